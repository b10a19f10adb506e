#define BITS 3
#include "rotated.cuh"
