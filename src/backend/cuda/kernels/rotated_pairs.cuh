// Decoding of rotated keys with their means in rows of common lengths, all of whose dims turn.

// The transform of a row whose lanes have PER_THREAD consecutive elements each before it, and every LANESth unit of the row after it. What two lanes have is told
// each other by halves: of the sums and differences of what both have, each lane makes those of its own half. `of_unit` says where unit k is then.
//
// Lanes whose half is the second have the halves in each other's place, which costs nothing where these are made. Their differences across lanes have the other
// sign, which `signs_of_lanes` knows.
template <u32 LANES> struct Exchange {
    static_assert(LANES == 2 || LANES == 4);
    static constexpr u32 UNITS_APART = UNIT, PAIRS_APART = 2 * UNIT;

    static __device__ __forceinline__ void transform(float* y, u32 lane) {
#pragma unroll
        for (u32 apart = 1; apart < UNIT; apart *= 2) butterflies<PER_THREAD>(y, apart);
        swapping(y, UNITS_APART, lane & 1);
        if (LANES == 4) swapping(y, PAIRS_APART, lane & 2);
        else butterflies<PER_THREAD>(y, PAIRS_APART);
        across(y, UNITS_APART, 1);
        if (LANES == 4) across(y, PAIRS_APART, 2);
    }
    // Units that the lanes have after each other come first in the row.
    static __device__ constexpr u32 of_unit(u32 k) { return LANES == 4 ? k : k % 2 * 2 + k / 2; }

    // Whether what a lane has of unit k has the other sign: it is a difference across lanes for the second of them, once.
    static __device__ constexpr bool is_negative(u32 k, u32 lane) {
        const u32 differences = LANES == 4 ? k & lane : k / 2 & lane;
        return (differences & 1) != differences / 2;
    }

    // The signs that the lanes give element `i` of unit k, a bit for each lane.
    static __device__ constexpr u32 signs_of_lanes(u32 k, u32 i) {
        u32 bits = 0;
        for (u32 lane = 0; lane < LANES; lane++) {
            const u32 at = (k * LANES + lane) * UNIT + i;
            bits |= (sign_word(at / 32) >> at % 32 & 1u ^ is_negative(k, lane)) << lane;
        }
        return bits;
    }

    static __device__ __forceinline__ void swapping(float* y, u32 apart, bool swap) {
        // Products are exact.
        const float sign = swap ? -1.0f : 1.0f;
#pragma unroll
        for (u32 i = 0; i < PER_THREAD; i++) {
            if (i & apart) continue;
            const float a = y[i], b = y[i + apart];
            y[i] = __fmaf_rn(b, sign, a);
            y[i + apart] = __fmaf_rn(b, -sign, a);
        }
    }
    static __device__ __forceinline__ void across(float* y, u32 apart, u32 lanes_apart) {
#pragma unroll
        for (u32 i = 0; i < PER_THREAD; i++) {
            if (i & apart) continue;
            const float own = y[i], other = __shfl_xor_sync(0xffffffffu, y[i + apart], lanes_apart);
            y[i] = __fadd_rn(own, other);
            y[i + apart] = __fsub_rn(own, other);
        }
    }
};

// The codes of PER_THREAD consecutive elements.
struct Codes {
    u32 words[BITS];
    __device__ __forceinline__ void fetch(u64 at) {
        if (BITS == 4) {
            const uint4 v = __ldcs((const uint4*)at);
            words[0] = v.x, words[1] = v.y, words[2 % BITS] = v.z, words[3 % BITS] = v.w;
        } else if (BITS == 2) {
            const uint2 v = __ldcs((const uint2*)at);
            words[0] = v.x, words[1] = v.y;
        } else {
#pragma unroll
            for (u32 i = 0; i < BITS; i++) words[i] = __ldcs((const u32*)at + i);
        }
    }
    __device__ __forceinline__ u32 unit(u32 k) const {
        const u32 bit = k * UNIT * BITS, at = bit / 32;
        return bit % 32 == 0 ? words[at] : __funnelshift_r(words[at], at + 1 < BITS ? words[(at + 1) % BITS] : 0, bit % 32);
    }
};

// Decodes the rows of a scale that wants care, after all others: see `is_quick`.
template <u32 E, u32 DIM, typename F>
__device__ __noinline__ void decode_exactly(Plane p, Centre centre, const DecodeTables& tables, u64 output, u32 rows, u32 begin, u32 apart, F place) {
    constexpr u32 LANES = DIM / PER_THREAD;
    const u32 lane = threadIdx.x % LANES;
#pragma unroll 1
    for (u32 turn = 0; turn < (rows + apart - 1) / apart; turn++) {
        const u32 row = begin + turn * apart;
        const uint2 at = place(min(row, rows - 1));
        Codes codes;
        codes.fetch(p.codes + (u64)at.x * p.code_bytes + lane * (PER_THREAD * BITS / 8));
        float y[PER_THREAD];
#pragma unroll
        for (u32 i = 0; i < PER_THREAD; i++) y[i] = tables.value(offset_of(codes.unit(i / UNIT), i % UNIT));
        Exchange<LANES>::transform(y, lane);
        const float scale = __fmul_rn(read_factor(p.scales + (u64)at.x * 2), inverse_root(DIM));
        if (row >= rows || is_quick<E>(centre, scale, DIM)) continue;
#pragma unroll
        for (u32 k = 0; k < UNITS; k++) {
            Unit unit;
            const float* const x = y + Exchange<LANES>::of_unit(k) * UNIT;
#pragma unroll
            for (u32 i = 0; i < UNIT; i++) unit.y[i] = Exchange<LANES>::is_negative(k, lane) ? -x[i] : x[i];
            const u32 of_row = k * LANES + lane;
            put_unit<E>((u8*)(output + (u64)at.y * p.row_bytes) + of_row * UNIT * sizeof(u16), centre, at.x, of_row * UNIT, unit, scale);
        }
    }
}

// Keys all of whose dims turn, in rows of DIM elements of two bytes: decodes them as `decode_rows` does, with what a row needs on its way before its turn.
//
// Rows of one token are at once in a warp, of as many heads as there are: they turn alike.
template <u32 E, u32 DIM, typename F>
__device__ __forceinline__ void decode_pairs(const Layout& L, const Plane& p, Centre centre, u64 output, u32 first_token, u32 tokens, u32 part, u32 parts, F target) {
    __shared__ DecodeShared S;
    const u32 rows = tokens * L.kv_heads;
    const auto place = [=, &L](u32 i) {
        const u32 head = i % L.kv_heads, token = first_token + i / L.kv_heads;
        return make_uint2(head * L.block_tokens + token, target(head, token));
    };
    if (p.dim != DIM || !is_fast(p, output) || !centre.all_turn<E>()) return plain_decode_rows<E>(L, p, centre, S.y, output, rows, part, parts, place);
    DecodeTables& tables = S.fast.tables;
    constexpr u32 LANES = DIM / PER_THREAD, HALF = DIM / 2, STEP = 4, CODES = DIM * BITS / 8, ROW = DIM * sizeof(u16);
    const u32 lane = threadIdx.x % LANES, begin = part * (blockDim.x / LANES) + threadIdx.x / LANES, apart = blockDim.x / LANES * parts;
    const float shorten = inverse_root(DIM);
    // Of the row whose codes come next: beyond the last one it stays.
    u32 first = begin, head = min(begin, rows - 1) % L.kv_heads, token = min(begin, rows - 1) / L.kv_heads;
    const u32 heads_apart = apart % L.kv_heads, tokens_apart = apart / L.kv_heads;
    Codes codes;
    float factor;
    const auto fetch = [&] {
        const u32 row = head * L.block_tokens + first_token + token;
        codes.fetch(p.codes + (u64)row * CODES + lane * (PER_THREAD * BITS / 8));
        factor = read_factor(p.scales + (u64)row * 2);
    };
    fetch();
    tables.fill_values();
    // All threads see the values and the means behind its barrier.
    centre.turn<E>(S.fast.turned, TURNED_APART);
    // The means of the row's head: mostly a thread stays with one.
    float mean[PER_THREAD];
    const auto fetch_means = [&] {
        const float* const means = centre.turned + head * (DIM + TURNED_APART) + lane * UNIT;
#pragma unroll
        for (u32 k = 0; k < UNITS; k++) Centre::load<UNIT>(means + k * LANES * UNIT, mean + k * UNIT);
    };
    fetch_means();
    bool all_quick = true;
    // All lanes of a warp take every turn: shuffles need them.
    for (u32 turns = (rows + apart - 1) / apart; turns > 0; turns--) {
        const float scale = __fmul_rn(factor, shorten);
        const u32 of_token = first_token + token;
        uint4* const to = (uint4*)(output + (u64)target(head, of_token) * ROW) + lane;
        const bool some = first < rows;
        float y[PER_THREAD];
#pragma unroll
        for (u32 i = 0; i < PER_THREAD; i++) y[i] = tables.value(offset_of(codes.unit(i / UNIT), i % UNIT));
        first += apart;
        if (first < rows) {
            head += heads_apart, token += tokens_apart;
            if (head >= L.kv_heads) head -= L.kv_heads, token++;
        }
        fetch();
        Exchange<LANES>::transform(y, lane);
        if (!some) continue;
        all_quick &= is_quick<E>(centre, scale, DIM);
        const float *const cos = centre.cos + of_token * HALF, *const sin = centre.sin + of_token * HALF;
        // With the sign of each pattern that lanes may have after that of the first.
        float by[1 << (LANES - 1)];
#pragma unroll
        for (u32 i = 0; i < 1 << (LANES - 1); i++) by[i] = __uint_as_float(__float_as_uint(scale) ^ ((2 * i >> lane) << 31));
        const auto scaled = [&](u32 k, u32 i) {
            const u32 signs = Exchange<LANES>::signs_of_lanes(k, i), of_first = signs & 1;
            const float m = by[((of_first ? ~signs : signs) & ((1 << LANES) - 1)) >> 1];
            return __fmaf_rn(y[Exchange<LANES>::of_unit(k) * UNIT + i], of_first ? -m : m, 0.0f);
        };
        if (centre.apart == 1) {
#pragma unroll
            for (u32 k = 0; k < UNITS; k++) {
                float x[UNIT], c[STEP], s[STEP];
                const u32 pair = (k * LANES + lane) * UNIT / 2;
                Centre::load_table<STEP>(cos + pair, c), Centre::load_table<STEP>(sin + pair, s);
#pragma unroll
                for (u32 j = 0; j < STEP; j++) {
                    const u32 i = 2 * j;
                    x[i] = scaled(k, i), x[i + 1] = scaled(k, i + 1);
                    Centre::add_turned(x[i], x[i + 1], mean[k * UNIT + i], mean[k * UNIT + i + 1], c[j], s[j]);
                }
                __stcs(to + k * LANES, pack<E>(x));
            }
        } else {
#pragma unroll
            for (u32 k = 0; k < UNITS / 2; k++) {
                float a[UNIT], b[UNIT];
                const u32 pair = (k * LANES + lane) * UNIT, fellow = k + UNITS / 2;
#pragma unroll
                for (u32 i = 0; i < UNIT; i += STEP) {
                    float c[STEP], s[STEP];
                    Centre::load_table<STEP>(cos + pair + i, c), Centre::load_table<STEP>(sin + pair + i, s);
#pragma unroll
                    for (u32 j = 0; j < STEP; j++) {
                        const u32 at = i + j;
                        a[at] = scaled(k, at), b[at] = scaled(fellow, at);
                        Centre::add_turned(a[at], b[at], mean[k * UNIT + at], mean[fellow * UNIT + at], c[j], s[j]);
                    }
                }
                __stcs(to + k * LANES, pack<E>(a)), __stcs(to + fellow * LANES, pack<E>(b));
            }
        }
        if (heads_apart != 0) fetch_means();
    }
    if (!__all_sync(0xffffffffu, all_quick)) decode_exactly<E, DIM>(p, centre, tables, output, rows, begin, apart, place);
}

template <u32 E, u32 DIM> __device__ __forceinline__ void reopen_paired(const Layout& L, const Convert& s) {
    const Plane p(L, s.to, s.from, plane_of(L));
    const Centre centre(L, plane_of(L), s.index);
    decode_pairs<E, DIM>(L, p, centre, p.raw, 0, L.block_tokens, 0, 1, [&](u32 head, u32 token) { return head * L.block_tokens + token; });
}

template <u32 E, u32 DIM> __device__ __forceinline__ void read_paired(const Layout& L, const Read& r) {
    const u32 plane = plane_of_read(L);
    const Plane p(L, r.slot[plane], r.slot[plane], 2 * r.layer + plane);
    const Centre centre(L, 2 * r.layer + plane, r.index);
    decode_pairs<E, DIM>(L, p, centre, r.output[plane], r.first_token, r.tokens, blockIdx.z, gridDim.z, [&](u32 head, u32 token) {
        return (token - r.first_token) * L.kv_heads + head;
    });
}

PAIRED_DECODES(turned64, f16, __launch_bounds__(128, 4), F16, 64)
PAIRED_DECODES(turned64, bf16, __launch_bounds__(128, 4), BF16, 64)
PAIRED_DECODES(turned128, f16, __launch_bounds__(128, 4), F16, 128)
PAIRED_DECODES(turned128, bf16, __launch_bounds__(128, 4), BF16, 128)
