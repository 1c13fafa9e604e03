"""The columns that templates are kept in: those that the head can reach, where a bug of the model shows as a whole.

Sixteen random projections tell how large an error is; how much of it lies along one direction they tell with the
square root of (rank / 16) times the noise. Logits of V columns are the head's matrix times d numbers: in its column
space nothing of a bug is lost, and what is left out, the rounding of the logits themselves, is round-off alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from harness.errors import ModelError
from harness.numerics.constants import COORDINATES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_KEY = 0x62617369
_HARDLY = 1e-6


def basis_of(model: PreTrainedModel, vocabulary: int) -> NDArray[np.float64]:
    """The centred columns of the head, [vocabulary, B], each orthogonal to a constant.

    Of a model that is wider than COORDINATES, as many random combinations of them. A function of the weights alone:
    what one machine showed in this basis another may judge.

    Raises:
        ModelError: for a model without a head.
    """
    head: Any = model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(model).__name__} has no output embedding", fix="Leave out --diagnose")
    weight: NDArray[np.float64] = head.weight.detach().double().cpu().numpy()[:vocabulary]
    weight = weight - weight.mean(axis=0)
    if weight.shape[1] > COORDINATES:
        generator = np.random.Generator(np.random.Philox(key=_KEY))
        weight = weight @ generator.standard_normal((weight.shape[1], COORDINATES))
    return np.ascontiguousarray(weight)


def turn_of(basis: NDArray[np.float64]) -> NDArray[np.float64]:
    """What turns products with the basis into coordinates in an orthonormal one of the same span, [B, R]."""
    _, sizes, rows = np.linalg.svd(basis, full_matrices=False)
    # A direction that the head hardly reaches is rounding.
    kept = sizes > _HARDLY * sizes[0]
    return np.ascontiguousarray(rows[kept].T / sizes[kept])
