"""Results are new memory: in-place operations on them change neither arguments nor other results (pytorch#79664)."""

import itertools

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import jvp, vmap

import blockdiag
from blockdiag import BlockDiagLinear, stack_models
from every_module import CASES, first, initialized

ops = torch.ops.blockdiag

# Leading dimensions and sizes for which a sum, a view or an expansion may be a no-op.
LEADING = [(), (1,), (3,), (1, 1), (2, 1), (0,)]
SIZES = [(2, 5, 3), (1, 5, 3), (2, 1, 1), (1, 1, 1)]


def storages(*tensors):
    return [tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel() > 0]


def assert_own_memory(results, arguments):
    """Each result owns its memory, without overlap."""
    mine, theirs = storages(*results), storages(*arguments)
    assert len(set(mine)) == len(mine)
    assert not set(mine) & set(theirs)
    before = [argument.clone() for argument in arguments]
    for result in results:
        result.detach().add_(1)
    for argument, value in zip(arguments, before, strict=True):
        torch.testing.assert_close(argument, value, rtol=0, atol=0)


def arguments_of(leading, sizes, stacked, bias_stacked, dtype=torch.float64):
    num_blocks, out_block, in_block = sizes
    inputs = (num_blocks, in_block) if stacked else (num_blocks * in_block,)
    bias = (num_blocks, out_block) if bias_stacked else (num_blocks * out_block,)
    return [torch.randn(shape, dtype=dtype) for shape in ((*leading, *inputs), sizes, bias)]


every_problem = pytest.mark.parametrize(
    ("leading", "sizes", "stacked", "bias_stacked"), [*itertools.product(LEADING, SIZES, (False, True), (False, True))]
)


@every_problem
def test_ops(leading, sizes, stacked, bias_stacked):
    x, weight, bias = arguments_of(leading, sizes, stacked, bias_stacked)
    output = ops.linear(x, weight, bias)
    grad = torch.randn_like(output)
    reverse = [*reversed(range(output.dim()))]
    for grad_output in (grad, grad.permute(reverse).contiguous().permute(reverse), grad.new_ones(()).expand_as(output)):
        results = [
            ops.linear(x, weight),
            ops.linear_input_grad(grad_output, weight, x.shape),
            ops.linear_weight_grad(grad_output, x, weight.shape),
            *ops.linear_weight_bias_grad(grad_output, x, weight.shape),
        ]
        assert all(result.is_contiguous() for result in results)
        assert_own_memory(results, [x, weight, bias, grad, grad_output])
    assert_own_memory([output], [x, weight, bias])


@every_problem
def test_gradients(leading, sizes, stacked, bias_stacked):
    tensors = [tensor.requires_grad_() for tensor in arguments_of(leading, sizes, stacked, bias_stacked)]
    output = blockdiag.linear(*tensors)
    grad = torch.randn_like(output).requires_grad_()
    grads = torch.autograd.grad(output, tensors, grad, create_graph=True)
    assert_own_memory([g.detach() for g in (output, *grads)], [t.detach() for t in (*tensors, grad)])
    # Of the bilinear parts only: the bias gradient alone is torch's own sum.
    directions = [torch.randn_like(g) for g in grads[:2]]
    second = torch.autograd.grad(grads[:2], [*tensors[:2], grad], directions)
    assert_own_memory(second, [t.detach() for t in (*tensors, grad, *directions, *grads)])


@every_problem
@pytest.mark.parametrize("requires_grad", [False, True])
def test_tangents(leading, sizes, stacked, bias_stacked, requires_grad):
    """For tangents of any subset of the arguments, including zeros."""
    tensors = arguments_of(leading, sizes, stacked, bias_stacked)
    for chosen in itertools.product((None, "random", "zero"), repeat=3):
        if not any(chosen):
            continue
        tangents = [
            None if kind is None else torch.randn_like(t) if kind == "random" else torch.zeros_like(t)
            for kind, t in zip(chosen, tensors, strict=True)
        ]
        given = [tangent for tangent in tangents if tangent is not None]
        with forward_ad.dual_level():
            duals = [
                t.clone().requires_grad_(requires_grad)
                if tangent is None
                else forward_ad.make_dual(t.clone().requires_grad_(requires_grad), tangent)
                for t, tangent in zip(tensors, tangents, strict=True)
            ]
            output = blockdiag.linear(*duals)
            value, tangent = forward_ad.unpack_dual(output)
            assert tangent.is_contiguous()
            assert_own_memory([value.detach(), tangent.detach()], [*given, *tensors])


@pytest.mark.parametrize("leading", LEADING, ids=str)
def test_an_in_place_operation_leaves_the_tangent_of_the_bias(leading):
    x, weight, bias = arguments_of(leading, (1, 3, 4), False, False)
    tangent = torch.ones_like(bias)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(bias, tangent)
        blockdiag.linear(x, weight, dual).mul_(3)
        second = forward_ad.unpack_dual(blockdiag.linear(x, weight, dual)).tangent
        assert torch.equal(tangent, torch.ones_like(bias))
        assert torch.equal(second, torch.ones_like(second))
    _, output_tangent = jvp(lambda b: blockdiag.linear(x, weight, b), (bias,), (tangent,))
    output_tangent.mul_(3)
    assert torch.equal(tangent, torch.ones_like(bias))


def test_a_zero_tangent_of_the_bias():
    """A zero tangent of torch's own, which has no memory: for example, of a view of a tensor without a tangent."""
    x, weight, bias = arguments_of((1,), (1, 3, 4), False, False)
    zero = torch._efficientzerotensor(bias.shape, dtype=bias.dtype)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(blockdiag.linear(x, weight, forward_ad.make_dual(bias, zero))).tangent
        assert torch.equal(tangent.add_(1), torch.ones(1, 3, dtype=bias.dtype))


@pytest.mark.parametrize("in_dims", [(0, None, None), (None, 0, None), (None, None, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("leading", LEADING, ids=str)
def test_vmap(in_dims, leading):
    tensors = [
        t if dim is None else t.expand(1, *t.shape)
        for t, dim in zip(arguments_of(leading, (1, 3, 4), False, False), in_dims, strict=True)
    ]
    assert_own_memory([vmap(blockdiag.linear, in_dims)(*tensors)], tensors)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("training", [False, True])
def test_modules(case, training):
    """With one row: outputs, and in forward mode their tangents, for the tangent of a single parameter."""
    module, inputs = initialized(case).train(training), case.inputs(2 if training else 1)
    state = [*module.parameters(), *module.buffers()]
    if not training:
        assert_own_memory([first(module(*inputs)).detach()], [*inputs, *(t.detach() for t in state)])
    for name, parameter in module.named_parameters():
        tangent = torch.randn_like(parameter)
        with forward_ad.dual_level():
            dual = {name: forward_ad.make_dual(parameter.detach(), tangent)}
            output = first(torch.func.functional_call(module, dual, inputs))
            result = forward_ad.unpack_dual(output).tangent
            if result is not None:
                assert_own_memory([result.detach()], [tangent])


@pytest.mark.parametrize(
    "layers",
    [
        lambda: [],
        lambda: [nn.Identity()],
        lambda: [nn.Flatten()],
        lambda: [nn.Dropout(0.5)],
        lambda: [nn.Dropout(0.5), nn.ReLU(inplace=True)],
        lambda: [nn.Sequential(nn.Identity(), nn.Dropout(0.5, inplace=True)), nn.Linear(4, 3)],
        lambda: [nn.Linear(4, 3), nn.ReLU(inplace=True)],
    ],
    ids=["nothing", "identity", "flatten", "dropout", "then in place", "nested", "afterwards"],
)
@pytest.mark.parametrize("num_models", [1, 3])
def test_stacked_models(layers, num_models):
    """Also if no layer computes, or the first is in-place."""
    models = [nn.Sequential(*layers()).eval() for _ in range(num_models)]
    x = torch.randn(2, 4)
    expected = torch.stack([model(x.clone()) for model in models])
    for input, stacked in ((x, False), (x.expand(num_models, 2, 4).clone(), True)):
        output = stack_models(models)(input, stacked=stacked)
        torch.testing.assert_close(output, expected)
        assert_own_memory([output], [input])


def test_only_what_is_needed_is_copied():
    """A stacked model whose first layer computes does not copy its input."""
    model = stack_models([nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True)).eval() for _ in range(3)])
    seen = []
    model.stacked[0].register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    x = torch.randn(2, 4)
    model(x)
    assert storages(*seen) == storages(x)


def test_conversions_copy():
    layer = BlockDiagLinear(12, 8, 4)
    converted = [*layer.to_linears(), layer.to_dense(), BlockDiagLinear.from_dense(layer.to_dense(), 2)]
    converted.append(BlockDiagLinear.from_linears(layer.to_linears()))
    assert_own_memory([p.detach() for other in converted for p in other.parameters()], [*layer.parameters()])
