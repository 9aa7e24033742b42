"""Equal weights once in memory: models built from the same files hold the same tensors, each in modules of its own.

Weights are told apart by the digest of their files, never by name. What is shared must not be written to in place.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakValueDictionary

import torch

from pia_ray.pia.components import Held
from pia_ray.pia.device.placement import MEMORY_FORMAT

SourceOf = Callable[[str], str]
"""Digest of the files that a parameter of this name comes from."""


class Pool:
    """Weights of the models in memory. Forgets a source when the last model that holds it is gone."""

    def __init__(self) -> None:
        self._held: WeakValueDictionary[tuple[object, ...], Held] = WeakValueDictionary()

    def __len__(self) -> int:
        """Sources that models in memory hold."""
        return len(self._held)

    def place(self, module: torch.nn.Module, source_of: SourceOf, *, device: torch.device) -> tuple[Held, ...]:
        """Moves a module to its device, in torch's channels-last layout, and makes it use tensors that are there.

        The module is as it was loaded: only weights of their files may be shared. What is given back keeps the
        weights known to the pool; the model has to hold it.
        """
        kind = type(module).__name__
        helds: dict[str, Held] = {}
        missing: list[tuple[str, Held]] = []
        for name, parameter in list(module.named_parameters()):
            source = source_of(name)
            if source not in helds:
                key = (source, kind, str(device), parameter.dtype)
                helds[source] = self._held.setdefault(key, Held())
            there = helds[source].tensors.get(name)
            if there is None or there.shape != parameter.shape or there.dtype != parameter.dtype:
                missing.append((name, helds[source]))
            else:
                owner, _, leaf = name.rpartition(".")
                # A parameter of its own: what moves or replaces one model's does not reach the other's.
                module.get_submodule(owner).register_parameter(leaf, torch.nn.Parameter(there, requires_grad=False))
        module.to(device)
        module.to(memory_format=MEMORY_FORMAT)  # type: ignore[call-overload]  # torch's stubs lack this form
        for name, held in missing:
            held.tensors[name] = module.get_parameter(name).detach()
        return tuple(helds.values())
