#!/usr/bin/env python3
"""A decode step the way it is usually written in PyTorch: one tensor at a time.

Per tensor: pin the host tensor, copy it to the device, ask whether all of it is finite (which waits for the device), quantise it to
int8 by its largest magnitude, and keep it in a dict under (sequence, position). A step is 256 sequences x 1 token, 8 heads x 128, f16,
keys and values. Prints the milliseconds of a step, with the quantiser run eagerly and with it compiled.

    python3 benches/peers/original.py            # a table
    python3 benches/peers/original.py --json     # one JSON object per line
"""
import argparse
import json
import statistics
import sys
import time

import torch

SEQUENCES = 256
HEADS = 8
DIM = 128


def quantise(tensor):
    """int8 codes and one scale for the whole tensor."""
    scale = tensor.abs().max().float().clamp(min=2.0**-100) / 127.0
    codes = torch.round(tensor.float() / scale).clamp(-127, 127).to(torch.int8)
    return codes, scale


class Cache:
    """What is stored, by (sequence, position)."""

    def __init__(self, device, quantiser):
        self.device = device
        self.quantiser = quantiser
        self.entries = {}

    def store(self, tensor):
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        tensor = tensor.to(self.device, non_blocking=True)
        if not torch.isfinite(tensor).all():
            raise ValueError("not finite")
        return self.quantiser(tensor)

    def append(self, sequence, position, keys, values):
        self.entries[sequence, position] = (self.store(keys), self.store(values))


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(device, quantiser, steps, warm_up):
    """Milliseconds of each step."""
    torch.manual_seed(0)
    rows = torch.randn(2, SEQUENCES, HEADS, DIM).half()
    cache, times = Cache(device, quantiser), []
    for step in range(warm_up + steps):
        synchronise(device)
        started = time.perf_counter()
        for sequence in range(SEQUENCES):
            cache.append(sequence, step, rows[0, sequence], rows[1, sequence])
        synchronise(device)
        if step >= warm_up:
            times.append((time.perf_counter() - started) * 1e3)
    assert len(cache.entries) == SEQUENCES * (warm_up + steps)
    return times


def variants(wanted):
    everything = {
        "eager": lambda: quantise,
        "compiled": lambda: torch.compile(quantise),
    }
    return [(name, make) for name, make in everything.items() if not wanted or name in wanted]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument("--steps", type=int, default=32, help="steps to measure")
    parser.add_argument("--warm-up", type=int, default=8, help="steps before them")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu to try the script")
    parser.add_argument("--only", action="append", choices=["eager", "compiled"], help="only this variant")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("nothing to measure: PyTorch finds no GPU", file=sys.stderr)
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    for variant, make in variants(options.only):
        try:
            times = measure(device, make(), options.steps, options.warm_up)
        except Exception as error:  # A compiler that is missing must not take the eager figure along.
            if variant == "eager":
                raise
            print(f"{variant}: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        figure = {
            "what": "decode step, 256 sequences x 1 token, 8 heads x 128, f16, keys and values",
            "variant": variant,
            "ms_per_step": round(statistics.median(times), 4),
            "ms_min": round(min(times), 4),
            "ms_max": round(max(times), 4),
            "steps": options.steps,
            "device": name,
            "torch": torch.__version__,
        }
        if options.json:
            print(json.dumps(figure), flush=True)
        else:
            print(f"{variant:<10} {figure['ms_per_step']:>10.3f} ms per step on {name}", flush=True)


if __name__ == "__main__":
    main()
