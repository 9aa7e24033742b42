"""The memory of a GPU that a process counts on, from torch's accounts as they are written down here."""

from __future__ import annotations

from typing import Any

from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.model import ModelConfig
from pia_ray.config.serve import ServeConfig
from pia_ray.pia.device.gpu_memory import CONTEXT_BYTES, available_bytes, share_bytes

OURS, OTHER = 7, 8
GIB = 2**30


def segment(total: int, active: int, *, stream: int = OURS, pool: tuple[int, int] = (0, 0)) -> dict[str, Any]:
    return {"total_size": total, "active_size": active, "stream": stream, "segment_pool_id": pool}


def available(*segments: dict[str, Any], free: int = 10, allowed: int = 1000) -> int:
    return available_bytes(free=free, allowed=allowed, segments=segments, stream=OURS)


def test_unused_memory_of_the_own_stream_counts() -> None:
    assert available(segment(20, 15)) == 10 + 5


def test_gaps_between_tensors_of_another_stream_do_not_count() -> None:
    assert available(segment(20, 15, stream=OTHER)) == 10


def test_a_whole_unused_segment_of_another_stream_counts_because_torch_gives_it_back() -> None:
    assert available(segment(20, 0, stream=OTHER)) == 10 + 20


def test_the_pool_of_a_cuda_graph_does_not_count() -> None:
    assert available(segment(20, 0, pool=(0, 1))) == 10


def test_memory_of_other_processes_is_not_free() -> None:
    # 30 of 100 are theirs: the driver says so, whatever this process has taken and left unused.
    assert available(segment(40, 40), free=30, allowed=100) == 30


def test_the_bound_of_the_process_holds_where_the_gpu_has_more() -> None:
    assert available(segment(40, 30), free=1000, allowed=50) == 10 + 10
    assert available(segment(40, 40), free=1000, allowed=30) == 0


def test_shares_of_a_gpu_fit_in_it_with_their_contexts() -> None:
    for number in (2, 3, 4):
        assert number * (share_bytes(24 * GIB, 1 / number) + CONTEXT_BYTES) <= 24 * GIB
    assert share_bytes(GIB, 0.1) == 0


def test_workers_on_a_part_of_a_gpu_have_that_share_of_its_memory() -> None:
    model = ModelConfig.named("demo")
    for gpus, share in ((None, 1.0), (0.0, 1.0), (0.5, 0.5), (1.0, 1.0), (2.0, 1.0)):
        catalog = CatalogConfig(manifest="m.csv", output="out", model=model, gpus_per_actor=gpus)
        serve = ServeConfig(models={"demo": model}, default_model="demo", storage="out", gpus_per_replica=gpus)
        assert (catalog.gpu_share, serve.gpu_share) == (share, share)
