"""How small the cases are that `--repro` writes, and whether each fails with the bug and passes without it.

    python benchmarks/repros.py --seconds 60

Each candidate is a bug of the catalogue as a port. Its case is shrunk, written, run in a fresh process with the bug (it
must end with 1) and without it (0). A bug that changes how the engine drives the model is in no port, and is left out.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import harness
from harness.flow.reproducing import reproduce

#: Host, then bugs that show everywhere, in decode steps alone, in padded rows alone, and in a second request alone.
CASES = {
    "llama-tiny": (
        "pos-leftpad-shared", "at-causal-on-decode", "kv-not-reset", "wc-eps", "wc-rope-permute-missing",
        "pos-llama3-scaling", "x-gqa-permute", "kv-fp8-scale", "at-gqa-tile", "x-last-layer", "pos-decode-zero",
    ),
    "bloom-tiny": (
        "pos-alibi-decode-dropped", "at-mask-as-length", "kv-batch-merge-offset", "pos-alibi-scale",
        "wc-embed-ln-missing", "wc-layer-dup", "x-bias-doubled",
    ),
    "gpt2-tiny": ("na-gelu", "wc-conv1d-transpose", "kv-static-crop", "pos-learned-offset", "x-row-scaled"),
}  # fmt: skip


def main() -> None:
    """Print a line for each bug, then the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--only", nargs="*", default=())
    given = parser.parse_args()
    torch.set_num_threads(1)
    tokens, steps, seconds, failed, passed = [], [], [], 0, 0
    with tempfile.TemporaryDirectory() as home:
        for host, mutants in CASES.items():
            golden = harness.load_golden(Path("golden", host, "translate"))
            for mutant in mutants:
                if given.only and mutant not in given.only:
                    continue
                spec = f"py:tests.meta.mutants:{mutant.replace('-', '_')}"
                out = Path(home, f"{host}-{mutant}")
                started = time.perf_counter()
                verdict = harness.check(golden, spec)
                one = reproduce(golden, spec, out, verdict=verdict, seconds=given.seconds)
                took = time.perf_counter() - started
                if one.found is None or one.written is None:
                    print(f"{host} {mutant}: {one.reason}", flush=True)
                    continue
                fixed = subprocess.run(
                    [sys.executable, "-B", str(out / "repro.py")], env={**os.environ, "MUTANT_FIXED": "1"}, check=False,
                    capture_output=True, text=True, timeout=300,
                )  # fmt: skip
                case = one.found.case
                print(
                    f"{host} {mutant}: {case.words}; {one.found.judgement.margin:.3g} x the limit; with the bug "
                    f"{one.written.code}, without {fixed.returncode}; {one.found.tried} tried, "
                    f"{one.found.seconds:.1f} s of {took:.1f} s{'' if one.found.finished else ' (time was up)'}",
                    flush=True,
                )
                if one.written.code != 1 or fixed.returncode != 0:
                    print("   ", one.written.said, "|", fixed.stdout.strip(), fixed.stderr.strip()[-300:], flush=True)
                failed += one.written.code == 1
                passed += fixed.returncode == 0
                tokens.append(max(len(row.ids) for row in case.batch.rows))
                steps.append(case.batch.steps)
                seconds.append(one.found.seconds)
    print(
        f"{len(tokens)} cases: {failed} fail with the bug, {passed} pass without it; longest row: median "
        f"{statistics.median(tokens)} tokens; decode steps: median {statistics.median(steps)}; shrinking: median "
        f"{statistics.median(seconds):.1f} s"
    )


if __name__ == "__main__":
    main()
