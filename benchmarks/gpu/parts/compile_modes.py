"""torch.compile's other modes: two sizes and a LoRA each, with the seconds of compiling."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from benchmarks.gpu.budget import Budget
from benchmarks.gpu.compiling import compile_for, compiled_engine
from benchmarks.gpu.part import NotMeasurable, Part, PartCard
from benchmarks.gpu.random_model import Cost, RandomModel, animate
from pia_ray.bench.similarity import psnr
from pia_ray.pia.components import CompileMode, Components, Lora
from pia_ray.pia.engine import Engine
from pia_ray.pia.loading.lora import read_lora
from pia_ray.testing import make_lora

MODES: Final[tuple[CompileMode, ...]] = ("reduce-overhead", "max-autotune")
LORA: Final = "style"

LEAST_PSNR_DB: Final = 20.0
"""Of a compiled video and the eager one: their forwards round differently, but memory that is overwritten shows."""


def measure(model: RandomModel, card: PartCard, budget: Budget) -> None:
    """Every case is a line of its own, so that a mode which takes all of the time leaves what came before."""
    if not model.compiles:
        raise NotMeasurable("nothing is compiled on this device")
    parts = with_lora(model)
    eager = Engine(parts, batch_size=1)
    cases: dict[str, dict[str, Any]] = {
        f"{model.size.side} px": {"lora": "none"},
        f"{model.size.other_side} px": {"lora": "none", "side": model.size.other_side},
        f"{model.size.side} px, a LoRA": {"lora": LORA},
    }
    for mode in MODES:
        engine = compiled_engine(parts, mode)
        for case, knobs in cases.items():
            name = f"{mode}, {case}"
            card.numbers[name] = found = of_case(model, engine, eager, knobs)
            card.lines.append(
                f"{name:32} compiled in {found['compile_s']:6.1f} s, {found['graphs']} graphs; "
                f"{1000 * found['step_s']:.1f} ms a step, eager {1000 * found['eager_step_s']:.1f}; "
                f"{found['to_eager_db']:.1f} dB to eager"
            )
            if found["to_eager_db"] < LEAST_PSNR_DB:
                card.problems.append(f"{name}: the video is not the eager one")


def of_case(model: RandomModel, engine: Engine, eager: Engine, knobs: dict[str, Any]) -> dict[str, Any]:
    """The numbers of one mode, size and LoRA; a step's time has a share of the row's start and end in it."""
    steps = model.size.few_steps
    compiled = compile_for(engine, model, model.request(num_inference_steps=2, **knobs))
    request = model.request(num_inference_steps=steps, **knobs)
    (true,), (ours,) = animate(eager, request), animate(engine, request)
    return {
        "compile_s": compiled.seconds,
        "graphs": compiled.graphs,
        "step_s": model.median_s(lambda: animate(engine, request), samples=3) / steps,
        "eager_step_s": model.median_s(lambda: animate(eager, request), samples=3) / steps,
        "to_eager_db": min(100.0, psnr(ours.frames, true.frames)),
    }


def with_lora(model: RandomModel) -> Components:
    """The model with a LoRA for rows that name it."""
    path = make_lora(model.work_folder / "style.safetensors", model.folder, parts=("unet",))
    return replace(model.components, loras={LORA: Lora(path, 1.0, read_lora(path, model.components).places)})


PART: Final = Part(
    "compile-modes",
    "reduce-overhead and max-autotune, two sizes and a LoRA",
    Cost(steps=2 * 3 * 8 * 10, loads=1, compiles=3),
    measure,
)
