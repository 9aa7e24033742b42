"""Pickled checkpoints: their tensors whatever trainers left in them, nothing run, and plain reasons."""

from __future__ import annotations

import collections
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from pia_ray.errors import WeightsError
from pia_ray.pia.loading.checkpoint_tensors import read_tensors


class ModelCheckpoint:
    """Stands for a callback of a trainer that is not installed here."""

    def __init__(self) -> None:
        self.best = {"path": "x", "score": 1.0}


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harm",)


def test_leftovers_of_a_trainer_are_named_and_do_not_stop_a_plain_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weight = torch.arange(4.0)
    left = {ModelCheckpoint: {"best": 1}, "object": ModelCheckpoint(), "counts": collections.Counter(a=1)}
    torch.save({"callbacks": left, "state_dict": {"a.weight": weight}}, tmp_path / "x.ckpt")
    with caplog.at_level(logging.INFO):
        assert torch.equal(read_tensors(tmp_path / "x.ckpt")["a.weight"], weight)
    assert "ModelCheckpoint" in caplog.text


def test_a_parameter_dict_is_read_as_its_parameters(tmp_path: Path) -> None:
    vectors = torch.randn(2, 8)
    words = torch.nn.ParameterDict({"*": torch.nn.Parameter(vectors)})
    whole = {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": words, "name": "art"}
    torch.save(whole, tmp_path / "art.pt")
    assert torch.equal(read_tensors(tmp_path / "art.pt")["string_to_param.*"], vectors)
    torch.save(whole, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(WeightsError, match=r"format of torch before 1.6"):
        read_tensors(tmp_path / "old.pt")


def test_code_in_a_pickle_is_named_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "x": Harmful()}, tmp_path / "x.ckpt")
    with pytest.raises(WeightsError, match=r"holds (posix|nt|os)\.mkdir"):
        read_tensors(tmp_path / "x.ckpt")
    assert not (tmp_path / "harm").exists()


def test_a_file_that_is_one_object_names_its_class(tmp_path: Path) -> None:
    torch.save(ModelCheckpoint(), tmp_path / "x.pt")
    with pytest.raises(WeightsError, match=r"no tensors by name: it is a .*ModelCheckpoint"):
        read_tensors(tmp_path / "x.pt")


def test_reasons_are_one_line_without_colours(tmp_path: Path) -> None:
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_bytes(b"not a checkpoint")
    torch.save([1, 2], tmp_path / "list.pt")
    for file in tmp_path.iterdir():
        with pytest.raises(WeightsError) as caught:
            read_tensors(file)
        assert "\n" not in caught.value.message
        assert "\x1b" not in caught.value.message
        assert "weights_only=False" not in caught.value.message
