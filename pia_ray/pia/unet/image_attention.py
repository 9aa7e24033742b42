"""Cross-attention over the tokens of an IP-Adapter's picture, in addition to the prompt's. Source: arXiv 2308.06721."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0

from pia_ray.pia.evaluation import Branch
from pia_ray.pia.transfers import to_device


def cross_attention_states(text: torch.Tensor, branches: Sequence[Branch]) -> Any:
    """The input of the UNet's cross-attention in one forward: `text` [N x T, L, C], and the tokens of its N branches.

    It is `text` alone where no branch has a picture. In a forward with pictures, branches without one get zeros at
    scale 0, which add nothing, to the last bit.
    """
    counts = {len(branch.image.tokens) for branch in branches if branch.image is not None}
    if not counts:
        return text
    most = max(counts)
    tokens = text.new_zeros(len(branches), most, text.shape[-1])
    scales = text.new_zeros(len(branches), 1, 1)
    unread = torch.zeros(len(branches), most, dtype=torch.bool)
    for index, branch in enumerate(branches):
        if branch.image is not None:
            num = len(branch.image.tokens)
            tokens[index, :num] = branch.image.tokens
            scales[index] = branch.image.scale
            unread[index, num:] = True
    # A mask costs the fastest kernels, so it is left out while all pictures have equally many tokens.
    mask = to_device(~unread, text.device) if len(counts) > 1 else None
    return text, tokens, scales, mask


class ImageCrossAttention(torch.nn.Module):
    """Cross-attention to the prompt and, apart from it, to the tokens of each row's picture."""

    def __init__(self, to_k_ip: torch.Tensor, to_v_ip: torch.Tensor) -> None:
        super().__init__()
        self.to_k_ip = _linear(to_k_ip)
        self.to_v_ip = _linear(to_v_ip)
        self._text_alone = AttnProcessor2_0()

    def forward(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As diffusers calls its attention processors; `encoder_hidden_states` is from `cross_attention_states`."""
        if isinstance(encoder_hidden_states, torch.Tensor):
            return self._text_alone(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        text, tokens, scales, mask = encoder_hidden_states
        frames = len(hidden_states) // len(tokens)
        query = _heads(attn.to_q(hidden_states), attn.heads)  # [N x T, heads, h x w, C / heads]
        out = F.scaled_dot_product_attention(
            query, _heads(attn.to_k(text), attn.heads), _heads(attn.to_v(text), attn.heads)
        )
        key = _heads(self.to_k_ip(tokens), attn.heads).repeat_interleave(frames, 0)  # [N x T, heads, K, C / heads]
        value = _heads(self.to_v_ip(tokens), attn.heads).repeat_interleave(frames, 0)
        read = None if mask is None else mask.repeat_interleave(frames, 0)[:, None, None]
        image = F.scaled_dot_product_attention(query, key, value, attn_mask=read)
        hidden = _joined(out) + scales.repeat_interleave(frames, 0) * _joined(image)
        return attn.to_out[1](attn.to_out[0](hidden))


def _heads(states: torch.Tensor, heads: int) -> torch.Tensor:
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)


def _joined(states: torch.Tensor) -> torch.Tensor:
    return states.transpose(1, 2).flatten(2)


def _linear(weight: torch.Tensor) -> torch.nn.Linear:
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer
