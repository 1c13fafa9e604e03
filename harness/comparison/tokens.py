"""Tokens: a flip inside the step's own noise is a tie and excused; any other is a bug (numerics.md 2.6).

Every token is judged on the prefix that it was chosen on: the golden's, or behind an excused flip the
candidate's own, which the live reference has then rescored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from harness.comparison.context import Context, pass_name, request_name
from harness.numerics import bounds, metrics
from harness.numerics.constants import (
    ALPHA_TOKENS,
    CATCH,
    DEFICIT_CLIP,
    EFFECT,
    MAX_SMALLEST,
    MIN_COVERAGE,
)
from harness.numerics.moments import entry_ratios
from harness.values import Finding, Generation, Golden, Level, Pass, Rows, Status, Trace

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

#: Margins of golden steps are sorted into this many bins, to see how noise depends on them.
_BINS = 6

#: Two entries of a step have one difference, whose largest over a suite has a far heavier tail than that of the five
#: which the replicas are measured on.
_FEWEST_ENTRIES = 3


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Tokens of one pass or of many, each with what the reference says on the very prefix it was chosen on.

    Attributes:
        name: for people.
        request, step: which prompt, and which step of its continuation, [n].
        gap: how far below its best the reference puts the token, in logits, [n]; a lower bound where not ``known``.
        known: whether the token is among the reference's stored top entries, [n].
        flipped: whether it is another token than the reference's best, [n].
        noise: round-off of a logit difference there, [n].
        ceiling: the most that this round-off may be, [n]: more than ``noise`` where no replica has been.
        top_logits: the reference's highest logits, best first, [n, T].
        entry: error ratio among the top entries where the candidate shows these alone, else NaN, [n].
    """

    name: str
    request: Int64
    step: Int64
    gap: Float64
    known: NDArray[np.bool_]
    flipped: NDArray[np.bool_]
    noise: Float64
    ceiling: Float64
    top_logits: Float64
    entry: Float64

    def __len__(self) -> int:
        return len(self.gap)

    @cached_property
    def share(self) -> Float64:
        """Each token's distance from the reference's best, in units of the largest noise it may have, [n]."""
        return self.gap / np.maximum(self.ceiling, np.finfo(np.float32).tiny)

    @cached_property
    def margin(self) -> Float64:
        """The reference's own top-1 less top-2, [n]."""
        return metrics.margins(self.top_logits.astype(np.float32))

    def flip_probability(self, times: float = 1.0) -> Float64:
        """Probability that noise of ``times`` its size turns the step: the sum over rivals of Phi(-gap / s), [n]."""
        from scipy import special

        scale = np.maximum(self.noise, np.finfo(np.float32).tiny)[:, None] * times
        rivals = (self.top_logits[:, :1] - self.top_logits[:, 1:]) / scale
        probability: Float64 = np.minimum(special.ndtr(-rivals).sum(axis=1), 1.0)
        return probability

    def tie_depth(self) -> tuple[float, float]:
        """Mean and variance of the sum of clipped margins that independent ties give."""
        from scipy import special

        scale = np.maximum(self.noise, np.finfo(np.float32).tiny)[:, None]
        gaps = (self.top_logits[:, :1] - self.top_logits[:, 1:]) / scale
        probability, depth = special.ndtr(-gaps), np.minimum(gaps, DEFICIT_CLIP)
        return float((probability * depth).sum()), float((probability * depth**2).sum())


def join(parts: Sequence[Steps], name: str) -> Steps:
    """Steps of several passes as one."""
    fields = ("request", "step", "gap", "known", "flipped", "noise", "ceiling", "top_logits", "entry")
    return Steps(name=name, **{field: np.concatenate([getattr(part, field) for part in parts]) for field in fields})


# --- which tokens there are ------------------------------------------------------------------------


def forced_steps(context: Context, one: Pass) -> Steps:
    """The greedy tokens of a pass on the golden's own prefixes."""
    assert one.rows is not None
    place = context.place(one.rows)[one.rows.generated]
    step_of = np.where(context.golden.rows.generated, np.cumsum(context.golden.rows.generated) - 1, -1)
    index = step_of[place].astype(np.int64)
    return _on_golden(context, index, one.rows.argmax[one.rows.generated].astype(np.int64), pass_name(one))


def free_steps(context: Context, one: Pass) -> tuple[Steps, int]:
    """(the tokens of free continuations up to and behind their first divergence, how many could not be judged).

    Up to and with a first divergence the prefix is the golden's. Behind it the reference must have been asked.
    """
    index: list[int] = []
    token: list[int] = []
    entries = _Entries()
    behind: list[Steps] = []
    unjudged = 0
    for request, given in zip(one.requests, one.generations, strict=True):
        expected = context.golden.generations[request].tokens
        common = min(len(expected), len(given.tokens))
        first = next((i for i in range(common) if given.tokens[i] != expected[i]), common)
        # The step of the divergence itself has the golden's prefix, if the golden has a step there at all.
        until = min(first + 1, common)
        index += [context.first_step(request) + i for i in range(until)]
        token += list(given.tokens[:until])
        entries.add(given, 0, until)
        rest = len(given.tokens) - until
        rescored = _rescored(context, request, given, until, pass_name(one)) if rest else None
        if rescored is not None:
            behind.append(rescored)
        unjudged += rest if rescored is None else 0
    own = _on_golden(context, np.array(index, dtype=np.int64), np.array(token, dtype=np.int64), pass_name(one), entries)
    return join([own, *behind], pass_name(one)), unjudged


class _Entries:
    """Top entries that a candidate shows of its steps; none where it shows tokens alone."""

    def __init__(self) -> None:
        self._ids: list[tuple[int, ...]] = []
        self._logits: list[tuple[float, ...]] = []

    def add(self, given: Generation, start: int, stop: int) -> None:
        self._ids += given.top_ids[start:stop]
        self._logits += given.top_logits[start:stop]

    def ratios(self, centre: Rows, step: Int64, noise: Float64) -> Float64:
        """Error ratio of each step; NaN where not every step shows its entries, or too few of them."""
        lengths = set(map(len, self._ids))
        if not len(step) or len(self._ids) != len(step) or len(lengths) != 1 or min(lengths) < _FEWEST_ENTRIES:
            return np.full(len(step), np.nan)
        ids, logits = np.array(self._ids, dtype=np.int32), np.array(self._logits, dtype=np.float32)
        return entry_ratios(ids, logits, centre, step, noise)


def own_steps(context: Context, name: str) -> Steps:
    """The tokens of a golden whose continuations are the candidate's own: the reference's choice is its best entry."""
    token = _golden_tokens(context.golden)
    return _on_golden(context, np.arange(len(token)), token, name, is_own=True)


def _on_golden(
    context: Context, index: Int64, token: Int64, name: str, entries: _Entries | None = None, *, is_own: bool = False
) -> Steps:
    centre, golden, floor = context.centre, context.golden, context.floor
    request = golden.rows.request[golden.rows.generated][index].astype(np.int64)
    firsts = np.array([context.first_step(i) for i in range(len(golden.requests))], dtype=np.int64)
    ids, logits = centre.top_ids[index], centre.top_logits[index]
    noise = np.zeros(len(index)) if floor is None else floor.pair[index].astype(np.float64)
    # The golden's own token is the reference's choice, also where two logits tie to the last bit.
    chosen = ids[:, 0] if is_own else _golden_tokens(golden)[index]
    return Steps(
        name=name,
        request=request,
        step=index - firsts[request],
        gap=metrics.deficit(ids, logits, token),
        known=(ids == token[:, None]).any(axis=1),
        flipped=(token != chosen) & (token != ids[:, 0]),
        noise=noise,
        ceiling=noise,
        top_logits=logits.astype(np.float64),
        entry=(entries or _Entries()).ratios(centre, index, noise),
    )


def _golden_tokens(golden: Golden) -> Int64:
    """The golden's token of every generated step, [G]."""
    return np.array([token for given in golden.generations for token in given.tokens], dtype=np.int64)


def _rescored(context: Context, request: int, given: Generation, start: int, name: str) -> Steps | None:
    """Tokens from ``start`` on, as the live reference sees them on the candidate's own prefix."""
    free, tokens = context.scoring.free, given.tokens
    key = (request, tokens)
    if free is None or key not in context.scoring.continuations:
        return None
    number = context.scoring.continuations.index(key)
    mine = np.flatnonzero(free.request[free.generated] == number)[start:]
    ids, logits = free.top_ids[mine], free.top_logits[mine]
    token = np.array(tokens[start:], dtype=np.int64)
    noise, ceiling = _noise_elsewhere(context, request, metrics.margins(logits))
    entries = _Entries()
    entries.add(given, start, len(tokens))
    return Steps(
        name=name,
        request=np.full(len(token), request, dtype=np.int64),
        step=np.arange(start, len(tokens), dtype=np.int64),
        gap=metrics.deficit(ids, logits, token),
        known=(ids == token[:, None]).any(axis=1),
        flipped=token != ids[:, 0],
        noise=noise,
        ceiling=ceiling,
        top_logits=logits.astype(np.float64),
        entry=entries.ratios(free, mine, noise),
    )


def _noise_elsewhere(context: Context, request: int, margin: Float64) -> tuple[Float64, Float64]:
    """(noise, largest noise) of steps that no replica has visited: the prompt's own, by how it depends on the margin.

    Noise is a matter of the prompt (docs/decisions/0007-noise-by-prompt.md), and grows with how spread the
    logits are: the prompt's root mean square noise is scaled by that of golden steps of a similar margin. Single
    steps differ by more, so a single token is judged by the largest such ratio of all golden steps.
    """
    floor, golden = context.floor, context.golden
    if floor is None:
        return np.zeros(len(margin)), np.zeros(len(margin))
    of_prompt = golden.rows.request[golden.rows.generated]
    square = floor.pair.astype(np.float64) ** 2
    counts = np.maximum(np.bincount(of_prompt, minlength=len(golden.requests)), 1)
    mean = np.bincount(of_prompt, weights=square, minlength=len(golden.requests)) / counts
    golden_margin = metrics.margins(context.centre.top_logits)
    edges = np.quantile(golden_margin[np.isfinite(golden_margin)], np.arange(1, _BINS) / _BINS)
    bins, own = np.searchsorted(edges, golden_margin), np.searchsorted(edges, margin)
    relative = square / np.maximum(mean[of_prompt], np.finfo(np.float64).tiny)
    sizes = np.maximum(np.bincount(bins, minlength=_BINS), 1)
    factor = np.bincount(bins, weights=relative, minlength=_BINS) / sizes
    noise: Float64 = np.sqrt(mean[request] * factor[own])
    return noise, np.maximum(noise, np.sqrt(mean[request] * relative.max()))


def diverged(golden: Golden, trace: Trace) -> list[tuple[int, tuple[int, ...]]]:
    """(request, tokens) of free continuations that go on behind a first divergence: what the scorer is asked."""
    found = []
    for one in trace.passes:
        for request, given in zip(one.requests, one.generations, strict=False):
            expected = golden.generations[request].tokens
            common = min(len(expected), len(given.tokens))
            first = next((i for i in range(common) if given.tokens[i] != expected[i]), common)
            inside = all(0 <= token < golden.vocabulary for token in given.tokens)
            if len(given.tokens) > min(first + 1, common) and inside and (request, given.tokens) not in found:
                found.append((request, given.tokens))
    return found


# --- what is said about them ----------------------------------------------------------------------


def check(context: Context) -> list[Finding]:
    """Judge every token of every pass: T1 each by itself, T2 how many flips, T3 how deep they are."""
    forced = [forced_steps(context, one) for one in context.trace.passes if one.rows is not None]
    free, unjudged = every_free(context)
    every = [steps for steps in (*forced, *free) if len(steps)]
    if context.floor is None:
        return _without_floor(context, every)
    found = [finding for steps in every for finding in _ties(context, steps)]
    for name, parts in (("forced tokens", forced), ("free tokens", free)):
        if parts and sum(map(len, parts)):
            # Where continuations could not be followed to their ends the rest is no fair part of them: ties that end
            # a shared prefix are in it, and the sure steps behind are not.
            found += _diffuse(context, join(parts, name), len(parts), whole=parts is forced or not unjudged)
    if unjudged and not forced:
        found.append(
            Finding(
                status=Status.UNMEASURED,
                check="tokens",
                question=context.question,
                message=f"{unjudged} free tokens behind a first divergence, and {_why_not(context)}",
                fix="Name the reference with --reference, or give the suite a run with the view replay",
            )
        )
    return [*found, *_coverage(context, every)]


def judge_own(context: Context, steps: Steps, passes: int) -> list[Finding]:
    """T1, T2 and T3 of the candidate's own continuations, as `own_steps` gives them.

    ``passes`` are the runs that they are of, which flip the same steps.
    """
    if context.floor is None:
        return _without_floor(context, [steps])
    found = [*_ties(context, steps), *_diffuse(context, steps, passes, whole=True)]
    return [*found, *_coverage(context, [steps])]


def every_free(context: Context) -> tuple[list[Steps], int]:
    """`free_steps` of all passes."""
    pairs = [free_steps(context, one) for one in context.trace.passes if one.view == "generate"]
    return [steps for steps, _ in pairs], sum(left for _, left in pairs)


def level(context: Context) -> Level:
    """What the candidate shows, the best of it."""
    if any(one.rows is not None and len(one.rows) for one in context.trace.passes):
        return "logits"
    generations = [given for one in context.trace.passes for given in one.generations]
    if any(given.top_ids for given in generations):
        return "top entries"
    return "tokens" if generations else "nothing"


def _why_not(context: Context) -> str:
    return context.scoring.reason or "the live reference was not asked"


def _without_floor(context: Context, every: Sequence[Steps]) -> list[Finding]:
    flipped = sum(int(steps.flipped.sum()) for steps in every)
    if not flipped:
        return []
    return [
        Finding(
            status=Status.UNMEASURED,
            check="tokens",
            question=context.question,
            message=f"{flipped} tokens differ, and the golden has no floor for {context.precision} to judge them by",
            fix="Record the golden with this precision, or check in one that it has",
        )
    ]


def _ties(context: Context, steps: Steps) -> list[Finding]:
    """T1: no token lies further below the reference's best than noise can lift it."""
    flipped = np.flatnonzero(steps.flipped)
    if not len(flipped):
        return []
    share = steps.share[flipped]
    worst = int(flipped[np.argmax(share)])
    wrong = flipped[~(share <= context.tie)]
    why = f"the reference's own noise there is {steps.noise[worst]:.2g}; {context.tie:.1f} x that can be chance"
    if len(wrong):
        first = wrong[np.lexsort((steps.step[wrong], steps.request[wrong]))[0]]
        return [
            Finding(
                status=Status.DEVIATES,
                check="tokens",
                question=context.question,
                message=f"{len(wrong)} of {len(flipped)} differing tokens are no ties; "
                f"worst margin {steps.gap[worst]:.2g}, the first at {_place(context, steps, first)}",
                where=f"{steps.name}, {_place(context, steps, worst)}",
                measured=float(steps.share[worst]),
                allowed=context.tie,
                why=why,
                fix="The reference clearly prefers another token on the same prefix",
            )
        ]
    if not steps.known[flipped].all():
        return [
            Finding(
                status=Status.UNMEASURED,
                check="tokens",
                question=context.question,
                message=f"{int((~steps.known[flipped]).sum())} differing tokens are not among the "
                f"{steps.top_logits.shape[1]} best that are kept: how far away they are is not known",
                where=f"{steps.name}, {_place(context, steps, worst)}",
                fix="Check logits too (the replay view), or record on prompts that the model is surer of",
            )
        ]
    listed = ", ".join(
        f"{_place(context, steps, int(i))} (margin {steps.gap[i]:.2g}, noise {steps.noise[i]:.2g})"
        for i in flipped[np.argsort(-share)][:3]
    )
    return [
        Finding(
            status=Status.DRIFT,
            check="tokens",
            question=context.question,
            message=f"{len(flipped)} differing tokens, all excused ties; widest: {listed}",
            where=steps.name,
            measured=float(steps.share[worst]),
            allowed=context.tie,
            why=why,
        )
    ]


def _place(context: Context, steps: Steps, index: int) -> str:
    return f"prompt {request_name(context.golden, int(steps.request[index]))!r} step {int(steps.step[index])}"


def _diffuse(context: Context, steps: Steps, passes: int, *, whole: bool) -> list[Finding]:
    """T2 and T3: ties that are each excused, but too many of them, or too deep on the whole."""
    found = []
    flips = int(steps.flipped.sum())
    limit, why = _flips_limit(context, steps, passes)
    if flips > limit:
        found.append(
            Finding(
                status=Status.DEVIATES,
                check="flips",
                question=context.question,
                message=f"{flips} of {len(steps)} tokens differ, more than ties explain",
                where=steps.name,
                measured=float(flips),
                allowed=limit,
                why=why,
                fix="Compare logits (the replay view), first in float32",
            )
        )
    return [*found, *_depth(context, steps, passes)] if whole else found


def _flips_limit(context: Context, steps: Steps, passes: int) -> tuple[float, str]:
    """(most flips that are chance and below the effect size, why).

    ``passes`` show the same steps again and flip the same ones: they count as one set of steps, the flips of
    which come ``passes`` at a time.
    """
    probability = steps.flip_probability()
    expected, variance = float(probability.sum()), float((probability * (1 - probability)).sum())
    assert context.floor is not None
    replicas = _as_shown(context, steps, context.floor.moments.flips)
    count = len(replicas)
    if count:
        expected = max(expected, float(replicas.mean()))
    # The replicas' own count already comes ``passes`` at a time.
    variance = max(variance * passes, expected * passes, float(replicas.var(ddof=1)) if count > 1 else 0.0)
    limit = max(
        bounds.flips_limit(expected, variance, ALPHA_TOKENS / 8),
        EFFECT[context.precision] * expected,
        float(replicas.max()) if count else 0.0,
    )
    return limit, (
        f"{expected:.1f} are expected from margins and round-off, with a variance of {variance:.1f}; the quantile for "
        f"rate {ALPHA_TOKENS / 8:.2g}, and at least {EFFECT[context.precision]:g} x the expected"
    )


def _as_shown(context: Context, steps: Steps, moment: NDArray[np.float32]) -> Float64:
    """A sum over each prompt's steps [K, P], of each replica as if it had shown these steps, [K]."""
    tokens = np.array([max(1, len(given.tokens)) for given in context.golden.generations], dtype=np.float64)
    replicas: Float64 = moment.astype(np.float64) @ (np.bincount(steps.request, minlength=len(tokens)) / tokens)
    return replicas


def _depth(context: Context, steps: Steps, passes: int) -> list[Finding]:
    """T3: the clipped margins of all tokens together, against those of the replicas and of ties alone.

    Flips are rare and some are deep, so the sum has a heavy tail, which 24 replicas cannot show: besides what these
    allow, it must exceed what Bernstein's inequality allows for independent ties (numerics/bounds.py).
    """
    assert context.floor is not None
    replicas = _as_shown(context, steps, context.floor.moments.deficit)
    value = float(np.minimum(np.where(steps.flipped, steps.share, 0.0), DEFICIT_CLIP).sum())
    # Without a single flip among the replicas there is nothing to hold it against, and T1 speaks alone.
    if not replicas.any():
        return []
    mean, variance = steps.tie_depth()
    mean, variance = max(mean, float(replicas.mean())), max(variance * passes, float(replicas.var(ddof=1)))
    spread = bounds.spread_of(replicas, context.floor.effective, 0.0)
    alpha = ALPHA_TOKENS / 8
    bound = bounds.signed_bound(replicas, spread, alpha=2 * alpha, tests=1)
    ties = mean + bounds.bernstein(variance, DEFICIT_CLIP * passes, alpha)
    limit = max(bound.failing[1], EFFECT[context.precision] * float(replicas.max()), ties)
    if value <= limit:
        return []
    return [
        Finding(
            status=Status.DEVIATES,
            check="depth of flips",
            question=context.question,
            message=f"differing tokens lie {value:.3g} x the noise below the reference's best, all in all",
            where=steps.name,
            measured=value,
            allowed=limit,
            why=f"{len(steps)} tokens; ties give {mean:.2g}, and up to {ties:.3g} at rate {alpha:.2g}; replicas up to "
            f"{replicas.max():.3g}, of which {EFFECT[context.precision]:g} x is allowed",
            fix="Compare logits (the replay view), first in float32",
        )
    ]


def _coverage(context: Context, every: Sequence[Steps]) -> list[Finding]:
    """Tokens alone say nothing where most steps are ties."""
    if level(context) != "tokens" or not every:
        return []
    steps = join(list(every), "all tokens")
    share = float((steps.margin > context.tie * steps.noise).mean())
    smallest = smallest_caught(context, steps)
    found = []
    if share < MIN_COVERAGE:
        found.append(
            Finding(
                status=Status.UNMEASURED,
                check="coverage",
                question=context.question,
                message=f"only {share:.1%} of the steps are decidable in {context.precision}: tokens alone cannot tell",
                measured=share,
                allowed=MIN_COVERAGE,
                why="a step is decidable when the reference's margin exceeds what noise can turn",
                fix="Let the engine show logits or top log-probabilities, or take prompts that the model is surer of",
            )
        )
    if smallest is None or smallest > MAX_SMALLEST:
        said = "no error at all is sure to be seen" if smallest is None else f"an error of {smallest:.3g} x is not seen"
        found.append(
            Finding(
                status=Status.UNMEASURED,
                check="power",
                question=context.question,
                message=f"too few tokens: {said}",
                measured=smallest,
                allowed=MAX_SMALLEST,
                why="the smallest error, in units of round-off, that fails with a probability of 99 %",
                fix="Check more tokens, or let the engine show logits or top log-probabilities",
            )
        )
    return found


def smallest_caught(context: Context, steps: Steps) -> float | None:
    """Smallest error, in units of round-off, that tokens alone would have failed with probability CATCH.

    It adds to the noise of every step, which then turns more of them (T2) or one too far (T1).
    """
    limit, _ = _flips_limit(context, steps, 1)
    low, high = 0.0, 2.0**20
    if _miss(context, steps, high, limit) > 1 - CATCH:
        return None
    while high > low * 2 or high - low > 1 / 2**6:
        middle = (low + high) / 2
        if _miss(context, steps, middle, limit) > 1 - CATCH:
            low = middle
        else:
            high = middle
    return high


def _miss(context: Context, steps: Steps, size: float, limit: float) -> float:
    """Probability that an error of ``size`` times round-off, independent at each step, stays unseen."""
    from scipy import special, stats

    times = float(np.sqrt(1 + size**2))
    probability = steps.flip_probability(times)
    few = float(stats.poisson.cdf(limit, probability.sum()))
    scale = np.maximum(steps.noise, np.finfo(np.float32).tiny)[:, None] * times
    gaps = steps.top_logits[:, :1] - steps.top_logits[:, 1:]
    # A rival beyond the limit of a tie, lifted to the top, is seen at once.
    far = np.where(gaps > context.tie * steps.noise[:, None], special.ndtr(-gaps / scale), 0.0).sum(axis=1)
    unseen = float(np.exp(np.log1p(-np.minimum(far, 1 - np.finfo(np.float64).eps)).sum()))
    return min(few, unseen)


# --- for the report -----------------------------------------------------------------------------------


def count(context: Context, one: Pass) -> int:
    """Generated steps that a pass shows tokens of."""
    if one.rows is None:
        return sum(len(given.tokens) for given in one.generations)
    return int(one.rows.generated.sum())


def flips(context: Context, one: Pass) -> int:
    """Steps at which the candidate's greedy token is another one than the golden's.

    A free run is compared place by place, so this also counts what follows a first divergence.
    """
    if one.rows is not None:
        return int(forced_steps(context, one).flipped.sum())
    return sum(
        _differing(context.golden.generations[index].tokens, given)
        for index, given in zip(one.requests, one.generations, strict=True)
    )


def _differing(expected: tuple[int, ...], given: Generation) -> int:
    same = sum(a == b for a, b in zip(expected, given.tokens, strict=False))
    return max(len(expected), len(given.tokens)) - same
