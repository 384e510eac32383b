"""Computations on matrices alone, in double precision: moments of inputs, and the closest structured weights."""
