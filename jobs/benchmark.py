"""Prints the benchmark card of a node: `pia-ray bench`, with the same flags.

It measures the node it runs on, and a job runs on the head: `ray job submit --entrypoint-num-gpus 1 -- python
/app/jobs/benchmark.py` sends it to one with a GPU. The last line of its output is the card as JSON.
"""

from __future__ import annotations

import sys

from pia_ray import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
