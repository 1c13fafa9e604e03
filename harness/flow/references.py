"""Where a golden's own model lies, and a fresh copy of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness import checkpoint, store
from harness.engines import hf
from harness.engines.spec import is_streamed, parse_spec
from harness.engines.streaming import engine as streaming
from harness.errors import ModelError, StaleError, UsageError
from harness.values import Golden

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """A golden's own model: where it lies, and the SPEC that it is streamed by where it is asked, "" for in memory."""

    directory: Path
    stream: str


def read(golden: Golden | str | Path) -> Golden:
    """A golden as it is, or read from its directory."""
    return golden if isinstance(golden, Golden) else store.read_golden(Path(golden))


def reference_directory(golden: Golden, reference: str | Path | None = None) -> Path | None:
    """Where the golden's model lies: as given, else beside the golden; None where it cannot be found.

    Raises:
        ModelError: when the given directory is not there.
        StaleError: when the model there is not the one that the golden was recorded from.
    """
    if reference is not None and not Path(reference).is_dir():
        raise ModelError(f"there is no model directory {reference}", fix="Check the path given as --reference")
    found = Path(reference) if reference is not None else beside(golden)
    if found is None or not found.is_dir():
        return None
    if golden.model.digest and checkpoint.identify(found).digest != golden.model.digest:
        raise StaleError(
            f"the model at {found} is not the one that {golden.name} was recorded from",
            fix="Record the golden again, or restore the model; to test other weights write hf:model=DIR",
        )
    return found


def reference_of(golden: Golden, reference: str | Path | Reference | None = None) -> Reference | None:
    """The golden's model, and how it is asked; None where it cannot be found.

    Args:
        golden: what it was recorded from; where that was done by streaming, the model is streamed here too, as it may
            not fit into memory.
        reference: its directory, or ``stream:key=value,...`` to stream it, from ``model`` or from beside the golden.

    Raises:
        ModelError: when the given directory is not there.
        StaleError: when the model there is not the one that the golden was recorded from.
        UsageError: for a SPEC that gives the reference another precision than the golden's.
    """
    if isinstance(reference, Reference):
        return reference
    stream, place = "", reference
    if reference is not None and is_streamed(str(reference)):
        stream = str(reference)
        options = streaming.build(parse_spec(stream), model=None).options
        if options.dtype not in (None, golden.precision) or options.weights is not None:
            raise UsageError(
                f"{golden.name} was recorded in {golden.precision}, and so is its reference run",
                fix="Leave dtype and weights out of --reference",
            )
        place = options.model
    elif golden.provenance.get("engine") == "stream":
        stream = "stream"
    found = reference_directory(golden, place)
    return None if found is None else Reference(directory=found, stream=stream)


def beside(golden: Golden) -> Path | None:
    """The model's directory as the golden names it, whether it is there or not."""
    path = golden.model.path
    if golden.directory is None or path is None or Path(path).is_absolute():
        return None
    return Path(os.path.normpath(Path(golden.directory) / path))


def model_name(path: Path) -> str:
    """The directory's name; for golden/NAME/model it is NAME."""
    path = path.resolve()
    return path.parent.name if path.name == "model" else path.name


def reference_model(
    golden: Golden | str | Path, path: str | Path | None = None, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """A fresh transformers model, the one that the golden was recorded from.

    Args:
        golden: a golden or its directory.
        path: the model's directory, where it does not lie beside the golden.
        dtype: torch dtype to load in; the checkpoint's own by default.

    Raises:
        ModelError: where the model cannot be found.
        StaleError: where it is another one by now.
    """
    golden = read(golden)
    directory = reference_directory(golden, path)
    if directory is None:
        raise ModelError(f"the model of {golden.name} is not beside it", fix="Pass its directory as path=")
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    with hf.HFEngine(hf.Options(model=str(directory), dtype=name), text="reference") as engine:
        return engine.model
