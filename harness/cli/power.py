"""`harness power`: how often correct implementations are called wrong."""

from __future__ import annotations

from pathlib import Path

import click

from harness.cli.output import must_be_writable, progress_bar, write_json
from harness.errors import UsageError


@click.command()
@click.option("--nulls", type=click.IntRange(min=1), metavar="N", help="At least N verdicts, then the table.")
@click.option("--spreads", is_flag=True, help="Measure how far correct implementations scatter, for constants.py.")
@click.option("--groups", type=click.IntRange(min=1), metavar="G", help="For --spreads: groups of prompts a model.")
@click.option("--summary", is_flag=True, help="The table of what is there.")
@click.option("--list", "listed", is_flag=True, help="The held-out implementations, and the bug catalogue.")
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
    must_be_writable("--json", json_file)
    part = _part(shard)
    if listed:
        _list_all()
    elif groups is not None:
        _measure_spreads(groups, work, part, minutes)
    else:
        _count_alarms(nulls, work, part, minutes, json_file)
    return 0


def _list_all() -> None:
    """The implementations that are correct, then the catalogue of bugs, a line each."""
    from harness.mutations.benign import FAMILIES
    from harness.mutations.catalogue import CATALOGUE

    click.secho("correct implementations", bold=True)
    for family in FAMILIES.values():
        click.echo(f"  {family.name:22} {family.what}")
    groups: dict[str, list[str]] = {}
    for one in CATALOGUE.values():
        where = ", ".join(sorted(one.active))
        kind = "negative controls" if one.harmless else one.group
        reported = f" ({one.reference})" if one.reference else ""
        line = f"  {one.id:24} {one.subtlety:9} {where:24} {one.wrong}{reported}"
        groups.setdefault(kind, []).append(line)
    for group, lines in groups.items():
        click.secho(f"{group}: {len(lines)}", bold=True)
        click.echo("\n".join(lines))


def _measure_spreads(groups: int, work: Path, part: tuple[int, int], minutes: float | None) -> None:
    from harness import power as bench

    with progress_bar("pilot") as progress:
        bench.run_pilot(groups, work, progress, part, minutes=minutes)
    results = bench.of_this_rule(bench.read_results(work, bench.PILOT))
    click.echo(bench.table_to_literal(bench.spreads(results)))


def _count_alarms(
    nulls: int | None, work: Path, part: tuple[int, int], minutes: float | None, json_file: str | None
) -> None:
    """Run the nulls, where a number is given, and print the table of all that are there."""
    from harness import power as bench

    if nulls is not None:
        with progress_bar("nulls") as progress:
            bench.run_nulls(nulls, work, progress, part, minutes=minutes)
    results = bench.read_results(work, bench.NULLS)
    found = bench.summarise(results)
    if json_file != "-":
        click.echo(bench.summary_to_text(found))
    if json_file:
        write_json([bench.summary_to_dict(found, results)], json_file)


def _part(shard: str | None) -> tuple[int, int]:
    """(index, number) of ``I/N``; the whole where there is none."""
    index, slash, number = (shard or "0/1").partition("/")
    if not (slash and index.isdecimal() and number.isdecimal() and int(index) < int(number)):
        raise UsageError(f"--shard {shard} is no part of a run", fix="Write I/N with I from 0 to N - 1, e.g. 0/2")
    return int(index), int(number)
