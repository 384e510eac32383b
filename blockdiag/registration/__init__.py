"""Registers the ops with other parts of PyTorch."""
