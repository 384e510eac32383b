"""torch.nn.MultiheadAttention with its projections as layers, which can be compressed like any others."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from blockdiag._surgery.duplicate import duplicate_on_meta
from blockdiag._surgery.optimizers import Successor
from blockdiag._surgery.replacement import Replacement, fill
from blockdiag.compression.exchange import exchange


class SplitAttention(nn.Module):
    """:class:`torch.nn.MultiheadAttention` with its four projections as layers of their own.

    That module keeps the projections of queries, keys and values in one parameter, and reads the weight of the output
    projection: none of them is called as a layer. Here all are.

    Args:
        attention: the module to take sizes and options from, but not parameters.

    Shape:
        - Inputs and outputs: those of :class:`torch.nn.MultiheadAttention`, with the same arguments.

    Attributes:
        q_proj, k_proj, v_proj, out_proj: the projections, :class:`torch.nn.Linear`.
        bias_k, bias_v: of shape ``(1, 1, embed_dim)``, appended to the sequences of keys and values; or ``None``.

    Example::

        >>> import torch
        >>> from blockdiag.compression import split_attention
        >>> model = torch.nn.Sequential(torch.nn.MultiheadAttention(16, 4, batch_first=True))
        >>> attention = split_attention(model)[0]
        >>> attention.q_proj
        Linear(in_features=16, out_features=16, bias=True)
        >>> x = torch.randn(2, 5, 16)
        >>> attention(x, x, x)[0].shape
        torch.Size([2, 5, 16])
    """

    bias_k: Tensor | None
    bias_v: Tensor | None
    in_proj_bias = None  # so that torch.nn.TransformerEncoderLayer does not read one weight of all projections

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = attention.embed_dim, attention.num_heads
        self.dropout, self.batch_first = attention.dropout, attention.batch_first
        self.add_zero_attn = attention.add_zero_attn
        self._qkv_same_embed_dim = False
        weight, bias = attention.out_proj.weight, attention.in_proj_bias is not None
        options: dict[str, Any] = {"bias": bias, "device": weight.device, "dtype": weight.dtype}
        self.q_proj = nn.Linear(attention.embed_dim, attention.embed_dim, **options)
        self.k_proj = nn.Linear(attention.kdim, attention.embed_dim, **options)
        self.v_proj = nn.Linear(attention.vdim, attention.embed_dim, **options)
        self.out_proj = nn.Linear(attention.embed_dim, attention.embed_dim, **options)
        for name in ("bias_k", "bias_v"):
            given = getattr(attention, name)
            self.register_parameter(name, None if given is None else nn.Parameter(torch.empty_like(given)))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = _batch_first(query, key, value, attn_mask, is_causal, self.batch_first)
        output, weights = _attend(
            self.q_proj(q),
            self.k_proj(k),
            self.v_proj(v),
            self.num_heads,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            key_padding_mask,
            attn_mask,
            need_weights,
            average_attn_weights,
            self.dropout if self.training else 0.0,
        )
        return _as_given(self.out_proj(output), weights, query, self.batch_first)

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}"


def _batch_first(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, batch_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as (batch, length, features), given in batches or as single sequences."""
    if is_causal and attn_mask is None:
        raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
    if query.dim() != 3:
        return query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
    if batch_first:
        return query, key, value
    return query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)


def _as_given(output: Tensor, weights: Tensor | None, query: Tensor, batch_first: bool) -> tuple[Tensor, Tensor | None]:
    """The inverse of :func:`_batch_first`: a batch, or a single sequence, as the query."""
    if query.dim() != 3:
        return output.squeeze(0), None if weights is None else weights.squeeze(0)
    return output if batch_first else output.transpose(0, 1), weights


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    need_weights: bool,
    average_attn_weights: bool,
    dropout: float,
) -> tuple[Tensor, Tensor | None]:
    """Attention on projected (batch, length, features), up to the output projection."""
    if bias_k is not None and bias_v is not None:
        k = torch.cat([k, bias_k.expand(k.shape[0], 1, -1)], dim=1)
        v = torch.cat([v, bias_v.expand(v.shape[0], 1, -1)], dim=1)
    if add_zero_attn:
        k, v = F.pad(k, [0, 0, 0, 1]), F.pad(v, [0, 0, 0, 1])
    q, k, v = (x.unflatten(-1, [num_heads, -1]).transpose(1, 2) for x in (q, k, v))
    mask = _both_masks(q, k, key_padding_mask, attn_mask)
    if not need_weights:
        output = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        return output.transpose(1, 2).flatten(2), None
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
    output = (weights @ v).transpose(1, 2).flatten(2)
    return output, weights.mean(1) if average_attn_weights else weights


def _both_masks(q: Tensor, k: Tensor, padding: Tensor | None, attn_mask: Tensor | None) -> Tensor | None:
    """Both masks as one to add to the scores (batch, heads, queries, keys); appended keys are not masked."""
    mask: Tensor | None = None
    if attn_mask is not None:
        mask = _additive_mask(attn_mask, q, k)
        mask = mask.unflatten(0, [q.shape[0], q.shape[1]]) if mask.dim() == 3 else mask
    if padding is not None:
        padded = _additive_mask(padding if padding.dim() == 2 else padding.unsqueeze(0), q, k).unsqueeze(1).unsqueeze(1)
        mask = padded if mask is None else mask + padded
    return mask


def _additive_mask(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, -float("inf"))
    return F.pad(mask.to(q.dtype), [0, k.shape[2] - mask.shape[-1]])


# For torch.fx: code that branches on arguments and their sizes is one node of the graph.
for _function in (_batch_first, _as_given, _attend):
    torch.fx.wrap(_function.__name__)


def split_attention(
    model: nn.Module, *, optimizers: Optimizer | Iterable[Optimizer] = (), inplace: bool = False
) -> nn.Module:
    """Replaces every :class:`torch.nn.MultiheadAttention` of a model by a :class:`SplitAttention` of the same outputs.

    Its projections are then layers, which :func:`~blockdiag.compress` compresses like any others, with calibration, and
    which save operations.

    Args:
        model: any module. A :class:`~torch.nn.parallel.DistributedDataParallel` is wrapped anew: use what is returned.
        optimizers: optimizers of the model, rebound to the new parameters with all of their state. Needs ``inplace``.
        inplace: whether to change the model itself. Default: a copy.

    Returns:
        The model.

    Raises:
        ValueError: there is no such module in it, or it is the model itself; or a parameter of one is on the meta
            device, not finite, or shared with another module.

    Example::

        >>> import torch, blockdiag
        >>> model = torch.nn.TransformerEncoderLayer(32, nhead=4, dim_feedforward=64, batch_first=True).eval()
        >>> split = blockdiag.split_attention(model)
        >>> x = torch.randn(2, 5, 32)
        >>> torch.allclose(split(x), model(x), atol=1e-5)
        True
        >>> config = blockdiag.LowRank(rank=8, min_features=0)
        >>> split, report = blockdiag.compress(split, config, "self_attn.*_proj", progress=False)
        >>> split.self_attn.v_proj.rank
        8
    """
    return exchange(
        model,
        lambda module: type(module) is nn.MultiheadAttention,
        _split,
        missing="split_attention: expected a model with torch.nn.MultiheadAttention inside",
        optimizers=optimizers,
        inplace=inplace,
    )


def _split(names: list[str], old: Any) -> Replacement:
    empty = SplitAttention(duplicate_on_meta(old))  # draws no random numbers
    new: Any = empty.to_empty(device=old.out_proj.weight.device).train(old.training)
    successors: dict[nn.Parameter, list[Successor]] = {}

    def inherit(parameter: nn.Parameter, name: str, part: int | None = None) -> None:
        """The parameter of that name from the given one, or from a third of it."""

        def gather(tensor: Tensor) -> Tensor:
            return tensor if part is None else tensor.chunk(3)[part]

        successor = new.get_parameter(name).requires_grad_(parameter.requires_grad)
        fill(successor, gather(parameter.detach()))
        successors.setdefault(parameter, []).append(Successor(successor, gather))

    for part, name in enumerate("qkv"):
        if old._qkv_same_embed_dim:
            inherit(old.in_proj_weight, f"{name}_proj.weight", part)
        else:
            inherit(getattr(old, f"{name}_proj_weight"), f"{name}_proj.weight")
        if old.in_proj_bias is not None:
            inherit(old.in_proj_bias, f"{name}_proj.bias", part)
    for name, parameter in old.out_proj.named_parameters():
        inherit(parameter, f"out_proj.{name}")
    for name in ("bias_k", "bias_v"):
        if getattr(old, name) is not None:
            inherit(getattr(old, name), name)
    return Replacement(names, old, new, successors)
