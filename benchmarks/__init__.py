"""Timings of the ways to write a block-diagonal linear layer. Run: python -m benchmarks --help"""
