"""`python -m pia_ray.cli`: the command line where the script `pia-ray` is not on the path."""

import sys

from pia_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
