"""The rules of AWS Neuron's logit validation, which look at logits without the constant shift of each row.

Sources: aws-neuron/neuronx-distributed-inference (logit_validation) and vllm-project/vllm-neuron
vllm_neuron/accuracy/logit_validation.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from harness.criteria.case import Entry, Float64, View, entry, everywhere, largest, ratio

#: Largest error over the largest logit, by how many of the reference's best tokens are looked at; 0 is all.
_TOLERANCES: Mapping[int, float] = {5: 0.01, 50: 0.02, 1000: 0.03, 0: 0.05}
_LATER_TOLERANCES: Mapping[int, float] = {**_TOLERANCES, 5: 0.011}
_ATOL = 1e-5
_FLIP = 1e-3
_MANTISSA: Mapping[str, int] = {"bfloat16": 7, "float16": 10, "float32": 23}
_RATIO, _OVERLAP, _BINS = 1.5, 0.99, 100


def _shift(view: View) -> Float64:
    """The constant b of the least-squares fit c = a r + b of each row, [N]; entries at -inf on both sides left out.

    Fitted to c - r, so that equal sides have exactly none.
    """
    same, error, count = _kept(view)
    mean_r, mean_e = same.sum(axis=1) / count, error.sum(axis=1) / count
    variance = np.einsum("nv,nv->n", same, same) / count - mean_r**2
    covariance = np.einsum("nv,nv->n", same, error) / count - mean_r * mean_e
    slope = np.divide(covariance, variance, out=np.zeros(len(same)), where=variance > 0)
    found: Float64 = mean_e - slope * mean_r
    return found


def _kept(view: View) -> tuple[Float64, Float64, Float64]:
    """Reference and error [N, V] with 0 in place of entries at -inf on both sides, and how many are left, [N]."""
    width = np.full(len(view.same), float(view.same.shape[1]))
    if view.finite:
        return view.same, view.error, width
    gone = np.isneginf(view.candidate) & np.isneginf(view.same)
    return np.where(gone, 0.0, view.same), np.where(gone, 0.0, view.error), width - gone.sum(axis=1)


def _top_errors(view: View) -> dict[int, float]:
    """Largest (max |c - b - r| - 1e-5) / max |r| over the reference's k best tokens of a row, by k; 0 is all."""
    same, error, _ = _kept(view)
    size = np.abs(error - view.once(_shift)[:, None])
    if not view.finite:
        size = np.where(np.isneginf(view.candidate) & np.isneginf(view.same), 0.0, size)
    magnitude, order, found = np.abs(same), view.same, {}
    for top in (0, 1000, 50, 5):
        width = order.shape[1]
        if 0 < top < width:
            chosen = np.argpartition(order, width - top, axis=1)[:, width - top :]
            order, size, magnitude = (np.take_along_axis(one, chosen, axis=1) for one in (order, size, magnitude))
        excess = np.maximum(size.max(axis=1, initial=0.0) - _ATOL, 0.0)
        found[top] = largest(ratio(excess, magnitude.max(axis=1, initial=0.0)))
    return found


def _gap(view: View) -> tuple[Float64, Float64]:
    """Of each row c[a] - c[e], a the candidate's best token, e the reference's; the larger magnitude of both, [N]."""
    rows = np.arange(len(view.same))
    best, expected = (view.candidate[rows, ids] for ids in (view.candidate_best, view.same_best))
    shift = view.once(_shift)
    return best - expected, np.maximum(np.abs(best - shift), np.abs(expected - shift))


def _over_tolerances(view: View, tolerances: Mapping[int, float]) -> float:
    errors = view.once(_top_errors)
    return largest([errors[top] / tolerance for top, tolerance in tolerances.items()])


def neuron(view: View) -> float:
    """Errors without their shift among the best 5, 50, 1000 and all tokens; a flip's gap over 0.001 logits.

    Adapted: all steps are forced through decode, where the original restarts from prefill behind each difference,
    and prefill rows count as well. Entries at -inf on both sides are left out, as there.
    """
    return largest([_over_tolerances(view, _TOLERANCES), largest(view.once(_gap)[0]) / _FLIP])


def neuron_ulp(view: View) -> float:
    """The later version: a flip's gap over one unit in the last place of the precision, at the logits' magnitude.

    7 mantissa bits for bfloat16, 10 for float16, 23 for float32; 0.011 for the best 5.
    """
    gap, magnitude = view.once(_gap)
    unit = np.exp2(np.floor(np.log2(magnitude)) - _MANTISSA[view.precision])
    return largest([_over_tolerances(view, _LATER_TOLERANCES), largest(ratio(gap, unit))])


def neuron_three_way(view: View) -> float:
    """Errors against float64, L2 and largest of each row, over 1.5 times the reference's; (1 - BC) / 0.01.

    BC is the Bhattacharyya coefficient of the histograms of |error| in 100 bins, decode and prefill apart. The
    candidate's shift is removed first. The original's high precision is float32, and its result informs without
    failing a run.
    """
    shift = view.once(_shift)[:, None]
    ours, theirs = np.abs(view.candidate_error - shift), np.abs(view.same_error)
    norms = ratio(np.sqrt(np.einsum("nv,nv->n", ours, ours)), np.sqrt(np.einsum("nv,nv->n", theirs, theirs)))
    tops = ratio(ours.max(axis=1, initial=0.0), theirs.max(axis=1, initial=0.0))
    apart = [1 - _overlap(ours[rows], theirs[rows]) for rows in (view.decode, ~view.decode) if rows.any()]
    return largest([largest(norms) / _RATIO, largest(tops) / _RATIO, largest(apart) / (1 - _OVERLAP)])


def _overlap(a: Float64, b: Float64) -> float:
    """Bhattacharyya coefficient of two samples in 100 bins over their common range."""
    low, high = min(a.min(), b.min()), max(a.max(), b.max())
    if not high > low:
        return 1.0
    shares = []
    for sample in (a, b):
        bins = np.minimum(((sample - low) * (_BINS / (high - low))).astype(np.int64), _BINS - 1)
        shares.append(np.bincount(bins.ravel(), minlength=_BINS) / bins.size)
    return min(1.0, float(np.sqrt(shares[0] * shares[1]).sum()))


ENTRIES: tuple[Entry, ...] = (
    entry(
        neuron,
        name="neuron",
        source="AWS Neuron",
        words="shift removed: max |c - r| / max |r| <= .01, .02, .03, .05 of top 5, 50, 1000, all; a flip <= 0.001",
        sees="logits",
        published=everywhere(1.0),
        numbers=(),
    ),
    entry(
        neuron_ulp,
        name="neuron-ulp",
        source="AWS Neuron",
        words="as neuron with .011 for the top 5, and a flip <= 1 ULP of the precision",
        sees="logits",
        published=everywhere(1.0),
        numbers=(),
    ),
    entry(
        neuron_three_way,
        name="neuron-3way",
        source="AWS Neuron",
        words="L2 and max error of each token against f64 < 1.5 times the reference's, and BC of |errors| > 0.99",
        sees="logits",
        published=everywhere(1.0),
        numbers=("forced",),
    ),
)
