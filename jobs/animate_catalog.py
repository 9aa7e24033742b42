"""Animates a catalogue on the cluster that this job was submitted to: a config file, and any flag of `pia-ray animate`.

Exits with 0 also where rows failed, unless --fail-on-rows, because RayJob repeats a job that exits with anything else.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from pia_ray import main as run_command

EPILOG = """\
All other arguments are those of `pia-ray animate`; flags go before what the config file says.

exit codes
  0    finished; with --fail-on-rows: and every row has succeeded, now or before
  1    finished with failed rows (--fail-on-rows only)
  2    could not run: bad config, manifest or weights, or another run is at work on the output
  4    deadline (0 with --ok-at-deadline), 130 stopped; the next run goes on from there

Submitting again is always safe: a run animates only what no earlier run has finished, and two at once are kept apart by
a lease. A deterministic id keeps a scheduler that tries twice from submitting twice; Ray refuses an id it has had:

  ray job submit --submission-id nightly-$(date -u +%F) -- \\
      python /app/jobs/animate_catalog.py --config /app/jobs/configs/nightly.yaml

After a failure add -2, -3, ... to the id. With --no-wait the command does not wait for the job's end. Rows that failed
are tried again where they are asked for, all of them or by the codes that `pia-ray report OUTPUT` counts:

  ray job submit --submission-id nightly-$(date -u +%F)-retry -- \\
      python /app/jobs/animate_catalog.py --retry fetch_unavailable,worker_died --config /app/jobs/configs/nightly.yaml
"""


def main(words: Sequence[str]) -> int:
    """Runs the job; its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--fail-on-rows", action="store_true", help="exit with 1 if rows failed")
    parser.add_argument(
        "--ok-at-deadline", action="store_true", help="exit with 0 at the deadline, so that nothing goes on at once"
    )
    args, flags = parser.parse_known_args(words)
    cluster = os.environ.get("RAY_ADDRESS")  # set in every submitted job; by hand there may be none
    code = run_command(["animate", *(["--address", cluster] if cluster else []), *flags])
    well = {1: not args.fail_on_rows, 4: args.ok_at_deadline}
    return 0 if well.get(code) else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
