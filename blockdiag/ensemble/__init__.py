"""Several models become one."""

from blockdiag.ensemble.stack import StackedModel, stack_linears, stack_models

__all__ = ["StackedModel", "stack_linears", "stack_models"]
