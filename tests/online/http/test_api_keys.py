"""Keys are let in by their hash, and a file of them is read again when it changes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from pia_ray.errors import Unauthorized
from pia_ray.online.http.api_keys import ANONYMOUS, KeyRing


def line(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def write(file: Path, *keys: str) -> None:
    new = file.with_suffix(".new")
    new.write_text("# who may call\n\n" + "".join(f"{line(key)}  # {index}\n" for index, key in enumerate(keys)))
    new.replace(file)


def test_without_keys_everybody_is_anonymous_whatever_key_the_client_cannot_do_without():
    ring = KeyRing((), allow_anonymous=False)
    assert ring.owner_of(None) == ANONYMOUS
    assert ring.owner_of("sk-any") == ANONYMOUS


def test_with_keys_a_caller_needs_one():
    ring = KeyRing((line("a"), line("b")), allow_anonymous=False)
    assert ring.owner_of("a") != ring.owner_of("b")
    for wrong in (None, "", "c", line("a"), "a\udcff"):
        with pytest.raises(Unauthorized):
            ring.owner_of(wrong)


def test_an_owner_keeps_its_name_wherever_the_key_stands(tmp_path: Path):
    write(tmp_path / "keys", "b", "a")
    named = KeyRing(str(tmp_path / "keys"), allow_anonymous=False).owner_of("a")
    assert named == KeyRing((line("a"),), allow_anonymous=False).owner_of("a")


def test_keys_are_added_and_withdrawn_without_a_restart(tmp_path: Path):
    file = tmp_path / "keys"
    write(file, "old")
    ring = KeyRing(str(file), allow_anonymous=False)
    old = ring.owner_of("old")
    write(file, "old", "new")
    assert ring.owner_of("old") == old
    new = ring.owner_of("new")
    write(file, "new")
    assert ring.owner_of("new") == new
    with pytest.raises(Unauthorized):
        ring.owner_of("old")


def test_a_slip_in_the_file_of_keys_changes_nothing(tmp_path: Path):
    file = tmp_path / "keys"
    write(file, "a")
    ring = KeyRing(str(file), allow_anonymous=False)
    owner = ring.owner_of("a")
    file.write_text(f"{line('b')}\nsk-a-key-in-clear\n")
    assert ring.owner_of("a") == owner
    with pytest.raises(Unauthorized):
        ring.owner_of("b")
    file.unlink()
    assert ring.owner_of("a") == owner


def test_an_empty_file_of_keys_admits_no_caller(tmp_path: Path):
    file = tmp_path / "keys"
    write(file, "a")
    ring = KeyRing(str(file), allow_anonymous=False)
    write(file)
    os.utime(file, (1, 1))
    for key in ("a", None):
        with pytest.raises(Unauthorized):
            ring.owner_of(key)
