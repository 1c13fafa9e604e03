"""The cells of `check --matrix`: every precision in one process, tensor parallel, in stages, both, and DeepSpeed's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.engines import ENGINES, build_engine, hf
from harness.engines.deepspeed import DeepSpeedEngine
from harness.engines.ranks import spawned
from harness.engines.ranks.engine import why_not
from harness.engines.ranks.layout import Layout
from harness.errors import ModelError
from harness.flow.references import read, reference_directory
from harness.reference import PRECISIONS

#: Largest first: one team of ranks serves all of them.
LAYOUTS = (
    Layout(tensor=2, stages=2),
    Layout(tensor=3),
    Layout(stages=3),
    Layout(tensor=2),
    Layout(stages=2),
    Layout(),
)


#: What DeepSpeed does, by the words of its row, those of one number of ranks together.
DEEPSPEED = {
    "deepspeed tp 3": "tp=3",
    "deepspeed tp 2": "tp=2",
    "deepspeed ZeRO-3 2": "zero=3,ranks=2",
    "deepspeed ZeRO-3 2, offload": "zero=3,ranks=2,offload=cpu",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One candidate of the matrix; ``reason`` says why it cannot exist, "" where it can."""

    layout: Layout | str
    dtype: str
    spec: str
    reason: str


def cells(golden: str | Path, reference: str | Path | None = None) -> Iterator[Cell]:
    """The cells for a golden's model, in the order in which they are best run.

    Raises:
        ModelError: where the golden's model is not at hand.
    """
    found = read(golden)
    model = reference_directory(found, reference)
    if model is None:
        fix = "Name its directory with --reference"
        raise ModelError(f"the model of {found.name} is not beside it", fix=fix)
    config = hf.load_config(str(model))
    for row, keys in DEEPSPEED.items():
        for dtype in PRECISIONS:
            spec = f"deepspeed:{keys},dtype={dtype}"
            reason = _why_no_deepspeed(spec, config)
            if not reason and dtype not in found.floors:
                reason = f"the golden has no floor for {dtype}"
            yield Cell(layout=row, dtype=dtype, spec=spec, reason=reason)
    for layout in LAYOUTS:
        for dtype in PRECISIONS:
            reason = why_not(layout, config)
            if not reason and dtype not in found.floors:
                reason = f"the golden has no floor for {dtype}"
            yield Cell(layout=layout, dtype=dtype, spec=_spec(layout, dtype), reason=reason)


def _why_no_deepspeed(spec: str, config: Any) -> str:
    if reason := ENGINES["deepspeed"].why_not():
        return reason
    engine = build_engine(spec)
    assert isinstance(engine, DeepSpeedEngine)
    return engine.why_not(config)


def _spec(layout: Layout, dtype: str) -> str:
    if layout.world == 1:
        return f"hf:dtype={dtype}"
    if layout.stages == 1:
        return f"tp:size={layout.tensor},dtype={dtype}"
    if layout.tensor == 1:
        return f"pp:stages={layout.stages},dtype={dtype}"
    return f"tp:size={layout.tensor},stages={layout.stages},dtype={dtype}"


def kept_ranks() -> AbstractContextManager[None]:
    """Inside, the cells share the processes of their ranks."""
    return spawned.kept()
