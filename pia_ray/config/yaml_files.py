"""YAML files of settings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from pia_ray.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML in which 1:16 and 1:2:3 are text, and a mapping has each key once.

    To YAML 1.1 1:16 is a number to the base of sixty, and actors: 1:16 would be 76.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """The node of a mapping."""
        node = super().compose_mapping_node(anchor)
        keys = set[str]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in keys:
                    raise yaml.constructor.ConstructorError(None, None, f'"{key.value}" occurs twice', key.start_mark)
                keys.add(key.value)
        return node


_Loader.yaml_implicit_resolvers = {
    first: [("tag:yaml.org,2002:str", re.compile(r"\d+(?::\d+)+$")), *resolvers] if first.isdigit() else resolvers
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: no such file, not YAML, or not a mapping.
    """
    try:
        value = yaml.load(Path(path).read_text("utf-8"), _Loader)  # noqa: S506 - a safe loader
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
        raise ConfigError(f"{path} is not valid YAML: {error.problem or error.context}{where}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: save the file as UTF-8 ({error.reason} at {error.start})") from None
    except (yaml.YAMLError, ValueError) as error:  # such as a date that no calendar has
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{path} must be a mapping of settings to values")
    return value
