"""docs/api.md: the public names with their signatures, fields and docstrings, as Markdown."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, is_dataclass
from dataclasses import fields as dataclass_fields
from itertools import pairwise
from typing import Any, Literal, get_origin

from pydantic import BaseModel

import pia_ray
from pia_ray import errors, testing
from pia_ray.config import knob_types

GROUPS = {
    "One picture or many": (
        "Animator PIAPipeline AnimationRequest AnimationParams Animation StepEnd EncodedVideo probe VideoFacts "
        "affinity keyframe_affinity Judgement judge load_scorer"
    ),
    "A catalogue": (
        "run_catalog run_local CatalogConfig Progress RunSummary read_results build_processor strip_provenance"
    ),
    "Models": "ModelConfig LoraConfig InversionConfig",
    "The endpoint": "build_app ServeConfig",
    "The command line": "main",
}
"""Headings with their names, in the order in which they are met; errors follow on a page of their own."""

TABLES_OF = {
    "AnimationParams": "[knobs](knobs.md)",
    "CatalogConfig": "[settings of a run](settings.md)",
    "ModelConfig": "[settings of a model](model.md#settings)",
    "ServeConfig": "[settings of the endpoint](endpoint.md)",
}

TOP = """\
# Python interface

Everything that a program of yours names: `from pia_ray import ...`, and `from pia_ray.testing import ...` for its
tests. All other modules are private and change without notice. `import pia_ray` takes milliseconds, because each name
is loaded when it is first used. This page is made from the code: `python -m tests.docs.generated`.
"""


def api() -> str:
    """The page."""
    parts = [TOP]
    for heading, names in GROUPS.items():
        parts.append(f"## {heading}\n")
        parts += [entry(name, getattr(pia_ray, name)) for name in names.split()]
    parts.append("## Errors\n")
    parts.append(f"[Codes, exit and HTTP statuses, and what to do](errors.md).\n\n{tree()}")
    parts.append("## pia_ray.testing\n")
    parts.append(prose(inspect.getdoc(testing) or "") + "\n")
    parts += [entry(name, getattr(testing, name)) for name in testing.__all__]
    return "\n".join(parts)


def entry(name: str, named: Any) -> str:
    """One public name: heading, signature, docstring, fields and methods."""
    if not inspect.isclass(named) and not callable(named):
        return f"### {name}\n\n```python\n{name} = {_quoted(named)}\n```\n"
    rows = list(fields(named)) if inspect.isclass(named) else []
    parts = [f"### {name}\n"]
    if not rows:
        parts.append(f"```python\n{signature(name, named)}\n```\n")
    parts.append(prose(inspect.getdoc(named) or "") + "\n")
    if name in TABLES_OF:
        parts.append(f"Fields: {TABLES_OF[name]}.\n")
    elif rows:
        parts.append("\n".join(["| field | type | default | meaning |", "|---|---|---|---|", *rows]) + "\n")
    if inspect.isclass(named):
        parts += methods(name, named)
    return "\n".join(parts)


def fields(kind: type) -> Iterator[str]:
    """Rows of a table: the fields of a dataclass or model, each with what stands under it in the code."""
    if issubclass(kind, BaseModel):
        for name, model_field in kind.model_fields.items():
            default = MISSING if model_field.is_required() else model_field.default
            yield _row(name, model_field.annotation, default, model_field.description or "", kind)
        return
    if not is_dataclass(kind):
        return
    notes = _notes(kind)
    for each in dataclass_fields(kind):
        yield _row(each.name, each.type, each.default, notes.get(each.name, ""), kind)


def _row(name: str, annotation: object, default: object, note: str, owner: object) -> str:
    shown = "" if default is MISSING else f"`{default!r}`"
    kind = _type(annotation, owner).replace("|", "\\|")
    return f"| `{name}` | `{kind}` | {shown} | {' '.join(note.split())} |"


def _notes(kind: type) -> dict[str, str]:
    """The string that stands under each field, by its name."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        ast.unparse(node.target): str(after.value.value)
        for node, after in pairwise(body.body)
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    }


def methods(owner: str, kind: type) -> list[str]:
    """The public methods and properties that the class itself defines, in its order; of a model, its constructors."""
    parts = []
    for name, member in vars(kind).items():
        is_constructor = isinstance(member, classmethod | staticmethod)
        target = member.__func__ if is_constructor else member
        if name.startswith("_") or (issubclass(kind, BaseModel) and not is_constructor):
            continue
        if isinstance(target, property):
            parts.append(f"`{owner}.{name}`\n\n{prose(inspect.getdoc(target) or '')}\n")
        elif inspect.isfunction(target):
            parts.append(
                f"```python\n{signature(f'{owner}.{name}', target, bound=not isinstance(member, staticmethod))}\n```\n"
            )
            parts.append(prose(inspect.getdoc(target) or "") + "\n")
    return parts


def signature(name: str, called: Any, *, bound: bool = False) -> str:
    """As one would write the call, a parameter a line where one line is too long."""
    found = inspect.signature(called)
    shown = list(found.parameters.values())[1 if bound else 0 :]
    arguments = list(_arguments(shown, called))
    result = found.return_annotation
    ending = "" if result is inspect.Signature.empty or inspect.isclass(called) else f" -> {_type(result, called)}"
    line = f"{name}({', '.join(arguments)}){ending}"
    if len(line) <= 100:
        return line
    return "\n".join([f"{name}(", *(f"    {argument}," for argument in arguments), f"){ending}"])


def _arguments(parameters: Iterable[inspect.Parameter], owner: object) -> Iterator[str]:
    starred = False
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not starred:
            starred = True
            yield "*"
        text = parameter.name
        if parameter.annotation is not inspect.Parameter.empty:
            text += f": {_type(parameter.annotation, owner)}"
        if parameter.default is not inspect.Parameter.empty:
            text += f" = {_default(parameter.default)}"
        yield text


def _quoted(value: object) -> str:
    """As ruff writes it, which formats the code in Markdown too."""
    return repr(value).replace("'", '"')


def _default(value: object) -> str:
    return "..." if inspect.isfunction(value) else _quoted(value)


def _type(annotation: object, owner: object) -> str:
    """An annotation as one reads it: aliases of choices and functions are written out."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    known = {**vars(knob_types), **vars(sys.modules[getattr(owner, "__module__", "builtins")])}
    for word in set(re.findall(r"\b[A-Z]\w+", text)):
        if get_origin(known.get(word)) in (Literal, Callable):
            text = re.sub(rf"\b{word}\b", inspect.formatannotation(known[word]), text)
    return re.sub(r"\b(?:typing|collections\.abc|pia_ray(?:\.\w+)+)\.", "", text).replace(
        "np.ndarray[Any, Any]", "np.ndarray"
    )


def prose(docstring: str) -> str:
    """A docstring as Markdown: an indented block stands apart, and what is raised becomes a list."""
    text, _, raised = docstring.partition("Raises:\n")
    text = re.sub(r"^(\S.*)\n(?= {4}\S)", r"\1\n\n", text.strip(), flags=re.MULTILINE)
    if not raised:
        return text
    listed = re.sub(r"\n\s{4,}(?!\w+: )", " ", textwrap.dedent(raised).strip())
    lines = [f"* `{name}`: {why}" for name, _, why in (line.strip().partition(": ") for line in listed.splitlines())]
    return "\n".join([text, "", "Raises:", "", *lines]).strip()


def tree() -> str:
    """The drawing of the error tree, as `pia_ray.errors` shows it."""
    drawing = (inspect.getdoc(errors) or "").partition("PiaRayError\n")
    return f"```\nPiaRayError\n{textwrap.dedent(drawing[2]).rstrip()}\n```\n"
