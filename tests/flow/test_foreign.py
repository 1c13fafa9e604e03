"""A golden of a port: no floors, so it supports structural findings and exact repeats, and says so."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import harness
from harness import flow, store
from harness.errors import EngineError, GoldenError, ModelError, SuiteError, UsageError
from harness.values import Status
from tests.support import write_suite

#: A port that imports no transformers: a table of bigrams, whose cache is how many tokens there were.
BIGRAM = """
import torch

VOCABULARY = 301


def build(path, *, dtype, device):
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(VOCABULARY, VOCABULARY, generator=generator).to(dtype) * SCALE

    def port(input_ids, position_ids, attention_mask, cache):
        return table[input_ids], (cache or 0) + input_ids.shape[1]

    return port


def build_without_cache(path, *, dtype, device):
    port = build(path, dtype=dtype, device=device)
    return lambda input_ids, position_ids, attention_mask: port(input_ids, position_ids, attention_mask, None)[0]
"""
IDS = """
name = "ids"
description = "Ids alone, for models without a tokenizer."
stop = "ignore-eos"
add_special_tokens = false
max_new_tokens = 6

[[prompts]]
id = "one"
ids = [5, 6, 7]

[[prompts]]
id = "two"
ids = [250, 6, 7, 11, 12, 300]

[[runs]]
name = "batched"
views = ["generate", "replay", "prefill"]
quick = true
"""
GOLDEN = "golden/bigram/ids"


@pytest.fixture(autouse=True)
def _forgotten():
    """The next test's ports of the same names lie elsewhere."""
    yield
    for name in [name for name in sys.modules if "bigram" in name]:
        del sys.modules[name]


def write_port(name, scale="1.0"):
    """A module in the working directory; its SPEC."""
    Path(f"{name}.py").write_text(BIGRAM.replace("SCALE", scale), encoding="utf-8")
    return f"py:{name}:build"


@pytest.fixture
def foreign(home):
    """A golden of the bigram port."""
    write_suite(Path("prompts/ids.toml"), IDS)
    return flow.record(write_port("foreign_bigram"), "prompts/ids.toml", out=GOLDEN)


def test_a_port_is_recorded_without_floors(foreign):
    """The golden is read as it was written, says whose it is, and has no floor, with the reason for each precision."""
    golden = harness.load_golden(GOLDEN)
    assert golden.floors == {}
    assert golden.precision == "float32"
    assert golden.provenance["engine"] == "py:foreign_bigram:build"
    assert set(golden.provenance["left_out"]) == {"float32", "bfloat16", "float16"}
    assert golden.model.path is None
    assert [one.tokens for one in golden.generations] == [one.tokens for one in foreign.generations]
    assert all(len(one.tokens) == 6 for one in golden.generations)


def test_an_exact_repeat_is_identical(foreign):
    """The same port again gives every bit, which needs no floor to be judged."""
    verdict = harness.check(GOLDEN, "py:foreign_bigram:build")
    assert verdict.status is Status.IDENTICAL, str(verdict)


def test_any_difference_is_unmeasured(foreign):
    """Round-off and a bug cannot be told apart without a floor: neither passes, and the first place is named."""
    for scale in ("1.0000001", "3.0"):
        verdict = harness.check(GOLDEN, write_port(f"bigram_{scale.replace('.', '_')}", scale))
        assert verdict.status is Status.UNMEASURED, str(verdict)
        assert "no floor" in str(verdict)
        assert verdict.findings[0].where


def test_structure_is_still_judged(foreign):
    """What needs no floor fails: here a NaN."""

    def broken(input_ids, position_ids, attention_mask, cache):
        import torch

        return torch.full((*input_ids.shape, 301), float("nan")), True

    assert harness.check(GOLDEN, broken).status is Status.STRUCTURAL


def test_without_a_cache_the_reference_recomputes(home):
    """A port that keeps no cache can be recorded too: its continuation is the one with a cache."""
    write_suite(Path("prompts/ids.toml"), IDS)
    write_port("plain_bigram")
    with_cache = flow.record("py:plain_bigram:build", "prompts/ids.toml", out="golden/bigram/with")
    without = flow.record("py:plain_bigram:build_without_cache", "prompts/ids.toml", out="golden/bigram/without")
    assert without.continuations == with_cache.continuations
    verdict = harness.check("golden/bigram/with", "py:plain_bigram:build_without_cache")
    assert verdict.status is Status.IDENTICAL
    assert "keeps no cache" in str(verdict)


def test_text_needs_a_tokenizer(home):
    """A suite of text is refused without a model directory, and resolved with one."""
    spec = write_port("texting_bigram")
    with pytest.raises(SuiteError, match="tokenizer"):
        flow.record(spec, "prompts/small.toml", out="golden/bigram/small")
    assert not Path("golden/bigram").exists()
    golden = flow.record(f"{spec}?model=golden/small/model", "prompts/small.toml", out="golden/bigram/small")
    assert golden.requests[0].prompt_ids == harness.load_golden("golden/small/small").requests[0].prompt_ids
    assert golden.model.path == "../../small/model"
    assert golden.tokenizer_digest
    assert harness.check("golden/bigram/small", spec, quick=True).status is Status.IDENTICAL


def test_a_suite_that_stops_needs_to_know_where(home):
    """Without a directory nothing says which token ends a text; with one its config does."""
    spec = write_port("stopping_bigram")
    write_suite(Path("prompts/eos.toml"), IDS.replace("ignore-eos", "eos"))
    with pytest.raises(UsageError, match="ends a text"):
        flow.record(spec, "prompts/eos.toml", out="golden/bigram/eos")
    golden = flow.record(f"{spec}?model=golden/small/model", "prompts/eos.toml", out="golden/bigram/eos")
    assert golden.stop_ids == (2,)


def test_a_port_that_is_not_finite_blesses_nothing(home):
    """A reference that gives NaN, or raises, is refused and nothing is written."""
    write_suite(Path("prompts/ids.toml"), IDS)
    with pytest.raises(ModelError, match="not finite"):
        flow.record(write_port("broken_bigram", 'float("nan")'), "prompts/ids.toml", out="golden/bigram/nan")
    with pytest.raises((EngineError, UsageError)):
        flow.record("py:bigram_of_nobody:build", "prompts/ids.toml", out="golden/bigram/nan")
    assert not Path("golden/bigram").exists()


def test_an_update_compares_exactly(foreign):
    """The same port again is no change; another one is refused without a reason, since nothing says how large it is."""
    before = Path(GOLDEN, "golden.json").read_bytes()
    seen = []
    flow.record("py:foreign_bigram:build", "prompts/ids.toml", out=GOLDEN, update=True, show=seen.append)
    assert seen[0].worst.value == "same"
    assert Path(GOLDEN, "golden.json").read_bytes() == before
    spec = write_port("changed_bigram", "1.5")
    with pytest.raises(GoldenError, match="--reason"):
        flow.record(spec, "prompts/ids.toml", out=GOLDEN, update=True, show=seen.append)
    assert Path(GOLDEN, "golden.json").read_bytes() == before


def test_a_golden_does_not_execute_its_port(foreign, tmp_path):
    """Recording again from what a golden says would run code that a stranger's file names."""
    with pytest.raises(UsageError, match="Name it with --model"):
        flow.rerecord(GOLDEN)


def test_candidates_beside_goldens_execute_nothing_unasked(foreign):
    """A list of candidates may come with a stranger's golden: code that it names is run with --allow-code alone."""
    marker = Path("executed")
    Path("marking_bigram.py").write_text(
        f"open({str(marker)!r}, 'w')\n" + BIGRAM.replace("SCALE", "1.0"), encoding="utf-8"
    )
    Path("golden/bigram/candidates.toml").write_text('quick = ["py:marking_bigram:build"]', encoding="utf-8")
    with pytest.raises(GoldenError, match="--allow-code"):
        list(flow.check_all(Path("golden/bigram"), quick=True))
    assert not marker.exists()
    Path("golden/bigram/candidates.toml").write_text('quick = ["hf:trust_remote_code=true"]', encoding="utf-8")
    with pytest.raises(GoldenError, match="--allow-code"):
        list(flow.check_all(Path("golden/bigram"), quick=True))
    assert list(flow.check_all(Path("golden/bigram"), quick=True, allow_code=True))


def test_a_foreign_golden_is_readable(foreign):
    """The JSON says in words what there is not."""
    document = json.loads(Path(GOLDEN, store.JSON_NAME).read_text(encoding="utf-8"))
    assert document["floors"] == {}
    assert "port" in document["provenance"]["precision_reason"]
