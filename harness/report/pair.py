"""Two candidates of one golden against each other, as a table."""

from __future__ import annotations

from harness.report.characters import one_line
from harness.report.columns import columns
from harness.report.terminal import headline
from harness.values import Pair

_TITLES = ("run", "first", "second", "apart", "equal to the bit", "tokens")


def pair_to_text(pair: Pair) -> str:
    """The verdict on each, and a line for each pass: errors, and how far apart, in units of the coarser round-off."""
    rows = [
        (
            one_line(f"{one.run}/{one.view}") + (f" visit {one.repeat + 1}" if one.repeat else ""),
            *("-" if value is None else f"{value:.2f}" for value in (one.first, one.second, one.apart)),
            "-" if one.equal is None else f"{one.equal:.1%}",
            f"{one.differ} of {one.steps} differ",
        )
        for one in pair.rows
    ]
    return "\n".join(
        [f"first:  {headline(pair.first)}", f"second: {headline(pair.second)}", *columns([_TITLES, *rows])]
    )
