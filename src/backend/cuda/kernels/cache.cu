// Kernels of the cache. One launch carries out any number of steps of one kind: each step is a descriptor, each thread block
// takes one descriptor and one plane (keys or values of one layer) of it.
//
// Descriptors, payloads and outputs may lie in device memory or in page-locked host memory: kernels see addresses only.
// All arithmetic is IEEE f32 without contraction (compiled with --fmad=false), so the bytes are those of the CPU codecs.
// Kernels named `plain_*` do one element at a time and make no assumption on sizes or alignment; the others need
// rows of whole 16-byte vectors and fall back per descriptor where an address is not aligned.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

enum Element { F16 = 0, BF16 = 1, F32 = 2 };
enum Format { RAW = 0, INT8 = 1 };

// Mirrors `abi::Layout`. A raw block is [layer][K|V][kv_head][token][dim].
struct Layout {
    u32 layers, kv_heads, block_tokens, element;
    u32 dim[2], row_bytes[2];
    u32 element_bytes, scale_bytes;
    u64 plane_bytes[2];
    u64 layer_bytes;
    u64 scales_offset;
};

// Mirrors `abi::Append`: tokens of payload tensors [layers, source_tokens, kv_heads, dim] go to one raw slot.
struct Append {
    u64 source[2];
    u64 slot, flag;
    u32 source_tokens, first_layer, layers, first_token, tokens, padding;
};

// Mirrors `abi::Convert`: a whole block from one format to another. `flag` is set if an element is not finite.
struct Convert {
    u64 from, to, flag;
};

// Mirrors `abi::Read`: tokens of one layer of a slot go to [tokens, kv_heads, dim].
struct Read {
    u64 slot;
    u64 output[2];
    u32 layer, first_token, tokens, format;
};

// Mirrors `abi::Move`: bytes from one place to another, or zeros if `from` is 0.
struct Move {
    u64 from, to, bytes;
};

// Vectors that a thread of `move_blocks` has in flight, and threads of its blocks. Mirrored in kernels.rs.
#define MOVE_UNROLL 4
#define MOVE_THREADS 256

// ---------------------------------------------------------------------------------------------------------------------
// Finiteness by exponent: adding one to an exponent of all ones carries into the (masked out) sign bit.

__device__ __forceinline__ u32 exponent_mask(u32 element) {
    return element == F16 ? 0x7c007c00u : element == BF16 ? 0x7f807f80u : 0x7f800000u;
}

__device__ __forceinline__ u32 exponent_one(u32 element) {
    return element == F16 ? 0x04000400u : element == BF16 ? 0x00800080u : 0x00800000u;
}

struct Finite {
    u32 mask, one, seen;
    __device__ __forceinline__ explicit Finite(u32 element)
        : mask(exponent_mask(element)), one(exponent_one(element)), seen(0) {}
    __device__ __forceinline__ void word(u32 w) { seen |= (w & mask) + one; }
    __device__ __forceinline__ void vector(const uint4& v) { word(v.x), word(v.y), word(v.z), word(v.w); }
    __device__ __forceinline__ bool bad() const { return (seen & 0x80008000u) != 0; }
};

__device__ __forceinline__ void raise(u64 flag) { *(volatile u32*)flag = 1u; }

// ---------------------------------------------------------------------------------------------------------------------
// Elements

template <u32 E> __device__ __forceinline__ float load(const u8* at) {
    if (E == F16) return __half2float(*(const __half*)at);
    if (E == BF16) return __bfloat162float(*(const __nv_bfloat16*)at);
    return *(const float*)at;
}

template <u32 E> __device__ __forceinline__ void store(u8* at, float value) {
    if (E == F16) *(__half*)at = __float2half_rn(value);
    else if (E == BF16) *(__nv_bfloat16*)at = __float2bfloat16_rn(value);
    else *(float*)at = value;
}

template <u32 E> __device__ __forceinline__ float finite_max() {
    return E == F16 ? 65504.0f : __uint_as_float(E == BF16 ? 0x7f7f0000u : 0x7f7fffffu);
}

// Bits of |x| order like |x|, with infinity and NaN above everything finite.
template <u32 E> __device__ __forceinline__ float from_bits(u32 bits) {
    if (E == F16) return __half2float(__ushort_as_half((u16)bits));
    return __uint_as_float(E == BF16 ? bits << 16 : bits);
}

template <u32 E> __device__ __forceinline__ u32 infinity_bits() {
    return E == F16 ? 0x7c00u : E == BF16 ? 0x7f80u : 0x7f800000u;
}

// Rounds the ideal scale to the stored type and applies the floor; `abs_max` 0 gives the floor.
template <u32 E> __device__ __forceinline__ float stored_scale(float abs_max) {
    // For an f16 maximum the product rounds to the same f16 as the quotient: all 31,744 were compared (see kernels.rs).
    if (E == F16) return fmaxf(__half2float(__float2half_rn(__fmul_rn(abs_max, 0.007874015718698502f))), 5.9604644775390625e-8f);
    // Two steps of fused arithmetic round to the quotient (Markstein 1990): compared for all significands (see kernels.rs).
    const float near = __fmul_rn(abs_max, 0.007874015718698502f);
    const float scale = __fmaf_rn(__fmaf_rn(-127.0f, near, abs_max), 0.007874015718698502f, near);
    return fmaxf(scale, 7.888609052210118e-31f);
}

template <u32 E> __device__ __forceinline__ void write_scale(u8* at, float scale) {
    if (E == F16) *(__half*)at = __float2half_rn(scale);
    else *(float*)at = scale;
}

template <u32 E> __device__ __forceinline__ float read_scale(const u8* at) {
    if (E == F16) return __half2float(*(const __half*)at);
    return *(const float*)at;
}

// The code of `x`: half to even of the correctly rounded quotient.
__device__ __forceinline__ u32 code_exact(float x, float scale) {
    float q = rintf(__fdiv_rn(x, scale));
    return (u32)(int)fminf(fmaxf(q, -127.0f), 127.0f) & 0xffu;
}

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

// The low bytes of four words.
__device__ __forceinline__ u32 pack_bytes(u32 a, u32 b, u32 c, u32 d) {
    return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

// Code `i` of a word, exactly: 2^23 + 128 + code as a float, less what was added.
__device__ __forceinline__ float signed_code(u32 codes, u32 i) {
    const u32 bits = __byte_perm(codes ^ 0x80808080u, 0x4b000000u, 0x7540 + i);
    return __fsub_rn(__uint_as_float(bits), 8388736.0f);
}

// `code` is a whole number. Saturates.
template <u32 E> __device__ __forceinline__ float decoded(float code, float scale) {
    return fmaxf(fminf(__fmul_rn(code, scale), finite_max<E>()), -finite_max<E>());
}

// ---------------------------------------------------------------------------------------------------------------------
// Vectors of 16 bytes: 8 elements of 2 bytes or 4 of 4 bytes.

template <u32 E> struct Vector {
    static const u32 N = E == F32 ? 4 : 8;
};

template <u32 E> __device__ __forceinline__ void unpack(const uint4& v, float* x) {
    const u32 w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (E == F32) {
            x[i] = __uint_as_float(w[i]);
        } else if (E == BF16) {
            x[2 * i] = __uint_as_float(w[i] << 16);
            x[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
        } else {
            float2 pair = __half22float2(*(const __half2*)&w[i]);
            x[2 * i] = pair.x;
            x[2 * i + 1] = pair.y;
        }
    }
}

template <u32 E> __device__ __forceinline__ uint4 pack(const float* x) {
    u32 w[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (E == F32) {
            w[i] = __float_as_uint(x[i]);
        } else if (E == BF16) {
            __nv_bfloat162 pair = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
            w[i] = *(u32*)&pair;
        } else {
            __half2 pair = __floats2half2_rn(x[2 * i], x[2 * i + 1]);
            w[i] = *(u32*)&pair;
        }
    }
    return make_uint4(w[0], w[1], w[2], w[3]);
}

// The largest |x| of a vector as bits; a NaN or infinity gives bits of at least infinity.
template <u32 E> __device__ __forceinline__ u32 abs_max_bits(const uint4& v) {
    const u32 w[4] = {v.x, v.y, v.z, v.w};
    if (E == F32) {
        u32 m = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) m = max(m, w[i] & 0x7fffffffu);
        return m;
    }
    if (E == F16) {
        __half2 m = __habs2(*(const __half2*)&w[0]);
#pragma unroll
        for (int i = 1; i < 4; i++) m = __hmax2_nan(m, __habs2(*(const __half2*)&w[i]));
        u32 bits = *(u32*)&m;
        return max(bits & 0x7fffu, bits >> 16 & 0x7fffu);
    }
    __nv_bfloat162 m = __habs2(*(const __nv_bfloat162*)&w[0]);
#pragma unroll
    for (int i = 1; i < 4; i++) m = __hmax2_nan(m, __habs2(*(const __nv_bfloat162*)&w[i]));
    u32 bits = *(u32*)&m;
    return max(bits & 0x7fffu, bits >> 16 & 0x7fffu);
}

__device__ __forceinline__ bool aligned16(u64 a, u64 b) { return ((a | b) & 15) == 0; }

// ---------------------------------------------------------------------------------------------------------------------
// Append: scatter [tokens, kv_heads, dim] to [kv_head][token][dim], checking every element.

template <typename T>
__device__ __forceinline__ void append_rows(const Layout& L, const Append& a, u64 source, u64 target, u32 plane) {
    const u32 units = L.row_bytes[plane] / sizeof(T), heads = L.kv_heads, total = a.tokens * heads * units;
    Finite finite(L.element);
    for (u32 at = threadIdx.x; at < total; at += blockDim.x * 4) {
        T value[4];
        u32 to[4];
#pragma unroll
        for (u32 k = 0; k < 4; k++) {
            u32 i = at + k * blockDim.x, row = i / units, column = i - row * units;
            u32 token = row / heads, head = row - token * heads;
            to[k] = (head * L.block_tokens + token) * units + column;
            if (i < total) value[k] = ((const T*)source)[i];
        }
#pragma unroll
        for (u32 k = 0; k < 4; k++) {
            if (at + k * blockDim.x < total) {
                if (sizeof(T) == 16) finite.vector(*(const uint4*)&value[k]);
                else if (sizeof(T) == 4) finite.word(*(const u32*)&value[k]);
                else finite.word(*(const u16*)&value[k]);
                ((T*)target)[to[k]] = value[k];
            }
        }
    }
    if (finite.bad()) raise(a.flag);
}

__device__ __forceinline__ void append_block(const Layout& L, const Append& a, bool plain) {
    const u32 layer = blockIdx.y >> 1, plane = blockIdx.y & 1;
    if (layer >= a.layers) return;
    const u64 token_bytes = (u64)L.kv_heads * L.row_bytes[plane];
    const u64 source = a.source[plane] + (u64)layer * a.source_tokens * token_bytes;
    const u64 target = a.slot + (a.first_layer + layer) * L.layer_bytes + plane * L.plane_bytes[0]
        + (u64)a.first_token * L.row_bytes[plane];
    if (!plain && L.row_bytes[plane] % 16 == 0 && aligned16(source, target)) append_rows<uint4>(L, a, source, target, plane);
    else if (L.element_bytes == 4) append_rows<u32>(L, a, source, target, plane);
    else append_rows<u16>(L, a, source, target, plane);
}

extern "C" __global__ void append(Layout L, const Append* steps) { append_block(L, steps[blockIdx.x], false); }
extern "C" __global__ void plain_append(Layout L, const Append* steps) { append_block(L, steps[blockIdx.x], true); }

// ---------------------------------------------------------------------------------------------------------------------
// Seal to int8: abs-max, encode and finite check in one read. Rows of a plane are contiguous: [kv_head][token][dim].

struct Int8Plane {
    u64 raw, codes, scales;
    u32 rows, dim, row_bytes;
    __device__ __forceinline__ Int8Plane(const Layout& L, u64 raw_slot, u64 sealed_slot, u32 index) {
        const u32 layer = index >> 1, plane = index & 1;
        const u64 offset = layer * L.layer_bytes + plane * L.plane_bytes[0];
        rows = L.kv_heads * L.block_tokens;
        dim = L.dim[plane];
        row_bytes = L.row_bytes[plane];
        raw = raw_slot + offset;
        codes = sealed_slot + offset / L.element_bytes;
        scales = sealed_slot + L.scales_offset + (u64)index * rows * L.scale_bytes;
    }
    // Whether rows are whole vectors. The planes before this one may leave it at an odd address.
    __device__ __forceinline__ bool vectors() const {
        return ((row_bytes | raw) & 15) == 0 && (codes & 7) == 0;
    }
};

// The codes of a vector without the short cut. Rare, so it is kept out of the way of the others.
template <u32 E> __device__ __noinline__ uint2 codes_exact(uint4 v, float scale) {
    float x[Vector<E>::N];
    unpack<E>(v, x);
    uint2 codes = make_uint2(0, 0);
#pragma unroll
    for (u32 i = 0; i < Vector<E>::N; i++) (i < 4 ? codes.x : codes.y) |= code_exact(x[i], scale) << 8 * (i % 4);
    return codes;
}

// Rows that a thread of a seal has on their way at once.
#ifndef SEAL_UNROLL
#define SEAL_UNROLL 8
#endif

// Scales of `count` consecutive rows.
template <u32 E> __device__ __forceinline__ void write_scales(u64 at, const float* scales, u32 count) {
    const u32 N = E == F16 ? 8 : 4;
    if (count == SEAL_UNROLL && SEAL_UNROLL % N == 0 && (at & 15) == 0) {
#pragma unroll
        for (u32 first = 0; first < SEAL_UNROLL; first += N) {
            const uint4 v = pack<E == F16 ? F16 : F32>(scales + first);
            __stcs((uint4*)at + first / N, v);
        }
        return;
    }
#pragma unroll
    for (u32 k = 0; k < SEAL_UNROLL; k++) {
        if (k < count) write_scale<E>((u8*)at + k * (E == F16 ? 2 : 4), scales[k]);
    }
}

// One row by LANES threads, each with one vector; UNROLL consecutive rows a thread so that enough loads are under way.
template <u32 E, u32 LANES>
__device__ __forceinline__ void seal_plane(const Layout& L, const Convert& s) {
    const u32 UNROLL = SEAL_UNROLL, N = Vector<E>::N;
    const Int8Plane p(L, s.from, s.to, blockIdx.y);
    const u32 lane = threadIdx.x % LANES, group = threadIdx.x / LANES, groups = blockDim.x / LANES;
    const bool active = lane * 16 < p.row_bytes;
    bool bad = false;
    // The whole block takes every turn: shuffles need all lanes of a warp.
    for (u32 first = 0; first < p.rows; first += groups * UNROLL) {
        const u32 row = first + group * UNROLL, count = row < p.rows ? min(p.rows - row, UNROLL) : 0;
        const u64 from = p.raw + (u64)row * p.row_bytes + lane * 16;
        const u64 to = p.codes + (u64)row * p.dim + lane * N;
        uint4 v[UNROLL];
        float scales[UNROLL];
#pragma unroll
        for (u32 k = 0; k < UNROLL; k++) {
            v[k] = make_uint4(0, 0, 0, 0);
            if (active && k < count) v[k] = __ldcs((const uint4*)(from + k * p.row_bytes));
        }
#pragma unroll
        for (u32 k = 0; k < UNROLL; k++) {
            u32 most = abs_max_bits<E>(v[k]);
#pragma unroll
            for (u32 step = LANES / 2; step > 0; step /= 2) most = max(most, __shfl_xor_sync(0xffffffffu, most, step));
            const bool finite = most < infinity_bits<E>();
            bad |= !finite;
            const float scale = stored_scale<E>(finite ? from_bits<E>(most) : 0.0f);
            scales[k] = scale;
            float x[N];
            unpack<E>(v[k], x);
            Quantiser<E> q(scale);
            u32 code[8];
#pragma unroll
            for (u32 i = 0; i < N; i++) code[i] = q.code(x[i]);
            uint2 codes = make_uint2(pack_bytes(code[0], code[1], code[2], code[3]), 0);
            if (N == 8) codes.y = pack_bytes(code[4], code[5], code[6], code[7]);
            if (q.exact) codes = codes_exact<E>(v[k], scale);
            if (!finite) codes = make_uint2(0, 0);
            if (active && k < count) {
                if (N == 8) __stcs((uint2*)(to + k * p.dim), codes);
                else __stcs((u32*)(to + k * p.dim), codes.x);
            }
        }
        if (lane == 0 && count > 0) write_scales<E>(p.scales + (u64)row * L.scale_bytes, scales, count);
    }
    if (bad) raise(s.flag);
}

template <u32 E>
__device__ __forceinline__ void plain_seal_plane(const Layout& L, const Convert& s) {
    const Int8Plane p(L, s.from, s.to, blockIdx.y);
    for (u32 row = threadIdx.x; row < p.rows; row += blockDim.x) {
        const u8* raw = (const u8*)p.raw + (u64)row * p.row_bytes;
        float most = 0.0f;
        bool finite = true;
        for (u32 i = 0; i < p.dim; i++) {
            const float x = load<E>(raw + i * L.element_bytes);
            finite &= fabsf(x) <= finite_max<F32>();
            most = fmaxf(most, fabsf(x));
        }
        const float scale = stored_scale<E>(finite ? most : 0.0f);
        for (u32 i = 0; i < p.dim; i++) {
            ((u8*)p.codes)[(u64)row * p.dim + i] =
                finite ? (u8)code_exact(load<E>(raw + i * L.element_bytes), scale) : 0;
        }
        write_scale<E>((u8*)p.scales + (u64)row * L.scale_bytes, scale);
        if (!finite) raise(s.flag);
    }
}

// The widest row that seal_plane takes is 32 vectors; wider ones and odd ones are the plain kernel's.
template <u32 E>
__device__ __forceinline__ void seal_block(const Layout& L, const Convert& s) {
    const u32 row_bytes = L.row_bytes[blockIdx.y & 1];
    if (row_bytes > 512 || !Int8Plane(L, s.from, s.to, blockIdx.y).vectors()) plain_seal_plane<E>(L, s);
    else if (row_bytes > 256) seal_plane<E, 32>(L, s);
    else if (row_bytes > 128) seal_plane<E, 16>(L, s);
    else if (row_bytes > 64) seal_plane<E, 8>(L, s);
    else seal_plane<E, 4>(L, s);
}

// ---------------------------------------------------------------------------------------------------------------------
// Decode

// The codes of one vector: 8 bytes, or 4 of which the second word is not used.
template <u32 E> __device__ __forceinline__ uint2 load_codes(u64 at) {
    if (E == F32) return make_uint2(__ldcs((const u32*)at), 0);
    return __ldcs((const uint2*)at);
}

template <u32 E>
__device__ __forceinline__ uint4 decode_vector(uint2 codes, float scale) {
    const u32 N = Vector<E>::N;
    float x[N];
#pragma unroll
    for (u32 i = 0; i < N; i++) x[i] = signed_code(i < 4 ? codes.x : codes.y, i % 4);
    // Saturation is for scales that 127 does not fit under: the same for a whole row.
    if (scale > finite_max<E>() / 128.0f) {
#pragma unroll
        for (u32 i = 0; i < N; i++) x[i] = decoded<E>(x[i], scale);
    } else {
#pragma unroll
        for (u32 i = 0; i < N; i++) x[i] = __fmul_rn(x[i], scale);
    }
    return pack<E>(x);
}

// Vectors that a thread has on their way at once when it decodes.
#ifndef DECODE_UNROLL
#define DECODE_UNROLL 8
#endif

// Each thread keeps to one column of vectors, so that no index is divided inside the loops.
struct Columns {
    u32 column, row, rows_at_once;
    bool active;
    __device__ __forceinline__ explicit Columns(u32 per_row) {
        rows_at_once = blockDim.x / per_row;
        row = threadIdx.x / per_row;
        column = threadIdx.x - row * per_row;
        active = row < rows_at_once;
    }
};

// Decodes a whole plane back to rows as they were.
template <u32 E>
__device__ __forceinline__ void reopen_plane(const Layout& L, const Convert& s, bool plain) {
    const Int8Plane p(L, s.to, s.from, blockIdx.y);
    const u32 N = Vector<E>::N, per_row = p.dim / N;
    if (!plain && p.vectors() && per_row <= blockDim.x) {
        const Columns c(per_row);
        if (!c.active) return;
        for (u32 first = c.row; first < p.rows; first += c.rows_at_once * DECODE_UNROLL) {
            uint2 codes[DECODE_UNROLL];
            float scale[DECODE_UNROLL];
#pragma unroll
            for (u32 k = 0; k < DECODE_UNROLL; k++) {
                const u32 row = min(first + k * c.rows_at_once, p.rows - 1);
                codes[k] = load_codes<E>(p.codes + (u64)row * p.dim + c.column * N);
                scale[k] = read_scale<E>((const u8*)p.scales + (u64)row * L.scale_bytes);
            }
#pragma unroll
            for (u32 k = 0; k < DECODE_UNROLL; k++) {
                const u32 row = first + k * c.rows_at_once;
                if (row < p.rows) __stcs((uint4*)(p.raw + (u64)row * p.row_bytes) + c.column, decode_vector<E>(codes[k], scale[k]));
            }
        }
        return;
    }
    for (u32 i = threadIdx.x; i < p.rows * p.dim; i += blockDim.x) {
        const float scale = read_scale<E>((const u8*)p.scales + (u64)(i / p.dim) * L.scale_bytes);
        store<E>((u8*)p.raw + (u64)i * L.element_bytes, decoded<E>(((const signed char*)p.codes)[i], scale));
    }
}

// Gathers and decodes tokens of one layer: [kv_head][token][dim] to [tokens, kv_heads, dim].
template <u32 E>
__device__ __forceinline__ void read_plane(const Layout& L, const Read& r, bool plain) {
    const u32 plane = blockIdx.y, heads = L.kv_heads, N = Vector<E>::N, row_bytes = L.row_bytes[plane];
    // One slot, looked at as raw and as sealed: `format` says which it is.
    const Int8Plane p(L, r.slot, r.slot, 2 * r.layer + plane);
    const u64 output = r.output[plane];
    const u32 rows = r.tokens * heads, per_row = row_bytes / 16;
    if (!plain && p.vectors() && (output & 15) == 0 && per_row <= blockDim.x) {
        const Columns c(per_row);
        if (!c.active) return;
        const u32 parts = gridDim.z;
        for (u32 first = c.row + blockIdx.z * c.rows_at_once * DECODE_UNROLL; first < rows;
             first += parts * c.rows_at_once * DECODE_UNROLL) {
            uint4 v[DECODE_UNROLL];
            u64 to[DECODE_UNROLL];
            float scale[DECODE_UNROLL];
#pragma unroll
            for (u32 k = 0; k < DECODE_UNROLL; k++) {
                const u32 at = min(first + k * c.rows_at_once, rows - 1), head = at / r.tokens, token = at - head * r.tokens;
                const u32 row = head * L.block_tokens + r.first_token + token;
                to[k] = output + ((u64)token * heads + head) * row_bytes;
                if (r.format == INT8) {
                    const uint2 codes = load_codes<E>(p.codes + (u64)row * p.dim + c.column * N);
                    v[k].x = codes.x, v[k].y = codes.y;
                    scale[k] = read_scale<E>((const u8*)p.scales + (u64)row * L.scale_bytes);
                } else {
                    v[k] = __ldcs((const uint4*)(p.raw + (u64)row * row_bytes) + c.column);
                }
            }
#pragma unroll
            for (u32 k = 0; k < DECODE_UNROLL; k++) {
                if (first + k * c.rows_at_once >= rows) continue;
                if (r.format == INT8) v[k] = decode_vector<E>(make_uint2(v[k].x, v[k].y), scale[k]);
                __stcs((uint4*)to[k] + c.column, v[k]);
            }
        }
        return;
    }
    for (u32 i = threadIdx.x + blockIdx.z * blockDim.x; i < rows * p.dim; i += gridDim.z * blockDim.x) {
        const u32 at = i / p.dim, column = i - at * p.dim, head = at / r.tokens, token = at - head * r.tokens;
        const u32 row = head * L.block_tokens + r.first_token + token;
        u8* to = (u8*)output + ((u64)token * heads + head) * row_bytes + column * L.element_bytes;
        if (r.format == INT8) {
            const float scale = read_scale<E>((const u8*)p.scales + (u64)row * L.scale_bytes);
            store<E>(to, decoded<E>(((const signed char*)p.codes)[(u64)row * p.dim + column], scale));
        } else if (L.element_bytes == 4) {
            *(u32*)to = ((const u32*)(p.raw + (u64)row * row_bytes))[column];
        } else {
            *(u16*)to = ((const u16*)(p.raw + (u64)row * row_bytes))[column];
        }
    }
}

#define KERNELS(E, NAME)                                                                                                         \
    extern "C" __global__ void seal_##NAME(Layout L, const Convert* s) { seal_block<E>(L, s[blockIdx.x]); }                      \
    extern "C" __global__ void plain_seal_##NAME(Layout L, const Convert* s) { plain_seal_plane<E>(L, s[blockIdx.x]); }          \
    extern "C" __global__ void reopen_##NAME(Layout L, const Convert* s) { reopen_plane<E>(L, s[blockIdx.x], false); }           \
    extern "C" __global__ void plain_reopen_##NAME(Layout L, const Convert* s) { reopen_plane<E>(L, s[blockIdx.x], true); }      \
    extern "C" __global__ void read_##NAME(Layout L, const Read* r) { read_plane<E>(L, r[blockIdx.x], false); }                  \
    extern "C" __global__ void plain_read_##NAME(Layout L, const Read* r) { read_plane<E>(L, r[blockIdx.x], true); }

KERNELS(F16, f16)
KERNELS(BF16, bf16)
KERNELS(F32, f32)

// ---------------------------------------------------------------------------------------------------------------------
// Moves: whole blocks between slots, and between device memory and page-locked host memory. Zeroing is a move from nowhere.

__device__ __forceinline__ void move_vectors(const Move& m, u32 part, u32 parts) {
    const u64 vectors = m.bytes / 16;
    const uint4* from = (const uint4*)m.from;
    uint4* to = (uint4*)m.to;
    const u64 stride = (u64)parts * blockDim.x * MOVE_UNROLL;
    for (u64 first = (u64)part * blockDim.x * MOVE_UNROLL + threadIdx.x; first < vectors; first += stride) {
        uint4 v[MOVE_UNROLL];
#pragma unroll
        for (u32 k = 0; k < MOVE_UNROLL; k++) {
            const u64 i = first + k * blockDim.x;
            v[k] = make_uint4(0, 0, 0, 0);
            if (from && i < vectors) v[k] = __ldcs(from + i);
        }
#pragma unroll
        for (u32 k = 0; k < MOVE_UNROLL; k++) {
            const u64 i = first + k * blockDim.x;
            if (i < vectors) __stcs(to + i, v[k]);
        }
    }
}

__device__ __forceinline__ void move_bytes(const Move& m, u64 start, u32 part, u32 parts) {
    for (u64 i = start + (u64)part * blockDim.x + threadIdx.x; i < m.bytes; i += (u64)parts * blockDim.x) {
        ((u8*)m.to)[i] = m.from ? ((const u8*)m.from)[i] : 0;
    }
}

extern "C" __global__ void move_blocks(const Move* moves) {
    const Move m = moves[blockIdx.x];
    if (aligned16(m.from, m.to)) {
        move_vectors(m, blockIdx.y, gridDim.y);
        move_bytes(m, m.bytes / 16 * 16, blockIdx.y, gridDim.y);
    } else {
        move_bytes(m, 0, blockIdx.y, gridDim.y);
    }
}

extern "C" __global__ void plain_move_blocks(const Move* moves) { move_bytes(moves[blockIdx.x], 0, blockIdx.y, gridDim.y); }

// Bytes that a warp of `carry_blocks` has in flight. Mirrored in kernels.rs.
#define CARRY_BYTES 4096

// Up to CARRY_BYTES bytes by one warp.
__device__ __forceinline__ void carry_piece(u64 from, u64 to, u32 bytes, u32 lane) {
    const bool vectors = aligned16(from, to);
    if (vectors && bytes == CARRY_BYTES) {
        uint4 v[CARRY_BYTES / 512];
#pragma unroll
        for (u32 k = 0; k < CARRY_BYTES / 512; k++) v[k] = __ldcs((const uint4*)from + k * 32 + lane);
#pragma unroll
        for (u32 k = 0; k < CARRY_BYTES / 512; k++) ((uint4*)to)[k * 32 + lane] = v[k];
        return;
    }
    const u32 whole = vectors ? bytes / 16 * 16 : 0;
    for (u32 at = lane * 16; at < whole; at += 512) *(uint4*)(to + at) = __ldcs((const uint4*)(from + at));
    for (u32 at = whole + lane; at < bytes; at += 32) ((u8*)to)[at] = ((const u8*)from)[at];
}

// Copies by as few thread blocks as the launch has: for bytes that cross PCIe, which a few warps saturate. Every warp takes a
// run of pieces, and its lanes fetch the descriptors of 32 of them at once, since those lie behind PCIe too.
extern "C" __global__ void carry_blocks(const Move* moves, u32 count, u32 parts) {
    const u32 lane = threadIdx.x % 32;
    const u64 warp = (u64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, warps = (u64)gridDim.x * (blockDim.x / 32);
    const u64 pieces = (u64)count * parts, end = pieces * (warp + 1) / warps;
    for (u64 first = pieces * warp / warps; first < end; first += 32) {
        u64 from = 0, to = 0;
        u32 bytes = 0;
        if (first + lane < end) {
            const u64 index = (first + lane) / parts, offset = (first + lane - index * parts) * CARRY_BYTES;
            const Move m = moves[index];
            from = m.from + offset;
            to = m.to + offset;
            if (offset < m.bytes) bytes = (u32)min(m.bytes - offset, (u64)CARRY_BYTES);
        }
        const u32 fetched = (u32)min(end - first, (u64)32);
        for (u32 k = 0; k < fetched; k++) {
            carry_piece(__shfl_sync(0xffffffffu, from, k), __shfl_sync(0xffffffffu, to, k),
                        __shfl_sync(0xffffffffu, bytes, k), lane);
        }
    }
}

extern "C" __global__ void plain_carry_blocks(const Move* moves, u32 count, u32) {
    for (u32 index = blockIdx.x; index < count; index += gridDim.x) move_bytes(moves[index], 0, 0, 1);
}

// Says that everything before it on its stream is done.
extern "C" __global__ void signal(volatile u64* word, u64 value) {
    __threadfence_system();
    *word = value;
}
