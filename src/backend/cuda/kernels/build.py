#!/usr/bin/env python3
"""Compiles .cu sources to the PTX beside them, with a pinned NVRTC. Needs no GPU.

    python3 -m pip install nvidia-cuda-nvrtc-cu12==12.4.127 nvidia-cuda-runtime-cu12==12.4.127
    python3 src/backend/cuda/kernels/build.py            # writes *.ptx
    python3 src/backend/cuda/kernels/build.py --check    # fails if what is there is not what the sources give

Without more arguments: the kernels that the crate ships, and those of its GPU tests. Otherwise the files and folders named.
"""
import ctypes
import importlib.util
import multiprocessing
import pathlib
import re
import sys

HERE = pathlib.Path(__file__).resolve().parent
FOLDERS = [HERE, HERE.parents[3] / "tests" / "gpu" / "kernels"]
VERSION = (12, 4)
OPTIONS = [
    "--gpu-architecture=compute_80",
    "--std=c++17",
    "--device-as-default-execution-space",  # generic lambdas have no place to say so
    "--fmad=false",       # the CPU codecs do not contract either: same bytes
    "--prec-div=true",
    "--ftz=false",
]


def package_dir(name):
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(f"{name} is missing; see the first lines of {__file__}")
    return pathlib.Path(list(spec.submodule_search_locations)[0])


def compile_ptx(source):
    nvrtc = ctypes.CDLL(str(next((package_dir("nvidia.cuda_nvrtc") / "lib").glob("libnvrtc.so.*"))))
    include = package_dir("nvidia.cuda_runtime") / "include"
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    if (major.value, minor.value) != VERSION:
        raise RuntimeError(f"NVRTC {major.value}.{minor.value} found, {VERSION[0]}.{VERSION[1]} is pinned")
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), source.read_bytes(), source.name.encode(), 0, None, None)
    options = [*OPTIONS, f"--include-path={include}", f"--include-path={source.parent}"]
    array = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
    result = nvrtc.nvrtcCompileProgram(program, len(options), array)
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    if log.value.strip():
        print(log.value.decode(), file=sys.stderr)
    if result != 0:
        raise RuntimeError(f"{source.name} does not compile")
    nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size))
    ptx = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetPTX(program, ptx)
    # The tool's banner and the absolute paths of comments say nothing about the code.
    lines = [line for line in ptx.value.decode().splitlines() if not re.match(r"\s*//", line)]
    return "\n".join(lines).strip() + "\n"


def sources(paths):
    for path in paths:
        if not path.exists():
            sys.exit(f"{path} is missing")
        yield from sorted(path.glob("*.cu")) if path.is_dir() else [path]


def main():
    check, paths = "--check" in sys.argv[1:], [pathlib.Path(at) for at in sys.argv[1:] if at != "--check"]
    stale, files = [], list(sources(paths or FOLDERS))
    # Each in a process of its own: what NVRTC has compiled before shows in what it gives.
    with multiprocessing.Pool(maxtasksperchild=1) as processes:
        try:
            compiled = processes.map(compile_ptx, files, chunksize=1)
        except RuntimeError as error:
            sys.exit(str(error))
    for source, ptx in zip(files, compiled):
        target = source.with_suffix(".ptx")
        if check:
            if not target.exists() or target.read_text() != ptx:
                stale.append(str(target))
        else:
            target.write_text(ptx)
            print(f"{target.name}: {len(ptx)} bytes, {ptx.count('.entry')} kernels")
    if stale:
        sys.exit(f"{', '.join(stale)}: not what the sources give; run build.py and commit the result")


if __name__ == "__main__":
    main()
