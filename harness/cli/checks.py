"""`harness check`: a candidate against a golden; `harness schema`: what its JSON looks like."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harness.cli.output import must_be_writable, progress_line, write_json, write_text
from harness.errors import HarnessError, UsageError

if TYPE_CHECKING:
    from harness.flow import Cell
    from harness.values import Verdict

    Check = Callable[..., Verdict]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Reports:
    """Where the verdicts go besides the terminal; '-' is the standard output, and then nothing else stands there."""

    json: str | None
    junit: str | None
    markdown: str | None

    def __post_init__(self) -> None:
        for option, file in self.named:
            must_be_writable(option, file)
        if [file for _, file in self.named].count("-") > 1:
            raise UsageError("two reports cannot both go to the standard output", fix="Name a file for one of them")

    @property
    def named(self) -> list[tuple[str, str | None]]:
        return [("--json", self.json), ("--junit", self.junit), ("--markdown", self.markdown)]

    @property
    def on_terminal(self) -> bool:
        return all(file != "-" for _, file in self.named)

    def write(self, verdicts: list[Verdict]) -> None:
        from harness.report.junit import to_junit
        from harness.report.markdown import append_step_summary, to_markdown

        if self.json:
            write_json([one.to_dict() for one in verdicts], self.json)
        if self.junit:
            write_text(to_junit(verdicts), self.junit)
        summary = to_markdown(verdicts)
        if self.markdown:
            write_text(summary, self.markdown)
        append_step_summary(summary)


@click.command()
@click.argument("golden", required=False, type=click.Path(path_type=Path))
@click.option("--candidate", "-c", "candidates", multiple=True, metavar="SPEC", help="What to check; may be repeated.")
@click.option("--trace", "traces", multiple=True, metavar="FILE", help="What `harness run` made; may be repeated.")
@click.option("--all", "everything", is_flag=True, help="Every golden, with the candidates named beside it.")
@click.option("--matrix", is_flag=True, help="Every precision in 1 process, sharded, in stages, by DeepSpeed.")
@click.option(
    "--quick/--whole", default=None, help="Only the quick runs and candidates; with --matrix that is the default."
)
@click.option("--root", type=click.Path(path_type=Path), default=Path("golden"), show_default=True, help="For --all.")
@click.option(
    "--reference",
    metavar="DIR|SPEC",
    help="The golden's model, if not beside it; stream:..., if larger than memory.",
)
@click.option("--no-upcast", is_flag=True, help="Judge 16-bit candidates as shipped only, without a float32 copy.")
@click.option("--allow-code", is_flag=True, help="For --all: run ports and trust_remote_code that the data name.")
@click.option("--blame-environment", is_flag=True, help="Run the reference again too: was it you, or the upgrade?")
@click.option("--diagnose", is_flag=True, help="Name the bug: fit the catalogue's templates, made once a golden.")
@click.option("--verbose", is_flag=True, help="Each kind of finding with its limit and derivation.")
@click.option("--json", metavar="FILE", help="Write the verdicts as JSON (`harness schema`); '-' for standard output.")
@click.option("--junit", metavar="FILE", help="Write them as JUnit XML.")
@click.option("--markdown", metavar="FILE", help="Write a summary; it goes to GITHUB_STEP_SUMMARY by itself.")
def check(
    golden: Path | None,
    candidates: tuple[str, ...],
    traces: tuple[str, ...],
    everything: bool,
    matrix: bool,
    quick: bool | None,
    root: Path,
    reference: str | None,
    no_upcast: bool,
    allow_code: bool,
    blame_environment: bool,
    diagnose: bool,
    verbose: bool,
    json: str | None,
    junit: str | None,
    markdown: str | None,
) -> int:
    """Check a candidate against the golden in directory GOLDEN.

    \b
    harness check golden/bloom-tiny/core -c hf:dtype=bfloat16
    harness check golden/bloom-tiny/core -c hf:model=path/to/my/weights,dtype=float32
    harness check golden/bloom-tiny/core -c 'py:my_package.port:build?dtype=bfloat16'
    harness check golden/bloom-tiny/core --trace from-the-device.trace
    harness check golden/bloom-tiny/core -c hf:model=DIR --diagnose
    harness check golden/bloom-tiny/core -c tp:size=2,dtype=bfloat16 -c pp:stages=2
    harness check golden/bloom-tiny/core --trace from-the-device.trace --reference stream:hidden_gb=1
    harness check golden/bloom-tiny/core --matrix
    harness check --all --quick

    A SPEC is ENGINE:key=value,...  For `hf` the keys are model, dtype, weights, quantised, attn, static_cache,
    compile, batch, chunk, show, threads, device, device_map (auto, cpu-offload, disk), tf32, deterministic, graphs,
    bucket and trust_remote_code; for `tp` and `pp` size, stages, micro_batches,
    model, dtype, attn, batch, chunk, threads, device, prepare and timeout; for `stream` (one block in memory at a time)
    model, dtype, weights, attn, threads, device, read, hidden_gb and work; for `deepspeed` tp, or zero=3 with ranks and
    offload, then kernels, all_reduce, build, prepare, timeout and those of a model. Ranks are started here, or joined
    where torchrun, deepspeed, srun or mpirun started this command.
    """  # noqa: D301  # click takes a backspace itself, which a raw text does not hold
    if everything == (golden is not None):
        raise UsageError("give either one golden or --all", fix="E.g. harness check golden/bloom-tiny/core -c hf")
    if everything and (candidates or traces or reference):
        raise UsageError(
            "--all takes its candidates from the data beside each golden", fix="Leave -c, --trace and --reference"
        )
    if matrix and (everything or candidates or traces):
        raise UsageError("--matrix takes its candidates by itself", fix="Leave --all, -c and --trace")
    if not everything and not matrix and not candidates and not traces:
        raise UsageError("no candidate was given", fix="Add -c SPEC, e.g. -c hf:dtype=bfloat16")
    _check_specs(candidates)
    # A grid multiplies what one check costs: where the quick runs take minutes, all of them take an hour.
    quick = matrix if quick is None else quick
    reports = _Reports(json=json, junit=junit, markdown=markdown)
    from harness import flow
    from harness.report.matrix import matrix_to_text
    from harness.report.terminal import verdict_to_text
    from harness.report.unseen import unseen_lines
    from harness.traces import load_trace
    from harness.verdict import exit_code

    work: list[tuple[Path, Any]]
    cells: list[Cell] = []
    if golden is None:
        work = list(flow.check_all(root, quick=quick, allow_code=allow_code))
    elif matrix:
        cells = list(flow.cells(golden, reference))
        work = [(golden, cell.spec) for cell in cells if not cell.reason]
    else:
        work = [(golden, one) for one in (*candidates, *map(load_trace, traces))]
    table = (everything or matrix) and reports.on_terminal
    verdicts: list[Verdict] = []
    if table:
        _table_header()
    stack = ExitStack()
    if matrix:
        stack.enter_context(flow.kept_ranks())
    with stack:
        for number, (directory, candidate) in enumerate(work, start=1):
            name = candidate if isinstance(candidate, str) else candidate.engine
            # A line that says what is being done ends before anything is printed: the two would write over each other.
            with progress_line() as progress:
                one = _checked(
                    directory,
                    candidate,
                    reports_unreadable=everything,
                    reference=reference,
                    quick=quick,
                    upcast=not no_upcast,
                    blame_environment=blame_environment,
                    diagnose=diagnose,
                    progress=_prefixed(progress, f"{number}/{len(work)} {directory} {name}: "),
                )
            verdicts.append(one)
            if table:
                _table_row(one)
            elif reports.on_terminal:
                click.echo("\n  ".join([verdict_to_text(one, verbose=verbose), *unseen_lines(directory, one)]))
    if table:
        _table_end(verdicts, verbose=verbose)
    if matrix and table:
        click.echo("\n" + matrix_to_text(cells, verdicts))
    reports.write(verdicts)
    return exit_code(verdicts)


def _checked(directory: Path, candidate: Any, *, reports_unreadable: bool, **keywords: Any) -> Verdict:
    """One verdict. Among many goldens one that cannot be read is an error of its own, and the others go on."""
    from harness import flow
    from harness.values import Status
    from harness.verdict import failed

    try:
        return flow.check(directory, candidate, **keywords)
    except HarnessError as error:
        if not reports_unreadable:
            raise
        name, message = f"{directory.parent.name}/{directory.name}", error.problem
        return failed(Status.ERROR, message, golden=name, candidate=candidate, fix=error.fix, check="golden")


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


def _table_end(verdicts: list[Verdict], *, verbose: bool) -> None:
    """Details of what is not ok, then one line that counts."""
    from harness.report.terminal import verdict_to_text

    for one in verdicts:
        if not one.ok:
            click.echo("\n" + verdict_to_text(one, verbose=verbose))
    counts = Counter(one.status.value for one in verdicts)
    words = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    click.echo(f"{len(verdicts)} checks: {words}")


@click.command()
def schema() -> int:
    """Print the JSON Schema of what `harness check --json` writes."""
    from harness.report.json import schema as published

    write_json(published(), "-")
    return 0
