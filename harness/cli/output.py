"""What commands share: a progress line, a bar, files that are checked before the work and written after it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from harness.errors import UsageError
from harness.files import replace_file


@contextmanager
def progress_line(quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """A line on the terminal's error stream that says what is being done; nothing where it is no terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda _text: None
        return
    with console.status("starting") as status:
        yield lambda text: status.update(text)


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on the error stream: how many verdicts are there, how many there will be, what is being done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda done, total, text: bar.update(task, completed=done, total=total, description=text)


def must_be_writable(option: str, file: str | None) -> None:
    """Refuse a file that could not be written before hours of work, not after them.

    Raises:
        UsageError: for a directory, or a file in a directory that is not there; '-' is the standard output.
    """
    if not file or file == "-":
        return
    if not Path(file).resolve().parent.is_dir():
        raise UsageError(f"the directory of {option} {file} does not exist", fix="Make it first")
    if Path(file).is_dir():
        raise UsageError(f"{option} {file} is a directory", fix="Name a file in it")


def write_text(text: str, file: str) -> None:
    """Write a report in one step; '-' is the standard output."""
    if file == "-":
        click.echo(text, nl=False)
    else:
        replace_file(Path(file), text.encode())


def write_json(data: Any, file: str) -> None:
    """Write plain values as JSON."""
    write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", file)
