"""What the trials of the bug catalogue add up to: found and missed, false alarms, curves, comparisons, survivors.

What counts is the bugs at the strength that was reported. In 16 bits they are those that change the suite's float64
logits, or show in tokens or prompts; in float32 those whose error is at least DETECTABLE times round-off, or whose
tokens differ where they show in tokens or prompts. The others are counted by the reason why they do not count.
Weaker and stronger ones are for the curves alone.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from harness.criteria import CRITERIA, Criterion
from harness.mutations.catalogue import CATALOGUE
from harness.mutations.mutation import Mutation
from harness.numerics.constants import EFFECT
from harness.power import curves
from harness.power.curves import Curve
from harness.power.judges import ALL, FAILED, OURS, TOKENS, Judge, alarms, is_judged, is_null, judges_of, rivals, speaks
from harness.power.nulls import Rate
from harness.power.paired import Paired, paired
from harness.power.survivors import DETECTABLE, REASONS, Survivor, is_large, survivor
from harness.power.trial import Trial

#: The strength of a bug as it was reported.
REPORTED = 1.0

#: An S/N up to this is that of another order of float64 additions, and no change: these give 1e-8 at most.
NEGLIGIBLE = 1e-6

#: Shares that are to be found in 16 bits: of all that count, and of those with an S/N of DETECTABLE.
IN_ALL, OF_STRONG = 0.60, 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """Found among so many."""

    found: int
    total: int

    @property
    def value(self) -> float:
        """Between 0 and 1; NaN of nothing."""
        return self.found / self.total if self.total else math.nan


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One judge in one precision.

    Attributes:
        total: of the trials that count.
        strong: of those with an S/N of at least DETECTABLE.
        groups: by group of the catalogue.
        subtleties: by subtlety.
        false: alarms on negative controls and correct implementations.
        silent: trials that count of which it says nothing; they are in no share.
    """

    judge: Judge
    total: Share
    strong: Share
    groups: Mapping[str, Share]
    subtleties: Mapping[str, Share]
    false: Rate
    silent: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A judge of ours beside a peer's on the trials that count and of which both say something.

    ``eligible``: its false alarms are no more than ours, as shares of the correct implementations that each judged.
    """

    ours: Judge
    peer: Judge
    counts: Paired
    eligible: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Something that the tables must show, what they do show, and whether that is enough."""

    asked: str
    shown: str
    reached: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """One precision.

    Attributes:
        rows: the most found first.
        aside: why bugs as reported do not count -> how many of them this project finds.
        small: those that do not count though they ran, for a list.
        unjudged: status -> trials that enter no rate.
        never: names of which no trial was judged.
        curves: name of a judge -> its curve, of all strengths.
        comparisons: by our judge, then the best peer first.
        seconds: mean of a candidate's run and our verdict.
        cost: mean of all the peers' rules together.
    """

    precision: str
    rows: tuple[Row, ...]
    aside: Mapping[str, Share]
    small: tuple[Trial, ...]
    unjudged: Mapping[str, int]
    never: tuple[str, ...]
    curves: Mapping[str, Curve]
    comparisons: tuple[Comparison, ...]
    survivors: tuple[Survivor, ...]
    targets: tuple[Target, ...]
    seconds: float
    cost: float


def tables(
    trials: Collection[Trial],
    criteria: Mapping[str, Criterion] = CRITERIA,
    catalogue: Mapping[str, Mutation] = CATALOGUE,
) -> tuple[Table, ...]:
    """A table for each precision in which a bug counts or a correct implementation was judged.

    Bugs that the catalogue does not name are left out.
    """
    known = [trial for trial in trials if trial.kind != "bug" or trial.name in catalogue]
    judges = judges_of(known, criteria)
    by_precision: dict[str, list[Trial]] = defaultdict(list)
    for trial in known:
        by_precision[trial.precision].append(trial)
    order = [*EFFECT, *sorted(by_precision.keys() - EFFECT.keys())]
    return tuple(
        _table(precision, by_precision[precision], judges, catalogue)
        for precision in order
        if any(_matters(trial, catalogue) for trial in by_precision.get(precision, ()))
    )


def _matters(trial: Trial, catalogue: Mapping[str, Mutation]) -> bool:
    return is_judged(trial) and (is_null(trial) or place(trial, catalogue[trial.name]) == COUNTS)


def _table(
    precision: str, trials: Sequence[Trial], judges: Sequence[Judge], catalogue: Mapping[str, Mutation]
) -> Table:
    judged = [trial for trial in trials if is_judged(trial)]
    nulls = [trial for trial in judged if is_null(trial)]
    bugs = [trial for trial in judged if not is_null(trial)]
    reported = [trial for trial in bugs if trial.strength == REPORTED]
    places = [(trial, place(trial, catalogue[trial.name])) for trial in reported]
    counted = [trial for trial, where in places if where == COUNTS]
    heard = [judge for judge in judges if any(speaks(trial, judge) for trial in judged if trial.status != FAILED)]
    rows = sorted((_row(judge, counted, nulls, catalogue) for judge in heard), key=_rank)
    found = _curves(bugs, heard)
    compared = _comparisons(rows, counted)
    eligible = [one.peer for one in compared if one.ours == ALL and one.eligible]
    return Table(
        precision=precision,
        rows=tuple(rows),
        aside={
            where: _share([trial for trial, other in places if other == where], ALL)
            for where in dict.fromkeys(where for _, where in places)
            if where != COUNTS
        },
        small=tuple(trial for trial, where in places if where == SMALL),
        unjudged=dict(Counter(trial.status for trial in trials if not is_judged(trial))),
        never=tuple(sorted({trial.name for trial in trials} - {trial.name for trial in judged})),
        curves=found,
        comparisons=compared,
        survivors=_survivors(reported, nulls, catalogue, found.get(ALL.name), eligible),
        targets=_targets(precision, rows, compared),
        seconds=_mean(trial.seconds for trial in judged),
        cost=_mean(trial.cost for trial in judged),
    )


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return math.fsum(known) / len(known) if known else 0.0


# --- what counts -------------------------------------------------------------------------------

COUNTS = "counts"
NO_SIGNAL = "no signal in float64"
UNKNOWN_SIGNAL = "S/N not known"
SMALL = f"error below {DETECTABLE:g} x round-off"


def place(trial: Trial, mutation: Mutation) -> str:
    """COUNTS, or the reason why a bug as reported is neither found nor missed. A run that fails always counts."""
    elsewhere = mutation.shows != "logits"
    if trial.status == FAILED:
        return COUNTS
    if trial.precision == "float32":
        return COUNTS if is_large(trial) or (elsewhere and trial.tokens > 0) else SMALL
    if elsewhere:
        return COUNTS
    if trial.signal is None:
        return UNKNOWN_SIGNAL
    return COUNTS if not trial.signal <= NEGLIGIBLE else NO_SIGNAL


def _is_strong(trial: Trial) -> bool:
    return trial.signal is not None and not trial.signal < DETECTABLE


# --- rows --------------------------------------------------------------------------------------


def _row(judge: Judge, counted: Sequence[Trial], nulls: Sequence[Trial], catalogue: Mapping[str, Mutation]) -> Row:
    heard = [trial for trial in counted if speaks(trial, judge)]
    quiet = [trial for trial in nulls if speaks(trial, judge)]
    return Row(
        judge=judge,
        total=_share(heard, judge),
        strong=_share([trial for trial in heard if _is_strong(trial)], judge),
        groups=_shares(heard, judge, lambda trial: catalogue[trial.name].group),
        subtleties=_shares(heard, judge, lambda trial: catalogue[trial.name].subtlety),
        false=Rate(alarms=sum(alarms(trial, judge) for trial in quiet), count=len(quiet)),
        silent=len(counted) - len(heard),
    )


def _share(trials: Sequence[Trial], judge: Judge) -> Share:
    return Share(found=sum(alarms(trial, judge) for trial in trials), total=len(trials))


def _shares(trials: Sequence[Trial], judge: Judge, key: Callable[[Trial], str]) -> dict[str, Share]:
    by_key: dict[str, list[Trial]] = defaultdict(list)
    for trial in trials:
        by_key[key(trial)].append(trial)
    return {name: _share(members, judge) for name, members in by_key.items()}


def _rank(row: Row) -> tuple[float, float, bool, str]:
    """Most found first, of all that count, then fewest false alarms, then ours."""
    found = row.total.found / max(1, row.total.total + row.silent)
    return (-found, _alarm_rate(row), row.judge not in OURS, row.judge.name)


def _alarm_rate(row: Row) -> float:
    """Share of alarms on correct implementations; inf where none was judged, since nothing is known."""
    return row.false.alarms / row.false.count if row.false.count else math.inf


def _curves(bugs: Sequence[Trial], judges: Sequence[Judge]) -> dict[str, Curve]:
    """By name of the judge, over all strengths; an S/N that is no number is infinite."""
    known = [trial for trial in bugs if trial.signal is not None and not trial.signal <= 0]
    # Judges that find the same have the same curve: in float32 most find nearly all.
    done: dict[tuple[tuple[int, bool], ...], Curve | None] = {}
    lines = {}
    for judge in judges:
        said = tuple((index, alarms(trial, judge)) for index, trial in enumerate(known) if speaks(trial, judge))
        if said not in done:
            members = [known[index] for index, _ in said]
            signals = [math.inf if math.isnan(trial.signal or 0.0) else trial.signal or 0.0 for trial in members]
            done[said] = curves.curve(signals, [found for _, found in said], [trial.name for trial in members])
        line = done[said]
        if line is not None:
            lines[judge.name] = line
    return lines


# --- beside the peers --------------------------------------------------------------------------


def _comparisons(rows: Sequence[Row], counted: Sequence[Trial]) -> tuple[Comparison, ...]:
    by_judge = {row.judge.name: row for row in rows}
    judges = [row.judge for row in rows]
    found = []
    for ours in OURS:
        if ours.name not in by_judge:
            continue
        allowed = _alarm_rate(by_judge[ours.name])
        compared = [
            Comparison(
                ours=ours,
                peer=peer,
                counts=paired(
                    (alarms(trial, ours), alarms(trial, peer))
                    for trial in counted
                    if speaks(trial, ours) and speaks(trial, peer)
                ),
                eligible=math.isfinite(_alarm_rate(by_judge[peer.name]))
                and _alarm_rate(by_judge[peer.name]) <= allowed,
            )
            for peer in rivals(ours, judges)
        ]
        found += sorted(compared, key=lambda one: (one.counts.difference, one.peer.name))
    return tuple(found)


def is_upper_bound(peer: Judge, precision: str) -> bool:
    """Whether a rule flags any token that differs: no rule on tokens finds more."""
    return peer.criterion == "exact" and max(peer.within(precision).values(), default=math.inf) <= 0


# --- survivors ---------------------------------------------------------------------------------


def _survivors(
    reported: Sequence[Trial],
    nulls: Sequence[Trial],
    catalogue: Mapping[str, Mutation],
    line: Curve | None,
    eligible: Sequence[Judge],
) -> tuple[Survivor, ...]:
    # Of all prompts: bugs that show in tokens are run on others than correct implementations.
    flips: dict[str, int] = defaultdict(int)
    for trial in nulls:
        flips[trial.host] = max(flips[trial.host], trial.tokens)
    found = []
    for trial in reported:
        if alarms(trial, ALL):
            continue
        finders = tuple(judge.name for judge in eligible if alarms(trial, judge))
        mutation = catalogue[trial.name]
        found.append(survivor(trial, mutation, flips=flips[trial.host], line=line, finders=finders))
    return tuple(sorted(found, key=lambda one: (REASONS.index(one.reason), one.trial.name, one.trial.host)))


# --- targets -----------------------------------------------------------------------------------


def _targets(precision: str, rows: Sequence[Row], compared: Sequence[Comparison]) -> tuple[Target, ...]:
    """What must be shown; a target without any trial is not reached."""
    ours = next((row for row in rows if row.judge == ALL), None)
    if ours is None:
        return ()
    if precision == "float32":
        asked = [(f"all bugs of {DETECTABLE:g} x round-off and more found", ours.total, 1.0)]
    else:
        asked = [
            (f"{IN_ALL:.0%} of all bugs found", ours.total, IN_ALL),
            (f"{OF_STRONG:.0%} of those with S/N >= {DETECTABLE:g} found", ours.strong, OF_STRONG),
        ]
    targets = [
        Target(asked=text, shown=f"{share.found} of {share.total}", reached=share.value >= least)
        for text, share, least in asked
    ]
    asked_false = "no alarm on controls and correct implementations"
    targets.append(Target(asked=asked_false, shown=str(ours.false), reached=ours.false.alarms == 0 < ours.false.count))
    return (*targets, *_rival_targets(compared, precision))


def _rival_targets(compared: Sequence[Comparison], precision: str) -> list[Target]:
    """None above ours by more than the interval, and none on tokens alone above or level."""
    beside_all = [one for one in compared if one.ours == ALL and one.eligible]
    beside_tokens = [
        one for one in compared if one.ours == TOKENS and one.eligible and not is_upper_bound(one.peer, precision)
    ]
    bound = [one for one in compared if one.ours == TOKENS and is_upper_bound(one.peer, precision)]
    # Nothing can be above a rule that flags any difference: where ours finds as much, to be level is all there is.
    at_bound = any(one.eligible and one.counts.difference >= 0 for one in bound)
    above = [one.peer.name for one in beside_all if one.counts.interval[1] < 0]
    level = [
        one.peer.name
        for one in beside_tokens
        if one.counts.difference < 0 or (one.counts.difference == 0 and not at_bound)
    ]
    targets = []
    if beside_all:
        asked = "no peer with no more false alarms above ours by more than the paired interval"
        targets.append(Target(asked=asked, shown=_names(above, len(beside_all)), reached=not above))
    if beside_tokens:
        asked = "tokens alone: every such rule with no more false alarms below ours" + (
            ", or level where ours finds what any difference shows" if at_bound else ""
        )
        targets.append(Target(asked=asked, shown=_names(level, len(beside_tokens)), reached=not level))
    return targets


def _names(wrong: Sequence[str], total: int) -> str:
    return f"{len(wrong)} of {total}" + (f": {'; '.join(wrong)}" if wrong else "")
