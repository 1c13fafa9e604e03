"""Updates, accountable: what changes is shown first, round-off is let through, more than that needs a reason."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import harness
from harness import arrays, flow, store
from harness.engines import hf
from harness.environment import thread_count
from harness.errors import GoldenError, ModelError
from harness.values import Kind
from tests.commands import listing, refused, runner
from tests.support import SUITE, write_suite

SMALL, MODEL, PROMPTS = "golden/small/small", "golden/small/model", "prompts/small.toml"


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command in this process."""
    return runner(monkeypatch, capsys)


def change_weight(factor=1.05):
    """Scale one weight row of the model beside the golden."""
    path = Path(MODEL, "model.safetensors")
    tensors = load_file(path)
    name = next(name for name in tensors if "down_proj.weight" in name)
    tensors[name][3] *= factor
    save_file(tensors, path, metadata={"format": "pt"})


def history():
    """The history that the golden keeps."""
    return json.loads(Path(SMALL, store.JSON_NAME).read_text(encoding="utf-8"))["provenance"]["history"]


def test_nothing_new_is_not_written(home):
    """Recorded again as it was, no file is touched and no history grows."""
    before, seen = listing("golden"), []
    flow.rerecord(SMALL, show=seen.append)
    assert seen[0].worst is Kind.SAME
    assert listing("golden") == before


@pytest.mark.parametrize("change", ["threads", "attention"])
def test_another_environment_is_drift_and_is_written(home, monkeypatch, change):
    """Another thread count or attention kernel moves last bits: round-off, which needs no reason, and is remembered."""
    opened = hf.HFEngine.__init__

    def eager(self, options, **keywords):
        opened(self, dataclasses.replace(options, attn="eager"), **keywords)

    seen = []
    with monkeypatch.context() as patch, thread_count(2 if change == "threads" else None):
        if change == "attention":
            patch.setattr(hf.HFEngine, "__init__", eager)
        flow.rerecord(SMALL, show=seen.append)
    # So small a model is too small for two threads to share its sums: every bit may stay.
    assert seen[0].worst in ((Kind.DRIFT,) if change == "attention" else (Kind.SAME, Kind.DRIFT)), str(seen[0])
    assert {one.name for one in seen[0].environment} == {"threads" if change == "threads" else "attn"}
    assert len(history()) == 2
    assert harness.check(SMALL, "hf:dtype=float32", quick=True).ok


def test_a_changed_weight_is_refused_without_a_reason(home):
    """The changes are shown, nothing is written, and the golden of the old weights stays."""
    change_weight()
    before, seen = listing(SMALL), []
    with pytest.raises(GoldenError, match=r"beyond round-off .*bug-sized.*--reason"):
        flow.rerecord(SMALL, show=seen.append)
    assert seen[0].worst is Kind.BUG_SIZED
    assert all(one.kind is Kind.BUG_SIZED for one in seen[0].prompts)
    assert listing(SMALL) == before


def test_a_reason_is_kept(home):
    """With a reason it is written; reason and counts stay in the golden, behind what was there."""
    change_weight()
    flow.rerecord(SMALL, reason="one row was retrained")
    first, last = history()
    assert first["reason"] == "recorded"
    assert last["reason"] == "one row was retrained"
    assert "bug-sized" in last["changes"]
    assert harness.check(SMALL, "hf:dtype=float32", quick=True).ok


def test_another_prompt_is_structural(home):
    """A suite that asks something else is refused as well."""
    write_suite(Path(PROMPTS), SUITE.replace("In the morning", "In the evening, when"))
    seen = []
    with pytest.raises(GoldenError, match="--reason"):
        flow.rerecord(SMALL, show=seen.append)
    assert seen[0].worst is Kind.STRUCTURAL


def test_floors_are_recorded_as_they_were(home):
    """A golden of one precision, few replicas and a declared parallelism is recorded again with these."""
    out = "golden/small/narrow"
    flow.record(MODEL, PROMPTS, out=out, precisions=("bfloat16",), replicas=3, parallel=(2,))
    seen = []
    again = flow.rerecord(out, show=seen.append)
    assert set(again.floors) == {"bfloat16", "bfloat16/tp2"}
    assert {floor.replicas for floor in again.floors.values()} == {3}
    assert seen[0].worst is Kind.SAME


def test_without_the_model_it_says_where_it_looked(home, tmp_path):
    """A golden whose model is elsewhere is recorded again from the directory that is named."""
    Path(MODEL).rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="not beside it"):
        flow.rerecord(SMALL)
    assert flow.rerecord(SMALL, reference=tmp_path / "elsewhere").floors


def test_a_damaged_golden_may_be_replaced(home):
    """Nothing can be compared with a golden that cannot be read; replacing it is what an update is for."""
    Path(SMALL, arrays.ARRAYS_NAME).write_bytes(b"broken")
    with pytest.raises(GoldenError):
        flow.rerecord(SMALL)  # its model and suite stand in what cannot be read
    flow.record(MODEL, PROMPTS, out=SMALL, update=True)
    assert harness.load_golden(SMALL).floors


# --- the command -------------------------------------------------------------------------------


def test_the_command_shows_refuses_and_writes(home, command):
    """`record --update` alone: the changes, the refusal with exit code 2, and with a reason the new golden."""
    change_weight()
    before = listing(SMALL)
    ended = command("record", "--update", "--out", SMALL)
    assert ended.code == 2
    assert "bug-sized" in ended.out
    assert ended.err.startswith("error: ")
    assert "--reason" in ended.err
    assert listing(SMALL) == before
    ended = command("record", "--update", "--out", SMALL, "--reason", "meant")
    assert ended.code == 0
    assert "recorded" in ended.out
    assert history()[-1]["reason"] == "meant"


def test_the_command_needs_a_golden_to_update(home, command):
    """An update of nothing is one line."""
    refused(command("record", "--update", "--out", "golden/small/nothing"), "there is no golden")


def test_two_goldens_are_compared(home, command):
    """`compare` of two goldens: 0 where they are the same, 1 where they differ by more than round-off."""
    ended = command("compare", SMALL, SMALL)
    assert ended.code == 0
    assert "nothing has changed in 3 prompts" in ended.out
    change_weight()
    flow.record(MODEL, PROMPTS, out="golden/small/new", replicas=24)
    ended = command("compare", SMALL, "golden/small/new")
    assert ended.code == 1
    assert "bug-sized" in ended.out


def test_threads_of_this_test_are_one():
    """The tests above change the number of threads and put it back."""
    assert torch.get_num_threads() == 1
