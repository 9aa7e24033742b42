"""Configuration of the endpoint: what may be said, what is refused, and how."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import pytest

from pia_ray.config.catalog import CatalogConfig, load
from pia_ray.config.serve import ServeConfig, is_loopback, load_serve
from pia_ray.config.workers import DEFAULT_BATCH_SIZE, MAX_AUTO_BATCH_SIZE
from pia_ray.errors import ConfigError

KEY = hashlib.sha256(b"a key").hexdigest()


def test_an_endpoint_without_settings_serves_the_demo_model_on_loopback():
    config = load_serve(None, {})
    assert (config.default_model, list(config.models), config.host) == ("demo", ["demo"], "127.0.0.1")
    assert not config.needs_key


def test_model_stands_for_the_only_model_by_name_or_file(tmp_path: Path):
    assert list(load_serve(None, {"model": "realistic-vision"}).models) == ["realistic-vision"]
    file = tmp_path / "ours.yaml"
    file.write_text("base: somewhere/checkpoint\n")
    config = load_serve(None, {"model": str(file)})
    assert config.default_model == "ours"
    assert config.models["ours"].base == "somewhere/checkpoint"


def test_a_model_on_the_command_line_replaces_those_of_the_file(tmp_path: Path):
    file = tmp_path / "serve.yaml"
    file.write_text("models: {vivid: demo, plain: demo}\ndefault_model: plain\nmax_waiting: 3\n")
    assert load_serve(file, {}).default_model == "plain"
    config = load_serve(file, {"model": "demo"})
    assert (list(config.models), config.max_waiting) == (["demo"], 3)


def test_settings_may_be_text_as_serve_run_gives_them():
    config = load_serve(None, {"models": "a=demo,b=demo", "min_replicas": "0", "allow_anonymous": "true"})
    assert (list(config.models), config.min_replicas, config.allow_anonymous) == (["a", "b"], 0, True)


def test_a_bare_off_of_yaml_is_the_word(tmp_path: Path):
    model, file = tmp_path / "ours.yaml", tmp_path / "serve.yaml"
    model.write_text("base: somewhere\ncompile: off\ncompile_cache: off\nvae_tiling: on\nzero_snr: off\n")
    file.write_text(f"safety: off\nmodel: {model}\n")
    config = load_serve(file, {})
    ours = config.models["ours"]
    assert (config.safety, ours.compile, ours.compile_cache) == ("off", "off", "off")
    assert (ours.vae_tiling, ours.zero_snr) == ("on", "off")
    model.write_text("base: somewhere\ncompile: on\n")
    with pytest.raises(ConfigError, match=r"compile: must be .*got True"):
        load_serve(file, {})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_bound_wider_than_loopback_an_endpoint_needs_keys_or_an_explicit_word(host: str):
    with pytest.raises(ConfigError, match="api_keys"):
        load_serve(None, {"host": host})
    assert load_serve(None, {"host": host, "api_keys": [KEY]}).needs_key
    assert not load_serve(None, {"host": host, "allow_anonymous": True}).needs_key


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.9.1", "::1", "[::1]"])
def test_loopback_has_several_names(host: str):
    assert is_loopback(host)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modles": {}}, 'Did you mean "models"'),
        ({"models": {}}, "at least one"),
        ({"default_model": "other"}, "default_model must be one of demo"),
        ({"min_replicas": 2}, "max_replicas"),
        ({"model": "demo", "models": "demo"}, "the only model"),
        ({"models": {"default": "demo"}}, "default"),
        ({"batch_size": "many"}, "auto"),
        ({"trusted_proxies": ["10.0.0.0/99"]}, "not a valid network: write it as 10.0.0.0/8"),
        ({"trusted_proxies": "10.0.0.1, proxy"}, '"proxy" is not a valid network'),
        ({"key_weights": {"sk-1": 2}}, "the sha256 of a key"),
        ({"key_weights": {KEY: 0}}, "from 0.01 to 100"),
        ({"max_retakes": 17}, "max_retakes"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(values: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        load_serve(None, values)


def test_a_key_written_in_the_clear_is_refused_and_not_repeated():
    with pytest.raises(ConfigError, match="sha256") as raised:
        load_serve(None, {"api_keys": ["sk-in-the-clear"]})
    assert "sk-in-the-clear" not in str(raised.value)


def test_secrets_show_in_no_text_of_the_config():
    config = ServeConfig.model_validate({"webhook_secret": "whsec_abc", "metrics_token": "letmein"})
    text = f"{config!r} {config} {config.model_dump_json()}"
    assert "whsec_abc" not in text
    assert "letmein" not in text
    again = pickle.loads(pickle.dumps(config))
    assert again.webhook_secret.get_secret_value() == "whsec_abc"


def test_a_range_of_actors_in_a_file_is_not_read_as_a_number_to_the_base_of_sixty(tmp_path: Path):
    (tmp_path / "run.yaml").write_text("manifest: m.csv\noutput: out\nmodel: demo\nactors: 1:16\n")
    assert load(tmp_path / "run.yaml", {}).actors == (1, 16)


def test_a_worker_with_a_gpu_has_as_many_rows_in_hand_as_may_pay_there():
    config = CatalogConfig(manifest="m.csv", output="out", model="demo", prefetch=3)
    assert config.concurrent_rows() == DEFAULT_BATCH_SIZE + 3
    assert config.concurrent_rows(0.5) == MAX_AUTO_BATCH_SIZE + 3
    assert config.model_copy(update={"batch_size": 5}).concurrent_rows(1.0) == 5 + 3
