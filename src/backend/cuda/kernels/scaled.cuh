// Formats of one byte an element under one scale a row. Expects `Code` and `Quantiser`, which say what a byte means.

template <u32 E> __device__ __forceinline__ void write_scale(u8* at, float scale) {
    if (E == F16) *(__half*)at = __float2half_rn(scale);
    else *(float*)at = scale;
}

template <u32 E> __device__ __forceinline__ float read_scale(const u8* at) {
    if (E == F16) return __half2float(*(const __half*)at);
    return *(const float*)at;
}

// The low bytes of four words.
__device__ __forceinline__ u32 pack_bytes(u32 a, u32 b, u32 c, u32 d) {
    return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
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

// Whether rows are whole vectors. The planes before this one may leave it at an odd address.
__device__ __forceinline__ bool are_vectors(const Plane& p) { return ((p.row_bytes | p.raw) & 15) == 0 && (p.codes & 7) == 0; }

// One row by `lanes` threads, each with one vector; UNROLL consecutive rows a thread so that enough loads are under way.
template <u32 E>
__device__ __forceinline__ void seal_rows(const Layout& L, const Convert& s, u32 lanes) {
    const u32 UNROLL = SEAL_UNROLL, N = Vector<E>::N;
    const Plane p(L, s.from, s.to, plane_of(L));
    const Centre centre(L, plane_of(L), s.index);
    const u32 lane = threadIdx.x % lanes, group = threadIdx.x / lanes, groups = blockDim.x / lanes;
    const bool active = lane * 16 < p.row_bytes;
    // Whether the rows of a thread are of one head, of which vectors of means can be had: all of them or none.
    const bool quick = centre.fits<E>() && L.block_tokens % UNROLL == 0;
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
        if constexpr (CENTRED) {
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
        bool again = centre.on && !quick;
#pragma unroll
        for (u32 k = 0; k < UNROLL; k++) {
            most[k] = abs_max_bits<E>(v[k]);
            again |= CENTRED && quick && most[k] >= infinity_bits<E>();
        }
        if (CENTRED && again) {
            // As it has to be done where something is not finite, or becomes so.
#pragma unroll
            for (u32 k = 0; k < UNROLL; k++) {
                if (!active || k >= count) continue;
                v[k] = centre.shifted<E, OFF>(*(const uint4*)(from + k * p.row_bytes), row + k, lane * N);
                most[k] = abs_max_bits<E>(v[k]);
            }
        }
        for (u32 step = lanes / 2; step > 0; step /= 2) {
#pragma unroll
            for (u32 k = 0; k < UNROLL; k++) most[k] = max(most[k], __shfl_xor_sync(0xffffffffu, most[k], step));
        }
#pragma unroll
        for (u32 k = 0; k < UNROLL; k++) {
            const bool finite = most[k] < infinity_bits<E>();
            bad |= !finite;
            const float scale = Code::stored_scale<E>(finite ? from_bits<E>(most[k]) : 0.0f);
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

// The widest row that seal_rows takes is 32 vectors; wider ones and odd ones are the plain kernel's.
template <u32 E>
__device__ __forceinline__ void seal_plane(const Layout& L, const Convert& s, bool plain) {
    const u32 row_bytes = L.row_bytes[plane_of(L) & 1];
    if (plain || row_bytes > 512 || !are_vectors(Plane(L, s.from, s.to, plane_of(L)))) plain_seal_rows<E>(L, s);
    else seal_rows<E>(L, s, row_bytes > 256 ? 32 : row_bytes > 128 ? 16 : row_bytes > 64 ? 8 : 4);
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

// Decodes vectors of consecutive tokens of a head and puts the centres of the first `tokens` back, but for the set that it gives: those go as
// they are, and so do the others.
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
template <u32 E>
__device__ __forceinline__ void reopen_plane(const Layout& L, const Convert& s, bool plain) {
    const Plane p(L, s.to, s.from, plane_of(L));
    const Centre centre(L, plane_of(L), s.index);
    const u32 N = Vector<E>::N, per_row = p.dim / N;
    if (!plain && are_vectors(p) && per_row <= blockDim.x) {
        const Columns c(per_row);
        if (!c.active) return;
        const bool quick = centre.fits<E>() && L.block_tokens % DECODE_UNROLL == 0;
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
            if (centre.on && left) {
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
template <u32 E>
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
            if (centre.fits<E>()) {
                const Place at(L, r, min(first, rows - 1));
                const Turned<E> turned = centre.of<E, ON>(at.head, c.column * N);
                // The next head's rows may begin before the last of these.
                left = decode_centred<E>(centre, turned, at.token, r.first_token + r.tokens - at.token, c.column * N, codes, scale, put);
            } else {
#pragma unroll
                for (u32 k = 0; k < DECODE_UNROLL; k++) put(k, decode_vector<E>(codes[k], scale[k]));
            }
            if (centre.on && left) {
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
