"""Forwards of one UNet over several evaluations: packs their inputs and runs the rewritten UNet, compiled or not.

The engine decides which evaluations are packed together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNetMotionModel

from pia_ray.pia.components import Components
from pia_ray.pia.evaluation import Branch, Evaluation
from pia_ray.pia.unet.attention_kernels import choose_kernels
from pia_ray.pia.unet.compilation import CompiledForward
from pia_ray.pia.unet.cross_attention import CrossAttention
from pia_ray.pia.unet.free_u import free_u
from pia_ray.pia.unet.image_attention import cross_attention_states
from pia_ray.pia.unet.rewrites import restructure_unet, restructure_vae


@dataclass(frozen=True)
class BatchEntry:
    """One branch of one row's evaluation: an entry of a forward's batch."""

    evaluation: Evaluation
    branch: Branch
    free_u: tuple[float, float, float, float] | None = None

    @property
    def prefix_key(self) -> tuple[object, ...]:
        """Equal for entries of one forward whose input before the first cross-attention is the same."""
        branch = self.branch
        return (id(self.evaluation), _storage_key(branch.mask), _storage_key(branch.condition), branch.frames)


class Forward:
    """The UNet of one model, and of its variants that have the same UNet.

    The constructor rewrites the UNet and the VAE, unless their weights are offloaded.
    """

    def __init__(self, components: Components) -> None:
        self._components = components
        self._prefix = None
        self._cross: CrossAttention | None = None
        unet = components.unet
        # A UNet with accelerate's hook is offloaded: its weights are moved at each forward, and stay as diffusers has
        # them.
        if isinstance(unet, UNetMotionModel) and not hasattr(unet, "_hf_hook"):
            self._prefix = restructure_unet(unet)
            restructure_vae(components.vae)
            if CrossAttention.suits(unet):
                self._cross = CrossAttention(unet)
        self._kernels = choose_kernels(unet) if self._prefix is not None and components.device.type == "cuda" else None
        self._timed: set[tuple[object, ...]] = set()
        self._compiled: CompiledForward | None = None
        if components.compile_mode is not None:
            with free_u(unet, (1.0, 1.0, 1.0, 1.0)):
                pass  # leaves its attributes on the blocks: compiled code that saw none would be made anew after a row
            self._compiled = CompiledForward(unet, mode=components.compile_mode, cache=components.compile_cache)

    @torch.inference_mode()
    def predict(self, entries: Sequence[BatchEntry]) -> torch.Tensor:
        """Predictions [N, 4, T, h, w], float32, of N entries of one shape and one FreeU."""
        parts = self._components
        order, inverse = list(range(len(entries))), list(range(len(entries)))
        if self._prefix is not None:
            order, inverse = _by_prefix(entries)
        packed = [entries[index] for index in order]
        sample = torch.stack([_input(entry) for entry in packed]).to(parts.dtype)  # [N, 9, T, h, w]
        # A tensor of one timestep per entry; with a number, torch would compile again for every timestep.
        timesteps = torch.tensor([entry.evaluation.timestep for entry in packed], dtype=torch.float32)
        branches = [entry.branch for entry in packed]
        num_frames = sample.shape[2]
        states: Any
        if self._cross is not None:
            states = self._cross.states(branches)
        else:
            prompts = torch.stack([branch.prompt for branch in branches])  # [N, L, C]
            states = cross_attention_states(prompts.repeat_interleave(num_frames, dim=0), branches)
        num = max(inverse) + 1
        prefix = self._prefix if num < len(inverse) else None
        inputs = {"encoder_hidden_states": states, "return_dict": False}
        timesteps = timesteps.to(parts.device, non_blocking=True)
        setting = packed[0].free_u
        with contextlib.ExitStack() as stack:
            if prefix is not None:
                indices = torch.tensor(inverse).to(parts.device, non_blocking=True)
                stack.enter_context(prefix.shared(num=num, num_frames=num_frames, inverse=indices))
            kind = (tuple(sample.shape), num if prefix is not None else 0)
            if self._kernels is not None and kind not in self._timed:
                with self._kernels.choosing(), free_u(parts.unet, setting):
                    parts.unet(sample, timesteps, **inputs)
                self._timed.add(kind)
            if self._compiled is not None and setting is None:
                prediction = self._compiled((*kind, _shapes(states)), sample, timesteps, **inputs)[0].clone()
            else:
                stack.enter_context(free_u(parts.unet, setting))
                prediction = parts.unet(sample, timesteps, **inputs)[0]
        if order != sorted(order):
            back = torch.tensor(sorted(range(len(order)), key=order.__getitem__))
            prediction = prediction[back.to(parts.device, non_blocking=True)]
        return prediction.float()


def _shapes(states: Any) -> tuple[object, ...]:
    """A key that is equal for cross-attention inputs of one compiled graph."""
    if isinstance(states, torch.Tensor):
        return tuple(states.shape)
    if isinstance(states, tuple):
        return tuple(map(_shapes, states))
    return (None,)


def _storage_key(tensor: torch.Tensor) -> tuple[object, ...]:
    """A key that is equal for views of the same values, as long as the tensors exist."""
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())


def _input(entry: BatchEntry) -> torch.Tensor:
    latents = entry.branch.frames_of(entry.evaluation.latents)
    frame_shape = latents.shape[1:]
    mask, condition = entry.branch.mask.expand(1, *frame_shape), entry.branch.condition.expand(-1, *frame_shape)
    return torch.cat([latents, mask, condition])  # [9, T, h, w]


def _by_prefix(entries: Sequence[BatchEntry]) -> tuple[list[int], list[int]]:
    """An order of the entries that starts with the distinct ones, and for each entry in it the index of its equal."""
    firsts: dict[tuple[object, ...], int] = {}
    later = []
    for index, entry in enumerate(entries):
        if entry.prefix_key in firsts:
            later.append(index)
        else:
            firsts[entry.prefix_key] = index
    kinds = list(firsts)
    order = [*firsts.values(), *later]
    return order, [kinds.index(entries[index].prefix_key) for index in order]
