"""locate: where a candidate first leaves the reference, from its weights, its settings and a replay of its modules."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.comparison.context import declared_precision
from harness.comparison.ranks import ranks_of
from harness.engines import Engine, build_engine, hf
from harness.engines.ranks.engine import ParallelEngine
from harness.engines.ranks.outer import Followed
from harness.errors import EngineError, HarnessError, ModelError, first_line
from harness.flow.candidates import engine_of, name_of
from harness.flow.checking import check
from harness.flow.references import read, reference_directory
from harness.flow.reproducing import reproduce
from harness.flow.running import refuse_other_model, silent
from harness.flow.sharding import first_wrong_rank
from harness.scorer import open_reference
from harness.values import Golden

if TYPE_CHECKING:
    from harness.locate.naming import Made, Names
    from harness.locate.presentations import Presentation
    from harness.locate.where import Question, Where

Progress = Callable[[str], None]


def locate(
    golden: Golden | str | Path,
    candidate: Any,
    *,
    reference: str | Path | None = None,
    names: Names | None = None,
    repro: str | Path | None = None,
    copy_model: bool = False,
    progress: Progress = silent,
) -> Where:
    """Where does the candidate first go wrong?

    Its weights, settings and tables are read, then every submodule is given what the reference's was given and its
    result compared, in a float32 copy first and, where that shows nothing, as the candidate is shipped; what is wrong
    is looked into down to its operations.

    Args:
        golden: a golden, or the directory of one; its model must be at hand.
        candidate: a SPEC, an Engine, a transformers model, an nn.Module or a callable.
        reference: directory of the golden's model, where it does not lie beside the golden.
        names: what the tensors of a port with other names are made of; what is left out is found by content.
        repro: a directory to write the smallest failing case to, as a script and a test (flow/reproducing.py); `repro`
            of the answer says what came of it.
        copy_model: put a copy of a small model there too.
        progress: called with a few words.

    Raises:
        HarnessError: for input that cannot be used, and for an engine that fails.
    """
    started = time.perf_counter()
    if isinstance(candidate, str):
        build_engine(candidate)
    golden = read(golden)
    directory = reference_directory(golden, reference)
    if directory is None:
        raise ModelError(f"the model of {golden.name} is not beside it", fix="Name its directory with --reference")
    try:
        with engine_of(candidate, directory, progress) as engine:
            refuse_other_model(golden, engine)
            found = _Work(golden=golden, directory=directory, engine=engine, names=names, progress=progress).where()
    except (HarnessError, Followed):
        raise
    except (Exception, SystemExit) as error:  # a port can raise anything, or exit: one clear line, and not our end
        if os.environ.get("HARNESS_TRACEBACK"):
            raise
        problem = f"the candidate failed ({type(error).__name__}: {first_line(error, 'no message')})"
        raise EngineError(problem, fix="Set HARNESS_TRACEBACK=1 to see where it was raised") from error
    seconds = time.perf_counter() - started
    if repro is not None:
        made = reproduce(golden, candidate, repro, reference=directory, copy_model=copy_model, progress=progress)
        found = replace(found, repro=str(made))
    return replace(found, candidate=name_of(candidate), seconds=seconds)


def proposed_map(
    golden: Golden | str | Path, candidate: Any, *, reference: str | Path | None = None
) -> dict[str, Made]:
    """Patterns for the tensors of a port that do not go by the reference's names, found by content.

    Raises:
        HarnessError: where the golden's model is not at hand, or the candidate shows no tensors.
    """
    from harness.locate.weights import proposed

    golden = read(golden)
    directory = reference_directory(golden, reference)
    if directory is None:
        raise ModelError(f"the model of {golden.name} is not beside it", fix="Name its directory with --reference")
    with engine_of(candidate, directory, silent) as engine:
        model = model_of(inner_of(engine))
        if model is None:
            raise ModelError("the candidate shows no tensors", fix="Give an nn.Module that registers its weights")
        return proposed(directory, model)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Work:
    """One candidate, open, beside the reference of a golden."""

    golden: Golden
    directory: Path
    engine: Engine
    names: Names | None
    progress: Progress

    def where(self) -> Where:
        from harness.locate.where import Where

        blank = Where(golden=self.golden.name, candidate=self.engine.spec)
        live = inner_of(self.engine)
        model = model_of(live)
        if isinstance(live, ParallelEngine):
            return self._ranks(live, blank)
        if model is None:
            return self._black_box(blank)
        found = replace(blank, clues=self._clues(model))
        if _other_class(self.directory, model) and not self._map(model):
            note = f"modules: the candidate's have other names than those of {self.golden.name}'s model, and no map"
            return replace(found, scope="unseen", notes=(note,))
        return self._replayed(live, found)

    def _map(self, model: Any) -> Mapping[str, Made]:
        """What the weights of a port are made of: as given, else by content."""
        return {name: made for name, made in map_of(self.directory, model, self.names).items() if made.parts}

    def _clues(self, model: Any) -> tuple[Any, ...]:
        from harness.locate.tables import tables
        from harness.locate.weights import audit

        self.progress("weights, settings and tables")
        declared = declared_precision(self.engine.settings)
        found = audit(self.directory, model, self.names, declared=declared if declared in hf.DTYPES else None)
        return (*found, *tables(self.directory, model))

    def _ranks(self, live: ParallelEngine, blank: Where) -> Where:
        """What the ranks show of themselves: which one leaves the reference first, and where."""
        declared = declared_precision(live.settings)
        wide = declared != "float32"
        question: Question = "function"
        words = first_wrong_rank(self.golden, live, question, self.directory, self.progress)
        if not words and wide:
            question = "precision"
            words = first_wrong_rank(self.golden, live, question, self.directory, self.progress)
        unlike = [
            f"rank {one['rank']}: {name} is not its part of the checkpoint"
            for one in ranks_of(live.settings)
            for name in one["unlike_checkpoint"]
        ]
        notes = ("modules were not replayed: each rank shows its layers on its own inputs", *unlike)
        precision = "float32" if question == "function" else declared
        if not words:
            return replace(blank, notes=notes, precision=precision)
        module = _module_in(words)
        return replace(
            blank, module=module, part=words, scope="local", notes=notes, precision=precision, question=question
        )

    def _black_box(self, blank: Where) -> Where:
        """Of a candidate without modules: the first wrong step and where its errors lie; nothing more can be said."""
        verdict = check(self.golden, self.engine, reference=self.directory, quick=True, progress=self.progress)
        bad = [one for one in verdict.findings if not one.status.ok]
        notes = [
            "modules: the candidate shows none, so no more than steps, positions and names of bugs can be said;"
            " `harness check --diagnose` fits the catalogue's bugs to its error"
        ]
        said = [f"{one.check}: {one.message}" + (f" ({one.where})" if one.where else "") for one in bad]
        return replace(blank, scope="unseen", notes=(*said, *notes))

    def _replayed(self, live: Engine, blank: Where) -> Where:
        """The function first; as shipped where that shows nothing and the two differ."""
        declared = declared_precision(live.settings)
        notes: list[str] = []
        found = blank
        if declared == "float32":
            return self._asked(live, "float32", None, blank)
        if "upcast" in live.capabilities:
            with live.upcast() as wide:
                if narrow := wide.narrow_operation():
                    notes.append(f"the function: a float32 copy still computes in 16 bits ({narrow})")
                else:
                    found = self._asked(wide, "float32", declared, blank)
        else:
            notes.append("the function: the candidate cannot be widened to float32")
        if not found.found and declared in hf.DTYPES:
            found = self._asked(live, declared, declared, replace(blank, question="precision"))
        return replace(found, notes=(*found.notes, *notes))

    def _asked(self, engine: Engine, precision: str, weights: str | None, blank: Where) -> Where:
        """One question: submodules, then the operations of the first wrong one.

        Args:
            engine: computes in ``precision``.
            precision: of the arithmetic.
            weights: what the weights are rounded to, where that is another one.
            blank: the answer so far.
        """
        import torch

        from harness.engines.hooks import block_names
        from harness.locate import places, suspects
        from harness.locate.maps import route_of, same_names
        from harness.locate.presentations import driven_as, presentations, texts_of
        from harness.locate.replaying import replay
        from harness.locate.yardstick import yardstick

        asked_dtype = weights or precision
        with ExitStack() as stack:
            exact = stack.enter_context(open_reference(str(self.directory), self.golden.precision, weights=asked_dtype))
            plain = stack.enter_context(
                open_reference(str(self.directory), precision, weights=weights if weights != precision else None)
            )
            stack.enter_context(torch.no_grad())
            asked = presentations(texts_of(self.golden), exact.model.config)
            driven, blocks = driven_as(engine), block_names(exact.model)

            live = model_of(engine)
            route = route_of(live, self._map(live)) if _other_class(self.directory, live) else None

            def measured(names: Sequence[str], asked: Sequence[Presentation] = asked) -> tuple[Any, Any]:
                by = yardstick(exact, plain, asked, names, driven, progress=self.progress)
                self.progress(f"candidate in {precision}")
                return by, replay(engine, route or same_names(live, names), asked, by.recording, driven)

            known = {name for name, _ in exact.model.named_modules()}
            names = places.submodules(exact.model)
            if route is not None:
                names = tuple(dict.fromkeys(n for one in route.modules for n in one.reference if n in known))
            by, shown = measured(names)
            named = suspects.first_wrong(shown, by, blocks)
            found = replace(blank, precision=precision, modules=len(by.names), tests=by.tests)
            if named is None:
                return found
            found = replace(
                found,
                module=named.module,
                part=named.part,
                scope=named.scope,
                conditions=named.conditions,
                others=named.others,
                evidence=named.evidence,
            )
            inside = places.operations(exact.model, [named.module]) if named.inside and route is None else ()
            if len(inside) > 1:
                by, shown = measured(inside, [asked[number] for number in named.presentations])
                module, part, more = suspects.first_inside(shown, by, named)
                found = replace(found, module=module, part=part, evidence=(*more, *found.evidence))
            return found


def map_of(checkpoint: Path, model: Any, names: Names | None = None) -> dict[str, Made]:
    """What each tensor of a port is made of: as ``names`` say, else found by content, else the one of its own name."""
    from harness.locate.naming import Made, expanded
    from harness.locate.weights import proposed

    tensors = [name for name, _ in model.named_parameters()]
    found = expanded({**proposed(checkpoint, model), **(names or {})}, tensors)
    return {name: found.get(name, Made(parts=(name,))) for name in tensors}


def _other_class(directory: Path, model: Any) -> bool:
    """Whether the modules of a live model bear other names than the reference's."""
    from harness.engines.hooks import block_names

    with open_reference(str(directory), None) as reference:
        blocks = block_names(reference.model)
    there = {name for name, _ in model.named_modules()}
    return not any(name in there for name in blocks)


def _module_in(words: str) -> str:
    """The name of a module in what is said of a rank: the first word with a dot in it."""
    found = [word.strip(",;()") for word in words.split() if "." in word.strip(",;().")]
    return found[0] if found else ""


def inner_of(engine: Engine) -> Engine:
    """The engine of what a SPEC `py:` built; any other as it is."""
    return getattr(engine, "inner", engine)


def model_of(engine: Engine) -> Any:
    """The live nn.Module of an engine, None where it has none."""
    from torch import nn

    found = getattr(engine, "model", None) or getattr(engine, "port", None)
    return found if isinstance(found, nn.Module) else None
