// The instructions of kernels/ptx.cuh, for a host compiler.

typedef u64 SharedAddress;
inline SharedAddress shared_address(const void* at) { return (u64)at; }

inline float near_reciprocal(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(INFINITY, x) : 1.0f / x; }

inline void load_shared(const float* from, float* to) {
    const float4 v = *(const float4*)from;
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}
inline void load_constant(const float* from, float* to) { load_shared(from, to); }
inline uint4 load_shared(const u32* from) { return *(const uint4*)from; }

// There when they are awaited, and no sooner.
struct Fetch {
    uint4* to;
    const uint4* from;
};
inline std::vector<Fetch> fetches[emulator::THREADS_MOST];
inline void fetch_shared(SharedAddress to, u64 from, bool some) { fetches[threadIdx.x].push_back({(uint4*)to, some ? (const uint4*)from : nullptr}); }
inline void await_shared() {
    for (const Fetch& fetch : fetches[threadIdx.x]) *fetch.to = fetch.from ? *fetch.from : uint4{0, 0, 0, 0};
    fetches[threadIdx.x].clear();
}

template <u32 E> inline u32 extreme_of_word(u32 a, u32 b, bool larger) {
    if (E == F32) return extreme(a, b, 0x7f800000, larger);
    const u32 infinity = E == F16 ? 0x7c00 : 0x7f80;
    return extreme(a & 0xffff, b & 0xffff, infinity, larger) | extreme(a >> 16, b >> 16, infinity, larger) << 16;
}
template <u32 E> inline u32 lesser(u32 a, u32 b) { return extreme_of_word<E>(a, b, false); }
template <u32 E> inline u32 greater(u32 a, u32 b) { return extreme_of_word<E>(a, b, true); }
