"""Timings of the ways to write a block-diagonal linear layer. Run: python -m benchmarks --help"""

import os

# The profiler that counts allocations would print a line per run into the progress bar. torch reads this when it loads.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
