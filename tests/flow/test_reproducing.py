"""A failure becomes a script that fails in a process of its own, and passes once the bug is out."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import harness
from harness.errors import UsageError
from harness.flow.reproducing import reproduce
from harness.repro.writing import write

#: A port that is wrong in decode steps alone.
PORT = """
import torch
from transformers import AutoModelForCausalLM, DynamicCache


def build(path, *, dtype):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()

    def port(input_ids, position_ids, attention_mask, cache):
        decodes = cache is not None
        cache = DynamicCache(config=model.config) if cache is None else cache
        given = {"attention_mask": attention_mask, "position_ids": position_ids}
        logits = model(input_ids, past_key_values=cache, use_cache=True, **given).logits
        if decodes and WRONG:
            logits[..., 3] += 0.01
        return logits, cache

    return port


WRONG = True
"""


@pytest.fixture(scope="module")
def golden(small_home):
    """A golden of a small Llama, its model beside it (read only)."""
    return harness.load_golden(small_home / "golden/small/small")


@pytest.fixture
def unrun(monkeypatch):
    """No fresh process: it is started in other tests."""
    monkeypatch.setattr("harness.repro.writing._run", lambda *_: (1, "the bug is there", 0.0))


def model_of(golden):
    """The directory of its model."""
    return Path(golden.directory).parent / "model"


def scaled(golden, directory):
    """The model with a few rows of one weight off by a tenth."""
    shutil.copytree(model_of(golden), directory)
    tensors = load_file(directory / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    tensors[name][:8] *= 1.1
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def scripted(directory):
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("repro_case", directory / "repro.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_bug_of_decode_steps_in_a_port(golden, tmp_path, monkeypatch):
    """One step behind one token; a fresh process fails with the bug and passes without, the test does as the script."""
    (tmp_path / "my_wrong_port.py").write_text(PORT)
    monkeypatch.chdir(tmp_path)
    found = reproduce(golden, "py:my_wrong_port:build", tmp_path / "case")
    assert found.runs, str(found)
    batch = found.found.case.batch
    assert (len(batch.rows), len(batch.rows[0].prompt), batch.steps, batch.decode) == (1, 1, 1, True)
    assert found.found.judgement.margin > 3
    assert "fails as promised" in str(found)
    for name in ("repro.py", "test_repro.py"):
        text = (tmp_path / "case" / name).read_text()
        assert "import harness" not in text
        assert "from harness" not in text
    assert "exit code 1" in (tmp_path / "case/README.md").read_text()
    (tmp_path / "my_wrong_port.py").write_text(PORT.replace("WRONG = True", "WRONG = False"))
    fixed = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:golden_harness", "test_repro.py"],
        cwd=tmp_path / "case", capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert fixed.returncode == 0, fixed.stdout


def test_a_bug_of_a_second_request(golden, tmp_path, monkeypatch, unrun):
    """The request before it is part of the case; the candidate is opened anew for each case, and so is the script's."""
    wrong = "position_ids.numel() > 2 and len(seen) > 1"
    counted = PORT.replace("decodes = cache is not None", "seen.extend([1] * (position_ids.numel() > 2))")
    (tmp_path / "my_leaking_port.py").write_text(
        counted.replace("decodes and WRONG", f"WRONG and {wrong}").replace(
            "    def port(", "    seen = []\n\n    def port("
        )
    )
    monkeypatch.chdir(tmp_path)
    found = reproduce(golden, "py:my_leaking_port:build", tmp_path / "case")
    assert found.found is not None, str(found)
    assert [batch.tokens for batch in found.found.case.before] == [3]
    assert found.found.case.batch.tokens == 3
    script = scripted(tmp_path / "case")
    assert "x the limit" in script.problem()
    sys.modules["my_leaking_port"].WRONG = False
    assert script.problem() == ""


def test_other_weights_in_sixteen_bits_and_pieces(golden, tmp_path, unrun):
    """What a SPEC says is written out: the float32 copy, chunks, the kernel; right weights pass the same script."""
    wrong = scaled(golden, tmp_path / "wrong")
    spec = f"hf:model={wrong},dtype=bfloat16,attn=eager,chunk=2"
    found = reproduce(golden, spec, tmp_path / "case")
    assert found.found is not None, str(found)
    script = scripted(tmp_path / "case")
    text = (tmp_path / "case/repro.py").read_text()
    assert "attn_implementation='eager'" in text
    assert "tensor.data.float()" in text
    assert "x the limit" in script.problem()
    script.MODEL = model_of(golden)
    assert script.problem() == ""
    script.REFERENCE = wrong
    with pytest.raises(ValueError, match="another model"):
        script.problem()


@pytest.mark.parametrize("option", ["static_cache=true", "chunk=2", "weights=bfloat16"])
def test_a_right_model_passes_as_it_is_asked_for(golden, tmp_path, unrun, option):
    """Padded rows in one pass and in decode steps give in the script's own loops what is right."""
    from harness.engines import build_engine
    from harness.repro.cases import Batch, Case, Judgement, Row
    from harness.repro.finding import Found
    from harness.repro.recipes import recipe_of
    from harness.repro.roundoff import Ruler

    rows = (Row(prompt=(7, 8, 9), fed=(10, 11)), Row(prompt=(12,), fed=(13, 14)))
    places = ((1, 3), (0, 5), (0, 3))
    with build_engine(f"hf:dtype=float32,{option}", model=str(model_of(golden))) as engine:
        recipe = recipe_of(engine, widened=False, cast=None)
    ruler = Ruler(
        str(model_of(golden)), precision=golden.precision, dtype="float32", weights=None, vocabulary=golden.vocabulary
    )
    with ruler:
        allowed = ruler.allowed([row.ids for row in rows], places)
    batch = Batch(rows=rows, decode=True)
    judgement = Judgement(kind="logits", places=places, ratio=9.0, limit=allowed.limit)
    found = Found(
        case=Case(batch=batch, before=(Batch(rows=rows, decode=False), batch)), judgement=judgement, allowed=allowed,
        tried=1, finished=True, seconds=0.0,
    )  # fmt: skip
    write(tmp_path / "case", found, recipe, golden="g", candidate="c", reference=model_of(golden), copy_model=True)
    script = scripted(tmp_path / "case")
    told = {"static_cache=true": "StaticCache(", "chunk=2": "range(0, length, 2)", "weights=bfloat16": "rounded ="}
    assert told[option] in (tmp_path / "case/repro.py").read_text()
    assert script.problem() == ""
    script.run = lambda model: script.one_pass(model, script.ROWS)
    assert script.problem() == ""
    assert tmp_path / "case" in script.MODEL.parents  # the copy
    # The same directory may be written again; another's may not.
    write(tmp_path / "case", found, recipe, golden="g", candidate="c", reference=model_of(golden))
    assert not (tmp_path / "case/model").exists()
    assert json.loads((tmp_path / "case/repro.json").read_text())["kind"] == "logits"
    with pytest.raises(UsageError, match="something else"):
        write(Path(golden.directory), found, recipe, golden="g", candidate="c", reference=model_of(golden))


def test_an_object_is_left_to_fill_in(golden, tmp_path):
    """A mutated model has no name: build() says so, and with it the script is complete."""
    model = harness.reference_model(golden, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.mul_(1.01)
    found = reproduce(golden, model, tmp_path / "case")
    assert found.unfilled
    assert "build()" in str(found)
    script = scripted(tmp_path / "case")
    with pytest.raises(NotImplementedError, match=r"build\(\)"):
        script.problem()
    script.build = lambda: model
    assert "x the limit" in script.problem()
    script.build = lambda: harness.reference_model(golden, dtype=torch.float32)
    assert script.problem() == ""


def test_what_cannot_be_widened_is_judged_in_its_own_precision(golden, tmp_path):
    """A bare callable in bfloat16 is held against round-off in bfloat16, and so is the control."""

    def port(shift):
        model = harness.reference_model(golden, dtype=torch.bfloat16)

        def run(input_ids, position_ids, attention_mask):
            logits = model(input_ids, attention_mask=attention_mask, position_ids=position_ids).logits
            return logits + shift * (torch.arange(logits.shape[-1]) == 5).to(logits.dtype)

        return run

    found = reproduce(golden, port(100), tmp_path / "case")
    assert found.found is not None, str(found)
    script = scripted(tmp_path / "case")
    script.build = lambda: port(100)
    assert "x the limit" in script.problem()
    script.build = lambda: port(0)
    assert script.problem() == ""


def test_what_is_not_finite_and_what_raises(golden, tmp_path):
    """Other failures stay what they are."""
    model = harness.reference_model(golden, dtype=torch.float32)

    def spoilt(length, spoil):
        def port(input_ids, position_ids, attention_mask):
            logits = model(input_ids, attention_mask=attention_mask, position_ids=position_ids).logits
            return spoil(logits) if input_ids.shape[1] > length else logits

        return port

    def not_finite(logits):
        logits[:, -1, 3] = float("nan")
        return logits

    def raising(_logits):
        raise RuntimeError("no such kernel")

    for name, spoil, kind in (("nan", not_finite, "finite"), ("raising", raising, "raises")):
        found = reproduce(golden, spoilt(6, spoil), tmp_path / name)
        assert (found.found.judgement.kind, found.found.case.batch.tokens) == (kind, 7), str(found)
        script = scripted(tmp_path / name)
        script.build = lambda spoil=spoil: spoilt(6, spoil)
        assert script.problem()
        script.build = lambda: spoilt(100, None)
        assert script.problem() == ""


def test_where_nothing_can_be_written_it_is_said(golden, tmp_path):
    """A right candidate, ranks, a black box: a plain word, and no directory."""
    red = harness.check(golden, _shifted(golden), quick=True)
    for candidate, verdict, said in (
        ("hf:dtype=float32", None, "nothing fails"),
        ("tp:size=2", red, "several ranks"),
        ("hf:dtype=float32,show=tokens", red, "no logits"),
    ):
        found = reproduce(golden, candidate, tmp_path / "case", verdict=verdict)
        assert said in str(found)
        assert not found.runs
        assert not (tmp_path / "case").exists()


def _shifted(golden):
    model = harness.reference_model(golden, dtype=torch.float32)

    def port(input_ids, position_ids, attention_mask):
        logits = model(input_ids, attention_mask=attention_mask, position_ids=position_ids).logits
        logits[..., 0] += 1
        return logits

    return port
