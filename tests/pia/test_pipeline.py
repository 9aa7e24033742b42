"""`pia_ray.PIAPipeline` against diffusers' own: its documented examples, every argument, and the methods."""

from __future__ import annotations

import gc
import inspect
import re
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMParallelScheduler, EulerDiscreteScheduler, MotionAdapter
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

import pia_ray
from pia_ray.errors import BadParameter, ConfigError, PiaRayError, UnexpectedError
from pia_ray.pia.denoising.schedulers import SCHEDULERS, name_of
from pia_ray.testing import (
    make_ip_adapter,
    make_lora,
    make_pipeline_folder,
    make_split_checkpoint,
    make_textual_inversion,
)

SIZE = 32

EXAMPLES = {
    "first example": """
import torch
from diffusers import EulerDiscreteScheduler, MotionAdapter
from diffusers.utils import export_to_gif, load_image

adapter = MotionAdapter.from_pretrained("openmmlab/PIA-condition-adapter")
pipe = PIAPipeline.from_pretrained(
    "SG161222/Realistic_Vision_V6.0_B1_noVAE", motion_adapter=adapter, torch_dtype=torch.float16
)

pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
pipe.enable_model_cpu_offload()
pipe.enable_vae_slicing()

image = load_image("cat_6.png")
image = image.resize((512, 512))
prompt = "cat in a field"
negative_prompt = "wrong white balance, dark, sketches,worst quality,low quality"

generator = torch.Generator("cpu").manual_seed(0)
output = pipe(image=image, prompt=prompt, generator=generator)
frames = output.frames[0]
export_to_gif(frames, "pia-animation.gif")
""",
    "example with FreeInit": """
import torch
from diffusers import DDIMScheduler, MotionAdapter
from diffusers.utils import export_to_gif, load_image

adapter = MotionAdapter.from_pretrained("openmmlab/PIA-condition-adapter")
pipe = PIAPipeline.from_pretrained("SG161222/Realistic_Vision_V6.0_B1_noVAE", motion_adapter=adapter)

# enable FreeInit
# Refer to the enable_free_init documentation for a full list of configurable parameters
pipe.enable_free_init(method="butterworth", use_fast_sampling=True)

# Memory saving options
pipe.enable_model_cpu_offload()
pipe.enable_vae_slicing()

pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
image = load_image("cat_6.png")
image = image.resize((512, 512))
prompt = "cat in a field"
negative_prompt = "wrong white balance, dark, sketches,worst quality,low quality"

generator = torch.Generator("cpu").manual_seed(0)

output = pipe(image=image, prompt=prompt, generator=generator)
frames = output.frames[0]
export_to_gif(frames, "pia-freeinit-animation.gif")
""",
}
"""The code of diffusers' page on PIA but for its import of `PIAPipeline`; the picture is a file here."""

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```\w+\n(.*?)^```", (ROOT / "docs/diffusers.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
EXAMPLES["our page"] = "\n".join(re.findall(r"^\+(from diffusers .*)", BLOCKS[0], re.MULTILINE)) + "\n" + BLOCKS[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline_folder(tmp_path_factory.mktemp("tiny") / "pipeline", vae_factor=4)


@pytest.fixture(scope="module")
def ours(folder: Path) -> Iterator[pia_ray.PIAPipeline]:
    pipe = pia_ray.PIAPipeline.from_pretrained(folder)
    yield pipe
    pipe.close()


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return diffusers_pipeline(folder)


def diffusers_pipeline(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated upstream; its arithmetic is what counts
        pipe = diffusers.PIAPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(seed: int = 0, size: tuple[int, int] = (SIZE, SIZE)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def call(pipe: Any, **arguments: Any) -> Any:
    """The frames of a call with few frames and steps, as an array [B, T, H, W, 3] of levels from 0 to 255."""
    given = {"image": picture(), "prompt": "a red cat", "negative_prompt": "dark", "output_type": "np"}
    given |= {"num_frames": 4, "num_inference_steps": 3, "generator": seeded(5), **arguments}
    given = {name: value for name, value in given.items() if value is not ...}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.asarray(pipe(**given).frames) * 255


def assert_same(ours: Any, theirs: Any, *, mean: float = 0.02, most: float = 1.0) -> None:
    ours, theirs = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    assert ours.shape == theirs.shape
    difference = np.abs(ours - theirs)
    assert difference.max() <= most, f"off by up to {difference.max()} levels of 255"
    assert difference.mean() <= mean, f"off by {difference.mean():.4f} levels on average"


def levels(frames: list[Image.Image]) -> np.ndarray[Any, Any]:
    return np.stack([np.asarray(frame) for frame in frames])


# The examples


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_documented_example_runs_with_only_its_import_changed(
    example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter, _ = make_split_checkpoint(tmp_path / "weights", vae_factor=4, sample_size=4)
    monkeypatch.chdir(tmp_path)
    for name in ("cat_6.png", "lighthouse.png"):
        picture(1).save(name)
    names = {"SG161222/Realistic_Vision_V6.0_B1_noVAE": base, "openmmlab/PIA-condition-adapter": adapter}
    # Float16 is slow on a CPU.
    text = EXAMPLES[example].replace("(512, 512)", "(16, 16)")
    text = text.replace("prompt=prompt,", "prompt=prompt, num_inference_steps=2,")
    text = text.replace("num_inference_steps=25", "num_inference_steps=2")
    for name, path in names.items():
        text = text.replace(name, str(path))
    # This diffusers offloads nothing where there is no GPU, and has no enable_vae_slicing any more.
    still_there = "\n".join(line for line in text.splitlines() if "cpu_offload" not in line and "slicing" not in line)
    runs = {"pia_ray": text, "diffusers": still_there}
    frames = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for package, code in runs.items():
            values: dict[str, Any] = {}
            exec(f"from {package} import PIAPipeline\n{code}", values)
            frames[package] = levels(values["frames"])
    assert frames["pia_ray"].shape == (16, 16, 16, 3)
    assert np.abs(np.diff(frames["pia_ray"].astype(int), axis=0)).mean() > 0.5
    half = "float16" in text
    assert_same(frames["pia_ray"], frames["diffusers"], mean=0.6 if half else 0.02, most=12 if half else 1)
    assert list(tmp_path.glob("*.gif"))


def test_the_arguments_are_those_of_diffusers_in_their_order_and_with_their_defaults() -> None:
    own = inspect.signature(pia_ray.PIAPipeline.__call__).parameters
    expected = inspect.signature(diffusers.PIAPipeline.__call__).parameters
    assert list(own) == list(expected)
    defaults = {name: parameter.default for name, parameter in expected.items()}
    defaults["callback_on_step_end_tensor_inputs"] = tuple(defaults["callback_on_step_end_tensor_inputs"])
    assert {name: parameter.default for name, parameter in own.items()} == defaults


# Arguments


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"negative_prompt": None},
        {"prompt": ""},
        {"num_frames": 7, "motion_scale": 2, "num_inference_steps": 3},
        {"num_frames": 16, "motion_scale": 4, "num_inference_steps": 2},
        {"guidance_scale": 1.0},
        {"guidance_scale": 12.0},
        {"strength": 0.5, "num_inference_steps": 6},
        {"eta": 0.7},
        {"generator": seeded(2**64 - 1)},
        {"width": 40, "height": 24, "image": picture(3, (40, 24))},
    ],
    ids=lambda arguments: ",".join(arguments) or "none",
)
def test_an_argument_does_what_it_does_in_diffusers(arguments: dict[str, Any], ours: Any, theirs: Any) -> None:
    def fresh() -> dict[str, Any]:
        generator = arguments.get("generator")
        return arguments if generator is None else {**arguments, "generator": seeded(generator.initial_seed())}

    assert_same(call(ours, **fresh()), call(theirs, **fresh()))


def test_clip_skip_leaves_out_the_last_layers(folder: Path, ours: Any) -> None:
    """As diffusers did up to transformers 5.5; it cannot with later ones."""
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")

    def encoded(text: str) -> torch.Tensor:
        tokens = tokenizer(text, padding="max_length", max_length=77, return_tensors="pt").input_ids
        with torch.no_grad():
            return encoder.final_layer_norm(encoder(tokens, output_hidden_states=True).hidden_states[-2])

    embeds = {"prompt_embeds": encoded("a red cat"), "negative_prompt_embeds": encoded("dark")}
    assert_same(call(ours, clip_skip=1), call(ours, prompt=None, negative_prompt=None, **embeds))
    own = ours.encode_prompt("a red cat", "cpu", 1, True, negative_prompt="dark", clip_skip=1)
    torch.testing.assert_close(own, tuple(embeds.values()))


def test_tensors_are_taken_as_in_diffusers(ours: Any, theirs: Any) -> None:
    latents = torch.randn(1, 4, 4, SIZE // 4, SIZE // 4, generator=seeded(3))
    prompt, negative = (torch.randn(1, 77, 32, generator=seeded(seed)) for seed in (1, 2))
    embeds = {"prompt": None, "negative_prompt": None, "prompt_embeds": prompt, "negative_prompt_embeds": negative}
    for arguments in ({"latents": latents}, embeds):
        assert_same(call(ours, **arguments), call(theirs, **arguments))


@pytest.mark.parametrize("kind", ["array", "floats", "tensor", "list"])
def test_a_picture_may_be_an_array_or_tensor_as_in_diffusers(kind: str, ours: Any, theirs: Any) -> None:
    pixels = np.asarray(picture())
    images: dict[str, Any] = {
        "array": (pixels, pixels[None] / 255.0),  # diffusers takes floats alone
        "floats": (pixels / 255.0, pixels[None] / 255.0),
        "tensor": 2 * (torch.from_numpy(pixels / 255.0).permute(2, 0, 1)[None],),
        "list": ([picture()], [picture()]),
    }
    assert_same(call(ours, image=images[kind][0]), call(theirs, image=images[kind][1]))


@pytest.mark.parametrize("kind", ["pil", "np", "pt", "latent"])
def test_every_output_type_is_that_of_diffusers(kind: str, ours: Any, theirs: Any) -> None:
    arguments = {"image": picture(), "prompt": "a", "num_frames": 3, "num_inference_steps": 2, "output_type": kind}
    own, expected = (pipe(**arguments, generator=seeded()).frames for pipe in (ours, theirs))
    assert type(own) is type(expected)
    if kind == "pil":
        assert_same(levels(own[0]), levels(expected[0]))
    else:
        assert own.shape == expected.shape
        np.testing.assert_allclose(np.asarray(own), np.asarray(expected), atol=1e-3)


def test_without_return_dict_a_tuple_comes_back(ours: Any) -> None:
    arguments = {"image": picture(), "prompt": "a", "num_frames": 2, "num_inference_steps": 2, "output_type": "np"}
    (frames,) = ours(**arguments, generator=seeded(), return_dict=False)
    output = ours(**arguments, generator=seeded())
    np.testing.assert_array_equal(frames, output.frames)
    assert output[0] is output["frames"] is output.frames


# Batches


def test_a_batch_with_a_generator_for_each_video_is_that_of_diffusers(ours: Any, theirs: Any) -> None:
    def batch() -> dict[str, Any]:
        prompts = {"prompt": ["a red cat", "the sea"], "negative_prompt": ["dark", "red"]}
        return {"image": [picture(1), picture(2)], **prompts, "generator": [seeded(1), seeded(2)]}

    assert_same(call(ours, **batch()), call(theirs, **batch()))


def test_several_videos_of_a_prompt_have_seeds_that_follow(ours: Any) -> None:
    prompts = ["a red cat", "the sea"]
    videos = call(ours, prompt=prompts, num_videos_per_prompt=2, generator=seeded(7))
    alone = [call(ours, prompt=prompts[index // 2], generator=seeded(7 + index))[0] for index in range(4)]
    assert_same(videos, alone)
    listed = call(ours, prompt=prompts, num_videos_per_prompt=2, generator=[seeded(7 + index) for index in range(4)])
    assert_same(videos, listed)


def test_entries_of_a_batch_that_do_not_fit_together_are_refused(ours: Any) -> None:
    for arguments, name in (
        ({"image": [picture()] * 3, "prompt": ["a", "b"], "negative_prompt": None}, "prompt"),
        ({"generator": [seeded(), seeded()]}, "generator"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt"),
        ({"latents": torch.zeros(3, 4, 4, 8, 8)}, "latents"),
    ):
        with pytest.raises(BadParameter) as refusal:
            call(ours, **arguments)
        assert refusal.value.field == name


# Generators


def test_a_generator_that_is_used_again_makes_another_video(ours: Any) -> None:
    generator = seeded(1)
    first, second = call(ours, generator=generator), call(ours, generator=generator)
    assert np.abs(first - second).mean() > 1
    again = seeded(1)
    assert_same(call(ours, generator=again), first)
    assert_same(call(ours, generator=again), second)


def test_without_a_generator_the_global_seed_decides_as_in_diffusers(ours: Any, theirs: Any) -> None:
    frames = []
    for pipe in (ours, theirs):
        torch.manual_seed(11)
        frames.append(call(pipe, generator=None))
    assert_same(*frames)
    assert np.abs(call(ours, generator=None) - frames[0]).mean() > 1


# Schedulers


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_of_diffusers_runs_with_its_own_settings(name: str, folder: Path, ours: Any, theirs: Any) -> None:
    kind, settings = SCHEDULERS[name]
    before = ours.scheduler, theirs.scheduler
    try:
        for pipe in (ours, theirs):
            pipe.scheduler = kind.from_config(pipe.scheduler.config, **settings)
        assert name_of(ours.scheduler) == name
        assert ours.scheduler.config["beta_schedule"] == "scaled_linear", "the checkpoint's own, as in diffusers"
        assert_same(call(ours), call(theirs))
    finally:
        ours.scheduler, theirs.scheduler = before


def test_linear_betas_are_those_of_an_animator(ours: Any, folder: Path) -> None:
    before = ours.scheduler
    model = pia_ray.ModelConfig(base=str(folder), device="cpu", dtype="float32")
    params = pia_ray.AnimationParams(
        prompt="a red cat",
        negative_prompt="dark",
        seed=5,
        num_frames=4,
        num_inference_steps=3,
        scheduler="euler",
        width=SIZE,
        height=SIZE,
    )
    try:
        ours.scheduler = EulerDiscreteScheduler.from_config(before.config, beta_schedule="linear")
        with pia_ray.Animator(model) as animator:
            (animation,) = animator.animate([pia_ray.AnimationRequest(picture(), params, output_type="np")])
        assert_same(call(ours)[0], animation.output * 255)
    finally:
        ours.scheduler = before


def test_a_scheduler_without_an_equal_is_refused_by_name(ours: Any) -> None:
    with pytest.raises(BadParameter, match=r"DDIMScheduler.*got DDIMParallelScheduler"):
        ours.scheduler = DDIMParallelScheduler.from_config(ours.scheduler.config)


# Callbacks


def test_a_callback_is_called_as_by_diffusers_and_can_replace_the_latents(ours: Any, theirs: Any) -> None:
    seen: dict[Any, list[Any]] = {ours: [], theirs: []}

    def brighten(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        seen[pipe].append((step, int(timestep), {name: tuple(tensor.shape) for name, tensor in tensors.items()}))
        return {"latents": tensors["latents"] * 1.1}

    frames = [call(pipe, callback_on_step_end=brighten) for pipe in (ours, theirs)]
    assert_same(*frames)
    assert seen[ours] == seen[theirs]
    assert np.abs(frames[0] - call(ours)).mean() > 1


def test_an_error_in_a_callback_ends_the_call(ours: Any) -> None:
    def fail(*_: Any) -> dict[str, Any]:
        raise RuntimeError("stopped by the user")

    with pytest.raises(UnexpectedError, match="stopped by the user"):
        call(ours, callback_on_step_end=fail)


# Methods


def test_free_init_and_freeu_are_those_of_diffusers_and_end(folder: Path) -> None:
    ours, theirs = pia_ray.PIAPipeline.from_pretrained(folder), diffusers_pipeline(folder)
    plain = call(ours)
    for method, arguments in (
        ("free_init", {"num_iters": 2, "method": "gaussian", "spatial_stop_frequency": 0.3}),
        ("freeu", {"s1": 0.9, "s2": 0.2, "b1": 1.5, "b2": 1.6}),
    ):
        for pipe in (ours, theirs):
            getattr(pipe, f"enable_{method}")(**arguments)
        frames = call(ours)
        assert_same(frames, call(theirs))
        assert np.abs(frames - plain).mean() > 0.5
        for pipe in (ours, theirs):
            getattr(pipe, f"disable_{method}")()
        assert_same(call(ours), plain)
    ours.close()


def test_loras_are_those_of_diffusers(folder: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        make_lora(tmp_path / f"{name}.safetensors", folder, seed=seed, layout="diffusers", alpha=None)
    ours, theirs = pia_ray.PIAPipeline.from_pretrained(folder), diffusers_pipeline(folder)
    plain = call(ours)
    for name in ("one", "two"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of peft, whenever there is more than one
            for pipe in (ours, theirs):
                pipe.load_lora_weights(str(tmp_path), weight_name=f"{name}.safetensors", adapter_name=name)
        assert_same(call(ours), call(theirs), most=2)  # the one that was loaded last
    for names, weights in ((["one", "two"], [0.5, 0.8]), ("one", None), (["one", "two"], 0.3)):
        for pipe in (ours, theirs):
            pipe.set_adapters(names, adapter_weights=weights)
        assert_same(call(ours), call(theirs), most=2)
    scaled = {"cross_attention_kwargs": {"scale": 0.4}}
    assert_same(call(ours, **scaled), call(theirs, **scaled), most=2)
    with pytest.raises(BadParameter, match='no LoRA "three"'):
        ours.set_adapters("three")
    ours.unload_lora_weights()
    assert_same(call(ours), plain)
    ours.close()


def test_textual_inversions_are_those_of_diffusers(folder: Path, tmp_path: Path) -> None:
    make_textual_inversion(tmp_path / "style.safetensors", num_vectors=2, name="<style>")
    ours, theirs = pia_ray.PIAPipeline.from_pretrained(folder), diffusers_pipeline(folder)
    for pipe in (ours, theirs):
        pipe.load_textual_inversion(str(tmp_path), token="<style>", weight_name="style.safetensors")
    assert_same(call(ours, prompt="a cat of <style>"), call(theirs, prompt="a cat of <style>"))
    with pytest.raises(BadParameter, match="token must be given"):
        ours.load_textual_inversion(str(tmp_path), weight_name="style.safetensors")
    ours.close()


def test_ip_adapters_are_those_of_diffusers(folder: Path, tmp_path: Path) -> None:
    file, _ = make_ip_adapter(tmp_path, folder)
    ours, theirs = pia_ray.PIAPipeline.from_pretrained(folder), diffusers_pipeline(folder)
    for pipe in (ours, theirs):
        pipe.load_ip_adapter(str(tmp_path), subfolder="", weight_name=file.name, image_encoder_folder="image_encoder")
        pipe.set_ip_adapter_scale(0.7)
    reference = picture(9, (40, 40))
    frames = call(ours, ip_adapter_image=reference)
    assert_same(frames, call(theirs, ip_adapter_image=reference))
    assert_same(call(ours, ip_adapter_image=[reference]), frames)
    assert np.abs(frames - call(ours)).mean() > 0.5
    width = theirs.image_encoder.config.projection_dim
    embeds = torch.randn(2, 1, width, generator=seeded(4))
    arguments = {"ip_adapter_image_embeds": [embeds]}
    assert_same(call(ours, **arguments), call(theirs, **arguments))
    with pytest.raises(BadParameter, match="one picture"):
        call(ours, ip_adapter_image=[reference, reference])
    ours.close()


@pytest.mark.parametrize("guidance", [True, False])
def test_embeddings_of_prompts_are_those_of_diffusers(guidance: bool, ours: Any, theirs: Any) -> None:
    arguments = (["a red cat", "the sea"], torch.device("cpu"), 2, guidance)
    own, expected = (pipe.encode_prompt(*arguments, negative_prompt=["dark", ""]) for pipe in (ours, theirs))
    torch.testing.assert_close(own[0], expected[0])
    if guidance:
        torch.testing.assert_close(own[1], expected[1])
    else:
        assert own[1] is None
        assert expected[1] is None


def test_memory_settings_keep_the_frames(folder: Path) -> None:
    pipe = pia_ray.PIAPipeline.from_pretrained(folder)
    plain = call(pipe)
    pipe.enable_vae_slicing()
    pipe.enable_vae_tiling()
    pipe.enable_sequential_cpu_offload()
    assert_same(call(pipe), plain)
    pipe.disable_vae_slicing()
    pipe.disable_vae_tiling()
    pipe.to("cpu")
    assert_same(call(pipe), plain)
    pipe.close()


# Loading


def test_parts_that_have_been_loaded_are_the_same_as_their_folders(tmp_path: Path) -> None:
    base, adapter, vae = make_split_checkpoint(tmp_path, vae_factor=4)
    scheduler = EulerDiscreteScheduler.from_pretrained(base, subfolder="scheduler")
    given: tuple[dict[str, Any], ...] = (
        {"motion_adapter": adapter, "vae": vae},
        {"motion_adapter": MotionAdapter.from_pretrained(adapter), "vae": AutoencoderKL.from_pretrained(vae)},
    )
    frames = []
    for parts in given:
        pipe = pia_ray.PIAPipeline.from_pretrained(base, scheduler=scheduler, **parts)
        frames.append(call(pipe))
        pipe.close()
    np.testing.assert_array_equal(*frames)


def test_a_changed_adapter_is_used_as_it_is_in_memory(tmp_path: Path) -> None:
    base, folder, _ = make_split_checkpoint(tmp_path, vae_factor=4)
    adapter = MotionAdapter.from_pretrained(folder)
    frames = []
    for _ in range(2):
        pipe = pia_ray.PIAPipeline.from_pretrained(base, motion_adapter=adapter)
        frames.append(call(pipe))
        pipe.close()
        with torch.no_grad():
            adapter.conv_in.weight *= 2
    assert np.abs(frames[0] - frames[1]).mean() > 0.5


def test_what_cannot_be_is_refused_by_name(folder: Path, ours: Any) -> None:
    refusals = {
        "torch_dtype": lambda: pia_ray.PIAPipeline.from_pretrained(folder, torch_dtype=torch.float64),
        "device": lambda: ours.enable_model_cpu_offload(gpu_id=1),
        "cross_attention_kwargs": lambda: call(ours, cross_attention_kwargs={"gligen": {}}),
        "prompt": lambda: call(ours, prompt=None),
        "prompt_embeds": lambda: call(ours, prompt_embeds=torch.zeros(1, 77, 32)),
        "image": lambda: call(ours, image="cat.png"),
        "num_frames": lambda: call(ours, num_frames=0),
        "output_type": lambda: call(ours, output_type="video"),
        "scale": lambda: ours.set_ip_adapter_scale({"down": 1.0}),
        "path": lambda: ours.load_lora_weights({"a": torch.zeros(1)}),
    }
    for name, cause in refusals.items():
        with pytest.raises(BadParameter) as refusal:
            cause()
        assert name in str(refusal.value) or refusal.value.field == name, name
    with pytest.raises(TypeError, match="safety_checker"):
        pia_ray.PIAPipeline.from_pretrained(folder, safety_checker=None)
    with pytest.raises(ConfigError, match="name of a LoRA"):
        ours.load_lora_weights("lora.safetensors", adapter_name="two:words")
    with pytest.raises(PiaRayError):
        pia_ray.PIAPipeline.from_pretrained(folder / "nothing")


def test_a_pipeline_that_is_deleted_frees_its_model(folder: Path) -> None:
    pipe = pia_ray.PIAPipeline.from_pretrained(folder)
    name = f"animator-{folder.stem}"
    before = sum(thread.name == name for thread in threading.enumerate())
    call(pipe)
    assert sum(thread.name == name for thread in threading.enumerate()) == before + 1
    del pipe
    gc.collect()
    assert sum(thread.name == name for thread in threading.enumerate()) == before
