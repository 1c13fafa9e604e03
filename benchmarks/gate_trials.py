"""How often the gate is right about speed on this machine: a candidate beside itself, and one that is a tenth slower.

    python benchmarks/gate_trials.py --runs 20

Each run is a whole `harness gate --max-slowdown 1.05`: processes, verdicts, warm-up, rounds. `same` is the golden's
model beside itself and should pass; `slowed` waits, after each forward, a tenth of what that took, and should fail.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from harness import flow
from harness.speed.judging import Limits, Outcome

PLAIN = "py:benchmarks.gate_trials:plain?threads=1"
SLOWED = "py:benchmarks.gate_trials:slowed?threads=1"
_WORDS = {0: "passed", 1: "failed", 3: "not known"}


def plain(path: Path, *, dtype: torch.dtype, device: str) -> Any:
    """The golden's own model."""
    return _port(path, dtype, device, 0.0)


def slowed(path: Path, *, dtype: torch.dtype, device: str) -> Any:
    """The same, each forward a tenth longer."""
    return _port(path, dtype, device, 0.1)


def _port(path: Path, dtype: torch.dtype, device: str, share: float) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device)

    def forward(input_ids: Any, position_ids: Any, attention_mask: Any, cache: Any) -> Any:
        start = time.perf_counter()
        done = model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=True,
        )
        end = time.perf_counter()
        while time.perf_counter() - end < share * (end - start):
            pass
        return done.logits, done.past_key_values

    return forward


def main() -> None:
    """Run all, a line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20, help="of each kind (20)")
    parser.add_argument("--golden", default="golden/llama-tiny/translate")
    parser.add_argument("--only", choices=("same", "slowed"), help="of the two kinds")
    parser.add_argument("--max-slowdown", type=float, default=1.05)
    given = parser.parse_args()
    kinds = {"same": (PLAIN, 0), "slowed": (SLOWED, 1)}
    ends = {name: Counter[str]() for name in kinds if given.only in (None, name)}
    for number in range(given.runs):
        # In turns: what else the machine does meets both kinds.
        for name, words in ends.items():
            words[_run(name, kinds[name][0], number, given)] += 1
    for name, words in ends.items():
        right = words[_WORDS[kinds[name][1]]]
        print(f"{name}: {right} of {given.runs} right; {dict(words)}", flush=True)


def _run(name: str, candidate: str, number: int, given: argparse.Namespace) -> str:
    """One gate, in a line; how it ended."""
    start = time.perf_counter()
    limits = Limits(slowdown=given.max_slowdown)
    found = flow.gate(given.golden, candidate, PLAIN, limits=limits, quick=True)
    assert found.verdict["ok"], found.verdict["text"]
    word = _WORDS[found.exit_code]
    ratios = ", ".join(f"{one.ratio.low:.3f} to {one.ratio.high:.3f}" for one in found.measures)
    unsure = sum(one.outcome is Outcome.UNSURE for one in found.measures)
    taken = time.perf_counter() - start
    told = f"{word} after {found.rounds} rounds, {taken:.0f} s ({ratios}; {unsure} unsure)"
    print(f"{name} {number + 1}: {told}", flush=True)
    return word


if __name__ == "__main__":
    main()
