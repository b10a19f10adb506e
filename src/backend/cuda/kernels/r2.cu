#define BITS 2
#include "rotated.cuh"
