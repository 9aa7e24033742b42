"""For all tests, and the processes that they start: one thread for torch's operators.

The models of the tests are so small that threads cost more than they bring, most of all on a busy machine, where each
operator waits for the slowest of them.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
