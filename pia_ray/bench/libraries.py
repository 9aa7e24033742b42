"""What the libraries that the benchmark imports print."""

from __future__ import annotations

import diffusers
import transformers


def silence_libraries() -> None:
    """Keeps off the screen what the import of diffusers' pipelines tells developers, such as what they deprecate."""
    for library in (diffusers, transformers):
        library.logging.set_verbosity_error()
