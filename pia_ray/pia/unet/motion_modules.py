"""The motion modules in the memory order of the frames: attention over time on views, without a transpose or a copy.

diffusers turns [N*T, C, h, w] into [N*h*w, T, C] and back around every motion module. Only the core of its attention
mixes frames; norms, projections and feed-forward take each position alone and do not mind the order.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from torch.nn import functional as F

from pia_ray.pia.device.placement import SDPA_ROWS
from pia_ray.pia.unet.attention_kernels import AttentionWays
from pia_ray.pia.unet.group_norms import ChosenGroupNorm


class TemporalTransformer(AnimateDiffTransformer3D):
    """diffusers' motion module over the same parameters, in the order [N, T, h*w, C]."""

    kernels: AttentionWays | None = None
    """The kernel of each shape; None: torch's choice."""

    @staticmethod
    def suits(module: Any) -> bool:
        """Whether the module is of the kind that PIA's adapters have."""
        return type(module) is AnimateDiffTransformer3D and all(
            block.norm_type == "layer_norm"
            and block._chunk_size is None
            and not block.only_cross_attention
            and all(_plain(attention) for attention in (block.attn1, block.attn2) if attention is not None)
            for block in module.transformer_blocks
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        num_frames: int = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """[N*T, C, h, w] -> the same shape."""
        rows, channels, height, width = hidden_states.shape
        num = rows // num_frames
        if type(self.norm) in (torch.nn.GroupNorm, ChosenGroupNorm):
            # Stacked vertically, the frames of a video are one tall picture, whose GroupNorm is the video's.
            tall = hidden_states.permute(0, 2, 3, 1).reshape(num, num_frames * height, width, channels)
            hidden = self.norm(tall.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # [N, T*h, w, C]
        else:
            videos = hidden_states.unflatten(0, (num, num_frames)).transpose(1, 2)
            hidden = self.norm(videos).permute(0, 2, 3, 4, 1)  # [N, T, h, w, C]
        hidden = self.proj_in(hidden.reshape(num, num_frames, height * width, channels))
        for block in self.transformer_blocks:
            hidden = _block(block, hidden, self.kernels)
        hidden = self.proj_out(hidden).reshape(rows, height, width, channels)
        return hidden.permute(0, 3, 1, 2) + hidden_states


def time_kernels(unet: torch.nn.Module, kernels: AttentionWays) -> None:
    """Lets a UNet's rewritten motion modules run by these kernels."""
    for module in unet.modules():
        if isinstance(module, TemporalTransformer):
            module.kernels = kernels


def attend_over_time(
    attention: Attention, hidden: torch.Tensor, *, most_heads: int | None = None, kernels: AttentionWays | None = None
) -> torch.Tensor:
    """Attention of each position over the frames. [N, T, S, C] -> [N, T, S, C].

    Positions and heads are merged into one dimension, which in this order is a view. `most_heads` splits that dimension
    into several calls; None: only where the device needs it.
    """
    num, num_frames, positions, _ = hidden.shape
    heads = attention.heads
    most = most_heads or (SDPA_ROWS if hidden.is_cuda else positions * heads)

    def view(values: torch.Tensor) -> torch.Tensor:
        return values.view(num, num_frames, positions * heads, -1).transpose(1, 2)  # [N, S*H, T, d]

    attend = F.scaled_dot_product_attention if kernels is None else kernels.attend
    query, key, value = (view(project(hidden)) for project in (attention.to_q, attention.to_k, attention.to_v))
    if positions * heads <= most:
        mixed = attend(query, key, value)
    else:
        parts = zip(query.split(most, 1), key.split(most, 1), value.split(most, 1), strict=True)
        mixed = torch.cat([attend(*part) for part in parts], dim=1)
    return attention.to_out[0](mixed.transpose(1, 2).reshape(num, num_frames, positions, -1))


def most_positions(unet: torch.nn.Module, device: torch.device) -> int | None:
    """The most latent pixels of a frame, over all evaluations of a forward, that the motion modules take; None: any.

    diffusers' modules make each of them a batch entry of one attention, whose number the device bounds; the rewritten
    modules split the attention.
    """
    if device.type != "cuda":
        return None
    own = any(type(module) is AnimateDiffTransformer3D for module in unet.modules())
    return SDPA_ROWS if own else None


def _block(block: BasicTransformerBlock, hidden: torch.Tensor, kernels: AttentionWays | None) -> torch.Tensor:
    num_frames = hidden.shape[1]
    for norm, attention in ((block.norm1, block.attn1), (block.norm2, block.attn2)):
        if attention is None:
            continue
        normed = norm(hidden)
        if block.pos_embed is not None:
            normed = normed + block.pos_embed.pe[:, :num_frames, None]  # [1, T, 1, C]
        hidden = attend_over_time(attention, normed, kernels=kernels) + hidden
    return block.ff(block.norm3(hidden)) + hidden


def _plain(attention: Attention) -> bool:
    return (
        attention.spatial_norm is None
        and attention.group_norm is None
        and attention.norm_q is None
        and attention.norm_k is None
        and not attention.residual_connection
        and attention.rescale_output_factor == 1
        and attention.scale_qk
    )
