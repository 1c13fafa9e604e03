"""Which bugs are named: the catalogue's, pairs of them, and correct implementations, before the matched filter.

A bug is put into an open engine, its forced passes are run and judged with the golden's templates: is the alias class
of the bug named first? Of a correct implementation nothing may be named.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from harness import suites
from harness.comparison import compare, likeness
from harness.comparison.context import compare_context
from harness.engines import hf, runner
from harness.engines.base import Engine
from harness.engines.spec import parse_spec
from harness.mutations import hosts
from harness.mutations.benign import FAMILIES
from harness.mutations.catalogue import CATALOGUE
from harness.mutations.mutation import Mutation
from harness.mutations.stopping import CORRECT
from harness.numerics.constants import ALPHA_TEMPLATES
from harness.numerics.matched import fits
from harness.power import ledger
from harness.power.drawn import MODELS, NULLS, PRECISIONS, generate_suite, recorded
from harness.power.ledger import SKIPPED, WHOLE, Late, Progress, Report, Shard, rule_version
from harness.power.opening import opened, part_missing, spec_text
from harness.power.trial import QUICK
from harness.power.trials import known, suite_for
from harness.templates import caching, making
from harness.templates.fitting import change_of
from harness.values import Diagnosis, Golden, Status, Suite, Templates, Trace, overall

NAME = "names"

#: Pairs that are both to be named, on each shipped host that has both.
PAIRS = (
    ("x-rows-swapped", "x-bias-doubled"),
    ("x-attention-scale", "x-row-scaled"),
    ("pos-invfreq-bf16", "x-row-scaled"),
    ("na-gelu", "x-row-scaled"),
)
_TRIED = ("float32", "bfloat16")
_LOOKS_LIKE = "looks like"

#: Groups of nulls that are run at once, in batches of so many rows: a third of the time of one after another.
_TOGETHER, _BATCH = 9, 24

#: Prompts of the bugs are those of the trials; of the nulls those of the false alarms, without their long one.
Kind = Literal["bug", "pair", "control", "null"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Naming:
    """What the templates said of one implementation on one host.

    Attributes:
        kind: a bug, two of them at once, a negative control of the catalogue, or a correct family.
        name: id in the catalogue, two ids with a plus, or the family's name.
        host: the model that it is put into.
        precision: that the candidate computes in.
        strength: of the bug.
        group: which prompts.
        version: of the rule.
        status: of the verdict on the forced passes, templates included.
        without: the same without them.
        signal: S/N on these passes; None without a template.
        named: ids that were named, best first.
        right: whether each bug that is there is named, by its alias class, the first first.
        nearest: the best id, named or not.
        nearest_right: whether it is of the class of the first bug that is there.
        z: of the nearest.
        coefficient: of the nearest.
        limit: of |z|.
        finding: why it was not run, or not fitted.
        seconds: its run and its verdict.
    """

    kind: Kind
    name: str
    host: str
    precision: str
    strength: float
    group: int
    version: str
    status: str
    without: str = SKIPPED
    signal: float | None = None
    named: tuple[str, ...] = ()
    right: bool = False
    nearest: str = ""
    nearest_right: bool = False
    z: float = 0.0
    coefficient: float = 0.0
    limit: float = 0.0
    finding: str = ""
    seconds: float = 0.0

    @property
    def key(self) -> tuple[str, str, str, str, float, int, str]:
        """What is not done twice."""
        return (self.kind, self.name, self.host, self.precision, self.strength, self.group, self.version)

    @property
    def ids(self) -> tuple[str, ...]:
        """The bugs that are there."""
        return () if self.kind in ("null", "control") else tuple(self.name.split("+"))


# --- what is asked -----------------------------------------------------------------------------


def planned_bugs(
    places: Iterable[str] | None = None, names: Iterable[str] | None = None, *, quick: bool = False
) -> list[Naming]:
    """Blanks of all bugs that show in logits, at each strength, of the pairs and of the negative controls.

    Args:
        places: hosts, all by default.
        names: ids and pairs of ids, all by default.
        quick: on a few short prompts.

    Raises:
        UsageError: for a name or a host that there is not.
    """
    pairs = ["+".join(pair) for pair in PAIRS]
    chosen = known(
        names, [*CATALOGUE, *pairs, *FAMILIES], "bug, pair or correct implementation", "harness power --list"
    )
    where = known(places, hosts.NAMES, "host", ", ".join(hosts.NAMES))
    group = QUICK if quick else 0
    singles = [
        _blank("control" if one.harmless else "bug", one.id, host, precision, strength, group)
        for one in CATALOGUE.values()
        if one.shows == "logits" and one.id not in CORRECT
        for host in sorted(one.hosts)
        for strength in one.strengths
        for precision in _precisions(one)
    ]
    both = [
        _blank("pair", "+".join(pair), host, precision, 1.0, group)
        for pair in PAIRS
        for host in sorted(CATALOGUE[pair[0]].hosts & CATALOGUE[pair[1]].hosts & set(hosts.SHIPPED))
        for precision in _TRIED
    ]
    asked = [one for one in (*singles, *both) if one.host in where and one.name in chosen]
    return sorted(asked, key=lambda one: hosts.NAMES.index(one.host))


def _precisions(one: Mutation) -> tuple[str, ...]:
    own = dict(one.options).get("dtype")
    return _TRIED if own is None else (own,)


def planned_nulls(count: int, places: Iterable[str] | None = None, names: Iterable[str] | None = None) -> list[Naming]:
    """Blanks of at least ``count`` correct implementations, whole groups of prompts, model by model.

    Args:
        count: over all models and families.
        places: models, all by default.
        names: families, all by default.
    """
    groups = -(-count // (len(MODELS) * len(FAMILIES) * len(PRECISIONS)))
    return [
        _blank("null", family, model, precision, 1.0, group)
        for model in MODELS
        if places is None or model in set(places)
        for precision in PRECISIONS
        for family in FAMILIES
        if names is None or family in set(names)
        for group in range(groups)
    ]


def _blank(kind: Kind, name: str, host: str, precision: str, strength: float, group: int = 0) -> Naming:
    return Naming(
        kind=kind, name=name, host=host, precision=precision, strength=strength, group=group, version=rule_version(),
        status=SKIPPED,
    )  # fmt: skip


def parse_naming(data: dict[str, Any]) -> Naming:
    """A record from its line.

    Raises:
        TypeError, ValueError, KeyError: for anything else.
    """
    numbers = {name: float(data[name]) for name in ("z", "coefficient", "limit")}
    return Naming(**{**data, **numbers, "named": tuple(map(str, data["named"]))})


def read_namings(work: Path) -> list[Naming]:
    """The records of all shards, each once, of this and of former versions of the rule.

    Raises:
        UsageError: for a line that is none.
    """
    return ledger.read(work, NAME, parse_naming)


def run_namings(
    asked: Sequence[Naming],
    work: Path,
    progress: Progress,
    shard: Shard = WHOLE,
    *,
    goldens: Path = Path("golden"),
    minutes: float | None = None,
) -> None:
    """Those of one shard, added to those in ``work``; arguments as in `trials.run_trials`."""
    index, number = shard
    # Templates take longest, and are of one host.
    places = list(dict.fromkeys(blank.host for blank in asked))
    mine = [blank for blank in asked if places.index(blank.host) % number == index]

    def perform(missing: Sequence[Naming], report: Report, late: Late) -> Generator[Naming, None, None]:
        with _Stage(work, goldens, report) as stage:
            for _, members in itertools.groupby(missing, key=lambda one: (one.kind, one.name, one.host, one.precision)):
                if late():
                    return
                yield from stage.performed(list(members))

    ledger.run(mine, work, NAME, parse_naming, perform, progress, shard, minutes)


# --- running -----------------------------------------------------------------------------------


class _Stage:
    """Hosts with their goldens and templates, each made once; those of the last host are let go."""

    def __init__(self, work: Path, goldens: Path, report: Report) -> None:
        self._work, self._goldens, self._report = work, goldens, report
        self._host = ""
        self._stack = ExitStack()
        self._engines: dict[str, hf.HFEngine] = {}
        self._banks: dict[tuple[int, bool], tuple[Golden, Templates]] = {}

    def __enter__(self) -> _Stage:
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def _enter(self, host: str) -> Path:
        if host != self._host:
            self._stack.close()
            self._engines, self._banks, self._host = {}, {}, host
        return hosts.model_directory(host, goldens=self._goldens, scratch=self._work / "hosts")

    def _bank(self, host: str, group: int, null: bool) -> tuple[Golden, Templates]:
        """The golden of a group of prompts, or of the groups that nulls are run in together, and its templates."""
        model, group = self._enter(host), group // _TOGETHER if null else group
        if (group, null) not in self._banks:
            if null:
                suite = _together(group)
                place = self._work / "goldens" / host / suite.name
            else:
                suite = suite_for(host, hf.context_length(hf.load_config(str(model))), group)
                place = self._work / "goldens" / host / suite.name

            def report(text: str) -> None:
                self._report(f"{host} group {group}: {text}")

            precisions = PRECISIONS if host in hosts.SHIPPED else _TRIED
            golden = recorded(model, suite, place, report, precisions=precisions)
            bank = caching.templates_of(golden, model, report, place=self._work / "templates", places=False)
            self._banks[group, null] = golden, bank
        return self._banks[group, null]

    def _engine(self, host: str, options: dict[str, str]) -> hf.HFEngine:
        model, text = self._enter(host), spec_text(options)
        if text not in self._engines:
            self._engines[text] = self._stack.enter_context(hf.build(parse_spec(text), model=str(model)))
        return self._engines[text]

    def performed(self, blanks: Sequence[Naming]) -> Iterator[Naming]:
        """The blanks of one implementation on one host in one precision, filled in."""
        first = blanks[0]
        work = [(blank, *self._bank(blank.host, blank.group, blank.kind == "null")) for blank in blanks]
        try:
            with ExitStack() as stack:
                engine = self._changed(stack, first)
                for (_, null), members in itertools.groupby(
                    work, key=lambda one: (one[0].group // _TOGETHER, one[0].kind == "null")
                ):
                    together = list(members)
                    self._report(" ".join(map(str, together[0][0].key[:-1])))
                    if null:
                        yield from _nulls([one for one, _, _ in together], *together[0][1:], engine)
                    else:
                        yield from (_judged(*one, engine) for one in together)
        except LookupError as error:
            reason = part_missing(error)
            yield from (replace(blank, finding=reason) for blank in blanks)

    def _changed(self, stack: ExitStack, blank: Naming) -> Engine:
        """An open engine that is the family, or has the bugs in it."""
        if blank.kind == "null":
            model = self._enter(blank.host)
            return stack.enter_context(opened(FAMILIES[blank.name], model, blank.precision, wide=False))
        bugs = [CATALOGUE[name] for name in blank.name.split("+")]
        options = {key: value for bug in bugs for key, value in bug.options}
        engine = self._engine(blank.host, {"dtype": blank.precision, **options})
        for bug in bugs:
            stack.enter_context(bug.applied(engine, blank.strength))
        return engine


def _together(index: int) -> Suite:
    """Prompts of as many groups of nulls as are run at once, in the order of their groups."""
    groups = [generate_suite(NULLS.seed + index * _TOGETHER + i, long=None) for i in range(_TOGETHER)]
    first = groups[0]
    data = {
        "name": f"nulls-{index}",
        "description": "Groups of drawn prompts, run together and judged by themselves.",
        "stop": first.stop,
        "add_special_tokens": first.add_special_tokens,
        "max_new_tokens": first.max_new_tokens,
        "prompts": [
            {"id": f"{group.name}-{prompt.id}", "text": prompt.text} for group in groups for prompt in group.prompts
        ],
        "runs": [{"name": "batched", "batch_size": _BATCH, "views": ["replay", "prefill"], "quick": True}],
    }
    return suites.suite_from_dict(data, f"the nulls {index}")


def _traced(golden: Golden, bank: Templates, engine: Engine) -> Trace:
    """The forced passes that templates are of."""
    trace = runner.run_suite(
        engine,
        golden.suite,
        golden.requests,
        golden.continuations,
        runs=[making.diagnosed_run(golden)],
        stop_ids=frozenset(golden.stop_ids),
        vocabulary=golden.vocabulary,
        views=bank.views,
        basis=bank.basis,
    )
    return replace(trace, basis=golden.model.digest)


def _nulls(blanks: Sequence[Naming], golden: Golden, bank: Templates, engine: Engine) -> Iterator[Naming]:
    """Several groups of prompts of one correct implementation: run together, each judged by its own prompts alone."""
    started = time.perf_counter()
    context = compare_context(golden, _traced(golden, bank, engine))
    fitted, reason = likeness.fit(context, bank)
    each = round((time.perf_counter() - started) / len(blanks), 3)
    size = len(golden.requests) // _TOGETHER
    for blank in blanks:
        if fitted is None:
            yield replace(blank, status=Status.UNMEASURED.value, finding=reason, seconds=each)
            continue
        prompts = range(blank.group % _TOGETHER * size, (blank.group % _TOGETHER + 1) * size)
        alone, sums = fitted.filter.of_prompts(prompts), fitted.sums.of_prompts(prompts)
        limit = alone.limit(ALPHA_TEMPLATES)
        named, ranked = alone.named(sums, limit), alone.ranked(sums)
        status = Status.DEVIATES if any(fits(one.coefficient) for one in named) else Status.DRIFT
        largest = max(ranked, key=lambda one: abs(one.z), default=None)
        yield replace(
            blank,
            status=status.value,
            named=tuple(bank.names[one.index][0] for one in named),
            nearest="" if largest is None else bank.names[largest.index][0],
            z=0.0 if largest is None else _finite(largest.z),
            coefficient=0.0 if largest is None else _finite(largest.coefficient),
            limit=limit,
            seconds=each,
        )


def _judged(blank: Naming, golden: Golden, bank: Templates, engine: Engine) -> Naming:
    started = time.perf_counter()
    try:
        trace = _traced(golden, bank, engine)
    except Exception as error:  # noqa: BLE001  # nothing a bug raises may end the bench
        return replace(blank, status="error", without="error", finding=f"{type(error).__name__}: {error}")
    run = replace(making.diagnosed_run(golden), views=bank.views)
    found = compare(golden, trace, [run], templates=bank)
    diagnosis = found.answers[-1].diagnosis or Diagnosis(reason="its structure is wrong")
    # The last answer is that of the run itself; before it may stand that no float32 copy was asked.
    question = found.answers[-1].question
    own = [one for one in found.findings if one.question == question]
    filled = replace(
        blank,
        status=overall([one.status for one in own]).value,
        without=overall([one.status for one in own if one.check != _LOOKS_LIKE]).value,
        signal=_signal(blank, golden, bank),
        finding=diagnosis.reason,
        seconds=round(time.perf_counter() - started, 3),
    )
    if diagnosis.limit is None:
        return filled
    ids = blank.ids
    named = [(_id(one.name), *one.aliases) for one in diagnosis.named]
    nearest = diagnosis.nearest[0] if diagnosis.nearest else None
    return replace(
        filled,
        named=tuple(first for first, *_ in named),
        right=bool(ids)
        and len(named) >= len(ids)
        and all(any(name in one for one in named[: len(ids)]) for name in ids),
        nearest="" if nearest is None else _id(nearest.name),
        nearest_right=nearest is not None and bool(ids) and ids[0] in (_id(nearest.name), *nearest.aliases),
        z=0.0 if nearest is None else _finite(nearest.z),
        coefficient=0.0 if nearest is None else _finite(nearest.coefficient),
        limit=diagnosis.limit,
    )


def _id(name: str) -> str:
    return name.partition(" at ")[0]


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _signal(blank: Naming, golden: Golden, bank: Templates) -> float | None:
    """S/N on the diagnosed passes: rms over rows of what the bug changes, over the pooled round-off."""
    key = (blank.name, blank.strength)
    if key not in bank.names or blank.precision not in golden.floors:
        return None
    index = bank.names.index(key)
    sigma = golden.floors[blank.precision].sigma[bank.place].astype(np.float64)
    return float(np.sqrt((change_of(bank, index) ** 2).sum() / (sigma**2).sum()))
