// CUDA C++ for a host compiler: the same kernels, run by the processor, one thread block of a source at a time.
//
// Every thread of a block is a fiber that runs until it waits for its fellows: at `__syncthreads`, and where a warp exchanges or votes. What is
// to be run is drawn anew after each wait, by a seed: threads that rely on an order which the code does not ask for give other bytes
// from one launch to the next. A wait that its fellows never come to ends the kernel with an error, as does a trap.
//
// Included before each source by `build.sh`. What is here is what the kernels use.

#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>
#include <mutex>
#include <random>
#include <tuple>
#include <utility>
#include <vector>

#include "kernel.h"

namespace emulator {

enum class State : uint8_t { Ready, AtBlock, AtWarp, Done };
enum class Exchange { Sync, Shuffle, Any, All };

constexpr unsigned WARP = 32, THREADS_MOST = 1024;
// Kernels keep whole rows in local arrays.
constexpr size_t STACK_BYTES = 256 << 10;

struct Fiber {
    Index thread;
    // What it came to its warp with, and what it takes from there.
    Exchange exchange;
    uint64_t brings, takes;
    unsigned from;
    bool started;
    void* resumed[5];
    ucontext_t start;
};

// A block of threads, and the fibers for them: one at a time runs of each source, on whichever thread of the host.
struct Block {
    State states[THREADS_MOST];
    Fiber fibers[THREADS_MOST];
    void* scheduler[5];
    const std::function<void()>* kernel;
    const char* error;
    std::minstd_rand order;

    Block() {
        char* stacks = (char*)mmap(nullptr, THREADS_MOST * STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (stacks == MAP_FAILED) perror("stacks of emulated threads"), abort();
        for (unsigned i = 0; i < THREADS_MOST; i++) {
            ucontext_t& start = fibers[i].start;
            getcontext(&start);
            start.uc_stack = {stacks + i * STACK_BYTES, 0, STACK_BYTES};
            start.uc_link = nullptr;
            begin_anew(fibers[i]);
        }
    }
    // Forgets where a fiber was.
    static void begin_anew(Fiber& fiber) { makecontext(&fiber.start, run_fiber, 0), fiber.started = false; }
    bool run(unsigned threads);
    bool exchange(unsigned first, unsigned threads);
    void resume(Fiber& fiber);
    static void run_fiber();
};

inline Block block;
inline Fiber* now;
inline Index block_index, block_size, grid_size;

// To where `__builtin_setjmp` was called, on another stack: that of libc asks the kernel of the system and unwinds.
[[noreturn]] __attribute__((noinline)) inline void jump(void** to) { __builtin_longjmp(to, 1); }

// Back to the scheduler, until what this fiber waits for is there.
__attribute__((noinline)) inline void wait(State state) {
    block.states[now->thread.x] = state;
    if (!__builtin_setjmp(now->resumed)) jump(block.scheduler);
}

inline void Block::run_fiber() {
    for (;;) {
        (*block.kernel)();
        wait(State::Done);
    }
}

__attribute__((noinline)) inline void Block::resume(Fiber& fiber) {
    now = &fiber;
    if (__builtin_setjmp(scheduler)) return;
    if (fiber.started) jump(fiber.resumed);
    fiber.started = true;
    setcontext(&fiber.start);
}

// Has the threads of a warp, all of which wait, exchange what they brought.
inline bool Block::exchange(unsigned begin, unsigned threads) {
    Fiber* const warp = fibers + begin;
    State* const state = states + begin;
    const Fiber* first = nullptr;
    bool any = false, all = true;
    for (unsigned i = 0; i < threads; i++) {
        if (state[i] == State::Done) continue;
        if (state[i] != State::AtWarp || (first && first->exchange != warp[i].exchange)) return false;
        first = warp + i;
        any |= warp[i].brings != 0, all &= warp[i].brings != 0;
    }
    for (unsigned i = 0; i < threads; i++) {
        if (state[i] == State::Done) continue;
        Fiber& fiber = warp[i];
        switch (fiber.exchange) {
            case Exchange::Sync: break;
            // Of a thread that is not there it takes what no thread brought.
            case Exchange::Shuffle: fiber.takes = fiber.from < threads && state[fiber.from] != State::Done ? warp[fiber.from].brings : 0xdeadbeefdeadbeef; break;
            case Exchange::Any: fiber.takes = any; break;
            case Exchange::All: fiber.takes = all; break;
        }
    }
    for (unsigned i = 0; i < threads; i++) {
        if (state[i] == State::AtWarp) state[i] = State::Ready;
    }
    return true;
}

inline bool Block::run(unsigned threads) {
    const unsigned warps = (threads + WARP - 1) / WARP;
    unsigned turns[THREADS_MOST / WARP];
    for (unsigned i = 0; i < threads; i++) states[i] = State::Ready, fibers[i].thread = {i, 0, 0};
    error = nullptr;
    for (;;) {
        // Warps in any order, and the threads of each.
        for (unsigned i = 0; i < warps; i++) turns[i] = i;
        for (unsigned i = warps; i > 1; i--) std::swap(turns[i - 1], turns[order() % i]);
        for (unsigned turn = 0; turn < warps && !error; turn++) {
            const unsigned first = turns[turn] * WARP, lanes = std::min(WARP, threads - first);
            // To where all of them wait for the block, or are done.
            for (;;) {
                const unsigned start = order() % lanes;
                unsigned at_warp = 0;
                for (unsigned i = start; i < start + lanes && !error; i++) {
                    const unsigned at = first + (i < lanes ? i : i - lanes);
                    if (states[at] == State::Ready) resume(fibers[at]);
                    at_warp += states[at] == State::AtWarp;
                }
                if (error || at_warp == 0) break;
                if (!exchange(first, lanes)) error = "threads of a warp wait at different places";
            }
        }
        unsigned done = 0;
        if (error) return false;
        for (unsigned i = 0; i < threads; i++) {
            done += states[i] == State::Done;
            if (states[i] == State::AtBlock) states[i] = State::Ready;
        }
        if (done == threads) return true;
    }
}

// Runs a kernel of this source, block by block.
inline const char* run(const std::function<void()>& kernel, Index grid, unsigned threads, unsigned seed) {
    static std::mutex& one = *new std::mutex;
    const std::lock_guard<std::mutex> guard(one);
    block.kernel = &kernel;
    block.order.seed(seed);
    block_size = {threads, 1, 1}, grid_size = grid;
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                block_index = {x, y, z};
                if (block.run(threads)) continue;
                // Those that wait are never resumed.
                for (unsigned i = 0; i < threads; i++) {
                    if (block.states[i] != State::Done) Block::begin_anew(block.fibers[i]);
                }
                return block.error;
            }
    return nullptr;
}

template <typename... P, size_t... I> void call(void (*kernel)(P...), void** parameters, std::index_sequence<I...>) {
    kernel(*(std::remove_const_t<P>*)parameters[I]...);
}

// A kernel that takes what lies at `parameters`.
template <auto K, typename... P> const char* launch_of(void (*)(P...), void** parameters, Index grid, unsigned threads, unsigned seed) {
    return run([&] { call(K, parameters, std::index_sequence_for<P...>()); }, grid, threads, seed);
}
template <auto K> const char* launch(void** parameters, Index grid, unsigned threads, unsigned seed) {
    return launch_of<K>(K, parameters, grid, threads, seed);
}
template <typename... P> constexpr unsigned parameter_bytes(void (*)(P...), unsigned* bytes) {
    unsigned count = 0;
    ((bytes[count++] = sizeof(P)), ...);
    return count;
}
template <auto K> Kernel kernel_of(const char* name) {
    Kernel kernel = {name, launch<K>, {}, 0};
    kernel.parameters = parameter_bytes(K, kernel.parameter_bytes);
    return kernel;
}

inline uint64_t exchanged(Exchange exchange, uint64_t brings, unsigned from) {
    now->exchange = exchange, now->brings = brings, now->from = from;
    wait(State::AtWarp);
    return now->takes;
}

template <typename T> T shuffled(T value, unsigned from) {
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    bits = exchanged(Exchange::Shuffle, bits, from);
    memcpy(&value, &bits, sizeof(T));
    return value;
}

}  // namespace emulator

#define __device__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
// Of the one block that runs.
#define __shared__ static

#define threadIdx (emulator::now->thread)
#define blockIdx emulator::block_index
#define blockDim emulator::block_size
#define gridDim emulator::grid_size

// ---------------------------------------------------------------------------------------------------------------------
// Waits and exchanges. Masks other than all threads have no user.

inline void __syncthreads() { emulator::wait(emulator::State::AtBlock); }
inline void __syncwarp() { emulator::exchanged(emulator::Exchange::Sync, 0, 0); }
inline bool __any_sync(unsigned, bool is) { return emulator::exchanged(emulator::Exchange::Any, is, 0) != 0; }
inline bool __all_sync(unsigned, bool is) { return emulator::exchanged(emulator::Exchange::All, is, 0) != 0; }
template <typename T> T __shfl_sync(unsigned, T value, unsigned from) { return emulator::shuffled(value, from % emulator::WARP); }
template <typename T> T __shfl_xor_sync(unsigned, T value, unsigned mask) {
    return emulator::shuffled(value, (emulator::now->thread.x % emulator::WARP) ^ mask);
}
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline unsigned atomicMax(unsigned* at, unsigned value) {
    const unsigned before = *at;
    *at = before > value ? before : value;
    return before;
}

// ---------------------------------------------------------------------------------------------------------------------
// Vectors

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

template <typename T> T __ldg(const T* at) { return *at; }
template <typename T> T __ldcs(const T* at) { return *at; }
template <typename T> void __stcs(T* at, T value) { *at = value; }

// ---------------------------------------------------------------------------------------------------------------------
// Arithmetic: IEEE, not contracted (-ffp-contract=off).

inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
// The larger, or smaller, of two elements of 16 or 32 bits, or what is no number. They are of the type that has this infinity: all types order alike.
inline unsigned extreme(unsigned a, unsigned b, unsigned infinity, bool larger) {
    const unsigned shift = infinity > 0xffff ? 0 : 16, none = 0x7fffffffu >> shift;
    if ((a & none) > infinity || (b & none) > infinity) return none;
    // -0 is below 0.
    const auto order = [&](unsigned bits) {
        const int32_t at = (int32_t)(bits << shift);
        return at < 0 ? INT32_MIN - at - 1 : at;
    };
    return (order(a) < order(b)) != larger ? a : b;
}
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline unsigned long long min(unsigned long long a, unsigned long long b) { return a < b ? a : b; }

// Bytes of both words by the digits of `which`; the highest bit of a digit asks for the sign of the byte.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned which) {
    const uint64_t both = (uint64_t)b << 32 | a;
    unsigned out = 0;
    for (unsigned i = 0; i < 4; i++) {
        const unsigned digit = which >> 4 * i & 15, byte = both >> 8 * (digit & 7) & 0xff;
        out |= (digit & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << 8 * i;
    }
    return out;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) { return ((uint64_t)high << 32 | low) >> (by & 31); }
