"""Schedulers by name: diffusers' classes with the model's own settings, PIA's linear betas and no clipping."""

from __future__ import annotations

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
from pia_ray.errors import BadParameter

LINEAR_BETAS: Final[Mapping[str, Any]] = {
    "beta_schedule": "linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "trained_betas": None,
    "clip_sample": False,
}
"""The noise schedule of PIA's training; a Stable Diffusion checkpoint's own file says scaled_linear. Source: PIA's
config."""

_KARRAS: Final = {"use_karras_sigmas": True}

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
}
"""For each scheduler name the class, and the settings that replace those of the model's own scheduler config."""


def make_scheduler(own: Mapping[str, Any], name: str, *, steps: int) -> Any:
    """A fresh scheduler, its timesteps set: the model's `own` settings, linear betas, no clipping.

    Raises:
        BadParameter: the scheduler cannot do that number of steps.
    """
    kind, settings = SCHEDULERS[name]
    public = {key: value for key, value in own.items() if not key.startswith("_")}
    scheduler = kind.from_config({**public, **LINEAR_BETAS, **settings})
    try:
        # On the CPU, so that reading a timestep does not wait for the GPU.
        scheduler.set_timesteps(steps, device="cpu")
    except ValueError as error:
        raise BadParameter(
            f"num_inference_steps: scheduler {name} cannot do {steps} steps ({error})",
            "num_inference_steps",
        ) from None
    trained = scheduler.config["num_train_timesteps"]
    if float(scheduler.timesteps.max()) > trained - 1:
        raise BadParameter(
            f"num_inference_steps must be below {trained} for scheduler {name} (got {steps})",
            "num_inference_steps",
        )
    return scheduler
