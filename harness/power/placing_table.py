"""How often `locate` names the right module, as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from harness.report.columns import columns

if TYPE_CHECKING:
    from harness.power.placing import Placed


def placed_to_text(placed: Sequence[Placed]) -> str:
    """Two tables, by precision: bugs of one submodule, and modules of correct implementations that were named."""
    return "\n".join(_lines(placed))


def _lines(placed: Sequence[Placed]) -> Iterator[str]:
    ran = [one for one in placed if not one.reason]
    precisions = sorted({one.precision for one in ran}, reverse=True)
    rows = [["precision", "bugs of one submodule", "seen", "named right", "share", "elsewhere", "seen"]]
    for precision in precisions:
        bugs = [one for one in ran if one.precision == precision and one.kind == "bug"]
        single = [one for one in bugs if one.single]
        seen = [one for one in single if one.found]
        right = [one for one in seen if one.right]
        others = [one for one in bugs if not one.single]
        share = f"{len(right) / len(seen):.1%}" if seen else "-"
        rows.append(
            [precision, str(len(single)), str(len(seen)), str(len(right)), share, str(len(others)),
             str(sum(one.found for one in others))]
        )  # fmt: skip
    yield from columns(rows)
    yield ""
    rows = [["precision", "correct implementations", "module tests", "modules named", "controls", "named"]]
    for precision in precisions:
        benign = [one for one in ran if one.precision == precision and one.kind == "benign"]
        controls = [one for one in ran if one.precision == precision and one.kind == "control"]
        named = sum(1 + len(one.others) for one in benign if one.found)
        rows.append(
            [precision, str(len(benign)), str(sum(one.modules for one in benign)), str(named), str(len(controls)),
             str(sum(one.found for one in controls))]
        )  # fmt: skip
    yield from columns(rows)
    wrong = [one for one in ran if one.kind == "bug" and one.single and one.found and not one.right]
    named_wrongly = [one for one in ran if one.kind != "bug" and one.found]
    if wrong or named_wrongly:
        yield ""
    for one in wrong:
        yield f"{one.name} on {one.host}, {one.precision}: named {_name(one)}, is in {', '.join(one.touched[:3])}"
    for one in named_wrongly:
        yield f"{one.name} ({one.kind}) on {one.host}, {one.precision}: named {_name(one)}"


def _name(one: Placed) -> str:
    return (one.named or "the model") + (f", {one.part}" if one.part else "")
