// Kernels that know no format: appends, moves, and reads of caches that keep raw blocks only.

#include "common.cuh"

// Vectors that a thread of `move_blocks` has in flight, and threads of its blocks. Mirrored in kernels.rs.
#define MOVE_UNROLL 4
#define MOVE_THREADS 256

// ---------------------------------------------------------------------------------------------------------------------
// Append: scatter [tokens, kv_heads, dim] to [kv_head][token][dim], checking every element.

template <typename T>
__device__ __forceinline__ void append_rows(const Layout& L, const Append& a, u64 source, u64 target, u32 plane) {
    const u32 units = L.row_bytes[plane] / sizeof(T), heads = L.kv_heads, total = a.tokens * heads * units;
    Finite finite(L.element);
    for (u32 at = threadIdx.x; at < total; at += blockDim.x * 4) {
        T value[4];
        u32 to[4];
#pragma unroll
        for (u32 k = 0; k < 4; k++) {
            u32 i = at + k * blockDim.x, row = i / units, column = i - row * units;
            u32 token = row / heads, head = row - token * heads;
            to[k] = (head * L.block_tokens + token) * units + column;
            if (i < total) value[k] = ((const T*)source)[i];
        }
#pragma unroll
        for (u32 k = 0; k < 4; k++) {
            if (at + k * blockDim.x < total) {
                if (sizeof(T) == 16) finite.vector(*(const uint4*)&value[k]);
                else if (sizeof(T) == 4) finite.word(*(const u32*)&value[k]);
                else finite.word(*(const u16*)&value[k]);
                ((T*)target)[to[k]] = value[k];
            }
        }
    }
    if (finite.bad()) raise(a.flag);
}

__device__ __forceinline__ void append_block(const Layout& L, const Append& a, bool plain) {
    const u32 layer = blockIdx.y >> 1, plane = blockIdx.y & 1;
    if (layer >= a.layers) return;
    const u64 token_bytes = (u64)L.kv_heads * L.row_bytes[plane];
    const u64 source = a.source[plane] + (u64)layer * a.source_tokens * token_bytes;
    const u64 target = a.slot + (a.first_layer + layer) * L.layer_bytes + plane * L.plane_bytes[0]
        + (u64)a.first_token * L.row_bytes[plane];
    if (!plain && L.row_bytes[plane] % 16 == 0 && aligned16(source, target)) append_rows<uint4>(L, a, source, target, plane);
    else if (L.element_bytes == 4) append_rows<u32>(L, a, source, target, plane);
    else append_rows<u16>(L, a, source, target, plane);
}

extern "C" __global__ void append(const __grid_constant__ Layout L, const Append* steps) { append_block(L, fetched(steps + blockIdx.x), false); }
extern "C" __global__ void plain_append(const __grid_constant__ Layout L, const Append* steps) { append_block(L, fetched(steps + blockIdx.x), true); }

extern "C" __global__ void read_raw(const __grid_constant__ Layout L, const Read* steps) { gather_raw(L, fetched(steps + blockIdx.x), false); }
extern "C" __global__ void plain_read_raw(const __grid_constant__ Layout L, const Read* steps) { gather_raw(L, fetched(steps + blockIdx.x), true); }

// ---------------------------------------------------------------------------------------------------------------------
// Moves: whole blocks between slots, and between device memory and page-locked host memory. Zeroing is a move from nowhere.

__device__ __forceinline__ void move_vectors(const Move& m, u32 part, u32 parts) {
    const u64 vectors = m.bytes / 16;
    const uint4* from = (const uint4*)m.from;
    uint4* to = (uint4*)m.to;
    const u64 stride = (u64)parts * blockDim.x * MOVE_UNROLL;
    for (u64 first = (u64)part * blockDim.x * MOVE_UNROLL + threadIdx.x; first < vectors; first += stride) {
        uint4 v[MOVE_UNROLL];
#pragma unroll
        for (u32 k = 0; k < MOVE_UNROLL; k++) {
            const u64 i = first + k * blockDim.x;
            v[k] = make_uint4(0, 0, 0, 0);
            if (from && i < vectors) v[k] = __ldcs(from + i);
        }
#pragma unroll
        for (u32 k = 0; k < MOVE_UNROLL; k++) {
            const u64 i = first + k * blockDim.x;
            if (i < vectors) __stcs(to + i, v[k]);
        }
    }
}

__device__ __forceinline__ void move_bytes(const Move& m, u64 start, u32 part, u32 parts) {
    for (u64 i = start + (u64)part * blockDim.x + threadIdx.x; i < m.bytes; i += (u64)parts * blockDim.x) {
        ((u8*)m.to)[i] = m.from ? ((const u8*)m.from)[i] : 0;
    }
}

extern "C" __global__ void move_blocks(const Move* moves) {
    const Move m = fetched(moves + blockIdx.x);
    if (aligned16(m.from, m.to)) {
        move_vectors(m, blockIdx.y, gridDim.y);
        move_bytes(m, m.bytes / 16 * 16, blockIdx.y, gridDim.y);
    } else {
        move_bytes(m, 0, blockIdx.y, gridDim.y);
    }
}

extern "C" __global__ void plain_move_blocks(const Move* moves) { move_bytes(fetched(moves + blockIdx.x), 0, blockIdx.y, gridDim.y); }

// Bytes that a warp of `carry_blocks` has in flight. Mirrored in kernels.rs.
#define CARRY_BYTES 4096

// Up to CARRY_BYTES bytes by one warp.
__device__ __forceinline__ void carry_piece(u64 from, u64 to, u32 bytes, u32 lane) {
    const bool vectors = aligned16(from, to);
    if (vectors && bytes == CARRY_BYTES) {
        uint4 v[CARRY_BYTES / 512];
#pragma unroll
        for (u32 k = 0; k < CARRY_BYTES / 512; k++) v[k] = __ldcs((const uint4*)from + k * 32 + lane);
#pragma unroll
        for (u32 k = 0; k < CARRY_BYTES / 512; k++) ((uint4*)to)[k * 32 + lane] = v[k];
        return;
    }
    const u32 whole = vectors ? bytes / 16 * 16 : 0;
    for (u32 at = lane * 16; at < whole; at += 512) *(uint4*)(to + at) = __ldcs((const uint4*)(from + at));
    for (u32 at = whole + lane; at < bytes; at += 32) ((u8*)to)[at] = ((const u8*)from)[at];
}

// Copies by as few thread blocks as the launch has: for bytes that cross PCIe, which a few warps saturate. Every warp takes a
// run of pieces, and its lanes fetch the descriptors of 32 of them at once, since those lie behind PCIe too.
extern "C" __global__ void carry_blocks(const Move* moves, u32 count, u32 parts) {
    const u32 lane = threadIdx.x % 32;
    const u64 warp = (u64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, warps = (u64)gridDim.x * (blockDim.x / 32);
    const u64 pieces = (u64)count * parts, end = pieces * (warp + 1) / warps;
    for (u64 first = pieces * warp / warps; first < end; first += 32) {
        u64 from = 0, to = 0;
        u32 bytes = 0;
        if (first + lane < end) {
            const u64 index = (first + lane) / parts, offset = (first + lane - index * parts) * CARRY_BYTES;
            const Move m = moves[index];
            from = m.from + offset;
            to = m.to + offset;
            if (offset < m.bytes) bytes = (u32)min(m.bytes - offset, (u64)CARRY_BYTES);
        }
        const u32 fetched = (u32)min(end - first, (u64)32);
        for (u32 k = 0; k < fetched; k++) {
            carry_piece(__shfl_sync(0xffffffffu, from, k), __shfl_sync(0xffffffffu, to, k),
                        __shfl_sync(0xffffffffu, bytes, k), lane);
        }
    }
}

extern "C" __global__ void plain_carry_blocks(const Move* moves, u32 count, u32) {
    for (u32 index = blockIdx.x; index < count; index += gridDim.x) move_bytes(moves[index], 0, 0, 1);
}

// Says that everything before it on its stream is done.
extern "C" __global__ void signal(volatile u64* word, u64 value) {
    __threadfence_system();
    *word = value;
}
