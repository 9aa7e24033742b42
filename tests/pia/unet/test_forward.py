"""Forwards of many entries against diffusers' UNet on each alone; compiled ones against plain ones."""

from __future__ import annotations

import copy
import gc
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.compiler._cache import CacheArtifactManager

from pia_ray.config.model import ModelConfig
from pia_ray.errors import ConfigError
from pia_ray.pia.components import Components
from pia_ray.pia.evaluation import Branch, Evaluation, ImageTokens
from pia_ray.pia.loading.load import assemble
from pia_ray.pia.unet.background_compilation import BackgroundCompilation
from pia_ray.pia.unet.compilation import CompiledCode
from pia_ray.pia.unet.compile_cache import MOST_FILES, CompileCache, compile_cache_of
from pia_ray.pia.unet.cross_attention import CACHED_PROJECTIONS, CACHED_TOKENS
from pia_ray.pia.unet.forward import BatchEntry, Forward
from pia_ray.pia.unet.guidance_prefix import prefix_of
from pia_ray.testing import make_ip_adapter, make_pipeline_folder
from pia_ray.weights import resolve

FRAMES = 4
WIDTH = 32


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Components:
    folder = make_pipeline_folder(tmp_path_factory.mktemp("checkpoint"))
    adapter, encoder = make_ip_adapter(tmp_path_factory.mktemp("ip-adapter"), folder)
    model = ModelConfig(
        name="tiny", base=str(folder), device="cpu", ip_adapter=str(adapter), image_encoder=str(encoder)
    )
    return assemble(resolve(model), model)


@pytest.fixture(scope="module")
def ours(plain: Components) -> tuple[Components, Forward]:
    parts = copy.deepcopy(plain)
    return parts, Forward(parts)


def evaluation_of(seed: int, branches: tuple[Branch, ...], *, frames: int = FRAMES, side: int = 8) -> Evaluation:
    latents = torch.randn(4, frames, side, side, generator=torch.Generator().manual_seed(seed))
    return Evaluation(latents, timestep=100.0 * seed + 1, branches=branches, step=0, num_steps=1)


def branch_of(seed: int, *, picture: Branch | None = None, image: ImageTokens | None = None, length: int = 7) -> Branch:
    generator = torch.Generator().manual_seed(1000 + seed)
    mask, condition = torch.rand(1, FRAMES, 1, 1, generator=generator), torch.randn(4, 1, 8, 8, generator=generator)
    if picture is not None:
        mask, condition = picture.mask, picture.condition
    return Branch(torch.randn(length, WIDTH, generator=generator), mask, condition, image=image)


def row(seed: int, *, image: ImageTokens | None = None) -> list[BatchEntry]:
    negative = branch_of(seed)
    positive = branch_of(seed + 50, picture=negative, image=image)
    evaluation = evaluation_of(seed, (negative, positive))
    return [BatchEntry(evaluation, branch, None) for branch in evaluation.branches]


@torch.inference_mode()
def by_diffusers(parts: Components, entry: BatchEntry) -> torch.Tensor:
    latents, branch = entry.evaluation.latents, entry.branch
    spread = latents.shape[1:]
    sample = torch.cat([latents, branch.mask.expand(1, *spread), branch.condition.expand(-1, *spread)])[None]
    prompts = branch.prompt[None].repeat_interleave(spread[0], dim=0)
    return parts.unet(sample, torch.tensor([entry.evaluation.timestep]), prompts, return_dict=False)[0]


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def test_rows_that_share_a_forward_get_what_diffusers_gives_each_alone(
    plain: Components, ours: tuple[Components, Forward]
) -> None:
    entries = [*row(1), *row(2), *row(3)[1:]]
    predictions = ours[1].predict(entries)
    for entry, prediction in zip(entries, predictions, strict=True):
        assert distance(prediction[None], by_diffusers(plain, entry)) < 5e-6


def test_a_side_with_another_picture_keeps_its_own_beginning(
    plain: Components, ours: tuple[Components, Forward]
) -> None:
    with_picture, without = branch_of(1), branch_of(2)
    evaluation = evaluation_of(1, (without, with_picture, branch_of(3, picture=with_picture)))
    entries = [BatchEntry(evaluation, branch, None) for branch in evaluation.branches]
    for entry, prediction in zip(entries, ours[1].predict(entries), strict=True):
        assert distance(prediction[None], by_diffusers(plain, entry)) < 5e-6


def test_looks_of_different_sizes_and_none_share_a_forward(ours: tuple[Components, Forward]) -> None:
    images = [ImageTokens(torch.randn(num, WIDTH), scale) for num, scale in ((4, 0.5), (8, 1.0))]
    entries = [*row(1, image=images[0]), *row(2, image=images[1]), *row(3)]
    together = ours[1].predict(entries)
    for entry, prediction in zip(entries, together, strict=True):
        alone = ours[1].predict([entry])
        assert distance(prediction[None], alone) < 5e-6
    assert distance(together[1], ours[1].predict(row(1))[1]) > 1e-3


def test_many_prompts_do_not_pile_up(ours: tuple[Components, Forward]) -> None:
    forward = ours[1]
    first = row(1)
    before = forward.predict(first)
    for seed in range(CACHED_PROJECTIONS):
        forward.predict(row(seed % 7 + 2))
    assert forward._cross is not None
    assert len(forward._cross._prompts) <= CACHED_PROJECTIONS
    assert torch.equal(forward.predict(first), before)


def test_long_prompts_count_by_their_tokens(plain: Components) -> None:
    cross = Forward(copy.deepcopy(plain))._cross
    assert cross is not None
    most = CACHED_TOKENS // 4000
    branches = [branch_of(seed, length=4000) for seed in range(most + 2)]
    for branch in branches:
        cross.states([branch])
    assert len(cross._prompts) == most
    (known,) = [each for each in cross._prompts.values() if each.source is branches[-1].prompt]
    assert cross._of_prompt(branches[-1].prompt) is known
    longest = branch_of(99, length=CACHED_TOKENS + 1)
    assert cross.states([longest]).keys[0].shape[2] == CACHED_TOKENS + 1
    assert len(cross._prompts) == most


def test_a_forward_reads_nothing_back_from_the_device(ours: tuple[Components, Forward]) -> None:
    """On torch's meta device tensors have no values: whatever would wait for a GPU to read one raises here."""
    meta = torch.device("meta")
    parts = copy.deepcopy(ours[0])
    parts.unet.to(meta)
    forward = Forward(replace(parts, device=meta))

    def moved(entry: BatchEntry) -> BatchEntry:
        branch, evaluation = entry.branch, entry.evaluation
        tensors = {name: getattr(branch, name).to(meta) for name in ("prompt", "mask", "condition")}
        return BatchEntry(replace(evaluation, latents=evaluation.latents.to(meta)), replace(branch, **tensors))

    with torch.device(meta):
        image = ImageTokens(torch.empty(4, WIDTH), 0.5)
    entries = [moved(entry) for entry in [*row(1), *row(2)]]
    entries[1] = replace(entries[1], branch=replace(entries[1].branch, image=image))
    predictions = forward.predict(entries)
    assert predictions.is_meta
    assert predictions.shape == (4, 4, FRAMES, 8, 8)


@torch.inference_mode()
def test_a_forward_goes_on_from_a_beginning_that_was_computed_before(ours: tuple[Components, Forward]) -> None:
    unet = ours[0].unet
    prefix = prefix_of(unet)
    assert prefix is not None
    torch.manual_seed(0)
    sample = torch.randn(1, 9, FRAMES, 8, 8).repeat(2, 1, 1, 1, 1)
    prompts = torch.randn(2, 7, WIDTH).repeat_interleave(FRAMES, dim=0)

    def run() -> torch.Tensor:
        answer: torch.Tensor = unet(sample, torch.full((2,), 3.0), prompts, return_dict=False)[0]
        return answer

    plain, alone = run(), prefix.begin(run)
    with prefix.shared(num=1, num_frames=FRAMES, inverse=torch.tensor([0, 0])):
        shared = prefix.begin(run)
    assert [each.stride() for each in shared] == [each.stride() for each in alone], "compiled code asks for one layout"
    for beginning in (alone, shared):
        with prefix.begun(beginning):
            assert distance(run(), plain) < 1e-6
            assert distance(run(), plain) < 1e-6, "the first forward has written over it"
    assert torch.equal(run(), plain)


def code_of(backend: Callable[..., object] | str = "eager") -> CompiledCode:
    return CompiledCode(mode="default", backend=backend)  # type: ignore[arg-type]


def at_each_first_call(backend: Callable[..., object]) -> BackgroundCompilation:
    return BackgroundCompilation(code_of(backend), patience=0, in_place=True)


@pytest.mark.heavy  # torch traces the UNet twice
def test_the_unet_compiles_beside_its_forwards_in_one_graph_per_kind_and_no_more(
    ours: tuple[Components, Forward], caplog: pytest.LogCaptureFixture
) -> None:
    parts = replace(copy.deepcopy(ours[0]), compile_mode="default")
    forward = Forward(parts)
    graphs: list[str] = []
    may_compile = threading.Event()

    def count(graph: torch.fx.GraphModule, inputs: object) -> object:
        assert may_compile.wait(60)
        graphs.append(threading.current_thread().name)
        return graph.forward

    def assert_as_plain(entries: list[BatchEntry]) -> None:
        assert distance(forward.predict(entries), ours[1].predict(entries)) < 5e-6

    beside = forward._compilation = BackgroundCompilation(code_of(count), patience=1)
    for seed in range(1, 6):  # rows go on, and give what they give
        assert_as_plain(row(seed))
    assert graphs == []
    may_compile.set()
    deadline = time.monotonic() + 120
    while not beside._ready and time.monotonic() < deadline:
        time.sleep(0.02)
    gc.collect()  # the module that was compiled beside is gone
    for seed in range(1, 4):  # other timesteps, prompts and noise: the same graph
        assert_as_plain(row(seed))
    assert graphs == ["compilation"], "the stream runs the other thread's code, and compiles none"
    forward._compilation = at_each_first_call(count)
    assert_as_plain(row(1))
    assert len(graphs) == 1
    assert_as_plain([*row(1), *row(2)])
    assert graphs == ["compilation", threading.current_thread().name]
    # Entries that share nothing, and a row with guidance beside two without: the same graph.
    for entries in ([row(seed)[1] for seed in range(1, 5)], [*row(1), row(2)[0], row(3)[1]]):
        assert_as_plain(entries)
    assert len(graphs) == 2
    # Another model of the same kind, such as one with LoRAs merged, runs the same graph on its own weights.
    other = copy.deepcopy(parts)
    for weight in other.unet.parameters():
        weight.data = weight.data * 1.01
    theirs = Forward(replace(other, compile_mode="default"))
    theirs._compilation = at_each_first_call(count)
    prediction = theirs.predict(row(1))
    assert distance(prediction, Forward(replace(other, compile_mode=None)).predict(row(1))) < 5e-6
    assert distance(prediction, forward.predict(row(1))) > 1e-3
    assert len(graphs) == 2
    # FreeU runs uncompiled, and leaves no trace.
    forward.predict([replace(entry, free_u=(0.9, 0.2, 1.5, 1.6)) for entry in row(1)])
    forward.predict(row(1))
    assert len(graphs) == 2
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_many_models_of_one_class_compile_side_by_side() -> None:
    class Doubling(torch.nn.Module):
        def forward(self, value: torch.Tensor) -> torch.Tensor:
            return 2 * value

    for model in range(3):
        code = code_of()
        for kind in range(12):
            value = torch.ones(model * 12 + kind + 2)
            assert torch.equal(code((kind,), Doubling(), value), 2 * value)
        assert len(code.kinds) == 12


def test_a_kind_that_is_dropped_frees_its_code() -> None:
    graphs: list[weakref.ref[torch.fx.GraphModule]] = []

    def keep(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(weakref.ref(graph))
        return graph.forward

    code, module = code_of(keep), torch.nn.Identity()
    for kind in range(2):
        code((kind,), module, torch.ones(kind + 2) + 1)
    code.drop((0,))
    gc.collect()
    assert [graph() is None for graph in graphs] == [True, False]
    code((1,), module, torch.ones(3))
    assert len(graphs) == 2, "the other one's code runs on"
    code((0,), module, torch.ones(2))
    assert len(graphs) == 3, "it is compiled again"


def test_a_module_that_cannot_be_compiled_runs_plain_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    class Printing(torch.nn.Module):
        def forward(self, value: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            return value + 1

    assert float(code_of()(("one",), Printing(), torch.tensor(1.0))) == 2
    assert "runs uncompiled" in caplog.text


def test_a_cache_that_cannot_be_read_is_told_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"compiled by an earlier version")
    with pytest.raises(ConfigError, match="must be a folder"):
        CompiledCode(mode="default", backend="eager", cache=tmp_path / "cache")


def test_damaged_compiled_code_is_left_out_and_said_once_for_unet_and_decoder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "one.compiled").write_bytes(b"damaged")
    for code in [CompiledCode(mode="default", backend="eager", cache=tmp_path) for _ in range(2)]:
        assert float(code(("one",), torch.nn.Identity(), torch.tensor(3.0))) == 3
    assert caplog.text.count("one.compiled holds no compiled code") == 1


def test_a_file_of_a_shared_cache_that_goes_while_it_is_read_harms_nobody(tmp_path: Path) -> None:
    (tmp_path / "gone.compiled").symlink_to(tmp_path / "replaced by another process")
    code = CompiledCode(mode="default", backend="eager", cache=tmp_path)
    assert float(code(("one",), torch.nn.Identity(), torch.tensor(3.0))) == 3


def test_processes_that_share_a_cache_keep_each_others_code_and_write_nothing_twice(tmp_path: Path) -> None:
    CacheArtifactManager._ensure_cache_artifacts_registered()

    def process(*kinds: str) -> set[str]:
        """As one that compiles these kinds one after the other."""
        with CacheArtifactManager.with_fresh_cache():
            cache = CompileCache(tmp_path)
            for kind in kinds:
                CacheArtifactManager.record_artifact("inductor", kind, kind.encode())
                cache.save()
        return {path.name for path in tmp_path.iterdir()}

    first = process("small", "large")
    assert len(first) == 1, "the second file holds what was in the first"
    both = process("small", "wide")
    assert first < both
    assert len(both) == 2
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in tmp_path.iterdir()), "other users' workers read it"
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert process("small", "large") == both
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times


def test_a_folder_of_compiled_code_keeps_the_newest_files(tmp_path: Path) -> None:
    for number in range(MOST_FILES + 3):
        (tmp_path / f"{number}.compiled").write_bytes(b"old")
        os.utime(tmp_path / f"{number}.compiled", (number, number))
    with CacheArtifactManager.with_fresh_cache():
        CacheArtifactManager.record_artifact("inductor", "kind", b"code")
        CompileCache(tmp_path).save()
    names = {path.name for path in tmp_path.iterdir()}
    assert len(names) == MOST_FILES
    assert f"{MOST_FILES + 2}.compiled" in names
    assert "0.compiled" not in names


def test_compiled_code_is_kept_beside_the_weights_unless_the_model_says_otherwise() -> None:
    model = ModelConfig(name="any", base="some/base")
    folder = compile_cache_of(model)
    assert folder is not None
    assert folder.parts[-3:] == ("pia-ray", "compiled", f"torch-{torch.__version__}")
    assert compile_cache_of(model.model_copy(update={"compile_cache": "off"})) is None
    assert compile_cache_of(model.model_copy(update={"compile_cache": "/some/folder"})) == Path("/some/folder")
    assert compile_cache_of(model.model_copy(update={"compile_cache": "~nosuchuser/x"})) == Path("~nosuchuser/x")


def test_a_cache_that_cannot_be_written_costs_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    code = CompiledCode(mode="default", backend="eager", cache=tmp_path / "file" / "below.bin")
    assert float(code(("one",), torch.nn.Identity(), torch.tensor(3.0))) == 3
