from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.numerics import moments, sketch
from harness.numerics.constants import DEFICIT_CLIP, PAIR_TOP
from harness.values import Moments
from tests.comparison import literal
from tests.comparison.literal import Shape

SHAPE = Shape(vocabulary=25, prompts=(1, 6, 3), steps=4)
LARGEST = ("largest", "top_largest")
POOLED = ("bias", "bucket")
NAMES = [field.name for field in fields(Moments)]


@pytest.fixture(scope="module")
def truth():
    """The reference's logits."""
    return literal.reference_logits(shape=SHAPE)


@pytest.fixture(scope="module")
def centre(truth):
    """The reference's rows."""
    return literal.condense(truth, truth=truth, shape=SHAPE)


@pytest.fixture(scope="module")
def scale(truth, centre):
    """What errors of the shape are measured in, with one direction."""
    floor = literal.floor([truth + literal.noise(k, shape=SHAPE) for k in range(6)], truth, shape=SHAPE)
    direction = literal.projected(literal.noise(50, shape=SHAPE), SHAPE)
    return moments.scale_of(centre, floor.sigma, floor.pair, [direction], 3, SHAPE.vocabulary)


def measured(rows, scale):
    """Moments of rows wherever they stand in the centre."""
    place = np.searchsorted(scale.centre.request, rows.request) + rows.position - 1
    return moments.measure(rows, scale, place)


def rows_of(truth, error, keep=None):
    """Rows of the reference's logits with an error."""
    return literal.condense(truth + error, keep, truth=truth, shape=SHAPE)


@pytest.fixture(scope="module")
def rows(truth):
    """Rows of a candidate like the replicas, its best tokens with two flips among them."""
    error = literal.noise(9, shape=SHAPE)
    for row in (0, -1):
        error[row, np.argsort(-truth[row])[2]] += 20
    return rows_of(truth, error)


# --- sums ------------------------------------------------------------------------------------------


def test_norms_count_rows_and_measure_the_centre(scale, centre):
    """Rows are counted by prompt and kind, and by range of positions; lengths are in units of round-off."""
    norms = moments.norms_of(scale)
    assert norms.count.tolist() == [[0, 4], [5, 4], [2, 4]]
    assert norms.bucket.sum(axis=1).tolist() == [7, 12]
    generated = centre.generated
    assert norms.bucket[1].tolist() == np.bincount(scale.buckets[generated], minlength=6).tolist()
    whitened = centre.projections.astype(float) / scale.sigma[:, None]
    mine = (centre.request == 1) & generated
    assert norms.gain[1, 1] == pytest.approx((whitened[mine] ** 2).sum())
    along = scale.directions[0] / scale.sigma[:, None]
    assert norms.along[1, 1, 0] == pytest.approx((along[mine] ** 2).sum())


@given(cut=st.lists(st.booleans(), min_size=SHAPE.rows, max_size=SHAPE.rows))
@settings(deadline=None, max_examples=50)
def test_moments_of_parts_add_up(cut, rows, scale):
    """Rows may be cut in two anywhere: sums add up, and the larger of two largest is the largest."""
    cut = np.array(cut)
    whole = measured(rows, scale)
    first, second = (measured(sketch.select_rows(rows, mask), scale) for mask in (cut, ~cut))
    for name in NAMES:
        combined = np.maximum if name in LARGEST else np.add
        expected = getattr(whole, name)
        found = combined(getattr(first, name), getattr(second, name))
        # float32 sums: what cancels is as large as the whole.
        near = 1e-6 * max(1, float(np.abs(expected).max(initial=0)))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=near, err_msg=name)


def test_the_order_of_rows_does_not_matter(rows, scale):
    """Rows may come in any order, as batches of any shape bring them."""
    order = np.random.default_rng(0).permutation(len(rows))
    shuffled = measured(sketch.select_rows(rows, order), scale)
    for name in NAMES:
        expected = getattr(measured(rows, scale), name)
        np.testing.assert_allclose(getattr(shuffled, name), expected, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in POOLED])
def test_each_prompt_has_its_own(name, rows, scale):
    """An error in one prompt is in that prompt's moments and in no other's."""
    clean = replace(rows, projections=scale.centre.projections, logp=scale.centre.logp, entropy=scale.centre.entropy)
    clean = replace(
        clean,
        argmax=np.where(clean.request == 1, rows.argmax, -1).astype(np.int32),
        top_ids=scale.centre.top_ids,
        top_logits=scale.centre.top_logits,
    )
    clean.argmax[clean.generated] = scale.centre.top_ids[:, 0]
    mine = clean.request == 1
    for field in ("projections", "logp", "entropy"):
        values = getattr(clean, field).copy()
        values[mine] += 1
        clean = replace(clean, **{field: values})
    tops = clean.top_logits.copy()
    tops[clean.request[clean.generated] == 1, 0] += 1
    argmax = clean.argmax.copy()
    argmax[mine & clean.generated] = scale.centre.top_ids[clean.request[clean.generated] == 1, 3]
    found = getattr(measured(replace(clean, top_logits=tops, argmax=argmax), scale), name)
    assert np.abs(found[1]).max() > 0
    assert not np.delete(found, 1, axis=0).any()


def test_a_replay_has_no_moments_of_prompts(truth, centre, scale):
    """Of generated rows alone the sums over prompt rows are zero, and the others those of all rows."""
    error = literal.noise(9, shape=SHAPE)
    whole, replay = measured(rows_of(truth, error), scale), measured(rows_of(truth, error, centre.generated), scale)
    for name in NAMES:
        one, other = getattr(replay, name), getattr(whole, name)
        if name in ("margin", "top", "top_largest", "flips", "deficit"):
            assert (one == other).all(), name
        else:
            axis = 0 if name in POOLED else 1
            assert not one.take(0, axis).any(), name
            assert (one.take(1, axis) == other.take(1, axis)).all(), name


def test_stacked_moments_have_a_leading_axis(rows, scale):
    """Replicas are kept as one, in the order given."""
    one = measured(rows, scale)
    two = replace(one, square=2 * one.square)
    stacked = moments.stack([one, two])
    for name in NAMES:
        assert getattr(stacked, name).shape == (2, *getattr(one, name).shape)
    assert (stacked.square[1] == 2 * stacked.square[0]).all()


def test_no_direction_is_an_axis_of_none(truth, rows, centre, scale):
    """Without directions the last axis is there and empty, of candidates and norms alike."""
    none = moments.scale_of(centre, scale.sigma, scale.pair, [], 3, SHAPE.vocabulary)
    assert measured(rows, none).along.shape == (3, 2, 0)
    assert moments.norms_of(none).along.shape == (3, 2, 0)


def test_a_row_without_round_off_divides_nothing_by_zero(rows, centre, scale):
    """Where all replicas agree to the bit any error is beyond all limits, and no error is none."""
    exact = moments.scale_of(centre, np.zeros_like(scale.sigma), np.zeros_like(scale.pair), [], 3, SHAPE.vocabulary)
    with np.errstate(divide="raise", invalid="raise"):
        nothing = measured(centre, exact)
    assert not nothing.square.any()
    with np.errstate(over="ignore"):
        something = measured(rows, exact)
    assert not (something.square[1] <= 1e30).any()


# --- tokens and top entries ------------------------------------------------------------------------


def test_deficit_is_clipped(centre):
    """A token's distance from the best is in units of noise, and no step adds more than the clip."""
    step, pair = np.arange(3), np.array([1e-9, 2.0, 1e9])
    token = centre.top_ids[step, 4].astype(np.int64)
    gap = centre.top_logits[step, 0].astype(float) - centre.top_logits[step, 4]
    expected = [DEFICIT_CLIP, min(gap[1] / 2, DEFICIT_CLIP), gap[2] / 1e9]
    assert moments.clipped_deficit(centre, step, token, pair) == pytest.approx(expected)
    best = centre.top_ids[step, 0].astype(np.int64)
    assert not moments.clipped_deficit(centre, step, best, pair).any()


def ratios(centre, truth, error, *, entries, shift=0.0, order=None):
    """`entry_ratios` of an engine that shows the highest entries of each generated step."""
    logits = (truth + error)[centre.generated] + shift
    order = np.argsort(-logits, axis=1)[:, :entries] if order is None else order
    values = np.take_along_axis(logits, order, axis=1)
    steps, pair = np.arange(len(logits)), np.full(len(logits), literal.NOISE)
    return moments.entry_ratios(order.astype(np.int32), values.astype(np.float32), centre, steps, pair)


@pytest.mark.parametrize("entries", [PAIR_TOP + 1, 20])
def test_entry_ratio_is_that_of_the_pairs(centre, truth, entries):
    """The ratio of a step is the root mean square difference of two errors, among the reference's best five.

    One entry more than five is asked for: the fifth and the sixth may change places.
    """
    error = literal.noise(21, shape=SHAPE)
    mine = np.take_along_axis(error[centre.generated], centre.top_ids[:, :PAIR_TOP].astype(np.int64), axis=1)
    pairs = [(row[:, None] - row)[np.triu_indices(PAIR_TOP, 1)] for row in mine]
    expected = [np.sqrt(np.mean(row**2)) / literal.NOISE for row in pairs]
    assert ratios(centre, truth, error, entries=entries) == pytest.approx(expected, rel=2e-3)


def test_log_probabilities_serve_as_logits(centre, truth):
    """A constant of a step's own, such as its logsumexp, is no error."""
    error, shift = (
        literal.noise(21, shape=SHAPE),
        np.random.default_rng(1).normal(0, 5, (int(centre.generated.sum()), 1)),
    )
    expected = ratios(centre, truth, error, entries=8)
    assert ratios(centre, truth, error, entries=8, shift=shift) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("entries", range(1, PAIR_TOP))
def test_few_entries_bound_the_error_from_below(centre, truth, entries):
    """An entry that is not shown lies at most at the last one that is: that alone is no error."""
    assert ratios(centre, truth, 0, entries=entries) == pytest.approx(0, abs=1e-3)


def test_an_entry_that_should_be_among_the_best_is_missed(centre, truth):
    """The reference's best token pushed out of the entries shows, though its own logit is not seen."""
    error = np.zeros_like(truth)
    error[np.arange(len(truth)), truth.argmax(axis=1)] = -100.0
    assert (ratios(centre, truth, error, entries=PAIR_TOP) > 100).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_entries_that_are_not_finite_are_never_small(centre, truth, bad):
    """NaN or infinity in the place of the best entry is no ratio that a limit could let pass."""
    error = np.zeros_like(truth)
    order = np.argsort(-truth[centre.generated], axis=1)[:, :PAIR_TOP]
    error[np.arange(len(truth)), truth.argmax(axis=1)] = bad
    with np.errstate(invalid="ignore"):
        found = ratios(centre, truth, error, entries=PAIR_TOP, order=order)
    assert not (found <= 100).any()


def test_entries_of_one_token_have_no_differences():
    """With a vocabulary of one token there is nothing to differ from."""
    shape = Shape(vocabulary=1, prompts=(2,), steps=3)
    truth = literal.reference_logits(shape=shape)
    centre = literal.condense(truth, truth=truth, shape=shape)
    found = moments.entry_ratios(centre.top_ids, centre.top_logits + 1, centre, np.arange(3), np.zeros(3))
    assert found.tolist() == [0, 0, 0]
