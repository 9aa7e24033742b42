"""Equal weights once in memory: models made from the same files have the same tensors, each in modules of its own.

Weights are identified by the digest of their files, never by name. Shared tensors must not be written to in place.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakValueDictionary

import torch

from pia_ray.pia.components import SharedTensors
from pia_ray.pia.device.placement import MEMORY_FORMAT

SourceOf = Callable[[str], str]
"""Digest of the files that a parameter of this name comes from."""


class WeightPool:
    """The weights of the models in memory, by source. A source is dropped with the last model that uses it."""

    def __init__(self) -> None:
        self._sources: WeakValueDictionary[tuple[object, ...], SharedTensors] = WeakValueDictionary()

    def __len__(self) -> int:
        """The number of sources that models in memory use."""
        return len(self._sources)

    def move(
        self,
        module: torch.nn.Module,
        source_of: SourceOf,
        *,
        device: torch.device,
        dtype: torch.dtype,
        layout: torch.memory_format = MEMORY_FORMAT,
    ) -> tuple[SharedTensors, ...]:
        """Moves a module to its device, in this precision and layout, and replaces its weights by equal ones of the
        pool.

        The module must be as it was loaded, because its weights are identified by their files. The model has to keep a
        reference to the result, which keeps the weights in the pool.
        """
        kind = type(module).__name__
        shared: dict[str, SharedTensors] = {}
        missing: list[tuple[str, SharedTensors]] = []
        for name, parameter in list(module.named_parameters()):
            source = source_of(name)
            if source not in shared:
                key = (source, kind, str(device), dtype)
                shared[source] = self._sources.setdefault(key, SharedTensors())
            known = shared[source].tensors.get(name)
            if known is None or known.shape != parameter.shape or known.dtype != dtype:
                missing.append((name, shared[source]))
            else:
                owner, _, leaf = name.rpartition(".")
                # A parameter of its own, so that moving or replacing it does not affect the other model's.
                module.get_submodule(owner).register_parameter(leaf, torch.nn.Parameter(known, requires_grad=False))
        # All at once, because new memory is what a conversion costs. Not the module's own `to`: diffusers' warns of
        # parts to be kept in float32, also where there are none.
        torch.nn.Module.to(module, device=device, dtype=dtype, memory_format=layout)  # type: ignore[call-overload]
        for name, tensors in missing:
            tensors.tensors[name] = module.get_parameter(name).detach()
        return tuple(shared.values())
