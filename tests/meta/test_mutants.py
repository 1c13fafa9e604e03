"""The harness cannot be fooled by simple bugs: each fails in fp32 on every host that has the part."""

from __future__ import annotations

import pytest
import torch

import harness
from harness.values import Status
from tests.meta.mutants import MUTANTS

HOSTS = ("bloom-tiny", "bloom-raw", "llama-tiny", "gpt2-tiny")


def _flips(verdict) -> str:
    replay = next(one for one in verdict.passes if one.view == "replay")
    return f"{replay.flips} of {replay.steps} greedy tokens flipped, error {replay.ratio:.0f} x round-off"


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_deviates_in_fp32(goldens, host, mutant):
    """A real bug fails the check in fp32, whether or not it flips a token."""
    golden = harness.load_golden(goldens / host / "core")
    model = harness.reference_model(golden, dtype=torch.float32)
    try:
        MUTANTS[mutant](model)
    except LookupError as reason:
        pytest.skip(str(reason))
    verdict = harness.check(golden, model, quick=True)
    print(f"{host}: {mutant}: {verdict.status}, {_flips(verdict)}")
    assert verdict.status is Status.DEVIATES
    assert verdict.status.exit_code == 1


@pytest.mark.parametrize("host", HOSTS)
def test_the_unchanged_model_passes(goldens, host):
    """The opposite direction: the same model without a bug is ok, so the mutants fail for their bug."""
    golden = harness.load_golden(goldens / host / "core")
    model = harness.reference_model(golden, dtype=torch.float32)
    assert harness.check(golden, model, quick=True).ok


@pytest.mark.parametrize("host", ["bloom-tiny", "llama-tiny"])
def test_a_changed_checkpoint_fails_through_the_command(goldens, tmp_path, host, monkeypatch):
    """A checkpoint with one changed row, named in the SPEC, ends the command with exit code 1."""
    from harness import cli

    golden = harness.load_golden(goldens / host / "core")
    model = harness.reference_model(golden)
    MUTANTS["one weight row x 1.2"](model)
    model.save_pretrained(tmp_path / "changed")
    spec = f"hf:dtype=float32,model={tmp_path / 'changed'}"
    monkeypatch.setattr("sys.argv", ["harness", "check", str(goldens / host / "core"), "--quick", "-c", spec])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
