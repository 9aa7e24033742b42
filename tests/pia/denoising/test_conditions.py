"""Motion and guidance: affinity lists, condition frames, keyframes, masks, seams and guidance by the picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from pia_ray import manifest
from pia_ray.animation import Animation
from pia_ray.catalog.workload import evaluations
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.knobs import AnimationParams
from pia_ray.config.model import ModelConfig, build
from pia_ray.config.resolving import parse_params, resolve
from pia_ray.errors import BadParameter, RowError
from pia_ray.pia.components import Components
from pia_ray.pia.denoising.affinity import TABLES, affinity, keyframe_affinity, nearest_keyframe
from pia_ray.pia.engine import Engine
from pia_ray.pia.loading.load import assemble
from pia_ray.prepare import prepare
from pia_ray.testing import make_pipeline_folder
from pia_ray.types import AnimationRequest
from pia_ray.weights import resolve as resolve_weights

SIZE, FRAMES = 32, 5
LATENT = SIZE // 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = make_pipeline_folder(tmp_path_factory.mktemp("model"), vae_factor=4)
    return ModelConfig(name="tiny", base=str(folder), device="cpu", long_edge=SIZE, size_step=16)


@pytest.fixture(scope="module")
def components(model: ModelConfig) -> Components:
    return assemble(resolve_weights(model), model)


def picture(seed: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def half_mask() -> Image.Image:
    """The left half may move."""
    values = np.zeros((SIZE, SIZE), dtype=np.uint8)
    values[:, : SIZE // 2] = 255
    return Image.fromarray(values)


def plain(level: int) -> Image.Image:
    return Image.new("L", (SIZE, SIZE), level)


def ask(
    model: ModelConfig,
    seed: int = 0,
    *,
    end_image: Image.Image | None = None,
    mask_image: Image.Image | None = None,
    **knobs: Any,
) -> AnimationRequest:
    knobs = {
        "prompt": "a red cat",
        "negative_prompt": "dark",
        "num_frames": FRAMES,
        "num_inference_steps": 2,
        "seed": seed,
        "width": SIZE,
        "height": SIZE,
        **knobs,
    }
    params = AnimationParams(**knobs)
    return prepare(
        AnimationRequest(picture(seed), params, id=f"row-{seed}", end_image=end_image, mask_image=mask_image), model
    )


def run(components: Components, requests: list[AnimationRequest]) -> list[Animation]:
    engine = Engine(components, batch_size=len(requests))
    rows = [engine.join(request) for request in requests]
    outcomes: dict[Any, Animation | RowError] = {}
    while engine.rows:
        outcomes.update(engine.step())
    animations = []
    for row in rows:
        outcome = outcomes[row]
        assert isinstance(outcome, Animation), outcome
        animations.append(outcome)
    return animations


def frames_of(components: Components, request: AnimationRequest) -> np.ndarray[Any, Any]:
    return run(components, [request])[0].frames


def off_by(ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any]) -> int:
    assert ours.shape == theirs.shape
    return int(np.abs(ours.astype(int) - theirs.astype(int)).max())


Combine = Callable[[Callable[[str, bool], torch.Tensor]], torch.Tensor]


@torch.inference_mode()
def by_hand(
    components: Components, request: AnimationRequest, mask: torch.Tensor, combine: Combine
) -> np.ndarray[Any, Any]:
    """The request on the bare UNet with DDIM: `mask` is [T, h, w], `combine` makes a prediction out of sides, each a
    text and whether it sees the picture."""
    params = request.params
    generator = torch.Generator().manual_seed(params.seed or 0)
    shape = (1, 4, params.num_frames, LATENT, LATENT)
    latents = torch.randn(shape, generator=generator)
    conditions = []
    for image in (request.image, request.end_image):
        if image is not None:
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
            posterior = components.vae.encode(pixels).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator)
            conditions.append((posterior.mean + posterior.std * noise) * components.latent_scale)  # [1, 4, h, w]
    # With a second keyframe the nearer one is shown; two as near: the first.
    nearest = [
        min(range(len(conditions)), key=lambda n: abs(frame - [params.condition_frame, params.num_frames - 1][n]))
        for frame in range(params.num_frames)
    ]
    condition = torch.stack([conditions[n] for n in nearest], dim=2)  # [1, 4, T, h, w]
    if params.strength < 1:
        latents = torch.randn(shape, generator=generator)
    scheduler = DDIMScheduler(
        beta_schedule="linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        steps_offset=1,
        set_alpha_to_one=False,
    )
    scheduler.set_timesteps(params.num_inference_steps)
    steps = max(1, int(params.num_inference_steps * params.strength))
    timesteps = scheduler.timesteps[-steps:]
    if params.strength < 1:
        latents = scheduler.add_noise(condition, latents, timesteps[:1])
    for timestep in timesteps:

        def predict(text: str, with_picture: bool, latents: torch.Tensor = latents, at: Any = timestep) -> torch.Tensor:
            tokens = components.tokenizer(
                text, padding="max_length", max_length=components.tokenizer.model_max_length, return_tensors="pt"
            ).input_ids
            embedding = components.text_encoder(tokens).last_hidden_state.repeat_interleave(params.num_frames, dim=0)
            shown = torch.cat([mask[None, None], condition], dim=1) * float(with_picture)
            sample = torch.cat([latents, shown], dim=1)
            return components.unet(sample, at, encoder_hidden_states=embedding, return_dict=False)[0]

        latents = scheduler.step(combine(predict), timestep, latents).prev_sample
    frames = components.vae.decode(latents[0].permute(1, 0, 2, 3) / components.latent_scale, return_dict=False)[0]
    return ((frames / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def spread(coefficients: Any) -> torch.Tensor:
    return torch.tensor(coefficients).view(-1, 1, 1).expand(-1, LATENT, LATENT).clone()


def by_prompt(predict: Callable[[str, bool], torch.Tensor]) -> torch.Tensor:
    """Guidance 7.5 by the prompt alone."""
    negative, positive = predict("dark", True), predict("a red cat", True)
    return negative + 7.5 * (positive - negative)


# Affinity.


@pytest.mark.parametrize("frame", [0, 1, 7, 15])
@pytest.mark.parametrize("motion_scale", [0, 1, 2, 6, 7, 8])
def test_affinity_goes_by_the_distance_from_the_condition_frame(motion_scale: int, frame: int) -> None:
    table = TABLES[motion_scale]
    padded = [*table, *[table[-1]] * 16]
    expected = tuple(padded[abs(f - frame)] for f in range(16))
    assert affinity(motion_scale, 16, condition_frame=frame) == expected


def test_a_list_of_coefficients_takes_the_place_of_the_table_and_its_last_value_goes_on() -> None:
    assert affinity(5, 6, condition_frame=2, coefficients=(1.0, 0.4)) == (0.4, 0.4, 1.0, 0.4, 0.4, 0.4)


@pytest.mark.parametrize("num_frames", [2, 3, 8, 9, 16, 17])
def test_between_two_keyframes_affinity_falls_and_rises_as_in_the_original(num_frames: int) -> None:
    # The original mixes the two linear curves by the difference of both, brought to the range asked for.
    low, high, last = 0.2, 1.0, num_frames - 1
    step = (high - low) / last
    mixed = [abs((1 - step * (last - f)) - (1 - step * f)) for f in range(num_frames)]
    bottom, top = min(mixed), max(mixed)
    expected = [low + (high - low) * ((m - bottom) / (top - bottom) if top > bottom else 1.0) for m in mixed]
    ours = keyframe_affinity(0, num_frames, keyframes=(0, last), coefficients=(low, high))
    assert ours == pytest.approx(expected)


def test_each_frame_shows_its_nearest_keyframe_and_the_earlier_of_two_as_near() -> None:
    assert nearest_keyframe(6, (0, 5)) == (0, 0, 0, 1, 1, 1)
    assert nearest_keyframe(5, (0, 4)) == (0, 0, 0, 1, 1)
    assert nearest_keyframe(6, (3, 5)) == (0, 0, 0, 0, 0, 1)


@pytest.mark.parametrize("num_frames", [2, 5, 8, 24, 32])
@pytest.mark.parametrize("motion_scale", [3, 4, 5])
def test_a_loop_of_any_length_starts_and_ends_on_the_picture(motion_scale: int, num_frames: int) -> None:
    curve = affinity(motion_scale, num_frames)
    assert len(curve) == num_frames
    assert curve[0] == curve[-1] == 1
    assert affinity(motion_scale, 16) == TABLES[motion_scale]


# Through the engine.


@pytest.mark.parametrize(
    ("knobs", "coefficients"),
    [
        ({"affinity": [1, 0.9, 0.3]}, [1, 0.9, 0.3, 0.3, 0.3]),
        ({"affinity": "1, .9, .3", "condition_frame": 3}, [0.3, 0.3, 0.9, 1, 0.9]),
        ({"motion_scale": 2, "condition_frame": 2}, [0.7, 0.8, 1, 0.8, 0.7]),
        ({"motion_scale": 8, "strength": 0.6, "num_inference_steps": 5}, [0.5, 0.2, 0.2, 0.2, 0.2]),
    ],
    ids=str,
)
def test_frames_equal_the_bare_unet_with_that_affinity(
    knobs: dict[str, Any], coefficients: list[float], components: Components, model: ModelConfig
) -> None:
    request = ask(model, seed=3, **knobs)
    expected = by_hand(components, request, spread(coefficients), by_prompt)
    assert off_by(frames_of(components, request), expected) <= 1


@pytest.mark.parametrize("knobs", [{}, {"strength": 0.6, "num_inference_steps": 5}], ids=str)
def test_two_keyframes_show_each_frame_the_nearer_picture(
    knobs: dict[str, Any], components: Components, model: ModelConfig
) -> None:
    request = ask(model, seed=4, end_image=picture(9), motion_scale=2, **knobs)
    expected = by_hand(components, request, spread([1.0, 0.75, 0.5, 0.75, 1.0]), by_prompt)
    assert off_by(frames_of(components, request), expected) <= 1
    assert off_by(frames_of(components, ask(model, seed=4, motion_scale=2, **knobs)), expected) > 5


def test_a_mask_keeps_its_black_region_as_the_picture(components: Components, model: ModelConfig) -> None:
    request = ask(model, seed=5, mask_image=half_mask(), motion_scale=2)
    mask = spread([1, 0.8, 0.7, 0.7, 0.7])
    mask[:, :, LATENT // 2 :] = 1
    assert off_by(frames_of(components, request), by_hand(components, request, mask, by_prompt)) <= 1


@pytest.mark.parametrize("motion_scale", [2, 8])
def test_a_white_mask_changes_nothing_and_a_black_one_keeps_every_frame(
    motion_scale: int, components: Components, model: ModelConfig
) -> None:
    def frames(**how: Any) -> np.ndarray[Any, Any]:
        return frames_of(components, ask(model, seed=6, motion_scale=motion_scale, **how))

    white = frames(mask_image=plain(255))
    assert np.array_equal(white, frames())
    black = frames(mask_image=plain(0))
    assert np.array_equal(black, frames(affinity=[1]))
    assert off_by(white, black) > 1


@pytest.mark.parametrize(
    ("guidance_scale", "image_guidance_scale", "combine"),
    [
        (
            6.0,
            1.8,
            lambda e: (
                e("dark", False)
                + 1.8 * (e("dark", True) - e("dark", False))
                + 6.0 * (e("a red cat", True) - e("dark", True))
            ),
        ),
        (1.0, 2.5, lambda e: e("a red cat", False) + 2.5 * (e("a red cat", True) - e("a red cat", False))),
        (6.0, 0.0, lambda e: e("dark", False) + 6.0 * (e("a red cat", False) - e("dark", False))),
        (0.0, 0.0, lambda e: e("a red cat", False)),
        (6.0, 1.0, lambda e: e("dark", True) + 6.0 * (e("a red cat", True) - e("dark", True))),
    ],
    ids=["both", "picture", "image-free", "image-free without guidance", "prompt"],
)
def test_image_guidance_is_the_arithmetic_of_its_three_sides(
    guidance_scale: float, image_guidance_scale: float, combine: Combine, components: Components, model: ModelConfig
) -> None:
    request = ask(model, seed=7, guidance_scale=guidance_scale, image_guidance_scale=image_guidance_scale)
    expected = by_hand(components, request, spread([1, 0.9, 0.85, 0.85, 0.85]), combine)
    assert off_by(frames_of(components, request), expected) <= 1


def test_rows_with_one_two_and_three_sides_equal_their_single_runs(components: Components, model: ModelConfig) -> None:
    requests = [
        ask(model, seed=1, image_guidance_scale=1.8),
        ask(model, seed=2, guidance_scale=1.0),
        ask(model, seed=3),
        ask(model, seed=4, image_guidance_scale=2.0, guidance_scale=0.0),
        ask(model, seed=5, image_guidance_scale=0.0),
        ask(model, seed=6, mask_image=half_mask(), affinity=[1, 0.2]),
        ask(model, seed=7, end_image=picture(3), condition_frame=1),
    ]
    for request, animation in zip(requests, run(components, requests), strict=True):
        assert off_by(animation.frames, frames_of(components, request)) <= 1, request.params


@pytest.mark.parametrize("knobs", [{"motion_scale": 5}, {"affinity": [1, 0.8, 0.6, 0.8, 1]}], ids=str)
def test_dropping_the_seam_leaves_out_the_last_frame_only(
    knobs: dict[str, Any], components: Components, model: ModelConfig
) -> None:
    kept = frames_of(components, ask(model, seed=8, **knobs))
    request = ask(model, seed=8, seam="drop", **knobs)
    dropped = frames_of(components, request)
    assert len(dropped) == request.params.video_frames == FRAMES - 1
    assert off_by(dropped, kept[:-1]) <= 1


@pytest.mark.parametrize("guidance_scale", [0.0, 7.5])
@pytest.mark.parametrize("image_guidance_scale", [0.0, 0.5, 1.0, 3.0])
def test_the_estimate_counts_the_evaluations_of_every_side(
    guidance_scale: float, image_guidance_scale: float, components: Components, model: ModelConfig
) -> None:
    request = ask(model, guidance_scale=guidance_scale, image_guidance_scale=image_guidance_scale)
    engine = Engine(components, batch_size=1)
    row, count = engine.join(request), 0
    while engine.rows:
        count += len(row.evaluation.branches)
        engine.step()
    assert evaluations(request.params) == count


# What is refused.


@pytest.mark.parametrize(
    ("knobs", "text"),
    [
        ({"affinity": []}, "affinity must be 1 to 64 numbers from 0 to 1"),
        ({"affinity": [1, 1.5]}, "affinity must be 1 to 64 numbers"),
        ({"affinity": [10**400]}, "affinity must be 1 to 64 numbers"),
        ({"affinity": [1, None]}, "affinity must be 1 to 64 numbers"),
        ({"affinity": [True]}, "affinity must be 1 to 64 numbers"),
        ({"affinity": [float("nan")]}, "affinity must be 1 to 64 numbers"),
        ({"affinity": "1;2"}, "affinity must be 1 to 64 numbers"),
        ({"affinity": [0.5] * 65}, "affinity must be 1 to 64 numbers"),
        ({"condition_frame": 16}, "condition_frame must be 0 to 15 for a video of 16 frames"),
        ({"condition_frame": -1}, "condition_frame must be a whole number from 0 to 255"),
        (
            {"condition_frame": 3, "motion_scale": "loop-small"},
            "condition_frame must be 0 with motion_scale loop-small",
        ),
        ({"seam": "drop"}, "seam must be keep here"),
        ({"seam": "drop", "affinity": "1,.5"}, "seam must be keep here"),
        ({"seam": "drop", "motion_scale": 3, "num_frames": 1}, "seam must be keep here"),
        ({"seam": "away"}, "seam must be one of keep, drop"),
        ({"image_guidance_scale": -1}, "image_guidance_scale must be 0 to 50"),
        ({"end_image": "b.png", "motion_scale": 4}, "motion_scale must not be a loop's with an end_image"),
        ({"end_image": "b.png", "condition_frame": 15}, "condition_frame must be before the last frame"),
        ({"end_image": "b.png", "seam": "drop", "affinity": [1]}, "seam must be keep with an end_image"),
        ({"mask_image": "m.png", "image_guidance_scale": 0}, "image_guidance_scale must be above 0 with a mask_image"),
    ],
    ids=str,
)
def test_knobs_that_cannot_be_are_refused_when_they_are_read(knobs: dict[str, Any], text: str) -> None:
    with pytest.raises(BadParameter, match=text):
        resolve(parse_params({"prompt": "p", **knobs}), {}, model_defaults={})


def test_a_loaded_end_image_is_held_to_the_same_rules(model: ModelConfig) -> None:
    with pytest.raises(BadParameter, match="before the last frame"):
        ask(model, end_image=picture(1), condition_frame=FRAMES - 1)
    with pytest.raises(BadParameter, match="above 0 with a mask_image"):
        ask(model, mask_image=half_mask(), image_guidance_scale=0)


# From a manifest.


def planned(path: Path, **settings: Any) -> list[Any]:
    config = build(CatalogConfig, {"manifest": str(path), "output": "/nowhere", "model": "demo", **settings})
    opened = manifest.open_manifest(config)
    items = [item for table in manifest.plan(opened, config, model_version="v1") for item in table.to_pylist()]
    return [item["error_message"] or manifest.row_from_item(item) for item in items]


def test_coefficients_mean_the_same_as_csv_text_json_lists_and_parquet_lists(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text('id,image,prompt,affinity\na,x.png,p,"1, .9, .85"\nb,x.png,p,0.5\nc,x.png,p,\n')
    (tmp_path / "m.jsonl").write_text(
        '{"id": "a", "image": "x.png", "prompt": "p", "affinity": [1, 0.9, 0.85]}\n'
        '{"id": "b", "image": "x.png", "prompt": "p", "affinity": 0.5}\n'
        '{"id": "c", "image": "x.png", "prompt": "p"}\n'
    )
    columns = {"id": ["a", "b", "c"], "image": ["x.png"] * 3, "prompt": ["p"] * 3}
    lists = pa.array([[1, 0.9, 0.85], [0.5], None], pa.list_(pa.float64()))
    pq.write_table(pa.table({**columns, "affinity": lists}), tmp_path / "m.parquet")
    plans = [planned(tmp_path / name) for name in ("m.csv", "m.jsonl", "m.parquet")]
    assert [row.params.affinity for row in plans[0]] == [(1, 0.9, 0.85), (0.5,), None]
    keys = [[row.work_key for row in plan] for plan in plans]
    assert keys[0] == keys[1] == keys[2]
    assert len(set(keys[0])) == 3


def test_a_row_whose_knobs_do_not_go_together_with_the_runs_is_rejected_alone(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("id,image,prompt,motion_scale\na,x.png,p,3\nb,x.png,p,0\n")
    good, bad = planned(tmp_path / "m.csv", defaults={"seam": "drop"})
    assert good.params.video_frames == good.params.num_frames - 1
    assert "row 2 of m.csv: seam must be keep" in bad
