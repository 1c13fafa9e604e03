"""The certificate as a value: the bugs of one golden, its precisions, and what each of these sees of each bug."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from harness.values import Status

#: How a bug is seen: by the size of its error alone; put into the model and checked; by its name, with --diagnose.
Seen = Literal["size", "tried", "name", "not"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sight:
    """What a check in one precision sees of one bug at the strength that was reported.

    Attributes:
        seen: how, or "not".
        signal: S/N: rms of what it changes over round-off; None without a template.
        z: expected of its template; None without one.
        weakest: the smallest strength of its knob that is still seen; None where none is.
        tokens: where it has a template and is not seen, the multiple of the suite's tokens from which it is named.
        needs: what is lacking for it to do anything here, words of NEEDS in suggestions.py.
        why: what was found, in words, where there is no template.
    """

    seen: Seen
    signal: float | None = None
    z: float | None = None
    weakest: float | None = None
    tokens: float | None = None
    needs: tuple[str, ...] = ()
    why: str = ""

    @property
    def known(self) -> bool:
        """Whether it is seen, or what would make it seen is known."""
        return self.seen != "not" or self.tokens is not None or bool(self.needs)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bug:
    """One bug of the catalogue, with what each precision sees of it.

    ``options`` are those that a candidate must run with for the bug to do anything: "chunk=16".
    """

    id: str
    group: str
    wrong: str
    shows: str
    options: tuple[str, ...]
    sights: Mapping[str, Sight]


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """One precision of the golden.

    Attributes:
        status: of the plain reference in that precision; the gate is of use only where it is ok.
        smallest: error in units of round-off, over all positions, that fails with a probability of CATCH; None where
            nothing was compared.
        limit: |z| beyond which a template is named; None without templates.
    """

    precision: str
    status: Status
    smallest: float | None
    limit: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificate:
    """What the gate of one golden sees.

    Attributes:
        golden: its name.
        digest: of its content, as golden.json has it; empty for one that was never stored.
        model: its name.
        model_type: in transformers.
        suite: its name.
        run: whose passes templates are of.
        views: of these passes.
        prompts, rows: of the golden.
        longest: tokens of its longest sequence.
        landmarks: lengths that the model's config names.
        columns: its precisions.
        bugs: those that a model of this type can have.
        absent: id of a bug whose part this very model lacks, with the reason.
        seconds: that making the templates took, once.
        size: bytes of the templates.
        trials: bugs that were put into the model and checked, once for each precision.
        trial_seconds: that these took, the plain reference among them.
        versions: of what it was made with.
    """

    golden: str
    digest: str
    model: str
    model_type: str
    suite: str
    run: str
    views: tuple[str, ...]
    prompts: int
    rows: int
    longest: int
    landmarks: Mapping[str, int]
    columns: tuple[Column, ...]
    bugs: tuple[Bug, ...]
    absent: Mapping[str, str]
    seconds: float
    size: int
    trials: int
    trial_seconds: float
    versions: Mapping[str, str | None]
