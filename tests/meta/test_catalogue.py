"""A fixed part of the bug catalogue on a few short prompts: what is found today is found tomorrow."""

import pytest

from conftest import ROOT
from harness.power import trials
from harness.power.judges import ALL, alarms, is_judged

#: Found on short prompts whatever the precision: one of each part of an implementation, and each path of a run.
IN_BOTH = {
    "gpt2-tiny": (
        "wc-lora-scale", "pos-learned-offset", "pos-leftpad-shared", "pos-decode-zero", "at-scale",
        "x-kv-head-swapped", "kv-cross-request-store", "x-residual-missing", "tp-actorder", "tp-bias-xN",
        "pp-batch-mix", "q-zp-v1v2", "kg-noncontig-sdpa", "kg-nan-in-unused-v",
    ),
    "bloom-tiny": ("wc-qkv-cat", "wc-embed-ln-missing", "pos-alibi-npo2", "pos-alibi-decode-dropped"),
}  # fmt: skip
#: Far below the round-off of 16 bits, so that their function alone shows them.
IN_FLOAT32 = {
    "gpt2-tiny": ("wc-eps", "na-gelu", "x-variance-unbiased", "x-row-scaled"),
    "bloom-tiny": ("x-attention-scale",),
}
#: Correct, and not to be flagged.
NEVER = ("ok-key-bias", "ok-gelu-factored", "plain", "attention", "ranks-2")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """(name, host, precision) -> its trial; one golden a host."""
    work = tmp_path_factory.mktemp("power")
    for host in IN_BOTH:
        names = (*IN_BOTH[host], *IN_FLOAT32[host], *NEVER)
        asked = trials.planned(names=names, places=[host], sweeps=False, quick=True)
        trials.run_trials(asked, work, lambda *_: None, goldens=ROOT / "golden")
    return {(one.name, one.host, one.precision): one for one in trials.read_trials(work)}


def cases(table):
    """Names with their hosts, flat."""
    return [(name, host) for host, names in table.items() for name in names]


@pytest.mark.parametrize(("name", "host"), [*cases(IN_BOTH), *cases(IN_FLOAT32)])
def test_the_function_shows_it(found, name, host):
    """In float32 every one of them fails, whatever it does to the tokens."""
    assert alarms(found[name, host, "float32"], ALL), found[name, host, "float32"]


@pytest.mark.parametrize(("name", "host"), cases(IN_BOTH))
def test_16_bits_show_it(found, name, host):
    """As shipped in bfloat16 these fail as well."""
    assert alarms(found[name, host, "bfloat16"], ALL), found[name, host, "bfloat16"]


def test_the_correct_ones_pass(found):
    """Controls and correct families are judged, and not flagged, in either precision."""
    right = [one for one in found.values() if one.name in NEVER]
    assert len(right) == 2 * 2 * len(NEVER)
    assert all(is_judged(one) for one in right)
    assert [one for one in right if alarms(one, ALL)] == []
