"""LoRA files -> variants of a model with their weights merged in; weights that no LoRA changes stay one copy in memory.

Reads kohya's, diffusers' and AnimateDiff's names. The base model is never written to, so several variants can coexist.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import torch

from pia_ray.errors import WeightsError
from pia_ray.pia.components import Components
from pia_ray.pia.loading.checkpoint_tensors import read_header, read_tensors, sharing_copy

Strengths = tuple[tuple[str, float], ...]
"""LoRAs of a model by name with the factor of each."""

_Part = Literal["unet", "text_encoder"]
_Target = tuple[_Part, str]
"""A module: its part and its flat name."""

_PAIR: Final = re.compile(r"(.+?)[._]lora(?:_linear_layer)?[._](down|up|A|B)(?:\.default(?:_\d+)?)?\.weight")
_ALPHA: Final = re.compile(r"(.+?)(?:[._]lora(?:_linear_layer)?)?\.alpha")
_PREFIXES: Final[Mapping[str, _Part]] = {
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
class WeightDelta:
    """A LoRA's addition to one weight: scale * up @ down."""

    part: _Part
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
    """The model with these LoRAs merged in: new weights where a LoRA acts, the same tensors everywhere else.

    Raises:
        WeightsError: a file is not a LoRA, or not for this model.
    """
    deltas: dict[_Part, dict[str, torch.Tensor]] = {}
    for name, strength in loras:
        for found in read_lora(components.loras[name].path, components):
            of_part = deltas.setdefault(found.part, {})
            weight = getattr(components, found.part).get_submodule(found.module).weight
            delta = strength * found.delta(weight)
            of_part[found.module] = of_part[found.module] + delta if found.module in of_part else delta
    parts: dict[str, Any] = {part: _merged(getattr(components, part), changes) for part, changes in deltas.items()}
    return replace(components, **parts)


def read_lora(path: Path, components: Components) -> list[WeightDelta]:
    """The file's additions to this model's weights. Every key of the file is read, or the file is refused.

    Raises:
        WeightsError: the file is not a LoRA, of a kind that is not read, or made for another model.
    """
    tensors = read_tensors(path)
    for part, kind in _OTHER_KINDS.items():
        if any(part in key for key in tensors):
            raise WeightsError(f"{path} is {kind}, which is not supported; plain LoRA is")
    factors, alphas, unknown = _sort(tensors)
    if not factors:
        raise WeightsError(f"{path} is not a LoRA: it holds no pair of lora_down and lora_up, or lora_A and lora_B")
    modules = dict(_modules(components))
    config = read_header(path).get("lora_adapter_metadata")
    found = []
    for target, pair in factors.items():
        module = modules.get(target)
        if module is None or set(pair) != {"down", "up"}:
            unknown.append(pair["down" if "down" in pair else "up"][0])
            continue
        (key, down), (_, up) = pair["down"], pair["up"]
        weight = getattr(components, target[0]).get_submodule(module).weight
        _check_shapes(path, key, down, up, weight)
        found.append(WeightDelta(target[0], module, down, up, _scale(down, target, module, alphas, config)))
    if unknown:
        raise WeightsError(
            f"{path} was made for another model: {len(unknown)} of its weights have no place in this one, such as "
            f"{unknown[0]}. PIA takes LoRAs of Stable Diffusion 1.5, not of XL or 2."
        )
    return found


def _sort(
    tensors: Mapping[str, torch.Tensor],
) -> tuple[dict[_Target, dict[str, tuple[str, torch.Tensor]]], dict[_Target, float], list[str]]:
    """Pairs of factors and alphas, both by target, and the other keys."""
    factors: dict[_Target, dict[str, tuple[str, torch.Tensor]]] = {}
    alphas: dict[_Target, float] = {}
    unknown = []
    for key, tensor in tensors.items():
        if (found := _PAIR.fullmatch(key)) is not None:
            factor = "down" if found[2] in ("down", "A") else "up"
            factors.setdefault(_target_of(found[1]), {})[factor] = (key, tensor)
        elif (found := _ALPHA.fullmatch(key)) is not None and tensor.numel() == 1:
            alphas[_target_of(found[1])] = float(tensor)
        else:
            unknown.append(key)
    return factors, alphas, unknown


def _target_of(name: str) -> _Target:
    """The part a name belongs to, and its flat form, in which all writers of LoRAs agree."""
    flat = name.replace(".", "_")
    part: _Part = "unet"
    for prefix, owner in _PREFIXES.items():
        if flat.startswith(prefix):
            flat, part = flat.removeprefix(prefix), owner
            break
    for alias, ours in _ALIASES.items():
        flat = flat.replace(alias, ours)
    return part, f"{flat}_0" if flat.endswith("_to_out") else flat


def _modules(components: Components) -> Iterator[tuple[_Target, str]]:
    parts: tuple[tuple[_Part, Any], ...] = (("unet", components.unet), ("text_encoder", components.text_encoder))
    for part, model in parts:
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                yield (part, name.replace(".", "_").replace("text_model_", "")), name


def _check_shapes(path: Path, key: str, down: torch.Tensor, up: torch.Tensor, weight: torch.Tensor) -> None:
    fits = down.ndim in (2, 4) and up.ndim in (2, 4) and up.shape[1] == down.shape[0] == up[0].numel()
    if not fits or up.shape[0] != weight.shape[0] or down[0].numel() != weight[0].numel():
        raise WeightsError(
            f"{path} was made for another model: {key} is {list(down.shape)} with {list(up.shape)}, for a weight of "
            f"{list(weight.shape)}. PIA takes LoRAs of Stable Diffusion 1.5, not of XL or 2."
        )


def _scale(
    down: torch.Tensor,
    target: _Target,
    module: str,
    alphas: Mapping[_Target, float],
    config: object,
) -> float:
    """alpha / r: kohya stores an alpha with each pair, peft writes its config into the header; else alpha is r."""
    rank = down.shape[0]
    if target in alphas:
        return alphas[target] / rank
    settings = config if isinstance(config, Mapping) else {}
    alpha = settings.get(f"{target[0]}.lora_alpha", rank)
    for pattern, value in (settings.get(f"{target[0]}.alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = value
            break
    return float(alpha) / (rank**0.5 if settings.get(f"{target[0]}.use_rslora") else rank)


def _merged(model: torch.nn.Module, deltas: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    own = sharing_copy(model)
    for name, delta in deltas.items():
        module = own.get_submodule(name)
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        merged = torch.empty_like(weight).copy_(weight.float() + delta)  # keeps precision and memory layout
        module.weight = torch.nn.Parameter(merged, requires_grad=False)
    return own
