"""Ensembles: several models stacked into one."""

from blockdiag.ensemble.stack import StackedModel, stack_models

__all__ = ["StackedModel", "stack_models"]
