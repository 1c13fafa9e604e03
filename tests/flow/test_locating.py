"""harness.locate: the first wrong module of a live model, from its weights and a replay of its modules."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import harness
from harness.engines import hf
from harness.errors import EngineError
from harness.mutations.catalogue import CATALOGUE
from tests.commands import runner
from tests.support import write_model, write_suite


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """A golden of a small random Llama with biases, in float32 alone."""
    root = tmp_path_factory.mktemp("locate")
    model = write_model(root / "tiny" / "model", "llama")
    suite = write_suite(root / "small.toml")
    harness.record(str(model), suite, out=root / "tiny" / "small", precisions=("float32",), replicas=2)
    made = harness.load_golden(root / "tiny" / "small")
    return replace(made, model=replace(made.model, path="../model"))


def test_a_correct_model_has_no_wrong_module(golden):
    """Nothing is named in the reference's own model, in the other attention kernel."""
    model = harness.reference_model(golden, dtype=torch.float32)
    model.config._attn_implementation = "eager"
    found = harness.locate(golden, model)
    assert (found.scope, found.module, found.exit_code) == ("nowhere", "", 0)
    assert found.modules > 10


def test_a_weight_is_named_by_its_audit_and_by_its_replay(golden):
    """Two rows of one matrix swapped: the linear map itself, not the MLP, the block or what comes after."""
    model = harness.reference_model(golden, dtype=torch.bfloat16)
    with torch.no_grad():
        weight = model.model.layers[1].mlp.up_proj.weight
        weight[[3, 17]] = weight[[17, 3]]
    found = harness.locate(golden, model)
    assert (found.module, found.scope, found.question) == ("model.layers.1.mlp.up_proj", "local", "function")
    assert {clue.module for clue in found.clues if clue.wrong} == {found.module}
    assert found.module in str(found)
    assert json.loads(json.dumps(found.to_dict()))["module"] == found.module


def test_a_setting_of_every_block_is_configuration(golden):
    """The same activation wrong in every MLP: one of them is named, and that all are wrong."""
    model = harness.reference_model(golden, dtype=torch.float32)
    for block in model.model.layers:
        block.mlp.act_fn = torch.nn.GELU()
    found = harness.locate(golden, model)
    assert (found.module, found.scope) == ("model.layers.0.mlp.act_fn", "configuration")


def test_what_is_wrong_in_decode_alone_is_said_so(golden):
    """Positions of decode steps set to 0 by whoever calls the model: no module is to blame."""
    model = harness.reference_model(golden, dtype=torch.float32)
    with hf.from_model(model) as engine, CATALOGUE["pos-decode-zero"].applied(engine):
        found = harness.locate(golden, model)
    assert (found.scope, found.module) == ("outside", "")
    assert "position_ids" in found.part
    assert found.conditions[0] == "only in decode"


def test_what_lies_between_modules_is_told_from_what_they_return(golden):
    """No residual around an MLP: each module is right, the block is not."""
    model = harness.reference_model(golden, dtype=torch.float32)
    block = model.model.layers[1]
    forward = type(block).forward

    def without(hidden_states, **given):
        return forward(block, hidden_states, **given) - hidden_states

    block.forward = without
    found = harness.locate(golden, model)
    assert (found.module, found.scope) == ("model.layers.1", "local")


def test_a_block_that_never_runs_is_named(golden):
    """The last block left out: it, and not the norm behind it."""
    model = harness.reference_model(golden, dtype=torch.float32)
    model.model.layers = copy.copy(model.model.layers)[:-1]
    found = harness.locate(golden, model)
    assert (found.module, found.part) == ("model.layers.1", "it never runs")


def test_a_callable_without_modules_is_told_what_can_be_said(golden):
    """A black box: the verdict's own findings, and that no module can be named."""
    model = harness.reference_model(golden, dtype=torch.float32)

    def port(input_ids, attention_mask):
        return model(input_ids=input_ids, attention_mask=attention_mask).logits * 1.01

    found = harness.locate(golden, port)
    assert (found.scope, found.exit_code) == ("unseen", 3)
    assert any("shows none" in note for note in found.notes)
    assert any("round-off" in note for note in found.notes)


def test_a_candidate_that_raises_is_told_in_one_line(golden):
    """Whatever a model raises under replay is an engine that failed, with its own words."""
    model = harness.reference_model(golden, dtype=torch.float32)

    def broken(*_args, **_given):
        raise ZeroDivisionError("a kernel gave up")

    model.model.layers[1].mlp.forward = broken
    with pytest.raises(EngineError, match="a kernel gave up"):
        harness.locate(golden, model)


def test_the_command_writes_what_it_says(golden, tmp_path, monkeypatch, capsys):
    """The command names the module, ends with 1, and writes JSON."""
    wrong = harness.reference_model(golden, dtype=torch.bfloat16)
    with torch.no_grad():
        wrong.model.layers[0].self_attn.o_proj.bias *= 2
    wrong.save_pretrained(tmp_path / "wrong")
    file = tmp_path / "where.json"
    ended = runner(monkeypatch, capsys)(
        "locate",
        golden.directory,
        "-c",
        f"hf:model={tmp_path / 'wrong'},dtype=float32",
        "--reference",
        Path(golden.directory).parent / "model",
        "--json",
        file,
    )
    assert ended.code == 1, ended.err
    assert "first wrong: model.layers.0.self_attn.o_proj" in ended.out
    assert json.loads(file.read_text())["module"] == "model.layers.0.self_attn.o_proj"


def test_the_smallest_case_of_what_is_located_is_written(golden, tmp_path):
    """Asked for with `repro`, it lies there as a script and a test, and the answer says so in a field of its own."""
    model = harness.reference_model(golden, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = 0
    found = harness.locate(golden, model, repro=tmp_path / "case")
    assert found.module == "model.layers.1.mlp.up_proj"
    assert "1 prompt of 1 token" in found.repro
    assert f"  repro: {found.repro}" in str(found)
    assert found.to_dict()["repro"] == found.repro
    assert "def build" in (tmp_path / "case/repro.py").read_text()
    assert harness.locate(golden, model).to_dict()["repro"] is None


def test_a_copy_of_the_model_is_for_a_case(golden, monkeypatch, capsys):
    """Asked for alone, it is refused in one line."""
    ended = runner(monkeypatch, capsys)("locate", golden.directory, "-c", "hf", "--copy-model")
    assert ended.code == 2
    assert "--copy-model copies into the directory of --repro" in ended.err
