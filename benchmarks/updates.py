"""What an update says after a change of the environment, and after a changed weight.

    python benchmarks/updates.py --golden golden/llama-tiny/translate

A copy of the golden is recorded again as it is, with two threads, with another attention kernel, and after one row of
one weight was scaled; each time what changes is printed, and whether it was written or refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import flow
from harness.engines import hf
from harness.environment import thread_count
from harness.errors import GoldenError
from harness.values import Changes


def main() -> None:
    """Copy, change, record again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--golden", type=Path, default=Path("golden/llama-tiny/translate"))
    golden = parser.parse_args().golden.resolve()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as home:
        copy = Path(home, "golden", golden.parent.name)
        shutil.copytree(golden.parent / "model", copy / "model")
        shutil.copytree(golden, copy / golden.name)
        os.chdir(home)
        place = copy.relative_to(home) / golden.name
        _again("as it is", place)
        with thread_count(2):
            _again("two threads", place)
        with _attention("eager"):
            _again("eager attention", place)
        _scale_a_row(copy / "model" / "model.safetensors")
        _again("one weight row x 1.02", place)
        _again("the same, with a reason", place, reason="one weight row was changed")


def _again(what: str, place: Path, reason: str | None = None) -> None:
    seen: list[Changes] = []
    try:
        flow.rerecord(place, reason=reason, show=seen.append)
        end = "written, or nothing to write"
    except GoldenError:
        end = "refused"
    print(f"{what}: {seen[0].worst.value}: {end}")
    print("".join(f"    {line}\n" for line in str(seen[0]).splitlines()[:6]), end="", flush=True)


@contextmanager
def _attention(kernel: str) -> Iterator[None]:
    opened = hf.HFEngine.__init__

    def other(self: hf.HFEngine, options: hf.Options, **keywords: Any) -> None:
        opened(self, dataclasses.replace(options, attn=kernel), **keywords)

    hf.HFEngine.__init__ = other  # type: ignore[method-assign]
    try:
        yield
    finally:
        hf.HFEngine.__init__ = opened  # type: ignore[method-assign]


def _scale_a_row(file: Path) -> None:
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(("down_proj.weight", "dense_4h_to_h.weight")))
    tensors[name][3] *= 1.02
    save_file(tensors, file, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
