"""Attention on a CPU as products of whole matrices, where they are faster than torch's kernel for a CPU.

That kernel works through one sequence at a time, and is made for long ones of many channels. Over 16 frames of 16 x 16
positions with 4 heads of 8 channels it takes 2.0 ms on one core of an AMD EPYC, products take 0.9; over 256 positions
with such heads, 16 frames and both sides of guidance, 11.2 and 8.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch.nn import functional as F

from pia_ray.pia.unet.choices import DEFAULT, Choices, Way, size_class, timed_share

LEAST_SCORES: Final = 100_000
"""Attentions with fewer scores (queries x keys) in all run by torch's kernel: there is nothing to gain."""

MOST_BYTES: Final = 2 * 2**20
"""Bytes of the scores that exist at a time. Attentions with more of them for one head run by torch's kernel."""

KEYS_LAST: Final = "scores by query"
QUERIES_LAST: Final = "scores by key"


class Products:
    """Attention by the fastest way for its sizes."""

    def __init__(self, choices: Choices) -> None:
        self._choices = choices

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention of queries [N, heads, S, d] to keys and values [N, heads, L, d]: [N, heads, S, d]."""
        num, heads, positions, channels = query.shape
        scores = positions * key.shape[2]
        unsuited = num * heads * scores < LEAST_SCORES or scores * query.element_size() > MOST_BYTES
        elsewhere = query.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_dynamo_compiling()
        if unsuited or elsewhere:
            return F.scaled_dot_product_attention(query, key, value)
        sizes = size_class(num), size_class(heads), positions, key.shape[2], channels
        way = self._choices.choose(("attention", *sizes, query.dtype), lambda: _ways(query, key, value))
        if way == DEFAULT:
            return F.scaled_dot_product_attention(query, key, value)
        return _by_products(query, key, value, way)


def _ways(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Mapping[str, Way]:
    flop = 4 * query.numel() * key.shape[2]
    num = max(1, int(len(query) * timed_share(flop)))
    q, k, v = query[:num], key[:num], value[:num]
    return {
        DEFAULT: lambda: F.scaled_dot_product_attention(q, k, v),
        KEYS_LAST: lambda: _by_products(q, k, v, KEYS_LAST),
        QUERIES_LAST: lambda: _by_products(q, k, v, QUERIES_LAST),
    }


def _by_products(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, way: str) -> torch.Tensor:
    """Attention for some heads at a time, whose scores fit in a processor's cache."""
    num, heads, positions, channels = query.shape
    most = max(1, MOST_BYTES // (positions * key.shape[2] * query.element_size()))
    if heads > num:  # as over time, where a copy would take pieces of a few channels from all over the memory
        parts = list(zip(query, key, value, strict=True))
    else:
        parts = [(query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1))]
    mixed = query.new_empty(num * heads, channels, positions)
    attend = _by_query if way == KEYS_LAST else _by_key
    start = 0
    for q, k, v in parts:
        for few in zip(q.split(most), k.split(most), v.split(most), strict=True):
            end = start + len(few[0])
            attend(*few, out=mixed[start:end])
            start = end
    return mixed.view(num, heads, channels, positions).transpose(2, 3)


def _by_query(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, out: torch.Tensor) -> None:
    """Writes [heads, d, S], by scores [heads, S, L]."""
    scores = _scaled_product(query, key)
    torch.softmax(scores, 2, out=scores)
    # The few channels come first: as the columns of a product they take three times as long.
    torch.bmm(value.transpose(1, 2), scores.transpose(1, 2), out=out)


def _by_key(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, out: torch.Tensor) -> None:
    """Writes [heads, d, S], by scores [heads, L, S]: with few keys a softmax over the first of both is faster."""
    scores = _scaled_product(key, query)
    torch.softmax(scores, 1, out=scores)
    torch.bmm(value.transpose(1, 2), scores, out=out)


def _scaled_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left x right transposed, by the root of the channels: [heads, A, d] and [heads, B, d] -> [heads, A, B]."""
    nothing = left.new_empty(1, 1, 1)
    return torch.baddbmm(nothing, left, right.transpose(1, 2), beta=0, alpha=left.shape[2] ** -0.5)
