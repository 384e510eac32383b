"""A block-diagonal linear layer between two permutations of features."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from blockdiag.functional import is_jagged, of_jagged
from blockdiag.nn._shared import Unquantized, check_own_forward
from blockdiag.nn.block_diag_linear import BlockDiagLinear


class PermutedBlockDiagLinear(Unquantized):
    r"""A :class:`BlockDiagLinear` between two permutations of features: any assignment of features to blocks.

    Args:
        in_features: number of input features of all blocks together, a multiple of ``num_blocks``.
        out_features: number of output features of all blocks together, a multiple of ``num_blocks``.
        num_blocks: number of blocks.
        input_permutation: feature ``i`` of the blocks' input is feature ``input_permutation[i]`` of the layer's input;
            an integer tensor of shape ``(in_features,)``, or a list. Default: no permutation.
        output_permutation: feature ``i`` of the layer's output is feature ``output_permutation[i]`` of the blocks'
            output; of shape ``(out_features,)``. Default: no permutation.
        bias: whether to learn an additive bias. Default: ``True``.
        device: device of the parameters and permutations.
        dtype: dtype of the parameters.

    Shape:
        - Input: :math:`(*, \text{in\_features})`
        - Output: :math:`(*, \text{out\_features})`

    Attributes:
        blocks: the :class:`BlockDiagLinear` between the permutations.
        weight: the weight of ``blocks``, of shape ``(num_blocks, out_features // num_blocks, in_features //
            num_blocks)``; its features are in the order of the blocks.
        bias: the bias of ``blocks``, in the order of the blocks; ``None`` if ``bias`` is ``False``.
        input_permutation: a buffer of dtype int64, or ``None``. A layer that was made on the meta device, where values
            get lost, gets it back from a state dict.
        output_permutation: a buffer of dtype int64, or ``None``.

    State dicts in which weight and bias have no prefix ``blocks.``, as those of version 0.1, load too.

    Raises:
        ValueError: the sizes do not fit, as for :class:`BlockDiagLinear`, or ``input_permutation`` or
            ``output_permutation`` is not a permutation of the features.

    Examples::

        >>> import torch, blockdiag
        >>> layer = blockdiag.PermutedBlockDiagLinear(6, 4, num_blocks=2, input_permutation=[0, 2, 4, 1, 3, 5])
        >>> layer(torch.randn(32, 6)).shape
        torch.Size([32, 4])
        >>> layer.to_dense().weight[:2, 1::2]  # the first block sees features 0, 2 and 4 only
        tensor([[0., 0., 0.],
                [0., 0., 0.]], grad_fn=<SliceBackward0>)
    """

    __constants__: ClassVar[list[str]] = ["in_features", "num_blocks", "out_features"]
    input_permutation: Tensor | None
    output_permutation: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_blocks: int,
        input_permutation: Tensor | Sequence[int] | None = None,
        output_permutation: Tensor | Sequence[int] | None = None,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.num_blocks = in_features, out_features, num_blocks
        self.blocks = BlockDiagLinear(in_features, out_features, num_blocks, bias=bias, device=device, dtype=dtype)
        self._register_permutations(input_permutation, output_permutation)

    @classmethod
    def from_blocks(
        cls,
        blocks: BlockDiagLinear,
        input_permutation: Tensor | Sequence[int] | None = None,
        output_permutation: Tensor | Sequence[int] | None = None,
    ) -> "PermutedBlockDiagLinear":
        """A layer that has these very blocks, not copies, in their mode.

        Args:
            blocks: the layer between the permutations.
            input_permutation: as for the class.
            output_permutation: as for the class.

        Raises:
            TypeError: ``blocks`` is another module.
            ValueError: one of them is not a permutation of the features.

        Example::

            >>> import torch, blockdiag
            >>> blocks = blockdiag.BlockDiagLinear.from_linears([torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)])
            >>> layer = blockdiag.PermutedBlockDiagLinear.from_blocks(blocks, [0, 2, 1, 3])
            >>> layer.blocks is blocks
            True
        """
        if not isinstance(blocks, BlockDiagLinear):
            raise TypeError(
                "PermutedBlockDiagLinear.from_blocks: expected blocks to be a BlockDiagLinear, but got "
                f"{type(blocks).__name__}"
            )
        layer = cls(blocks.in_features, blocks.out_features, blocks.num_blocks, device="meta")
        layer.blocks = blocks
        layer._register_permutations(input_permutation, output_permutation)
        return layer.train(blocks.training)

    def _register_permutations(self, input_permutation: Any, output_permutation: Any) -> None:
        for name, permutation, features in (
            ("input_permutation", input_permutation, self.in_features),
            ("output_permutation", output_permutation, self.out_features),
        ):
            if permutation is not None:
                permutation = _checked_permutation(name, permutation, features, self.blocks.weight.device)
            self.register_buffer(name, permutation)

    @property
    def weight(self) -> Tensor:
        """The weight of ``blocks``."""
        return self.blocks.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of ``blocks``."""
        return self.blocks.bias

    def reset_parameters(self) -> None:
        """Draws the parameters of the blocks anew; the permutations stay."""
        self.blocks.reset_parameters()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for name in [*dict(self.blocks.named_parameters()), *dict(self.blocks.named_buffers())]:
            old, new = f"{prefix}{name}", f"{prefix}blocks.{name}"
            if old in state_dict and new not in state_dict:  # the blocks were the layer itself
                state_dict[new] = state_dict.pop(old)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting() and is_jagged(input):
            return of_jagged(self.forward, input)
        return _permuted(self.blocks(_permuted(input, self.input_permutation)), self.output_permutation)

    def to_dense(self) -> nn.Linear:
        """One :class:`torch.nn.Linear` that computes the same, with copies of the parameters.

        Raises:
            ValueError: the layer, or ``blocks``, has hooks or a replaced forward.

        Example::

            >>> import torch, blockdiag
            >>> layer = blockdiag.PermutedBlockDiagLinear(6, 4, 2, output_permutation=[3, 1, 2, 0])
            >>> x = torch.randn(32, 6)
            >>> torch.testing.assert_close(layer.to_dense()(x), layer(x))
        """
        check_own_forward(self)
        dense = self.blocks.to_dense()
        with torch.no_grad():
            if self.input_permutation is not None:
                dense.weight.copy_(dense.weight[:, self.input_permutation.argsort()])
            if self.output_permutation is not None:
                dense.weight.copy_(dense.weight[self.output_permutation])
                if self.bias is not None:
                    dense.bias.copy_(dense.bias[self.output_permutation])
        return dense

    def extra_repr(self) -> str:
        permuted = [name for name in ("input", "output") if getattr(self, f"{name}_permutation") is not None]
        return f"permuted={' and '.join(permuted) or None}"


def _checked_permutation(name: str, permutation: Any, features: int, device: torch.device) -> Tensor:
    """A copy on the device; of one on the meta device only the size is checked."""
    is_tensor = isinstance(permutation, Tensor)
    if not is_tensor or permutation.shape == (features,):
        if is_tensor and permutation.is_meta:
            if device.type == "meta":
                return permutation.to(torch.int64, copy=True)
            raise ValueError(
                f"PermutedBlockDiagLinear: expected {name} to have values, as the parameters on {device}, but it is on "
                "the meta device"
            )
        # By their values: under torch.device("meta") a tensor of them would be made there, and lose them.
        values = permutation.tolist() if is_tensor else list(permutation)
        if sorted(values) == list(range(features)):
            return torch.tensor(values, dtype=torch.int64, device=device)
    raise ValueError(
        f"PermutedBlockDiagLinear: expected {name} to be a permutation of 0 to {features - 1}, but got {permutation}"
    )


def _is_refused(features: Any) -> bool:
    return isinstance(features, Tensor) and (
        features.layout != torch.strided or features.is_nested or features.is_quantized
    )


def _permuted(features: Tensor, permutation: Tensor | None) -> Tensor:
    """The last dimension in another order. What ``linear`` refuses is left to its error message."""
    if permutation is None or (not torch.jit.is_scripting() and _is_refused(features)):
        return features
    # A proxy of torch.fx is no Tensor, and has no sizes to compare.
    if not torch.jit.is_scripting() and isinstance(features, Tensor) and features.shape[-1:] != permutation.shape:
        raise ValueError(
            f"PermutedBlockDiagLinear: expected the last dimension to be {len(permutation)}, but got the shape "
            f"{tuple(features.shape)}"
        )
    # On a CPU index_select is much faster on matrices than on tensors of more dimensions.
    rows = features.unsqueeze(0).flatten(0, -2)
    return rows.index_select(-1, permutation).view(features.shape)
