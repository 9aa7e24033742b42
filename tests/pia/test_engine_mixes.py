"""Any mix of any kinds of row in one engine: rows join and leave at random steps, and each equals its single run.

A new kind of row is one line in `KINDS`.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, Final, get_args

import numpy as np
import pytest
from PIL import Image

from pia_ray.animation import Animation
from pia_ray.config.finish_knobs import FinishKnobs
from pia_ray.config.knob_types import ContextSchedule, Scheduler
from pia_ray.config.knobs import KNOBS, AnimationParams
from pia_ray.config.model import ModelConfig
from pia_ray.errors import BadParameter
from pia_ray.pia.engine import Engine, Row
from pia_ray.pia.loading.load import assemble
from pia_ray.pia.model_cache import Model
from pia_ray.pia.unet.background_compilation import BackgroundCompilation
from pia_ray.pia.unet.compilation import CompiledCode
from pia_ray.prepare import prepare
from pia_ray.testing import make_ip_adapter, make_lora, make_pipeline_folder
from pia_ray.types import AnimationRequest
from pia_ray.weights import resolve

FRAMES: Final = 4
SIZES: Final = ((32, 32), (24, 40))

Kind = Callable[[random.Random], dict[str, Any]]
"""Knobs, and values of the request's other fields, that make such a row."""

KINDS: Final[dict[str, Kind]] = {
    "scheduler": lambda dice: {
        "scheduler": dice.choice(get_args(Scheduler)),
        "num_inference_steps": dice.randint(2, 5),
    },
    "noise at each step": lambda dice: {"scheduler": "ddim", "eta": dice.choice([0.3, 1.0])},
    "strength": lambda dice: {"strength": dice.choice([0.1, 0.5, 0.8]), "num_inference_steps": 4},
    "no guidance": lambda dice: {"guidance_scale": dice.choice([0.0, 1.0])},
    "guidance": lambda dice: {"guidance_scale": dice.choice([1.5, 9.0]), "negative_prompt": dice.choice(["", "dark"])},
    "image guidance": lambda dice: {"image_guidance_scale": dice.choice([0.4, 2.0])},
    "image-free": lambda dice: {"image_guidance_scale": 0},
    "motion": lambda dice: {"motion_scale": dice.choice([0, 1, 2, 6, 7, 8])},
    "loop": lambda dice: {"motion_scale": dice.choice([3, 4, 5]), "seam": dice.choice(["keep", "drop"])},
    "affinity": lambda dice: {"affinity": [dice.random() for _ in range(3)]},
    "condition frame": lambda dice: {"condition_frame": dice.randrange(3)},
    "end image": lambda dice: {"end_image": picture(dice.randrange(100))},
    "mask": lambda dice: {"mask_image": picture(dice.randrange(100)).convert("L")},
    "length": lambda dice: {"num_frames": dice.choice([1, 2, 3, 6])},
    "size": lambda dice: dict(zip(("width", "height"), dice.choice(SIZES), strict=True)),
    "latents": lambda dice: {"latents": normal(dice, 4, FRAMES, 8, 8), "width": 32, "height": 32},
    "embeddings": lambda dice: {"prompt_embeds": normal(dice, 9, 32), "negative_prompt_embeds": normal(dice, 9, 32)},
    "ip-adapter": lambda dice: {
        "ip_adapter_image": picture(dice.randrange(100)),
        "ip_adapter_scale": dice.choice([0.0, 0.5, 1.0]),
    },
    "ip-adapter embeddings": lambda dice: {"ip_adapter_image_embeds": normal(dice, dice.choice([1, 2]), 24)},
    "text layers": lambda dice: {"clip_skip": dice.choice([0, 1, 2])},
    "weighted text": lambda dice: {
        "prompt": dice.choice(["a (red:1.3) cat", "a [red] cat BREAK in the ((sea))"]),
        "prompt_syntax": "a1111",
    },
    "output": lambda dice: {"output_type": dice.choice(["np", "pt", "pil", "latent"])},
    "style": lambda dice: {"style": dice.choice(["other", "v-prediction"])},
    "lora": lambda dice: {"lora": dice.choice(["one", "one:0.5+two", "two:-0.7"])},
    "free init": lambda dice: {
        "free_init": dice.choice(["butterworth", "gaussian"]),
        "free_init_iters": 2,
        "free_init_fast_sampling": dice.choice(["on", "off"]),
        "free_init_order": dice.choice([2, 4]),
        "free_init_spatial_stop": 0.3,
        "free_init_temporal_stop": 0.2,
    },
    "free u": lambda dice: {"free_u": [0.9, 0.2, dice.choice([1.2, 1.5]), 1.6]},
    "windows": lambda dice: {
        "num_frames": 6,
        "context_frames": 4,
        "context_overlap": 2,
        "context_schedule": dice.choice(get_args(ContextSchedule)),
        "context_stride": dice.choice([1, 2]),
        "long_video": "windows",
        "noise": dice.choice(["shuffle", "repeat", "random"]),
    },
    "chain": lambda dice: {"num_frames": 6, "context_frames": 4, "long_video": "chain"},
    "preset": lambda dice: {
        "preset": dice.choice(["balanced", "fast"]),
        "scheduler": dice.choice(["ddim", "heun", "unipc"]),
        "guidance_scale": dice.choice([1.0, 4.0]),
        "num_inference_steps": dice.choice([9, 12]),
    },
    "lora scale": lambda dice: {"lora": "two", "lora_scale": dice.choice([0.0, 0.4])},
}

OUTSIDE: Final = frozenset({"prompt", "seed", "fps", "num_videos", *FinishKnobs.model_fields})
"""Knobs that every row below has anyway, or that never reach the engine."""


def picture(seed: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((40, 40), Image.Resampling.BICUBIC)


def normal(dice: random.Random, *shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(dice.randrange(2**32)).standard_normal(shape, dtype=np.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    root = tmp_path_factory.mktemp("model")
    folder = make_pipeline_folder(root / "pipeline", vae_factor=4)
    loras = {
        name: {"path": str(make_lora(Path(root / f"{name}.safetensors"), folder, seed=seed)), "weight": 0.0}
        for seed, name in enumerate(("one", "two"), 1)
    }
    adapter, encoder = make_ip_adapter(root / "ip-adapter", folder)
    return ModelConfig(
        name="tiny",
        base=str(folder),
        device="cpu",
        long_edge=32,
        size_step=16,
        loras=loras,
        ip_adapter=str(adapter),
        image_encoder=str(encoder),
    )


@pytest.fixture(scope="module")
def models(model: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """The model of each style: "other" has other weights, "v-prediction" also another kind of scheduler.

    Forwards of the default one are packed as those of a model that is compiled.
    """
    root = tmp_path_factory.mktemp("styles")
    folders = {
        "other": make_pipeline_folder(root / "other", vae_factor=4, seed=1),
        "v-prediction": make_pipeline_folder(root / "v", vae_factor=4, prediction_type="v_prediction", zero_snr=True),
    }
    configs = {style: model.model_copy(update={"base": str(folder)}) for style, folder in folders.items()}
    configs[str(KNOBS["style"].default)] = model
    made = {style: Model(assemble(resolve(config), config)) for style, config in configs.items()}
    packs = BackgroundCompilation(CompiledCode(mode="default", backend="eager"), patience=sys.maxsize)
    made[str(KNOBS["style"].default)].forward._compilation = packs
    return made


def draw_request(dice: random.Random, model: ModelConfig, kinds: list[str]) -> AnimationRequest:
    """A row of these kinds and, where they allow it, up to two more."""
    plain: dict[str, Any] = {
        "prompt": dice.choice(["a cat", "the sea at night"]),
        "num_frames": FRAMES,
        "num_inference_steps": 3,
        "seed": dice.randrange(2**64),
        "guidance_scale": 4.0,
    }
    others = dice.sample(sorted(KINDS), 2)
    while True:
        values = dict(plain)
        for kind in [*others, *kinds]:
            values.update(KINDS[kind](dice))
        knobs = {name: value for name, value in values.items() if name in KNOBS and name not in FIELDS}
        own = {name: value for name, value in values.items() if name in FIELDS}
        try:
            request = AnimationRequest(picture(dice.randrange(100)), AnimationParams(**knobs), id="row", **own)
            return prepare(request, model)
        except BadParameter:  # kinds that cannot go together
            others = others[:-1]


FIELDS: Final = frozenset(field.name for field in fields(AnimationRequest)) - {"image", "params"}


def pixels(animation: Animation) -> np.ndarray[Any, Any]:
    """Frames, or latents where the row asks for them, in levels of 255."""
    if animation.frames.size:
        return animation.frames.astype(float)
    return np.asarray(animation.output) * 20  # latents are a few units wide


def assert_same(together: Animation, alone: Animation, what: str) -> None:
    ours, theirs = pixels(together), pixels(alone)
    assert ours.shape == theirs.shape, what
    assert np.abs(ours - theirs).max() <= 1, what
    assert together.motion == pytest.approx(alone.motion, abs=0.02), what


def single_run(models: dict[str, Model], request: AnimationRequest) -> Animation | BadParameter:
    engine = Engine(batch_size=1)
    try:
        engine.join(request, models[request.params.style])
    except BadParameter as error:
        return error
    while True:
        for _, outcome in engine.step():
            assert isinstance(outcome, Animation), outcome
            return outcome


def test_every_knob_that_reaches_the_engine_is_in_some_kind_of_row() -> None:
    dice = random.Random(0)
    mixed = {name for kind in KINDS.values() for name in kind(dice)}
    missing = set(KNOBS) - mixed - OUTSIDE
    assert missing == set()


@pytest.mark.parametrize(
    "seed",
    [0, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(1, 9))],
)
def test_rows_of_all_kinds_that_join_and_leave_at_random_steps_equal_their_single_runs(
    seed: int, models: dict[str, Model], model: ModelConfig
) -> None:
    dice = random.Random(seed)
    kinds = dice.sample(sorted(KINDS), len(KINDS))
    requests = [draw_request(dice, model, [kind]) for kind in kinds]
    expected = [single_run(models, request) for request in requests]
    assert sum(isinstance(outcome, Animation) for outcome in expected) > 0.7 * len(KINDS)
    engine, waiting = Engine(batch_size=6), list(range(len(requests)))
    number: dict[Row, int] = {}
    ended: set[int] = set()
    while waiting or engine.rows:
        while waiting and len(engine.rows) < 6 and (not engine.rows or dice.random() < 0.5):
            index = waiting.pop(0)
            if isinstance(expected[index], BadParameter):  # kinds that cannot go together
                with pytest.raises(BadParameter):
                    engine.join(requests[index], models[requests[index].params.style])
                ended.add(index)
            else:
                number[engine.join(requests[index], models[requests[index].params.style])] = index
        if engine.rows and dice.random() < 0.05:
            leaver = dice.choice(engine.rows)
            engine.leave(leaver)
            ended.add(number[leaver])
        for row, outcome in engine.step():
            index = number[row]
            alone = expected[index]
            assert isinstance(outcome, Animation), (kinds[index], outcome)
            assert isinstance(alone, Animation)
            assert_same(outcome, alone, f"{kinds[index]}: {row.request.params}")
            ended.add(index)
    assert len(ended) == len(requests)
