// What the driver knows of a source of kernels.

#pragma once

namespace emulator {

struct Index {
    unsigned x, y, z;
};

// A kernel, by name. A launch gives what went wrong, or nothing.
struct Kernel {
    const char* name;
    const char* (*launch)(void** parameters, Index grid, unsigned threads, unsigned seed);
    unsigned parameter_bytes[16], parameters;
};

}  // namespace emulator
