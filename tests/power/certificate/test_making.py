"""Which models have a certificate, of which bugs, and the whole on a tiny golden."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from harness.errors import ModelError, UsageError
from harness.power.certificate import making
from harness.report.certificate import NAME
from harness.report.unseen import golden_digest, unseen_lines
from harness.templates.making import bugs_for
from harness.values import Status
from tests.templates import tiny


def test_a_model_that_the_catalogue_does_not_know_is_refused(tmp_path):
    """Its type is named, and those that are known."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(UsageError, match=r"nothing for models of type 'qwen2'.*bloom, gemma2, gpt2, llama"):
        making.refuse_unknown(tmp_path)
    with pytest.raises(ModelError, match="no model directory"):
        making.refuse_unknown(tmp_path / "nowhere")
    assert making.refuse_unknown(tiny.MODEL) == "llama"


def test_bugs_are_those_that_a_type_can_have():
    """No negative control; those that show in tokens or in 16 bits alone are among them."""
    found = making.bugs_of("gpt2")
    assert not any(one.harmless for one in found)
    ids = {one.id for one in found}
    assert {"wc-conv1d-transpose", "pr-norm-half", "sg-min-tokens"} <= ids
    assert "wc-rope-permute-missing" not in ids
    assert making.bugs_of("qwen2") == []


def test_lengths_of_a_config():
    """A window, the original length of a scaled RoPE, the context; what is not there is left out."""
    scaled = SimpleNamespace(rope_scaling={"original_max_position_embeddings": 64}, max_position_embeddings=512)
    assert making.landmarks(scaled) == {"original_max_position_embeddings": 64, "context": 512}
    window = SimpleNamespace(sliding_window=16, n_positions=128)
    assert making.landmarks(window) == {"sliding_window": 16, "context": 128}
    assert making.landmarks(SimpleNamespace(sliding_window=None)) == {}


def seen(found, precision):
    """How each bug is seen."""
    return {one.id: one.sights[precision].seen for one in found.bugs}


def test_the_reference_itself_is_no_alarm(tried):
    """Each precision of the golden has a column, with an error that is red and a limit of z."""
    assert [one.precision for one in tried.columns] == list(tiny.PRECISIONS)
    for one in tried.columns:
        assert one.status in (Status.IDENTICAL, Status.DRIFT)
        assert one.smallest > 1
        assert one.limit > 3


def test_what_is_seen_on_the_tiny_golden(tried):
    """In float32 nearly all is red by its size, in bfloat16 less; what needs other things is not seen."""
    wide, narrow = seen(tried, "float32"), seen(tried, "bfloat16")
    assert wide["x-rows-swapped"] == wide["wc-eps"] == wide["at-mask-as-length"] == "size"
    assert narrow["wc-eps"] != "size"
    assert wide["tp-argmax-rows"] == narrow["tp-argmax-rows"] == "tried"
    assert {wide[name] for name in ("sg-pen-pad", "sg-min-tokens", "kv-not-reset", "pr-norm-half")} == {"not"}
    assert "na-gelu" not in wide
    assert "na-gelu" in tried.absent
    # Three that show in tokens, in both precisions, and pr-norm-half in bfloat16.
    assert tried.trials == 7


def test_why_others_are_not_seen(tried):
    """Each that is not seen says what it needs, how many tokens, or what the check said."""
    needs = {one.id: one.sights["float32"].needs for one in tried.bugs}
    assert needs["sg-min-tokens"] == needs["bs-result-order"] == ("eos",)
    assert needs["sg-pen-pad"] == ("penalties",)
    assert needs["kv-not-reset"] == ("second",)
    assert needs["pr-norm-half"] == ("half",)
    assert needs["pr-fp16-clamp"] == ("float16",)
    for one in tried.bugs:
        for sight in one.sights.values():
            assert sight.known or sight.why
            assert sight.tokens is None or sight.tokens > 1


def test_reasons_without_a_template_are_those_of_making(tried):
    """The words by which a missing part is known are those that templates/making.py uses."""
    assert bugs_for("llama")
    reasons = set(tiny.bank().left_out.values())
    assert reasons
    assert all(one.startswith(making.NO_PART) or one == making.NOTHING for one in reasons)


def test_it_is_written_beside_its_golden_and_found_there(tried, tmp_path, plain):
    """It carries the digest of its golden; a check of that refers to it."""
    assert tried.digest == golden_digest(Path(tiny.golden().directory))
    assert len(tried.digest) == 64
    (tmp_path / "golden.json").write_text(json.dumps({"digest": tried.digest}))
    path = making.write(tried, tmp_path)
    assert path == tmp_path / NAME
    (line,) = unseen_lines(tmp_path, plain["bfloat16"])
    counted = sum(one.sights["bfloat16"].seen in ("not", "name") for one in tried.bugs)
    assert f"{counted} of {len(tried.bugs)} bugs of the catalogue in bfloat16" in line
