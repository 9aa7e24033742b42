"""The programs of docs/recipes.md run as they stand there, and leave what they promise."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import ray

from pia_ray import probe, storage
from pia_ray.cli.main import main
from pia_ray.testing import make_lora
from pia_ray.webhooks import Poster
from tests.docs.generated import ROOT
from tests.models import home_of_quick_demo
from tests.online.video_server import VideoServer, serve_videos
from tests.s3_server import S3Server, point_at, s3_server

__all__ = ["s3_server"]  # fixture

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.filterwarnings("ignore:The Sora API is scheduled:DeprecationWarning"),
    # Ray Data sets its own deprecated settings whenever it makes a context.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),
    # Ray leaves pipes and log files of the processes it started to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

RECIPES = dict(re.findall(r"^## (.+)\n((?:(?!## ).*\n)*)", (ROOT / "docs/recipes.md").read_text("utf-8"), re.MULTILINE))
SECRET = "whsec_" + "c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0"


def program(name: str, kind: str = "python") -> str:
    """The one program of the recipe."""
    (found,) = re.findall(rf"```{kind}\n(.*?)```", RECIPES[name], re.DOTALL)
    return str(found)


def run(name: str) -> dict[str, Any]:
    """The names that the Python program has defined when it is through; it runs in this process."""
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(program(name), f"recipe: {name}", "exec"), names)
    return names


@pytest.fixture(scope="module")
def cluster(s3_server: S3Server, ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Ray cluster that this process is connected to, whose workers reach the S3 server, which has a bucket `shop`."""
    with pytest.MonkeyPatch.context() as patch:
        point_at(patch, s3_server.environment, tmp_path_factory.mktemp("aws"))
        s3_server.client().create_bucket(Bucket="shop")
        ray.init(address=ray_address, log_to_driver=False, logging_level="ERROR")
        yield
        ray.shutdown()
    storage.forget_clients()


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VideoServer]:
    with serve_videos(str(tmp_path_factory.mktemp("serve"))) as up:
        yield up


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return home_of_quick_demo(tmp_path_factory.mktemp("home"))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory but for `pictures/`, of a user whose demo model is quick."""
    monkeypatch.setenv("HOME", str(home))
    (tmp_path / "pictures").mkdir()
    for name in ("mug.png", "moon.png"):
        shutil.copy(str(files("pia_ray") / "demo/catalog/images" / name), tmp_path / "pictures")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def at_endpoint(endpoint: VideoServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipes' address is that of the running endpoint."""
    for name, text in RECIPES.items():
        monkeypatch.setitem(RECIPES, name, text.replace("http://127.0.0.1:8000", endpoint.url))


def is_video(path: str) -> bool:
    return probe(path).num_frames > 1


def test_every_recipe_is_run_here_and_short() -> None:
    tested = Path(__file__).read_text("utf-8")
    assert len(RECIPES) >= 10
    for name, text in RECIPES.items():
        assert f'"{name}"' in tested, name
        assert len(text.split("```")[1].splitlines()) <= 31, name


def test_a_folder_of_pictures_becomes_videos(cluster: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("A folder of pictures")["summary"].exit_code == 0
    assert "2 made, 0 were there" in capsys.readouterr().out
    assert all(is_video(str(path)) for path in Path("out/folder/videos").rglob("*.mp4"))
    run("A folder of pictures")
    assert "0 made, 2 were there" in capsys.readouterr().out


def test_a_manifest_on_s3_leaves_its_videos_there(
    cluster: None, s3_server: S3Server, capsys: pytest.CaptureFixture[str]
) -> None:
    s3_server.client().upload_file("pictures/mug.png", "shop", "mug.png")
    run("Parquet on S3")
    printed = capsys.readouterr().out
    assert "'sku': 'm-1'" in printed
    assert storage.exists(re.findall(r"s3://shop/animated/[^']+\.mp4", printed)[0])


def test_a_lora_changes_the_video_as_far_as_it_weighs(folder: Path) -> None:
    make_lora(folder / "pixar.safetensors", Path(str(files("pia_ray") / "demo/model")))
    run("A LoRA")
    made = {path.stem: path.read_bytes() for path in folder.glob("*.mp4")}
    assert set(made) == {"default", "none", "pixar-1.2"}
    assert len(set(made.values())) == 3


def test_a_long_video_has_its_frames(capsys: pytest.CaptureFixture[str]) -> None:
    run("A long video")
    assert capsys.readouterr().out.startswith("48 frames")


def test_a_graph_of_ones_own_holds_the_videos(cluster: None) -> None:
    (row,) = run("A step of your own in a Ray Data graph")["videos"].to_dict("records")
    assert (row["sku"], row["error"]) == ("m-1", None)
    assert is_video(row["video"])


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_the_endpoint_answers_curl(at_endpoint: None) -> None:
    command = program("The endpoint from curl", "bash")
    done = subprocess.run(["bash", "-euc", command], capture_output=True, text=True, timeout=120, check=True)
    assert is_video("mug.mp4")
    assert "event: " in done.stdout


def test_the_endpoint_answers_the_openai_client(at_endpoint: None) -> None:
    names = run("The endpoint from the openai client")
    names["client"].close()
    assert is_video("mug.mp4")


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no node")
def test_the_endpoint_answers_javascript(at_endpoint: None, folder: Path) -> None:
    (folder / "recipe.mjs").write_text(program("The endpoint from JavaScript", "javascript"))
    done = subprocess.run(["node", "recipe.mjs"], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "video/mp4"), done.stderr
    assert is_video("mug.mp4")


def test_a_batch_names_the_end_of_each_line(at_endpoint: None, capsys: pytest.CaptureFixture[str]) -> None:
    names = run("A batch")
    names["client"].close()
    assert set(capsys.readouterr().out.splitlines()) == {"rotate right completed", "zoom in completed"}


def test_a_webhook_receiver_takes_signed_events_alone() -> None:
    with socket.socket() as probing:
        probing.bind(("127.0.0.1", 0))
        port = probing.getsockname()[1]
    source = program("A webhook receiver").replace("8001", str(port))
    receiver = subprocess.Popen(
        [sys.executable, "-c", source],
        env={**os.environ, "PIA_RAY_WEBHOOK_SECRET": SECRET},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    body = json.dumps({"id": "evt_1", "object": "event", "type": "video.completed", "data": {"id": "video_1"}}).encode()
    signed = Poster(SECRET).headers("evt_1", body)
    try:
        assert post(port, body, {**signed, "webhook-signature": "v1,bm8="}) == 401
        assert post(port, body, signed) == 204
        assert receiver.stdout is not None
        assert receiver.stdout.readline() == "video.completed video_1\n"
    finally:
        receiver.kill()
        receiver.communicate()


def post(port: int, body: bytes, headers: dict[str, str]) -> int:
    """The status of the answer, once something listens there."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/", data=body, headers=headers)
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except urllib.error.URLError:
            assert time.monotonic() < deadline, "nothing listens there"
            time.sleep(0.1)


def test_a_catalogue_is_estimated_animated_and_reported(cluster: None, capsys: pytest.CaptureFixture[str]) -> None:
    for line in program("Estimate, run, report", "console").splitlines():
        words = re.findall(r'"([^"]*)"|(\S+)', line.removeprefix("$ pia-ray "))
        assert main([quoted or word for quoted, word in words]) == 0, line
    assert "2 of 2 work items succeeded, none failed, none left" in capsys.readouterr().out
