"""torch.func and forward-mode AD: transforms of the layer equal those of a dense layer with explicit zeros."""

import itertools

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import blockdiag
from blockdiag import BlockDiagLinear

NUM_BLOCKS, OUT_BLOCK, IN_BLOCK, BATCH = 2, 5, 3, 4


def dense(x, weight, bias=None):
    stacked = x.shape[-1] != weight.shape[0] * weight.shape[2]
    flat = x.flatten(-2) if stacked else x
    output = torch.nn.functional.linear(flat, torch.block_diag(*weight), None if bias is None else bias.flatten())
    return output.unflatten(-1, weight.shape[:2]) if stacked else output


@pytest.fixture(params=[False, True], ids=["concatenated", "stacked"])
def arguments(request, device):
    features, outputs = (NUM_BLOCKS * IN_BLOCK,), (NUM_BLOCKS * OUT_BLOCK,)
    if request.param:
        features, outputs = (NUM_BLOCKS, IN_BLOCK), (NUM_BLOCKS, OUT_BLOCK)
    shapes = ((BATCH, *features), (NUM_BLOCKS, OUT_BLOCK, IN_BLOCK), outputs)
    return tuple(torch.randn(shape, dtype=torch.float64, device=device) for shape in shapes)


def loss(layer):
    return lambda *arguments: layer(*arguments).sin().sum()


def directions(arguments):
    return tuple(argument.cos() for argument in arguments)


TRANSFORMS = {
    "grad": lambda layer, arguments: grad(loss(layer), (0, 1, 2))(*arguments),
    "vjp": lambda layer, arguments: vjp(layer, *arguments)[1](layer(*arguments)),
    "jvp": lambda layer, arguments: jvp(layer, arguments, directions(arguments)),
    "jvp of the input": lambda layer, arguments: jvp(lambda x: layer(x, *arguments[1:]), arguments[:1], arguments[:1]),
    "jvp of the bias": lambda layer, arguments: jvp(lambda b: layer(*arguments[:2], b), arguments[2:], arguments[2:]),
    "jacrev": lambda layer, arguments: jacrev(layer, (0, 1, 2))(*arguments),
    "jacfwd": lambda layer, arguments: jacfwd(layer, (0, 1, 2))(*arguments),
    "hessian": lambda layer, arguments: hessian(loss(layer), (0, 1, 2))(*arguments),
    "grad of grad": lambda layer, arguments: grad(lambda w: loss(grad(loss(layer)))(arguments[0], w, arguments[2]))(
        arguments[1]
    ),
    "jvp of grad": lambda layer, arguments: jvp(grad(loss(layer), (0, 1, 2)), arguments, directions(arguments)),
    "grad of jvp": lambda layer, arguments: grad(
        lambda *primals: jvp(loss(layer), primals, directions(arguments))[1], (0, 1)
    )(*arguments),
    "jacfwd of jacrev": lambda layer, arguments: jacfwd(jacrev(layer, 1), 1)(*arguments),
    "jacrev of jacfwd": lambda layer, arguments: jacrev(jacfwd(layer, 0), 1)(*arguments),
    "vmap of grad": lambda layer, arguments: vmap(grad(loss(layer), (1, 2)), (0, None, None))(*arguments),
    "grad of vmap": lambda layer, arguments: grad(loss(vmap(layer, (0, None, None))), (0, 1, 2))(*arguments),
}


@pytest.mark.filterwarnings("error:There is a performance drop")  # vmap's fallback, a loop
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(transform, arguments):
    function = TRANSFORMS[transform]
    torch.testing.assert_close(function(blockdiag.linear, arguments), function(dense, arguments))


@pytest.mark.filterwarnings("error:There is a performance drop")
@pytest.mark.parametrize("bias_dim", [None, 0, "none"])
@pytest.mark.parametrize("weight_dim", [None, 0, 2])
@pytest.mark.parametrize("input_dim", [None, 0, 1])
def test_vmap(input_dim, weight_dim, bias_dim, arguments):
    """Over any arguments, at any dimensions, with gradients through it."""
    in_dims = [input_dim, weight_dim, bias_dim]
    if bias_dim == "none":
        arguments, in_dims = arguments[:2], in_dims[:2]
    if all(dim is None for dim in in_dims):
        pytest.skip("vmap refuses to map over nothing")
    batched = [
        argument if dim is None else torch.stack([argument, -argument, argument + 1], dim)
        for argument, dim in zip(arguments, in_dims, strict=True)
    ]
    wanted = tuple(range(len(batched)))

    def results(layer):
        mapped = vmap(layer, tuple(in_dims))
        sample_grads = vmap(grad(loss(layer), wanted), tuple(in_dims))(*batched)
        return mapped(*batched), grad(loss(mapped), wanted)(*batched), sample_grads

    torch.testing.assert_close(results(blockdiag.linear), results(dense))


def contiguous(result):
    """Asserts contiguity, which the ops also promise inside a mapped function."""
    for tensor in result if isinstance(result, tuple) else (result,):
        assert tensor.is_contiguous()
        assert tensor.view(-1).shape == (tensor.numel(),)
    return result


def batched_at(tensor, dim):
    """Three copies, stacked at that dimension and, for different strides, at the end."""
    tensors = torch.stack([tensor, -tensor, tensor + 1], -1)
    return tensor if dim is None else tensors.movedim(-1, dim)


@pytest.mark.filterwarnings("error:There is a performance drop")
@pytest.mark.parametrize(
    "in_dims", [dims for dims in itertools.product((None, 0, 1, -1), repeat=2) if any(dims) or 0 in dims]
)
@pytest.mark.parametrize("bias_dim", [None, 0, -1])
def test_results_of_vmap_are_contiguous_inside(in_dims, bias_dim, arguments):
    """pytorch/functorch#999: all ops, each argument batched at any of its dimensions or not at all."""
    ops = torch.ops.blockdiag
    x, weight, bias = arguments
    grad_output = blockdiag.linear(x, weight)
    x_sizes, weight_sizes = x.shape, weight.shape
    calls = {
        "linear": (lambda *args: ops.linear(*args), (x, weight, bias), (*in_dims, bias_dim)),
        "no bias": (lambda *args: ops.linear(*args), (x, weight), in_dims),
        "input_grad": (lambda *args: ops.linear_input_grad(*args, x_sizes), (grad_output, weight), in_dims),
        "weight_grad": (lambda *args: ops.linear_weight_grad(*args, weight_sizes), (grad_output, x), in_dims),
        "weight_bias_grad": (lambda *args: ops.linear_weight_bias_grad(*args, weight_sizes), (grad_output, x), in_dims),
    }
    for op, args, dims in calls.values():
        batched = [batched_at(arg, dim) for arg, dim in zip(args, dims, strict=True)]
        actual = contiguous(vmap(lambda *args, op=op: contiguous(op(*args)), dims)(*batched))
        loop = [op(*[a if d is None else a.select(d, i) for a, d in zip(batched, dims, strict=True)]) for i in range(3)]
        expected = torch.utils._pytree.tree_map(lambda *results: torch.stack(results), *loop)
        torch.testing.assert_close(actual, expected)


@pytest.mark.filterwarnings("error:There is a performance drop")
@pytest.mark.parametrize("outer", [(0, None, None), (None, 0, None), (None, None, 0), (1, 1, 0)], ids=str)
@pytest.mark.parametrize("inner", [(0, None, None), (None, 0, None), (None, None, 0), (1, 2, 0)], ids=str)
def test_results_of_nested_vmap_and_of_gradients_in_it_are_contiguous_inside(outer, inner, arguments):
    batched = [batched_at(batched_at(a, i), o) for a, i, o in zip(arguments, inner, outer, strict=True)]

    def results(layer, check):
        def function(*args):
            grads = grad(lambda *args: check(layer(*args)).sin().sum(), (0, 1, 2))(*args)
            return check(layer(*args)), *check(grads)

        return vmap(vmap(function, inner), outer)(*batched)

    torch.testing.assert_close(results(blockdiag.linear, contiguous), results(dense, lambda result: result))


@pytest.mark.filterwarnings("error:There is a performance drop")
@pytest.mark.parametrize(
    ("shapes", "dtype", "message"),
    [
        ([(4, 5), None, None], None, "expected input's last dimension to be num_blocks .* = 4 .* 5 = 20, but got 5"),
        ([(2, 10), (2, 4, 3, 5), None], None, "expected input's last dimension to be .* = 20, but got 10"),
        ([(2,), (2, 4, 3, 5), None], None, "expected input to have at least 1 dimension"),
        ([None, (2, 3, 5), None], None, "expected weight to have 3 dimensions"),
        ([None, None, (2, 3, 4)], None, r"expected bias to have shape .*, but got shape \[3, 4\]"),
        ([None, (2, 4, 3, 5), (2, 3, 4)], None, r"expected bias to have shape .*, but got shape \[3, 4\]"),
        ([None, None, (2, 12)], torch.complex64, "expected bias to have input's dtype float32, but got complex64"),
        ([None, None, (2, 12)], torch.float64, "expected bias to have input's dtype float32, but got float64"),
    ],
)  # fmt: skip
def test_vmap_refuses_what_the_op_refuses(shapes, dtype, message):
    """Also where the whole batch happens to fit."""
    fitting = [(6, 20), (4, 3, 5), (12,)]
    x, weight, bias = (torch.randn(own or shape) for own, shape in zip(shapes, fitting, strict=True))
    with pytest.raises(RuntimeError, match=f"blockdiag::linear: {message}"):
        vmap(blockdiag.linear, tuple(0 if own else None for own in shapes))(x, weight, bias.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_vmap_over_the_bias_rounds_once(dtype, device):
    """A product that is rounded by itself loses what a bias of the opposite sign leaves over."""
    x, weight = torch.ones(4, 6, dtype=dtype, device=device), torch.ones(2, 5, 3, dtype=dtype, device=device)
    weight[..., 0] = 2.0**-12  # neither half type holds 2 + 2^-12
    biases = torch.full((3, 10), -2.0, dtype=dtype, device=device)
    actual = vmap(blockdiag.linear, (None, None, 0))(x, weight, biases)
    assert actual.dtype == dtype
    exact = torch.einsum("bgk,gnk->bgn", x.double().view(4, 2, 3), weight.double()).flatten(1) - 2
    assert torch.equal(actual, exact.to(dtype).expand(3, 4, 10))


def test_vmap_over_the_bias_refuses_mixed_dtypes(device):
    x, weight = torch.ones(4, 6, device=device), torch.ones(2, 5, 3, dtype=torch.bfloat16, device=device)
    biases = torch.ones(3, 10, dtype=torch.bfloat16, device=device)
    with pytest.raises(RuntimeError, match="dtype"):
        blockdiag.linear(x, weight, biases[0])
    with pytest.raises(RuntimeError, match="dtype"):
        vmap(blockdiag.linear, (None, None, 0))(x, weight, biases)


def test_vmap_over_the_bias_under_autocast(arguments, device):
    x, weight, bias = (argument.float() for argument in arguments)
    biases = torch.stack([bias, bias + 1])
    with torch.autocast(device, dtype=torch.bfloat16):
        output = vmap(blockdiag.linear, (None, None, 0))(x, weight, biases)
        expected = torch.stack([blockdiag.linear(x, weight, b) for b in biases])
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected, rtol=2**-7, atol=2**-5)  # rounded before the bias is added, and after


def test_batched_gradients(arguments):
    """By torch.autograd.grad, whose vmap differs from torch.func's."""
    arguments = [argument.requires_grad_() for argument in arguments]
    for bias in (arguments[2], arguments[2].detach().flatten().requires_grad_()):
        inputs = (*arguments[:2], bias)
        output = blockdiag.linear(*inputs)
        grads = torch.randn(7, *output.shape, dtype=torch.float64, device=output.device)
        batched = torch.autograd.grad(output, inputs, grads, is_grads_batched=True, retain_graph=True)
        loop = [torch.autograd.grad(output, inputs, grad, retain_graph=True) for grad in grads]
        for actual, expected in zip(batched, zip(*loop, strict=True), strict=True):
            torch.testing.assert_close(actual, torch.stack(expected))


def test_nested_vmap(arguments):
    x, weight, bias = (torch.stack([argument, -argument]) for argument in arguments)

    def results(layer):
        return vmap(vmap(layer, (0, None, 0)), (None, 0, None))(x, weight, bias)

    torch.testing.assert_close(results(blockdiag.linear), results(dense))


def test_per_sample_gradients_equal_a_loop(device):
    layer = BlockDiagLinear(6, 10, 2, device=device)
    parameters = dict(layer.named_parameters())
    x, target = torch.randn(16, 6, device=device), torch.randn(16, 10, device=device)

    def sample_loss(parameters, x, target):
        return torch.nn.functional.mse_loss(functional_call(layer, parameters, (x,)), target)

    per_sample = vmap(grad(sample_loss), (None, 0, 0))(parameters, x, target)
    for i in range(len(x)):
        expected = grad(sample_loss)(parameters, x[i], target[i])
        torch.testing.assert_close({name: value[i] for name, value in per_sample.items()}, expected)


def test_an_ensemble_of_layers(device):
    layers = [BlockDiagLinear(6, 10, 2, device=device) for _ in range(3)]
    parameters, buffers = stack_module_state(layers)
    x = torch.randn(4, 6, device=device)
    outputs = vmap(lambda p, b: functional_call(layers[0], (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(outputs, torch.stack([layer(x) for layer in layers]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_forward_mode(dtype, device):
    arguments = [
        torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for shape in ((4, 6), (2, 5, 3), (2, 5))
    ]
    checks = {"check_batched_grad": True, "check_forward_ad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(blockdiag.linear, arguments, **checks)
    assert torch.autograd.gradgradcheck(blockdiag.linear, arguments, check_fwd_over_rev=True, check_rev_over_rev=True)


def test_a_dual_input_that_requires_grad(device):
    x = torch.randn(4, 6, dtype=torch.float64, device=device, requires_grad=True)
    weight = torch.randn(2, 5, 3, dtype=torch.float64, device=device)

    def results(layer):
        with forward_ad.dual_level():
            output = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x.detach().cos()), weight))
            return output.tangent, torch.autograd.grad(
                loss(lambda: output.primal)() + loss(lambda: output.tangent)(), x
            )

    torch.testing.assert_close(results(blockdiag.linear), results(dense))
