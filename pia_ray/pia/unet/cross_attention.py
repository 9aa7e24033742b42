"""Cross-attention with keys and values once per prompt: not for every frame, and not again at every step.

diffusers repeats the prompt for each frame and projects it again in each forward. Here the frames of a video are
further queries of one attention, and the projections of a prompt, or of an IP-Adapter's picture, are cached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import torch
from cachetools import LRUCache
from diffusers import UNetMotionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch.nn import functional as F

from pia_ray.pia.evaluation import Branch, ImageTokens
from pia_ray.pia.unet.attention_kernels import AttentionWays
from pia_ray.pia.unet.image_attention import ImageCrossAttention

CACHED_PROJECTIONS: Final = 64
"""Prompts, and pictures, whose keys and values are cached, the most recently used ones: some 4 MB for 77 tokens in
Stable Diffusion 1.5 at float16."""

CACHED_TOKENS: Final = CACHED_PROJECTIONS * 4 * 77
"""Their tokens in all, 1 GB: prompts of 10,000 characters, which have more than 100 times 77, would fill a GPU."""

Layers = tuple[torch.Tensor, ...]
"""One tensor for each cross-attention, in the order of the UNet's modules."""


class Projections(NamedTuple):
    """The keys and values of one prompt or picture, each [heads, L, d]."""

    keys: Layers
    values: Layers
    source: object
    """The prompt or picture. Caches are keyed by its id, which no other object can get while this refers to it."""


class CrossStates(NamedTuple):
    """The keys and values of all cross-attentions of one forward, passed in place of the prompts' embeddings."""

    keys: Layers
    """Each [N, heads, L, d]."""
    values: Layers
    image_keys: Layers | None
    """Each [N, heads, K, d], of pictures; None where no entry has one."""
    image_values: Layers | None
    image_scales: torch.Tensor | None
    """[N, 1, 1]; 0 for entries without a picture."""
    image_mask: torch.Tensor | None
    """[N, 1, 1, K], true where there is a token; None: everywhere."""


class CrossAttention:
    """The cross-attentions of one UNet, rewritten to take `CrossStates`."""

    def __init__(self, unet: UNetMotionModel, ways: AttentionWays | None = None) -> None:
        self._layers = _cross_attentions(unet)
        self._prompts: LRUCache[int, Projections] = LRUCache(CACHED_TOKENS, _share)
        self._images: LRUCache[int, Projections] = LRUCache(CACHED_TOKENS, _share)
        for index, attention in enumerate(self._layers):
            if not isinstance(attention.processor, PromptAttention):  # a UNet is rewritten once
                attention.set_processor(PromptAttention(index, _image_attention(attention), ways))

    @staticmethod
    def suits(unet: UNetMotionModel) -> bool:
        """Whether all cross-attentions of the UNet are of the kind that Stable Diffusion 1.5 has."""
        layers = _cross_attentions(unet)
        return bool(layers) and all(_is_plain(attention) for attention in layers)

    def states(self, branches: Sequence[Branch]) -> CrossStates:
        """The keys and values for the entries of one forward."""
        prompts = [self._of_prompt(branch.prompt) for branch in branches]
        keys, values = _stacked([each.keys for each in prompts]), _stacked([each.values for each in prompts])
        counts = {len(branch.image.tokens) for branch in branches if branch.image is not None}
        if not counts:
            return CrossStates(keys, values, None, None, None, None)
        first, most = branches[0].prompt, max(counts)
        images = [None if branch.image is None else self._of_image(branch.image) for branch in branches]
        image_keys = _padded([image and image.keys for image in images], like=keys, most=most)
        image_values = _padded([image and image.values for image in images], like=values, most=most)
        scales = torch.tensor([0.0 if branch.image is None else branch.image.scale for branch in branches])
        mask = None
        if len(counts) > 1:  # a mask costs the fastest kernels, so it is left out while all have equally many tokens
            lengths = [most if branch.image is None else len(branch.image.tokens) for branch in branches]
            mask = (torch.arange(most)[None] < torch.tensor(lengths)[:, None])[:, None, None]
            mask = mask.to(first.device, non_blocking=True)
        scales = scales.to(first.dtype)[:, None, None].to(first.device, non_blocking=True)
        return CrossStates(keys, values, image_keys, image_values, scales, mask)

    def _of_prompt(self, prompt: torch.Tensor) -> Projections:
        return self._known(self._prompts, prompt, lambda layer: (layer.to_k(prompt), layer.to_v(prompt)))

    def _of_image(self, image: ImageTokens) -> Projections:
        def project(attention: Attention) -> tuple[torch.Tensor, torch.Tensor]:
            adapter = attention.processor.image
            return adapter.to_k_ip(image.tokens), adapter.to_v_ip(image.tokens)

        return self._known(self._images, image, project)

    def _known(
        self,
        cache: LRUCache[int, Projections],
        source: object,
        project: Callable[[Attention], tuple[torch.Tensor, torch.Tensor]],
    ) -> Projections:
        """The projections in the cache, or new ones, which are kept there unless they alone are larger than it."""
        if (known := cache.get(id(source))) is not None:
            return known
        pairs = [
            tuple(states.unflatten(-1, (attention.heads, -1)).transpose(0, 1) for states in project(attention))
            for attention in self._layers
        ]
        made = Projections(tuple(keys for keys, _ in pairs), tuple(values for _, values in pairs), source)
        if _share(made) <= cache.maxsize:
            cache[id(source)] = made
        return made


class PromptAttention(torch.nn.Module):
    """The processor of one cross-attention: reads its layer of `CrossStates`, or embeddings as diffusers gives them."""

    def __init__(self, index: int, image: ImageCrossAttention | None, ways: AttentionWays | None = None) -> None:
        super().__init__()
        self._index = index
        self._attend = F.scaled_dot_product_attention if ways is None else ways.attend
        self.image = image
        self._plain = AttnProcessor2_0()

    def forward(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[N*T, S, C] -> the same shape."""
        if not isinstance(encoder_hidden_states, CrossStates):
            processor = self.image if self.image is not None else self._plain
            return processor(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        states, index = encoder_hidden_states, self._index
        rows, positions, _ = hidden_states.shape
        num = states.keys[index].shape[0]
        query = attn.to_q(hidden_states).view(num, rows // num * positions, attn.heads, -1).transpose(1, 2)
        mixed = _joined(self._attend(query, states.keys[index], states.values[index]))
        if states.image_keys is not None and states.image_values is not None and states.image_scales is not None:
            image = F.scaled_dot_product_attention(
                query, states.image_keys[index], states.image_values[index], attn_mask=states.image_mask
            )
            mixed = mixed + states.image_scales * _joined(image)
        return attn.to_out[0](mixed.reshape(rows, positions, -1))


def _share(projections: Projections) -> int:
    """What the projections count in a cache: their tokens, and so many that no more than `CACHED_PROJECTIONS` fit."""
    return max(projections.keys[0].shape[1], CACHED_TOKENS // CACHED_PROJECTIONS)


def _cross_attentions(unet: UNetMotionModel) -> list[Attention]:
    return [
        module
        for name, module in unet.named_modules()
        if isinstance(module, Attention) and name.endswith("attn2") and "motion_modules" not in name
    ]


def _is_plain(attention: Attention) -> bool:
    return (
        attention.is_cross_attention
        and attention.spatial_norm is None
        and attention.group_norm is None
        and not attention.norm_cross
        and attention.norm_q is None
        and attention.norm_k is None
        and not attention.residual_connection
        and attention.rescale_output_factor == 1
        and isinstance(attention.processor, AttnProcessor2_0 | ImageCrossAttention | PromptAttention)
    )


def _image_attention(attention: Attention) -> ImageCrossAttention | None:
    processor = attention.processor
    return processor if isinstance(processor, ImageCrossAttention) else None


def _stacked(layers: Sequence[Layers]) -> Layers:
    return tuple(torch.stack(of_one_layer) for of_one_layer in zip(*layers, strict=True))


def _padded(images: Sequence[Layers | None], *, like: Layers, most: int) -> Layers:
    """For each layer [N, heads, most, d]: zeros after an entry's tokens, and zeros alone for an entry without a
    picture."""

    def of_entry(image: Layers | None, layer: int) -> torch.Tensor:
        if image is None:
            return like[layer].new_zeros(like[layer].shape[1], most, like[layer].shape[3])
        return F.pad(image[layer], (0, 0, 0, most - image[layer].shape[1]))

    return tuple(torch.stack([of_entry(image, layer) for image in images]) for layer in range(len(like)))


def _joined(states: torch.Tensor) -> torch.Tensor:
    return states.transpose(1, 2).flatten(2)
