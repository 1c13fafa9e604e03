"""The command `harness`. Usage errors and --help come without importing torch."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harness.errors import HarnessError, UsageError

if TYPE_CHECKING:
    from harness.values import Verdict

_INTERRUPTED = 130


def main() -> None:
    """Entry point: one clear line for what users get wrong, and the exit code that belongs to it."""
    try:
        code = cli.main(standalone_mode=False)
    except HarnessError as error:
        _fail(str(error), error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted; nothing was written half", _INTERRUPTED)
    except BrokenPipeError:
        # The reader (`| head`) has gone: nothing is left to be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        _fail(f"{place}{error.strerror or error}. Check that the path exists, is readable and has room", 2)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(line: str, code: int) -> None:
    click.echo(f"error: {line}", err=True)
    sys.exit(code)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="golden-harness", prog_name="harness")
def cli() -> None:
    """Is it still the same model? Record what a reference does, and check any other implementation against it.

    Exit codes: 0 ok (identical, drift); 1 failed; 2 bad input; 3 unmeasured or stale; 4 the engine failed.
    """


@contextmanager
def _progress(quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """A line on the terminal's error stream that says what is being done; nothing where it is no terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda _text: None
        return
    with console.status("starting") as status:
        yield lambda text: status.update(text)


# --- check -------------------------------------------------------------------------------------


@cli.command()
@click.argument("golden", required=False, type=click.Path(path_type=Path))
@click.option("--candidate", "-c", "candidates", multiple=True, metavar="SPEC", help="What to check; may be repeated.")
@click.option("--all", "everything", is_flag=True, help="Every golden, with the candidates named beside it.")
@click.option("--quick", is_flag=True, help="Only the quick runs and the quick candidates.")
@click.option("--root", type=click.Path(path_type=Path), default=Path("golden"), show_default=True, help="For --all.")
@click.option(
    "--reference", type=click.Path(path_type=Path), metavar="DIR", help="The golden's model, if not beside it."
)
@click.option("--no-upcast", is_flag=True, help="Judge 16-bit candidates as shipped only, without a float32 copy.")
@click.option("--json", "json_file", metavar="FILE", help="Write the verdicts as JSON; '-' for standard output.")
def check(
    golden: Path | None,
    candidates: tuple[str, ...],
    everything: bool,
    quick: bool,
    root: Path,
    reference: Path | None,
    no_upcast: bool,
    json_file: str | None,
) -> int:
    """Check a candidate against the golden in directory GOLDEN.

    \b
    harness check golden/bloom-tiny/core -c hf:dtype=bfloat16
    harness check golden/bloom-tiny/core -c hf:model=path/to/my/weights,dtype=float32
    harness check --all --quick

    A SPEC is ENGINE:key=value,...  For `hf` the keys are model, dtype, weights, quantised, attn, static_cache,
    compile, batch, chunk, show, threads, device and trust_remote_code.
    """  # noqa: D301  # click takes a backspace itself, which a raw text does not hold
    if everything == (golden is not None):
        raise UsageError("give either one golden or --all", fix="E.g. harness check golden/bloom-tiny/core -c hf")
    if everything and (candidates or reference):
        raise UsageError("--all takes its candidates from the data beside each golden", fix="Leave -c and --reference")
    if not everything and not candidates:
        raise UsageError("no candidate was given", fix="Add -c SPEC, e.g. -c hf:dtype=bfloat16")
    _check_specs(candidates)
    from harness import flow, verdict

    if json_file and json_file != "-" and not Path(json_file).resolve().parent.is_dir():
        raise UsageError(f"the directory of --json {json_file} does not exist", fix="Make it first")
    if json_file and Path(json_file).is_dir():
        raise UsageError(f"--json {json_file} is a directory", fix="Name a file in it")
    work = list(flow.check_all(root, quick=quick)) if everything else [(golden, spec) for spec in candidates]
    verdicts = []
    table = everything and json_file != "-"
    if table:
        _table_header()
    with _progress() as progress:
        for number, (directory, spec) in enumerate(work, start=1):
            assert directory is not None
            report = _prefixed(progress, f"{number}/{len(work)} {directory} {spec}: ")
            one = flow.check(directory, spec, reference=reference, quick=quick, upcast=not no_upcast, progress=report)
            verdicts.append(one)
            if table:
                _table_row(one)
            elif json_file != "-":
                click.echo(str(one))
    if table:
        _table_end(verdicts)
    if json_file:
        _write_json([one.to_dict() for one in verdicts], json_file)
    return verdict.exit_code(verdicts)


def _prefixed(progress: Callable[[str], None], label: str) -> Callable[[str], None]:
    return lambda text: progress(label + text)


def _check_specs(candidates: tuple[str, ...]) -> None:
    from harness.engines import build_engine

    for spec in candidates:
        build_engine(spec)


def _table_header() -> None:
    from harness.report import terminal

    click.secho(terminal.table_header(), bold=True)


def _table_row(one: Verdict) -> None:
    from harness.report import terminal

    row = terminal.table_row(one)
    status = one.status.value
    click.echo(click.style(status, fg=terminal.style_of(one)) + row[len(status) :])


def _table_end(verdicts: list[Verdict]) -> None:
    """Details of what is not ok, then one line that counts."""
    for one in verdicts:
        if not one.ok:
            click.echo("\n" + str(one))
    counts: dict[str, int] = {}
    for one in verdicts:
        counts[one.status.value] = counts.get(one.status.value, 0) + 1
    words = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    click.echo(f"{len(verdicts)} checks: {words}")


def _write_json(data: list[dict[str, Any]], target: str) -> None:
    text = json.dumps(data, indent=2, allow_nan=False) + "\n"
    if target == "-":
        click.echo(text, nl=False)
        return
    staged = Path(f"{target}.part")
    staged.write_text(text, encoding="utf-8")
    os.replace(staged, target)


# --- record ------------------------------------------------------------------------------------


@cli.command()
@click.option("--model", required=True, metavar="DIR", help="Directory of a transformers causal language model.")
@click.option("--suite", required=True, type=click.Path(path_type=Path), help="E.g. prompts/core.toml.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory to write, golden/NAME/SUITE.")
@click.option(
    "--tensor-parallel",
    type=click.IntRange(min=2),
    multiple=True,
    metavar="N",
    help="Measure round-off of N-way tensor parallelism as well; may be repeated.",
)
@click.option("--update", is_flag=True, help="Replace the golden that is there.")
@click.option("--reason", metavar="TEXT", help="Why, kept in the golden's history.")
def record(
    model: str, suite: Path, out: Path, tensor_parallel: tuple[int, ...], update: bool, reason: str | None
) -> int:
    """Record a golden: the reference's tokens and logits, and its own round-off in fp32, bf16 and fp16.

    \b
    harness record --model path/to/model --suite prompts/core.toml --out golden/my-model/core
    """  # noqa: D301  # click takes a backspace itself, which a raw text does not hold
    from harness import flow

    with _progress() as progress:
        golden = flow.record(
            model, suite, out=out, parallel=tensor_parallel, update=update, reason=reason, progress=progress
        )
    steps = int(golden.rows.generated.sum())
    click.echo(f"recorded {out}: {len(golden.requests)} prompts, {steps} tokens, reference in {golden.precision}")
    for note in (golden.provenance["precision_reason"], *golden.provenance["left_out"].items()):
        if note:
            click.echo(f"  note: {note if isinstance(note, str) else ': '.join(note)}")
    from harness.store import decidable_steps

    for precision, decidable in decidable_steps(golden).items():
        floor = golden.floors[precision]
        click.echo(
            f"  {precision}: {decidable.mean():.1%} of steps decidable, {floor.effective:.1f} independent replicas"
        )
    return 0


# --- models ------------------------------------------------------------------------------------


@cli.group()
def models() -> None:
    """The small test models: list them, build them from their recipes, describe them."""


@models.command("list")
def models_list() -> int:
    """Name and summary of each recipe."""
    from harness.models.recipes import RECIPES

    for recipe in RECIPES.values():
        click.echo(f"{recipe.name:12} {recipe.dtype:9} {recipe.summary}")
    return 0


@models.command("build")
@click.argument("name")
@click.option("--out", type=click.Path(path_type=Path), help="Directory to write; default golden/NAME/model.")
@click.option("--steps", type=click.IntRange(min=1), help="Fewer optimizer steps, to try a recipe out.")
def models_build(name: str, out: Path | None, steps: int | None) -> int:
    """Generate the text, train tokenizer and model NAME, write it. About 15 minutes on one core."""
    from harness.engines.spec import suggest
    from harness.models.recipes import RECIPES

    if name not in RECIPES:
        raise UsageError(f"there is no recipe {name!r}", fix=suggest(name, RECIPES))
    target = out or Path("golden") / name / "model"
    from rich.progress import Progress

    from harness.checkpoint import identify
    from harness.models.build import build

    with Progress(transient=True) as bar:
        task = bar.add_task(f"training {name}", total=None)

        def report(step: int, total: int, loss: float) -> None:
            bar.update(task, completed=step, total=total, description=f"training {name}, loss {loss:.3f}")

        loss = build(RECIPES[name], target, steps=steps, progress=report)
    identity = identify(target)
    click.echo(f"built {target}: {identity.parameters:,} parameters, loss {loss:.3f}, digest {identity.digest[:16]}")
    return 0


@models.command("table")
@click.option("--root", type=click.Path(path_type=Path), default=Path("golden"), show_default=True)
def models_table(root: Path) -> int:
    """Parameters, training loss, margins and coverage of the small models, from their `core` goldens."""
    from harness.models.table import describe

    click.echo(describe(root))
    return 0


# --- power -------------------------------------------------------------------------------------


@cli.command()
@click.option("--nulls", type=click.IntRange(min=1), metavar="N", help="At least N verdicts, then the table.")
@click.option("--spreads", is_flag=True, help="Measure how far correct implementations scatter, for constants.py.")
@click.option("--groups", type=click.IntRange(min=1), metavar="G", help="For --spreads: groups of prompts a model.")
@click.option("--summary", is_flag=True, help="The table of what is there.")
@click.option("--list", "listed", is_flag=True, help="The held-out implementations.")
@click.option("--work", type=click.Path(path_type=Path), default=Path(".power"), show_default=True, help="Directory.")
@click.option("--shard", metavar="I/N", help="Do part I (from 0) of N; each part is a process of its own.")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), metavar="M", help="Stop after that long.")
@click.option("--json", "json_file", metavar="FILE", help="Write every verdict as JSON; '-' for standard output.")
def power(
    nulls: int | None,
    spreads: bool,
    groups: int | None,
    summary: bool,
    listed: bool,
    work: Path,
    shard: str | None,
    minutes: float | None,
    json_file: str | None,
) -> int:
    """Measure false alarms: check correct implementations that the goldens know nothing of.

    \b
    harness power --nulls 3000
    harness power --nulls 3000 --shard 0/2 --minutes 30
    harness power --spreads --groups 6

    What is done stays in the directory --work, and a run goes on where the last one ended.
    """  # noqa: D301  # click takes a backspace itself, which a raw text does not hold
    if [nulls is not None, spreads, summary, listed].count(True) != 1:
        raise UsageError("give one of --nulls, --spreads, --summary and --list", fix="E.g. harness power --nulls 3000")
    if spreads != (groups is not None):
        raise UsageError("--spreads and --groups go together", fix="E.g. harness power --spreads --groups 6")
    if (summary or listed) and (shard or minutes):
        raise UsageError("--shard and --minutes are of a run", fix="Give them with --nulls or --spreads")
    if (spreads or listed) and json_file:
        raise UsageError("--json is of the nulls", fix="Give it with --nulls or --summary")
    _must_be_writable(json_file)
    part = _part(shard)
    # Before torch is loaded: the second thread of a family, spinning while it waits, would hold up the other shards.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if listed:
        _list_families()
    elif groups is not None:
        _measure_spreads(groups, work, part, minutes)
    else:
        _count_alarms(nulls, work, part, minutes, json_file)
    return 0


def _must_be_writable(json_file: str | None) -> None:
    """Before hours of work, not after them."""
    if json_file and json_file != "-" and not Path(json_file).resolve().parent.is_dir():
        raise UsageError(f"the directory of --json {json_file} does not exist", fix="Make it first")
    if json_file and Path(json_file).is_dir():
        raise UsageError(f"--json {json_file} is a directory", fix="Name a file in it")


def _list_families() -> None:
    from harness.mutations.benign import FAMILIES

    for family in FAMILIES.values():
        click.echo(f"{family.name:15} {family.what}")


def _measure_spreads(groups: int, work: Path, part: tuple[int, int], minutes: float | None) -> None:
    from harness import power as bench

    with _counted("pilot") as progress:
        bench.run_pilot(groups, work, progress, part, minutes=minutes)
    results = bench.of_this_rule(bench.read_results(work, bench.PILOT))
    click.echo(bench.table_to_literal(bench.spreads(results)))


def _count_alarms(
    nulls: int | None, work: Path, part: tuple[int, int], minutes: float | None, json_file: str | None
) -> None:
    """Run the nulls, where a number is given, and print the table of all that are there."""
    from harness import power as bench

    if nulls is not None:
        with _counted("nulls") as progress:
            bench.run_nulls(nulls, work, progress, part, minutes=minutes)
    results = bench.read_results(work, bench.NULLS)
    found = bench.summarise(results)
    if json_file != "-":
        click.echo(bench.summary_to_text(found))
    if json_file:
        _write_json([bench.summary_to_dict(found, results)], json_file)


def _part(shard: str | None) -> tuple[int, int]:
    """(index, number) of ``I/N``; the whole where there is none."""
    index, slash, number = (shard or "0/1").partition("/")
    if not (slash and index.isdecimal() and number.isdecimal() and int(index) < int(number)):
        raise UsageError(f"--shard {shard} is no part of a run", fix="Write I/N with I from 0 to N - 1, e.g. 0/2")
    return int(index), int(number)


@contextmanager
def _counted(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on the error stream: how many verdicts are there, how many there will be, what is being done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda done, total, text: bar.update(task, completed=done, total=total, description=text)


# --- doctor ------------------------------------------------------------------------------------


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> int:
    """Versions, devices, compilers; which engines can run here, and why the others cannot."""
    from harness import environment
    from harness.engines import ENGINES

    found = {
        "versions": environment.versions(),
        "machine": environment.machine(),
        "devices": environment.devices(),
        "compiler": environment.compiler() or "none: hf:compile=true cannot run (install g++ or clang++)",
        "engines": {name: entry.why_not() or f"can run: {entry.summary}" for name, entry in ENGINES.items()},
    }
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return 0
    for title, content in found.items():
        click.secho(title, bold=True)
        lines = content.items() if isinstance(content, dict) else [("", content)]
        for key, value in lines:
            click.echo(f"  {key:16} {value}" if key else f"  {value}")
    return 0
