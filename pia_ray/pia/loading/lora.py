"""LoRA files -> variants of a model with their weights merged in; weights that no LoRA changes stay one copy in memory.

The base model is never written to, so several variants can coexist. `lora_names` reads names, `lora_kinds` the kinds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from pia_ray.errors import WeightsError
from pia_ray.pia.components import Changeable, Components, Part, Place, sharing_copy
from pia_ray.pia.loading.checkpoint_tensors import is_finite, read_header, read_tensors
from pia_ray.pia.loading.lora_kinds import WeightDelta, is_complete, rank_of
from pia_ray.pia.loading.lora_names import Target, role_of, target_of, targets_in
from pia_ray.pia.loading.textual_inversion import BUNDLED

Strengths = tuple[tuple[str, float], ...]
"""LoRAs of a model by name with the factor of each."""

_OTHER_KINDS: Final = {
    "on_input": "IA3",
    "oft_": "OFT",
    ".a1.weight": "GLoRA",
}
_XL: Final = "lora_te2_"
_BIAS_ROLES: Final = ("diff_b", "b_norm")


@dataclass(frozen=True)
class LoraFile:
    """A LoRA as this model takes it."""

    deltas: list[WeightDelta]
    unread: list[str]
    """Layers that this model has not, and other keys."""
    num_layers: int
    """Layers of the file."""

    @property
    def places(self) -> frozenset[Place]:
        """The parameters that it changes."""
        return frozenset((found.part, found.module, found.parameter) for found in self.deltas)


def variant(components: Components, loras: Strengths) -> Components:
    """The model with these LoRAs merged in: new weights where a LoRA acts, the same tensors everywhere else.

    Raises:
        WeightsError: a file is not a LoRA, or not for this model.
    """
    deltas: dict[Part, dict[tuple[str, str], torch.Tensor]] = {}
    for name, strength in loras:
        for found in read_lora(components.loras[name].path, components).deltas:
            of_part, key = deltas.setdefault(found.part, {}), (found.module, found.parameter)
            delta = strength * found.delta(_parameter(components, found))
            of_part[key] = of_part[key] + delta if key in of_part else delta
    parts: dict[str, Any] = {part: _merged(getattr(components, part), changes) for part, changes in deltas.items()}
    return replace(components, **parts)


def merge(path: Path, weight: float, components: Changeable) -> LoraFile:
    """Writes a LoRA of that strength into the model's own weights.

    Raises:
        WeightsError: the file is not a LoRA, or not for this model.
    """
    file = read_lora(path, components)
    for found in file.deltas:
        own = _parameter(components, found)
        with torch.no_grad():
            own.copy_(own.float() + weight * found.delta(own))
    return file


def read_lora(path: Path, components: Changeable) -> LoraFile:
    """The file's differences to this model's weights, and the keys that have no place in it.

    Raises:
        WeightsError: the file is not a LoRA, of a kind that is not read, or most of it is for another model.
    """
    tensors = {key: tensor for key, tensor in read_tensors(path).items() if not key.startswith(BUNDLED)}
    for part, kind in _OTHER_KINDS.items():
        if any(part in key for key in tensors):
            raise WeightsError(f"{path} is a LoRA of the kind {kind}, which is not supported")
    if any(key.startswith(_XL) for key in tensors):
        raise WeightsError(f"{path} is a LoRA of Stable Diffusion XL, whose second text encoder has no place here")
    layers, names, unread = _by_layer(tensors, _layers_per_block(components))
    _check_values(path, layers, names)
    if not any(set(factors) - {"alpha"} for factors in layers.values()):
        raise WeightsError(f"{path} is not a LoRA: it holds no pair of lora_down and lora_up, or lora_A and lora_B")
    modules, config = dict(targets_in(components)), read_header(path).get("lora_adapter_metadata")
    deltas = []
    for target, factors in layers.items():
        module, own = modules.get(target), {role: value for role, value in factors.items() if role != "alpha"}
        if module is None or not is_complete(own):
            unread.append(names[target])
            continue
        try:
            alpha = _alpha(factors, target, module, config)
        except (AttributeError, TypeError, ValueError, re.error) as error:
            raise WeightsError(
                f"{path} is damaged: lora_adapter_metadata in its header gives no alpha ({error})"
            ) from None
        for found in _deltas(target[0], module, own, alpha):
            _check_shapes(path, names[target], found, components)
            deltas.append(found)
    if len(unread) > len({(found.part, found.module) for found in deltas}):
        raise WeightsError(
            f"{path} was made for another model: {len(unread)} of its weights have no place in this one, such as "
            f"{unread[0]}. PIA takes LoRAs of Stable Diffusion 1.5, not of XL or 2."
        )
    return LoraFile(deltas, unread, len(layers))


def _layers_per_block(components: Changeable) -> tuple[int, ...]:
    layers, blocks = components.unet.config["layers_per_block"], components.unet.config["down_block_types"]
    return (layers,) * len(blocks) if isinstance(layers, int) else tuple(layers)


def _by_layer(
    tensors: Mapping[str, torch.Tensor], layers_per_block: Sequence[int]
) -> tuple[dict[Target, dict[str, torch.Tensor]], dict[Target, str], list[str]]:
    """The tensors of each layer by role, a name of each as the file writes it, and the keys that are neither."""
    layers: dict[Target, dict[str, torch.Tensor]] = {}
    names: dict[Target, str] = {}
    unknown = []
    for key, tensor in tensors.items():
        if (found := role_of(key)) is None:
            unknown.append(key)
            continue
        name, role = found
        target = target_of(name, layers_per_block)
        layers.setdefault(target, {})[role] = tensor
        names.setdefault(target, name)
    return layers, names, unknown


def _check_values(path: Path, layers: Mapping[Target, Mapping[str, torch.Tensor]], names: Mapping[Target, str]) -> None:
    for target, factors in layers.items():
        for role, factor in factors.items():
            if factor.numel() == 0 or (factor.ndim == 0 and role != "alpha") or not is_finite(factor):
                raise WeightsError(
                    f"{path} is damaged: {names[target]} has an empty {role}, or one with NaN or infinite values. "
                    "Fetch or train it again."
                )


def _deltas(part: Part, module: str, factors: Mapping[str, torch.Tensor], alpha: float) -> Iterator[WeightDelta]:
    """The differences to the module's weight and to its bias, where the file has them."""
    weight = {role: factor for role, factor in factors.items() if role not in _BIAS_ROLES}
    if weight:
        yield WeightDelta(part, module, "weight", weight, alpha)
    for role in _BIAS_ROLES:
        if role in factors:
            yield WeightDelta(part, module, "bias", {role: factors[role]}, alpha)


def _parameter(components: Changeable, delta: WeightDelta) -> torch.Tensor:
    parameter = getattr(getattr(components, delta.part).get_submodule(delta.module), delta.parameter)
    assert isinstance(parameter, torch.Tensor)
    return parameter


def _check_shapes(path: Path, name: str, delta: WeightDelta, components: Changeable) -> None:
    module = getattr(components, delta.part).get_submodule(delta.module)
    weight = getattr(module, delta.parameter)
    try:
        if weight is None:
            raise RuntimeError("no bias")
        delta.delta(torch.empty_like(weight, device="meta"))  # computes shapes alone
    except (RuntimeError, ValueError, IndexError) as error:
        shapes = " with ".join(str(list(factor.shape)) for factor in delta.factors.values())
        wanted = "no bias" if weight is None else f"a weight of {list(weight.shape)}"
        raise WeightsError(
            f"{path} was made for another model: {name} is {shapes}, for {wanted}. PIA takes LoRAs of Stable Diffusion "
            "1.5, not of XL or 2."
        ) from error


def _alpha(factors: Mapping[str, torch.Tensor], target: Target, module: str, config: object) -> float:
    """kohya stores an alpha with each layer, peft writes its config into the header; else alpha is the rank."""
    rank = rank_of(factors)
    if "alpha" in factors:
        return float(factors["alpha"])
    settings = config if isinstance(config, Mapping) else {}
    alpha = settings.get(f"{target[0]}.lora_alpha", rank)
    for pattern, value in (settings.get(f"{target[0]}.alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = value
            break
    if not math.isfinite(float(alpha)):
        raise ValueError(f"an alpha is {alpha}")
    return float(alpha) * (rank**0.5 if settings.get(f"{target[0]}.use_rslora") else 1.0)


def _merged(model: torch.nn.Module, deltas: Mapping[tuple[str, str], torch.Tensor]) -> torch.nn.Module:
    own = sharing_copy(model)
    for (name, parameter), delta in deltas.items():
        module = own.get_submodule(name)
        weight = getattr(module, parameter)
        assert isinstance(weight, torch.Tensor)
        merged = torch.empty_like(weight).copy_(weight.float() + delta)  # keeps precision and memory layout
        setattr(module, parameter, torch.nn.Parameter(merged, requires_grad=False))
    return own
