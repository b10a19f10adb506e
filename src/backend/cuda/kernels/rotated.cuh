// `r4`, `r3`, `r2`: rotated rows in BITS bits an element, one bf16 factor a row. The definition is that of the CPU codecs, down to
// the order of every sum: all of them add neighbours first, then neighbours of those sums, and so on.

#include "common.cuh"

// Elements that are rotated together, at most, and those of the widest row.
#define GROUP_MAX 256u
#define DIM_MAX 4096u

// Whether element `i` changes its sign: the bits of the fraction of pi.
__device__ const u32 SIGNS[8] = {0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u, 0xa4093822u, 0x299f31d0u, 0x082efa98u, 0xec4e6c89u};

__device__ __forceinline__ float flipped(float x, u32 signs, u32 i) {
    return __uint_as_float(__float_as_uint(x) ^ (signs << (31 - i) & 0x80000000u));
}

// The positive half of the codebook, and where one of its values ends and the next begins.
constexpr u32 MAGNITUDES = 1u << (BITS - 1);

__device__ constexpr float book(u32 i) {
    constexpr float two[2] = {0.4528f, 1.5104f};
    constexpr float three[4] = {0.2451f, 0.7560f, 1.3439f, 2.1519f};
    constexpr float four[8] = {0.1284f, 0.3880f, 0.6568f, 0.9423f, 1.2562f, 1.6180f, 2.0690f, 2.7326f};
    return BITS == 2 ? two[i % 2] : BITS == 3 ? three[i % 4] : four[i % 8];
}

__device__ constexpr float middle(u32 i) { return (book(i) + book(i + 1)) * 0.5f; }

// How many values of the codebook end below `a`.
__device__ __forceinline__ u32 magnitude_of(float a) {
    if (BITS == 2) return a > middle(0) ? 1 : 0;
    if (BITS == 3) {
        const bool high = a > middle(1);
        const bool low = a > (high ? middle(2) : middle(0));
        return (high ? 2 : 0) + (low ? 1 : 0);
    }
    const bool high = a > middle(3);
    const bool mid = a > (high ? middle(5) : middle(1));
    const float upper = high ? middle(6) : middle(2), lower = high ? middle(4) : middle(0);
    const bool low = a > (mid ? upper : lower);
    return (high ? 4 : 0) + (mid ? 2 : 0) + (low ? 1 : 0);
}

// The values of all codes, once for each lane: no two lanes of a warp ask the same bank.
struct Book {
    float (*values)[32];
    u32 lane;
    __device__ __forceinline__ explicit Book(float (*shared)[32]) : values(shared), lane(threadIdx.x % 32) {
        for (u32 i = threadIdx.x; i < 32u << BITS; i += blockDim.x) {
            const u32 code = i / 32;
            values[code][i % 32] = (code & MAGNITUDES) ? -book(code % MAGNITUDES) : book(code % MAGNITUDES);
        }
        __syncthreads();
    }
    __device__ __forceinline__ float operator[](u32 code) const { return values[code][lane]; }
};

__device__ __forceinline__ float inverse_root(u32 group) { return __frcp_rn(__fsqrt_rn((float)group)); }

// The power of two at or below x, between 2^-126 and 2^126. Rows of wide range are divided by it, so that no square overflows.
__device__ __forceinline__ float power_below(float x) {
    return __uint_as_float(min(max(__float_as_uint(x) & 0x7f800000u, 1u << 23), 253u << 23));
}

__device__ __forceinline__ void write_factor(u64 at, float ideal) {
    *(__nv_bfloat16*)at = __float2bfloat16_rn(fminf(ideal, finite_max<BF16>()));
}

__device__ __forceinline__ float read_factor(u64 at) { return __bfloat162float(*(const __nv_bfloat16*)at); }

// The length of a row in units of its codes: the codebook is for elements of variance 1.
__device__ __forceinline__ float to_unit(u32 dim, float square) { return __fsqrt_rn(__fdiv_rn((float)dim, square)); }

// Saturates, and takes a NaN for a number that is too large.
template <u32 E> __device__ __forceinline__ float saturated(float x) {
    return fmaxf(fminf(x, finite_max<E>()), -finite_max<E>());
}

// ---------------------------------------------------------------------------------------------------------------------
// Rows of 32, 64, 128 or 256 elements: 1, 2, 4 or 8 lanes a row, 32 consecutive elements each.

constexpr u32 PER_THREAD = 32;

// Neighbours in a thread first, then those of other threads.
__device__ __forceinline__ void transform(float* y, u32 lane, u32 lanes) {
#pragma unroll
    for (u32 apart = 1; apart < PER_THREAD; apart *= 2) {
#pragma unroll
        for (u32 i = 0; i < PER_THREAD; i++) {
            if (i & apart) continue;
            const float a = y[i], b = y[i + apart];
            y[i] = __fadd_rn(a, b);
            y[i + apart] = __fsub_rn(a, b);
        }
    }
    for (u32 apart = 1; apart < lanes; apart *= 2) {
        // The product is exact, so this is the sum, or the difference from the lower lane's.
        const float sign = lane & apart ? -1.0f : 1.0f;
#pragma unroll
        for (u32 i = 0; i < PER_THREAD; i++) y[i] = __fmaf_rn(y[i], sign, __shfl_xor_sync(0xffffffffu, y[i], apart));
    }
}

__device__ __forceinline__ float sum(float* t, u32 lanes) {
#pragma unroll
    for (u32 count = PER_THREAD / 2; count > 0; count /= 2) {
#pragma unroll
        for (u32 i = 0; i < count; i++) t[i] = __fadd_rn(t[2 * i], t[2 * i + 1]);
    }
    float all = t[0];
    for (u32 apart = 1; apart < lanes; apart *= 2) all = __fadd_rn(all, __shfl_xor_sync(0xffffffffu, all, apart));
    return all;
}

// The codes of a thread: BITS words.
struct Codes {
    u32 words[BITS];
    __device__ __forceinline__ void put(u32 i, u32 code) {
        const u32 word = i * BITS / 32, shift = i * BITS % 32;
        words[word] |= code << shift;
        if (shift + BITS > 32) words[word + 1] |= code >> (32 - shift);
    }
    __device__ __forceinline__ u32 get(u32 i) const {
        const u32 word = i * BITS / 32, shift = i * BITS % 32;
        const u32 code = shift + BITS > 32 ? __funnelshift_r(words[word], words[word + 1], shift) : words[word] >> shift;
        return code & (2 * MAGNITUDES - 1);
    }
    __device__ __forceinline__ void store(u64 at) const {
        if (BITS == 4) __stcs((uint4*)at, make_uint4(words[0], words[1], words[2], words[BITS - 1]));
        else if (BITS == 2) __stcs((uint2*)at, make_uint2(words[0], words[1]));
        else
            for (u32 i = 0; i < BITS; i++) __stcs((u32*)at + i, words[i]);
    }
    __device__ __forceinline__ void load(u64 at) {
        if (BITS == 4) {
            const uint4 v = __ldcs((const uint4*)at);
            words[0] = v.x, words[1] = v.y, words[2] = v.z, words[BITS - 1] = v.w;
        } else if (BITS == 2) {
            const uint2 v = __ldcs((const uint2*)at);
            words[0] = v.x, words[1] = v.y;
        } else {
            for (u32 i = 0; i < BITS; i++) words[i] = __ldcs((const u32*)at + i);
        }
    }
};

template <u32 E> constexpr u32 VECTORS = PER_THREAD / Vector<E>::N;

template <u32 E>
__device__ __forceinline__ void seal_rows(const Layout& L, const Convert& s, const Book& book, u32 lanes) {
    const Plane p(L, s.from, s.to, blockIdx.y);
    const Centre centre(L, blockIdx.y, s.index);
    const u32 lane = threadIdx.x % lanes, group = threadIdx.x / lanes, groups = blockDim.x / lanes;
    const u32 signs = SIGNS[lane];
    const float shorten = inverse_root(lanes * PER_THREAD);
    bool bad = false;
    uint4 next[VECTORS<E>];
    const auto fetch = [&](u32 row) {
        const uint4* from = (const uint4*)(p.raw + (u64)min(row, p.rows - 1) * p.row_bytes) + lane * VECTORS<E>;
#pragma unroll
        for (u32 i = 0; i < VECTORS<E>; i++) next[i] = __ldcs(from + i);
    };
    fetch(group);
    // The whole block takes every turn: shuffles need all lanes of a warp.
    for (u32 first = 0; first < p.rows; first += groups) {
        const u32 row = first + group;
        float y[PER_THREAD], t[PER_THREAD];
        u32 most = 0;
#pragma unroll
        for (u32 i = 0; i < VECTORS<E>; i++) {
            if (centre.on && row < p.rows) {
                next[i] = centre.shifted<E>(next[i], row, lane * PER_THREAD + i * Vector<E>::N, -1.0f);
            }
            most = max(most, abs_max_bits<E>(next[i]));
            unpack<E>(next[i], y + i * Vector<E>::N);
        }
        if (first + groups < p.rows) fetch(row + groups);
        for (u32 apart = 1; apart < lanes; apart *= 2) most = max(most, __shfl_xor_sync(0xffffffffu, most, apart));
        const bool finite = most < infinity_bits<E>();
        bad |= !finite;
        const float power = E == F16 ? 1.0f : power_below(from_bits<E>(most)), down = __frcp_rn(power);
#pragma unroll
        for (u32 i = 0; i < PER_THREAD; i++) y[i] = flipped(E == F16 ? y[i] : __fmul_rn(y[i], down), signs, i);
        transform(y, lane, lanes);
#pragma unroll
        for (u32 i = 0; i < PER_THREAD; i++) t[i] = __fmul_rn(y[i], y[i]);
        const float square = sum(t, lanes);
        const float unit = to_unit(lanes * PER_THREAD, square);
        Codes codes = {};
        float dots[PER_THREAD];
#pragma unroll
        for (u32 i = 0; i < PER_THREAD; i++) {
            const u32 magnitude = magnitude_of(fabsf(__fmul_rn(y[i], unit))), bits = __float_as_uint(y[i]);
            codes.put(i, magnitude | (bits >> 31) << (BITS - 1));
            const float c = book[magnitude];
            // Both have the sign of y, so their product has none.
            dots[i] = __fmul_rn(fabsf(y[i]), c);
            t[i] = __fmul_rn(c, c);
        }
        const float dot = sum(dots, lanes), length = sum(t, lanes);
        float factor = __fmul_rn(__fmul_rn(__fdiv_rn(dot, length), shorten), power);
        if (!finite || square == 0.0f) {
            factor = 0.0f;
            codes = Codes{};
        }
        if (row < p.rows) {
            codes.store(p.codes + (u64)row * p.code_bytes + lane * (PER_THREAD * BITS / 8));
            if (lane == 0) write_factor(p.scales + (u64)row * 2, factor);
        }
    }
    if (bad) raise(s.flag);
}

// A row as it was, or as near as its codes are; all lanes of a warp take part.
template <u32 E>
__device__ __forceinline__ void decode_row(const Codes& codes, float factor, const Book& book, u32 lane, u32 lanes, uint4* v) {
    float y[PER_THREAD];
#pragma unroll
    for (u32 i = 0; i < PER_THREAD; i++) y[i] = book[codes.get(i)];
    transform(y, lane, lanes);
    const float scale = __fmul_rn(factor, inverse_root(lanes * PER_THREAD));
    const u32 signs = SIGNS[lane];
#pragma unroll
    for (u32 i = 0; i < PER_THREAD; i++) y[i] = flipped(__fmul_rn(y[i], scale), signs, i);
    // The transform of a row of codes is below 2.7326 times its length.
    if (!(fabsf(scale) <= finite_max<E>() / (3.0f * PER_THREAD * lanes))) {
#pragma unroll
        for (u32 i = 0; i < PER_THREAD; i++) y[i] = saturated<E>(y[i]);
    }
#pragma unroll
    for (u32 i = 0; i < VECTORS<E>; i++) v[i] = pack<E>(y + i * Vector<E>::N);
}

// Decodes `rows` rows; `place` says of each where it is in the block and where it goes.
template <u32 E, typename F>
__device__ __forceinline__ void decode_rows(const Plane& p, const Centre& centre, const Book& book, u32 lanes, u64 output, u32 rows, u32 part, u32 parts, F place) {
    const u32 lane = threadIdx.x % lanes, group = threadIdx.x / lanes, groups = blockDim.x / lanes;
    for (u32 first = part * groups; first < rows; first += parts * groups) {
        const uint2 at = place(min(first + group, rows - 1));
        Codes codes;
        codes.load(p.codes + (u64)at.x * p.code_bytes + lane * (PER_THREAD * BITS / 8));
        uint4 v[VECTORS<E>];
        decode_row<E>(codes, read_factor(p.scales + (u64)at.x * 2), book, lane, lanes, v);
        if (first + group >= rows) continue;
        uint4* to = (uint4*)(output + (u64)at.y * p.row_bytes) + lane * VECTORS<E>;
        if (centre.on) {
#pragma unroll
            for (u32 i = 0; i < VECTORS<E>; i++) {
                v[i] = centre.shifted<E>(v[i], at.x, lane * PER_THREAD + i * Vector<E>::N, 1.0f);
            }
        }
#pragma unroll
        for (u32 i = 0; i < VECTORS<E>; i++) __stcs(to + i, v[i]);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Rows of any length: a thread block a row.

__device__ __forceinline__ u32 group_of(u32 dim) { return min(dim & (0u - dim), GROUP_MAX); }

struct Scratch {
    float y[DIM_MAX], t[DIM_MAX];
    u8 codes[DIM_MAX];
    u32 most;
};

__device__ __forceinline__ void plain_transform(float* y, u32 dim) {
    for (u32 apart = 1; apart < group_of(dim); apart *= 2) {
        __syncthreads();
        for (u32 j = threadIdx.x; j < dim / 2; j += blockDim.x) {
            const u32 i = j / apart * 2 * apart + j % apart;
            const float a = y[i], b = y[i + apart];
            y[i] = __fadd_rn(a, b);
            y[i + apart] = __fsub_rn(a, b);
        }
    }
    __syncthreads();
}

// The sum of `t`, which it uses up; groups after each other.
__device__ __forceinline__ float plain_sum(float* t, u32 dim) {
    const u32 group = group_of(dim);
    for (u32 apart = 1; apart < group; apart *= 2) {
        __syncthreads();
        for (u32 i = threadIdx.x * 2 * apart; i < dim; i += blockDim.x * 2 * apart) t[i] = __fadd_rn(t[i], t[i + apart]);
    }
    __syncthreads();
    float all = t[0];
    for (u32 i = group; i < dim; i += group) all = __fadd_rn(all, t[i]);
    __syncthreads();
    return all;
}

template <u32 E>
__device__ __noinline__ void plain_seal_rows(const Layout& L, const Convert& s, Scratch& S) {
    const Plane p(L, s.from, s.to, blockIdx.y);
    const Centre centre(L, blockIdx.y, s.index);
    for (u32 row = 0; row < p.rows; row++) {
        const u8* raw = (const u8*)p.raw + (u64)row * p.row_bytes;
        const u64 to = p.codes + (u64)row * p.code_bytes;
        if (threadIdx.x == 0) S.most = 0;
        __syncthreads();
        for (u32 i = threadIdx.x; i < p.dim; i += blockDim.x) {
            S.y[i] = load<E>(raw + i * L.element_bytes);
            if (centre.on) S.y[i] = centre.shifted<E>(S.y[i], row, i, -1.0f);
            atomicMax(&S.most, __float_as_uint(fabsf(S.y[i])));
        }
        __syncthreads();
        const bool finite = S.most < 0x7f800000u;
        const float power = E == F16 ? 1.0f : power_below(__uint_as_float(S.most)), down = __frcp_rn(power);
        for (u32 i = threadIdx.x; i < p.dim; i += blockDim.x) S.y[i] = flipped(__fmul_rn(S.y[i], down), SIGNS[i / 32 % 8], i % 32);
        plain_transform(S.y, p.dim);
        for (u32 i = threadIdx.x; i < p.dim; i += blockDim.x) S.t[i] = __fmul_rn(S.y[i], S.y[i]);
        const float square = plain_sum(S.t, p.dim);
        const bool some = finite && square != 0.0f;
        const float unit = to_unit(p.dim, square);
        for (u32 i = threadIdx.x; i < p.dim; i += blockDim.x) {
            const u32 magnitude = some ? magnitude_of(fabsf(__fmul_rn(S.y[i], unit))) : 0;
            S.codes[i] = some ? magnitude | (__float_as_uint(S.y[i]) >> 31) << (BITS - 1) : 0;
            S.t[i] = __fmul_rn(fabsf(S.y[i]), book(magnitude));
        }
        const float dot = plain_sum(S.t, p.dim);
        for (u32 i = threadIdx.x; i < p.dim; i += blockDim.x) {
            const float c = book(S.codes[i] % MAGNITUDES);
            S.t[i] = __fmul_rn(c, c);
        }
        const float length = plain_sum(S.t, p.dim);
        for (u32 byte = threadIdx.x; byte < p.code_bytes; byte += blockDim.x) {
            u32 bits = 0;
            for (u32 bit = 8 * byte; bit < 8 * byte + 8 && bit / BITS < p.dim; bit++)
                bits |= (S.codes[bit / BITS] >> bit % BITS & 1u) << bit % 8;
            ((u8*)to)[byte] = bits;
        }
        if (threadIdx.x == 0) {
            const float factor = __fmul_rn(__fmul_rn(__fdiv_rn(dot, length), inverse_root(group_of(p.dim))), power);
            write_factor(p.scales + (u64)row * 2, some ? factor : 0.0f);
            if (!finite) raise(s.flag);
        }
        __syncthreads();
    }
}

template <u32 E, typename F>
__device__ __forceinline__ void plain_decode_rows(const Layout& L, const Plane& p, const Centre& centre, Scratch& S, u64 output, u32 rows, u32 part, u32 parts, F place) {
    for (u32 row = part; row < rows; row += parts) {
        const uint2 at = place(row);
        const u8* codes = (const u8*)p.codes + (u64)at.x * p.code_bytes;
        __syncthreads();
        for (u32 i = threadIdx.x; i < p.dim; i += blockDim.x) {
            const u32 bit = i * BITS, first = codes[bit / 8];
            const u32 code = (bit % 8 + BITS > 8 ? first | codes[bit / 8 + 1] << 8 : first) >> bit % 8;
            S.y[i] = code & MAGNITUDES ? -book(code % MAGNITUDES) : book(code % MAGNITUDES);
        }
        plain_transform(S.y, p.dim);
        const float scale = __fmul_rn(read_factor(p.scales + (u64)at.x * 2), inverse_root(group_of(p.dim)));
        u8* to = (u8*)output + (u64)at.y * p.row_bytes;
        for (u32 i = threadIdx.x; i < p.dim; i += blockDim.x) {
            const float x = flipped(__fmul_rn(S.y[i], scale), SIGNS[i / 32 % 8], i % 32);
            const float near = rounded<E>(saturated<E>(x));
            store<E>(to + i * L.element_bytes, centre.on ? centre.shifted<E>(near, at.x, i, 1.0f) : near);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------

// Lanes of a row if it is one for the fast kernels, else 0.
__device__ __forceinline__ u32 lanes_of(const Plane& p, u64 raw, bool plain) {
    const bool fits = p.dim == 32 || p.dim == 64 || p.dim == 128 || p.dim == 256;
    return fits && !plain && (raw & 15) == 0 && (p.codes & (BITS == 4 ? 15 : BITS == 2 ? 7 : 3)) == 0 ? p.dim / PER_THREAD : 0;
}

// Either the one or the other: a row is in registers, or it is here.
union Shared {
    float book[1 << BITS][32];
    Scratch scratch;
};

template <u32 E>
__device__ __forceinline__ void seal_plane(const Layout& L, const Convert& s, bool plain) {
    __shared__ Shared S;
    const Plane p(L, s.from, s.to, blockIdx.y);
    const u32 lanes = lanes_of(p, p.raw, plain);
    if (lanes == 0) return plain_seal_rows<E>(L, s, S.scratch);
    seal_rows<E>(L, s, Book(S.book), lanes);
}

template <u32 E, typename F>
__device__ __forceinline__ void decode_plane(const Layout& L, const Plane& p, const Centre& centre, u64 output, u32 rows, u32 part, u32 parts, bool plain, F place) {
    __shared__ Shared S;
    const u32 lanes = lanes_of(p, output, plain);
    if (lanes == 0) return plain_decode_rows<E>(L, p, centre, S.scratch, output, rows, part, parts, place);
    decode_rows<E>(p, centre, Book(S.book), lanes, output, rows, part, parts, place);
}

template <u32 E>
__device__ __forceinline__ void reopen_plane(const Layout& L, const Convert& s, bool plain) {
    const Plane p(L, s.to, s.from, blockIdx.y);
    decode_plane<E>(L, p, Centre(L, blockIdx.y, s.index), p.raw, p.rows, 0, 1, plain, [](u32 row) { return make_uint2(row, row); });
}

template <u32 E>
__device__ __forceinline__ void read_plane(const Layout& L, const Read& r, bool plain) {
    const u32 plane = blockIdx.y;
    const Plane p(L, r.slot, r.slot, 2 * r.layer + plane);
    decode_plane<E>(L, p, Centre(L, 2 * r.layer + plane, r.index), r.output[plane], r.tokens * L.kv_heads, blockIdx.z, gridDim.z, plain, [&](u32 i) {
        const Place place(L, r, i);
        return make_uint2(place.row, place.target);
    });
}

FORMAT_KERNELS(F16, f16)
FORMAT_KERNELS(BF16, bf16)
FORMAT_KERNELS(F32, f32)
