"""The gate on real processes: what it passes, what it refuses, and why."""

import json

import pytest
from click.testing import CliRunner

from harness import flow
from harness.cli import cli
from harness.errors import UsageError
from harness.flow import gating
from harness.numerics import ratios
from harness.speed.judging import Limits, Outcome
from tests.speed.test_revisions import git

SMALL = "golden/small/small"
HF = "hf:dtype=float32,threads=1"

#: A port of the golden's model; its forward waits where it is told to, or adds to a logit.
PORT = """
import time
from transformers import AutoModelForCausalLM

def build(path, *, dtype, device):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)

    def forward(input_ids, position_ids, attention_mask, cache):
        time.sleep({wait})
        done = model(
            input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, past_key_values=cache,
            use_cache=True,
        )
        return done.logits * {scale}, done.past_key_values

    return forward
"""


@pytest.fixture
def one_look(monkeypatch):
    """A gate that looks once, after few rounds."""
    monkeypatch.setattr(ratios, "LOOKS", (4,))
    monkeypatch.setattr(gating, "LOOKS", (4,))


def gate(*arguments, **named):
    """A gate on little work."""
    return flow.gate(SMALL, *arguments, **{"batches": (1,), "prompt": 8, "new": 3, "quick": True, **named})


@pytest.mark.usefixtures("one_look")
def test_a_revision_that_waits_is_found_slower(home):
    """Base and candidate are one SPEC of two revisions; the working tree's forward waits 50 milliseconds more."""
    git(home, "init", "-q")
    (home / "timed_port.py").write_text(PORT.format(wait=0, scale=1))
    git(home, "add", "timed_port.py", "prompts")
    git(home, "commit", "-q", "-m", "fast")
    (home / "timed_port.py").write_text(PORT.format(wait=0.05, scale=1))
    found = gate("py:timed_port:build", base_revision="HEAD", limits=Limits(slowdown=1.5))
    assert found.verdict["ok"], found.verdict["text"]
    assert found.base_verdict["ok"], found.base_verdict["text"]
    assert {one.outcome for one in found.measures} == {Outcome.BEYOND}
    assert found.exit_code == 1
    assert found.rounds == 4
    decode = found.measures[-1]
    assert decode.candidate - decode.base > 0.03, "the wait is in every step"
    assert decode.base_memory > 2**20


@pytest.mark.usefixtures("one_look")
def test_speed_that_is_bought_with_a_wrong_result_is_refused(home):
    """The candidate's verdict decides whatever its speed, and the command says both."""
    (home / "wrong_port.py").write_text(PORT.format(wait=0, scale=1.5))
    (home / "slow_port.py").write_text(PORT.format(wait=0.05, scale=1))
    done = CliRunner().invoke(
        cli,
        ["gate", SMALL, "-b", "py:slow_port:build", "-c", "py:wrong_port:build", "--require-speedup", "1.1", "--quick",
         "--batch", "1", "--prompt-tokens", "8", "--new-tokens", "3", "--json", "gate.json", "--markdown", "gate.md"],
        standalone_mode=False,
    )  # fmt: skip
    assert done.return_value == 1, done.output
    assert "gate: refused: the candidate is deviates, whatever its speed (prefill at batch 1" in done.output
    found = json.loads((home / "gate.json").read_text())
    assert not found["ok"]
    assert found["verdict"]["status"] == "deviates"
    assert all(one["ratio"] < 0.9 for one in found["measures"]), "it is faster"
    assert (home / "gate.md").read_text().startswith("### gate: refused")


@pytest.mark.parametrize("status", [("deviates", 1), ("error", 4), ("unmeasured", 3)])
def test_a_base_that_is_another_model_gates_nothing(home, monkeypatch, status):
    """Nothing is timed beside a base that the golden refuses, whatever the candidate is."""
    word, code = status
    verdicts = {
        HF: {"ok": True, "exit_code": 0, "status": "identical", "text": "", "data": {}},
        "hf": {"ok": False, "exit_code": code, "status": word, "text": "", "data": {}},
    }

    class Side:
        """One that can be judged, and nothing else."""

        def __init__(self, spec, **_named):
            self._spec = spec

        def __enter__(self):
            return self

        def __exit__(self, *_error):
            pass

        def check(self, *_arguments, **_named):
            return verdicts[self._spec]

    monkeypatch.setattr(gating, "Side", Side)
    found = gate(HF, "hf", limits=Limits(slowdown=2.0))
    assert (found.measures, found.exit_code, found.ok) == ((), code, False)


@pytest.mark.parametrize(
    ("arguments", "named", "message"),
    [
        ((HF,), {}, "nothing to compare with"),
        ((HF, HF), {"rounds": 3}, "3 rounds are too few"),
        ((HF, HF), {"prompt": 10**6}, "1000000 prompt tokens and 3 new ones do not fit the model's context"),
        (("hf:dtyp=float32", HF), {}, "dtyp"),
        ((HF, "nothing:x=1"), {}, "nothing"),
        ((HF,), {"base_revision": "HEAD"}, "git cannot find a repository"),
    ],
)
def test_what_cannot_be_gated_is_refused(home, arguments, named, message):
    """In one line, before a process is started."""
    with pytest.raises(UsageError, match=message):
        gate(*arguments, **named)
