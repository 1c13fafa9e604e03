"""Who judges a trial: this project on all or less of the evidence, and the peers' rules at three thresholds each."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from harness.criteria import CRITERIA, Criterion
from harness.power.nulls import ALARMS, PASSES
from harness.power.trial import Trial
from harness.values import Status

Sees = Literal["tokens", "top", "logits"]
Threshold = Literal["own", "published", "calibrated", "per host"]

#: A run that fails is seen by everyone, whatever rule would have judged it.
FAILED = Status.ERROR.value

#: Evidence from least to most: a judge competes with those that see no more than it does.
EVIDENCE: tuple[Sees, ...] = ("tokens", "top", "logits")


@dataclass(frozen=True, kw_only=True, slots=True)
class Judge:
    """One column of verdicts.

    Attributes:
        name: for tables, "golden-harness: tokens", "vllm-top5 calibrated".
        sees: the least evidence that it needs.
        threshold: "own" for this project, whose verdict is a status; "published" with the rule; "calibrated": the
            largest score of the correct implementations, so that it has no alarm on them; "per host": the same, of
            each host by itself, as a project would choose it that knows one model.
        criterion: key of a trial's scores; "" for this project.
        source: the project that a rule is of.
        thresholds: precision, or "precision/host" -> the score above which it alarms; inf where a correct
            implementation scores inf, so that no threshold separates anything.
    """

    name: str
    sees: Sees
    threshold: Threshold
    criterion: str = ""
    source: str = ""
    thresholds: Mapping[str, float] = field(default_factory=dict)

    def within(self, precision: str) -> Mapping[str, float]:
        """Its thresholds in one precision, by host, or by "" where it is one for all."""
        parted = ((*place.partition("/")[::2], value) for place, value in self.thresholds.items())
        return {host: value for name, host, value in parted if name == precision}


_CALIBRATED: tuple[Threshold, ...] = ("calibrated", "per host")

#: This project's verdict on everything, on tokens with a few log-probabilities a step, and on tokens alone.
ALL = Judge(name="golden-harness: all", sees="logits", threshold="own")
TOP = Judge(name="golden-harness: top log-probabilities", sees="top", threshold="own")
TOKENS = Judge(name="golden-harness: tokens", sees="tokens", threshold="own")
OURS = (ALL, TOP, TOKENS)


def judges_of(trials: Collection[Trial], criteria: Mapping[str, Criterion] = CRITERIA) -> tuple[Judge, ...]:
    """This project's judges, then each rule at its published thresholds and at those that these trials calibrate."""
    peers = []
    for name, criterion in criteria.items():
        if criterion.published:
            peers.append(_peer(name, criterion, "published", criterion.published))
        for kind in _CALIBRATED:
            if thresholds := calibrated(trials, name, kind):
                peers.append(_peer(name, criterion, kind, thresholds))
    return (*OURS, *peers)


def _peer(name: str, criterion: Criterion, threshold: Threshold, values: Mapping[str, float]) -> Judge:
    return Judge(
        name=f"{name} {threshold}",
        sees=criterion.sees,
        threshold=threshold,
        criterion=name,
        source=criterion.source,
        thresholds=dict(values),
    )


def calibrated(trials: Collection[Trial], criterion: str, kind: Threshold = "calibrated") -> dict[str, float]:
    """The largest score of any correct implementation that was judged, by precision, or by precision and host.

    With it the rule has no alarm on these, which flatters it: they are the ones that it is compared on.
    """
    largest: dict[str, float] = {}
    for trial in trials:
        if is_null(trial) and is_judged(trial) and trial.status != FAILED and criterion in trial.scores:
            place = _place(trial, kind)
            largest[place] = max(largest.get(place, -math.inf), _score(trial, criterion))
    return largest


def _place(trial: Trial, kind: Threshold) -> str:
    """What a threshold is of."""
    return f"{trial.precision}/{trial.host}" if kind == "per host" else trial.precision


def is_null(trial: Trial) -> bool:
    """Whether an alarm on it would be a false one."""
    return trial.kind != "bug"


def is_judged(trial: Trial) -> bool:
    """Whether it enters a rate; what is unmeasured, stale or skipped is neither found nor missed."""
    return trial.status in ALARMS | PASSES | {FAILED}


def speaks(trial: Trial, judge: Judge) -> bool:
    """Whether a judge says anything of a trial: its evidence was kept, and it has a threshold in that precision."""
    if trial.status == FAILED:
        return True
    if judge.threshold == "own":
        return judge.sees == "logits" or judge.sees in trial.levels
    return judge.criterion in trial.scores and _place(trial, judge.threshold) in judge.thresholds


def alarms(trial: Trial, judge: Judge) -> bool:
    """Whether a judge calls a trial wrong; a judge that says nothing does not.

    What this project calls unmeasured when it sees less is no alarm.
    """
    if trial.status == FAILED:
        return True
    if not speaks(trial, judge):
        return False
    if judge.threshold == "own":
        status = trial.status if judge.sees == "logits" else trial.levels[judge.sees]
        return status in ALARMS or status == FAILED
    return _score(trial, judge.criterion) > judge.thresholds[_place(trial, judge.threshold)]


def _score(trial: Trial, criterion: str) -> float:
    """A score that is no number is worse than any."""
    score = trial.scores[criterion]
    return math.inf if math.isnan(score) else score


def rivals(judge: Judge, judges: Sequence[Judge]) -> tuple[Judge, ...]:
    """The peers' rules that see no more than a judge does."""
    known = EVIDENCE[: EVIDENCE.index(judge.sees) + 1]
    return tuple(one for one in judges if one.threshold != "own" and one.sees in known)
