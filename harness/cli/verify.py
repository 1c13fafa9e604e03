"""`harness verify`: what a candidate said, scored by a reference that is larger than memory."""

from __future__ import annotations

from pathlib import Path

import click

from harness.cli.output import must_be_writable, progress_line, write_json
from harness.errors import UsageError


@click.command()
@click.option("--model", required=True, type=click.Path(path_type=Path), metavar="DIR", help="The model's checkpoint.")
@click.option("--suite", type=click.Path(path_type=Path), metavar="FILE", help="What the candidate continues.")
@click.option("--candidate", "-c", metavar="SPEC", help="An engine: it continues the suite now.")
@click.option("--trace", metavar="FILE", help="What `harness run SPEC --suite FILE` made.")
@click.option("--answers", metavar="FILE", help="JSON lines of any program: prompt_ids and tokens, or prompt and text.")
@click.option("--reference", metavar="SPEC", default="stream", show_default=True, help="How the model is streamed.")
@click.option("--dtype", metavar="DTYPE", help="The candidate's precision, where it does not say.")
@click.option(
    "--replicas", type=click.IntRange(min=0), help="Variants that measure the noise of each step; 8 are drawn."
)
@click.option("--json", metavar="FILE", help="Write the verdict as JSON; '-' for standard output.")
@click.option("--verbose", is_flag=True, help="Each kind of finding with its limit and derivation.")
def verify(
    model: Path,
    suite: Path | None,
    candidate: str | None,
    trace: str | None,
    answers: str | None,
    reference: str,
    dtype: str | None,
    replicas: int | None,
    json: str | None,
    verbose: bool,
) -> int:
    """Judge a candidate by its tokens alone, against a model that need not fit into memory and has no golden.

    \b
    harness verify --model path/to/model --suite prompts/core.toml --trace from-the-cluster.trace
    harness verify --model path/to/model --suite prompts/core.toml -c hf:model=path/to/port,dtype=bfloat16
    harness verify --model path/to/model --answers said.jsonl --dtype bfloat16

    The model is streamed from its files, a block at a time: one pass scores every continuation on its own prefixes,
    and one measures how much round-off each step has in the candidate's precision.
    """  # noqa: D301  # click takes a backspace itself, which a raw text does not hold
    if sum(one is not None for one in (candidate, trace, answers)) != 1:
        raise UsageError("give one candidate", fix="One of -c SPEC, --trace FILE and --answers FILE")
    if answers is None and suite is None:
        raise UsageError("the suite is not named", fix="Add --suite FILE, the one that the candidate continues")
    must_be_writable("--json", json)
    from harness import flow
    from harness.engines import build_engine
    from harness.report.terminal import verdict_to_text
    from harness.traces import load_trace

    build_engine(reference)
    if candidate is not None:
        build_engine(candidate)
    given = candidate if candidate is not None else load_trace(trace) if trace is not None else Path(str(answers))
    with progress_line() as progress:
        verdict = flow.verify(
            given,
            model=model,
            suite=suite,
            reference=reference,
            dtype=dtype,
            replicas=flow.VERIFY_REPLICAS if replicas is None else replicas,
            progress=progress,
        )
    if json != "-":
        click.echo(verdict_to_text(verdict, verbose=verbose))
    if json:
        write_json(verdict.to_dict(), json)
    return verdict.status.exit_code
