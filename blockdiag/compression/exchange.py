"""Replaces modules by others that compute the same, in other layers."""

from collections.abc import Callable, Iterable

from torch import nn
from torch.optim import Optimizer

from blockdiag._surgery.duplicate import duplicate
from blockdiag._surgery.optimizers import as_optimizers
from blockdiag._surgery.replacement import Replacement, commit, unwrap
from blockdiag._surgery.sharing import check_sharing, names_by_module
from blockdiag.compression.checks import check_parameters, check_parts


def exchange(
    model: nn.Module,
    matches: Callable[[nn.Module], bool],
    build: Callable[[list[str], nn.Module], Replacement],
    *,
    missing: str,
    optimizers: Optimizer | Iterable[Optimizer],
    inplace: bool,
) -> nn.Module:
    """Replaces the modules that match by what `build` makes of their names and themselves.

    Raises:
        ValueError: there are none, or it is the model itself, with the message `missing`; or one has parameters that
            are not plain, or shared with others.
    """
    bare = unwrap(model)
    bound = as_optimizers(optimizers, bare, inplace=inplace)
    if not inplace:
        bare = duplicate(bare)
    names = {module: where for module, where in names_by_module(bare).items() if matches(module)}
    if not names or bare in names:
        raise ValueError(missing)
    for module, where in names.items():
        check_parts(where[0], module)
        check_parameters(where[0], module)
    check_sharing(bare, {module: where[0] for module, where in names.items()})
    replacements = [build(where, module) for module, where in names.items()]
    for replacement in replacements:
        lost = [key for key, p in replacement.old.named_parameters() if p not in replacement.successors]
        if lost:
            raise ValueError(
                f"'{replacement.names[0]}' has parameters {lost} of pruning or the like: remove that first"
            )
    return commit(model, bare, replacements, [], bound)
