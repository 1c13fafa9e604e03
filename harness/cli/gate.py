"""`harness gate`: correctness and speed of a candidate beside its base, in one run."""

from __future__ import annotations

from pathlib import Path

import click

from harness.cli.output import must_be_writable, progress_line, write_json, write_text


@click.command()
@click.argument("golden", type=click.Path(path_type=Path))
@click.option("--candidate", "-c", required=True, metavar="SPEC", help="What is to take the base's place.")
@click.option("--base", "-b", metavar="SPEC", help="What it is to replace; with --base-rev the candidate's SPEC.")
@click.option("--base-rev", metavar="REV", help="Run the base from this revision of the repository you are in.")
@click.option("--max-slowdown", type=click.FloatRange(min=0, min_open=True), metavar="X", help="E.g. 1.05.")
@click.option("--require-speedup", type=click.FloatRange(min=0, min_open=True), metavar="X", help="E.g. 1.1.")
@click.option(
    "--speedup-in",
    type=click.Choice(["prefill", "decode"]),
    multiple=True,
    help="What --require-speedup is asked of; both unless named.",
)
@click.option("--batch", "batches", type=click.IntRange(min=1), multiple=True, help="May be repeated.  [default: 1, 8]")
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--new-tokens", type=click.IntRange(min=2), default=16, show_default=True)
@click.option("--rounds", type=click.IntRange(min=8), default=64, show_default=True, help="At most.")
@click.option("--quick", is_flag=True, help="Judge by the golden's quick runs only.")
@click.option(
    "--reference", type=click.Path(path_type=Path), metavar="DIR", help="The golden's model, if not beside it."
)
@click.option("--timeout", type=click.FloatRange(min=1), default=300.0, show_default=True, help="Seconds of silence.")
@click.option("--json", metavar="FILE", help="Write all of it as JSON; '-' for standard output.")
@click.option("--markdown", metavar="FILE", help="Write a summary; it goes to GITHUB_STEP_SUMMARY by itself.")
def gate(
    golden: Path,
    candidate: str,
    base: str | None,
    base_rev: str | None,
    max_slowdown: float | None,
    require_speedup: float | None,
    speedup_in: tuple[str, ...],
    batches: tuple[int, ...],
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
    quick: bool,
    reference: Path | None,
    timeout: float,
    json: str | None,
    markdown: str | None,
) -> int:
    """May a candidate take the base's place? Both are judged by the golden in directory GOLDEN, and timed in turns.

    \b
    harness gate golden/bloom-tiny/core -b hf -c hf:attn=sdpa --max-slowdown 1.05
    harness gate golden/bloom-tiny/core -b hf -c hf:dtype=bfloat16 --require-speedup 1.1 --speedup-in decode
    harness gate golden/bloom-tiny/core --base-rev main -c 'py:my_package.port:build' --max-slowdown 1.05

    Prefill and decoding are timed apart, at each batch size, each side in a process of its own. It passes when the
    verdict is ok and every interval lies within its limit; where noise does not let that be told, it does not pass.
    Exit codes: 0 passed; 1 another model, or beyond a limit; 2 bad input; 3 too noisy to tell, or unmeasured; 4 a side
    failed.
    """  # noqa: D301  # click takes a backspace itself, which a raw text does not hold
    for option, file in (("--json", json), ("--markdown", markdown)):
        must_be_writable(option, file)
    from harness import flow
    from harness.report.gate import gate_to_dict, gate_to_markdown, gate_to_text
    from harness.report.markdown import append_step_summary
    from harness.speed.judging import PARTS, Limits

    with progress_line() as progress:
        found = flow.gate(
            golden,
            candidate,
            base,
            base_revision=base_rev,
            limits=Limits(slowdown=max_slowdown, speedup=require_speedup, speedup_in=speedup_in or PARTS),
            batches=batches or (1, 8),
            prompt=prompt_tokens,
            new=new_tokens,
            rounds=rounds,
            quick=quick,
            reference=reference,
            timeout=timeout,
            progress=progress,
        )
    if "-" not in (json, markdown):
        click.echo(gate_to_text(found))
    if json:
        write_json(gate_to_dict(found), json)
    summary = gate_to_markdown(found)
    if markdown:
        write_text(summary, markdown)
    append_step_summary(summary)
    return found.exit_code
