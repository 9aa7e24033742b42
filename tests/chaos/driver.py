"""The program of a driver: one run on Ray with the fake animator, which writes the log of generations itself.

`python -m tests.chaos.driver CONFIG_JSON LOG MARKS`. The last line of standard output is a JSON object.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
from functools import partial
from pathlib import Path

from pia_ray.catalog.cluster_run import run_catalog
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.model import build
from pia_ray.errors import JobError
from pia_ray.testing import make_fake


def main(values: str, log: str, marks: str) -> int:
    """The exit code of the run, as the command line gives it."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    settings = json.loads(values)
    fake = partial(make_fake, seconds_per_step=settings.pop("seconds_per_step"), log=Path(log), marks=Path(marks))
    try:
        summary = run_catalog(build(CatalogConfig, settings), make_animator=fake)
    except KeyboardInterrupt:
        sys.stdout.write(json.dumps({"exit_code": 130, "error": "interrupted"}))
        return 130
    except JobError as error:
        sys.stdout.write(json.dumps({"exit_code": error.exit_code, "error": error.code, "message": error.message}))
        return error.exit_code
    sys.stdout.write(json.dumps({"exit_code": summary.exit_code, "pending": summary.progress.num_pending}))
    return summary.exit_code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
