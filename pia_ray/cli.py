"""The command line. Every knob of `AnimationParams` is a flag; heavy imports stand inside the commands.

Exit codes: 0 all rows succeeded, 1 some failed, 2 could not run, 4 deadline, 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, get_args

from pia_ray import __version__
from pia_ray.config.catalog import CatalogConfig, load
from pia_ray.config.knobs import DEFAULT_STYLE, KNOBS, REFERENCE_KNOBS, Knob, VideoFormat, suggest
from pia_ray.config.model import (
    ModelConfig,
    check_style_name,
    load_model,
    model_for,
    named_models,
    parse_styles,
)
from pia_ray.config.resolving import parse_defaults, parse_params
from pia_ray.config.serve import ServeConfig, load_serve
from pia_ray.errors import BadParameter, ConfigError, OutputError, PiaRayError, RowError, StorageError

if TYPE_CHECKING:
    from rich.console import Console

    from pia_ray.catalog.run import Progress
    from pia_ray.ledger import Lease, Ledger

Command = Callable[[argparse.Namespace], int]

_FORMATS: Final = get_args(VideoFormat)
_WRONG_CHOICE: Final = re.compile(r"argument (\S+): invalid choice: '(.*)' \(choose from (.*)\)")
_DURATION: Final = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code. Installed as `pia-ray`."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    args, unknown = parser.parse_known_args(given)
    if unknown:
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    args.argv = given
    _set_up(args)
    command: Command = args.command
    try:
        return command(args)
    except PiaRayError as error:
        print(f"pia-ray: {error.message}", file=sys.stderr)
        # `pia-ray image` is a run of one row. Anywhere else a store's or a knob's error means that nothing could run.
        return 1 if isinstance(error, RowError) and args.command is _image else 2
    except KeyboardInterrupt:
        print("pia-ray: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE  # as of a program that SIGPIPE ends; 1 would mean failed rows
    except Exception:  # noqa: BLE001 - exit 1 means failed rows, which a bug does not
        traceback.print_exc()
        return 2


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
            message = f'{name} "{value}" is none of {", ".join(known)}.{suggest(value, known)}'
        self.exit(2, f"{self.prog}: {message}\nSee `{self.prog} --help`.\n")


def _parser() -> _Parser:
    parser = _Parser(prog="pia-ray", description="Animates catalogues of images with PIA on Ray.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"pia-ray {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, command: Command, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
        added.set_defaults(command=command, parser=added)
        added.add_argument("-v", "--verbose", action="store_true", help="log what is done, with ids and seconds")
        return added

    demo = add("demo", _demo, "animate the bundled catalogue with the bundled model on this machine")
    demo.add_argument("--output", default="pia-ray-demo", metavar="DIR", help="where to (default: %(default)s)")

    animate = add("animate", _animate, "animate a catalogue: videos, results table and gallery")
    animate.add_argument("manifest", metavar="MANIFEST", nargs="?", help=_MANIFEST_HELP)
    animate.add_argument("--output", metavar="URI", help="folder or s3:// prefix for videos, results and gallery")
    _add_catalog_flags(animate)
    _add_knob_flags(animate)

    image = add("image", _image, "animate one picture, without Ray")
    image.add_argument("image", metavar="IMAGE", help="path, s3://, https:// or data: URL")
    image.add_argument("-o", "--output", required=True, metavar="FILE", help=f"the video: .{', .'.join(_FORMATS)}")
    image.add_argument("--model", default="realistic-vision", metavar="NAME|FILE", help="default: %(default)s")
    _add_styles_flag(image)
    _add_knob_flags(image)

    validate = add("validate", _validate, "check every row of a manifest, without a GPU")
    validate.add_argument("manifest", metavar="MANIFEST", help=_MANIFEST_HELP)
    validate.add_argument("--fetch", action="store_true", help="also open the images")
    validate.add_argument("--json", action="store_true", help="print one JSON line per bad row, and one of counts")
    _add_catalog_flags(validate)
    _add_knob_flags(validate)

    estimate = add("estimate", _estimate, "what a run takes, before it runs: rows, time, GPU-hours, cost, storage")
    estimate.add_argument("manifest", metavar="MANIFEST", help=_MANIFEST_HELP)
    estimate.add_argument("--output", metavar="URI", help="of an earlier run: what it has done is left out")
    speeds = estimate.add_mutually_exclusive_group()
    speeds.add_argument("--calibrate", metavar="OUTPUT", help="speeds from an earlier run on such hardware")
    speeds.add_argument("--measure", metavar="N", type=int, default=0, help="speeds from N rows, animated here and now")
    estimate.add_argument("--price-per-hour", metavar="X", type=float, help="of one worker, in any currency")
    estimate.add_argument("--json", action="store_true", help="print JSON")
    _add_catalog_flags(estimate)
    _add_knob_flags(estimate)

    report = add("report", _report, "what happened in an output: counts, errors, throughput, percentiles")
    report.add_argument("output", metavar="OUTPUT")
    report.add_argument("--json", action="store_true", help="print JSON")
    report.add_argument("--follow", action="store_true", help="again every few seconds, until interrupted")

    gallery = add("gallery", _gallery, "write OUTPUT/index.html")
    gallery.add_argument("output", metavar="OUTPUT")

    ledger = add("ledger", _ledger, "care of the ledger")
    ledger.add_argument("action", choices=("verify", "compact", "rebuild"))
    ledger.add_argument("output", metavar="OUTPUT")

    bench = add("bench", _bench, "the benchmark card: this animator beside diffusers' own pipeline, in one run")
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
    bench.add_argument("--against", metavar="PATH", help="a card's JSON, or a folder of them: tell what has moved")
    bench.add_argument("--json", metavar="FILE", help="also write the JSON line to a file")

    serve = add("serve", _serve, "the endpoint and its page on this machine, until interrupted")
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

    models = add("models", _models, "named models; `models pull NAME` fetches and verifies weights")
    models.add_argument("action", nargs="?", choices=("pull",))
    models.add_argument("name", nargs="?", metavar="NAME|FILE")
    models.add_argument(
        "--to", metavar="URI", help="with pull: also copy the weights to a folder or s3:// prefix that workers share"
    )
    return parser


_MANIFEST_HELP: Final = (
    "a .parquet, .csv, .tsv or .jsonl file (also .gz), a folder or glob of these, or a folder of images; local or s3://"
)


def _add_catalog_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the run")

    def add(name: str, metavar: str, **how: Any) -> None:
        field = CatalogConfig.model_fields[name]
        default = "" if field.default in (None, (), False) else f" (default: {field.default})"
        text = (field.description or "").rstrip(".") + default
        how = {"metavar": metavar, **how} if metavar else how
        group.add_argument(f"--{name.removesuffix('_s').replace('_', '-')}", dest=name, help=text, **how)

    group.add_argument("--config", metavar="FILE", help="YAML file with any of these settings; flags go first")
    group.add_argument("--model", metavar="NAME|FILE", help="named model, or YAML file of one")
    _add_styles_flag(group)
    add("keep_models", "N", type=int)
    add("limit", "N", type=int)
    add("retry", "WHAT")
    add("actors", "N|MIN:MAX")
    add("gpus_per_actor", "X", type=float)
    add("cpus_per_actor", "X", type=float)
    add("batch_size", "N|auto")
    add("prefetch", "N", type=int)
    add("format", "", choices=_FORMATS)
    add("max_attempts", "N", type=int)
    add("deadline_s", "T", type=_seconds)
    add("row_timeout_s", "T", type=_seconds)
    add("detect_changes", "", action="store_true", default=None)
    add("background", "#RRGGBB")
    add("max_image_bytes", "N", type=int)
    add("max_image_pixels", "N", type=int)
    add("address", "ADDR")
    add("id_col", "NAME")
    add("image_col", "NAME")
    add("prompt_col", "NAME")


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


def _knobs_of(args: argparse.Namespace) -> dict[str, Any]:
    """The knobs that were given as flags.

    Raises:
        ConfigError: one has no valid value; names the flag.
    """
    given = {name: value for name in KNOBS if (value := getattr(args, name)) is not None}
    try:
        return parse_defaults(given)
    except BadParameter as error:
        raise ConfigError(f"--{error.field.replace('_', '-')}: {error.message}") from None


def _catalog_config(args: argparse.Namespace, **fixed: Any) -> CatalogConfig:
    overrides: dict[str, Any] = {
        name: value
        for name in CatalogConfig.model_fields
        if name not in ("model", "styles", "defaults") and (value := getattr(args, name, None)) is not None
    }
    overrides |= fixed
    if knobs := _knobs_of(args):
        overrides["defaults"] = knobs
    if args.model is not None:
        overrides["model"] = load_model(args.model)
    if args.styles is not None:
        overrides["styles"] = _styles_of(args)
    return load(args.config, overrides)


def _styles_of(args: argparse.Namespace) -> dict[str, ModelConfig]:
    """The models that --styles names.

    Raises:
        ConfigError: a name or model is wrong.
    """
    models = {}
    for name, model in parse_styles(args.styles or ()).items():
        try:
            check_style_name(name)
        except ValueError as error:
            raise ConfigError(f"--styles: {error}") from None
        models[name] = load_model(model)
    return models


def _demo(args: argparse.Namespace) -> int:
    manifest = str(files("pia_ray").joinpath("demo", "catalog", "catalog.parquet"))
    config = CatalogConfig(manifest=manifest, output=args.output, model=ModelConfig.named("demo"))
    return _run(config, args, again=["animate", manifest, "--output", args.output, "--model", "demo"])


def _animate(args: argparse.Namespace) -> int:
    config = _catalog_config(args)
    again = list(args.argv)
    while "--retry" in again:
        del again[again.index("--retry") : again.index("--retry") + 2]
    return _run(config, args, again=[word for word in again if not word.startswith("--retry=")])


def _run(config: CatalogConfig, args: argparse.Namespace, *, again: Sequence[str]) -> int:
    """Runs the catalogue; `again` are the arguments that repeat the run, the command first."""
    from pia_ray.catalog.graph import run_catalog
    from pia_ray.console import RunDisplay, show_summary

    if not args.verbose:
        logging.getLogger("ray").setLevel(logging.ERROR)  # only now: importing ray sets its own level
    _require_cluster(config.address)
    console = _console()
    interrupted = False

    def interrupt(number: int, frame: object) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    # A scheduler's stop is a person's Ctrl-C: what is done is recorded, the rest can be resumed.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, interrupt)
    with RunDisplay(console) as display:

        def observe(progress: Progress) -> None:
            display.show(progress)
            # Raised in a callback of foreign code the interrupt may have been swallowed.
            if interrupted and progress.phase == "animating":
                raise KeyboardInterrupt

        summary = run_catalog(config, observe=observe)
    # Right after the command, so that it stays a flag also where the arguments end in `-- MANIFEST`.
    retry = [*_program(), again[0], "--retry", "failed", *again[1:]]
    show_summary(console, summary, retry_command=shlex.join(retry), open_path=_shown)
    return summary.exit_code


def _require_cluster(address: str | None) -> None:
    """Asks HOST:PORT whether anybody is there: Ray itself tries for two minutes and cannot be interrupted.

    Raises:
        ConfigError: nobody is.
    """
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return  # none, "auto", or what Ray alone understands
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--address {address}: no Ray cluster answers there ({error})") from None


def _program() -> list[str]:
    """This program as a shell finds it: `pia-ray` where that is on the PATH, else as it was called."""
    called = Path(sys.argv[0])
    if called.name == "cli.py":
        return [sys.executable, "-m", "pia_ray.cli"]
    found = shutil.which("pia-ray")
    if called.name != "pia-ray" or (found is not None and Path(found).resolve() == called.resolve()):
        return ["pia-ray"]
    return [sys.argv[0]]


def _image(args: argparse.Namespace) -> int:
    from rich.progress import Progress as Bar

    from pia_ray import steps
    from pia_ray.manifest import shown
    from pia_ray.media import image as pictures
    from pia_ray.media.video import MIME
    from pia_ray.pia.animator import Animator
    from pia_ray.types import AnimationRequest

    if (extension := Path(args.output).suffix.lower().removeprefix(".")) not in MIME:
        raise ConfigError(f'-o {args.output}: "{extension}" is no video format; end it in .{", .".join(MIME)}')
    if not Path(args.output).resolve().parent.is_dir():
        raise ConfigError(f"there is no folder {Path(args.output).resolve().parent} to write {args.output} to")
    knobs = _knobs_of(args)
    try:
        model = model_for(knobs.pop("style", DEFAULT_STYLE), load_model(args.model), _styles_of(args))
    except BadParameter as error:
        raise ConfigError(f"--style: {error.message}") from None
    if "prompt" not in knobs and "prompt" not in model.defaults:
        raise ConfigError("there is no prompt: say with --prompt what the picture shows and how it moves")
    params = parse_params({"prompt": model.defaults.get("prompt"), **knobs})
    if params.num_videos > 1:
        raise ConfigError("--num-videos makes several files: use `pia-ray animate` on a manifest of one row")
    caps = CatalogConfig.model_fields
    max_bytes, max_pixels = caps["max_image_bytes"].default, caps["max_image_pixels"].default
    picture = pictures.decode(steps.read_image(args.image, max_bytes=max_bytes)).rgb
    named = {knob: uri for knob in REFERENCE_KNOBS if (uri := getattr(params, knob) or model.defaults.get(knob))}
    brings: dict[str, Any] = dict(
        steps.read_references(named, background=caps["background"].default, max_bytes=max_bytes, max_pixels=max_pixels)
    )
    # What the video says of itself holds no signature of a URL and no bytes.
    params = params.model_copy(update={knob: shown(uri) for knob, uri in named.items()})
    console = _console()
    with Animator(model) as animator, Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("animating", total=None)
        request = AnimationRequest(picture, params, id=Path(args.image).stem, **brings)
        future = animator.submit(request, on_step=lambda done, steps: bar.update(task, completed=done, total=steps))
        animation = future.result()
    animation.save(args.output)
    made = animation.params
    console.print(
        f"{args.output}: {made.width} x {made.height} px, {made.num_frames} frames, seed {made.seed}, "
        f"motion {animation.motion:.3f}, {animation.animate_s:.1f} s",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def _validate(args: argparse.Namespace) -> int:
    from pia_ray.catalog.validate import validate

    config = _catalog_config(args, output="unused")
    console, counts = _console(), {"rows": 0, "bad": 0}
    for finding in validate(config, fetch=args.fetch):
        counts["rows"] = finding.num_items
        if finding.code is None:
            continue
        counts["bad"] += 1
        if args.json:
            print(json.dumps({"id": finding.id, "code": finding.code, "message": finding.message}))
        else:
            console.print(f"{finding.id}: {finding.message}", highlight=False, soft_wrap=True, markup=False)
    if args.json:
        print(json.dumps(counts))
    else:
        console.print(f"{counts['rows']} work items, {counts['bad']} bad", highlight=False)
    return 1 if counts["bad"] else 0


def _estimate(args: argparse.Namespace) -> int:
    from pia_ray.catalog import estimate

    for flag, value in (("--measure", args.measure), ("--price-per-hour", args.price_per_hour or 0)):
        if value < 0:
            raise ConfigError(f"{flag} must not be negative (got {value})")
    config = _catalog_config(args, output=args.output or "unused")
    estimated = estimate.estimate(
        config,
        calibrate=args.calibrate,
        measure=args.measure,
        price_per_hour=args.price_per_hour,
        resume=args.output is not None,
    )
    print(json.dumps(estimate.facts_of(estimated)) if args.json else estimate.text_of(estimated))
    return 0


def _report(args: argparse.Namespace) -> int:
    from pia_ray import ledger
    from pia_ray.console import show_report

    console = _console()
    while True:
        facts = dataclasses.asdict(ledger.summary(_open_ledger(args.output)))
        facts["run"] = facts["run"] and facts["run"]["run_id"]
        if args.json:
            print(json.dumps(facts, default=str), flush=True)
        else:
            if args.follow and console.is_terminal:
                console.clear()
            show_report(console, facts)
        if not args.follow:
            return 0
        time.sleep(5)


def _open_ledger(output: str) -> Ledger:
    from pia_ray import ledger

    _require_run(output)
    return ledger.Ledger.open(output)


def _require_run(output: str, *places: str) -> None:
    """Refuses an output that no run has written to, before a command leaves traces in it.

    Raises:
        OutputError: there is nothing below `_ledger` nor in the other `places`.
    """
    from pia_ray import storage

    for place in ("_ledger/parts", "_ledger/runs", *places):
        try:
            if next(iter(storage.list_objects(storage.join(output, place))), None) is not None:
                return
        except StorageError as error:
            raise OutputError(f"the output {output} cannot be used: {error.message}") from None
    raise OutputError(f"there is nothing of pia-ray in {output}: give the --output of an earlier run")


def _gallery(args: argparse.Namespace) -> int:
    from pia_ray.gallery import write_gallery

    print(_shown(write_gallery(args.output)))
    return 0


def _ledger(args: argparse.Namespace) -> int:
    from pia_ray import ledger
    from pia_ray.console import show_report

    _require_run(args.output, "videos")
    if args.action == "compact":
        with _lease(args.output), _open_ledger(args.output) as book:
            before, after = book.compact()
        print(f"{before} parts are now {after}")
        return 0
    if args.action == "rebuild":
        with _lease(args.output):
            show_report(_console(), dataclasses.asdict(ledger.rebuild(args.output)))
        return 0
    found = ledger.verify(args.output)
    show_report(_console(), dataclasses.asdict(found))
    return 0 if found.ok else 1


def _lease(output: str) -> Lease:
    """No run may be at work while parts are rewritten."""
    from pia_ray import ledger

    return ledger.Lease(output, run_id=f"ledger-{os.getpid()}")


def _bench(args: argparse.Namespace) -> int:
    from pia_ray.bench import bench, differences, settings_here, text_of

    batches = args.batches.split(",")
    if not all(number.strip().isdecimal() for number in batches):
        raise ConfigError(f"--batches must be numbers such as 1,2,4 (got {args.batches})")
    offload = tuple(filter(None, (args.offload or "").split(",")))
    if not set(offload) <= {"model", "sequential"}:
        raise ConfigError(f"--offload must be model, sequential or both with a comma between (got {args.offload})")
    settings = settings_here(
        size=args.size,
        steps=args.steps,
        side=args.side,
        num_frames=args.frames,
        rounds=args.rounds,
        batches=tuple(map(int, batches)),
        dtype=args.dtype,
        verbatim=not args.no_verbatim,
        offload=offload,
    )
    card = bench(settings, report=lambda line: print(line, file=sys.stderr))
    print(text_of(card))
    if args.against:
        place = Path(args.against)
        place = place / f"{card.kind}.json" if place.is_dir() else place
        if place.is_file():
            print(f"  against {place}:")
            for line in differences(card, json.loads(place.read_text("utf-8"))):
                print(f"    {line}")
        elif not Path(args.against).is_dir():
            raise ConfigError(f"there is no card {place}")
        else:
            print(f"  there is no earlier card of this kind of machine ({place}): --json writes one")
    if args.json:
        Path(args.json).write_text(card.to_json() + "\n", "utf-8")
    print(card.to_json())
    return 0


def _serve(args: argparse.Namespace) -> int:
    names = ("host", "port", "storage", "model", "allow_anonymous")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    config = load_serve(args.config, given)

    from pia_ray.online.serve import run_server

    if not args.verbose:
        for name in ("ray", "ray.serve"):
            logging.getLogger(name).setLevel(logging.ERROR)  # only now: importing ray sets its own levels

    def ready(url: str) -> None:
        print(f"Serving {', '.join(config.models)} at {url}\nStop with Ctrl-C.", flush=True)

    print("Starting ...", file=sys.stderr)
    run_server(config, ready=ready)
    return 0


def _models(args: argparse.Namespace) -> int:
    from pia_ray import storage, weights
    from pia_ray.console import show_table

    if args.action == "pull":
        if args.name is None:
            raise ConfigError("models pull needs the name of a model, or a YAML file of one")
        model = load_model(args.name)
        if args.to is not None:
            place = _shown(args.to)
            print(f"{args.name}: {weights.version(weights.copy(model, place))} in {place}")
            print(f"Its settings, for `model` in a config file, are in {storage.join(place, weights.MODEL_FILE)}")
            return 0
        local = weights.pull(model)
        print(f"{args.name}: {local.version} in {local.base}")
        return 0
    if args.to is not None:
        raise ConfigError("--to is for models pull NAME")
    rows = [
        [name, "yes" if weights.is_pulled(model) else "no", model.base, model.description]
        for name, model in named_models().items()
    ]
    show_table(_console(), ["name", "here", "base", "description"], rows)
    return 0


def _set_up(args: argparse.Namespace) -> None:
    level = logging.INFO if args.verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name in ("httpx", "httpcore", "botocore", "diffusers", "transformers"):
        # httpx logs whole URLs at INFO, signatures of presigned ones included.
        logging.getLogger(name).setLevel(logging.WARNING)
    if not args.verbose:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def _console() -> Console:
    from pia_ray.console import Screen

    # Where there is no terminal rich assumes 80 columns, and would cut the tables of a pipe or a log file.
    return Screen() if sys.stdout.isatty() else Screen(width=200)


def _shown(uri: str) -> str:
    """A path that can be clicked or pasted: absolute where it is local."""
    return uri if "://" in uri else str(Path(uri).resolve())


def _seconds(text: str) -> float:
    """`90`, `90s`, `15m`, `1.5h` or `1h30m` in seconds."""
    match = _DURATION.fullmatch(text.strip().lower())
    if match is None or not any(match.groups()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time: write 90s, 15m or 1h30m")
    hours, minutes, seconds = (float(part or 0) for part in match.groups())
    return 3600 * hours + 60 * minutes + seconds


if __name__ == "__main__":
    sys.exit(main())
