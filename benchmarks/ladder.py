"""The ladder of BLOOM, rung by rung beside transformers eager: verdict, ms a token, share of what the machine can do.

    python benchmarks/ladder.py --write docs/ladder.md

Two models: golden/bloom-tiny, which is trained, and one of bloom-560m's shape with random weights, made and recorded in
--work the first time. All candidates of a model are open at once in one process and take turns, step by step, in an
order that changes each round, and so does reading all of the weights once with the same threads: what else the machine
does falls on all of them. With --write the tables between the marks of a document, and the figure beside it, are
made anew.
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import harness
from harness.engines import build_engine, decoding, hf
from harness.files import replace_file
from harness.flow.recording import record
from harness.models.ports.ladder import kernels
from harness.models.ports.ladder.rungs import RUNGS, join, ladder
from harness.numerics import ratios
from harness.speed import costs, machine, roofline

BEGIN, END = "<!-- ladder: begin, made by benchmarks/ladder.py -->\n", "<!-- ladder: end -->\n"
EAGER = "transformers eager"
_SEED = 560

#: Of the interval of a ratio.
_ERROR = 0.025

#: Four short prompts of ids: a random model has no tokenizer.
SUITE = """name = "random"
description = "Random prompts for a random model of bloom-560m's shape."
stop = "ignore-eos"
add_special_tokens = false
max_new_tokens = 8

[[runs]]
name = "batched"
batch_size = 4
views = ["generate", "replay", "prefill"]
quick = true
"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model as it is measured.

    Attributes:
        name: in the tables.
        golden: that judges the candidates.
        model: its directory.
        dtype: of all candidates.
        threads: of torch.
        prompt: tokens in the cache before the first step that counts.
        steps: of a turn.
    """

    name: str
    golden: Path
    model: Path
    dtype: str
    threads: int
    prompt: int
    steps: int


@dataclass(kw_only=True)
class Measured:
    """One candidate: its verdict, and by batch size its seconds a step, one number a round, and its limit."""

    name: str
    spec: str
    verdict: str = "not asked"
    seconds: dict[int, list[float]] = field(default_factory=dict)
    limit: dict[int, roofline.Limit] = field(default_factory=dict)


@dataclass(kw_only=True)
class Table:
    """All candidates of a case, and by batch size the seconds of reading all weights, one number a round."""

    case: Case
    rows: list[Measured]
    reads: dict[int, list[float]] = field(default_factory=dict)
    bytes: int = 0


def main() -> None:
    """Measure, print, and write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="a document with the marks; its figure lies beside it"
    )
    parser.add_argument("--work", type=Path, default=Path("build/ladder"), help="where the large model is made")
    parser.add_argument("--rounds", type=int, default=32)
    parser.add_argument("--batch", type=int, action="append", help="1 and 8 unless named")
    parser.add_argument("--model", choices=("bloom-tiny", "560m"), action="append", help="both unless named")
    parser.add_argument(
        "--quick", action="store_true", help="a few rounds, and a short golden: too noisy to be believed"
    )
    arguments = parser.parse_args()
    chosen = arguments.model or ["bloom-tiny", "560m"]
    rounds = 4 if arguments.quick else arguments.rounds
    tables = []
    for name in chosen:
        case = _tiny(arguments.quick) if name == "bloom-tiny" else _large(arguments.work)
        tables.append(measured(case, arguments.batch or [1, 8], rounds))
    text = "\n".join(_markdown(table) for table in tables)
    print(text)
    if arguments.write is not None:
        _write(arguments.write, text, tables)


# --- the models --------------------------------------------------------------------------------


def _tiny(quick: bool) -> Case:
    golden = Path("golden/bloom-tiny") / ("headline" if quick else "core")
    return Case(
        name="bloom-tiny",
        golden=golden,
        model=golden.parent / "model",
        dtype="bfloat16",
        threads=1,
        prompt=64,
        steps=8,
    )


def _large(work: Path) -> Case:
    """A model of bloom-560m's shape, made and recorded where it is not there yet."""
    model, golden, suite = work / "bloom-560m" / "model", work / "bloom-560m" / "random", work / "random.toml"
    if not model.is_dir():
        _say("making a model of bloom-560m's shape")
        _make(model)
    if not golden.is_dir():
        _say("recording it")
        suite.write_text(SUITE + "".join(_prompts()), encoding="utf-8")
        record(model, suite, out=golden, precisions=("float32", "bfloat16"))
    threads = torch.get_num_threads()
    return Case(
        name="bloom-560m's shape", golden=golden, model=model, dtype="bfloat16", threads=threads, prompt=16, steps=1
    )


def _prompts() -> Iterator[str]:
    drawn = random.Random(_SEED)
    for length in (2, 5, 11, 22):
        ids = ", ".join(str(drawn.randrange(3, 250_880)) for _ in range(length))
        yield f'\n[[prompts]]\nid = "{length}-tokens"\nids = [{ids}]\n'


def _make(directory: Path) -> None:
    """Random weights in bfloat16, hot enough that each layer matters: no bias is zero, no norm's weight is 1."""
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(
        vocab_size=250_880, hidden_size=1024, n_layer=24, n_head=16, bos_token_id=1, eos_token_id=2, pad_token_id=3
    )
    with torch.device("meta"):
        model: Any = BloomForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    model.tie_weights()
    generator = torch.Generator().manual_seed(_SEED)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.normal_(0.0, 0.03, generator=generator)
            else:
                weight.normal_(0.0 if name.endswith("bias") else 1.0, 0.1, generator=generator)
    staging = Path(tempfile.mkdtemp(prefix=".model.", dir=_made(directory.parent)))
    model.save_pretrained(staging)
    staging.rename(directory)


def _made(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    return directory


# --- measuring ---------------------------------------------------------------------------------


class Decoding:
    """A batch that an open engine goes on decoding, some steps a turn."""

    def __init__(self, engine: hf.HFEngine, case: Case, batch: int, length: int) -> None:
        drawn = random.Random(_SEED)
        rows = [[drawn.randrange(3, engine.vocabulary) for _ in range(case.prompt)] for _ in range(batch)]
        self._step = engine.decoder.step
        self._cache = engine.decoder.new_cache(batch, length)
        self._ids = torch.tensor(rows)
        self._mask = torch.ones_like(self._ids)

    def advance(self, steps: int) -> float:
        """Seconds of a step; the prompt is taken in first, and does not count."""
        if self._ids.shape[1] > 1:
            self._one()
        start = time.perf_counter()
        for _ in range(steps):
            self._one()
        return (time.perf_counter() - start) / steps

    def _one(self) -> None:
        positions = decoding.positions(self._mask)[:, -self._ids.shape[1] :]
        logits = self._step(self._ids, positions, self._mask, self._cache, 1)
        self._ids = logits[:, -1].argmax(dim=-1, keepdim=True)
        self._mask = torch.cat([self._mask, torch.ones_like(self._ids)], dim=1)


def measured(case: Case, batches: Sequence[int], rounds: int) -> Table:
    """All candidates of a case: each one's verdict first, then all of them in turns."""
    common = f"dtype={case.dtype},threads={case.threads}"
    named = {EAGER: f"hf:{common},attn=eager"}
    for rungs in ladder():
        new = [name for name in RUNGS if name in rungs][-1:]
        named["+ " + new[0] if new else "baseline"] = f"bloom:rungs={join(rungs)},{common}"
    table = Table(case=case, rows=[Measured(name=name, spec=spec) for name, spec in named.items()])
    for row in table.rows:
        verdict = harness.check(case.golden, row.spec, reference=case.model, quick=True)
        row.verdict = str(verdict.status)
        _say(f"{case.name}, {row.name}: {row.verdict}")
        if not verdict.ok:
            raise SystemExit(f"{row.spec} is {row.verdict}, and no speed of it is told:\n{verdict}")
    with ExitStack() as stack:
        engines = [stack.enter_context(build_engine(row.spec, model=str(case.model))) for row in table.rows]
        block = _block(engines[-1])
        table.bytes = block.numel()
        for batch in batches:
            _take_turns(table, engines, block, batch, rounds)
    return table


def _take_turns(table: Table, engines: Sequence[Any], block: torch.Tensor, batch: int, rounds: int) -> None:
    case = table.case
    length = case.prompt + (rounds + 2) * case.steps
    running = [Decoding(engine, case, batch, length) for engine in engines]
    read = kernels.load().read
    order, drawn = list(range(len(running) + 1)), random.Random(_SEED)
    for number in range(-1, rounds):  # the first round warms up
        drawn.shuffle(order)
        for place in order:
            if place < len(running):
                seconds = running[place].advance(case.steps)
                found = table.rows[place].seconds.setdefault(batch, [])
            else:
                start = time.perf_counter()
                read(block)
                seconds, found = time.perf_counter() - start, table.reads.setdefault(batch, [])
            if number >= 0:
                found.append(seconds)
        _say(f"{case.name}, batch {batch}, round {number + 1} of {rounds}")
    limit = _limit(engines[0], case, batch, length)
    for row in table.rows:
        row.limit[batch] = limit


def _limit(engine: Any, case: Case, batch: int, length: int) -> roofline.Limit:
    """The shortest time of a step on this machine, which is the same for all candidates.

    A processor without products of 16 bits has float32's, which kernels may use: the faster of the two counts.
    """
    cost = costs.decode(
        costs.count(engine.model.config),
        batch=batch,
        prompt=case.prompt,
        new=length - case.prompt,
        dtype=case.dtype,
    )
    torch.set_num_threads(case.threads)
    found = machine.measure(case.dtype)
    return roofline.limit(cost, replace(found, rate=max(found.rate, machine.measure("float32").rate)))


def _block(engine: Any) -> torch.Tensor:
    """The memory that holds all weights of the full ladder, as bytes."""
    weight = engine.model.lm_head.weight
    return torch.empty(0, dtype=torch.uint8).set_(weight.untyped_storage())


# --- telling -----------------------------------------------------------------------------------


def _ratio(above: Sequence[float], below: Sequence[float]) -> ratios.Interval:
    logs = np.log(np.array(above)) - np.log(np.array(below))
    return ratios.interval(logs, below=_ERROR, above=_ERROR)


def _middle(seconds: Sequence[float]) -> float:
    return float(np.median(seconds))


def _markdown(table: Table) -> str:
    """A table a batch size, and beneath it what was read."""
    case, lines = table.case, []
    for batch in table.reads:
        first, read = table.rows[0].seconds[batch], _middle(table.reads[batch])
        lines += [
            f"**{case.name}**, {case.dtype}, batch {batch}, {case.threads} thread{'s' * (case.threads > 1)}:",
            "",
            "| | verdict | ms a step | x eager | x the one above (95 %) | of the roofline | of plain reads |",
            "|---|---|---|---|---|---|---|",
        ]
        for number, row in enumerate(table.rows):
            own = row.seconds[batch]
            above = "" if number == 0 else _told(_ratio(table.rows[number - 1].seconds[batch], own))
            lines.append(
                f"| {row.name} | {row.verdict} | {1000 * _middle(own):.3g} | {_ratio(first, own).middle:.2f} | {above} "
                f"| {_percent(row.limit[batch].share(_middle(own)))} | {_percent(read / _middle(own))} |"
            )
        limit = table.rows[0].limit[batch]
        lines += [
            "",
            f"{len(first)} rounds of {case.steps} step{'s' * (case.steps > 1)}. The roofline is "
            f"{1000 * limit.seconds:.3g} ms, by {limit.binds}: {limit.bytes / 1e6:.0f} MB, "
            f"{limit.operations / 1e9:.2f} GFLOP. Plain reads of the {table.bytes / 1e6:.0f} MB of weights took "
            f"{1000 * read:.3g} ms, {table.bytes / read / 1e9:.1f} GB/s.",
            "",
        ]
    return "\n".join(lines)


def _told(found: ratios.Interval) -> str:
    return f"{found.middle:.2f} ({found.low:.2f} to {found.high:.2f})"


def _percent(share: float) -> str:
    return f"{100 * share:.{max(0, 1 - math.floor(math.log10(100 * share)))}f} %"


def _say(text: str) -> None:
    print(f"# {text}", flush=True)


def _write(document: Path, text: str, tables: Sequence[Table]) -> None:
    before = document.read_text(encoding="utf-8")
    if BEGIN not in before or END not in before:
        raise SystemExit(f"{document} has no place for the tables; write the two lines\n{BEGIN}{END}")
    head, _, rest = before.partition(BEGIN)
    tail = rest.partition(END)[2]
    replace_file(document, (head + BEGIN + "\n" + text + "\n" + END + tail).encode())
    _draw(document.with_suffix(".svg"), tables)


def _draw(path: Path, tables: Sequence[Table]) -> None:
    """Draw ms a step over the rungs, a panel a model and batch size, with transformers and plain reads as lines."""
    import io

    import matplotlib
    from matplotlib.figure import Figure

    panels = [(table, batch) for table in tables for batch in table.reads]
    with matplotlib.rc_context({"svg.hashsalt": "golden-harness", "font.size": 9, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(3.4 * len(panels), 3.6), layout="constrained")
        for axes, (table, batch) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            rows = table.rows[1:]
            heights = [1000 * _middle(row.seconds[batch]) for row in rows]
            axes.bar(range(len(rows)), heights, color="#0072B2")
            axes.axhline(1000 * _middle(table.rows[0].seconds[batch]), color="#D55E00", label=EAGER)
            axes.axhline(1000 * _middle(table.reads[batch]), color="#000000", linestyle="--", label="plain reads")
            axes.set_xticks(range(len(rows)), [row.name for row in rows], rotation=60, ha="right")
            axes.set_title(f"{table.case.name}, batch {batch}", size=9)
            axes.set_ylabel("ms a step")
            axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    replace_file(path, drawn.getvalue())


if __name__ == "__main__":
    main()
