"""Error-guided budgets: which threshold each head gets, by what it costs the velocity (HASTE, arXiv 2605.14513).

The cut between low and high frequencies is ours, a quarter of a cycle per sample: the paper gives none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lvsa_compile.errors import MissingPackageError, OptionError, ShapeError

BANDS = {"LL": 1.0, "LH": 0.5, "HL": 0.01, "HH": 0.01}
"""Weights of low and high frequencies: of time by the first letter, of space by the second."""
_CUT = 0.25
_LEAST_ENERGY = 1e-8


def band_errors(sparse: Tensor, dense: Tensor) -> dict[str, Tensor]:
    """Energy of the difference of two velocities ``[C, T, H, W]`` in each band, over the energy of the dense one."""
    if sparse.dim() != 4 or sparse.shape != dense.shape:
        raise ShapeError("sparse", tuple(sparse.shape), f"it does not fit a dense velocity {tuple(dense.shape)}", "Give two [C, T, H, W].")
    wrong, right = (torch.fft.fftn(each.double(), dim=(1, 2, 3)).abs().square() for each in (sparse - dense, dense))
    time, rows, columns = (torch.fft.fftfreq(size, dtype=torch.float64, device=dense.device) for size in dense.shape[1:])
    in_time = (time.abs() < _CUT)[:, None, None]
    in_space = ((rows[:, None] ** 2 + columns[None, :] ** 2).sqrt() < _CUT)[None]
    total = right.sum() + _LEAST_ENERGY
    slow, fast, coarse, fine = in_time, ~in_time, in_space, ~in_space
    bands = {"LL": slow & coarse, "LH": slow & fine, "HL": fast & coarse, "HH": fast & fine}
    return {name: (wrong * band).sum() / total for name, band in bands.items()}


def spectral_error(sparse: Tensor, dense: Tensor) -> Tensor:
    """How far a velocity is from the dense one, slow and coarse parts counting most: a scalar, float64.

    Args:
        sparse, dense: what the model predicts, ``[C, T, H, W]`` in latents.

    Raises:
        ShapeError: they are no two velocities of one shape.

    Example:
        >>> spectral_error(dense, dense)
        tensor(0., dtype=torch.float64)
    """
    errors = band_errors(sparse, dense)
    return torch.stack([BANDS[name] * error for name, error in errors.items()]).sum()


def allot(error: Tensor | Sequence[Sequence[float]], sparsity: Tensor | Sequence[Sequence[float]], required: float) -> Tensor:
    """One candidate for each head, so that errors are least in sum and sparsities reach ``required`` in sum.

    Args:
        error: of each candidate, ``[heads, K]``.
        sparsity: of each candidate, ``[heads, K]``.
        required: least sum of sparsities over the heads, in the units of ``sparsity``.

    Returns:
        The candidate of each head, int64 ``[heads]``: exact, by integer programming.

    Raises:
        ShapeError: the tables do not fit.
        OptionError: no choice reaches ``required``.
        MissingPackageError: scipy is not installed.

    Example:
        >>> allot([[1.0, 4.0], [2.0, 3.0]], [[0.1, 0.5], [0.1, 0.5]], required=0.6)
        tensor([0, 1])
    """
    errors, sparsities = (torch.as_tensor(each, dtype=torch.float64) for each in (error, sparsity))
    if errors.dim() != 2 or errors.shape != sparsities.shape:
        problem = f"it does not fit errors {tuple(errors.shape)}"
        raise ShapeError("sparsity", tuple(sparsities.shape), problem, "Give [heads, candidates] of both.")
    most = float(sparsities.amax(1).sum())
    if required > most:
        raise OptionError("required", required, f"the sparsest candidates make {most:g} in sum", "Give at most that.")
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import eye, kron, vstack
    except ImportError:
        raise MissingPackageError("allotting thresholds to heads", "scipy", "calibrate") from None
    heads, candidates = errors.shape
    one_each = kron(eye(heads), [[1.0] * candidates])
    limits = LinearConstraint(
        vstack([one_each, sparsities.reshape(1, -1).numpy()]), [*[1.0] * heads, float(required)], [*[1.0] * heads, float("inf")]
    )
    scale = float(errors.abs().amax()) or 1.0
    found = milp(
        (errors / scale).flatten().numpy(), integrality=[1] * errors.numel(), bounds=Bounds(0, 1), constraints=limits,
        options={"mip_rel_gap": 0.0},
    )  # fmt: skip
    if found.x is None:
        raise OptionError("required", required, f"no choice was found ({found.message})", "Give less.")
    return torch.from_numpy(found.x).reshape(heads, candidates).argmax(1)
