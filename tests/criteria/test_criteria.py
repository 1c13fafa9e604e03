"""What holds for every criterion."""

import itertools
import math
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.criteria import CRITERIA, Case, scores
from harness.criteria.case import PRECISIONS
from tests.criteria.cases import alarms, changed, drawn, forced, score, together

#: What cannot see logits at all: a NaN shows in the tokens, or nowhere.
IDS_ALONE = {"exact", "sglang-rouge", "hf-quant-match"}
#: Scores that are no distance: a mean exponential begins at 1, a ratio of errors at 1 / 1.5.
MINIMUM = {"tmpe": 1.0}
#: The scores that cannot fall while all logits move along one line away from the reference.
MONOTONE = [
    "allclose-1e-2", "difr", "dynamo-fp64", "flash-2x", "hf-80", "llamacpp-kld-p99", "llamacpp-nmse",
    "llamacpp-same-top", "maxtext-kl", "neuron", "polygraphy", "polygraphy-cosine", "reprod-log", "sglang-rel",
    "vllm-top5-every",
]  # fmt: skip


def test_the_list():
    """Names are unique and lower case, thresholds are of known precisions, and what is looked at is one of three."""
    assert len(CRITERIA) == 32
    for name, one in CRITERIA.items():
        assert one.name == name == name.lower()
        assert "\n" not in one.rule
        assert set(one.published) <= set(PRECISIONS)
        assert one.sees in ("tokens", "top", "logits")
    assert {name for name, one in CRITERIA.items() if not one.published} == {
        "difr", "llamacpp-kld-p99", "llamacpp-same-top"
    }  # fmt: skip


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equal_sides_have_the_least_score(precision, dtype):
    """A candidate that is its reference, both exact, scores 0 or the rule's minimum, and nothing alarms."""
    case = drawn(precision=precision, noise=0.0, error=0.0, dtype=dtype)
    for name, value in scores(case).items():
        assert value == pytest.approx(MINIMUM.get(name, 0.0), abs=1e-12), name
        assert value <= CRITERIA[name].published.get(precision, math.inf)


def test_the_reference_itself_passes_everywhere():
    """A candidate equal to a reference that has round-off passes every rule."""
    case = drawn(noise=0.05)
    case = replace(case, candidate=case.same)
    for name in CRITERIA:
        if case.precision in CRITERIA[name].published:
            assert not alarms(name, case), name


def test_scores_are_those_of_the_criteria():
    """Sharing work changes no number."""
    case = drawn(3)
    found = scores(case)
    assert found == {name: one.score(case) for name, one in CRITERIA.items()}
    assert sum(value > 0 for value in found.values()) > 20


def test_a_broken_candidate_alarms_everywhere():
    """Random logits are past the published threshold of every rule but those that look at tokens by chance."""
    case = drawn(error=30.0, prompts=6)
    case = replace(case, repeats=((case.repeats[0][0], case.repeats[0][1] + 1),))
    quiet = {name for name, one in CRITERIA.items() if case.precision in one.published and not alarms(name, case)}
    assert quiet <= {"trtllm-accuracy", "vllm-top5"}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", sorted(set(CRITERIA) - IDS_ALONE))
def test_what_is_no_number_is_infinite(name, value):
    """One NaN or infinity anywhere in the candidate's logits scores infinity; in no rule NaN."""

    def spoil(logits):
        spoiled = logits.copy()
        spoiled[-1:, 3] = value
        return spoiled

    assert score(name, changed(drawn(), spoil)) == math.inf


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_an_order_of_prompts_does_not_matter(name):
    """The same prompts in another order have the same score."""
    case = drawn(5, prompts=5, error=0.5)
    for order in ((4, 2, 0, 3, 1), (1, 0, 2, 4, 3)):
        fields = ("candidate", "same", "exact", "repeats")
        moved = replace(case, **{field: tuple(getattr(case, field)[place] for place in order) for field in fields})
        assert score(name, moved) == pytest.approx(score(name, case), rel=1e-12)


def moved(seed, factor):
    """A reference with an error, and a candidate with that error and ``factor`` times it in addition."""
    case = drawn(seed, noise=0.0)
    rng = np.random.default_rng(seed + 1)
    same, candidate = [], []
    for one in case.exact:
        errors = {name: 0.3 * rng.normal(size=getattr(one, name).shape) for name in ("free", "decode", "prefill")}
        same.append(replace(one, **{name: getattr(one, name) + error for name, error in errors.items()}))
        far = {name: getattr(one, name) + (1 + factor) * error for name, error in errors.items()}
        candidate.append(replace(one, **far))
    return replace(case, same=tuple(same), candidate=tuple(candidate))


@given(
    seed=st.integers(0, 1000),
    near=st.floats(0, 4),
    more=st.floats(0, 4),
    name=st.sampled_from(MONOTONE),
    precision=st.sampled_from(PRECISIONS),
)
@settings(deadline=None, max_examples=150)
def test_further_is_never_better(seed, near, more, name, precision):
    """A larger error along the same line does not lower the score."""
    cases = (replace(moved(seed, factor), precision=precision) for factor in (near, near + more))
    small, large = (score(name, case) for case in cases)
    assert large >= small * (1 - 1e-9) - 1e-12


@given(seed=st.integers(0, 1000), less=st.floats(0, 3), more=st.floats(0, 3))
@settings(deadline=None, max_examples=50)
def test_less_likely_tokens_are_never_better(seed, less, more):
    """Pulling down the logit of every given token does not lower what looks at its log-probability."""
    case = drawn(seed, noise=0.0, error=0.0)

    def lowered(size):
        sides = []
        for one in case.same:
            decode, prefill, length = one.decode.copy(), one.prefill.copy(), len(one.prompt_ids)
            decode[np.arange(len(decode)), one.forced_ids[length:]] -= size
            prefill[np.arange(len(prefill)), one.forced_ids[1:]] -= size
            sides.append(replace(one, decode=decode, prefill=prefill))
        return replace(case, candidate=tuple(sides))

    near, far = scores(lowered(less)), scores(lowered(less + more))
    for name in ("tmpe", "tgi-logprobs", "megatron-logprobs", "megatron-approx"):
        assert far[name] >= near[name] * (1 - 1e-9)


@given(st.lists(st.integers(0, 11), unique=True, max_size=12), st.integers(0, 11))
@settings(deadline=None, max_examples=60)
def test_one_more_wrong_token_is_never_better(places, extra):
    """Replacing tokens one by one does not lower the rules on ids."""
    same = np.arange(12)

    def wrong(where):
        tokens = same.copy()
        tokens[list(where)] += 20
        base = forced(np.zeros((1, 40)))
        side = replace(base.same[0], tokens=same, free=np.zeros((12, 40)))
        return replace(base, same=(side,), candidate=(replace(side, tokens=tokens),))

    for name in IDS_ALONE:
        assert score(name, wrong({*places, extra})) >= score(name, wrong(places))


def test_nothing_shown_is_no_alarm():
    """Prompts without own tokens, of one token, or without forced tokens give numbers."""
    bare = forced(np.zeros((0, 4)), prompt=1)
    for case in (bare, forced(np.zeros((0, 4)), prompt=4), together(bare, forced(np.eye(4)[:2]))):
        for name, value in scores(case).items():
            assert value in (0.0, 1.0), name


def test_all_subsets_of_prompts_give_numbers():
    """No rule needs a certain number of prompts."""
    parts = [drawn(seed, prompts=1) for seed in range(3)]
    for count in (1, 2, 3):
        for chosen in itertools.combinations(parts, count):
            assert all(value >= 0 for value in scores(together(*chosen)).values())


def large_case(width: int) -> Case:
    """Eight prompts, 256 decode rows and 1,500 prefill rows."""
    one = drawn(0, prompts=1, width=width, longest=2)
    rng = np.random.default_rng(0)
    cases = []
    for _ in range(8):
        ids = rng.integers(0, width, size=188)
        shapes = {"free": (32, width), "decode": (32, width), "prefill": (187, width)}
        exact = {name: rng.normal(0, 3, size=shape) for name, shape in shapes.items()}
        sides = {}
        for name, dtype in (("exact", np.float64), ("same", np.float32), ("candidate", np.float32)):
            noise = 0.0 if name == "exact" else 0.02
            arrays = {key: (x + noise * rng.normal(size=x.shape)).astype(dtype) for key, x in exact.items()}
            tokens = arrays["free"].argmax(axis=1)
            sides[name] = (replace(one.same[0], prompt_ids=ids[:156], tokens=tokens, forced_ids=ids, **arrays),)
        repeats = ((sides["candidate"][0].decode, sides["candidate"][0].decode.copy()),)
        cases.append(Case(precision="bfloat16", repeats=repeats, **sides))
    return together(*cases)


@pytest.mark.parametrize("width", [300, 1500])
def test_all_rules_are_fast(width):
    """All criteria of a case as `harness power` has them take well below what running the models does."""
    case = large_case(width)
    began = time.process_time()
    found = scores(case)
    taken = time.process_time() - began
    print(f"V = {width}: {taken:.2f} s")
    assert len(found) == len(CRITERIA)
    assert taken < 3
