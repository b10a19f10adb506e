// bfloat16 for a host compiler, as far as the kernels use it.

#pragma once

struct __nv_bfloat16 {
    unsigned short bits;
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};

inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float((unsigned)x.bits << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    const unsigned bits = __float_as_uint(x);
    // Half to even; all that are no numbers are one.
    return {(unsigned short)(x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)}; }

inline __nv_bfloat162 __hmax2_nan(__nv_bfloat162 a, __nv_bfloat162 b) {
    const auto larger = [](unsigned x, unsigned y) { return __nv_bfloat16{(unsigned short)extreme(x, y, 0x7f80, true)}; };
    return {larger(a.x.bits, b.x.bits), larger(a.y.bits, b.y.bits)};
}
