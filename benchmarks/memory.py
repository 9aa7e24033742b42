"""Memory of Stable Diffusion 1.5 with PIA's motion modules, by size, frames and precision, without running it.

The architecture runs on tensors that have shapes and no content, and what is alive at once is counted. Not in it:
workspaces of convolutions, torch's own context on a GPU and what its allocator cannot use.

Prints a card and, last, one JSON line. Run: `.venv/bin/python benchmarks/memory.py`
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from typing import Any

import card
import torch
from diffusers import AutoencoderKL, UNetMotionModel
from peak_memory import peak_bytes, weightless
from transformers import CLIPTextConfig, CLIPTextModel

from pia_ray.pia.device.memory import weight_bytes
from pia_ray.pia.device.vae_tiling import TILE_PIXELS, tiled

SIZES = ((256, 16), (512, 16), (512, 32), (768, 16), (1024, 16))
"""Side in px and frames."""
GIB = 2**30


def main() -> None:
    """Prints weights once per precision, then a line per size."""
    result: dict[str, Any] = {"benchmark": "memory"}
    for dtype in (torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        with weightless(dtype):
            parts = {"unet": unet(), "vae": vae(), "text_encoder": text_encoder()}
            weights = {part: weight_bytes([module]) / GIB for part, module in parts.items()}
            print(f"{name}: weights in GiB: " + ", ".join(f"{part} {size:.2f}" for part, size in weights.items()))
            print("  px      frames   one evaluation   a frame decoded   in tiles   offload none   model   sequential")
            result[name] = {"weights_gib": weights, "sizes": [sizes(parts, *size) for size in SIZES]}
        for line in result[name]["sizes"]:
            print(
                f"  {line['side']:<7} {line['num_frames']:<8} {line['evaluation']:<16.2f} {line['decode']:<17.2f} "
                f"{line['tiles']:<10.2f} {line['none']:<14.1f} {line['model']:<7.1f} {line['sequential']:.1f}"
            )
    facts = card.machine("torch", "diffusers")
    print(f"  {card.line(facts)}")
    print(json.dumps({**result, **facts}))


def sizes(parts: dict[str, Any], side: int, num_frames: int) -> dict[str, float]:
    """GiB of activations at one size, and of all that is on the device, with one evaluation and one frame at a time."""
    latent = side // 8
    sample, prompts = torch.empty(1, 9, num_frames, latent, latent), torch.empty(num_frames, 77, 768)
    evaluation = peak_bytes(partial(parts["unet"], sample, torch.zeros(1), encoder_hidden_states=prompts)) / GIB
    frame = torch.empty(1, 4, latent, latent)
    decode = peak_bytes(partial(parts["vae"].decode, frame)) / GIB
    run = partial(tiled, lambda tile: parts["vae"].decode(tile).sample, frame, tile=TILE_PIXELS // 8, scale=8)
    tiles = peak_bytes(run) / GIB if side > TILE_PIXELS else decode
    weights = {name: weight_bytes([part]) / GIB for name, part in parts.items()}
    return {
        "side": side,
        "num_frames": num_frames,
        "evaluation": evaluation,
        "decode": decode,
        "tiles": tiles,
        "none": sum(weights.values()) + max(evaluation, decode),
        "model": max(weights["unet"] + evaluation, weights["vae"] + decode),
        "sequential": max(evaluation + largest_layer(parts.values()), decode),
    }


def largest_layer(parts: Iterable[torch.nn.Module]) -> float:
    """GiB of the weights of the largest single layer."""
    layers = [layer for part in parts for layer in part.modules()]
    return max(sum(weight.nbytes for weight in layer.parameters(recurse=False)) for layer in layers) / GIB


def unet() -> UNetMotionModel:
    """Stable Diffusion 1.5's UNet with PIA's motion modules and 9-channel input."""
    return UNetMotionModel(
        in_channels=9,
        cross_attention_dim=768,
        num_attention_heads=8,
        motion_num_attention_heads=8,
        use_motion_mid_block=False,
    )


def vae() -> AutoencoderKL:
    """Stable Diffusion 1.5's VAE."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
    )


def text_encoder() -> CLIPTextModel:
    """The text encoder of CLIP ViT-L/14."""
    return CLIPTextModel(
        CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    )


if __name__ == "__main__":
    main()
