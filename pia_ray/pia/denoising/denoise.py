"""One row's denoising as a generator: it yields the UNet evaluations it needs next and receives their predictions.

A program owns its scheduler, its random numbers and its latents, and knows nothing of other rows. Every way of making a
video is a program or a part of one; the stepper in `engine` sees only evaluations.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from pia_ray.config.knobs import AnimationParams
from pia_ray.errors import BadParameter
from pia_ray.pia.denoising import free_init
from pia_ray.pia.denoising.context_windows import windows
from pia_ray.pia.denoising.extrapolation import Extrapolation
from pia_ray.pia.denoising.full_steps import full_steps, is_stiff
from pia_ray.pia.denoising.scheduler_steps import noised, step
from pia_ray.pia.denoising.window_blending import blend
from pia_ray.pia.evaluation import Branch, Evaluation, Program, Text, Window
from pia_ray.types import OnStepEnd, StepEnd


def denoise(
    params: AnimationParams,
    *,
    schedulers: Sequence[Any],
    noise: torch.Tensor,
    fresh_noise: Callable[[], torch.Tensor],
    condition: torch.Tensor,
    branches: tuple[Branch, ...],
    generator: torch.Generator,
    on_step_end: OnStepEnd | None = None,
    texts: dict[Text, torch.Tensor] | None = None,
    segment: int = 0,
    num_segments: int = 1,
) -> Program:
    """PIA's denoising of one row, from noise or, below strength 1, from the noised picture.

    `noise` [4, T, h, w] and `condition` [4, 1 or T, h, w] have been drawn; only FreeInit (by `fresh_noise`) and the
    schedulers draw here. The order of draws is that of diffusers' PIAPipeline, so equal seeds give equal frames.
    Embeddings that `on_step_end` returns are written to `texts`, for the segments that follow. `schedulers` has a fresh
    one for each FreeInit iteration. `segment` of `num_segments` is only for the count of steps.
    Source: arXiv 2312.13964; FreeInit: arXiv 2312.07537.
    """
    runs = [_begin(*pair, params.strength) for pair in zip(schedulers, params.iterations, strict=True)]
    num_steps = sum(count for _, _, count in runs)
    done, evaluated = segment * num_steps, segment * sum(len(timesteps) for _, timesteps, _ in runs)
    picture = condition.expand_as(noise)
    latents = picture
    for iteration, (scheduler, timesteps, count) in enumerate(runs):
        if iteration == 0:
            latents = _start(picture, noise, params, scheduler, timesteps)
        else:
            latents = _restart(latents, picture, noise, fresh_noise(), params, scheduler, timesteps)
        extras = _step_extras(scheduler, params, generator)
        extrapolation = _extrapolation(params, scheduler, timesteps, steps=params.iterations[iteration])
        for index, timestep in enumerate(timesteps):
            scaled = scheduler.scale_model_input(latents[None], timestep)[0]
            if (prediction := extrapolation.at(index)) is None:
                step_windows = windows(params, index // scheduler.order)
                predictions = yield Evaluation(
                    latents=scaled,
                    timestep=float(timestep),
                    branches=_branches_of(branches, step_windows),
                    step=done + index * count // len(timesteps),
                    num_steps=num_segments * num_steps,
                )
                prediction = guide(blend(predictions, step_windows, noise.shape[1]), params)
                extrapolation.add(index, prediction)
            latents = step(scheduler, prediction, timestep, latents, extras)
            if on_step_end is not None:
                before = (latents, *branches)
                latents, branches = call_back(on_step_end, evaluated, float(timestep), latents, branches)
                if any(new is not old for new, old in zip((latents, *branches), before, strict=True)):
                    extrapolation.clear()
                if texts is not None:
                    texts.update({branch.text: branch.prompt for branch in branches})
            evaluated += 1
        done += count
    return latents


def chain(program_of: Callable[[int, torch.Tensor | None], Program], num_segments: int) -> Program:
    """One segment after the other as one program; `program_of` makes each from the frame before it, [4, 1, h, w].

    That frame is the last clean latent, which has the scale of a condition latent: it never passes through pixels.
    Its repetition at the start of the next segment is left out.
    """
    parts: list[torch.Tensor] = []
    for segment in range(num_segments):
        latents = yield from program_of(segment, parts[-1][:, -1:] if parts else None)
        parts.append(latents[:, 1:] if parts else latents)
    return torch.cat(parts, dim=1)


def guide(predictions: torch.Tensor, params: AnimationParams) -> torch.Tensor:
    """The guided prediction, by prompt, picture or both: each branch adds its difference from the one before, times its
    scale.

    The branches are in the order of `row_program.guidance_branches`; a single one is returned as it is. Source: arXiv
    2207.12598; by picture and prompt: arXiv 2211.09800, equation 3.
    """
    scales = [params.image_guidance_scale] * params.has_image_guidance + [params.guidance_scale] * params.has_guidance
    guided = predictions[0]
    for before, after, scale in zip(predictions[:-1], predictions[1:], scales, strict=True):
        guided = guided + scale * (after - before)
    return guided


def call_back(
    on_step_end: OnStepEnd, step: int, timestep: float, latents: torch.Tensor, branches: tuple[Branch, ...]
) -> tuple[torch.Tensor, tuple[Branch, ...]]:
    """The latents and branches of the next step, after the caller's function has seen, and may have replaced, them.

    Raises:
        BadParameter: the function returned something that cannot replace the row's own tensors.
    """
    own = {f"{branch.text}_embeds": branch.prompt for branch in branches} | {"latents": latents}
    # Copies, because embeddings are shared with other rows that have the same text.
    tensors = {name: tensor.clone() for name, tensor in own.items()}
    given = on_step_end(StepEnd(step, timestep, tensors)) or {}
    if not isinstance(given, Mapping):
        raise BadParameter(
            f"on_step_end must return tensors by name, or None (got {type(given).__name__})", "on_step_end"
        )
    for name, tensor in given.items():
        if name not in own:
            raise BadParameter(f"on_step_end cannot replace {name}, only {', '.join(own)}", "on_step_end")
        if not isinstance(tensor, torch.Tensor) or tensor.shape != own[name].shape:
            shape = list(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise BadParameter(
                f"on_step_end must return {name} as a tensor {list(own[name].shape)} (got {shape})", "on_step_end"
            )
    # Copies again, because the caller may write to its tensors later, and projections of an embedding are cached.
    new = {name: given[name].to(own[name], copy=True) for name in given}
    branches = tuple(
        replace(branch, prompt=new.get(f"{branch.text}_embeds", branch.prompt)) if new else branch
        for branch in branches
    )
    return new.get("latents", latents), branches


def _begin(scheduler: Any, steps: int, strength: float) -> tuple[Any, torch.Tensor, int]:
    """The scheduler, the timesteps that it runs, and their number of steps: at least one, at any strength."""
    count = max(1, min(int(steps * strength), steps))
    first = (steps - count) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    return scheduler, scheduler.timesteps[first:], count


def _extrapolation(params: AnimationParams, scheduler: Any, timesteps: torch.Tensor, *, steps: int) -> Extrapolation:
    """For a run of these timesteps, of a schedule of so many steps."""
    count = -(-len(timesteps) // scheduler.order)
    # Where guidance is strong a parabola is no better than a line (37.9 against 39.3 dB at guidance 7.5, every third of
    # 25 steps); without guidance it gains 4 dB. A parabola also doubles the rounding noise of half precision.
    points = 2 if is_stiff(params) else 3
    return Extrapolation(full_steps(params, steps=steps, count=count), points=points, order=scheduler.order)


def _branches_of(branches: tuple[Branch, ...], step_windows: Sequence[Window]) -> tuple[Branch, ...]:
    """Every guidance branch for every window of a step, so that they may share forwards."""
    if len(step_windows) == 1:
        return branches
    return tuple(branch.for_window(window) for window in step_windows for branch in branches)


def _start(
    picture: torch.Tensor, noise: torch.Tensor, params: AnimationParams, scheduler: Any, timesteps: torch.Tensor
) -> torch.Tensor:
    """The latents that a scheduler starts with: noise, or below strength 1 the noised `picture`."""
    if params.strength < 1:
        return noised(scheduler, picture, noise, timesteps[0])
    return noise * float(scheduler.init_noise_sigma)


def _restart(
    before: torch.Tensor,
    picture: torch.Tensor,
    noise: torch.Tensor,
    fresh: torch.Tensor,
    params: AnimationParams,
    scheduler: Any,
    timesteps: torch.Tensor,
) -> torch.Tensor:
    """The latents that a further iteration of FreeInit starts with: low frequencies of the noised result before, high
    ones of a fresh start."""
    kept = free_init.low_pass(params, tuple(noise.shape[1:]), noise.device)
    if params.strength < 1:
        slow = _start(before, noise, params, scheduler, timesteps)
        return free_init.mix(slow, _start(picture, fresh, params, scheduler, timesteps), kept)
    slow = free_init.diffuse(before, noise, scheduler)
    return free_init.mix(slow, fresh, kept) * float(scheduler.init_noise_sigma)


def _step_extras(scheduler: Any, params: AnimationParams, generator: torch.Generator) -> dict[str, Any]:
    accepted = inspect.signature(scheduler.step).parameters
    extras: dict[str, Any] = {}
    if "eta" in accepted:
        # Where the first step has no signal, eta 1 leaves 0 under a root; rounding makes it negative, and the root NaN.
        zero_snr = scheduler.config.get("rescale_betas_zero_snr", False)
        extras["eta"] = min(params.eta, 1 - 1e-6) if zero_snr else params.eta
    if "generator" in accepted:
        extras["generator"] = generator
    return extras
