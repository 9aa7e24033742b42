"""Prompts as front ends write them -> texts with weights, chunk breaks and LoRAs. Knows no tokenizer.

Follows the published rule of A1111's web UI: `(x)`, `(x:1.2)`, `[x]`, escapes by a backslash, BREAK, `<lora:name:0.8>`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from pia_ray.errors import BadParameter

BRACKET_FACTOR: Final = 1.1
"""Factor of a round bracket without a weight; a square bracket divides by it. Source: A1111's web UI."""


class WeightedText(NamedTuple):
    """A piece of a prompt with the factor on its embedding."""

    text: str
    weight: float
    starts_chunk: bool = False
    """Whether BREAK stands before it."""


_TOKEN: Final = re.compile(
    r"\\[\\()\[\]]?|:\s*(?P<number>[+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)|[()\[\]]|[^\\()\[\]:]+|:", re.DOTALL
)
# A run of spaces is tried from its start alone.
_BREAK: Final = re.compile(r"(?:(?<!\s)\s+)?\bBREAK\b\s*")
_LORA: Final = re.compile(r"<(lora|lyco|hypernet):([^<>]*)>", re.IGNORECASE)
_NUMBER_IN_BRACKETS: Final = re.compile(r"(?<!\\)\([^()]*:\s*[+-]?[\d.]+\s*\)")
_DOUBLED: Final = re.compile(r"(?<!\\)(?:\(\([^()]+\)\)|\[\[[^\[\]]+\]\])")
_MARKS: Final = re.compile(r"[(\[<]|BREAK")
_EDIT: Final = re.compile(r"(?<!\\)\[(?:[^\[\]\\]|\\.)*(?:\||:\s*[\d.]+\s*\])")
_LITERAL: Final = {
    re.compile(r"\{[^{}|]*\|[^{}]*\}|__[A-Za-z][\w /*-]*__"): "wildcards are not read",
    re.compile(r"\{[A-Za-z]\w*\}"): "columns are filled into the run's --prompt alone",
    re.compile(r"\bembedding:\S+"): "write the token of the textual inversion alone",
}
_AND: Final = re.compile(r"\bAND\b")


def weighted_texts(prompt: str) -> list[WeightedText]:
    """The pieces of a prompt in A1111's syntax, neighbours of one weight joined; at least one.

    Brackets that are not closed reach to the end of the prompt, as in A1111. Brackets that are not opened are text.
    """
    pieces: list[tuple[str, bool, int | None, int | None]] = []
    rounds, squares = _Brackets(BRACKET_FACTOR), _Brackets(1 / BRACKET_FACTOR)

    def add(text: str, *, starts_chunk: bool = False) -> None:
        pieces.append((text, starts_chunk, rounds.innermost, squares.innermost))

    for found in _TOKEN.finditer(prompt):
        mark, number = found[0], found["number"]
        if mark.startswith("\\"):
            add(mark[1:])
        elif mark == "(":
            rounds.open()
        elif mark == "[":
            squares.open()
        elif number is not None and rounds.innermost is not None:
            rounds.close(float(number))
        elif mark == ")" and rounds.innermost is not None:
            rounds.close()
        elif mark == "]" and squares.innermost is not None:
            squares.close()
        else:
            first, *others = _BREAK.split(mark)
            add(first)
            for text in others:
                add(text, starts_chunk=True)
    of_round, of_square = rounds.weights(), squares.weights()
    return _joined([WeightedText(text, of_round[i] * of_square[j], starts) for text, starts, i, j in pieces])


class _Brackets:
    """The brackets of one kind in a prompt, each by its number, in the order in which they are opened.

    Each has its factor and the bracket around it, so that the time does not grow with depth times length: a prompt of
    5,000 brackets with 2,500 pieces in them took minutes.
    """

    def __init__(self, factor: float) -> None:
        self.innermost: int | None = None
        """The bracket that is open here and was opened last."""
        self._usual = factor
        self._factors: list[float] = []
        self._around: list[int | None] = []

    def open(self) -> None:
        """Opens one inside the innermost."""
        self._factors.append(self._usual)
        self._around.append(self.innermost)
        self.innermost = len(self._factors) - 1

    def close(self, factor: float | None = None) -> None:
        """Closes the innermost, which there must be; with a factor of its own, where the prompt states one."""
        assert self.innermost is not None
        if factor is not None:
            self._factors[self.innermost] = factor
        self.innermost = self._around[self.innermost]

    def weights(self) -> dict[int | None, float]:
        """The weight of what stands in each bracket, by its number; under None that of what stands in none."""
        weights: dict[int | None, float] = {None: 1.0}
        for number, (factor, around) in enumerate(zip(self._factors, self._around, strict=True)):
            weights[number] = weights[around] * factor
        return weights


def _joined(pieces: list[WeightedText]) -> list[WeightedText]:
    joined: list[WeightedText] = []
    for piece in pieces:
        before = joined[-1] if joined else None
        if before is None or piece.starts_chunk or (before.text and before.weight != piece.weight and piece.text):
            joined.append(piece)
        else:
            weight = piece.weight if piece.text else before.weight
            joined[-1] = WeightedText(before.text + piece.text, weight, before.starts_chunk)
    return joined or [WeightedText("", 1.0)]


def looks_weighted(prompt: str) -> bool:
    """Whether a prompt is written in A1111's syntax, so that read as plain text it means something else."""
    if _MARKS.search(prompt) is None:  # most prompts, at a tenth of the time
        return False
    return any(pattern.search(prompt) for pattern in (_NUMBER_IN_BRACKETS, _DOUBLED, _LORA, _BREAK))


def literal_part(prompt: str) -> str | None:
    """A part that other programs replace and that is text here, with what to do; None where there is none."""
    if not any(mark in prompt for mark in ("{", "__", "embedding:")):  # most prompts, of maybe millions
        return None
    for pattern, hint in _LITERAL.items():
        if (found := pattern.search(prompt)) is not None:
            return f"{found[0]} as text: {hint}"
    return None


def without_loras(prompt: str) -> tuple[str, dict[str, float]]:
    """The prompt without its `<lora:name:weight>`, and the LoRAs by name, in lower case, with their weights.

    Raises:
        BadParameter: one is not a name with at most one weight, is named twice, or is a hypernetwork.
    """
    loras: dict[str, float] = {}
    for kind, content in _LORA.findall(prompt):
        name, *weights = (part.strip() for part in content.split(":"))
        shown = f"<{kind}:{content}>"
        if kind.lower() == "hypernet":
            raise BadParameter(f"prompt: {shown} is a hypernetwork, which is not supported", "prompt")
        try:
            (weight,) = map(float, weights or ["1"])
        except ValueError:
            raise BadParameter(
                f"prompt: {shown} must be a name with one weight, as in <lora:name:0.8>", "prompt"
            ) from None
        if not name or name.lower() in loras or not -10 <= weight <= 10:
            raise BadParameter(f"prompt: {shown} must name a LoRA, each once, with -10 to 10", "prompt")
        loras[name.lower()] = weight
    return (_LORA.sub("", prompt).strip() if loras else prompt), loras


def with_loras_of_prompt(values: Mapping[str, Any]) -> dict[str, Any]:
    """Resolved knobs whose prompt is in A1111's syntax, with the prompt's LoRAs in the knob `lora`.

    They replace the default choice, and are added to LoRAs that the row names.

    Raises:
        BadParameter: the prompt holds syntax that this version does not read, or a LoRA is named twice.
    """
    for knob in ("prompt", "negative_prompt"):
        if (found := _EDIT.search(values[knob])) is not None:
            raise BadParameter(
                f"{knob}: {found[0]} changes the text between steps, which is not supported: write \\[ for a bracket "
                "that is text",
                knob,
            )
        if _AND.search(values[knob]) is not None:
            raise BadParameter(f"{knob}: AND joins several prompts, which is not supported: write and", knob)
    if (tag := _LORA.search(values["negative_prompt"])) is not None:
        raise BadParameter(f"negative_prompt: {tag[0]} has no effect there: put it into the prompt", "negative_prompt")
    prompt, loras = without_loras(values["prompt"])
    if not loras:
        return dict(values)
    named = [] if values["lora"] in ("default", "none") else values["lora"].split("+")
    if twice := {part.partition(":")[0] for part in named} & set(loras):
        raise BadParameter(f"lora: {min(twice)} is named by the prompt and by lora: name it once", "lora")
    chosen = sorted([*named, *(f"{name}:{weight:g}" for name, weight in loras.items())])
    return {**values, "prompt": prompt, "lora": "+".join(chosen)}
