"""The parser of the command line: argparse with suggestions, a short help, and settings from the environment."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NoReturn

from pia_ray.config.knobs import KNOBS, suggest
from pia_ray.config.model import named_models
from pia_ray.errors import ConfigError

PREFIX: Final = "PIA_RAY_"
"""How environment variables of settings begin: `PIA_RAY_MAX_ATTEMPTS` is `--max-attempts`."""

_NEAR: Final = 0.75
"""Similarity from which a variable counts as misspelt, and not as one of another program. Kubernetes sets
`PIA_RAY_PORT` and its like for a service named pia-ray."""

_WRONG_CHOICE: Final = re.compile(r"argument (\S+): invalid choice: '(.*)' \(choose from (.*)\)")
_SWITCH: Final = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False}


class Parser(argparse.ArgumentParser):
    """argparse that suggests the nearest flag or command, and prints the flags that matter first."""

    def __init__(self, *args: Any, **how: Any) -> None:
        super().__init__(*args, **how)
        self.formatter_class = argparse.RawDescriptionHelpFormatter
        self.allow_abbrev = False
        self.examples: Sequence[str] = ()
        self.first_flags: Sequence[str] = ()
        """The names, as in `args`, of the flags that `--help` prints first."""
        self.variables: dict[str, argparse.Action] = {}
        """The flags that environment variables set, by variable."""
        self._knob_groups: list[argparse._ArgumentGroup] = []

    def add_knob_group(self, title: str) -> argparse._ArgumentGroup:
        """A group of flags that `--help-knobs` prints, and `--help` does not."""
        if not self._knob_groups:
            text = "print the knobs of a row, in groups, and exit"
            self.add_argument("--help-knobs", action=_HelpKnobs, nargs=0, help=text)
        self._knob_groups.append(self.add_argument_group(title))
        return self._knob_groups[-1]

    def take_variable(self, flag: argparse.Action) -> None:
        """Lets an environment variable set this flag or positional argument, whose default is None."""
        name = (flag.option_strings or [flag.dest])[0]
        self.variables[PREFIX + name.removeprefix("--").replace("-", "_").upper()] = flag

    def completes(self, flag: argparse.Action, choices: Iterable[str]) -> None:
        """Lets a shell complete the flag's value from these; the value is not checked against them."""
        words = tuple(choices)
        flag.completer = lambda **_: words  # type: ignore[attr-defined] # argcomplete reads it there

    def completes_models(self, flag: argparse.Action) -> None:
        """Lets a shell complete the flag's value from the named models and the YAML files here."""
        flag.completer = _models_like  # type: ignore[attr-defined] # argcomplete reads it there

    def format_help(self) -> str:
        """The text of `--help`."""
        first = [action for name in self.first_flags for action in self._actions if action.dest == name]
        sections: list[tuple[str | None, list[argparse.Action]]] = [("most used", first)] if first else []
        groups = [group for group in self._action_groups if group not in self._knob_groups]
        sections += [(group.title, [flag for flag in group._group_actions if flag not in first]) for group in groups]
        return self._format(sections, examples=self.examples)

    def format_knobs_help(self) -> str:
        """The text of `--help-knobs`."""
        return self._format([(group.title, group._group_actions) for group in self._knob_groups], examples=())

    def _format(self, sections: Iterable[tuple[str | None, list[argparse.Action]]], *, examples: Sequence[str]) -> str:
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        if examples:
            formatter.start_section("examples")
            formatter.add_text("\n".join(examples))
            formatter.end_section()
        for title, actions in sections:
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            flag = message.removeprefix("unrecognized arguments: ").split()[0].partition("=")[0]
            if flag.startswith("-"):
                message += "." + suggest(flag, (name for name in self._option_string_actions if name[:2] == "--"))
        elif (wrong := _WRONG_CHOICE.fullmatch(message)) is not None:
            name, value, choices = wrong.groups()
            known = [choice.strip(" '") for choice in choices.split(",")]
            message = f'{name} "{value}" is not valid, choose from {", ".join(known)}.{suggest(value, known)}'
        self.exit(2, f"{self.prog}: {message}\nSee `{self.prog} --help`.\n")


def _models_like(prefix: str, **_: object) -> list[str]:
    """Names and files of models, for a shell."""
    from argcomplete.completers import FilesCompleter

    try:
        names = list(named_models())
    except ConfigError:  # the user's own file is wrong, as the command will say
        names = []
    return [*names, *FilesCompleter(("yaml", "yml"))(prefix)]


class _HelpKnobs(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        assert isinstance(parser, Parser)
        print(parser.format_knobs_help(), end="")
        parser.exit()


def fill_from_environment(args: argparse.Namespace, environ: Mapping[str, str], *, known: Iterable[str]) -> list[str]:
    """Sets flags that were not given from environment variables; the names of the variables that did.

    `known` are the variables of all commands. An empty variable counts as absent.

    Raises:
        ConfigError: a variable has a wrong value, the name of a knob, or one that is nearly one of `known`.
    """
    names = {name.removeprefix(PREFIX): name for name in known}
    for variable in environ:
        if variable.startswith(PREFIX) and (name := variable.removeprefix(PREFIX)) not in names:
            if (knob := name.lower()) in KNOBS:
                raise ConfigError(
                    f"{variable}: {knob} is a knob of a row, which no variable sets: give --{knob.replace('_', '-')}, "
                    "or write it under `defaults:` of a --config file"
                )
            for near in difflib.get_close_matches(name, names, n=1, cutoff=_NEAR):
                raise ConfigError(f"there is no variable {variable}. Did you mean {names[near]}?")
    used = []
    parser: Parser = args.parser
    for variable, flag in parser.variables.items():
        if environ.get(variable) and getattr(args, flag.dest) in (None, []):
            setattr(args, flag.dest, _value(variable, environ[variable], flag))
            used.append(variable)
    return used


def _value(variable: str, text: str, flag: argparse.Action) -> object:
    """The value of a flag from text, as if the flag had been given."""
    if flag.nargs == 0:
        if text.lower() not in _SWITCH:
            raise ConfigError(f"{variable} must be true or false (got {text!r})")
        return _SWITCH[text.lower()]
    if isinstance(flag, argparse._AppendAction) or flag.nargs == "*":
        return [text]
    if not callable(flag.type):
        return text
    try:
        return flag.type(text)
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"{variable}: {error}") from None
    except ValueError:
        raise ConfigError(f"{variable} must be a number (got {text!r})") from None
