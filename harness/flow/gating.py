"""gate: a candidate beside the base it is to replace, judged and timed in one run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from harness.engines import build_engine, hf
from harness.errors import UsageError
from harness.flow.references import read, reference_directory
from harness.flow.running import Progress, silent
from harness.numerics.ratios import LOOKS
from harness.speed import judging
from harness.speed.judging import Gate, Limits, Measure
from harness.speed.revisions import checkout
from harness.speed.sampling import Sampler
from harness.speed.shapes import prompts_of, refuse_too_long, shapes
from harness.speed.sides import Side

_TIMEOUT = 300.0


def gate(
    golden: str | Path,
    candidate: str,
    base: str | None = None,
    *,
    base_revision: str | None = None,
    limits: Limits | None = None,
    batches: Sequence[int] = (1, 8),
    prompt: int = 128,
    new: int = 16,
    rounds: int = LOOKS[-1],
    quick: bool = False,
    reference: str | Path | None = None,
    timeout: float = _TIMEOUT,
    progress: Progress = silent,
) -> Gate:
    """May the candidate take the base's place: is it still the same model, and how fast is it beside the base?

    Each side is a process of its own, a new one each round (speed/sampling.py). The intervals of the ratios are looked
    at after numerics/ratios.LOOKS rounds, until every limit is decided.

    Args:
        golden: directory of the golden.
        candidate: SPEC.
        base: SPEC of what it is to replace; None is the candidate's own SPEC, of another revision.
        base_revision: of the repository around the working directory, where the base's code comes from.
        limits: what is asked of the speed; None only shows it.
        batches: prompts at once; each is timed.
        prompt: tokens of each prompt.
        new: tokens that are added.
        rounds: at most.
        quick: judge by the golden's quick runs only.
        reference: the golden's model, where it is not beside it.
        timeout: seconds without progress after which a side has failed.
        progress: called with a few words.

    Raises:
        UsageError: for a SPEC or a number that cannot be used.
        EngineError: when a side fails while it is timed.
    """
    if base is None and base_revision is None:
        raise UsageError("there is nothing to compare with", fix="Name a base SPEC, or a revision of the base, or both")
    if rounds < LOOKS[0]:
        raise UsageError(f"{rounds} rounds are too few to tell", fix=f"Allow {LOOKS[0]} or more")
    found = read(golden)
    model = reference_directory(found, reference)
    base = candidate if base is None else base
    # Refused before anything is started; the base's code may be another's.
    for spec in (candidate, base) if base_revision is None else (candidate,):
        build_engine(spec, model=None if model is None else str(model))
    context = None if model is None else hf.context_length(hf.load_config(str(model)).get_text_config())
    refuse_too_long(prompt, new, context, fix="Give fewer --prompt-tokens or --new-tokens")
    work = [(shape, prompts_of(found, shape)) for shape in shapes(batches, prompt=prompt, new=new)]
    with ExitStack() as stack:
        code = None if base_revision is None else stack.enter_context(checkout(base_revision))
        first, second = (
            stack.enter_context(Side(spec, model=model, checkout=where, timeout=timeout, progress=progress))
            for spec, where in ((base, code), (candidate, None))
        )
        verdict = second.check(Path(golden), model, quick=quick)
        is_same = base == candidate and base_revision is None
        result = Gate(
            golden=found.name,
            base=base if base_revision is None else f"{base} at {base_revision}",
            candidate=candidate,
            base_verdict=verdict if is_same else first.check(Path(golden), model, quick=quick),
            verdict=verdict,
        )
        # A wrong candidate is refused whatever its speed, and one look says what that would have bought.
        if not result.base_verdict["ok"] or result.verdict["exit_code"] not in (0, 1):
            return result
        looks = [look for look in LOOKS if look <= rounds] if result.verdict["ok"] else LOOKS[:1]
        settings = (first.open(), second.open())
        sampler = Sampler(first, second, settings, work, progress)
        measures: tuple[Measure, ...] = ()
        left = [shape for shape, _ in work]
        for look in looks:
            sampler.extend(look, left)
            measures = judging.kept(measures, judging.measures(sampler.rounds, limits or Limits()))
            if judging.settled(measures):
                break
            left = [shape for shape in left if shape.batch in judging.unsure(measures)]
        # Afterwards: buffers larger than the caches would count as the engines' memory.
        base_roofline, roofline = (side.roofline([shape for shape, _ in work]) for side in (first, second))
    measures = judging.limited(measures, base_roofline, roofline)
    rooflines = (base_roofline, roofline)
    return replace(result, measures=measures, rounds=sampler.count, settings=settings, rooflines=rooflines)
