#define CENTRED 1
#include "fp8.cu"
