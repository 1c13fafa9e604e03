"""`harness record`: make a golden, or make it again and say what has changed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from harness.cli.output import progress_line
from harness.errors import UsageError

if TYPE_CHECKING:
    from harness.values import Changes, Golden


@click.command()
@click.option("--model", metavar="DIR|SPEC", help="A transformers model's directory, or py:pkg.mod:build?model=DIR.")
@click.option("--suite", type=click.Path(path_type=Path), help="E.g. prompts/core.toml.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory to write, golden/NAME/SUITE.")
@click.option(
    "--tensor-parallel",
    type=click.IntRange(min=2),
    multiple=True,
    metavar="N",
    help="Measure round-off of N-way tensor parallelism as well; may be repeated.",
)
@click.option("--update", is_flag=True, help="Replace the golden that is there; alone, from its own model and suite.")
@click.option("--reason", metavar="TEXT", help="Why, kept in the golden's history; needed beyond round-off.")
@click.option("--stream", metavar="SPEC", help="Stream a model that does not fit into memory: stream:key=value,...")
@click.option(
    "--draft", metavar="SPEC|FILE", help="What proposes continuations to --stream; prompt look-up by default."
)
@click.option("--certificate", is_flag=True, help="Also say which bugs a check of it sees: certificate.json beside it.")
def record(
    model: str | None,
    suite: Path | None,
    out: Path,
    tensor_parallel: tuple[int, ...],
    update: bool,
    reason: str | None,
    stream: str | None,
    draft: str | None,
    certificate: bool,
) -> int:
    """Record a golden: the reference's tokens and logits, and its own round-off in fp32, bf16 and fp16.

    \b
    harness record --model path/to/model --suite prompts/core.toml --out golden/my-model/core
    harness record --update --out golden/my-model/core --reason "retrained"
    harness record --model path/to/large --suite FILE --out golden/large/core --stream stream --draft said.jsonl

    An update first shows, prompt by prompt, what changes. Beyond round-off it is refused without a reason.
    """  # noqa: D301  # click takes a backspace itself, which a raw text does not hold
    if (model is None) != (suite is None):
        raise UsageError(
            "--model and --suite go together", fix="Give both, or --update alone for a golden that is there"
        )
    if model is None and not update:
        raise UsageError("nothing to record from", fix="Give --model DIR and --suite FILE")
    if model is None and tensor_parallel:
        raise UsageError("an update alone keeps the floors that are there", fix="Give --model and --suite as well")
    if stream is None and draft is not None:
        raise UsageError("only a streamed recording takes a draft", fix="Add --stream stream")
    from harness import flow

    directory = _certified(out, model) if certificate else None
    changes: list[Changes] = []
    try:
        with progress_line() as progress:
            if model is None or suite is None:
                golden = flow.rerecord(out, reason=reason, show=changes.append, progress=progress)
            else:
                golden = flow.record(
                    model,
                    suite,
                    out=out,
                    parallel=tensor_parallel,
                    update=update,
                    reason=reason,
                    stream=stream,
                    draft=draft or "lookup",
                    show=changes.append,
                    progress=progress,
                )
    finally:
        # Also where the update is refused; not while the line that says what is being done is on the terminal.
        for one in changes:
            click.echo(str(one))
    _report(golden, out)
    if directory is not None:
        _certify(golden, directory, out)
    return 0


def _certified(out: Path, model: str | None) -> Path:
    """The model of which a certificate is asked, before anything is recorded.

    Raises:
        HarnessError: for a port, a model that is not at hand, or one of which the bug catalogue has nothing.
    """
    from harness.engines.spec import is_port
    from harness.flow.references import read, reference_directory
    from harness.power.certificate import refuse_unknown

    if model is not None and is_port(model):
        raise UsageError("a port has no floors, so nothing can be certified", fix="Leave out --certificate")
    directory = reference_directory(read(out)) if model is None else Path(model)
    if directory is None:
        raise UsageError(f"the model of {out} is not beside it", fix="Name it with --model and --suite")
    refuse_unknown(directory)
    return directory


def _certify(golden: Golden, model: Path, out: Path) -> None:
    """Write the certificate beside the golden, and say in short what it says."""
    from harness.power import certificate
    from harness.report.certificate import certificate_summary

    with progress_line() as progress:
        found = certificate.make(golden, model, progress)
    click.echo(f"certified {certificate.write(found, out)}")
    click.echo(certificate_summary(found))


def _report(golden: Golden, out: Path) -> None:
    """What the golden is, and how much it can decide."""
    from harness.store import decidable_steps

    steps = int(golden.rows.generated.sum())
    click.echo(f"recorded {out}: {len(golden.requests)} prompts, {steps} tokens, reference in {golden.precision}")
    settings = golden.provenance["settings"]
    if golden.provenance["engine"] == "stream":
        wrong = ", ".join(f"{name} {count}" for name, count in settings["mistakes"].items())
        click.echo(
            f"  {settings['passes']} passes over the weights; mistakes of the draft {settings['draft']}: {wrong}"
        )
    for note in (golden.provenance["precision_reason"], *golden.provenance["left_out"].items()):
        if note:
            click.echo(f"  note: {note if isinstance(note, str) else ': '.join(note)}")
    for precision, decidable in decidable_steps(golden).items():
        floor = golden.floors[precision]
        click.echo(
            f"  {precision}: {decidable.mean():.1%} of steps decidable, {floor.effective:.1f} independent replicas"
        )
