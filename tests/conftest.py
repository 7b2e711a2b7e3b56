"""One thread for everything: tests work on a handful of atoms, where a second one only waits for the first."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the processes that tests start
