"""One flag for each setting of a run, and one for each knob, as commands that take them have them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
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
    config_help = "YAML file with any of these settings; flags and variables go first"
    parser.take_variable(group.add_argument("--config", metavar="FILE", help=config_help))
    model = group.add_argument("--model", metavar="NAME|FILE", help="named model, or YAML file of one")
    parser.take_variable(model)
    parser.completes_models(model)
    add_styles_flag(parser, group)
    for name, how in _SETTINGS.items():
        field = CatalogConfig.model_fields[name]
        default = "" if field.default in (None, (), False) else f" (default: {field.default})"
        text = ((field.description or "").rstrip(".") + default).replace("%", "%%")
        flag = f"--{name.removesuffix('_s').replace('_', '-')}"
        parser.take_variable(group.add_argument(flag, dest=name, help=text, **how))


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


_WHOLE_NUMBER: Final[Mapping[str, Any]] = {"metavar": "N", "type": int}
_NUMBER: Final[Mapping[str, Any]] = {"metavar": "X", "type": float}
_SECONDS: Final[Mapping[str, Any]] = {"metavar": "T", "type": seconds}
_SWITCH: Final[Mapping[str, Any]] = {"action": "store_true", "default": None}
_SETTINGS: Final[Mapping[str, Mapping[str, Any]]] = {
    "keep_models": _WHOLE_NUMBER,
    "pictures": {"choices": ("all", "first")},
    "limit": _WHOLE_NUMBER,
    "sample": _WHOLE_NUMBER,
    "partition": {"metavar": "K/N"},
    "accept": {"metavar": "BOUND", "action": "append"},
    "retakes": _WHOLE_NUMBER,
    "unaccepted": {"choices": ("keep", "fail")},
    "review": {"metavar": "FILE"},
    "retry": {"metavar": "WHAT"},
    "remake": {"metavar": "missing,damaged"},
    "actors": {"metavar": "N|MIN:MAX"},
    "gpus_per_actor": _NUMBER,
    "cpus_per_actor": _NUMBER,
    "batch_size": {"metavar": "N|auto"},
    "warm": {"metavar": "WxHxFRAMES,..."},
    "prefetch": {"metavar": "N|auto"},
    "format": {"choices": FORMATS},
    "safety": {"choices": ("off", "flag", "fail")},
    "provenance": {"choices": get_args(ProvenanceLevel)},
    "c2pa_certificate": {"metavar": "FILE"},
    "c2pa_key": {"metavar": "FILE"},
    "c2pa_timestamp_url": {"metavar": "URL"},
    "max_attempts": _WHOLE_NUMBER,
    "patience_s": _SECONDS,
    "max_failures": {"metavar": "N|P%"},
    "deadline_s": _SECONDS,
    "grace_s": _SECONDS,
    "row_timeout_s": _SECONDS,
    "hang_timeout_s": _SECONDS,
    "fetch_timeout_s": _SECONDS,
    "publish_timeout_s": _SECONDS,
    "detect_changes": _SWITCH,
    "background": {"metavar": "#RRGGBB"},
    "max_image_bytes": _WHOLE_NUMBER,
    "max_image_pixels": _WHOLE_NUMBER,
    "max_image_side": _WHOLE_NUMBER,
    "max_image_aspect": _NUMBER,
    "on_end": {"metavar": "URL"},
    "on_end_secret": {"metavar": "FILE"},
    "on_end_networks": {"metavar": "NET,..."},
    "per_host_rate": _NUMBER,
    "allow_http": _SWITCH,
    "allowed_networks": {"metavar": "NETWORK,..."},
    "header": {"metavar": "HOST:NAME:VALUE", "action": "append"},
    "user_agent": {"metavar": "TEXT"},
    "s3_anonymous": {"metavar": "BUCKET,..."},
    "s3_requester_pays": {"metavar": "BUCKET,..."},
    "ignore_opt_outs": _SWITCH,
    "address": {"metavar": "ADDR"},
    "id_col": {"metavar": "NAME"},
    "image_col": {"metavar": "NAME"},
    "prompt_col": {"metavar": "NAME"},
    "knobs": {"metavar": "NAME,..."},
    "delimiter": {"metavar": "CHAR|tab"},
    "encoding": {"metavar": "NAME"},
    "not_knobs": {"metavar": "NAME,..."},
}
"""The settings with a flag, in the order of `--help`, and what argparse takes for each."""
