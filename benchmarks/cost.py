"""What a check costs, as a ratio to what a user pays today, measured in one run.

    python benchmarks/cost.py [--golden golden/bloom-tiny/core] [--dtype float32] [--repeats 3]

Today: `model.generate` prompt by prompt at batch 1, then comparing strings. Quick: one batched replay and
prefill, compared. Full: every run of the suite, compared. The three are interleaved; models are loaded once.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import harness
from harness.engines import hf
from harness.engines.runner import run_suite
from harness.flow import reference_directory
from harness.values import Golden


def main() -> None:
    """Measure, and print one line a way of checking."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--golden", default="golden/bloom-tiny/core")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    golden = harness.load_golden(arguments.golden)
    directory = reference_directory(golden)
    assert directory is not None
    tokenizer = hf.load_tokenizer(str(directory))
    options = hf.Options(model=str(directory), dtype=arguments.dtype)
    with hf.HFEngine(options, text=f"hf:dtype={arguments.dtype}") as engine:
        ways: dict[str, Callable[[], object]] = {
            "today": lambda: _today(engine, golden, tokenizer),
            "quick": lambda: _check(engine, golden, quick=True),
            "full": lambda: _check(engine, golden, quick=False),
        }
        for way in ways.values():
            way()
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(arguments.repeats):
            for name, way in ways.items():
                started = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - started)
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(times, seconds["today"], strict=True))
        print(
            f"{arguments.golden} {arguments.dtype} {name:6} {statistics.median(times):7.2f} s  {ratio:5.2f} x today's"
            f"  (min {min(times):.2f}, max {max(times):.2f}, {torch.get_num_threads()} threads)"
        )


def _today(engine: hf.HFEngine, golden: Golden, tokenizer: object) -> bool:
    same = True
    for request, given in zip(golden.requests, golden.generations, strict=True):
        ids = torch.tensor([request.prompt_ids])
        made = engine.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=request.max_new_tokens,
            min_new_tokens=request.max_new_tokens if golden.suite.stop == "ignore-eos" else None,
            do_sample=False,
            pad_token_id=0,
        )
        text = tokenizer.decode(made[0, ids.shape[1] :])  # type: ignore[attr-defined]
        same &= text == tokenizer.decode(given.tokens)  # type: ignore[attr-defined]
    return same


def _check(engine: hf.HFEngine, golden: Golden, *, quick: bool) -> object:
    trace = run_suite(
        engine,
        golden.suite,
        golden.requests,
        golden.continuations,
        runs=[run for run in golden.suite.runs if run.quick or not quick],
        stop_ids=frozenset(golden.stop_ids),
        vocabulary=golden.vocabulary,
    )
    verdict = harness.check(golden, trace, quick=quick)
    assert verdict.ok, str(verdict)
    return verdict


if __name__ == "__main__":
    main()
