#define CENTRED 1
#include "r3.cu"
