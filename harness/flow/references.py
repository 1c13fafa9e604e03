"""Where a golden's own model lies, and a fresh copy of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from harness import checkpoint, store
from harness.engines import hf
from harness.errors import ModelError, StaleError
from harness.values import Golden

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


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
