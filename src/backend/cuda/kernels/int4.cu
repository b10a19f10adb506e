#define BITS 4
#include "grouped.cuh"
