"""jobs/animate_catalog.py through the Jobs API on several nodes, from and to S3: a node dies, a catalogue grows."""

from __future__ import annotations

import json
import shutil
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from pia_ray import ledger, read_results, storage
from pia_ray.config.model import read_yaml
from pia_ray.media import video
from pia_ray.testing import draw_picture
from tests.cluster.networks import until
from tests.cluster.nodes import ON_CPU, PATIENCE_S, ROOT, Nodes

pytestmark = [
    pytest.mark.heavy,
    # Ray's client code of 2.60 leaves sockets to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


WITH_FAKES = """
import runpy
from pia_ray.catalog import cluster_run
from tests.cli.fake_actors import run_with_fakes

cluster_run.run_catalog = run_with_fakes(seconds_per_step=0.1)
runpy.run_path("animate_catalog.py", run_name="__main__")
"""


class Catalogue:
    """Pictures and manifests in a bucket, and the folder that is submitted to animate them: the script and one of its
    config files, with places and a model for this machine. Its actors have fakes, which load no torch.
    """

    def __init__(self, bucket: str, folder: Path, config: str, **settings: Any) -> None:
        self.output = f"{bucket}/videos"
        self._bucket = bucket
        self.num_rows = 0
        self._folder = folder / "job"
        self._folder.mkdir()
        shutil.copy(ROOT / "jobs" / "animate_catalog.py", self._folder)
        (self._folder / "with_fakes.py").write_text(WITH_FAKES)
        values = read_yaml(ROOT / "jobs" / "configs" / config)
        values |= {
            "manifest": f"{bucket}/manifests/",
            "output": self.output,
            "model": ON_CPU,
            "cpus_per_actor": 1,
            "defaults": {"num_frames": 4, "num_inference_steps": 8},
            **settings,
        }
        (self._folder / config).write_text(yaml.safe_dump(values))
        self._entrypoint = f"python with_fakes.py --config {config}"

    def add_rows(self, num: int) -> None:
        """Makes the catalogue longer by so many, in a manifest of their own."""
        numbers = range(self.num_rows, self.num_rows + num)
        for number in numbers:
            self.draw(number, seed=number)
        lines = [
            json.dumps({"id": f"item-{n}", "image": f"{self._bucket}/pictures/{n}.png", "prompt": f"picture {n}"})
            + "\n"
            for n in numbers
        ]
        storage.write_bytes(f"{self._bucket}/manifests/from-{self.num_rows:06d}.jsonl", "".join(lines).encode())
        self.num_rows += num

    def draw(self, number: int, *, seed: int) -> None:
        """Puts a picture there, in place of what may be there."""
        storage.write_bytes(f"{self._bucket}/pictures/{number}.png", draw_picture((96, 64), seed=seed))

    def submit(self, nodes: Nodes) -> str:
        """Starts a job that animates what is new; its id."""
        return nodes.submit(self._entrypoint, self._folder, submission_id=f"nightly-{uuid.uuid4().hex[:8]}")

    def num_videos(self) -> int:
        """The number of videos that are there."""
        return sum(1 for _ in storage.list_objects(f"{self.output}/videos", suffix=".mp4"))

    def videos(self) -> dict[str, bytes]:
        """The videos that are there, by URI."""
        found = storage.list_objects(f"{self.output}/videos", suffix=".mp4")
        return {each.uri: storage.read_bytes(each.uri) for each in found}

    def rows(self) -> dict[str, dict[str, Any]]:
        """The results by id, once each."""
        rows = read_results(self.output).to_pylist()
        assert max(Counter(row["id"] for row in rows).values()) == 1
        return {row["id"]: row for row in rows}


def test_nodes_have_addresses_of_their_own(nodes: Nodes):
    if nodes.network.shared:
        pytest.skip(nodes.network.shared)
    assert len({node["node_ip"] for node in nodes.alive()}) == 3


def test_a_catalogue_is_complete_though_a_node_dies_and_a_nightly_job_does_only_what_is_new_or_has_changed(
    nodes: Nodes, bucket: str, tmp_path: Path
):
    (tmp_path / "once").mkdir()
    (tmp_path / "nightly").mkdir()
    catalogue = Catalogue(bucket, tmp_path / "once", "spot_workers.yaml", batch_size=2, detect_changes=True)
    catalogue.add_rows(16)
    job = catalogue.submit(nodes)
    until(lambda: nodes.job_ended(job) or catalogue.num_videos() >= 3, seconds=PATIENCE_S, what="some videos are there")
    at_work = [worker for worker in nodes.workers if worker.runs("AnimateRow")]
    assert at_work, "the run was over too soon to show anything"
    nodes.kill(at_work[0])
    before = catalogue.videos()
    assert len(before) < 16, "the run was over too soon to show anything"
    nodes.finish(job)

    first = catalogue.rows()
    assert {row["status"] for row in first.values()} == {"succeeded"}
    videos = catalogue.videos()
    assert {row["video_uri"] for row in first.values()} == set(videos)
    assert len(videos) == 16
    assert {uri: videos[uri] for uri in before} == before, "what was committed is not made again"
    assert {video.probe(content).num_frames for content in videos.values()} == {4}
    verified = ledger.verify(catalogue.output)
    assert verified.ok, verified

    nightly = Catalogue(bucket, tmp_path / "nightly", "nightly.yaml", actors=1)
    nightly.num_rows = 16
    nightly.add_rows(2)
    nightly.draw(0, seed=100)
    nodes.finish(nightly.submit(nodes))
    second = nightly.rows()
    assert {row["status"] for row in second.values()} == {"succeeded"}
    new = {item for item, row in second.items() if item not in first or row["finished_at"] > first[item]["finished_at"]}
    assert new == {"item-0", "item-16", "item-17"}
    assert {item: row for item, row in second.items() if item not in new} == {
        item: row for item, row in first.items() if item not in new
    }
    # The first picture's first video stays, for whoever links to it.
    assert videos.items() <= nightly.videos().items()
    assert len(nightly.videos()) == 19
    assert second["item-0"]["video_uri"] != first["item-0"]["video_uri"]
