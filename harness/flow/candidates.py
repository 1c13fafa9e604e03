"""What users give as a candidate -> an engine; and the candidates that lie beside goldens as data."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from harness import store
from harness.engines import Engine, build_engine, hf, port
from harness.engines.convention import name_of as name_of_object
from harness.engines.spec import is_port, parse_spec
from harness.errors import GoldenError, UsageError

CANDIDATES = "candidates.toml"


def engine_of(candidate: Any, model: Path | None, progress: Callable[[str], None]) -> Engine:
    """The engine that a SPEC names or that goes around an object, closed.

    Args:
        candidate: a SPEC, an Engine, a transformers model, an nn.Module or a callable.
        model: the directory of weights for a SPEC that names none.
        progress: called with a few words while it works.

    Raises:
        UsageError: for what is no candidate.
    """
    found = _engine_of(candidate, model)
    found.progress = progress
    return found


def _engine_of(candidate: Any, model: Path | None) -> Engine:
    if isinstance(candidate, str):
        return build_engine(candidate, model=None if model is None else str(model))
    if isinstance(candidate, Engine):
        return candidate
    if _is_transformers_model(candidate):
        return hf.from_model(candidate)
    if callable(candidate):
        return port.from_object(candidate)
    raise UsageError(
        f"a {type(candidate).__name__} is not a candidate",
        fix="Give a SPEC, an Engine, a transformers model, an nn.Module, a callable or a Trace",
    )


def name_of(candidate: Any) -> str:
    """What reports call it before it is opened."""
    if isinstance(candidate, Engine):
        return candidate.spec
    return candidate if isinstance(candidate, str) else name_of_object(candidate)


def _is_transformers_model(candidate: Any) -> bool:
    from transformers import PreTrainedModel

    return isinstance(candidate, PreTrainedModel)


def check_all(root: Path, *, quick: bool, allow_code: bool = False) -> Iterator[tuple[Path, str]]:
    """Every golden under ``root`` with each candidate that the data beside it names, in order.

    Raises:
        GoldenError: where there is no golden, or no list of candidates beside one.
    """
    goldens = store.list_goldens(root)
    if not goldens:
        raise GoldenError(f"there is no golden under {root}", fix="Name the directory with --root, or record one")
    for directory in goldens:
        for candidate in candidates(directory, quick=quick, allow_code=allow_code):
            yield directory, candidate


def candidates(directory: Path, *, quick: bool, allow_code: bool = False) -> list[str]:
    """The SPECs to check a golden with, from `candidates.toml` beside it or one directory up.

    Args:
        directory: of the golden.
        quick: only the quick ones.
        allow_code: accept SPECs that execute code of their own (ports, trust_remote_code): the file may be another's.

    Raises:
        GoldenError: where there is no list, or it cannot be used.
    """
    file = next((path / CANDIDATES for path in (directory, directory.parent) if (path / CANDIDATES).is_file()), None)
    if file is None:
        raise GoldenError(
            f"no {CANDIDATES} lies beside {directory} or one directory up",
            fix='Write one with quick = ["hf:dtype=float32"] and full = []',
        )
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise GoldenError(f"{file} is not TOML ({error})", fix="Mend the line that it names") from None
    lists = [data.get("quick", []), [] if quick else data.get("full", [])]
    unknown = sorted(set(data) - {"quick", "full"})
    if unknown or not all(isinstance(one, list) and all(isinstance(spec, str) for spec in one) for one in lists):
        wrong = f"the key {unknown[0]!r}" if unknown else "something that is no list of SPECs"
        raise GoldenError(f"{file} holds {wrong}", fix='Write quick = ["hf:dtype=float32"] and full = ["..."]')
    specs = [*lists[0], *lists[1]]
    if not specs:
        raise GoldenError(f"{file} names no candidate", fix='Write quick = ["hf:dtype=float32"], or remove the golden')
    for spec in specs:
        try:
            build_engine(spec)
        except UsageError as error:
            raise GoldenError(f"{file}: {error.problem}", fix=error.fix) from None
        if not allow_code and _executes(spec):
            raise GoldenError(f"{file} names {spec}, which executes code", fix="If you trust it, add --allow-code")
    return specs


def _executes(text: str) -> bool:
    """Whether a SPEC runs code that it names."""
    options = parse_spec(text).options
    return is_port(text) or options.get("trust_remote_code") == "true" or "prepare" in options
