"""What Pillow raises for bad files, as errors of a row."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from PIL import Image

from pia_ray.errors import ImageTooLarge, ImageTruncated, UnsupportedImage

ADVICE: Final = "Save it as JPEG, PNG or WebP."

# Pillow's decoders let all of these out for damaged files, by no rule: over its own 1,067 test images OSError 96 times,
# ValueError 9, NotImplementedError 3, TypeError 2, SyntaxError 1, and the others from fuzzing. Warning stands here for
# programs that turn warnings into errors. A bug of ours in the lines they guard would be taken for a bad picture, so
# those lines are few.
DECODER_FAULTS: Final = (
    OSError,
    ValueError,
    SyntaxError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    EOFError,
    RuntimeError,
    Warning,
    struct.error,
    zlib.error,
)
_UNSUPPORTED_WORDS: Final = (
    "unsupported",
    "not supported",
    "not available",
    "cannot handle",
    "unknown pixel",
    "unknown d",
)


@contextmanager
def decoder_faults(what: str) -> Iterator[None]:
    """Turns what Pillow raises on bad input into an ImageError."""
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageTooLarge(f"{what} declares far more pixels than it should. {ADVICE}") from None
    except MemoryError as error:
        raise ImageTooLarge(f"{what} does not fit into memory while it is decoded. Make it smaller.") from error
    except DECODER_FAULTS as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        if isinstance(error, NotImplementedError) or any(word in reason.lower() for word in _UNSUPPORTED_WORDS):
            raise UnsupportedImage(f"{what} uses a variant that is not read ({reason}). {ADVICE}") from error
        raise ImageTruncated(f"{what} is cut off or damaged ({reason}). Upload it again.") from error
