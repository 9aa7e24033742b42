"""Draws a catalogue to try a cluster with: pictures and a manifest, in a folder or below an s3:// prefix.

The same arguments draw the same catalogue. The demo model animates it on anything:

    make_demo_catalog.py --output s3://bucket/demo --rows 500 --broken 0.02
    animate_catalog.py s3://bucket/demo/manifest.parquet --output s3://bucket/videos --model demo
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pia_ray import PiaRayError
from pia_ray.testing import put_catalog


def main(words: Sequence[str]) -> int:
    """Runs the job; its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", required=True, metavar="URI", help="folder or s3:// prefix")
    parser.add_argument("--rows", type=int, default=100, metavar="N", help="pictures (default: %(default)s)")
    parser.add_argument("--broken", type=float, default=0.0, metavar="SHARE", help="of damaged ones, 0 to 1")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="draws other pictures (default: %(default)s)")
    args = parser.parse_args(words)
    if args.rows < 1 or not 0 <= args.broken <= 1 or args.seed < 0:
        parser.error("--rows must be at least 1, --broken 0 to 1, and --seed not negative")
    try:
        print(put_catalog(args.output, rows=args.rows, seed=args.seed, broken=args.broken))
    except (PiaRayError, OSError) as error:
        print(f"make_demo_catalog.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
