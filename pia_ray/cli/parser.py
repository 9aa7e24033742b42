"""The commands of `pia-ray` and their flags."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, get_args

from pia_ray import __version__
from pia_ray.cli import commands, model_commands, output_commands
from pia_ray.cli.arguments import Parser
from pia_ray.cli.bench_command import bench_command
from pia_ray.cli.export_command import export_command
from pia_ray.cli.jobs_command import ACTIONS, STATUSES, jobs_command
from pia_ray.cli.setting_flags import FORMATS, add_catalog_flags, add_knob_flags, add_styles_flag, seconds
from pia_ray.config.knob_types import Preset
from pia_ray.config.serve import ServeConfig
from pia_ray.logs import LogFormat

_MANIFEST_HELP: Final = (
    "a .parquet, .arrow, .csv, .tsv, .jsonl, .json, .xlsx or .txt file (also .gz or .zst), a folder or glob of these, "
    "or a folder of images; local, s3:// or of a store that fsspec reads. Several are animated as one"
)
_OPEN_HELP: Final = "open the gallery in the browser when the run has ended"
_RUN_EPILOG: Final = (
    "Knobs of a row, such as --motion-scale and --num-frames: see --help-knobs.\n"
    "A setting may stand in the --config file, or in a variable: --max-attempts is PIA_RAY_MAX_ATTEMPTS."
)


def make_parser() -> Parser:
    """The parser of all commands; `args.command` is the function to call, `args.parser` the parser of its flags.

    Its own `variables` are those of all commands.
    """
    parser = Parser(prog="pia-ray", description="Animates catalogues of images with PIA on Ray.")
    parser.add_argument("--version", action="version", version=f"pia-ray {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for each in _COMMANDS:
        usage = each.usage and f"pia-ray {each.name} {each.usage}"
        description = each.text[0].upper() + each.text[1:] + "."
        added = subparsers.add_parser(each.name, help=each.text, description=description, usage=usage)
        added.set_defaults(command=each.command, parser=added)
        added.add_argument("-v", "--verbose", action="store_true", help="log what is done, with ids and seconds")
        added.add_argument("--log", choices=get_args(LogFormat), help="log lines as text (default), or as JSON lines")
        each.add_flags(added)
        parser.variables.update(added.variables)
    return parser


def _demo_flags(demo: Parser) -> None:
    demo.add_argument("--output", default="pia-ray-demo", metavar="DIR", help="where to (default: %(default)s)")
    demo.add_argument("--limit", metavar="N", type=int, help="only the first so many rows of the catalogue")
    preset_help = "how many steps are computed (default: %(default)s, whose videos are at 44 dB or more against exact)"
    demo.add_argument("--preset", choices=get_args(Preset), default="balanced", help=preset_help)
    demo.add_argument("--open", action="store_true", help=_OPEN_HELP)


def _animate_flags(animate: Parser) -> None:
    animate.examples = (
        'pia-ray animate catalog.csv --output out --prompt "a photo of {title}"',
        "pia-ray animate s3://shop/catalog.parquet --output s3://shop/videos --address auto --limit 100",
    )
    animate.first_flags = ("output", "prompt", "model", "limit", "dry_run")
    animate.epilog = _RUN_EPILOG
    animate.take_variable(animate.add_argument("manifest", metavar="MANIFEST", nargs="*", help=_MANIFEST_HELP))
    output_help = "folder or s3:// prefix for videos, results and gallery"
    animate.take_variable(animate.add_argument("--output", metavar="URI", help=output_help))
    animate.add_argument("--open", action="store_true", help=_OPEN_HELP)
    animate.add_argument("--dry-run", action="store_true", help="check every row and estimate the run; animate nothing")
    add_catalog_flags(animate)
    add_knob_flags(animate)


def _image_flags(image: Parser) -> None:
    image.examples = (
        'pia-ray image cat.jpg -o cat.mp4 --prompt "a cat turns its head"',
        "pia-ray image lake.png -o lake.webp --prompt waves --model demo --motion-scale loop-small --open",
    )
    image.first_flags = ("output", "prompt", "model", "motion_scale", "open")
    image.epilog = "More knobs, such as --num-frames and --seed: see --help-knobs."
    image.add_argument("image", metavar="IMAGE", help="path, s3://, https:// or data: URL, or a URI that fsspec reads")
    formats = ", .".join(FORMATS)
    image.add_argument("-o", "--output", required=True, metavar="FILE", help=f"the video: .{formats}")
    model_help = f"named model, or YAML file of one (default: {commands.DEFAULT_MODEL})"
    model = image.add_argument("--model", metavar="NAME|FILE", help=model_help)
    image.take_variable(model)
    image.completes_models(model)
    image.add_argument("--open", action="store_true", help="show the video with the system's own program")
    add_styles_flag(image, image)
    add_knob_flags(image)


def _validate_flags(validate: Parser) -> None:
    validate.examples = (
        'pia-ray validate catalog.csv --prompt "a photo of {title}" --show 3',
        "pia-ray validate --config run.yaml --fetch",
    )
    validate.first_flags = ("prompt", "fetch", "show", "json", "config")
    validate.epilog = _RUN_EPILOG
    validate.take_variable(validate.add_argument("manifest", metavar="MANIFEST", nargs="*", help=_MANIFEST_HELP))
    validate.add_argument("--show", metavar="N", type=int, default=0, help="also print the prompts of the first N rows")
    validate.add_argument("--fetch", action="store_true", help="also open the images")
    validate.add_argument("--json", action="store_true", help="print one JSON line per bad row, and one of counts")
    add_catalog_flags(validate)
    add_knob_flags(validate)


def _estimate_flags(estimate: Parser) -> None:
    estimate.examples = (
        "pia-ray estimate catalog.parquet --measure 8 --price-per-hour 2.5",
        "pia-ray estimate --config run.yaml --calibrate s3://shop/earlier",
    )
    estimate.first_flags = ("output", "measure", "calibrate", "price_per_hour", "config")
    estimate.epilog = _RUN_EPILOG
    estimate.take_variable(estimate.add_argument("manifest", metavar="MANIFEST", nargs="*", help=_MANIFEST_HELP))
    output_help = "of the run: what is done there already is left out"
    estimate.take_variable(estimate.add_argument("--output", metavar="URI", help=output_help))
    speeds = estimate.add_mutually_exclusive_group()
    speeds.add_argument("--calibrate", metavar="OUTPUT", help="speeds from an earlier run on such hardware")
    speeds.add_argument("--measure", metavar="N", type=int, default=0, help="speeds from N rows, animated here and now")
    estimate.add_argument("--price-per-hour", metavar="X", type=float, help="of one worker, in any currency")
    estimate.add_argument("--json", action="store_true", help="print JSON")
    add_catalog_flags(estimate)
    add_knob_flags(estimate)


def _report_flags(report: Parser) -> None:
    report.add_argument("output", metavar="OUTPUT")
    report.add_argument("--json", action="store_true", help="print JSON")
    report.add_argument("--follow", action="store_true", help="again every few seconds, until interrupted")


def _judge_flags(judge: Parser) -> None:
    judge.examples = ('pia-ray judge out --accept "likeness_min>=0.7" --accept "flicker<=0.03"',)
    judge.add_argument("output", metavar="OUTPUT")
    accept_help = 'bound such as "likeness_min>=0.7". Repeatable'
    judge.add_argument("--accept", metavar="BOUND", action="append", required=True, help=accept_help)
    judge.add_argument("--json", action="store_true", help="print JSON")
    judge.add_argument("--csv", metavar="FILE", help="also write the videos that miss to a file")


def _gallery_flags(gallery: Parser) -> None:
    gallery.add_argument("output", metavar="OUTPUT")


def _export_flags(export: Parser) -> None:
    export.examples = (
        'pia-ray export out --to shop --name "{sku}-{video_index}" --accepted',
        "pia-ray export s3://shop/videos --to s3://cdn/videos --base-url https://cdn.example/videos/ --feed both",
    )
    export.first_flags = ("to", "name", "accepted", "feed", "base_url")
    export.add_argument("output", metavar="OUTPUT")
    export.add_argument("--to", metavar="URI", required=True, help="folder or s3:// prefix that the files go to")
    name_help = "template of names from columns of the results and of the catalogue; a / makes folders"
    export.add_argument(
        "--name", metavar="TEXT", default="{id}-{video_index}", help=f"{name_help} (default: %(default)s)"
    )
    export.add_argument(
        "--accepted", action="store_true", help="only videos that were approved, or meet the bounds of their run"
    )
    marking_help = "the part of its making that a video states (default: %(default)s)"
    export.add_argument("--provenance", choices=("full", "public", "none"), default="public", help=marking_help)
    feed_help = "file with a line per video: its URLs, facts and the catalogue's columns (default: %(default)s)"
    export.add_argument("--feed", choices=("csv", "jsonl", "both"), default="csv", help=feed_help)
    export.add_argument("--base-url", metavar="URL", help="URL at which the target is public, for the feed")
    export.add_argument("--link", action="store_true", help="give files a second name on their disk, do not copy them")
    export.add_argument("--prune", action="store_true", help="remove what earlier exports copied and this one does not")
    export.add_argument("--json", action="store_true", help="print JSON")


def _ledger_flags(ledger: Parser) -> None:
    ledger.add_argument("action", choices=("verify", "compact", "rebuild"))
    ledger.add_argument("output", metavar="OUTPUT")
    ledger.add_argument("--deep", action="store_true", help="with verify: read every video and compare its SHA-256")
    ledger.add_argument(
        "--repair", action="store_true", help="with verify: say which command makes damaged and missing videos again"
    )


def _bench_flags(bench: Parser) -> None:
    bench.add_argument("--size", choices=("full", "reduced", "demo"), help="model (default: full with a GPU)")
    bench.add_argument(
        "--steps",
        metavar="N",
        type=int,
        help="denoising steps (default: 25 with a GPU, else 4; full 2; quality: 8 and 25)",
    )
    bench.add_argument("--frames", metavar="N", type=int, default=16, help="frames of a video (default: %(default)s)")
    bench.add_argument(
        "--side", metavar="PX", type=int, help="of the square frames (default: 512, on a CPU 128; reduced 128; demo 64)"
    )
    bench.add_argument("--rounds", metavar="N", type=int, default=5, help="rounds by turns (default: %(default)s)")
    bench.add_argument("--batches", metavar="N,N", help="rows in flight (default: 1,2,4,8; full on a CPU: 1)")
    precisions = ("auto", "float32", "tf32", "float16", "bfloat16")
    bench.add_argument("--dtype", choices=precisions, default="auto", help="precision")
    bench.add_argument("--offload", metavar="MODE,MODE", help="also with weights in host memory: model, sequential")
    bench.add_argument("--no-verbatim", action="store_true", help="leave the documented example out")
    bench.add_argument(
        "--quality", action="store_true", help="presets against every step computed, and beside fewer steps"
    )
    model_help = "with --quality: a model of yours (default: demo)"
    bench.completes_models(bench.add_argument("--model", metavar="NAME|FILE", help=model_help))
    bench.add_argument("--rows", metavar="N", type=int, default=4, help="with --quality (default: %(default)s)")
    bench.add_argument("--guidance", metavar="X", type=float, help="with --quality (default: the model's)")
    bench.add_argument("--against", metavar="PATH", help="a card's JSON, or a folder of them: show what has changed")
    bench.add_argument("--json", metavar="FILE", help="also write the JSON line to a file")


def _serve_flags(serve: Parser) -> None:
    config_help = "YAML file with the endpoint's settings; flags and variables go first"
    serve.take_variable(serve.add_argument("--config", metavar="FILE", help=config_help))
    for name, metavar in (("host", "ADDR"), ("port", "N"), ("storage", "URI")):
        field = ServeConfig.model_fields[name]
        text = f"{(field.description or '').rstrip('.')} (default: {field.default})"
        flag = serve.add_argument(f"--{name}", metavar=metavar, help=text)
        if name != "port":  # Kubernetes sets PIA_RAY_PORT to an address where a service is called pia-ray
            serve.take_variable(flag)
    model = serve.add_argument("--model", metavar="NAME|FILE", help="the only model (default: demo)")
    serve.take_variable(model)
    serve.completes_models(model)
    warm_help = (ServeConfig.model_fields["warm"].description or "").rstrip(".")
    serve.take_variable(serve.add_argument("--warm", metavar="WxHxFRAMES,...", help=warm_help))
    anonymous_help = (ServeConfig.model_fields["allow_anonymous"].description or "").rstrip(".")
    anonymous = serve.add_argument("--allow-anonymous", action="store_true", default=None, help=anonymous_help)
    serve.take_variable(anonymous)


def _jobs_flags(jobs: Parser) -> None:
    jobs.examples = (
        "pia-ray jobs list --storage s3://shop/serve --status failed",
        "pia-ray jobs retry video_... --storage s3://shop/serve",
        "pia-ray jobs purge --storage s3://shop/serve --status failed --older-than 72h --dry-run",
    )
    jobs.first_flags = ("storage", "status", "owner", "older_than", "json")
    jobs.add_argument("action", choices=ACTIONS)
    jobs.add_argument("ids", nargs="*", metavar="ID", help="of the jobs to show, retry or cancel")
    default = ServeConfig.model_fields["storage"].default
    storage_help = f"the endpoint's storage (default: {default})"
    jobs.take_variable(jobs.add_argument("--storage", metavar="URI", help=storage_help))
    jobs.add_argument("--status", choices=STATUSES, help="only jobs of this status")
    owner_help = "only jobs of this owner, as logs name it, or of the key with this sha256"
    jobs.add_argument("--owner", metavar="TEXT", help=owner_help)
    older_help = "only jobs that ended, or began to wait, longer ago, such as 90s, 15m or 72h"
    jobs.add_argument("--older-than", metavar="T", type=seconds, help=older_help)
    jobs.add_argument("--newer-than", metavar="T", type=seconds, help="only jobs that did so since then")
    jobs.add_argument("--limit", metavar="N", type=int, help="with list: at most so many, the newest (default: 100)")
    jobs.add_argument("--json", action="store_true", help="with list and show: print a JSON line per job")
    jobs.add_argument("--dry-run", action="store_true", help="with purge: print the jobs, delete none")


def _models_flags(models: Parser) -> None:
    models.add_argument("action", nargs="?", choices=("list", "pull", "show"), help="list if left out")
    models.completes_models(models.add_argument("name", nargs="?", metavar="NAME|FILE"))
    models.add_argument(
        "--to", metavar="URI", help="with pull: also copy the weights to a folder or s3:// prefix that workers share"
    )


def _completion_flags(completion: Parser) -> None:
    completion.add_argument("shell", choices=("bash", "zsh", "fish"))
    completion.examples = ('eval "$(pia-ray completion bash)"', "pia-ray completion fish | source")


@dataclass(frozen=True)
class _Entry:
    """A command as `pia-ray --help` lists it."""

    name: str
    command: commands.Command
    text: str
    add_flags: Callable[[Parser], None]
    usage: str | None = None
    """Its usage after its name; None for argparse's own."""


_COMMANDS: Final = (
    _Entry(
        "demo",
        commands.demo_command,
        "animate the bundled catalogue with the bundled model on this machine",
        _demo_flags,
    ),
    _Entry(
        "animate",
        commands.animate_command,
        "animate a catalogue: videos, results table and gallery",
        _animate_flags,
        "MANIFEST --output URI [FLAG ...]",
    ),
    _Entry(
        "image",
        commands.image_command,
        "animate one picture, without Ray",
        _image_flags,
        "IMAGE --output FILE --prompt TEXT [FLAG ...]",
    ),
    _Entry(
        "validate",
        commands.validate_command,
        "check every row of a manifest, without a GPU",
        _validate_flags,
        "MANIFEST [FLAG ...]",
    ),
    _Entry(
        "estimate",
        commands.estimate_command,
        "what a run takes, before it runs: rows, time, GPU-hours, cost, storage",
        _estimate_flags,
        "MANIFEST [FLAG ...]",
    ),
    _Entry(
        "report",
        output_commands.report_command,
        "what happened in an output: counts, errors, throughput, percentiles",
        _report_flags,
    ),
    _Entry(
        "judge",
        output_commands.judge_command,
        "which videos of an output meet bounds, by their stored numbers",
        _judge_flags,
    ),
    _Entry("gallery", output_commands.gallery_command, "write OUTPUT/index.html", _gallery_flags),
    _Entry(
        "export", export_command, "copy an output's videos under names of yours, with a feed of them", _export_flags
    ),
    _Entry("ledger", output_commands.ledger_command, "care of the ledger", _ledger_flags),
    _Entry(
        "bench",
        bench_command,
        "the benchmark card: this animator against diffusers' own pipeline, in one run",
        _bench_flags,
    ),
    _Entry(
        "serve", commands.serve_command, "the endpoint and its page on this machine, until interrupted", _serve_flags
    ),
    _Entry(
        "jobs", jobs_command, "the video jobs of an endpoint, for its operator; needs its storage alone", _jobs_flags
    ),
    _Entry(
        "models",
        model_commands.models_command,
        "list named models; `models pull NAME` fetches and verifies weights, `show` reads them",
        _models_flags,
    ),
    _Entry(
        "completion",
        commands.completion_command,
        "print what makes a shell complete these commands",
        _completion_flags,
    ),
)
