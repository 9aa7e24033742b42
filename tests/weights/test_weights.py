"""Weights from folders, from the package, from an S3 server over HTTP and from a hub of our own over HTTP."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from pia_ray.config.added_weights import without_upscaler
from pia_ray.config.model import ModelConfig, build
from pia_ray.errors import ConfigError, WeightsError
from pia_ray.testing import make_ip_adapter, make_pipeline_folder, make_split_checkpoint
from pia_ray.weights import is_pulled, pin, pull, resolve, version, work_version

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline_folder(tmp_path_factory.mktemp("original") / "pipeline")


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return make_split_checkpoint(tmp_path_factory.mktemp("split"))


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "pipeline"))


def model(base: Path | str, **settings: Any) -> ModelConfig:
    return ModelConfig(name="test", base=str(base), **settings)


def refusal(config: ModelConfig) -> str:
    with pytest.raises(WeightsError) as caught:
        resolve(config)
    assert not is_pulled(config)
    return caught.value.message


def test_a_whole_pipeline_folder_resolves_to_itself(folder: Path):
    weights = resolve(model(folder))
    assert (weights.base, weights.motion_adapter, weights.vae) == (folder, None, None)
    assert weights.version == version(model(folder))
    assert is_pulled(model(folder))


def test_a_split_checkpoint_resolves_to_its_three_folders(split: tuple[Path, Path, Path]):
    base, adapter, vae = split
    config = model(base, motion_adapter=str(adapter), vae=str(vae))
    weights = resolve(config)
    assert (weights.base, weights.motion_adapter, weights.vae) == split
    assert weights.version.count("+") == 2


def test_a_base_whose_vae_is_replaced_needs_none(split: tuple[Path, Path, Path], tmp_path: Path):
    base = Path(shutil.copytree(split[0], tmp_path / "base"))
    shutil.rmtree(base / "vae")
    assert resolve(model(base, vae=str(split[2]))).vae == split[2]
    assert "vae" in refusal(model(base))


def test_the_demo_model_comes_with_the_package():
    demo = ModelConfig.named("demo")
    assert (resolve(demo).base / UNET).is_file()
    assert version(demo).startswith("demo@")
    assert is_pulled(demo)


def test_the_demo_model_names_no_folder_of_the_machine_it_was_made_on():
    for path in resolve(ModelConfig.named("demo")).base.rglob("*.json"):
        assert "_name_or_path" not in path.read_text("utf-8"), path


def test_the_demo_model_stays_below_16_mb():
    folder = resolve(ModelConfig.named("demo")).base
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 16_000_000


def test_the_version_is_of_the_content_not_of_the_place(original: Path, folder: Path):
    assert version(model(folder)) == version(model(original))


def test_the_version_changes_with_one_byte_of_the_weights(folder: Path):
    before = version(model(folder))
    content = bytearray((folder / UNET).read_bytes())
    content[-1] ^= 1
    (folder / UNET).write_bytes(content)
    assert version(model(folder)) != before


@pytest.mark.parametrize("name", ["scheduler/scheduler_config.json", "unet/config.json", "tokenizer/merges.txt"])
def test_the_version_changes_with_a_config(folder: Path, name: str):
    before = version(model(folder))
    (folder / name).write_text((folder / name).read_text() + "\n")
    assert version(model(folder)) != before


def test_the_version_ignores_what_is_not_loaded(folder: Path):
    before = version(model(folder))
    (folder / "README.md").write_text("hello")
    (folder / "single-file.safetensors").write_bytes(b"not looked at")
    (folder / "unet/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"not looked at")
    assert version(model(folder)) == before


def test_a_pinned_model_without_hub_ids_is_unchanged(folder: Path):
    assert pin(model(folder)) == model(folder)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path):
    assert "there is no folder" in refusal(model(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", ["model.ckpt", "model.bin", "some/deep/model.pt"])
def test_a_pickled_checkpoint_is_refused_with_what_to_do(tmp_path: Path, name: str):
    message = refusal(model(tmp_path / name))
    assert "pickled" in message
    assert "safetensors" in message


def test_a_single_file_that_is_not_there_is_named_and_no_hub_is_asked(tmp_path: Path):
    assert "there is no file" in refusal(model(tmp_path / "model.safetensors"))


def test_a_folder_with_a_single_file_checkpoint_is_not_diffusers_layout(tmp_path: Path):
    (tmp_path / "realistic.safetensors").write_bytes(b"x")
    message = refusal(model(tmp_path))
    assert "not in diffusers layout" in message
    assert "realistic.safetensors" in message


def test_a_bin_file_is_refused_unless_pickle_is_allowed(folder: Path):
    (folder / UNET).unlink()
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"x")
    message = refusal(model(folder))
    assert "diffusion_pytorch_model.bin" in message
    assert "allow_pickle" in message
    allowed = model(folder, allow_pickle=True)
    assert resolve(allowed).base == folder


def test_weights_of_another_variant_alone_are_refused(folder: Path):
    (folder / UNET).rename(folder / "unet/diffusion_pytorch_model.non_ema.safetensors")
    assert "rename" in refusal(model(folder))


def test_the_fp16_variant_alone_is_taken(folder: Path):
    (folder / UNET).rename(folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    assert resolve(model(folder)).base == folder


@pytest.mark.parametrize("length", [0, 5, 100, 5_000, -1])
def test_truncated_safetensors_are_refused_unloaded(folder: Path, length: int):
    content = (folder / UNET).read_bytes()
    (folder / UNET).write_bytes(content[:length])
    message = refusal(model(folder))
    assert UNET in message
    assert "truncated" in message


def test_safetensors_with_bytes_behind_their_end_are_refused(folder: Path):
    with (folder / UNET).open("ab") as stream:
        stream.write(b"more")
    assert "damaged" in refusal(model(folder))


def test_a_git_lfs_pointer_is_named_as_such(folder: Path):
    (folder / UNET).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in refusal(model(folder))


@pytest.mark.parametrize("header", [b"[]", b'{"a": 1}', b'{"a": {"data_offsets": []}}', b"\xff\xfe"])
def test_a_damaged_safetensors_header_is_refused(folder: Path, header: bytes):
    (folder / UNET).write_bytes(len(header).to_bytes(8, "little") + header)
    assert UNET in refusal(model(folder))


@pytest.mark.parametrize(
    "name",
    [
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
    ],
)
def test_a_missing_file_is_named(folder: Path, name: str):
    (folder / name).unlink()
    message = refusal(model(folder))
    assert name.rpartition("/")[2] in message
    assert name.partition("/")[0] in message


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_config_is_named(folder: Path, content: str):
    (folder / "vae/config.json").write_text(content)
    assert "vae/config.json" in refusal(model(folder))


def test_a_tokenizer_needs_its_new_or_its_old_files(folder: Path):
    (folder / "tokenizer/tokenizer.json").unlink()
    resolve(model(folder))
    (folder / "tokenizer/merges.txt").unlink()
    assert "tokenizer" in refusal(model(folder))


def _shard(folder: Path) -> None:
    (folder / UNET).rename(folder / "unet/diffusion_pytorch_model-00001-of-00001.safetensors")
    index = {"weight_map": {"conv_in.weight": "diffusion_pytorch_model-00001-of-00001.safetensors"}}
    (folder / f"{UNET}.index.json").write_text(json.dumps(index))


def test_sharded_weights_are_used_and_their_missing_shard_is_named(folder: Path):
    _shard(folder)
    assert resolve(model(folder)).base == folder
    (folder / "unet/diffusion_pytorch_model-00001-of-00001.safetensors").unlink()
    assert "00001-of-00001" in refusal(model(folder))


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    file = tmp_path / "loras" / "pytorch_lora_weights.safetensors"
    file.parent.mkdir()
    header = b'{"a.lora_A.weight":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
    return file


def test_loras_and_textual_inversions_are_resolved_and_count_towards_the_version(folder: Path, lora: Path):
    plain = version(model(folder))
    config = model(folder, loras={"pixar": str(lora)}, textual_inversions={"<cat>": {"path": str(lora)}})
    weights = resolve(config)
    assert (weights.loras, weights.textual_inversions) == ({"pixar": lora}, {"<cat>": lora})
    assert is_pulled(config)
    assert pin(config) == config
    assert weights.version == version(config)
    others = [
        config,
        model(folder, loras={"pixar": str(lora)}),
        model(folder, loras={"drawn": str(lora)}),
        model(folder, loras={"pixar": {"path": str(lora), "weight": 0.5}}),
    ]
    versions = {plain, *map(version, others)}
    assert len(versions) == 5
    lora.write_bytes(lora.read_bytes()[:-1] + b"5")
    assert not versions & {*map(version, others)}


def test_an_upscaler_counts_in_the_version_for_work_keys_alone(folder: Path, lora: Path):
    plain, with_upscaler = model(folder), model(folder, upscaler=str(lora))
    assert resolve(with_upscaler).upscaler == lora
    assert version(with_upscaler) == version(plain) == work_version(plain) == resolve(with_upscaler).version
    first = work_version(with_upscaler)
    assert without_upscaler(first) == version(plain) != first
    content = bytearray(lora.read_bytes())
    content[-1] ^= 1
    lora.write_bytes(content)
    assert work_version(with_upscaler) != first
    assert Path(pin(with_upscaler).upscaler or "").is_absolute()


def test_an_upscaler_that_is_not_a_file_of_weights_is_refused(folder: Path, tmp_path: Path):
    assert "is not a .safetensors or .pth file" in refusal(model(folder, upscaler=str(tmp_path)))
    assert "upscaler" in refusal(model(folder, upscaler=str(tmp_path / "gone.safetensors")))
    (tmp_path / "x.pth").write_bytes(b"pickled")
    assert "allow_pickle" in refusal(model(folder, upscaler=str(tmp_path / "x.pth")))
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{")
    assert "truncated" in refusal(model(folder, upscaler=str(tmp_path / "cut.safetensors")))


def test_a_folder_of_a_lora_means_the_file_that_diffusers_writes_there(folder: Path, lora: Path):
    assert resolve(model(folder, loras={"pixar": str(lora.parent)})).loras == {"pixar": lora}


def test_a_relative_lora_is_pinned_to_its_place(folder: Path, lora: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(lora.parent)
    assert pin(model(folder, loras={"pixar": lora.name})).loras["pixar"].path == str(lora)


@pytest.mark.parametrize("part", ["loras", "textual_inversions"])
def test_a_named_file_that_is_missing_cut_or_pickled_is_refused_by_its_name(folder: Path, lora: Path, part: str):
    def message(path: Path, **settings: Any) -> str:
        return refusal(model(folder, **{part: {"pixar": str(path)}}, **settings))

    role = part.removesuffix("s")
    assert f"for {role} pixar" in message(lora.with_name("nowhere.safetensors"))
    lora.write_bytes(lora.read_bytes()[:-1])
    assert "truncated" in message(lora)
    pickled = lora.with_suffix(".pt")
    pickled.write_bytes(b"x")
    assert f"{role} pixar" in (text := message(pickled)) and "allow_pickle" in text
    assert resolve(model(folder, **{part: {"pixar": str(pickled)}}, allow_pickle=True)).base == folder


@pytest.mark.parametrize("name", ["default", "None", " a", "a+b", "a:1", "a<b", "a,b", ""])
def test_a_lora_cannot_have_a_name_that_a_row_could_not_choose(folder: Path, name: str):
    with pytest.raises(ValueError, match="cannot be the name of a LoRA"):
        model(folder, loras={name: "x.safetensors"})


# S3 and the hub are read by processes of their own, as the actors of a node do: caches and clients are per process.
# One server forks them all, so that only it imports what they use. huggingface_hub reads its settings when it is
# imported, so they import it themselves.

SERVER = """
import json, os, signal, sys, traceback
import boto3, httpx2
from pia_ray import storage
from pia_ray.config.catalog import ModelConfig
from pia_ray.errors import WeightsError

assert "huggingface_hub" not in sys.modules

def answer_of(action, settings):
    from pia_ray import weights

    model = ModelConfig(name="test", **settings)
    try:
        answer = getattr(weights, action)(model)
    except WeightsError as error:
        return {"error": error.message}
    if action in ("resolve", "pull"):
        files = {name: str(path) for name, path in {**answer.loras, **answer.textual_inversions}.items()}
        looks = {"ip_adapter": answer.ip_adapter, "image_encoder": answer.image_encoder}
        files |= {name: str(path) for name, path in looks.items() if path}
        answer = {"base": str(answer.base), "version": answer.version, **({"files": files} if files else {})}
    elif action == "pin":
        named = {**answer.loras, **answer.textual_inversions}
        revisions = {name: part.revision for name, part in named.items()}
        if answer.ip_adapter:
            revisions |= {"ip_adapter": answer.ip_adapter_revision, "image_encoder": answer.image_encoder_revision}
        answer = {"revision": answer.revision, **revisions}
    return {"answer": answer}

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    action, settings, environment, pipe = json.loads(line)
    if os.fork():
        continue
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    try:
        answer = answer_of(action, settings)
    except BaseException:
        answer = {"error": traceback.format_exc()}
    with open(pipe, "w") as stream:
        json.dump(answer, stream)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, text=True) as process:
        yield process  # ends with its input


@dataclass
class Node:
    """A machine with a cache of its own."""

    server: subprocess.Popen[str]
    home: Path
    environment: dict[str, str] = field(default_factory=dict)

    def start(self, action: str, base: str, **settings: Any) -> Path:
        """Starts a process that does this; where it writes its answer, when that is read."""
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "AWS_"))},
            "HF_HOME": str(self.home),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            **self.environment,
        }
        pipe = self.home.parent / f"answer-{uuid.uuid4().hex}"
        os.mkfifo(pipe)
        self.server.stdin.write(json.dumps([action, {"base": base, **settings}, environment, str(pipe)]) + "\n")
        self.server.stdin.flush()
        return pipe

    def ask(self, action: str, base: str, **settings: Any) -> Any:
        answer = json.loads(self.start(action, base, **settings).read_text())
        return answer.get("error", answer.get("answer"))


class Bucket:
    """A bucket on a real S3 server over HTTP."""

    def __init__(self) -> None:
        import boto3
        from moto.server import ThreadedMotoServer

        self._server = ThreadedMotoServer(port=0, verbose=False)
        self._server.start()
        host, port = self._server.get_host_and_port()
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        self.client = boto3.client(
            "s3",
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            aws_access_key_id="test",
            aws_secret_access_key="test",
            region_name="us-east-1",
        )
        self.client.create_bucket(Bucket="weights")

    def upload(self, folder: Path, prefix: str) -> None:
        for path in folder.rglob("*"):
            if path.is_file():
                self.client.upload_file(str(path), "weights", f"{prefix}/{path.relative_to(folder)}")

    def stop(self) -> None:
        self.client.close()
        self._server.stop()


@pytest.fixture(scope="module")
def bucket(original: Path) -> Iterator[Bucket]:
    opened = Bucket()
    opened.upload(original, "models/tiny")
    opened.client.put_object(Bucket="weights", Key="models/tiny/huge.ckpt", Body=b"never fetched")
    yield opened
    opened.stop()


@pytest.fixture
def s3_node(bucket: Bucket, server: subprocess.Popen[str], tmp_path: Path) -> Node:
    return Node(server, tmp_path / "home", bucket.environment)


@pytest.mark.heavy
def test_an_s3_prefix_is_fetched_once_and_only_what_counts(s3_node: Node, original: Path):
    first = s3_node.ask("resolve", "s3://weights/models/tiny")
    base = Path(first["base"])
    assert (base / UNET).read_bytes() == (original / UNET).read_bytes()
    assert not (base / "huge.ckpt").exists()
    before = (base / UNET).stat()
    again = s3_node.ask("resolve", "s3://weights/models/tiny/")
    assert again == first
    after = (base / UNET).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert s3_node.ask("version", "s3://weights/models/tiny") == first["version"]
    assert s3_node.ask("is_pulled", "s3://weights/models/tiny") is True


@pytest.mark.heavy
def test_actors_that_start_together_fetch_an_s3_prefix_once(s3_node: Node):
    together = [s3_node.start("resolve", "s3://weights/models/tiny") for _ in range(3)]
    answers = [pipe.read_text() for pipe in together]
    assert len(set(answers)) == 1
    base = Path(json.loads(answers[0])["answer"]["base"])
    assert sorted(path.name for path in base.parent.iterdir()) == [base.name, f"{base.name}.lock"]


@pytest.mark.heavy
def test_the_remains_of_a_fetch_that_died_are_swept_and_not_used(s3_node: Node):
    base = Path(s3_node.ask("resolve", "s3://weights/models/tiny")["base"])
    base.rename(base.parent / f"{base.name}.part-dead")
    assert s3_node.ask("is_pulled", "s3://weights/models/tiny") is False
    assert Path(s3_node.ask("resolve", "s3://weights/models/tiny")["base"]) == base
    assert not list(base.parent.glob("*.part-*"))


@pytest.mark.heavy
def test_replaced_weights_in_s3_are_another_version(bucket: Bucket, s3_node: Node, original: Path):
    bucket.upload(original, "models/replaced")
    before = s3_node.ask("resolve", "s3://weights/models/replaced")
    content = bytearray((original / UNET).read_bytes())
    content[-1] ^= 1
    bucket.client.put_object(Bucket="weights", Key=f"models/replaced/{UNET}", Body=bytes(content))
    after = s3_node.ask("resolve", "s3://weights/models/replaced")
    assert after["version"] != before["version"]
    assert (Path(after["base"]) / UNET).read_bytes() == bytes(content)


@pytest.mark.heavy
def test_faults_of_an_s3_prefix_name_it_and_leave_nothing_behind(bucket: Bucket, s3_node: Node, original: Path):
    bucket.upload(original, "models/cut")
    bucket.client.put_object(Bucket="weights", Key=f"models/cut/{UNET}", Body=(original / UNET).read_bytes()[:-5])
    message = s3_node.ask("resolve", "s3://weights/models/cut")
    assert f"s3://weights/models/cut/{UNET}" in message
    assert "truncated" in message
    assert not [path for path in s3_node.home.rglob("*") if path.suffix == ".safetensors"]
    assert "s3://weights/models/nothing" in s3_node.ask("resolve", "s3://weights/models/nothing")
    assert "no bucket" in s3_node.ask("version", "s3://other/models/tiny")
    assert s3_node.ask("is_pulled", "s3://other/models/tiny") is False


@pytest.mark.heavy
def test_single_objects_of_s3_are_fetched_once(bucket: Bucket, s3_node: Node, lora: Path):
    bucket.client.put_object(Bucket="weights", Key="loras/pixar.safetensors", Body=lora.read_bytes())
    settings = {"loras": {"pixar": "s3://weights/loras/pixar.safetensors"}}
    first = s3_node.ask("resolve", "s3://weights/models/tiny", **settings)
    file = Path(first["files"]["pixar"])
    assert file.read_bytes() == lora.read_bytes()
    before = file.stat()
    assert s3_node.ask("resolve", "s3://weights/models/tiny", **settings) == first
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert s3_node.ask("version", "s3://weights/models/tiny", **settings) == first["version"]
    assert s3_node.ask("is_pulled", "s3://weights/models/tiny", **settings) is True
    bucket.client.put_object(Bucket="weights", Key="loras/pixar.safetensors", Body=lora.read_bytes()[:-1])
    message = s3_node.ask("resolve", "s3://weights/models/tiny", **settings)
    assert "s3://weights/loras/pixar.safetensors" in message and "truncated" in message
    missing = {"loras": {"pixar": "s3://weights/loras/other.safetensors"}}
    assert "there is no s3://" in s3_node.ask("resolve", "s3://weights/models/tiny", **missing)


class Hub(http.server.ThreadingHTTPServer):
    """As much of a hub as snapshot_download asks: revisions, trees and files of repositories in folders."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.repositories: dict[str, Path] = {}
        self.gated: set[str] = set()
        self.fetched: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, repository: str) -> str:
        whole = hashlib.sha1()
        for path in sorted(self.repositories[repository].rglob("*")):
            if path.is_file():
                whole.update(path.read_bytes())
        return whole.hexdigest()


class HubHandler(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        words = self.path.partition("?")[0].strip("/").split("/")
        if words[:2] == ["api", "models"]:
            repository, rest = "/".join(words[2:4]), words[4:]
        else:
            repository, rest = "/".join(words[:2]), words[2:]
        if repository not in self.server.repositories:
            return self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if repository in self.server.gated:
            return self._answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        folder, commit = self.server.repositories[repository], self.server.commit(repository)
        if rest and rest[1] not in ("main", commit):
            return self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if words[0] != "api":
            path = folder / "/".join(rest[2:])
            if not path.is_file():
                return self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            content = path.read_bytes()
            if self.command == "GET":
                self.server.fetched.append(f"{repository}/{path.relative_to(folder)}")
            etag = hashlib.sha1(content).hexdigest()
            return self._answer(200, content, {"X-Repo-Commit": commit, "ETag": f'"{etag}"'})
        if rest and rest[0] == "tree":
            tree = [
                {
                    "type": "file",
                    "path": str(path.relative_to(folder)),
                    "size": path.stat().st_size,
                    "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
                }
                for path in folder.rglob("*")
                if path.is_file()
            ]
            return self._answer(200, json.dumps(tree).encode(), {})
        siblings = [{"rfilename": str(path.relative_to(folder))} for path in folder.rglob("*") if path.is_file()]
        about = {"_id": "1", "id": repository, "modelId": repository, "sha": commit, "siblings": siblings}
        return self._answer(200, json.dumps(about).encode(), {})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(folder: Path) -> Iterator[Hub]:
    opened = Hub()
    opened.repositories["someone/tiny-pia"] = folder
    yield opened
    opened.shutdown()
    opened.server_close()


@pytest.fixture
def hub_node(hub: Hub, server: subprocess.Popen[str], tmp_path: Path) -> Node:
    return Node(server, tmp_path / "home", {"HF_ENDPOINT": hub.url})


def _offline(node: Node) -> Node:
    return replace(node, environment={**node.environment, "HF_HUB_OFFLINE": "1"})


@pytest.mark.heavy
def test_a_hub_model_is_fetched_once_and_then_used_without_network(hub: Hub, hub_node: Node, folder: Path):
    (folder / "someone.ckpt").write_bytes(b"never fetched")
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"never fetched")
    (folder / "unet/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"never fetched")
    commit = hub.commit("someone/tiny-pia")
    assert hub_node.ask("is_pulled", "someone/tiny-pia") is False
    assert hub_node.ask("version", "someone/tiny-pia") == f"test@{commit[:12]}"
    assert hub.fetched == []
    first = hub_node.ask("resolve", "someone/tiny-pia")
    assert first["version"] == f"test@{commit[:12]}"
    assert (Path(first["base"]) / UNET).read_bytes() == (folder / UNET).read_bytes()
    assert not [name for name in hub.fetched if name.endswith((".ckpt", ".bin", ".fp16.safetensors"))]
    assert _offline(hub_node).ask("resolve", "someone/tiny-pia") == first
    assert _offline(hub_node).ask("is_pulled", "someone/tiny-pia") is True
    hub.shutdown()
    hub.server_close()
    assert hub_node.ask("resolve", "someone/tiny-pia") == first
    assert hub_node.ask("version", "someone/tiny-pia") == first["version"]
    assert hub_node.ask("pin", "someone/tiny-pia") == {"revision": commit}


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", ["float16", "auto"])
def test_fp16_files_of_the_hub_are_fetched_for_float16_and_where_there_are_no_others(
    dtype: str, hub: Hub, hub_node: Node, folder: Path
):
    half = folder / "unet/diffusion_pytorch_model.fp16.safetensors"
    half.write_bytes((folder / UNET).read_bytes())
    for name in ("text_encoder/model", "vae/diffusion_pytorch_model"):
        (folder / f"{name}.safetensors").rename(folder / f"{name}.fp16.safetensors")
    base = Path(hub_node.ask("resolve", "someone/tiny-pia", dtype=dtype)["base"])
    assert (base / "text_encoder/model.fp16.safetensors").is_file()
    assert (base / "unet" / half.name).is_file()
    assert (base / UNET).is_file() == (dtype == "auto")


@pytest.mark.heavy
def test_pull_follows_a_branch_and_resolve_keeps_what_is_cached(hub: Hub, hub_node: Node, folder: Path):
    first = hub_node.ask("pull", "someone/tiny-pia")
    (folder / "scheduler/scheduler_config.json").write_text('{"beta_schedule": "linear"}')
    assert hub_node.ask("resolve", "someone/tiny-pia") == first
    second = hub_node.ask("pull", "someone/tiny-pia")
    assert second["version"] == f"test@{hub.commit('someone/tiny-pia')[:12]}" != first["version"]
    old = first["base"].rpartition("/")[2]
    assert _offline(hub_node).ask("resolve", "someone/tiny-pia", revision=old) == first


@pytest.mark.heavy
def test_a_bin_file_of_the_hub_is_fetched_only_where_allowed(hub: Hub, hub_node: Node, folder: Path):
    (folder / UNET).unlink()
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"x")
    assert "allow_pickle" in hub_node.ask("resolve", "someone/tiny-pia")
    assert not [name for name in hub.fetched if name.endswith(".bin")]
    base = hub_node.ask("resolve", "someone/tiny-pia", allow_pickle=True)["base"]
    assert (Path(base) / "unet/diffusion_pytorch_model.bin").is_file()


@pytest.mark.heavy
def test_faults_of_the_hub_say_what_to_do(hub: Hub, hub_node: Node, folder: Path, tmp_path: Path):
    hub.repositories["someone/gated"] = folder
    hub.gated.add("someone/gated")
    hub.repositories["someone/pictures"] = tmp_path / "pictures"
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/cat.jpg").write_bytes(b"x")
    for action in ("resolve", "pull"):
        assert "no such model on the hub" in hub_node.ask(action, "someone/misspelt")
        assert "hf auth login" in hub_node.ask(action, "someone/gated")
        assert "not that revision" in hub_node.ask(action, "someone/tiny-pia", revision="v9")
        assert "someone/pictures" in hub_node.ask(action, "someone/pictures")
    assert "no such model on the hub" in hub_node.ask("version", "someone/misspelt")
    assert "hf auth login" in hub_node.ask("version", "someone/gated")
    offline = _offline(hub_node)
    for action in ("resolve", "pull", "version", "pin"):
        assert "HF_HUB_OFFLINE" in offline.ask(action, "someone/tiny-pia")
    unreachable = Node(hub_node.server, tmp_path / "elsewhere", {"HF_ENDPOINT": "http://127.0.0.1:9"})
    for action in ("resolve", "version"):
        assert "cannot be reached" in unreachable.ask(action, "someone/tiny-pia")


@pytest.mark.heavy
def test_an_interrupted_fetch_from_the_hub_is_completed(hub: Hub, hub_node: Node):
    base = Path(hub_node.ask("resolve", "someone/tiny-pia")["base"])
    (base / UNET).resolve().unlink()
    (base / UNET).unlink()
    assert hub_node.ask("is_pulled", "someone/tiny-pia") is False
    assert "HF_HUB_OFFLINE" in _offline(hub_node).ask("resolve", "someone/tiny-pia")
    assert hub_node.ask("resolve", "someone/tiny-pia")["base"] == str(base)
    assert (base / UNET).is_file()


@pytest.mark.heavy
def test_single_files_of_the_hub_are_fetched_once_and_pinned_to_a_commit(
    hub: Hub, hub_node: Node, folder: Path, lora: Path
):
    hub.repositories["someone/loras"] = lora.parent
    (lora.parent / "deep").mkdir()
    other = lora.parent / "deep/other.safetensors"
    other.write_bytes(lora.read_bytes()[:-1] + b"9")  # equal files would be one in the hub's cache
    commit = hub.commit("someone/loras")
    settings = {"loras": {"whole": "someone/loras", "other": "someone/loras/deep/other.safetensors"}}
    before = hub_node.ask("version", str(folder), **settings)
    assert hub.fetched == []
    first = hub_node.ask("resolve", str(folder), **settings)
    assert first["version"] == before
    for name, file in {"whole": lora, "other": other}.items():
        assert Path(first["files"][name]).read_bytes() == file.read_bytes()
    assert len(hub.fetched) == 2
    offline = _offline(hub_node)
    assert offline.ask("resolve", str(folder), **settings) == first
    assert offline.ask("is_pulled", str(folder), **settings) is True
    assert offline.ask("pin", str(folder), **settings) == {"revision": None, "whole": commit, "other": commit}
    moved = {"loras": {"whole": "someone/loras", "other": "someone/loras"}}
    assert hub_node.ask("version", str(folder), **moved) != before, "another file of the same commit"
    missing = {"loras": {"other": "someone/loras/nowhere.safetensors"}}
    assert "holds no file nowhere" in hub_node.ask("resolve", str(folder), **missing)
    assert "no such model on the hub" in hub_node.ask("resolve", str(folder), loras={"x": "someone/nobody"})


@pytest.fixture(scope="module")
def looks(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with IP-Adapter and image encoder, as the published ones lie together."""
    folder = tmp_path_factory.mktemp("looks") / "models"
    make_ip_adapter(folder, original)[0].rename(folder / "ip-adapter_sd15.safetensors")
    return folder


def test_an_ip_adapter_and_its_image_encoder_are_part_of_the_version(original: Path, looks: Path, tmp_path: Path):
    folder = Path(shutil.copytree(looks, tmp_path / "models"))
    places = {"ip_adapter": folder / "ip-adapter_sd15.safetensors", "image_encoder": folder / "image_encoder"}
    settings = {name: str(place) for name, place in places.items()}
    weights = resolve(model(original, **settings))
    assert (str(weights.ip_adapter), str(weights.image_encoder)) == tuple(settings.values())
    usual = {**settings, "ip_adapter": str(folder)}
    assert resolve(model(original, **usual)) == weights, "a folder means the file of the usual name in it"
    assert weights.version == version(model(original, **settings)) != version(model(original))
    for name in ("ip-adapter_sd15.safetensors", "image_encoder/model.safetensors"):
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= 1
        (folder / name).write_bytes(content)
        assert version(model(original, **settings)) != weights.version, name
    (folder / "image_encoder/model.safetensors").unlink()
    assert "model.safetensors" in refusal(model(original, **settings))


def test_an_image_encoder_without_ip_adapter_is_refused(original: Path, looks: Path):
    with pytest.raises(ConfigError, match="image_encoder needs an ip_adapter"):
        build(ModelConfig, {"base": str(original), "image_encoder": str(looks / "image_encoder")})


@pytest.mark.heavy
def test_an_ip_adapter_and_its_image_encoder_are_found_inside_one_repository(
    hub: Hub, hub_node: Node, folder: Path, looks: Path
):
    hub.repositories["someone/looks"] = looks.parent
    commit = hub.commit("someone/looks")
    settings = {"ip_adapter": "someone/looks/models", "image_encoder": "someone/looks/models/image_encoder"}
    before = hub_node.ask("version", str(folder), **settings)
    assert hub.fetched == []
    first = hub_node.ask("resolve", str(folder), **settings)
    assert first["version"] == before
    assert Path(first["files"]["ip_adapter"]).read_bytes() == (looks / "ip-adapter_sd15.safetensors").read_bytes()
    encoder = Path(first["files"]["image_encoder"])
    assert {path.name for path in encoder.iterdir()} == {"config.json", "model.safetensors"}
    offline = _offline(hub_node)
    assert offline.ask("resolve", str(folder), **settings) == first
    assert offline.ask("is_pulled", str(folder), **settings) is True
    pinned = {"revision": None, "ip_adapter": commit, "image_encoder": commit}
    assert offline.ask("pin", str(folder), **settings) == pinned


@pytest.mark.heavy
def test_an_ip_adapter_and_its_image_encoder_come_from_s3(bucket: Bucket, s3_node: Node, folder: Path, looks: Path):
    bucket.upload(looks, "looks")
    settings = {
        "ip_adapter": "s3://weights/looks/ip-adapter_sd15.safetensors",
        "image_encoder": "s3://weights/looks/image_encoder",
    }
    answer = s3_node.ask("resolve", str(folder), **settings)
    assert Path(answer["files"]["ip_adapter"]).read_bytes() == (looks / "ip-adapter_sd15.safetensors").read_bytes()
    assert (Path(answer["files"]["image_encoder"]) / "model.safetensors").is_file()
    assert s3_node.ask("version", str(folder), **settings) == answer["version"]


def test_pull_verifies_local_folders_too(folder: Path):
    assert pull(model(folder)).base == folder
    (folder / UNET).write_bytes(b"")
    with pytest.raises(WeightsError):
        pull(model(folder))
