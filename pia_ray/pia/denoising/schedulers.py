"""Schedulers by name: diffusers' classes with the model's own settings, PIA's linear betas and no clipping."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Final

from diffusers.schedulers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    SASolverScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)

from pia_ray.config.knobs import DISTILLED_STEPS
from pia_ray.errors import BadParameter, WeightsError

LINEAR_BETAS: Final[Mapping[str, Any]] = {
    "beta_schedule": "linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "trained_betas": None,
    "clip_sample": False,
}
"""The noise schedule of PIA's training; a Stable Diffusion checkpoint's own file says scaled_linear. Source: PIA's
config."""

_OTHER_SIGMAS: Final = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_flow_sigmas",
    "use_lu_lambdas",
)
"""Settings that replace the sigmas of a scheduler. A checkpoint's file may have one; the name alone says it here."""

_KARRAS: Final = {"use_karras_sigmas": True}

# Few-step models are distilled at the ends of equal parts of the noise schedule. Source: arXiv 2404.13686, 2402.13929.
_TRAILING: Final = {"timestep_spacing": "trailing"}

# Without lower_order_final an uneven number of steps does not end on a whole one.
_SINGLESTEP: Final = {"algorithm_type": "dpmsolver++", "solver_order": 2, "lower_order_final": True}

SCHEDULERS: Final[Mapping[str, tuple[Any, Mapping[str, Any]]]] = {
    "ddim": (DDIMScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler-a": (EulerAncestralDiscreteScheduler, {}),
    "dpm++2m": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpm++2m-karras": (
        DPMSolverMultistepScheduler,
        {"algorithm_type": "dpmsolver++", "solver_order": 2, **_KARRAS},
    ),
    "dpm++2m-sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "unipc": (UniPCMultistepScheduler, {}),
    # Without skip_prk_steps the Runge-Kutta warm-up explodes at strength below 1.
    "pndm": (PNDMScheduler, {"skip_prk_steps": True}),
    "deis": (DEISMultistepScheduler, {"algorithm_type": "deis"}),
    "heun": (HeunDiscreteScheduler, {}),
    "lcm": (LCMScheduler, {"original_inference_steps": DISTILLED_STEPS}),
    "euler-karras": (EulerDiscreteScheduler, _KARRAS),
    "dpm++2m-sde-karras": (
        DPMSolverMultistepScheduler,
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 2, **_KARRAS},
    ),
    "dpm++2s": (DPMSolverSinglestepScheduler, _SINGLESTEP),
    "dpm++2s-karras": (DPMSolverSinglestepScheduler, {**_SINGLESTEP, **_KARRAS}),
    "unipc-karras": (UniPCMultistepScheduler, _KARRAS),
    "heun-karras": (HeunDiscreteScheduler, _KARRAS),
    "kdpm2": (KDPM2DiscreteScheduler, {}),
    "kdpm2-karras": (KDPM2DiscreteScheduler, _KARRAS),
    "kdpm2-a": (KDPM2AncestralDiscreteScheduler, {}),
    "kdpm2-a-karras": (KDPM2AncestralDiscreteScheduler, _KARRAS),
    "ddpm": (DDPMScheduler, {}),
    "tcd": (TCDScheduler, {"original_inference_steps": DISTILLED_STEPS}),
    "sa-solver": (SASolverScheduler, {}),
    "ddim-trailing": (DDIMScheduler, _TRAILING),
    "euler-trailing": (EulerDiscreteScheduler, _TRAILING),
}
"""For each scheduler name the class, and the settings that replace those of the model's own scheduler config."""


class _SetLater:
    """A scheduler whose constructor sets one timestep, because `set_timesteps` sets them all anew.

    diffusers' own constructor sets all 1,000 of the training, one by one: 0.3 s, in which no other row denoises.
    """

    def set_timesteps(self, num_inference_steps: int, device: Any = None, num_train_timesteps: Any = None) -> None:
        """As diffusers' method; only the constructor gives `num_train_timesteps`."""
        steps = num_inference_steps if num_train_timesteps is None else 1
        super().set_timesteps(steps, device, num_train_timesteps)  # type: ignore[misc]


class _KDPM2(_SetLater, KDPM2DiscreteScheduler):
    pass


class _KDPM2Ancestral(_SetLater, KDPM2AncestralDiscreteScheduler):
    pass


_SET_LATER: Final = {KDPM2DiscreteScheduler: _KDPM2, KDPM2AncestralDiscreteScheduler: _KDPM2Ancestral}


def make_scheduler(own: Mapping[str, Any], name: str, *, steps: int) -> Any:
    """A fresh scheduler, its timesteps set: the model's `own` settings, linear betas, no clipping, the name's sigmas.

    Raises:
        BadParameter: the scheduler cannot do that number of steps.
    """
    plain = {**own, **LINEAR_BETAS, **dict.fromkeys(_OTHER_SIGMAS, False)}
    return make_configured({**plain, **SCHEDULERS[name][1]}, name, steps=steps)


def check_settings(own: Mapping[str, Any]) -> None:
    """Raises what each row would fail with.

    Raises:
        WeightsError: no scheduler takes the model's `own` settings.
    """
    for name in ("ddim", "euler"):  # one counts in timesteps, the other in sigmas
        try:
            make_scheduler(own, name, steps=1)
        except Exception as error:  # noqa: BLE001 - whatever diffusers and torch raise for values that they do not take
            raise WeightsError(f"no scheduler takes the model's scheduler_config.json: {error}") from None


def make_configured(config: Mapping[str, Any], name: str, *, steps: int) -> Any:
    """A fresh scheduler of that name's class, its timesteps set, with exactly the settings of `config`.

    Raises:
        BadParameter: the scheduler cannot do that number of steps.
    """
    kind = SCHEDULERS[name][0]
    # diffusers logs a line for settings that a class does not have.
    known = inspect.signature(kind.__init__).parameters
    settings = {key: value for key, value in config.items() if key in known}
    scheduler = _SET_LATER.get(kind, kind).from_config(settings)
    try:
        # On the CPU, so that reading a timestep does not wait for the GPU.
        scheduler.set_timesteps(steps, device="cpu")
    except ValueError as error:
        raise BadParameter(
            f"num_inference_steps: scheduler {name} cannot do {steps} steps ({error})",
            "num_inference_steps",
        ) from None
    trained, timesteps = scheduler.config["num_train_timesteps"], scheduler.timesteps
    # Solvers divide by the differences of `steps` + 1 noise levels, and there may be fewer different ones.
    divides = "solver_order" in scheduler.config or "predictor_order" in scheduler.config
    if float(timesteps.max()) > trained - 1 or (divides and len(scheduler.sigmas.unique()) < len(scheduler.sigmas)):
        raise BadParameter(
            f"num_inference_steps must be below {trained} for scheduler {name} (got {steps})",
            "num_inference_steps",
        )
    return scheduler


def name_of(scheduler: Any) -> str:
    """The name of a diffusers scheduler: of those with its class the one whose settings it has.

    Raises:
        BadParameter: there is no name for its class; lists the classes that have one.
    """
    names = [name for name, (kind, _) in SCHEDULERS.items() if type(scheduler) is kind]
    if not names:
        known = sorted({kind.__name__ for kind, _ in SCHEDULERS.values()})
        raise BadParameter(
            f"scheduler must be one of diffusers' {', '.join(known)} (got {type(scheduler).__name__})", "scheduler"
        )
    config = scheduler.config
    fitting = [name for name in names if SCHEDULERS[name][1].items() <= dict(config).items()]
    return max(fitting or names[:1], key=lambda name: len(SCHEDULERS[name][1]))
