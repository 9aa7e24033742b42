"""Knobs that refer to files, from a manifest's cell or a run's default to the request that the model gets."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from concurrent.futures import Future
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.numpy import save

from pia_ray import Animation, AnimationRequest, Animator, ModelConfig, manifest, read_results, storage
from pia_ray.animation import OnStep
from pia_ray.catalog.local import run_local
from pia_ray.catalog.validate import validate
from pia_ray.cli.main import main
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.knobs import ARRAY_KNOBS, PICTURE_KNOBS, AnimationParams
from pia_ray.config.model import build
from pia_ray.errors import BadParameter, ConfigError, ManifestError
from pia_ray.manifest import inputs
from pia_ray.media import arrays
from pia_ray.media.sizes import fit, fit_mask
from pia_ray.prepare import prepare
from pia_ray.testing import FakeAnimator, draw_picture, make_pipeline_folder
from tests.s3_server import s3, s3_server
from tests.videos import decode_frames

__all__ = ["s3", "s3_server"]  # fixtures

PNG = draw_picture((64, 48), seed=0)
END = draw_picture((80, 60), seed=1)
NOISE = np.random.default_rng(0).standard_normal((4, 4, 8, 8)).astype(np.float32)
TEXT = np.random.default_rng(1).standard_normal((77, 32)).astype(np.float32)


class KeepingAnimator(FakeAnimator):
    """Keeps what it is asked, as an engine would get it."""

    def __init__(self) -> None:
        super().__init__(ModelConfig.named("demo"), batch_size=2)
        self.asked: dict[str, AnimationRequest] = {}

    def submit(
        self, request: AnimationRequest, *, alone: bool = False, on_step: OnStep | None = None, **how: Any
    ) -> Future[Animation]:
        self.asked[request.id] = prepare(request, self.model)
        return super().submit(request, alone=alone, on_step=on_step, **how)


def configure(source: Path | str, output: Path, **settings: Any) -> CatalogConfig:
    return build(CatalogConfig, {"manifest": str(source), "output": str(output), "model": "demo", **settings})


def go(config: CatalogConfig) -> dict[str, AnimationRequest]:
    """Runs the catalogue; what the animator was asked, by id."""
    with KeepingAnimator() as animator:
        run_local(config, animator=animator)
        return animator.asked


def rows_of(config: CatalogConfig) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in read_results(config.output).to_pylist()}


def params_of(config: CatalogConfig, row_id: str) -> dict[str, Any]:
    return json.loads(rows_of(config)[row_id]["params"])


def plan_of(config: CatalogConfig) -> dict[str, dict[str, Any]]:
    opened = manifest.open_manifest(config)
    tables = manifest.plan(opened, config, model_version="v1")
    return {item["id"]: item for table in tables for item in table.to_pylist()}


def write_csv(folder: Path, *rows: dict[str, str]) -> Path:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [",".join(names), *(",".join(row.get(name, "") for name in names) for row in rows)]
    (folder / "m.csv").write_text("\n".join(lines) + "\n")
    (folder / "a.png").write_bytes(PNG)
    (folder / "b.png").write_bytes(END)
    return folder / "m.csv"


def row(row_id: str = "a", **cells: str) -> dict[str, str]:
    return {"id": row_id, "image": "a.png", "prompt": "p", **cells}


def rgb(content: bytes, mode: str = "RGB") -> Image.Image:
    return Image.open(BytesIO(content)).convert(mode)


def same(one: Any, other: Any) -> bool:
    return np.array_equal(np.asarray(one), np.asarray(other))


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


# Cells of every kind


def test_pictures_beside_the_image_reach_the_model_fitted_as_it_is(tmp_path: Path) -> None:
    mask = Image.new("RGBA", (64, 48), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (0, 0, 32, 48))
    mask.save(tmp_path / "m.png")
    path = write_csv(tmp_path, row(end_image="b.png", mask_image="m.png", ip_adapter_image="b.png"), row("b"))
    asked = go(configure(path, tmp_path / "out"))
    size = asked["a"].image.size
    assert same(asked["a"].end_image, fit(rgb(END), size))
    assert same(asked["a"].ip_adapter_image, rgb(END)), "as it is"
    assert asked["a"].mask_image.mode == "L"
    assert asked["a"].mask_image.size == size
    columns = np.asarray(asked["a"].mask_image).mean(axis=0)
    assert (columns[: size[0] // 2 - 4] == 255).all()
    assert (columns[size[0] // 2 + 4 :] == 0).all(), "what is transparent stays"
    assert [getattr(asked["b"], knob) for knob in PICTURE_KNOBS] == [None] * 3


@pytest.mark.parametrize("kind", ["bytes", "struct of bytes", "struct of a path", "data: URL", "path"])
def test_a_picture_in_parquet_may_be_all_that_an_image_may_be(kind: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "b.png").write_bytes(END)
    cell = {
        "bytes": END,
        "struct of bytes": {"bytes": END, "path": "x.png"},
        "struct of a path": {"bytes": None, "path": "b.png"},
        "data: URL": data_url(END),
        "path": "b.png",
    }[kind]
    columns = {"id": ["a", "b"], "image": ["a.png"] * 2, "prompt": ["p"] * 2, "end_image": [cell, None]}
    if kind == "struct of a path":
        struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        columns["end_image"] = pa.array(columns["end_image"], struct)
    pq.write_table(pa.table(columns), tmp_path / "m.parquet")
    config = configure(tmp_path / "m.parquet", tmp_path / "out")
    asked = go(config)
    assert same(asked["a"].end_image, fit(rgb(END), asked["a"].image.size))
    assert asked["b"].end_image is None
    shown = params_of(config, "a")["end_image"]
    assert shown == "b.png" if "path" in kind and "bytes" not in kind else shown.startswith("sha256:")


def array_cells() -> dict[str, Any]:
    nested = pa.list_(pa.list_(pa.float32()))
    fixed = pa.list_(pa.list_(pa.float64(), 32), 77)
    tensor = pa.fixed_shape_tensor(pa.float32(), (77, 32))
    return {
        "nested lists": pa.array([TEXT.tolist(), None], nested),
        "lists of fixed size": pa.array([TEXT.tolist(), None], fixed),
        "tensors": pa.ExtensionArray.from_storage(tensor, pa.array([TEXT.ravel().tolist(), None], tensor.storage_type)),
        "bytes": pa.array([save({"x": TEXT}), None]),
        "a file": pa.array(["t.safetensors", None]),
        "a file of several tensors": pa.array(["many.safetensors", None]),
        "half precision": pa.array(["half.safetensors", None]),
    }


@pytest.mark.parametrize("kind", array_cells())
def test_an_array_in_parquet_may_be_lists_tensors_bytes_or_a_file(kind: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "t.safetensors").write_bytes(save({"anything": TEXT}))
    (tmp_path / "many.safetensors").write_bytes(save({"latents": NOISE, "prompt_embeds": TEXT}))
    (tmp_path / "half.safetensors").write_bytes(save({"x": TEXT.astype(np.float16)}))
    columns = {"id": ["a", "b"], "image": ["a.png"] * 2, "prompt": ["p"] * 2, "prompt_embeds": array_cells()[kind]}
    pq.write_table(pa.table(columns), tmp_path / "m.parquet")
    asked = go(configure(tmp_path / "m.parquet", tmp_path / "out"))
    assert asked["a"].prompt_embeds.dtype == np.float32
    np.testing.assert_allclose(asked["a"].prompt_embeds, TEXT, rtol=1e-3 if kind == "half precision" else 0)
    assert asked["b"].prompt_embeds is None


def test_equal_arrays_in_lists_and_tensors_are_the_same_work(tmp_path: Path) -> None:
    keys = set()
    for kind in ("nested lists", "lists of fixed size", "tensors"):
        columns = {"id": ["a", "b"], "image": ["a.png"] * 2, "prompt": ["p"] * 2, "prompt_embeds": array_cells()[kind]}
        pq.write_table(pa.table(columns), tmp_path / "m.parquet")
        keys.add(plan_of(configure(tmp_path / "m.parquet", tmp_path / "out"))["a"]["work_key"])
    assert len(keys) == 1


def test_json_lines_hold_arrays_as_nested_lists(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    lines = [{"id": "a", "image": "a.png", "prompt": "p", "prompt_embeds": TEXT.tolist()}, {**row("b")}]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = go(configure(tmp_path / "m.jsonl", tmp_path / "out"))
    np.testing.assert_array_equal(asked["a"].prompt_embeds, TEXT)
    assert asked["b"].prompt_embeds is None


def test_bfloat16_tensors_are_read() -> None:
    import torch
    from safetensors.torch import save as save_torch

    values = torch.from_numpy(TEXT).to(torch.bfloat16)
    read = arrays.decode(save_torch({"x": values}), "prompt_embeds")
    np.testing.assert_array_equal(read, values.float().numpy())


def test_references_in_s3_are_read(s3: str, tmp_path: Path) -> None:
    storage.write_bytes(f"{s3}/in/a.png", PNG)
    storage.write_bytes(f"{s3}/in/b.png", END)
    storage.write_bytes(f"{s3}/t.safetensors", save({"x": TEXT}))
    text = f"id,image,prompt,end_image,prompt_embeds\na,a.png,p,b.png,{s3}/t.safetensors\n"
    storage.write_bytes(f"{s3}/in/m.csv", text.encode())
    asked = go(configure(f"{s3}/in/m.csv", tmp_path / "out"))
    assert same(asked["a"].end_image, fit(rgb(END), asked["a"].image.size))
    np.testing.assert_array_equal(asked["a"].prompt_embeds, TEXT)


def test_a_row_from_elsewhere_carries_what_it_holds(tmp_path: Path) -> None:
    config = configure(tmp_path, tmp_path / "out")
    cells = {"id": "a", "image": PNG, "prompt": "p", "end_image": END, "prompt_embeds": TEXT.tolist(), "latents": None}
    planned = manifest.plan_row(cells, config, model_version="v1")
    from pia_ray.catalog import steps

    fetched = steps.fetch(planned, config)
    assert same(fetched.references["end_image"], rgb(END))
    np.testing.assert_array_equal(fetched.references["prompt_embeds"], TEXT)
    assert set(fetched.references) == {"end_image", "prompt_embeds"}


# Identity, work keys, results


def test_what_a_row_refers_to_is_part_of_its_work_key_and_of_its_derived_id(tmp_path: Path) -> None:
    path = write_csv(
        tmp_path, row("a"), row("b", end_image="b.png"), row("c", end_image="a.png"), row("d", mask_image="b.png")
    )
    config = configure(path, tmp_path / "out")
    assert len({item["work_key"] for item in plan_of(config).values()}) == 4
    text = "image,prompt,end_image\na.png,p,\na.png,p,b.png\na.png,p,a.png\n"
    (tmp_path / "n.csv").write_text(text)
    assert len(plan_of(configure(tmp_path / "n.csv", tmp_path / "out"))) == 3


def test_neither_signatures_nor_bytes_reach_the_results(tmp_path: Path) -> None:
    url = "https://example.com/b.png?size=2&X-Amz-Signature=secret"
    other = "https://example.com/b.png?size=2&X-Amz-Signature=another"
    path = write_csv(tmp_path, row("a", end_image=url), row("b", end_image=data_url(END).replace(",", "%2C", 0)))
    text = path.read_text().replace(data_url(END), f'"{data_url(END)}"')
    path.write_text(text)
    config = configure(path, tmp_path / "out")
    items = plan_of(config)
    assert json.loads(items["a"]["params"])["end_image"] == "https://example.com/b.png?size=2"
    assert json.loads(items["a"]["reference_uris"]) == {"end_image": url}
    assert json.loads(items["b"]["params"])["end_image"].startswith("sha256:")
    path.write_text(text.replace("secret", "another"))
    assert plan_of(config)["a"]["work_key"] == items["a"]["work_key"]
    assert other in plan_of(config)["a"]["reference_uris"]


def test_a_repeated_run_animates_nothing_and_a_changed_file_counts_where_changes_are_detected(tmp_path: Path) -> None:
    path = write_csv(tmp_path, row(end_image="b.png"))
    config = configure(path, tmp_path / "out")
    assert len(go(config)) == 1
    assert go(config) == {}
    watched = configure(path, tmp_path / "watched", detect_changes=True)
    assert len(go(watched)) == 1
    assert go(watched) == {}
    (tmp_path / "b.png").write_bytes(draw_picture((100, 60), seed=9))
    assert go(config) == {}
    assert len(go(watched)) == 1


def test_a_manifest_whose_bytes_changed_since_the_plan_fails_the_row(tmp_path: Path) -> None:

    columns = {"id": ["a"], "image": [PNG], "prompt": ["p"], "latents": [NOISE[0, 0, 0].tolist()]}
    columns["latents"] = pa.array([NOISE.tolist()])
    pq.write_table(pa.table(columns), tmp_path / "m.parquet")
    config = configure(tmp_path / "m.parquet", tmp_path / "out")
    planned = manifest.row_from_item(plan_of(config)["a"])
    (tmp_path / "later").mkdir()
    pq.write_table(pa.table({**columns, "latents": pa.array([(NOISE * 2).tolist()])}), tmp_path / "later" / "m.parquet")
    moved = {"latents": planned.references["latents"].replace("m.parquet", "later/m.parquet")}
    with pytest.raises(Exception, match="latents: the manifest has changed since it was planned"):
        inputs.read_references(
            moved,
            background="#ffffff",
            max_bytes=10**6,
            max_pixels=10**6,
            identities={"latents": planned.params.latents or ""},
        )


# Defaults of a run


def test_a_runs_default_is_relative_to_the_working_directory_and_rows_overrule_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_csv(tmp_path, row("a"), row("b", end_image="b.png"))
    work = tmp_path / "work"
    work.mkdir()
    (work / "end.png").write_bytes(draw_picture((64, 64), seed=5))
    monkeypatch.chdir(work)
    config = configure(path, tmp_path / "out", defaults={"end_image": "end.png"})
    asked = go(config)
    assert same(asked["a"].end_image, fit(rgb((work / "end.png").read_bytes()), asked["a"].image.size))
    assert same(asked["b"].end_image, fit(rgb(END), asked["b"].image.size))
    assert params_of(config, "a")["end_image"] == str(work / "end.png")
    keys = {key: item["work_key"] for key, item in plan_of(config).items()}
    monkeypatch.chdir(tmp_path)
    elsewhere = configure(path, tmp_path / "out", defaults={"end_image": str(work / "end.png")})
    assert {key: item["work_key"] for key, item in plan_of(elsewhere).items()} == keys


def test_a_default_that_cannot_be_one_ends_the_run_before_it_begins(tmp_path: Path) -> None:
    path = write_csv(tmp_path, row())
    with pytest.raises(ConfigError, match="a default is a path or URL"):
        configure(path, tmp_path / "out", defaults={"end_image": data_url(END)})
    with pytest.raises(ConfigError, match=r"end_image ftp://x/y\.png: ftp:// is not read"):
        go(configure(path, tmp_path / "out", defaults={"end_image": "ftp://x/y.png"}))


# What is wrong is said


@pytest.mark.parametrize(
    ("knob", "cell", "code", "text"),
    [
        ("end_image", "none.png", "image_not_found", "end_image: there is no image"),
        ("end_image", "t.safetensors", "unsupported_image", "end_image: This is"),
        ("latents", "none.safetensors", "storage_not_found", "latents: there is no"),
        ("latents", "a.png", "bad_parameter", "latents is not a valid .safetensors file"),
        ("latents", "flat.safetensors", "bad_parameter", r"latents must be [4, T, h, w] (got [77, 32])"),
        ("prompt_embeds", "whole.safetensors", "bad_parameter", "prompt_embeds must hold floats, not I64"),
        ("prompt_embeds", "nan.safetensors", "bad_parameter", "prompt_embeds holds NaN"),
        ("prompt_embeds", "two.safetensors", "bad_parameter", "must hold one tensor, or one named prompt_embeds"),
        ("mask_image", "http://x/y.png", "bad_parameter", "mask_image http://x/y.png: http:// is not fetched"),
    ],
)
def test_a_reference_that_cannot_be_used_fails_its_row_and_names_the_knob(
    knob: str, cell: str, code: str, text: str, tmp_path: Path
) -> None:
    (tmp_path / "t.safetensors").write_bytes(save({"x": TEXT}))
    (tmp_path / "flat.safetensors").write_bytes(save({"x": TEXT}))
    (tmp_path / "whole.safetensors").write_bytes(save({"x": TEXT.astype(np.int64)}))
    (tmp_path / "nan.safetensors").write_bytes(save({"x": TEXT * np.nan}))
    (tmp_path / "two.safetensors").write_bytes(save({"x": TEXT, "y": TEXT}))
    config = configure(write_csv(tmp_path, row("a", **{knob: cell}), row("b")), tmp_path / "out")
    go(config)
    rows = rows_of(config)
    assert rows["b"]["status"] == "succeeded"
    assert rows["a"]["error_code"] == code
    assert text in rows["a"]["error_message"]
    (finding,) = [each for each in validate(config, fetch=True) if each.code is not None]
    assert (finding.id, finding.code) == ("a", code)


@pytest.mark.parametrize(
    ("column", "text"),
    [
        ({"end_image": [3]}, "end_image is a path or URL, bytes, or a struct"),
        ({"end_image": [[1.0]]}, "end_image is a path or URL, bytes, or a struct"),
        ({"latents": [3.5]}, "latents is a path or URL, bytes, nested lists of floats"),
    ],
)
def test_a_column_of_a_type_that_refers_to_nothing_is_refused(
    column: dict[str, Any], text: str, tmp_path: Path
) -> None:
    pq.write_table(pa.table({"image": ["a.png"], "prompt": ["p"], **column}), tmp_path / "m.parquet")
    with pytest.raises(ManifestError, match=text):
        plan_of(configure(tmp_path / "m.parquet", tmp_path / "out"))


def test_a_ragged_array_is_rejected_with_its_row(tmp_path: Path) -> None:
    columns = {"id": ["a"], "image": ["a.png"], "prompt": ["p"], "prompt_embeds": [[[1.0, 2.0], [3.0]]]}
    pq.write_table(pa.table(columns), tmp_path / "m.parquet")
    item = plan_of(configure(tmp_path / "m.parquet", tmp_path / "out"))["a"]
    assert item["error_message"] == (
        "row 1 of m.parquet: prompt_embeds must be an array of floats [L, C], with rows of one length"
    )


def test_the_cap_on_bytes_holds_for_arrays_too(tmp_path: Path) -> None:
    (tmp_path / "t.safetensors").write_bytes(save({"x": TEXT}))
    path = write_csv(tmp_path, row(prompt_embeds="t.safetensors"))
    config = configure(path, tmp_path / "out", max_image_bytes=5000)
    go(config)
    assert rows_of(config)["a"]["error_code"] == "storage_too_large"


# Masks


@pytest.mark.parametrize("size", [(64, 48), (32, 24), (100, 200)])
def test_a_mask_of_any_size_lies_over_its_picture_after_the_fit(size: tuple[int, int]) -> None:
    # The left third of the picture and of the mask is white; both must show it at the same place.
    picture, mask = (Image.new("L", each) for each in ((64, 48), size))
    for image in (picture, mask):
        image.paste(255, (0, 0, round(image.width / 3), image.height))
    for wanted in ((32, 32), (48, 32), (64, 48)):
        seen = np.asarray(fit(picture.convert("RGB"), wanted).convert("L")) > 127
        laid = np.asarray(fit_mask(mask, picture.size, wanted)) > 127
        assert laid.shape == seen.shape
        assert (laid != seen).mean() < 0.05


# Through a real model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = make_pipeline_folder(tmp_path_factory.mktemp("model"), vae_factor=4)
    defaults = {"num_inference_steps": 2, "num_frames": 4, "width": 32, "height": 32, "negative_prompt": "dark"}
    return ModelConfig(name="tiny", base=str(folder), device="cpu", long_edge=32, size_step=16, defaults=defaults)


@pytest.fixture(scope="module")
def animator(tiny: ModelConfig) -> Iterator[Animator]:
    with Animator(tiny, batch_size=1) as animator:
        yield animator


def test_a_catalogues_arrays_make_what_the_same_arrays_make_in_python(
    tmp_path: Path, tiny: ModelConfig, animator: Animator
) -> None:
    (tmp_path / "t.safetensors").write_bytes(save({"prompt_embeds": TEXT, "latents": NOISE, "negative": TEXT}))
    brings = {"latents": NOISE, "prompt_embeds": TEXT}
    path = write_csv(tmp_path, row(latents="t.safetensors", prompt_embeds="t.safetensors"), row("b"))
    config = configure(path, tmp_path / "out", model=tiny.model_dump(), batch_size=1, prefetch=0)
    run_local(config, animator=animator)
    params = AnimationParams(prompt="p")
    for row_id, given in (("a", brings), ("b", {})):
        (expected,) = animator.animate([AnimationRequest(rgb(PNG), params, id=row_id, **given)])
        assert isinstance(expected, Animation)
        expected.save(tmp_path / "expected.mp4")
        made = decode_frames(storage.read_bytes(rows_of(config)[row_id]["video_uri"]))
        np.testing.assert_array_equal(made, decode_frames(tmp_path / "expected.mp4"))


def test_the_image_command_takes_the_references_as_flags(
    tmp_path: Path, tiny: ModelConfig, animator: Animator, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "t.safetensors").write_bytes(save({"x": TEXT}))
    (tmp_path / "tiny.yaml").write_text(json.dumps(tiny.model_dump()))
    words = ["image", str(tmp_path / "a.png"), "--model", str(tmp_path / "tiny.yaml"), "--prompt", "p"]
    words += ["-o", str(tmp_path / "v.webp"), "--guidance-scale", "1", "--seed", "3"]
    assert main([*words, "--prompt-embeds", str(tmp_path / "t.safetensors")]) == 0
    params = AnimationParams(prompt="p", guidance_scale=1, seed=3)
    (expected,) = animator.animate([AnimationRequest(rgb(PNG), params, prompt_embeds=TEXT)])
    assert isinstance(expected, Animation)
    expected.save(tmp_path / "expected.webp")
    np.testing.assert_array_equal(decode_frames(tmp_path / "v.webp"), decode_frames(tmp_path / "expected.webp"))
    assert main([*words, "--latents", str(tmp_path / "none.safetensors")]) == 1
    assert "latents: there is no" in capsys.readouterr().err


def test_every_array_knob_has_a_layout_that_its_message_names() -> None:
    for knob, layout in ARRAY_KNOBS.items():
        with pytest.raises(BadParameter) as caught:
            arrays.as_array(np.zeros((2, 2, 2, 2, 2), np.float32), knob)
        assert layout in caught.value.message
