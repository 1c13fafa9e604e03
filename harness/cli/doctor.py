"""`harness doctor`: what this machine has, and what can run on it."""

from __future__ import annotations

import json

import click

_NO_COMPILER = (
    "none: hf:compile=true cannot run, and deepspeed:tp=N with all_reduce=gloo alone (install g++ or clang++)"
)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> int:
    """Versions, devices, compilers; which engines can run here, and why the others cannot."""
    from harness import environment
    from harness.engines import ENGINES

    found = {
        "versions": environment.versions(),
        "machine": environment.machine(),
        "devices": environment.devices(),
        "compiler": environment.compiler() or _NO_COMPILER,
        "engines": {name: entry.why_not() or f"can run: {entry.summary}" for name, entry in ENGINES.items()},
    }
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return 0
    for title, content in found.items():
        click.secho(title, bold=True)
        lines = content.items() if isinstance(content, dict) else [("", content)]
        for key, value in lines:
            click.echo(f"  {key:16} {value}" if key else f"  {value}")
    return 0
