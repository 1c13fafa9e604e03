"""The columns that templates are kept in: those of the head, without a constant, and never too many of them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import ModelError
from harness.numerics.constants import COORDINATES
from harness.templates.space import basis_of, turn_of
from tests.support import VOCABULARY, random_model


def headed(columns, width, *, seed=0, dtype=torch.float32):
    """What is needed of a model: a head of so many columns behind so many numbers."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn((columns, width), generator=generator).to(dtype)
    return SimpleNamespace(get_output_embeddings=lambda: SimpleNamespace(weight=weight)), weight


def test_the_basis_is_the_head_without_a_constant():
    """Of each column of the head its mean over the vocabulary is taken off, in float64."""
    model, weight = headed(50, 7)
    wide = weight.double().numpy()
    found = basis_of(model, 50)
    assert found.dtype == np.float64
    assert found == pytest.approx(wide - wide.mean(axis=0), abs=1e-15)


def test_a_basis_by_hand():
    """Two columns of a vocabulary of three."""
    head = SimpleNamespace(weight=torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 6.0], [99.0, 99.0]]))
    model = SimpleNamespace(get_output_embeddings=lambda: head)
    # The fourth row is padding that the golden does not know.
    assert basis_of(model, 3).tolist() == [[-1, -2], [0, -2], [1, 4]]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom"])
def test_logits_of_a_real_model_lie_in_the_basis(kind):
    """What the head computes has no part outside, but for a constant: nothing of a bug in the model is lost."""
    model = random_model(kind)
    basis = basis_of(model, VOCABULARY)
    with torch.no_grad():
        logits = model.double()(torch.arange(5, 25)[None]).logits[0].numpy()
    centred = logits - logits.mean(axis=1, keepdims=True)
    coordinates = logits @ basis @ turn_of(basis)
    assert np.linalg.norm(coordinates, axis=1) == pytest.approx(np.linalg.norm(centred, axis=1), rel=1e-6)


@given(width=st.integers(1, 20), seed=st.integers(0, 99), shift=st.floats(-1e3, 1e3))
@settings(deadline=None, max_examples=30)
def test_columns_are_orthogonal_to_a_constant(width, seed, shift):
    """A number added to all logits of a row, to which the softmax is blind, changes no product but by rounding."""
    basis = basis_of(headed(40, width, seed=seed)[0], 40)
    assert np.abs(basis.sum(axis=0)).max() < 40 * 1e-14
    logits = np.random.default_rng(seed).normal(size=(3, 40))
    assert (logits + shift) @ basis == pytest.approx(logits @ basis, abs=1e-10)


@given(width=st.integers(1, 20), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_turned_products_are_orthonormal_coordinates(width, seed):
    """The basis turned has columns of length 1 at right angles, so that lengths are those of the logits."""
    basis = basis_of(headed(40, width, seed=seed)[0], 40)
    turned = basis @ turn_of(basis)
    assert turned.T @ turned == pytest.approx(np.eye(width), abs=1e-9)
    inside = basis @ np.random.default_rng(seed).normal(size=width)
    assert np.linalg.norm(inside @ turned) == pytest.approx(np.linalg.norm(inside))


def test_directions_that_the_head_does_not_reach_are_left_out():
    """Two equal columns of the head are one direction, and one that is a millionth of the others is rounding."""
    model, weight = headed(40, 5)
    weight[:, 3] = weight[:, 1]
    basis = basis_of(model, 40)
    turn = turn_of(basis)
    assert turn.shape == (5, 4)
    assert (basis @ turn).T @ (basis @ turn) == pytest.approx(np.eye(4), abs=1e-9)
    small = basis.copy()
    small[:, 3] = 1e-9 * np.random.default_rng(0).normal(size=40)
    assert turn_of(small).shape == (5, 4)


def test_a_wide_model_is_compressed():
    """A model wider than COORDINATES has so many random combinations of its columns, each orthogonal to a constant."""
    vocabulary, width = 700, COORDINATES + 300
    model, weight = headed(vocabulary, width)
    basis = basis_of(model, vocabulary)
    assert basis.shape == (vocabulary, COORDINATES)
    assert turn_of(basis).shape == (COORDINATES, COORDINATES)
    assert np.abs(basis.sum(axis=0)).max() < 1e-8
    # They lie in the span of the head's own.
    wide = weight.double().numpy() - weight.double().numpy().mean(axis=0)
    parts = np.linalg.lstsq(wide, basis, rcond=None)[0]
    assert wide @ parts == pytest.approx(basis, abs=1e-7)
    # Of a change COORDINATES / width of the square are kept, and more since large directions are more likely kept.
    turned = basis @ turn_of(basis)
    seen = wide @ np.random.default_rng(1).normal(size=(width, 200))
    shares = ((seen.T @ turned) ** 2).sum(axis=1) / (seen**2).sum(axis=0)
    print(f"kept of a square: {shares.mean():.2f} of {COORDINATES / width:.2f}")
    assert shares.min() > COORDINATES / width
    assert shares.max() < 1


@pytest.mark.parametrize("width", [8, COORDINATES, COORDINATES + 1])
def test_the_basis_is_the_same_again(width):
    """It is a function of the weights alone: another machine makes the same to the bit, whatever was drawn before."""
    first = basis_of(headed(300, width)[0], 300)
    torch.manual_seed(9)
    assert basis_of(headed(300, width)[0], 300).tobytes() == first.tobytes()
    assert first.shape == (300, min(width, COORDINATES))
    assert basis_of(headed(300, width, seed=1)[0], 300).tobytes() != first.tobytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_precision_of_the_head_is_widened_exactly(dtype):
    """A head in 16 bits gives what its float64 copy gives."""
    model, weight = headed(30, 4, dtype=dtype)
    wide = SimpleNamespace(get_output_embeddings=lambda: SimpleNamespace(weight=weight.double()))
    assert (basis_of(model, 30) == basis_of(wide, 30)).all()


def test_a_model_without_a_head_is_told():
    """There is nothing to fit in, and the error says what to leave out."""
    with pytest.raises(ModelError, match="no output embedding") as error:
        basis_of(SimpleNamespace(get_output_embeddings=lambda: None), 30)
    assert "--diagnose" in error.value.fix
