"""Steps of diffusers' schedulers that make no GPU wait: their scalars stay in host memory, and noise is sent ahead.

diffusers 0.42.1 moves the coefficients of a UniPC step to the latents' device and solves for them there (127 kernels
and 6 blocking copies a step), and copies the noise of a step in a way that waits for all work before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch.overrides import TorchFunctionMode

from pia_ray.pia.transfers import to_device


def step(
    scheduler: Any, prediction: torch.Tensor, timestep: torch.Tensor, latents: torch.Tensor, extras: Mapping[str, Any]
) -> torch.Tensor:
    """The latents [4, T, h, w] after a step; `extras` are further arguments of the scheduler's own `step`."""
    with _HostScalars():
        after: torch.Tensor = scheduler.step(prediction[None], timestep, latents[None], **extras).prev_sample[0]
    return after


def noised(scheduler: Any, latents: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """The scheduler's mixture of latents and noise, both [4, T, h, w], at a timestep."""
    nothing, one, timesteps = torch.zeros(1), torch.ones(1), timestep.reshape(1)
    # Its factors of both, because diffusers moves its whole tables to the device of what it is given.
    kept, added = (float(scheduler.add_noise(*pair, timesteps)) for pair in ((one, nothing), (nothing, one)))
    return kept * latents + added * noise


_MAKES_SCALARS: Final = (torch.ones, torch.tensor)


class _HostScalars(TorchFunctionMode):
    """Leaves scalars and vectors of a scheduler in host memory, where its tables are; sends larger tensors unawaited.

    Scalars in host memory are arguments of the kernels that they take part in.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if func is torch.Tensor.to and args[0].device.type == "cpu":
            return _moved(args[0], *args[1:], **given)
        if func in _MAKES_SCALARS:
            made = func(*args, **{**given, "device": "cpu"})
            return made if made.dim() < 2 else _moved(made, given.get("device", made.device))
        if func is torch.einsum and args[0] == "k,bkc...->bc...":
            # Weights are the first operand. Not as a matrix product, which TF32 would round.
            return sum(weight * each for weight, each in zip(args[1], args[2].unbind(1), strict=True))
        return func(*args, **given)


def _moved(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`tensor.to`, but a vector stays in host memory, and a larger one is sent to a GPU without waiting for it."""
    values = [*args, *kwargs.values()]
    devices = [torch.device(value) for value in values if isinstance(value, torch.device | str)]
    dtypes = [value for value in values if isinstance(value, torch.dtype)]
    for other in [value for value in values if isinstance(value, torch.Tensor)]:
        devices.append(other.device)
        dtypes.append(other.dtype)
    if dtypes:
        tensor = tensor.to(dtypes[0])
    return to_device(tensor, devices[0]) if devices and tensor.dim() > 1 else tensor
