"""Pulls and verifies a model's weights once, before workers need them: `pia-ray models pull`.

    warm_weights.py realistic-vision                                  into HF_HOME, which may be a disk that nodes share
    warm_weights.py realistic-vision --to s3://bucket/models/rv       and a copy there, for nodes without the hub

Safe to repeat: what is there and whole is left alone. Exits with 0, or with 2 and says why. With --to the copy's
model.yaml holds the settings for `model` in a config file. A copy counts as another model in work keys: choose first.
"""

from __future__ import annotations

import sys

from pia_ray import main

if __name__ == "__main__":
    sys.exit(main(["models", "pull", *sys.argv[1:]]))
