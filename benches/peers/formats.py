#!/usr/bin/env python3
"""The storage formats in PyTorch, beside the device's own copy rate.

Encodes and decodes the keys and values of a layer, [heads, tokens, dim] in f16, whole tensors at a time: eagerly, and with torch.compile.

- int8, fp8 (e4m3): one scale for a token and head.
- int4, int2: a least element and a step for 32 elements, in keys those of a channel of 32 tokens, in values neighbours in a row.
- r4, r3, r2: a row is rotated by a Hadamard matrix with signs and brought to unit variance; each element becomes the nearest of a
  codebook, found by binary search; one factor for a token and head. The rotation is a product with the matrix of +-1/sqrt(dim) in f16,
  summed in f32. It reads and writes a row once; butterflies over views of the whole tensor would do so log2(dim) times.

Codes are packed to whole bytes, in an order of their own within a row or group. What the cache's kernels do beyond that is left out, in
favour of the peer: the check that everything is finite, saturation of what is decoded, and bytes that are the same on every device.

    python3 benches/peers/formats.py            # a table
    python3 benches/peers/formats.py --json     # one JSON object per line

Exits with 1 if what comes back is further from what went in than the format allows, or if it takes other than its bits an element: 8.125
(int8, fp8), 5 (int4), 3 (int2), 4.125 (r4), 3.125 (r3), 2.125 (r2).
"""
import argparse
import json
import statistics
import sys
import time
from typing import Callable, NamedTuple

import torch

HEADS = 8
DIM = 128
GROUP = 32  # Elements that share a step in int4 and int2.
FLOOR = 2.0**-24  # The least scale, which keeps a constant group from dividing by zero.
# A sign for each of 128 elements: the bits of the fraction of pi.
SIGNS = [-1.0 if word >> bit & 1 else 1.0 for word in (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344) for bit in range(32)]
BOOKS = {
    4: [0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326],
    3: [0.2451, 0.7560, 1.3439, 2.1519],
    2: [0.4528, 1.5104],
}
SQUARED_ERROR = {4: 0.0095, 3: 0.0346, 2: 0.118}  # What each codebook leaves of a normal variable's variance.


class Format(NamedTuple):
    bits: float  # Stored for an element, its share of scales included.
    encode: Callable  # (x, plane) -> stored tensors; plane is "keys" or "values"
    decode: Callable  # (stored, plane) -> x
    error: Callable  # (x, back, stored, plane) -> the largest error as a share of what is allowed


def parts_of(bits):
    """How many codes share a byte, or three bytes if the bits of a code do not divide 8."""
    return 8 if bits == 3 else 8 // bits


def pack(parts, bits, axis):
    """Equal parts of an axis, laid above each other in the bits of whole bytes."""
    word = parts[0]
    for at, part in enumerate(parts[1:], 1):
        word = torch.add(word, part, alpha=1 << bits * at)
    if bits == 3:
        word = torch.stack((word & 255, word >> 8 & 255, word >> 16), axis)
    return word.to(torch.uint8)


def unpack(packed, bits, axis):
    """All codes, in the order of the axis before it was split into parts."""
    if bits == 3:
        low, middle, high = packed.int().unbind(axis)
        packed = low | middle << 8 | high << 16
    shifts = torch.arange(0, parts_of(bits) * bits, bits, dtype=packed.dtype, device=packed.device)
    shifts = shifts.view(-1, *[1] * (packed.dim() - axis))
    return ((packed.unsqueeze(axis) >> shifts) & ((1 << bits) - 1)).flatten(axis, axis + 1)


def rounding(x):
    """What two roundings to f16 may take from an element."""
    return x.float().abs() * 2.0**-10 + FLOOR


def scaled(code_type, most):
    """int8 and fp8."""

    def encode(x, plane):
        # The norm is the largest magnitude, in one pass.
        scale = (torch.linalg.vector_norm(x, torch.inf, -1, keepdim=True).float() / most).half().clamp(min=FLOOR)
        codes = (x / scale.float()).clamp_(-most, most)
        return (codes.round_() if code_type is torch.int8 else codes).to(code_type), scale

    def decode(stored, plane):
        codes, scale = stored
        # An e4m3 tensor takes no part in arithmetic.
        return (codes if code_type is torch.int8 else codes.half()) * scale

    def error(x, back, stored, plane):
        scale = stored[1].float()
        if code_type is torch.int8:
            allowed = scale * (0.5 + 1 / 16)
        else:  # Half of the last of three bits, or half of the least step.
            allowed = torch.maximum(x.float().abs() / 16, scale * 2.0**-10) * 1.01
        return ((back.float() - x.float()).abs() / (allowed + rounding(x))).max()

    return Format(8 + 16 / DIM, encode, decode, error)


def grouped(bits):
    """int4 and int2."""
    most = (1 << bits) - 1

    def axis_of(plane):
        """Of a group: [heads, groups, GROUP, dim] in keys, [heads, tokens, groups, GROUP] in values."""
        return 2 if plane == "keys" else 3

    def encode(x, plane):
        axis = axis_of(plane)
        parts = x.unflatten(axis - 1, (-1, GROUP)).chunk(parts_of(bits), axis)
        # By parts, as codes are packed: all loops have one shape then, and a compiler makes one kernel of them.
        low, high = parts[0], parts[0]
        for part in parts[1:]:
            low, high = torch.minimum(low, part), torch.maximum(high, part)
        low, high = low.amin(axis, keepdim=True), high.amax(axis, keepdim=True)
        step = ((high.float() - low.float()) / most).half().clamp(min=FLOOR)
        codes = [((part - low.float()) / step.float()).round_().clamp_(max=most) for part in parts]
        return pack(codes, bits, axis), low, step

    def decode(stored, plane):
        packed, low, step = stored
        axis = axis_of(plane)
        return torch.addcmul(low, unpack(packed, bits, axis), step).flatten(axis - 1, axis)

    def error(x, back, stored, plane):
        axis = axis_of(plane)
        x, back = (tensor.unflatten(axis - 1, (-1, GROUP)) for tensor in (x, back))
        allowed = stored[2].float() * (0.5 + most * 2.0**-10)
        return ((back.float() - x.float()).abs() / (allowed + rounding(x))).max()

    return Format(bits + 2 * 16 / GROUP, encode, decode, error)


def rotated(bits, device):
    """r4, r3 and r2."""
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < DIM:
        hadamard = torch.cat((torch.cat((hadamard, hadamard), 1), torch.cat((hadamard, -hadamard), 1)))
    rotation = (torch.tensor(SIGNS)[:, None] * hadamard / DIM**0.5).half().to(device)
    book = torch.tensor([-c for c in reversed(BOOKS[bits])] + BOOKS[bits])
    book, book_f16, middles = (table.to(device) for table in (book, book.half(), (book[1:] + book[:-1]) / 2))

    def encode(x, plane):
        # By parts, as in `grouped`: the compiler makes one kernel of all that follows the product.
        parts = (x @ rotation).chunk(parts_of(bits), 2)
        square = sum(torch.linalg.vector_norm(y, dim=2, keepdim=True, dtype=torch.float32).square() for y in parts)
        to_unit = (DIM / square.clamp(min=2.0**-100)).sqrt()
        units = [y * to_unit for y in parts]
        codes = [torch.bucketize(u, middles, out_int32=True) for u in units]
        chosen = [book.index_select(0, code.flatten()).view_as(code) for code in codes]
        dot = sum((u * c).sum(2, keepdim=True) for u, c in zip(units, chosen))
        length = sum(torch.linalg.vector_norm(c, dim=2, keepdim=True).square() for c in chosen)
        return pack(codes, bits, 2), (dot / length / to_unit).bfloat16()

    def decode(stored, plane):
        packed, factor = stored
        codes = unpack(packed, bits, 2).int()
        chosen = book_f16.index_select(0, codes.flatten()).view_as(codes)
        return (chosen * factor.half()) @ rotation.T

    def error(x, back, stored, plane):
        # On the whole what the codebook leaves; a row may have an element far beyond the codebook.
        square, lost = x.float().square().sum(2), (back.float() - x.float()).square().sum(2)
        return torch.maximum(lost.sum() / square.sum() / SQUARED_ERROR[bits] / 1.02, (lost / (0.3 * square + FLOOR)).max())

    return Format(bits + 16 / DIM, encode, decode, error)


FORMATS = {
    "int8": lambda device: scaled(torch.int8, 127.0),
    "fp8": lambda device: scaled(torch.float8_e4m3fn, 448.0),
    "r4": lambda device: rotated(4, device),
    "r3": lambda device: rotated(3, device),
    "r2": lambda device: rotated(2, device),
    "int4": lambda device: grouped(4),
    "int2": lambda device: grouped(2),
}


def median_ms(work, options, device):
    """Of the repetitions of `work`. The device has the next one at hand when it is done with one."""
    for _ in range(options.warm_up):
        work()
    if device.type == "cuda":
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(options.repeats)]
        stream = torch.cuda.current_stream(device)
        torch.cuda.synchronize(device)
        for start, end in events:
            start.record(stream)
            work()
            end.record(stream)
        torch.cuda.synchronize(device)
        return statistics.median(start.elapsed_time(end) for start, end in events)
    times = []
    for _ in range(options.repeats):
        started = time.perf_counter()
        work()
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def measure(format, variant, planes, options, device):
    """Milliseconds of each direction, stored bytes, and the largest error as a share of what is allowed."""
    encode, decode = format.encode, format.decode
    if variant == "compiled":
        torch.compiler.reset()  # The last format's graphs do not count towards the limit.
        encode, decode = (torch.compile(f, fullgraph=True, dynamic=False, mode=options.mode) for f in (encode, decode))
    stored = {plane: encode(x, plane) for plane, x in planes.items()}
    error = 0.0
    for plane, x in planes.items():
        of_plane = format.error(x, decode(stored[plane], plane), stored[plane], plane).item()
        error = of_plane if not of_plane <= error else error  # Also if it is no number.
    ms = {
        "encode": median_ms(lambda: [encode(x, plane) for plane, x in planes.items()], options, device),
        "decode": median_ms(lambda: [decode(of_plane, plane) for plane, of_plane in stored.items()], options, device),
    }
    return ms, sum(tensor.nbytes for of_plane in stored.values() for tensor in of_plane), error


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument("--tokens", type=int, default=1 << 18, help="a multiple of 32")
    parser.add_argument("--repeats", type=int, default=31, help="of which the median counts")
    parser.add_argument("--warm-up", type=int, default=5, help="repetitions before them")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu to try the script")
    parser.add_argument("--only", action="append", choices=["eager", "compiled"], help="only this variant")
    parser.add_argument("--format", action="append", choices=FORMATS, help="only this format")
    parser.add_argument("--mode", default="default", help="of torch.compile: default, max-autotune-no-cudagraphs")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("nothing to measure: PyTorch finds no GPU", file=sys.stderr)
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.manual_seed(0)
    planes = {plane: torch.randn(HEADS, options.tokens, DIM, device=device, dtype=torch.float16) for plane in ("keys", "values")}
    for x in planes.values():
        x[:, :GROUP] = 0  # Groups and rows without extent.
    raw_bytes = sum(x.nbytes for x in planes.values())

    def report(format, direction, variant, ms, moved, **more):
        of_copy = moved / ms / copy_rate
        if options.json:
            shape = {"tokens": options.tokens, "heads": HEADS, "dim": DIM, "device": name, "torch": torch.__version__}
            figure = {"peer": "pytorch", "format": format, "direction": direction, "variant": variant, "ms": round(ms, 4)}
            print(json.dumps({**figure, "bytes": moved, "share_of_copy": round(of_copy, 4), **more, **shape}), flush=True)
        else:
            rates = f"{moved / ms / 1e6:>9.1f} GB/s {of_copy:>7.3f} of the copy rate"
            print(f"{format:<6} {direction:<7} {variant:<9} {ms:>10.3f} ms {rates}", flush=True)

    # Half a gibibyte, unless there are fewer tokens: as much as `gpu_bench` copies.
    to = torch.empty_like(planes["keys"])
    copy_ms = median_ms(lambda: to.copy_(planes["keys"]), options, device)
    copy_rate = 2 * to.nbytes / copy_ms
    if not options.json:
        print(f"{options.tokens} tokens x {HEADS} heads x {DIM}, f16, keys and values, on {name}")
    report("raw", "copy", "eager", copy_ms, 2 * to.nbytes)
    del to
    wrong = False
    for what in options.format or FORMATS:
        format = FORMATS[what](device)
        for variant in options.only or ["eager", "compiled"]:
            try:
                ms, stored_bytes, error = measure(format, variant, planes, options, device)
            except Exception as problem:  # A compiler that is missing must not take the eager figures along.
                if variant == "eager":
                    raise
                print(f"{what}, {variant}: {type(problem).__name__}: {str(problem).splitlines()[0]}", file=sys.stderr)
                continue
            bits = stored_bytes * 8 / (raw_bytes / 2)
            for direction in ms:
                more = {"bits_per_element": bits, "error_of_allowed": round(error, 3)}
                report(what, direction, variant, ms[direction], raw_bytes + stored_bytes, **more)
            if bits != format.bits or not error <= 1.0:
                wrong = True
                print(f"{what}, {variant}: {bits} bits instead of {format.bits}, {error} of the error allowed", file=sys.stderr)
    sys.exit(wrong)


if __name__ == "__main__":
    main()
