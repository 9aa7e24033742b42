"""The UNet of Stable Diffusion 1.5 with PIA at full width on a CPU: diffusers' own against ours, by turns.

Random weights, 128 px, 8 frames, both sides of guidance, one forward a turn. Needs 10 GB. CPU seconds count, because
they do not depend on what else the machine does. Prints a card, our operators' ways and, last, one JSON line. Run:
`.venv/bin/python benchmarks/full_width.py [--rounds N]`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter

import card
import torch
from diffusers import UNetMotionModel

from pia_ray.pia.components import sharing_copy
from pia_ray.pia.device.memory import available_bytes
from pia_ray.pia.device.placement import MEMORY_FORMAT
from pia_ray.pia.unet.choices import ON_CPU
from pia_ray.pia.unet.convolutions import COPIES
from pia_ray.pia.unet.rewrites import restructure_unet

NEEDED_BYTES = 12 * 2**30
FRAMES, SIDE = 8, 16
"""SIDE in latent pixels."""


def main() -> None:
    """Takes both by turns and prints the ratios of each round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds; their medians count (5)")
    rounds = parser.parse_args().rounds
    if 0 < available_bytes() < NEEDED_BYTES:
        print(f"left out: less than {NEEDED_BYTES / 2**30:.0f} GiB of memory are free")
        return
    theirs = random_unet()
    ours = sharing_copy(theirs).to(memory_format=MEMORY_FORMAT)
    restructure_unet(ours, ON_CPU, COPIES)
    inputs = torch.randn(2, 9, FRAMES, SIDE, SIDE), torch.tensor([500.0, 500.0]), torch.randn(2 * FRAMES, 77, 768)
    seconds: dict[str, list[tuple[float, float]]] = {"diffusers": [], "ours": []}
    choosing_s, off = 0.0, 0.0
    for turn in range(rounds + 1):
        predictions = {}
        for name, unet in (("diffusers", theirs), ("ours", ours)):
            predictions[name], wall_s, cpu_s = timed(unet, inputs)
            if turn:
                seconds[name].append((wall_s, cpu_s))
            elif name == "ours":
                choosing_s = cpu_s
        off = float((predictions["ours"] - predictions["diffusers"]).norm() / predictions["diffusers"].norm())
    pairs = list(zip(seconds["diffusers"], seconds["ours"], strict=True))
    wall, cpu = ([round(them[kind] / us[kind], 3) for them, us in pairs] for kind in (0, 1))
    least = {name: round(min(cpu_s for _, cpu_s in taken), 2) for name, taken in seconds.items()}
    ways = Counter(f"{kind.split()[0]}: {way}" for kind, way in ON_CPU.known().items())
    facts = card.machine("torch", "diffusers")
    print(f"a forward at full width, {FRAMES} frames of {8 * SIDE} px, {rounds} rounds by turns")
    print(f"  CPU s, least: diffusers {least['diffusers']}, ours {least['ours']}")
    print(f"  our first forward, which times the ways: {choosing_s:.1f} CPU s")
    print(f"  diffusers / ours, median: {statistics.median(cpu):.2f} by CPU s, {statistics.median(wall):.2f} by wall")
    print(f"  relative difference of the predictions: {off:.1e}")
    for way, num in sorted(ways.items()):
        print(f"  {way}, {num} kinds of call")
    print(f"  {card.line(facts)}")
    result = {"cpu_ratio": cpu, "wall_ratio": wall, "least_cpu_s": least, "first_cpu_s": round(choosing_s, 2)}
    print(json.dumps({"benchmark": "full_width", **result, "difference": off, "ways": ways, **facts}))


def random_unet() -> UNetMotionModel:
    """The UNet with weights of about the scale of trained ones."""
    with torch.device("meta"):
        unet = UNetMotionModel(
            in_channels=9,
            block_out_channels=(320, 640, 1280, 1280),
            cross_attention_dim=768,
            num_attention_heads=8,
            motion_num_attention_heads=8,
            use_motion_mid_block=False,
        )
    unet.to_empty(device="cpu").requires_grad_(False).eval()
    for name, weight in unet.named_parameters():
        if weight.ndim > 1:
            weight.uniform_(-1, 1).mul_(weight[0].numel() ** -0.5)
        else:
            weight.fill_(1.0 if name.endswith("weight") else 0.0)
    for positions in unet.buffers():
        positions.normal_(std=0.1)
    return unet


@torch.inference_mode()
def timed(unet: UNetMotionModel, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, float, float]:
    """A prediction, and its wall and CPU seconds."""
    sample, timesteps, prompts = inputs
    started, cpu = time.perf_counter(), time.process_time()
    made = unet(sample, timesteps, encoder_hidden_states=prompts, return_dict=False)[0]
    return made, time.perf_counter() - started, time.process_time() - cpu


if __name__ == "__main__":
    main()
