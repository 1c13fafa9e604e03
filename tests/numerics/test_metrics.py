import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from harness.numerics import metrics, sketch
from harness.numerics.constants import BUCKETS, PAIR_FLOOR, PROJECTIONS, SIGMA_FLOOR


def rng_of(seed=0):
    """A seeded generator."""
    return np.random.default_rng(seed)


# --- error and sigma -------------------------------------------------------------------------------


def test_error_norm_is_the_euclidean_length():
    """The error of a row is the length of the difference of its projections."""
    measured, centre = (rng_of(i).normal(size=(5, PROJECTIONS)).astype(np.float32) for i in (0, 1))
    expected = np.linalg.norm(measured.astype(np.float64) - centre, axis=1)
    assert metrics.error_norm(measured, centre) == pytest.approx(expected, rel=1e-14)


def test_error_norm_keeps_small_differences():
    """Two fp32 values one ulp apart near 1,000 differ: they are subtracted in float64."""
    centre = np.full((1, PROJECTIONS), 1000, dtype=np.float32)
    other = np.nextafter(centre, np.float32(2000))
    expected = np.sqrt(PROJECTIONS) * (float(other[0, 0]) - 1000)
    assert metrics.error_norm(other, centre)[0] == pytest.approx(expected, rel=1e-14)


def test_rms_is_that_of_all_values():
    """The root mean square is over every value of an array of any shape, and 0 of none."""
    assert metrics.rms(np.array([[3.0, 4.0], [0.0, 0.0]])) == 2.5
    assert metrics.rms(np.zeros(0)) == 0.0


def test_row_sigma_is_the_rms_over_replicas():
    """Sigma of a row is the root mean square of its errors over the replicas."""
    norms = rng_of().uniform(1, 2, size=(6, 9))
    expected = [np.sqrt(sum(value**2 for value in column) / 6) for column in norms.T]
    assert metrics.row_sigma(norms) == pytest.approx(expected, rel=1e-14)


def test_row_sigma_has_a_floor():
    """A row whose replicas agree by chance gets a share of the median row's sigma, others stay as they are."""
    norms = np.ones((3, 5))
    norms[:, 2] = 0.0
    assert metrics.row_sigma(norms).tolist() == [1, 1, SIGMA_FLOOR, 1, 1]


# --- buckets ---------------------------------------------------------------------------------------


@given(positions=st.lists(st.integers(1, 5000), min_size=1, max_size=200, unique=True))
@settings(deadline=None, max_examples=100)
def test_buckets_are_about_equal(positions):
    """Different positions fall into buckets of nearly one size, in the order of the positions."""
    found = metrics.position_buckets(np.array(positions))
    counts = np.bincount(found, minlength=BUCKETS)
    assert len(counts) == BUCKETS
    assert counts.max() - counts.min() <= 2
    assert (np.diff(found[np.argsort(positions)]) >= 0).all()


@given(positions=st.lists(st.integers(1, 30), min_size=1, max_size=200))
@settings(deadline=None, max_examples=50)
def test_one_position_is_in_one_bucket(positions):
    """Rows at the same position share a bucket, however many there are."""
    found = metrics.position_buckets(np.array(positions))
    assert all(len(set(found[np.array(positions) == p].tolist())) == 1 for p in positions)


# --- logit differences -----------------------------------------------------------------------------


def pair_noise_by_pairs(errors):
    """The mean squared difference over all pairs that a replica shows, over replicas; floored."""
    noise = []
    for step in range(errors.shape[1]):
        squares = []
        for replica in errors[:, step]:
            shown = replica[np.isfinite(replica)]
            if len(shown) > 1:
                squares.append(np.mean([(a - b) ** 2 for a, b in itertools.combinations(shown, 2)]))
        noise.append(np.sqrt(np.mean(squares)) if squares else 0.0)
    pool = np.sqrt(np.mean(np.square(noise)))
    return np.maximum(noise, PAIR_FLOOR * pool)


def test_pair_noise_is_the_rms_over_pairs():
    """The noise of a step is what the sum over all pairs of its top entries gives."""
    errors = rng_of().normal(size=(7, 6, 5)) * np.array([0.5, 1, 2, 1, 1, 3])[None, :, None]
    assert metrics.pair_noise(errors) == pytest.approx(pair_noise_by_pairs(errors), rel=1e-12)


def test_pair_noise_leaves_out_what_is_not_shown():
    """Entries that a replica does not show are no zeros: the noise is that of the pairs it does show."""
    errors = rng_of(1).normal(size=(7, 6, 5))
    errors[rng_of(2).random(errors.shape) < 0.4] = np.nan
    errors[:, 3] = np.nan
    found = metrics.pair_noise(errors)
    assert found == pytest.approx(pair_noise_by_pairs(errors), rel=1e-12)
    assert found[3] > 0


@given(shift=hnp.arrays(np.float64, (4, 3), elements=st.floats(-100, 100)))
@settings(deadline=None, max_examples=50)
def test_pair_noise_of_equal_shifts_is_zero(shift):
    """An error that all entries of a step share flips no token: it is no noise."""
    errors = np.repeat(shift[:, :, None], 5, axis=2)
    assert (metrics.pair_noise(errors) <= 1e-13 * np.abs(shift).max()).all()


def test_pair_noise_has_a_floor():
    """A step whose replicas agree by chance gets a share of the pooled noise."""
    errors = rng_of().normal(size=(6, 4, 5))
    errors[:, 1] = 0.25
    found = metrics.pair_noise(errors)
    raw = pair_noise_by_pairs(errors)
    assert found[1] == pytest.approx(raw[1])
    assert found[1] == pytest.approx(PAIR_FLOOR * np.sqrt(np.sum(np.delete(found, 1) ** 2) / 4), rel=1e-12)


def test_a_masked_entry_spoils_no_other():
    """A token that a server masks with minus infinity has that logit, and the others keep theirs."""
    ids = np.array([[9, 5, 4]], dtype=np.int32)
    found = metrics.logits_at(ids, ids, np.array([[2.0, 1.0, -np.inf]], dtype=np.float32))
    assert found.tolist() == [[2.0, 1.0, -np.inf]]


def test_logits_at_looks_up_by_token():
    """Logits are found by token id and not by place; a token that is not stored is NaN, not 0."""
    top_ids = np.array([[5, 3, 9], [1, 2, 3]], dtype=np.int32)
    top_logits = np.array([[3.0, 2.0, 1.0], [-1.0, -2.0, -3.0]], dtype=np.float32)
    found = metrics.logits_at(np.array([[9, 5, 4], [3, 5, 1]], dtype=np.int32), top_ids, top_logits)
    expected = [[1.0, 3.0, np.nan], [-3.0, np.nan, -1.0]]
    np.testing.assert_array_equal(found, expected)


def test_pair_noise_is_floored_by_its_own_prompt():
    """A step whose replicas agree gets a share of what its prompt has, not of what a noisier prompt has."""
    errors = rng_of(6).normal(size=(7, 8, 5)) * np.repeat([1.0, 50.0], 4)[None, :, None]
    errors[:, 2] = errors[:, 6] = 0.0
    units = np.repeat([0, 1], 4)
    found = metrics.pair_noise(errors, units)
    expected = np.concatenate([pair_noise_by_pairs(errors[:, units == unit]) for unit in (0, 1)])
    assert found == pytest.approx(expected, rel=1e-12)
    assert found[6] > 20 * found[2]
    assert metrics.pair_noise(errors)[2] == pytest.approx(pair_noise_by_pairs(errors)[2])


def test_margins_by_hand():
    """The margin is the best logit less the second, infinite where there is only one token."""
    assert metrics.margins(np.array([[3.0, 1.0, 0.5], [2.0, 2.0, 0.0]], dtype=np.float32)).tolist() == [2.0, 0.0]
    assert np.isposinf(metrics.margins(np.ones((3, 1), dtype=np.float32))).all()


@given(
    logits=hnp.arrays(np.float32, (3, 12), elements=st.floats(-50, 50, width=32)),
    token=hnp.arrays(np.int64, 3, elements=st.integers(0, 11)),
)
@settings(deadline=None, max_examples=100)
def test_deficit_is_a_lower_bound(logits, token):
    """The deficit from the stored top entries never exceeds the true one, and equals it for a stored token."""
    top_ids = np.argsort(-logits, axis=1, kind="stable")[:, :4].astype(np.int32)
    top_logits = np.take_along_axis(logits, top_ids, axis=1)
    wide = logits.astype(np.float64)
    true = wide.max(axis=1) - wide[np.arange(3), token]
    found = metrics.deficit(top_ids, top_logits, token)
    assert (found >= 0).all()
    assert (found <= true).all()
    stored = (top_ids == token[:, None]).any(axis=1)
    assert (found[stored] == true[stored]).all()


# --- divergence ------------------------------------------------------------------------------------


def rows_of(logits, top=20, generated=None):
    """Rows of one request with the given logits [N, V]; of each generated one the ``top`` highest entries."""
    count = len(logits)
    generated = np.ones(count, dtype=np.bool_) if generated is None else generated
    order = np.argsort(-logits, axis=1, kind="stable")[generated, :top]
    numbers = np.zeros(count, dtype=np.int32)
    return replace(
        sketch.empty_rows(logits.shape[1]),
        request=numbers,
        position=np.arange(1, count + 1, dtype=np.int32),
        generated=generated,
        logsumexp=np.log(np.exp(logits).sum(axis=1)).astype(np.float32),
        top_ids=order.astype(np.int32),
        top_logits=np.take_along_axis(logits[generated], order, axis=1).astype(np.float32),
    )


def divergence_by_hand(p_logits, q_logits):
    """KL(p || q) in nats over all columns."""
    p, q = (np.exp(one) / np.exp(one).sum(axis=1, keepdims=True) for one in (p_logits, q_logits))
    return (p * np.log(p / q)).sum(axis=1)


@pytest.mark.parametrize("columns", [1, 7, 20])
def test_divergence_of_all_columns_is_exact(columns):
    """Where all columns are kept nothing is merged, and it is the divergence itself."""
    logits = rng_of(7).normal(0, 2, (5, columns))
    other = logits + rng_of(8).normal(0, 0.5, logits.shape)
    found = metrics.coarse_divergence(rows_of(logits), rows_of(other), np.arange(5))
    # Rounded to float32, the probabilities sum to 1 within 1e-7, which the cell for the rest then holds.
    assert found == pytest.approx(divergence_by_hand(logits, other), rel=1e-4, abs=1e-5)


@given(seed=st.integers(0, 2**16), size=st.floats(0.01, 3), top=st.integers(1, 12))
@settings(deadline=None, max_examples=50)
def test_coarse_divergence_never_exceeds_the_true_one(seed, size, top):
    """Merging all but the top entries loses divergence and never adds to it; it is never negative."""
    logits = rng_of(seed).normal(0, 2, (4, 40))
    other = logits + rng_of(seed + 1).normal(0, size, logits.shape)
    true = divergence_by_hand(logits, other)
    found = metrics.coarse_divergence(rows_of(logits, top), rows_of(other, 40), np.arange(4))
    assert (found >= 0).all()
    # The logits are rounded to float32 when kept.
    assert (found <= true * (1 + 1e-4) + 1e-5).all()


def test_divergence_of_equal_rows_is_zero():
    """A distribution does not diverge from itself, whatever constant its logits are shifted by."""
    logits = rng_of(9).normal(0, 2, (5, 40))
    for shift in (0.0, 8.0):
        found = metrics.coarse_divergence(rows_of(logits), rows_of(logits + shift), np.arange(5))
        assert found == pytest.approx(0, abs=1e-5)


def test_divergence_is_of_the_generated_rows_at_their_own_places():
    """Prompt rows hold no top entries: they are passed over on both sides, and the others found by place."""
    logits = rng_of(10).normal(0, 2, (6, 40))
    other = logits + rng_of(11).normal(0, 0.5, logits.shape)
    generated = np.array([False, False, True, True, False, True])
    place = np.array([1, 3, 5])
    found = metrics.coarse_divergence(
        rows_of(logits, generated=generated), rows_of(other[place], generated=generated[place]), place
    )
    expected = metrics.coarse_divergence(rows_of(logits), rows_of(other), np.arange(6))[[3, 5]]
    assert found == pytest.approx(expected, rel=1e-6)


def test_divergence_of_nan_is_nan():
    """NaN among the entries is no divergence that a limit could let pass."""
    logits = rng_of(12).normal(0, 2, (2, 40))
    broken = replace(rows_of(logits), logsumexp=np.array([np.nan, 1.0], dtype=np.float32))
    found = metrics.coarse_divergence(rows_of(logits), broken, np.arange(2))
    assert not found[0] <= 1e300


# --- effective number ------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 8, 24])
def test_independent_replicas_count_in_full(count):
    """K independent replicas count as K - 1: one is spent on the common mode."""
    errors = rng_of(count).normal(size=(count, 20_000))
    assert metrics.effective_number(errors) == pytest.approx(count - 1, rel=0.02)


def test_a_common_mode_does_not_count():
    """An error that all replicas share, however large, changes nothing: it is removed first."""
    errors = rng_of().normal(size=(8, 5000))
    shared = errors + 100 * rng_of(1).normal(size=5000)
    assert metrics.effective_number(shared) == pytest.approx(metrics.effective_number(errors), rel=1e-9)


@pytest.mark.parametrize("kinds", [1, 2, 4])
def test_copies_count_once(kinds):
    """Six copies each of some replicas count as those few, not as all."""
    errors = np.repeat(rng_of(3).normal(size=(kinds, 20_000)), 6, axis=0)
    assert metrics.effective_number(errors) == pytest.approx(max(1, kinds - 1), rel=0.03)


def test_near_copies_count_little_more():
    """Replicas that differ by a hundredth are no independent evidence, whatever their number."""
    base = np.repeat(rng_of(4).normal(size=(3, 20_000)), 8, axis=0)
    near = base + 0.01 * rng_of(5).normal(size=base.shape)
    assert metrics.effective_number(near) < 3


def test_one_or_no_spread_counts_as_one():
    """A single replica, and replicas without any difference, count as one."""
    assert metrics.effective_number(rng_of().normal(size=(1, 50))) == 1
    assert metrics.effective_number(np.zeros((5, 50))) == 1


@given(errors=hnp.arrays(np.float64, (6, 9), elements=st.floats(-1e3, 1e3)), factor=st.floats(1e-6, 1e6))
@settings(deadline=None, max_examples=50)
def test_the_effective_number_is_between_one_and_all(errors, factor):
    """It never exceeds the number of replicas nor falls below one."""
    assert 1 - 1e-9 <= metrics.effective_number(errors * factor) <= 6 + 1e-9


# --- nothing, and NaN ------------------------------------------------------------------------------


def test_empty_inputs_give_empty_outputs():
    """No rows, no steps and no units are no errors."""
    integers = np.zeros(0, dtype=np.int64)
    no_projections = np.zeros((0, PROJECTIONS), dtype=np.float32)
    assert metrics.error_norm(no_projections, no_projections).shape == (0,)
    assert metrics.row_sigma(np.zeros((3, 0))).shape == (0,)
    assert metrics.position_buckets(integers).shape == (0,)
    assert metrics.pair_noise(np.zeros((3, 0, 5))).shape == (0,)
    ids, logits = np.zeros((0, 5), dtype=np.int32), np.zeros((0, 5), dtype=np.float32)
    assert metrics.logits_at(ids, ids, logits).shape == (0, 5)
    assert metrics.margins(logits).shape == (0,)
    assert metrics.deficit(ids, logits, integers).shape == (0,)
    empty = sketch.empty_rows(40)
    assert metrics.coarse_divergence(empty, empty, integers).shape == (0,)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_is_never_a_small_number(bad):
    """One NaN or infinity comes out of every metric as one: nothing that is compared with `<=` can pass."""
    projections = np.zeros((2, PROJECTIONS), dtype=np.float32)
    broken = projections.copy()
    broken[1, 3] = bad
    norms = metrics.error_norm(broken, projections)
    assert norms[0] == 0
    assert not norms[1] <= 1e300
    assert not metrics.row_sigma(np.stack([norms, norms]))[1] <= 1e300


def test_nan_in_an_explicit_difference_is_nan():
    """Infinity less infinity is NaN, and does not cancel into agreement."""
    broken = np.full((1, PROJECTIONS), np.inf, dtype=np.float32)
    with np.errstate(invalid="ignore"):
        assert np.isnan(metrics.error_norm(broken, broken)[0])
