"""The flags of `pia-ray`: catalogue flags, and one flag for each knob."""

from __future__ import annotations

import argparse
import re
from typing import Any, Final, NoReturn, get_args

from pia_ray import __version__
from pia_ray.cli import commands, output_commands
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.knob_types import Knob, VideoFormat
from pia_ray.config.knobs import KNOBS, suggest
from pia_ray.config.serve import ServeConfig
from pia_ray.logs import LogFormat

_FORMATS: Final = get_args(VideoFormat)

_MANIFEST_HELP: Final = (
    "a .parquet, .arrow, .csv, .tsv, .jsonl, .json, .xlsx or .txt file (also .gz or .zst), a folder or glob of these, "
    "or a folder of images; local or s3://. Several are animated as one"
)

_WRONG_CHOICE: Final = re.compile(r"argument (\S+): invalid choice: '(.*)' \(choose from (.*)\)")

_DURATION: Final = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?")


class _Parser(argparse.ArgumentParser):
    """argparse that suggests the nearest flag or command, and points at the help where argparse prints all flags."""

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


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; `args.command` is the function to call, `args.parser` the parser of its flags."""
    parser = _Parser(prog="pia-ray", description="Animates catalogues of images with PIA on Ray.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"pia-ray {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, command: commands.Command, text: str) -> argparse.ArgumentParser:
        added = subparsers.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
        added.set_defaults(command=command, parser=added)
        added.add_argument("-v", "--verbose", action="store_true", help="log what is done, with ids and seconds")
        added.add_argument("--log", choices=get_args(LogFormat), help="log lines as text (default), or as JSON lines")
        return added

    demo = add("demo", commands.demo_command, "animate the bundled catalogue with the bundled model on this machine")
    demo.add_argument("--output", default="pia-ray-demo", metavar="DIR", help="where to (default: %(default)s)")
    demo.add_argument("--limit", metavar="N", type=int, help="only the first so many rows of the catalogue")
    demo.add_argument("--open", action="store_true", help="open the gallery in the browser when the run has ended")

    animate = add("animate", commands.animate_command, "animate a catalogue: videos, results table and gallery")
    animate.add_argument("manifest", metavar="MANIFEST", nargs="*", default=None, help=_MANIFEST_HELP)
    animate.add_argument("--output", metavar="URI", help="folder or s3:// prefix for videos, results and gallery")
    animate.add_argument("--open", action="store_true", help="open the gallery in the browser when the run has ended")
    _add_catalog_flags(animate)
    _add_knob_flags(animate)

    image = add("image", commands.image_command, "animate one picture, without Ray")
    image.add_argument("image", metavar="IMAGE", help="path, s3://, https:// or data: URL")
    image.add_argument("-o", "--output", required=True, metavar="FILE", help=f"the video: .{', .'.join(_FORMATS)}")
    image.add_argument("--model", default="realistic-vision", metavar="NAME|FILE", help="default: %(default)s")
    _add_styles_flag(image)
    _add_knob_flags(image)

    validate = add("validate", commands.validate_command, "check every row of a manifest, without a GPU")
    validate.add_argument("manifest", metavar="MANIFEST", nargs="+", help=_MANIFEST_HELP)
    validate.add_argument("--show", metavar="N", type=int, default=0, help="also print the prompts of the first N rows")
    validate.add_argument("--fetch", action="store_true", help="also open the images")
    validate.add_argument("--json", action="store_true", help="print one JSON line per bad row, and one of counts")
    _add_catalog_flags(validate)
    _add_knob_flags(validate)

    estimate = add(
        "estimate", commands.estimate_command, "what a run takes, before it runs: rows, time, GPU-hours, cost, storage"
    )
    estimate.add_argument("manifest", metavar="MANIFEST", nargs="+", help=_MANIFEST_HELP)
    estimate.add_argument("--output", metavar="URI", help="of an earlier run: what it has done is left out")
    speeds = estimate.add_mutually_exclusive_group()
    speeds.add_argument("--calibrate", metavar="OUTPUT", help="speeds from an earlier run on such hardware")
    speeds.add_argument("--measure", metavar="N", type=int, default=0, help="speeds from N rows, animated here and now")
    estimate.add_argument("--price-per-hour", metavar="X", type=float, help="of one worker, in any currency")
    estimate.add_argument("--json", action="store_true", help="print JSON")
    _add_catalog_flags(estimate)
    _add_knob_flags(estimate)

    report = add(
        "report", output_commands.report_command, "what happened in an output: counts, errors, throughput, percentiles"
    )
    report.add_argument("output", metavar="OUTPUT")
    report.add_argument("--json", action="store_true", help="print JSON")
    report.add_argument("--follow", action="store_true", help="again every few seconds, until interrupted")

    gallery = add("gallery", output_commands.gallery_command, "write OUTPUT/index.html")
    gallery.add_argument("output", metavar="OUTPUT")

    ledger = add("ledger", output_commands.ledger_command, "care of the ledger")
    ledger.add_argument("action", choices=("verify", "compact", "rebuild"))
    ledger.add_argument("output", metavar="OUTPUT")
    ledger.add_argument("--deep", action="store_true", help="with verify: read every video and compare its SHA-256")
    ledger.add_argument(
        "--repair", action="store_true", help="with verify: say which command makes damaged and missing videos again"
    )

    bench = add(
        "bench", commands.bench_command, "the benchmark card: this animator against diffusers' own pipeline, in one run"
    )
    bench.add_argument("--size", choices=("full", "reduced", "demo"), help="model (default: full with a GPU)")
    bench.add_argument("--steps", metavar="N", type=int, help="denoising steps (default: 25 with a GPU, else 4)")
    bench.add_argument("--frames", metavar="N", type=int, default=16, help="frames of a video (default: %(default)s)")
    bench.add_argument(
        "--side", metavar="PX", type=int, help="of the square frames (default: 512; reduced 128; demo 64)"
    )
    bench.add_argument("--rounds", metavar="N", type=int, default=5, help="rounds by turns (default: %(default)s)")
    bench.add_argument("--batches", metavar="N,N", default="1,2,4,8", help="rows in flight (default: %(default)s)")
    bench.add_argument("--dtype", choices=("auto", "float32", "float16", "bfloat16"), default="auto", help="precision")
    bench.add_argument("--offload", metavar="MODE,MODE", help="also with weights in host memory: model, sequential")
    bench.add_argument("--no-verbatim", action="store_true", help="leave the documented example out")
    bench.add_argument("--against", metavar="PATH", help="a card's JSON, or a folder of them: show what has changed")
    bench.add_argument("--json", metavar="FILE", help="also write the JSON line to a file")

    serve = add("serve", commands.serve_command, "the endpoint and its page on this machine, until interrupted")
    serve.add_argument("--config", metavar="FILE", help="YAML file with the endpoint's settings; flags go first")
    for name, metavar in (("host", "ADDR"), ("port", "N"), ("storage", "URI")):
        field = ServeConfig.model_fields[name]
        text = f"{(field.description or '').rstrip('.')} (default: {field.default})"
        serve.add_argument(f"--{name}", metavar=metavar, help=text)
    serve.add_argument("--model", metavar="NAME|FILE", help="the only model (default: demo)")
    serve.add_argument(
        "--allow-anonymous",
        action="store_true",
        default=None,
        help=(ServeConfig.model_fields["allow_anonymous"].description or "").rstrip("."),
    )

    models = add(
        "models",
        commands.models_command,
        "named models; `models pull NAME` fetches and verifies weights, `show` reads them",
    )
    models.add_argument("action", nargs="?", choices=("pull", "show"))
    models.add_argument("name", nargs="?", metavar="NAME|FILE")
    models.add_argument(
        "--to", metavar="URI", help="with pull: also copy the weights to a folder or s3:// prefix that workers share"
    )
    return parser


def _add_catalog_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the run")

    def add(name: str, metavar: str, **how: Any) -> None:
        field = CatalogConfig.model_fields[name]
        default = "" if field.default in (None, (), False) else f" (default: {field.default})"
        text = ((field.description or "").rstrip(".") + default).replace("%", "%%")
        how = {"metavar": metavar, **how} if metavar else how
        group.add_argument(f"--{name.removesuffix('_s').replace('_', '-')}", dest=name, help=text, **how)

    group.add_argument("--config", metavar="FILE", help="YAML file with any of these settings; flags go first")
    group.add_argument("--model", metavar="NAME|FILE", help="named model, or YAML file of one")
    _add_styles_flag(group)
    add("keep_models", "N", type=int)
    add("pictures", "", choices=("all", "first"))
    add("limit", "N", type=int)
    add("sample", "N", type=int)
    add("retry", "WHAT")
    add("remake", "missing,damaged")
    add("actors", "N|MIN:MAX")
    add("gpus_per_actor", "X", type=float)
    add("cpus_per_actor", "X", type=float)
    add("batch_size", "N|auto")
    add("prefetch", "N", type=int)
    add("format", "", choices=_FORMATS)
    add("max_attempts", "N", type=int)
    add("patience_s", "T", type=_seconds)
    add("max_failures", "N|P%")
    add("deadline_s", "T", type=_seconds)
    add("grace_s", "T", type=_seconds)
    add("row_timeout_s", "T", type=_seconds)
    add("hang_timeout_s", "T", type=_seconds)
    add("fetch_timeout_s", "T", type=_seconds)
    add("publish_timeout_s", "T", type=_seconds)
    add("detect_changes", "", action="store_true", default=None)
    add("background", "#RRGGBB")
    add("max_image_bytes", "N", type=int)
    add("max_image_pixels", "N", type=int)
    add("max_image_side", "N", type=int)
    add("max_image_aspect", "X", type=float)
    add("on_end", "URL")
    add("on_end_secret", "FILE")
    add("on_end_networks", "NET,...")
    add("per_host_rate", "X", type=float)
    add("allow_http", "", action="store_true", default=None)
    add("allowed_networks", "NETWORK,...")
    add("header", "HOST:NAME:VALUE", action="append")
    add("user_agent", "TEXT")
    add("ignore_opt_outs", "", action="store_true", default=None)
    add("address", "ADDR")
    add("id_col", "NAME")
    add("image_col", "NAME")
    add("prompt_col", "NAME")
    add("knobs", "NAME,...")
    add("delimiter", "CHAR|tab")
    add("encoding", "NAME")
    add("not_knobs", "NAME,...")


def _add_styles_flag(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--styles",
        metavar="NAME[=MODEL],...",
        action="append",
        help="more models, for rows that name one as their style; NAME alone is the model of that name. Repeatable",
    )


def _add_knob_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("knobs", "for rows that leave them out; a row's own value goes first")
    for knob in KNOBS.values():
        group.add_argument(f"--{knob.name.replace('_', '-')}", dest=knob.name, metavar="X", help=_knob_help(knob))


def _knob_help(knob: Knob) -> str:
    facts = [", ".join(knob.choices)] if knob.choices else [" ".join(filter(None, [knob.bounds, knob.unit]))]
    if knob.default not in (None, ""):
        shown = str(knob.default)
        facts.append(f"default {shown if len(shown) < 40 else shown[:37] + '...'}")
    inside = "; ".join(filter(None, facts))
    return (f"{knob.meaning} ({inside})" if inside else knob.meaning).replace("%", "%%")


def _seconds(text: str) -> float:
    """`90`, `90s`, `15m`, `1.5h` or `1h30m` in seconds."""
    match = _DURATION.fullmatch(text.strip().lower())
    if match is None or not any(match.groups()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time: write 90s, 15m or 1h30m")
    hours, minutes, seconds = (float(part or 0) for part in match.groups())
    return 3600 * hours + 60 * minutes + seconds
