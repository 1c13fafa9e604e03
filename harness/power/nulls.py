"""The null bench: how often a check alarms on implementations that are correct (numerics.md 2.5 d).

Held-out families (harness/mutations/benign.py) x shipped models x precisions x groups of prompts that are made for
it: every alarm is a false one. A pilot on other prompts measures how far correct implementations scatter, which is
what the rule must allow for; the nulls then judge each family by the scatter of the *others*.

A working directory holds goldens and one JSON line a verdict, so that a run that was ended goes on where it was.
Remove its `goldens` when the way replicas are drawn has changed: a golden does not say how they were.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from harness import flow
from harness.mutations.benign import FAMILIES, kin_of
from harness.numerics.constants import SPREADS
from harness.numerics.statistics import MAGNITUDES, PROMPT, RANGE
from harness.power import ledger
from harness.power.drawn import MODELS, NULLS, PILOT, PRECISIONS, Bench, generate_suite, recorded
from harness.power.ledger import SKIPPED, WHOLE, Late, Progress, Report, Shard, of_this_rule, rule_version
from harness.power.opening import opened, part_missing
from harness.values import Finding, Golden, Status, Verdict

#: Verdicts that call a correct implementation wrong. What was not judged (unmeasured, stale, error, skipped) is
#: neither an alarm nor a success: it is counted apart.
ALARMS = frozenset({Status.DEVIATES.value, Status.STRUCTURAL.value, Status.NONDETERMINISTIC.value})
PASSES = frozenset({Status.IDENTICAL.value, Status.DRIFT.value})

#: Confidence of the one-sided bounds (numerics 2.5 d).
CONFIDENCE = 0.95

#: Precision -> statistic -> (largest, the family that has it, the largest of the other families).
Table = Mapping[str, Mapping[str, tuple[float, str, float]]]
_SHOWN = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Pooled:
    """A statistic of all prompts together, of one, or of a range; ``precision`` names the floor."""

    question: str
    precision: str
    name: str
    value: float
    centre: float
    own: float
    spread: float
    z: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One verdict on one correct implementation. ``version`` is of the rule, ``finding`` the first that failed."""

    model: str
    family: str
    precision: str
    group: int
    version: str
    status: str
    finding: str = ""
    seconds: float = 0.0
    statistics: tuple[Pooled, ...] = ()

    @property
    def key(self) -> tuple[str, str, str, int, str]:
        """What is not done twice."""
        return (self.model, self.family, self.precision, self.group, self.version)


# --- running -----------------------------------------------------------------------------------


def run_nulls(
    count: int, work: Path, progress: Progress, shard: Shard = WHOLE, *, minutes: float | None = None
) -> None:
    """At least ``count`` verdicts on correct implementations, over all shards, added to those in ``work``.

    Args:
        count: verdicts; rounded up to whole groups of prompts.
        work: directory of goldens and results.
        progress: called before each verdict.
        shard: (index, number) of this process among several that share the work.
        minutes: time after which no further verdict is begun.
    """
    cells = len(MODELS) * len(FAMILIES) * len(PRECISIONS)
    _run(NULLS, -(-count // cells), work, progress, shard, minutes)


def run_pilot(
    groups: int, work: Path, progress: Progress, shard: Shard = WHOLE, *, minutes: float | None = None
) -> None:
    """The verdicts that `spreads` needs, on ``groups`` groups of prompts a model; arguments as in `run_nulls`."""
    _run(PILOT, groups, work, progress, shard, minutes)


def _run(bench: Bench, groups: int, work: Path, progress: Progress, shard: Shard, minutes: float | None) -> None:
    asked = [
        Result(model=model, family=family, precision=precision, group=group, version=rule_version(), status=SKIPPED)
        for model, family, precision in combinations(shard)
        for group in range(groups)
    ]

    def perform(missing: Sequence[Result], report: Report, late: Late) -> Generator[Result, None, None]:
        return _results(missing, bench, work, report, late)

    ledger.run(asked, work, bench.name, _parsed, perform, progress, shard, minutes)


def _parsed(data: dict[str, Any]) -> Result:
    return Result(**{**data, "statistics": tuple(Pooled(**one) for one in data["statistics"])})


def read_results(work: Path, bench: Bench) -> list[Result]:
    """The results of all shards, each once, of this and of former versions of the rule.

    Raises:
        UsageError: for a line that is no result.
    """
    return ledger.read(work, bench.name, _parsed)


def combinations(shard: Shard) -> list[tuple[str, str, str]]:
    """(model, family, precision) of one shard of (index, number): each is in exactly one of the shards."""
    index, number = shard
    return list(itertools.product(MODELS, FAMILIES, PRECISIONS))[index::number]


def _golden(bench: Bench, model: str, group: int, work: Path, report: Report) -> Golden:
    suite = generate_suite(bench.seed + group)
    place = work / "goldens" / model / suite.name
    return recorded(MODELS[model], suite, place, lambda text: report(f"{model} golden {group}: {text}"))


def _results(
    missing: Sequence[Result], bench: Bench, work: Path, report: Report, late: Late
) -> Generator[Result, None, None]:
    """The missing results filled in, one model, family and precision after the other."""
    goldens: dict[tuple[str, int], Golden] = {}
    for _, cell in itertools.groupby(missing, key=lambda one: (one.model, one.family, one.precision)):
        blanks = list(cell)
        # Before the engine is opened, whose settings (two threads) are not for the reference.
        for blank in blanks:
            if late():
                return
            if (blank.model, blank.group) not in goldens:
                goldens[blank.model, blank.group] = _golden(bench, blank.model, blank.group, work, report)
        yield from _judged(blanks, [goldens[blank.model, blank.group] for blank in blanks])


def _judged(blanks: Sequence[Result], goldens: Sequence[Golden]) -> Iterator[Result]:
    """The blanks of one model, family and precision, each held against its golden."""
    first = blanks[0]
    family, model = FAMILIES[first.family], MODELS[first.model]
    allowed = floors(SPREADS, without=kin_of(family.name))
    with ExitStack() as stack:
        try:
            engine = stack.enter_context(opened(family, model, first.precision))
        except LookupError as error:
            reason = part_missing(error)
            yield from (replace(blank, finding=reason) for blank in blanks)
            return
        for blank, golden in zip(blanks, goldens, strict=True):
            yield _filled(blank, flow.check(golden, engine, reference=model, spreads=allowed))


def _filled(blank: Result, verdict: Verdict) -> Result:
    return replace(
        blank,
        status=verdict.status.value,
        finding="" if verdict.ok else _first_failure(verdict),
        seconds=round(verdict.seconds, 3),
        statistics=tuple(
            Pooled(**{field.name: getattr(one, field.name) for field in fields(Pooled)})
            for one in verdict.statistics
            # What is not finite was judged as structure, and has no scatter.
            if (one.unit == "all" or one.name in (PROMPT, RANGE))
            and all(map(math.isfinite, (one.value, one.centre, one.own, one.spread, one.z)))
        ),
    )


def _first_failure(verdict: Verdict) -> str:
    """The first finding of the verdict's own status, in one line."""
    finding = next((one for one in verdict.failures if one.status is verdict.status), None)
    return "without a finding" if finding is None else finding_words(finding)


def finding_words(finding: Finding) -> str:
    """What was found, where, and what was measured, in one line."""
    text = f"{finding.check}: {finding.message}" + (f" at {finding.where}" if finding.where else "")
    if finding.measured is None or finding.allowed is None:
        return text
    return f"{text} (measured {finding.measured:.4g}, allowed {finding.allowed:.4g})"


# --- how far correct implementations scatter ---------------------------------------------------


def spreads(results: Sequence[Result]) -> Table:
    """The scatter of each pooled statistic between families, by the precision that names the floor.

    A family's is the root of mean((value - centre)^2) - mean(own^2) over hosts and groups of prompts: what the
    replicas of the golden do not show already. Of a magnitude a value that is too small is no fault, and counts as
    none. One standard error is added, since few prompts cannot show a small scatter, and none would be taken for
    nothing. Families of one kin count as one, by the larger.
    """
    excess: dict[tuple[str, str], dict[str, list[Pooled]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        for one in result.statistics:
            excess[one.precision, one.name][result.family].append(one)
    table: dict[str, dict[str, tuple[float, str, float]]] = {}
    for (precision, name), by_family in sorted(excess.items()):
        by_kin: dict[str, float] = defaultdict(float)
        for family, values in by_family.items():
            scatter = _scatter(values)
            by_kin[kin_of(family)] = max(by_kin[kin_of(family)], scatter)
        (kin, largest), *others = sorted(by_kin.items(), key=lambda pair: -pair[1])
        table.setdefault(precision, {})[name] = (largest, kin, max((value for _, value in others), default=0.0))
    return table


def _scatter(values: Sequence[Pooled]) -> float:
    """Root of the mean excess and its standard error: the mean of n squares of spread own is off by sqrt(2/n) own^2."""
    excess = math.fsum(map(_excess, values)) / len(values)
    own = math.fsum(one.own**2 for one in values) / len(values)
    return math.sqrt(max(0.0, excess) + own * math.sqrt(2 / len(values)))


def _excess(one: Pooled) -> float:
    residual = one.value - one.centre
    return 0.0 if residual < 0 and one.name in MAGNITUDES else residual**2 - one.own**2


def floors(table: Table, without: str | None = None) -> dict[str, dict[str, float]]:
    """The scatter of each statistic between families: the largest, or the largest of all but one kin."""
    return {
        precision: {
            name: second if family == without else largest for name, (largest, family, second) in by_name.items()
        }
        for precision, by_name in table.items()
    }


def table_to_literal(table: Table) -> str:
    """The table as it stands in constants.py, to three digits."""
    lines = ["SPREADS: Mapping[str, Mapping[str, tuple[float, str, float]]] = {"]
    for precision, by_name in table.items():
        lines.append(f'    "{precision}": {{')
        lines += [f'        "{name}": ({a:.3g}, "{family}", {b:.3g}),' for name, (a, family, b) in by_name.items()]
        lines.append("    },")
    return "\n".join([*lines, "}"])


# --- the table ---------------------------------------------------------------------------------


def upper_bound(alarms: int, verdicts: int) -> float:
    """One-sided 95 % Clopper-Pearson bound of a rate; 1 where nothing was judged."""
    from scipy.stats import beta

    return 1.0 if alarms >= verdicts else float(beta.ppf(CONFIDENCE, alarms + 1, verdicts - alarms))


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """Alarms among so many, with the bound."""

    alarms: int
    count: int

    @property
    def bound(self) -> float:
        return upper_bound(self.alarms, self.count)

    def __str__(self) -> str:
        share = f"{self.alarms / self.count:.3%}" if self.count else "-"
        return f"{self.alarms} of {self.count} ({share}; at most {self.bound:.3%} with {CONFIDENCE:.0%} confidence)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """The verdicts of one family in one precision; ``largest`` is the largest z of a pooled statistic, and its name."""

    precision: str
    family: str
    statuses: Mapping[str, int]
    largest: tuple[float, str] | None

    @property
    def verdicts(self) -> int:
        return sum(self.statuses.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What a bench found.

    Attributes:
        lines: by precision and family.
        overall: alarms among all verdicts that judged.
        distinct: the same, families that computed the very same numbers counted once (a copy is no evidence).
        clusters: (family, model) with any alarm, among all that judged.
        alarms: the verdicts that alarmed.
        unjudged: those that did not judge.
        former: how many verdicts of former versions of the rule were left out.
    """

    lines: tuple[Line, ...]
    overall: Rate
    distinct: Rate
    clusters: Rate
    alarms: tuple[Result, ...]
    unjudged: tuple[Result, ...]
    former: int


def summarise(results: Sequence[Result]) -> Summary:
    """Count the results of the rule as it is now."""
    current = of_this_rule(results)
    judged = [result for result in current if result.status in ALARMS | PASSES]
    by_line: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in sorted(current, key=lambda one: (_place(one.precision, PRECISIONS), _place(one.family, FAMILIES))):
        by_line[result.precision, result.family].append(result)
    return Summary(
        lines=tuple(
            Line(
                precision=precision,
                family=family,
                statuses=dict(Counter(result.status for result in members)),
                largest=_largest(members),
            )
            for (precision, family), members in by_line.items()
        ),
        overall=_rate(judged, lambda one: one.key),
        distinct=_rate(judged, _numbers),
        clusters=_rate(judged, lambda one: (one.family, one.model)),
        alarms=tuple(result for result in judged if result.status in ALARMS),
        unjudged=tuple(result for result in current if result.status not in ALARMS | PASSES),
        former=len(results) - len(current),
    )


def _place(word: str, known: Iterable[str]) -> int:
    return list(known).index(word) if word in known else -1


def _rate(judged: Sequence[Result], unit: Callable[[Result], Hashable]) -> Rate:
    """Alarms among units; a unit alarms when any of its verdicts does."""
    alarmed: dict[Hashable, bool] = {}
    for result in judged:
        alarmed[unit(result)] = alarmed.get(unit(result), False) or result.status in ALARMS
    return Rate(alarms=sum(alarmed.values()), count=len(alarmed))


def _numbers(result: Result) -> Hashable:
    """The same for two families that agreed in every bit; a result without numbers is like no other."""
    values = tuple((one.question, one.name, one.value) for one in result.statistics)
    return (result.model, result.precision, result.group, values or result.family)


def _largest(results: Sequence[Result]) -> tuple[float, str] | None:
    """The largest z over all prompts, towards too large for magnitudes and in either direction for the others."""
    sizes = [
        (one.z if one.name in MAGNITUDES else abs(one.z), one.name)
        for result in results
        for one in result.statistics
        if one.name not in (PROMPT, RANGE)
    ]
    return max(sizes, default=None)


#: Columns of the table: title and width.
_COLUMNS = (("precision", 10), ("family", 15), ("verdicts", 9), ("identical", 10), ("drift", 6), ("alarms", 7),
            ("unmeasured", 11), ("other", 6))  # fmt: skip


def summary_to_text(summary: Summary) -> str:
    """The table and the rates, then each alarm, then what was not judged."""
    lines = ["".join(title.ljust(width) for title, width in _COLUMNS) + "largest z"]
    lines += [_row(line) for line in summary.lines]
    lines += [
        "",
        f"false alarms           {summary.overall}",
        f"  distinct numbers     {summary.distinct}",
        f"  by (family, model)   {summary.clusters}",
    ]
    lines += [f"alarm: {_described(result)}" for result in summary.alarms]
    kinds = Counter((result.status, result.finding) for result in summary.unjudged)
    lines += [f"not judged, {count} x {status}: {finding}" for (status, finding), count in kinds.most_common(_SHOWN)]
    if len(kinds) > _SHOWN:
        lines.append(f"not judged for {len(kinds) - _SHOWN} other reasons")
    if summary.former:
        lines.append(f"{summary.former} verdicts of former versions of the rule are left out")
    return "\n".join(lines)


def _row(line: Line) -> str:
    count = dict.fromkeys(("identical", "drift", "unmeasured"), 0) | dict(line.statuses)
    alarms = sum(line.statuses.get(status, 0) for status in ALARMS)
    others = line.verdicts - alarms - count["identical"] - count["drift"] - count["unmeasured"]
    numbers = (line.verdicts, count["identical"], count["drift"], alarms, count["unmeasured"], others)
    cells = zip((line.precision, line.family, *numbers), _COLUMNS, strict=True)
    padded = "".join(f"{cell}".ljust(width - 1) + " " for cell, (_, width) in cells)
    return padded + ("-" if line.largest is None else f"{line.largest[0]:.1f} ({line.largest[1]})")


def _described(result: Result) -> str:
    return f"{result.model} {result.precision} {result.family} group {result.group}: {result.status}: {result.finding}"


def summary_to_dict(summary: Summary, results: Sequence[Result]) -> dict[str, Any]:
    """Everything as plain JSON types."""
    rates = {"overall": summary.overall, "distinct": summary.distinct, "clusters": summary.clusters}
    return {
        "rule": rule_version(),
        "confidence": CONFIDENCE,
        **{name: {**asdict(rate), "bound": rate.bound} for name, rate in rates.items()},
        "lines": [asdict(line) for line in summary.lines],
        "former": summary.former,
        "results": [asdict(result) for result in of_this_rule(results)],
    }
