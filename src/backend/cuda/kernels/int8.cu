// `int8`: one signed byte an element, one scale a row.

#include "common.cuh"

struct Code {
    // More than any code: below the largest number of an element type over this, no scale needs saturation.
    static constexpr float BOUND = 128.0f;

    // Rounds abs_max / 127 to the stored type and applies the floor.
    template <u32 E> static __device__ __forceinline__ float stored_scale(float abs_max) {
        // For an f16 maximum the product rounds to the same f16 as the quotient: all 31,744 were compared (see kernels/tests.rs).
        const float near = __fmul_rn(abs_max, 0.007874015718698502f);
        if (E == F16) return fmaxf(__half2float(__float2half_rn(near)), scale_floor<E>());
        // Two steps of fused arithmetic round to the quotient (Markstein 1990): compared for all significands (see kernels/tests.rs).
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

// The same without dividing, for scales that leave codes within their bounds: a subnormal f16 may not.
//
// The quotient of two f16 is n + 1/2 or at least 2^-12 from it: twice the element and (2n + 1) scales differ by nothing or by half a last place of the scale.
// The product with the reciprocal is 2^-16 from it at most; beside 1536 that is rounded to 13 bits of fraction, so that what is half is again,
// and what is not stays on its side. Other elements get the quotient itself, rounded: the remainder is exact and corrects it (Markstein 1990).
template <u32 E> struct Quantiser {
    float inverse, scale;
    bool exact;
    __device__ __forceinline__ explicit Quantiser(float scale)
        : inverse(reciprocal<E>(scale)), scale(scale), exact(E == F16 && scale < 6.103515625e-5f) {}
    static __device__ __forceinline__ u32 word(const u32* codes, u32) {
        return __byte_perm(__byte_perm(codes[0], codes[1], 0x0040), __byte_perm(codes[2], codes[3], 0x0040), 0x5410);
    }
    // 1.5 * 2^23: adding it rounds to an integer and leaves that in the low bits.
    __device__ __forceinline__ u32 code(float x) {
        if (E == F16) return __float_as_uint(__fadd_rn(__fmaf_rn(x, inverse, 1536.0f), 12582912.0f - 1536.0f));
        const float near = __fmul_rn(x, inverse);
        return __float_as_uint(__fadd_rn(__fmaf_rn(__fmaf_rn(-near, scale, x), inverse, near), 12582912.0f));
    }
};

#include "scaled.cuh"
