"""Rules that look at full logits as a tensor; a tensor is one pass of one prompt, and the worst counts."""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy.typing import NDArray

from harness.criteria.case import (
    Entry,
    Float64,
    View,
    by_precision,
    entry,
    everywhere,
    largest,
    ratio,
)

#: (absolute, relative) tolerances of transformers tests/test_modeling_common.py, eager against SDPA.
_HF_TOLERANCES = {"float32": (1e-6, 1e-4), "bfloat16": (1e-2, 1e-2), "float16": (5e-3, 5e-3)}
_HF_FAILING_SHARE = 0.2

#: Tolerance and multiplier of torch/_dynamo/utils.py `same`; tolerances as its benchmarks set them.
_DYNAMO_TOLERANCE = by_precision(1e-4, 1e-2)
_DYNAMO_MULTIPLIER = by_precision(2.0, 3.0)
_DYNAMO_SMALL, _DYNAMO_SMALL_MULTIPLIER = 1000, 3.0

#: TOPLOC: largest values compared, rows of a block, and what may differ of 128 values (90 exponents must agree).
_TOPLOC_TOP, _TOPLOC_ROWS = 128, 32
_TOPLOC_EXPONENTS, _TOPLOC_MEAN, _TOPLOC_MEDIAN = 38 / 128, 10.0, 8.0


def _per_row(view: View, atol: float, rtol: float) -> Float64:
    """Largest |c - r| / (atol + rtol |r|) of each row, [N]: allclose holds where it is at most 1."""
    found: Float64 = (view.size / (atol + rtol * np.abs(view.same))).max(axis=1, initial=0.0)
    return found


# --- relative errors of whole tensors ----------------------------------------------------------------


def normalised_error(view: View) -> float:
    """mean((c - r)^2) / var(r) of the row behind each prompt, decode and prefill, the worst.

    Source: ggml-org/llama.cpp examples/model-conversion/scripts/utils/check-nmse.py.
    """
    last = view.place == view.lengths[view.prompt] - 1
    return largest(ratio((view.error[last] ** 2).mean(axis=1), view.same[last].var(axis=1)))


def _squares(view: View) -> Float64:
    """Sum of (c - r)^2 of each part, [Q]."""
    return view.parts(np.add, np.einsum("nv,nv->n", view.error, view.error))


def _lengths(view: View) -> tuple[Float64, Float64]:
    """Sums of c^2 and of r^2 of each part, [Q] each."""
    cc, rr = (view.parts(np.add, np.einsum("nv,nv->n", one, one)) for one in (view.candidate, view.same))
    return cc, rr


def relative_difference(view: View) -> float:
    """1 - 2 sum(c r) / sum(c^2 + r^2) = sum((c - r)^2) / sum(c^2 + r^2) in float64, the worst tensor.

    Source: sgl-project/sglang python/sglang/srt/debug_utils/comparator.
    """
    cc, rr = view.once(_lengths)
    return largest(ratio(view.once(_squares), cc + rr))


def angle(view: View) -> float:
    """1 - cosine similarity, the worst tensor. Source: NVIDIA/TensorRT tools/Polygraphy."""
    cc, rr = view.once(_lengths)
    # |c - r|^2 - (|c| - |r|)^2 = 2 |c| |r| (1 - cos): unlike 1 - cos itself, exact for equal sides.
    excess = np.maximum(view.once(_squares) - (np.sqrt(cc) - np.sqrt(rr)) ** 2, 0.0)
    return largest(ratio(excess, 2 * np.sqrt(cc) * np.sqrt(rr)))


def either_tolerance(view: View) -> float:
    """Largest min(|c - r| / 1e-5, |c - r| / (1e-5 |r|)): an element passes by either tolerance.

    Source: NVIDIA/TensorRT tools/Polygraphy. Relative to the second runner, here the reference.
    """
    return largest((view.size / np.maximum(np.abs(view.same), 1.0)).max(axis=1, initial=0.0)) / 1e-5


def mean_absolute(view: View) -> float:
    """Mean |c - r| in logits, the worst tensor. Source: PaddlePaddle/models, reprod_log; float32 alone."""
    return largest(view.parts(np.add, view.size.mean(axis=1)) / view.parts(np.add, np.ones(len(view.size))))


def plain_allclose(view: View) -> float:
    """Largest |c - r| / (0.01 + 0.01 |r|): what somebody without a rule would write."""
    return largest(_per_row(view, 1e-2, 1e-2))


# --- transformers ------------------------------------------------------------------------------------


def scores_to_difference(view: View) -> float:
    """Where own tokens differ, the largest |c - r| / (1e-5 + 1e-5 |r|) of the steps up to the first difference.

    Source: huggingface/transformers tests/generation/test_utils.py. Equal tokens pass whatever the logits are; what
    follows a difference is ignored; unequal lengths cannot be compared and fail.
    """
    each = []
    for one in view.free:
        if one.equal:
            continue
        steps = one.common + 1
        if len(one.candidate) != len(one.same) or min(len(one.candidate_rows), len(one.same_rows)) < steps:
            return math.inf
        ours, theirs = one.candidate_rows[:steps], one.same_rows[:steps]
        each.append(largest(np.abs(ours - theirs) / (1e-5 + 1e-5 * np.abs(theirs))))
    return largest(each)


def most_sequences(view: View) -> float:
    """Largest |c - r| / (atol + rtol |r|) of a sequence, of all but the worst fifth of the sequences.

    Source: huggingface/transformers tests/test_modeling_common.py: 80 % of the sequences must pass allclose with a
    table by precision. This order statistic exceeds 1 exactly where fewer pass, and can be calibrated further.
    """
    parts = view.parts(np.maximum, _per_row(view, *_HF_TOLERANCES[view.precision]))
    worst = np.zeros(len(view.case.same))
    np.maximum.at(worst, view.part_prompt, parts)
    # The small number mends 0.2 n that falls short of a whole number by rounding.
    return float(np.sort(worst)[::-1][int(_HF_FAILING_SHARE * len(worst) + 1e-9)])


# --- against a reference of high precision -----------------------------------------------------------


def dynamo(view: View) -> float:
    """The better of two: allclose to the reference; rmse to float64 within m times that of the reference.

    Score: min(max |c - r| / (tol + tol |r|), rmse_c / (m rmse_r + tol / 10)), the worst tensor. Source:
    pytorch/pytorch torch/_dynamo/utils.py `same`: infinities at the same places are equal, and two rmse that are NaN
    (both sides hold a NaN) pass.
    """
    tolerance = _DYNAMO_TOLERANCE[view.precision]
    close = view.parts(np.maximum, _close_or_equal(view, tolerance))
    count = view.parts(np.add, np.full(len(view.same), view.same.shape[1], dtype=np.float64))
    errors = (view.candidate_error, view.same_error)
    rmse = [np.sqrt(view.parts(np.add, np.einsum("nv,nv->n", one, one)) / count) for one in errors]
    usual = _DYNAMO_MULTIPLIER[view.precision]
    multiplier = np.where(count < _DYNAMO_SMALL, _DYNAMO_SMALL_MULTIPLIER, usual)
    relative: Float64 = rmse[0] / (multiplier * rmse[1] + tolerance / 10)
    relative = np.where(np.isnan(rmse[0]) & np.isnan(rmse[1]), 0.0, relative)
    # fmin: a NaN fails its own test alone, and the other may still pass.
    return largest(np.fmin(close, relative))


def _close_or_equal(view: View, tolerance: float) -> Float64:
    """As _per_row; the same infinity is no difference, [N]."""
    if view.finite:
        return _per_row(view, tolerance, tolerance)
    c, r = view.candidate, view.same
    found: Float64 = np.where(c == r, 0.0, view.size / (tolerance + tolerance * np.abs(r))).max(axis=1, initial=0.0)
    return found


def twice_the_error(view: View) -> float:
    """Max |c - x| / (2 max |r - x| + 1e-5), x the float64 reference, the worst tensor.

    Source: Dao-AILab/flash-attention tests/test_flash_attn.py, where x is float32.
    """
    ours, theirs = (
        view.parts(np.maximum, np.abs(error).max(axis=1, initial=0.0))
        for error in (view.candidate_error, view.same_error)
    )
    return largest(ours / (2 * theirs + 1e-5))


# --- TOPLOC ------------------------------------------------------------------------------------------


def toploc(view: View) -> float:
    """Of the 128 largest values of a block: exponents that differ, mean and median mantissa error, in bfloat16.

    Each over its limit: 38 of 128, 10 and 8 units; the worst block. Source: PrimeIntellect-ai/toploc
    toploc/poly.py. Adapted: logits instead of the last hidden state; the prompt is one block, then 32 tokens each.
    A place that is among the largest of one side alone counts as a differing exponent.
    """
    return largest([_toploc(view.candidate[rows], view.same[rows]) for rows in _blocks(view)])


def _blocks(view: View) -> list[slice]:
    """Rows of each block: a prefill's prompt, then 32 rows at a time of either pass."""
    blocks, start = [], 0
    for prompt, count in zip(view.part_prompt, view.parts(np.add, np.ones(len(view.same))).astype(int), strict=True):
        first = 0 if view.decode[start] else min(int(view.lengths[prompt]), count)
        edges = [0, first] if first else [0]
        edges = [*edges, *range(first + _TOPLOC_ROWS, count, _TOPLOC_ROWS)]
        edges += [count] if count > edges[-1] else []
        blocks += [slice(start + low, start + high) for low, high in itertools.pairwise(edges)]
        start += count
    return blocks


def _toploc(candidate: Float64, same: Float64) -> float:
    ours, theirs = candidate.ravel(), same.ravel()
    count = min(_TOPLOC_TOP, ours.size)
    own, places = (np.argpartition(np.abs(one), one.size - count)[one.size - count :] for one in (ours, theirs))
    exponent_c, mantissa_c = _bfloat16_parts(ours[places])
    exponent_r, mantissa_r = _bfloat16_parts(theirs[places])
    agree = (exponent_c == exponent_r) & np.isin(places, own)
    if not agree.any():
        return math.inf
    errors = np.abs(mantissa_c - mantissa_r)[agree]
    missing = float((~agree).sum()) / (_TOPLOC_EXPONENTS * count)
    return max(missing, float(errors.mean()) / _TOPLOC_MEAN, float(np.median(errors)) / _TOPLOC_MEDIAN)


def _bfloat16_parts(values: Float64) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Exponent and mantissa bits of numbers rounded to bfloat16, to nearest even."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.int64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return (rounded >> 7) & 0xFF, rounded & 0x7F


# --- repeats -----------------------------------------------------------------------------------------


def changed_rows(view: View) -> float:
    """Rows of a prompt's second run that are not bit for bit those of its first; the original asks for none.

    Source: vllm-project/vllm tests/v1/determinism/test_batch_invariance.py. Adapted: full logits instead of
    log-probabilities.
    """
    total = 0
    for first, second in view.case.repeats:
        if first.shape != second.shape or not np.isfinite(first).all():
            return math.inf
        total += int((first != second).any(axis=1).sum())
    return float(total)


ENTRIES: tuple[Entry, ...] = (
    entry(
        normalised_error,
        name="llamacpp-nmse",
        source="llama.cpp",
        words="mean((c - r)^2) / var(r) of the last prompt position < 0.01",
        sees="logits",
        published=everywhere(1e-2),
        numbers=("forced",),
    ),
    entry(
        dynamo,
        name="dynamo-fp64",
        source="PyTorch",
        words="allclose(tol, tol) or rmse(c, f64) <= m rmse(r, f64) + tol / 10; tol 1e-4, m 2; 16 bits: 1e-2, 3",
        sees="logits",
        published=everywhere(1.0),
        numbers=(),
    ),
    entry(
        twice_the_error,
        name="flash-2x",
        source="FlashAttention",
        words="max |c - f64| <= 2 max |r - f64| + 1e-5",
        sees="logits",
        published=everywhere(1.0),
        numbers=("forced",),
    ),
    entry(
        scores_to_difference,
        name="hf-first-diff",
        source="transformers",
        words="own tokens equal, or allclose(1e-5, 1e-5) of the logits up to the first different one",
        sees="logits",
        published=everywhere(1.0),
        numbers=("free",),
    ),
    entry(
        most_sequences,
        name="hf-80",
        source="transformers",
        words="allclose by precision (1e-6 + 1e-4 |r|; bf16 1e-2; fp16 5e-3) for >= 80 % of the sequences",
        sees="logits",
        published=everywhere(1.0),
        numbers=("forced",),
    ),
    entry(
        relative_difference,
        name="sglang-rel",
        source="SGLang",
        words="1 - 2 sum(c r) / sum(c^2 + r^2) <= 0.001 of each tensor",
        sees="logits",
        published=everywhere(1e-3),
        numbers=("forced",),
    ),
    entry(
        either_tolerance,
        name="polygraphy",
        source="Polygraphy",
        words="each |c - r| <= 1e-5 or |c - r| / |r| <= 1e-5",
        sees="logits",
        published=everywhere(1.0),
        numbers=("forced",),
    ),
    entry(
        angle,
        name="polygraphy-cosine",
        source="Polygraphy",
        words="cosine similarity >= 0.997 of each tensor; score: 1 - cosine",
        sees="logits",
        published=everywhere(3e-3),
        numbers=("forced",),
    ),
    entry(
        plain_allclose,
        name="allclose-1e-2",
        source="plain reader",
        words="allclose with atol = rtol = 0.01",
        sees="logits",
        published=everywhere(1.0),
        numbers=("forced",),
    ),
    entry(
        mean_absolute,
        name="reprod-log",
        source="reprod_log",
        words="mean |c - r| < 1e-6 of each tensor, float32",
        sees="logits",
        published={"float32": 1e-6},
        numbers=("forced",),
    ),
    entry(
        toploc,
        name="toploc",
        source="TOPLOC",
        words="largest 128 logits of a block: <= 38 exponents differ, mantissa errors mean <= 10, median <= 8",
        sees="logits",
        published=everywhere(1.0),
        numbers=("forced",),
    ),
    entry(
        changed_rows,
        name="bitwise",
        source="vLLM",
        words="a prompt run again has the same bits; score: rows that differ",
        sees="logits",
        published=everywhere(0.0),
        numbers=("forced",),
    ),
)
