// Instructions that C++ has no words for: all of the inline PTX of the kernels. Kernels that run without a GPU (tests/gpu/emulator) get others of the
// same names in place of these.

// An address in shared memory, as instructions take it.
typedef u32 SharedAddress;
__device__ __forceinline__ SharedAddress shared_address(const void* at) { return (u32)__cvta_generic_to_shared(at); }

// One over a number, off by one in the last place at most. Subnormal numbers are zeros.
__device__ __forceinline__ float near_reciprocal(float x) {
    float near;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(near) : "f"(x));
    return near;
}

// Four numbers from shared memory as one vector: the compiler would take some apart, and not the same ones each time.
__device__ __forceinline__ void load_shared(const float* from, float* to) {
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3])
                 : "r"(shared_address(from)));
}

// Four words from shared memory, when they are needed: the compiler would rather keep them all.
__device__ __forceinline__ uint4 load_shared(const u32* from) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(shared_address(from)));
    return v;
}

// Four numbers of a table in device memory, when they are needed.
__device__ __forceinline__ void load_constant(const float* from, float* to) {
    asm volatile("ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3]) : "l"(from));
}

// 16 bytes on their way to shared memory, or zeros.
__device__ __forceinline__ void fetch_shared(SharedAddress to, u64 from, bool some) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(some ? 16u : 0u) : "memory");
}
// All that this thread has on their way are there.
__device__ __forceinline__ void await_shared() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// The two smaller (larger) of each pair of elements in a word; NaN if there is one.
#define EXTREMES(NAME, INSTRUCTION) \
    template <u32 E> __device__ __forceinline__ u32 NAME(u32 a, u32 b) { \
        u32 out; \
        if (E == F16) asm(INSTRUCTION ".NaN.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b)); \
        else if (E == BF16) asm(INSTRUCTION ".NaN.bf16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b)); \
        else asm(INSTRUCTION ".NaN.f32 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b)); \
        return out; \
    }
EXTREMES(lesser, "min")
EXTREMES(greater, "max")
