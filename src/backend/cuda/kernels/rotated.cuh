// `r4`, `r3`, `r2`: rotated rows in BITS bits an element, one bf16 factor a row. The definition is that of the CPU codecs, down to
// the order of every sum.

// Arithmetic is the limit of a seal: three blocks of threads a multiprocessor keep it busy.
#define SEAL_BOUNDS __launch_bounds__(256, 3)
#define SEAL(E, PLAIN) seal_planes<E>(L, s, count, PLAIN)
#include "common.cuh"

// Elements that are rotated together, at most, and those of the widest row.
#define GROUP_MAX 256u
#define DIM_MAX 4096u

// Whether element `i` changes its sign: the bits of the fraction of pi.
__device__ const u32 SIGNS[8] = {0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u, 0xa4093822u, 0x299f31d0u, 0x082efa98u, 0xec4e6c89u};

__device__ __forceinline__ float flipped(float x, u32 signs, u32 i) {
    return __uint_as_float(__float_as_uint(x) ^ (signs << (31 - i) & 0x80000000u));
}

// The positive half of the codebook.
constexpr u32 MAGNITUDES = 1u << (BITS - 1);

// The value of a code.
__device__ __forceinline__ float value_of(u32 code) {
    constexpr float two[2] = {0.4528f, 1.5104f};
    constexpr float three[4] = {0.2401f, 0.7501f, 1.3446f, 2.1537f};
    constexpr float four[8] = {0.1304f, 0.3911f, 0.6518f, 0.9323f, 1.2545f, 1.6179f, 2.0644f, 2.7350f};
    const u32 m = code % MAGNITUDES;
    const float magnitude = BITS == 2 ? two[m % 2] : BITS == 3 ? three[m % 4] : four[m];
    return code & MAGNITUDES ? -magnitude : magnitude;
}

// The same with the code for its lowest bits.
__device__ __forceinline__ float marked_value_of(u32 code) {
    return __uint_as_float(__float_as_uint(value_of(code)) & ~(2 * MAGNITUDES - 1) | code);
}

// Numbers are told apart by places of equal width, half of them below zero; what is beyond them belongs to the outermost.
constexpr u32 PLACES = BITS == 4 ? 111 : BITS == 3 ? 51 : 3;
constexpr float PLACE_WIDTH = BITS == 4 ? 0.0437f : BITS == 3 ? 0.07f : 0.9816f;

__device__ __forceinline__ u32 code_of_place(u32 place) {
    constexpr u32 two[1] = {1}, three[3] = {7, 15, 25}, four[7] = {6, 12, 18, 25, 33, 42, 55};
    const bool negative = place < (PLACES + 1) / 2;
    const u32 from_zero = negative ? PLACES / 2 - place : place - (PLACES + 1) / 2;
    u32 code = negative ? MAGNITUDES : 0;
    for (u32 i = 0; i + 1 < MAGNITUDES; i++) code += from_zero >= (BITS == 2 ? two[0] : BITS == 3 ? three[i % 3] : four[i % 7]);
    return code;
}

// The place of `y` if `unit` makes a share of all places of it. A product too small for a normal number is a whole number of its least
// one: the bits are that number.
__device__ __forceinline__ u32 place_of(float y, float unit) {
    return __float_as_uint(__fmul_rn(__saturatef(__fmaf_rn(y, unit, 0.5f)), __uint_as_float(PLACES)));
}

struct Tables {
    // The value of each code, and the marked one of each place. Places that share a bank are seldom met at once.
    float values[1 << BITS];
    float of_places[PLACES + 1];
    // The signs of a row of elements of the type: a bit for each in the place of its sign.
    alignas(16) u32 signs[256];

    template <u32 E> __device__ __forceinline__ void fill() {
        constexpr u32 PER_WORD = E == F32 ? 1 : 2;
        for (u32 word = threadIdx.x; word < 256 / PER_WORD; word += blockDim.x) {
            u32 mask = 0;
#pragma unroll
            for (u32 i = 0; i < PER_WORD; i++) {
                const u32 element = word * PER_WORD + i;
                mask |= (SIGNS[element / 32] >> element % 32 & 1u) << (32 / PER_WORD * (i + 1) - 1);
            }
            signs[word] = mask;
        }
        for (u32 code = threadIdx.x; code < 1u << BITS; code += blockDim.x) values[code] = value_of(code);
        for (u32 place = threadIdx.x; place <= PLACES; place += blockDim.x) of_places[place] = marked_value_of(code_of_place(place));
        __syncthreads();
    }
    // A vector with signs changed, the `at`th of a row. The masks are read when they are needed: the compiler would rather keep them all.
    __device__ __forceinline__ uint4 flipped(const uint4& v, u32 at) const {
        uint4 m;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(m.x), "=r"(m.y), "=r"(m.z), "=r"(m.w)
                     : "r"((u32)__cvta_generic_to_shared(signs + 4 * at)));
        return make_uint4(v.x ^ m.x, v.y ^ m.y, v.z ^ m.z, v.w ^ m.w);
    }
    __device__ __forceinline__ float value(u32 offset) const { return *(const float*)((const u8*)values + offset); }
};

__device__ __forceinline__ float inverse_root(u32 group) { return __frcp_rn(__fsqrt_rn((float)group)); }

// The power of two that a row is divided by, so that no square overflows: 1 for what is far from that, or the one at or below x, the
// largest magnitude, between 2^-126 and 2^126.
__device__ __forceinline__ float power_below(float x) {
    const u32 exponent = __float_as_uint(x) & 0x7f800000u;
    const bool near = exponent - (87u << 23) <= 80u << 23;
    return __uint_as_float(near ? 127u << 23 : min(max(exponent, 1u << 23), 253u << 23));
}

// Its reciprocal, which is exact.
__device__ __forceinline__ float power_inverse(float power) { return __uint_as_float((254u << 23) - __float_as_uint(power)); }

__device__ __forceinline__ void write_factor(u64 at, float ideal) {
    *(__nv_bfloat16*)at = __float2bfloat16_rn(fminf(ideal, finite_max<BF16>()));
}

__device__ __forceinline__ float read_factor(u64 at) { return __bfloat162float(*(const __nv_bfloat16*)at); }

// One over the root of x, a normal number, but for some millionths: two steps of Newton's method from what half the exponent gives.
__device__ __forceinline__ float near_inverse_root(float x) {
    const float half = __fmul_rn(x, 0.5f);
    float root = __uint_as_float(0x5f375a86u - (__float_as_uint(x) >> 1));
#pragma unroll
    for (u32 step = 0; step < 2; step++) root = __fmul_rn(root, __fmaf_rn(-__fmul_rn(half, root), root, 1.5f));
    return root;
}

// The length of a row of `dim` elements of variance 1, for which the codebook is, as a share of all places.
__device__ __forceinline__ float share_of_places(u32 dim) { return __fdiv_rn(__fsqrt_rn((float)dim), PLACES * PLACE_WIDTH); }

// Sums and differences of a thread's elements that are `apart`.
__device__ __forceinline__ void butterflies(float* y, u32 apart) {
#pragma unroll
    for (u32 i = 0; i < 32; i++) {
        if (i & apart) continue;
        const float a = y[i], b = y[i + apart];
        y[i] = __fadd_rn(a, b);
        y[i + apart] = __fsub_rn(a, b);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Rows of 32, 64, 128 or 256 elements: 1, 2, 4 or 8 lanes a row. A unit is 8 consecutive elements; lane `l` of `lanes` has units
// l, l + lanes, l + 2 * lanes and l + 3 * lanes, so that what the lanes of a row load and store lies side by side.

constexpr u32 UNIT = 8, UNITS = 4, PER_THREAD = UNIT * UNITS;

// Vectors of a unit.
template <u32 E> constexpr u32 VECTORS = UNIT / Vector<E>::N;

// Elements of a unit first, then units of other lanes, then those of this one: neighbours first, as everywhere.
__device__ __forceinline__ void transform(float* y, u32 lane, u32 lanes) {
#pragma unroll
    for (u32 apart = 1; apart < UNIT; apart *= 2) butterflies(y, apart);
    for (u32 apart = 1; apart < lanes; apart *= 2) {
        // The product is exact, so this is the sum, or the difference from the lower lane's.
        const float sign = lane & apart ? -1.0f : 1.0f;
#pragma unroll
        for (u32 i = 0; i < PER_THREAD; i++) y[i] = __fmaf_rn(y[i], sign, __shfl_xor_sync(0xffffffffu, y[i], apart));
    }
#pragma unroll
    for (u32 apart = UNIT; apart < PER_THREAD; apart *= 2) butterflies(y, apart);
}

// Of what the units of a row come to: each of the first half and its fellow of the second, until one is left.
__device__ __forceinline__ float sum(const float* of_units, u32 lanes) {
    float all = __fadd_rn(__fadd_rn(of_units[0], of_units[2]), __fadd_rn(of_units[1], of_units[3]));
    for (u32 apart = lanes / 2; apart > 0; apart /= 2) all = __fadd_rn(all, __shfl_xor_sync(0xffffffffu, all, apart));
    return all;
}

// The codes of a unit are BITS bytes.
__device__ __forceinline__ void store_codes(u64 at, u32 word) {
    if (BITS == 4) __stcs((u32*)at, word);
    else if (BITS == 2) __stcs((u16*)at, (u16)word);
    else
#pragma unroll
        for (u32 byte = 0; byte < BITS; byte++) ((u8*)at)[byte] = word >> 8 * byte;
}

__device__ __forceinline__ u32 load_codes(u64 at) {
    if (BITS == 4) return __ldcs((const u32*)at);
    if (BITS == 2) return __ldcs((const u16*)at);
    u32 word = 0;
#pragma unroll
    for (u32 byte = 0; byte < BITS; byte++) word |= (u32)((const u8*)at)[byte] << 8 * byte;
    return word;
}

// Code `i` of a unit, in bytes of the table of values.
__device__ __forceinline__ u32 offset_of(u32 word, u32 i) {
    const u32 shifted = i * BITS < 2 ? word << (2 - i * BITS) : word >> (i * BITS - 2);
    return shifted & (4 * (2 * MAGNITUDES - 1));
}

template <u32 E>
__device__ __forceinline__ void fetch(uint4* v, u64 raw, const Plane& p, u32 row, u32 lane, u32 lanes) {
    const uint4* from = (const uint4*)(raw + (u64)min(row, p.rows - 1) * p.row_bytes);
#pragma unroll
    for (u32 k = 0; k < UNITS; k++) {
#pragma unroll
        for (u32 part = 0; part < VECTORS<E>; part++)
            v[k * VECTORS<E> + part] = __ldcs(from + (k * lanes + lane) * VECTORS<E> + part);
    }
}

// Seals a plane of every `gridDim.x`th block. While rows are sealed the next are on their way, across blocks too: what is to be known of
// one is in the cache by then.
template <u32 E>
__device__ __forceinline__ void seal_rows(const Layout& L, const Convert* s, u32 count, Tables& tables, u32 lanes) {
    // Where the plane is in a slot.
    const Plane p(L, 0, 0, plane_of(L));
    const u32 lane = threadIdx.x % lanes, group = threadIdx.x / lanes, groups = blockDim.x / lanes;
    const float shorten = inverse_root(lanes * PER_THREAD), share = share_of_places(lanes * PER_THREAD);
    const Convert *block = s + blockIdx.x, *end = s + count;
    uint4 v[UNITS * VECTORS<E>];
    fetch<E>(v, block->from + p.raw, p, group, lane, lanes);
    tables.fill<E>();
    // The threads take every turn together: shuffles need all lanes of a warp.
    for (u32 first = 0; block < end;) {
        if (first == 0 && block + gridDim.x < end) asm volatile("prefetch.global.L1 [%0];" ::"l"(block + gridDim.x));
        const Convert* here = block;
        const u32 row = first + group;
        const Centre centre(L, plane_of(L), CENTRED ? here->index : 0);
        float y[PER_THREAD], of_units[UNITS], lengths[UNITS];
        u32 most = 0;
#pragma unroll
        for (u32 k = 0; k < UNITS; k++) {
#pragma unroll
            for (u32 part = 0; part < VECTORS<E>; part++) {
                uint4 w = v[k * VECTORS<E> + part];
                const u32 at = (k * lanes + lane) * UNIT + part * Vector<E>::N;
                if (centre.on && row < p.rows) w = centre.shifted<E>(w, row, at, -1.0f);
                if (E != F16) most = max(most, abs_max_bits<E>(w));
                unpack<E>(tables.flipped(w, (k * lanes + lane) * VECTORS<E> + part), y + k * UNIT + part * Vector<E>::N);
            }
        }
        first += groups;
        if (first >= p.rows) first = 0, block += gridDim.x;
        if (block < end) fetch<E>(v, block->from + p.raw, p, first + group, lane, lanes);
        float power = 1.0f;
        if (E != F16) {
            for (u32 apart = 1; apart < lanes; apart *= 2) most = max(most, __shfl_xor_sync(0xffffffffu, most, apart));
            power = power_below(from_bits<E>(most));
        }
        if (power != 1.0f) {
            const float down = power_inverse(power);
#pragma unroll
            for (u32 i = 0; i < PER_THREAD; i++) y[i] = __fmul_rn(y[i], down);
        }
        transform(y, lane, lanes);
#pragma unroll
        for (u32 k = 0; k < UNITS; k++) {
            float all = __fmul_rn(y[k * UNIT], y[k * UNIT]);
#pragma unroll
            for (u32 i = 1; i < UNIT; i++) all = __fmaf_rn(y[k * UNIT + i], y[k * UNIT + i], all);
            of_units[k] = all;
        }
        const float square = sum(of_units, lanes);
        // Every element of the transform has every one of the row in it: what is not finite is in all squares.
        const bool finite = square <= finite_max<F32>(), some = finite && square != 0.0f;
        if (!finite) raise(here->flag);
        const u64 to = here->to;
        const float unit = __fmul_rn(near_inverse_root(square), share);
#pragma unroll
        for (u32 k = 0; k < UNITS; k++) {
            u32 word = 0;
#pragma unroll
            for (u32 i = 0; i < UNIT; i++) {
                const float x = y[k * UNIT + i];
                const float c = tables.of_places[place_of(x, unit)];
                // The code enters at the top.
                word = __funnelshift_r(word, __float_as_uint(c), BITS);
                of_units[k] = i == 0 ? __fmul_rn(x, c) : __fmaf_rn(x, c, of_units[k]);
                lengths[k] = i == 0 ? __fmul_rn(c, c) : __fmaf_rn(c, c, lengths[k]);
            }
            if (row < p.rows) store_codes(to + p.codes + (u64)row * p.code_bytes + (k * lanes + lane) * BITS, some ? word >> (32 - UNIT * BITS) : 0);
        }
        const float dot = sum(of_units, lanes), length = sum(lengths, lanes);
        if (row < p.rows && lane == 0) {
            const float factor = __fmul_rn(__fmul_rn(__fdiv_rn(dot, length), shorten), power);
            write_factor(to + p.scales + (u64)row * 2, some ? factor : 0.0f);
        }
    }
}

// Decodes `rows` rows; `place` says of each where it is in the block and where it goes.
template <u32 E, typename F>
__device__ __forceinline__ void decode_rows(const Plane& p, const Centre& centre, const Tables& tables, u32 lanes, u64 output, u32 rows, u32 part, u32 parts, F place) {
    const u32 lane = threadIdx.x % lanes, group = threadIdx.x / lanes, groups = blockDim.x / lanes;
    const float shorten = inverse_root(lanes * PER_THREAD);
    // The transform of a row of codes is below 2.75 times its length.
    const float bound = finite_max<E>() / (3.0f * PER_THREAD * lanes);
    for (u32 first = part * groups; first < rows; first += parts * groups) {
        const uint2 at = place(min(first + group, rows - 1));
        u32 words[UNITS];
#pragma unroll
        for (u32 k = 0; k < UNITS; k++) words[k] = load_codes(p.codes + (u64)at.x * p.code_bytes + (k * lanes + lane) * BITS);
        const float scale = __fmul_rn(read_factor(p.scales + (u64)at.x * 2), shorten);
        float y[PER_THREAD];
#pragma unroll
        for (u32 i = 0; i < PER_THREAD; i++) y[i] = tables.value(offset_of(words[i / UNIT], i % UNIT));
        transform(y, lane, lanes);
#pragma unroll
        for (u32 i = 0; i < PER_THREAD; i++) y[i] = __fmul_rn(y[i], scale);
        if (!(fabsf(scale) <= bound)) {
#pragma unroll
            for (u32 i = 0; i < PER_THREAD; i++) y[i] = saturated<E>(y[i]);
        }
        if (first + group >= rows) continue;
        uint4* to = (uint4*)(output + (u64)at.y * p.row_bytes);
#pragma unroll
        for (u32 k = 0; k < UNITS; k++) {
#pragma unroll
            for (u32 part = 0; part < VECTORS<E>; part++) {
                const u32 dim = (k * lanes + lane) * UNIT + part * Vector<E>::N;
                uint4 v = tables.flipped(pack<E>(y + k * UNIT + part * Vector<E>::N), (k * lanes + lane) * VECTORS<E> + part);
                if (centre.on) v = centre.shifted<E>(v, at.x, dim, 1.0f);
                __stcs(to + (k * lanes + lane) * VECTORS<E> + part, v);
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Rows of any length: a thread block a row.

__device__ __forceinline__ u32 group_of(u32 dim) { return min(dim & (0u - dim), GROUP_MAX); }

struct Scratch {
    float y[DIM_MAX], t[DIM_MAX];  // Of `t`, a place for each unit: a dim that is odd has units of one element.
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

// The sum of the products that `factors` gives for each element: units one element after the other, then each of the first half of
// a group and its fellow of the second; groups after each other.
template <typename F> __device__ __forceinline__ float plain_sum(float* t, u32 dim, F factors) {
    const u32 group = group_of(dim), unit = min(group, 8u);
    for (u32 j = threadIdx.x; j < dim / unit; j += blockDim.x) {
        float2 f = factors(j * unit);
        float all = __fmul_rn(f.x, f.y);
        for (u32 i = 1; i < unit; i++) {
            f = factors(j * unit + i);
            all = __fmaf_rn(f.x, f.y, all);
        }
        t[j] = all;
    }
    const u32 units = group / unit;
    for (u32 apart = units / 2; apart > 0; apart /= 2) {
        __syncthreads();
        for (u32 j = threadIdx.x; j < dim / group * apart; j += blockDim.x) {
            const u32 i = j / apart * units + j % apart;
            t[i] = __fadd_rn(t[i], t[i + apart]);
        }
    }
    __syncthreads();
    float all = t[0];
    for (u32 j = units; j < dim / unit; j += units) all = __fadd_rn(all, t[j]);
    __syncthreads();
    return all;
}

template <u32 E>
__device__ __noinline__ void plain_seal_rows(const Layout& L, const Convert& s, Scratch& S) {
    const Plane p(L, s.from, s.to, plane_of(L));
    const Centre centre(L, plane_of(L), s.index);
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
        const float power = E == F16 ? 1.0f : power_below(__uint_as_float(S.most)), down = power_inverse(power);
        for (u32 i = threadIdx.x; i < p.dim; i += blockDim.x) S.y[i] = flipped(__fmul_rn(S.y[i], down), SIGNS[i / 32 % 8], i % 32);
        plain_transform(S.y, p.dim);
        const float square = plain_sum(S.t, p.dim, [&](u32 i) { return make_float2(S.y[i], S.y[i]); });
        const bool some = finite && square != 0.0f;
        const float unit = __fmul_rn(near_inverse_root(square), share_of_places(p.dim));
        for (u32 i = threadIdx.x; i < p.dim; i += blockDim.x) S.codes[i] = some ? code_of_place(place_of(S.y[i], unit)) : 0;
        __syncthreads();
        const float dot = plain_sum(S.t, p.dim, [&](u32 i) { return make_float2(S.y[i], marked_value_of(S.codes[i])); });
        const float length = plain_sum(S.t, p.dim, [&](u32 i) { return make_float2(marked_value_of(S.codes[i]), marked_value_of(S.codes[i])); });
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
            S.y[i] = value_of(code);
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
    Tables tables;
    Scratch scratch;
};

template <u32 E>
__device__ __forceinline__ void seal_planes(const Layout& L, const Convert* s, u32 count, bool plain) {
    __shared__ Shared S;
    // Slots are aligned alike.
    const Plane p(L, s[blockIdx.x].from, s[blockIdx.x].to, plane_of(L));
    const u32 lanes = lanes_of(p, p.raw, plain);
    if (lanes == 4) return seal_rows<E>(L, s, count, S.tables, 4);
    if (lanes != 0) return seal_rows<E>(L, s, count, S.tables, lanes);
    for (u32 block = blockIdx.x; block < count; block += gridDim.x) plain_seal_rows<E>(L, s[block], S.scratch);
}

template <u32 E, typename F>
__device__ __forceinline__ void decode_plane(const Layout& L, const Plane& p, const Centre& centre, u64 output, u32 rows, u32 part, u32 parts, bool plain, F place) {
    __shared__ Shared S;
    const u32 lanes = lanes_of(p, output, plain);
    if (lanes == 0) return plain_decode_rows<E>(L, p, centre, S.scratch, output, rows, part, parts, place);
    S.tables.fill<E>();
    if (lanes == 4) decode_rows<E>(p, centre, S.tables, 4, output, rows, part, parts, place);
    else decode_rows<E>(p, centre, S.tables, lanes, output, rows, part, parts, place);
}

template <u32 E>
__device__ __forceinline__ void reopen_plane(const Layout& L, const Convert& s, bool plain) {
    const Plane p(L, s.to, s.from, plane_of(L));
    decode_plane<E>(L, p, Centre(L, plane_of(L), s.index), p.raw, p.rows, 0, 1, plain, [](u32 row) { return make_uint2(row, row); });
}

template <u32 E>
__device__ __forceinline__ void read_plane(const Layout& L, const Read& r, bool plain) {
    const u32 plane = plane_of_read(L);
    const Plane p(L, r.slot[plane], r.slot[plane], 2 * r.layer + plane);
    decode_plane<E>(L, p, Centre(L, 2 * r.layer + plane, r.index), r.output[plane], r.tokens * L.kv_heads, blockIdx.z, gridDim.z, plain, [&](u32 i) {
        const Place place(L, r, i);
        return make_uint2(place.row, place.target);
    });
}

FORMAT_KERNELS(F16, f16)
FORMAT_KERNELS(BF16, bf16)
FORMAT_KERNELS(F32, f32)
