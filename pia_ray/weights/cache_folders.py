"""The folders of this user for what a later process need not make again, beside the weights that were fetched."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub.constants import HF_HOME


def weights_folder(identity: str) -> Path:
    """The folder of weights from other stores than the hub."""
    return Path(HF_HOME) / "pia-ray" / "weights" / identity


def compiled_folder(kind: str) -> Path:
    """The folder of compiled code of this kind."""
    return Path(HF_HOME) / "pia-ray" / "compiled" / kind


def digests_folder() -> Path:
    """The folder of the digests of large files."""
    return Path(HF_HOME) / "pia-ray" / "digests"
