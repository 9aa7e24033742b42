"""Tiny checkpoints with random weights in genuine diffusers layout. torch and diffusers are loaded when one is made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from pia_ray.config.resolving import seed_from_id
from pia_ray.testing.original import original_text_encoder, original_unet, original_vae

if TYPE_CHECKING:
    import torch
    from transformers import CLIPTextConfig, CLIPTokenizer

_WORDS: Final = ("a", "the", "of", "in", "left", "right", "up", "down", "zoom", "pan", "sea", "waves", "cat", "red")
_WIDTHS: Final = (16, 32)
_CROSS_WIDTH: Final = 32
_GROUPS: Final = 8


def make_pipeline_folder(
    folder: Path,
    *,
    seed: int = 0,
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon",
    zero_snr: bool = False,
    vae_factor: Literal[2, 4, 8, 16] = 8,
    motion_mid_block: bool = False,
    sample_size: int = 8,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
) -> Path:
    """Writes a whole PIA pipeline (a few hundred thousand random weights) and returns its folder.

    `PIAPipeline.from_pretrained(folder)` runs it. Its UNet is the `UNetMotionModel` that the parts of
    `make_split_checkpoint` give with the same arguments, so both make the same frames. No weight is zero and no layer
    an identity: leaving any part out changes the frames. Equal arguments give equal files. `sample_size` is the side
    of the latents that the config states. As with Stable Diffusion, the scheduler file says scaled_linear.
    """
    import torch
    from diffusers import PIAPipeline, UNetMotionModel

    with torch.random.fork_rng(devices=[]):
        unet = UNetMotionModel.from_unet2d(
            _unet(seed, sample_size=sample_size), _adapter(seed, motion_mid_block=motion_mid_block)
        )
        tokenizer = make_tokenizer()
        pipeline = PIAPipeline(
            vae=_vae(seed, factor=vae_factor, sample_size=sample_size),
            text_encoder=_text_encoder(seed, tokenizer=tokenizer),
            tokenizer=tokenizer,
            unet=unet,
            motion_adapter=None,
            scheduler=_scheduler(prediction_type, zero_snr=zero_snr),
        )
    if dtype != "float32":
        pipeline.to(getattr(torch, dtype))
    pipeline.save_pretrained(folder)
    write_slow_tokenizer(Path(folder) / "tokenizer")
    return Path(folder)


def make_split_checkpoint(
    folder: Path,
    *,
    seed: int = 0,
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon",
    zero_snr: bool = False,
    vae_factor: Literal[2, 4, 8, 16] = 8,
    motion_mid_block: bool = False,
    sample_size: int = 8,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
) -> tuple[Path, Path, Path]:
    """Writes a Stable Diffusion 1.5 checkpoint, PIA's motion adapter and a VAE; returns the three folders.

    This is the layout of Realistic Vision with openmmlab/PIA-condition-adapter. The base holds a 4-channel
    `UNet2DConditionModel` and a VAE of its own whose weights differ from the separate one's; the adapter brings the
    9-channel conv_in.
    """
    import torch
    from diffusers import StableDiffusionPipeline

    base, adapter_folder, vae_folder = (Path(folder) / name for name in ("base", "motion-adapter", "vae"))
    with torch.random.fork_rng(devices=[]):
        tokenizer = make_tokenizer()
        pipeline = StableDiffusionPipeline(
            vae=_vae(seed + 1, factor=vae_factor, sample_size=sample_size),
            text_encoder=_text_encoder(seed, tokenizer=tokenizer),
            tokenizer=tokenizer,
            unet=_unet(seed, sample_size=sample_size),
            scheduler=_scheduler(prediction_type, zero_snr=zero_snr),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        adapter = _adapter(seed, motion_mid_block=motion_mid_block)
        vae = _vae(seed, factor=vae_factor, sample_size=sample_size)
    if dtype != "float32":
        for part in (pipeline, adapter, vae):
            part.to(getattr(torch, dtype))
    pipeline.save_pretrained(base)
    write_slow_tokenizer(base / "tokenizer")
    adapter.save_pretrained(adapter_folder)
    vae.save_pretrained(vae_folder)
    return base, adapter_folder, vae_folder


def make_single_file_checkpoint(
    folder: Path,
    *,
    seed: int = 0,
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon",
    zero_snr: bool = False,
    vae_factor: Literal[2, 4, 8, 16] = 8,
    motion_mid_block: bool = False,
    sample_size: int = 8,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
) -> tuple[Path, Path, Path, Path]:
    """Writes `make_split_checkpoint`'s model as model sites give it: base and VAE one .safetensors file each.

    Returns the base's file, the motion adapter's folder, the VAE's file, and a folder with nothing but configs,
    tokenizer and scheduler, for `ModelConfig.config`. Names and shapes are those of the original Stable Diffusion
    code; both layouts make the same frames.
    """
    import shutil

    from safetensors.torch import load_file, save_file

    base, adapter, vae = make_split_checkpoint(
        folder,
        seed=seed,
        prediction_type=prediction_type,
        zero_snr=zero_snr,
        vae_factor=vae_factor,
        motion_mid_block=motion_mid_block,
        sample_size=sample_size,
        dtype=dtype,
    )
    weights = "diffusion_pytorch_model.safetensors"
    tensors = original_unet(load_file(base / "unet" / weights), layers_per_block=1)
    tensors |= original_vae(load_file(base / "vae" / weights), prefix="first_stage_model.")
    tensors |= original_text_encoder(load_file(base / "text_encoder" / "model.safetensors"))
    files = Path(folder) / "base.safetensors", Path(folder) / "vae.safetensors"
    save_file(tensors, files[0])
    save_file(original_vae(load_file(vae / weights)), files[1])
    config = Path(folder) / "config"
    shutil.copytree(base, config, ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.rmtree(base)
    shutil.rmtree(vae)
    return files[0], adapter, files[1], config


def make_tokenizer(words: Sequence[str] = _WORDS, *, max_length: int = 77) -> CLIPTokenizer:
    """A CLIP tokenizer that spells every text in bytes and knows the prefixes of a few words."""
    from transformers import CLIPTokenizer

    # Bytes that do not print are shown as characters from 256 on: GPT-2's byte-level alphabet, which CLIP shares.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in plain]
    alphabet = [chr(byte) for byte in plain] + [chr(256 + index) for index in range(len(hidden))]
    merges: list[tuple[str, str]] = []
    for word in words:
        head = word[0]
        for place, letter in enumerate(word[1:], start=2):
            tail = letter if place < len(word) else letter + "</w>"
            if (head, tail) not in merges:
                merges.append((head, tail))
            head += letter
    tokens = [*alphabet, *(char + "</w>" for char in alphabet), *(left + right for left, right in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def write_slow_tokenizer(folder: Path) -> None:
    """Adds vocab.json and merges.txt, which transformers 4 reads, beside the tokenizer.json of transformers 5."""
    model = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]
    vocab = json.dumps(model["vocab"], ensure_ascii=False)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "vocab.json").write_text(vocab + "\n", "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", "utf-8")


def _unet(seed: int, *, sample_size: int) -> Any:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=_WIDTHS,
        layers_per_block=1,
        norm_num_groups=_GROUPS,
        cross_attention_dim=_CROSS_WIDTH,
        attention_head_dim=4,  # Stable Diffusion 1.5's misnomer: the number of heads
    )
    return _randomise(unet, seed, "unet")


def _adapter(seed: int, *, motion_mid_block: bool) -> Any:
    from diffusers import MotionAdapter

    adapter = MotionAdapter(
        block_out_channels=_WIDTHS,
        motion_layers_per_block=1,
        motion_num_attention_heads=4,
        motion_norm_num_groups=_GROUPS,
        motion_max_seq_length=32,
        use_motion_mid_block=motion_mid_block,
        conv_in_channels=9,
    )
    return _randomise(adapter, seed, "motion-adapter")


def _vae(seed: int, *, factor: int, sample_size: int) -> Any:
    from diffusers import AutoencoderKL

    widths = {2: (8, 16), 4: (8, 8, 16), 8: (8, 8, 16, 16), 16: (8, 8, 8, 16, 16)}[factor]
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        norm_num_groups=_GROUPS,
        sample_size=sample_size * factor,
        scaling_factor=0.18215,
    )
    return _randomise(vae, seed, "vae")


def _text_encoder(seed: int, *, tokenizer: CLIPTokenizer) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=_CROSS_WIDTH,
        intermediate_size=2 * _CROSS_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=_CROSS_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _randomise(CLIPTextModel(config), seed, "text-encoder")


def _scheduler(prediction_type: str, *, zero_snr: bool) -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=0 if zero_snr else 1,
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_snr,
        timestep_spacing="trailing" if zero_snr else "leading",
    )


def _randomise(model: Any, seed: int, part: str) -> Any:
    """Draws every weight anew, so that no layer is zero or an identity; scales keep activations near one."""
    import torch

    generator = torch.Generator().manual_seed(seed_from_id(f"{part}/{seed}") % 2**63)
    for name, weight in model.named_parameters():
        noise: torch.Tensor = torch.randn(weight.shape, generator=generator)
        if weight.ndim > 1:
            value = noise / weight[0].numel() ** 0.5
        else:
            value = noise * 0.1 + (1.0 if name.endswith("weight") else 0.0)
        weight.data.copy_(value)
    return model.eval()


def make_random_pipeline(
    folder: Path, *, size: Literal["full", "reduced"], dtype: str = "float32", device: str = "cpu", seed: int = 0
) -> Path:
    """Writes a PIA pipeline of Stable Diffusion 1.5's architecture with random weights, for measuring speed.

    "full" has its true widths: 1.28 billion parameters in the UNet, 3 GB in float16, best made on a GPU. "reduced" has
    a fifth of the widths and a quarter of the layers. What such a model draws means nothing.
    """
    import torch

    pipeline = random_pipeline(size, device=device, seed=seed)
    pipeline.to(getattr(torch, dtype)).save_pretrained(folder)
    return Path(folder)


def random_pipeline(size: Literal["full", "reduced"], *, device: str = "cpu", seed: int = 0) -> Any:
    """The pipeline that `make_random_pipeline` writes, in float32 and in memory."""
    import torch
    from diffusers import AutoencoderKL, PIAPipeline, UNetMotionModel
    from transformers import CLIPTextModel

    is_full = size == "full"
    tokenizer = make_tokenizer()
    text_config = _random_text_config(tokenizer, is_full=is_full)
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        unet = UNetMotionModel(
            in_channels=9,
            block_out_channels=(320, 640, 1280, 1280) if is_full else (64, 128, 256, 256),
            layers_per_block=2 if is_full else 1,
            cross_attention_dim=text_config.hidden_size,
            num_attention_heads=8,
            motion_num_attention_heads=8,
            use_motion_mid_block=False,
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512) if is_full else (32, 32, 64, 64),
            layers_per_block=2 if is_full else 1,
            scaling_factor=0.18215,
        )
        text_encoder = CLIPTextModel(text_config)
    return PIAPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        motion_adapter=None,
        scheduler=_scheduler("epsilon", zero_snr=False),
    )


def _random_text_config(tokenizer: CLIPTokenizer, *, is_full: bool) -> CLIPTextConfig:
    from transformers import CLIPTextConfig

    width = 768 if is_full else 64
    return CLIPTextConfig(
        vocab_size=49_408 if is_full else len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=12 if is_full else 2,
        num_attention_heads=12 if is_full else 4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
