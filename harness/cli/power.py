"""`harness power`: which bugs a check finds, and how often it calls correct implementations wrong."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from harness.cli.output import must_be_writable, progress_bar, progress_line, write_json
from harness.errors import UsageError

if TYPE_CHECKING:
    from harness.power.trial import Trial

_MODES = "--nulls, --names, --spreads, --summary, --list, --ranks, --locate and --model"


@click.command()
@click.option("--nulls", type=click.IntRange(min=1), metavar="N", help="At least N verdicts, then the table.")
@click.option("--spreads", is_flag=True, help="Measure how far correct implementations scatter, for constants.py.")
@click.option("--summary", is_flag=True, help="The table of the nulls that are there.")
@click.option("--names", is_flag=True, help="Which bugs the templates name; with --nulls, on correct implementations.")
@click.option("--ranks", is_flag=True, help="Which bugs of sharding are found in real ranks, and which rank is named.")
@click.option("--locate", "placing", is_flag=True, help="Whether `harness locate` names the right module.")
@click.option("--list", "listed", is_flag=True, help="The held-out implementations, and the bug catalogue.")
@click.option("--model", type=click.Path(path_type=Path), metavar="DIR", help="Your model: what a check of it sees.")
@click.option("--suite", type=click.Path(path_type=Path), metavar="FILE", help="Your suite, with --model.")
@click.option("--groups", type=click.IntRange(min=1), metavar="G", help="Groups of prompts a model.")
@click.option("--only", metavar="ID,...", help="These bugs, controls and correct implementations alone.")
@click.option("--host", "hosts", metavar="NAME,...", help="These models alone.")
@click.option(
    "--port", metavar="SPEC", help="Put the bugs into this engine in place of transformers, e.g. bloom:rungs=all."
)
@click.option("--quick", is_flag=True, help="On a few short prompts, those that show in logits alone.")
@click.option("--as-reported", is_flag=True, help="Leave out the weaker strengths of bugs.")
@click.option("--plot", "plot_file", metavar="FILE", help="Detection against S/N in bfloat16, as .svg or .png.")
@click.option("--work", type=click.Path(path_type=Path), default=Path(".power"), show_default=True, help="Directory.")
@click.option("--jobs", type=click.IntRange(min=1), metavar="J", help="Run in J processes.")
@click.option("--shard", metavar="I/N", help="Do part I (from 0) of N; each part is a process of its own.")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), metavar="M", help="Stop after that long.")
@click.option("--json", "json_file", metavar="FILE", help="Write everything as JSON; '-' for standard output.")
def power(
    nulls: int | None,
    spreads: bool,
    summary: bool,
    names: bool,
    ranks: bool,
    placing: bool,
    listed: bool,
    model: Path | None,
    suite: Path | None,
    groups: int | None,
    only: str | None,
    hosts: str | None,
    port: str | None,
    quick: bool,
    as_reported: bool,
    plot_file: str | None,
    work: Path,
    jobs: int | None,
    shard: str | None,
    minutes: float | None,
    json_file: str | None,
) -> int:
    """Measure what a check finds: put the bugs of the catalogue into models, beside correct implementations.

    \b
    harness power --jobs 2                         every bug on every host, our rules beside the peers'
    harness power --only wc-eps,at-scale --host llama-tiny
    harness power --nulls 3000 --jobs 2            false alarms on correct implementations
    harness power --names --nulls 3000 --jobs 2    which bugs --diagnose names, and names where there is none
    harness power --ranks                          bugs of sharding in real ranks of tp and pp
    harness power --locate --host llama-tiny       bugs and correct implementations, replayed module by module
    harness power --port bloom:rungs=all           bugs in an optimized port; with --locate, where
    harness power --spreads --groups 2             how far these scatter
    harness power --model DIR --suite FILE         which bugs a check of your model on your suite sees

    What is done stays in the directory --work, and a run goes on where the last one ended.
    """  # noqa: D301  # click takes a backspace itself, which a raw text does not hold
    certified = model is not None or suite is not None
    modes = [nulls is not None or names, spreads, summary, ranks, placing, listed, certified].count(True)
    table = not modes
    if modes > 1:
        raise UsageError(f"give one of {_MODES}, or none of them", fix="E.g. harness power --nulls 3000")
    if spreads and groups is None:
        raise UsageError("--spreads needs a number of --groups", fix="E.g. harness power --spreads --groups 2")
    if groups is not None and not (spreads or table):
        raise UsageError("--groups is of --spreads and of the bugs", fix="--nulls makes as many as it needs")
    if not table and (
        as_reported or plot_file or ((only or hosts) and not (names or ranks or placing)) or (quick and not names)
    ):
        raise UsageError("--only, --host, --quick, --as-reported and --plot are of the bugs", fix=f"Leave out {_MODES}")
    if port is not None and not (table or placing):
        raise UsageError("--port is of the bugs and of --locate", fix="Leave out --port, or the other mode")
    given = work
    if port is not None:
        # What was done on another engine is none of this one's.
        work = work / "ports" / re.sub(r"[^\w.+=-]", "-", port)
    if (summary or ranks or placing or listed) and (shard or minutes or jobs):
        raise UsageError("--shard, --jobs and --minutes are of a run", fix="Give them with --nulls or --spreads")
    if shard and jobs:
        raise UsageError("--shard is one process, --jobs are several", fix="Give one of them")
    if shard and (table or names) and (json_file or plot_file):
        raise UsageError(
            "--shard is a part of a run, which writes no table",
            fix="Give --json and --plot without --shard, afterwards",
        )
    if certified and (model is None or suite is None):
        raise UsageError("--model and --suite go together", fix="Give both, or none of them")
    if certified and (shard or minutes or jobs):
        raise UsageError("--shard, --jobs and --minutes are of other runs", fix="Leave them out with --model")
    if (spreads or listed or placing) and json_file:
        raise UsageError("--json is of the nulls and of the bugs", fix="Give it without --spreads, --list and --locate")
    must_be_writable("--json", json_file)
    must_be_writable("--plot", plot_file)
    if plot_file:
        from harness.power.plot import refuse_undrawable

        refuse_undrawable(Path(plot_file))
    part = _part(shard)
    if shard:
        from harness.power.processes import end_with_parent

        end_with_parent()
    again = _Again(work=work, given=given, jobs=jobs or 1, minutes=minutes)
    if model is not None and suite is not None:
        _certify(model, suite, work, json_file)
    elif ranks:
        from harness.cli.power_ranks import check_ranks

        return check_ranks(_split(only), _split(hosts), json_file)
    elif placing:
        _place_bugs(_split(only), _split(hosts), work, port)
    elif listed:
        _list_all()
    elif groups is not None and spreads:
        _measure_spreads(groups, part, again)
    elif names:
        from harness.cli.power_names import name_bugs

        name_bugs(nulls, _split(only), _split(hosts), part, again, json_file, quick=quick, alone=shard is not None)
    elif table:
        asked = _Asked(groups or 1, _split(only), _split(hosts), port, quick, as_reported)
        _find_bugs(asked, plot_file, part, again, json_file, shard)
    else:
        _count_alarms(nulls, part, again, json_file)
    return 0


def _place_bugs(only: Sequence[str] | None, places: Sequence[str] | None, work: Path, port: str | None) -> None:
    from harness.power.opening import TRANSFORMERS
    from harness.power.placing import kept, place
    from harness.power.placing_table import placed_to_text
    from harness.power.trials import hosts_of

    port = port or TRANSFORMERS
    with progress_line() as progress:
        place(places or hosts_of(port), work, Path("golden"), progress, only, port)
    click.echo(placed_to_text(kept(work)))


class _Again:
    """The same run in processes of its own."""

    def __init__(self, *, work: Path, given: Path, jobs: int, minutes: float | None) -> None:
        self.work, self.given, self.jobs, self.minutes = work, given, jobs, minutes

    def run(self, title: str, arguments: Sequence[str], done: Callable[[], int], total: int) -> None:
        """Share it, with a bar over all parts."""
        from harness.power.processes import run_parts

        limit = [] if self.minutes is None else ["--minutes", str(self.minutes)]
        with progress_bar(title) as progress:

            def seen() -> int:
                found = done()
                progress(found, total, f"{self.jobs} processes")
                return found

            run_parts(["power", *arguments, "--work", str(self.given), *limit], self.jobs, seen)


def _split(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


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


@dataclass(frozen=True, slots=True)
class _Asked:
    """Which bugs, on which prompts."""

    groups: int
    only: list[str] | None
    hosts: list[str] | None
    port: str | None
    quick: bool
    as_reported: bool

    def words(self) -> list[str]:
        """As arguments of the command."""
        words = ["--groups", str(self.groups)]
        for name, values in (("--only", self.only), ("--host", self.hosts)):
            words += [] if values is None else [name, ",".join(values)]
        words += [] if self.port is None else ["--port", self.port]
        return words + ["--quick"] * self.quick + ["--as-reported"] * self.as_reported


def _find_bugs(
    asked: _Asked,
    plot_file: str | None,
    part: tuple[int, int],
    again: _Again,
    json_file: str | None,
    shard: str | None,
) -> None:
    """Run what is missing, and print what all of it adds up to; a part of a run prints nothing."""
    from harness.power import rendering, trials
    from harness.power.detection import tables
    from harness.power.opening import TRANSFORMERS
    from harness.power.plot import write_plot

    port = asked.port or TRANSFORMERS
    blanks = trials.planned(
        asked.groups, names=asked.only, places=asked.hosts, sweeps=not asked.as_reported, quick=asked.quick, port=port
    )
    keys = {blank.key for blank in blanks}

    def done() -> list[Trial]:
        return [one for one in trials.read_trials(again.work) if one.key in keys]

    if again.jobs > 1:
        again.run("bugs", asked.words(), lambda: len(done()), len(blanks))
    else:
        with progress_bar("bugs") as progress:
            trials.run_trials(blanks, again.work, progress, part, minutes=again.minutes, port=port)
    if shard:
        return
    found = done()
    summed = tables(found)
    if json_file != "-":
        click.echo(rendering.tables_to_text(summed))
        click.echo("".join(f"\n{line}\n" for line in rendering.beside_tables(found, summed)), nl=False)
    if json_file:
        write_json([rendering.tables_to_dict(summed)], json_file)
    if plot_file:
        drawn = [one for one in summed if one.precision == "bfloat16"]
        if not drawn:
            raise UsageError(
                "--plot shows bfloat16, in which nothing was judged", fix="Run other bugs, or leave it out"
            )
        write_plot(drawn[0], Path(plot_file))


def _measure_spreads(groups: int, part: tuple[int, int], again: _Again) -> None:
    from harness.power import ledger
    from harness.power import nulls as bench
    from harness.power.drawn import PILOT

    if again.jobs > 1:
        again.run(
            "pilot",
            ["--spreads", "--groups", str(groups)],
            lambda: len(bench.read_results(again.work, PILOT)),
            groups * len(bench.combinations(ledger.WHOLE)),
        )
    else:
        with progress_bar("pilot") as progress:
            bench.run_pilot(groups, again.work, progress, part, minutes=again.minutes)
    results = ledger.of_this_rule(bench.read_results(again.work, PILOT))
    click.echo(bench.table_to_literal(bench.spreads(results)))


def _certify(model: Path, suite_file: Path, work: Path, json_file: str | None) -> None:
    """The sensitivity certificate of a model and a suite, whose golden is kept in ``work``."""
    from harness import checkpoint, suites
    from harness.power import certificate
    from harness.power.drawn import recorded
    from harness.report.certificate import certificate_to_dict, certificate_to_text

    certificate.refuse_unknown(model)
    suite = suites.load_suite(suite_file)
    # Models of one name have a golden each.
    name = f"{model.resolve().name}-{checkpoint.identify(model).digest[:12]}"
    with progress_line() as progress:
        golden = recorded(model, suite, work / "certified" / name / suite.name, progress)
        found = certificate.make(golden, model, progress)
    if json_file != "-":
        click.echo(certificate_to_text(found))
    if json_file:
        write_json(certificate_to_dict(found), json_file)


def _count_alarms(count: int | None, part: tuple[int, int], again: _Again, json_file: str | None) -> None:
    """Run the nulls, where a number is given, and print the table of all that are there."""
    from harness.power import nulls as bench
    from harness.power.drawn import NULLS

    if count is not None and again.jobs > 1:
        again.run("nulls", ["--nulls", str(count)], lambda: len(bench.read_results(again.work, NULLS)), count)
    elif count is not None:
        with progress_bar("nulls") as progress:
            bench.run_nulls(count, again.work, progress, part, minutes=again.minutes)
    results = bench.read_results(again.work, NULLS)
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
