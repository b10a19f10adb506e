#define CENTRED 1
#include "r4.cu"
