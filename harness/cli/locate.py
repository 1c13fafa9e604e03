"""`harness locate`: where a candidate first goes wrong."""

from __future__ import annotations

from pathlib import Path

import click

from harness.cli.output import must_be_writable, progress_line, write_json


@click.command()
@click.argument("golden", type=click.Path(path_type=Path))
@click.option("--candidate", "-c", required=True, metavar="SPEC", help="What to look into.")
@click.option(
    "--reference", type=click.Path(path_type=Path), metavar="DIR", help="The golden's model, if not beside it."
)
@click.option("--json", metavar="FILE", help="Write all of it as JSON; '-' for standard output.")
def locate(golden: Path, candidate: str, reference: Path | None, json: str | None) -> int:
    """Where does a candidate first leave the reference? Run it after a red `harness check`.

    \b
    harness locate golden/bloom-tiny/core -c hf:model=path/to/my/weights
    harness locate golden/bloom-tiny/core -c 'py:my_package.port:build?dtype=bfloat16'

    Weights, settings and tables are read; then each module is given what the reference's was given, and its result is
    compared: in float32 first, then in the candidate's own precision. Exit codes: 0 nothing is wrong; 1 a place is
    named; 2 bad input; 3 nothing could be looked at; 4 the candidate failed.
    """  # noqa: D301  # click takes a backspace itself, which a raw text does not hold
    must_be_writable("--json", json)
    from harness.engines import build_engine

    build_engine(candidate)
    from harness import flow
    from harness.report.locate import where_to_text

    with progress_line() as progress:
        found = flow.locate(golden, candidate, reference=reference, progress=progress)
    if json != "-":
        click.echo(where_to_text(found))
    if json:
        write_json(found.to_dict(), json)
    return found.exit_code
