"""Two judges on the same trials: who finds what the other misses, and how far apart their totals are."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from harness.numerics.bounds import normal_quantile

#: Confidence of the intervals, half of the rest on each side.
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class Paired:
    """Trials by who finds them.

    The p-value and the interval take trials as independent. Those of one bug on several hosts and prompts are not, so
    that both are narrower than they should be: a difference that they do not show is not there, one that they barely
    show may be chance.
    """

    both: int
    first: int
    second: int
    neither: int

    @property
    def count(self) -> int:
        return self.both + self.first + self.second + self.neither

    @property
    def difference(self) -> float:
        """Share that the first finds less the share that the second finds; 0 without trials."""
        return (self.first - self.second) / self.count if self.count else 0.0

    @property
    def p(self) -> float:
        """McNemar's test, exact and two-sided: the trials that one alone finds are as likely the other's."""
        from scipy.stats import binomtest

        discordant = self.first + self.second
        return float(binomtest(self.first, discordant).pvalue) if discordant else 1.0

    @property
    def interval(self) -> tuple[float, float]:
        """Limits of the difference: method 10 of Newcombe 1998 (Statistics in Medicine 17, 2635-2650), as in
        rforge/ebuzh pkg/biostatUZH/R/confIntPairedProportion.R.

        Wilson's intervals of the two shares put together, with the correlation that the pairs have; (-1, 1)
        without trials.
        """
        if not self.count:
            return (-1.0, 1.0)
        one, other = (self.both + self.first) / self.count, (self.both + self.second) / self.count
        (low_one, high_one), (low_other, high_other) = wilson(one, self.count), wilson(other, self.count)
        phi = self._correlation()
        down = _joined(one - low_one, high_other - other, phi)
        up = _joined(high_one - one, other - low_other, phi)
        return (max(-1.0, self.difference - down), min(1.0, self.difference + up))

    def _correlation(self) -> float:
        """Phi of the two by two table, its numerator less n / 2 where that leaves it positive (method 10)."""
        margins = (
            (self.both + self.first)
            * (self.second + self.neither)
            * (self.both + self.second)
            * (self.first + self.neither)
        )
        product = self.both * self.neither - self.first * self.second
        corrected = max(0.0, product - self.count / 2) if product > 0 else float(product)
        return corrected / math.sqrt(margins) if margins else 0.0


def _joined(one: float, other: float, phi: float) -> float:
    # The square is not negative but by rounding: phi is a correlation.
    return math.sqrt(max(0.0, one**2 - 2 * phi * one * other + other**2))


def paired(pairs: Iterable[tuple[bool, bool]]) -> Paired:
    """Trials by whether the first and the second judge find them."""
    counts = {(True, True): 0, (True, False): 0, (False, True): 0, (False, False): 0}
    for first, second in pairs:
        counts[first, second] += 1
    return Paired(
        both=counts[True, True],
        first=counts[True, False],
        second=counts[False, True],
        neither=counts[False, False],
    )


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's score interval of a share of ``count`` trials, at least one."""
    z = normal_quantile((1 + CONFIDENCE) / 2)
    middle = share + z**2 / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    scale = 1 + z**2 / count
    return (max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale))
