// Formats of one byte an element under one scale a row. Expects `Code`, which says what a byte means, and `Quantiser`, which makes bytes of many
// elements under one scale: `code` of one, of which `word` puts four together with their signs, unless `exact` says that `Code` has to.

template <u32 E> __device__ __forceinline__ void write_scale(u8* at, float scale) {
    if (E == F16) *(__half*)at = __float2half_rn(scale);
    else *(float*)at = scale;
}

template <u32 E> __device__ __forceinline__ float read_scale(const u8* at) {
    if (E == F16) return __half2float(*(const __half*)at);
    return *(const float*)at;
}

// Four bytes that begin with the signs of four elements: of two words of 16-bit ones, of four words.
__device__ __forceinline__ u32 signs_of(u32 a, u32 b) { return __byte_perm(a, b, 0x7531); }
__device__ __forceinline__ u32 signs_of(u32 a, u32 b, u32 c, u32 d) {
    return __byte_perm(__byte_perm(a, b, 0x0073), __byte_perm(c, d, 0x0073), 0x5410);
}

template <u32 E> __device__ __forceinline__ float decoded(float code, float scale) { return saturated<E>(__fmul_rn(code, scale)); }

// ---------------------------------------------------------------------------------------------------------------------
// Seal: abs-max, encode and finite check in one read.

// The codes of a vector without the short cut. Rare, so it is kept out of the way of the others.
template <u32 E> __device__ __noinline__ uint2 codes_exact(uint4 v, float scale) {
    float x[Vector<E>::N];
    unpack<E>(v, x);
    uint2 codes = make_uint2(0, 0);
#pragma unroll
    for (u32 i = 0; i < Vector<E>::N; i++) (i < 4 ? codes.x : codes.y) |= Code::exact(x[i], scale) << 8 * (i % 4);
    return codes;
}

// The codes of a vector under the scale of a quantiser.
template <u32 E> __device__ __forceinline__ uint2 codes_of(const uint4& v, Quantiser<E>& q, float scale) {
    constexpr u32 N = Vector<E>::N;
    if (q.exact) return codes_exact<E>(v, scale);
    float x[N];
    unpack<E>(v, x);
    u32 code[8];
#pragma unroll
    for (u32 i = 0; i < N; i++) code[i] = q.code(x[i]);
    if (N == 4) return make_uint2(q.word(code, signs_of(v.x, v.y, v.z, v.w)), 0);
    return make_uint2(q.word(code, signs_of(v.x, v.y)), q.word(code + 4, signs_of(v.z, v.w)));
}

template <u32 E> __device__ __forceinline__ void put_codes(u64 at, const uint2& codes) {
    if (Vector<E>::N == 8) __stcs((uint2*)at, codes);
    else __stcs((u32*)at, codes.x);
}

// Rows that a thread of a seal has on their way at once.
#ifndef SEAL_UNROLL
#define SEAL_UNROLL 8
#endif

// Scales of `count` consecutive rows.
template <u32 E, u32 MOST = SEAL_UNROLL> __device__ __forceinline__ void write_scales(u64 at, const float* scales, u32 count) {
    const u32 N = E == F16 ? 8 : 4;
    if (count == MOST && MOST % N == 0 && (at & 15) == 0) {
#pragma unroll
        for (u32 first = 0; first < MOST; first += N) {
            const uint4 v = pack<E == F16 ? F16 : F32>(scales + first);
            __stcs((uint4*)at + first / N, v);
        }
        return;
    }
#pragma unroll
    for (u32 k = 0; k < MOST; k++) {
        if (k < count) write_scale<E>((u8*)at + k * (E == F16 ? 2 : 4), scales[k]);
    }
}

// Whether rows are whole vectors. The planes before this one may leave it at an odd address.
__device__ __forceinline__ bool are_vectors(const Plane& p) { return ((p.row_bytes | p.raw) & 15) == 0 && (p.codes & 7) == 0; }

// Makes the largest of each row known to all of its `lanes` threads.
template <u32 COUNT> __device__ __forceinline__ void share_most(u32* most, u32 lanes) {
    for (u32 step = lanes / 2; step > 0; step /= 2) {
#pragma unroll
        for (u32 k = 0; k < COUNT; k++) most[k] = max(most[k], __shfl_xor_sync(0xffffffffu, most[k], step));
    }
}

// One row by `lanes` threads, each with one vector; UNROLL consecutive rows a thread so that enough loads are under way.
template <u32 E, bool SHIFTS>
__device__ __forceinline__ void seal_rows(const Layout& L, const Convert& s, u32 lanes) {
    const u32 UNROLL = SEAL_UNROLL, N = Vector<E>::N;
    const Plane p(L, s.from, s.to, plane_of(L));
    const Centre centre(L, plane_of(L), s.index);
    const u32 lane = threadIdx.x % lanes, group = threadIdx.x / lanes, groups = blockDim.x / lanes;
    const bool active = lane * 16 < p.row_bytes;
    // Whether the rows of a thread are of one head, of which vectors of means can be had: all of them or none.
    const bool quick = SHIFTS && centre.fits<E>() && L.block_tokens % UNROLL == 0;
    bool bad = false;
    // The whole block takes every turn: shuffles need all lanes of a warp.
    for (u32 first = 0; first < p.rows; first += groups * UNROLL) {
        const u32 row = first + group * UNROLL, count = row < p.rows ? min(p.rows - row, UNROLL) : 0;
        const u64 from = p.raw + (u64)row * p.row_bytes + lane * 16;
        const u64 to = p.codes + (u64)row * p.dim + lane * N;
        uint4 v[UNROLL];
        u32 most[UNROLL];
        float scales[UNROLL];
#pragma unroll
        for (u32 k = 0; k < UNROLL; k++) {
            v[k] = make_uint4(0, 0, 0, 0);
            if (active && k < count) v[k] = __ldcs((const uint4*)(from + k * p.row_bytes));
        }
        if constexpr (SHIFTS) {
            if (quick) {
                // Threads that have no rows look at the first ones.
                const bool mine = active && count > 0;
                const u32 head = mine ? row / L.block_tokens : 0, token = mine ? row - head * L.block_tokens : 0, d = mine ? lane * N : 0;
                const Turned<E> turned = centre.of<E, OFF>(head, d);
                centre.of_kind(d, [&](auto kind) {
#pragma unroll
                    for (u32 k = 0; k < UNROLL; k++) {
                        const uint4 x = centre.quick<E, kind.other>(v[k], turned, token + k, d);
                        if (mine) v[k] = x;
                    }
                });
            }
        }
        bool again = SHIFTS && centre.on && !quick;
#pragma unroll
        for (u32 k = 0; k < UNROLL; k++) {
            most[k] = abs_max_bits<E>(v[k]);
            again |= SHIFTS && quick && most[k] >= infinity_bits<E>();
        }
        if (SHIFTS && again) {
            // As it has to be done where something is not finite, or becomes so.
#pragma unroll
            for (u32 k = 0; k < UNROLL; k++) {
                if (!active || k >= count) continue;
                v[k] = centre.shifted<E, OFF>(*(const uint4*)(from + k * p.row_bytes), row + k, lane * N);
                most[k] = abs_max_bits<E>(v[k]);
            }
        }
        share_most<UNROLL>(most, lanes);
#pragma unroll
        for (u32 k = 0; k < UNROLL; k++) {
            const bool finite = most[k] < infinity_bits<E>();
            bad |= !finite;
            const float scale = Code::stored_scale<E>(finite ? from_bits<E>(most[k]) : 0.0f);
            scales[k] = scale;
            Quantiser<E> q(scale);
            uint2 codes = codes_of<E>(v[k], q, scale);
            if (!finite) codes = make_uint2(0, 0);
            if (active && k < count) put_codes<E>(to + k * p.dim, codes);
        }
        if (lane == 0 && count > 0) write_scales<E>(p.scales + (u64)row * p.scale_bytes, scales, count);
    }
    if (bad) raise(s.flag);
}

template <u32 E>
__device__ __forceinline__ void plain_seal_rows(const Layout& L, const Convert& s) {
    const Plane p(L, s.from, s.to, plane_of(L));
    const Centre centre(L, plane_of(L), s.index);
    for (u32 row = threadIdx.x; row < p.rows; row += blockDim.x) {
        const auto element = [&](u32 i) {
            const float x = load<E>((const u8*)p.raw + (u64)row * p.row_bytes + i * L.element_bytes);
            return centre.on ? centre.shifted<E, OFF>(x, row, i) : x;
        };
        float most = 0.0f;
        bool finite = true;
        for (u32 i = 0; i < p.dim; i++) {
            const float x = element(i);
            finite &= fabsf(x) <= finite_max<F32>();
            most = fmaxf(most, fabsf(x));
        }
        const float scale = Code::stored_scale<E>(finite ? most : 0.0f);
        for (u32 i = 0; i < p.dim; i++) {
            ((u8*)p.codes)[(u64)row * p.dim + i] =
                finite ? (u8)Code::exact(element(i), scale) : 0;
        }
        write_scale<E>((u8*)p.scales + (u64)row * p.scale_bytes, scale);
        if (!finite) raise(s.flag);
    }
}

// Threads of a row.
__device__ __forceinline__ u32 lanes_of(u32 row_bytes) { return row_bytes > 256 ? 32 : row_bytes > 128 ? 16 : row_bytes > 64 ? 8 : 4; }

// The widest row that seal_rows takes is 32 vectors; wider ones and odd ones are the plain kernel's.
template <u32 E, bool SHIFTS = CENTRED>
__device__ __forceinline__ void seal_plane(const Layout& L, const Convert& s, bool plain) {
    const u32 row_bytes = L.row_bytes[plane_of(L) & 1];
    if (plain || row_bytes > 512 || !are_vectors(Plane(L, s.from, s.to, plane_of(L)))) plain_seal_rows<E>(L, s);
    else seal_rows<E, SHIFTS>(L, s, lanes_of(row_bytes));
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
    for (u32 i = 0; i < N; i++) x[i] = Code::value(i < 4 ? codes.x : codes.y, i % 4);
    // Saturation is for scales that the largest code does not fit under, and for what is no number: the same for a whole row.
    if (!(fabsf(scale) <= finite_max<E>() / Code::BOUND)) {
#pragma unroll
        for (u32 i = 0; i < N; i++) x[i] = decoded<E>(x[i], scale);
    } else {
#pragma unroll
        for (u32 i = 0; i < N; i++) x[i] = __fmul_rn(x[i], scale);
    }
    return pack<E>(x);
}

// Whether no element under this scale is so large that a centre could make it too large.
template <u32 E> __device__ __forceinline__ bool leaves_room(const Centre& centre, float scale) {
    return fabsf(scale) <= (finite_max<E>() - centre.most) / Code::BOUND;
}

// Decodes vectors of consecutive tokens of a head and puts the centres of the first `tokens` back. Gives the set of those whose centres it did not add.
template <u32 E, typename F>
__device__ __forceinline__ u32 decode_centred(const Centre& centre, const Turned<E>& turned, u32 token, u32 tokens, u32 d, const uint2* codes, const float* scale, F put) {
    u32 left = 0;
    centre.of_kind(d, [&](auto kind) {
#pragma unroll
        for (u32 k = 0; k < DECODE_UNROLL; k++) {
            const uint4 v = decode_vector<E>(codes[k], scale[k]);
            const bool near = k < tokens && leaves_room<E>(centre, scale[k]);
            left |= near ? 0 : 1u << k;
            const uint4 x = centre.quick<E, kind.other>(v, turned, min(token + k, centre.block_tokens - 1), d);
            put(k, near ? x : v);
        }
    });
    return left;
}

// Puts centres back on what a thread has stored: of the rows in the set, whose places `place` gives if they are some. Rare, so it is out of
// the way of the others.
template <u32 E, typename F> __device__ __forceinline__ void put_centres(const Centre& centre, u32 set, u32 d, F place) {
#pragma unroll 1
    for (u32 k = 0; k < DECODE_UNROLL; k++) {
        u32 row;
        uint4* const at = set >> k & 1 ? place(k, row) : nullptr;
        if (at) *at = centre.shifted<E, ON>(*at, row, d);
    }
}

// Decodes a whole plane back to rows as they were.
template <u32 E, bool SHIFTS = CENTRED>
__device__ __forceinline__ void reopen_plane(const Layout& L, const Convert& s, bool plain) {
    const Plane p(L, s.to, s.from, plane_of(L));
    const Centre centre(L, plane_of(L), s.index);
    const u32 N = Vector<E>::N, per_row = p.dim / N;
    if (!plain && are_vectors(p) && per_row <= blockDim.x) {
        const Columns c(per_row);
        if (!c.active) return;
        const bool quick = SHIFTS && centre.fits<E>() && L.block_tokens % DECODE_UNROLL == 0;
        for (u32 first = c.first(); first < p.rows; first += c.rows_at_once * DECODE_UNROLL) {
            uint2 codes[DECODE_UNROLL];
            float scale[DECODE_UNROLL];
#pragma unroll
            for (u32 k = 0; k < DECODE_UNROLL; k++) {
                const u32 row = min(first + k * c.apart(), p.rows - 1);
                codes[k] = load_codes<E>(p.codes + (u64)row * p.dim + c.column * N);
                scale[k] = read_scale<E>((const u8*)p.scales + (u64)row * p.scale_bytes);
            }
            u32 left = 0;
            const auto put = [&](u32 k, uint4 v) {
                const u32 row = first + k * c.apart();
                if (row < p.rows) __stcs((uint4*)(p.raw + (u64)row * p.row_bytes) + c.column, v);
            };
            if (quick) {
                const u32 head = min(first, p.rows - 1) / L.block_tokens, token = first - head * L.block_tokens;
                const Turned<E> turned = centre.of<E, ON>(head, c.column * N);
                left = decode_centred<E>(centre, turned, token, DECODE_UNROLL, c.column * N, codes, scale, put);
            } else {
                left = ~0u;
#pragma unroll
                for (u32 k = 0; k < DECODE_UNROLL; k++) put(k, decode_vector<E>(codes[k], scale[k]));
            }
            if (SHIFTS && centre.on && left) {
                put_centres<E>(centre, left, c.column * N, [&](u32 k, u32& row) {
                    row = first + k * c.apart();
                    return row < p.rows ? (uint4*)(p.raw + (u64)row * p.row_bytes) + c.column : nullptr;
                });
            }
        }
        return;
    }
    for (u32 i = threadIdx.x; i < p.rows * p.dim; i += blockDim.x) {
        const float scale = read_scale<E>((const u8*)p.scales + (u64)(i / p.dim) * p.scale_bytes);
        float x = rounded<E>(decoded<E>(Code::value(((const u8*)p.codes)[i], 0), scale));
        if (centre.on) x = centre.shifted<E, ON>(x, i / p.dim, i % p.dim);
        store<E>((u8*)p.raw + (u64)i * L.element_bytes, x);
    }
}

// Gathers and decodes tokens of one layer: [kv_head][token][dim] to [tokens, kv_heads, dim].
template <u32 E, bool SHIFTS = CENTRED>
__device__ __forceinline__ void read_plane(const Layout& L, const Read& r, bool plain) {
    const u32 plane = plane_of_read(L), N = Vector<E>::N, row_bytes = L.row_bytes[plane];
    const Plane p(L, r.slot[plane], r.slot[plane], 2 * r.layer + plane);
    const Centre centre(L, 2 * r.layer + plane, r.index);
    const u64 output = r.output[plane];
    const u32 rows = r.tokens * L.kv_heads, per_row = p.dim / N;
    if (!plain && are_vectors(p) && (output & 15) == 0 && per_row <= blockDim.x) {
        const Columns c(per_row);
        if (!c.active) return;
        for (u32 first = c.first() + blockIdx.z * c.rows_at_once * DECODE_UNROLL; first < rows;
             first += gridDim.z * c.rows_at_once * DECODE_UNROLL) {
            uint2 codes[DECODE_UNROLL];
            u32 to[DECODE_UNROLL];
            float scale[DECODE_UNROLL];
#pragma unroll
            for (u32 k = 0; k < DECODE_UNROLL; k++) {
                const Place place(L, r, min(first + k * c.apart(), rows - 1));
                to[k] = place.target;
                codes[k] = load_codes<E>(p.codes + (u64)place.row * p.dim + c.column * N);
                scale[k] = read_scale<E>((const u8*)p.scales + (u64)place.row * p.scale_bytes);
            }
            u32 left = ~0u;
            const auto put = [&](u32 k, uint4 v) {
                if (first + k * c.apart() < rows) __stcs((uint4*)(output + (u64)to[k] * row_bytes) + c.column, v);
            };
            if (SHIFTS && centre.fits<E>()) {
                const Place at(L, r, min(first, rows - 1));
                const Turned<E> turned = centre.of<E, ON>(at.head, c.column * N);
                // The next head's rows may begin before the last of these.
                left = decode_centred<E>(centre, turned, at.token, r.first_token + r.tokens - at.token, c.column * N, codes, scale, put);
            } else {
#pragma unroll
                for (u32 k = 0; k < DECODE_UNROLL; k++) put(k, decode_vector<E>(codes[k], scale[k]));
            }
            if (SHIFTS && centre.on && left) {
                put_centres<E>(centre, left, c.column * N, [&](u32 k, u32& row) {
                    const Place place(L, r, min(first + k * c.apart(), rows - 1));
                    row = place.row;
                    return first + k * c.apart() < rows ? (uint4*)(output + (u64)place.target * row_bytes) + c.column : nullptr;
                });
            }
        }
        return;
    }
    for (u32 i = threadIdx.x + blockIdx.z * blockDim.x; i < rows * p.dim; i += gridDim.z * blockDim.x) {
        const u32 column = i % p.dim;
        const Place place(L, r, i / p.dim);
        const float scale = read_scale<E>((const u8*)p.scales + (u64)place.row * p.scale_bytes);
        const u32 code = ((const u8*)p.codes)[(u64)place.row * p.dim + column];
        float x = rounded<E>(decoded<E>(Code::value(code, 0), scale));
        if (centre.on) x = centre.shifted<E, ON>(x, place.row, column);
        store<E>((u8*)output + (u64)place.target * row_bytes + column * L.element_bytes, x);
    }
}

FORMAT_KERNELS(F16, f16)
FORMAT_KERNELS(BF16, bf16)
FORMAT_KERNELS(F32, f32)

// ---------------------------------------------------------------------------------------------------------------------
#if CENTRED
// Rows that a thread of these seals has on their way at once, and of these decodes.
constexpr u32 HALF_SEAL_ROWS = 2, HALF_DECODE_ROWS = 4;

// Keys whose pairs lie half a row apart: a row by `lanes` threads, each with a vector of either half, whose turns are one.
template <u32 E>
__device__ __forceinline__ void seal_halves(const Layout& L, const Convert& s, Centre centre, u32 lanes) {
    constexpr u32 UNROLL = HALF_SEAL_ROWS, N = Vector<E>::N;
    const Plane p(L, s.from, s.to, plane_of(L));
    const u32 lane = threadIdx.x % lanes, group = threadIdx.x / lanes, groups = blockDim.x / lanes;
    const u32 d = lane * N, half_bytes = p.row_bytes / 2, half_dim = p.dim / 2;
    bool bad = false;
    for (u32 first = 0; first < p.rows; first += groups * UNROLL) {
        // Threads that have no rows look at the last ones.
        const bool mine = first + group * UNROLL < p.rows;
        const u32 row = mine ? first + group * UNROLL : p.rows - UNROLL;
        const u64 from = p.raw + (u64)row * p.row_bytes + lane * 16;
        const u64 to = p.codes + (u64)row * p.dim + d;
        uint4 a[UNROLL], b[UNROLL];
        u32 most[UNROLL];
        float scales[UNROLL];
#pragma unroll
        for (u32 k = 0; k < UNROLL; k++) {
            a[k] = __ldcs((const uint4*)(from + k * p.row_bytes));
            b[k] = __ldcs((const uint4*)(from + k * p.row_bytes + half_bytes));
        }
        // Behind the loads that take longest.
        if (first == 0) centre.turn<E>();
        const u32 head = row / L.block_tokens, token = row - head * L.block_tokens;
#pragma unroll
        for (u32 k = 0; k < UNROLL; k++) centre.quick_halves<E, OFF>(a[k], b[k], centre.turned + head * p.dim + d, token + k, d);
        bool again = false;
#pragma unroll
        for (u32 k = 0; k < UNROLL; k++) {
            most[k] = max(abs_max_bits<E>(a[k]), abs_max_bits<E>(b[k]));
            again |= most[k] >= infinity_bits<E>();
        }
        if (again) {
#pragma unroll
            for (u32 k = 0; k < UNROLL; k++) {
                a[k] = centre.shifted<E, OFF>(*(const uint4*)(from + k * p.row_bytes), row + k, d);
                b[k] = centre.shifted<E, OFF>(*(const uint4*)(from + k * p.row_bytes + half_bytes), row + k, d + half_dim);
                most[k] = max(abs_max_bits<E>(a[k]), abs_max_bits<E>(b[k]));
            }
        }
        share_most<UNROLL>(most, lanes);
#pragma unroll
        for (u32 k = 0; k < UNROLL; k++) {
            const bool finite = most[k] < infinity_bits<E>();
            bad |= !finite;
            const float scale = Code::stored_scale<E>(finite ? from_bits<E>(most[k]) : 0.0f);
            scales[k] = scale;
            Quantiser<E> q(scale);
            uint2 of_a = codes_of<E>(a[k], q, scale), of_b = codes_of<E>(b[k], q, scale);
            if (!finite) of_a = of_b = make_uint2(0, 0);
            if (mine) put_codes<E>(to + k * p.dim, of_a), put_codes<E>(to + k * p.dim + half_dim, of_b);
        }
        if (lane == 0 && mine) write_scales<E, UNROLL>(p.scales + (u64)row * p.scale_bytes, scales, UNROLL);
    }
    if (bad) raise(s.flag);
}

template <u32 E> __device__ __forceinline__ void seal_paired(const Layout& L, const Convert& s) {
    const Plane p(L, s.from, s.to, plane_of(L));
    const Centre centre(L, plane_of(L), s.index);
    if (!centre.on) return seal_plane<E, false>(L, s, false);
    const u32 lanes = lanes_of(p.row_bytes) / 2;
    if (p.row_bytes == 32 * lanes && centre.halves<E>() && are_vectors(p)) seal_halves<E>(L, s, centre, lanes);
    else plain_seal_rows<E>(L, s);
}

// Decodes keys whose pairs lie half a row apart: `tokens` of each head from `first_token` on, to the rows of `output` that `target` names. A thread has a
// vector of either half of a row, whose turns are one.
template <u32 E, typename F>
__device__ __forceinline__ void decode_halves(const Layout& L, const Plane& p, Centre centre, u64 output, u32 first_token, u32 tokens, u32 part, u32 parts, F target) {
    constexpr u32 N = Vector<E>::N, ROWS = HALF_DECODE_ROWS;
    const Columns c(p.dim / N / 2);
    const u32 d = c.column * N, half_dim = p.dim / 2, rows = L.kv_heads * tokens, at_once = c.rows_at_once * ROWS;
    // The whole block takes every turn.
    for (u32 turn = part * at_once; turn < rows; turn += parts * at_once) {
        const u32 first = min(turn + c.row * ROWS, rows - 1);
        uint2 a[ROWS], b[ROWS];
        float scale[ROWS];
        u32 head[ROWS], token[ROWS];
        head[0] = first / tokens, token[0] = first - head[0] * tokens;
#pragma unroll
        for (u32 k = 1; k < ROWS; k++) {
            // Beyond the last row, that one.
            const bool next = token[k - 1] + 1 == tokens, last = first + k >= rows;
            token[k] = last ? token[k - 1] : next ? 0 : token[k - 1] + 1, head[k] = head[k - 1] + (next && !last ? 1 : 0);
        }
#pragma unroll
        for (u32 k = 0; k < ROWS; k++) {
            const u32 row = head[k] * L.block_tokens + first_token + token[k];
            const u64 at = p.codes + (u64)row * p.dim + d;
            a[k] = load_codes<E>(at), b[k] = load_codes<E>(at + half_dim);
            scale[k] = read_scale<E>((const u8*)p.scales + (u64)row * p.scale_bytes);
        }
        // Behind the loads that take longest.
        if (turn == part * at_once) centre.turn<E>();
        const u32 count = c.active && turn + c.row * ROWS < rows ? rows - first : 0;
#pragma unroll
        for (u32 k = 0; k < ROWS; k++) {
            if (k >= count) break;
            const u32 of_block = first_token + token[k];
            uint4 x = decode_vector<E>(a[k], scale[k]), y = decode_vector<E>(b[k], scale[k]);
            if (leaves_room<E>(centre, scale[k])) {
                centre.quick_halves<E, ON>(x, y, centre.turned + head[k] * p.dim + d, of_block, d);
            } else {
                const u32 row = head[k] * L.block_tokens + of_block;
                x = centre.shifted<E, ON>(x, row, d), y = centre.shifted<E, ON>(y, row, d + half_dim);
            }
            uint4* const to = (uint4*)(output + (u64)target(head[k], token[k]) * p.row_bytes) + c.column;
            __stcs(to, x), __stcs(to + p.row_bytes / 32, y);
        }
    }
}

template <u32 E> __device__ __forceinline__ void reopen_paired(const Layout& L, const Convert& s) {
    const Plane p(L, s.to, s.from, plane_of(L));
    const Centre centre(L, plane_of(L), s.index);
    if (!centre.on) return reopen_plane<E, false>(L, s, false);
    if (!are_vectors(p) || p.row_bytes / 32 > blockDim.x || !centre.halves<E>()) return reopen_plane<E>(L, s, true);
    decode_halves<E>(L, p, centre, p.raw, 0, L.block_tokens, 0, 1, [&](u32 head, u32 token) { return head * L.block_tokens + token; });
}

template <u32 E> __device__ __forceinline__ void read_paired(const Layout& L, const Read& r) {
    const u32 plane = plane_of_read(L);
    const Plane p(L, r.slot[plane], r.slot[plane], 2 * r.layer + plane);
    const Centre centre(L, 2 * r.layer + plane, r.index);
    const u64 output = r.output[plane];
    if (!centre.on) return read_plane<E, false>(L, r, false);
    if (!are_vectors(p) || (output & 15) != 0 || p.row_bytes / 32 > blockDim.x || !centre.halves<E>()) return read_plane<E>(L, r, true);
    decode_halves<E>(L, p, centre, output, r.first_token, r.tokens, blockIdx.z, gridDim.z, [&](u32 head, u32 token) { return token * L.kv_heads + head; });
}

PAIRED_KERNELS(halves, f16, __launch_bounds__(256, 3), __launch_bounds__(256, 3), F16)
PAIRED_KERNELS(halves, bf16, __launch_bounds__(256, 3), __launch_bounds__(256, 3), BF16)
#endif
