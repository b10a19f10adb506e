#define CENTRED 1
#include "int2.cu"
