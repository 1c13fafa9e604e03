"""Why a bug was missed: it changes nothing, too little, nothing on these prompts, or the verdict has a hole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from harness.mutations.mutation import Active, Mutation
from harness.numerics.constants import EFFECT
from harness.power.curves import Curve
from harness.power.trial import Trial

#: From this many times round-off on a bug is to be found.
DETECTABLE = 3.0

#: What the prompts of the trials make a bug do on every host (harness/power/trials.py). Long ones are read only by
#: hosts with the context for them, and pieces of a prompt only where the bug brings the option.
AXES: frozenset[Active] = frozenset({"fp32", "decode", "prefill", "padding", "batch", "single", "second", "free"})

#: From what must be mended to what is no bug.
Reason = Literal["HOLE", "not known", "below the floor", "not active in this suite", "equivalent"]
REASONS: tuple[Reason, ...] = get_args(Reason)


@dataclass(frozen=True, kw_only=True, slots=True)
class Survivor:
    """A bug as reported that this project misses, and why.

    Attributes:
        more_tokens: times as many tokens as the suite has for even odds, at the least; None where no number of
            tokens is known to do.
        finders: eligible judges that find it.
    """

    trial: Trial
    reason: Reason
    explanation: str
    more_tokens: float | None = None
    finders: tuple[str, ...] = ()


def is_large(trial: Trial) -> bool:
    """Whether S/N or error is at least DETECTABLE; a NaN is as large as can be."""
    return any(size is not None and not size < DETECTABLE for size in (trial.signal, trial.error))


def survivor(
    trial: Trial, mutation: Mutation, *, flips: int = 0, line: Curve | None = None, finders: Sequence[str] = ()
) -> Survivor:
    """Why a bug as reported was missed, by the first rule that holds.

    1. HOLE: its S/N or its error is at least DETECTABLE, or it shows in tokens or prompts, and more tokens differ than
       of any correct implementation on the same host.
    2. Below the floor: it changes logits in float64, or, if active in 16 bits alone, its error is larger than
       round-off; with the number of tokens of `tokens_needed`.
    3. Not known: neither S/N nor error was measured.
    4. Not active in this suite: nothing changed, and the catalogue says that it needs what these prompts lack.
    5. Equivalent: nothing changed though all that it needs is there.

    Args:
        trial: of a bug that was missed.
        mutation: of the catalogue.
        flips: most tokens by which a correct implementation differs on the same host.
        line: the curve of this project, in this precision.
        finders: judges that found it.
    """
    reason, explanation, more = _reason(trial, mutation, flips, line)
    return Survivor(trial=trial, reason=reason, explanation=explanation, more_tokens=more, finders=tuple(finders))


def _reason(trial: Trial, mutation: Mutation, flips: int, line: Curve | None) -> tuple[Reason, str, float | None]:
    shown = mutation.shows != "logits" and trial.tokens > flips
    if is_large(trial) or shown:
        tokens = f", {trial.tokens} tokens differ, of correct ones at most {flips}" if shown else ""
        return "HOLE", f"HOLE: {_sizes(trial)}{tokens}", None
    signal = trial.signal or _excess(trial, mutation)
    if signal:
        more = tokens_needed(signal, line, trial.precision)
        return "below the floor", f"below the floor: S/N {signal:.2g}{_tokens_words(more)}", more
    if trial.signal is None and trial.error is None:
        return "not known", "not known: neither S/N nor error was measured", None
    if _is_half(trial, mutation):
        return "below the floor", f"below the floor: no change in float64, {_sizes(trial)}", None
    lacking = sorted(mutation.active - _axes(trial, mutation))
    if lacking:
        return "not active in this suite", f"not active in this suite: needs {', '.join(lacking)}", None
    return "equivalent", "equivalent: no change in float64 logits and in tokens", None


def _sizes(trial: Trial) -> str:
    known = (("S/N", trial.signal), ("error", trial.error))
    return ", ".join(f"{name} {size:.3g}" for name, size in known if size is not None) or "no logits measured"


def _excess(trial: Trial, mutation: Mutation) -> float:
    """What its error has beyond round-off, where float64 cannot show it; independent errors add as squares."""
    unseen = trial.signal is None or _is_half(trial, mutation)
    return math.sqrt(max(0.0, trial.error**2 - 1)) if unseen and trial.error is not None else 0.0


def _is_half(trial: Trial, mutation: Mutation) -> bool:
    """Whether it is active in 16 bits alone, and was run in them."""
    return "half" in mutation.active and trial.precision != "float32"


def _axes(trial: Trial, mutation: Mutation) -> frozenset[str]:
    """What was there to make the bug do anything."""
    half = {"half"} if trial.precision != "float32" else set()
    return AXES | half | {name for name, _ in mutation.options}


def tokens_needed(signal: float, line: Curve | None, precision: str) -> float | None:
    """Times as many tokens as the suite has with which this S/N would have even odds; at the least.

    The squared error of n independent rows has a mean of 1 + s^2 in units of round-off and a spread of sqrt(2 / n), so
    that it shows from s^2 = z sqrt(2 / n) on: n grows as 1 / s^4. What z and the independent rows are is read off
    the S/N of even odds that was measured. Rows are not independent, and the scatter between families of correct
    implementations does not shrink with n, so more are needed rather than fewer.

    None where no number of tokens is known to do: without a point of even odds, and below s = sqrt(EFFECT^2 - 1), from
    which on an error is EFFECT times as large as round-off, the least that fails by its size. Signed statistics have
    no such limit. 1 where the odds were even or better, and chance decided.
    """
    if line is None or not 0 < line.even.value < math.inf:
        return None
    if signal >= line.even.value:
        return 1.0
    if signal < math.sqrt(EFFECT[precision] ** 2 - 1):
        return None
    return (line.even.value / signal) ** 4


def _tokens_words(more: float | None) -> str:
    if more is None:
        return ", no number of tokens is known to show it"
    return ", odds were even or better" if more <= 1 else f", even odds at {more:.2g} x as many tokens or more"
