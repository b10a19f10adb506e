// `fp8`: one e4m3 float an element, one scale a row.

#include "common.cuh"

struct Code {
    static constexpr float BOUND = 512.0f;

    // Rounds abs_max / 448 to the stored type and applies the floor. Two steps of fused arithmetic round to the quotient (Markstein 1990): compared for
    // all significands (see kernels/tests.rs).
    template <u32 E> static __device__ __forceinline__ float stored_scale(float abs_max) {
        const float near = __fmul_rn(abs_max, 0.0022321429569274187f);
        const float scale = __fmaf_rn(__fmaf_rn(-448.0f, near, abs_max), 0.0022321429569274187f, near);
        if (E == F16) return fmaxf(__half2float(__float2half_rn(scale)), scale_floor<E>());
        return fmaxf(scale, scale_floor<E>());
    }

    static __device__ __forceinline__ u32 of(float x) {
        const u32 bits = __float_as_uint(x), magnitude = bits & 0x7fffffffu;
        // Drops 20 of 23 bits of the mantissa, half to even; the bias becomes 7 instead of 127.
        const u32 normal = (magnitude + 0x7ffffu + (magnitude >> 20 & 1)) >> 20;
        // Below 2^-6 numbers are multiples of 2^-9: adding 2^14 rounds to one and leaves how many in the low bits.
        const u32 steps = __float_as_uint(__fadd_rn(__uint_as_float(magnitude), 16384.0f)) & 0xffu;
        const u32 code = magnitude < 0x3c800000u ? steps : min(normal - ((127 - 7) << 3), 0x7eu);
        return code | (bits >> 24 & 0x80u);
    }

    static __device__ __forceinline__ u32 exact(float x, float scale) { return of(__fmul_rn(x, __frcp_rn(scale))); }

    // As an f32 of the same fields a code is too small by 2^120, also where it is subnormal.
    static __device__ __forceinline__ float value(u32 codes, u32 i) {
        const u32 code = codes >> 8 * i;
        return __fmul_rn(__uint_as_float((code & 0x7fu) << 20 | (code & 0x80u) << 24), 1.329227995784916e36f);
    }
};

// The same of finite numbers that no code is too small for, by additions, which are cheaper than shifts. What is added to a number has room for three bits
// behind its first, or for multiples of 2^-9: taken off again it leaves the number rounded. The answer has the code without its sign in bits 20 to 26.
template <u32 E> struct Quantiser {
    float inverse;
    // A subnormal scale may be so coarse that codes have to be clamped.
    bool exact;
    __device__ __forceinline__ explicit Quantiser(float scale) : inverse(reciprocal<E>(scale)), exact(E == F16 && scale < 6.103515625e-5f) {}
    static __device__ __forceinline__ u32 word(const u32* codes, u32 signs) {
        return codes[0] >> 20 | codes[1] >> 12 | codes[2] >> 4 | codes[3] << 4 | signs & 0x80808080u;
    }
    __device__ __forceinline__ u32 code(float x) {
        const float magnitude = fabsf(__fmul_rn(x, inverse));
        const float far = __uint_as_float(max(__float_as_uint(magnitude) & 0x7f800000u, 0x3c800000u) + (20u << 23));
        return __float_as_uint(__fmul_rn(__fsub_rn(__fadd_rn(magnitude, far), far), 7.52316384526264e-37f));
    }
};

#include "scaled.cuh"
