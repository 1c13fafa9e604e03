"""Rules that look at log-probabilities or ranks, and so do not see a constant added to all logits of a row."""

from __future__ import annotations

import math

import numpy as np

from harness.criteria.case import (
    Entry,
    Float64,
    Int64,
    View,
    by_precision,
    entry,
    everywhere,
    largest,
    pick,
    ratio,
)

#: vLLM compares the first 32 tokens, and looks among the best 5.
_VLLM_STEPS, _VLLM_TOP = 32, 5
_SGLANG_TOP, _SGLANG_LONGEST = 5, 100
_MEGATRON_SHARE = 0.05
#: 1.645 standard errors (one-sided 5 %) of a difference of two shares of at most 50 % spread each, in points.
_TRTLLM_Z, _TRTLLM_SPREAD = 1.645, 50.0


# --- vLLM --------------------------------------------------------------------------------------------


def rank_at_difference(view: View) -> float:
    """At the first different token, the worse rank (from 1) of one side's token on the other side; 0 without one.

    Source: vllm-project/vllm tests/models/utils.py, check_logprobs_close. Lengths are not compared, and nothing
    behind the first difference. A token that the other side has no logits for has an infinite rank.
    """
    worst = 0.0
    for one in view.free:
        step = one.common
        if step < min(len(one.candidate), len(one.same), _VLLM_STEPS):
            ours, theirs = one.candidate[step : step + 1], one.same[step : step + 1]
            worst = max(worst, _first_rank(one.same_rows[step : step + 1], ours))
            worst = max(worst, _first_rank(one.candidate_rows[step : step + 1], theirs))
    return worst


def rank_everywhere(view: View) -> float:
    """The same of the tokens that the sides would choose at every forced step, decode and prefill; 0 where equal."""
    differ = view.candidate_best != view.same_best
    ours = _rank(view.same[differ], view.candidate_best[differ])
    theirs = _rank(view.candidate[differ], view.same_best[differ])
    return largest(np.maximum(ours, theirs))


def _rank(rows: Float64, ids: Int64) -> Float64:
    """1 + how many entries of each row [n, V] exceed that of its id; infinite outside the vocabulary, [n]."""
    value = pick(rows, ids)
    rank = 1.0 + (rows > value[:, None]).sum(axis=1)
    return np.where(np.isneginf(value), np.inf, rank)


def _first_rank(rows: Float64, ids: Int64) -> float:
    return float(_rank(rows, ids)[0]) if len(rows) else math.inf


# --- TGI, Megatron -----------------------------------------------------------------------------------


def relative_logp(view: View) -> float:
    """Largest |a - b| / max(|a|, |b|) of log-probabilities: prompt tokens, own ones before the first difference.

    Source: huggingface/text-generation-inference integration-tests/conftest.py, math.isclose with rel_tol 0.2.
    """
    return largest(np.concatenate([ratio(np.abs(a - b), np.maximum(np.abs(a), np.abs(b))) for a, b in _shown(view)]))


def relative_logp_and_ids(view: View) -> float:
    """The whole rule: ids of prompt and continuation are equal as well, which no factor relaxes."""
    return relative_logp(view) if _same_ids(view) else math.inf


def absolute_logp(view: View) -> float:
    """Largest |a - b| of log-probabilities in nats: prompt tokens, and own ones before the first difference.

    Source: NVIDIA/Megatron-LM tests/functional_tests/python_test_utils/test_inference_regular_pipeline.py.
    """
    return largest(np.concatenate([np.abs(a - b) for a, b in _shown(view)]))


def absolute_logp_and_ids(view: View) -> float:
    """The whole rule: the lists of generated tokens are equal as well, which no factor relaxes."""
    return absolute_logp(view) if all(one.equal for one in view.free) else math.inf


def _shown(view: View) -> list[tuple[Float64, Float64]]:
    """Candidate's and reference's log-probabilities of the same tokens behind the same prefixes."""
    ours, theirs = view.given_logp
    pairs = [(ours[view.inside], theirs[view.inside])]
    for one in view.free:
        steps = min(one.common, len(one.candidate_logp), len(one.same_logp))
        pairs.append((one.candidate_logp[:steps], one.same_logp[:steps]))
    return pairs


def _same_ids(view: View) -> bool:
    prompts = zip(view.case.candidate, view.case.same, strict=True)
    return all(one.equal for one in view.free) and all(np.array_equal(a.prompt_ids, b.prompt_ids) for a, b in prompts)


def values_apart(view: View) -> float:
    """Values that differ by more than 5 % of the reference's, over how many of n may: min(max(n // 100, 1), 50).

    Source: NVIDIA/Megatron-LM tests/functional_tests/python_test_utils/common.py. Adapted: the curve is the
    log-probabilities of the golden's tokens in one pass of one prompt, instead of a loss over training steps; the
    worst curve counts.
    """
    ours, theirs = view.given_logp
    apart = ~(np.abs(ours - theirs) <= _MEGATRON_SHARE * np.abs(theirs))
    count = view.parts(np.add, np.ones(len(ours)))
    allowed = np.minimum(np.maximum(count // 100, 1), 50)
    return largest(view.parts(np.add, apart.astype(np.float64)) / allowed)


# --- SGLang ------------------------------------------------------------------------------------------


def sorted_top(view: View) -> float:
    """Largest difference in nats of the five best log-probabilities, each side's sorted, without their ids.

    Source: sgl-project/sglang test/srt/models/test_generation_models.py. As there, prompts of more than 100
    tokens are not compared. Adapted: the decode steps are forced ones, where the original's own runs may part.
    """
    short = (view.lengths <= _SGLANG_LONGEST)[view.prompt]
    return largest(np.abs(_best(view.candidate_logp[short]) - _best(view.same_logp[short])))


def _best(rows: Float64) -> Float64:
    count = min(_SGLANG_TOP, rows.shape[1])
    return np.sort(np.partition(rows, -count, axis=1)[:, -count:], axis=1)


# --- divergences -------------------------------------------------------------------------------------


def _divergence(view: View) -> Float64:
    """KL(reference || candidate) of each forced row, in nats, [N]."""
    weighted = np.exp(view.same_logp)
    weighted *= view.same_logp - view.candidate_logp
    found: Float64 = np.maximum(weighted.sum(axis=1), 0.0)
    return found


def largest_divergence(view: View) -> float:
    """The largest divergence of a token, in nats, decode and prefill.

    Source: AI-Hypercomputer/maxtext tests/utils/forward_pass_logit_checker.py. The threshold is an option there;
    taken by precision as its scripts have it.
    """
    return largest(view.once(_divergence))


def tail_divergence(view: View) -> float:
    """The 99th percentile of the divergences, decode or prefill whichever is worse, in nats.

    Source: ggml-org/llama.cpp tools/perplexity, which reports it and decides nothing.
    """
    return view.kinds(lambda rows: float(np.quantile(rows, 0.99)), view.once(_divergence))


def other_top(view: View) -> float:
    """Share of rows with another best token, decode or prefill whichever is worse. Source: as tail_divergence."""
    return view.kinds(lambda rows: float(rows.mean()), view.candidate_best != view.same_best)


def mean_exponential(view: View) -> float:
    """Mean of exp |log p_c - log p_r| of the golden's tokens (TMPE), decode or prefill whichever is worse."""
    ours, theirs = view.given_logp
    return view.kinds(lambda rows: float(rows.mean()), np.exp(np.abs(ours - theirs)))


def lost_accuracy(view: View) -> float:
    """Points of accuracy lost, over 1.645 sqrt(2 50^2 / n); 0 where none is lost.

    Source: NVIDIA/TensorRT-LLM tests/integration/defs/accuracy. Adapted: the task is the prompts' own next tokens,
    n of them, answered by the best token of the prefill rows inside the prompts.
    """
    right = view.given[view.inside]
    if not len(right):
        return 0.0
    ours = 100 * float((view.candidate_best[view.inside] == right).mean())
    theirs = 100 * float((view.same_best[view.inside] == right).mean())
    return max(0.0, theirs - ours) / (_TRTLLM_Z * math.sqrt(2 * _TRTLLM_SPREAD**2 / len(right)))


ENTRIES: tuple[Entry, ...] = (
    entry(
        rank_at_difference,
        name="vllm-top5",
        source="vLLM",
        words="at the first different token of 32, each in the other's top 5; score: the worse rank, from 1",
        sees="top",
        published=everywhere(_VLLM_TOP),
        numbers=("free",),
    ),
    entry(
        rank_everywhere,
        name="vllm-top5-every",
        source="vLLM",
        words="at every forced step, each side's best token in the other's top 5; score: the worst rank",
        sees="top",
        published=everywhere(_VLLM_TOP),
        numbers=("forced",),
    ),
    entry(
        relative_logp_and_ids,
        name="tgi",
        source="TGI",
        words="ids and lengths equal, and max |a - b| / max(|a|, |b|) of log-probabilities <= 0.2",
        sees="top",
        published=everywhere(0.2),
        numbers=("free", "forced"),
    ),
    entry(
        relative_logp,
        name="tgi-logprobs",
        source="TGI",
        words="max |a - b| / max(|a|, |b|) of log-probabilities <= 0.2, before the first different token",
        sees="top",
        published=everywhere(0.2),
        numbers=("free", "forced"),
    ),
    entry(
        absolute_logp_and_ids,
        name="megatron",
        source="Megatron-LM",
        words="ids equal, and max |a - b| of log-probabilities <= 0.001",
        sees="top",
        published=everywhere(1e-3),
        numbers=("free", "forced"),
    ),
    entry(
        absolute_logp,
        name="megatron-logprobs",
        source="Megatron-LM",
        words="max |a - b| of log-probabilities <= 0.001, before the first different token",
        sees="top",
        published=everywhere(1e-3),
        numbers=("free", "forced"),
    ),
    entry(
        values_apart,
        name="megatron-approx",
        source="Megatron-LM",
        words="of n values at most min(max(n // 100, 1), 50) differ by over 5 %; score: their number over that",
        sees="top",
        published=everywhere(1.0),
        numbers=("forced",),
    ),
    entry(
        sorted_top,
        name="sglang-top5",
        source="SGLang",
        words="prompts of <= 100 tokens: |difference| of the sorted top-5 log-probabilities < 0.05",
        sees="top",
        published=everywhere(0.05),
        numbers=("forced",),
    ),
    entry(
        largest_divergence,
        name="maxtext-kl",
        source="MaxText",
        words="max KL(r || c) of a token < 2e-4 (float32), 0.015 (16 bits)",
        sees="logits",
        published=by_precision(2e-4, 0.015),
        numbers=("forced",),
    ),
    entry(
        tail_divergence,
        name="llamacpp-kld-p99",
        source="llama.cpp",
        words="99th percentile of KL(r || c) over tokens",
        sees="logits",
        published={},
        numbers=("forced",),
    ),
    entry(
        other_top,
        name="llamacpp-same-top",
        source="llama.cpp",
        words="share of tokens with another best token",
        sees="top",
        published={},
        numbers=("forced",),
    ),
    entry(
        mean_exponential,
        name="tmpe",
        source="TMPE",
        words="mean exp |log p_c - log p_r| of the given tokens <= 1.05",
        sees="top",
        published=everywhere(1.05),
        numbers=("forced",),
    ),
    entry(
        lost_accuracy,
        name="trtllm-accuracy",
        source="TensorRT-LLM",
        words="acc_r - acc_c <= 1.645 sqrt(2 50^2 / n) points, of next tokens inside the prompts; score: the quotient",
        sees="top",
        published=everywhere(1.0),
        numbers=("forced",),
    ),
)
