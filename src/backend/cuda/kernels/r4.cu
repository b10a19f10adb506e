#define BITS 4
#include "rotated.cuh"
