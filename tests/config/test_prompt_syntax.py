"""A1111's prompt syntax: pieces and weights as its published rule gives them, LoRAs of prompts, what is refused."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest

from pia_ray.config.prompt_syntax import literal_part, looks_weighted, weighted_texts
from pia_ray.config.resolving import parse_params, resolve
from pia_ray.errors import BadParameter

PROMPTS = (
    "a cat",
    "",
    "a (cat) sits",
    "(cat:1.3) on ((red)) sea",
    "a [dog], [[old]]",
    r"a \(cat\) of \[x\]",
    "an (unbalanced, and ((open",
    "closed) too] early",
    "(a (nested:1.5) weight:0.8)",
    "masterpiece, best quality, (1girl:1.21), [bad], BREAK the sea",
    "a house (on (a [hill:0.5]):1.3), (((sky)))",
    "a: b, 3:4 (x : 1.1 )",
)


def published(text: str) -> list[tuple[str, float]]:
    """A1111's `parse_prompt_attention` in its own words; BREAK is ("BREAK", -1)."""
    tokens = re.compile(
        r"\\\(|\\\)|\\\[|\\]|\\\\|\\|\(|\[|:\s*([+-]?[.\d]+)\s*\)|\)|]|[^\\()\[\]:]+|:",
    )
    result: list[list[Any]] = []
    brackets: dict[str, list[int]] = {"(": [], "[": []}

    def multiply(start: int, factor: float) -> None:
        for entry in result[start:]:
            entry[1] *= factor

    for match in tokens.finditer(text):
        part, weight = match[0], match[1]
        if part.startswith("\\"):
            result.append([part[1:], 1.0])
        elif part in brackets:
            brackets[part].append(len(result))
        elif weight is not None and brackets["("]:
            multiply(brackets["("].pop(), float(weight))
        elif part == ")" and brackets["("]:
            multiply(brackets["("].pop(), 1.1)
        elif part == "]" and brackets["["]:
            multiply(brackets["["].pop(), 1 / 1.1)
        else:
            for index, each in enumerate(re.split(r"\s*\bBREAK\b\s*", part)):
                if index:
                    result.append(["BREAK", -1])
                result.append([each, 1.0])
    for kind, factor in (("(", 1.1), ("[", 1 / 1.1)):
        for start in brackets[kind]:
            multiply(start, factor)
    merged: list[list[Any]] = []
    for part, weight in result or [["", 1.0]]:
        if merged and merged[-1][1] == weight:
            merged[-1][0] += part
        else:
            merged.append([part, weight])
    return [(part, weight) for part, weight in merged]


def letters(pieces: list[tuple[str, float]]) -> list[tuple[str, float]]:
    return [(letter, weight) for text, weight in pieces for letter in text]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_every_letter_has_the_weight_of_the_published_rule(prompt: str) -> None:
    ours: list[tuple[str, float]] = []
    for piece in weighted_texts(prompt):
        ours += [*letters([("BREAK", -1)] if piece.starts_chunk else []), *letters([(piece.text, piece.weight)])]
    assert ours == letters(published(prompt))


@pytest.mark.parametrize("mixed", ["(a [b (c", "((x:1.3) y:0.7) [z] ", "([a)] b:1.2)", "[[(a:2) (b"])
def test_letters_in_many_brackets_have_the_weight_of_the_published_rule(mixed: str) -> None:
    ours = [(letter, weight) for text, weight, _ in weighted_texts(mixed * 9) for letter in text]
    theirs = letters(published(mixed * 9))
    assert [letter for letter, _ in ours] == [letter for letter, _ in theirs]
    assert [weight for _, weight in ours] == pytest.approx([weight for _, weight in theirs], rel=1e-12)


@pytest.mark.parametrize(
    "prompt",
    [
        "(" * 5000 + "\\a" * 2500,
        "a(" * 5000,
        "[a" * 2500 + "a]" * 2500,
        "(:" + "1" * 9998,
        " " * 9999 + "(",
        "{" + "|" * 9999,
        "BREAK " * 1666,
    ],
    ids=lambda prompt: prompt[-4:],
)
def test_the_time_for_a_prompt_grows_with_its_length_alone(prompt: str) -> None:
    start = time.process_time()
    assert len(weighted_texts(prompt)) <= len(prompt)
    looks_weighted(prompt)
    literal_part(prompt)
    assert time.process_time() - start < 1  # squares of the length took 1 to 100 s


@pytest.mark.parametrize(
    ("prompt", "weighted"),
    [
        ("a (red:1.2) cat", True),
        ("((old)) house", True),
        ("[[old]] house", True),
        ("a BREAK b", True),
        ("cat <lora:pixar:0.8>", True),
        ("a cat (left) and a ratio of 4:3", False),
        ("breaking news", False),
        (r"a \(red:1.2\) cat", False),
    ],
)
def test_a_prompt_that_is_written_with_weights_is_recognised(prompt: str, weighted: bool) -> None:
    assert looks_weighted(prompt) is weighted


def resolved(**cells: Any) -> Any:
    return resolve(parse_params({"prompt_syntax": "a1111", **cells}), {}, model_defaults={})


@pytest.mark.parametrize(
    ("prompt", "part"),
    [
        ("a {red|blue} car", "{red|blue} as text: wildcards"),
        ("a __color__ car", "__color__ as text: wildcards"),
        ("a photo of {title}", "{title} as text: columns"),
        ("ugly, embedding:bad-art", "embedding:bad-art as text"),
        ("a car, snake_case, {} and {1}", None),
        ("__init__", "__init__ as text"),
    ],
)
def test_what_other_programs_replace_is_named(prompt: str, part: str | None) -> None:
    found = literal_part(prompt)
    assert (found is None) == (part is None)
    assert (found or "").startswith(part or "")


def test_loras_of_a_prompt_become_those_of_the_row() -> None:
    params = resolved(prompt="a cat <lora:Pixar:0.80>, <lora:add detail>")
    assert (params.prompt, params.lora) == ("a cat ,", "add detail:1+pixar:0.8")
    assert resolve(params, {}, model_defaults={}) == params
    assert resolved(prompt="cat<lora:b:1>", lora="a:0.5").lora == "a:0.5+b:1"
    assert resolve(parse_params({"prompt": "a <lora:b:1>"}), {}, model_defaults={}).prompt == "a <lora:b:1>"


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"prompt": "a <lora:b:1:0.5>"}, "one weight"),
        ({"prompt": "a <lora:b:x>"}, "one weight"),
        ({"prompt": "a <lora:b:99>"}, "-10 to 10"),
        ({"prompt": "a <lora:b> <lora:B>"}, "each once"),
        ({"prompt": "a <lora:b>", "lora": "b:0.3"}, "name it once"),
        ({"prompt": "a <hypernet:b>"}, "hypernetwork"),
        ({"prompt": "a", "negative_prompt": "b <lora:b>"}, "has no effect there"),
        ({"prompt": "a [cat:dog:0.5]"}, "between steps"),
        ({"prompt": "a [cat|dog]"}, "between steps"),
        ({"prompt": "cat AND dog"}, "AND"),
    ],
)
def test_syntax_that_is_not_read_is_refused_with_its_reason(cells: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadParameter, match=re.escape(reason)):
        resolved(**cells)
