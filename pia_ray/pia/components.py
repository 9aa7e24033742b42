"""The parts of a loaded model, as values. `loading` makes them; engine, `unet`, `decoding` and `device` use them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
from diffusers import AutoencoderKL, UNetMotionModel
from diffusers.models.embeddings import ImageProjection
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from pia_ray.pia.safety_checker import SafetyChecker
from pia_ray.pia.scorer import Scorer

if TYPE_CHECKING:
    from pia_ray.pia.upscaler import Upscaler

_Module = TypeVar("_Module", bound=torch.nn.Module)

Part = Literal["unet", "text_encoder"]
"""A part of a model that LoRAs change."""

Place = tuple[Part, str, str]
"""A parameter that a LoRA changes: its part, its module, and `weight` or `bias`."""


class Changeable(Protocol):
    """The parts of a model that LoRAs change."""

    @property
    def unet(self) -> UNetMotionModel:
        """The UNet with its motion modules."""

    @property
    def text_encoder(self) -> CLIPTextModel:
        """The encoder of prompts."""


@dataclass(frozen=True)
class Lora:
    """A LoRA of a model."""

    path: Path
    weight: float
    """Its strength for rows that name none."""
    places: frozenset[Place] = frozenset()
    """The parameters that it changes."""


@dataclass(eq=False)
class SharedTensors:
    """Tensors from one source on one device in one precision; alive as long as a model refers to them."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(eq=False)
class VariantMemory:
    """The memory of a model's variants with LoRAs: the bytes of each that is alive, beside the weights it shares."""

    sizes: WeakKeyDictionary[Any, int] = field(default_factory=WeakKeyDictionary)

    @property
    def num_bytes(self) -> int:
        """The bytes of all of them."""
        return sum(self.sizes.values())


@dataclass(frozen=True)
class Components:
    """A model in memory, on its device and in its precision."""

    unet: UNetMotionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler_config: Mapping[str, Any]
    device: torch.device
    """The device of the forwards; with offload, the weights are in host memory until they are needed."""
    dtype: torch.dtype
    """Of the UNet."""
    vae_dtype: torch.dtype
    vae_tiling: Literal["auto", "on", "off"]
    memory_bytes: int | None
    """Most memory of the device to use; None: what is free."""
    compile_mode: CompileMode | None
    """torch.compile's mode for the UNet; None: it runs as it is."""
    compile_cache: Path | None
    """Folder in which compiled code is kept for the next process."""
    version: str
    """Name and revision or digest of the weights."""
    compiles_what_pays: bool = False
    """Whether only kinds of forward are compiled that pay for the rows that are left."""
    tf32: bool = False
    """Whether products of float32 matrices may be made in TF32; only on a GPU."""
    ip_adapter: IPAdapter | None = None
    """None: rows cannot have a picture for one."""
    scorer: Scorer | None = None
    """Measures the similarity of a video to its picture and prompt; None: the model has no scorer."""
    safety_checker: SafetyChecker | None = None
    """Finds videos that are not safe; None: the model has no checker, or nobody asks for its verdict."""
    upscaler: Upscaler | None = None
    """Enlarges finished frames; None: the model has none, and Lanczos does."""
    loras: Mapping[str, Lora] = field(default_factory=dict)
    """The LoRAs that rows may choose from, by name; none of them is merged into these parts."""
    inversions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Words of textual inversions: the ids of each one's vectors in the text encoder. The tokenizer has none."""
    variants: VariantMemory = field(default_factory=VariantMemory)
    """Of the model, which is the same object in its variants."""
    shared_tensors: tuple[SharedTensors, ...] = ()
    """Keeps the weights alive in the pool through which models share them."""

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent pixel: from the VAE's own blocks, 8 for Stable Diffusion 1.5."""
        return int(2 ** (len(self.vae.config["block_out_channels"]) - 1))

    @property
    def latent_channels(self) -> int:
        """Channels of a latent: 4 for Stable Diffusion 1.5."""
        return int(self.vae.config["latent_channels"])

    @property
    def latent_scale(self) -> float:
        """Factor between the VAE's latents and those of the UNet: 0.18215 for Stable Diffusion 1.5."""
        return float(self.vae.config["scaling_factor"])

    @property
    def max_frames(self) -> int:
        """Frames the motion modules have positions for."""
        return int(self.unet.config["motion_max_seq_length"])


CompileMode = Literal["default", "reduce-overhead", "max-autotune"]


@dataclass(frozen=True)
class IPAdapter:
    """The parts that turn a picture into tokens; the attention that reads the tokens is in the UNet."""

    projection: torch.nn.Module
    """Embeddings of pictures -> tokens as wide as the prompt's."""
    embed_width: int
    image_encoder: CLIPVisionModelWithProjection | None
    """None: rows have embeddings in place of pictures."""

    @property
    def reads_patches(self) -> bool:
        """Whether it reads a vector for each patch of the picture (plus, full), and not one for the whole picture."""
        return not isinstance(self.projection, ImageProjection)


def sharing_copy(module: _Module) -> _Module:
    """A copy of a module with the original's tensors; replacing some of them does not affect the original."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}
    return copy.deepcopy(module, shared)
