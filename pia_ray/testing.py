"""Parts for tests, shipped so that users can test their own pipelines without weights, a GPU or a network.

Tiny checkpoints in genuine diffusers layout, an animator that needs no torch, and catalogues with as many damaged
pictures as asked for. torch, diffusers, Pillow and pyarrow are loaded by the functions that need them only.
"""

from __future__ import annotations

import csv
import io
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Self

import numpy as np

from pia_ray.config import ModelConfig
from pia_ray.errors import Cancelled, NonFiniteFrames, OutOfMemory, RowError, Timeout
from pia_ray.params import Animation, AnimationRequest, resolve, seed_from_id

if TYPE_CHECKING:
    import torch
    from transformers import CLIPTokenizer

ManifestFormat = Literal["parquet", "csv", "tsv", "jsonl"]

FAULTS: Final = ("oom", "nan", "die", "die-once", "hang")
"""Words that make `FakeAnimator` fail a row when they stand alone in its prompt."""

_WORDS: Final = (
    "a",
    "the",
    "of",
    "in",
    "with",
    "left",
    "right",
    "up",
    "down",
    "zoom",
    "pan",
    "sea",
    "waves",
    "cat",
    "red",
)
_WIDTHS: Final = (16, 32)
_CROSS_WIDTH: Final = 32
_GROUPS: Final = 8


def make_pipeline_folder(
    folder: Path,
    *,
    seed: int = 0,
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon",
    zero_snr: bool = False,
    vae_factor: Literal[2, 4, 8] = 8,
    motion_mid_block: bool = False,
    sample_size: int = 8,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
) -> Path:
    """Writes a whole PIA pipeline (a few hundred thousand random weights) and returns its folder.

    `PIAPipeline.from_pretrained(folder)` runs it. Its UNet is the `UNetMotionModel` that the parts of
    `make_split_checkpoint` give with the same arguments, so both make the same frames. No weight is zero and no layer
    an identity: leaving any part out changes the frames. Equal arguments give equal files. `sample_size` is the side
    of the latents that the config states. As with Stable Diffusion, the scheduler file says scaled_linear.
    """
    import torch
    from diffusers import PIAPipeline, UNetMotionModel

    with torch.random.fork_rng(devices=[]):
        unet = UNetMotionModel.from_unet2d(
            _unet(seed, sample_size=sample_size), _adapter(seed, motion_mid_block=motion_mid_block)
        )
        tokenizer = make_tokenizer()
        pipeline = PIAPipeline(
            vae=_vae(seed, factor=vae_factor, sample_size=sample_size),
            text_encoder=_text_encoder(seed, tokenizer=tokenizer),
            tokenizer=tokenizer,
            unet=unet,
            motion_adapter=None,
            scheduler=_scheduler(prediction_type, zero_snr=zero_snr),
        )
    if dtype != "float32":
        pipeline.to(getattr(torch, dtype))
    pipeline.save_pretrained(folder)
    write_slow_tokenizer(Path(folder) / "tokenizer")
    return Path(folder)


def make_split_checkpoint(
    folder: Path,
    *,
    seed: int = 0,
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon",
    zero_snr: bool = False,
    vae_factor: Literal[2, 4, 8] = 8,
    motion_mid_block: bool = False,
    sample_size: int = 8,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
) -> tuple[Path, Path, Path]:
    """Writes a Stable Diffusion 1.5 checkpoint, PIA's motion adapter and a VAE; returns the three folders.

    This is the layout of Realistic Vision with openmmlab/PIA-condition-adapter. The base holds a 4-channel
    `UNet2DConditionModel` and a VAE of its own whose weights differ from the separate one's; the adapter brings the
    9-channel conv_in.
    """
    import torch
    from diffusers import StableDiffusionPipeline

    base, adapter_folder, vae_folder = (Path(folder) / name for name in ("base", "motion-adapter", "vae"))
    with torch.random.fork_rng(devices=[]):
        tokenizer = make_tokenizer()
        pipeline = StableDiffusionPipeline(
            vae=_vae(seed + 1, factor=vae_factor, sample_size=sample_size),
            text_encoder=_text_encoder(seed, tokenizer=tokenizer),
            tokenizer=tokenizer,
            unet=_unet(seed, sample_size=sample_size),
            scheduler=_scheduler(prediction_type, zero_snr=zero_snr),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        adapter = _adapter(seed, motion_mid_block=motion_mid_block)
        vae = _vae(seed, factor=vae_factor, sample_size=sample_size)
    if dtype != "float32":
        for part in (pipeline, adapter, vae):
            part.to(getattr(torch, dtype))
    pipeline.save_pretrained(base)
    write_slow_tokenizer(base / "tokenizer")
    adapter.save_pretrained(adapter_folder)
    vae.save_pretrained(vae_folder)
    return base, adapter_folder, vae_folder


def make_tokenizer(words: Sequence[str] = _WORDS, *, max_length: int = 77) -> CLIPTokenizer:
    """A CLIP tokenizer that spells every text in bytes and knows the prefixes of a few words."""
    from transformers import CLIPTokenizer

    # Bytes that do not print are shown as characters from 256 on: GPT-2's byte-level alphabet, which CLIP shares.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in plain]
    alphabet = [chr(byte) for byte in plain] + [chr(256 + index) for index in range(len(hidden))]
    merges: list[tuple[str, str]] = []
    for word in words:
        head = word[0]
        for place, letter in enumerate(word[1:], start=2):
            tail = letter if place < len(word) else letter + "</w>"
            if (head, tail) not in merges:
                merges.append((head, tail))
            head += letter
    tokens = [*alphabet, *(char + "</w>" for char in alphabet), *(left + right for left, right in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def write_slow_tokenizer(folder: Path) -> None:
    """Adds vocab.json and merges.txt, which transformers 4 reads, beside the tokenizer.json of transformers 5."""
    model = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]
    vocab = json.dumps(model["vocab"], ensure_ascii=False)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "vocab.json").write_text(vocab + "\n", "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", "utf-8")


class FakeAnimator:
    """An `Animator` without a model: same methods, no torch, frames that depend on image, params and seed alone.

    Frame f shows the picture moved right by f times (motion_scale + 1) pixels, wrapped round, under faint noise from
    the row's seed; the first frame is the picture and its noise. A row takes `seconds_per_step` for each inference
    step; `batch_size` rows ("auto": 1) are at work side by side.

    Faults for tests of failure, each a word that stands alone in a row's prompt:
        oom       the row fails with `OutOfMemory`
        nan       the row fails with `NonFiniteFrames`
        die       the process ends at once with exit status 137, each time
        die-once  the same, but only the first time for that row's id; needs `marks`, a folder that outlives the process
        hang      the row ends only by its deadline (`Timeout`), by `future.cancel()` or by `close` (`Cancelled`)
    """

    def __init__(
        self,
        model: ModelConfig,
        *,
        batch_size: int | Literal["auto"] = "auto",
        cpu_threads: int | None = None,
        seconds_per_step: float = 0.0,
        marks: Path | None = None,
    ) -> None:
        self.model = model
        self.batch_size = 1 if batch_size == "auto" else batch_size
        self.model_version = f"{model.name}@fake"
        self._seconds_per_step = seconds_per_step
        self._marks = marks
        self._closed = threading.Event()
        self._pool = ThreadPoolExecutor(self.batch_size, thread_name_prefix="fake-animator")

    def animate(self, requests: Sequence[AnimationRequest]) -> list[Animation | RowError]:
        """One animation or that row's error per request, in order."""
        outcomes: list[Animation | RowError] = []
        for future in [self.submit(request) for request in requests]:
            try:
                outcomes.append(future.result())
            except RowError as error:
                outcomes.append(error)
            except CancelledError:
                outcomes.append(Cancelled("the request was taken back"))
        return outcomes

    def submit(
        self, request: AnimationRequest, *, alone: bool = False, on_step: Callable[[int, int], None] | None = None
    ) -> Future[Animation]:
        """The future animation; its exception is a `RowError`. `future.cancel()` works until the end.

        `alone` changes nothing: rows share nothing here. `on_step` is called with steps done and steps in all.
        """
        future: Future[Animation] = Future()
        if self._closed.is_set():
            future.set_exception(Cancelled("the animator is closed"))
        else:
            self._pool.submit(self._settle, future, request, time.monotonic(), on_step)
        return future

    def close(self) -> None:
        """Ends rows that are waiting or hanging with `Cancelled`, then the threads."""
        self._closed.set()
        self._pool.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _settle(
        self,
        future: Future[Animation],
        request: AnimationRequest,
        submitted: float,
        on_step: Callable[[int, int], None] | None,
    ) -> None:
        try:
            animation = self._run(future, request, submitted, on_step)
        except Exception as error:  # noqa: BLE001  # the row boundary: whatever it is belongs into the future
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
        else:
            if future.set_running_or_notify_cancel():
                future.set_result(animation)

    def _run(
        self,
        future: Future[Animation],
        request: AnimationRequest,
        submitted: float,
        on_step: Callable[[int, int], None] | None,
    ) -> Animation:
        started = time.monotonic()
        params = resolve(request.params, {}, model_defaults=self.model.defaults)
        self._check(future, request, submitted)
        self._fail(future, request, submitted)
        for step in range(params.num_inference_steps):
            self._check(future, request, submitted)
            if self._seconds_per_step:
                self._closed.wait(self._seconds_per_step)
            if on_step is not None:
                on_step(step + 1, params.num_inference_steps)
        self._check(future, request, submitted)
        seed = params.seed if params.seed is not None else seed_from_id(request.id)
        picture = _picture(request.image, params.width, params.height)  # [H, W, 3], uint8
        noise = np.random.default_rng(seed).integers(-4, 5, picture.shape, dtype=np.int16)
        noisy = (picture.astype(np.int16) + noise).clip(0, 255).astype(np.uint8)
        shift = params.motion_scale + 1
        frames = np.stack([np.roll(noisy, index * shift, axis=1) for index in range(params.num_frames)])  # [T, H, W, 3]
        ended = time.monotonic()
        return Animation(
            frames=frames,
            params=params.model_copy(update={"seed": seed, "width": picture.shape[1], "height": picture.shape[0]}),
            model=self.model_version,
            id=request.id,
            gpu_s=ended - started,
            animate_s=ended - submitted,
            motion=float(np.abs(frames.astype(np.int16) - frames[0].astype(np.int16)).mean() / 255),
        )

    def _check(self, future: Future[Animation], request: AnimationRequest, submitted: float) -> None:
        if self._closed.is_set():
            raise Cancelled("the animator is closed")
        if future.cancelled():
            raise Cancelled("the request was taken back")
        if request.deadline_s is not None and time.monotonic() - submitted > request.deadline_s:
            raise Timeout(f"not finished within its deadline of {request.deadline_s:g} s")

    def _fail(self, future: Future[Animation], request: AnimationRequest, submitted: float) -> None:
        words = set(request.params.prompt.lower().split())
        if "oom" in words:
            raise OutOfMemory("fault by prompt: the row does not fit on this device")
        if "nan" in words:
            raise NonFiniteFrames("fault by prompt: the model produced NaN")
        if "die" in words or ("die-once" in words and self._first_time(request.id)):
            os._exit(137)  # what a shell reports after kill -9
        while "hang" in words:
            self._closed.wait(0.02)
            self._check(future, request, submitted)

    def _first_time(self, row_id: str) -> bool:
        if self._marks is None:
            raise ValueError("die-once needs FakeAnimator(marks=FOLDER)")
        try:
            (self._marks / row_id.encode("utf-8").hex()).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def make_catalog(
    folder: Path,
    *,
    rows: int,
    seed: int = 0,
    broken: float = 0.0,
    sizes: Sequence[tuple[int, int]] = ((96, 64), (64, 96), (64, 64)),
    format: ManifestFormat = "parquet",  # noqa: A002  # the field's word
) -> Path:
    """Draws pictures, no two alike, writes a manifest that names them, and returns the manifest's path.

    Of the rows, the share `broken` (0 to 1, rounded) has a picture that is truncated, a web page, or missing, by
    turns; which rows is drawn from `seed`. Sizes are (width, height) in px, by turns. Columns: id, image, prompt,
    motion_scale, seed and sku, a column that is no knob and passes through.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    damaged = {int(row): place for place, row in enumerate(rng.permutation(rows)[: round(rows * broken)])}
    records: list[dict[str, Any]] = []
    for row in range(rows):
        extension = ("jpg", "png", "webp")[row % 3]
        name = f"images/{row:06d}.{extension}"
        content = draw_picture(sizes[row % len(sizes)], seed=int(rng.integers(2**32)), extension=extension)
        kind = ("truncated", "html", "missing")[damaged[row] % 3] if row in damaged else ""
        if kind == "truncated":
            content = content[: len(content) // 2]
        elif kind == "html":
            content = b"<!doctype html><title>404</title><p>This picture is no longer here.</p>\n"
        if kind != "missing":
            (folder / name).write_bytes(content)
        records.append(
            {
                "id": f"item-{row:06d}",
                "image": name,
                "prompt": f"picture {row} of the catalogue, gentle motion",
                "motion_scale": row % 3,
                "seed": int(rng.integers(2**63)),
                "sku": f"SKU{row:05d}",
            }
        )
    return _write_manifest(folder / f"manifest.{format}", records, format)


def draw_picture(size: tuple[int, int], *, seed: int, extension: Literal["jpg", "png", "webp"] | str = "png") -> bytes:
    """The bytes of a picture file of (width, height) px: a gradient with discs, drawn from the seed."""
    from PIL import Image

    width, height = size
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]  # each [H, W]
    slope = (x / width + y / height)[..., None] / 2  # [H, W, 1], 0 to 1
    pixels = rng.uniform(0, 255, 3) * (1 - slope) + rng.uniform(0, 255, 3) * slope  # [H, W, 3]
    for _ in range(4):
        across, down, radius = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0.1, 0.3) * min(size)
        pixels[(x - across) ** 2 + (y - down) ** 2 < radius**2] = rng.uniform(0, 255, 3)
    stream = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(stream, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[extension])
    return stream.getvalue()


def _picture(image: Any, width: int | None, height: int | None) -> np.ndarray[Any, Any]:
    from PIL import Image

    picture = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
    picture = picture.convert("RGB")
    size = (width or max(8, picture.width // 8 * 8), height or max(8, picture.height // 8 * 8))
    return np.asarray(picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS))


def _write_manifest(path: Path, records: list[dict[str, Any]], kind: ManifestFormat) -> Path:
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        text = pa.string()
        fields = {
            "id": text,
            "image": text,
            "prompt": text,
            "motion_scale": pa.int8(),
            "seed": pa.uint64(),
            "sku": text,
        }
        pq.write_table(pa.Table.from_pylist(records, pa.schema(fields)), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    else:
        with path.open("w", encoding="utf-8", newline="") as stream:
            columns = ["id", "image", "prompt", "motion_scale", "seed", "sku"]
            writer = csv.DictWriter(stream, columns, delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(records)
    return path


def _unet(seed: int, *, sample_size: int) -> Any:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=_WIDTHS,
        layers_per_block=1,
        norm_num_groups=_GROUPS,
        cross_attention_dim=_CROSS_WIDTH,
        attention_head_dim=4,  # Stable Diffusion 1.5's misnomer: the number of heads
    )
    return _randomise(unet, seed, "unet")


def _adapter(seed: int, *, motion_mid_block: bool) -> Any:
    from diffusers import MotionAdapter

    adapter = MotionAdapter(
        block_out_channels=_WIDTHS,
        motion_layers_per_block=1,
        motion_num_attention_heads=4,
        motion_norm_num_groups=_GROUPS,
        motion_max_seq_length=32,
        use_motion_mid_block=motion_mid_block,
        conv_in_channels=9,
    )
    return _randomise(adapter, seed, "motion-adapter")


def _vae(seed: int, *, factor: int, sample_size: int) -> Any:
    from diffusers import AutoencoderKL

    widths = {2: (8, 16), 4: (8, 8, 16), 8: (8, 8, 16, 16)}[factor]
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        norm_num_groups=_GROUPS,
        sample_size=sample_size * factor,
        scaling_factor=0.18215,
    )
    return _randomise(vae, seed, "vae")


def _text_encoder(seed: int, *, tokenizer: CLIPTokenizer) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=_CROSS_WIDTH,
        intermediate_size=2 * _CROSS_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=_CROSS_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _randomise(CLIPTextModel(config), seed, "text-encoder")


def _scheduler(prediction_type: str, *, zero_snr: bool) -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=0 if zero_snr else 1,
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_snr,
        timestep_spacing="trailing" if zero_snr else "leading",
    )


def _randomise(model: Any, seed: int, part: str) -> Any:
    """Draws every weight anew, so that no layer is zero or an identity; scales keep activations near one."""
    import torch

    generator = torch.Generator().manual_seed(seed_from_id(f"{part}/{seed}") % 2**63)
    for name, weight in model.named_parameters():
        noise: torch.Tensor = torch.randn(weight.shape, generator=generator)
        if weight.ndim > 1:
            value = noise / weight[0].numel() ** 0.5
        else:
            value = noise * 0.1 + (1.0 if name.endswith("weight") else 0.0)
        weight.data.copy_(value)
    return model.eval()
