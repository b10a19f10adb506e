// `int4` and `int2`: a least element and a step for each group; a group is a channel of 32 keys of a head, or 32 neighbours of a row of
// values. Expects BITS. The definition is that of `cpu/codec/grouped.rs`.
//
// A warp takes a tile of 32 rows by 8 vectors: lane `l` has rows l / 8, l / 8 + 4, ... of column l % 8. So rows are read 128 bytes at a
// time, a group of keys is 8 rows of 4 lanes, and one of values a row of 4 neighbouring lanes (8 of f32).

#define KEY_SCALE_ROWS 32
#ifdef CENTRED
#define DECODE_BOUNDS __launch_bounds__(256, 3)
#endif
#include "common.cuh"

// Elements of a group, rows of a tile, vectors across it, and its rows that a lane has.
enum { GROUP = 32, TILE_ROWS = 32, TILE_COLUMNS = 8, LANE_ROWS = 8 };

constexpr float MOST = (1 << BITS) - 1;

// What is stored of a group, and what encoding it needs.
struct Group {
    float least, half_least, step, inverse;
    bool finite;
    template <u32 E> __device__ __forceinline__ static Group of(float low, float high) {
        Group g;
        g.finite = fabsf(low) <= finite_max<F32>() && fabsf(high) <= finite_max<F32>();
        // One zero, whichever of the two the least element was.
        low = __fadd_rn(low, 0.0f);
        g.least = g.finite ? low : 0.0f;
        // Halves: what a group spans may be too much for a number. Also for groups that are not finite, whose codes must still fit their bits.
        g.half_least = __fmul_rn(0.5f, low);
        const float span = g.finite ? __fmaf_rn(0.5f, high, -g.half_least) : 0.0f;
        // Two steps of fused arithmetic round to the quotient (Markstein 1990): compared for all significands (see kernels/tests.rs).
        const float near = __fmul_rn(span, 2.0f / MOST);
        const float quotient = __fmaf_rn(__fmaf_rn(-0.5f * MOST, near, span), 2.0f / MOST, near);
        g.step = rounded<E>(fmaxf(quotient, scale_floor<E>()));
        g.inverse = __frcp_rn(__fmul_rn(0.5f, g.step));
        return g;
    }
};

// The code of an element, in the low bits of a word with the exponent of 2^23 above: adding that rounds to an integer.
__device__ __forceinline__ u32 code_of(float x, float half_least, float inverse) {
    return __float_as_uint(__fadd_rn(fminf(__fmul_rn(__fmaf_rn(0.5f, x, -half_least), inverse), MOST), 8388608.0f));
}

// Whether no element of a group is larger than `most`.
__device__ __forceinline__ bool leaves_room(float least, float step, float most) { return __fmaf_rn(2.0f * MOST, fabsf(step), fabsf(least)) <= most; }

__device__ __forceinline__ float decoded(u32 code, float least, float step) {
    return __fmaf_rn(__fsub_rn(__uint_as_float(code | 0x4b000000u), 8388608.0f), step, least);
}

template <bool B> struct Limited {
    static constexpr bool limited = B;
};

// Codes beside each other, the first in the lowest bits.
template <u32 N> __device__ __forceinline__ u32 packed(const u32* codes) {
    // The exponents add up to a constant.
    constexpr u32 EXPONENTS = 0x4b000000u + (0x4b000000u << BITS) + (BITS == 2 ? 0x4b000000u << 4 : 0) + (BITS == 2 ? 0x4b000000u << 6 : 0);
    u32 word = codes[N - 1];
#pragma unroll
    for (int i = N - 2; i >= 0; i--) word = (word << BITS) + codes[i];
    return word - EXPONENTS;
}

// Codes of one vector.
template <u32 E> struct Codes {
    static constexpr u32 N = Vector<E>::N, BYTES = Vector<E>::N * BITS / 8;

    __device__ __forceinline__ static u32 pack(const u32* codes) { return packed<N>(codes); }

    __device__ __forceinline__ static u32 code(u32 word, u32 i) { return word >> BITS * i & ((1 << BITS) - 1); }

    __device__ __forceinline__ static void store(u64 at, u32 word) {
        if (BYTES == 4) __stcs((u32*)at, word);
        else if (BYTES == 2) __stcs((u16*)at, (u16)word);
        else __stcs((u8*)at, (u8)word);
    }

    __device__ __forceinline__ static u32 load(u64 at) {
        if (BYTES == 4) return __ldcs((const u32*)at);
        if (BYTES == 2) return __ldcs((const u16*)at);
        return __ldcs((const u8*)at);
    }
};

// Whether the plane's rows and scales are whole vectors, and its heads whole tiles. The planes before this one may leave it at an odd address.
template <u32 E> __device__ __forceinline__ bool are_vectors(const Layout& L, const Plane& p) {
    return L.block_tokens % TILE_ROWS == 0 && ((p.row_bytes | p.raw) & 15) == 0 && p.codes % Codes<E>::BYTES == 0 && (!p.keys || (p.scales & 15) == 0);
}

// Where the tile with this number lies, and this lane in it.
template <u32 E> struct Tile {
    u32 row, column;
    bool active;
    // From this row and this column on.
    __device__ __forceinline__ Tile(u32 row, u32 column)
        : row(row + threadIdx.x % 32 / TILE_COLUMNS), column(column + threadIdx.x % TILE_COLUMNS), active(true) {}
    __device__ __forceinline__ Tile(const Plane& p, u32 tile) {
        const u32 lane = threadIdx.x % 32, per_row = p.dim / Vector<E>::N, across = (per_row + TILE_COLUMNS - 1) / TILE_COLUMNS;
        row = tile / across * TILE_ROWS + lane / TILE_COLUMNS;
        column = tile % across * TILE_COLUMNS + lane % TILE_COLUMNS;
        active = column < per_row;
    }
    __device__ __forceinline__ static u32 count(const Plane& p, u32 rows) {
        return rows / TILE_ROWS * ((p.dim / Vector<E>::N + TILE_COLUMNS - 1) / TILE_COLUMNS);
    }
    __device__ __forceinline__ static u32 stride() { return TILE_ROWS / LANE_ROWS; }
};

// The least elements and the steps of the keys of a lane, or one of a row of its values.
template <u32 E> __device__ __forceinline__ u64 leasts_of(const Layout& L, const Plane& p, u32 row, u32 first) {
    return p.scales + (u64)(row / (p.keys ? KEY_SCALE_ROWS : 1)) * p.scale_bytes + (u64)first * L.element_bytes;
}

// ---------------------------------------------------------------------------------------------------------------------
// Seal: extremes, encode and finite check in one read.

template <u32 E> __device__ __forceinline__ bool seal_keys(const Layout& L, const Plane& p, const Tile<E>& t, const uint4* v) {
    constexpr u32 N = Vector<E>::N;
    uint4 low = v[0], high = v[0];
    const auto widen = [&](const uint4& a, const uint4& b) {
        low = make_uint4(lesser<E>(low.x, a.x), lesser<E>(low.y, a.y), lesser<E>(low.z, a.z), lesser<E>(low.w, a.w));
        high = make_uint4(greater<E>(high.x, b.x), greater<E>(high.y, b.y), greater<E>(high.z, b.z), greater<E>(high.w, b.w));
    };
#pragma unroll
    for (u32 k = 1; k < LANE_ROWS; k++) widen(v[k], v[k]);
#pragma unroll
    for (u32 step = TILE_COLUMNS; step < 32; step *= 2) {
        const auto other = [&](u32 word) { return __shfl_xor_sync(0xffffffffu, word, step); };
        const uint4 a = make_uint4(other(low.x), other(low.y), other(low.z), other(low.w));
        const uint4 b = make_uint4(other(high.x), other(high.y), other(high.z), other(high.w));
        widen(a, b);
    }
    float least[N], half_least[N], step[N], inverse[N], most[N];
    unpack<E>(low, least), unpack<E>(high, most);
    u32 kept = 0;
#pragma unroll
    for (u32 i = 0; i < N; i++) {
        const Group g = Group::of<E>(least[i], most[i]);
        least[i] = g.least, half_least[i] = g.half_least, step[i] = g.step, inverse[i] = g.inverse;
        kept |= g.finite ? (1u << BITS) - 1 << BITS * i : 0;
    }
    if (t.active) {
        const u32 quarter = threadIdx.x % 32 / TILE_COLUMNS;
        const u64 at = leasts_of<E>(L, p, t.row, t.column * N);
        if (quarter == 0) __stcs((uint4*)at, pack<E>(least));
        if (quarter == 1) __stcs((uint4*)(at + p.scale_bytes / 2), pack<E>(step));
#pragma unroll
        for (u32 k = 0; k < LANE_ROWS; k++) {
            float x[N];
            u32 codes[N];
            unpack<E>(v[k], x);
#pragma unroll
            for (u32 i = 0; i < N; i++) codes[i] = code_of(x[i], half_least[i], inverse[i]);
            const u64 to = p.codes + (u64)(t.row + k * t.stride()) * p.code_bytes + t.column * Codes<E>::BYTES;
            Codes<E>::store(to, Codes<E>::pack(codes) & kept);
        }
    }
    return kept != (u32)((1ull << BITS * N) - 1);
}

template <u32 E> __device__ __forceinline__ bool seal_values(const Layout& L, const Plane& p, const Tile<E>& t, const uint4* v) {
    constexpr u32 N = Vector<E>::N, LANES = GROUP / N;
    const u32 lane = threadIdx.x % LANES, group = t.column * N / GROUP;
    // Whether all lanes of the group have elements: the last group of a row may be shorter.
    const bool whole = (group + 1) * LANES <= p.dim / N;
    bool bad = false;
#pragma unroll
    for (u32 k = 0; k < LANE_ROWS; k++) {
        const uint4& w = v[k];
        u32 low = lesser<E>(lesser<E>(w.x, w.y), lesser<E>(w.z, w.w)), high = greater<E>(greater<E>(w.x, w.y), greater<E>(w.z, w.w));
        // Beyond the last column there is nothing, which changes neither.
        if (!t.active) low = E == F16 ? 0x7bff7bffu : E == BF16 ? 0x7f7f7f7fu : 0x7f7fffffu, high = low | 0x80008000u;
        float least, most;
        if constexpr (E == F32) {
#pragma unroll
            for (u32 step = 1; step < LANES; step *= 2) {
                low = lesser<E>(low, __shfl_xor_sync(0xffffffffu, low, step));
                high = greater<E>(high, __shfl_xor_sync(0xffffffffu, high, step));
            }
            least = __uint_as_float(low), most = __uint_as_float(high);
        } else {
            // Both in one word: the greatest as the least of what is negated.
            low = lesser<E>(low, __byte_perm(low, low, 0x1032)), high = greater<E>(high, __byte_perm(high, high, 0x1032));
            u32 both = __byte_perm(low, high ^ 0x80008000u, 0x5410);
#pragma unroll
            for (u32 step = 1; step < LANES; step *= 2) both = lesser<E>(both, __shfl_xor_sync(0xffffffffu, both, step));
            float pair[2 * 4];
            unpack<E>(make_uint4(both, 0, 0, 0), pair);
            least = pair[0], most = -pair[1];
        }
        const Group g = Group::of<E>(least, most);
        bad |= !g.finite;
        if (!t.active) continue;
        const u32 row = t.row + k * t.stride();
        // The lanes of a group take turns in storing what they share, if all of them are there.
        if (lane == (whole ? k % LANES : 0)) {
            const u64 at = leasts_of<E>(L, p, row, group);
            store<E>((u8*)at, g.least);
            store<E>((u8*)at + p.scale_bytes / 2, g.step);
        }
        float x[N];
        u32 codes[N];
        unpack<E>(w, x);
#pragma unroll
        for (u32 i = 0; i < N; i++) codes[i] = code_of(x[i], g.half_least, g.inverse);
        const u32 word = g.finite ? Codes<E>::pack(codes) : 0;
        Codes<E>::store(p.codes + (u64)row * p.code_bytes + t.column * Codes<E>::BYTES, word);
    }
    return bad;
}

// Seals a tile of keys whose centres have to be taken off element by element. Rare, so it is kept out of the way of the others.
template <u32 E> __device__ __noinline__ bool seal_exactly(const Layout& L, const Convert& s, u32 tile) {
    const Plane p(L, s.from, s.to, plane_of(L));
    const Centre centre(L, plane_of(L), s.index);
    const Tile<E> t(p, tile);
    uint4 v[LANE_ROWS];
#pragma unroll
    for (u32 k = 0; k < LANE_ROWS; k++) {
        const u32 row = t.row + k * t.stride();
        v[k] = make_uint4(0, 0, 0, 0);
        if (t.active) v[k] = centre.shifted<E, OFF>(((const uint4*)(p.raw + (u64)row * p.row_bytes))[t.column], row, t.column * Vector<E>::N);
    }
    return seal_keys<E>(L, p, t, v);
}

// With `VALUES` it is known that they are none of keys.
template <u32 E, bool VALUES = false> __device__ __forceinline__ void seal_tiles(const Layout& L, const Convert& s, const Plane& p) {
    constexpr u32 N = Vector<E>::N;
    const bool keys = !VALUES && p.keys;
    const Centre centre(L, plane_of(L), s.index);
    bool bad = false;
    for (u32 tile = threadIdx.x / 32; tile < Tile<E>::count(p, p.rows); tile += blockDim.x / 32) {
        const Tile<E> t(p, tile);
        uint4 v[LANE_ROWS];
#pragma unroll
        for (u32 k = 0; k < LANE_ROWS; k++) {
            v[k] = make_uint4(0, 0, 0, 0);
            if (t.active) v[k] = __ldcs((const uint4*)(p.raw + (u64)(t.row + k * t.stride()) * p.row_bytes) + t.column);
        }
        if (!CENTRED || !keys) {
            bad |= keys ? seal_keys<E>(L, p, t, v) : seal_values<E>(L, p, t, v);
            continue;
        }
        // The rows of a tile are of one head. Lanes that have no column look at the first.
        const u32 head = t.row / L.block_tokens, token = t.row - head * L.block_tokens, d = t.active ? t.column * N : 0;
        bool again = !centre.fits<E>();
        if (!again) {
            __syncwarp();
            const Turned<E> turned = centre.of<E, OFF>(head, d);
            centre.of_kind(d, [&](auto kind) {
#pragma unroll
                for (u32 k = 0; k < LANE_ROWS; k++) {
                    const uint4 x = centre.quick<E, kind.other>(v[k], turned, token + k * t.stride(), d);
                    if (t.active) v[k] = x;
                }
            });
            again = seal_keys<E>(L, p, t, v);
        }
        if (__any_sync(0xffffffffu, again)) bad |= seal_exactly<E>(L, s, tile);
    }
    if (bad) raise(s.flag);
}

// One group after the other, a thread each.
template <u32 E> __device__ __forceinline__ void plain_seal(const Layout& L, const Convert& s, const Plane& p) {
    const Centre centre(L, plane_of(L), s.index);
    // Bytes of codes have more than one writer, of which each knows its own bits only.
    for (u32 i = threadIdx.x; i < p.rows * p.code_bytes; i += blockDim.x) ((u8*)p.codes)[i] = 0;
    __syncthreads();
    const u32 at_once = p.keys ? KEY_SCALE_ROWS : 1, per_set = p.keys ? p.dim : (p.dim + GROUP - 1) / GROUP;
    const u32 per_byte = 8 / BITS;
    // So a thread takes the channels (or groups) of as many keys (or values) as share a byte.
    const u32 width = p.keys ? per_byte : 1, parts = (per_set + width - 1) / width;
    for (u32 i = threadIdx.x; i < p.rows / at_once * parts; i += blockDim.x) {
        const u32 set = i / parts, first = i % parts * width;
        for (u32 group = first; group < min(first + width, per_set); group++) {
            const u32 from = p.keys ? group : group * GROUP, to = p.keys ? group + 1 : min(p.dim, from + GROUP);
            const auto element = [&](u32 row, u32 column) {
                const float x = load<E>((const u8*)p.raw + (u64)row * p.row_bytes + column * L.element_bytes);
                return centre.on ? centre.shifted<E, OFF>(x, row, column) : x;
            };
            float low = finite_max<F32>(), high = -finite_max<F32>();
            bool finite = true;
            for (u32 row = set * at_once; row < (set + 1) * at_once; row++) {
                for (u32 column = from; column < to; column++) {
                    const float x = element(row, column);
                    finite &= fabsf(x) <= finite_max<F32>();
                    low = fminf(low, x), high = fmaxf(high, x);
                }
            }
            const Group g = Group::of<E>(finite ? low : __uint_as_float(0x7fc00000u), high);
            const u64 at = leasts_of<E>(L, p, set * at_once, group);
            store<E>((u8*)at, g.least);
            store<E>((u8*)at + p.scale_bytes / 2, g.step);
            if (!finite) {
                raise(s.flag);
                continue;
            }
            for (u32 row = set * at_once; row < (set + 1) * at_once; row++) {
                for (u32 column = from; column < to; column++) {
                    u8* byte = (u8*)p.codes + (u64)row * p.code_bytes + column / per_byte;
                    *byte |= (code_of(element(row, column), g.half_least, g.inverse) & ((1 << BITS) - 1)) << column % per_byte * BITS;
                }
            }
        }
    }
}

template <u32 E> __device__ __forceinline__ void seal_plane(const Layout& L, const Convert& s, bool plain) {
    const Plane p(L, s.from, s.to, plane_of(L));
    if (plain || !are_vectors<E>(L, p)) plain_seal<E>(L, s, p);
    else seal_tiles<E>(L, s, p);
}

// ---------------------------------------------------------------------------------------------------------------------
// Decode

// Tiles of a plane, as many rows of each as `target` wants: it says where a row goes, or 0. Of values if it is known.
template <u32 E, bool VALUES = false, class Target>
__device__ __forceinline__ void decode_tile(const Layout& L, const Plane& p, const Centre& centre, const Tile<E>& t, Target target) {
    constexpr u32 N = Vector<E>::N;
    if (!t.active) return;
    const bool keys = !VALUES && p.keys, centred = CENTRED && !VALUES && centre.on;
    u32 codes[LANE_ROWS];
#pragma unroll
    for (u32 k = 0; k < LANE_ROWS; k++) {
        codes[k] = Codes<E>::load(p.codes + (u64)(t.row + k * t.stride()) * p.code_bytes + t.column * Codes<E>::BYTES);
    }
    float least[N], step[N];
    if (keys) {
        const u64 at = leasts_of<E>(L, p, t.row, t.column * N);
        unpack<E>(__ldg((const uint4*)at), least), unpack<E>(__ldg((const uint4*)(at + p.scale_bytes / 2)), step);
    } else {
        // The same of a row for all N: here of the rows of the lane.
#pragma unroll
        for (u32 k = 0; k < LANE_ROWS; k++) {
            const u64 at = leasts_of<E>(L, p, t.row + k * t.stride(), t.column * N / GROUP);
            if (k < N) least[k] = load<E>((const u8*)at), step[k] = load<E>((const u8*)at + p.scale_bytes / 2);
        }
    }
    // Whether no element of the lane's is too large, also with what may be added to it.
    const float most = finite_max<E>() - (centred ? centre.most : 0.0f);
    bool near = !keys || !centred || centre.fits<E>();
#pragma unroll
    for (u32 i = 0; i < N; i++) near &= leaves_room(least[i], step[i], most);
    const auto decode = [&](u32 k, auto kind) {
        float x[N];
        float m = least[k % N], s = step[k % N];
        bool limited = kind.limited;
        if (!keys && k >= N) {
            const u64 at = leasts_of<E>(L, p, t.row + k * t.stride(), t.column * N / GROUP);
            m = load<E>((const u8*)at), s = load<E>((const u8*)at + p.scale_bytes / 2);
            limited = false;
        }
#pragma unroll
        for (u32 i = 0; i < N; i++) {
            const u32 code = Codes<E>::code(codes[k], i);
            x[i] = keys ? decoded(code, least[i], step[i]) : decoded(code, m, s);
            if (!limited) x[i] = saturated<E>(x[i]);
        }
        return pack<E>(x);
    };
    const auto put = [&](u32 k, const uint4& v) {
        const u64 to = target(t.row + k * t.stride());
        if (to != 0) __stcs((uint4*)to + t.column, v);
    };
    if (near) {
        if (centred) {
            // The rows of a tile are of one head.
            const u32 head = t.row / L.block_tokens, token = t.row - head * L.block_tokens, d = t.column * N;
            const Turned<E> turned = centre.of<E, ON>(head, d);
            centre.of_kind(d, [&](auto kind) {
#pragma unroll
                for (u32 k = 0; k < LANE_ROWS; k++) put(k, centre.quick<E, kind.other>(decode(k, Limited<true>()), turned, token + k * t.stride(), d));
            });
            return;
        }
#pragma unroll
        for (u32 k = 0; k < LANE_ROWS; k++) put(k, decode(k, Limited<true>()));
        return;
    }
#pragma unroll
    for (u32 k = 0; k < LANE_ROWS; k++) put(k, decode(k, Limited<false>()));
    if (centred) {
#pragma unroll 1
        for (u32 k = 0; k < LANE_ROWS; k++) {
            const u32 row = t.row + k * t.stride();
            uint4* const at = (uint4*)target(row);
            if (at) at[t.column] = centre.shifted<E, ON>(at[t.column], row, t.column * N);
        }
    }
}

// One element.
template <u32 E>
__device__ __forceinline__ float decode_one(const Layout& L, const Plane& p, const Centre& centre, u32 row, u32 column) {
    const u64 at = leasts_of<E>(L, p, row, p.keys ? column : column / GROUP);
    const float least = load<E>((const u8*)at), step = load<E>((const u8*)at + p.scale_bytes / 2);
    const u32 byte = ((const u8*)p.codes)[(u64)row * p.code_bytes + column * BITS / 8];
    const float x = rounded<E>(saturated<E>(decoded(byte >> column * BITS % 8 & ((1 << BITS) - 1), least, step)));
    return centre.on ? centre.shifted<E, ON>(x, row, column) : x;
}

// Decodes a whole plane back to rows as they were.
template <u32 E, bool VALUES = false> __device__ __forceinline__ void reopen_plane(const Layout& L, const Convert& s, bool plain) {
    const Plane p(L, s.to, s.from, plane_of(L));
    const Centre centre(L, plane_of(L), s.index);
    if (!plain && are_vectors<E>(L, p)) {
        for (u32 tile = threadIdx.x / 32; tile < Tile<E>::count(p, p.rows); tile += blockDim.x / 32) {
            decode_tile<E, VALUES>(L, p, centre, Tile<E>(p, tile), [&](u32 row) { return p.raw + (u64)row * p.row_bytes; });
        }
        return;
    }
    for (u32 i = threadIdx.x; i < p.rows * p.dim; i += blockDim.x) {
        store<E>((u8*)p.raw + (u64)i * L.element_bytes, decode_one<E>(L, p, centre, i / p.dim, i % p.dim));
    }
}

// Gathers and decodes tokens of one layer: [kv_head][token][dim] to [tokens, kv_heads, dim].
template <u32 E, bool VALUES = false> __device__ __forceinline__ void read_plane(const Layout& L, const Read& r, bool plain) {
    const u32 plane = plane_of_read(L), row_bytes = L.row_bytes[plane];
    const Plane p(L, r.slot[plane], r.slot[plane], 2 * r.layer + plane);
    const Centre centre(L, 2 * r.layer + plane, r.index);
    const u64 output = r.output[plane];
    if (!plain && are_vectors<E>(L, p) && (output & 15) == 0) {
        // Rows of each head from the beginning of a tile on.
        const u32 begin = r.first_token / TILE_ROWS * TILE_ROWS;
        const u32 rows = (r.first_token + r.tokens - begin + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
        const u32 warps = blockDim.x / 32;
        const u32 of_head = Tile<E>::count(p, rows);
        for (u32 i = blockIdx.z * warps + threadIdx.x / 32; i < L.kv_heads * of_head; i += gridDim.z * warps) {
            const u32 head = i / of_head;
            Tile<E> t(p, i % of_head);
            t.row += head * L.block_tokens + begin;
            decode_tile<E, VALUES>(L, p, centre, t, [&](u32 row) -> u64 {
                const u32 token = row - head * L.block_tokens - r.first_token;
                return token < r.tokens ? output + (u64)(token * L.kv_heads + head) * row_bytes : 0;
            });
        }
        return;
    }
    for (u32 i = threadIdx.x + blockIdx.z * blockDim.x; i < r.tokens * L.kv_heads * p.dim; i += gridDim.z * blockDim.x) {
        const Place place(L, r, i / p.dim);
        store<E>((u8*)output + (u64)place.target * row_bytes + i % p.dim * L.element_bytes, decode_one<E>(L, p, centre, place.row, i % p.dim));
    }
}

FORMAT_KERNELS(F16, f16)
FORMAT_KERNELS(BF16, bf16)
FORMAT_KERNELS(F32, f32)

// ---------------------------------------------------------------------------------------------------------------------
#if CENTRED
// Keys all of whose dims turn, in rows of DIM elements of two bytes: a length that is known makes addresses cheap. Decoding is for pairs half a row apart.

// A lane has four dims of 16 rows of a tile, or of either half of a row: so few that what its rows have in common stays in registers.
enum { DIMS = 4, ROWS_BESIDE = 4 };

// The tiles are those of `Tile`. The dims of a pair are BESIDE each other, or half a row apart.
template <u32 E, u32 DIM, bool BESIDE> __device__ __forceinline__ void seal_turned(const Layout& L, const Convert& s, const Plane& p) {
    constexpr u32 COLUMNS = 16, ROWS = 16, APART = 2, HALF = DIM / 2, ACROSS = DIM / (COLUMNS * DIMS);
    constexpr u32 ROW = DIM * sizeof(u16), CODES = DIM * BITS / 8;
    Centre centre(L, plane_of(L), s.index);
    const u32 count = Tile<E>::count(p, p.rows), warps = blockDim.x / 32, lane = threadIdx.x % 32;
    bool bad = false;
    for (u32 tile = threadIdx.x / 32; tile < count; tile += warps) {
        const u32 row = tile / ACROSS * TILE_ROWS + lane / COLUMNS, d = (tile % ACROSS * COLUMNS + lane % COLUMNS) * DIMS;
        const u64 from = p.raw + (u64)row * ROW + d * sizeof(u16);
        uint2 v[ROWS];
#pragma unroll
        for (u32 k = 0; k < ROWS; k++) v[k] = __ldcs((const uint2*)(from + k * APART * ROW));
        const u32 head = row / L.block_tokens, token = row - head * L.block_tokens;
        const bool in_first = d < HALF;
        const u32 pair = BESIDE ? d / 2 : in_first ? d : d - HALF;
        // All that is loaded from here on comes behind the loads that take longest. No warp waits for others, as it would for means that they share.
        __syncwarp();
        float own[DIMS], other[DIMS];
        if (BESIDE) {
            centre.turned_beside(head, d, own, other);
        } else {
            centre.turned_halves<DIMS>(head, pair, own, other);
#pragma unroll
            for (u32 i = 0; i < DIMS; i++) {
                const float first = own[i], second = other[i];
                own[i] = in_first ? first : second, other[i] = in_first ? second : -first;
            }
        }
        const float* const cos = centre.cos + token * HALF + pair;
        const float* const sin = centre.sin + (cos - centre.cos);
#pragma unroll
        for (u32 k = 0; k < ROWS; k++) {
            float x[DIMS], c[DIMS], s[DIMS];
            unpack<E>(v[k], x);
            if (BESIDE) Centre::load_beside<DIMS>(cos + k * APART * HALF, sin + k * APART * HALF, c, s);
            else load_constant(cos + k * APART * HALF, c), load_constant(sin + k * APART * HALF, s);
#pragma unroll
            for (u32 i = 0; i < DIMS; i++) x[i] = __fmaf_rn(other[i], s[i], __fmaf_rn(-own[i], c[i], x[i]));
            v[k] = pack_half<E>(x);
        }
        uint2 low = v[0], high = v[0];
        const auto widen = [&](const uint2& a, const uint2& b) {
            low = make_uint2(lesser<E>(low.x, a.x), lesser<E>(low.y, a.y)), high = make_uint2(greater<E>(high.x, b.x), greater<E>(high.y, b.y));
        };
#pragma unroll
        for (u32 k = 1; k < ROWS; k++) widen(v[k], v[k]);
        const auto fellow = [&](u32 word) { return __shfl_xor_sync(0xffffffffu, word, COLUMNS); };
        const uint2 a = make_uint2(fellow(low.x), fellow(low.y)), b = make_uint2(fellow(high.x), fellow(high.y));
        widen(a, b);
        float least[DIMS], half_least[DIMS], step[DIMS], inverse[DIMS], most[DIMS];
        unpack<E>(low, least), unpack<E>(high, most);
        bool fine = true;
#pragma unroll
        for (u32 i = 0; i < DIMS; i++) {
            const Group g = Group::of<E>(least[i], most[i]);
            least[i] = g.least, half_least[i] = g.half_least, step[i] = g.step, inverse[i] = g.inverse;
            fine &= g.finite;
        }
        // Centres were taken off as if all were finite.
        if (!__all_sync(0xffffffffu, fine)) {
            bad |= seal_exactly<E>(L, s, tile);
            continue;
        }
        const u64 leasts = leasts_of<E>(L, p, row, d);
        if (lane < COLUMNS) __stcs((uint2*)leasts, pack_half<E>(least));
        else __stcs((uint2*)(leasts + p.scale_bytes / 2), pack_half<E>(step));
        const u64 to = p.codes + (u64)row * CODES + d * BITS / 8;
#pragma unroll
        for (u32 k = 0; k < ROWS; k++) {
            float x[DIMS];
            u32 codes[DIMS];
            unpack<E>(v[k], x);
#pragma unroll
            for (u32 i = 0; i < DIMS; i++) codes[i] = code_of(x[i], half_least[i], inverse[i]);
            const u32 word = packed<DIMS>(codes);
            if (BITS == 4) __stcs((u16*)(to + k * APART * CODES), (u16)word);
            else __stcs((u8*)(to + k * APART * CODES), (u8)word);
        }
    }
    if (bad) raise(s.flag);
}

// Whole blocks, or rows of each head from the beginning of a tile on: where a tile of DIMS of up to 16 lanes begins, which tokens
// are wanted, where the row of one goes, and how far it is to that of the next token.
template <u32 DIM> struct PlaceInBlock {
    static constexpr u32 COLUMNS = DIM / 2 / DIMS < 16 ? DIM / 2 / DIMS : 16, ACROSS = DIM / 2 / DIMS / COLUMNS;
    u64 raw;
    u32 block_tokens;
    __device__ __forceinline__ uint2 operator()(u32 tile) const { return make_uint2(tile / ACROSS * TILE_ROWS, tile % ACROSS * COLUMNS * DIMS); }
    __device__ __forceinline__ bool wants(u32) const { return true; }
    __device__ __forceinline__ u64 per_token() const { return DIM * sizeof(u16); }
    __device__ __forceinline__ u64 target(u32 head, u32 token) const { return raw + (u64)(head * block_tokens + token) * (DIM * sizeof(u16)); }
};

template <u32 DIM> struct PlaceInRead {
    static constexpr u32 COLUMNS = PlaceInBlock<DIM>::COLUMNS, ACROSS = PlaceInBlock<DIM>::ACROSS;
    const Layout& L;
    const Read& r;
    u64 output;
    u32 begin, of_head;
    __device__ __forceinline__ PlaceInRead(const Layout& L, const Read& r, u64 output) : L(L), r(r), output(output) {
        begin = r.first_token / TILE_ROWS * TILE_ROWS;
        of_head = (r.first_token + r.tokens - begin + TILE_ROWS - 1) / TILE_ROWS * ACROSS;
    }
    __device__ __forceinline__ uint2 operator()(u32 tile) const {
        const u32 head = tile / of_head, of = tile % of_head;
        return make_uint2(head * L.block_tokens + begin + of / ACROSS * TILE_ROWS, of % ACROSS * COLUMNS * DIMS);
    }
    __device__ __forceinline__ bool wants(u32 token) const { return token - r.first_token < r.tokens; }
    __device__ __forceinline__ u64 per_token() const { return L.kv_heads * (DIM * sizeof(u16)); }
    __device__ __forceinline__ u64 target(u32 head, u32 token) const {
        return output + head * (DIM * sizeof(u16)) + token * per_token() - r.first_token * per_token();
    }
};

// A tile of which some element may be too large for its centre. Rare, so it is kept out of the way of the others.
template <u32 E, u32 DIM, class Place> __device__ __noinline__ void decode_exactly(const Layout& L, Plane p, Centre centre, uint2 begin, Place place) {
    const u32 head = begin.x / L.block_tokens;
    for (u32 half = 0; half < 2; half++) {
        Tile<E> t(begin.x, (begin.y + half * DIM / 2) / Vector<E>::N);
        t.active = threadIdx.x % TILE_COLUMNS < Place::COLUMNS * DIMS / Vector<E>::N;
        decode_tile<E>(L, p, centre, t, [&](u32 row) -> u64 {
            const u32 token = row - head * L.block_tokens;
            return place.wants(token) ? place.target(head, token) : 0;
        });
    }
}

// Four codes of either half of a row, those of the second above.
template <u32 DIM> __device__ __forceinline__ u32 load_halves(u64 at) {
    constexpr u32 APART = DIM / 2 * BITS / 8;
    if (BITS == 4) return __ldcs((const u16*)at) | (u32)__ldcs((const u16*)(at + APART)) << 16;
    return __ldcs((const u8*)at) | (u32)__ldcs((const u8*)(at + APART)) << 16;
}

// Decodes tiles from `first` on, `apart` from each other.
template <u32 E, u32 DIM, class Place>
__device__ __forceinline__ void decode_halves(const Layout& L, const Plane& p, Centre centre, u32 tiles, u32 first, u32 apart, Place place) {
    constexpr u32 COLUMNS = Place::COLUMNS, ROWS = COLUMNS, APART = 32 / COLUMNS, HALF = DIM / 2, CODES = DIM * BITS / 8;
    const u32 lane = threadIdx.x % 32;
    for (u32 tile = first + threadIdx.x / 32; tile < tiles; tile += apart) {
        const uint2 begin = place(tile);
        const u32 row = begin.x + lane / COLUMNS, d = begin.y + lane % COLUMNS * DIMS;
        u64 from = p.codes + (u64)row * CODES + d * BITS / 8;
        u32 codes[ROWS_BESIDE];
        const auto load = [&] {
#pragma unroll
            for (u32 k = 0; k < ROWS_BESIDE; k++) codes[k] = load_halves<DIM>(from + k * APART * CODES);
            from += ROWS_BESIDE * APART * CODES;
        };
        load();
        float least[2][DIMS], step[2][DIMS];
        // No element is so large then that a centre could make it too large.
        bool near = true;
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            const u64 at = leasts_of<E>(L, p, row, d + half * HALF);
            unpack<E>(__ldg((const uint2*)at), least[half]), unpack<E>(__ldg((const uint2*)(at + p.scale_bytes / 2)), step[half]);
#pragma unroll
            for (u32 i = 0; i < DIMS; i++) near &= leaves_room(least[half][i], step[half][i], finite_max<E>() - centre.most);
        }
        const u32 head = row / L.block_tokens;
        float of_x[DIMS], of_y[DIMS];
        __syncwarp();
        centre.turned_halves<DIMS>(head, d, of_x, of_y);
        if (!__all_sync(0xffffffffu, near)) {
            decode_exactly<E, DIM>(L, p, centre, begin, place);
            continue;
        }
        u32 token = row - head * L.block_tokens;
        const float *cos = centre.cos + token * HALF + d, *sin = centre.sin + token * HALF + d;
        u64 to = place.target(head, token) + d * sizeof(u16);
        // A loop that stays one: of all rows at once the compiler would keep too much.
#pragma unroll 1
        for (u32 turns = ROWS / ROWS_BESIDE; turns > 0; turns--) {
            u32 words[ROWS_BESIDE];
#pragma unroll
            for (u32 k = 0; k < ROWS_BESIDE; k++) words[k] = codes[k];
            if (turns > 1) load();
#pragma unroll
            for (u32 k = 0; k < ROWS_BESIDE; k++) {
                float x[DIMS], y[DIMS], c[DIMS], s[DIMS];
#pragma unroll
                for (u32 i = 0; i < DIMS; i++) {
                    x[i] = decoded(words[k] >> i * BITS & ((1 << BITS) - 1), least[0][i], step[0][i]);
                    y[i] = decoded(words[k] >> (16 + i * BITS) & ((1 << BITS) - 1), least[1][i], step[1][i]);
                }
                unpack<E>(pack_half<E>(x), x), unpack<E>(pack_half<E>(y), y);
                Centre::load_table<DIMS>(cos + k * APART * HALF, c), Centre::load_table<DIMS>(sin + k * APART * HALF, s);
#pragma unroll
                for (u32 i = 0; i < DIMS; i++) Centre::add_turned(x[i], y[i], of_x[i], of_y[i], c[i], s[i]);
                if (place.wants(token + k * APART)) __stcs((uint2*)to, pack_half<E>(x)), __stcs((uint2*)(to + HALF * sizeof(u16)), pack_half<E>(y));
                to += APART * place.per_token();
            }
            token += ROWS_BESIDE * APART, cos += ROWS_BESIDE * APART * HALF, sin += ROWS_BESIDE * APART * HALF;
        }
    }
}

// Whether keys are for these kernels, and those that decode besides.
template <u32 E, u32 DIM> __device__ __forceinline__ bool are_turned(const Layout& L, const Plane& p, const Centre& centre) {
    return p.dim == DIM && are_vectors<E>(L, p) && centre.all_turn<E>();
}
template <u32 E, u32 DIM> __device__ __forceinline__ bool are_halves(const Layout& L, const Plane& p, const Centre& centre) {
    return are_turned<E, DIM>(L, p, centre) && centre.apart != 1;
}

template <u32 E, u32 DIM> __device__ __forceinline__ void seal_paired(const Layout& L, const Convert& s) {
    const Plane p(L, s.from, s.to, plane_of(L));
    if (!p.keys && are_vectors<E>(L, p)) seal_tiles<E, true>(L, s, p);
    else if (p.keys && are_turned<E, DIM>(L, p, Centre(L, plane_of(L), s.index))) {
        if (L.centres.apart == 1) seal_turned<E, DIM, true>(L, s, p);
        else seal_turned<E, DIM, false>(L, s, p);
    } else if (p.keys && are_vectors<E>(L, p)) {
        bool bad = false;
        for (u32 tile = threadIdx.x / 32; tile < Tile<E>::count(p, p.rows); tile += blockDim.x / 32) bad |= seal_exactly<E>(L, s, tile);
        if (bad) raise(s.flag);
    } else plain_seal<E>(L, s, p);
}

template <u32 E, u32 DIM> __device__ __forceinline__ void reopen_paired(const Layout& L, const Convert& s) {
    const Plane p(L, s.to, s.from, plane_of(L));
    const Centre centre(L, plane_of(L), s.index);
    if (!p.keys) return reopen_plane<E, true>(L, s, false);
    if (!are_halves<E, DIM>(L, p, centre)) return reopen_plane<E>(L, s, true);
    const PlaceInBlock<DIM> place{p.raw, L.block_tokens};
    decode_halves<E, DIM>(L, p, centre, p.rows / TILE_ROWS * place.ACROSS, 0, blockDim.x / 32, place);
}

template <u32 E, u32 DIM> __device__ __forceinline__ void read_paired(const Layout& L, const Read& r) {
    const u32 plane = plane_of_read(L), warps = blockDim.x / 32;
    const Plane p(L, r.slot[plane], r.slot[plane], 2 * r.layer + plane);
    const Centre centre(L, 2 * r.layer + plane, r.index);
    const u64 output = r.output[plane];
    if (!p.keys) return read_plane<E, true>(L, r, false);
    if ((output & 15) != 0 || !are_halves<E, DIM>(L, p, centre)) return read_plane<E>(L, r, true);
    const PlaceInRead<DIM> place(L, r, output);
    decode_halves<E, DIM>(L, p, centre, L.kv_heads * place.of_head, blockIdx.z * warps, gridDim.z * warps, place);
}

PAIRED_KERNELS(paired64, f16, __launch_bounds__(256, 3), __launch_bounds__(256, 3), F16, 64)
PAIRED_KERNELS(paired64, bf16, __launch_bounds__(256, 3), __launch_bounds__(256, 3), BF16, 64)
PAIRED_KERNELS(paired128, f16, __launch_bounds__(256, 3), __launch_bounds__(256, 3), F16, 128)
PAIRED_KERNELS(paired128, bf16, __launch_bounds__(256, 3), __launch_bounds__(256, 3), BF16, 128)
#endif
