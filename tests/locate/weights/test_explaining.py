"""What is said of a tensor that is another one."""

import pytest
import torch

from harness.locate.weights import explaining
from harness.locate.weights.explaining import Sides, explain


def _noisy(tensor: torch.Tensor) -> torch.Tensor:
    """Of bfloat16, each element as it is, or one unit in the last place off."""
    bits = tensor.view(torch.int16)
    return (bits + torch.randint(-1, 2, bits.shape, dtype=torch.int16)).view(torch.bfloat16)


@pytest.mark.parametrize("rows", [slice(None), slice(3, 4), slice(2, 9)])
def test_noise_of_one_rounding_is_no_factor(rows: slice) -> None:
    """A factor of 1 and a summand of 0 lie in all intervals, and explain nothing: of all, of a row, of each."""
    torch.manual_seed(0)
    right = torch.randn(16, 80).bfloat16()
    held = right.clone()
    held[rows] = _noisy(right[rows])
    found = explain(Sides(stored=right, right=right, held=held))
    assert not found.exact, found.text
    assert "scaled" not in found.text
    assert "shifted" not in found.text


def test_one_element_is_not_a_factor_of_all() -> None:
    """Nor is a factor so near to 1 that it leaves the others as they are."""
    torch.manual_seed(0)
    right = torch.randn(16, 80).bfloat16()
    held = right.clone()
    held.view(torch.int16)[3, 4] += 2
    assert not explain(Sides(stored=right, right=right, held=held)).exact


def test_numbers_that_are_needed_are_found() -> None:
    """A factor for some rows of many, and a shift in groups."""
    torch.manual_seed(0)
    right = torch.randn(16, 80)
    factors = torch.ones(16)
    factors[::3] = torch.linspace(0.5, 2, 6)
    found = explain(Sides(stored=right, right=right, held=right * factors[:, None]))
    assert found.exact
    assert "scaled by a factor of its own" in found.text
    shifts = torch.randn(16, 3).repeat_interleave(32, dim=1)[:, :80]
    shifts[5] = 0
    found = explain(Sides(stored=right, right=right, held=right + shifts))
    assert found.text == "each output shifted by one number in each group of 32 inputs, as by a wrong zero point"


def test_of_a_large_matrix_the_rows_that_differ_are_looked_at(monkeypatch) -> None:
    """And the first of them only where these are too many, which is said, and is no explanation of the whole."""
    torch.manual_seed(0)
    right = torch.randn(16, 80)
    monkeypatch.setattr(explaining, "_MOST", 4 * 80)
    held = right.clone()
    held[3:5] *= 1.5
    found = explain(Sides(stored=right, right=right, held=held))
    assert found.text == "rows 3 and 4: scaled by 1.5"
    assert found.exact
    assert found.size == pytest.approx(float((held - right).norm() / right.norm()), rel=1e-6)
    held[3:12] = right[3:12] * 1.5
    found = explain(Sides(stored=right, right=right, held=held))
    assert found.text == "rows 3-6, the first of 9 that differ: scaled by 1.5"
    assert not found.exact
