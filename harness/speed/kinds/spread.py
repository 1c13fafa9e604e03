"""What several runs took, in three numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """The middle of several values and where the middle half of them lies.

    Attributes:
        low: a quarter is smaller.
        middle: the median.
        high: a quarter is larger.
    """

    low: float
    middle: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Of one value or more; linear between two of them."""
    low, middle, high = (float(one) for one in np.percentile(values, (25, 50, 75)))
    return Spread(low=low, middle=middle, high=high)
