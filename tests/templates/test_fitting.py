"""Sums over rows: the one pass is what products row by row give, and fits of real templates find what was put in."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.numerics.constants import ALPHA_TEMPLATES
from harness.numerics.matched import fits
from harness.templates.fitting import Projector, filter_of, part_of, places_of, sums_of
from tests.templates import tiny


@pytest.fixture(scope="module")
def bank():
    """The tiny golden's templates."""
    return tiny.bank()


def projector_of(precision="bfloat16"):
    """The templates beside the round-off of one precision."""
    one = tiny.bank()
    return Projector.of(
        one, tiny.golden().rows.request[one.place], tiny.sigma(precision)[:, 0], one.noises[precision].whiten
    )


def fitted(error, precision="bfloat16", views=(0, 1)):
    """The filter of the bugs, and the sums of an error [M, R] in orthonormal coordinates."""
    one = tiny.bank()
    noise = one.noises[precision]
    whole = sums_of(projector_of(precision), noise, error / tiny.sigma(precision), list(views))
    return filter_of(one, noise, list(views)), part_of(whole, slice(len(one.names)))


def named(error, precision="bfloat16", views=(0, 1)):
    """What is named of an error: {(id, strength): coefficient}, best first."""
    one, sums = fitted(error, precision, views)
    return {tiny.bank().names[m.index]: m.coefficient for m in one.named(sums, one.limit(ALPHA_TEMPLATES))}


# --- sums --------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", tiny.PRECISIONS)
def test_a_template_is_decoded_and_whitened(bank, precision):
    """One template in units of round-off, whitened, is what its codes say by hand."""
    index = bank.names.index(("x-rows-swapped", 1.0))
    by_hand = tiny.template("x-rows-swapped") / tiny.sigma(precision) @ bank.noises[precision].whiten
    assert projector_of(precision).template(index) == pytest.approx(by_hand, rel=1e-6, abs=1e-6 * np.abs(by_hand).max())


@pytest.mark.parametrize("precision", tiny.PRECISIONS)
def test_gram_is_the_direct_inner_product(bank, precision):
    """Each entry is the sum over the rows of its view and prompt of the product of the two templates."""
    projector, noise = projector_of(precision), bank.noises[precision]
    chosen = [0, bank.names.index(("x-bias-doubled", 0.1)), bank.names.index(("wc-eps", 1.0)), len(bank) - 1]
    direct = [projector.template(index) for index in chosen]
    for view in (0, 1):
        for prompt in range(4):
            rows = (bank.view == view) & (projector.prompt == prompt)
            assert rows.any()
            by_hand = np.array([[(one[rows] * other[rows]).sum() for other in direct] for one in direct])
            found = noise.gram[view, prompt][np.ix_(chosen, chosen)]
            length = np.sqrt(np.diag(by_hand))
            # float32 products of templates that were brought to length 1.
            assert np.abs(found - by_hand).max() < 1e-3 * length.max() ** 2
            assert np.abs(found - by_hand) / np.outer(length, length) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("precision", tiny.PRECISIONS)
def test_sums_are_the_direct_products(bank, precision):
    """Sums with each template and squares, of each view and prompt, are what products row by row give."""
    projector = projector_of(precision)
    errors = np.random.default_rng(0).normal(size=(2, *bank.codes.shape[1:])) / 10
    along, square = projector.sums(errors)
    assert along.shape == (2, 2, 4, len(bank))
    whitened = errors @ projector.whiten
    for index in (0, 5, len(bank) - 1):
        products = (whitened * projector.template(index)).sum(axis=2)
        lengths = np.linalg.norm(whitened, axis=2) * np.linalg.norm(projector.template(index), axis=1)
        for view in (0, 1):
            for prompt in range(4):
                rows = (bank.view == view) & (projector.prompt == prompt)
                error = np.abs(along[:, view, prompt, index] - products[:, rows].sum(axis=1))
                assert (error < 1e-5 * lengths[:, rows].sum(axis=1)).all()
                assert square[:, view, prompt] == pytest.approx((whitened[:, rows] ** 2).sum(axis=(1, 2)))


@given(one=st.floats(-5, 5), other=st.floats(-5, 5), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=8)
def test_sums_are_linear(one, other, seed):
    """The sums of two errors together are those of each, for whatever they are."""
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=(2, *tiny.bank().codes.shape[1:]))
    along, _ = projector_of().sums(np.stack([first, second, one * first + other * second]))
    size = np.abs(along).max()
    assert along[2] == pytest.approx(one * along[0] + other * along[1], abs=1e-4 * size)


def test_views_alone(bank):
    """The filter of one view has the sums of that view, and of both their sum."""
    noise = bank.noises["bfloat16"]
    replay, prefill, both = (filter_of(bank, noise, views) for views in ([0], [1], [0, 1]))
    assert replay.gram + prefill.gram == pytest.approx(both.gram)
    assert replay.replicas + prefill.replicas == pytest.approx(both.replicas)
    assert replay.squares + prefill.squares == pytest.approx(both.squares)
    assert (replay.gram == noise.gram[0][:, : len(bank.names), : len(bank.names)]).all()


def test_bugs_and_places_are_apart(bank):
    """The filter of bugs has one kind a bug whatever its strength, that of places one a place."""
    noise = bank.noises["bfloat16"]
    bugs, places = filter_of(bank, noise, [0, 1]), places_of(bank, noise, [0, 1])
    ids = [name for name, _ in bank.names]
    assert [list(bugs.kinds).index(kind) for kind in bugs.kinds] == [ids.index(one) for one in ids]
    assert len(set(bugs.kinds)) == len(set(ids)) < len(ids)
    assert len(set(places.kinds)) == len(set(bank.places)) == 10
    assert bugs.total.shape == (len(bank.names),) * 2
    assert places.total.shape == (len(bank.places),) * 2
    assert (bugs.squares == places.squares).all()


def test_the_mean_of_replicas_counts_for_the_raw_coefficient(bank):
    """What the replicas have in common has nothing along any template, and all of its own in the raw sums."""
    noise = bank.noises["bfloat16"]
    mean = tiny.sigma() * noise.mean
    _, sums = fitted(mean)
    size = np.sqrt(np.diag(filter_of(bank, noise, [0, 1]).total))
    assert np.abs(sums.along.sum(axis=0) / size).max() < 1e-6
    assert np.abs(sums.raw.sum(axis=0) / size).max() > 0.1
    assert sums.square.sum() == pytest.approx(0, abs=1e-6)


# --- what is found -----------------------------------------------------------------------------


@pytest.mark.parametrize("precision", tiny.PRECISIONS)
def test_each_template_is_found_by_itself(bank, precision):
    """Every bug that these rows can show is named alone with the coefficient 1, at its own strength."""
    one, _ = fitted(np.zeros(bank.codes.shape[1:]), precision)
    limit = one.limit(ALPHA_TEMPLATES)
    seen = [name for index, name in enumerate(bank.names) if one.needed(index, limit) < 0.2]
    assert len(seen) >= 5
    for number, name in enumerate(seen):
        found = named(tiny.round_off(number, precision) + tiny.template(*name), precision)
        assert list(found) == [name]
        assert found[name] == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("precision", tiny.PRECISIONS)
def test_nothing_is_found_in_round_off(precision):
    """Of 40 drawn implementations nothing is named, in either view and in both."""
    for seed in range(40):
        assert named(tiny.round_off(seed, precision), precision) == {}
    assert named(tiny.round_off(1, precision), precision, views=(0,)) == {}
    assert named(tiny.round_off(1, precision), precision, views=(1,)) == {}


def test_two_at_once_are_both_found():
    """Two bugs together are named with the share of each."""
    error = tiny.round_off(3) + tiny.template("x-rows-swapped") + tiny.template("x-bias-doubled", 0.1)
    found = named(error)
    assert set(found) == {("x-rows-swapped", 1.0), ("x-bias-doubled", 0.1)}
    assert list(found.values()) == pytest.approx([1, 1], abs=0.25)


@pytest.mark.parametrize("share", [-1.0, 4.0, 0.3])
def test_another_strength_does_not_fit(share):
    """The opposite of a bug, four times of it and a third are named, and their coefficient says that it is not it."""
    found = named(tiny.round_off(5) + share * tiny.template("x-rows-swapped"))
    assert found == {("x-rows-swapped", 1.0): pytest.approx(share, abs=0.15)}
    assert not fits(found["x-rows-swapped", 1.0])


def test_one_view_finds_it_too():
    """A bug is named from the view that a candidate shows, prefill or decode alone."""
    error = tiny.round_off(6) + tiny.template("x-rows-swapped")
    for views in ((0,), (1,)):
        assert list(named(error, views=views)) == [("x-rows-swapped", 1.0)]


def test_a_stranger_is_not_named(bank):
    """An error of a hundred times round-off along no template has no name."""
    stranger = tiny.sigma() * np.random.default_rng(1).normal(size=bank.codes.shape[1:])
    assert named(tiny.round_off(7) + 100 * stranger) == {}


# --- no templates ------------------------------------------------------------------------------


def test_no_templates_have_an_empty_gram_matrix(bank):
    """A golden that no bug of the catalogue changes has sums with nothing, and no error."""
    rows, columns = bank.codes.shape[1:]
    empty = replace(bank, names=(), wrong=(), places=(), codes=bank.codes[:0], scales=bank.scales[:0])
    one = Projector.of(empty, tiny.golden().rows.request[bank.place], tiny.sigma()[:, 0], np.eye(columns))
    along, square = one.sums(np.ones((3, rows, columns)))
    assert along.shape == (3, 2, 4, 0)
    assert square.sum() == pytest.approx(3 * rows * columns)
    assert one.gram().shape == (2, 4, 0, 0)
