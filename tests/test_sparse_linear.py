"""The block-sparse op: values, gradients, layouts and errors."""

import re

import pytest
import torch
from sparse_reference import PROBLEMS, Layer, SparseProblem, check, dense_weight, make, positions
from test_bounds import at_the_end_of_memory
from test_memory import SCRATCH, allocated, result_bytes
from torch.testing import assert_close

import blockdiag
from reference import DTYPES, REAL_DTYPES

ops = torch.ops.blockdiag
SMALL = SparseProblem((5,), 3, 4, (4, 3), 0.5)

every_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def grad_output_of(problem, dtype, device="cpu"):
    return torch.randn(*problem.batch, problem.out_features, dtype=dtype, device=device)


@every_dtype
@every_problem
def test_values_and_gradients(problem, dtype, device):
    layer = make(problem, dtype, device)
    check(layer, grad_output_of(problem, dtype, device))
    check(make(problem, dtype, device, bias=False), grad_output_of(problem, dtype, device))
    with torch.no_grad():
        check(layer)


@every_dtype
@pytest.mark.parametrize("size", [(16, 1), (16, 4), (4, 4), (1, 1)], ids=str)
@pytest.mark.parametrize(("stacked", "features"), [(1, 48), (3, 48), (4, 20)])
@pytest.mark.parametrize("batch", [1, 3, 40])
def test_diagonal(batch, stacked, features, size, dtype, device):
    """In one pass without gradients, and beside the op with them."""
    problem = SparseProblem((batch,), stacked * features // size[0], features // size[1], size, 0.3)
    layer = make(problem, dtype, device, diagonal=True)
    trained = check(layer, grad_output_of(problem, dtype, device))
    with torch.no_grad():
        served = check(layer)
    if dtype in (torch.float32, torch.float64):
        assert_close(served, trained)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_index_dtypes(index_dtype, device):
    check(make(SMALL, torch.float32, device, index_dtype=index_dtype), grad_output_of(SMALL, torch.float32, device))


@pytest.mark.parametrize("problem", [SMALL, SparseProblem((40,), 4, 30, (16, 1), 0.3)], ids=str)
def test_layouts(problem, device):
    """Rows of a wider tensor, transposed and expanded ones, strided parameters and indices."""
    layer = make(problem, torch.float32, device)
    (batch,), features = problem.batch, problem.in_features
    wide = torch.randn(batch, features + 3, device=device)
    inputs = [wide[:, 3:], torch.randn(features, batch, device=device).mT, torch.randn(features, device=device)]
    inputs[2] = inputs[2].expand(batch, features)
    values = torch.randn(*layer.values.shape[::-1], device=device).permute(2, 1, 0)
    bias = torch.randn(2 * problem.out_features, device=device)[::2]
    every_second = [torch.stack([index, index], -1).flatten()[::2] for index in layer[2:4]]
    for input in inputs:
        strided = Layer(input.requires_grad_(), values.requires_grad_(), *every_second, bias.requires_grad_(), None)
        for grad_output in (torch.ones(1, 1, device=device).expand(batch, problem.out_features), None):
            check(strided, grad_output)


@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
@pytest.mark.parametrize("problem", [p for p in PROBLEMS if 0 not in (*p.batch, p.rows, p.cols)], ids=str)
def test_nothing_is_read_beyond_the_operands(problem, dtype):
    layer = make(problem, dtype, diagonal=problem.in_features == problem.out_features)
    ended = [t if t is None or t.numel() == 0 else at_the_end_of_memory(t.detach()) for t in layer]
    ended = [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in ended]
    check(Layer(*ended), at_the_end_of_memory(grad_output_of(problem, dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(16, 1), (16, 4), (8, 8), (1, 1)], ids=str)
def test_the_number_of_threads_changes_nothing(size, dtype):
    threads = torch.get_num_threads()
    for batch in (1, 16, 40, 300):
        layer = make(SparseProblem((batch,), 320 // size[0], 320 // size[1], size, 0.3), dtype)
        grad_output = torch.randn(batch, 320, dtype=dtype)
        results = []
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                output = ops.sparse_linear(*layer)
                results.append((output, *torch.autograd.grad(output, (layer.input, layer.values), grad_output)))
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_of_the_dense_weight_is_made(dtype):
    """4096 x 4096 elements, of which 2 % are kept."""
    problem = SparseProblem((16,), 256, 1024, (16, 4), 0.02)
    layer = make(problem, dtype)
    dense_bytes = problem.in_features * problem.out_features * dtype.itemsize

    def call():
        output = ops.sparse_linear(*layer)
        return output, *torch.autograd.grad(output.sum(), [layer.input, layer.values, layer.bias])

    peak, results = allocated(call, "cpu")
    # Half types: their values, or their gradients, in float32.
    assert peak <= result_bytes(*results) + 8 * layer.values.numel() + 2 * SCRATCH < dense_bytes / 2


def function(layer):
    def call(input, values, bias, diagonal):
        return ops.sparse_linear(input, values, layer.crow_indices, layer.col_indices, bias, diagonal)

    return call


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("diagonal", [False, True])
def test_gradients_of_any_order(diagonal, dtype, device):
    problem = SparseProblem((2, 3), 3, 6, (4, 2), 0.5)
    layer = make(problem, dtype, device, diagonal=diagonal)
    inputs = (layer.input, layer.values, layer.bias, layer.diagonal)
    assert torch.autograd.gradcheck(function(layer), inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function(layer), inputs, check_fwd_over_rev=True)


@every_dtype
def test_opcheck(dtype, device):
    layer = make(SMALL, dtype, device)
    grad_output = grad_output_of(SMALL, dtype, device).requires_grad_()
    torch.library.opcheck(ops.sparse_linear.default, layer)
    square = make(SparseProblem((2,), 3, 6, (4, 2), 0.5), dtype, device, diagonal=True)
    torch.library.opcheck(ops.sparse_linear.default, square)
    given = (grad_output, layer.values, layer.crow_indices, layer.col_indices, list(layer.input.shape))
    torch.library.opcheck(ops.sparse_linear_input_grad.default, given)
    given = (grad_output, layer.input, layer.crow_indices, layer.col_indices, list(layer.values.shape))
    torch.library.opcheck(ops.sparse_linear_values_grad.default, given)


@pytest.mark.parametrize("mapped", ["input", "values", "indices", "bias", "all"])
def test_vmap(mapped, device):
    """Values, positions and all gradients, as of calls one by one."""
    layers = [make(SMALL, torch.float64, device) for _ in range(3)]
    layers = [layer._replace(values=torch.randn_like(layers[0].values)) for layer in layers]
    indices = [layers[0][2:4]] * 3
    if mapped in ("indices", "all"):
        orders = [torch.randperm(4)[:2].sort().values for _ in range(9)]
        cols = torch.cat(orders).view(3, 6).to(device, torch.int32)
        indices = [(torch.arange(0, 7, 2, dtype=torch.int32, device=device), each) for each in cols]
        layers = [layer._replace(values=torch.randn(6, 4, 3, dtype=torch.float64, device=device)) for layer in layers]
    fields = {"input": (0,), "values": (1,), "indices": (2, 3), "bias": (4,), "all": (0, 1, 2, 3, 4)}[mapped]
    arguments = [
        Layer(layer.input, layer.values, *index, layer.bias, None) for layer, index in zip(layers, indices, strict=True)
    ]
    stacked = [torch.stack([a[i] for a in arguments]) if i in fields else arguments[0][i] for i in range(5)]
    dims = tuple(0 if i in fields else None for i in range(5))

    def loss(*arguments):
        return ops.sparse_linear(*arguments).sin().sum()

    def all_of(*arguments):
        return ops.sparse_linear(*arguments), torch.func.grad(loss, argnums=(0, 1, 4))(*arguments)

    actual = torch.vmap(all_of, dims)(*stacked)
    for index in range(3):
        own = [tensor[index] if i in fields else tensor for i, tensor in enumerate(stacked)]
        output, grads = all_of(*own)
        assert_close((actual[0][index], tuple(grad[index] for grad in actual[1])), (output, grads))


def test_vmap_of_what_does_not_fit(device):
    layer = make(SMALL, torch.float32, device)
    message = "expected input to have at least 1 dimension, but got a scalar"
    rejects(message, torch.tensor(1.0, device=device), *layer[1:4])
    with pytest.raises(RuntimeError, match=message):
        torch.vmap(lambda x: ops.sparse_linear(x, *layer[1:4]))(torch.randn(12, device=device))


@pytest.mark.parametrize("mapped", [0, 1, 2])
def test_vmap_over_nothing(mapped, device):
    layer = make(SMALL, torch.float32, device)
    arguments = [t.detach().expand(0, *t.shape) if i == mapped else t for i, t in enumerate(layer[:4])]
    output = torch.vmap(ops.sparse_linear, tuple(0 if i == mapped else None for i in range(4)))(*arguments)
    assert output.shape == (0, 5, 12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch", [1, 40])
def test_the_diagonal_is_added_before_the_output_is_rounded(batch, dtype, device):
    """With gradients as without."""
    layer = make(SparseProblem((batch,), 4, 64, (16, 1), 0.9), dtype, device, diagonal=True)
    output = ops.sparse_linear(*layer)
    if device == "cpu":
        with torch.no_grad():
            assert torch.equal(ops.sparse_linear(*layer), output)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, device):
    layer = make(SMALL, torch.float32, device)
    with torch.autocast(device, dtype):
        output = ops.sparse_linear(*layer)
    assert output.dtype == dtype
    halves = [t if t is None or t.dtype == torch.int32 else t.to(dtype) for t in layer]
    assert_close(output, ops.sparse_linear(*halves))
    grads = torch.autograd.grad(output.float().sum(), [layer.input, layer.values, layer.bias])
    assert all(grad.dtype == torch.float32 for grad in grads)


def test_flops():
    layer = make(SMALL, torch.float32)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        ops.sparse_linear(*layer).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 5 * layer.values.numel()
    layer = make(SparseProblem((5,), 3, 4, (4, 3), 0.5), torch.float32, diagonal=True)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter, torch.no_grad():
        ops.sparse_linear(*layer)
    assert counter.get_total_flops() == 2 * 5 * (layer.values.numel() + 12)


def test_the_function_is_the_op(device):
    layer = make(SMALL, torch.float32, device)
    assert_close(blockdiag.sparse_linear(*layer), ops.sparse_linear(*layer))
    assert_close(dense_weight(*layer[1:4], SMALL.in_features).shape, (12, 12))


def rejects(message, *arguments, op=ops.sparse_linear):
    with pytest.raises(RuntimeError, match=re.escape(message)):
        op(*arguments)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_shapes_and_dtypes(device):
    layer = Layer(*(t if t is None else t.detach().to(device) for t in make(SMALL, torch.float32)))
    input, values, crow, col = layer[:4]
    rejects("blockdiag::sparse_linear: expected values to have 3 dimensions", input, values.flatten(), crow, col)
    rejects("expected input to have at least 1 dimension, but got a scalar", input.sum(), values, crow, col)
    rejects("expected blocks to be of at least 1 x 1, but got 0 x 3", input, values[:, :0], crow, col)
    rejects("expected crow_indices to be int32 or int64, but got int16", input, values, crow.short(), col)
    rejects("expected col_indices to have crow_indices' dtype int32, but got int64", input, values, crow, col.long())
    rejects("expected col_indices to have 1 dimension", input, values, crow, col[None])
    rejects("expected crow_indices to have 1 element more than there are rows", input, values, crow[:0], col)
    rejects(f"an element for each of values' {len(col)} blocks, but got", input, values, crow, col[1:])
    rejects("expected input's last dimension to be a multiple of in_block = 3, but got 11", input[:, 1:], *layer[1:4])
    rejects("expected bias to have shape (12,), but got [11]", *layer[:4], input[0, 1:])
    rejects("expected diagonal to have shape (12,), but got [11]", *layer[:4], None, input[0, 1:])
    rejects(
        "a multiple of the input features beside a diagonal, but got 12 and 9",
        input[:, 3:],
        *layer[1:4],
        None,
        input[0],
    )
    rejects("expected values to have input's dtype float32, but got float64", input, values.double(), crow, col)
    rejects("expected input to be float16, bfloat16, float32", input.int(), values.int(), crow, col)
    grad = input[:, 1:]
    message = "expected grad_output to have the output's shape [5, 12], but got [5, 11]"
    rejects(message, grad, values, crow, col, [5, 12], op=ops.sparse_linear_input_grad)
    rejects(message, grad, input, crow, col, list(values.shape), op=ops.sparse_linear_values_grad)


def test_other_devices():
    layer = make(SMALL, torch.float32)
    rejects("expected values to be on input's device meta, but got cpu", layer.input.detach().to("meta"), *layer[1:4])
    rejects("to be on the device cpu", *layer[:2], layer.crow_indices.to("meta"), layer.col_indices)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    ("crow", "col", "message"),
    [
        ([0, 2, 4], [0, 0, 1, 2], "col_indices to ascend in each row of blocks, but got 0 before 0 in row 0"),
        ([0, 2, 4], [1, 0, 1, 2], "but got 1 before 0 in row 0"),
        ([0, 2, 4], [0, 1, 2, 4], "col_indices to be from 0 to 3, but got 4"),
        ([0, 2, 4], [-1, 1, 2, 3], "but got -1"),
        ([0, 1, 3], [0, 1, 2, 3], "to begin with 0 and to end with the number of blocks, 4, but got 0 and 3"),
        ([1, 2, 4], [0, 1, 2, 3], "but got 1 and 4"),
        ([0, 5, 4], [0, 1, 2, 3], "crow_indices to ascend, but got 0 before 5"),
        ([0, -3, 4], [0, 1, 2, 3], "crow_indices to ascend, but got 0 before -3"),
    ],
)
def test_indices(crow, col, message, dtype):
    crow, col = (torch.tensor(index, dtype=dtype) for index in (crow, col))
    values, input = torch.randn(4, 16, 1), torch.randn(3, 4)
    rejects(message, input, values, crow, col)
    rejects(message, torch.randn(3, 32), values, crow, col, [3, 4], op=ops.sparse_linear_input_grad)
    rejects(message, torch.randn(3, 32), input, crow, col, [4, 16, 1], op=ops.sparse_linear_values_grad)
    rejects(message, input[:0], values, crow, col)


def test_indices_beyond_int32():
    crow, col = torch.tensor([0, 1]), torch.tensor([2**32])
    rejects("col_indices to be from 0 to 3, but got 4294967296", torch.randn(3, 4), torch.randn(1, 16, 1), crow, col)


def test_positions_are_those_of_torch():
    problem = SparseProblem((4,), 3, 5, (16, 4), 0.5)
    crow, col = positions(problem)
    values = torch.randn(len(col), 16, 4)
    weight = torch.sparse_bsr_tensor(crow.long(), col.long(), values, (48, 20))
    x = torch.randn(4, 20)
    assert_close(ops.sparse_linear(x, values, crow, col), x @ weight.to_dense().mT)
