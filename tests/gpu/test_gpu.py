"""`make gpu` on a CPU at its tiny size: every part runs and leaves a card, within its time, whatever fails."""

from __future__ import annotations

import json
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from benchmarks.gpu.__main__ import main
from benchmarks.gpu.budget import Budget
from benchmarks.gpu.gpu_use import GpuUse
from benchmarks.gpu.part import Outcome, Part, PartCard, run_parts
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.parts.waits import counted_waits
from benchmarks.gpu.random_model import Cost, RandomModel
from benchmarks.gpu.report import CardFolder, machine_of, table
from benchmarks.gpu.sizes import TINY
from benchmarks.gpu.upsampling import as_four_convolutions, four_weights
from pia_ray.bench.reference import step_flops

CPU = torch.device("cpu")

# The parts share a model, so they run in one process.
pytestmark = pytest.mark.xdist_group("gpu")


@pytest.fixture(scope="module")
def model() -> Iterator[RandomModel]:
    with RandomModel(TINY, CPU, compiles=False) as model:
        yield model


@pytest.fixture(scope="module")
def cards(model: RandomModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the whole measurement has written."""
    folder = tmp_path_factory.mktemp("cards")
    run_parts(PARTS, model, Budget(1e6), done=CardFolder(folder, TINY, machine_of(CPU)).write)
    return folder


def card_of(cards: Path, part: str) -> dict[str, Any]:
    (path,) = cards.glob(f"gpu-*-tiny-{part}.json")
    card = json.loads(path.read_text("utf-8"))
    assert card["status"] == "measured", card
    return card


def test_every_part_leaves_one_card_that_says_where_and_when_it_was_measured(cards: Path) -> None:
    found = [json.loads(path.read_text("utf-8")) for path in cards.iterdir()]
    assert {card["part"] for card in found} == {part.name for part in PARTS}
    assert len(found) == len(PARTS)
    for card in found:
        assert card["machine"].keys() >= {"kind", "torch", "diffusers", "commit"}
        assert card["date"].startswith("20")
        expected = "not measured" if card["part"] == "compile-modes" else "measured"
        assert card["status"] == expected, card


def test_the_table_of_kernels_names_ways_that_cannot_run_here(cards: Path) -> None:
    numbers = card_of(cards, "kernels")["numbers"]
    assert numbers.keys() == {"spatial_attention", "temporal_attention", "upsampling", "group_norm"}
    (spatial,) = numbers["spatial_attention"].values()
    assert spatial["default"] > 0
    assert isinstance(spatial["cudnn"], str)
    for ways in numbers["group_norm"].values():
        assert ways["sums"] > 0
        assert ways["converted"] > 0
        assert isinstance(ways["triton"], str)


def test_each_scheduler_is_stepped_and_a_cpu_counts_no_waits(cards: Path) -> None:
    numbers = card_of(cards, "waits")["numbers"]
    assert numbers["unipc"] == {"at_start": None, "per_step": None, "where": {}, "forwards": 3}
    assert numbers["heun"]["forwards"] > 3


def test_videos_in_all_precisions_are_those_of_diffusers_and_not_flat(cards: Path) -> None:
    numbers = card_of(cards, "parity")["numbers"]
    assert list(numbers) == ["float32", "float16", "bfloat16"]
    assert numbers["float32"]["ours_to_diffusers_db"] >= 40
    for found in numbers.values():
        assert found["spread"] > 5
        assert found["movement"] > 1


def test_forwards_are_halved_when_memory_ends_and_no_row_fails(cards: Path) -> None:
    numbers = card_of(cards, "out-of-memory")["numbers"]
    assert (numbers["forward_before"], numbers["forward_while_scarce"]) == (4, 2)
    assert numbers["forwards_without_memory"]
    assert (numbers["simulated"], numbers["rows_failed"]) == (True, 0)


def test_whole_videos_presets_batches_and_the_catalogue_are_timed(cards: Path) -> None:
    ways = card_of(cards, "resident")["numbers"]["ways"]
    assert ways.keys() == {"diffusers, resident", "pia-ray, eager"}
    assert ways["diffusers, resident"]["against_diffusers"] == 1
    assert card_of(cards, "presets")["numbers"].keys() == {"exact", "balanced", "fast"}
    batches = card_of(cards, "batches")["numbers"]
    assert [batches[rows]["forward"] for rows in ("1", "2")] == [2, 4]
    assert batches["2"]["predicted_bytes"] == 2 * batches["1"]["predicted_bytes"] > 0
    assert card_of(cards, "catalogue")["numbers"]["one actor"]["errors"] == {}


def test_a_cancelled_row_frees_the_engine_and_a_new_size_joins(cards: Path) -> None:
    numbers = card_of(cards, "endpoint")["numbers"]
    assert numbers["cancel"]["steps_run"] < numbers["cancel"]["steps"] / 2
    assert numbers["new_size"]["longest_step_s"] > 0


def part(name: str, *, cost_s: float = 0.0, measure: Any = lambda model, card, budget: None) -> Part:
    return Part(name, f"title of {name}", Cost(fixed_s=cost_s), measure)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> Any:
        def measure(model: RandomModel, card: PartCard, budget: Budget) -> None:
            self.now += seconds

        return measure


def test_a_part_that_takes_longer_than_the_time_left_is_skipped_with_the_reason(model: RandomModel) -> None:
    clock, ended, said = Clock(), list[str](), list[str]()
    parts = (
        part("first", cost_s=300, measure=clock.passes(400)),
        part("long", cost_s=330, measure=clock.passes(1)),
        part("short", cost_s=300, measure=clock.passes(300)),
    )
    outcomes = run_parts(
        parts,
        model,
        Budget(720, clock=clock),
        done=lambda outcome: ended.append(outcome.part.name),
        report=said.append,
    )
    assert [outcome.status for outcome in outcomes] == ["measured", "skipped", "measured"]
    assert outcomes[1].reason == "it takes about 330 s, and 320 s are left"
    assert ended == ["first", "long", "short"]
    assert "long: skipped, 0.0 s: it takes about 330 s, and 320 s are left" in said
    assert "it takes about 330 s" in table(outcomes, machine_of(CPU), TINY)


def test_a_part_under_way_when_the_time_ends_keeps_what_it_has_found(model: RandomModel) -> None:
    def measure(model: RandomModel, card: PartCard, budget: Budget) -> None:
        card.numbers["first"] = 1
        time.sleep(60)

    outcomes = run_parts((part("endless", measure=measure), part("next", cost_s=1)), model, Budget(0.5))
    assert [outcome.status for outcome in outcomes] == ["stopped", "skipped"]
    assert outcomes[0].card.numbers == {"first": 1}
    assert outcomes[0].has_card


def test_time_that_a_part_needs_grows_with_its_steps_and_with_slower_devices(model: RandomModel) -> None:
    step_s = TINY.step_tflop * 1e12 / model.flops_per_s
    assert model.expected_s(Cost(steps=100)) > 100 * step_s
    assert model.expected_s(Cost(compiles=5)) == 0  # nothing is compiled here


def breaks(model: RandomModel, card: PartCard, budget: Budget) -> None:
    card.numbers["before"] = 2
    raise ValueError("the reason")


def finds_a_fault(model: RandomModel, card: PartCard, budget: Budget) -> None:
    card.problems.append("the videos differ")


@pytest.mark.parametrize(
    ("measure", "status", "shown"),
    [(breaks, "failed", "ValueError: the reason"), (finds_a_fault, "wrong", "WRONG: the videos differ")],
)
def test_a_part_that_fails_is_in_its_card_and_the_exit_code_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], measure: Any, status: str, shown: str
) -> None:
    code = main(["--device", "cpu", "--output", str(tmp_path)], parts=(part("bad", measure=measure), part("good")))
    assert code == 1
    assert shown in capsys.readouterr().out
    bad, good = (json.loads(path.read_text("utf-8")) for path in sorted(tmp_path.iterdir()))
    assert (bad["status"], good["status"]) == (status, "measured")
    if status == "failed":
        assert bad["numbers"] == {"before": 2}
        assert "raise ValueError" in bad["reason"]


def test_the_chosen_parts_run_in_their_order_and_the_table_comes_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    order: list[str] = []
    parts = [part(name, measure=lambda *given, name=name: order.append(name)) for name in ("a", "b", "c")]
    assert main(["--device", "cpu", "--parts", "c,a", "--output", str(tmp_path)], parts=parts) == 0
    assert order == ["a", "c"]
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("gpu: tiny size")
    assert out[-1] == f"cards in {tmp_path}"


def test_an_unknown_part_is_refused_with_the_names_of_all(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--device", "cpu", "--parts", "kernels,speed"])
    assert ended.value.code == 2
    assert "speed is not a part; parts are kernels, waits," in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_names_the_reason_and_the_way_to_try_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "`--device cpu` tries the parts" in capsys.readouterr().err


def test_waits_are_counted_by_the_line_that_waits() -> None:
    with counted_waits(on_gpu=False) as waits:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    ((where, times),) = waits.items()
    assert where.startswith("test_gpu.py:")
    assert times == 3


def test_the_busy_share_is_the_mean_of_the_samples_between_two_times_until_the_counter_is_gone() -> None:
    shares = iter([0.5, 1.0])

    def read() -> float:
        if (share := next(shares, None)) is None:
            raise RuntimeError("the counter is gone")
        return share

    begin = time.monotonic()
    with GpuUse(read, every_s=0.001) as use:
        while use.between(begin, time.monotonic()) != 0.75:
            time.sleep(0.001)
    assert use.between(begin, begin - 1) is None


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_four_small_convolutions_give_the_doubled_picture_s_convolution(layout: torch.memory_format) -> None:
    images, weight = torch.randn(2, 3, 5, 4).contiguous(memory_format=layout), torch.randn(6, 3, 3, 3)
    doubled = F.conv2d(F.interpolate(images, scale_factor=2.0, mode="nearest"), weight, padding=1)
    torch.testing.assert_close(as_four_convolutions(images, four_weights(weight)), doubled, rtol=1e-4, atol=1e-4)


def test_operations_of_a_step_are_those_that_are_counted(model: RandomModel) -> None:
    side = TINY.side // 8
    counted = step_flops(model.components, num_frames=TINY.num_frames, height=side, width=side)
    assert TINY.step_tflop == pytest.approx(counted / 1e12, rel=0.01)


def test_an_outcome_that_found_nothing_leaves_an_earlier_card_as_it_is(tmp_path: Path) -> None:
    cards = CardFolder(tmp_path, TINY, machine_of(CPU))
    cards.write(Outcome(part("any"), "measured", PartCard({"found": 1})))
    for status in ("skipped", "stopped"):
        cards.write(Outcome(part("any"), status, PartCard()))
    assert json.loads(cards.path_of("any").read_text("utf-8"))["numbers"] == {"found": 1}


def test_a_part_that_cannot_be_interrupted_is_given_up_some_time_after_the_end() -> None:
    ended = threading.Event()
    with Budget(0.01).ended_by(ended.set, after_s=0.01):
        assert ended.wait(60)
    kept = threading.Event()
    with Budget(0.01).ended_by(kept.set, after_s=30):
        pass
    assert not kept.is_set()
