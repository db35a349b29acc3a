"""The factor of a damped Hessian's inverse that GPTQ works with, for Hessians of any width.

Of a wide linear the Hessian is the largest thing in memory: 3.3 GB for 28672 input features. Up to
`AT_ONCE` features torch factors it in one piece, with four matrices of that size alive; above, it
is factored and inverted block by block in its own memory.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from rilq.errors import RilqError

LARGEST_DAMPING = 1.0  # beyond it the Hessian says little more than its mean diagonal
AT_ONCE = 8192  # features; four matrices of them take 1.1 GB
BLOCK = 1024  # columns at a time: enough for fast matrix products, few beside 8192
PANELS = 4  # blocks of columns that are alive beside the matrix, torch's own copies among them


def inverse_factor(hessian: Tensor, damping: float, warn: Callable[[str], None]) -> Tensor:
    """The upper triangular `U` with `inverse(H + damping) = U^T U`.

    Row `j` of `U`, divided by its diagonal, says how the error of column `j` is best made up
    for by the columns after it, once the columns before are fixed. It comes from one Cholesky
    of `H` read backwards and one triangular inverse: the inverse itself is never formed.

    Args:
        hessian: `[in_features, in_features]` float32, positive semidefinite, in any scale; given
            away: if it is wider than `AT_ONCE`, the result lies in its memory.
        damping: in parts of the mean diagonal; raised tenfold, up to 1, where it is too little.
        warn: is told of a damping that had to be raised.

    Returns:
        `[in_features, in_features]` float32.

    Raises:
        RilqError: the Hessian is not finite, or not positive definite at the largest damping.
    """
    extremes = torch.stack(torch.aminmax(hessian))
    if not bool(torch.isfinite(extremes).all()):
        raise RilqError(
            f"Hessian {list(hessian.shape)}: expected finite sums, found NaN or infinity\n"
            "  the layer's inputs overflow; try --dtype float32 or bfloat16"
        )
    mean = float(hessian.diagonal().mean(dtype=torch.float64))
    if mean == 0:
        return torch.eye(len(hessian), dtype=torch.float32, device=hessian.device)
    # Scaled to a mean diagonal of 1, so that sums of any size stay within float32.
    attempt = (
        partial(_at_once, hessian.flip(0, 1).div_(abs(mean)))
        if len(hessian) <= AT_ONCE
        else _Blocks(hessian.div_(abs(mean)), BLOCK).inverse_factor
    )
    used = damping
    while used <= LARGEST_DAMPING:
        if (inverse := attempt(used)) is not None:
            if used > damping:
                warn(
                    f"the Hessian is not positive definite with {damping:g} of its mean diagonal "
                    f"added; {used:g} was used"
                )
            return inverse
        used *= 10
    raise RilqError(
        f"Hessian {list(hessian.shape)}: not positive definite, even with {LARGEST_DAMPING:g} "
        "times its mean diagonal added\n"
        "  check the calibration text, or use --quantizer rtn"
    )


def factor_bytes(in_features: int) -> int:
    """The most memory that `inverse_factor` takes, the Hessian included."""
    if in_features > AT_ONCE:
        return 4 * in_features * (in_features + PANELS * BLOCK)
    return 4 * 4 * in_features**2


def _at_once(backward: Tensor, damping: float) -> Tensor | None:
    """From the Hessian read backwards, whose diagonal has the mean 1; None if it is not definite.

    Beside the caller's Hessian at most three matrices are alive, `backward` among them.
    """
    diagonal = backward.diagonal().clone()
    backward.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(backward)
    if int(failed):
        backward.diagonal().copy_(diagonal)
        return None
    upper = factor.flip(0, 1)  # H = upper @ upper.T
    del factor
    identity = backward.zero_()
    identity.diagonal().fill_(1)
    inverse: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
    return inverse


class _Blocks:
    """The same in the memory of the Hessian, block by block.

    The work is done in the upper triangle. The lower one, and copies of the blocks on the diagonal,
    keep what a second attempt with more damping begins with.

    Args:
        matrix: the Hessian, symmetric, with a mean diagonal of 1; overwritten.
        block: columns at a time.
    """

    def __init__(self, matrix: Tensor, block: int) -> None:
        self.matrix = matrix
        starts = range(0, len(matrix), block)
        self.spans = [slice(start, min(start + block, len(matrix))) for start in starts]
        self.corners = [matrix[span, span].clone() for span in self.spans]

    def inverse_factor(self, damping: float) -> Tensor | None:
        """`inverse_factor` of the Hessian with so much added; None if it is not definite."""
        self._restore()
        self.matrix.diagonal().add_(damping)
        if not self._factor():
            return None
        self.matrix.triu_()
        self._invert()
        return self.matrix

    def _restore(self) -> None:
        for span, corner in zip(self.spans, self.corners, strict=True):
            self.matrix[span, span] = corner
            self.matrix[: span.start, span] = self.matrix[span, : span.start].T

    def _factor(self) -> bool:
        """The upper triangle of `U` with `H = U U^T`, from the last columns to the first."""
        H = self.matrix
        for at, columns in reversed(list(enumerate(self.spans))):
            backward, failed = torch.linalg.cholesky_ex(H[columns, columns].flip(0, 1))
            if int(failed):
                return False
            corner = backward.flip(0, 1)
            H[columns, columns] = corner
            above = H[: columns.start, columns]
            above.copy_(torch.linalg.solve_triangular(corner.T, above, upper=False, left=False))
            for rows in self.spans[:at]:
                rest = slice(rows.start, columns.start)  # of the upper triangle
                H[rows, rest].addmm_(above[rows], above[rest].T, alpha=-1)
        return True

    def _invert(self) -> None:
        """`U` becomes its inverse `X`, from the first columns to the last.

        With `X` the inverse of `A`, that of `[[A, b], [0, c]]` is `[[X, -X b / c], [0, 1 / c]]`.
        """
        U = self.matrix
        for at, columns in enumerate(self.spans):
            identity = torch.eye(columns.stop - columns.start, device=U.device)
            corner = torch.linalg.solve_triangular(U[columns, columns], identity, upper=True)
            for rows in self.spans[:at]:  # downwards: a block needs `b` from its own rows on
                rest = slice(rows.start, columns.start)
                U[rows, columns] = (U[rows, rest] @ U[rest, columns]) @ -corner
            U[columns, columns] = corner
