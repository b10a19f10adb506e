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
        for (u32 code = threadIdx.x; code < 1u << BITS; code += blockDim.x) values[code] = value_of(code);
        __syncthreads();
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
    // The means of the head whose rows a warp seals, after the turn of the block: both dims of each pair, to be added.
    alignas(16) float2 means[WARPS][64];

    // What is to be added to a lane's share of the pairs of a head all of whose dims turn.
    template <u32 DIM> static __device__ __forceinline__ void turned(float2* to, const Centre& centre, u32 head) {
        const u32 step = centre.apart == 1 ? 2 : 1;
        const float* mean = centre.means + head * DIM;
#pragma unroll
        for (u32 i = 0; i < DIM / 2 / WARP; i++) {
            const u32 pair = threadIdx.x % WARP + i * WARP;
            const float x = __ldg(mean + pair * step), y = __ldg(mean + pair * step + centre.apart);
            const float2 by = __ldg(centre.of_block + pair);
            to[i] = make_float2(-__fsub_rn(__fmul_rn(x, by.x), __fmul_rn(y, by.y)), -__fadd_rn(__fmul_rn(x, by.y), __fmul_rn(y, by.x)));
        }
    }

    // Takes the centre off a row whose pairs all turn, the `threadIdx.x % WARP`th of a head: right if all of it is finite, and stays so. Each lane has its
    // share of the means.
    template <u32 E, u32 DIM> __device__ __forceinline__ void centre(float* y, const Centre& centre, const float2* share) {
        const u32 lane = threadIdx.x % WARP;
        float2* here = means[threadIdx.x / WARP];
#pragma unroll
        for (u32 i = 0; i < DIM / 2 / WARP; i++) here[lane + i * WARP] = share[i];
        __syncwarp();
        // Tokens of a pair are beside each other.
        const float2* turns = (const float2*)centre.L.centres.pair_turns + lane;
        if (centre.apart == 1) take_off<E, DIM, 2, 1>(y, here, turns);
        else take_off<E, DIM, 1, DIM / 2>(y, here, turns);
    }

    // Pairs begin `STEP` dims from each other, and have their second dim `APART` from the first.
    template <u32 E, u32 DIM, u32 STEP, u32 APART>
    static __device__ __forceinline__ void take_off(float* y, const float2* here, const float2* turns) {
#pragma unroll
        for (u32 pair = 0; pair < DIM / 2; pair += 2) {
            const float4 p = *(const float4*)(here + pair);
            const float2 t = __ldg(turns + pair * WARP), u = __ldg(turns + (pair + 1) * WARP);
            float *const a = y + pair * STEP, *const b = a + STEP;
            turn(a[0], a[APART], p.x, p.y, t);
            turn(b[0], b[APART], p.z, p.w, u);
            // Neighbours are rounded together.
            if (STEP == 1) round<E>(a[0], b[0]), round<E>(a[APART], b[APART]);
            else round<E>(a[0], a[1]), round<E>(b[0], b[1]);
        }
    }
    static __device__ __forceinline__ void turn(float& a, float& b, float p, float q, float2 by) {
        a = __fmaf_rn(-q, by.y, __fmaf_rn(p, by.x, a));
        b = __fmaf_rn(p, by.y, __fmaf_rn(q, by.x, b));
    }
    template <u32 E> static __device__ __forceinline__ void round(float& a, float& b) {
        const float before[2 * 4] = {a, b};
        float after[2 * 4];
        unpack<E>(pack<E>(before), after);
        a = after[0], b = after[1];
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
        if (E == F16 || divided || __all_sync(0xffffffffu, near<E>(square))) return make_float2(power, square);
        const float largest = most();
        power = near<E>(square) ? 1.0f : power_below(largest);
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
        const auto vector = [&](u32 k, u32 part) {
            const u32 at = (k * lanes + lane) * VECTORS<E> + part;
            const uint4 v = __ldcs(from + at);
            return centre.on && row < end ? centre.shifted<E, OFF>(v, row, at * Vector<E>::N) : v;
        };
        float y[PER_THREAD];
        const auto load = [&](bool divided, float down) {
#pragma unroll
            for (u32 k = 0; k < UNITS; k++) {
#pragma unroll
                for (u32 part = 0; part < VECTORS<E>; part++) {
                    const u32 at = (k * lanes + lane) * VECTORS<E> + part;
                    unpack<E>(tables.flipped(vector(k, part), at), y + k * UNIT + part * Vector<E>::N);
                }
            }
            if (divided) {
#pragma unroll
                for (u32 i = 0; i < PER_THREAD; i++) y[i] = __fmul_rn(y[i], down);
            }
        };
        const auto most = [&] {
            u32 bits = 0;
#pragma unroll 1
            for (u32 i = 0; i < UNITS * VECTORS<E>; i++) bits = max(bits, abs_max_bits<E>(vector(i / VECTORS<E>, i % VECTORS<E>)));
            for (u32 apart = 1; apart < lanes; apart *= 2) bits = max(bits, __shfl_xor_sync(0xffffffffu, bits, apart));
            return from_bits<E>(bits);
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
        // Rows of one head, all of whose dims turn, at positions that follow each other.
        const bool quick = L.block_tokens == WARP && 2 * centre.pairs == N * UNIT && !centre.positions;
        float2 means[N * UNIT / 2 / WARP];
        if (centre.on && quick) tables.turned<N * UNIT>(means, centre, first / WARP);
#endif
        await_shared();
        __syncwarp();
#if CENTRED
        if (centre.on && !quick && some) {
#pragma unroll 1
            for (u32 k = 0; k < N; k++) {
                uint4* vector = (uint4*)(rows + place(lane, k));
                *vector = centre.shifted<E, OFF>(*vector, first + lane, k * UNIT);
            }
        }
#endif
        float y[N * UNIT];
#pragma unroll
        for (u32 k = 0; k < N; k++) unpack<E>(*(const uint4*)(rows + place(lane, k)), y + k * UNIT);
#if CENTRED
        if (centre.on && quick) tables.centre<E, N * UNIT>(y, centre, means);
#endif
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
        const bool fine = near<E>(square) && (!CENTRED || square <= finite_max<F32>());
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
template <u32 E> __device__ __noinline__ void put_largest(uint4* to, Centre centre, u32 row, u32 lane, u32 lanes) {
    float x[Vector<E>::N];
    for (u32 i = 0; i < Vector<E>::N; i++) x[i] = finite_max<E>();
    for (u32 vector = lane; vector < lanes * UNITS * VECTORS<E>; vector += lanes) {
        const uint4 v = pack<E>(x);
        to[vector] = centre.on ? centre.shifted<E, ON>(v, row, vector * Vector<E>::N) : v;
    }
}

// Puts the centre back on what a thread has stored of a row. Rare, so it is kept out of the way of the others.
template <u32 E> __device__ __noinline__ void put_centred(uint4* to, Centre centre, u32 row, u32 lane, u32 lanes) {
    for (u32 k = 0; k < UNITS; k++) {
        for (u32 part = 0; part < VECTORS<E>; part++) {
            const u32 vector = (k * lanes + lane) * VECTORS<E> + part;
            to[vector] = centre.shifted<E, ON>(to[vector], row, vector * Vector<E>::N);
        }
    }
}

// Decodes `rows` rows; `place` says of each where it is in the block and where it goes.
template <u32 E, typename F>
__device__ __forceinline__ void decode_rows(const Plane& p, const Centre& centre, const DecodeTables& tables, u32 lanes, u64 output, u32 rows, u32 part, u32 parts, F place) {
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
        transform<PER_THREAD>(y, lane, lanes);
#pragma unroll
        for (u32 i = 0; i < PER_THREAD; i++) y[i] = __fmul_rn(y[i], scale);
        if (!(fabsf(scale) <= bound)) {
#pragma unroll
            for (u32 i = 0; i < PER_THREAD; i++) y[i] = saturated<E>(y[i]);
        }
        if (first + group >= rows) continue;
        // No element is so large then that the centre could make it too large.
        const bool quick = centre.turned && fabsf(scale) <= (finite_max<E>() - centre.most) / (3.0f * PER_THREAD * lanes);
        uint4* to = (uint4*)(output + (u64)at.y * p.row_bytes);
        if (scale != scale) {
            put_largest<E>(to, centre, at.x, lane, lanes);
            continue;
        }
        const auto vector = [&](u32 k, u32 part) {
            return tables.flipped(pack<E>(y + k * UNIT + part * Vector<E>::N), (k * lanes + lane) * VECTORS<E> + part);
        };
        if (CENTRED && quick && 2 * centre.apart == p.dim) {
            // A thread has both dims of its pairs.
            const u32 head = at.x / centre.block_tokens, token = at.x - head * centre.block_tokens;
#pragma unroll
            for (u32 k = 0; k < UNITS / 2; k++) {
#pragma unroll
                for (u32 part = 0; part < VECTORS<E>; part++) {
                    constexpr u32 N = Vector<E>::N;
                    const u32 dim = (k * lanes + lane) * UNIT + part * N;
                    float a[N], b[N], of_a[N], of_b[N], c[N], s[N];
                    unpack<E>(vector(k, part), a), unpack<E>(vector(k + UNITS / 2, part), b);
                    Centre::load<N>(centre.turned + head * p.dim + dim, of_a);
                    Centre::load<N>(centre.turned + head * p.dim + dim + centre.apart, of_b);
                    Centre::load_table<N>(centre.cos + token * centre.pairs + dim, c);
                    Centre::load_table<N>(centre.sin + token * centre.pairs + dim, s);
#pragma unroll
                    for (u32 i = 0; i < N; i++) {
                        a[i] = __fmaf_rn(-of_b[i], s[i], __fmaf_rn(of_a[i], c[i], a[i]));
                        b[i] = __fmaf_rn(of_a[i], s[i], __fmaf_rn(of_b[i], c[i], b[i]));
                    }
                    __stcs(to + (k * lanes + lane) * VECTORS<E> + part, pack<E>(a));
                    __stcs(to + ((k + UNITS / 2) * lanes + lane) * VECTORS<E> + part, pack<E>(b));
                }
            }
            continue;
        }
        const u32 head = CENTRED ? at.x / centre.block_tokens : 0, token = CENTRED ? at.x - head * centre.block_tokens : 0;
#pragma unroll
        for (u32 k = 0; k < UNITS; k++) {
#pragma unroll
            for (u32 part = 0; part < VECTORS<E>; part++) {
                const u32 dim = (k * lanes + lane) * UNIT + part * Vector<E>::N;
                uint4 v = vector(k, part);
                if (CENTRED && quick) {
                    const Turned<E> turned = centre.kept<E, ON>(head, dim);
                    centre.of_kind(dim, [&](auto kind) { v = centre.quick<E, kind.other>(v, turned, token, dim); });
                }
                __stcs(to + (k * lanes + lane) * VECTORS<E> + part, v);
            }
        }
        if (CENTRED && centre.on && !quick) put_centred<E>(to, centre, at.x, lane, lanes);
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
                if (centre.on) x = centre.shifted<E, OFF>(x, row, i);
                atomicMax(&S.most, __float_as_uint(fabsf(x)));
                S.y[i] = flipped(__fmul_rn(x, power_inverse(power)), sign_word(i / 32), i % 32);
            }
            plain_transform(S.y, p.dim);
            square = plain_sum(S.t, p.dim, [&](u32 i) { return make_float2(S.y[i], S.y[i]); });
            if (near<E>(square) || divided) break;
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
            const float kept = rounded<E>(saturated<E>(x));
            store<E>(to + i * L.element_bytes, centre.on ? centre.shifted<E, ON>(kept, at.x, i) : kept);
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
        if (dim == 128) return seal_own_rows<E, 16>(L, s, count, S.tables);
        if (dim == 64) return seal_own_rows<E, 8>(L, s, count, S.tables);
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
// Keys whose dims are pairs half a row apart, in rows of DIM elements of two bytes: decodes them as `decode_rows` does, with what a row needs on its way
// before its turn.
//
// Rows of one token are at once in a warp, of as many heads as there are: they turn alike.
template <u32 E, u32 DIM, typename F>
__device__ __forceinline__ void decode_halves(const Layout& L, const Plane& p, Centre centre, u64 output, u32 first_token, u32 tokens, u32 part, u32 parts, F target) {
    __shared__ DecodeShared S;
    const u32 rows = tokens * L.kv_heads;
    const auto place = [&](u32 i) {
        const u32 head = i % L.kv_heads, token = first_token + i / L.kv_heads;
        return make_uint2(head * L.block_tokens + token, target(head, token));
    };
    if (p.dim != DIM || !is_fast(p, output) || !centre.halves<E>()) return plain_decode_rows<E>(L, p, centre, S.y, output, rows, part, parts, place);
    DecodeTables& tables = S.fast.tables;
    constexpr u32 LANES = DIM / PER_THREAD, HALF = DIM / 2, STEP = 4, CODES = DIM * BITS / 8, ROW = DIM * sizeof(u16);
    const u32 lane = threadIdx.x % LANES, begin = part * (blockDim.x / LANES) + threadIdx.x / LANES, apart = blockDim.x / LANES * parts;
    const float shorten = inverse_root(DIM);
    // No element is so large then that the centre could make it too large.
    const float bound = (finite_max<E>() - centre.most) / (3.0f * DIM);
    // Of the row whose codes come next: beyond the last one it stays.
    u32 first = begin, head = min(begin, rows - 1) % L.kv_heads, token = min(begin, rows - 1) / L.kv_heads, words[UNITS];
    const u32 heads_apart = apart % L.kv_heads, tokens_apart = apart / L.kv_heads;
    float factor;
    const auto fetch = [&] {
        const u32 row = head * L.block_tokens + first_token + token;
        const u64 codes = p.codes + (u64)row * CODES + lane * BITS;
#pragma unroll
        for (u32 k = 0; k < UNITS; k++) words[k] = load_codes(codes + k * LANES * BITS);
        factor = read_factor(p.scales + (u64)row * 2);
    };
    fetch();
    tables.template fill<E>();
    centre.turn<E>(S.fast.turned, TURNED_APART);
    bool all_quick = true;
    // All lanes of a warp take every turn: shuffles need them.
    for (u32 turns = (rows + apart - 1) / apart; turns > 0; turns--) {
        const float scale = __fmul_rn(factor, shorten);
        const u32 of_head = head, of_token = first_token + token;
        uint4* const to = (uint4*)(output + (u64)target(of_head, of_token) * ROW) + lane;
        const bool some = first < rows;
        float y[PER_THREAD];
#pragma unroll
        for (u32 i = 0; i < PER_THREAD; i++) y[i] = tables.value(offset_of(words[i / UNIT], i % UNIT));
        first += apart;
        if (first < rows) {
            head += heads_apart, token += tokens_apart;
            if (head >= L.kv_heads) head -= L.kv_heads, token++;
        }
        fetch();
        transform<PER_THREAD>(y, lane, LANES);
        if (!some) continue;
        const bool quick = fabsf(scale) <= bound;
        all_quick &= quick;
        const float* const means = centre.turned + of_head * (DIM + TURNED_APART) + lane * UNIT;
        const float *const cos = centre.cos + of_token * HALF + lane * UNIT, *const sin = centre.sin + of_token * HALF + lane * UNIT;
#pragma unroll
        for (u32 k = 0; k < UNITS / 2; k++) {
            float *const a = y + k * UNIT, *const b = a + PER_THREAD / 2;
            const u32 d = k * LANES * UNIT;
#pragma unroll
            for (u32 i = 0; i < UNIT; i++) a[i] = __fmul_rn(a[i], scale), b[i] = __fmul_rn(b[i], scale);
            if (!quick) {
                // What is too large without its centre gets it below.
#pragma unroll
                for (u32 i = 0; i < UNIT; i++) a[i] = saturated<E>(a[i]), b[i] = saturated<E>(b[i]);
            }
            uint4 of_a = tables.flipped(pack<E>(a), k * LANES + lane), of_b = tables.flipped(pack<E>(b), (k + UNITS / 2) * LANES + lane);
            if (quick) {
                unpack<E>(of_a, a), unpack<E>(of_b, b);
#pragma unroll
                for (u32 i = 0; i < UNIT; i += STEP) {
                    float p[STEP], q[STEP], c[STEP], s[STEP];
                    load_shared(means + d + i, p), load_shared(means + d + HALF + i, q);
                    Centre::load_table<STEP>(cos + d + i, c), Centre::load_table<STEP>(sin + d + i, s);
#pragma unroll
                    for (u32 j = 0; j < STEP; j++) {
                        float &x = a[i + j], &z = b[i + j];
                        x = __fmaf_rn(-q[j], s[j], __fmaf_rn(p[j], c[j], x));
                        z = __fmaf_rn(p[j], s[j], __fmaf_rn(q[j], c[j], z));
                    }
                }
                of_a = pack<E>(a), of_b = pack<E>(b);
            }
            __stcs(to + k * LANES, of_a), __stcs(to + (k + UNITS / 2) * LANES, of_b);
        }
    }
    if (all_quick) return;
    for (first = begin; first < rows; first += apart) {
        const uint2 at = place(first);
        const float scale = __fmul_rn(read_factor(p.scales + (u64)at.x * 2), shorten);
        uint4* const to = (uint4*)(output + (u64)at.y * ROW);
        if (scale != scale) put_largest<E>(to, centre, at.x, lane, LANES);
        else if (!(fabsf(scale) <= bound)) put_centred<E>(to, centre, at.x, lane, LANES);
    }
}

template <u32 E, u32 DIM> __device__ __forceinline__ void reopen_plane_of_halves(const Layout& L, const Convert& s) {
    const Plane p(L, s.to, s.from, plane_of(L));
    const Centre centre(L, plane_of(L), s.index);
    decode_halves<E, DIM>(L, p, centre, p.raw, 0, L.block_tokens, 0, 1, [&](u32 head, u32 token) { return head * L.block_tokens + token; });
}

template <u32 E, u32 DIM> __device__ __forceinline__ void read_plane_of_halves(const Layout& L, const Read& r) {
    const u32 plane = plane_of_read(L);
    const Plane p(L, r.slot[plane], r.slot[plane], 2 * r.layer + plane);
    const Centre centre(L, 2 * r.layer + plane, r.index);
    decode_halves<E, DIM>(L, p, centre, r.output[plane], r.first_token, r.tokens, blockIdx.z, gridDim.z, [&](u32 head, u32 token) {
        return (token - r.first_token) * L.kv_heads + head;
    });
}

HALVES_DECODES(halves64, f16, __launch_bounds__(256, 3), F16, 64)
HALVES_DECODES(halves64, bf16, __launch_bounds__(256, 3), BF16, 64)
HALVES_DECODES(halves128, f16, __launch_bounds__(256, 3), F16, 128)
HALVES_DECODES(halves128, bf16, __launch_bounds__(256, 3), BF16, 128)
#endif

FORMAT_KERNELS(F16, f16)
FORMAT_KERNELS(BF16, bf16)
FORMAT_KERNELS(F32, f32)
