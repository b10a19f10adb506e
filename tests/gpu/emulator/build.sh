#!/usr/bin/env bash
# Builds what stands for an NVIDIA driver on machines without a GPU: libcuda.so.1, which runs the project's kernels on the processor.
#
#   tests/gpu/emulator/build.sh DIR      # then LD_LIBRARY_PATH=DIR before what is to find a GPU; tests/gpu/run.sh --emulated does both
#
# Needs g++ 12 or newer and an x86-64 processor with FMA and F16C.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
root="$here/../../.."
kernels="$root/src/backend/cuda/kernels"
target="${1:?a folder}"
mkdir -p "$target"
target="$(cd "$target" && pwd)"
cxx="${CXX:-g++}"
flags=(-std=c++20 -O2 -fPIC -shared -pthread -mfma -mf16c -ffp-contract=off -fno-strict-aliasing -U_FORTIFY_SOURCE
    -fvisibility=hidden -fno-gnu-unique -w)

# A library for each source, which shares nothing with the others: kernels of several have the same names.
module() {
    local source="$1" name
    name="$(basename "$source" .cu)"
    {
        echo "#include \"$source\""
        echo 'extern "C" __attribute__((visibility("default"))) const emulator::Kernel kernels[] = {'
        sed -n 's/.*\.entry \([a-z0-9_]*\).*/    emulator::kernel_of<\&::\1>("\1"),/p' "${source%.cu}.ptx"
        echo '    {nullptr}};'
    } >"$target/$name.cpp"
    "$cxx" "${flags[@]}" -include "$here/device.h" -I"$here/include" -I"$(dirname "$source")" \
        -o "$target/$name.so" "$target/$name.cpp"
}
export -f module
export target cxx here

"$cxx" "${flags[@]}" -o "$target/libcuda.so.1" -Wl,-soname,libcuda.so.1 "$here/driver.cpp" -ldl
sources=("$kernels"/*.cu "$here"/../kernels/*.cu)
printf '%s\n' "${sources[@]}" | flag_text="${flags[*]}" xargs -P "$(nproc)" -I{} bash -c 'set -euo pipefail; flags=($flag_text); module {}'
# Which of them the text of a module belongs to.
for source in "${sources[@]}"; do echo "$(basename "$source" .cu) ${source%.cu}.ptx"; done >"$target/modules"
