#define CENTRED 1
#include "r2.cu"
