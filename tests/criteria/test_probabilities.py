import math
from dataclasses import replace

import numpy as np
import pytest

from tests.criteria.cases import alarms, drawn, forced, free, score, together


def logs(*probabilities):
    """Logits whose softmax is as given."""
    return [math.log(one) for one in probabilities]


# --- vLLM --------------------------------------------------------------------------------------------


def ranked(rank, width=8):
    """A row of logits in which token 0 is best and token 1 has the given rank."""
    order = [2, 3, 4, 5, 6, 7][: rank - 2]
    row = np.zeros(width)
    for place, token in enumerate([0, *order, 1]):
        row[token] = 10 - place
    return row


def swapped(row):
    """The same row with tokens 0 and 1 exchanged."""
    return row[[1, 0, *range(2, len(row))]]


@pytest.mark.parametrize("rank", [2, 5, 6])
def test_vllm_looks_among_the_best_five(rank):
    """At the first difference the worse of both ranks counts: the fifth passes, the sixth does not."""
    for mine, theirs in ((rank, 2), (2, rank)):
        same, candidate = [ranked(2), ranked(mine)], [ranked(2), swapped(ranked(theirs))]
        case = free([3, 0, 4], [3, 1, 5], [*same, ranked(2)], [*candidate, ranked(2)])
        assert score("vllm-top5", case) == rank
        assert alarms("vllm-top5", case) == (rank > 5)


def test_vllm_stops():
    """Nothing behind the first difference, behind the 32nd token or of the lengths is looked at."""
    assert score("vllm-top5", free([1, 2, 3], [1, 2])) == 0
    same, candidate = [0] * 40, [0] * 40
    candidate[32] = 1
    rows = [ranked(8)] * 40
    assert score("vllm-top5", free(same, candidate, rows, rows)) == 0
    candidate[31] = 1
    assert score("vllm-top5", free(same, candidate, rows, rows)) == 8


def test_vllm_cannot_find_what_is_not_shown():
    """A token outside the vocabulary, or one without logits, is among nobody's best."""
    assert score("vllm-top5", free([0], [9], [ranked(2)], [ranked(2)])) == math.inf
    case = free([0], [1])
    bare = replace(case.candidate[0], free=np.zeros((0, 8)))
    assert score("vllm-top5", replace(case, candidate=(bare,))) == math.inf


@pytest.mark.parametrize("rank", [2, 5, 6])
def test_vllm_at_every_step(rank):
    """Each side's best token of each forced row has a rank on the other side; the worst counts."""
    for mine, theirs in ((rank, 2), (2, rank)):
        case = forced([ranked(2), ranked(mine), ranked(3)], [ranked(2), swapped(ranked(theirs)), ranked(3)])
        assert score("vllm-top5-every", case) == rank
        assert alarms("vllm-top5-every", case) == (rank > 5)
    assert score("vllm-top5-every", forced([ranked(2)])) == 0


# --- TGI, Megatron -----------------------------------------------------------------------------------


def shown(same, candidate, tokens=((0, 0), (0, 0))):
    """Two steps with the given probabilities of token 0, of which the second may differ."""
    rows = [[logs(one, 1 - one) for one in side] for side in (same, candidate)]
    return free(tokens[0], tokens[1], *rows, width=2)


def test_tgi_by_hand():
    """Log-probabilities log 1/4 and log 1/2 differ by half of the larger; 20 % of it is allowed."""
    assert score("tgi", shown((0.25, 0.5), (0.25, 0.25))) == pytest.approx(0.5)
    assert score("tgi", shown((0.25, 0.5), (0.5, 0.5))) == pytest.approx(0.5)
    limit = 0.5**1.25
    for name in ("tgi", "tgi-logprobs"):
        assert not alarms(name, shown((0.5, 0.5), (0.5, limit * 1.0001)))
        assert alarms(name, shown((0.5, 0.5), (0.5, limit * 0.9999)))


def test_megatron_by_hand():
    """0.001 nats are allowed."""
    for name in ("megatron", "megatron-logprobs"):
        assert not alarms(name, shown((0.5, 0.5), (0.5, 0.5 * math.exp(-0.00099))))
        assert alarms(name, shown((0.5, 0.5), (0.5, 0.5 * math.exp(-0.00101))))
    assert score("megatron", shown((0.5, 0.5), (0.5, 0.5 * math.exp(-0.25)))) == pytest.approx(0.25)


@pytest.mark.parametrize("name", ["tgi", "megatron"])
def test_ids_are_beyond_any_factor(name):
    """A different id or length is infinite in the whole rule; the other looks at the steps before it alone."""
    differ = shown((0.5, 0.9), (0.5, 0.1), ((0, 0), (0, 1)))
    assert score(name, differ) == math.inf
    assert score(f"{name}-logprobs", differ) == 0
    assert score(name, free([0, 0], [0], width=2)) == math.inf
    assert score(f"{name}-logprobs", free([0, 0], [0], width=2)) == 0


def test_tgi_compares_the_prompt_ids():
    """TGI shows ids of prompt tokens; Megatron's test does not compare them."""
    case = shown((0.5, 0.5), (0.5, 0.5))
    other = replace(case, candidate=(replace(case.candidate[0], prompt_ids=np.array([3])),))
    assert (score("tgi", case), score("tgi", other), score("megatron", other)) == (0, math.inf, 0)


def test_prompt_tokens_count():
    """Log-probabilities of the prompt's own tokens are compared, those of forced steps are not."""
    case = forced([logs(0.5, 0.5)], prompt=2)
    prompt = replace(case.candidate[0], prefill=np.array([logs(0.25, 0.75), logs(0.5, 0.5)]))
    steps = replace(case.candidate[0], prefill=np.array([[0.0, 0.0], logs(0.25, 0.75)]))
    assert score("megatron-logprobs", replace(case, candidate=(prompt,))) == pytest.approx(math.log(2))
    assert score("tgi-logprobs", replace(case, candidate=(prompt,))) == pytest.approx(0.5)
    assert score("megatron-logprobs", replace(case, candidate=(steps,))) == 0


@pytest.mark.parametrize(("count", "allowed"), [(3, 1), (199, 1), (200, 2), (250, 2)])
def test_megatron_lets_some_values_be_apart(count, allowed):
    """Of n values one in a hundred, and at least one, may be 5 % off."""
    same = np.array([logs(0.5, 0.5)] * count)
    for apart in (allowed, allowed + 1):
        candidate = same.copy()
        candidate[:apart, 1] += 0.1
        assert score("megatron-approx", forced(same, candidate)) == pytest.approx(apart / allowed)
        assert alarms("megatron-approx", forced(same, candidate)) == (apart > allowed)
    near = same.copy()
    near[:, 1] += 0.06
    assert score("megatron-approx", forced(same, near)) == 0


# --- SGLang ------------------------------------------------------------------------------------------


def test_sglang_sorts_away_the_ids():
    """Swapped ids of equal values are not seen, a shifted probability is; 0.05 nats are allowed."""
    same = [logs(0.5, 0.25, 0.25)]
    assert score("sglang-top5", forced(same, [logs(0.25, 0.25, 0.5)])) == pytest.approx(0)
    assert score("sglang-top5", forced(same, [logs(0.5, 0.3, 0.2)])) == pytest.approx(math.log(1.25))
    for factor in (0.049, 0.051):
        low = 0.1 * math.exp(factor)
        case = forced([logs(*[0.225] * 4, 0.1)], [logs(*[(1 - low) / 4] * 4, low)])
        assert alarms("sglang-top5", case) == (factor > 0.05)


def test_sglang_looks_at_five_and_at_short_prompts():
    """The sixth value is not compared, and prompts of more than 100 tokens are not compared at all."""
    same = np.array([[9.0, 9, 9, 9, 9, 0, 0]])
    candidate = same + np.array([0, 0, 0, 0, 0, 1, 1])
    assert score("sglang-top5", forced(same, candidate)) < 1e-3
    candidate = same + np.array([0, 0, 0, 0, 1, 0, 0])
    assert score("sglang-top5", forced(same, candidate, prompt=100)) > 0.5
    assert score("sglang-top5", forced(same, candidate, prompt=101)) == 0


# --- divergences -------------------------------------------------------------------------------------


def test_divergence_by_hand():
    """KL of (1/2, 1/2) from (1/4, 3/4) is log 2 / 2 - log 1.5 / 2; the largest row counts, with its own limits."""
    expected = 0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)
    case = forced([logs(0.5, 0.5)] * 3, [logs(0.5, 0.5), logs(0.25, 0.75), logs(0.5, 0.5)])
    assert score("maxtext-kl", case) == pytest.approx(expected)
    small = forced([logs(0.5, 0.5)], [logs(0.52, 0.48)])
    assert alarms("maxtext-kl", small)
    assert not alarms("maxtext-kl", replace(small, precision="bfloat16"))


def test_llamacpp_by_hand():
    """The 99th percentile lies where it should between the sorted divergences; the share of other tops is counted."""
    probabilities = np.linspace(0.5, 0.9, 11)
    case = forced([logs(0.5, 0.5)] * 11, [logs(1 - one, one) for one in probabilities])
    divergences = [-0.5 * math.log(4 * one * (1 - one)) for one in probabilities]
    assert score("llamacpp-kld-p99", case) == pytest.approx(divergences[-2] * 0.1 + divergences[-1] * 0.9)
    assert score("llamacpp-same-top", case) == pytest.approx(10 / 11)


def test_tmpe_by_hand():
    """Probabilities off by 5 % either way score 1.05; a concentrated fault disappears in the mean."""
    case = forced([logs(0.5, 0.5)] * 2, [logs(0.5 * 1.05, 0.475), logs(0.5 / 1.05, 1 - 0.5 / 1.05)])
    assert score("tmpe", case) == pytest.approx(1.05)
    right = forced([logs(0.5, 0.5)] * 39)
    wrong = forced([logs(0.5, 0.5)], [logs(0.2, 0.8)])
    assert score("tmpe", together(right, wrong)) == pytest.approx((39 + 2.5) / 40)
    assert not alarms("tmpe", together(right, wrong))
    assert alarms("tmpe", wrong)


def test_accuracy_of_next_tokens():
    """Of 100 prompt tokens, the reference has all right: 11 lost points pass, 12 do not, and none is gained."""
    case = forced([[1.0, 0]], prompt=101)
    prefill = np.tile([1.0, 0.0], (101, 1))
    same = (replace(case.same[0], prefill=prefill),)
    found = []
    for wrong in (0, 11, 12):
        answers = prefill.copy()
        answers[:wrong] = [0, 1]
        found.append(replace(case, same=same, candidate=(replace(case.same[0], prefill=answers),)))
    assert [alarms("trtllm-accuracy", one) for one in found] == [False, False, True]
    assert score("trtllm-accuracy", found[2]) == pytest.approx(12 / (1.645 * math.sqrt(2 * 2500 / 100)))
    assert score("trtllm-accuracy", replace(found[2], candidate=same, same=found[2].candidate)) == 0


@pytest.mark.parametrize(
    "name", ["maxtext-kl", "llamacpp-kld-p99", "llamacpp-same-top", "sglang-top5", "tgi-logprobs", "megatron-approx"]
)
def test_log_probabilities_do_not_see_a_constant(name):
    """What is added to all logits of a row changes nothing."""
    case = drawn(error=0.5)
    shifted = replace(
        case,
        candidate=tuple(
            replace(one, free=one.free + 5, decode=one.decode - 3, prefill=one.prefill + 7) for one in case.candidate
        ),
    )
    assert score(name, shifted) == pytest.approx(score(name, case), rel=1e-9)
    assert score(name, case) > 0
