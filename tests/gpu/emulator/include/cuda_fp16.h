// Half-precision floats for a host compiler, as far as the kernels use them. Needs -mf16c, which rounds as GPUs do.

#pragma once

struct __half {
    unsigned short bits;
};
struct alignas(4) __half2 {
    __half x, y;
};

inline float __half2float(__half x) { return (float)std::bit_cast<_Float16>(x.bits); }
inline __half __float2half_rn(float x) {
    // All that are no numbers are one.
    return {(unsigned short)(x != x ? 0x7fff : std::bit_cast<unsigned short>((_Float16)x))};
}
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline float2 __half22float2(__half2 pair) { return {__half2float(pair.x), __half2float(pair.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }

inline __half2 __hmax2_nan(__half2 a, __half2 b) {
    const auto larger = [](unsigned x, unsigned y) { return __half{(unsigned short)extreme(x, y, 0x7c00, true)}; };
    return {larger(a.x.bits, b.x.bits), larger(a.y.bits, b.y.bits)};
}
