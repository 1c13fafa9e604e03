"""Run the command `harness` in this process, and look at how it ended."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness import cli


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


def runner(monkeypatch, capsys):
    """A function that runs the command as the entry point does."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["harness", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return Ended(code=ended.value.code, out=printed.out, err=printed.err)

    return run


def listing(directory="."):
    """Every path below a directory, with the bytes and the time of each file."""
    return {
        str(path): (path.read_bytes(), path.stat().st_mtime_ns) if path.is_file() else None
        for path in Path(directory).rglob("*")
    }


def refused(ended, *words, code=2):
    """Nothing on standard output, and on the other exactly one line with these words."""
    assert ended.code == code, ended
    assert ended.out == ""
    assert len(ended.err.splitlines()) == 1, ended.err
    assert ended.err.startswith("error: ")
    assert "Traceback" not in ended.err
    for word in words:
        assert word in ended.err
    return ended.err
