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

#include <ptx.cuh>

// Mirrors `abi::CentreTables`.
struct CentreTables {
    u64 means, block_turns, token_turns, pair_turns;
    u32 pairs, apart;
    float most;
    u32 padding;
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

// In the place of a block's number, `abi::POSITIONS_PER_TOKEN`: the rest is the address of the positions of its tokens.
#define POSITIONS_PER_TOKEN (1ull << 63)

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

// One over a scale, rounded. Scales are far from the least and the largest numbers, and those of elements of 16 bits few: all were compared (see
// kernels/tests.rs). One step from what is approximate leaves some of the others off by one.
template <u32 E> __device__ __forceinline__ float reciprocal(float x) {
    if (E == F32) return __frcp_rn(x);
    const float near = near_reciprocal(x);
    return __fmaf_rn(__fmaf_rn(-x, near, 1.0f), near, near);
}

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

// The same of half a vector of elements of two bytes.
template <u32 E> __device__ __forceinline__ void unpack(const uint2& v, float* x) {
    float all[8];
    unpack<E>(make_uint4(v.x, v.y, 0, 0), all);
#pragma unroll
    for (u32 i = 0; i < 4; i++) x[i] = all[i];
}

template <u32 E> __device__ __forceinline__ uint2 pack_half(const float* x) {
    const float all[8] = {x[0], x[1], x[2], x[3]};
    const uint4 v = pack<E>(all);
    return make_uint2(v.x, v.y);
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

// Whether the module is for centred keys.
#ifndef CENTRED
#define CENTRED 0
#endif

// Each thread keeps to one column of vectors, so that no index is divided inside the loops.
// Where keys are centred its rows are consecutive ones: those of a head have their means in common.
struct Columns {
    u32 column, row, rows_at_once;
    bool active;
    __device__ __forceinline__ u32 first() const { return CENTRED ? row * DECODE_UNROLL : row; }
    __device__ __forceinline__ u32 apart() const { return CENTRED ? 1 : rows_at_once; }
    __device__ __forceinline__ explicit Columns(u32 per_row) {
        rows_at_once = blockDim.x / per_row;
        row = threadIdx.x / per_row;
        column = threadIdx.x - row * per_row;
        active = row < rows_at_once;
    }
};

// Sealed keys are differences from a centre: the mean key of their head, rotated as they are, by the turn of the block and that of the
// token in it. Tokens of a block that were put together when others were dropped have turns of their own, of the block and the place that they
// had. The arithmetic is that of `RowCentres` in cpu/codec. Modules that are compiled with CENTRED know it, others skip it.

// What the means of all heads of a plane may be for a thread block to keep them turned.
#define TURNED_MAX 4096

// Whether centres are taken off or put back.
enum Shift { OFF, ON };

// Where the other dim of a pair is: the turn does not concern some dims.
enum Other { NONE, BESIDE, APART };
template <Other O> struct Kind {
    static constexpr Other other = O;
};

// The means of a vector of dims after the turn of the block, and those of the other dims of their pairs, with the signs that they are added with.
template <u32 E> struct Turned {
    static constexpr u32 N = Vector<E>::N;
    float own[N], other[N];
};

struct Centre {
    const Layout& L;
    u64 block;
    u32 plane;
    const float* means;
    const float2* of_block;
    const float *cos, *sin;
    const float* turned;
    // Of each token, if they are not those of a block that nothing was dropped before or from.
    const u32* positions;
    u32 pairs, apart, heads, block_tokens, dim;
    // None is larger.
    float most;
    bool on;
    __device__ __forceinline__ Centre(const Layout& L, u32 plane_index, u64 block) : L(L), block(block), plane(plane_index), turned(nullptr) {
        on = CENTRED && (plane_index & 1) == 0;
        pairs = L.centres.pairs, apart = L.centres.apart, heads = L.kv_heads, block_tokens = L.block_tokens, dim = L.dim[0];
        most = L.centres.most;
        means = (const float*)L.centres.means + (u64)(plane_index >> 1) * L.kv_heads * dim;
        positions = CENTRED && (block & POSITIONS_PER_TOKEN) != 0 ? (const u32*)(block & ~POSITIONS_PER_TOKEN) : nullptr;
        of_block = (const float2*)L.centres.block_turns + block * pairs;
        cos = (const float*)L.centres.token_turns, sin = cos + block_tokens * pairs;
    }

    // What the turn of a block makes of a pair of means.
    static __device__ __forceinline__ float2 turned_pair(float x, float y, float cos, float sin) {
        return make_float2(__fsub_rn(__fmul_rn(x, cos), __fmul_rn(y, sin)), __fadd_rn(__fmul_rn(x, sin), __fmul_rn(y, cos)));
    }

    // Adds what the token's turn makes of a pair of means to the dims of the pair.
    static __device__ __forceinline__ void add_turned(float& x, float& y, float of_x, float of_y, float cos, float sin) {
        x = __fmaf_rn(-of_y, sin, __fmaf_rn(of_x, cos, x));
        y = __fmaf_rn(of_x, sin, __fmaf_rn(of_y, cos, y));
    }

    // Whether dim `d` is the first of its pair.
    __device__ __forceinline__ bool is_first(u32 d) const { return apart == 1 ? d % 2 == 0 : d < apart; }
    __device__ __forceinline__ u32 pair_of(u32 d) const { return apart == 1 ? d / 2 : d < apart ? d : d - apart; }

    // The mean of dim `d` of a head after the turn of a block.
    __device__ __forceinline__ float turned_at(const float2* of_block, u32 head, u32 d) const {
        const float* mean = means + head * dim;
        if (d >= 2 * pairs) return mean[d];
        const bool first = is_first(d);
        const float2 b = of_block[pair_of(d)];
        const float x = mean[first ? d : d - apart], y = mean[first ? d + apart : d];
        return first ? __fsub_rn(__fmul_rn(x, b.x), __fmul_rn(y, b.y)) : __fadd_rn(__fmul_rn(x, b.y), __fmul_rn(y, b.x));
    }

    // Whether every vector lies wholly inside or outside the dims that turn, each unit of rows in one head, and all tokens of the block turn as it does.
    template <u32 E> __device__ __forceinline__ bool fits() const {
        constexpr u32 N = Vector<E>::N;
        return CENTRED && on && !positions && dim % N == 0 && pairs % N == 0 && block_tokens % 8 == 0;
    }

    // `turned_at` of the four dims from `d` on.
    __device__ __forceinline__ void turned4(u32 head, u32 d, float* to) const {
        const float* mean = means + head * dim;
        float own[4], other[4], turns[8];
        load_table<4>(mean + d, own);
        if (d >= 2 * pairs) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) to[i] = own[i];
            return;
        }
        const bool first = apart == 1 || d < apart;
        load_table<4>((const float*)(of_block + pair_of(d)), turns);
        if (apart != 1) load_table<4>((const float*)(of_block + pair_of(d)) + 4, turns + 4), load_table<4>(mean + (first ? d + apart : d - apart), other);
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            const float a = own[i], b = apart == 1 ? own[i ^ 1] : other[i];
            const float c = apart == 1 ? turns[i & 2] : turns[2 * i], s = apart == 1 ? turns[(i & 2) + 1] : turns[2 * i + 1];
            // A sum is the same from either end.
            const float x = __fmul_rn(a, c), y = __fmul_rn(b, s);
            to[i] = (apart == 1 ? i % 2 == 0 : first) ? __fsub_rn(x, y) : __fadd_rn(x, y);
        }
    }

    // The means of the four dims from `d` on after the turn of the block, and those of the other dims of their pairs with the sign that they are added with
    // where a centre is taken off: where pairs are neighbours.
    __device__ __forceinline__ void turned_beside(u32 head, u32 d, float* own, float* other) const {
        float p[4], turns[4];
        load_table<4>(means + head * dim + d, p), load_table<4>((const float*)(of_block + d / 2), turns);
#pragma unroll
        for (u32 i = 0; i < 4; i += 2) {
            const float2 turned = turned_pair(p[i], p[i + 1], turns[i], turns[i + 1]);
            own[i] = turned.x, own[i + 1] = turned.y;
            other[i] = turned.y, other[i + 1] = -turned.x;
        }
    }

    // The means of N dims from `d` on of the first half of a head, and of their fellows in the second, after the turn of the block: where pairs lie so.
    template <u32 N> __device__ __forceinline__ void turned_halves(u32 head, u32 d, float* x, float* y) const {
        const float* mean = means + head * dim + d;
        float p[N], q[N], turns[2 * N];
        load_table<N>(mean, p), load_table<N>(mean + apart, q), load_table<2 * N>((const float*)(of_block + d), turns);
#pragma unroll
        for (u32 i = 0; i < N; i++) {
            const float2 turned = turned_pair(p[i], q[i], turns[2 * i], turns[2 * i + 1]);
            x[i] = turned.x, y[i] = turned.y;
        }
    }

    // Has the thread block keep the means of all heads in shared memory, if they fit. All threads call it, best behind loads that take longer.
    template <u32 E> __device__ __forceinline__ void turn() {
        if constexpr (CENTRED) {
            alignas(16) __shared__ float here[TURNED_MAX];
            turn<E>(here);
        }
    }
    // `between` heads there is nothing.
    template <u32 E> __device__ __forceinline__ void turn(float* here, u32 between = 0) {
        if constexpr (CENTRED) {
            if (!fits<E>() || heads * dim > TURNED_MAX) return;
            for (u32 i = 4 * threadIdx.x; i < heads * dim; i += 4 * blockDim.x) {
                float own[4];
                const u32 head = i / dim;
                turned4(head, i % dim, own);
                *(float4*)(here + i + head * between) = make_float4(own[0], own[1], own[2], own[3]);
            }
            __syncthreads();
            turned = here;
        }
    }

    // Of the vector from dim `d` on of a head.
    template <u32 E, Shift S> __device__ __forceinline__ Turned<E> of(u32 head, u32 d) const {
        return of<E, S>(d, [&](u32 at, float* to) { turned4(head, at, to); });
    }
    // The same where they are kept.
    template <u32 E, Shift S> __device__ __forceinline__ Turned<E> kept(u32 head, u32 d) const {
        return of<E, S>(d, [&](u32 at, float* to) { load<4>(turned + head * dim + at, to); });
    }
    template <u32 E, Shift S, typename F> __device__ __forceinline__ Turned<E> of(u32 d, F four) const {
        constexpr u32 N = Vector<E>::N;
        Turned<E> t;
        const bool first = apart == 1 || d < apart, turns = d < 2 * pairs;
#pragma unroll
        for (u32 i = 0; i < N; i += 4) {
            four(d + i, t.own + i);
            if (apart != 1 && turns) four((first ? d + apart : d - apart) + i, t.other + i);
        }
        const float other = (S == OFF) == first ? 1.0f : -1.0f;
#pragma unroll
        for (u32 i = 0; i < N; i++) {
            if (apart == 1 || !turns) t.other[i] = t.own[i ^ 1];
            t.other[i] *= apart == 1 && i % 2 == 1 ? -other : other;
        }
        if (S == OFF) {
#pragma unroll
            for (u32 i = 0; i < N; i++) t.own[i] = -t.own[i];
        }
        return t;
    }

    // Whether all dims turn, and the means of all heads fit.
    template <u32 E> __device__ __forceinline__ bool all_turn() const { return fits<E>() && heads * dim <= TURNED_MAX && 2 * pairs == dim; }

    // Whether the dims of a pair lie half a row apart besides: a thread that has a vector of either half then has both dims of its pairs.
    template <u32 E> __device__ __forceinline__ bool halves() const { return all_turn<E>() && apart != 1; }

    // Takes off, or puts back, the centres of a vector of the first half of a row and its fellow in the second, and rounds both to the element type: wrong
    // where something is not finite, or becomes so. `own` are the head's means from dim `d` on, as they are kept.
    template <u32 E, Shift S> __device__ __forceinline__ void quick_halves(uint4& a, uint4& b, const float* own, u32 token, u32 d) const {
        constexpr u32 N = Vector<E>::N;
        float x[N], y[N];
        unpack<E>(a, x), unpack<E>(b, y);
#pragma unroll
        for (u32 first = 0; first < N; first += 4) {
            float p[4], q[4], c[4], s[4];
            load_shared(own + first, p), load_shared(own + apart + first, q);
            load_table<4>(cos + token * pairs + d + first, c), load_table<4>(sin + token * pairs + d + first, s);
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                const float of_x = S == OFF ? -p[i] : p[i], of_y = S == OFF ? -q[i] : q[i];
                add_turned(x[first + i], y[first + i], of_x, of_y, c[i], s[i]);
            }
        }
        a = pack<E>(x), b = pack<E>(y);
    }

    // Calls `f` with the `Kind` of the vector from dim `d` on: a loop in it does not have to ask again.
    template <typename F> __device__ __forceinline__ void of_kind(u32 d, F f) const {
        if (d >= 2 * pairs) f(Kind<NONE>());
        else if (apart == 1) f(Kind<BESIDE>());
        else f(Kind<APART>());
    }

    // Adds a centre to a vector from dim `d` on of a token.
    template <u32 E, Other O> __device__ __forceinline__ void add(float* x, const Turned<E>& t, u32 token, u32 d) const {
        constexpr u32 N = Vector<E>::N;
        if (O == NONE) {
#pragma unroll
            for (u32 i = 0; i < N; i++) x[i] = __fadd_rn(x[i], t.own[i]);
            return;
        }
        const u32 at = token * pairs + (O == BESIDE ? d / 2 : d < apart ? d : d - apart);
        float c[N], s[N];
        if (O == BESIDE) {
            load_beside<N>(cos + at, sin + at, c, s);
        } else {
            load_table<N>(cos + at, c), load_table<N>(sin + at, s);
        }
#pragma unroll
        for (u32 i = 0; i < N; i++) x[i] = __fmaf_rn(t.other[i], s[i], __fmaf_rn(t.own[i], c[i], x[i]));
    }

    template <u32 N> static __device__ __forceinline__ void load(const float* from, float* to) {
#pragma unroll
        for (u32 i = 0; i < N; i += 4) *(float4*)(to + i) = *(const float4*)(from + i);
    }
    // The same of a table in device memory.
    template <u32 N> static __device__ __forceinline__ void load_table(const float* from, float* to) {
#pragma unroll
        for (u32 i = 0; i < N; i += 4) *(float4*)(to + i) = __ldg((const float4*)(from + i));
    }

    // Of neighbouring dims that are pairs: each pair's for both of its dims.
    template <u32 N> static __device__ __forceinline__ void load_beside(const float* cos, const float* sin, float* c, float* s) {
#pragma unroll
        for (u32 i = 0; i < N / 2; i += 2) {
            const float2 cs = __ldg((const float2*)(cos + i)), ss = __ldg((const float2*)(sin + i));
            c[2 * i] = c[2 * i + 1] = cs.x, c[2 * i + 2] = c[2 * i + 3] = cs.y;
            s[2 * i] = s[2 * i + 1] = ss.x, s[2 * i + 2] = s[2 * i + 3] = ss.y;
        }
    }

    // A vector without, or with, its centre, rounded to the element type: wrong where something is not finite, or becomes so.
    template <u32 E, Other O> __device__ __forceinline__ uint4 quick(const uint4& v, const Turned<E>& t, u32 token, u32 d) const {
        float x[Vector<E>::N];
        unpack<E>(v, x);
        add<E, O>(x, t, token, d);
        return pack<E>(x);
    }

    // What turns a row's key: of which head it is, and the token of which block.
    struct Turn {
        const float2* of_block;
        u32 head, token;
    };
    __device__ __forceinline__ Turn turn_of(u32 row) const {
        Turn t;
        t.of_block = of_block, t.head = row / block_tokens, t.token = row - t.head * block_tokens;
        if (positions) {
            const u32 position = __ldg(positions + t.token), block = position / block_tokens;
            t.of_block = (const float2*)L.centres.block_turns + block * pairs, t.token = position - block * block_tokens;
        }
        return t;
    }

    // One element, rounded to its type. What is no number stays so, and what becomes too large is the largest.
    template <u32 E, Shift S> __device__ __forceinline__ float shifted(float x, u32 row, u32 d) const {
        if (!CENTRED) return x;
        return shifted<E, S>(x, turn_of(row), d);
    }
    template <u32 E, Shift S> __device__ __forceinline__ float shifted(float x, const Turn& t, u32 d) const {
        const float mean = turned_at(t.of_block, t.head, d), own = S == OFF ? -mean : mean;
        float y = __fadd_rn(x, own);
        if (d < 2 * pairs) {
            const bool first = is_first(d);
            const u32 at = t.token * pairs + pair_of(d);
            const float other = turned_at(t.of_block, t.head, first ? d + apart : d - apart);
            y = __fmaf_rn((S == OFF) == first ? other : -other, sin[at], __fmaf_rn(own, cos[at], x));
        }
        return fabsf(x) <= finite_max<F32>() ? rounded<E>(saturated<E>(y)) : x;
    }

    // The same for a vector of dims from `d` on.
    template <u32 E, Shift S> __device__ __forceinline__ uint4 shifted(const uint4& v, u32 row, u32 d) const {
        if constexpr (CENTRED) return called<E, S>(L, block, plane, v, row, d);
        return v;
    }

    // Rare, and many times as long as what is around it, which keeps nothing in memory for it.
    template <u32 E, Shift S>
    static __device__ __noinline__ uint4 called(const Layout& L, u64 block, u32 plane, uint4 v, u32 row, u32 d) {
        const Centre centre(L, plane, block);
        const Turn turn = centre.turn_of(row);
        float x[Vector<E>::N];
        unpack<E>(v, x);
#pragma unroll
        for (u32 i = 0; i < Vector<E>::N; i++) x[i] = centre.shifted<E, S>(x[i], turn, d + i);
        return pack<E>(x);
    }
};

// Row `i` of a read, rows of a head after each other: where it is in the block, and where it goes in [tokens, kv_heads].
struct Place {
    u32 head, token, row, target;
    __device__ __forceinline__ Place(const Layout& L, const Read& r, u32 i) {
        head = i / r.tokens;
        const u32 of_read = i - head * r.tokens;
        token = r.first_token + of_read;
        row = head * L.block_tokens + token;
        target = of_read * L.kv_heads + head;
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
#if CENTRED
#define DECODE_BOUNDS __launch_bounds__(256, 2)
#else
#define DECODE_BOUNDS
#endif
#endif
#ifndef SEAL_BOUNDS
#if CENTRED
#define SEAL_BOUNDS __launch_bounds__(256, 3)
#else
#define SEAL_BOUNDS
#endif
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

// Those for centred keys of two bytes an element all of whose dims turn, over functions in which a thread has both dims of its pairs, with registers of their own.
// Other keys are not fast here. What comes last is what the functions take as template arguments.
#define PAIRED_DECODES(KIND, NAME, DECODES, ...) \
    extern "C" __global__ void DECODES KIND##_reopen_##NAME(const __grid_constant__ Layout L, const Convert* s) { \
        reopen_paired<__VA_ARGS__>(L, fetched(s + step_of())); \
    } \
    extern "C" __global__ void DECODES KIND##_read_##NAME(const __grid_constant__ Layout L, const Read* steps) { \
        const Read& r = fetched(steps + blockIdx.x); \
        if (r.raw >> plane_of_read(L) & 1) gather_raw(L, r, false); \
        else read_paired<__VA_ARGS__>(L, r); \
    }
#define PAIRED_KERNELS(KIND, NAME, SEALS, DECODES, ...) \
    extern "C" __global__ void SEALS KIND##_seal_##NAME(const __grid_constant__ Layout L, const Convert* s, u32 count) { \
        seal_paired<__VA_ARGS__>(L, fetched(s + step_of())); \
    } \
    PAIRED_DECODES(KIND, NAME, DECODES, __VA_ARGS__)
