"""`harness power --names`: which bugs `check --diagnose` names, and what it names where there is none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import click

from harness.cli.output import progress_bar, write_json
from harness.errors import UsageError


class Again(Protocol):
    """The same run in processes of its own."""

    work: Path
    jobs: int
    minutes: float | None

    def run(self, title: str, arguments: Sequence[str], done: Callable[[], int], total: int) -> None:
        """Share it."""


def name_bugs(
    nulls: int | None,
    only: list[str] | None,
    places: list[str] | None,
    part: tuple[int, int],
    again: Again,
    json_file: str | None,
    *,
    quick: bool,
    alone: bool,
) -> None:
    """Run what is missing, and print what all of it adds up to; a part of a run (``alone``) prints nothing."""
    from harness.power import naming, naming_table

    asked = naming.planned_bugs(places, only, quick=quick)
    if nulls is not None:
        asked += naming.planned_nulls(nulls, places, only)
    if not asked:
        raise UsageError("none of these is put into any of these hosts", fix="Name other hosts, or leave them out")
    keys = {blank.key for blank in asked}

    def done() -> list[naming.Naming]:
        return [one for one in naming.read_namings(again.work) if one.key in keys]

    if again.jobs > 1:
        arguments = ["--names", *([] if nulls is None else ["--nulls", str(nulls)])]
        for name, values in (("--only", only), ("--host", places)):
            arguments += [] if values is None else [name, ",".join(values)]
        again.run("names", arguments + ["--quick"] * quick, lambda: len(done()), len(asked))
    else:
        with progress_bar("names") as progress:
            naming.run_namings(asked, again.work, progress, part, minutes=again.minutes)
    if alone:
        return
    found = done()
    summed = naming_table.summarise(found)
    if json_file != "-":
        click.echo(naming_table.summary_to_text(summed))
    if json_file:
        write_json([naming_table.summary_to_dict(summed, found)], json_file)
