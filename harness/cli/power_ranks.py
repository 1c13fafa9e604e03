"""`harness power --ranks`: which bugs of sharding a check finds in real ranks, and which ranks it names."""

from __future__ import annotations

import click

from harness.cli.output import progress_bar, write_json
from harness.errors import UsageError


def check_ranks(only: list[str] | None, places: list[str] | None, json_file: str | None) -> int:
    """Run all that is asked, and print it.

    Returns:
        The exit code: 1 where a bug is not found, or a run without one is not ok.
    """
    from harness.power import sharded, sharded_table

    asked = sharded.planned(places, only)
    if not asked:
        raise UsageError("none of these is put into any of these hosts", fix="Name other hosts, or leave them out")
    with progress_bar("ranks") as progress:
        records = sharded.run(asked, progress)
    summary = sharded_table.summarise(records)
    if json_file != "-":
        click.echo(sharded_table.summary_to_text(summary, records))
    if json_file:
        write_json([sharded_table.summary_to_dict(summary, records)], json_file)
    return 0 if summary.ok else 1
