"""The command `harness`. Usage errors and --help come without importing torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click

from harness.cli.bench import bench
from harness.cli.checks import check, schema
from harness.cli.convert import convert
from harness.cli.doctor import doctor
from harness.cli.gate import gate
from harness.cli.goldens import compare, lint
from harness.cli.locate import locate
from harness.cli.models import models
from harness.cli.power import power
from harness.cli.records import record
from harness.cli.runs import run
from harness.cli.verify import verify
from harness.errors import HarnessError

_INTERRUPTED = 130

#: Commands that open engines, and thus can be started as several ranks by an outer launcher.
_WITH_ENGINES = ("check", "record", "run", "verify")


def main() -> None:
    """Entry point: one clear line for what users get wrong, and the exit code that belongs to it."""
    # Before torch is loaded: threads that spin while they wait take the cores from whoever else is on the machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Logits are taken and freed at every step: in huge pages the system has a fifth less to do for a whole check.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        with _as_rank(sys.argv[1:]) as given:
            code = cli.main(args=given, standalone_mode=False)
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


@contextmanager
def _as_rank(given: list[str]) -> Iterator[list[str]]:
    """The command line, to be run inside. Of several launched ranks only rank 0 gets there; the others end with it."""
    # What launchers call a rank: RANK, OMPI_COMM_WORLD_RANK, SLURM_PROCID, ... Only then is it worth a slow import.
    may_be_rank = any(name.endswith(("RANK", "_PROCID")) for name in os.environ)
    if not may_be_rank or not given or given[0] not in _WITH_ENGINES:
        yield given
        return
    from harness.engines.ranks import outer

    launched = outer.launched()
    if launched is None:
        yield given
        return
    if launched.rank > 0:
        outer.follow()
    with outer.led():
        # deepspeed adds it to the command of every rank.
        yield [one for one in given if not one.startswith("--local_rank=")]


def _fail(line: str, code: int) -> None:
    click.echo(f"error: {line}", err=True)
    sys.exit(code)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="golden-harness", prog_name="harness")
def cli() -> None:
    """Is it still the same model? Record what a reference does, and check any other implementation against it.

    Exit codes: 0 ok (identical, drift); 1 failed; 2 bad input; 3 unmeasured or stale; 4 the engine failed.
    """


for command in (
    check, verify, locate, record, run, compare, gate, bench, lint, power, models, convert, doctor, schema,
):  # fmt: skip
    cli.add_command(command)
