"""From alarms to a name: the first place whose inputs are right, how far the fault reaches, and when it shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from harness.locate.deviations import Unit, deviations, row_ratios
from harness.locate.places import kind_of, submodule_of
from harness.locate.replaying import Place, Replay
from harness.locate.where import Evidence, Scope
from harness.locate.yardstick import Alarm, Yardstick, alarms
from harness.numerics.bounds import exponential
from harness.numerics.constants import MOSTLY

_SHOWN = 6
#: Presentations that are run again to look into a module.
_LOOKED_INTO = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Named:
    """The first wrong place of one replay.

    Attributes:
        module: the reference's name; "" for the model's own forward.
        part: what of it, in words; "" for its result.
        scope: how far the fault reaches.
        place: where the first alarm was.
        conditions: when it shows.
        others: further modules that are wrong on their own inputs.
        evidence: measurements.
        inside: whether a look at the operations inside may say more.
        presentations: numbers of a few in which it is wrong.
    """

    module: str
    part: str
    scope: Scope
    place: Place
    conditions: tuple[str, ...]
    others: tuple[str, ...]
    evidence: tuple[Evidence, ...]
    inside: bool
    presentations: tuple[int, ...] = ()


def first_wrong(found: Replay, by: Yardstick, blocks: Sequence[str]) -> Named | None:
    """The first wrong place of a replay of submodules; None where all is as in correct implementations.

    Args:
        found: the candidate's replay.
        by: what it is measured by.
        blocks: names of the model's blocks.
    """
    raised = alarms(found, by)
    hidden = [one for one in raised if is_hidden(one.place, by)]
    order = by.recording.places
    for place in found.strange:
        if is_hidden(place, by):
            return _unfit(place, found.strange[place])
    if not hidden:
        return None
    first = min(hidden, key=lambda one: order[one.place]).place
    module, part, outside = _culprit(first, found, by, blocks, {one.place for one in raised})
    wrong = _modules(hidden, by, blocks)
    scope: Scope = "outside" if outside else _scope(wrong, blocks)
    own = [one for one in raised if one.place == first]
    blamed = [one for one in raised if one.place.module == module and one.place != first]
    unlike = [_unequal(place, found, by) for place in sorted(found.unlike, key=lambda one: order[one])]
    return Named(
        module=module,
        part=part,
        scope=scope,
        place=first,
        conditions=conditions(first, found, by, hidden),
        others=tuple(dict.fromkeys(one for one in wrong if one != module)),
        evidence=(*(evidence(one, by) for one in _telling([*own, *blamed])), *unlike[:_SHOWN]),
        inside=first.side == "output" and bool(first.module) and module == first.module,
        presentations=_few({one.unit.presentation for one in own if one.unit is not None}, by),
    )


def _few(wrong: set[int], by: Yardstick) -> tuple[int, ...]:
    """Presentations to look into a module with: two in which it is wrong, any two where it only is over all."""
    return tuple(sorted(wrong)[:_LOOKED_INTO] or range(min(_LOOKED_INTO, len(by.presentations))))


def first_inside(found: Replay, by: Yardstick, outer: Named) -> tuple[str, str, tuple[Evidence, ...]]:
    """Module, part and evidence of the first wrong operation inside of a wrong submodule.

    Where each operation inside is right by itself, what lies between them is wrong: the submodule keeps its name.
    """
    raised = [one for one in alarms(found, by) if one.place.module != outer.module]
    hidden = [one for one in raised if is_hidden(one.place, by) and one.place.module]
    if not hidden:
        return outer.module, outer.part, ()
    first = min(hidden, key=lambda one: by.recording.places[one.place]).place
    shown = tuple(evidence(one, by) for one in _telling([one for one in raised if one.place == first]))
    if first.side == "output":
        return first.module, "", shown
    inner = first.module.removeprefix(f"{outer.module}.")
    return outer.module, f"what goes into {inner}, though what the modules before it return is right", shown


def is_hidden(place: Place, by: Yardstick) -> bool:
    """Whether a place is of hidden states (or logits), which are put right; all else is looked at alone."""
    if place.side == "input":
        return True
    return place.side == "output" and Place(module=place.module, side="output", key="1") not in by.recording.places


def _culprit(
    first: Place, found: Replay, by: Yardstick, blocks: Sequence[str], raised: set[Place]
) -> tuple[str, str, bool]:
    """Module, part, and whether it lies outside of the model's modules."""
    base = blocks[0].rpartition(".")[0].rpartition(".")[0] if blocks else ""
    if first.side == "input":
        before = _never_ran(first, found, by, blocks)
        if before:
            return before, "it never runs", False
        parent = first.module.rpartition(".")[0]
        if first.module in blocks or (base and parent == base):
            return base, f"what goes into {first.module}, though what the modules before it return is right", False
        return (
            parent,
            f"what goes into {first.module.rpartition('.')[2]}, though what the modules before it return is right",
            False,
        )
    given = [one for one in by.recording.fed.get(first.module, ()) if one in raised or one in found.unlike]
    if given:
        source = min(_chain(given, found, by, raised), key=by.recording.places.__getitem__)
        if source.side == "output":
            return source.module, "", False
        handed = source.module in ("", base) or not blocks
        name = _argument(source.key)
        if handed:
            return "", f"the {name} that the model is handed", True
        return base, f"the {name} that {source.module} is handed", False
    if _reads_cache(first, found, by):
        return first.module, "what it reads from the KV cache: it is right where nothing was cached before", False
    return first.module, "", False


def _reads_cache(first: Place, found: Replay, by: Yardstick) -> bool:
    """Whether an attention is wrong only behind cached tokens, of which its cache holds others than the reference's."""
    passes = by.recording.passes
    behind = {one.number for one in passes if one.seen_BS.shape[1] > one.real_BT.shape[1]}
    scale = by.limits[first].scale if first in by.limits else None
    shown = deviations(found, passes).get(first)
    if scale is None or shown is None or len(shown.squares_N) != len(scale.squares_N):
        return False
    worst = exponential(by.limits[first].bounds[None][1].failing[1])
    bad = set(shown.passes_N[row_ratios(shown, scale) > worst].tolist())
    caches = [one for one in (*found.strange, *_wrong_caches(found, by)) if one.side == "cache"]
    return bool(bad) and bad <= behind and bool(caches)


def _wrong_caches(found: Replay, by: Yardstick) -> list[Place]:
    return [one.place for one in alarms(found, by) if one.place.side == "cache"]


def _chain(given: Sequence[Place], found: Replay, by: Yardstick, raised: set[Place]) -> list[Place]:
    """What was wrong already in what made these: tables are made of positions, masks of a mask."""
    sources = list(given)
    for one in given:
        if one.side == "output":
            sources += [
                other for other in by.recording.fed.get(one.module, ()) if other in found.unlike or other in raised
            ]
        elif "mask" in one.key or "alibi" in one.key:
            sources += [other for other in found.unlike if "mask" in other.key]
    return sources


def _argument(key: str) -> str:
    return f"argument {int(key) + 1}" if key.isdigit() else key


def _never_ran(first: Place, found: Replay, by: Yardstick, blocks: Sequence[str]) -> str:
    """A block that the reference ran before this place and the candidate never did."""
    order = by.recording.places
    for block in blocks:
        place = Place(module=block, side="output", key="0")
        if block not in found.called and place in order and order[place] < order[first]:
            return block
    return ""


def _modules(hidden: Sequence[Alarm], by: Yardstick, blocks: Sequence[str]) -> list[str]:
    """Submodules with an alarm of their own, in order."""
    order = by.recording.places
    places = sorted({one.place for one in hidden}, key=order.__getitem__)
    return list(dict.fromkeys(submodule_of(one.module, blocks) for one in places))


def _scope(wrong: Sequence[str], blocks: Sequence[str]) -> Scope:
    kinds = {kind_of(one) for one in wrong}
    if len(wrong) == 1 or (len({_block(one, blocks) for one in wrong} - {""}) == 1 and len(kinds) == 1):
        return "local"
    per_kind = {kind: {_block(one, blocks) for one in wrong if kind_of(one) == kind} for kind in kinds}
    everywhere = [kind for kind, where in per_kind.items() if len(where) == len(blocks) > 1]
    return "configuration" if everywhere else "several"


def _block(name: str, blocks: Sequence[str]) -> str:
    return next((block for block in blocks if name == block or name.startswith(f"{block}.")), "")


# --- when it shows -----------------------------------------------------------------------------


def conditions(place: Place, found: Replay, by: Yardstick, raised: Sequence[Alarm]) -> tuple[str, ...]:
    """When a place is wrong: "only in decode", "only with padding", "only from position 17 on"."""
    shown = deviations(found, by.recording.passes).get(place)
    if shown is None:
        return ()
    wrong = {one.unit for one in raised if one.place == place and one.unit is not None}
    right = set(shown.units) - wrong
    if not wrong:
        return ()
    said = list(_by_unit(wrong, right, by))
    limits = by.limits[place]
    names = by.limits[place].bounds[None]
    worst = exponential(names[1].failing[1])
    bad = row_ratios(shown, limits.scale) > worst
    if bad.any() and not bad.all() and (shown.positions_N >= 0).all():
        said += _by_row(
            bad,
            shown.positions_N,
            shown.batch_row_N,
            shown.unit_N,
            [by.presentations[u.presentation].padded for u in shown.units],
        )
    return tuple(said)


def _by_unit(wrong: set[Unit], right: set[Unit], by: Yardstick) -> list[str]:
    said = []
    phases = {one.phase for one in wrong}
    if len(phases) == 1 and any(one.phase not in phases for one in right):
        clean = {one.presentation for one in right if one.phase not in phases}
        if {one.presentation for one in wrong} <= clean:
            said.append(f"only in {phases.pop()}")
    kinds = {one.presentation for one in wrong}
    others = {one.presentation for one in right} - kinds
    if others:
        names = [by.presentations[number].name for number in sorted(kinds)]
        padded = {by.presentations[number].padded for number in kinds}
        if padded == {True} and not any(by.presentations[number].padded for number in others):
            said.append("only in a padded batch")
        elif padded == {False} and all(by.presentations[number].padded for number in others):
            said.append("only in a batch of one row")
        elif len(names) == 1:
            said.append(f"only in {names[0]}")
    return said


def _by_row(
    bad: np.ndarray, position: np.ndarray, row: np.ndarray, unit: np.ndarray, padded: Sequence[bool]
) -> list[str]:
    said = []
    start = int(position[bad].min())
    later = position >= start
    if start > 0 and later.any() and bad[later].mean() > MOSTLY:
        said.append(f"only from position {start} on")
    inside = np.array(padded)[unit]
    rows = set(row[bad & inside].tolist())
    if bad[inside].any() and not bad[~inside].any() and len(rows) == 1 and len(set(row[inside].tolist())) > 1:
        said.append(f"only in batch row {rows.pop()}")
    return said


# --- evidence ----------------------------------------------------------------------------------


def evidence(one: Alarm, by: Yardstick) -> Evidence:
    """An alarm in the words of a report."""
    gain = one.statistic == "gain"
    usual = one.bound.centre
    high = one.bound.failing[1] if one.value > usual else one.bound.failing[0]
    return Evidence(
        module=one.place.module,
        part=f"{one.place.side}" + ("" if one.place.side == "output" and one.place.key == "0" else f" {one.place.key}"),
        statistic=one.statistic,
        ratio=one.value - usual if gain else exponential(one.value - usual),
        limit=abs(high - usual) if gain else exponential(high - usual),
        z=one.z,
        unit="all" if one.unit is None else f"{by.presentations[one.unit.presentation].name}, {one.unit.phase}",
    )


def _telling(raised: Sequence[Alarm]) -> list[Alarm]:
    """A few alarms: those over all units, then the largest of others."""
    return sorted(raised, key=lambda one: (one.unit is not None, -abs(one.z)))[:_SHOWN]


def _unequal(place: Place, found: Replay, by: Yardstick) -> Evidence:
    number, wrong, total = found.unlike[place][0]
    one = by.recording.passes[number]
    return Evidence(
        module=place.module,
        part=f"{_argument(place.key)}",
        statistic="equal",
        ratio=wrong / total,
        limit=0.0,
        z=float("inf"),
        unit=f"{wrong} of {total} entries first in {by.presentations[one.presentation].name}, {one.phase}",
    )


def _unfit(place: Place, reason: str) -> Named:
    return Named(
        module=place.module,
        part=reason,
        scope="local",
        place=place,
        conditions=(),
        others=(),
        evidence=(),
        inside=False,
    )
