"""How often the whole rule calls a correct candidate wrong, both questions asked, on simulated round-off.

    python benchmarks/null_simulation.py --draws 20000

Every candidate errs exactly as the replicas of its golden do, in bf16 as shipped and in fp32 as widened; a golden is
drawn anew for every 20 candidates. Prints how many verdicts failed or said `beyond chance`, by question and check, each
with its rate and the one-sided 95 % Clopper-Pearson bound on it. With --scatter the rule allows families of
implementations to scatter by that much, which none of these candidates does.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.numerics import nulls

_LEVEL = 0.95


def main() -> None:
    """Draw, judge and count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=20_000)
    parser.add_argument("--scatter", type=float, default=0.0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="number of the first golden")
    arguments = parser.parse_args()
    goldens = range(arguments.seed, arguments.seed + -(-arguments.draws // nulls.EACH))
    started = time.perf_counter()
    counts: nulls.Counts = Counter()
    # A fork would inherit torch's locks.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, mp_context=context, initializer=_one_thread) as pool:
        for one in pool.map(partial(nulls.judged, scatter=arguments.scatter), goldens, chunksize=4):
            counts += one
    _report(counts, time.perf_counter() - started, arguments.processes)


def _one_thread() -> None:
    torch.set_num_threads(1)


def _report(counts: nulls.Counts, seconds: float, processes: int) -> None:
    draws = counts["judged",]
    print(f"{draws:,} draws in {seconds:.0f} s on {processes} processes, {seconds * processes / draws:.3f} s a draw")
    print("| verdicts | question | check | count | rate | 95 % bound |")
    print("|---|---|---|---|---|---|")
    for kind in ("failing", "significant"):
        keys = sorted(key for key in counts if key[0] == kind and len(key) > 1)
        for key in [(kind,), *keys]:
            _, question, check = (*key, "any", "any")[:3]
            hits = counts[key]
            bound = float(stats.beta.ppf(_LEVEL, hits + 1, draws - hits))
            print(f"| {kind} | {question} | {check} | {hits} | {hits / draws:.2e} | {bound:.2e} |")


if __name__ == "__main__":
    main()
