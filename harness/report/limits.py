"""What is said of a roofline: the machine's speeds, shares of the limit, and what a small share means."""

from __future__ import annotations

from collections.abc import Sequence

from harness.report.characters import one_line
from harness.speed.roofline import Roofline

#: Below this share of the limit more time goes elsewhere than into what the limit counts.
_HALF = 0.5


def percent(share: float) -> str:
    """A share for people; small ones keep two digits."""
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def roofline_line(found: Roofline, name: str) -> str:
    """The speeds that limits are reckoned with, or why there are none; "" where nothing was asked."""
    if found.machine is None:
        return f"limit of the {name}: not known ({one_line(found.reason)})" if found.reason else ""
    one = found.machine
    where = f"{one.threads} thread{'s' if one.threads > 1 else ''}" if one.device == "cpu" else one.device
    speeds = f"copies at {one.bandwidth / 1e9:.3g} GB/s, {one.dtype} products at {one.rate / 1e9:.3g} G operations/s"
    return f"limit of the {name}: {speeds} ({where}), measured in its process"


def neither_binds(shares: Sequence[float]) -> list[str]:
    """A line where no share of the limit reaches a half."""
    if not shares or max(shares) >= _HALF:
        return []
    said = f"at most {percent(max(shares))} of the limit is reached: neither bytes nor operations bind here"
    return [f"{said}; a step of a small model waits for Python and for the launch of its kernels"]
