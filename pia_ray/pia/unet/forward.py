"""Forwards of one UNet over several evaluations: packs their inputs and runs the rewritten UNet, compiled or not.

The engine decides which evaluations are packed together.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import UNetMotionModel

from pia_ray.pia.components import Components, sharing_copy
from pia_ray.pia.device.timing import Stopwatch
from pia_ray.pia.evaluation import Branch, Evaluation
from pia_ray.pia.unet.attention_kernels import Kernels, choose_kernels
from pia_ray.pia.unet.attention_products import Products
from pia_ray.pia.unet.background_compilation import compilation_of
from pia_ray.pia.unet.choices import Choices, choices_on
from pia_ray.pia.unet.convolutions import COPIES
from pia_ray.pia.unet.cross_attention import CrossAttention
from pia_ray.pia.unet.free_u import free_u
from pia_ray.pia.unet.guidance_prefix import Prefix, prefix_of
from pia_ray.pia.unet.image_attention import cross_attention_states
from pia_ray.pia.unet.motion_modules import time_kernels
from pia_ray.pia.unet.rewrites import restructure_unet, restructure_vae
from pia_ray.pia.unet.upsample import make_transposed_weights

FreeU = tuple[float, float, float, float]
"""Its factors: two of the skip connections, two of the backbone."""


@dataclass(frozen=True)
class BatchEntry:
    """One branch of one row's evaluation: an entry of a forward's batch."""

    evaluation: Evaluation
    branch: Branch
    free_u: FreeU | None = None

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
        self._prefix: Prefix | None = None
        self._choices: Choices | None = None
        self._cross: CrossAttention | None = None
        unet = components.unet
        # A UNet with accelerate's hook is offloaded: its weights are moved at each forward, and stay as diffusers has
        # them.
        if isinstance(unet, UNetMotionModel) and not hasattr(unet, "_hf_hook"):
            self._choices = choices_on(components.device)
            may_copy = components.device.type == "cpu" and components.memory_bytes is None
            copies = COPIES if may_copy else None
            self._prefix = restructure_unet(unet, self._choices, copies)
            restructure_vae(components.vae, self._choices, copies)
            if CrossAttention.suits(unet):
                on_cpu = components.device.type == "cpu"
                self._cross = CrossAttention(unet, Products(self._choices) if on_cpu and self._choices else None)
        self._kernels: Kernels | None = None
        if self._prefix is not None and components.device.type == "cuda":  # a CPU has one kernel
            self._kernels = choose_kernels(unet)
            time_kernels(unet, self._kernels)
        self._timed: set[tuple[object, ...]] = set()
        self._has_all_weights = False
        self._compilation = compilation_of(components) if isinstance(unet, UNetMotionModel) else None
        if self._compilation is not None:
            with free_u(unet, (1.0, 1.0, 1.0, 1.0)):
                pass  # leaves its attributes on the blocks: compiled code that saw none would be made anew after a row

    def packs_for(self, setting: FreeU | None) -> bool:
        """Whether forwards with that FreeU are to be of few kinds, because they are compiled or may be."""
        return self._compilation is not None and setting is None and self._compilation.is_on

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """A context in which each kind of forward is compiled when it first occurs, where the model is compiled."""
        if self._compilation is None:
            yield
            return
        with self._compilation.warming():
            yield

    @torch.inference_mode()
    def predict(self, entries: Sequence[BatchEntry], *, ahead: float = math.inf) -> torch.Tensor:
        """Predictions [N, 4, T, h, w], float32, of N entries of one shape and one FreeU.

        `ahead` is the number of forwards to come for each one until now: compilation has to pay in them.
        """
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
        timesteps = timesteps.to(parts.device, non_blocking=True)
        indices = None
        if prefix is not None:
            indices = torch.tensor(inverse).to(parts.device, non_blocking=True)
        call = _Call(sample, timesteps, states, num=num, inverse=indices)
        prediction = self._run(call, packed[0].free_u, ahead)
        if order != sorted(order):
            back = torch.tensor(sorted(range(len(order)), key=order.__getitem__))
            prediction = prediction[back.to(parts.device, non_blocking=True)]
        return prediction.float()

    def _run(self, call: _Call, setting: FreeU | None, ahead: float) -> torch.Tensor:
        unet = self._components.unet
        with call.shared(self._prefix):
            # Another thread that compiles holds Python's lock, which delays what a timing sends to the GPU.
            timable = call.size not in self._timed and not torch.compiler.is_compiling()
            if self._kernels is not None and self._choices is not None and timable:
                with self._kernels.choosing(), self._choices.choosing(), free_u(unet, setting):
                    call.run(unet)
                self._timed.add(call.size)
            if self._compilation is None or setting is not None:
                with free_u(unet, setting):
                    return call.run(unet)
            compiled = self._compilation.is_ready(call.kind, partial(self._compile, call), ahead=ahead)
            watch = Stopwatch(self._components.device)
            if compiled:
                self._make_all_weights()
                with call.begun(unet):
                    prediction = call.run(partial(self._compilation.code, call.kind, unet)).clone()
            else:
                prediction = call.run(unet)
            self._compilation.add_time(call.kind, watch.stop(), compiled=compiled)
            return prediction

    def _compile(self, call: _Call) -> None:
        """Compiles the kind of the call, on any thread."""
        assert self._compilation is not None
        self._make_all_weights()
        # A module of its own, because the prefix is a module's state; weights and code are the same.
        twin = sharing_copy(self._components.unet)
        with torch.inference_mode(), call.shared(prefix_of(twin)), call.begun(twin):
            call.run(partial(self._compilation.code.compile, call.kind, twin))

    def _make_all_weights(self) -> None:
        """Makes the weights that layers make when they first need them, which compiled code cannot."""
        if not self._has_all_weights:
            make_transposed_weights(self._components.unet)
            self._has_all_weights = True


@dataclass(frozen=True)
class _Call:
    """The inputs of one forward of the UNet."""

    sample: torch.Tensor
    timesteps: torch.Tensor
    states: Any
    num: int
    """The entries whose beginning is distinct."""
    inverse: torch.Tensor | None
    """As in `Prefix`; None: nothing is shared."""

    @property
    def size(self) -> tuple[object, ...]:
        """Equal for calls whose operators have the same sizes."""
        return (tuple(self.sample.shape), 0 if self.inverse is None else self.num)

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for calls of one compiled graph, which has no part in what its entries share."""
        return (tuple(self.sample.shape), _shapes(self.states))

    def run(self, unet: Callable[..., Any]) -> Any:
        """The first result of the UNet, or of what stands for it."""
        return unet(self.sample, self.timesteps, encoder_hidden_states=self.states, return_dict=False)[0]

    @contextlib.contextmanager
    def shared(self, prefix: Prefix | None) -> Iterator[None]:
        """A context in which the entries share their beginning."""
        if prefix is None or self.inverse is None:
            yield
            return
        with prefix.shared(num=self.num, num_frames=self.sample.shape[2], inverse=self.inverse):
            yield

    @contextlib.contextmanager
    def begun(self, unet: UNetMotionModel) -> Iterator[None]:
        """A context in which the UNet has computed the beginning, uncompiled, so that the rest is the same for all."""
        if (prefix := prefix_of(unet)) is None:
            yield
            return
        with prefix.begun(prefix.begin(lambda: self.run(unet))):
            yield


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
