"""`harness bench`: the measurements of the articles on inference, of any engine."""

from __future__ import annotations

from pathlib import Path

import click

from harness.cli.output import must_be_writable, progress_line, write_json
from harness.errors import UsageError

_KINDS = ("latency", "completion", "burst", "scaling", "modules")


@click.command()
@click.argument("specs", nargs=-1, required=True, metavar="SPEC...")
@click.option("--golden", type=click.Path(path_type=Path), metavar="DIR", help="Judges each SPEC first; gives prompts.")
@click.option("--model", type=click.Path(path_type=Path), metavar="DIR", help="Weights for a SPEC that names none.")
@click.option("--suite", type=click.Path(path_type=Path), metavar="FILE", help="Rows to complete, not the golden's.")
@click.option("--kind", "kinds", type=click.Choice(_KINDS), multiple=True, help="May be repeated.  [default: all]")
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=7, show_default=True, help="Not of a burst.")
@click.option("--new-tokens", type=click.IntRange(min=2), default=100, show_default=True, help="Not of a burst.")
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--batch", type=click.IntRange(min=1), default=32, show_default=True, help="Of completion and burst.")
@click.option("--burst", metavar="NxTOKENS[+NEW]", default="1000x512+20", show_default=True, help="Size of a burst.")
@click.option("--ranks", metavar="N,N,...", default="1,2", show_default=True, help="Of scaling; the SPEC has tp or pp.")
@click.option("--quick", is_flag=True, help="Judge by the golden's quick runs only.")
@click.option("--timeout", type=click.FloatRange(min=1), default=300.0, show_default=True, help="Seconds of silence.")
@click.option("--json", metavar="FILE", help="Write all of it as JSON; '-' for standard output.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="Draw it, as .svg or .png.")
def bench(
    specs: tuple[str, ...],
    golden: Path | None,
    model: Path | None,
    suite: Path | None,
    kinds: tuple[str, ...],
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    batch: int,
    burst: str,
    ranks: str,
    quick: bool,
    timeout: float,
    json: str | None,
    plot: Path | None,
) -> int:
    """How fast is SPEC? Each measurement runs in a process of its own, and none before the verdict.

    \b
    harness bench hf:dtype=float32 hf:dtype=bfloat16 --golden golden/bloom-tiny/core --kind latency
    harness bench tp:size=2,threads=1 --golden golden/bloom-tiny/core --kind scaling --ranks 1,2,3
    harness bench hf --model path/to/model --kind burst --burst 100x512+20

    latency: a prompt at batch 1, the first forward and later ones apart; completion: rows/s of a suite; burst: requests
    that arrive at once; scaling: latency over ranks; modules: where a forward spends its time, under the profiler.
    Exit codes: 0 measured; those of `harness check` for a SPEC that is not ok, of which no speed is told; 2 bad input;
    3 what was named by --kind cannot be measured; 4 an engine failed.
    """  # noqa: D301  # click takes a backspace itself, which a raw text does not hold
    must_be_writable("--json", json)
    numbers = _ranks(ranks)
    from harness.speed.kinds.burst import parse_size

    size = parse_size(burst)
    if plot is not None:
        from harness.power.plot import refuse_undrawable

        must_be_writable("--plot", str(plot))
        refuse_undrawable(plot)
    from harness import flow
    from harness.report.bench import bench_to_dict, bench_to_text
    from harness.speed.benching import KINDS, Plan

    plan = Plan(
        kinds=tuple(kind for kind in KINDS if kind in (kinds or KINDS)),
        asked=bool(kinds),
        prompt=prompt_tokens,
        new=new_tokens,
        repeats=repeats,
        batch=batch,
        burst=size,
        ranks=numbers,
    )
    with progress_line() as progress:
        found = flow.bench(
            specs, golden=golden, model=model, suite=suite, plan=plan, quick=quick, timeout=timeout, progress=progress
        )
    if json != "-":
        click.echo(bench_to_text(found))
    if json:
        write_json(bench_to_dict(found), json)
    if plot is not None and any(one.results for one in found.subjects):
        from harness.report.bench_plot import write_plot

        write_plot(found, plot)
    return found.exit_code


def _ranks(text: str) -> tuple[int, ...]:
    words = [one.strip() for one in text.split(",")]
    if not all(one.isascii() and one.isdigit() and len(one) <= 4 and int(one) for one in words):
        raise UsageError(f"--ranks {text!r} is no list of numbers", fix="Write e.g. --ranks 1,2,3")
    return tuple(int(one) for one in words)
