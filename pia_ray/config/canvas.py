"""The size of a finished file by the size of its frames and the knobs `upscale` and `aspect`. Pure functions."""

from __future__ import annotations

from pia_ray.config.finish_knobs import FinishKnobs


def canvas_of(size: tuple[int, int], params: FinishKnobs) -> tuple[int, int]:
    """The size (width, height) of the file whose frames, before padding, have the size `size`.

    With fit pad or blur it is the smallest one of the aspect that holds the frames; both sides are even.
    """
    aspect = params.aspect_ratio
    if aspect is None or params.fit == "crop":
        return size
    width, height = size
    if width >= height * aspect:
        return width, max(height, _even(width / aspect))
    return max(width, _even(height * aspect)), height


def file_size(size: tuple[int, int], params: FinishKnobs) -> tuple[int, int]:
    """The size (width, height) of the file of frames that are generated at the size `size`."""
    width, height = size
    return canvas_of((params.upscale * width, params.upscale * height), params)


def _even(side: float) -> int:
    return 2 * round(side / 2)
