"""Lines of a report that only a candidate of several ranks has."""

from __future__ import annotations

from collections.abc import Iterator

from harness.values import Sharding


def sharding_lines(sharding: Sharding | None, *, ok: bool) -> Iterator[str]:
    """How its sums explain its error where the verdict is ok, and the first rank that was wrong."""
    if sharding is None:
        return
    if sharding.first_wrong:
        yield f"first wrong: {sharding.first_wrong}"
    if sharding.reason:
        yield f"not seen: inside the ranks: {sharding.reason}"
    if ok and sharding.plain is not None and sharding.emulated is not None and sharding.equal is not None:
        yield (
            f"sums of {sharding.ranks} ranks: error {sharding.emulated:.2g} x round-off about a reference that sums as "
            f"they do ({sharding.equal:.1%} of positions equal to the bit), {sharding.plain:.2f} about the plain one"
        )
