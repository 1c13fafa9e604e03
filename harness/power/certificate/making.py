"""Make the certificate of a golden, and write it beside that.

What a bug does to the logits is known from its template, so what a check would say of it follows: red by the size of
its error, or named with --diagnose. A bug without a template (it shows in tokens or prompts, in 16 bits alone, or in
other runs than templates are of) is put into the model and checked, unless the suite lacks what it needs.

Shape legend: M rows of all views, T templates.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from harness import flow
from harness.engines import hf
from harness.environment import versions
from harness.errors import UsageError
from harness.files import readable_json, replace_file
from harness.mutations import hosts
from harness.mutations.catalogue import CATALOGUE
from harness.mutations.mutation import Mutation
from harness.numerics.constants import ALPHA_TEMPLATES
from harness.power.certificate.needs import explained, lacking, of_precision, wants_second
from harness.power.certificate.trials import Progress, is_rounding, trials
from harness.power.certificate.value import Bug, Certificate, Column, Sight
from harness.power.certificate.weights import (
    Float64,
    Units,
    Weight,
    sight_of_templates,
    smallest_of,
    squares_of,
    units_of,
    weigh,
)
from harness.report.certificate import NAME, certificate_to_dict
from harness.report.unseen import golden_digest
from harness.templates import caching, making
from harness.templates.fitting import filter_of
from harness.values import Golden, Templates, Verdict

#: What templates/making.py says of bugs that have no template.
NO_PART, _NO_NUMBER = "cannot be put into this model", "its logits are not finite"
NOTHING = "changes nothing on these prompts"
#: Numbers of a config that sequences must be longer than for bugs of long sequences.
_LANDMARKS = ("sliding_window", "original_max_position_embeddings")


def bugs_of(model_type: str) -> list[Mutation]:
    """The bugs of the catalogue that a model of this type can have, however they show."""
    return [
        one
        for one in CATALOGUE.values()
        if not one.harmless and model_type in {hosts.model_type_of(name) for name in one.hosts}
    ]


def refuse_unknown(model: Path) -> str:
    """The type of a model directory in transformers.

    Raises:
        ModelError: for what is no model directory.
        UsageError: for a type of which the catalogue has no bug.
    """
    model_type = str(hf.load_config(str(model)).get_text_config().model_type)
    if not bugs_of(model_type):
        known = ", ".join(sorted({hosts.model_type_of(name) for name in hosts.NAMES}))
        raise UsageError(
            f"the bug catalogue has nothing for models of type {model_type!r}, so nothing can be certified",
            fix=f"It has bugs of {known}; `harness check` says of any model how small an error it would have caught",
        )
    return model_type


def make(golden: Golden, model: Path, progress: Progress) -> Certificate:
    """The certificate of a golden; its templates come from the cache, or are made and put there.

    Args:
        golden: recorded from a transformers model, with floors.
        model: directory of that model.
        progress: called with a few words before each run.

    Raises:
        UsageError: for a type of model of which the catalogue has no bug, and for a golden that allows no templates.
    """
    model_type = refuse_unknown(model)
    making.diagnosed_run(golden)
    bank = caching.templates_of(golden, model, progress)
    started = time.perf_counter()
    asked = bugs_of(model_type)
    plain = {precision: _plain(golden, model, precision, progress) for precision in bank.noises}
    sights: dict[str, dict[str, Sight]] = {one.id: {} for one in asked}
    columns, squares, units = [], squares_of(bank), units_of(golden, bank)
    for precision, verdict in plain.items():
        column, weights = _column(golden, bank, precision, verdict, squares, units)
        columns.append(column)
        for one in asked:
            sights[one.id][precision] = _first_sight(one, precision, golden, bank, weights)
    absent = {name: reason for name, reason in bank.left_out.items() if reason.startswith(NO_PART)}
    count = 0
    for one, precision, sight in trials(asked, sights, absent, golden, model, progress):
        count += sight is not None
        if sight is None:
            absent[one.id] = NO_PART
        elif sight.seen != "not" or not sights[one.id][precision].known:
            sights[one.id][precision] = sight
    for one in asked:
        for precision, sight in sights[one.id].items():
            if not sight.known and not sight.why:
                sights[one.id][precision] = replace(sight, needs=explained(one, golden), why=NOTHING)
    config = hf.load_config(str(model)).get_text_config()
    return Certificate(
        golden=golden.name,
        digest="" if golden.directory is None else golden_digest(Path(golden.directory)) or "",
        model=golden.model.name,
        model_type=model_type,
        suite=golden.suite.name,
        run=bank.run,
        views=bank.views,
        prompts=len(golden.requests),
        rows=len(golden.rows),
        longest=_longest(golden),
        landmarks=landmarks(config),
        columns=tuple(columns),
        bugs=tuple(_bug(one, sights[one.id]) for one in asked if one.id not in absent),
        absent=absent,
        seconds=bank.seconds,
        size=caching.size_of(golden),
        trials=count,
        trial_seconds=time.perf_counter() - started,
        versions={name: versions().get(name) for name in ("golden-harness", "torch", "transformers")},
    )


def write(certificate: Certificate, directory: Path) -> Path:
    """Write it beside its golden, in one step; returns the file."""
    path = directory / NAME
    replace_file(path, readable_json(certificate_to_dict(certificate)).encode())
    return path


def landmarks(config: object) -> dict[str, int]:
    """Lengths that a model's config names, beside which a sequence is long."""
    scaling = getattr(config, "rope_scaling", None) or getattr(config, "rope_parameters", None) or {}
    found = {name: getattr(config, name, None) or _item(scaling, name) for name in _LANDMARKS}
    found["context"] = hf.context_length(config)
    return {name: value for name, value in found.items() if isinstance(value, int) and value > 0}


def _item(table: object, name: str) -> object:
    return table.get(name) if isinstance(table, Mapping) else None


def _longest(golden: Golden) -> int:
    pairs = zip(golden.requests, golden.continuations, strict=True)
    return max(len(request.prompt_ids) + len(tokens) for request, tokens in pairs)


def _bug(one: Mutation, sights: Mapping[str, Sight]) -> Bug:
    options = tuple(f"{key}={value}" for key, value in one.options if key != "dtype")
    return Bug(id=one.id, group=one.group, wrong=one.wrong, shows=one.shows, options=options, sights=sights)


def _plain(golden: Golden, model: Path, precision: str, progress: Progress) -> Verdict:
    """The verdict on the reference itself in one precision: it must not alarm, and says how small an error would."""
    progress(f"{precision}: the reference itself")
    # Where the run that templates are of is not a quick one, the quick ones would say nothing of it.
    quick = making.diagnosed_run(golden).quick
    return flow.check(golden, f"hf:dtype={precision}", reference=model, quick=quick, upcast=False)


def _column(
    golden: Golden,
    bank: Templates,
    precision: str,
    verdict: Verdict,
    squares: Float64,
    units: Sequence[Units],
) -> tuple[Column, dict[str, dict[float, Weight]]]:
    """One precision, and in it the weight of each template by the bug's id and strength."""
    answer = verdict.answers[-1] if verdict.answers else None
    power = None if answer is None else answer.power
    column = Column(
        precision=precision,
        status=verdict.status if answer is None else answer.status,
        smallest=None if power is None else power.smallest,
        limit=None,
    )
    if not bank.names:
        return column, {}
    floor = golden.floors[precision]
    one = filter_of(bank, bank.noises[precision], list(range(len(bank.views))))
    limit = one.limit(ALPHA_TEMPLATES)
    smallest = smallest_of([each for each in verdict.statistics if each.precision == precision], floor.replicas)
    sigma = floor.sigma[bank.place].astype(np.float64)
    weights: dict[str, dict[float, Weight]] = {}
    for (name, strength), weight in zip(
        bank.names, weigh(squares, sigma, units, smallest, one.errors, limit), strict=True
    ):
        weights.setdefault(name, {})[strength] = weight
    return replace(column, limit=limit if math.isfinite(limit) else None), weights


def _first_sight(
    one: Mutation, precision: str, golden: Golden, bank: Templates, weights: Mapping[str, Mapping[float, Weight]]
) -> Sight:
    """What is known of a bug before anything is tried."""
    if other := of_precision(one, precision):
        return Sight(seen="not", needs=other)
    if one.id in weights and not is_rounding(one, precision):
        return sight_of_templates(weights[one.id])
    if bank.left_out.get(one.id, "").startswith(_NO_NUMBER):
        return Sight(seen="size", weakest=max(one.strengths), why=_NO_NUMBER)
    lengths = [len(request.prompt_ids) for request in golden.requests]
    text = golden.tokenizer_digest is not None and any(request.text is not None for request in golden.requests)
    needs = lacking(one, golden.suite.runs, lengths, text=text)
    return Sight(seen="not", needs=(*needs, "second") if needs and wants_second(one, golden) else needs)
