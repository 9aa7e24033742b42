"""The differences to a weight that the kinds of LoRA say: LoRA and LoCon, Tucker, LoHa, LoKr, full, each with DoRA.

Source: LoRA, arXiv 2106.09685; LyCORIS, arXiv 2309.14859; DoRA, arXiv 2402.09353.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pia_ray.pia.components import Part
from pia_ray.pia.transfers import to_device


@dataclass(frozen=True)
class WeightDelta:
    """A LoRA's difference to one module's weight or bias."""

    part: Part
    module: str
    parameter: str
    """`weight` or `bias`."""
    factors: Mapping[str, torch.Tensor]
    """By role: down and up, hada_w1_a, lokr_w1, diff, ..."""
    alpha: float
    """The scale is alpha / rank."""

    def delta(self, weight: torch.Tensor) -> torch.Tensor:
        """float32, of the weight's shape and on its device; RuntimeError where the shapes do not fit.

        A difference for the first 4 of conv_in's 9 channels leaves the others.
        """
        factors = {role: to_device(factor, weight.device).float() for role, factor in self.factors.items()}
        change, whole = self._change(factors), weight.float()
        is_plain_input = self.module == "conv_in" and change.numel() == whole[:, :4].numel() < whole.numel()
        own = whole[:, :4] if is_plain_input else whole
        change = change.reshape(own.shape)
        if (size := factors.get("dora_scale", factors.get("magnitude_vector"))) is not None:
            change = _decomposed(own + change, size, on_input=_is_on_input("dora_scale" in factors, size, own)) - own
        if own is whole:
            return change
        padded = torch.zeros_like(whole)
        padded[:, :4] = change
        return padded

    def _change(self, factors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if (difference := _first(factors, "diff", "diff_b", "w_norm", "b_norm")) is not None:
            return difference
        if _first(factors, "lokr_w1", "lokr_w1_a") is not None:
            first, second = (
                (
                    factors[f"lokr_w{index}"]
                    if f"lokr_w{index}" in factors
                    else _product(factors, f"lokr_w{index}", f"lokr_t{index}")
                ).flatten(1)
                for index in (1, 2)
            )
            has_rank = _first(factors, "lokr_w2_b", "lokr_w1_b") is not None
            return torch.kron(first, second) * (self.alpha / rank_of(factors) if has_rank else 1.0)
        if "hada_w1_a" in factors:
            first, second = (_product(factors, f"hada_w{index}", f"hada_t{index}") for index in (1, 2))
            return first * second * (self.alpha / rank_of(factors))
        up, down = factors["up"].flatten(1), factors["down"]
        if (mid := factors.get("mid")) is not None:
            return self.alpha / len(down) * torch.einsum("op,pqkl,qi->oikl", up, mid, down.flatten(1))
        return self.alpha / len(down) * (up @ down.flatten(1))


def rank_of(factors: Mapping[str, torch.Tensor]) -> int:
    """The rank, which is the alpha of files that state none."""
    found = _first(factors, "down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
    return 1 if found is None else len(found)


def is_complete(factors: Mapping[str, torch.Tensor]) -> bool:
    """Whether the roles of one module make a kind of LoRA."""
    roles = set(factors)
    pairs = [{"down", "up"}, {f"hada_w{index}_{side}" for index in (1, 2) for side in "ab"}]
    lokr = all(f"lokr_w{index}" in roles or {f"lokr_w{index}_a", f"lokr_w{index}_b"} <= roles for index in (1, 2))
    return lokr or any(pair <= roles for pair in pairs) or bool(roles & {"diff", "w_norm", "diff_b", "b_norm"})


def _first(factors: Mapping[str, torch.Tensor], *roles: str) -> torch.Tensor | None:
    return next((factors[role] for role in roles if role in factors), None)


def _product(factors: Mapping[str, torch.Tensor], name: str, core: str) -> torch.Tensor:
    left, right = factors[f"{name}_a"], factors[f"{name}_b"]
    if core in factors:
        return torch.einsum("ijkl,jr,ip->prkl", factors[core], right, left)
    return left @ right.flatten(1)


def _is_on_input(is_lycoris: bool, size: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether DoRA's magnitudes are those of the input's channels, as LyCORIS also writes them."""
    return is_lycoris and size.ndim > 1 and size.shape[0] == 1 and size.numel() == weight.shape[1]


def _decomposed(weight: torch.Tensor, size: torch.Tensor, *, on_input: bool) -> torch.Tensor:
    """The weight with these magnitudes of its columns or rows."""
    axis = 1 if on_input else 0
    others = [each for each in range(weight.ndim) if each != axis]
    shape = [-1 if each == axis else 1 for each in range(weight.ndim)]
    norm = torch.linalg.vector_norm(weight, dim=others, keepdim=True)
    return weight * (size.reshape(shape) / (norm + torch.finfo(norm.dtype).eps))
