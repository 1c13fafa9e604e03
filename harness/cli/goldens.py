"""`harness compare` and `harness lint`: goldens against each other, and against themselves."""

from __future__ import annotations

from pathlib import Path

import click

from harness.cli.output import progress_line


@click.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--golden", type=click.Path(path_type=Path), metavar="DIR", help="Of two traces: what they were made of.")
def compare(a: Path, b: Path, golden: Path | None) -> int:
    """Compare two goldens prompt by prompt, a golden with a trace, or two traces of one golden.

    \b
    harness compare golden/my-model/core /tmp/recorded-elsewhere/core
    harness compare golden/my-model/core from-the-device.trace
    harness compare tp.trace pp.trace --golden golden/my-model/core

    Two goldens: exit code 0 where they differ by round-off at most, 1 where by more. A trace is judged as by `check`,
    and of two traces each, with how far they are apart.
    """  # noqa: D301  # click takes a backspace itself, which a raw text does not hold
    from harness import flow
    from harness.values import Pair, Verdict
    from harness.verdict import exit_code

    found = flow.compare(a, b, golden=golden)
    click.echo(str(found))
    if isinstance(found, Pair):
        return exit_code([found.first, found.second])
    if isinstance(found, Verdict):
        return found.status.exit_code
    return int(found.worst.needs_reason)


@click.command()
@click.argument("root", type=click.Path(path_type=Path, exists=True, file_okay=False), default=Path("golden"))
@click.option("--live", is_flag=True, help="Also ask each golden's own model for its logits again.")
def lint(root: Path, live: bool) -> int:
    """Look for goldens under ROOT that cannot be trusted: stale, orphaned, contradicting each other, anomalous.

    Exit code 1 where something is wrong; warnings alone leave it 0.
    """
    from harness.lint import lint as looked_at
    from harness.report.lint import lint_to_text

    with progress_line():
        found = looked_at(root, live=live)
    click.echo(lint_to_text(found))
    return int(any(one.severity == "error" for one in found))
