#!/usr/bin/env python3
"""Compiles .cu sources to the PTX beside them, with a pinned NVRTC, and that of the crate to cubins, with a pinned ptxas. Needs no GPU.

    python3 -m pip install -r src/backend/cuda/kernels/requirements.txt
    python3 src/backend/cuda/kernels/build.py            # writes *.ptx and sm_*/*.cubin.zst
    python3 src/backend/cuda/kernels/build.py --check    # fails if what is there is not what the sources give

Without more arguments: the kernels that the crate ships, and those of its GPU tests. Otherwise the files and folders named.
"""
import ctypes
import importlib.util
import itertools
import multiprocessing
import pathlib
import re
import subprocess
import sys
import tempfile

import zstandard

HERE = pathlib.Path(__file__).resolve().parent
FOLDERS = [HERE, HERE.parents[3] / "tests" / "gpu" / "kernels"]
VERSION = (12, 4)
# A cubin runs on all GPUs of its major number. ptxas is newer than NVRTC, whose own spends more registers: by NVIDIA's rules all drivers of CUDA 12 load
# what it makes, and whatever a driver refuses gives way to PTX.
CUBINS = ["sm_80", "sm_90"]
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


def compile_cubin(ptx, architecture):
    ptxas = package_dir("nvidia.cuda_nvcc") / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        source, target = pathlib.Path(folder) / "in.ptx", pathlib.Path(folder) / "out.cubin"
        source.write_text(ptx)
        subprocess.run([ptxas, f"--gpu-name={architecture}", "-O3", source, "-o", target], check=True)
        return target.read_bytes()


def compiled(source):
    """What is shipped of a source: path and content of each file."""
    ptx = compile_ptx(source)
    files = [(source.with_suffix(".ptx"), ptx.encode())]
    if source.parent == HERE:
        for architecture in CUBINS:
            path = source.parent / architecture / f"{source.stem}.cubin.zst"
            files.append((path, compile_cubin(ptx, architecture)))
    return files


def read(path):
    """What a shipped file holds. None if it is missing, or cannot be unpacked."""
    if not path.exists():
        return None
    if path.suffix != ".zst":
        return path.read_bytes()
    try:
        return zstandard.ZstdDecompressor().decompress(path.read_bytes())
    except zstandard.ZstdError:
        return None


def write(path, content):
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".zst":
        content = zstandard.ZstdCompressor(level=19, write_checksum=True).compress(content)
    path.write_bytes(content)


def sources(paths):
    for path in paths:
        if not path.exists():
            sys.exit(f"{path} is missing")
        yield from sorted(path.glob("*.cu")) if path.is_dir() else [path]


def main():
    check, paths = "--check" in sys.argv[1:], [pathlib.Path(at).resolve() for at in sys.argv[1:] if at != "--check"]
    stale, files = [], list(sources(paths or FOLDERS))
    # Each in a process of its own: what NVRTC has compiled before shows in what it gives.
    with multiprocessing.Pool(maxtasksperchild=1) as processes:
        try:
            outcomes = processes.map(compiled, files, chunksize=1)
        except (RuntimeError, subprocess.CalledProcessError) as error:
            sys.exit(str(error))
    for path, wanted in itertools.chain.from_iterable(outcomes):
        if read(path) == wanted:
            continue
        if check:
            stale.append(str(path))
        else:
            write(path, wanted)
            print(f"{path.relative_to(path.parents[1])}: {len(wanted)} bytes")
    if stale:
        sys.exit(f"{', '.join(stale)}: not what the sources give; run build.py and commit the result")


if __name__ == "__main__":
    main()
