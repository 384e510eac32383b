"""Export to ONNX as standard operators, so that runtimes need no library of ours."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch

from blockdiag.registration.layout import feature_dims

__all__ = ["translation_table"]

_TORCHLIB = "torch.onnx._internal.exporter._torchlib"  # torch.onnx.export's table of translations
_TRANSLATIONS = f"{_TORCHLIB}.ops"  # registers translations when it is first imported


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The translations of the ops for :func:`torch.onnx.export`.

    A block-diagonal layer becomes a ``MatMul`` of the blocks between two transpositions, and a block-sparse one a
    ``MatMul`` with the dense weight, which a runtime makes once, when it loads the model. The batch may be dynamic. The
    table is optional: with ``dynamo=True``, the default, importing blockdiag is enough.

    Raises:
        ModuleNotFoundError: onnxscript, which :func:`torch.onnx.export` also needs, is not installed.

    Example::

        >>> import torch, blockdiag
        >>> program = torch.onnx.export(
        ...     blockdiag.BlockDiagLinear(8, 4, num_blocks=2),
        ...     (torch.randn(3, 8),),
        ...     "model.onnx",
        ...     dynamo=True,
        ...     dynamic_shapes=({0: "batch"},),
        ...     custom_translation_table=blockdiag.registration.onnx.translation_table(),
        ...     verbose=False,
        ... )
    """
    try:
        op: Any = importlib.import_module("onnxscript").opset18
    except ModuleNotFoundError as error:
        message = "export to ONNX needs onnxscript: pip install onnx onnxscript"
        raise ModuleNotFoundError(message, name=error.name) from error

    def linear(input: Any, weight: Any, bias: Any = None, *, out_dtype: Any = None) -> Any:
        num_blocks, out_block, in_block = weight.shape
        stacked = feature_dims(input.shape, weight.shape) == 2
        features = [num_blocks, out_block] if stacked else [num_blocks * out_block]
        leading = op.Shape(input, start=0, end=len(input.shape) - (2 if stacked else 1))
        types = importlib.import_module("onnx").TensorProto
        if out_dtype in (types.FLOAT, types.FLOAT16, types.BFLOAT16):  # mixed: in float32, which all runtimes have
            float32 = types.FLOAT
            input, weight = op.Cast(input, to=float32), op.Cast(weight, to=float32)
            bias = None if bias is None else op.Cast(bias, to=float32)
        rows = op.Reshape(input, op.Constant(value_ints=[-1, num_blocks, in_block]))
        # Workaround: without this no-op Reshape, onnxruntime fuses the transposition into the product, and divides by
        # zero if the batch is empty.
        by_block = op.Reshape(op.Transpose(rows, perm=[1, 0, 2]), op.Constant(value_ints=[num_blocks, -1, in_block]))
        product = op.MatMul(by_block, op.Transpose(weight, perm=[0, 2, 1]))
        output = op.Transpose(product, perm=[1, 0, 2])
        if bias is not None:
            output = op.Add(output, op.Reshape(bias, op.Constant(value_ints=[num_blocks, out_block])))
        output = op.Reshape(output, op.Concat(leading, op.Constant(value_ints=features), axis=0), allowzero=1)
        return output if out_dtype is None else op.Cast(output, to=out_dtype)

    def dense_weight(values: Any, crow_indices: Any, col_indices: Any, cols: int) -> Any:
        (blocks, *block), rows = values.shape, crow_indices.shape[0] - 1
        weight = op.Expand(op.CastLike(0.0, values), op.Constant(value_ints=[rows, cols, *block]))
        if blocks > 0:
            # Each block's row: the number of rows, after the first, that begin at it or before.
            begins = op.Slice(crow_indices, op.Constant(value_ints=[1]), op.Constant(value_ints=[rows]))
            marks = op.Expand(op.Constant(value_int=0), op.Constant(value_ints=[blocks + 1]))
            ones = op.Expand(op.Constant(value_int=1), op.Constant(value_ints=[rows - 1]))
            int64 = importlib.import_module("onnx").TensorProto.INT64
            marks = op.ScatterElements(marks, op.Cast(begins, to=int64), ones, axis=0, reduction="add")
            row_indices = op.Slice(
                op.CumSum(marks, op.Constant(value_int=0)),
                op.Constant(value_ints=[0]),
                op.Constant(value_ints=[blocks]),
            )
            axis = op.Constant(value_ints=[1])
            positions = [op.Unsqueeze(index, axis) for index in (row_indices, op.Cast(col_indices, to=int64))]
            weight = op.ScatterND(weight, op.Concat(*positions, axis=1), values)
        shape = op.Constant(value_ints=[rows * block[0], cols * block[1]])
        return op.Reshape(op.Transpose(weight, perm=[0, 2, 1, 3]), shape, allowzero=1)

    def sparse_linear(
        input: Any, values: Any, crow_indices: Any, col_indices: Any, bias: Any = None, diagonal: Any = None
    ) -> Any:
        weight = dense_weight(values, crow_indices, col_indices, input.shape[-1] // values.shape[2])
        output = op.MatMul(input, op.Transpose(weight, perm=[1, 0]))
        output = output if bias is None else op.Add(output, bias)
        if diagonal is None:
            return output
        copies = diagonal.shape[0] // max(input.shape[-1], 1)  # of the input, one for each square matrix
        inputs = op.Concat(*[input] * copies, axis=-1) if copies > 1 else input
        return op.Add(output, op.Mul(inputs, diagonal))

    ops = torch.ops.blockdiag
    return {ops.linear.default: linear, ops.sparse_linear.default: sparse_linear}


def _register() -> None:
    try:
        torchlib: Any = importlib.import_module(f"{_TORCHLIB}._torchlib_registry")
        known = {entry.fx_target for entry in torchlib._registry}
        for op, translation in translation_table().items():
            if op not in known:
                torchlib.onnx_impl(op, no_compile=True)(translation)
    except Exception as error:  # another version of torch or onnxscript; affects only exports of our layers
        warnings.warn(
            "blockdiag: torch.onnx.export needs "
            f"custom_translation_table=blockdiag.registration.onnx.translation_table(): {error}",
            stacklevel=2,
        )


class _OnImport(importlib.abc.MetaPathFinder):
    """Registers the translation when the exporter is imported: that takes seconds, and most programs never do it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _TRANSLATIONS:
            return None
        spec: Any = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: Any) -> None:
                execute(module)
                sys.meta_path.remove(self)
                _register()

            spec.loader.exec_module = execute_and_register
        return spec


def register_translation() -> None:
    """Registers the translation with :func:`torch.onnx.export`. Idempotent."""
    if _TRANSLATIONS in sys.modules:
        _register()
    elif not any(isinstance(finder, _OnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OnImport())
