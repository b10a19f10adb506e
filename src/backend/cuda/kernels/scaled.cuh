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
    Centre centre(L, plane_of(L), s.index);
    centre.turn<E>();
    const u32 lane = threadIdx.x % lanes, group = threadIdx.x / lanes, groups = blockDim.x / lanes;
    const bool active = lane * 16 < p.row_bytes;
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
            // Rows of one head, if its means are kept.
            const u32 head = min(row, p.rows - 1) / L.block_tokens, token = row - head * L.block_tokens;
            Turned<E> turned;
            if (centre.turned && active) turned = centre.of<E, OFF>(centre.turned + head * p.dim, lane * N);
#pragma unroll
            for (u32 k = 0; k < UNROLL; k++) {
                if (!centre.on || !active || k >= count) continue;
                const uint4 raw = v[k];
                if (centre.turned) v[k] = centre.quick<E>(raw, turned, token + k, lane * N);
                if (!centre.turned || abs_max_bits<E>(v[k]) >= infinity_bits<E>()) v[k] = centre.shifted<E, OFF>(raw, row + k, lane * N);
            }
        }
#pragma unroll
        for (u32 k = 0; k < UNROLL; k++) most[k] = abs_max_bits<E>(v[k]);
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

// The means that a thread needs for the vectors of a column, as long as they are of one head.
template <u32 E> struct Column {
    Turned<E> turned;
    u32 head = ~0u;

    // A decoded vector with its centre.
    __device__ __forceinline__ uint4 centred(const Centre& centre, const uint4& v, float scale, u32 of_head, u32 token, u32 d) {
        // No element is so large then that the centre could make it too large.
        if (!centre.turned || !(fabsf(scale) <= (finite_max<E>() - centre.most) / Code::BOUND))
            return centre.shifted<E, ON>(v, of_head * centre.block_tokens + token, d);
        if (head != of_head) turned = centre.of<E, ON>(centre.turned + of_head * centre.dim, d), head = of_head;
        return centre.quick<E>(v, turned, token, d);
    }
};

// Decodes a whole plane back to rows as they were.
template <u32 E>
__device__ __forceinline__ void reopen_plane(const Layout& L, const Convert& s, bool plain) {
    const Plane p(L, s.to, s.from, plane_of(L));
    Centre centre(L, plane_of(L), s.index);
    const u32 N = Vector<E>::N, per_row = p.dim / N;
    if (!plain && are_vectors(p) && per_row <= blockDim.x) {
        centre.turn<E>();
        const Columns c(per_row);
        if (!c.active) return;
        Column<E> column;
        for (u32 first = c.first(); first < p.rows; first += c.rows_at_once * DECODE_UNROLL) {
            uint2 codes[DECODE_UNROLL];
            float scale[DECODE_UNROLL];
#pragma unroll
            for (u32 k = 0; k < DECODE_UNROLL; k++) {
                const u32 row = min(first + k * c.apart(), p.rows - 1);
                codes[k] = load_codes<E>(p.codes + (u64)row * p.dim + c.column * N);
                scale[k] = read_scale<E>((const u8*)p.scales + (u64)row * p.scale_bytes);
            }
#pragma unroll
            for (u32 k = 0; k < DECODE_UNROLL; k++) {
                const u32 row = first + k * c.apart();
                if (row >= p.rows) continue;
                uint4 v = decode_vector<E>(codes[k], scale[k]);
                if (CENTRED && centre.on) {
                    const u32 head = row / L.block_tokens;
                    v = column.centred(centre, v, scale[k], head, row - head * L.block_tokens, c.column * N);
                }
                __stcs((uint4*)(p.raw + (u64)row * p.row_bytes) + c.column, v);
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
    Centre centre(L, 2 * r.layer + plane, r.index);
    const u64 output = r.output[plane];
    const u32 rows = r.tokens * L.kv_heads, per_row = p.dim / N;
    if (!plain && are_vectors(p) && (output & 15) == 0 && per_row <= blockDim.x) {
        centre.turn<E>();
        const Columns c(per_row);
        if (!c.active) return;
        Column<E> column;
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
#pragma unroll
            for (u32 k = 0; k < DECODE_UNROLL; k++) {
                if (first + k * c.apart() >= rows) continue;
                uint4 v = decode_vector<E>(codes[k], scale[k]);
                if (centre.on) {
                    const Place place(L, r, first + k * c.apart());
                    v = column.centred(centre, v, scale[k], place.head, place.token, c.column * N);
                }
                __stcs((uint4*)(output + (u64)to[k] * row_bytes) + c.column, v);
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
