// `int8`: one signed byte an element, one scale a row.

#include "common.cuh"

struct Code {
    // More than any code: below the largest number of an element type over this, no scale needs saturation.
    static constexpr float BOUND = 128.0f;

    // Rounds abs_max / 127 to the stored type and applies the floor.
    template <u32 E> static __device__ __forceinline__ float stored_scale(float abs_max) {
        // For an f16 maximum the product rounds to the same f16 as the quotient: all 31,744 were compared (see kernels.rs).
        const float near = __fmul_rn(abs_max, 0.007874015718698502f);
        if (E == F16) return fmaxf(__half2float(__float2half_rn(near)), scale_floor<E>());
        // Two steps of fused arithmetic round to the quotient (Markstein 1990): compared for all significands (see kernels.rs).
        const float scale = __fmaf_rn(__fmaf_rn(-127.0f, near, abs_max), 0.007874015718698502f, near);
        return fmaxf(scale, scale_floor<E>());
    }

    // Half to even of the correctly rounded quotient.
    static __device__ __forceinline__ u32 exact(float x, float scale) {
        float q = rintf(__fdiv_rn(x, scale));
        return (u32)(int)fminf(fmaxf(q, -127.0f), 127.0f) & 0xffu;
    }

    // Code `i` of a word as a number, exactly: 2^23 + 128 + code as a float, less what was added.
    static __device__ __forceinline__ float value(u32 codes, u32 i) {
        const u32 bits = __byte_perm(codes ^ 0x80808080u, 0x4b000000u, 0x7540 + i);
        return __fsub_rn(__uint_as_float(bits), 8388736.0f);
    }
};

// The same without dividing. x times an approximate reciprocal is within 3e-5 of the quotient, so both round alike unless
// the product is that close to a tie, or the scale so coarse (a subnormal f16) that codes need clamping: about one element in ten
// thousand, for which `exact` says that it has to be done over. So nothing approximate reaches a byte.
template <u32 E> struct Quantiser {
    float inverse;
    bool exact;
    __device__ __forceinline__ explicit Quantiser(float scale) : exact(E == F16 && scale < 6.103515625e-5f) {
        asm("rcp.approx.f32 %0, %1;" : "=f"(inverse) : "f"(scale));
    }
    // 1.5 * 2^23: adding it rounds to an integer and leaves that in the low bits.
    __device__ __forceinline__ u32 code(float x) {
        const float shifted = __fmaf_rn(x, inverse, 12582912.0f);
        const float off = __fmaf_rn(x, inverse, -__fsub_rn(shifted, 12582912.0f));
        exact |= fabsf(off) > 0.49993f;
        return __float_as_uint(shifted);
    }
};

#include "scaled.cuh"
