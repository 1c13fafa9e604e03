from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from harness import flow
from harness.cli import cli
from harness.engines import deepspeed
from harness.engines.ranks.layout import Layout
from harness.errors import ModelError
from harness.flow import matrix
from harness.values import Status, Verdict
from harness.verdict import failed


@pytest.mark.parametrize("host", ["bloom-tiny", "llama-tiny", "gpt2-tiny"])
def test_every_cell_of_the_shipped_models_exists(goldens: Path, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    """Three precisions in six layouts, the largest first; heads and blocks of these models divide by 2 and 3."""
    monkeypatch.setattr(matrix, "DEEPSPEED", {})
    found = list(matrix.cells(goldens / host / "translate"))
    assert len(found) == 18
    assert all(not cell.reason for cell in found)
    assert found[0].layout.world == max(cell.layout.world for cell in found)
    assert {cell.spec for cell in found} >= {
        "hf:dtype=float16",
        "tp:size=3,dtype=bfloat16",
        "pp:stages=2,dtype=float32",
        "tp:size=2,stages=2,dtype=float16",
    }


def test_a_cell_that_cannot_exist_has_its_reason(goldens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads that do not divide, more stages than blocks."""
    monkeypatch.setattr(matrix, "LAYOUTS", (Layout(tensor=4), Layout(stages=9), Layout()))
    monkeypatch.setattr(matrix, "DEEPSPEED", {})
    found = list(matrix.cells(goldens / "llama-tiny" / "translate"))
    reasons = {str(cell.layout): cell.reason for cell in found}
    assert "12 attention heads" in reasons["tp 4"] or "6 key/value heads" in reasons["tp 4"]
    assert "5 blocks are fewer than 9 stages" in reasons["pp 9"]
    assert reasons["1 process"] == ""


def test_deepspeed_joins_the_matrix(goldens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rows; GPT-2 has none that is cut, float16 none on a processor without products, none where it is missing."""
    monkeypatch.setattr(matrix, "LAYOUTS", ())
    monkeypatch.setattr(deepspeed, "_has_float16", lambda: False)
    monkeypatch.setitem(matrix.ENGINES, "deepspeed", replace(matrix.ENGINES["deepspeed"], packages=("torch",)))
    found = {cell.spec: cell for cell in matrix.cells(goldens / "gpt2-tiny" / "translate")}
    assert len(found) == 12
    assert "does not support the model type 'gpt2'" in found["deepspeed:tp=2,dtype=float32"].reason
    assert "float16" in found["deepspeed:zero=3,ranks=2,offload=cpu,dtype=float16"].reason
    assert found["deepspeed:zero=3,ranks=2,offload=cpu,dtype=bfloat16"].reason == ""
    monkeypatch.setitem(matrix.ENGINES, "deepspeed", replace(matrix.ENGINES["deepspeed"], packages=("no_such",)))
    assert all(cell.reason == "install no_such" for cell in matrix.cells(goldens / "gpt2-tiny" / "translate"))


def test_a_golden_without_its_model_has_no_matrix(home: Path) -> None:
    """The model is what tells which cells there are."""
    import shutil

    shutil.rmtree("golden/small/model")
    with pytest.raises(ModelError, match="not beside it"):
        list(matrix.cells("golden/small/small"))


def test_the_command_runs_the_cells_and_draws_the_grid(
    goldens: Path, monkeypatch: pytest.MonkeyPatch, idle_ranks: Callable[[], AbstractContextManager[None]]
) -> None:
    """A reduced matrix in real ranks: every cell ok, one that cannot exist with its reason, exit code 0."""
    layouts = (Layout(tensor=2, stages=2), Layout(tensor=4), Layout(stages=3), Layout())
    monkeypatch.setattr(matrix, "LAYOUTS", layouts)
    monkeypatch.setattr(matrix, "DEEPSPEED", {})
    monkeypatch.setattr(matrix, "PRECISIONS", ("float32", "bfloat16"))
    with idle_ranks():
        done = CliRunner().invoke(cli, ["check", str(goldens / "gpt2-tiny" / "translate"), "--matrix"])
    assert done.return_value == 0 or done.exit_code == 0, done.output
    grid = done.output[done.output.index("checks:") :].splitlines()[2:]
    assert [line.split()[0] for line in grid[:5]] == ["float32", "1", "pp", "tp", "tp"]
    assert grid[3].count("none") == 2
    assert "identical" in grid[1]
    assert grid[5].startswith("no such cell: tp 4: its 6 attention heads cannot be divided among 4 ranks")
    assert CliRunner().invoke(cli, ["check", "x", "--matrix", "-c", "hf"]).exit_code != 0


@pytest.mark.parametrize(("given", "quick"), [([], True), (["--quick"], True), (["--whole"], False)])
def test_a_cell_does_the_quick_runs_unless_all_are_asked_for(
    goldens: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], quick: bool
) -> None:
    """A grid multiplies what one check costs."""
    asked = []

    def check(*_arguments: object, **named: object) -> Verdict:
        asked.append(named["quick"])
        return failed(Status.ERROR, "not run", golden="g", candidate="c", fix="none", check="engine")

    monkeypatch.setattr(flow, "check", check)
    monkeypatch.setattr(matrix, "LAYOUTS", (Layout(),))
    monkeypatch.setattr(matrix, "DEEPSPEED", {})
    CliRunner().invoke(cli, ["check", str(goldens / "gpt2-tiny" / "translate"), "--matrix", *given])
    assert asked == [quick] * 3
