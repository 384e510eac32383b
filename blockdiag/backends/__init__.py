"""Selection of the library that computes the ops on each kind of device."""

from blockdiag.backends import cpu, cuda
from blockdiag.backends.tuning import tune

__all__ = ["cpu", "cuda", "tune"]
