"""Timings of the ways to write a block-diagonal linear layer. Run: python -m benchmarks --help"""

import os

# The profiler that counts allocations would write a line for each run through the progress bar; read when torch loads.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
