#!/usr/bin/env python3
"""Known answers of the storage formats, from their written definition (the documentation of src/backend/cpu/codec) in plain f64.

    python3 tests/data/known_answers.py            # writes known_answers.txt beside it
    python3 tests/data/known_answers.py --check    # fails if what is there is not what the script gives

It shares nothing with the codecs: rotations are sums over a matrix of signs, nothing overflows, and no order of sums matters. The codecs compute
in f32, so an answer is only taken where the two cannot differ: each rounding and each choice of a code has to be further from a tie than what f32
may be off by (or exactly on one, where f32 is exact too). Rows for which that is not so are drawn again.
"""
import functools
import math
import pathlib
import struct
import sys
import zlib

HERE = pathlib.Path(__file__).resolve().parent
GROUP = 32


class Chance:
    """Numbers that are the same with every version of Python, and every library below it."""

    def __init__(self, seed):
        self.state = zlib.crc32(seed.encode()) << 16 | 1

    def below(self, n):
        self.state = (self.state * 6364136223846793005 + 1442695040888963407) % 2 ** 64
        return (self.state >> 33) * n >> 31

    def among(self, most):
        """An integer from -most to most."""
        return self.below(2 * most + 1) - most

    def normal(self):
        """Nearly."""
        return sum(self.below(2 ** 16) for _ in range(12)) / 2 ** 16 - 6

    def of(self, *choices):
        return choices[self.below(len(choices))]


class Ambiguous(Exception):
    """So close to a tie that f32 may see it on the other side."""


def nearest(x, slack):
    """The integer nearest to x, half to even, which x +- slack agree on; a tie that is exact stays one."""
    low = math.floor(x)
    off = abs(x - low - 0.5)
    if off != 0 and off <= slack:
        raise Ambiguous
    return round(x)


class Float:
    """A binary format: significant digits, least exponent of a normal number, largest number."""

    def __init__(self, name, digits, least, largest, code, size):
        self.name, self.digits, self.least, self.largest, self.code, self.size = name, digits, least, largest, code, size

    def unit(self, x):
        """From x to the next number."""
        exponent = math.frexp(x)[1] - 1 if x else self.least
        return 2.0 ** (max(exponent, self.least) - self.digits + 1)

    def round(self, x, slack=0.0):
        """Rounded and saturated, if all within `slack` of x are rounded alike."""
        unit = self.unit(x)
        # Power of two: the quotient is exact. Close to a power of two the unit below is half as large.
        rounded = nearest(x / unit, slack / unit * 2) * unit
        # A zero keeps the sign of what it comes from.
        return math.copysign(min(self.largest, abs(rounded)), x)

    def bytes(self, x):
        if self.name == "bf16":
            return struct.pack("<f", x)[2:]
        return struct.pack(self.code, x)


F16 = Float("f16", 11, -14, 65504.0, "<e", 2)
BF16 = Float("bf16", 8, -126, float.fromhex("0x1.fep127"), None, 2)
F32 = Float("f32", 24, -126, float.fromhex("0x1.fffffep127"), "<f", 4)
ELEMENTS = [F16, BF16, F32]


def floor_of(element):
    return 2.0 ** -24 if element is F16 else 2.0 ** -100


def packed(codes, bits):
    """The first code in the lowest bits."""
    all_bits = sum(code << (bits * at) for at, code in enumerate(codes))
    return all_bits.to_bytes((bits * len(codes) + 7) // 8, "little")


# ---------------------------------------------------------------------------------------------------------------------
# int8 and fp8: rows to codes, scales and values.


def scaled(row, element, most, coder):
    scale_type = F16 if element is F16 else F32
    largest = max(map(abs, row))
    scale = max(scale_type.round(largest / most, 1e-7 * largest / most if element is F16 else 0.0), floor_of(element))
    codes, values = zip(*(coder(x, scale) for x in row))
    # Products of 8 and 24 digits are exact here, and rounded to f32 there before they are to the element type.
    decoded = [element.round(v * scale, 0.0 if element is F32 else 1e-7 * abs(v * scale)) for v in values]
    return bytes(codes), scale_type.bytes(scale), b"".join(map(element.bytes, decoded))


def int8(row, element):
    def coder(x, scale):
        code = max(-127, min(127, nearest(x / scale, 1e-6 * abs(x / scale))))
        return code & 0xFF, code

    return scaled(row, element, 127.0, coder)


def fp8(row, element):
    def coder(x, scale):
        quotient = abs(x / scale)
        unit = 2.0 ** (max(math.frexp(quotient)[1] - 1, -6) - 3) if quotient else 2.0 ** -9
        # By way of a reciprocal: only where that is a power of two is a tie one there too.
        inexact = math.frexp(scale)[0] != 0.5
        steps = quotient / unit
        if inexact and steps % 1 == 0.5:
            raise Ambiguous
        value = min(nearest(steps, 1e-6 * steps) * unit, 448.0)
        if value < 2.0 ** -6:
            code = round(value * 512)
        else:
            exponent = math.frexp(value)[1] - 1
            code = (exponent + 7 << 3) + round((value / 2.0 ** exponent - 1) * 8)
        negative = math.copysign(1.0, x) < 0
        return code | negative << 7, -value if negative else value

    return scaled(row, element, 448.0, coder)


# ---------------------------------------------------------------------------------------------------------------------
# r4, r3, r2

SIGNS = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0, 0x082EFA98, 0xEC4E6C89]
BOOKS = {
    # Magnitudes, places, their width, and where each magnitude but the first begins.
    2: ([0.4528, 1.5104], 3, 0.9816, [1]),
    3: ([0.2401, 0.7501, 1.3446, 2.1537], 51, 0.07, [7, 15, 25]),
    4: ([0.1304, 0.3911, 0.6518, 0.9323, 1.2545, 1.6179, 2.0644, 2.7350], 111, 0.0437, [6, 12, 18, 25, 33, 42, 55]),
}


def single(x):
    return struct.unpack("<f", struct.pack("<f", x))[0]


def marked(value, code, bits):
    """The value as an f32 whose lowest bits are its code."""
    word = struct.unpack("<I", struct.pack("<f", value))[0]
    return struct.unpack("<f", struct.pack("<I", word >> bits << bits | code))[0]


def sign(i):
    return -1.0 if SIGNS[i // 32 % 8] >> i % 32 & 1 else 1.0


@functools.cache
def hadamard(group):
    return [[-1.0 if (i & j).bit_count() % 2 else 1.0 for j in range(group)] for i in range(group)]


def rotated(x, back=False):
    """Signs, then sums with the signs of a Hadamard matrix, over groups; back, the other way round."""
    dim = len(x)
    group = min(dim & -dim, 256)
    if not back:
        x = [sign(i) * v for i, v in enumerate(x)]
    y = []
    for first in range(0, dim, group):
        of_group = x[first:first + group]
        for i in range(group):
            y.append(math.fsum(v * h for v, h in zip(of_group, hadamard(group)[i])))
    return [sign(i) * v for i, v in enumerate(y)] if back else y


def rotation(bits):
    magnitudes, places, width, begins = BOOKS[bits]
    half = len(magnitudes)

    def code_of(place):
        below = place < (places + 1) // 2
        from_zero = places // 2 - place if below else place - (places + 1) // 2
        return sum(from_zero >= begin for begin in begins) + (half if below else 0)

    def value_of(code):
        return single(-magnitudes[code % half] if code >= half else magnitudes[code % half])

    def encode(row, element):
        dim = len(row)
        group = min(dim & -dim, 256)
        y = rotated(row)
        square = math.fsum(v * v for v in y)
        if square == 0:
            codes, factor = [0] * dim, 0.0
        else:
            unit = math.sqrt(dim / square) / (places * width)
            codes = []
            for v in y:
                share = [max(0.0, min(1.0, v * unit * off + 0.5)) * places for off in (1 - 1e-5, 1 + 1e-5)]
                # What is summed is off by some 1e-6 of a row's standard deviation, whatever is left of it.
                around = {code_of(round(at + by)) for at in share for by in (-1e-4, 0.0, 1e-4)}
                if len(around) > 1:
                    raise Ambiguous
                codes += around
            c = [marked(value_of(code), code, bits) for code in codes]
            factor = math.fsum(a * b for a, b in zip(y, c)) / math.fsum(v * v for v in c) / math.sqrt(group)
            factor = BF16.round(min(factor, BF16.largest), 4e-6 * abs(factor))
        stored = packed(codes, bits), BF16.bytes(factor)
        if element is F32:
            return *stored, None
        values = rotated([value_of(code) for code in codes], back=True)
        values = [v * factor / math.sqrt(group) for v in values]
        # No nearer to a tie than a hundred-thousandth of what its elements come to.
        decoded = [element.round(v, 2e-6 * factor if abs(v) <= element.largest else 0.0) for v in values]
        # An f32 knows no more of zeros than their sum: with signs.
        if any(v == 0 and factor for v in decoded):
            raise Ambiguous
        return *stored, b"".join(map(element.bytes, decoded))

    return encode


# ---------------------------------------------------------------------------------------------------------------------
# int4 and int2: a group to its least element, step, codes and values.


def group_of(values, element, bits):
    most = 2 ** bits - 1
    low = min(values) + 0.0
    halves = [F32.round(0.5 * x - 0.5 * low) for x in values]
    quotient = F32.round(max(halves) / (0.5 * most))
    step = max(element.round(quotient, 0.0 if element is F32 else 1e-6 * quotient), floor_of(element))
    inverse = F32.round(1 / (0.5 * step))
    codes = [nearest(min(F32.round(h * inverse), most), 0.0) for h in halves]
    decoded = [q * step + low for q in codes]
    slack = 0.0 if element is F16 else 1e-9
    decoded = [element.round(v, max(slack * abs(v), 0.0 if element is F32 else 1e-7 * abs(v))) for v in decoded]
    return low, step, codes, decoded


def grouped(bits):
    def values(row, element):
        groups = [group_of(row[at:at + GROUP], element, bits) for at in range(0, len(row), GROUP)]
        scales = b"".join(element.bytes(g[part]) for part in (0, 1) for g in groups)
        decoded = b"".join(element.bytes(v) for g in groups for v in g[3])
        return packed([code for g in groups for code in g[2]], bits), scales, decoded

    def keys(rows, element):
        groups = [group_of([row[channel] for row in rows], element, bits) for channel in range(len(rows[0]))]
        scales = b"".join(element.bytes(g[part]) for part in (0, 1) for g in groups)
        codes = b"".join(packed([g[2][token] for g in groups], bits) for token in range(GROUP))
        decoded = b"".join(element.bytes(g[3][token]) for token in range(GROUP) for g in groups)
        return codes, scales, decoded

    return values, keys


# ---------------------------------------------------------------------------------------------------------------------


def rows_of(kind, element, dim, chance):
    """One row of a kind, of numbers of the type."""
    def number(x):
        return element.round(x)

    tiny = 2.0 ** -24 if element is F16 else float.fromhex("0x1p-133") if element is BF16 else 2.0 ** -149
    if kind == "normal":
        return [number(chance.normal()) for _ in range(dim)]
    if kind == "outlier":
        return [number(chance.normal() * (60 if i == dim // 3 else 1)) for i in range(dim)]
    if kind == "zeros":
        return [chance.of(0.0, -0.0) for _ in range(dim)]
    if kind == "denormal":
        return [chance.among(60) * tiny for _ in range(dim)]
    if kind == "largest":
        return [chance.of(-1, 1) * element.largest for _ in range(dim)]
    if kind == "small":
        return [number(chance.normal() * (2e-6 if element is F16 else 1e-30)) for _ in range(dim)]
    if kind == "large":
        return [number(chance.normal() * (9e3 if element is F16 else 1e30)) for _ in range(dim)]
    if kind == "wholes":
        return [float(chance.among(16)) for _ in range(dim)]
    if kind == "constant":
        return [number(3.14159)] * dim
    raise ValueError(kind)


KINDS = ["normal", "outlier", "zeros", "denormal", "largest", "small", "large", "wholes", "constant"]
FORMATS = {
    "int8": (int8, None, [64, 128, 33, 80, 1, 7, 256, 96, 16]),
    "fp8": (fp8, None, [128, 64, 33, 80, 1, 7, 256, 96, 16]),
    "r4": (rotation(4), None, [128, 64, 33, 80, 32, 128, 64, 8]),
    "r3": (rotation(3), None, [64, 128, 32, 96, 33, 80, 32, 64]),
    "r2": (rotation(2), None, [128, 64, 33, 32, 96, 64, 80, 32]),
    "int4": (*grouped(4), [64, 128, 34, 80, 32, 16, 96, 128, 7]),
    "int2": (*grouped(2), [128, 64, 34, 96, 32, 16, 80, 64, 7]),
}


def vectors():
    for name, (of_row, of_keys, dims) in FORMATS.items():
        for element in ELEMENTS:
            # Rows of 256, whose values are on no tie, are rare but where no value is asked for.
            wide = [("normal", 256)] if element is F32 else []
            for kind, dim in [*zip(KINDS, dims), *wide]:
                for plane in ["value"] + (["key"] if of_keys else []):
                    if plane == "key":
                        dim = max(dim // 16, 1)
                    for attempt in range(2000):
                        chance = Chance(f"{name} {element.name} {kind} {plane} {dim} {attempt}")
                        try:
                            if plane == "key":
                                rows = [rows_of(kind, element, dim, chance) for _ in range(GROUP)]
                                stored = of_keys(rows, element)
                            else:
                                rows = [rows_of(kind, element, dim, chance)]
                                stored = of_row(rows[0], element)
                        except Ambiguous:
                            continue
                        given = b"".join(element.bytes(x) for row in rows for x in row)
                        columns = [part.hex() if part is not None else "-" for part in (given, *stored)]
                        yield " ".join([name, plane, element.name, str(dim), kind, *columns])
                        break
                    else:
                        # Rows of few different numbers lie on ties, or do not, whatever is drawn.
                        print(f"none is unambiguous: {name} {plane} {element.name} {dim} {kind}", file=sys.stderr)


def main():
    path = HERE / "known_answers.txt"
    text = "# Made by known_answers.py, which says how. Bytes in hex, little endian:\n"
    text += "# format plane element dim kind elements codes scales decoded (- where f64 cannot tell the last bit)\n"
    text += "\n".join(vectors()) + "\n"
    if "--check" not in sys.argv[1:]:
        path.write_text(text)
    elif path.read_text() != text:
        sys.exit(f"{path} is not what the script gives; run it and commit the result")
    print(f"{text.count(chr(10)) - 2} vectors, {len(text)} bytes")


if __name__ == "__main__":
    main()
