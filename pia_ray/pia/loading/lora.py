"""LoRA files -> variants of a model with their weights merged in; what a LoRA does not touch stays one copy in memory.

Reads kohya's, diffusers' and AnimateDiff's names. The base model is never written to, so variants live side by side.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import torch

from pia_ray.errors import WeightsError
from pia_ray.pia.loading.checkpoint_tensors import read_header, read_tensors, sharing_copy

if TYPE_CHECKING:
    from pia_ray.pia.components import Components

Strengths = tuple[tuple[str, float], ...]
"""LoRAs of a model by name with the factor of each."""

_Side = Literal["unet", "text_encoder"]
_PAIR: Final = re.compile(r"(.+?)[._]lora(?:_linear_layer)?[._](down|up|A|B)(?:\.default(?:_\d+)?)?\.weight")
_ALPHA: Final = re.compile(r"(.+?)(?:[._]lora(?:_linear_layer)?)?\.alpha")
_PREFIXES: Final[Mapping[str, _Side]] = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "unet_": "unet",
    "text_encoder_": "text_encoder",
}
_ALIASES: Final = {
    "_processor": "",  # diffusers' older names
    "text_model_": "",  # a level of CLIPTextModel that transformers 5.6 dropped
    "self_attn_to_out": "self_attn_out_proj",
    "self_attn_to_q": "self_attn_q_proj",
    "self_attn_to_k": "self_attn_k_proj",
    "self_attn_to_v": "self_attn_v_proj",
    "temporal_transformer_": "",  # AnimateDiff's own names
    "attention_blocks_0": "attn1",
    "attention_blocks_1": "attn2",
}
_OTHER_KINDS: Final = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_mid": "LoCon with a third factor",
    "hada_w": "LoHa",
    "lokr_w": "LoKr",
}


@dataclass(frozen=True)
class Change:
    """What a LoRA adds to one weight: scale * up @ down."""

    side: _Side
    module: str
    down: torch.Tensor
    """[r, in] or [r, in, k, k]"""
    up: torch.Tensor
    """[out, r] or [out, r, 1, 1]"""
    scale: float
    """alpha / r."""

    def delta(self, weight: torch.Tensor) -> torch.Tensor:
        """float32, of the weight's shape and on its device. Source: LoRA, arXiv 2106.09685, equation 3."""
        up, down = (factor.to(weight.device, torch.float32).flatten(1) for factor in (self.up, self.down))
        return self.scale * (up @ down).reshape(weight.shape)


def variant(components: Components, loras: Strengths) -> Components:
    """The model with these LoRAs merged in: new weights where they act, the same tensors everywhere else.

    Raises:
        WeightsError: a LoRA is not one, or is not for this model.
    """
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for name, strength in loras:
        for change in read_lora(components.loras[name].path, components):
            deltas = sides.setdefault(change.side, {})
            weight = getattr(components, change.side).get_submodule(change.module).weight
            delta = strength * change.delta(weight)
            deltas[change.module] = deltas[change.module] + delta if change.module in deltas else delta
    parts: dict[str, Any] = {side: _merged(getattr(components, side), deltas) for side, deltas in sides.items()}
    return replace(components, **parts)


def read_lora(path: Path, components: Components) -> list[Change]:
    """What the file changes in this model, every key of it accounted for.

    Raises:
        WeightsError: it is no LoRA, of a kind that is not read, or made for another model.
    """
    tensors = read_tensors(path)
    for part, kind in _OTHER_KINDS.items():
        if any(part in key for key in tensors):
            raise WeightsError(f"{path} is {kind}, which is not read; plain LoRA is")
    factors, alphas, strange = _sort(tensors)
    if not factors:
        raise WeightsError(f"{path} is not a LoRA: it holds no pair of lora_down and lora_up, or lora_A and lora_B")
    modules = dict(_modules(components))
    config = read_header(path).get("lora_adapter_metadata")
    changes = []
    for place, pair in factors.items():
        module = modules.get(place)
        if module is None or set(pair) != {"down", "up"}:
            strange.append(pair["down" if "down" in pair else "up"][0])
            continue
        (key, down), (_, up) = pair["down"], pair["up"]
        weight = getattr(components, place[0]).get_submodule(module).weight
        _check_shapes(path, key, down, up, weight)
        changes.append(Change(place[0], module, down, up, _scale(down, place, module, alphas, config)))
    if strange:
        raise WeightsError(
            f"{path} was made for another model: {len(strange)} of its weights have no place in this one, such as "
            f"{strange[0]}. PIA takes LoRAs of Stable Diffusion 1.5, not of XL or 2."
        )
    return changes


def _sort(
    tensors: Mapping[str, torch.Tensor],
) -> tuple[dict[tuple[_Side, str], dict[str, tuple[str, torch.Tensor]]], dict[tuple[_Side, str], float], list[str]]:
    """Pairs of factors and alphas by place, and the keys that are neither."""
    factors: dict[tuple[_Side, str], dict[str, tuple[str, torch.Tensor]]] = {}
    alphas: dict[tuple[_Side, str], float] = {}
    strange = []
    for key, tensor in tensors.items():
        if (found := _PAIR.fullmatch(key)) is not None:
            factor = "down" if found[2] in ("down", "A") else "up"
            factors.setdefault(_place(found[1]), {})[factor] = (key, tensor)
        elif (found := _ALPHA.fullmatch(key)) is not None and tensor.numel() == 1:
            alphas[_place(found[1])] = float(tensor)
        else:
            strange.append(key)
    return factors, alphas, strange


def _place(name: str) -> tuple[_Side, str]:
    """The side a name belongs to, and its flat form, in which all writers of LoRAs agree."""
    flat = name.replace(".", "_")
    side: _Side = "unet"
    for prefix, owner in _PREFIXES.items():
        if flat.startswith(prefix):
            flat, side = flat.removeprefix(prefix), owner
            break
    for alias, ours in _ALIASES.items():
        flat = flat.replace(alias, ours)
    return side, f"{flat}_0" if flat.endswith("_to_out") else flat


def _modules(components: Components) -> Iterator[tuple[tuple[_Side, str], str]]:
    sides: tuple[tuple[_Side, Any], ...] = (("unet", components.unet), ("text_encoder", components.text_encoder))
    for side, model in sides:
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                yield (side, name.replace(".", "_").replace("text_model_", "")), name


def _check_shapes(path: Path, key: str, down: torch.Tensor, up: torch.Tensor, weight: torch.Tensor) -> None:
    fits = down.ndim in (2, 4) and up.ndim in (2, 4) and up.shape[1] == down.shape[0] == up[0].numel()
    if not fits or up.shape[0] != weight.shape[0] or down[0].numel() != weight[0].numel():
        raise WeightsError(
            f"{path} was made for another model: {key} is {list(down.shape)} with {list(up.shape)}, for a weight of "
            f"{list(weight.shape)}. PIA takes LoRAs of Stable Diffusion 1.5, not of XL or 2."
        )


def _scale(
    down: torch.Tensor, place: tuple[_Side, str], module: str, alphas: Mapping[tuple[_Side, str], float], config: object
) -> float:
    """alpha / r: kohya keeps an alpha beside each pair, peft writes its config into the header; else alpha is r."""
    rank = down.shape[0]
    if place in alphas:
        return alphas[place] / rank
    settings = config if isinstance(config, Mapping) else {}
    alpha = settings.get(f"{place[0]}.lora_alpha", rank)
    for pattern, value in (settings.get(f"{place[0]}.alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = value
            break
    return float(alpha) / (rank**0.5 if settings.get(f"{place[0]}.use_rslora") else rank)


def _merged(model: torch.nn.Module, deltas: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    own = sharing_copy(model)
    for name, delta in deltas.items():
        module = own.get_submodule(name)
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        merged = torch.empty_like(weight).copy_(weight.float() + delta)  # keeps precision and memory layout
        module.weight = torch.nn.Parameter(merged, requires_grad=False)
    return own
