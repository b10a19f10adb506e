// The instructions of tests/gpu/kernels/test_ptx.cuh, for a host compiler.

inline u64 nanoseconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (u64)now.tv_sec * 1000000000 + now.tv_nsec;
}
inline void trap() {
    emulator::block.error = "a trap";
    emulator::wait(emulator::State::AtBlock);
}
