"""Parts for tests, shipped so that users can test their own pipelines without weights, a GPU or a network.

Tiny checkpoints in genuine diffusers layout, an animator that needs no torch, and catalogues with as many damaged
pictures as asked for. Heavy packages are loaded by the functions that need them only.
"""

from pia_ray.testing.catalogs import draw_picture, make_catalog, put_catalog
from pia_ray.testing.checkpoints import (
    make_pipeline_folder,
    make_random_pipeline,
    make_single_file_checkpoint,
    make_split_checkpoint,
    make_tokenizer,
    write_slow_tokenizer,
)
from pia_ray.testing.fake_animator import FAULTS, FakeAnimator, make_fake, make_fake_engine
from pia_ray.testing.ip_adapters import make_ip_adapter
from pia_ray.testing.loras import make_lora, make_textual_inversion
from pia_ray.testing.scorers import make_scorer

__all__ = [
    "FAULTS",
    "FakeAnimator",
    "draw_picture",
    "make_catalog",
    "make_fake",
    "make_fake_engine",
    "make_ip_adapter",
    "make_lora",
    "make_pipeline_folder",
    "make_random_pipeline",
    "make_scorer",
    "make_single_file_checkpoint",
    "make_split_checkpoint",
    "make_textual_inversion",
    "make_tokenizer",
    "put_catalog",
    "write_slow_tokenizer",
]
