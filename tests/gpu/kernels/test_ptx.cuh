// What C++ has no words for, apart: see src/backend/cuda/kernels/ptx.cuh.

__device__ __forceinline__ u64 nanoseconds() {
    u64 now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    return now;
}

// A sticky error: the context is lost.
__device__ __forceinline__ void trap() { asm("trap;"); }
