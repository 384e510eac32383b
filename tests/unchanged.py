"""State of a model that the conversion of a copy, a dry run or a failure must not change."""

import contextlib
import pickle
import random

import numpy as np
import torch
from torch import nn
from torch.nn.modules import module as nn_module


def _value(value):
    """Tensors by type and values, containers by content, everything else by identity."""
    if isinstance(value, torch.Tensor):
        attributes = {name: _value(inside) for name, inside in vars(value).items()}
        grad = None if not value.is_leaf or value.grad is None else _value(value.grad)
        about = (id(value), value.data_ptr(), value.requires_grad, value.stride(), str(value.dtype))
        return (*about, value.detach().flatten().tolist(), attributes, grad)
    if isinstance(value, dict):
        return {(key if isinstance(key, str | int) else id(key)): _value(inside) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        return [_value(inside) for inside in value]
    return value if value is None or isinstance(value, bool | int | float | str) else id(value)


def snapshot(*things):
    """The state of modules and optimizers, and of the process."""
    held = []
    for thing in things:
        for part in thing.modules() if isinstance(thing, nn.Module) else [thing]:
            held.append((id(part), type(part), _value(vars(part))))
        with contextlib.suppress(AttributeError, TypeError, pickle.PicklingError):
            held.append(len(pickle.dumps(thing)))
    randomness = (torch.get_rng_state().tolist(), str(np.random.get_state()), str(random.getstate()))
    if torch.cuda.is_initialized():
        randomness += tuple(state.tolist() for state in torch.cuda.get_rng_state_all())
    process = (nn.Module.__call__, nn.Module.__getattr__, _value(vars(nn_module)), torch.is_grad_enabled())
    return held, randomness, process, _stance()


def _stance():
    from torch._dynamo import eval_frame

    return str(eval_frame._stance)


@contextlib.contextmanager
def unchanged(*things):
    """Asserts that modules, optimizers, and the process's random state, hooks and modes do not change."""
    before = snapshot(*things)
    yield
    after = snapshot(*things)
    for ours, theirs in zip(after, before, strict=True):
        assert ours == theirs
