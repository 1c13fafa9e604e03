import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.numerics import metrics, sketch
from harness.numerics.constants import PROJECTIONS, TOP
from harness.values import Rows

VOCABULARY = 301
INTEGERS = {
    torch.bfloat16: (torch.int16, 16),
    torch.float16: (torch.int16, 16),
    torch.float32: (torch.int32, 32),
    torch.float64: (torch.int64, 64),
}


def logits_of(rows, *, columns=VOCABULARY, seed=0, dtype=torch.float64, scale=3.0):
    """Random logits [rows, columns]."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn((rows, columns), generator=generator, dtype=torch.float64) * scale).to(dtype)


def condensed(logits, *, vocabulary=VOCABULARY, fingerprints=False, generated=None, next_ids=None, pieces=1):
    """The rows of one request whose logits are given, added in some pieces."""
    count = len(logits)
    sketcher = sketch.Sketcher(vocabulary, fingerprints=fingerprints)
    next_ids = torch.zeros(count, dtype=torch.int64) if next_ids is None else next_ids
    generated = np.ones(count, dtype=np.bool_) if generated is None else generated
    for cut in np.array_split(np.arange(count), pieces):
        sketcher.add(
            logits[cut],
            next_ids[cut],
            request=np.zeros(len(cut), dtype=np.int32),
            position=(cut + 1).astype(np.int32),
            generated=generated[cut],
        )
    return sketcher.rows()


def coded_rows(keys, generated):
    """Rows whose every field says which (request, position) it is of."""
    requests, positions = np.array(keys, dtype=np.int32).reshape(-1, 2).T
    code = (requests * 1000 + positions).astype(np.int32)
    shown = code[generated]
    return Rows(
        request=requests,
        position=positions,
        generated=generated,
        argmax=code,
        nonfinite=code,
        logsumexp=code.astype(np.float32),
        logp=code.astype(np.float32),
        entropy=code.astype(np.float32),
        projections=np.repeat(code[:, None], PROJECTIONS, axis=1).astype(np.float32),
        top_ids=np.repeat(shown[:, None], TOP, axis=1),
        top_logits=np.repeat(shown[:, None], TOP, axis=1).astype(np.float32),
        fingerprint=shown.astype(np.int64),
    )


def assert_coded(rows):
    """Every field of `coded_rows` still stands beside its own request and position."""
    code = rows.request * 1000 + rows.position
    for name in ("argmax", "nonfinite", "logsumexp", "logp", "entropy"):
        assert (getattr(rows, name) == code).all(), name
    assert (rows.projections == code[:, None]).all()
    assert rows.fine is None or (rows.fine == np.stack([code, -code], axis=1)).all()
    shown = code[rows.generated]
    assert (rows.top_ids == shown[:, None]).all()
    assert (rows.top_logits == shown[:, None]).all()
    assert (rows.fingerprint == shown).all()


# --- the matrix ------------------------------------------------------------------------------------


def test_signs_are_signs():
    """Before centring each entry is +-1/sqrt(J), with about as many of one as of the other."""
    matrix = sketch.signs(1021)
    assert matrix.shape == (PROJECTIONS, 1021)
    for row in matrix:
        low, high = np.unique(row)
        assert high - low == pytest.approx(2 / np.sqrt(PROJECTIONS), rel=1e-12)
        # 1,021 fair coins: four standard deviations of the share.
        assert abs(np.mean(row == high) - 0.5) < 4 * 0.5 / np.sqrt(1021)


def test_signs_are_centred():
    """Each row sums to zero but for the rounding of its mean, so a constant shift of the logits projects to zero."""
    matrix = sketch.signs(1021)
    assert np.abs(matrix.sum(axis=1)).max() < 1021 * np.finfo(np.float64).eps


def test_signs_are_unlike_each_other():
    """No two rows agree or disagree more than independent coins do: each adds information of its own."""
    unit = np.sign(sketch.signs(4096) - sketch.signs(4096).mean(axis=1, keepdims=True))
    correlation = unit @ unit.T / 4096
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 5 / np.sqrt(4096)


@pytest.mark.parametrize(
    ("vocabulary", "checksum"),
    [
        (301, "aa0427ef490b5f54ca82582b9d4bc887d246333036485d37bb76e95994f9d7cb"),
        (1021, "4f37e29b842d8b63264bdda953daf373114fb79ad51997394c01103251887bed"),
    ],
)
def test_signs_never_change(vocabulary, checksum):
    """The matrix is the same to the bit in every version of numpy: stored goldens were projected with it."""
    assert hashlib.sha256(sketch.signs(vocabulary).tobytes()).hexdigest() == checksum


def test_generator_is_named():
    """The name that goldens store says the key that is really used."""
    assert f"key {sketch._KEY:#x}," in sketch.GENERATOR


# --- projections -----------------------------------------------------------------------------------


def test_projections_estimate_the_length():
    """|P e| estimates |C e| with a relative spread of about sqrt(1 / 2J), and without bias over many rows."""
    errors = logits_of(600, columns=2000, scale=1e-3)
    base = logits_of(600, columns=2000, seed=1)
    rows = condensed(base + errors, vocabulary=2000), condensed(base, vocabulary=2000)
    estimated = metrics.error_norm(rows[0].projections, rows[1].projections)
    centred = errors - errors.mean(dim=1, keepdim=True)
    ratio = estimated / centred.norm(dim=1).numpy()
    spread = np.sqrt(2 / PROJECTIONS)  # of the squared length of one row
    assert np.std(ratio**2) == pytest.approx(spread, rel=0.2)
    # Four standard deviations of the mean of 600 rows.
    assert np.mean(ratio**2) == pytest.approx(1, abs=4 * spread / np.sqrt(600))


def test_projections_see_one_wrong_column():
    """An error in a single column keeps its length: no sign vector is zero anywhere."""
    base = logits_of(VOCABULARY)
    other = base + torch.eye(VOCABULARY, dtype=torch.float64)
    estimated = metrics.error_norm(condensed(other).projections, condensed(base).projections)
    assert np.abs(estimated - 1).max() < 0.3


@given(shift=st.floats(-1e4, 1e4), seed=st.integers(0, 2**16))
@settings(deadline=None, max_examples=50)
def test_projections_are_blind_to_a_constant_shift(shift, seed):
    """Adding one number to all logits of a row changes no projection beyond rounding, as it changes no probability."""
    base = logits_of(3, seed=seed)
    before, after = condensed(base), condensed(base + shift)
    # fp64 sums over the vocabulary, then one rounding to fp32.
    rounding = VOCABULARY * 2.0**-52 * (abs(shift) + float(base.abs().max()))
    allowed = 2.0**-23 * np.linalg.norm(before.projections, axis=1) + np.sqrt(PROJECTIONS) * rounding
    assert (metrics.error_norm(after.projections, before.projections) <= allowed).all()
    assert after.logsumexp - before.logsumexp == pytest.approx(shift, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_condenses_every_dtype(dtype):
    """Logits of each dtype give what the same values give in float64, to the rounding of fp32."""
    logits = logits_of(7, dtype=dtype)
    rows, exact = condensed(logits), condensed(logits.double())
    assert (rows.top_ids == exact.top_ids).all()
    assert (rows.top_logits == exact.top_logits).all()
    assert rows.logsumexp == pytest.approx(exact.logsumexp, rel=1e-6)
    bound = VOCABULARY * 2.0**-24 * logits.double().norm(dim=1).numpy()
    assert (metrics.error_norm(rows.projections, exact.projections) <= bound).all()


# --- products with a basis -------------------------------------------------------------------------


def basis_of(columns=6, *, vocabulary=VOCABULARY, seed=0):
    """Random columns, each orthogonal to a constant, [V, B]."""
    found = np.random.default_rng(seed).normal(size=(vocabulary, columns))
    return found - found.mean(axis=0)


def fine_of(logits, basis, **more):
    """The products that a sketcher keeps, [N, B]."""
    count = len(logits)
    sketcher = sketch.Sketcher(more.pop("vocabulary", VOCABULARY), basis=basis)
    for cut in np.array_split(np.arange(count), more.pop("pieces", 1)):
        sketcher.add(
            logits[cut],
            torch.zeros(len(cut), dtype=torch.int64),
            request=np.zeros(len(cut), dtype=np.int32),
            position=(cut + 1).astype(np.int32),
            generated=cut % 2 == 0,
        )
    return sketcher.rows().fine


def test_products_with_a_basis():
    """Each row's logits are multiplied with each column of the basis, all of them, in float64."""
    logits, basis = logits_of(9), basis_of()
    found = fine_of(logits, basis)
    assert (found.dtype, found.shape) == (np.float64, (9, 6))
    assert found == pytest.approx(logits.numpy() @ basis, rel=1e-12)
    by_hand = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64)
    assert fine_of(by_hand, np.array([[1.0], [0.0], [-1.0]]), vocabulary=3).tolist() == [[-3.0]]


def test_products_are_asked_for():
    """Without a basis there are none, with rows or without, and nothing else of a row changes with one."""
    logits = logits_of(4)
    plain = condensed(logits)
    assert plain.fine is None
    assert sketch.Sketcher(VOCABULARY).rows().fine is None
    sketcher = sketch.Sketcher(VOCABULARY, basis=basis_of())
    sketcher.add(
        logits,
        torch.zeros(4, dtype=torch.int64),
        request=np.zeros(4, dtype=np.int32),
        position=np.arange(1, 5, dtype=np.int32),
        generated=np.ones(4, dtype=np.bool_),
    )
    rows = sketcher.rows()
    for name in set(Rows.__slots__) - {"fine"}:
        assert (getattr(rows, name) == getattr(plain, name)).all(), name


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 2.0**-52), (torch.bfloat16, 2.0**-23)])
def test_products_are_wide(dtype, unit):
    """Logits in float32 are multiplied in float64, narrower ones in float32, as the projections are."""
    logits, basis = logits_of(7, dtype=dtype), basis_of()
    exact = logits.double().numpy() @ basis
    allowed = VOCABULARY * unit * (np.abs(logits.double().numpy()) @ np.abs(basis))
    assert (np.abs(fine_of(logits, basis) - exact) <= allowed).all()


def test_extra_columns_are_not_multiplied():
    """A padded vocabulary has the products of the columns that the reference has."""
    logits, basis = logits_of(3), basis_of()
    padded = torch.cat([logits, torch.full((3, 5), 9.0, dtype=torch.float64)], dim=1)
    assert fine_of(padded, basis) == pytest.approx(fine_of(logits, basis), rel=1e-12)


def test_products_keep_their_rows_in_pieces(monkeypatch):
    """Rows that are added one at a time, or condensed a chunk at a time, have the same products in the same order."""
    logits, basis = logits_of(11), basis_of()
    whole = fine_of(logits, basis)
    monkeypatch.setattr(sketch, "_CHUNK_BYTES", 2 * 8 * VOCABULARY)
    assert fine_of(logits, basis, pieces=5) == pytest.approx(whole, rel=1e-12)


def test_products_show_a_nan():
    """A NaN in one row makes its products NaN, and those of no other."""
    logits = logits_of(3)
    logits[1, 4] = float("nan")
    assert np.isnan(fine_of(logits, basis_of())).any(axis=1).tolist() == [False, True, False]


def with_fine(rows):
    """Rows of `coded_rows` whose products say which (request, position) they are of."""
    code = (rows.request * 1000 + rows.position).astype(np.float64)
    return replace(rows, fine=np.stack([code, -code], axis=1))


def test_concatenated_rows_keep_their_products():
    """Products stay beside their rows; where a part has none the whole has none."""
    generated = np.array([True, False])
    first, second = (coded_rows([(one, 1), (one, 2)], generated) for one in (4, 3))
    both = sketch.concatenate([with_fine(first), with_fine(second)], VOCABULARY)
    assert both.fine[:, 0].tolist() == [4001, 4002, 3001, 3002]
    assert sketch.concatenate([with_fine(first), second], VOCABULARY).fine is None
    assert sketch.concatenate([first, second], VOCABULARY).fine is None


# --- rows ------------------------------------------------------------------------------------------


def test_fields_are_what_they_say():
    """Each field of a row equals an independent formula over the full logits."""
    logits, next_ids = logits_of(9, scale=2.0), torch.arange(9) * 30
    generated = np.arange(9) % 3 != 0
    rows = condensed(logits, generated=generated, next_ids=next_ids)
    wide = logits.numpy()
    probability = np.exp(wide) / np.exp(wide).sum(axis=1, keepdims=True)
    assert (rows.argmax == wide.argmax(axis=1)).all()
    assert rows.logsumexp == pytest.approx(np.log(np.exp(wide).sum(axis=1)), rel=1e-6)
    assert rows.logp == pytest.approx(np.log(probability[np.arange(9), next_ids.numpy()]), rel=1e-6)
    assert rows.entropy == pytest.approx(-(probability * np.log(probability)).sum(axis=1), rel=1e-6)
    order = np.argsort(-wide[generated], axis=1)[:, :TOP]
    assert (rows.top_ids == order).all()
    assert rows.top_logits == pytest.approx(np.take_along_axis(wide[generated], order, axis=1), rel=1e-6)
    assert not rows.nonfinite.any()


def test_extra_columns_count_for_the_argmax_alone():
    """A padded vocabulary changes nothing but the argmax, which must tell that a padding column won."""
    logits = logits_of(4)
    padded = torch.cat([logits, torch.full((4, 3), -50.0, dtype=torch.float64)], dim=1)
    padded[2, VOCABULARY + 1] = 99.0
    rows, plain = condensed(padded), condensed(logits)
    assert rows.argmax.tolist() == [*plain.argmax[:2], VOCABULARY + 1, plain.argmax[3]]
    for name in ("nonfinite", "logsumexp", "logp", "entropy", "projections", "top_ids", "top_logits"):
        assert (getattr(rows, name) == getattr(plain, name)).all(), name


def test_token_outside_the_vocabulary_is_no_crash():
    """A forced token that the reference has no column for is looked up in its last one."""
    rows = condensed(logits_of(2), next_ids=torch.tensor([VOCABULARY + 5, VOCABULARY - 1]))
    assert np.isfinite(rows.logp).all()
    assert (rows.logp <= 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nonfinite_logits_are_counted(value):
    """Each NaN and infinity of a row is counted, none of another row or of the padding."""
    logits = torch.cat([logits_of(3), torch.zeros((3, 2), dtype=torch.float64)], dim=1)
    logits[1, [4, 7, 200]] = value
    logits[2, VOCABULARY] = value
    assert condensed(logits).nonfinite.tolist() == [0, 3, 0]


def test_nan_stays_visible():
    """A NaN logit makes the row's projections and logsumexp NaN: it cannot look like a small error."""
    logits = logits_of(2)
    logits[1, 5] = float("nan")
    rows = condensed(logits)
    assert np.isnan(rows.projections[1]).all()
    for name in ("logsumexp", "logp", "entropy"):
        assert np.isnan(getattr(rows, name)[1]), name
        assert np.isfinite(getattr(rows, name)[0]), name
    assert np.isfinite(rows.projections[0]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_masked_column_has_no_entropy(dtype):
    """A column at -inf has no probability and adds nothing to the entropy; the row still counts as not finite."""
    logits = logits_of(2, dtype=dtype)
    masked = logits.clone()
    masked[1, 5:] = -torch.inf
    rows, few = condensed(masked), condensed(logits[:, :5].contiguous(), vocabulary=5)
    assert rows.entropy[1] == pytest.approx(few.entropy[1], rel=1e-5)
    assert rows.nonfinite.tolist() == [0, VOCABULARY - 5]


@given(shift=st.floats(-1e4, 1e4), seed=st.integers(0, 2**16))
@settings(deadline=None, max_examples=50)
def test_log_p_and_entropy_are_blind_to_a_constant_shift(shift, seed):
    """They are of the softmax, which a number added to all logits of a row does not change."""
    base = logits_of(3, seed=seed)
    before, after = condensed(base), condensed(base + shift)
    # Float64 sums at the size of the shift, then one rounding to float32 at the size of the result.
    allowed = VOCABULARY * 2.0**-52 * (abs(shift) + float(base.abs().max())) + 2.0**-22 * np.abs(before.logsumexp).max()
    for name in ("logp", "entropy"):
        assert np.abs(getattr(after, name) - getattr(before, name)).max() <= allowed


@pytest.mark.parametrize("columns", [1, 2, 301])
def test_entropy_of_equal_logits_is_that_of_a_die(columns):
    """Equal logits have the entropy log V, a single column none; log p is its negative."""
    rows = condensed(torch.full((2, columns), 7.0, dtype=torch.float64), vocabulary=columns)
    assert rows.entropy == pytest.approx(np.log(columns), rel=1e-6, abs=1e-12)
    assert rows.logp == pytest.approx(-np.log(columns), rel=1e-6, abs=1e-12)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # a float64 with a flipped exponent bit
@given(
    dtype=st.sampled_from(list(INTEGERS)),
    row=st.integers(0, 3),
    column=st.integers(0, VOCABULARY + 4),
    bit=st.integers(0, 63),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None, max_examples=200)
def test_fingerprint_changes_with_any_bit(dtype, row, column, bit, seed):
    """One flipped bit of one logit, padding columns included, changes the fingerprint of its row and of no other."""
    integer, width = INTEGERS[dtype]
    logits = logits_of(4, columns=VOCABULARY + 5, seed=seed, dtype=dtype)
    flipped = logits.clone()
    one = torch.tensor(1, dtype=integer) << (bit % width)
    flipped.view(integer)[row, column] ^= one
    before, after = (condensed(each, fingerprints=True).fingerprint for each in (logits, flipped))
    assert (before != after).tolist() == [i == row for i in range(4)]


def test_fingerprint_is_asked_for():
    """Without being asked there are no fingerprints, and with it equal bits have equal ones."""
    logits = logits_of(3, dtype=torch.bfloat16)
    assert not condensed(logits).fingerprint.any()
    first, second = (condensed(logits.clone(), fingerprints=True).fingerprint for _ in range(2))
    assert first.all()
    assert (first == second).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("pieces", [2, 5])
def test_chunks_change_nothing(monkeypatch, dtype, pieces):
    """Adding rows one at a time, or a chunk at a time inside, gives the same rows as all at once."""
    logits = logits_of(11, dtype=dtype)
    generated = np.arange(11) % 2 == 0
    whole = condensed(logits, generated=generated, fingerprints=True)
    monkeypatch.setattr(sketch, "_CHUNK_BYTES", 2 * 8 * VOCABULARY)
    parts = condensed(logits, generated=generated, fingerprints=True, pieces=pieces)
    for name in Rows.__slots__:
        if name not in ("projections", "logsumexp", "logp", "entropy", "fine"):
            assert (getattr(parts, name) == getattr(whole, name)).all(), name
    # Another shape may sum in another order: two roundings of the precision of the product apart at most. log p and
    # entropy are differences of numbers as large as the logsumexp.
    for name in ("logsumexp", "logp", "entropy"):
        assert np.abs(getattr(parts, name) - getattr(whole, name)).max() <= 2.0**-20 * np.abs(whole.logsumexp).max()
    bound = VOCABULARY * 2.0**-24 * logits.double().norm(dim=1).numpy()
    assert (metrics.error_norm(parts.projections, whole.projections) <= bound).all()


def test_rows_take_the_suites_indices():
    """Requests that were added as 0, 1 are named and ordered as the suite's 4 and 2."""
    sketcher = sketch.Sketcher(VOCABULARY)
    for request in (0, 1):
        sketcher.add(
            logits_of(2, seed=request),
            torch.zeros(2, dtype=torch.int64),
            request=np.full(2, request, dtype=np.int32),
            position=np.array([2, 1], dtype=np.int32),
            generated=np.array([True, False]),
        )
    rows = sketcher.rows((4, 2))
    assert rows.request.tolist() == [2, 2, 4, 4]
    assert rows.position.tolist() == [1, 2, 1, 2]
    assert rows.argmax.tolist() == [
        *logits_of(2, seed=1).argmax(1).tolist()[::-1],
        *logits_of(2).argmax(1).tolist()[::-1],
    ]
    assert (rows.top_ids[:, 0] == rows.argmax[rows.generated]).all()


def test_no_rows_have_the_same_types():
    """Nothing added gives zero rows of the shapes and dtypes that any other rows have."""
    nothing, something = sketch.Sketcher(VOCABULARY).rows(), condensed(logits_of(2))
    assert len(nothing) == 0
    for name in set(Rows.__slots__) - {"fine"}:
        empty, full = getattr(nothing, name), getattr(something, name)
        assert (empty.dtype, empty.shape[1:]) == (full.dtype, full.shape[1:]), name
        assert len(empty) == 0, name


def test_a_vocabulary_smaller_than_the_top():
    """Where there are fewer columns than top entries, all of them are kept."""
    rows = condensed(logits_of(3, columns=7), vocabulary=7)
    assert rows.top_ids.shape == (3, 7)
    assert sketch.empty_rows(7).top_ids.shape == (0, 7)


_KEYS = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 99)), min_size=1, max_size=30, unique=True)


@given(keys=_KEYS, data=st.data())
@settings(deadline=None, max_examples=100)
def test_sorting_keeps_rows_together(keys, data):
    """Sorted rows are ordered by (request, position), and every field moved with its row."""
    generated = np.array(data.draw(st.lists(st.booleans(), min_size=len(keys), max_size=len(keys))))
    rows = sketch.sort_rows(with_fine(coded_rows(keys, generated)))
    assert list(zip(rows.request.tolist(), rows.position.tolist(), strict=True)) == sorted(keys)
    assert rows.generated.sum() == generated.sum()
    assert_coded(rows)


@given(keys=_KEYS, data=st.data())
@settings(deadline=None, max_examples=100)
def test_selecting_keeps_top_entries_aligned(keys, data):
    """A mask and the same choice as indices give the same rows, each with its own top entries and fingerprint."""
    flags = st.lists(st.booleans(), min_size=len(keys), max_size=len(keys))
    rows = with_fine(coded_rows(keys, np.array(data.draw(flags))))
    mask = np.array(data.draw(flags))
    by_mask, by_index = sketch.select_rows(rows, mask), sketch.select_rows(rows, np.flatnonzero(mask))
    assert len(by_mask) == mask.sum()
    assert_coded(by_mask)
    for name in Rows.__slots__:
        assert (getattr(by_mask, name) == getattr(by_index, name)).all(), name
