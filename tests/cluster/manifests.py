"""Readers of the manifests of cluster/k8s, their build by kustomize, and KubeRay's schemas.

The schemas are not in the repository: PIA_RAY_KUBERAY_CRDS names a folder of KubeRay's CRDs, which its sources have in
ray-operator/config/crd/bases, and PIA_RAY_REQUIRE_CRDS=1 forbids to skip what needs them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
K8S = CLUSTER / "k8s"
COMPONENTS = K8S / "components"
KUBERNETES = "1.33"
CRDS = os.environ.get("PIA_RAY_KUBERAY_CRDS", "")
Mapping = dict[str, Any]

needs_kustomize = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")


def documents(path: Path) -> list[Mapping]:
    """The documents of a YAML file, without empty ones."""
    return [document for document in yaml.safe_load_all(path.read_text("utf-8")) if document]


def name_of(found: Mapping) -> str:
    """Kind and name of an object."""
    return f"{found['kind']}/{found['metadata']['name']}"


def resources(folder: Path) -> Iterator[tuple[str, Mapping]]:
    """The objects of a folder's files by kind and name."""
    for path in sorted(folder.glob("*.yaml")):
        for document in documents(path):
            if "kind" in document and document["kind"] not in ("Kustomization", "Component"):
                yield name_of(document), document


def build(folder: Path) -> list[Mapping]:
    """What kustomize makes of a folder."""
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [each for each in yaml.safe_load_all(done.stdout) if each]


def pod_templates(found: Any) -> Iterator[Mapping]:
    """The pod templates within an object."""
    if isinstance(found, list):
        for each in found:
            yield from pod_templates(each)
    elif isinstance(found, dict):
        if isinstance(found.get("spec"), dict) and "containers" in found["spec"]:
            yield found
        else:
            for each in found.values():
                yield from pod_templates(each)


def closed(schema: Any) -> Any:
    """The schema with every object that lists its keys closed to others, and Kubernetes' either-or types spelt out."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string") is True:
        made = {key: value for key, value in made.items() if key not in ("type", "anyOf")} | {
            "type": ["integer", "string"]
        }
    if isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema:
        made["additionalProperties"] = schema.get("x-kubernetes-preserve-unknown-fields", False)
    return made


@cache
def schema_of(kind: str) -> Mapping:
    """KubeRay's own schema of a kind, closed; skips the test where its CRDs are not at hand."""
    path = Path(CRDS) / f"ray.io_{kind.lower()}s.yaml"
    if not CRDS or not path.is_file():
        reason = f"there is no {path.name} in PIA_RAY_KUBERAY_CRDS ({CRDS or 'not set'})"
        if os.environ.get("PIA_RAY_REQUIRE_CRDS") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    crd = yaml.load(path.read_text("utf-8"), loader)  # megabytes: a minute without libyaml
    (version,) = [each for each in crd["spec"]["versions"] if each["name"] == "v1"]
    schema: Mapping = closed(version["schema"]["openAPIV3Schema"])
    fields = ("name", "namespace", "labels", "annotations")
    schema["properties"]["metadata"] = {
        "type": "object",
        "properties": {field: {} for field in fields},
        "additionalProperties": False,
    }
    return schema


def faults(resource: Mapping) -> list[str]:
    """What KubeRay's schema has against an object; nothing where it is right."""
    validator = jsonschema.Draft202012Validator(schema_of(resource["kind"]))
    return [
        f"{'.'.join(map(str, each.absolute_path))}: {each.message[:200]}" for each in validator.iter_errors(resource)
    ]
