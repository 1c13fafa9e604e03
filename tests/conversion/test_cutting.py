"""Cutting and joining are inverse, and cut where tensor-parallel layers compute."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.conversion import cutting
from harness.conversion.names import Cut


@pytest.mark.parametrize("cut", Cut)
@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_joining_parts_gives_the_whole(cut, ranks):
    """In the order of the ranks."""
    whole = torch.arange(72.0).reshape(6, 12)
    parts = [cutting.part_of(whole, cut, rank, ranks) for rank in range(ranks)]
    assert torch.equal(cutting.join(parts, cut), whole)


def test_a_part_has_memory_of_its_own():
    """A file of one rank must not hold the tensor of all."""
    whole = torch.arange(72.0).reshape(6, 12)
    for cut, size in ((Cut.COLUMN, 36), (Cut.ROW, 36), (Cut.REPLICATED, 72)):
        part = cutting.part_of(whole, cut, 1, 2)
        assert part.untyped_storage().nbytes() == 4 * size
        assert part.data_ptr() != whole.data_ptr()


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_compute_what_the_whole_does(ranks):
    """Of a column-parallel layer and the row-parallel one behind it the partial sums are the whole's result."""
    generator = torch.Generator().manual_seed(0)
    up, bias, down = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((12, 6), (12,), (6, 12))
    )
    x = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    total = torch.zeros(4, 6, dtype=torch.float64)
    for rank in range(ranks):
        rows, offset = (cutting.part_of(one, Cut.COLUMN, rank, ranks) for one in (up, bias))
        total += torch.tanh(x @ rows.T + offset) @ cutting.part_of(down, Cut.ROW, rank, ranks).T
    torch.testing.assert_close(total, torch.tanh(x @ up.T + bias) @ down.T)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_rank_holds_whole_heads(ranks):
    """Rows of the fused layer go by head, each with its q, k and v: a rank's are those of consecutive heads."""
    heads, size = 6, 4
    whole = torch.arange(heads * 3 * size).reshape(heads, 3, size)
    for rank in range(ranks):
        part = cutting.part_of(whole.reshape(-1), Cut.COLUMN, rank, ranks)
        each = heads // ranks
        assert torch.equal(part.reshape(each, 3, size), whole[rank * each : (rank + 1) * each])


@given(st.integers(1, 300_000), st.integers(1, 256), st.integers(1, 64))
@settings(deadline=None)
def test_padding_is_the_least_that_ranks_can_share(vocabulary, multiple, ranks):
    """No smaller multiple holds the vocabulary."""
    rows = cutting.padded_size(vocabulary, multiple, ranks)
    assert rows % (multiple * ranks) == 0
    assert 0 <= rows - vocabulary < multiple * ranks


def test_known_paddings():
    """The vocabulary of GPT-2 on one rank, and the small models' on three."""
    assert cutting.padded_size(50257, 128, 1) == 50304
    assert cutting.padded_size(1021, 128, 3) == 1152
    assert cutting.padded_size(1024, 128, 2) == 1024


def test_padding_is_zeros_behind_the_rows():
    """The rows stay, and nothing is added where nothing is missing."""
    rows = torch.ones(3, 2)
    assert torch.equal(cutting.padded(rows, 5), torch.tensor([[1.0, 1.0]] * 3 + [[0.0, 0.0]] * 2))
    assert cutting.padded(rows, 3) is rows


def test_same_bits_tells_zeros_apart_and_nan_alike():
    """Unlike ==, which does the opposite of both."""
    nan, zero = torch.tensor([float("nan")]), torch.tensor([0.0])
    assert cutting.same_bits(nan, nan.clone())
    assert not cutting.same_bits(zero, -zero)
    assert not cutting.same_bits(zero, zero.half())
    assert not cutting.same_bits(zero, torch.zeros(1, 1))


def test_the_furthest_element_is_told():
    """Of any rank, from the first; what is not a number is not passed over."""
    parts = [torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]), torch.tensor([-3.0, 2.0])]
    assert cutting.furthest(parts) == 4.0
    assert cutting.furthest([*parts, torch.tensor([float("nan"), 0.0])]) != cutting.furthest(parts)


def test_a_mean_is_rounded_once():
    """In float32: summed in float16 these overflow, or lose their last bits."""
    large = [torch.tensor([60000.0], dtype=torch.float16)] * 3
    assert cutting.mean(large).tolist() == [60000.0]
    small = [torch.tensor([value], dtype=torch.float16) for value in (2048.0, 1.0, 1.0)]
    assert cutting.mean(small).tolist() == [torch.tensor(2050 / 3).half().item()]
    assert cutting.mean(small).dtype == torch.float16
