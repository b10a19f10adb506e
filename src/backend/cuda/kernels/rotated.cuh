// `r4`, `r3`, `r2`: rotated rows in BITS bits an element, one bf16 factor a row. The definition is that of the CPU codecs, down to
// the order of every sum.

// Arithmetic and shared memory are the limit of a seal: a thread has a row of its own where it can, as long as a third of a
// multiprocessor's registers are enough for it.
#define SEAL_BOUNDS __launch_bounds__(SEAL_THREADS, 3)
#define SEAL_THREADS 128
#ifdef CENTRED
#define DECODE_BOUNDS __launch_bounds__(256, 3)
#else
// As few registers as there is room for five blocks with.
#define DECODE_BOUNDS __launch_bounds__(256, 5)
#endif
#define SEAL(E, PLAIN) seal_planes<E>(L, s, count, PLAIN)
#include "common.cuh"

// What rows are for the codec: keys without their means are not rounded to the element type.
template <u32 E> constexpr u32 CODED = CENTRED ? F32 : E;

// A unit is 8 consecutive elements. Units of a thread, if it has not all of a row.
constexpr u32 UNIT = 8, UNITS = 4, PER_THREAD = UNIT * UNITS;
// Threads of a warp, and warps of a block that seals.
constexpr u32 WARP = 32, WARPS = SEAL_THREADS / WARP;
// Between the means of heads as a thread block that decodes keeps them: those that threads read at once are in different banks.
constexpr u32 TURNED_APART = 4;

// Elements that are rotated together, at most, and those of the widest row.
#define GROUP_MAX 256u
#define DIM_MAX 4096u

// Whether element `i` changes its sign: the bits of the fraction of pi.
__device__ constexpr u32 sign_word(u32 i) {
    constexpr u32 words[8] = {0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u, 0xa4093822u, 0x299f31d0u, 0x082efa98u, 0xec4e6c89u};
    return words[i % 8];
}

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

// Numbers are told apart by places of equal width, two of which meet at zero; the two outermost, which have what is beyond them, count for
// half a place each.
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

// The signs of a row of elements of the type: a bit for each in the place of its sign.
struct Signs {
    alignas(16) u32 signs[256];

    template <u32 E> __device__ __forceinline__ void fill() {
        constexpr u32 PER_WORD = E == F32 ? 1 : 2;
        for (u32 word = threadIdx.x; word < 256 / PER_WORD; word += blockDim.x) {
            u32 mask = 0;
#pragma unroll
            for (u32 i = 0; i < PER_WORD; i++) {
                const u32 element = word * PER_WORD + i;
                mask |= (sign_word(element / 32) >> element % 32 & 1u) << (32 / PER_WORD * (i + 1) - 1);
            }
            signs[word] = mask;
        }
    }

    // The numbers of a vector with signs changed, the `at`th of a row.
    template <u32 E> __device__ __forceinline__ void flip(float* x, u32 at) const {
        const uint4 m = load_shared(signs + 4 * at);
        const u32 words[4] = {m.x, m.y, m.z, m.w};
#pragma unroll
        for (u32 i = 0; i < Vector<E>::N; i++) {
            const u32 sign = E == F32 ? words[i % 4] : i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0x80000000u;
            x[i] = __uint_as_float(__float_as_uint(x[i]) ^ sign);
        }
    }

    // A vector with signs changed, the `at`th of a row.
    __device__ __forceinline__ uint4 flipped(const uint4& v, u32 at) const {
        const uint4 m = load_shared(signs + 4 * at);
        return make_uint4(v.x ^ m.x, v.y ^ m.y, v.z ^ m.z, v.w ^ m.w);
    }
};

struct DecodeTables : Signs {
    // Of each code.
    float values[1 << BITS];

    template <u32 E> __device__ __forceinline__ void fill() {
        Signs::fill<E>();
        fill_values();
        __syncthreads();
    }
    // Without a barrier.
    __device__ __forceinline__ void fill_values() {
        for (u32 code = threadIdx.x; code < 1u << BITS; code += blockDim.x) values[code] = value_of(code);
    }
    __device__ __forceinline__ float value(u32 offset) const { return *(const float*)((const u8*)values + offset); }
};

// What a thread block decodes with: either the one, or a row.
union DecodeShared {
    struct {
        DecodeTables tables;
        alignas(16) float turned[CENTRED ? TURNED_MAX + TURNED_MAX / 64 * TURNED_APART : 4];
    } fast;
    float y[DIM_MAX];
};

struct SealTables : Signs {
#if CENTRED
    // The means of the head whose rows a warp seals and the turns of the block, as they come; then both dims of each pair, turned, to be added.
    alignas(16) float means[WARPS][128];
    alignas(16) float2 of_block[WARPS][64];

    // Has the means of a head and the turns of a block come to the warp.
    template <u32 DIM> __device__ __forceinline__ void fetch_means(const Centre& centre, u32 head) {
        const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
        if (lane >= DIM / 4) return;
        fetch_shared(shared_address(means[warp]) + lane * 16, (u64)(centre.means + head * DIM) + lane * 16, true);
        fetch_shared(shared_address(of_block[warp]) + lane * 16, (u64)centre.of_block + lane * 16, true);
    }

    // Turns what has come. All of the dims of the head turn.
    template <u32 DIM> __device__ __forceinline__ void turn_means(const Centre& centre) {
        const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, step = centre.apart == 1 ? 2 : 1;
        float2 turned[DIM / 2 / WARP];
#pragma unroll
        for (u32 i = 0; i < DIM / 2 / WARP; i++) {
            const u32 pair = i * WARP + lane;
            const float x = means[warp][pair * step], y = means[warp][pair * step + centre.apart];
            const float2 by = of_block[warp][pair];
            const float2 mean = Centre::turned_pair(x, y, by.x, by.y);
            turned[i] = make_float2(-mean.x, -mean.y);
        }
        __syncwarp();
#pragma unroll
        for (u32 i = 0; i < DIM / 2 / WARP; i++) ((float2*)means[warp])[i * WARP + lane] = turned[i];
        __syncwarp();
    }

    // A row of a token without its centre: right if all of it is finite. `vector(k)` is its kth. What a pair needs is on its way while those before it are
    // turned.
    template <u32 E, u32 DIM, typename F> __device__ __forceinline__ void centred(float* y, const Centre& centre, u32 token, F vector) const {
        // Tokens of a pair are beside each other.
        const float2* turns = (const float2*)centre.L.centres.pair_turns + token;
        if (centre.apart == 1) take_off<E, DIM, true>(y, turns, vector);
        else take_off<E, DIM, false>(y, turns, vector);
    }
    template <u32 E, u32 DIM, bool BESIDE, typename F> __device__ __forceinline__ void take_off(float* y, const float2* turns, F vector) const {
        constexpr u32 PAIRS = DIM / 2, AT_ONCE = 4, AHEAD = 2;
        const float2* const here = (const float2*)means[threadIdx.x / WARP];
        float2 t[AHEAD + 1][AT_ONCE];
#pragma unroll
        for (u32 pair = 0; pair < AHEAD * AT_ONCE; pair++) t[pair / AT_ONCE][pair % AT_ONCE] = __ldg(turns + pair * WARP);
#pragma unroll
        for (u32 pair = 0; pair < PAIRS; pair += AT_ONCE) {
            const u32 turn_of = pair / AT_ONCE;
#pragma unroll
            for (u32 i = 0; i < AT_ONCE; i++) {
                const u32 next = pair + AHEAD * AT_ONCE + i;
                if (next < PAIRS) t[(turn_of + AHEAD) % (AHEAD + 1)][i] = __ldg(turns + next * WARP);
            }
            if (BESIDE) unpack<E>(vector(pair * 2 / UNIT), y + pair * 2);
            else if (pair % UNIT == 0) unpack<E>(vector(pair / UNIT), y + pair), unpack<E>(vector((pair + PAIRS) / UNIT), y + PAIRS + pair);
#pragma unroll
            for (u32 i = 0; i < AT_ONCE; i += 2) {
                const float4 p = *(const float4*)(here + pair + i);
                float *const a = y + (BESIDE ? 2 * (pair + i) : pair + i), *const b = a + (BESIDE ? 1 : PAIRS);
                const float2 *const by = t[turn_of % (AHEAD + 1)] + i;
                Centre::add_turned(a[0], b[0], p.x, p.y, by[0].x, by[0].y);
                Centre::add_turned(a[BESIDE ? 2 : 1], b[BESIDE ? 2 : 1], p.z, p.w, by[1].x, by[1].y);
            }
        }
    }
#endif
    // The marked value of each place. Places that share a bank are seldom met at once.
    float of_places[PLACES + 1];
    // The blocks that a warp is at, and goes on to. Descriptors may lie in host memory: each is read once.
    Convert steps[WARPS][2];
    // Codes of the rows that a warp seals at once: memory wants whole sectors, not what a lane has of one.
    alignas(16) u8 codes[WARPS][WARP * 80];
    // The rows themselves, if a thread has one of its own.
    alignas(128) u8 rows[WARPS][WARP * 256];

    template <u32 E> __device__ __forceinline__ void fill() {
        Signs::fill<E>();
        for (u32 place = threadIdx.x; place <= PLACES; place += blockDim.x) of_places[place] = marked_value_of(code_of_place(place));
        __syncthreads();
    }
    __device__ __forceinline__ const Convert& step(u32 block) const { return steps[threadIdx.x / WARP][block % 2]; }
    __device__ __forceinline__ void fetch(const Convert* s, u32 block) {
        const u32 lane = threadIdx.x % WARP;
        if (lane < sizeof(Convert) / sizeof(u64)) ((u64*)&steps[threadIdx.x / WARP][block % 2])[lane] = ((const u64*)(s + block))[lane];
        __syncwarp();
    }
};

__device__ __forceinline__ float inverse_root(u32 group) { return __frcp_rn(__fsqrt_rn((float)group)); }

// Whether the squares of a row, `square` in all, are far enough from overflow and underflow. Those of f16 always are.
template <u32 E> __device__ __forceinline__ bool near(float square) {
    return E == F16 || (square >= __uint_as_float((127u - 80u) << 23) && square <= __uint_as_float((127u + 100u) << 23));
}

// What other rows are divided by: the power of two at or below x, the largest magnitude, between 2^-126 and 2^126.
__device__ __forceinline__ float power_below(float x) {
    return __uint_as_float(min(max(__float_as_uint(x) & 0x7f800000u, 1u << 23), 253u << 23));
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
template <u32 N> __device__ __forceinline__ void butterflies(float* y, u32 apart) {
#pragma unroll
    for (u32 i = 0; i < N; i++) {
        if (i & apart) continue;
        const float a = y[i], b = y[i + apart];
        y[i] = __fadd_rn(a, b);
        y[i + apart] = __fsub_rn(a, b);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Rows of 32, 64, 128 or 256 elements. Of a row's `lanes`, lane `l` has units l, l + lanes, l + 2 * lanes and so on, so that what they load
// and store lies side by side.

// Vectors of a unit.
template <u32 E> constexpr u32 VECTORS = UNIT / Vector<E>::N;

// Elements of a unit first, then units of other lanes, then those of this one: neighbours first, as everywhere.
template <u32 N> __device__ __forceinline__ void transform(float* y, u32 lane, u32 lanes) {
#pragma unroll
    for (u32 apart = 1; apart < UNIT; apart *= 2) butterflies<N>(y, apart);
    for (u32 apart = 1; apart < lanes; apart *= 2) {
        // The product is exact, so this is the sum, or the difference from the lower lane's.
        const float sign = lane & apart ? -1.0f : 1.0f;
#pragma unroll
        for (u32 i = 0; i < N; i++) y[i] = __fmaf_rn(y[i], sign, __shfl_xor_sync(0xffffffffu, y[i], apart));
    }
#pragma unroll
    for (u32 apart = UNIT; apart < N; apart *= 2) butterflies<N>(y, apart);
}

// Of what the units of a row come to: each of the first half and its fellow of the second, until one is left.
template <u32 N> __device__ __forceinline__ float sum(float* of_units, u32 lanes) {
    if constexpr (N > 1) {
#pragma unroll
        for (u32 k = 0; k < N / 2; k++) of_units[k] = __fadd_rn(of_units[k], of_units[k + N / 2]);
        return sum<N / 2>(of_units, lanes);
    }
    float all = of_units[0];
    for (u32 apart = lanes / 2; apart > 0; apart /= 2) all = __fadd_rn(all, __shfl_xor_sync(0xffffffffu, all, apart));
    return all;
}

// The codes of a unit are BITS bytes.
__device__ __forceinline__ void put_codes(u8* at, u32 word) {
    if (BITS == 4) *(u32*)at = word;
    else if (BITS == 2) *(u16*)at = word;
    else
#pragma unroll
        for (u32 byte = 0; byte < BITS; byte++) at[byte] = word >> 8 * byte;
}

__device__ __forceinline__ u32 load_codes(u64 at) {
    if (BITS == 4) return __ldcs((const u32*)at);
    if (BITS == 2) return __ldcs((const u16*)at);
    // Of the words that they begin and end in. Rows are whole words.
    const u64 word = ~(u64)3;
    return __funnelshift_r(__ldcs((const u32*)(at & word)), __ldcs((const u32*)((at + 2) & word)), at % 4 * 8);
}

// Code `i` of a unit, in bytes of the table of values.
__device__ __forceinline__ u32 offset_of(u32 word, u32 i) {
    if (BITS == 4) return __byte_perm((i % 2 == 0 ? word << 2 : word >> 2) & 0x3c3c3c3cu, 0, 0x4440 + i / 2);
    const u32 shifted = i * BITS < 2 ? word << (2 - i * BITS) : word >> (i * BITS - 2);
    return shifted & (4 * (2 * MAGNITUDES - 1));
}

// The sum of the squares of a row, of which `lanes` lanes have N units each.
template <u32 N> __device__ __forceinline__ float square_of(const float* y, u32 lanes) {
    float of_units[N];
#pragma unroll
    for (u32 k = 0; k < N; k++) {
        of_units[k] = __fmul_rn(y[k * UNIT], y[k * UNIT]);
#pragma unroll
        for (u32 i = 1; i < UNIT; i++) of_units[k] = __fmaf_rn(y[k * UNIT + i], y[k * UNIT + i], of_units[k]);
    }
    return sum<N>(of_units, lanes);
}

// Transforms the elements that `load(down)` gives, with signs changed, divided before if need be, so that no square overflows: `most()` is
// the largest magnitude then. The answers are what they were divided by, and the sum of their squares.
template <u32 E, u32 N, typename Load, typename Most>
__device__ __forceinline__ float2 transformed(float* y, u32 lane, u32 lanes, Load load, Most most) {
    float power = 1.0f;
    for (bool divided = false;; divided = true) {
        load(divided, power_inverse(power));
        transform<N * UNIT>(y, lane, lanes);
        const float square = square_of<N>(y, lanes);
        // All of a warp do it again, or none: those that need not divide by 1.
        if (CODED<E> == F16 || divided || __all_sync(0xffffffffu, near<CODED<E>>(square))) return make_float2(power, square);
        const float largest = most();
        power = near<CODED<E>>(square) ? 1.0f : power_below(largest);
    }
}

// Chooses the codes of a row after its transform, which go to `take(unit, word)`. The answer is its factor, 0 if there is nothing to
// store.
template <u32 N, typename F>
__device__ __forceinline__ float choose(const float* y, u32 lanes, float power, float square, const SealTables& tables, F take) {
    float dots[N], lengths[N];
    // Every element of the transform has every one of the row in it: what is not finite is in all squares.
    const bool some = square <= finite_max<F32>() && square != 0.0f;
    const u32 dim = lanes * N * UNIT;
    const float unit = __fmul_rn(near_inverse_root(square), share_of_places(dim));
#pragma unroll
    for (u32 k = 0; k < N; k++) {
        u32 word = 0;
#pragma unroll
        for (u32 i = 0; i < UNIT; i++) {
            const float x = y[k * UNIT + i];
            const float c = tables.of_places[place_of(x, unit)];
            // The code enters at the top.
            word = __funnelshift_r(word, __float_as_uint(c), BITS);
            dots[k] = i == 0 ? __fmul_rn(x, c) : __fmaf_rn(x, c, dots[k]);
            lengths[k] = i == 0 ? __fmul_rn(c, c) : __fmaf_rn(c, c, lengths[k]);
        }
        take(k, some ? word >> (32 - UNIT * BITS) : 0);
    }
    const float dot = sum<N>(dots, lanes), length = sum<N>(lengths, lanes);
    return some ? __fmul_rn(__fmul_rn(__fdiv_rn(dot, length), inverse_root(dim)), power) : 0.0f;
}

// Stores the codes of rows that a warp has beside each other, `stride` bytes apart, from the first on.
__device__ __forceinline__ void store_rows(u64 to, const u8* codes, u32 row_bytes, u32 stride, u32 rows) {
    const u32 bytes = rows * row_bytes;
    for (u32 at = threadIdx.x % WARP * 16; at < bytes; at += WARP * 16) {
        const u8* from = codes + (stride == row_bytes ? at : at / row_bytes * stride + at % row_bytes);
        if (at + 16 <= bytes) __stcs((uint4*)(to + at), *(const uint4*)from);
        else
#pragma unroll 1
            for (u32 byte = 0; byte < bytes - at; byte++) ((u8*)(to + at))[byte] = from[byte];
    }
}

// What is left to do for a warp: 32 rows at a time of a plane of a block, consecutive ones of all that a launch seals. No warp has more turns than `most`, or
// fewer by more than one.
struct Share {
    u32 planes, per_plane, block, of_planes, of_rows, left, most;
    __device__ __forceinline__ Share(const Layout& L, u32 count) : planes(L.planes) {
        per_plane = (L.kv_heads * L.block_tokens + WARP - 1) / WARP;
        const u64 all = (u64)count * planes * per_plane;
        const u32 warps = gridDim.x * WARPS, warp = blockIdx.x * WARPS + threadIdx.x / WARP;
        const u32 at = all * warp / warps;
        left = (u32)(all * (warp + 1) / warps) - at;
        most = (all + warps - 1) / warps;
        of_planes = at / per_plane % planes, of_rows = at % per_plane, block = at / per_plane / planes;
    }
    __device__ __forceinline__ u32 plane(const Layout& L) const { return L.first_plane + of_planes * L.plane_step; }
    __device__ __forceinline__ u32 row() const { return of_rows * WARP; }
    // Whether it is the first of its block.
    __device__ __forceinline__ bool begins() const { return of_rows == 0 && of_planes == 0; }
    __device__ __forceinline__ void next() {
        left--;
        if (++of_rows < per_plane) return;
        of_rows = 0;
        if (++of_planes < planes) return;
        of_planes = 0, block++;
    }
};

// The numbers of a vector.
template <u32 E> struct Numbers {
    float x[Vector<E>::N];
};

// Those of a vector from dim `d` on without their centre. Rare, and many times as long as what is around it.
template <u32 E> __device__ __noinline__ Numbers<E> less_centre(const Layout& L, u32 plane, u64 block, uint4 v, u32 row, u32 d) {
    const Centre centre(L, plane, block);
    Numbers<E> numbers;
    unpack<E>(v, numbers.x);
#pragma unroll 1
    for (u32 i = 0; i < Vector<E>::N; i++) numbers.x[i] = centre.shifted<F32, OFF>(numbers.x[i], row, d + i);
    return numbers;
}

// Rows `first` to `end` of a plane, by a warp: `lanes` threads share one.
template <u32 E>
__device__ __noinline__ void seal_rows(const Layout& L, const Convert& s, SealTables& tables, u32 plane, u32 first, u32 end) {
    const Plane p(L, s.from, s.to, plane);
    const Centre centre(L, plane, s.index);
    const u32 lanes = p.dim / PER_THREAD, rows = WARP / lanes, lane = threadIdx.x % lanes, in_warp = threadIdx.x % WARP / lanes;
    u8* codes = tables.codes[threadIdx.x / WARP];
    // All lanes of a warp take every turn: shuffles need them.
    for (; first < end; first += rows) {
        const u32 row = first + in_warp;
        const uint4* from = (const uint4*)(p.raw + (u64)min(row, p.rows - 1) * p.row_bytes);
        const auto place = [&](u32 k, u32 part) { return (k * lanes + lane) * VECTORS<E> + part; };
        // Numbers of a vector, as they are coded.
        const auto numbers = [&](u32 at, float* x) {
            const uint4 v = __ldcs(from + at);
            if (!CENTRED || !centre.on || row >= end) return unpack<E>(v, x);
            const Numbers<E> less = less_centre<E>(L, plane, s.index, v, row, at * Vector<E>::N);
#pragma unroll
            for (u32 i = 0; i < Vector<E>::N; i++) x[i] = less.x[i];
        };
        float y[PER_THREAD];
        const auto load = [&](bool divided, float down) {
#pragma unroll
            for (u32 k = 0; k < UNITS; k++) {
#pragma unroll
                for (u32 part = 0; part < VECTORS<E>; part++) {
                    float* const to = y + k * UNIT + part * Vector<E>::N;
                    numbers(place(k, part), to);
                    tables.template flip<E>(to, place(k, part));
                }
            }
            if (divided) {
#pragma unroll
                for (u32 i = 0; i < PER_THREAD; i++) y[i] = __fmul_rn(y[i], down);
            }
        };
        const auto most = [&] {
            float largest = 0.0f;
#pragma unroll 1
            for (u32 i = 0; i < UNITS * VECTORS<E>; i++) {
                float x[Vector<E>::N];
                numbers(place(i / VECTORS<E>, i % VECTORS<E>), x);
#pragma unroll
                for (u32 j = 0; j < Vector<E>::N; j++) largest = fmaxf(largest, fabsf(x[j]));
            }
            for (u32 apart = 1; apart < lanes; apart *= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, apart));
            return largest;
        };
        const float2 done = transformed<E, UNITS>(y, lane, lanes, load, most);
        const float factor = choose<UNITS>(y, lanes, done.x, done.y, tables, [&](u32 k, u32 word) {
            put_codes(codes + in_warp * p.code_bytes + (k * lanes + lane) * BITS, word);
        });
        if (row < end && lane == 0) write_factor(p.scales + (u64)row * 2, factor);
        if (!(done.y <= finite_max<F32>())) raise(s.flag);
        __syncwarp();
        store_rows(p.codes + (u64)first * p.code_bytes, codes, p.code_bytes, p.code_bytes, min(end - first, rows));
        __syncwarp();
    }
}

// Whether rows are for the next: keys without their means have to be 32 of a head, all of whose dims turn.
__device__ __forceinline__ bool are_own(const Layout& L, u32 dim) {
    return !CENTRED || L.first_plane % 2 == 1 || (L.block_tokens == WARP && 2 * L.centres.pairs == dim);
}

// Rows of N units of 16-bit elements, one to each thread. A warp takes 32 at a time, of any of the blocks, and while it is at them the next
// are on their way to shared memory.
template <u32 E, u32 N>
__device__ __forceinline__ void seal_own_rows(const Layout& L, const Convert* s, u32 count, SealTables& tables) {
    constexpr u32 ROW = N * 16, CODES = N * BITS, STRIDE = CODES % 32 == 0 ? CODES + 16 : CODES;
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, of_plane = L.kv_heads * L.block_tokens;
    u8 *const rows = tables.rows[warp], *const codes = tables.codes[warp];
    // Vectors of rows lie in an order of each row's own, so that those that threads read at once are in different banks.
    const auto place = [](u32 row, u32 vector) { return row * ROW + (vector ^ row % 8) * 16; };
    Share share(L, count);
    const auto fetch = [&](bool first) {
        if (first || share.begins()) tables.fetch(s, share.block);
        const Plane p(L, tables.step(share.block).from, 0, share.plane(L));
        const u64 from = p.raw + (u64)share.row() * ROW + lane * 16;
        // The rows of a turn are an even number of rows behind those of the first, fewer than which these are: their order is that of the
        // first but for bits that it has not.
        const SharedAddress to = shared_address(rows) + place(lane / N, lane % N);
        const u32 vectors = min(of_plane - share.row(), WARP) * N;
#pragma unroll
        for (u32 turn = 0; turn < N; turn++) {
            // Beyond the rows, zeros.
            const bool some = turn * WARP + lane < vectors;
            fetch_shared((to ^ (turn * WARP / N % 8 * 16)) + turn * WARP * 16, from + turn * WARP * 16, some);
        }
#if CENTRED
        const Centre centre(L, share.plane(L), tables.step(share.block).index);
        if (centre.on && !centre.positions) tables.fetch_means<N * UNIT>(centre, share.row() / WARP);
#endif
    };
    if (share.left > 0) fetch(true);
    for (u32 turns = share.most; turns > 0; turns--) {
        // Warps that are at the same place share what they fetch of the kernel's code.
        __syncthreads();
        if (share.left == 0) break;
        const Convert& here = tables.step(share.block);
        const u32 plane = share.plane(L), first = share.row(), end = min(first + WARP, of_plane);
        const bool some = first + lane < end;
#if CENTRED
        const Centre centre(L, plane, here.index);
#endif
        await_shared();
        __syncwarp();
        float y[N * UNIT];
        const auto vector = [&](u32 k) { return *(const uint4*)(rows + place(lane, k)); };
#if CENTRED
        if (centre.on && !centre.positions) {
            tables.turn_means<N * UNIT>(centre);
            tables.centred<E, N * UNIT>(y, centre, lane, vector);
        } else
#endif
        {
#pragma unroll
            for (u32 k = 0; k < N; k++) unpack<E>(vector(k), y + k * UNIT);
        }
#pragma unroll
        for (u32 i = 0; i < N * UNIT; i++) {
            if (sign_word(i / 32) >> i % 32 & 1) y[i] = -y[i];
        }
        __syncwarp();
        share.next();
        if (share.left > 0) fetch(false);
        transform<N * UNIT>(y, 0, 1);
        const float square = square_of<N>(y, 1);
        // A centre is taken off here as if all were finite.
        bool fine = near<CODED<E>>(square);
#if CENTRED
        if (centre.positions) fine = false;
#endif
        if (!__all_sync(0xffffffffu, fine || !some)) {
            seal_rows<E>(L, here, tables, plane, first, end);
            continue;
        }
        u32 before = 0;
        const float factor = choose<N>(y, 1, 1.0f, square, tables, [&](u32 k, u32 word) {
            u32* words = (u32*)(codes + lane * STRIDE);
            // Units of 2 and 3 bytes are put together.
            if (BITS == 4) words[k] = word;
            else if (BITS == 2 && k % 2 == 1) words[k / 2] = before | word << 16;
            else if (BITS == 3 && k % 4 != 0) words[k / 4 * 3 + k % 4 - 1] = before >> (8 * (k % 4) - 8) | word << (32 - 8 * (k % 4));
            before = word;
        });
        const Plane p(L, 0, here.to, plane);
        if (some) write_factor(p.scales + (u64)(first + lane) * 2, factor);
        if (!(square <= finite_max<F32>())) raise(here.flag);
        __syncwarp();
        store_rows(p.codes + (u64)first * CODES, codes, CODES, STRIDE, end - first);
    }
}

// A row whose factor is no number, which no seal writes: the largest number, whatever the signs.
template <u32 E> __device__ __noinline__ void put_largest(uint4* to, u32 lane, u32 lanes) {
    float x[Vector<E>::N];
    for (u32 i = 0; i < Vector<E>::N; i++) x[i] = finite_max<E>();
    for (u32 vector = lane; vector < lanes * UNITS * VECTORS<E>; vector += lanes) to[vector] = pack<E>(x);
}

// A number of a row with its centre, if rows have any. A zero has no sign before.
template <u32 E> __device__ __forceinline__ float with_centre(const Centre& centre, float x, u32 row, u32 d) {
    if (!CENTRED || !centre.on) return saturated<E>(x);
    return saturated<E>(centre.shifted<F32, ON>(__fadd_rn(saturated<F32>(x), 0.0f), row, d));
}

// Whether rows of a scale need no more care than `quick` kernels have: nothing becomes too large, and no product that is not zero becomes zero. Sums of a row
// of codes are below 2.75 times its length, and whole numbers of 2^-26.
template <u32 E> __device__ __forceinline__ bool is_quick(const Centre& centre, float scale, u32 dim) {
    const float size = fabsf(scale);
    return size <= (finite_max<E>() - centre.most) / (3.0f * dim) && (size >= __uint_as_float((127u - 120u) << 23) || size == 0.0f);
}

// Stores a unit of a row from dim `d` on, with its centre, whatever its numbers are. Rare, so it is kept out of the way of the others.
struct Unit {
    float y[UNIT];
};
template <u32 E> __device__ __noinline__ void put_unit(u8* to, Centre centre, u32 row, u32 d, Unit unit, float scale) {
#pragma unroll 1
    for (u32 i = 0; i < UNIT; i++) {
        const float x = flipped(__fmul_rn(unit.y[i], scale), sign_word((d + i) / 32), (d + i) % 32);
        store<E>(to + i * (E == F32 ? 4 : 2), with_centre<E>(centre, x, row, d + i));
    }
}

// Decodes `rows` rows; `place` says of each where it is in the block and where it goes.
template <u32 E, typename F>
__device__ __forceinline__ void decode_rows(const Plane& p, const Centre& centre, const DecodeTables& tables, u32 lanes, u64 output, u32 rows, u32 part, u32 parts, F place) {
    const u32 lane = threadIdx.x % lanes, group = threadIdx.x / lanes, groups = blockDim.x / lanes;
    const float shorten = inverse_root(lanes * PER_THREAD);
#if !CENTRED
    // The transform of a row of codes is below 2.75 times its length.
    const float bound = finite_max<E>() / (3.0f * PER_THREAD * lanes);
#endif
    for (u32 first = part * groups; first < rows; first += parts * groups) {
        const uint2 at = place(min(first + group, rows - 1));
        u32 words[UNITS];
#pragma unroll
        for (u32 k = 0; k < UNITS; k++) words[k] = load_codes(p.codes + (u64)at.x * p.code_bytes + (k * lanes + lane) * BITS);
        const float scale = __fmul_rn(read_factor(p.scales + (u64)at.x * 2), shorten);
        float y[PER_THREAD];
#pragma unroll
        for (u32 i = 0; i < PER_THREAD; i++) y[i] = tables.value(offset_of(words[i / UNIT], i % UNIT));
        transform<PER_THREAD>(y, lane, lanes);
        uint4* to = (uint4*)(output + (u64)at.y * p.row_bytes);
#if CENTRED
        if (first + group >= rows) continue;
        if (!centre.turned || !is_quick<E>(centre, scale, PER_THREAD * lanes)) {
#pragma unroll
            for (u32 k = 0; k < UNITS; k++) {
                const u32 unit = k * lanes + lane;
                put_unit<E>((u8*)(to + unit * VECTORS<E>), centre, at.x, unit * UNIT, *(const Unit*)(y + k * UNIT), scale);
            }
            continue;
        }
        const u32 head = at.x / centre.block_tokens, token = at.x - head * centre.block_tokens;
        const bool halves = 2 * centre.apart == p.dim;
#pragma unroll
        for (u32 k = 0; k < UNITS; k++) {
#pragma unroll
            for (u32 part = 0; part < VECTORS<E>; part++) {
                const u32 vector = (k * lanes + lane) * VECTORS<E> + part, dim = vector * Vector<E>::N;
                float* const x = y + k * UNIT + part * Vector<E>::N;
                tables.template flip<E>(x, vector);
#pragma unroll
                for (u32 i = 0; i < Vector<E>::N; i++) x[i] = __fmaf_rn(x[i], scale, 0.0f);
                if (halves) continue;
                const Turned<E> turned = centre.kept<E, ON>(head, dim);
                centre.of_kind(dim, [&](auto kind) { centre.add<E, kind.other>(x, turned, token, dim); });
                __stcs(to + vector, pack<E>(x));
            }
        }
        if (!halves) continue;
        // A thread has both dims of its pairs.
#pragma unroll
        for (u32 k = 0; k < UNITS / 2; k++) {
#pragma unroll
            for (u32 part = 0; part < VECTORS<E>; part++) {
                constexpr u32 N = Vector<E>::N;
                const u32 vector = (k * lanes + lane) * VECTORS<E> + part, dim = vector * N;
                float *const a = y + k * UNIT + part * N, *const b = a + UNITS / 2 * UNIT;
                float of_a[N], of_b[N], c[N], s[N];
                Centre::load<N>(centre.turned + head * p.dim + dim, of_a);
                Centre::load<N>(centre.turned + head * p.dim + dim + centre.apart, of_b);
                Centre::load_table<N>(centre.cos + token * centre.pairs + dim, c);
                Centre::load_table<N>(centre.sin + token * centre.pairs + dim, s);
#pragma unroll
                for (u32 i = 0; i < N; i++) Centre::add_turned(a[i], b[i], of_a[i], of_b[i], c[i], s[i]);
                __stcs(to + vector, pack<E>(a));
                __stcs(to + vector + UNITS / 2 * lanes * VECTORS<E>, pack<E>(b));
            }
        }
#else
#pragma unroll
        for (u32 i = 0; i < PER_THREAD; i++) y[i] = __fmul_rn(y[i], scale);
        if (!(fabsf(scale) <= bound)) {
#pragma unroll
            for (u32 i = 0; i < PER_THREAD; i++) y[i] = saturated<E>(y[i]);
        }
        if (first + group >= rows) continue;
        if (scale != scale) {
            put_largest<E>(to, lane, lanes);
            continue;
        }
#pragma unroll
        for (u32 k = 0; k < UNITS; k++) {
#pragma unroll
            for (u32 part = 0; part < VECTORS<E>; part++) {
                const u32 vector = (k * lanes + lane) * VECTORS<E> + part;
                __stcs(to + vector, tables.flipped(pack<E>(y + k * UNIT + part * Vector<E>::N), vector));
            }
        }
#endif
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
__device__ __noinline__ void plain_seal_rows(const Layout& L, const Convert& s, Scratch& S, u32 plane) {
    const Plane p(L, s.from, s.to, plane);
    const Centre centre(L, plane, s.index);
    for (u32 row = 0; row < p.rows; row++) {
        const u8* raw = (const u8*)p.raw + (u64)row * p.row_bytes;
        const u64 to = p.codes + (u64)row * p.code_bytes;
        if (threadIdx.x == 0) S.most = 0;
        __syncthreads();
        float power = 1.0f, square;
        for (bool divided = false;; divided = true) {
            for (u32 i = threadIdx.x; i < p.dim; i += blockDim.x) {
                float x = load<E>(raw + i * L.element_bytes);
                if (centre.on) x = centre.shifted<F32, OFF>(x, row, i);
                atomicMax(&S.most, __float_as_uint(fabsf(x)));
                S.y[i] = flipped(__fmul_rn(x, power_inverse(power)), sign_word(i / 32), i % 32);
            }
            plain_transform(S.y, p.dim);
            square = plain_sum(S.t, p.dim, [&](u32 i) { return make_float2(S.y[i], S.y[i]); });
            if (near<CODED<E>>(square) || divided) break;
            power = power_below(__uint_as_float(S.most));
        }
        const bool finite = S.most < 0x7f800000u, some = finite && square != 0.0f;
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
__device__ __forceinline__ void plain_decode_rows(const Layout& L, const Plane& p, const Centre& centre, float* y, u64 output, u32 rows, u32 part, u32 parts, F place) {
    for (u32 row = part; row < rows; row += parts) {
        const uint2 at = place(row);
        const u8* codes = (const u8*)p.codes + (u64)at.x * p.code_bytes;
        __syncthreads();
        for (u32 i = threadIdx.x; i < p.dim; i += blockDim.x) {
            const u32 bit = i * BITS, first = codes[bit / 8];
            const u32 code = (bit % 8 + BITS > 8 ? first | codes[bit / 8 + 1] << 8 : first) >> bit % 8;
            y[i] = value_of(code);
        }
        plain_transform(y, p.dim);
        const float scale = __fmul_rn(read_factor(p.scales + (u64)at.x * 2), inverse_root(group_of(p.dim)));
        u8* to = (u8*)output + (u64)at.y * p.row_bytes;
        for (u32 i = threadIdx.x; i < p.dim; i += blockDim.x) {
            const float x = flipped(__fmul_rn(y[i], scale), sign_word(i / 32), i % 32);
            store<E>(to + i * L.element_bytes, with_centre<E>(centre, x, at.x, i));
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------

// Whether rows are for the fast kernels.
__device__ __forceinline__ bool is_fast(const Plane& p, u64 raw) {
    const bool fits = p.dim == 32 || p.dim == 64 || p.dim == 128 || p.dim == 256;
    return fits && aligned16(raw, p.codes);
}

// The same for all planes that a launch seals, whose dims are alike. Slots begin at multiples of 128 bytes.
__device__ __forceinline__ bool are_fast(const Layout& L) {
    const Plane first(L, 0, 0, L.first_plane), second(L, 0, 0, L.first_plane + L.plane_step);
    return is_fast(first, first.raw) && (L.planes == 1 || is_fast(second, second.raw)) && aligned16(L.layer_bytes, L.codes_layer);
}

template <u32 E>
__device__ __forceinline__ void seal_planes(const Layout& L, const Convert* s, u32 count, bool plain) {
    // Either the one or the other: a row is in registers, or it is here.
    __shared__ union Shared {
        SealTables tables;
        Scratch scratch;
    } S;
    if (plain || !are_fast(L)) {
        for (u32 i = blockIdx.x; i < count * L.planes; i += gridDim.x)
            plain_seal_rows<E>(L, s[i / L.planes], S.scratch, L.first_plane + i % L.planes * L.plane_step);
        return;
    }
    S.tables.template fill<E>();
    const u32 dim = L.dim[L.first_plane % 2], rows = L.kv_heads * L.block_tokens;
    if constexpr (E != F32) {
        if (dim == 128 && are_own(L, dim)) return seal_own_rows<E, 16>(L, s, count, S.tables);
        if (dim == 64 && are_own(L, dim)) return seal_own_rows<E, 8>(L, s, count, S.tables);
    }
    bool first = true;
    for (Share share(L, count); share.left > 0; share.next(), first = false) {
        if (first || share.begins()) S.tables.fetch(s, share.block);
        const Convert& here = S.tables.step(share.block);
        seal_rows<E>(L, here, S.tables, share.plane(L), share.row(), min(share.row() + WARP, rows));
    }
}

template <u32 E, typename F>
__device__ __forceinline__ void decode_plane(const Layout& L, const Plane& p, Centre centre, u64 output, u32 rows, u32 part, u32 parts, bool plain, F place) {
    __shared__ DecodeShared S;
    if (plain || !is_fast(p, output)) return plain_decode_rows<E>(L, p, centre, S.y, output, rows, part, parts, place);
    S.fast.tables.template fill<E>();
    centre.turn<E>(S.fast.turned);
    const u32 lanes = p.dim / PER_THREAD;
    if (lanes == 4) decode_rows<E>(p, centre, S.fast.tables, 4, output, rows, part, parts, place);
    else decode_rows<E>(p, centre, S.fast.tables, lanes, output, rows, part, parts, place);
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

#if CENTRED
#include "rotated_pairs.cuh"
#endif

FORMAT_KERNELS(F16, f16)
FORMAT_KERNELS(BF16, bf16)
FORMAT_KERNELS(F32, f32)
