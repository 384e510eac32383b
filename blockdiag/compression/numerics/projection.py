"""The closest matrix of a structure to a dense one: in the Frobenius norm, or in the outputs that inputs give.

All matrices are in double precision. Where inputs are known, `second` is their second moment E[x x^H] or covariance,
and the error of an approximation A of W is E|(W - A) x|^2 = tr((W - A) second (W - A)^H); `None` stands for the
identity, which makes it the squared Frobenius norm.
"""

from typing import Any

import torch
from torch import Tensor


def energy(matrix: Tensor, second: Tensor | None) -> Tensor:
    """E|matrix x|^2, summed over groups if there are several."""
    weighted = matrix if second is None else matrix @ second
    return (weighted * matrix.conj()).sum().real.clamp(min=0)


def relative_error(weight: Tensor, difference: Tensor, second: Tensor | None, reference: Tensor | None) -> float:
    """Root mean square of the outputs of `difference` relative to that of the outputs of `weight`; 0 if both are 0."""
    whole = energy(weight, reference)
    part = energy(difference, second)
    return float((part / whole).sqrt()) if whole > 0 else float(part.sqrt())


def _least_squares(second: Tensor, columns: Any) -> Tensor:
    """What maps a matrix to the one on `columns` of the inputs alone whose outputs are closest to those of the matrix.

    The normal equations by a pseudoinverse: calibration inputs are often fewer than features, or have constant ones.
    """
    return second[:, columns] @ torch.linalg.pinv(second[columns][:, columns], hermitian=True)


def spectrum(weight: Tensor, num_blocks: tuple[int, int], second: Tensor | None) -> Tensor:
    """Energies by rank: how much of the error each next rank takes away, summed over the (l, k) submatrices.

    Exact for one submatrix; of several with `second`, what correlations between their inputs change is left out.
    """
    blocks = _submatrices(weight, num_blocks)
    if second is None:
        return torch.linalg.svdvals(blocks).square().sum((0, 1))
    in_blocks, in_block = num_blocks[0], blocks.shape[-1]
    own = torch.stack([second[i : i + in_block, i : i + in_block] for i in range(0, in_blocks * in_block, in_block)])
    return _principal_outputs(blocks, own)[1].sum((0, 1))


def _submatrices(weight: Tensor, num_blocks: tuple[int, int]) -> Tensor:
    """(out_features, in_features) as (out_blocks, in_blocks, out_block, in_block)."""
    in_blocks, out_blocks = num_blocks
    return weight.unflatten(0, (out_blocks, -1)).unflatten(2, (in_blocks, -1)).transpose(1, 2)


def _split_evenly(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The same product of two factors of one scale, for `up` with orthonormal columns."""
    left, values, right = torch.linalg.svd(down, full_matrices=False)
    root = values.sqrt()
    return up @ left * root.unsqueeze(-2), root.unsqueeze(-1) * right


def _reduced_rank(target: Tensor, second: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """The factors of the closest matrix of this rank: the projection on the principal directions of the outputs.

    Without `second` that is the truncated singular value decomposition (Eckart and Young, 1936), with it reduced-rank
    regression (Izenman, 1975), `up` then with orthonormal columns; neither needs an inverse.
    """
    if second is None:
        left, values, right = torch.linalg.svd(target, full_matrices=False)
        root = values[..., :rank].sqrt()
        return left[..., :rank] * root.unsqueeze(-2), root.unsqueeze(-1) * right[..., :rank, :]
    up = _principal_outputs(target, second)[0][..., :rank]
    return up, up.mH @ target


def _principal_outputs(matrix: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The directions of the outputs' variance, largest first, and how much there is in each, for every possible rank.

    By the eigenvectors of the outputs' second moment, or where there are more outputs than inputs, by the singular
    vectors of the matrix times a root of the inputs' one.
    """
    if matrix.shape[-2] <= matrix.shape[-1]:
        values, vectors = torch.linalg.eigh(matrix @ second @ matrix.mH)
        return vectors.flip(-1), values.flip(-1).clamp(min=0)
    values, vectors = torch.linalg.eigh(second)
    root = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
    directions, singular, _ = torch.linalg.svd(matrix @ root, full_matrices=False)
    return directions, singular.square()


def monarch(
    weight: Tensor,
    num_blocks: tuple[int, int],
    rank: int,
    second: Tensor | None,
    sweeps: int = 30,
    tolerance: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """The two weights of the closest MonarchLinear; for (1, 1) blocks the factors of the closest low-rank matrix.

    Without inputs every submatrix has its own closed-form optimum. With them, submatrices of one block row share an
    output: each is put at its optimum given the others, in turn, until a sweep lowers the error by less than
    `tolerance`, relative to itself. For one submatrix per row that is the optimum at once; otherwise the error never
    rises, and starts from that of the closed form.

    Returns:
        The first layer's weight (in_blocks, out_blocks * rank, in_block), and the second's
        (out_blocks, out_block, in_blocks * rank).
    """
    in_blocks, out_blocks = num_blocks
    blocks = _submatrices(weight, num_blocks)  # (out_blocks, in_blocks, out_block, in_block)
    if second is not None and in_blocks == 1:
        up, down = _reduced_rank(blocks, second, rank)
    else:
        up, down = _reduced_rank(blocks, None, rank)
    if second is not None and in_blocks > 1:
        rows = weight.unflatten(0, (out_blocks, -1))
        in_block = blocks.shape[-1]
        slices = [slice(start, start + in_block) for start in range(0, weight.shape[1], in_block)]
        solutions = [_least_squares(second, columns) for columns in slices]
        residual = rows - (up @ down).transpose(1, 2).flatten(2)
        previous = energy(residual, second)
        for _ in range(sweeps):
            for index, columns in enumerate(slices):
                residual[..., columns] += up[:, index] @ down[:, index]
                target = residual @ solutions[index]
                up[:, index], down[:, index] = _reduced_rank(target, second[columns, columns], rank)
                residual[..., columns] -= up[:, index] @ down[:, index]
            error = energy(residual, second)
            if error > (1 - tolerance) * previous:
                break
            previous = error
    if second is not None:
        up, down = _split_evenly(up, down)
    first = down.transpose(0, 1).flatten(1, 2)
    return first, up.transpose(1, 2).flatten(2)


def diagonal_blocks(matrix: Tensor, rows: Tensor, columns: Tensor, num_blocks: int) -> Tensor:
    """The diagonal blocks (num_blocks, out_block, in_block) of the matrix with its rows and columns in this order."""
    blocks = matrix[rows][:, columns].unflatten(0, (num_blocks, -1)).unflatten(2, (num_blocks, -1))
    return blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)


def scatter_blocks(blocks: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The inverse of :func:`diagonal_blocks`: the dense matrix that has these blocks there, and zeros elsewhere."""
    dense = torch.block_diag(*blocks)
    return dense[rows.argsort()][:, columns.argsort()]


def refit_blocks(weight: Tensor, rows: Tensor, columns: Tensor, num_blocks: int, second: Tensor) -> Tensor:
    """The blocks whose outputs are closest to those of `weight`: least squares for each block by itself."""
    return torch.stack(
        [
            weight[row] @ _least_squares(second, column)
            for row, column in zip(rows.chunk(num_blocks), columns.chunk(num_blocks), strict=True)
        ]
    )


def find_permutations(energies: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Orders of rows and columns that gather much of a nonnegative matrix in its diagonal blocks.

    Rows and columns are assigned to equal blocks in turn, each time by the best assignment given the other
    (:func:`scipy.optimize.linear_sum_assignment`), until next to nothing is gained, from the given order and from
    spectral co-clustering (:class:`sklearn.cluster.SpectralCoclustering`); the better result is returned, never one
    worse than the given order. To find the best of all is NP-hard.

    Raises:
        ImportError: scipy or scikit-learn is missing.
    """
    try:
        import numpy as np
        from scipy.optimize import linear_sum_assignment
        from sklearn.cluster import SpectralCoclustering
    except ImportError as error:
        raise ImportError(
            f"permuting features needs scipy and scikit-learn ({error}): pip install scipy scikit-learn"
        ) from error

    matrix = energies.cpu().double().numpy()
    sizes = [features // num_blocks for features in matrix.shape]

    def assign(affinity: Any, size: int) -> Any:
        """The block of each feature, `size` of them in each, with the largest sum of affinity (features, blocks)."""
        _, slots = linear_sum_assignment(np.repeat(affinity, size, axis=1), maximize=True)
        return slots // size

    def one_hot(labels: Any) -> Any:
        return np.eye(num_blocks)[labels]

    def improve(row_blocks: Any) -> tuple[float, Any, Any]:
        best = -1.0
        while True:
            column_blocks = assign(matrix.T @ one_hot(row_blocks), sizes[1])
            row_blocks = assign(matrix @ one_hot(column_blocks), sizes[0])
            kept = float((matrix * (row_blocks[:, None] == column_blocks[None, :])).sum())
            if kept <= best * (1 + 1e-3):  # the rounds after that are many, and gain next to nothing
                return kept, row_blocks, column_blocks
            best = kept

    starts = [np.arange(matrix.shape[0]) // sizes[0]]
    if 1 < num_blocks <= min(matrix.shape):
        # Added to every entry, so that empty rows and columns, which the clustering divides by, have a sum.
        smallest = matrix.mean() * 1e-6 + np.finfo(float).tiny
        clustering = SpectralCoclustering(n_clusters=num_blocks, random_state=0).fit(matrix + smallest)
        starts.append(clustering.row_labels_)
    _, row_blocks, column_blocks = max((improve(start) for start in starts), key=lambda result: result[0])
    # Stable: features of one block stay in their order.
    rows, columns = (torch.from_numpy(np.argsort(blocks, kind="stable")) for blocks in (row_blocks, column_blocks))
    return rows, columns
