"""Tables of detection as text for the terminal, 120 columns wide, and as plain JSON types."""

from __future__ import annotations

import math
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, get_args

from harness.mutations.mutation import Group, Subtlety
from harness.power.curves import Curve, Point
from harness.power.detection import Comparison, Row, Share, Table
from harness.power.judges import ALL, OURS, alarms, is_judged
from harness.power.nulls import CONFIDENCE
from harness.power.survivors import REASONS, Survivor
from harness.power.trial import Trial

_WIDTH = 120
_NAME = 38
_BESIDE = 48
_GROUP = 6
_GROUPS: tuple[Group, ...] = get_args(Group)
_SUBTLETIES: tuple[Subtlety, ...] = get_args(Subtlety)

#: Peers in all tables but the first, the best first, and survivors of one reason; JSON has them all.
_PEERS = 12
_LISTED = 40

NOTE = (
    "null is what is not finite: a threshold that no score passes, an S/N beyond what was tried, a share of nothing. "
    "A point of 0 lies below the smallest S/N tried. A calibrated threshold is the largest score of the same correct "
    "implementations that false alarms are counted on; per host, of those of each host."
)


def tables_to_text(tables: Sequence[Table]) -> str:
    """All precisions, one below the other, without a final newline."""
    return "\n\n".join(_text(table) for table in tables) if tables else "nothing was judged"


def beside_tables(trials: Iterable[Trial], tables: Sequence[Table]) -> list[str]:
    """A line for each bug that was judged in a precision without a table: no correct implementation was run in it."""
    shown = {table.precision for table in tables}
    by_bug: dict[tuple[str, str], list[Trial]] = defaultdict(list)
    for trial in trials:
        if trial.kind == "bug" and trial.precision not in shown and is_judged(trial):
            by_bug[trial.precision, trial.name].append(trial)
    return [
        f"{precision} alone: {name}: {sum(alarms(trial, ALL) for trial in members)} of {len(members)} found"
        for (precision, name), members in sorted(by_bug.items())
    ]


def _text(table: Table) -> str:
    parts = [
        _headline(table),
        _targets(table),
        _totals(table),
        _by_group(table),
        _points(table),
        _beside(table),
        _survivors(table.survivors),
        _aside(table),
    ]
    return "\n\n".join("\n".join(_wrapped(lines)) for lines in parts if lines)


def _wrapped(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        yield from textwrap.wrap(
            line, _WIDTH, subsequent_indent=" " * 8, break_on_hyphens=False, replace_whitespace=False
        )


def _headline(table: Table) -> list[str]:
    return [
        f"{table.precision}: mean of a run and its verdict {table.seconds:.2f} s, "
        f"of all the peers' rules together {table.cost:.2f} s"
    ]


def _targets(table: Table) -> list[str]:
    return [f"{'reached' if one.reached else 'MISSED ':<8} {one.asked}: {one.shown}" for one in table.targets]


# --- totals ------------------------------------------------------------------------------------


def _totals(table: Table) -> list[str]:
    titles = (("found", 9), ("", 6), ("S/N >= 3", 10), *((name, 10) for name in _SUBTLETIES), ("false alarms", 14))
    head = "judge".ljust(_NAME) + "".join(title.ljust(width) for title, width in titles) + "at most"
    lines = [head.rstrip(), *(_total(row, table.precision) for row in table.rows)]
    lines.append(f"at most: {CONFIDENCE:.0%} one-sided bound of the share of false alarms")
    if any(_is_blind(row, table.precision) for row in table.rows):
        lines.append("* no threshold: a correct implementation has the worst score there is")
    if any(row.silent for row in table.rows):
        lines.append("not all rules speak of every bug: each share is of what the rule judged")
    return lines


def _total(row: Row, precision: str) -> str:
    cells = [(_counts(row.total), 9), (percent(row.total), 6), (_counts(row.strong), 10)]
    cells += [(_counts(row.subtleties.get(name, Share(found=0, total=0))), 10) for name in _SUBTLETIES]
    cells.append((f"{row.false.alarms}/{row.false.count}", 14))
    mark = " *" if _is_blind(row, precision) else ""
    name = row.judge.name.ljust(_NAME)
    return name + "".join(text.ljust(width) for text, width in cells) + f"{row.false.bound:.2%}{mark}"


def _is_blind(row: Row, precision: str) -> bool:
    """Whether no threshold is left: a correct implementation scores inf."""
    return min(row.judge.within(precision).values(), default=0.0) == math.inf


def _counts(share: Share) -> str:
    return f"{share.found}/{share.total}" if share.total else "-"


def percent(share: Share) -> str:
    """In whole percent, rounded down, so that 100% is all of them."""
    return f"{100 * share.found // share.total}%" if share.total else "-"


def _chosen(table: Table) -> list[Row]:
    """Ours, and the best of the rules with no more false alarms."""
    eligible = [one.peer for one in table.comparisons if one.ours == ALL and one.eligible]
    best = [row.judge for row in table.rows if row.judge in eligible][:_PEERS]
    return [row for row in table.rows if row.judge in OURS or row.judge in best]


def _by_group(table: Table) -> list[str]:
    if not table.rows:
        return []
    sizes = {name: max(row.groups[name].total if name in row.groups else 0 for row in table.rows) for name in _GROUPS}
    lines = [
        "by group".ljust(_NAME) + "".join(_short(name).ljust(_GROUP) for name in _GROUPS),
        "bugs".ljust(_NAME) + "".join(f"{sizes[name]}".ljust(_GROUP) for name in _GROUPS),
    ]
    for row in _chosen(table):
        shares = [row.groups.get(name, Share(found=0, total=0)) for name in _GROUPS]
        lines.append(row.judge.name.ljust(_NAME) + "".join(percent(share).ljust(_GROUP) for share in shares))
    return [line.rstrip() for line in lines]


def _short(group: str) -> str:
    """The initials of two words, the beginning of one."""
    words = group.split()
    return "".join(word[0] for word in words) if len(words) > 1 else group[: _GROUP - 1]


# --- curves ------------------------------------------------------------------------------------


def _points(table: Table) -> list[str]:
    lines = ["S/N at which it is found".ljust(_NAME) + "half of the time".ljust(34) + "19 times in 20"]
    for row in _chosen(table):
        line = table.curves.get(row.judge.name)
        if line is not None:
            even, nearly = point_words(line.even, line), point_words(line.nearly, line)
            lines.append(row.judge.name.ljust(_NAME) + even.ljust(34) + nearly)
    return lines if len(lines) > 1 else []


def point_words(point: Point, line: Curve) -> str:
    """A point with its interval; what lies outside the S/N that were tried is so called."""
    value, low, high = (_edge(one, line) for one in (point.value, point.low, point.high))
    return value if value == low == high else f"{value} ({low} to {high})"


def _edge(value: float, line: Curve) -> str:
    if value == 0:
        return f"< {line.smallest:.2g}"
    return f"> {line.largest:.2g}" if math.isinf(value) else f"{value:.2g}"


# --- beside the peers --------------------------------------------------------------------------


def _beside(table: Table) -> list[str]:
    lines = []
    for name in dict.fromkeys(one.ours.name for one in table.comparisons):
        mine = [one for one in table.comparisons if one.ours.name == name and one.eligible]
        if not mine:
            continue
        titles = "ours only  theirs only  difference (95 %)            p"
        lines.append(f"{name} beside".ljust(_BESIDE) + titles)
        lines += [_compared(one) for one in mine[:_PEERS]]
        if len(mine) > _PEERS:
            lines.append(f"  and {len(mine) - _PEERS} that find less")
    if lines:
        lines.append("beside rules with no more false alarms on the same correct implementations; found by one alone")
    return lines


def _compared(one: Comparison) -> str:
    low, high = one.counts.interval
    difference = f"{one.counts.difference:+.1%} ({low:+.1%} to {high:+.1%})"
    return (
        f"  {one.peer.name}".ljust(_BESIDE)
        + f"{one.counts.first}".ljust(11)
        + f"{one.counts.second}".ljust(13)
        + difference.ljust(29)
        + f"{one.counts.p:.2g}"
    )


# --- survivors ---------------------------------------------------------------------------------


def _survivors(survivors: Sequence[Survivor]) -> list[str]:
    if not survivors:
        return ["no bug as reported is missed"]
    counts = Counter(one.reason for one in survivors)
    lines = ["missed: " + ", ".join(f"{counts[reason]} {reason}" for reason in REASONS if counts[reason])]
    for reason in REASONS:
        members = [one for one in survivors if one.reason == reason]
        # What a peer finds has a line of its own, and is never cut.
        alone = [one for one in members if one.finders or reason == REASONS[0]]
        by_name: dict[str, list[Survivor]] = defaultdict(list)
        for one in members:
            if one not in alone:
                by_name[one.trial.name].append(one)
        lines += [_missed(one) for one in alone]
        together = [_missed_together(reason, several) for several in by_name.values()]
        lines += together[:_LISTED]
        if len(together) > _LISTED:
            lines.append(f"  and {len(together) - _LISTED} more: {reason}")
    return lines


def _missed(one: Survivor) -> str:
    found = f"; found by {_several(one.finders)}" if one.finders else ""
    return f"  {_where(one.trial)}: {one.explanation}{found}"


def _missed_together(reason: str, members: Sequence[Survivor]) -> str:
    """One bug on several hosts, missed for one reason."""
    if len(members) == 1:
        return _missed(members[0])
    hosts = ", ".join(sorted({one.trial.host for one in members}))
    sizes = [one.trial.signal for one in members if one.trial.signal is not None]
    said = f", S/N {min(sizes):.2g} to {max(sizes):.2g}" if sizes and max(sizes) > 0 else ""
    if not said and len({one.explanation for one in members}) == 1:
        return f"  {members[0].trial.name} on {hosts}: {members[0].explanation}"
    return f"  {members[0].trial.name} on {hosts}: {reason}{said}"


def _several(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _where(trial: Trial) -> str:
    return f"{trial.name} on {trial.host}" + (f" group {trial.group}" if trial.group else "")


def _aside(table: Table) -> list[str]:
    lines = [
        f"not counted, {share.total} x {reason}: {ALL.name} finds {share.found}"
        for reason, share in table.aside.items()
    ]
    by_bug: dict[tuple[str, str], list[Trial]] = defaultdict(list)
    for trial in table.small:
        by_bug[trial.name, trial.status].append(trial)
    together = [_small(*key, members) for key, members in sorted(by_bug.items())]
    lines += together[:_LISTED]
    if len(together) > _LISTED:
        lines.append(f"  and {len(together) - _LISTED} more")
    lines += [f"not judged, {count} x {status}" for status, count in table.unjudged.items()]
    if table.never:
        lines.append(f"never judged: {', '.join(table.never)}")
    return lines


def _small(name: str, status: str, members: Sequence[Trial]) -> str:
    """One bug on the hosts where it is too small to count, with the largest of its sizes."""
    hosts = ", ".join(sorted({one.host for one in members}))
    return f"  {name} on {hosts}: {_sizes(max(members, key=lambda one: one.error or 0.0))}, {status}"


def _sizes(trial: Trial) -> str:
    known = (("error", trial.error), ("S/N", trial.signal))
    return ", ".join(f"{name} {size:.2g}" for name, size in known if size is not None) or "no size measured"


# --- JSON --------------------------------------------------------------------------------------


def tables_to_dict(tables: Sequence[Table]) -> dict[str, Any]:
    """Everything as plain JSON types; ``note`` says what null means."""
    plain: dict[str, Any] = _plain({"note": NOTE, "precisions": {one.precision: _table(one) for one in tables}})
    return plain


def _table(table: Table) -> dict[str, Any]:
    return {
        "seconds": table.seconds,
        "cost": table.cost,
        "targets": [asdict(one) for one in table.targets],
        "judges": [_row(row, table.curves.get(row.judge.name), table.precision) for row in table.rows],
        "comparisons": [_comparison(one) for one in table.comparisons],
        "survivors": [_survivor(one) for one in table.survivors],
        "not counted": {reason: asdict(share) for reason, share in table.aside.items()},
        "small": [_named(trial) for trial in table.small],
        "not judged": table.unjudged,
        "never judged": table.never,
    }


def _row(row: Row, line: Curve | None, precision: str) -> dict[str, Any]:
    thresholds = row.judge.within(precision)
    return {
        "judge": row.judge.name,
        "source": row.judge.source,
        "sees": row.judge.sees,
        "threshold": thresholds.get("") if "" in thresholds else thresholds or None,
        "kind": row.judge.threshold,
        "total": asdict(row.total),
        "strong": asdict(row.strong),
        "groups": {name: asdict(share) for name, share in row.groups.items()},
        "subtleties": {name: asdict(share) for name, share in row.subtleties.items()},
        "false": {**asdict(row.false), "bound": row.false.bound},
        "silent": row.silent,
        "curve": None if line is None else asdict(line),
    }


def _comparison(one: Comparison) -> dict[str, Any]:
    return {
        "ours": one.ours.name,
        "peer": one.peer.name,
        "eligible": one.eligible,
        **asdict(one.counts),
        "difference": one.counts.difference,
        "interval": one.counts.interval,
        "p": one.counts.p,
    }


def _survivor(one: Survivor) -> dict[str, Any]:
    return {
        **_named(one.trial),
        "reason": one.reason,
        "explanation": one.explanation,
        "more_tokens": one.more_tokens,
        "finders": one.finders,
    }


def _named(trial: Trial) -> dict[str, Any]:
    names = ("name", "host", "group", "status", "signal", "error", "tokens", "finding")
    return {name: getattr(trial, name) for name in names}


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value
