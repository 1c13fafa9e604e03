from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.numerics import metrics, sketch, statistics
from harness.numerics.constants import BUCKETS
from harness.numerics.moments import Scale, measure, norms_of, scale_of
from harness.values import Floor, Rows
from tests.comparison import literal
from tests.comparison.literal import Shape
from tests.numerics import independent

SHAPES = st.builds(
    Shape,
    vocabulary=st.integers(2, 30),
    prompts=st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple),
    steps=st.integers(1, 5),
)
SMALL = Shape(vocabulary=25, prompts=(1, 6, 3), steps=4)
VIEWS = {"replay": np.array([0, 1]), "prefill": np.array([1, 1])}


class Case:
    """A golden of a shape, with what errors are measured in, and passes of candidates on it."""

    def __init__(self, shape: Shape, seed: int = 0, replicas: int = 6, directions: int = 2) -> None:
        self.shape, self.seed = shape, seed
        self.truth = literal.reference_logits(seed, shape)
        self.shown = [self._rows(literal.noise(seed + k, shape=shape)) for k in range(replicas)]
        self.directions = [
            literal.projected(literal.noise(seed + 500 + k, shape=shape), shape) for k in range(directions)
        ]
        logits = [self.truth + literal.noise(seed + k, shape=shape) for k in range(replicas)]
        self.floor: Floor = literal.floor(logits, self.truth, directions=self.directions, shape=shape)
        self.centre: Rows = self._rows(0)
        self.scale: Scale = scale_of(
            self.centre, self.floor.sigma, self.floor.pair, self.directions, len(shape.prompts), shape.vocabulary
        )
        self.norms = norms_of(self.scale)

    def _rows(self, error: np.ndarray | int, keep: np.ndarray | None = None) -> Rows:
        return literal.condense(self.truth + error, keep, truth=self.truth, shape=self.shape)

    def one_pass(self, error: np.ndarray | int, view: str = "prefill", prompts: tuple[int, ...] | None = None) -> Rows:
        """Rows of a pass over some prompts, all by default."""
        keep = np.isin(self.centre.request, range(len(self.shape.prompts)) if prompts is None else prompts)
        return self._rows(error, keep if view == "prefill" else keep & self.centre.generated)

    def shown_by(self, view: str = "prefill", prompts: tuple[int, ...] | None = None) -> np.ndarray:
        """How often each prompt and kind was shown by such a pass, [P, 2]."""
        found = np.zeros((len(self.shape.prompts), 2), dtype=np.int64)
        found[list(range(len(found)) if prompts is None else prompts)] = VIEWS[view]
        return found

    def place(self, rows: Rows) -> np.ndarray:
        """Place in the golden of each row."""
        return np.searchsorted(self.centre.request, rows.request) + rows.position - 1

    def measured(self, passes: list[Rows], shown: list[np.ndarray]):
        """(moments, unit) of several passes as one."""
        unit = statistics.unit_of("all", shown)
        return statistics.averaged([measure(one, self.scale, self.place(one)) for one in passes], shown, unit), unit

    def values(self, error: np.ndarray | int, view: str = "prefill", prompts: tuple[int, ...] | None = None):
        """Every pooled statistic of one pass, the worst row among them."""
        part, unit = self.measured([self.one_pass(error, view, prompts)], [self.shown_by(view, prompts)])
        return all_of(part, self.norms, unit)


def all_of(moments, norms, unit):
    """Every pooled statistic of a unit, the worst row among them, as plain numbers."""
    found = {
        **statistics.logits(moments, norms, unit),
        **statistics.tokens(moments, norms, unit),
        statistics.WORST: statistics.worst(moments, unit),
    }
    return {name: float(value) for name, value in found.items()}


@st.composite
def cases(draw, *, least_passes=1):
    """A golden, and passes of one candidate on it: [(view, prompts or None for all, seed of its error)]."""
    shape = draw(SHAPES)
    everyone = tuple(range(len(shape.prompts)))
    some = st.lists(st.sampled_from(everyone), min_size=1, unique=True).map(lambda one: tuple(sorted(one)))
    one_pass = st.tuples(st.sampled_from(sorted(VIEWS)), st.none() | some, st.integers(0, 99))
    passes = draw(st.lists(one_pass, min_size=least_passes, max_size=4))
    return Case(shape, draw(st.integers(0, 2**16))), passes


# --- against an independent version ----------------------------------------------------------------


@given(case=cases(), size=st.floats(0.1, 300))
@settings(deadline=None, max_examples=60)
def test_every_statistic_is_what_the_note_says(case, size):
    """Sums over prompts, averaged over passes and put together again, are the formulas of the note row by row."""
    case, passes = case
    scale = case.scale
    rows = [case.one_pass(size * literal.noise(9000 + seed, shape=case.shape), v, p) for v, p, seed in passes]
    shown = [case.shown_by(view, prompts) for view, prompts, _ in passes]
    moments, unit = case.measured(rows, shown)
    records = [
        record
        for one, by in zip(rows, shown, strict=True)
        for record in independent.shown_rows(
            one, case.centre, scale.sigma, scale.pair, case.shape.vocabulary, directions=case.directions,
            whole=bool(by[:, 1].all()),
        )
    ]  # fmt: skip
    # Moments are kept in float32: 2e-7 of the sizes that are summed, which are ``size`` here or below it.
    close = {"rel": 1e-5, "abs": 1e-5 * max(size, 1)}
    found = statistics.logits(moments, case.norms, unit)
    assert found[statistics.ERROR] == pytest.approx(independent.log_rms(records), abs=1e-5)
    assert found[statistics.GAIN] == pytest.approx(independent.gain(records), **close)
    assert found[statistics.LOGP] == pytest.approx(independent.mean(records, "logp"), **close)
    assert found[statistics.ENTROPY] == pytest.approx(independent.mean(records, "entropy"), **close)
    assert found[statistics.MARGIN] == pytest.approx(independent.mean(records, "margin"), **close)
    assert (statistics.SHIFT in found) == any(record.whole for record in records)
    if statistics.SHIFT in found:
        length = np.exp(independent.log_shift(records))
        assert np.exp(found[statistics.SHIFT]) == pytest.approx(length, rel=1e-4, abs=1e-5 * size)
    assert statistics.worst(moments, unit) == pytest.approx(independent.log_largest(records), abs=1e-5)
    by_prompt = statistics.by_prompt(moments, case.norms, unit)
    for prompt, value in enumerate(by_prompt):
        assert value == pytest.approx(independent.log_rms([r for r in records if r.prompt == prompt]), abs=1e-5)
    for bucket, value in enumerate(statistics.by_bucket(moments, case.norms, unit)):
        own = [record for record in records if record.whole and record.bucket == bucket]
        assert value == pytest.approx(independent.log_rms(own), abs=1e-5)
    tokens = statistics.tokens(moments, case.norms, unit)
    steps = [record for record in records if record.generated]
    assert tokens[statistics.FLIPS] == pytest.approx(independent.mean(steps, "flipped"), rel=1e-6)
    assert tokens[statistics.DEFICIT] == pytest.approx(independent.mean(steps, "deficit"), rel=1e-5)
    squares = np.mean([record.top**2 for record in steps])
    assert tokens[statistics.TOP] == pytest.approx(0.5 * np.log(squares), abs=1e-4)
    assert tokens[statistics.TOP_WORST] == pytest.approx(np.log(max(record.top for record in steps)), abs=1e-4)
    shares, coefficients = statistics.directions(moments, case.norms, unit)
    for index in range(len(case.directions)):
        share, coefficient = independent.share_along(records, index)
        assert shares[index] == pytest.approx(share, **close)
        assert coefficients[index] == pytest.approx(coefficient, rel=1e-4, abs=1e-4 * size)


@given(case=cases())
@settings(deadline=None, max_examples=25)
def test_replicas_are_measured_as_a_candidate_is(case):
    """The moments of a floor are those of its replicas, each measured like any candidate, on the same rows."""
    case, passes = case
    shown = [case.shown_by(view, prompts) for view, prompts, _ in passes]
    unit = statistics.unit_of("all", shown)
    of_floor = statistics.logits(case.floor.moments, case.norms, unit)
    for k, one in enumerate(case.shown):
        rows = [sketch.select_rows(one, np.flatnonzero(by[one.request, one.generated.astype(int)])) for by in shown]
        moments, _ = case.measured(rows, shown)
        for name, value in statistics.logits(moments, case.norms, unit).items():
            assert of_floor[name][k] == pytest.approx(value, rel=1e-4, abs=1e-4), name


@given(shape=SHAPES, seed=st.integers(0, 2**16), replicas=st.integers(2, 8))
@settings(deadline=None, max_examples=25)
def test_round_off_and_effective_number_are_what_the_note_says(shape, seed, replicas):
    """The sigma of a row and the noise of a pair, each with its floor, and K_eff follow 2.2, 2.3 and 2.6."""
    case = Case(shape, seed, replicas)
    assert case.floor.sigma == pytest.approx(independent.row_sigmas(case.shown, case.centre), rel=1e-5)
    assert case.floor.pair == pytest.approx(independent.pair_sigmas(case.shown, case.centre), rel=1e-5)
    errors = np.stack([(one.projections.astype(float) - case.centre.projections).ravel() for one in case.shown])
    whitened = errors / np.repeat(independent.row_sigmas(case.shown, case.centre), case.centre.projections.shape[1])
    assert case.floor.effective == pytest.approx(independent.effective_number(whitened), rel=1e-5)


# --- by hand ---------------------------------------------------------------------------------------


def test_an_error_of_known_size_is_its_log():
    """An error f times as large is the log of f more in every magnitude, and f times every signed share."""
    case, error = Case(SMALL), literal.noise(77, shape=SMALL)
    one, three = case.values(error), case.values(3 * error)
    for name in (statistics.ERROR, statistics.WORST, statistics.SHIFT, statistics.TOP, statistics.TOP_WORST):
        assert three[name] - one[name] == pytest.approx(np.log(3), abs=1e-3), name
    # log p and entropy bend with the error: its square over one error is 1e-3 here.
    for name in statistics.SIGNED:
        assert three[name] == pytest.approx(3 * one[name], rel=0.02, abs=0.02), name


def test_gain_is_the_factor_of_the_logits():
    """Logits times 1 + g have the gain g in units of round-off, and its sign."""
    case = Case(SMALL)
    rows = len(case.centre)
    for g in (1e-3, -1e-3):
        found = case.values(g * case.truth)[statistics.GAIN]
        assert found == pytest.approx(g * np.sqrt(case.norms.gain.sum() / rows), rel=1e-3)


def test_replicas_have_an_error_of_one():
    """The root mean square over replicas of the error ratio is 1 by definition, where no row meets its floor."""
    case = Case(literal.SHAPE, replicas=24)
    unit = statistics.unit_of("all", [case.shown_by()])
    values = statistics.logits(case.floor.moments, case.norms, unit)[statistics.ERROR]
    assert np.sqrt(np.mean(np.exp(2 * values))) == pytest.approx(1, abs=1e-5)


def test_a_direction_is_found_with_its_coefficient():
    """An error that is a direction has the coefficient 1, and a multiple of it that multiple."""
    case = Case(SMALL)
    direction = literal.noise(500, shape=SMALL)
    part, unit = case.measured([case.one_pass(-2.5 * direction)], [case.shown_by()])
    share, coefficient = statistics.directions(part, case.norms, unit)
    assert coefficient[0] == pytest.approx(-2.5, rel=1e-2)
    assert abs(coefficient[1]) < 2
    # All of the error lies along it: its share is the whole root mean square.
    assert -share[0] == pytest.approx(np.exp(case.values(-2.5 * direction)[statistics.ERROR]), rel=1e-2)


# --- what does not matter --------------------------------------------------------------------------


@given(case=cases(), shift=st.floats(-20, 20), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_a_constant_shift_of_each_row_changes_nothing(case, shift, seed):
    """Each row may be shifted by a number of its own: no statistic sees it, as the softmax does not."""
    case, _ = case
    error = literal.noise(seed, shape=case.shape)
    shifts = shift * np.random.default_rng(seed).uniform(-1, 1, (len(error), 1))
    before, after = case.values(error), case.values(error + shifts)
    # Logits are kept in float32: 2e-6 at 30, against round-off of 1e-3.
    assert _sizes(after) == pytest.approx(_sizes(before), rel=0.01, abs=0.02)


def _sizes(found):
    """Magnitudes as multiples of round-off instead of their logarithms."""
    return {name: np.exp(value) if name in statistics.MAGNITUDES else value for name, value in found.items()}


@given(case=cases(), data=st.data(), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_the_order_of_the_prompts_does_not_matter(case, data, seed):
    """Prompts under other numbers give the same pooled statistics, and each prompt keeps its own."""
    case, _ = case
    prompts = len(case.shape.prompts)
    number = np.array(data.draw(st.permutations(range(prompts))), dtype=np.int32)
    rows = case.one_pass(literal.noise(seed, shape=case.shape))
    before, unit = case.measured([rows], [case.shown_by()])
    moved = np.argsort(np.lexsort((case.centre.position, number[case.centre.request])))
    steps = moved[case.centre.generated].argsort()
    sigma = np.empty_like(case.scale.sigma)
    sigma[moved] = case.scale.sigma
    directions = [one[moved.argsort()] for one in case.directions]
    scale = scale_of(
        _relabelled(case.centre, number), sigma, case.scale.pair[steps], directions, prompts, case.shape.vocabulary
    )
    norms = norms_of(scale)
    after = measure(_relabelled(rows, number), scale, np.arange(len(rows)))
    assert all_of(after, norms, unit) == pytest.approx(all_of(before, case.norms, unit), rel=1e-4, abs=1e-4)
    assert statistics.by_prompt(after, norms, unit)[number] == pytest.approx(
        statistics.by_prompt(before, case.norms, unit), rel=1e-5
    )
    for old, new in zip(
        statistics.directions(before, case.norms, unit), statistics.directions(after, norms, unit), strict=True
    ):
        assert new == pytest.approx(old, rel=1e-3, abs=1e-4)


def _relabelled(rows: Rows, number: np.ndarray) -> Rows:
    return sketch.sort_rows(replace(rows, request=number[rows.request]))


@given(case=cases(), copies=st.integers(2, 4), seed=st.integers(0, 99), view=st.sampled_from(sorted(VIEWS)))
@settings(deadline=None, max_examples=40)
def test_rows_that_are_shown_again_change_nothing(case, copies, seed, view):
    """A candidate that shows the same rows in several passes has the values of one pass."""
    case, _ = case
    rows, shown = case.one_pass(literal.noise(seed, shape=case.shape), view), case.shown_by(view)
    once, unit = case.measured([rows], [shown])
    again, units = case.measured([rows] * copies, [shown] * copies)
    assert all_of(again, case.norms, units) == pytest.approx(all_of(once, case.norms, unit), abs=1e-5)
    for statistic in (statistics.logits, statistics.tokens):
        # The replicas are put together in the same way.
        for name, value in statistic(case.floor.moments, case.norms, unit).items():
            assert statistic(case.floor.moments, case.norms, units)[name] == pytest.approx(value, abs=1e-5)
    for statistic in (statistics.by_prompt, statistics.by_bucket):
        assert statistic(again, case.norms, units) == pytest.approx(statistic(once, case.norms, unit), abs=1e-5)


@given(case=cases(), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_halves_of_the_prompts_make_the_whole(case, seed):
    """The mean square of all prompts is that of two halves, each with its share of the rows."""
    case, _ = case
    error = literal.noise(seed, shape=case.shape)
    everyone = range(len(case.shape.prompts))
    total, rows = 0.0, 0
    for half in (everyone[::2], everyone[1::2]):
        if half:
            count = len(case.one_pass(error, prompts=tuple(half)))
            total += count * float(np.exp(2 * case.values(error, prompts=tuple(half))[statistics.ERROR]))
            rows += count
    assert rows == len(case.centre)
    assert case.values(error)[statistics.ERROR] == pytest.approx(0.5 * np.log(total / rows), abs=1e-5)


# --- monotone --------------------------------------------------------------------------------------


@given(case=cases(), size=st.floats(1, 30), factor=st.floats(1.1, 30), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_a_larger_error_of_one_kind_is_a_larger_statistic(case, size, factor, seed):
    """However an error is directed, more of it is a larger value of every magnitude."""
    case, _ = case
    direction = literal.noise(seed, shape=case.shape)
    low, high = case.values(size * direction), case.values(size * factor * direction)
    for name in (statistics.ERROR, statistics.WORST, statistics.SHIFT, statistics.TOP, statistics.TOP_WORST):
        assert high[name] > low[name], name


@given(case=cases(), factor=st.floats(1, 1e6), data=st.data())
@settings(deadline=None, max_examples=40)
def test_an_error_in_one_row_never_lowers_a_statistic(case, factor, data):
    """Whatever row an error is enlarged in, no magnitude falls, and its own prompt sees what it must."""
    case, _ = case
    row = data.draw(st.integers(0, len(case.centre) - 1))
    error = literal.noise(3, shape=case.shape)
    worse = error.copy()
    worse[row] *= factor
    before, after = case.values(error), case.values(worse)
    for name in (statistics.ERROR, statistics.WORST):
        assert after[name] >= before[name] - 1e-5
    part, unit = case.measured([case.one_pass(worse)], [case.shown_by()])
    prompt = case.centre.request[row]
    ratio = metrics.error_norm(case.one_pass(worse).projections, case.centre.projections)[row] / case.scale.sigma[row]
    alone = np.log(ratio) - 0.5 * np.log((case.centre.request == prompt).sum())
    assert statistics.by_prompt(part, case.norms, unit)[prompt] >= alone - 1e-5


# --- nothing, ties, NaN ----------------------------------------------------------------------------


def test_no_error_is_minus_infinity():
    """The reference itself has no error: magnitudes are -inf, signed statistics exactly zero."""
    found = Case(SMALL).values(0)
    for name in (statistics.ERROR, statistics.WORST, statistics.SHIFT, statistics.TOP, statistics.TOP_WORST):
        assert np.isneginf(found[name]), name
    for name in (*statistics.SIGNED, statistics.FLIPS, statistics.DEFICIT):
        assert found[name] == 0, name


def test_a_pass_without_rows_adds_nothing():
    """An empty pass is averaged in without a trace, and alone it has no statistic at all."""
    case = Case(SMALL)
    rows, empty = case.one_pass(literal.noise(5, shape=SMALL)), sketch.empty_rows(SMALL.vocabulary)
    shown, nothing = case.shown_by(), np.zeros((3, 2), dtype=np.int64)
    alone, unit = case.measured([rows], [shown])
    both, units = case.measured([rows, empty], [shown, nothing])
    assert all_of(both, case.norms, units) == pytest.approx(all_of(alone, case.norms, unit))
    none, unit = case.measured([empty], [nothing])
    assert statistics.logits(none, case.norms, unit) == {}
    assert statistics.tokens(none, case.norms, unit) == {}
    assert np.isneginf(statistics.worst(none, unit))
    assert np.isneginf(statistics.by_prompt(none, case.norms, unit)).all()
    assert np.isneginf(statistics.by_bucket(none, case.norms, unit)).all()


def test_a_prompt_of_one_token_has_no_prompt_rows():
    """Its own rows are all generated, and what a prefill adds for the others is not asked of it."""
    case = Case(Shape(vocabulary=25, prompts=(1, 5), steps=3))
    assert case.norms.count.tolist() == [[0, 3], [4, 3]]
    found = case.values(literal.noise(4, shape=case.shape), prompts=(0,))
    assert np.isfinite([found[name] for name in (statistics.ERROR, *statistics.SIGNED)]).all()


def test_a_vocabulary_of_one_token():
    """With one token nothing can differ: no error, no margin, no gain."""
    shape = Shape(vocabulary=1, prompts=(2, 3), steps=2)
    case = Case(shape, directions=0)
    found = case.values(literal.noise(4, 5.0, shape))
    assert np.isneginf(found[statistics.ERROR])
    assert statistics.GAIN not in found
    assert found[statistics.MARGIN] == found[statistics.FLIPS] == 0


def test_ties_are_no_error():
    """Two best logits that tie to the bit have a margin of zero, before and after."""
    case = Case(SMALL)
    truth = case.truth.copy()
    order = np.argsort(-truth, axis=1)
    rows = np.arange(len(truth))
    truth[rows, order[:, 1]] = truth[rows, order[:, 0]]
    case.truth = truth
    case.centre = case.one_pass(0)
    case.scale = replace(case.scale, centre=case.centre)
    found = case.values(0)
    assert found[statistics.MARGIN] == 0
    assert np.isneginf(found[statistics.TOP])
    assert np.isfinite(case.values(literal.noise(6, shape=SMALL))[statistics.MARGIN])


@pytest.mark.parametrize("size", [1e-320, 1e-300, 1e-38])
def test_errors_below_every_precision_are_none(size):
    """A denormal error is lost when logits are kept, and neither divides by zero nor turns into NaN."""
    case = Case(SMALL)
    with np.errstate(divide="raise", invalid="raise", over="raise"):
        found = case.values(size * np.ones_like(case.truth) * np.arange(SMALL.vocabulary))
    assert found == pytest.approx(case.values(0))


@pytest.mark.parametrize("name", ["projections", "logp", "entropy", "top_logits"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("row", [0, -1])
def test_nan_and_infinity_stay_what_they_are(name, bad, row):
    """One NaN or infinity comes out of the statistics that hold it: no value that a limit could let pass."""
    case = Case(SMALL)
    rows = case.one_pass(literal.noise(5, shape=SMALL))
    broken = getattr(rows, name).copy()
    broken[row] = bad
    with np.errstate(invalid="ignore", over="ignore"):
        part, unit = case.measured([replace(rows, **{name: broken})], [case.shown_by()])
        found = {**statistics.logits(part, case.norms, unit), **statistics.tokens(part, case.norms, unit)}
        found[statistics.WORST] = statistics.worst(part, unit)
        by_prompt, by_bucket = (of(part, case.norms, unit) for of in (statistics.by_prompt, statistics.by_bucket))
    broken_ones = {one for one, value in found.items() if not abs(value) <= 1e300}
    wanted = {
        "projections": {statistics.ERROR, statistics.WORST, statistics.SHIFT, statistics.GAIN},
        "logp": {statistics.LOGP},
        "entropy": {statistics.ENTROPY},
        "top_logits": {statistics.MARGIN, statistics.TOP, statistics.TOP_WORST},
    }[name]
    assert broken_ones == wanted
    if name == "projections":
        prompt = rows.request[row]
        assert not by_prompt[prompt] <= 1e300
        assert (~(by_bucket <= 1e300)).sum() == 1
    assert len(by_bucket) == BUCKETS
