"""Rules that look at token ids alone."""

from __future__ import annotations

import numpy as np

from harness.criteria.case import Entry, Int64, View, entry, everywhere, largest, pick

#: Most that one token can add to token-DiFR, in logits (Token-DiFR, arXiv 2511.20621).
_MARGIN_CLIP = 0.5


def different_tokens(view: View) -> float:
    """How many tokens differ, those that only one side has included.

    The original asks for none; the count lets a threshold be set where correct implementations differ too.
    """
    total = 0
    for one in view.free:
        shorter = min(len(one.candidate), len(one.same))
        total += int((one.candidate[:shorter] != one.same[:shorter]).sum())
        total += abs(len(one.candidate) - len(one.same))
    return float(total)


def rouge_l(view: View) -> float:
    """1 - F1 of the longest common subsequence, the worst prompt; over token ids instead of characters.

    Source: sgl-project/sglang python/sglang/test/test_utils.py, with a tolerance of 1.
    """
    return largest([1 - _rouge(one.candidate, one.same) for one in view.free])


def positions_that_differ(view: View) -> float:
    """1 - (equal positions) / (longer length), the worst prompt; the original asks for a share of 0.75."""
    scores = []
    for one in view.free:
        shorter, longer = sorted((len(one.candidate), len(one.same)))
        equal = int((one.candidate[:shorter] == one.same[:shorter]).sum())
        scores.append(1 - equal / longer if longer else 0.0)
    return largest(scores)


def clipped_margin(view: View) -> float:
    """Mean distance below the reference's best of the candidate's tokens, in logits, each at most 0.5.

    Adapted: the tokens are what the candidate would choose behind the golden's prefix in its decode loop, so the
    reference needs no run of its own over the candidate's sequence; greedy, so without Gumbel noise.
    """
    chosen, rows = view.candidate_best[view.decode], view.same[view.decode]
    if not len(chosen):
        return 0.0
    margin = rows.max(axis=1) - pick(rows, chosen)
    return float(np.minimum(margin, _MARGIN_CLIP).mean())


def _rouge(candidate: Int64, same: Int64) -> float:
    if np.array_equal(candidate, same):
        return 1.0
    if not len(candidate) or not len(same):
        return 0.0
    length = np.zeros(len(same) + 1, dtype=np.int64)
    for token in candidate:
        length[1:] = np.maximum.accumulate(np.maximum(length[1:], length[:-1] + (same == token)))
    # F1 of precision lcs / len(candidate) and recall lcs / len(same).
    return 2 * int(length[-1]) / (len(candidate) + len(same))


ENTRIES: tuple[Entry, ...] = (
    entry(
        different_tokens,
        name="exact",
        source="vLLM, DeepSpeed, optimum-habana",
        words="own tokens equal; score: tokens that differ",
        sees="tokens",
        published=everywhere(0.0),
        numbers=(),
    ),
    entry(
        rouge_l,
        name="sglang-rouge",
        source="SGLang",
        words="ROUGE-L of own tokens >= 1; score: 1 - F1, worst prompt",
        sees="tokens",
        published=everywhere(0.0),
        numbers=(),
    ),
    entry(
        positions_that_differ,
        name="hf-quant-match",
        source="transformers",
        words="equal positions / longer length >= 0.75; score: 1 - share, worst prompt",
        sees="tokens",
        published=everywhere(0.25),
        numbers=(),
    ),
    entry(
        clipped_margin,
        name="difr",
        source="Token-DiFR",
        words="mean of min(max r - r[candidate's token], 0.5) over forced decode steps",
        sees="tokens",
        published={},
        numbers=("forced",),
    ),
)
