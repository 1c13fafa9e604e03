"""In which block a bug is: four bugs, each in one block alone and in all, with the templates of the whole catalogue.

    python benchmarks/layers.py --host llama-tiny

A line for each case, then for each precision how many were told right, told at all without reserve, and tried.
"""

from __future__ import annotations

import argparse
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import store
from harness.report.diagnosis import layer_words
from harness.templates import caching, layers
from harness.values import Templates
from tests.templates.one_block import told

ROOT = Path(__file__).resolve().parents[1]

#: Bugs that the catalogue has in all blocks, at a strength that is below round-off in bfloat16.
SHIPPED = {
    "llama-tiny": (("na-silu-for-gelu", 1.0), ("at-scale", 0.01), ("tp-bias-xN", 0.1), ("q-int4-borrow", 0.1)),
    "bloom-tiny": (("na-gelu", 1.0), ("at-scale", 0.01), ("tp-bias-xN", 0.1), ("q-int4-borrow", 0.1)),
    "gpt2-tiny": (("na-gelu", 1.0), ("at-scale", 0.01), ("tp-bias-xN", 0.1), ("q-int4-borrow", 0.1)),
}


def counted(host: str, bank: Templates) -> dict[tuple[str, str], list[int]]:
    """Of each precision: (right, told, tried) of bugs in one block alone and of bugs in all."""
    golden, model = store.read_golden(ROOT / "golden" / host / "translate"), ROOT / "golden" / host / "model"

    @cache
    def maker(name: str, strength: float) -> Any:
        return layers.layered(golden, model, bank, name, strength, lambda _: None)

    found: dict[tuple[str, str], list[int]] = {}
    for precision in ("float32", "bfloat16"):
        for name, strength in SHIPPED[host]:
            parts = maker(name, strength)
            there = [block for part in ([] if parts is None else parts.blocks) for block in part]
            for block in [*there, None] if len(there) > 1 else []:
                one, named = told(golden, model, bank, maker, precision, name, strength, block)
                words = "" if one is None else layer_words(one.layers)
                wanted = "in every block" if block is None else f"in block {block}"
                right = re.match(rf"{wanted}( alone|, where| \(a)", words) is not None
                sure = right or (words != "" and "cannot be told" not in words)
                seen = f"{one and one.name} {words}{' (named)' if named else ''}"
                print(f"{host} {name} at {strength:g}, {precision}, block {block}: {seen}", flush=True)
                tally = found.setdefault((precision, "all" if block is None else "one"), [0, 0, 0])
                tally[0] += right
                tally[1] += sure
                tally[2] += 1
    return found


def main() -> None:
    """Make or read the templates of a model's golden, and count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", choices=sorted(SHIPPED), default="llama-tiny")
    host = parser.parse_args().host
    torch.set_num_threads(1)
    golden, model = store.read_golden(ROOT / "golden" / host / "translate"), ROOT / "golden" / host / "model"
    for (precision, where), tally in counted(host, caching.templates_of(golden, model, lambda _text: None)).items():
        print(f"{host}, {precision}, in {where}: {tally[0]} right, {tally[1]} told without reserve, {tally[2]} tried")


if __name__ == "__main__":
    main()
