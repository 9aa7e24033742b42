"""IP-Adapter: rows with and without a picture against diffusers' PIAPipeline and against their single runs."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pia_ray import read_results, storage
from pia_ray.animation import Animation
from pia_ray.catalog.local import run_local
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.knobs import AnimationParams
from pia_ray.config.model import ModelConfig, build
from pia_ray.errors import BadParameter, RowError, WeightsError
from pia_ray.pia.animator import Animator
from pia_ray.testing import make_ip_adapter, make_pipeline_folder
from pia_ray.types import AnimationRequest
from tests.videos import decode_frames

SIZE = 32
KINDS = ("plain", "plus", "full")
Kind = Literal["plain", "plus", "full"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline_folder(tmp_path_factory.mktemp("base") / "pipeline", vae_factor=4)


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    root = tmp_path_factory.mktemp("adapters")
    return {kind: make_ip_adapter(root / kind, base, kind=kind) for kind in KINDS}


def model_of(base: Path, adapter: tuple[Path, Path | None] | None = None, **settings: Any) -> ModelConfig:
    if adapter is not None:
        settings["ip_adapter"] = str(adapter[0])
        settings["image_encoder"] = None if adapter[1] is None else str(adapter[1])
    return ModelConfig(name="tiny", base=str(base), device="cpu", long_edge=SIZE, size_step=16, **settings)


@pytest.fixture(scope="module")
def animator(base: Path, adapters: dict[str, tuple[Path, Path]]):
    with Animator(model_of(base, adapters["plain"]), batch_size=8) as opened:
        yield opened


@pytest.fixture(scope="module")
def plain(base: Path):
    with Animator(model_of(base)) as opened:
        yield opened


def picture(seed: int, size: tuple[int, int] = (SIZE, SIZE)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


def ask(
    seed: int = 0,
    reference: Image.Image | np.ndarray | None = None,
    *,
    embeds: np.ndarray | None = None,
    **knobs: Any,
) -> AnimationRequest:
    knobs = {
        "prompt": "a red cat",
        "negative_prompt": "dark",
        "num_frames": 4,
        "num_inference_steps": 3,
        "seed": seed,
        "width": SIZE,
        "height": SIZE,
        **knobs,
    }
    request = AnimationRequest(picture(seed), AnimationParams(**knobs), id=f"row-{seed}")
    return replace(request, ip_adapter_image=reference, ip_adapter_image_embeds=embeds)


def animate(animator: Animator, *requests: AnimationRequest) -> list[np.ndarray]:
    frames = []
    for outcome in animator.animate(requests):
        assert isinstance(outcome, Animation), outcome
        frames.append(outcome.frames)
    return frames


def refused(animator: Animator, request: AnimationRequest) -> RowError:
    (outcome,) = animator.animate([request])
    assert isinstance(outcome, BadParameter), outcome
    return outcome


@cache
def pipeline(base: Path, adapter: tuple[Path, Path]) -> Any:
    """diffusers' PIAPipeline with the adapter loaded by its own loader."""
    from diffusers import DDIMScheduler, PIAPipeline
    from transformers import CLIPVisionModelWithProjection
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    path, encoder = adapter
    pipe = PIAPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    betas = {"beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **betas)
    pipe.register_modules(
        image_encoder=CLIPVisionModelWithProjection.from_pretrained(encoder),
        # As the loader would make it for this encoder; it must not depend on torchvision being here.
        feature_extractor=CLIPImageProcessorPil(size=30, crop_size=30),
    )
    pipe.load_ip_adapter(str(path.parent), subfolder="", weight_name=path.name, image_encoder_folder=None)
    return pipe


def reference(
    base: Path,
    adapter: tuple[Path, Path],
    request: AnimationRequest,
    *,
    embeds: torch.Tensor | None = None,
) -> np.ndarray:
    """The same request through diffusers."""
    params = request.params
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the pipeline is deprecated upstream, its arithmetic is not
        pipe = pipeline(base, adapter)
        pipe.set_ip_adapter_scale(params.ip_adapter_scale)
        result = pipe(
            image=request.image,
            prompt=params.prompt,
            negative_prompt=params.negative_prompt,
            num_frames=params.num_frames,
            width=params.width,
            height=params.height,
            num_inference_steps=params.num_inference_steps,
            guidance_scale=params.guidance_scale,
            motion_scale=params.motion_scale,
            generator=torch.Generator("cpu").manual_seed(params.seed),
            output_type="np",
            **({"ip_adapter_image": request.ip_adapter_image} if embeds is None else {}),
            **({} if embeds is None else {"ip_adapter_image_embeds": [embeds]}),
        )
    return (result.frames[0] * 255).round().astype(np.uint8)


def assert_same(ours: np.ndarray, theirs: np.ndarray, *, mean: float = 0.02, most: int = 1) -> None:
    assert ours.shape == theirs.shape
    difference = np.abs(ours.astype(int) - theirs.astype(int))
    assert difference.max() <= most, f"off by up to {difference.max()} levels of 255"
    assert difference.mean() <= mean, f"off by {difference.mean():.4f} levels on average"


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(int) - other.astype(int)).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_frames_of_a_picture_and_of_embeddings_equal_those_of_diffusers(
    kind: Kind, base: Path, adapters: dict[str, tuple[Path, Path]]
) -> None:
    choices: tuple[dict[str, Any], ...] = ({}, {"ip_adapter_scale": 0.6}, {"guidance_scale": 1.0})
    # A wide picture, so that the square cut for the image encoder counts.
    requests = [ask(3, picture(9, (50, 37)), **{"guidance_scale": 5.0, **knobs}) for knobs in choices]
    width, patches = (24, ()) if kind == "plain" else (16, (10,))
    embeds = np.random.default_rng(5).standard_normal((2, 2, *patches, width)).astype(np.float32)
    of_embeds = ask(4, embeds=embeds, guidance_scale=4.0)  # in diffusers' layout
    with Animator(model_of(base, adapters[kind])) as animator:
        *made, from_embeds = [animate(animator, request)[0] for request in (*requests, of_embeds)]
    for request, ours in zip(requests, made, strict=True):
        assert_same(ours, reference(base, adapters[kind], request))
    assert_same(from_embeds, reference(base, adapters[kind], of_embeds, embeds=torch.from_numpy(embeds)))


def mixed_requests() -> list[AnimationRequest]:
    embeds = np.random.default_rng(1).standard_normal((3, 24)).astype(np.float32)
    return [
        ask(1),
        ask(2, picture(20)),
        ask(3, picture(21), ip_adapter_scale=0.4, guidance_scale=3.0),
        ask(4, picture(20), guidance_scale=1.0, scheduler="euler"),
        ask(5, embeds=embeds[0], ip_adapter_scale=1.7),
        ask(6, embeds=embeds, num_inference_steps=2),  # three pictures: thrice the tokens
        ask(7, guidance_scale=1.0),
        ask(8, picture(22), num_frames=3),
        ask(9, picture(23), image_guidance_scale=2.0, guidance_scale=4.0),  # three sides
    ]


def test_rows_with_and_without_pictures_equal_their_single_runs(animator: Animator) -> None:
    requests = mixed_requests()
    together = animate(animator, *requests)
    for request, frames in zip(requests, together, strict=True):
        (alone,) = animate(animator, request)
        assert_same(frames, alone)


def test_a_row_without_a_picture_equals_the_plain_model_bit_for_bit(animator: Animator, plain: Animator) -> None:
    # One at a time: in which forward two rows meet depends on when the second arrives.
    (expected,) = animate(plain, ask(1))
    for request in (ask(1), ask(1, picture(20), ip_adapter_scale=0)):
        (frames,) = animate(animator, request)
        assert np.array_equal(frames, expected)


def test_a_row_without_a_picture_beside_one_with_equals_the_plain_model(animator: Animator, plain: Animator) -> None:
    (expected,) = animate(plain, ask(1))
    frames, _ = animate(animator, ask(1), ask(2, picture(20)))
    assert_same(frames, expected)


def test_another_picture_or_scale_gives_another_video(animator: Animator) -> None:
    without, first, other, fainter = animate(
        animator, ask(1), ask(1, picture(20)), ask(1, picture(21)), ask(1, picture(20), ip_adapter_scale=0.5)
    )
    for one, two in ((without, first), (first, other), (first, fainter), (without, fainter)):
        assert distance(one, two) > 0.5


def test_pictures_of_any_mode_and_arrays_do(animator: Animator) -> None:
    grey = picture(20).convert("L")
    from_grey, from_rgb, from_array = animate(
        animator, ask(1, grey), ask(1, grey.convert("RGB")), ask(1, np.asarray(grey))
    )
    assert_same(from_grey, from_rgb)
    assert_same(from_array, from_rgb)


def test_a_manifests_pictures_and_scales_reach_the_adapter(
    tmp_path: Path, base: Path, adapters: dict[str, tuple[Path, Path]], animator: Animator
) -> None:
    rows = [("a", "look.png", ""), ("b", "look.png", 2.0), ("c", "", "")]
    picture(0).save(tmp_path / "a.png")
    picture(20).save(tmp_path / "look.png")
    lines = [f"{name},a.png,a red cat,{reference},{scale}" for name, reference, scale in rows]
    manifest = tmp_path / "rows.csv"
    manifest.write_text("\n".join(["id,image,prompt,ip_adapter_image,ip_adapter_scale", *lines]))
    defaults = {name: value for name, value in ask().params.model_dump(exclude_unset=True).items() if name != "prompt"}
    values = {"manifest": str(manifest), "output": str(tmp_path / "out"), "format": "webp", "defaults": defaults}
    config = build(CatalogConfig, {**values, "model": model_of(base, adapters["plain"]).model_dump()})
    run_local(config, animator=animator)
    videos = []
    for row, (_, reference, scale) in zip(read_results(config.output).to_pylist(), rows, strict=True):
        request = ask(0, picture(20) if reference else None, ip_adapter_scale=scale or 1.0)
        (expected,) = animator.animate([request])
        assert isinstance(expected, Animation)
        expected.save(tmp_path / "expected.webp")
        videos.append(decode_frames(storage.read_bytes(row["video_uri"])))
        # A last bit of a float may differ, and the lossy format makes more of it.
        assert distance(videos[-1], decode_frames(tmp_path / "expected.webp")) < 3
    assert all(distance(one, other) > 10 for one, other in combinations(videos, 2))


def test_a_pictures_own_embedding_gives_the_pictures_video(animator: Animator, adapters: Any) -> None:
    from transformers import CLIPVisionModelWithProjection
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    encoder = CLIPVisionModelWithProjection.from_pretrained(adapters["plain"][1])
    pixels = CLIPImageProcessorPil(size=30, crop_size=30)(picture(20), return_tensors="pt").pixel_values
    with torch.inference_mode():
        embeds = encoder(pixels).image_embeds[0].numpy()
    shown, embedded, nested = animate(
        animator, ask(1, picture(20)), ask(1, embeds=embeds), ask(1, embeds=embeds[None, None])
    )
    assert_same(embedded, shown)
    assert_same(nested, shown)


def test_half_precision_stays_near(base: Path, adapters: dict[str, tuple[Path, Path]], animator: Animator) -> None:
    request = ask(3, picture(9), guidance_scale=2.0)
    (expected,) = animate(animator, request)
    with Animator(model_of(base, adapters["plain"], dtype="bfloat16")) as half:
        (frames,) = animate(half, request)
    assert_same(frames, expected, mean=4.0, most=40)


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_offloaded_weights_give_the_same_videos(
    offload: str, base: Path, adapters: dict[str, tuple[Path, Path]], animator: Animator
) -> None:
    request = ask(3, picture(9), guidance_scale=2.0)
    (expected,) = animate(animator, request)
    with Animator(model_of(base, adapters["plain"], offload=offload)) as offloaded:
        (frames,) = animate(offloaded, request)
    assert_same(frames, expected)


def test_a_picture_for_a_model_without_ip_adapter_is_refused_naming_the_field(plain: Animator) -> None:
    error = refused(plain, ask(1, picture(20)))
    assert error.field == "ip_adapter_image"
    assert "needs a model with an ip_adapter" in error.message
    assert refused(plain, ask(1, embeds=np.zeros(24, np.float32))).field == "ip_adapter_image_embeds"


def test_a_picture_for_a_model_without_image_encoder_is_refused_and_embeds_are_taken(
    base: Path, adapters: dict[str, tuple[Path, Path]], animator: Animator
) -> None:
    embeds = np.random.default_rng(1).standard_normal(24).astype(np.float32)
    with Animator(model_of(base, (adapters["plain"][0], None))) as lean:
        assert "image_encoder" in refused(lean, ask(1, picture(20))).message
        assert_same(*animate(lean, ask(1, embeds=embeds)), *animate(animator, ask(1, embeds=embeds)))
    patches = np.random.default_rng(1).standard_normal((10, 16)).astype(np.float32)
    with Animator(model_of(base, (adapters["plus"][0], None))) as lean:
        assert "negative" in refused(lean, ask(1, embeds=patches)).message
        animate(lean, ask(1, embeds=np.stack([patches, patches])[:, None]))


@pytest.mark.parametrize(
    ("embeds", "text"),
    [
        (np.zeros((7,), np.float32), "must be [24], [pictures x 24] or [2 x pictures x 24]"),
        (np.zeros((3, 1, 24), np.float32), "(got [3, 1, 24])"),
        (np.zeros((1, 1, 1, 24), np.float32), "(got [1, 1, 1, 24])"),
        (np.full((24,), np.nan, np.float32), "NaN"),
    ],
    ids=("width", "sides", "axes", "nan"),
)
def test_unusable_embeds_are_refused_with_the_shape_wanted(embeds: np.ndarray, text: str, animator: Animator) -> None:
    error = refused(animator, ask(1, embeds=embeds))
    assert error.field == "ip_adapter_image_embeds"
    assert text in error.message


def test_a_picture_and_embeds_at_once_are_refused(animator: Animator) -> None:
    request = ask(1, picture(20), embeds=np.zeros(24, np.float32))
    assert "not both" in refused(animator, request).message


def refusal(config: ModelConfig) -> str:
    with pytest.raises(WeightsError) as caught:
        Animator(config)
    return caught.value.message


def test_an_adapter_of_another_model_or_kind_is_refused(
    base: Path, adapters: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    path, encoder = adapters["plain"]
    weights = load_file(path)

    def refusal_of(changed: dict[str, torch.Tensor]) -> str:
        save_file(changed, tmp_path / "changed.safetensors")
        return refusal(model_of(base, (tmp_path / "changed.safetensors", encoder)))

    fewer = {name: weight for name, weight in weights.items() if not name.startswith("ip_adapter.1.")}
    assert "for another model" in refusal_of(fewer)
    more = {f"ip_adapter.99.{layer}.weight": torch.zeros(2, 2) for layer in ("to_k_ip", "to_v_ip")}
    assert "for another model" in refusal_of({**weights, **more})
    assert "for another model" in refusal_of({**weights, "ip_adapter.1.to_k_ip.weight": torch.zeros(16, 48)})
    assert "not an IP-Adapter" in refusal_of({"lora_unet.weight": torch.zeros(2)})
    assert "face" in refusal_of(
        {
            **fewer,
            "image_proj.norm.weight": torch.zeros(2),
            "image_proj.proj.0.weight": more["ip_adapter.99.to_k_ip.weight"],
        }
    )
    projection = {"image_proj.latents": torch.zeros(1, 4, 8)}
    assert "no known layout" in refusal_of(
        {**{name: weight for name, weight in weights.items() if "image_proj" not in name}, **projection}
    )


def test_an_image_encoder_of_another_width_is_refused(
    base: Path, adapters: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, projection_dim=20, num_hidden_layers=1, num_attention_heads=2,
        image_size=30, patch_size=10,
    )  # fmt: skip
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "narrow")
    message = refusal(model_of(base, (adapters["plain"][0], tmp_path / "narrow")))
    assert "24 wide, and those of image_encoder are 20 wide" in message
