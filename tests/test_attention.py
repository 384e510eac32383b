"""split_attention: the same outputs for all arguments, and projections that convert like other layers."""

import copy
import itertools

import pytest
import torch
from torch import nn

from blockdiag import BlockDiagLinear, BlockDiagonal, LowRank, LowRankLinear, compress, split_attention
from blockdiag.compression import SplitAttention

BATCH, QUERIES, KEYS, HEADS = 3, 5, 7, 4


def make(options, batch_first, dtype=torch.float64):
    model = nn.ModuleDict(
        {"attention": nn.MultiheadAttention(16, HEADS, batch_first=batch_first, dtype=dtype, **options)}
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 12, "vdim": 20}],
    ids=str,
)
def test_computes_the_same(options, batch_first, device):
    model = make(options, batch_first).to(device)
    split = split_attention(model)["attention"]
    attention = model["attention"]
    assert type(split) is SplitAttention
    assert type(attention) is nn.MultiheadAttention
    sizes = [(QUERIES, 16), (KEYS, options.get("kdim", 16)), (KEYS, options.get("vdim", 16))]
    inputs = [torch.randn(BATCH, *size, dtype=torch.float64, device=device) for size in sizes]
    masked = torch.rand(QUERIES, KEYS, device=device) < 0.3
    masked[:, 0] = False
    masks = [None, masked, torch.randn(BATCH * HEADS, QUERIES, KEYS, dtype=torch.float64, device=device)]
    padding = torch.arange(KEYS, device=device) >= torch.tensor([[KEYS], [5], [6]], device=device)
    batches = inputs if batch_first else [x.transpose(0, 1) for x in inputs]
    for mask, pad, need, average in itertools.product(masks, (None, padding), (True, False), (True, False)):
        arguments = {"key_padding_mask": pad, "need_weights": need, "attn_mask": mask, "average_attn_weights": average}
        torch.testing.assert_close(split(*batches, **arguments), attention(*batches, **arguments))
    single = [x[0] for x in inputs]
    torch.testing.assert_close(split(*single, attn_mask=masked), attention(*single, attn_mask=masked))
    with pytest.raises(RuntimeError, match="is_causal"):
        split(*single, is_causal=True)


def test_training_goes_on():
    """All of the optimizer's state maps: the next steps are the same as without the conversion."""
    model = make({}, True)
    split = copy.deepcopy(model)
    x = torch.randn(BATCH, QUERIES, 16, dtype=torch.float64)
    optimizers = [torch.optim.AdamW(m.named_parameters(), lr=1e-2) for m in (model, split)]

    def step(model, optimizer):
        optimizer.zero_grad()
        model["attention"](x, x, x)[0].square().sum().backward()
        optimizer.step()

    for m, optimizer in zip((model, split), optimizers, strict=True):
        step(m, optimizer)
    assert split_attention(split, optimizers=optimizers[1], inplace=True) is split
    assert optimizers[1].param_groups[0]["param_names"][:3] == [f"attention.{n}_proj.weight" for n in "qkv"]
    for _ in range(3):
        for m, optimizer in zip((model, split), optimizers, strict=True):
            step(m, optimizer)
    new = split["attention"]
    weights = torch.cat([new.q_proj.weight, new.k_proj.weight, new.v_proj.weight])
    torch.testing.assert_close(weights, model["attention"].in_proj_weight)
    torch.testing.assert_close(new.out_proj.bias, model["attention"].out_proj.bias)


@pytest.mark.parametrize("training", [False, True])
def test_transformer(training):
    model = nn.Transformer(16, 4, 2, 2, 32, dropout=0.0, batch_first=True).train(training)
    split = split_attention(model)
    source, target = torch.randn(3, 7, 16), torch.randn(3, 5, 16)
    padding = torch.arange(7) >= torch.tensor([[7], [5], [6]])
    mask = model.generate_square_subsequent_mask(5)
    with torch.set_grad_enabled(training):
        arguments = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding, "tgt_mask": mask}
        torch.testing.assert_close(split(source, target, **arguments), model(source, target, **arguments))


def test_projections_are_converted_as_other_layers():
    model = split_attention(nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)).eval()
    x = torch.randn(8, 50, 32)
    low_rank, report = compress(model, LowRank(min_features=0), "*_proj", calibration=[x], progress=False)
    assert len(report.layers) == 8
    assert all(layer.calibrated for layer in report.layers)
    assert type(low_rank.layers[1].self_attn.q_proj) is LowRankLinear
    blocks, _ = compress(model, BlockDiagonal(4), "*_proj", calibration=[x], progress=False)
    assert type(blocks.layers[0].self_attn.out_proj) is BlockDiagLinear
    for converted in (low_rank, blocks):
        assert converted(x).shape == x.shape
        converted.train()(x).sum().backward()


def test_models_that_cannot_be_split():
    for model in (nn.Sequential(nn.Linear(2, 2)), nn.MultiheadAttention(4, 2)):
        with pytest.raises(ValueError, match=r"expected a model with torch\.nn\.MultiheadAttention inside"):
            split_attention(model)
    model = make({}, True)
    model["other"] = nn.Linear(16, 48)
    model["other"].weight = model["attention"].in_proj_weight
    with pytest.raises(ValueError, match=r"'attention' shares a parameter with 'other\.weight'"):
        split_attention(model)
    with pytest.raises(ValueError, match="on the meta device"):
        split_attention(make({}, True).to("meta"))
    with pytest.raises(ValueError, match="pass inplace=True"):
        split_attention(model, optimizers=torch.optim.SGD(model.parameters()))
