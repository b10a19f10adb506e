// Kernels of the GPU tests: an attention kernel as somebody else would write it over exported block tables, and kernels that are
// slow, that write, and that fail.

#include <cuda_fp16.h>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#include <test_ptx.cuh>

// Mirrors `Strides` of table.rs.
struct Strides {
    u64 key_token, key_head, values, value_token, value_head, layer;
};

// Mirrors `Table` of table.rs.
struct Table {
    u64 keys, scales, formats, lengths, dropped;
    Strides raw, codes, scale;
    u32 max_blocks, block_tokens;
    // Layers behind the one that the table was made for.
    u32 layer, padding;
};

#define THREADS 128
#define TOKENS_MAX 2048
#define INFINITY __int_as_float(0x7f800000)

struct Row {
    u64 elements, scale;
    bool int8;
    __device__ float operator[](u32 i) const {
        if (int8) return (float)((const signed char*)elements)[i] * __half2float(*(const __half*)scale);
        return __half2float(((const __half*)elements)[i]);
    }
};

// The key or value of token `t` and head `h` of sequence `s`.
__device__ __forceinline__ Row row(const Table& T, u32 s, u32 t, u32 h, bool value) {
    const u32 place = s * T.max_blocks + t / T.block_tokens, inside = t % T.block_tokens;
    const bool int8 = ((const u8*)T.formats)[place] == 1;
    auto at = [&](const Strides& S) {
        return T.layer * S.layer
            + (value ? S.values + h * S.value_head + inside * S.value_token : h * S.key_head + inside * S.key_token);
    };
    Row r;
    r.int8 = int8;
    r.elements = ((const u64*)T.keys)[place] + at(int8 ? T.codes : T.raw);
    r.scale = int8 ? ((const u64*)T.scales)[place] + at(T.scale) : 0;
    return r;
}

// One token's attention over f16 elements: queries and output are [sequences, q_heads, dim]. A thread block is one head.
extern "C" __global__ void paged_attention(
    Table T, const float* queries, float* output, u32 q_heads, u32 kv_heads, u32 key_dim, u32 value_dim, float factor) {
    __shared__ float weight[TOKENS_MAX];
    __shared__ float partial[THREADS];
    const u32 s = blockIdx.x, q_head = blockIdx.y, head = q_head / (q_heads / kv_heads), me = threadIdx.x;
    const u32 length = ((const u32*)T.lengths)[s];
    const u32 dropped_from = ((const u32*)T.dropped)[2 * s], dropped_to = ((const u32*)T.dropped)[2 * s + 1];
    const float* query = queries + (s * q_heads + q_head) * key_dim;
    float* out = output + (s * q_heads + q_head) * value_dim;
    float most = -INFINITY;
    for (u32 t = me; t < length; t += THREADS) {
        float score = -INFINITY;
        if (t < dropped_from || t >= dropped_to) {
            const Row key = row(T, s, t, head, false);
            score = 0.0f;
            for (u32 i = 0; i < key_dim; i++) score += query[i] * key[i];
            score *= factor;
        }
        weight[t] = score;
        most = fmaxf(most, score);
    }
    partial[me] = most;
    __syncthreads();
    for (u32 step = THREADS / 2; step > 0; step /= 2) {
        if (me < step) partial[me] = fmaxf(partial[me], partial[me + step]);
        __syncthreads();
    }
    most = partial[0];
    __syncthreads();
    float sum = 0.0f;
    for (u32 t = me; t < length; t += THREADS) {
        weight[t] = weight[t] == -INFINITY ? 0.0f : expf(weight[t] - most);
        sum += weight[t];
    }
    partial[me] = sum;
    __syncthreads();
    for (u32 step = THREADS / 2; step > 0; step /= 2) {
        if (me < step) partial[me] += partial[me + step];
        __syncthreads();
    }
    sum = partial[0];
    for (u32 i = me; i < value_dim; i += THREADS) {
        float total = 0.0f;
        for (u32 t = 0; t < length; t++) {
            if (weight[t] != 0.0f) total += weight[t] * row(T, s, t, head, true)[i];
        }
        out[i] = length == 0 ? 0.0f : total / sum;
    }
}

// Takes so many nanoseconds.
extern "C" __global__ void delay(u64 ns) {
    const u64 start = nanoseconds();
    while (nanoseconds() - start < ns) {}
}

// Writes `value` to `count` 16-bit elements.
extern "C" __global__ void fill16(u16* to, u32 count, u16 value) {
    for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) to[i] = value;
}

extern "C" __global__ void fail() { trap(); }
