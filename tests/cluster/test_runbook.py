"""The runbook's deployment, typed from top to bottom: each command finds the files, objects and variables it names.

A walk keeps what the commands before have made. `REQUIRED` is what the runbook says is there before the first one.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.manifests import CLUSTER, ROOT, build, documents, faults, name_of, needs_kustomize, pod_templates

REQUIRED = {"file/tls.crt", "file/tls.key", "Namespace/envoy-gateway-system"}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def deployment() -> list[tuple[str, str]]:
    """Language and text of the blocks that one types for a deployment, in order."""
    text = (CLUSTER / "README.md").read_text()
    section = text[text.index("\n## Deploy\n") : text.index("`--build-arg VARIANT=cpu` builds")]
    return BLOCK.findall(section)


def commands(block: str) -> list[str]:
    return block.replace("\\\n", " ").strip().splitlines()


def write_overlay(folder: Path) -> None:
    """Makes the overlay in a copy of what it names, by the runbook's own files and `cp`."""
    shutil.copytree(CLUSTER / "k8s", folder / "cluster" / "k8s")
    for language, block in deployment():
        if language == "yaml":
            path = folder / block.splitlines()[0].removeprefix("# ")
            path.parent.mkdir(exist_ok=True)
            path.write_text(block)
        for words in map(shlex.split, commands(block) if not language else ()):
            if words[0] == "cp":
                (folder / words[2]).parent.mkdir(exist_ok=True)
                shutil.copy(folder / words[1], folder / words[2])


def secrets_named(found: Any) -> set[str]:
    """Names of the secrets that an object cannot do without."""
    if isinstance(found, list):
        return {name for each in found for name in secrets_named(each)}
    if not isinstance(found, dict):
        return set()
    names = {name for each in found.values() for name in secrets_named(each)}
    for key in ("secretKeyRef", "secret"):
        reference = found.get(key)
        if isinstance(reference, dict) and not reference.get("optional"):
            names |= {reference.get("name") or reference.get("secretName")} - {None}
    if "credentials" in found:
        names.add(found["credentials"]["name"])
    return names | {each["name"] for each in found.get("certificateRefs", ())}


class Walk:
    """What there is after the commands so far: files, images, namespaces, secrets, variables, objects."""

    def __init__(self, folder: Path) -> None:
        self.there = set(REQUIRED)
        self._folder = folder

    def step(self, language: str, block: str) -> None:
        """Does a block.

        Raises:
            AssertionError: it names something that is not there yet.
        """
        if language == "yaml":
            path = block.splitlines()[0].removeprefix("# ")
            self.needs(f"folder/{path.split('/')[0]}")
            self.there.add(f"file/{path}")
            return
        for line in commands(block):
            for name in re.findall(r"\$([A-Z]+)\b", line):
                self.needs(f"variable/{name}")
            variable = re.match(r"([A-Z]+)=", line)
            if variable:
                self.there.add(f"variable/{variable[1]}")
                continue
            words = shlex.split(line)
            programs: dict[str, Callable[[list[str]], None]] = {
                "helm": self._helm,
                "docker": self._docker,
                "mkdir": lambda rest: self.there.add(f"folder/{rest[0]}"),
                "cp": self._copy,
                "kubectl": self._kubectl,
                "curl": lambda _: self.needs("RayService/pia-ray"),
            }
            programs[words[0]](words[1:])

    def needs(self, *names: str) -> None:
        """Fails where one of these is not there yet; files of the repository always are."""
        for name in names:
            kind, _, rest = name.partition("/")
            assert name in self.there or (kind == "file" and (ROOT / rest).exists()), f"there is no {name} yet"

    def _helm(self, words: list[str]) -> None:
        if words[:2] == ["repo", "add"]:
            self.there.add(f"chart/{words[2]}")
            return
        assert (words[0], words[-1]) == ("install", "--create-namespace")
        self.needs(f"chart/{words[2].split('/')[0]}")
        self.there |= {"operator", f"Namespace/{words[words.index('--namespace') + 1]}"}

    def _docker(self, words: list[str]) -> None:
        image = next(word for word in words if word.startswith("registry.example.com/"))
        if words[0] == "build":
            self.needs(f"file/{words[words.index('-f') + 1]}")
            self.there.add(f"image/{image}")
        self.needs(f"image/{image}")
        if words[0] == "push":
            self.there.add(f"pushed/{image}")
        if words[:2] == ["image", "inspect"]:
            self.needs(f"pushed/{image}")  # an image has a digest when a registry has it
        if words[0] == "run":
            self.there.add("weights/" + words[words.index("--to") + 1])

    def _copy(self, words: list[str]) -> None:
        self.needs(f"file/{words[0]}", f"folder/{words[1].split('/')[0]}")
        self.there.add(f"file/{words[1]}")

    def _kubectl(self, words: list[str]) -> None:
        if words[0] == "-n":
            self.needs(f"Namespace/{words[1]}")
            words = words[2:]
        for word in words:
            for kind, path in re.findall(r"^--(cert|key)=(.+)$", word):
                self.needs(f"file/{path}")
                assert kind in ("cert", "key")
        if words[:2] == ["apply", "-f"]:
            self.needs(f"file/{words[2]}")
            self.there |= {name_of(each) for each in documents(ROOT / words[2])}
        elif words[:2] == ["apply", "-k"]:
            self._apply(words[2])
        elif words[:2] == ["create", "secret"]:
            self.there.add(f"Secret/{words[3]}")
        elif words[:2] == ["label", "namespace"]:
            self.needs(f"Namespace/{words[2]}")
            self.there.add(f"label/{words[3]}")
        elif words[0] == "wait":
            self.needs("RayService/" + next(word for word in words if word.startswith("rayservice/")).split("/")[1])
        else:
            assert words[:2] == ["create", "job"]
            (source,) = [word for word in words if word.startswith("--from=cronjob/")]
            self.needs(f"CronJob/{source.split('/')[1]}")

    def _apply(self, overlay: str) -> None:
        values = yaml.safe_load((self._folder / overlay / "kustomization.yaml").read_text())
        paths = [each["path"] for each in values["patches"] if "path" in each]
        paths += [name for each in values["configMapGenerator"] for name in each["files"]]
        self.needs("operator", *(f"file/{overlay}/{path}" for path in paths))
        built = build(self._folder / overlay)
        self.needs(*(f"Secret/{name}" for name in secrets_named(built)))
        self.needs(*(f"pushed/{name}:0.1.0-cuda" for name in {image.split("@")[0] for image in images(built)}))
        (policy,) = [each for each in built if each["kind"] == "NetworkPolicy"]
        assert "pia-ray/caller" in str(policy)
        self.needs("label/pia-ray/caller=true")
        assert "s3://my-videos/models/realistic-vision/base" in str(built)
        self.needs("weights/s3://my-videos/models/realistic-vision")
        self.there |= {name_of(each) for each in built}


def images(built: list[Any]) -> set[str]:
    """The images of our own pods."""
    containers = [each for found in built for pod in pod_templates(found) for each in pod["spec"]["containers"]]
    return {each["image"] for each in containers if "redis" not in each["image"]}


@needs_kustomize
def test_each_command_of_the_runbook_names_what_is_there_by_then(tmp_path: Path):
    write_overlay(tmp_path)
    walk = Walk(tmp_path)
    for language, block in deployment():
        walk.step(language, block)
    assert {"RayService/pia-ray", "CronJob/pia-ray-nightly", "Gateway/pia-ray"} <= walk.there


@pytest.mark.parametrize(
    ("line", "missing"),
    [
        ("kubectl apply -f cluster/k8s/namespace.yaml\n", "Namespace/pia-ray"),
        ("mkdir overlay\n", "folder/overlay"),
        ("KEY=$(openssl rand -hex 24)\n", "variable/KEY"),
        ("docker push registry.example.com/pia-ray:0.1.0-cuda\n", "pushed/registry.example.com/pia-ray:0.1.0-cuda"),
        pytest.param(
            "kubectl -n pia-ray create secret generic pia-ray-redis "
            '--from-literal=password="$(openssl rand -hex 24)"\n',
            "Secret/pia-ray-redis",
            marks=needs_kustomize,
        ),
    ],
)
def test_a_runbook_that_lacks_a_command_is_noticed_at_the_first_that_needs_it(tmp_path: Path, line: str, missing: str):
    write_overlay(tmp_path)
    walk = Walk(tmp_path)
    blocks = deployment()
    assert line in "".join(block for _, block in blocks)
    with pytest.raises(AssertionError, match=f"there is no {missing} yet"):
        for language, block in blocks:
            walk.step(language, block.replace(line, ""))


@needs_kustomize
def test_the_overlay_of_the_runbook_builds_with_its_own_host_digest_and_files(tmp_path: Path):
    write_overlay(tmp_path)
    catalog = tmp_path / "overlay" / "catalog.yaml"
    catalog.write_text(catalog.read_text().replace("s3://my-catalog", "s3://other"))
    built = build(tmp_path / "overlay")
    found = {name_of(each): each for each in built}
    assert images(built) == {f"registry.example.com/pia-ray@sha256:{'0' * 64}"}
    assert "s3://other" in found["ConfigMap/pia-ray-catalog"]["data"]["catalog.yaml"]
    hosts = {
        host
        for name in ("HTTPRoute/pia-ray", "HTTPRoute/pia-ray-redirect")
        for host in found[name]["spec"]["hostnames"]
    }
    assert hosts | {each["hostname"] for each in found["Gateway/pia-ray"]["spec"]["listeners"]} == {
        "videos.example.com"
    }
    for each in built:
        if each["apiVersion"] == "ray.io/v1":
            assert faults(each) == []


def test_the_serve_config_of_the_runbook_is_that_of_the_manifest_but_for_delays():
    (written,) = [block for _, block in deployment() if block.startswith("# overlay/serve-config.yaml")]
    (shown,) = yaml.safe_load(yaml.safe_load(written)["spec"]["serveConfigV2"])["applications"]
    (ray,) = documents(CLUSTER / "k8s" / "rayservice.yaml")
    (ours,) = yaml.safe_load(ray["spec"]["serveConfigV2"])["applications"]
    assert shown["args"].items() <= ours["args"].items()
    assert set(ours["args"]) - set(shown["args"]) == {"upscale_delay_s", "downscale_delay_s"}
