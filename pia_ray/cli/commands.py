"""The commands of `pia-ray` that animate, check, estimate and serve.

Each takes the parsed flags and gives the exit code. Heavy imports stand inside them.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pia_ray import logs
from pia_ray.cli.config_flags import catalog_config, knobs_of, styles_of
from pia_ray.cli.file_viewer import open_file
from pia_ray.cli.model_commands import print_unread_layers
from pia_ray.config.canvas import file_size
from pia_ray.config.catalog import RETRY_ALL, CatalogConfig, load
from pia_ray.config.knobs import DEFAULT_STYLE, REFERENCE_KNOBS, AnimationParams
from pia_ray.config.model import ModelConfig, load_model, model_for
from pia_ray.config.resolving import parse_params
from pia_ray.config.serve import load_serve
from pia_ray.config.timeline import timeline_of
from pia_ray.config.workers import WorkerConfig
from pia_ray.errors import BadParameter, ConfigError
from pia_ray.extras import require
from pia_ray.formatting import count_of

if TYPE_CHECKING:
    from pia_ray.catalog.progress import Progress
    from pia_ray.types import AnimationRequest

Command = Callable[[argparse.Namespace], int]

DEFAULT_MODEL: Final = "realistic-vision"

_NO_OUTPUT: Final = "unused"
"""Output of commands that need none; no run has written there."""


def demo_command(args: argparse.Namespace) -> int:
    manifest = str(files("pia_ray").joinpath("demo", "catalog", "catalog.parquet"))
    given = {"manifest": manifest, "output": args.output, "model": "demo", "limit": args.limit, "log": args.log}
    preset: dict[str, Any] = {} if args.preset == "exact" else {"defaults": {"preset": args.preset}}
    config = load(None, {name: value for name, value in given.items() if value is not None} | preset)
    limit = [] if args.limit is None else ["--limit", str(args.limit)]
    again = ["animate", manifest, "--output", args.output, "--model", "demo", "--preset", args.preset, *limit]
    return _run(config, args, again=again, note=f"preset    {args.preset}: {_DEMO_PRESETS[args.preset]}")


_DEMO_PRESETS: Final = {
    "exact": "all 6 steps are computed",
    "balanced": "4 of 6 steps are computed, 44 dB or more against --preset exact",
    "fast": "3 of 6 steps are computed, 39 dB or more against --preset exact",
}
"""The least PSNR of the bundled catalogue's videos (docs/speed.md)."""


def animate_command(args: argparse.Namespace) -> int:
    config = catalog_config(args)
    if args.dry_run:
        return _dry_run(config)
    again = list(args.argv)
    for flag in ("--retry", "--remake"):
        while flag in again:
            del again[again.index(flag) : again.index(flag) + 2]
        again = [word for word in again if not word.startswith(f"{flag}=")]
    return _run(config, args, again=again)


def _run(config: CatalogConfig, args: argparse.Namespace, *, again: Sequence[str], note: str = "") -> int:
    """Runs the catalogue; `again` are the arguments that repeat the run, the command first. `note` is a first line."""
    require("run", purpose=f"`{args.parser.prog}`")
    from pia_ray.catalog.cluster_run import run_catalog
    from pia_ray.cli.console import RunDisplay, absolute_path, make_run_console, open_page, show_summary

    _set_up_logs(config, args)
    if not args.verbose:
        logging.getLogger("ray").setLevel(logging.ERROR)  # only now: importing ray sets its own level
    console = make_run_console()
    interrupted = False

    def interrupt(number: int, frame: object) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    # A scheduler's stop is a person's Ctrl-C: what is done is recorded, the rest can be resumed. While rows are
    # animated the run has handlers of its own, which let those that denoise end.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, interrupt)
    if note:
        console.print(note, highlight=False, soft_wrap=True)
    with RunDisplay(console) as display:

        def observe(progress: Progress) -> None:
            nonlocal interrupted
            display.show(progress)
            # Raised in a callback of foreign code the interrupt may have been swallowed.
            if interrupted and progress.phase == "animating":
                interrupted = False
                raise KeyboardInterrupt

        summary = run_catalog(config, observe=observe)
    # Right after the command, so that it stays a flag also where the arguments end in `-- MANIFEST`.
    retry = [*_program(), again[0], "--retry", RETRY_ALL, *again[1:]]
    with logs.block_fields(run_id=summary.run_id):
        show_summary(console, summary, retry_command=shlex.join(retry), open_path=absolute_path)
    if args.open:
        open_page(console, summary.gallery_uri)
    return summary.exit_code


def _set_up_logs(config: WorkerConfig, args: argparse.Namespace) -> None:
    """Does what the config says of logs, after Ray, which sets up its own, has been imported."""
    if config.log == "json":
        logs.set_up("json", level=logging.INFO if args.verbose else logging.WARNING)
        for name in ("ray", "ray.serve"):
            logs.take_over(name)


def _program() -> list[str]:
    """This program as a shell finds it: `pia-ray` where that is on the PATH, else as it was called."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return [sys.executable, "-m", "pia_ray.cli"]
    found = shutil.which("pia-ray")
    if called.name != "pia-ray" or (found is not None and Path(found).resolve() == called.resolve()):
        return ["pia-ray"]
    return [sys.argv[0]]


def image_command(args: argparse.Namespace) -> int:
    require("run", purpose="`pia-ray image`")

    from rich.progress import Progress as Bar

    from pia_ray import weights
    from pia_ray.cli.console import make_console
    from pia_ray.media.video import MIME
    from pia_ray.pia import animator_class
    from pia_ray.prepare import prepare

    if (extension := Path(args.output).suffix.lower().removeprefix(".")) not in MIME:
        raise ConfigError(f'-o {args.output}: "{extension}" is not a video format, choose from .{", .".join(MIME)}')
    check_writable(Path(args.output))
    model, params = _model_and_params(args)
    request = prepare(_request_of(args.image, params, model), model)
    weights.fetch(model)
    make = animator_class()  # only now: importing torch takes seconds
    console = make_console()
    with make(model) as animator, Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("animating", total=None)
        future = animator.submit(request, on_step=lambda done, steps: bar.update(task, completed=done, total=steps))
        animation = future.result()
    animation.save(args.output)
    made, timeline = animation.params, timeline_of(animation.params)
    height, width = animation.frames.shape[1:3]
    width, height = file_size((width, height), made)
    console.print(
        f"{args.output}: {width} x {height} px, {timeline.num_frames} frames, seed {made.seed}, "
        f"motion {animation.motion:.3f}, {animation.animate_s:.1f} s",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
    if args.open and not open_file(args.output):
        print("pia-ray: this system has no program that opens files: open the video by hand", file=sys.stderr)
    return 0


def _model_and_params(args: argparse.Namespace) -> tuple[ModelConfig, AnimationParams]:
    """The model of the style that the flags name, and the knobs that they give.

    Raises:
        ConfigError: there is no such style, no prompt, or several videos are asked for.
    """
    knobs = knobs_of(args)
    try:
        model = model_for(knobs.pop("style", DEFAULT_STYLE), load_model(args.model or DEFAULT_MODEL), styles_of(args))
    except BadParameter as error:
        raise ConfigError(f"--style: {error.message}") from None
    if "prompt" not in knobs and "prompt" not in model.defaults:
        raise ConfigError("there is no prompt: say with --prompt what the picture shows and how it moves")
    params = parse_params({"prompt": model.defaults.get("prompt"), **knobs})
    if params.num_videos > 1:
        raise ConfigError("--num-videos makes several files: use `pia-ray animate` on a manifest of one row")
    return model, params


def _request_of(image: str, params: AnimationParams, model: ModelConfig) -> AnimationRequest:
    """The request for one picture, with the files that its params or the model's defaults name.

    Raises:
        RowError: a file cannot be read.
    """
    from pia_ray.manifest import inputs, redacted
    from pia_ray.media import image as pictures
    from pia_ray.types import AnimationRequest

    caps = CatalogConfig.model_fields
    max_bytes = caps["max_image_bytes"].default
    limits = {f"max_{cap}": caps[f"max_image_{cap}"].default for cap in ("bytes", "pixels", "side", "aspect")}
    picture = pictures.decode(inputs.read_image(image, max_bytes=max_bytes), **limits).rgb
    named = {knob: uri for knob in REFERENCE_KNOBS if (uri := getattr(params, knob) or model.defaults.get(knob))}
    brings: dict[str, Any] = dict(inputs.read_references(named, background=caps["background"].default, **limits))
    # What the video says of itself holds no signature of a URL and no bytes.
    params = params.model_copy(update={knob: redacted(uri) for knob, uri in named.items()})
    return AnimationRequest(picture, params, id=Path(image).stem, **brings)


def check_writable(file: Path) -> None:
    """Refuses a file that cannot be written, before anything is fetched or made.

    Raises:
        ConfigError: there is no such folder, or it is one itself; OutputError: the system refuses.
    """
    from pia_ray import storage

    folder = file.resolve().parent
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder} to write {file} to")
    if file.is_dir():
        raise ConfigError(f"{file} is a folder: name a file")
    storage.check_writable(str(folder))


def validate_command(args: argparse.Namespace) -> int:
    return _validate(catalog_config(args, output=_NO_OUTPUT), fetch=args.fetch, show=args.show, as_json=args.json)


def _dry_run(config: CatalogConfig) -> int:
    from pia_ray.catalog import estimate

    code = _validate(config, fetch=False, show=0, as_json=False, columns=False)
    print(estimate.text_of(estimate.estimate(config, resume=True)))
    return code


def _validate(config: CatalogConfig, *, fetch: bool, show: int, as_json: bool, columns: bool = True) -> int:
    from pia_ray import manifest
    from pia_ray.catalog.review.verdict_file import read_review
    from pia_ray.catalog.run_end import EndPost
    from pia_ray.catalog.validate import validate
    from pia_ray.cli.console import make_console

    console, counts = make_console(), {"rows": 0, "bad": 0}
    if config.review:
        read_review(config.review)
    EndPost(config)
    opened = manifest.open_manifest(config)
    for finding in validate(config, fetch=fetch, opened=opened):
        counts["rows"] = finding.num_items
        if finding.prompt is not None and finding.num_items <= show and not as_json:
            console.print(f"{finding.id}: {finding.prompt}", highlight=False, soft_wrap=True, markup=False)
        if finding.code is None and finding.note is None:
            continue
        counts["bad"] += finding.code is not None and not finding.is_unreachable
        if finding.is_unreachable:
            counts["unreachable"] = counts.get("unreachable", 0) + 1
        if not as_json:
            text = finding.message or f"note: {finding.note}"
            text = text if text.startswith((f"{finding.id} ", f"{finding.id}: ")) else f"{finding.id}: {text}"
            console.print(text, highlight=False, soft_wrap=True, markup=False)
        elif finding.code is None:
            print(json.dumps({"id": finding.id, "note": finding.note}))
        else:
            print(json.dumps({"id": finding.id, "code": finding.code, "message": finding.message}))
    print_unread_layers(console, (config.model, *config.styles.values()), as_json=as_json)
    if as_json:
        print(json.dumps(counts))
    else:
        unreachable = f", {counts['unreachable']:,} unreachable now" if "unreachable" in counts else ""
        console.print(f"{count_of(counts['rows'], 'work item')}, {counts['bad']:,} bad{unreachable}", highlight=False)
    if columns and opened.use.text:
        print(opened.use.text, file=sys.stderr if as_json else sys.stdout)
    return 1 if counts["bad"] or "unreachable" in counts else 0


def estimate_command(args: argparse.Namespace) -> int:
    from pia_ray.catalog import estimate

    for flag, value in (("--measure", args.measure), ("--price-per-hour", args.price_per_hour or 0)):
        if not 0 <= value < math.inf:
            raise ConfigError(f"{flag} must be 0 or more (got {value})")
    if args.measure:
        require("run", purpose="--measure")
    config = catalog_config(args, output=_NO_OUTPUT)
    estimated = estimate.estimate(
        config,
        calibrate=args.calibrate,
        measure=args.measure,
        price_per_hour=args.price_per_hour,
        resume=config.output != _NO_OUTPUT,
    )
    print(json.dumps(estimate.facts_of(estimated)) if args.json else estimate.text_of(estimated))
    return 0


def serve_command(args: argparse.Namespace) -> int:
    names = ("host", "port", "storage", "model", "warm", "allow_anonymous", "log")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    config = load_serve(args.config, given)
    require("serve", purpose="`pia-ray serve`")

    if config.log == "json":
        os.environ.setdefault("RAY_SERVE_LOG_ENCODING", "JSON")  # read when Serve is imported, and by its processes

    from pia_ray.cli.console import make_run_console
    from pia_ray.online.serve import run_server

    _set_up_logs(config, args)
    if not args.verbose:
        for name in ("ray", "ray.serve"):
            logging.getLogger(name).setLevel(logging.ERROR)  # only now: importing ray sets its own levels
    console = make_run_console()

    def ready(url: str) -> None:
        console.print(
            f"Serving {', '.join(config.models)} at {url}\nStop with Ctrl-C.", highlight=False, soft_wrap=True
        )

    if config.log == "text":
        print("Starting ...", file=sys.stderr)
    run_server(config, ready=ready)
    return 0


def completion_command(args: argparse.Namespace) -> int:
    from argcomplete.shell_integration import shellcode

    print(shellcode(["pia-ray"], shell=args.shell))
    return 0
