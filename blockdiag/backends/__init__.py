"""Which library computes the ops on each kind of device, and how that is chosen."""

from blockdiag.backends import cpu, cuda
from blockdiag.backends.tuning import tune

__all__ = ["cpu", "cuda", "tune"]
