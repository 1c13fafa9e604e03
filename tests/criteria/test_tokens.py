import pytest

from tests.criteria.cases import alarms, forced, free, score, together


@pytest.mark.parametrize(
    ("same", "candidate", "expected"),
    [([1, 2, 3], [1, 2, 3], 0), ([1, 2, 3], [1, 7, 3], 1), ([1, 2, 3], [1], 2), ([], [4], 1), ([], [], 0)],
)
def test_exact_counts_tokens(same, candidate, expected):
    """Each place with another token, or with a token of one side alone, counts once."""
    assert score("exact", free(same, candidate)) == expected
    assert alarms("exact", free(same, candidate)) == (expected > 0)


def test_exact_adds_up_prompts():
    """The prompts' counts are added."""
    assert score("exact", together(free([1, 2], [2, 1]), free([1], [1]), free([1], [3]))) == 3


@pytest.mark.parametrize(
    ("same", "candidate", "expected"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 0),
        ([1, 2, 3, 4], [1, 3, 4, 5], 0.25),
        ([1, 2, 3, 4], [1, 2], 1 - 4 / 6),
        ([4, 3, 2, 1], [1, 2, 3, 4], 0.75),
        ([1, 2], [3, 4], 1),
        ([], [1], 1),
        ([], [], 0),
    ],
)
def test_rouge_by_hand(same, candidate, expected):
    """1 - 2 lcs / (lengths): one inserted token costs one, where a comparison by place loses all behind it."""
    assert score("sglang-rouge", free(same, candidate)) == pytest.approx(expected)
    assert alarms("sglang-rouge", free(same, candidate)) == (expected > 0)


def test_equal_positions_over_the_longer_length():
    """Three of four equal places pass, two do not; missing tokens count as different, and the worst prompt counts."""
    good, bad = free([1, 2, 3, 4], [1, 2, 3, 7]), free([1, 2, 3, 4], [1, 2])
    assert score("hf-quant-match", good) == 0.25
    assert not alarms("hf-quant-match", good)
    assert score("hf-quant-match", together(good, bad)) == 0.5
    assert alarms("hf-quant-match", together(good, bad))


def test_margins_are_clipped_and_averaged():
    """Flips of depth 0.2 and 9 and two right tokens have a mean of (0.2 + 0.5) / 4."""
    same = [[1.0, 0.8], [9, 0], [1, 0], [0, 1]]
    candidate = [[0.8, 1.0], [0, 9], [5, 0], [0, 5]]
    assert score("difr", forced(same, candidate)) == pytest.approx(0.7 / 4)
    assert score("difr", forced(same)) == 0
