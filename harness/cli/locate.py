"""`harness locate`: where a candidate first goes wrong."""

from __future__ import annotations

from pathlib import Path

import click

from harness.cli.output import must_be_writable, progress_line, write_json
from harness.errors import UsageError


@click.command()
@click.argument("golden", type=click.Path(path_type=Path))
@click.option("--candidate", "-c", required=True, metavar="SPEC", help="What to look into.")
@click.option(
    "--reference", type=click.Path(path_type=Path), metavar="DIR", help="The golden's model, if not beside it."
)
@click.option("--map", "map_file", type=click.Path(path_type=Path), metavar="FILE", help="What a port's tensors are.")
@click.option("--write-map", type=click.Path(path_type=Path), metavar="FILE", help="Write the map that is found, only.")
@click.option("--repro", type=click.Path(path_type=Path), metavar="DIR", help="Write the smallest failing case there.")
@click.option("--copy-model", is_flag=True, help="With --repro: put a copy of a small model there too.")
@click.option("--json", metavar="FILE", help="Write all of it as JSON; '-' for standard output.")
def locate(
    golden: Path,
    candidate: str,
    reference: Path | None,
    map_file: Path | None,
    write_map: Path | None,
    repro: Path | None,
    copy_model: bool,
    json: str | None,
) -> int:
    """Where does a candidate first leave the reference? Run it after a red `harness check`.

    \b
    harness locate golden/bloom-tiny/core -c hf:model=path/to/my/weights
    harness locate golden/bloom-tiny/core -c 'py:my_package.port:build?dtype=bfloat16'
    harness locate golden/bloom-tiny/core -c py:my_package.port:build --repro my-case

    A port whose modules have other names needs a map of its tensors. Without --map it is found by content; --write-map
    writes that for you to read and confirm.

    Weights, settings and tables are read; then each module is given what the reference's was given, and its result is
    compared: in float32 first, then in the candidate's own precision. Exit codes: 0 nothing is wrong; 1 a place is
    named; 2 bad input; 3 nothing could be looked at; 4 the candidate failed.
    """  # noqa: D301  # click takes a backspace itself, which a raw text does not hold
    must_be_writable("--json", json)
    from harness.engines import build_engine

    build_engine(candidate)
    if copy_model and repro is None:
        raise UsageError("--copy-model copies into the directory of --repro", fix="Add --repro DIR, or leave it out")
    from harness import flow
    from harness.locate import mapfile
    from harness.report.locate import where_to_text

    names = None if map_file is None else mapfile.read_map(map_file)
    with progress_line() as progress:
        if write_map is not None:
            found_map = flow.proposed_map(golden, candidate, reference=reference)
            mapfile.write_map(found_map, write_map)
            click.echo(f"{len(found_map)} lines in {write_map}; read it, and give it with --map")
            return 0
        found = flow.locate(
            golden, candidate, reference=reference, names=names, repro=repro, copy_model=copy_model, progress=progress
        )
    if json != "-":
        click.echo(where_to_text(found))
    if json:
        write_json(found.to_dict(), json)
    return found.exit_code
