"""The README tells the truth: its tables are the code's, its commands exist, its Python runs.

`python tests/test_readme.py` writes the tables anew.
"""

from __future__ import annotations

import ast
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from pia_ray import cli, errors
from pia_ray.config import CatalogConfig, ModelConfig, ServeConfig
from pia_ray.ledger import RESULTS_SCHEMA
from pia_ray.params import KNOBS, ResultRow

README = Path(__file__).parent.parent / "README.md"


def knobs() -> str:
    lines = ["| knob | default | allowed | meaning |", "|---|---|---|---|"]
    for knob in KNOBS.values():
        allowed = ", ".join(f"`{choice}`" for choice in knob.choices) or " ".join(
            filter(None, [knob.bounds, knob.unit])
        )
        default = "" if knob.default is None else f"`{knob.default}`"
        lines.append(f"| `{knob.name}` | {default} | {allowed} | {knob.meaning} |")
    return "\n".join(lines)


def settings() -> str:
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    for name, field in CatalogConfig.model_fields.items():
        default = (
            "" if field.is_required() or field.default in (None, ()) or name == "defaults" else f"`{field.default}`"
        )
        lines.append(f"| `{name}` | {default} | {field.description} |")
    return "\n".join(lines)


def serve() -> str:
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    for name, field in ServeConfig.model_fields.items():
        silent = field.is_required() or field.default in (None, (), "") or field.default_factory is not None
        default = "`{demo: demo}`" if name == "models" else "" if silent else f"`{field.default}`"
        lines.append(f"| `{name}` | {default} | {field.description} |")
    return "\n".join(lines)


def models() -> str:
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    for name, field in ModelConfig.model_fields.items():
        silent = field.is_required() or field.default is None or field.default_factory is not None
        default = "" if silent else f"`{field.default}`"
        lines.append(f"| `{name}` | {default if field.default != '' else ''} | {field.description} |")
    return "\n".join(lines)


def results() -> str:
    lines = ["| column | type |", "|---|---|"]
    lines += [
        f"| `{field.name}` | {field.type}{'' if field.nullable else ', never null'} |" for field in RESULTS_SCHEMA
    ]
    return "\n".join(lines)


def codes() -> str:
    lines = ["| error code | retryable | what it means |", "|---|---|---|"]
    lines.append(
        "| `bad_manifest_row` | no | A line of the manifest that is no row: too many cells, not JSON, not text. |"
    )
    for kind in every_row_error():
        meaning = (kind.__doc__ or "").split("Arguments:")[0].strip()
        lines.append(f"| `{kind.code}` | {'yes' if kind.retryable else 'no'} | {meaning} |")
    return "\n".join(lines)


def every_row_error(root: type[errors.RowError] = errors.RowError) -> list[type[errors.RowError]]:
    found = []
    for kind in root.__subclasses__():
        found += [kind, *every_row_error(kind)]
    return found


TABLES = {"knobs": knobs, "settings": settings, "serve": serve, "models": models, "results": results, "codes": codes}


def between(text: str, name: str) -> str:
    match = re.search(rf"<!-- {name} -->\n(.*?)\n?<!-- /{name} -->", text, re.DOTALL)
    assert match is not None, f"the README has no table {name}"
    return match[1]


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_the_readme_equals_the_code(name: str) -> None:
    expected = TABLES[name]()
    assert between(README.read_text("utf-8"), name) == expected, "run `python tests/test_readme.py`"


def commands() -> list[str]:
    blocks = re.findall(r"```(?:console|sh)\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ").split(" #")[0].strip() for line in lines if "pia-ray " in line]


def test_every_command_of_the_readme_is_one_that_the_parser_takes() -> None:
    assert len(commands()) >= 8
    for command in commands():
        words = shlex.split(command)
        start = next(i for i, word in enumerate(words) if word.endswith("pia-ray"))
        cli._parser().parse_args(words[start + 1 :])


def test_every_make_target_of_the_readme_exists() -> None:
    makefile = README.with_name("Makefile").read_text("utf-8")
    for target in set(re.findall(r"`make ([a-z-]+)`", README.read_text("utf-8"))):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_python_examples_compile_and_use_public_names_only() -> None:
    import pia_ray

    blocks = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "pia_ray":
                assert {name.name for name in node.names} <= set(pia_ray.__all__)


def test_links_inside_the_repository_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", README.read_text("utf-8")):
        assert (README.parent / target).exists(), target


def test_results_columns_are_those_of_the_value_type() -> None:
    assert RESULTS_SCHEMA.names == [field.name for field in fields(ResultRow)]


if __name__ == "__main__":
    text = README.read_text("utf-8")
    for table, make in TABLES.items():
        between(text, table)
        pattern = rf"(<!-- {table} -->\n).*?(<!-- /{table} -->)"
        text = re.sub(pattern, lambda found, make=make: found[1] + make() + "\n" + found[2], text, flags=re.DOTALL)
    README.write_text(text, "utf-8")
