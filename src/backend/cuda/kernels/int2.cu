#define BITS 2
#include "grouped.cuh"
