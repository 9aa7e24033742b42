"""The spatial transformers in the memory order of a channels-last picture: their 1x1 convolutions as matrix products.

diffusers makes the pictures contiguous before the last convolution, which with channels-last weights turns them back.
Here the positions of a picture are rows from the first projection to the last, without a copy between.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from pia_ray.pia.unet.linear_layers import product


class SpatialTransformer(Transformer2DModel):
    """diffusers' spatial transformer of Stable Diffusion 1.5 over the same parameters."""

    @staticmethod
    def suits(module: Any) -> bool:
        """Whether the module is of the kind that Stable Diffusion 1.5 has."""
        return (
            type(module) is Transformer2DModel
            and module.is_input_continuous
            and type(module.proj_in) is nn.Conv2d
            and type(module.proj_out) is nn.Conv2d
            and all(
                block.norm_type == "layer_norm"
                and block.pos_embed is None
                and block._chunk_size is None
                and block.attn2 is not None
                and not block.only_cross_attention
                for block in module.transformer_blocks
            )
        )

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: Any = None, *args: Any, **kwargs: Any) -> Any:
        """[N, C, h, w] -> a tuple of the same shape; anything but the states of the prompts runs as diffusers does."""
        return_dict = kwargs.pop("return_dict", True)
        if args or return_dict or any(value is not None for value in kwargs.values()):
            return super().forward(hidden_states, encoder_hidden_states, *args, **kwargs, return_dict=return_dict)
        num, channels, height, width = hidden_states.shape
        normed = self.norm(hidden_states).permute(0, 2, 3, 1).contiguous()  # a copy only of a picture in torch's order
        hidden = product(normed.view(num, height * width, channels), self.proj_in)
        for block in self.transformer_blocks:
            hidden = _block(block, hidden, encoder_hidden_states)
        made = product(hidden, self.proj_out).view(num, height, width, channels).permute(0, 3, 1, 2)
        return (_sum(made, hidden_states),)


def rewrite_transformers(unet: nn.Module) -> None:
    """Rewrites a UNet's spatial transformers of that kind."""
    for module in unet.modules():
        if SpatialTransformer.suits(module):
            module.__class__ = SpatialTransformer


def _block(block: BasicTransformerBlock, hidden: torch.Tensor, states: Any) -> torch.Tensor:
    hidden = _sum(_attend(block.attn1, block.norm1(hidden)), hidden)
    hidden = _sum(_attend(block.attn2, block.norm2(hidden), states), hidden)
    return _sum(block.ff(block.norm3(hidden)), hidden)


def _attend(attention: Attention, hidden: torch.Tensor, states: Any = None) -> torch.Tensor:
    if type(attention) is Attention:  # past its `forward`, which reads the signature of its processor in each call
        return attention.processor(attention, hidden, encoder_hidden_states=states)
    return attention(hidden, encoder_hidden_states=states)


def _sum(made: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """The sum, in the memory of `made` where nobody reads that again."""
    return made + before if torch.is_grad_enabled() else made.add_(before)
