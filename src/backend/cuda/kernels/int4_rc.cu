#define CENTRED 1
#include "int4.cu"
