"""Puts the many small parts of an output's ledger together: `pia-ray ledger compact OUTPUT`.

Safe to repeat, and to kill: what is new is durable before anything is dropped. Refused (exit 2) while a run is at work
on the output. Planning compacts by itself above a thousand parts, so this is for outputs that are read often.
"""

from __future__ import annotations

import sys

from pia_ray import main

if __name__ == "__main__":
    sys.exit(main(["ledger", "compact", *sys.argv[1:]]))
