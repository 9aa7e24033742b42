"""`pia-ray models`: the named models, their weights, and what of them has no place in a model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from importlib.util import find_spec
from typing import TYPE_CHECKING

from pia_ray.config.model import ModelConfig, load_model, named_models
from pia_ray.errors import ConfigError
from pia_ray.formatting import count_of

if TYPE_CHECKING:
    from rich.console import Console


def models_command(args: argparse.Namespace) -> int:
    from pia_ray import storage, weights
    from pia_ray.cli.console import absolute_path, make_console, show_table

    if args.action == "pull":
        if args.name is None:
            raise ConfigError("models pull needs the name of a model, or a YAML file of one")
        model = load_model(args.name)
        if args.to is not None:
            location = absolute_path(args.to)
            print(f"{args.name}: {weights.version(weights.copy(model, location))} in {location}")
            print(f"Its settings, for `model` in a config file, are in {storage.join(location, weights.MODEL_FILE)}")
            return 0
        local = weights.pull(model)
        print(f"{args.name}: {local.version} in {local.base}")
        return 0
    if args.to is not None:
        raise ConfigError("--to is for models pull NAME")
    if args.action == "list" and args.name is not None:
        raise ConfigError(f"models list takes no name: `pia-ray models show {args.name}` shows one model")
    if args.action == "show":
        if args.name is None:
            raise ConfigError("models show needs the name of a model, or a YAML file of one")
        return _show_model(load_model(args.name))
    rows = [
        [name, "yes" if weights.is_pulled(model) else "no", model.base, model.description]
        for name, model in named_models().items()
    ]
    show_table(make_console(), ["name", "fetched", "base", "description"], rows)
    return 0


def _show_model(model: ModelConfig) -> int:
    """Prints what a model is made of, and what of its LoRAs has no place in it."""
    from pia_ray import weights
    from pia_ray.cli.console import make_console, show_table
    from pia_ray.pia.loading.outline import outline

    local = weights.resolve(model)
    found = outline(local, model)
    zero = ", zero terminal SNR" if found.scheduler.get("rescale_betas_zero_snr") else ""
    print(f"{local.version} in {local.base}")
    print(f"predicts: {found.scheduler.get('prediction_type', 'epsilon')}{zero}")
    if model.sampling:
        print(f"{model.few_step}: " + ", ".join(f"{knob} {value}" for knob, value in model.sampling.items()))
    if found.words:
        print("words of textual inversions: " + ", ".join(found.words))
    rows = []
    for name, file in found.loras.items():
        use = "all rows" if model.loras[name].merge else "rows that choose it or nothing"
        rows.append([name, f"{model.loras[name].weight:g}", use, str(file.num_layers), str(len(file.unread))])
    if rows:
        show_table(make_console(), ["lora", "weight", "acts on", "layers", "without a place"], rows)
    for name, unread in _unread_layers(model).items():
        print(f"{name}, without a place in this model: {', '.join(unread)}")
    return 0


def _unread_layers(model: ModelConfig) -> dict[str, list[str]]:
    """The layers without a place in the model, by LoRA; none where weights or torch are not here."""
    from pia_ray import weights

    if not model.loras or not weights.is_pulled(model) or find_spec("torch") is None:
        return {}
    from pia_ray.pia.loading.outline import outline

    found = outline(weights.resolve(model), model)
    return {name: file.unread for name, file in found.loras.items() if file.unread}


def print_unread_layers(console: Console, models: Iterable[ModelConfig], *, as_json: bool) -> None:
    """Prints a line for each LoRA of which layers have no place in its model."""
    for model in models:
        for name, unread in _unread_layers(model).items():
            if as_json:
                print(json.dumps({"model": model.name, "lora": name, "unread": unread}))
            else:
                layers = f"{count_of(len(unread), 'layer')} of LoRA {name} without a place in it"
                text = f"model {model.name}: note: {layers}, such as {unread[0]}"
                console.print(text, highlight=False, soft_wrap=True, markup=False)
