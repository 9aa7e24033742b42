"""Tries failed rows of a catalogue again, all of them or those with some error codes, and whatever is not done yet.

Takes what animate_catalog.py takes, the same config above all; exits as that does.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from pia_ray import main as run_command

EPILOG = """\
All other arguments are those of `pia-ray animate`; so are exit codes, but 1 needs --fail-on-rows.

  ray job submit --submission-id nightly-$(date -u +%F)-retry -- \\
      python /app/jobs/retry_failed.py --codes fetch_unavailable,worker_died --config /app/jobs/configs/nightly.yaml

`pia-ray report OUTPUT` counts the codes that there are; results.parquet has them row by row.
"""


def main(words: Sequence[str]) -> int:
    """Runs the job; its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--codes", default="failed", metavar="CODE,...", help="error codes; left out: all failed rows")
    parser.add_argument("--fail-on-rows", action="store_true", help="exit with 1 if rows failed")
    parser.add_argument("--ok-at-deadline", action="store_true", help="exit with 0 at the deadline")
    args, flags = parser.parse_known_args(words)
    cluster = os.environ.get("RAY_ADDRESS")  # set in every submitted job; by hand there may be none
    address = ["--address", cluster] if cluster else []
    code = run_command(["animate", "--retry", args.codes, *address, *flags])
    well = {1: not args.fail_on_rows, 4: args.ok_at_deadline}
    return 0 if well.get(code) else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
