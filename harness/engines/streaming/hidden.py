"""Hidden states between two blocks: in memory while they fit a budget, else in a file; and on disk to go on from.

With a directory every block is a commit: the new states are a whole file, on disk, before the file that names them
replaces its predecessor. Whoever is killed finds the last commit, whatever else lies there.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Self

from harness.errors import ModelError, UsageError
from harness.files import content_digest, replace_file, sync

if TYPE_CHECKING:
    import torch

PROGRESS = "progress.json"
_HIDDEN, _SUMS = re.compile(r"hidden-\d+\.bin"), re.compile(r"sums-[a-z]+-\d+\.safetensors")
#: The stage of work that is done, and whose sums are kept.
FINISHED = "finished"


class States:
    """A list of tensors [B, T, H] that is replaced as a whole, block by block.

    Args:
        shapes: of each.
        dtype: of all.
        directory: where to commit; None to commit nothing.
        budget: bytes that may stay in memory.
        work: digest of what is done; progress of other work is not gone on from.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, *, directory: Path | None, budget: int, work: str
    ) -> None:
        self._shapes, self._dtype, self._work = [tuple(shape) for shape in shapes], dtype, work
        sizes = [math.prod(shape) * dtype.itemsize for shape in self._shapes]
        self._starts = [sum(sizes[:index]) for index in range(len(sizes))]
        self.bytes = sum(sizes)
        self.spilled = self.bytes > budget
        self._committed = directory
        self._directory = directory
        self._stack = ExitStack()
        self._memory: list[torch.Tensor | None] = [None] * len(self._shapes)
        self._file: Path | None = None
        self._next: BinaryIO | None = None
        self._number = 0

    def __enter__(self) -> Self:
        if self._directory is None and self.spilled:
            self._directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="harness-stream-")))
        if self._committed is not None:
            self._committed.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._next is not None:
            self._next.close()
        self._stack.close()

    def read(self, index: int) -> torch.Tensor:
        """The tensor as it was last committed."""
        import torch

        kept = self._memory[index]
        if kept is not None:
            return kept
        assert self._file is not None
        shape = self._shapes[index]
        data = bytearray(math.prod(shape) * self._dtype.itemsize)
        with self._file.open("rb") as opened:
            opened.seek(self._starts[index])
            if opened.readinto(data) != len(data):
                raise UsageError(f"{self._file} is truncated", fix="Remove its directory, and start again")
        return torch.frombuffer(data, dtype=self._dtype).reshape(shape)

    def write(self, index: int, tensor: torch.Tensor) -> None:
        """The tensor's next value; all are written, in order, before they are committed."""
        import torch

        tensor = tensor.detach().to("cpu")
        if tuple(tensor.shape) != self._shapes[index] or tensor.dtype != self._dtype:
            problem = f"a block gives {tensor.dtype} {list(tensor.shape)}, not {self._dtype} {self._shapes[index]}"
            raise ModelError(problem, fix="Such a model cannot be streamed: load it with hf:")
        if not self.spilled:
            # Read before it is written, so that the old one is not needed any more.
            self._memory[index] = tensor
        if self._directory is not None:
            if index == 0:
                self._number += 1
                self._next = (self._directory / f"hidden-{self._number}.bin").open("wb")
            assert self._next is not None
            self._next.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def commit(self, words: Mapping[str, Any]) -> None:
        """Make what was written the current states, with the words that say how far the work is."""
        before = self._file
        if self._next is not None:
            self._next.flush()
            if self._committed is not None:
                os.fsync(self._next.fileno())
            self._next.close()
            self._file, self._next = Path(self._next.name), None
        self.note(words)
        if before is not None and before != self._file:
            before.unlink(missing_ok=True)

    def note(self, words: Mapping[str, Any], arrays: Mapping[str, torch.Tensor] | None = None) -> None:
        """Commit words, and small arrays, beside the states that are current."""
        if self._committed is None:
            return
        document: dict[str, Any] = {"work": self._work, "hidden": self._file.name if self._file else None, **words}
        old = {path.name for path in _named(self._committed, _SUMS)}
        if arrays is not None:
            from safetensors.torch import save

            document["sums"] = f"sums-{words['stage']}-{words['done']}.safetensors"
            replace_file(self._committed / document["sums"], save({k: v.contiguous() for k, v in arrays.items()}))
        document["digest"] = content_digest(document)
        replace_file(self._committed / PROGRESS, (json.dumps(document) + "\n").encode())
        for name in old - {document.get("sums")}:
            (self._committed / name).unlink(missing_ok=True)

    def resume(self) -> dict[str, Any] | None:
        """The words of the last commit of this very work, its states current again; None to start at the beginning.

        Raises:
            UsageError: where other work can be gone on from there, or files lie there that no pass wrote.
        """
        if self._committed is None:
            return None
        _refuse_others(self._committed)
        words = progress_in(self._committed)
        if words is not None and words.get("work") != self._work and _is_intact(self._committed, words):
            raise UsageError(
                f"{self._committed} holds other work, {_so_far(words)}: other prompts, weights, settings or versions",
                fix="Run that to its end, remove the directory, or name another as work=",
            )
        if words is None or words.get("work") != self._work:
            self._anew()
            return None
        if not _is_intact(self._committed, words):
            if words.get("done") != 0 or words.get("hidden") is not None:
                self._anew()
            return None
        if words.get("hidden") is None:
            return words
        file = self._committed / str(words["hidden"])
        if file.stat().st_size != self.bytes:
            self._anew()
            return None
        self._file, self._number = file, int(file.stem.rpartition("-")[2])
        for path in _named(self._committed, _HIDDEN):
            if path != file:
                path.unlink(missing_ok=True)  # half written when the process ended
        if not self.spilled:
            self._memory = [self.read(index) for index in range(len(self._shapes))]
        return words

    def arrays(self, words: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The small arrays of a commit."""
        from safetensors.torch import load_file

        assert self._committed is not None
        return load_file(self._committed / str(words["sums"])) if words.get("sums") else {}

    def finish(self, arrays: Mapping[str, torch.Tensor] | None) -> None:
        """Nothing is left to go on from; with arrays these stay, for whoever asks for the same work again."""
        if arrays is None:
            self._clear()
            return
        file, self._file = self._file, None
        self.note({"stage": FINISHED, "done": 0}, arrays)
        if file is not None and self._committed is not None:
            file.unlink(missing_ok=True)

    def _anew(self) -> None:
        """Nothing to go on from; the first words are there before the first file, which so is known as a pass's."""
        self._clear()
        self.note({"stage": "blocks", "done": 0})

    def _clear(self) -> None:
        if self._committed is not None:
            forget(self._committed)


def forget(directory: Path) -> None:
    """Remove what was committed there, and nothing else: without words of a pass no file there is one's."""
    if not _is_ours(directory / PROGRESS):
        return
    for path in [*_named(directory, _HIDDEN), *_named(directory, _SUMS)]:
        path.unlink(missing_ok=True)
    (directory / PROGRESS).unlink(missing_ok=True)  # the last: it says whose the others are
    sync(directory)


def work_in(directory: Path) -> str | None:
    """The digest of the work whose last commit lies there, None without one."""
    words = progress_in(directory)
    return None if words is None else str(words["work"])


def _refuse_others(directory: Path) -> None:
    """No file of a pass's names that no pass wrote.

    Raises:
        UsageError: for one.
    """
    if _is_ours(directory / PROGRESS):
        return
    found = [*_named(directory, _HIDDEN), *_named(directory, _SUMS)]
    if (directory / PROGRESS).exists():
        found.append(directory / PROGRESS)
    if found:
        problem = f"{directory} holds {found[-1].name}, which is not known to be a streamed pass's"
        raise UsageError(problem, fix="Remove it, or name another directory as work=")


def _is_ours(progress: Path) -> bool:
    """Whether a pass wrote it, damaged or not."""
    words = _words(progress)
    return words is not None and {"work", "hidden", "stage", "digest"} <= words.keys()


def _is_intact(directory: Path, words: Mapping[str, Any]) -> bool:
    """Whether there is something to go on from, or a result."""
    named = [(pattern, str(words[key])) for key, pattern in (("hidden", _HIDDEN), ("sums", _SUMS)) if words.get(key)]
    return bool(named) and all(pattern.fullmatch(name) and (directory / name).is_file() for pattern, name in named)


def _so_far(words: Mapping[str, Any]) -> str:
    done = words.get("done")
    return {"blocks": f"{done} blocks done", "head": f"{done} slices of the head done"}.get(
        str(words.get("stage")), "finished"
    )


def _named(directory: Path, pattern: re.Pattern[str]) -> list[Path]:
    return [path for path in directory.iterdir() if pattern.fullmatch(path.name)]


def progress_in(directory: Path) -> dict[str, Any] | None:
    """What a directory's last commit says, None without one or where it was damaged."""
    words = _words(directory / PROGRESS)
    return words if words is not None and words.get("digest") == content_digest(words) else None


def _words(progress: Path) -> dict[str, Any] | None:
    try:
        words = json.loads(progress.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return words if isinstance(words, dict) else None
