"""Queries, keys and values of self-attention by one matrix product in place of three: does it pay?

Both ways have the same parameters and operations. Spatial attention of SD 1.5 at 512 x 512 px, one frame, and temporal
attention over 16 frames. Prints a card and, last, one JSON line. Run: `.venv/bin/python benchmarks/fused_qkv.py
[--rounds N]`; on a GPU where there is one, in float16.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import card
import torch
from torch.nn import functional as F

HEADS = 8
SHAPES = {
    "spatial, 64 x 64, 320 channels": (1, 4096, 320),
    "spatial, 32 x 32, 640 channels": (1, 1024, 640),
    "spatial, 16 x 16, 1280 channels": (1, 256, 1280),
    "temporal, 16 frames, 320 channels": (1024, 16, 320),
    "temporal, 16 frames, 1280 channels": (256, 16, 1280),
}
"""[N, S, C] of the hidden states."""


def main() -> None:
    """Takes both ways by turns and prints the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25, help="rounds; their medians count (25)")
    rounds = parser.parse_args().rounds
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    print(f"queries, keys and values on {device.type}, {dtype}: three products against one; medians of {rounds} rounds")
    print(f"  {'ms, with the attention itself':38} three      one    one/three")
    ratios = {}
    for name, shape in SHAPES.items():
        three, one = medians(shape, device, dtype, rounds)
        ratios[name] = round(one / three, 3)
        print(f"  {name:38} {three * 1e3:6.2f}   {one * 1e3:6.2f}    {one / three:.2f}")
    facts = card.machine("torch")
    print(f"  {card.line(facts)}")
    print(json.dumps({"benchmark": "fused_qkv", "rounds": rounds, "one_over_three": ratios, **facts}))


@torch.inference_mode()
def medians(shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype, rounds: int) -> tuple[float, float]:
    """Seconds of three products and of one, each with what follows."""
    states = torch.randn(shape, device=device, dtype=dtype)
    width = shape[2]
    weights = [torch.randn(width, width, device=device, dtype=dtype) * width**-0.5 for _ in range(3)]
    fused = torch.cat(weights)

    def heads(values: torch.Tensor) -> torch.Tensor:
        return values.unflatten(-1, (HEADS, width // HEADS)).transpose(1, 2)

    def three() -> torch.Tensor:
        return F.scaled_dot_product_attention(*(heads(F.linear(states, weight)) for weight in weights))

    def one() -> torch.Tensor:
        return F.scaled_dot_product_attention(*map(heads, F.linear(states, fused).chunk(3, dim=-1)))

    torch.testing.assert_close(one(), three(), rtol=1e-2, atol=1e-2 if dtype == torch.float16 else 1e-4)
    ways = (three, one)
    seconds: tuple[list[float], list[float]] = ([], [])
    for round_ in range(rounds + 2):
        for way, taken in zip(ways, seconds, strict=True):
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round_ >= 2:  # the first ones make ready
                taken.append(time.perf_counter() - started)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


if __name__ == "__main__":
    main()
