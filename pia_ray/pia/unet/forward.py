"""One model's UNet as forwards of several evaluations: packs their inputs, runs the rewritten UNet, compiled or not.

What may be packed together is the engine's to say; how it is run is said here and in `exact`.
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
from pia_ray.pia.unet.compilation import CompiledForward
from pia_ray.pia.unet.free_u import free_u
from pia_ray.pia.unet.image_attention import cross_attention_states
from pia_ray.pia.unet.rewrites import CrossAttention, choose_kernels, restructure_unet, restructure_vae


@dataclass(frozen=True)
class Piece:
    """One side of one row's evaluation."""

    evaluation: Evaluation
    branch: Branch
    free_u: tuple[float, float, float, float] | None = None

    @property
    def prefix_key(self) -> tuple[object, ...]:
        """Equal for pieces of one forward that see the same input before any text."""
        branch = self.branch
        return (id(self.evaluation), _place(branch.mask), _place(branch.condition), branch.frames)


class Forward:
    """The UNet of one model. Rewrites it, and the VAE beside it, where nothing has to be moved about for a forward."""

    def __init__(self, components: Components) -> None:
        self._components = components
        self._prefix = None
        self._cross: CrossAttention | None = None
        unet = components.unet
        # Offloaded weights, told by accelerate's hook, come and go: they are left as diffusers has them.
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
    def predict(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """Predictions [N, 4, T, h, w], float32, of N pieces of one shape and one FreeU."""
        parts = self._components
        order, spread = list(range(len(pieces))), list(range(len(pieces)))
        if self._prefix is not None:
            order, spread = _by_prefix(pieces)
        packed = [pieces[index] for index in order]
        sample = torch.stack([_input(piece) for piece in packed]).to(parts.dtype)  # [N, 9, T, h, w]
        # A vector of its own per piece, never a number: a number would compile anew for every timestep.
        timesteps = torch.tensor([piece.evaluation.timestep for piece in packed], dtype=torch.float32)
        branches = [piece.branch for piece in packed]
        num_frames = sample.shape[2]
        states: Any
        if self._cross is not None:
            states = self._cross.states(branches)
        else:
            prompts = torch.stack([branch.prompt for branch in branches])  # [N, L, C]
            states = cross_attention_states(prompts.repeat_interleave(num_frames, dim=0), branches)
        num = max(spread) + 1
        prefix = self._prefix if num < len(spread) else None
        told = {"encoder_hidden_states": states, "return_dict": False}
        timesteps = timesteps.to(parts.device, non_blocking=True)
        setting = packed[0].free_u
        with contextlib.ExitStack() as stack:
            if prefix is not None:
                places = torch.tensor(spread).to(parts.device, non_blocking=True)
                stack.enter_context(prefix.shared(num=num, num_frames=num_frames, spread=places))
            kind = (tuple(sample.shape), num if prefix is not None else 0)
            if self._kernels is not None and kind not in self._timed:
                with self._kernels.choosing(), free_u(parts.unet, setting):
                    parts.unet(sample, timesteps, **told)
                self._timed.add(kind)
            if self._compiled is not None and setting is None:
                prediction = self._compiled((*kind, _form(states)), sample, timesteps, **told)[0].clone()
            else:
                stack.enter_context(free_u(parts.unet, setting))
                prediction = parts.unet(sample, timesteps, **told)[0]
        if order != sorted(order):
            back = torch.tensor(sorted(range(len(order)), key=order.__getitem__))
            prediction = prediction[back.to(parts.device, non_blocking=True)]
        return prediction.float()


def _form(states: Any) -> tuple[object, ...]:
    """Equal for cross-attention inputs that one graph serves."""
    if isinstance(states, torch.Tensor):
        return tuple(states.shape)
    if isinstance(states, tuple):
        return tuple(map(_form, states))
    return (None,)


def _place(tensor: torch.Tensor) -> tuple[object, ...]:
    """Where a tensor lies: equal for views of the same values, while they are alive."""
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())


def _input(piece: Piece) -> torch.Tensor:
    latents = piece.branch.view(piece.evaluation.latents)
    spread = latents.shape[1:]
    mask, condition = piece.branch.mask.expand(1, *spread), piece.branch.condition.expand(-1, *spread)
    return torch.cat([latents, mask, condition])  # [9, T, h, w]


def _by_prefix(pieces: Sequence[Piece]) -> tuple[list[int], list[int]]:
    """An order of the pieces in which the first of each kind stand first; for each then, which of those it equals."""
    firsts: dict[tuple[object, ...], int] = {}
    later = []
    for index, piece in enumerate(pieces):
        if piece.prefix_key in firsts:
            later.append(index)
        else:
            firsts[piece.prefix_key] = index
    kinds = list(firsts)
    order = [*firsts.values(), *later]
    return order, [kinds.index(pieces[index].prefix_key) for index in order]
