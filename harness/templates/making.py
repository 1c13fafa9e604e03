"""Make a golden's templates: run the reference with each bug of the catalogue in it, and its replicas once more.

Shape legend: V views, M rows of all of them, P prompts, R coordinates, T templates, K replicas.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from harness.engines import hf, runner
from harness.engines.spec import parse_spec
from harness.errors import UsageError, first_line
from harness.mutations import hosts
from harness.mutations.catalogue import CATALOGUE
from harness.mutations.mutation import Mutation, attention_of, blocks, hooked, part
from harness.mutations.stopping import CORRECT
from harness.numerics import matched
from harness.numerics.sketch import Sketcher
from harness.replicas import applied, draw, kernels_of
from harness.scorer import open_reference
from harness.templates.space import basis_of, turn_of
from harness.values import Golden, Run, TemplateNoise, Templates, View

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Progress = Callable[[str], None]

_VIEWS: tuple[View, ...] = ("replay", "prefill")
#: Precision that templates are computed in: what a bug does is far above its round-off, or it does nothing.
PRECISION = "float32"
#: Variants that are drawn for each that is needed: one that is not finite is no correct implementation.
_ATTEMPTS = 4
#: Share of the finest round-off below which what a bug changes is the round-off of the run itself.
_NOTHING = 1.5
_LEVELS = 127


def diagnosed_run(golden: Golden) -> Run:
    """The run that templates are fitted to.

    Raises:
        UsageError: for a suite that has none, and a golden without floors.
    """
    run = runner.first_whole(golden.suite.runs)
    if run is None:
        raise UsageError(
            f"no run of {golden.name} shows the logits of all prompts",
            fix='Give its suite a run with the views "replay" and "prefill"',
        )
    if not golden.floors:
        raise UsageError(f"{golden.name} has no floors to hold templates against", fix="Record it from a model")
    return run


def bugs_for(model_type: str) -> list[tuple[Mutation, float]]:
    """The bugs of the catalogue that a model of this type can have and that show in logits, at each strength."""
    return [
        (one, strength)
        for one in CATALOGUE.values()
        if not one.harmless and one.id not in CORRECT and one.shows == "logits"
        if "half" not in one.active and model_type in {hosts.model_type_of(name) for name in one.hosts}
        for strength in one.strengths
    ]


def make(golden: Golden, model: Path, progress: Progress, *, places: bool = True) -> Templates:
    """Run the reference with each bug in it, and its replicas in each precision that the golden has a floor for.

    Args:
        golden: whose work is done; its first whole run alone.
        model: directory of its model.
        progress: called with a few words before each run.
        places: also templates of places.

    Raises:
        UsageError: as `diagnosed_run`.
    """
    started = time.perf_counter()
    work = Work.of(golden, model)
    precisions = [name for name in golden.floors if "/" not in name]
    with open_reference(str(model), golden.precision) as engine:
        exact = work.shown(engine)
    centres = dict.fromkeys(precisions, exact)
    for name in set(golden.centres) & set(precisions):
        with open_reference(str(model), golden.precision, weights=name) as engine:
            centres[name] = work.shown(engine)
    errors = {name: _replicas(work, model, name, centres[name], progress) for name in precisions}
    whitens = {name: matched.whitening(one - one.mean(axis=0)) for name, one in errors.items()}
    # Of the last, the coarsest: in it no coordinate of a template is small beside the others.
    frame = whitens[precisions[-1]]
    found, left_out = _of_catalogue(work, model, frame, progress)
    parts = _of_places(work, model, frame, progress) if places else []
    every = [*found.values(), *(one for _, one in parts)]
    progress("sums over rows")
    bank = Templates(
        run=work.run.name,
        views=work.views,
        view=work.view,
        place=work.place,
        basis=work.basis,
        turn=work.turn,
        names=tuple(found),
        wrong=tuple(CATALOGUE[name].wrong for name, _ in found),
        places=tuple(place for place, _ in parts),
        frame=frame,
        codes=np.stack([codes for codes, _ in every]) if every else np.zeros((0, *exact.shape), dtype=np.int8),
        scales=np.stack([scales for _, scales in every]) if every else np.zeros((0, len(exact)), dtype=np.float32),
        centres=centres,
        noises={},
        left_out=left_out,
        seconds=0.0,
    )
    noises = {name: _noise(bank, golden, name, errors.pop(name), whitens[name]) for name in precisions}
    return replace(bank, noises=noises, seconds=time.perf_counter() - started)


# --- one run of an engine ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """The passes of one run, and where their rows lie in the golden."""

    golden: Golden
    run: Run
    views: tuple[View, ...]
    view: NDArray[np.int64]
    place: NDArray[np.int64]
    basis: Float64
    turn: Float64

    @classmethod
    def of(cls, golden: Golden, model: Path) -> Work:
        run = diagnosed_run(golden)
        views = tuple(view for view in _VIEWS if view in run.views)
        everywhere = np.arange(len(golden.rows))
        places = [everywhere[golden.rows.generated] if view == "replay" else everywhere for view in views]
        with open_reference(str(model), "float32") as engine:
            basis = basis_of(engine.model, golden.vocabulary)
        return cls(
            golden=golden,
            run=run,
            views=views,
            view=np.repeat(np.arange(len(views)), [len(one) for one in places]),
            place=np.concatenate(places),
            basis=basis,
            turn=turn_of(basis),
        )

    def shown(self, engine: hf.HFEngine, chunk: int | None = None) -> Float64:
        """Coordinates of an open engine's logits on every row, [M, R].

        Raises:
            UsageError: for an engine that shows other rows.
        """
        parts = []
        for view in self.views:
            sketcher = Sketcher(self.golden.vocabulary, basis=self.basis)
            show: Callable[..., None] = engine.replay if view == "replay" else engine.prefill
            more: dict[str, Any] = {"chunk": chunk} if view == "prefill" and chunk is not None else {}
            show(
                self.golden.requests,
                self.golden.continuations,
                batch_size=self.run.batch_size,
                sketcher=sketcher,
                **more,
            )
            fine = sketcher.rows().fine
            assert fine is not None
            parts.append(fine)
        found: Float64 = np.concatenate(parts) @ self.turn
        if len(found) != len(self.view):
            raise UsageError(f"{len(found)} rows were shown, and {len(self.view)} are of this run", fix="Report this")
        return found


# --- bugs --------------------------------------------------------------------------------------


#: A template in its frame, rounded to 8 bits [M, R], and what each row is multiplied with [M].
Coded = tuple[NDArray[np.int8], NDArray[np.float32]]


def _of_catalogue(
    work: Work, model: Path, frame: Float64, progress: Progress
) -> tuple[dict[tuple[str, float], Coded], dict[str, str]]:
    """What each bug changes, by (id, strength), and why others have nothing here."""
    found: dict[tuple[str, float], Coded] = {}
    left_out: dict[str, str] = {}
    with ExitStack() as stack:
        plain = stack.enter_context(open_reference(str(model), PRECISION))
        right = work.shown(plain)
        asked = bugs_for(str(plain.model.config.get_text_config().model_type))
        for number, (one, strength) in enumerate(asked, start=1):
            progress(f"template {number} of {len(asked)}: {one.id}")
            try:
                changed = _with_bug(work, model, plain, one, strength) - right
            except Exception as error:  # noqa: BLE001  # nothing a bug raises may end it
                left_out[one.id] = f"cannot be put into this model ({first_line(error, type(error).__name__)})"
                continue
            if not np.isfinite(changed).all():
                left_out[one.id] = "its logits are not finite"
            elif is_nothing(work, changed):
                left_out.setdefault(one.id, "changes nothing on these prompts")
            else:
                found[one.id, strength] = coded(changed, frame)
    seen = {name for name, _ in found}
    return found, {name: reason for name, reason in left_out.items() if name not in seen}


def _with_bug(work: Work, model: Path, plain: hf.HFEngine, one: Mutation, strength: float) -> Float64:
    if not one.options:
        with one.applied(plain, strength):
            return work.shown(plain)
    with opened(model, one) as engine, one.applied(engine, strength):
        return work.shown(engine)


def opened(model: Path, one: Mutation) -> hf.HFEngine:
    """The reference that a bug can be put into: with the options that it needs."""
    options = ",".join(f"{key}={value}" for key, value in {**dict(one.options), "dtype": PRECISION}.items())
    return hf.build(parse_spec(f"hf:{options}"), model=str(model))


def is_nothing(work: Work, changed: Float64) -> bool:
    """Whether a change [M, R] is no more than the round-off of a run in the precision of templates."""
    floor = work.golden.floors.get(PRECISION)
    if floor is None:
        return not changed.any()
    ratio = (changed**2).sum(axis=1) / floor.sigma[work.place].astype(np.float64) ** 2
    # The right run and the one with the bug have the same round-off where the bug does nothing, and then it cancels.
    return bool(np.sqrt(ratio.mean()) < _NOTHING)


# --- places ------------------------------------------------------------------------------------

#: Random changes of the output of one part of one block: its channels scaled by a little, all alike and at random.
_CHANGES, _LITTLE = 4, 0.02
#: Templates of places that are made in all: fewer changes a place, then fewer blocks, in a deep model.
_MOST_PLACES = 64


def _of_places(work: Work, model: Path, frame: Float64, progress: Progress) -> list[tuple[str, Coded]]:
    """What small changes of the attention and of the MLP of single blocks do, each with its place."""
    found: list[tuple[str, Coded]] = []
    with open_reference(str(model), PRECISION) as plain:
        try:
            parts = _parts(plain.model)
        except LookupError:
            return found  # a model whose blocks have other names: then no place is told
        right = work.shown(plain)
        each = max(1, min(_CHANGES, _MOST_PLACES // len(parts)))
        # Whole blocks are left out: attention and MLP alternate.
        step = -(-len(parts) * each // _MOST_PLACES)
        kept = [named for number, named in enumerate(parts) if number // 2 % step == 0]
        for name, module in kept:
            progress(f"place: {name}")
            for change in range(each):
                with hooked((module, _scaled(change), False)):
                    changed = work.shown(plain) - right
                if np.isfinite(changed).all() and not is_nothing(work, changed):
                    found.append((name, coded(changed, frame)))
    return found


def _parts(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """Attention and MLP of each block, first to last."""
    return [
        (f"the {name} of block {number}", module)
        for number, block in enumerate(blocks(model))
        for name, module in (("attention", attention_of(block)), ("MLP", part(block, "mlp", "fc2")))
    ]


def _scaled(change: int) -> Callable[..., Any]:
    """A hook that scales the channels of a module's output: the first change all alike, the others at random."""
    import torch

    def hook(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        generator = torch.Generator().manual_seed(change)
        noise = torch.randn(first.shape[-1], generator=generator) if change else torch.ones(first.shape[-1])
        scaled = first * (1 + _LITTLE * noise.to(first))
        return (scaled, *output[1:]) if isinstance(output, tuple) else scaled

    return hook


def coded(change: Float64, frame: Float64) -> Coded:
    """A change [M, R] in the frame, rounded to 8 bits, with the scale of each row."""
    framed = change @ frame
    largest = np.abs(framed).max(axis=1, initial=0.0) / _LEVELS
    codes = np.rint(framed / np.where(largest > 0, largest, 1)[:, None])
    return codes.astype(np.int8), largest.astype(np.float32)


# --- replicas ----------------------------------------------------------------------------------


def _replicas(work: Work, model: Path, precision: str, centre: Float64, progress: Progress) -> Float32:
    """Errors of as many replicas as the golden's floor has, in units of round-off, float32 [K, M, R]."""
    floor = work.golden.floors[precision]
    sigma = floor.sigma[work.place].astype(np.float64)[:, None]

    def shown(engine: hf.HFEngine) -> Iterator[Float32]:
        kernels, wide = kernels_of(engine.model), precision == "float16"
        # A golden's replicas leave activations as they are. Along the template of another activation that matters.
        for variant in draw(_ATTEMPTS * floor.replicas, 0, kernels, wide=wide, fused=True):
            with applied(engine.model, variant):
                error = ((work.shown(engine, variant.chunk) - centre) / sigma).astype(np.float32)
            if np.isfinite(error).all():
                yield error

    found = []
    with open_reference(str(model), precision) as engine:
        for number, error in enumerate(islice(shown(engine), floor.replicas), start=1):
            progress(f"{precision}: replica {number} of {floor.replicas}")
            found.append(error)
    if len(found) < 2:
        raise UsageError(
            f"the reference's variants are not finite in {precision} in the run {work.run.name!r}",
            fix="Leave out --diagnose",
        )
    return np.stack(found)


def _noise(bank: Templates, golden: Golden, precision: str, errors: Float32, whiten: Float64) -> TemplateNoise:
    from harness.templates.fitting import Projector

    mean = errors.mean(axis=0)
    left = errors - mean
    sigma = golden.floors[precision].sigma[bank.place].astype(np.float64)
    projector = Projector.of(bank, golden.rows.request[bank.place], sigma, whiten)
    along, square = projector.sums(left)
    return TemplateNoise(
        mean=mean,
        whiten=whiten,
        row=np.sum([((one @ whiten) ** 2).sum(axis=1) for one in left], axis=0).astype(np.float32)
        / max(1, len(left) - 1),
        along=along,
        square=square,
        gram=projector.gram(),
    )
