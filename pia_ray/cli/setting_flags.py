"""One flag for each setting of a run, and one for each knob, as commands that take them have them."""

from __future__ import annotations

import argparse
import re
from typing import Any, Final, get_args

from pia_ray.cli.arguments import Parser
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.knob_types import MOTION_NAMES, Knob, VideoFormat
from pia_ray.config.knobs import ARRAY_KNOBS, KNOBS, PICTURE_KNOBS
from pia_ray.config.marking import ProvenanceLevel

FORMATS: Final = get_args(VideoFormat)

KNOB_GROUPS: Final = {
    "what the video shows": (
        *("prompt", "negative_prompt", "prompt_syntax", "style", "end_image", "mask_image", "prompt_embeds"),
        "negative_prompt_embeds",
    ),
    "how it moves": ("motion_scale", "affinity", "condition_frame", "seam"),
    "size and length": ("width", "height", "num_frames", "fps", "num_videos"),
    "the finished file": (
        *("aspect", "fit", "focus", "pad_colour", "playback_fps", "interpolate", "repeat", "repeat_mode"),
        *("min_duration", "upscale", "poster"),
    ),
    "sampling": (
        *("preset", "num_inference_steps", "scheduler", "guidance_scale", "image_guidance_scale", "strength"),
        *("seed", "eta", "clip_skip", "latents"),
    ),
    "LoRAs and IP-Adapter": (
        *("lora", "lora_scale", "ip_adapter_image", "ip_adapter_scale", "ip_adapter_image_embeds"),
    ),
    "long videos": (
        *("long_video", "context_frames", "context_overlap", "context_schedule", "context_stride", "noise"),
    ),
    "FreeInit and FreeU": (
        *("free_init", "free_init_iters", "free_init_fast_sampling", "free_init_order", "free_init_spatial_stop"),
        *("free_init_temporal_stop", "free_u"),
    ),
}
"""The knobs as `--help-knobs` prints them."""

_METAVARS: Final = {
    "affinity": "X,X,...",
    "aspect": "W:H",
    "focus": "X,Y",
    "free_u": "S1,S2,B1,B2",
    "pad_colour": "#RRGGBB",
    "lora": "NAME[:X]+...",
    "motion_scale": "N|NAME",
    "style": "NAME",
    **dict.fromkeys(PICTURE_KNOBS, "FILE|URL"),
    **dict.fromkeys(ARRAY_KNOBS, "FILE"),
}

_DURATION: Final = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?")


def add_catalog_flags(parser: Parser) -> None:
    """Adds a flag for every setting of `CatalogConfig` but `manifest`, `output` and the knobs."""
    group = parser.add_argument_group("the run")

    def add(name: str, metavar: str, **how: Any) -> None:
        field = CatalogConfig.model_fields[name]
        default = "" if field.default in (None, (), False) else f" (default: {field.default})"
        text = ((field.description or "").rstrip(".") + default).replace("%", "%%")
        how = {"metavar": metavar, **how} if metavar else how
        flag = f"--{name.removesuffix('_s').replace('_', '-')}"
        parser.take_variable(group.add_argument(flag, dest=name, help=text, **how))

    config_help = "YAML file with any of these settings; flags and variables go first"
    parser.take_variable(group.add_argument("--config", metavar="FILE", help=config_help))
    model = group.add_argument("--model", metavar="NAME|FILE", help="named model, or YAML file of one")
    parser.take_variable(model)
    parser.completes_models(model)
    add_styles_flag(parser, group)
    add("keep_models", "N", type=int)
    add("pictures", "", choices=("all", "first"))
    add("limit", "N", type=int)
    add("sample", "N", type=int)
    add("partition", "K/N")
    add("accept", "BOUND", action="append")
    add("retakes", "N", type=int)
    add("unaccepted", "", choices=("keep", "fail"))
    add("review", "FILE")
    add("retry", "WHAT")
    add("remake", "missing,damaged")
    add("actors", "N|MIN:MAX")
    add("gpus_per_actor", "X", type=float)
    add("cpus_per_actor", "X", type=float)
    add("batch_size", "N|auto")
    add("warm", "WxHxFRAMES,...")
    add("prefetch", "N|auto")
    add("format", "", choices=FORMATS)
    add("safety", "", choices=("off", "flag", "fail"))
    add("provenance", "", choices=get_args(ProvenanceLevel))
    add("c2pa_certificate", "FILE")
    add("c2pa_key", "FILE")
    add("c2pa_timestamp_url", "URL")
    add("max_attempts", "N", type=int)
    add("patience_s", "T", type=seconds)
    add("max_failures", "N|P%")
    add("deadline_s", "T", type=seconds)
    add("grace_s", "T", type=seconds)
    add("row_timeout_s", "T", type=seconds)
    add("hang_timeout_s", "T", type=seconds)
    add("fetch_timeout_s", "T", type=seconds)
    add("publish_timeout_s", "T", type=seconds)
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
    add("s3_anonymous", "BUCKET,...")
    add("s3_requester_pays", "BUCKET,...")
    add("ignore_opt_outs", "", action="store_true", default=None)
    add("address", "ADDR")
    add("id_col", "NAME")
    add("image_col", "NAME")
    add("prompt_col", "NAME")
    add("knobs", "NAME,...")
    add("delimiter", "CHAR|tab")
    add("encoding", "NAME")
    add("not_knobs", "NAME,...")


def add_styles_flag(parser: Parser, group: argparse._ActionsContainer) -> None:
    """Adds `--styles` to that group of the parser."""
    flag = group.add_argument(
        "--styles",
        metavar="NAME[=MODEL],...",
        action="append",
        help="more models, for rows that name one as their style; NAME alone is the model of that name. Repeatable",
    )
    parser.take_variable(flag)


def add_knob_flags(parser: Parser) -> None:
    """Adds a flag for every knob, in groups that `--help-knobs` prints."""
    for title, names in KNOB_GROUPS.items():
        group = parser.add_knob_group(title)
        for name in names:
            knob = KNOBS[name]
            flag = group.add_argument(
                f"--{name.replace('_', '-')}", dest=name, metavar=_metavar(knob), help=_knob_help(knob)
            )
            if words := MOTION_NAMES if name == "motion_scale" else knob.choices:
                parser.completes(flag, words)


def _metavar(knob: Knob) -> str:
    if knob.name in _METAVARS:
        return _METAVARS[knob.name]
    if knob.choices:
        return "NAME" if len(knob.choices) > 3 else "|".join(knob.choices)
    return {int: "N", float: "X"}.get(knob.type, "TEXT")


def _knob_help(knob: Knob) -> str:
    facts = [", ".join(knob.choices)] if knob.choices else [" ".join(filter(None, [knob.bounds, knob.unit]))]
    if knob.default not in (None, ""):
        shown = str(knob.default)
        facts.append(f"default {shown if len(shown) < 40 else shown[:37] + '...'}")
    inside = "; ".join(filter(None, facts))
    return (f"{knob.meaning} ({inside})" if inside else knob.meaning).replace("%", "%%")


def seconds(text: str) -> float:
    """`90`, `90s`, `15m`, `1.5h` or `1h30m` in seconds."""
    match = _DURATION.fullmatch(text.strip().lower())
    if match is None or not any(match.groups()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time: write 90s, 15m or 1h30m")
    hours, minutes, rest = (float(part or 0) for part in match.groups())
    return 3600 * hours + 60 * minutes + rest
