"""Goldens of one model must agree on a prompt that both hold, as far as their tokens are the same, within round-off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.changes import Compared, Yardstick, compare_prompt, yardstick
from harness.lint.anomaly import Anomaly
from harness.values import Golden, Kind


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """A prompt of a golden."""

    directory: Path
    golden: Golden
    prompt: int

    @property
    def name(self) -> str:
        return self.golden.requests[self.prompt].id


def look(goldens: Mapping[Path, Golden]) -> Iterator[Anomaly]:
    """Pairs of goldens that contradict each other, with the worst of their prompts.

    Each golden is held against the first of its model that has the prompt and can judge it. The rate of false alarms
    of a pair is that of the prompts of one check.
    """
    found: dict[tuple[Path, Path], list[tuple[_Place, _Place, Compared]]] = {}
    yards: dict[tuple[Path, Path], Yardstick | None] = {}
    for places in _same_prompts(goldens):
        for index, place in enumerate(places):
            other = next((one for one in places[:index] if _one_model(one.golden, place.golden)), None)
            if other is None:
                continue
            pair = (other.directory, place.directory)
            old, new, yard = _sides(other, place, yards)
            with np.errstate(all="ignore"):  # hostile numbers may overflow
                compared = compare_prompt(old.golden, old.prompt, new.golden, new.prompt, yard)
            if compared.change.kind is Kind.BUG_SIZED:
                found.setdefault(pair, []).append((old, new, compared))
    for each in found.values():
        yield _anomaly(each)


def _same_prompts(goldens: Mapping[Path, Golden]) -> list[list[_Place]]:
    """The places of each prompt that is there more than once; goldens with floors first, then by path."""
    places: dict[tuple[int, tuple[int, ...]], list[_Place]] = {}
    for directory, golden in sorted(goldens.items(), key=lambda item: (not item[1].floors, item[0])):
        for index, request in enumerate(golden.requests):
            place = _Place(directory=directory, golden=golden, prompt=index)
            places.setdefault((golden.vocabulary, request.prompt_ids), []).append(place)
    return [each for each in places.values() if len(each) > 1]


def _one_model(a: Golden, b: Golden) -> bool:
    same = (a.model.signature, a.model.name) == (b.model.signature, b.model.name)
    return a.model.digest == b.model.digest or same


def _sides(
    a: _Place, b: _Place, yards: dict[tuple[Path, Path], Yardstick | None]
) -> tuple[_Place, _Place, Yardstick | None]:
    """Which of two judges the other: the first that has a floor for what both were computed in."""
    for old, new in ((a, b), (b, a)):
        pair = (old.directory, new.directory)
        if pair not in yards:
            with np.errstate(all="ignore"):
                yards[pair] = yardstick(old.golden, new.golden)
        if yards[pair] is not None:
            return old, new, yards[pair]
    return a, b, None


def _anomaly(each: list[tuple[_Place, _Place, Compared]]) -> Anomaly:
    old, new, compared = max(each, key=lambda one: one[2].times or 0.0)
    judged = compared.times is not None
    more = f"; and in {len(each) - 1} more prompts" if len(each) > 1 else ""
    times = f" ({compared.times:.3g} x the limit)" if judged else ""
    there = "" if old.name == new.name else f" (there {old.name!r})"
    return Anomaly(
        kind="contradiction",
        path=new.directory,
        where=f"prompt {new.name!r}{there}, position {compared.position}",
        message=f"against {old.directory}, which is of the same model: {compared.change.message}{times}{more}",
        fix="Record both again in one environment, and remove the one that was recorded wrongly",
        severity="error" if judged else "warning",
    )
