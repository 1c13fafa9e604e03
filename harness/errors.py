"""What users can get wrong. Each error says what is wrong, where, and how to fix it, in one line."""

from __future__ import annotations


class HarnessError(Exception):
    """Bad input or a failed engine: one clear line, and the exit code that a command ends with."""

    exit_code = 2

    def __init__(self, problem: str, *, fix: str, details: str = "") -> None:
        super().__init__(f"{_one_line(problem)}. {_one_line(fix)}")
        self.problem = problem
        self.fix = fix
        #: Lines that follow, such as the traceback of another process; "" for none.
        self.details = details


class UsageError(HarnessError):
    """An unknown engine, key, value or path on the command line or in a call."""


class SuiteError(HarnessError):
    """A suite file that cannot be used, or a prompt that does not fit the model."""


class ModelError(HarnessError):
    """A model directory that is missing, unreadable, or not a causal language model."""


class GoldenError(HarnessError):
    """A golden that is missing, damaged or hostile."""


class TraceError(HarnessError):
    """A trace file that is missing, damaged or hostile."""


class StaleError(HarnessError):
    """A golden of another suite or another model than the one at hand."""

    exit_code = 3


class EngineError(HarnessError):
    """The engine failed while running."""

    exit_code = 4


def first_line(error: BaseException, otherwise: str | None = None) -> str:
    """The first line of an error's message; without a message ``otherwise``, or the name of its class."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else otherwise or type(error).__name__


def _one_line(text: str) -> str:
    return " ".join(text.split()).rstrip(".")
