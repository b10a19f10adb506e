// What all kernels share: descriptors, elements, vectors of 16 bytes, and reads of raw rows.
//
// One launch carries out any number of steps of one kind: each step is a descriptor, each thread block takes one descriptor and
// one plane (keys or values of one layer) of it, neighbours those that lie beside each other. Descriptors, payloads and outputs may lie in device memory or in page-locked host
// memory: kernels see addresses only. All arithmetic is IEEE f32 without contraction (compiled with --fmad=false), so the bytes
// are those of the CPU codecs. Kernels named `plain_*` make no assumption on sizes or alignment; the others need rows
// of whole 16-byte vectors and fall back per descriptor where an address is not aligned.
//
// A format is a source file of its own, and a module: it has `seal_*`, `reopen_*` and `read_*` for each element type, of which the
// last takes raw blocks too. NVRTC gets one file at a time, so those with more than one user are headers.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

enum Element { F16 = 0, BF16 = 1, F32 = 2 };
// Mirrors `abi::CentreTables`.
struct CentreTables {
    u64 means, block_turns, token_turns;
    u32 pairs, apart;
};

// Mirrors `abi::Layout`. A raw block is [layer][K|V][kv_head][token][dim], `row_bytes` a row; a sealed one has `code_bytes` a row in
// the same order, and behind them all scales in the order of the rows: `scale_bytes` for a row, or for KEY_SCALE_ROWS rows of keys.
// Planes are counted keys, values, keys of the next layer, …: a launch takes `planes` of them from `first_plane` on, `plane_step` apart.
// Those of a layer have their codes at `codes_at` and their scales at `scales_at`, by kind, as if all layers were coded.
struct Layout {
    u32 layers, kv_heads, block_tokens, element;
    u32 dim[2], row_bytes[2], code_bytes[2];
    u32 element_bytes, scale_bytes[2], first_plane, plane_step, planes;
    u64 plane_bytes[2];
    u64 layer_bytes;
    u64 codes_at[2], codes_layer;
    u64 scales_at[2], scales_layer;
    CentreTables centres;
};

// The step of a thread block that converts, and its plane, over all layers; and that of a read, which has one layer.
__device__ __forceinline__ u32 step_of() { return blockIdx.y; }
__device__ __forceinline__ u32 plane_of(const Layout& L) { return L.first_plane + blockIdx.x * L.plane_step; }
__device__ __forceinline__ u32 plane_of_read(const Layout& L) { return L.first_plane % 2 + blockIdx.y; }

// Mirrors `abi::Append`: tokens of payload tensors [layers, source_tokens, kv_heads, dim] go to one raw slot.
struct Append {
    u64 source[2];
    u64 slot, flag;
    u32 source_tokens, first_layer, layers, first_token, tokens, padding;
};

// Mirrors `abi::Convert`: block `index` of a sequence from one format to another. `flag` is set if an element is not finite.
struct Convert {
    u64 from, to, flag, index;
};

// Mirrors `abi::Read`: tokens of one layer of a slot, block `index` of a sequence, go to [tokens, kv_heads, dim]. Keys are raw if the first
// bit of `raw` is set, values if the second is: they lie then as in a raw block at their `slot`.
struct Read {
    u64 slot[2];
    u64 output[2];
    u32 layer, first_token, tokens, raw;
    u64 index;
};

// Mirrors `abi::Move`: bytes from one place to another, or zeros if `from` is 0.
struct Move {
    u64 from, to, bytes;
};

// The descriptor of a thread block, once for all of its threads: it may lie in host memory, which has other things to do than to tell each
// warp the same.
template <typename Step> __device__ __forceinline__ const Step& fetched(const Step* step) {
    __shared__ Step here;
    static_assert(sizeof(Step) % sizeof(u64) == 0 && sizeof(Step) / sizeof(u64) <= 32, "a word for each thread of a warp");
    if (threadIdx.x < sizeof(Step) / sizeof(u64)) ((u64*)&here)[threadIdx.x] = ((const u64*)step)[threadIdx.x];
    __syncthreads();
    return here;
}

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

// As it is after it was stored.
template <u32 E> __device__ __forceinline__ float rounded(float value) {
    if (E == F16) return __half2float(__float2half_rn(value));
    if (E == BF16) return __bfloat162float(__float2bfloat16_rn(value));
    return value;
}

template <u32 E> __device__ __forceinline__ float finite_max() {
    return E == F16 ? 65504.0f : __uint_as_float(E == BF16 ? 0x7f7f0000u : 0x7f7fffffu);
}

// Saturates, and takes a NaN for a number that is too large.
template <u32 E> __device__ __forceinline__ float saturated(float x) {
    return fmaxf(fminf(x, finite_max<E>()), -finite_max<E>());
}

// The least scale: the smallest positive f16, or 2^-100.
template <u32 E> __device__ __forceinline__ float scale_floor() { return E == F16 ? 5.9604644775390625e-8f : 7.888609052210118e-31f; }

// Bits of |x| order like |x|, with infinity and NaN above everything finite.
template <u32 E> __device__ __forceinline__ float from_bits(u32 bits) {
    if (E == F16) return __half2float(__ushort_as_half((u16)bits));
    return __uint_as_float(E == BF16 ? bits << 16 : bits);
}

template <u32 E> __device__ __forceinline__ u32 infinity_bits() {
    return E == F16 ? 0x7c00u : E == BF16 ? 0x7f80u : 0x7f800000u;
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
    // Signs are masked out: what the library has for it takes halves apart.
    u32 bits = w[0] & 0x7fff7fffu;
#pragma unroll
    for (int i = 1; i < 4; i++) {
        const u32 next = w[i] & 0x7fff7fffu;
        if constexpr (E == F16) {
            const __half2 m = __hmax2_nan(*(const __half2*)&bits, *(const __half2*)&next);
            bits = *(const u32*)&m;
        } else {
            const __nv_bfloat162 m = __hmax2_nan(*(const __nv_bfloat162*)&bits, *(const __nv_bfloat162*)&next);
            bits = *(const u32*)&m;
        }
    }
    return max(bits & 0x7fffu, bits >> 16 & 0x7fffu);
}

__device__ __forceinline__ bool aligned16(u64 a, u64 b) { return ((a | b) & 15) == 0; }

// ---------------------------------------------------------------------------------------------------------------------
// Where the rows of a plane lie, raw and sealed: they are contiguous, [kv_head][token][dim].

// Keys of a head that share their scales.
#ifndef KEY_SCALE_ROWS
#define KEY_SCALE_ROWS 1
#endif

struct Plane {
    u64 raw, codes, scales;
    u32 rows, dim, row_bytes, code_bytes, scale_bytes;
    bool keys;
    __device__ __forceinline__ Plane(const Layout& L, u64 raw_slot, u64 sealed_slot, u32 index) {
        const u32 layer = index >> 1, plane = index & 1;
        rows = L.kv_heads * L.block_tokens;
        dim = L.dim[plane];
        row_bytes = L.row_bytes[plane];
        code_bytes = L.code_bytes[plane];
        scale_bytes = L.scale_bytes[plane];
        keys = plane == 0;
        raw = raw_slot + layer * L.layer_bytes + plane * L.plane_bytes[0];
        codes = sealed_slot + L.codes_at[plane] + layer * L.codes_layer;
        scales = sealed_slot + L.scales_at[plane] + layer * L.scales_layer;
    }
};

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

// Sealed keys are differences from a centre: the mean key of their head, rotated as they are, by the turn of the block and that of the
// token in it. The arithmetic is that of `Centres` in key_means.rs. Modules that are compiled with CENTRED know it, others skip it.
#ifndef CENTRED
#define CENTRED 0
#endif

struct Centre {
    const float* means;
    const float2* of_block;
    const float2* of_tokens;
    u32 pairs, apart, block_tokens, dim;
    bool on;
    __device__ __forceinline__ Centre(const Layout& L, u32 plane_index, u64 block) {
        on = CENTRED && (plane_index & 1) == 0;
        pairs = L.centres.pairs, apart = L.centres.apart, block_tokens = L.block_tokens, dim = L.dim[0];
        means = (const float*)L.centres.means + (u64)(plane_index >> 1) * L.kv_heads * dim;
        of_block = (const float2*)L.centres.block_turns + block * pairs;
        of_tokens = (const float2*)L.centres.token_turns;
    }

    // Of dim `d` of row `row` of the plane.
    __device__ __forceinline__ float at(u32 row, u32 d) const {
        const u32 head = row / block_tokens, token = row - head * block_tokens;
        const float* mean = means + head * dim;
        if (d >= 2 * pairs) return mean[d];
        const bool first = apart == 1 ? (d & 1) == 0 : d < pairs;
        const u32 a = first ? d : d - apart, pair = apart == 1 ? a / 2 : a;
        const float2 b = of_block[pair], t = of_tokens[token * pairs + pair];
        const float cos = __fsub_rn(__fmul_rn(b.x, t.x), __fmul_rn(b.y, t.y));
        const float sin = __fadd_rn(__fmul_rn(b.y, t.x), __fmul_rn(b.x, t.y));
        const float x = mean[a], y = mean[a + apart];
        return first ? __fsub_rn(__fmul_rn(x, cos), __fmul_rn(y, sin)) : __fadd_rn(__fmul_rn(x, sin), __fmul_rn(y, cos));
    }

    // `x` with the centre times `sign` on top, rounded to the element type. What is no number stays so.
    template <u32 E> __device__ __forceinline__ float shifted(float x, u32 row, u32 d, float sign) const {
        const float y = __fadd_rn(x, __fmul_rn(sign, at(row, d)));
        const float bounded = fmaxf(fminf(y, finite_max<E>()), -finite_max<E>());
        return fabsf(x) <= finite_max<F32>() ? rounded<E>(bounded) : x;
    }

    // The same for a vector of dims from `d` on.
    template <u32 E> __device__ __forceinline__ uint4 shifted(const uint4& v, u32 row, u32 d, float sign) const {
        if constexpr (CENTRED) return called<E>(v, row, d, sign);
        return v;
    }

    // Not inlined: it is many times as long as what is around it.
    template <u32 E> __device__ __noinline__ uint4 called(const uint4& v, u32 row, u32 d, float sign) const {
        float x[Vector<E>::N];
        unpack<E>(v, x);
#pragma unroll
        for (u32 i = 0; i < Vector<E>::N; i++) x[i] = shifted<E>(x[i], row, d + i, sign);
        return pack<E>(x);
    }
};

// Row `i` of a read, rows of a head after each other: where it is in the block, and where it goes in [tokens, kv_heads].
struct Place {
    u32 row, target;
    __device__ __forceinline__ Place(const Layout& L, const Read& r, u32 i) {
        const u32 head = i / r.tokens, token = i - head * r.tokens;
        row = head * L.block_tokens + r.first_token + token;
        target = token * L.kv_heads + head;
    }
};

// Gathers tokens of one layer of a raw block: [kv_head][token][dim] to [tokens, kv_heads, dim].
__device__ __forceinline__ void gather_raw(const Layout& L, const Read& r, bool plain) {
    const u32 plane = plane_of_read(L), row_bytes = L.row_bytes[plane];
    const Plane p(L, r.slot[plane], r.slot[plane], 2 * r.layer + plane);
    const u64 output = r.output[plane];
    const u32 rows = r.tokens * L.kv_heads, per_row = row_bytes / 16;
    if (!plain && row_bytes % 16 == 0 && aligned16(p.raw, output) && per_row <= blockDim.x) {
        const Columns c(per_row);
        if (!c.active) return;
        for (u32 first = c.row + blockIdx.z * c.rows_at_once * DECODE_UNROLL; first < rows;
             first += gridDim.z * c.rows_at_once * DECODE_UNROLL) {
            uint4 v[DECODE_UNROLL];
            u32 to[DECODE_UNROLL];
#pragma unroll
            for (u32 k = 0; k < DECODE_UNROLL; k++) {
                const Place place(L, r, min(first + k * c.rows_at_once, rows - 1));
                to[k] = place.target;
                v[k] = __ldcs((const uint4*)(p.raw + (u64)place.row * row_bytes) + c.column);
            }
#pragma unroll
            for (u32 k = 0; k < DECODE_UNROLL; k++) {
                if (first + k * c.rows_at_once < rows) __stcs((uint4*)(output + (u64)to[k] * row_bytes) + c.column, v[k]);
            }
        }
        return;
    }
    const u32 units = row_bytes / 2;
    for (u32 i = threadIdx.x + blockIdx.z * blockDim.x; i < rows * units; i += gridDim.z * blockDim.x) {
        const Place place(L, r, i / units);
        ((u16*)(output + (u64)place.target * row_bytes))[i % units] = ((const u16*)(p.raw + (u64)place.row * row_bytes))[i % units];
    }
}

// What a format asks of the registers of its kernels, and how it seals `count` blocks: with a block of threads for each plane of each, or with
// fewer that go on to others.
#ifndef DECODE_BOUNDS
#define DECODE_BOUNDS
#endif
#ifndef SEAL_BOUNDS
#define SEAL_BOUNDS
#define SEAL(E, PLAIN) seal_plane<E>(L, fetched(s + step_of()), PLAIN)
#endif

// The kernels of a format, over functions that take the element type: `plain` says to do without vectors.
#define FORMAT_KERNELS(E, NAME) \
    extern "C" __global__ void SEAL_BOUNDS seal_##NAME(const __grid_constant__ Layout L, const Convert* s, u32 count) { SEAL(E, false); } \
    extern "C" __global__ void plain_seal_##NAME(const __grid_constant__ Layout L, const Convert* s, u32 count) { SEAL(E, true); } \
    extern "C" __global__ void DECODE_BOUNDS reopen_##NAME(const __grid_constant__ Layout L, const Convert* s) { \
        reopen_plane<E>(L, fetched(s + step_of()), false); \
    } \
    extern "C" __global__ void plain_reopen_##NAME(const __grid_constant__ Layout L, const Convert* s) { \
        reopen_plane<E>(L, fetched(s + step_of()), true); \
    } \
    extern "C" __global__ void DECODE_BOUNDS read_##NAME(const __grid_constant__ Layout L, const Read* steps) { \
        const Read& r = fetched(steps + blockIdx.x); \
        if (r.raw >> plane_of_read(L) & 1) gather_raw(L, r, false); \
        else read_plane<E>(L, r, false); \
    } \
    extern "C" __global__ void plain_read_##NAME(const __grid_constant__ Layout L, const Read* steps) { \
        const Read& r = fetched(steps + blockIdx.x); \
        if (r.raw >> plane_of_read(L) & 1) gather_raw(L, r, true); \
        else read_plane<E>(L, r, true); \
    }
