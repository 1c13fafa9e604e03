"""Write files so that at every moment the old or the new content is there; JSON for people and for digests."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time; another waits.

    Args:
        path: a directory, or a lock file, which is made where it is not there.
    """
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDONLY | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def replace_file(path: Path, payload: bytes) -> None:
    """Write ``payload`` beside ``path`` and move it there in one step, on disk before this returns."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as opened:
            opened.write(payload)
            opened.flush()
            os.fsync(opened.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(directory: Path) -> None:
    """Make the names in a directory last through a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def content_digest(document: Mapping[str, Any]) -> str:
    """Over the content, not the layout: whitespace may change, nothing else."""
    content = {key: value for key, value in document.items() if key != "digest"}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def readable_json(value: Any, indent: str = "") -> str:
    """JSON for people and for `git diff`: one key a line, a list of plain values on one line."""
    deeper = indent + "  "
    if isinstance(value, Mapping) and value:
        members = (f"{deeper}{json.dumps(key)}: {readable_json(item, deeper)}" for key, item in value.items())
        return "{\n" + ",\n".join(members) + f"\n{indent}}}" + ("" if indent else "\n")
    if isinstance(value, (list, tuple)) and any(isinstance(item, (Mapping, list, tuple)) for item in value):
        return "[\n" + ",\n".join(deeper + readable_json(item, deeper) for item in value) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
