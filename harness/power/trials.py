"""Put bugs, controls and correct implementations into hosts one after another, and ask every rule about each.

A bug is put into an open engine; what it does is recorded inside; everything is judged after it was taken out again,
since a patch of torch itself would also change the reference that is asked.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness import flow
from harness.comparison import compare, diverged
from harness.criteria import CRITERIA, Case, Side, scores
from harness.engines import hf
from harness.errors import StaleError, UsageError
from harness.flow.checking import scoring
from harness.mutations import hosts
from harness.mutations.benign import FAMILIES, kin_of
from harness.mutations.catalogue import CATALOGUE
from harness.mutations.mutation import Mutation
from harness.mutations.stopping import CORRECT
from harness.numerics import statistics
from harness.numerics.bounds import exponential
from harness.numerics.constants import EFFECT, SPREADS
from harness.numerics.sketch import Sketcher
from harness.power import ledger
from harness.power.drawn import CHARACTERS_A_TOKEN, TRIALS, generate_suite, recorded
from harness.power.ledger import SKIPPED, WHOLE, Late, Progress, Report, Shard, rule_version
from harness.power.nulls import finding_words, floors
from harness.power.opening import TRANSFORMERS, Call, Kept, open_spec, opened, part_missing
from harness.power.trial import ENDS, QUICK, Trial, parse_trial
from harness.scorer import teacher_forced
from harness.values import Finding, Generation, Golden, Pass, Run, Scoring, Status, Suite, Trace

PRECISIONS = ("float32", "bfloat16")
_REFERENCE = "float64"

#: Families that are left to the null bench: each host and precision is compiled for a minute.
_SLOW = frozenset({"compiled"})

#: Hosts on which bugs are not swept: each is much like one on which they are.
_NOT_SWEPT = frozenset({"bloom-raw", "gpt2-tiny"})

#: Of the grammar's text, by the tokenizer of the hosts that are built from a seed.
_CHARACTERS_SEEDED = 1.4
_NEW_TOKENS = 32
#: Share of the room that a prompt is meant to take: some texts have more tokens than their characters tell.
_SAFE = 0.7
_LONGEST, _LONG = 160, 480
#: Of texts that may end: more than half the context of the shipped models, beyond which a server may cut.
_LONG_ENDS = 560


# --- what is asked -----------------------------------------------------------------------------


def planned(
    groups: int = 1,
    *,
    names: Iterable[str] | None = None,
    places: Iterable[str] | None = None,
    sweeps: bool = True,
    quick: bool = False,
    port: str = TRANSFORMERS,
) -> list[Trial]:
    """Blank trials, host by host, so that engines are opened once.

    Args:
        groups: of prompts, for each.
        names: ids and families, all by default.
        places: hosts, all by default.
        sweeps: also the weaker strengths of a bug.
        quick: on a few short prompts, those that show in logits alone.
        port: SPEC of what the bugs are put into; families are of transformers' models alone.

    Raises:
        UsageError: for a name or a host that there is not, or that have nothing in common.
    """
    blanks = [*_of_catalogue(sweeps), *(_of_families() if port == TRANSFORMERS else ())]
    chosen = known(names, [*CATALOGUE, *FAMILIES], "bug, control or correct implementation", "harness power --list")
    where = known(places, hosts_of(port), "host", ", ".join(hosts_of(port)))
    asked = [
        blank if blank.group == ENDS else replace(blank, group=QUICK if quick else group)
        for host in hosts.NAMES
        if host in where
        for group in range(1 if quick else groups)
        for blank in blanks
        if blank.host == host and blank.name in chosen and (blank.group != ENDS or not (group or quick))
    ]
    if not asked:
        raise UsageError("none of these is put into any of these hosts", fix="Name other hosts, or leave them out")
    return asked


def hosts_of(port: str) -> tuple[str, ...]:
    """The hosts that a port can run."""
    return tuple(
        one for one in hosts.NAMES if port == TRANSFORMERS or hosts.model_type_of(one) == port.partition(":")[0]
    )


def known(names: Iterable[str] | None, there: Collection[str], what: str, where: str) -> frozenset[str]:
    """The names that were chosen, all by default.

    Raises:
        UsageError: for one that there is not.
    """
    chosen = frozenset(there if names is None else names)
    if unknown := sorted(chosen - frozenset(there)):
        raise UsageError(f"there is no {what} {unknown[0]!r}", fix=f"Choose among those of {where}")
    return chosen


def _of_catalogue(sweeps: bool) -> Iterator[Trial]:
    for one in CATALOGUE.values():
        own = dict(one.options).get("dtype")
        for host in sorted(one.hosts):
            for strength in one.strengths if sweeps and host not in _NOT_SWEPT else one.strengths[:1]:
                for precision in PRECISIONS if own is None else (own,):
                    blank = _blank("control" if one.harmless else "bug", one.id, host, precision, strength)
                    yield blank if one.shows == "logits" else replace(blank, group=ENDS)


def _of_families() -> Iterator[Trial]:
    for family in FAMILIES.values():
        for host in hosts.NAMES:
            if family.name in _SLOW:
                continue
            blanks = [_blank("benign", family.name, host, precision, 1.0) for precision in PRECISIONS]
            yield from blanks
            if host in hosts.SHIPPED:  # the trained models alone know where a text ends
                yield from (replace(blank, group=ENDS) for blank in blanks)


def _blank(kind: Any, name: str, host: str, precision: str, strength: float) -> Trial:
    return Trial(
        kind=kind, name=name, host=host, precision=precision, strength=strength, group=0, version=rule_version(),
        status=SKIPPED,
    )  # fmt: skip


def run_trials(
    asked: Sequence[Trial],
    work: Path,
    progress: Progress,
    shard: Shard = WHOLE,
    *,
    goldens: Path = Path("golden"),
    minutes: float | None = None,
    port: str = TRANSFORMERS,
) -> None:
    """The trials of one shard, added to those in ``work``.

    Args:
        asked: blank trials of all shards, as `planned` gives them.
        work: directory of goldens, hosts and results.
        progress: called before and after each.
        shard: (index, number) of this process among several that share the work.
        goldens: where the models that are shipped lie.
        minutes: time after which none is begun.
        port: SPEC of what the bugs are put into, as `opening.open_spec` takes it.
    """
    index, number = shard
    # What differs in precision alone stays together: the float64 run serves both.
    together = [list(members) for _, members in itertools.groupby(asked, key=_implementation)]
    mine = [blank for members in together[index::number] for blank in members]

    def perform(missing: Sequence[Trial], report: Report, late: Late) -> Generator[Trial, None, None]:
        return _performed(missing, work, goldens, port, report, late)

    ledger.run(mine, work, TRIALS.name, parse_trial, perform, progress, shard, minutes)


def read_trials(work: Path) -> list[Trial]:
    """The trials of all shards, each once, of this and of former versions of the rule.

    Raises:
        UsageError: for a line that is no trial.
    """
    return ledger.read(work, TRIALS.name, parse_trial)


def _implementation(trial: Trial) -> tuple[str, str, str, float, int]:
    return (trial.kind, trial.name, trial.host, trial.strength, trial.group)


def _performed(
    missing: Sequence[Trial], work: Path, goldens: Path, port: str, report: Report, late: Late
) -> Generator[Trial, None, None]:
    with _Stage(work, goldens, report, port) as stage:
        for key, members in itertools.groupby(missing, key=_implementation):
            blanks = list(members)
            if late():
                return
            report(" ".join(map(str, key)))
            yield from (_of_family(stage, blanks) if blanks[0].kind == "benign" else _of_mutation(stage, blanks))


# --- the stage: hosts, engines, references -------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seen:
    """What an engine did on a golden's work."""

    trace: Trace
    calls: tuple[Call, ...]
    sides: tuple[Side, ...]


class _Stage:
    """Hosts with their goldens, engines and references, each made once; those of the last host are let go."""

    def __init__(self, work: Path, goldens: Path, report: Report, port: str = TRANSFORMERS) -> None:
        self._work, self._goldens, self._report, self._port = work, goldens, report, port
        self._host = ""
        self._stack = ExitStack()
        self._engines: dict[tuple[str, tuple[tuple[str, str], ...]], tuple[hf.HFEngine, Kept]] = {}
        self._recorded: dict[int, Golden] = {}
        self._references: dict[tuple[str, int], _Seen] = {}

    def __enter__(self) -> _Stage:
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def enter(self, host: str) -> Path:
        """The host's model directory; engines and references of another host are closed."""
        if host != self._host:
            self._stack.close()
            self._engines, self._recorded, self._references = {}, {}, {}
            self._host = host
        return hosts.model_directory(host, goldens=self._goldens, scratch=self._work / "hosts")

    def golden(self, host: str, group: int) -> Golden:
        """The golden of a group of prompts, recorded where it is not there."""
        model = self.enter(host)
        if group not in self._recorded:
            self._recorded[group] = self._drawn(host, model, group)
        return self._recorded[group]

    def _drawn(self, host: str, model: Path, group: int) -> Golden:
        suite = suite_for(host, hf.context_length(hf.load_config(str(model))), group)
        place = self._work / "goldens" / host / suite.name
        # float16 is asked of the shipped models alone.
        precisions = tuple(EFFECT) if host in hosts.SHIPPED else PRECISIONS
        return recorded(
            model, suite, place, lambda text: self._report(f"{host} golden {group}: {text}"), precisions=precisions
        )

    def engine(self, host: str, precision: str, options: tuple[tuple[str, str], ...]) -> tuple[hf.HFEngine, Kept]:
        """An open engine, and the same with all its logits kept."""
        model = self.enter(host)
        key = (precision, options)
        if key not in self._engines:
            engine = self._stack.enter_context(open_spec(self._port, precision, dict(options), model))
            self._engines[key] = (engine, Kept(engine, spec=engine.spec))
        return self._engines[key]

    def reference(self, host: str, precision: str, group: int) -> _Seen:
        """What the right model does in a precision."""
        if (precision, group) not in self._references:
            _, kept = self.engine(host, precision, ())
            self._references[precision, group] = seen_by(kept, self.golden(host, group))
        return self._references[precision, group]


def suite_for(host: str, context: int | None, group: int) -> Suite:
    """The prompts of a group, as long as the host can read them."""
    room = math.inf if context is None else context - _NEW_TOKENS - 1
    characters = CHARACTERS_A_TOKEN if host in hosts.SHIPPED else _CHARACTERS_SEEDED
    if group == QUICK:
        return generate_suite(
            TRIALS.seed + QUICK,
            prompts=4,
            new_tokens=8,
            longest=int(min(64, _SAFE * room)),
            long=None,
            characters=characters,
        )
    return generate_suite(
        TRIALS.seed + group,
        new_tokens=_NEW_TOKENS,
        longest=int(min(_LONGEST, _SAFE * room)),
        long=None if room < 2 * _LONG else _LONG_ENDS if group == ENDS else _LONG,
        characters=characters,
        alone=True,
        ends=group == ENDS,
    )


def seen_by(engine: Kept, golden: Golden) -> _Seen:
    """Run a golden's work, and keep all logits; where tokens are its own, these are forced once more."""
    with engine.recording() as calls:
        trace = flow.run(engine, golden, upcast=False)
        requests, given = golden.requests, _free(trace)
        if trace.prompt_ids is not None and [one.prompt_ids for one in requests] != list(trace.prompt_ids):
            # A peer gives texts and sees what comes of them.
            requests = tuple(replace(one, prompt_ids=ids) for one, ids in zip(requests, trace.prompt_ids, strict=True))
            given = engine.generate(
                requests, batch_size=golden.suite.runs[0].batch_size, stop_ids=frozenset(golden.stop_ids)
            )
        forced = len(calls)
        tokens = [one.tokens for one in given]
        if forced and (requests != golden.requests or tokens != list(golden.continuations)):
            engine.replay(
                requests, tokens, batch_size=golden.suite.runs[0].batch_size, sketcher=Sketcher(golden.vocabulary)
            )
        own = calls[forced:]
    return _Seen(trace=trace, calls=tuple(calls[:forced]), sides=_sides(golden, requests, given, calls[:forced], own))


def _free(trace: Trace) -> Sequence[Generation]:
    whole = (one for one in trace.passes if one.view == "generate" and one.run == "batched")
    first = next(whole, None)
    return () if first is None else first.generations


def _sides(
    golden: Golden, requests: Sequence[Any], given: Sequence[Generation], calls: Sequence[Call], own: Sequence[Call]
) -> tuple[Side, ...]:
    if not calls:
        return ()
    decode = next(one for one in calls if one.view == "replay").logits
    prefill = next(one for one in calls if one.view == "prefill").logits
    free = own[0].logits if own else decode
    return tuple(
        Side(
            prompt_ids=np.asarray(requests[i].prompt_ids, dtype=np.int64),
            tokens=np.asarray(given[i].tokens, dtype=np.int64),
            free=free[i],
            forced_ids=np.asarray((*one.prompt_ids, *golden.continuations[i]), dtype=np.int64),
            decode=decode[i],
            prefill=prefill[i],
        )
        for i, one in enumerate(golden.requests)
    )


# --- trials ------------------------------------------------------------------------------------


def _of_mutation(stage: _Stage, blanks: Sequence[Trial]) -> Iterator[Trial]:
    """All precisions of one bug or control at one strength on one host, float32 first."""
    first = blanks[0]
    one = CATALOGUE[first.name]
    if one.id in CORRECT:
        yield from (replace(blank, finding="no suite asks for penalties or stop strings") for blank in blanks)
        return
    golden = stage.golden(first.host, first.group)
    change: _Change | None = None
    for blank in blanks:
        stage.reference(first.host, blank.precision, first.group)  # outside of the bug
        started = time.perf_counter()
        try:
            seen = _with_bug(stage, one, blank, blank.precision)
        except LookupError as error:
            yield replace(blank, finding=part_missing(error))
            continue
        trial = _judged(stage, blank, golden, seen, started)
        if change is None or "half" in one.active:  # which is something else in 16 bits than in float32
            change = _change(stage, one, blank, golden, seen)
        yield replace(trial, signal=_signal(golden, change, blank.precision))


def _with_bug(stage: _Stage, one: Mutation, trial: Trial, precision: str) -> _Seen | Exception:
    """What the host does in a precision with the bug in it.

    Raises:
        LookupError: where the host lacks the part.
    """
    options = tuple((key, value) for key, value in one.options if key != "dtype")
    engine, kept = stage.engine(trial.host, precision, options)
    with one.applied(engine, trial.strength):
        return _tried(kept, stage.golden(trial.host, trial.group))


def _of_family(stage: _Stage, blanks: Sequence[Trial]) -> Iterator[Trial]:
    first, family = blanks[0], FAMILIES[blanks[0].name]
    golden = stage.golden(first.host, first.group)
    allowed = floors(SPREADS, without=kin_of(family.name))
    for blank in blanks:
        started = time.perf_counter()
        try:
            with opened(family, stage.enter(first.host), blank.precision, wide=False) as kept:
                seen = _tried(kept, golden)
        except LookupError as error:
            yield replace(blank, finding=part_missing(error))
            continue
        yield replace(_judged(stage, blank, golden, seen, started, allowed), signal=0.0)


def _tried(kept: Kept, golden: Golden) -> _Seen | Exception:
    """What it did, or how it failed: a bug may raise anything, and that is a result."""
    try:
        return seen_by(kept, golden)
    except Exception as error:  # noqa: BLE001  # nothing a bug raises may end the bench
        return error


def _judged(
    stage: _Stage,
    blank: Trial,
    golden: Golden,
    seen: _Seen | Exception,
    started: float,
    spreads: Mapping[str, Mapping[str, float]] | None = None,
) -> Trial:
    """The verdict of every rule; a candidate that failed is an error to all of them."""
    if isinstance(seen, Exception):
        failed = Status.STALE if isinstance(seen, StaleError) else Status.ERROR
        return replace(blank, status=failed.value, finding=f"{type(seen).__name__}: {seen}"[:300])
    asked = _scored(stage, blank, golden, seen.trace)

    def findings(trace: Trace, runs: Sequence[Run]) -> tuple[str, tuple[Finding, ...], float | None]:
        found = compare(golden, trace, runs, scoring=asked, spreads=spreads)
        error = next(
            (one.value for one in found.statistics if one.unit == "all" and one.name == statistics.ERROR), None
        )
        # The last answer is that of the run itself; before it may stand that no float32 copy was asked.
        return found.answers[-1].status.value, found.findings, None if error is None else exponential(error)

    status, found, error = findings(seen.trace, golden.suite.runs)
    seconds = time.perf_counter() - started
    free = [run for run in golden.suite.runs if "generate" in run.views]
    levels = {level: findings(_less(seen.trace, level), free)[0] for level in ("tokens", "top")}
    begun = time.perf_counter()
    reference, exact = (stage.reference(blank.host, name, blank.group) for name in (blank.precision, _REFERENCE))
    case = Case(
        precision=blank.precision,
        candidate=seen.sides,
        same=reference.sides,
        exact=exact.sides,
        repeats=_repeats(seen.calls),
    )
    peers = scores(case) if _same_shape(case) else dict.fromkeys(CRITERIA, math.inf)
    return replace(
        blank,
        status=status,
        finding=next((finding_words(one) for one in found if one.status.value == status and not one.status.ok), ""),
        levels=levels,
        error=error,
        tokens=_differing(seen.sides, reference.sides),
        scores=peers,
        seconds=round(seconds, 3),
        cost=round(time.perf_counter() - begun, 3),
    )


def _same_shape(case: Case) -> bool:
    """Whether the candidate shows all that was asked: whatever rule is applied, what is missing is seen."""
    shapes = [[(one.decode.shape, one.prefill.shape) for one in side] for side in (case.candidate, case.same)]
    return shapes[0] == shapes[1]


def _less(trace: Trace, level: str) -> Trace:
    """The trace of an engine that shows tokens alone, or tokens with the highest log-probabilities."""
    able = frozenset({"tokens", "batch", "deterministic"}) | ({"top_logprobs"} if level == "top" else frozenset())
    return replace(trace, capabilities=able, passes=tuple(_generated(trace, level)))


def _generated(trace: Trace, level: str) -> Iterator[Pass]:
    for one in trace.passes:
        if one.view != "generate":
            continue
        if level == "top":
            yield one
        else:
            bare = tuple(replace(given, top_ids=(), top_logits=()) for given in one.generations)
            yield replace(one, generations=bare)


def _repeats(calls: Sequence[Call]) -> tuple[tuple[NDArray[Any], NDArray[Any]], ...]:
    """The first and the last visit of the prompt that was run twice alone, another between them."""
    alone = [one for one in calls if len(one.requests) == 1]
    return tuple(
        (first.logits[0], last.logits[0])
        for first, last in zip(alone, alone[2:], strict=False)
        if first.requests == last.requests and first.logits[0].shape == last.logits[0].shape
    )


def _differing(sides: Sequence[Side], others: Sequence[Side]) -> int:
    """Tokens that are not the reference's, missing and additional ones counted."""
    if not sides:  # it has fewer columns than was asked, and was not run
        return sum(len(one.tokens) for one in others)
    total = 0
    for one, other in zip(sides, others, strict=True):
        common = min(len(one.tokens), len(other.tokens))
        total += int((one.tokens[:common] != other.tokens[:common]).sum())
        total += max(len(one.tokens), len(other.tokens)) - common
    return total


# --- how large a bug is ------------------------------------------------------------------------

#: Multiple of float32's round-off from which what a bug changes is known from float32 to a part in a thousand.
_FAR = 30.0

#: Squares of what a bug changes in the centred float64 logits of each row of each call, with the row's place.
_Change = tuple[NDArray[np.float64], NDArray[np.int64]]


def _change(stage: _Stage, one: Mutation, trial: Trial, golden: Golden, seen: _Seen | Exception) -> _Change | None:
    """What it changes but for round-off; None where it fails, or shows other rows.

    In float32 what a bug changes is far above round-off or it is not: only where it is not, or where it was not run
    in float32, it is run in float64, which takes longer than all else.
    """
    if trial.precision == "float32":
        change = _moved(golden, seen, stage.reference(trial.host, "float32", trial.group))
        size = _signal(golden, change, "float32")
        if size is None or size > _FAR or "half" in one.active:
            return change
    wrong = _with_bug(stage, one, trial, _REFERENCE)
    return _moved(golden, wrong, stage.reference(trial.host, _REFERENCE, trial.group))


def _moved(golden: Golden, wrong: _Seen | Exception, right: _Seen) -> _Change | None:
    if isinstance(wrong, Exception) or [one.requests for one in wrong.calls] != [one.requests for one in right.calls]:
        return None
    starts = np.searchsorted(golden.rows.request, np.arange(len(golden.requests)))
    index = {request.id: number for number, request in enumerate(golden.requests)}
    squares, places = [], []
    for call, other in zip(wrong.calls, right.calls, strict=True):
        for request, found, expected, positions in zip(
            call.requests, call.logits, other.logits, other.positions, strict=True
        ):
            if found.shape != expected.shape:
                return None
            difference = found.astype(np.float64) - expected
            difference -= difference.mean(axis=-1, keepdims=True)
            squares.append((difference**2).sum(axis=-1))
            places.append(starts[index[request]] + positions.astype(np.int64) - 1)
    return (np.concatenate(squares), np.concatenate(places)) if squares else None


def _scored(stage: _Stage, trial: Trial, golden: Golden, trace: Trace) -> Scoring:
    """The reference on what the candidate went on with behind a first divergence, by the engine that is open."""
    free = tuple(diverged(golden, trace))
    if not free:
        return Scoring()
    if trial.precision in golden.centres:
        return scoring(golden, trace, stage.enter(trial.host), lambda _text: None)
    engine, _ = stage.engine(trial.host, golden.precision, ())
    asked, tokens = [golden.requests[index] for index, _ in free], [tokens for _, tokens in free]
    return Scoring(free=teacher_forced(engine, asked, tokens), continuations=free)


def _signal(golden: Golden, change: _Change | None, precision: str) -> float | None:
    """S/N: rms over rows of what it changes, over the pooled round-off of the precision (numerics.md 2.2)."""
    floor = golden.floors.get(precision)
    if change is None or floor is None:
        return None
    squares, places = change
    ratio = squares.sum() / (floor.sigma[places].astype(np.float64) ** 2).sum()
    return float(np.sqrt(ratio)) if np.isfinite(ratio) else math.inf
