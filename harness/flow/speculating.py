"""A reference that is larger than memory, recorded: exact greedy tokens from few passes, their rows, and the floors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness import answers
from harness.engines import Engine
from harness.engines.spec import parse_spec
from harness.engines.streaming import engine as streaming
from harness.engines.streaming import hidden, speculative
from harness.errors import ModelError, TraceError, UsageError
from harness.flow.candidates import engine_of
from harness.reference import Observed
from harness.replicas import streamed_floor
from harness.traces import SUFFIX, load_trace, save_trace
from harness.values import Floor, Generation, Golden, Pass, Request, Rows, Trace

Notify = Callable[[str], None]

LOOK_UP = "lookup"
_ROUNDS = f"rounds{SUFFIX}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Streamed:
    """What was observed, and how: passes over the weights, and of each text how often the draft was wrong."""

    observed: Observed
    rounds: int
    mistakes: tuple[int, ...]


def observe_streamed(
    engine: streaming.StreamEngine,
    requests: Sequence[Request],
    *,
    draft: str | Golden,
    stop_ids: frozenset[int],
    precisions: Sequence[str],
    replicas: int,
    progress: Notify,
) -> Streamed:
    """As reference.observe, of a model that is streamed.

    Args:
        engine: open; its precision is the reference's.
        requests: the prompts.
        draft: ``lookup``, the SPEC of an engine, a file (a trace of free continuations, or answers in JSON lines), or
            a golden.
        stop_ids: ids that end a text.
        precisions: those that get a floor, where their cast of the checkpoint is exact and the reference fine enough.
        replicas: variants drawn for each.
        progress: called with a few words.

    Raises:
        HarnessError: for a draft that cannot be used, or logits that are not finite.
    """
    directory = None if engine.options.work is None else Path(engine.options.work)
    work = streaming.digest_of([[list(one.prompt_ids), one.max_new_tokens] for one in requests], sorted(stop_ids))
    state = _resumed(directory, work, requests)

    def score(asked: Sequence[Request], had: Sequence[Sequence[int]]) -> Rows:
        sequences = [(*request.prompt_ids, *tokens) for request, tokens in zip(asked, had, strict=True)]
        return engine.score(sequences, [len(one.prompt_ids) for one in asked], keep=True)[0]

    engine.progress = progress
    if not state.is_done:
        with _draft(draft, engine, stop_ids, progress) as proposes:
            while not state.is_done:
                state = speculative.advance(state, requests, proposes, score, stop_ids)
                _commit(directory, work, state, engine.vocabulary)
                _use_up(directory)
                wrong = sum(state.mistakes)
                progress(f"round {state.rounds}: {sum(state.ended)} of {len(requests)} whole, {wrong} mistakes")
    generations, rows = speculative.result(state, stop_ids, engine.vocabulary)
    floors, left_out = _floors(engine, requests, generations, rows, precisions, replicas, progress)
    if directory is not None:
        (directory / _ROUNDS).unlink(missing_ok=True)
        for place in (directory, *(directory / name for name in precisions)):
            hidden.forget(place)
    precision = str(engine.settings["dtype"])
    observed = Observed(
        generations=generations,
        rows=rows,
        precision=precision,
        precision_reason="" if precision == "float64" else "the model is streamed, a block in memory at a time",
        centres={},
        floors=floors,
        directions={},
        left_out=left_out,
    )
    return Streamed(observed=observed, rounds=state.rounds, mistakes=state.mistakes)


def _floors(
    engine: streaming.StreamEngine,
    requests: Sequence[Request],
    generations: Sequence[Generation],
    rows: Rows,
    precisions: Sequence[str],
    replicas: int,
    progress: Notify,
) -> tuple[dict[str, Floor], dict[str, str]]:
    """Round-off in each precision that can be measured so, and why not in the others."""
    floors: dict[str, Floor] = {}
    left_out: dict[str, str] = {}
    native, reference = engine.settings["native_dtype"], engine.settings["dtype"]
    sequences = [(*one.prompt_ids, *given.tokens) for one, given in zip(requests, generations, strict=True)]
    for dtype in precisions:
        if dtype not in (native, "float32"):
            left_out[dtype] = f"a cast of {native} weights to it is not exact, and its centre is not streamed"
        elif dtype == "float32" and reference != "float64":
            left_out[dtype] = f"a {reference} reference is too coarse for it"
        else:
            progress(f"{dtype}: {replicas} replicas in one pass")
            work = None if engine.options.work is None else str(Path(engine.options.work) / dtype)
            options = replace(engine.options, dtype=dtype, weights=None, work=work)
            with streaming.StreamEngine(options, text=f"replicas in {dtype}") as noisy:
                noisy.progress = progress
                starts = [len(one.prompt_ids) for one in requests]
                floor = streamed_floor(noisy, sequences, starts, rows, prompts=len(requests), count=replicas)
            if floor is None:
                left_out[dtype] = "the reference, or one of its variants, is not finite in it"
            else:
                floors[dtype] = floor
    return floors, left_out


# --- drafts ------------------------------------------------------------------------------------------


@contextmanager
def _draft(
    given: str | Golden, engine: streaming.StreamEngine, stop_ids: frozenset[int], progress: Notify
) -> Iterator[speculative.Draft]:
    if isinstance(given, Golden):
        said = zip(given.requests, given.generations, strict=True)
        yield speculative.said_before({one.prompt_ids: generation.tokens for one, generation in said})
        return
    path = Path(given)
    if given == LOOK_UP:
        yield speculative.looked_up
    elif path.suffix in (".jsonl", SUFFIX):
        yield speculative.said_before(_said(path, engine))
    elif parse_spec(given).engine == "stream":
        raise UsageError("a streamed draft would read all weights for every token", fix="Name another engine or a file")
    else:
        with engine_of(given, engine.directory, progress) as opened:
            yield _continued_by(opened, stop_ids)


def _continued_by(engine: Engine, stop_ids: frozenset[int]) -> speculative.Draft:
    """A draft that an engine goes on with, from what was accepted."""

    def draft(requests: Sequence[Request], had: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        longer = [
            replace(
                one, prompt_ids=(*one.prompt_ids, *tokens), max_new_tokens=one.max_new_tokens - len(tokens), text=None
            )
            for one, tokens in zip(requests, had, strict=True)
        ]
        return [given.tokens for given in engine.generate(longer, batch_size=None, stop_ids=stop_ids)]

    return draft


def _said(path: Path, engine: streaming.StreamEngine) -> dict[tuple[int, ...], tuple[int, ...]]:
    """What a file says to each prompt."""
    if path.suffix == ".jsonl":
        return {one.prompt_ids: one.tokens for one in answers.read_answers(path, engine.tokenizer)}
    trace = load_trace(path)
    if trace.prompt_ids is None:
        raise TraceError(f"{path} does not hold its prompts' ids", fix="Make it with `harness run SPEC --suite FILE`")
    return {
        trace.prompt_ids[index]: given.tokens
        for one in trace.passes
        for index, given in zip(one.requests, one.generations, strict=False)
    }


# --- between two rounds --------------------------------------------------------------------------------


def _commit(directory: Path | None, work: str, state: speculative.Progress, vocabulary: int) -> None:
    """Write how far it is, in one step."""
    if directory is None:
        return
    _, rows = speculative.result(state, frozenset(), vocabulary)
    everyone = tuple(range(len(state.tokens)))
    save_trace(
        Trace(
            engine="stream",
            declared={},
            settings={
                "rounds": state.rounds, "mistakes": list(state.mistakes), "ended": list(state.ended),
                "pass": hidden.work_in(directory),
            },
            capabilities=frozenset({"logits"}),
            vocabulary=vocabulary,
            suite_digest=work,
            prompt_ids=None,
            passes=(
                Pass(run="rounds", view="prefill", requests=everyone, rows=rows),
                Pass(
                    run="rounds", view="generate", requests=everyone,
                    generations=tuple(Generation(tokens=tokens, finish="length") for tokens in state.tokens),
                ),
            ),
        ),
        directory / _ROUNDS,
    )  # fmt: skip


def _use_up(directory: Path | None) -> None:
    """Remove the pass whose result the committed rounds hold, and no other."""
    if directory is None or not (directory / _ROUNDS).is_file():
        return
    used = load_trace(directory / _ROUNDS).settings.get("pass")
    if used is not None and hidden.work_in(directory) == used:
        hidden.forget(directory)


def _resumed(directory: Path | None, work: str, requests: Sequence[Request]) -> speculative.Progress:
    """Where a killed recording of the same prompts was, else the beginning."""
    if directory is None or not (directory / _ROUNDS).is_file():
        return speculative.start(requests)
    trace = load_trace(directory / _ROUNDS)
    if trace.suite_digest != work:
        raise UsageError(f"{directory} holds a recording of other prompts", fix="Remove it, or name another as work=")
    _use_up(directory)  # where it was killed before that
    settings: Any = trace.settings
    rows = trace.passes[0].rows
    if rows is None:
        raise ModelError(f"{directory / _ROUNDS} holds no rows", fix="Remove it, and record again")
    return speculative.Progress(
        tokens=tuple(given.tokens for given in trace.passes[1].generations),
        ended=tuple(bool(one) for one in settings["ended"]),
        mistakes=tuple(int(one) for one in settings["mistakes"]),
        rounds=int(settings["rounds"]),
        rows=(rows,),
    )
