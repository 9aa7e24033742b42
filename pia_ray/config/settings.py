"""`Settings`, the kind of all configs but knobs: wrong values and misspelt names are refused, each by its name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import NoneType, UnionType
from typing import Any, Final, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, SecretStr, ValidationError, ValidationInfo, field_validator

from pia_ray.config.faults import fault_text
from pia_ray.config.knob_types import holds_surrogates
from pia_ray.config.knobs import KNOBS, suggest
from pia_ray.errors import ConfigError

_SHOWN_CHARS: Final = 80


class Settings(BaseModel):
    """A frozen set of settings. Text is not empty, numbers are finite, and true is not a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: object, info: ValidationInfo) -> object:
        field = cls.model_fields[str(info.field_name)]
        kinds = _kinds(field.annotation)
        if isinstance(value, bool) and (word := "on" if value else "off") in kinds:
            return word  # YAML reads a bare on or off as a truth value
        if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
            raise ValueError("must be a number, not true or false")
        if any(isinstance(text, str) and holds_surrogates(text) for text in _several(value)):
            raise ValueError("must be valid Unicode text")
        if value == "" and kinds & {str, SecretStr} and field.default != "" and list not in kinds:
            raise ValueError("must not be empty: leave it out, or give a value")
        return value


def check_settings(kind: type[BaseModel], values: Mapping[str, Any], *, source: str = "", within: str = "") -> None:
    """Refuses names that are no settings of that kind of config, nor of the configs in it.

    `within` is the setting that holds these values, such as `model`.

    Raises:
        ConfigError: names the first of them, with the nearest known one, and `source` (a file) if given.
    """
    prefix = "".join(f"{name}: " for name in (source, within) if name)
    knobs = KNOBS if "defaults" in kind.model_fields else ()
    for key, value in values.items():
        if key not in kind.model_fields:
            raise ConfigError(f"{prefix}{_unknown(str(key), kind, knobs=set(knobs))}")
        if key == "defaults" and isinstance(value, Mapping):
            _check_defaults(kind, value, prefix=prefix)
        for name, inner, settings in _inner(kind, key, value):
            check_settings(inner, settings, source=source, within=f"{within}.{name}" if within else name)


def _unknown(key: str, kind: type[BaseModel], *, knobs: set[str]) -> str:
    if key in knobs:
        return f'"{key}" is a knob, not a setting: write it under `defaults:`'
    near = suggest(key, {*kind.model_fields, *knobs})
    under = " It is a knob: write it under `defaults:`." if near and near.split('"')[1] in knobs else ""
    return f'there is no setting "{key}".{near}{under}'


def _check_defaults(kind: type[BaseModel], defaults: Mapping[Any, Any], *, prefix: str) -> None:
    """Refuses a setting among the defaults; what is no knob either is left to their own check."""
    for name in defaults:
        if name in kind.model_fields and name not in KNOBS:
            raise ConfigError(f'{prefix}defaults: "{name}" is a setting, not a knob: write it outside of `defaults:`')


def _inner(kind: type[BaseModel], name: str, value: object) -> Iterator[tuple[str, type[BaseModel], Mapping[str, Any]]]:
    """The configs that a setting holds, one or several by name, each with its name, kind and values."""
    annotation: Any = kind.model_fields[name].annotation
    if not isinstance(value, Mapping):
        return
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield name, annotation, value
    elif get_origin(annotation) is dict and issubclass(inner := get_args(annotation)[1], BaseModel):
        yield from ((f"{name}.{key}", inner, each) for key, each in value.items() if isinstance(each, Mapping))


def message_of(error: ValidationError, kind: type[BaseModel]) -> str:
    """The fault in the values of a config, in one line that names the setting. No secret is quoted."""
    first, *others = error.errors(include_url=False)
    field = kind.model_fields.get(str(first["loc"][0])) if first["loc"] else None
    if field is not None and len(_choices(field.annotation)) > 1 and len(first["loc"]) > 1:
        # One fault for each type that the setting may have, with the type as second part: the most exact is meant.
        same = [each for each in others if each["loc"][:1] == first["loc"][:1]]
        first = max(first, *same, key=lambda each: len(each["loc"])) if same else first
        first["loc"] = (first["loc"][0], *first["loc"][2:])
    where = ".".join(str(part) for part in first["loc"])
    text = fault_text(first)
    if first["type"] == "missing":
        return f"{where} {text}"
    if text.startswith("must") and (field is None or SecretStr not in _kinds(field.annotation)):
        shown = repr(first["input"])
        text += f" (got {shown if len(shown) <= _SHOWN_CHARS else shown[: _SHOWN_CHARS - 3] + '...'})"
    return f"{where}: {text}" if where else text


def _choices(annotation: Any) -> list[Any]:
    """The types of which a value may be one, but for None."""
    is_union = get_origin(annotation) in (Union, UnionType)
    return [each for each in get_args(annotation) if each is not NoneType] if is_union else [annotation]


def _several(value: object) -> tuple[object, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _kinds(annotation: Any) -> set[Any]:
    """The types in an annotation, at every depth; `list` stands for every kind of several values."""
    origin, inner = get_origin(annotation), get_args(annotation)
    found = {list} if origin in (tuple, list, dict) else set() if inner else {annotation}
    return found.union(*map(_kinds, inner))
