#define CENTRED 1
#include "int8.cu"
