"""The shape of the package: who may import whom, who owns which dependency, what a bare import costs."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import pia_ray
from pia_ray import errors

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pia_ray"

ORDER = (
    "errors",
    "logs",
    "spare_threads",
    "extras",
    "imports",
    "formatting",
    "config",
    "types",
    "result_row",
    "takes",
    "temporary_folders",
    "storage",
    "webhooks",
    "weights",
    "ray_runtime",
    "media",
    "animation",
    "prepare",
    "manifest",
    "ledger",
    "pia",
    "testing",
    "catalog",
    "online",
    "demo",
    "bench",
    "cli",
)
"""The rooms of the package: a module or sub-package imports only those that stand before it."""

INSIDE = {
    "pia_ray.pia": (
        "transfers",
        "evaluation",
        "scorer",
        "safety_checker",
        "components",
        "admission",
        "device",
        "upscaler",
        "unet",
        "decoding",
        "loading",
        "denoising",
        "model_cache",
        "style_models",
        "forward_sizes",
        "engine",
        "warm_up",
        "submissions",
        "finisher",
        "animator",
        "pipeline_inputs",
        "pipeline",
        "judging",
    ),
    "pia_ray.online": (
        "allocator",
        "public_errors",
        "documents",
        "rendering",
        "requests",
        "files",
        "usage",
        "video_jobs",
        "http",
        "batches",
        "routes",
        "app",
        "service",
        "serve",
    ),
}
"""The same inside the two rooms that have rooms of their own."""

FOLDERS = {
    "pia_ray.pia": {"decoding", "denoising", "device", "loading", "unet"},
    "pia_ray.online": {"batches", "documents", "http", "rendering", "requests", "routes", "serve", "video_jobs"},
}
"""The rooms inside them that are folders."""

NEVER = {
    "pia_ray.catalog": {"pia_ray.online": "the wings are siblings"},
    "pia_ray.online": {"pia_ray.catalog": "the wings are siblings"},
    "pia_ray.pia": {
        "pia_ray.storage": "the model knows no URI",
        "pia_ray.manifest": "the model knows no manifest",
        "pia_ray.ledger": "the model keeps no record of rows",
        "pia_ray.media.video": "the model makes frames, not files",
    },
    "pia_ray.testing": {"pia_ray.pia": "the fake animator must start without torch"},
}
"""Imports that no module may have, with the reason."""

LONG_FILES = {
    "pia_ray/errors.py": "the tree of errors is one file, drawn at its head",
}
"""Files of more than 400 lines. The list only shrinks."""

_A_ROW = "a flat list of the columns"

LONG_FUNCTIONS = {
    "pia_ray.result_row.ResultRow.failed": _A_ROW,
    "pia_ray.result_row.ResultRow.succeeded": _A_ROW,
    "pia_ray.pia.denoising.denoise.denoise": "the loop of the method, with the order of its draws",
    "pia_ray.pia.pipeline.PIAPipeline.__call__": "its arguments are those of diffusers, one a line",
    "pia_ray.pia.unet.group_norm_kernel._fold": "a kernel, which only a GPU compiles",
    "pia_ray.online.video_jobs.dispatcher.Dispatcher.__init__": "its settings and its state, one a line",
    "pia_ray.online.video_jobs.store.JobStore.create": "its arguments and the fields of the job, one a line",
}
"""Functions of more than 40 lines, as `num_own_lines` counts them. The list only shrinks."""

OWNERS = {
    "torch": {
        "pia_ray.pia": "the model",
        "pia_ray.bench": "waits for the device it times",
        "pia_ray.testing": "makes tiny checkpoints, when called",
    },
    "diffusers": {
        "pia_ray.pia": "the model",
        "pia_ray.bench": "the pipeline that ours is timed beside",
        "pia_ray.testing": "makes tiny checkpoints, when called",
    },
    "transformers": {
        "pia_ray.pia": "the model",
        "pia_ray.bench": "keeps its advice off the screen",
        "pia_ray.testing": "makes tiny checkpoints, when called",
    },
    "accelerate": {"pia_ray.pia": "offloads the model's parts"},
    "huggingface_hub": {"pia_ray.weights": "fetches from the hub"},
    "filelock": {"pia_ray.weights": "one process per node fetches"},
    "PIL": {
        "pia_ray.media": "decodes and fits pictures, writes gif and webp",
        "pia_ray.catalog.steps": "hands pictures from fetch to animate",
        "pia_ray.pia": "takes pictures, knows no files",
        "pia_ray.bench": "hands pictures to the pipeline beside ours",
        "pia_ray.testing": "draws pictures, when called",
    },
    "pi_heif": {"pia_ray.media": "decodes HEIC"},
    "av": {"pia_ray.media": "encodes and decodes videos"},
    "boto3": {"pia_ray.storage": "speaks to S3"},
    "botocore": {"pia_ray.storage": "speaks to S3"},
    "fsspec": {"pia_ray.storage.other_stores": "reads gs://, az://, hf:// and others"},
    "httpx2": {
        "pia_ray.storage.https": "guarded https:// inputs",
        "pia_ray.weights.hub_requests": "knows the errors of huggingface_hub's requests",
    },
    "httpcore2": {"pia_ray.storage.https": "guarded https:// inputs"},
    "pyarrow": {
        "pia_ray.manifest": "reads manifests",
        "pia_ray.ledger": "reads and writes the ledger",
        "pia_ray.storage": "hands out the file system that boto3's settings describe",
        "pia_ray.catalog": "work items travel as Arrow batches",
        "pia_ray.testing": "writes manifests, when called",
    },
    "ray": {
        "pia_ray.ray_runtime": "starts and ends it",
        "pia_ray.catalog.cluster_run": "knows whether this process is connected to Ray already",
        "pia_ray.catalog.graph": "Ray Data",
        "pia_ray.catalog.actors.actor_pool": "sizes the actors of a run",
        "pia_ray.catalog.actors.channel": "joins the driver of a run and its actors",
        "pia_ray.catalog.actors.helper_actors": "leaves out the actors that Ray Data adds",
        "pia_ray.catalog.actors.key_values": "writes to the cluster's key-value store",
        "pia_ray.catalog.actors.metrics": "exports the metrics of runs through Ray's own",
        "pia_ray.catalog.actors.results": "reads what Ray Data gives, and ends its execution",
        "pia_ray.catalog.actors.stages": "runs in the actors",
        "pia_ray.catalog.actors.start_reports": "carries the actors' reports to the driver",
        "pia_ray.online.serve": "Ray Serve",
    },
    "triton": {"pia_ray.pia.unet.group_norm_kernel": "kernels, where torch brings it"},
    "spandrel": {"pia_ray.pia.loading.upscaler_file": "knows the architectures of upscalers"},
    "fastapi": {"pia_ray.online": "the HTTP interface"},
    "starlette": {"pia_ray.online": "the HTTP interface"},
    "prometheus_client": {"pia_ray.online.http.metrics": "what the endpoint counts"},
    "anyio": {"pia_ray.online": "the event loop's side of the HTTP interface"},
    "c2pa": {"pia_ray.media.marking.signing": "signs manifests of videos"},
    "cryptography": {"pia_ray.media.marking.signing": "reads the certificate and its key"},
    "openpyxl": {"pia_ray.manifest.workbooks": "reads Excel workbooks"},
    "argcomplete": {"pia_ray.cli": "completion in shells"},
    "rich": {"pia_ray.cli": "the live display and tables on the terminal"},
    "yaml": {"pia_ray.config": "configuration files"},
}
"""Each heavy dependency with the modules (and what is below them) that may import it, and why."""

ENVIRONMENT_READERS = ("pia_ray.cli", "pia_ray.online.serve", "pia_ray.ray_runtime")
"""The only modules that may read environment variables: entry points, and the start of Ray, for what Ray reads."""

Function = ast.FunctionDef | ast.AsyncFunctionDef

HEAVY = ("torch", "diffusers", "transformers", "ray", "PIL", "boto3", "pyarrow", "av", "httpx2", "fastapi")


@dataclass(frozen=True)
class Import:
    """One import statement's target: a module's dotted name, as far as it is a module."""

    importer: str
    target: str
    line: int


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package by dotted name, parsed."""
    return {name_of(path): ast.parse(path.read_text("utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def _statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports at any depth but those under TYPE_CHECKING, which never run."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for part in child.orelse:
                yield from _statements(part)
        else:
            yield from _statements(child)


@cache
def imports() -> tuple[Import, ...]:
    """Every import of the package that can run."""
    found = []
    for importer, tree in modules().items():
        for statement in _statements(tree):
            if isinstance(statement, ast.Import):
                found += [Import(importer, alias.name, statement.lineno) for alias in statement.names]
                continue
            assert statement.level == 0, f"{importer}:{statement.lineno} imports relatively"
            assert statement.module
            for alias in statement.names:
                inner = f"{statement.module}.{alias.name}"
                found.append(Import(importer, inner if inner in modules() else statement.module, statement.lineno))
    return tuple(found)


def within(module: str, owner: str) -> bool:
    return module == owner or module.startswith(f"{owner}.")


def child_of(parent: str, module: str) -> str:
    """The name right below the parent that the module is in; empty for a module that is not below it."""
    return module.removeprefix(f"{parent}.").partition(".")[0] if module.startswith(f"{parent}.") else ""


@pytest.mark.parametrize(("parent", "order"), [("pia_ray", ORDER), *INSIDE.items()])
def test_the_house_has_the_rooms_that_are_named(parent: str, order: tuple[str, ...]):
    assert {child_of(parent, name) for name in modules()} - {""} == set(order)


@pytest.mark.parametrize("parent", FOLDERS)
def test_the_rooms_that_are_folders_are_named(parent: str):
    folder = ROOT.joinpath(*parent.split("."))
    assert {path.name for path in folder.iterdir() if (path / "__init__.py").exists()} == FOLDERS[parent]


@pytest.mark.parametrize(("parent", "order"), [("pia_ray", ORDER), *INSIDE.items()])
def test_a_module_imports_only_what_stands_above_it(parent: str, order: tuple[str, ...]):
    wrong = []
    for found in imports():
        importer, target = child_of(parent, found.importer), child_of(parent, found.target)
        if "" not in (importer, target) and order.index(target) > order.index(importer):
            wrong.append(f"{found.importer}:{found.line} imports {found.target}")
    assert not wrong


def test_wings_and_model_keep_to_themselves():
    wrong = [
        f"{found.importer}:{found.line} imports {found.target}: {reason}"
        for found in imports()
        for importer, targets in NEVER.items()
        for target, reason in targets.items()
        if within(found.importer, importer) and within(found.target, target)
    ]
    assert not wrong


def test_no_file_is_long_but_those_that_are_named():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {name for name, num_lines in lengths.items() if num_lines > 400} == set(LONG_FILES)


def outer_functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, Function]]:
    """The functions below the node that are in no other function below it, by dotted name."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            yield f"{prefix}{child.name}", child
        else:
            inside = f"{prefix}{child.name}." if isinstance(child, ast.ClassDef) else prefix
            yield from outer_functions(child, inside)


def functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, Function]]:
    """Every function below the node, by dotted name."""
    for name, function in outer_functions(node, prefix):
        yield name, function
        yield from functions(function, f"{name}.")


def num_lines_of(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def num_own_lines(function: Function) -> int:
    """Lines of a function and its arguments, without its docstring and the functions inside it."""
    apart = [inner for _, inner in outer_functions(function)]
    text = function.body[:1] if ast.get_docstring(function) is not None else []
    return num_lines_of(function) - sum(map(num_lines_of, [*apart, *text]))


def test_no_function_is_long_but_those_that_are_named():
    long = {
        f"{module}.{name}"
        for module, tree in modules().items()
        for name, function in functions(tree)
        if num_own_lines(function) > 40
    }
    assert long == set(LONG_FUNCTIONS)


def test_no_modules_import_each_other_in_a_circle():
    below: dict[str, set[str]] = {}
    for found in imports():
        if found.target in modules():
            below.setdefault(found.importer, set()).add(found.target)
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for target in sorted(below.get(module, ())):
                visit(target, (*path, module))
            done.add(module)

    for module in modules():
        visit(module, ())


def test_a_heavy_dependency_is_imported_by_its_owner_alone():
    wrong = []
    for found in imports():
        owners = OWNERS.get(found.target.partition(".")[0])
        if owners is not None and not any(within(found.importer, owner) for owner in owners):
            wrong.append(f"{found.importer}:{found.line} imports {found.target}, which belongs to {', '.join(owners)}")
    assert not wrong


def test_every_third_party_import_is_declared_and_owned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = chain.from_iterable(project["optional-dependencies"].values())
    declared = {canonicalize_name(Requirement(line).name) for line in (*project["dependencies"], *extras)}
    # What is imported under another name than it is installed by, or comes as the stated part of another package.
    aliases = {"pil": "pillow", "yaml": "pyyaml", "botocore": "boto3", "starlette": "fastapi", "c2pa": "c2pa-python"}
    aliases |= {"anyio": "fastapi", "uvicorn": "ray", "triton": "torch"}  # torch's builds for CUDA bring it
    wrong = []
    for found in imports():
        top = found.target.partition(".")[0]
        if top in sys.stdlib_module_names or top == "pia_ray":
            continue
        name = canonicalize_name(top)
        if aliases.get(name, name) not in declared:
            wrong.append(f"{found.importer}:{found.line} imports {top}")
    assert not wrong


def test_only_entry_points_read_environment_variables():
    wrong = []
    for name, tree in modules().items():
        for node in ast.walk(tree):
            reads = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
            if reads and not any(within(name, reader) for reader in ENVIRONMENT_READERS):
                wrong.append(f"{name}:{node.lineno}")
    assert not wrong


def loaded_after(code: str, *others: str) -> set[str]:
    """Heavy packages, and the others named, that a fresh interpreter has loaded after the code."""
    program = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout)) & {*HEAVY, "huggingface_hub", "rich", "moto", *others}


@pytest.mark.parametrize(
    "code",
    [
        "import pia_ray",
        "import pia_ray.config.knobs",
        "import pia_ray.config.catalog",
        "from pia_ray import AnimationParams, AnimationRequest, CatalogConfig, ModelConfig",
        "from pia_ray.testing import FakeAnimator",
    ],
)
def test_a_light_import_loads_nothing_heavy(code: str):
    assert loaded_after(code) == set()


def test_help_and_completion_load_nothing_heavy_and_no_numpy():
    assert loaded_after("from pia_ray.cli.parser import make_parser; make_parser()", "numpy") == set()


def test_storage_without_s3_loads_no_boto3():
    assert "boto3" not in loaded_after("from pia_ray import storage; storage.read_bytes('pyproject.toml')")


def test_the_driver_of_a_run_imports_no_torch_nor_http_client_and_ray_data_only_beside_rays_start():
    driver = loaded_after("import pia_ray.catalog.cluster_run", "ray.data", "pandas")
    assert "ray" in driver
    assert not driver & {"ray.data", "pandas", "torch", "diffusers", "transformers", "httpx2"}
    worker = loaded_after("import pia_ray.catalog.graph")
    assert not worker & {"torch", "diffusers", "transformers", "httpx2"}


def test_an_image_whose_weights_are_missing_is_refused_without_torch_and_ray(tmp_path: Path):
    picture = next((PACKAGE / "demo" / "catalog" / "images").glob("*.jpg"))
    model = tmp_path / "model.yaml"
    model.write_text(f"base: {tmp_path / 'nowhere'}\n")
    arguments = ["image", str(picture), "-o", str(tmp_path / "a.mp4"), "--prompt", "sea", "--model", str(model)]
    code = f"from pia_ray.cli.main import main\nassert main({arguments!r}) == 2"
    assert not loaded_after(code) & {"torch", "diffusers", "transformers", "ray"}
    assert not (tmp_path / "a.mp4").exists()


def test_the_fake_animator_runs_without_torch():
    code = """
import numpy as np
from pia_ray import AnimationParams, AnimationRequest, ModelConfig
from pia_ray.testing import FakeAnimator

with FakeAnimator(ModelConfig(base="embedded")) as animator:
    request = AnimationRequest(np.zeros((64, 64, 3), np.uint8), AnimationParams(prompt="a"))
    assert len(animator.animate([request])[0].frames) == 16
"""
    assert loaded_after(code) == {"PIL"}


def test_the_help_of_the_command_loads_neither_torch_nor_ray():
    command = Path(sys.executable).parent / "pia-ray"
    done = subprocess.run([sys.executable, "-X", "importtime", command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "pia_ray.cli.main" in loaded
    assert not loaded & {"torch", "ray", "diffusers", "transformers", "pyarrow", "boto3", "PIL", "av"}


def test_every_public_name_can_be_imported():
    for name in pia_ray.__all__:
        assert getattr(pia_ray, name).__name__ == name


def test_the_public_names_are_those_that_type_checkers_see():
    tree = modules()["pia_ray"]
    typed = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for part in node.body
        if isinstance(part, ast.ImportFrom) and (part.module or "").startswith("pia_ray")
        for alias in part.names
    }
    assert typed == set(pia_ray.__all__)
    assert list(pia_ray.__all__) == sorted(pia_ray.__all__)


def error_classes(kind: type[errors.PiaRayError] = errors.PiaRayError) -> list[type[errors.PiaRayError]]:
    return [kind, *(one for child in kind.__subclasses__() for one in error_classes(child))]


@pytest.mark.parametrize("kind", error_classes(), ids=lambda kind: kind.__name__)
def test_every_error_survives_pickling_with_its_message(kind: type[errors.PiaRayError]):
    error = kind("what happened, and what to do")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert again.args == error.args
    assert str(again) == again.message == "what happened, and what to do"
    assert (again.code, again.retryable, again.http_status) == (kind.code, kind.retryable, kind.http_status)


def test_every_error_has_a_code_of_its_own_and_a_place_in_the_drawing():
    kinds = error_classes()
    assert len({kind.code for kind in kinds}) == len(kinds)
    for kind in kinds:
        assert re.search(rf"\b{kind.__name__}\b", errors.__doc__ or ""), kind.__name__
        assert re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", kind.code)
        assert 400 <= kind.http_status < 600


def test_errors_live_in_the_tree_alone():
    ends_a_forward = "_Begun"  # control flow that its module catches itself
    wrong = []
    for name, tree in modules().items():
        if name == "pia_ray.errors":
            continue
        wrong += [
            f"{name}:{node.lineno} {node.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef)
            and node.name != ends_a_forward
            and any(re.search(r"(Error|Exception)$", ast.unparse(base)) for base in node.bases)
        ]
    assert not wrong


def own_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


def test_no_file_names_a_folder_of_somebodys_machine():
    private = [str(path) + "/" for path in (ROOT, Path.home()) if len(path.parts) > 1]
    pattern = re.compile("|".join([*map(re.escape, private), "/home" + r"/\w+/", "/Users" + r"/\w+/"]).encode())
    wrong = [str(path.relative_to(ROOT)) for path in own_files() if pattern.search(path.read_bytes())]
    assert not wrong


def test_every_module_says_what_it_owns():
    assert [name for name, tree in modules().items() if tree.body and not ast.get_docstring(tree)] == []


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_every_dependency_is_pinned_within_its_range():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lines = [*project["project"]["dependencies"]]
    for group in (*project["dependency-groups"].values(), *project["project"]["optional-dependencies"].values()):
        lines += group
    for requirement in map(Requirement, lines):
        if requirement.name == "pia-ray":  # an extra that brings another one
            continue
        pinned = pins().get(canonicalize_name(requirement.name))
        assert pinned is not None, f"{requirement.name} is not in constraints.txt"
        assert requirement.specifier.contains(pinned), f"{requirement} is pinned to {pinned}"


def test_every_dependency_states_its_reason():
    text = (ROOT / "pyproject.toml").read_text()
    block = text[text.index("\ndependencies = [") : text.index("[project.scripts]")]
    entries = [line for line in block.splitlines() if line.strip().startswith('"')]
    assert entries
    assert [line for line in entries if not re.search(r",\s*# \w", line)] == []


def test_the_tests_of_a_group_run_in_one_process(request: pytest.FixtureRequest) -> None:
    """pytest-xdist writes the group behind a test's id; without it, each process would start all shared clusters."""
    assert "PYTEST_XDIST_WORKER" not in os.environ or request.node.nodeid.endswith("@test_shape")
