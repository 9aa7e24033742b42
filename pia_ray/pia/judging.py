"""`judge`: the numbers of a video, from frames in memory. An `Animator` measures those of its own videos as it goes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pia_ray.media.image import as_rgb
from pia_ray.media.judgement import Judgement, judge_frames
from pia_ray.pia.decoding.motion_score import measure_motion
from pia_ray.pia.scorer import Scorer, read_scorer
from pia_ray.weights import resolve_scorer

if TYPE_CHECKING:
    from PIL import Image


def judge(
    frames: np.ndarray[Any, Any],
    *,
    image: Image.Image | np.ndarray[Any, Any],
    loop: bool = False,
    scorer: Scorer | None = None,
    prompt: str = "",
) -> Judgement:
    """The judgement of frames, uint8 [T, H, W, 3], RGB, that were made of `image`, which is cropped to their size.

    A `scorer`, as `load_scorer` gives it, adds the similarities of the frames to the picture and to `prompt`.

    Raises:
        BadParameter: `frames` is not uint8 [T, H, W, 3], or is empty; `image` is not a picture.
    """
    picture = as_rgb(image)
    judgement = judge_frames(frames, image=picture, motion=0.0, loop=loop)
    tensor = torch.from_numpy(np.ascontiguousarray(frames))
    judgement = replace(judgement, motion=measure_motion(tensor))
    if scorer is None:
        return judgement
    similarities = scorer.similarities(tensor, image=picture, prompt=prompt)
    return replace(judgement, subject_similarity=similarities.subject, prompt_similarity=similarities.prompt)


def load_scorer(reference: str, *, revision: str | None = None, device: str | None = None) -> Scorer:
    """The CLIP or DINO of a folder, s3:// prefix or hub id in transformers' layout, fetched and loaded.

    `device` as torch names it; left out: the GPU if there is one.

    Raises:
        WeightsError: it cannot be found, fetched or loaded.
    """
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return read_scorer(resolve_scorer(reference, revision=revision), torch.device(chosen))
