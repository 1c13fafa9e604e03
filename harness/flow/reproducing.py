"""reproduce: the smallest case in which a candidate fails, written as a script and a test that need no harness."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.comparison.context import declared_precision
from harness.engines import Engine
from harness.engines.spec import parse_spec
from harness.errors import EngineError
from harness.flow.candidates import engine_of, name_of
from harness.flow.checking import check
from harness.flow.references import read, reference_directory
from harness.flow.running import silent
from harness.repro.cases import Kind
from harness.repro.finding import Found, smallest_failing
from harness.repro.judging import Judge
from harness.repro.recipes import OF_RANKS, Recipe, recipe_of, refusal
from harness.repro.roundoff import Ruler
from harness.repro.writing import Written, must_be_ours, write
from harness.values import Finding, Golden, Status, Verdict

Progress = Callable[[str], None]

#: Seconds that are spent on shrinking unless the caller says otherwise; then the best case so far is taken.
SECONDS = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Reproduction:
    """What came of it: a case and the directory it was written to, or the reason why there is none."""

    found: Found | None = None
    written: Written | None = None
    reason: str = ""
    unfilled: bool = False

    @property
    def runs(self) -> bool:
        """Whether the script was run in a process of its own and failed as promised."""
        return self.written is not None and self.written.code == 1

    def __str__(self) -> str:
        if self.found is None or self.written is None:
            return f"no case was written: {self.reason}"
        small = f"the smallest failing case: {self.found.case.words}"
        time_up = "" if self.found.finished else " (time was up: a smaller one may be there)"
        said = "Fill in build() in repro.py, then run it." if self.unfilled else self.written.words
        return f"{small}{time_up}; written to {self.written.directory}. {said}"


def reproduce(
    golden: Golden | str | Path,
    candidate: Any,
    out: str | Path,
    *,
    verdict: Verdict | None = None,
    reference: str | Path | None = None,
    copy_model: bool = False,
    seconds: float = SECONDS,
    progress: Progress = silent,
) -> Reproduction:
    """Shrink a failure, and write it to ``out`` as a script and a test.

    Args:
        golden: a golden, or the directory of one.
        candidate: a SPEC, a transformers model, an nn.Module or a callable.
        out: a directory that is not there, or one that was written here before, which is replaced.
        verdict: on the candidate; made here where it is None, of the quick runs where these fail.
        reference: directory of the golden's model, where it does not lie beside the golden.
        copy_model: put a copy of a small model into the directory.
        seconds: after which the best case so far is taken.
        progress: called with a few words.

    Raises:
        HarnessError: for input that cannot be used. A failure of which no case can be written is a reason.
    """
    golden, out = read(golden), Path(out)
    must_be_ours(out)
    if verdict is None:
        verdict = check(golden, candidate, reference=reference, quick=True, progress=progress)
        if verdict.ok:
            verdict = check(golden, candidate, reference=reference, progress=progress)
    kinds = _kinds(verdict)
    if isinstance(kinds, str):
        return Reproduction(reason=kinds)
    if isinstance(candidate, str) and parse_spec(candidate).engine in ("tp", "pp"):
        return Reproduction(reason=OF_RANKS)  # before its processes are started
    directory = reference_directory(golden, reference)
    if directory is None:
        return Reproduction(reason="the golden's model is not at hand: name it with --reference")

    def opener() -> Engine:
        return engine_of(candidate, directory, progress)

    try:
        with opener() as engine:
            reason = refusal(engine)
            if reason:
                return Reproduction(reason=reason)
            dtype = declared_precision(engine.settings)
            widened = dtype != "float32" and "upcast" in engine.capabilities and _is_function(verdict)
            cast = dtype if dtype in golden.centres else None
            recipe = recipe_of(engine, widened=widened, cast=cast)
    except EngineError as error:
        return Reproduction(reason=f"the candidate cannot be opened: {error.problem}")
    judged = "float32" if widened else dtype
    if judged not in golden.floors:
        return Reproduction(reason=f"the golden has no floor for {judged}, so no small case can be judged")
    ruler = Ruler(str(directory), precision=golden.precision, dtype=judged, weights=cast, vocabulary=golden.vocabulary)
    with ruler, Judge(opener, ruler, widened=widened) as judge:
        found = smallest_failing(
            golden, judge, dtype=judged, declared=dtype, kinds=kinds, seconds=seconds, progress=progress
        )
    if found is None:
        return Reproduction(reason=_spread_out(verdict))
    progress("writing the case, and running it")
    return _written(golden, candidate, out, found, recipe, directory, copy_model)


def _written(
    golden: Golden, candidate: Any, out: Path, found: Found, recipe: Recipe, directory: Path, copy_model: bool
) -> Reproduction:
    written = write(
        out,
        found,
        recipe,
        golden=golden.name,
        candidate=name_of(candidate),
        reference=directory,
        copy_model=copy_model,
    )
    return Reproduction(found=found, written=written, unfilled=recipe.source == "object")


def _kinds(verdict: Verdict) -> tuple[Kind, ...] | str:
    """The failures to look for, the worst first; in words, why there is none that token ids show."""
    if verdict.ok:
        return f"the verdict is {verdict.status.value}, so nothing fails"
    by_status: list[tuple[Kind, Callable[[Finding], bool]]] = [
        ("raises", lambda one: one.status is Status.ERROR),
        ("finite", lambda one: one.status is Status.STRUCTURAL and one.check == "finite"),
        ("logits", lambda one: one.status is Status.DEVIATES),
        ("repeat", lambda one: one.status is Status.NONDETERMINISTIC),
    ]
    kinds = tuple(kind for kind, fits in by_status if any(fits(one) for one in verdict.failures))
    # Where the structure is wrong no number was compared, so none is known to be right either.
    if kinds:
        return kinds
    first = verdict.failures[0].message if verdict.failures else verdict.status.value
    return f"no token ids show this failure: {first}"


def _is_function(verdict: Verdict) -> bool:
    """Whether the float32 copy fails too, where round-off hides nothing."""
    return any(one.question == "function" for one in verdict.failures)


def _spread_out(verdict: Verdict) -> str:
    """Why no small case is there, with the finding that is."""
    first = next(iter(verdict.failures), None)
    said = "" if first is None else f" ({first.message})"
    return f"no position of a few prompts fails by itself: what fails is seen over many of them together{said}"
