"""Cross-attention with keys and values once per prompt: not for every frame, and not again at every step.

diffusers repeats the prompt for each frame and projects it again in each forward. Here the frames of a video are
further queries of one attention, and the projections of a prompt, or of an IP-Adapter's picture, are cached.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import torch
from diffusers import UNetMotionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch.nn import functional as F

from pia_ray.pia.evaluation import Branch, ImageTokens
from pia_ray.pia.unet.image_attention import ImageCrossAttention

CACHED_PROJECTIONS: Final = 64
"""Prompts, and pictures, whose keys and values are cached, the most recently used ones: some 4 MB each in Stable
Diffusion 1.5 at float16."""

Layers = tuple[torch.Tensor, ...]
"""One tensor for each cross-attention, in the order of the UNet's modules."""


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

    def __init__(self, unet: UNetMotionModel) -> None:
        self._layers = _cross_attentions(unet)
        self._prompts: OrderedDict[int, tuple[torch.Tensor, Layers, Layers]] = OrderedDict()
        self._images: OrderedDict[int, tuple[ImageTokens, Layers, Layers]] = OrderedDict()
        for index, attention in enumerate(self._layers):
            if not isinstance(attention.processor, PromptAttention):  # a UNet is rewritten once
                attention.set_processor(PromptAttention(index, _image_attention(attention)))

    @staticmethod
    def suits(unet: UNetMotionModel) -> bool:
        """Whether all cross-attentions of the UNet are of the kind that Stable Diffusion 1.5 has."""
        layers = _cross_attentions(unet)
        return bool(layers) and all(_is_plain(attention) for attention in layers)

    def states(self, branches: Sequence[Branch]) -> CrossStates:
        """The keys and values for the entries of one forward."""
        projected = [self._of_prompt(branch.prompt) for branch in branches]
        keys, values = (_stacked([pair[which] for pair in projected]) for which in (0, 1))
        counts = {len(branch.image.tokens) for branch in branches if branch.image is not None}
        if not counts:
            return CrossStates(keys, values, None, None, None, None)
        first, most = branches[0].prompt, max(counts)
        images = [None if branch.image is None else self._of_image(branch.image) for branch in branches]
        image_keys, image_values = (
            tuple(
                torch.stack(
                    [_padded(None if image is None else image[side][layer], like=text, most=most) for image in images]
                )
                for layer, text in enumerate(keys)
            )
            for side in (0, 1)
        )
        scales = torch.tensor([0.0 if branch.image is None else branch.image.scale for branch in branches])
        mask = None
        if len(counts) > 1:  # a mask costs the fastest kernels, so it is left out while all have equally many tokens
            lengths = [most if branch.image is None else len(branch.image.tokens) for branch in branches]
            mask = (torch.arange(most)[None] < torch.tensor(lengths)[:, None])[:, None, None]
            mask = mask.to(first.device, non_blocking=True)
        scales = scales.to(first.dtype)[:, None, None].to(first.device, non_blocking=True)
        return CrossStates(keys, values, image_keys, image_values, scales, mask)

    def _of_prompt(self, prompt: torch.Tensor) -> tuple[Layers, Layers]:
        def project(attention: Attention) -> tuple[torch.Tensor, torch.Tensor]:
            return attention.to_k(prompt), attention.to_v(prompt)

        return self._recall(self._prompts, prompt, project)

    def _of_image(self, image: ImageTokens) -> tuple[Layers, Layers]:
        def project(attention: Attention) -> tuple[torch.Tensor, torch.Tensor]:
            reader = attention.processor.image
            return reader.to_k_ip(image.tokens), reader.to_v_ip(image.tokens)

        return self._recall(self._images, image, project)

    def _recall(
        self,
        known: OrderedDict[int, Any],
        source: Any,
        project: Callable[[Attention], tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[Layers, Layers]:
        # By identity; the cache refers to the source, so that no other tensor can get its id.
        key = id(source)
        if key not in known:
            both = [
                tuple(side.unflatten(-1, (attention.heads, -1)).transpose(0, 1) for side in project(attention))
                for attention in self._layers
            ]
            known[key] = (source, tuple(keys for keys, _ in both), tuple(values for _, values in both))
        known.move_to_end(key)
        while len(known) > CACHED_PROJECTIONS:
            known.popitem(last=False)
        return known[key][1:]


class PromptAttention(torch.nn.Module):
    """The processor of one cross-attention: reads its layer of `CrossStates`, or embeddings as diffusers gives them."""

    def __init__(self, index: int, image: ImageCrossAttention | None) -> None:
        super().__init__()
        self._index = index
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
        mixed = _joined(F.scaled_dot_product_attention(query, states.keys[index], states.values[index]))
        if states.image_keys is not None and states.image_values is not None and states.image_scales is not None:
            image = F.scaled_dot_product_attention(
                query, states.image_keys[index], states.image_values[index], attn_mask=states.image_mask
            )
            mixed = mixed + states.image_scales * _joined(image)
        return attn.to_out[0](mixed.view(rows, positions, -1))


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


def _padded(tokens: torch.Tensor | None, *, like: torch.Tensor, most: int) -> torch.Tensor:
    """[heads, K, d] with zeros up to `most` tokens; all zeros for an entry without a picture."""
    if tokens is None:
        return like.new_zeros(like.shape[1], most, like.shape[3])
    return F.pad(tokens, (0, 0, 0, most - tokens.shape[1]))


def _joined(states: torch.Tensor) -> torch.Tensor:
    return states.transpose(1, 2).flatten(2)
