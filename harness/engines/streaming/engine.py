"""The `stream` engine: teacher-forced scoring of a model of which only one block is in memory at a time.

It shows the prefill view alone: what a decode loop or a batch shape does is not seen, and the verdict says so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from harness import suites
from harness.engines import hf, modules, spec
from harness.engines.base import Engine
from harness.engines.ranks import outer
from harness.engines.streaming import files, preflight, spreading
from harness.engines.streaming.grouping import Group, groups
from harness.environment import Quiet, thread_count, versions
from harness.errors import EngineError, UsageError
from harness.numerics.sketch import Sketcher
from harness.numerics.sliced import SlicedSketch
from harness.values import Generation, Request, Rows, Suite

if TYPE_CHECKING:
    from harness.engines.streaming.passes import Took, Variant
    from harness.engines.streaming.skeleton import Skeleton

_GB = 10**9
#: Hidden states up to this stay in memory.
_BUDGET_GB = 2.0
#: Seconds without a word after which a rank has failed: a large block of many prompts takes minutes, and says so.
_TIMEOUT = 600.0
#: Letters of a digest that name the directory of one of a check's passes.
_PART = 12

_LIMITS = (
    "the decode path: a streamed pass scores whole sequences alone",
    "batches, padding and repeats: every run of the suite is the same one pass over the weights",
)


def gigabytes(value: str) -> float:
    """A reader for a size in GB."""
    try:
        found = float(value)
    except ValueError:
        found = -1.0
    if not 0 <= found <= 10**6:
        raise ValueError("a number of GB")
    return found


#: The keys of `stream:...`, each with what reads its value.
READERS: Mapping[str, Callable[[str], Any]] = {
    "model": str,
    "dtype": spec.one_of(*hf.DTYPES),
    "weights": spec.one_of("float32", "bfloat16", "float16"),
    "attn": spec.one_of("eager", "sdpa"),
    "threads": spec.positive,
    "device": str,
    "read": spec.one_of("direct", "cached"),
    "hidden_gb": gigabytes,
    "work": str,
    "ranks": spec.positive,
    "timeout": spec.seconds,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What `stream:key=value,...` sets.

    ``dtype`` None is the checkpoint's own. ``weights`` rounds the weights to a dtype first. ``read`` says whether
    files come past the page cache: None is that for checkpoints of more than half of the free memory. ``hidden_gb``
    is what hidden states may keep in memory; the rest is in a file. ``work`` names a directory to commit to after
    each block, from which a run that was killed goes on. ``ranks`` processes, those of an outer launcher where there
    is one, share the prompts; one that says nothing for ``timeout`` seconds has failed.
    """

    model: str | None = None
    dtype: str | None = None
    weights: str | None = None
    attn: str | None = None
    threads: int | None = None
    device: str | None = None
    read: str | None = None
    hidden_gb: float = _BUDGET_GB
    work: str | None = None
    ranks: int = 1
    timeout: float = _TIMEOUT


class StreamEngine(Engine):
    """A checkpoint on disk, scored in one pass over its weights.

    Args:
        options: where it is and how it runs.
        text: the SPEC that names it in reports.
        widens: whether it stands for a copy of ``weights`` widened to ``dtype``, buffers too.
    """

    def __init__(self, options: Options, *, text: str, widens: bool = False) -> None:
        self.spec = text
        self.options = options
        self.declared = {
            key: value
            for key in ("dtype", "attn", "threads", "weights", "device")
            if (value := getattr(options, key)) is not None and not (widens and key == "weights")
        }
        if "device" in self.declared:
            self.declared = {**self.declared, "device": str(options.device).partition(":")[0]}
        if options.ranks > 1:
            self.declared = {**self.declared, "prompt_ranks": options.ranks}
        self.capabilities = frozenset({"logits", "upcast"})
        self.limits = _LIMITS
        #: What the last pass took, piece by piece.
        self.took: list[Took] = []
        #: Passes that share this machine's memory.
        self.beside = 1
        self._widens = widens
        self._stack = ExitStack()
        self._entered = 0
        self._places: dict[str, files.Place] = {}
        self._skeleton: Skeleton | None = None
        self._tokenizer: Any = None
        self._known: tuple[str, Rows] | None = None
        self._ran: dict[str, Any] = {}
        self._ranks: spreading.Ranks | None = None

    # --- opening -----------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if self._entered == 0:
            self._stack = ExitStack()
            self._stack.enter_context(Quiet())
            self._stack.enter_context(thread_count(self.options.threads))
            try:
                self._open()
            except BaseException:
                self._stack.close()
                raise
        self._entered += 1
        return self

    def _open(self) -> None:
        from harness.engines.streaming import skeleton

        source = self.directory
        hf.must_exist(str(source))
        self._places = files.survey(source)
        self._native = files.native_dtype(self._places)
        self._dtype = self.options.dtype or self._native
        self._load = self.options.weights or self._dtype
        built = self._load if self._widens else self._dtype
        self._skeleton = skeleton.build(
            str(source), self._places, load=built, dtype=self._dtype, attention=self.options.attn
        )
        self._known = None
        self._ran = {}
        if self.options.ranks > 1:
            self._ranks = spreading.Ranks(
                self.options.ranks,
                spec=self.spec,
                threads=self.options.threads,
                device=self.options.device,
                timeout=self.options.timeout,
            )
            self._stack.callback(self._ranks.close)
            self._ranks.join()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._entered = max(0, self._entered - 1)
        if not self._entered:
            self._skeleton = None
            self._known = None
            self._stack.close()
            self._ranks = None

    @property
    def lost(self) -> bool:
        return self._ranks is not None and self._ranks.lost

    # --- what it is --------------------------------------------------------------------------------

    @property
    def directory(self) -> Path:
        """The model's directory.

        Raises:
            UsageError: where nobody named one.
        """
        if self.options.model is None:
            raise UsageError(f"the spec {self.spec!r} names no model", fix="Add model=DIR, or pass --model DIR")
        return Path(self.options.model)

    @property
    def skeleton(self) -> Skeleton:
        """The empty model; only inside the ``with`` block."""
        if self._skeleton is None:
            raise EngineError("the engine is closed", fix="Use it inside its with block")
        return self._skeleton

    @property
    def vocabulary(self) -> int:
        return self.skeleton.head_places[0].shape[0]

    @property
    def stop_ids(self) -> frozenset[int]:
        return hf.stop_ids_in(str(self.directory))

    @property
    def context(self) -> int | None:
        """The longest sequence, in tokens; None where the config does not say."""
        return hf.context_length(self.skeleton.model.config.get_text_config())

    @property
    def settings(self) -> Mapping[str, Any]:
        """What is in force: dtype and device as the parts had them in the last pass; before it, as they will be."""
        import torch

        model = self.skeleton.model
        return {
            "engine": "stream",
            "model": type(model).__name__,
            "dtype": self._ran.get("dtype", self._dtype),
            "buffers": modules.dtypes(model.buffers()),
            "weights": self.options.weights if not self._widens else None,
            "attn": getattr(model.config, "_attn_implementation", "unknown"),
            "threads": torch.get_num_threads(),
            "device": self._ran.get("device", (self.options.device or "cpu").partition(":")[0]),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "missing_tensors": [],
            "signature": files.signature(self._places),
            "native_dtype": self._native,
            "prompt_ranks": self._ran.get("prompt_ranks", self.options.ranks),
            "versions": versions(),
        }

    def tokenize(self, suite: Suite) -> tuple[Request, ...] | None:
        return None if self.tokenizer is None else self.resolve(suite)

    def resolve(self, suite: Suite) -> tuple[Request, ...]:
        """The suite's prompts as ids; without a tokenizer only prompts that are ids already."""
        return suites.resolve(
            suite, self.tokenizer, context=self.context, vocabulary=self.vocabulary, model=str(self.directory)
        )

    @property
    def tokenizer(self) -> Any:
        """The tokenizer beside the model, None without one."""
        if self._tokenizer is None:
            self._tokenizer = hf.load_tokenizer(str(self.directory))
        return self._tokenizer

    # --- running -----------------------------------------------------------------------------------

    def generate(
        self, requests: Sequence[Request], *, batch_size: int | None, stop_ids: frozenset[int]
    ) -> list[Generation]:
        raise EngineError(
            f"{self.spec} reads all weights for every token", fix="Record with a draft: harness record --stream"
        )

    def replay(
        self,
        requests: Sequence[Request],
        continuations: Sequence[Sequence[int]],
        *,
        batch_size: int | None,
        sketcher: Sketcher,
    ) -> None:
        raise EngineError(f"{self.spec} has no decode loop", fix="Ask for the view prefill")

    def prefill(
        self,
        requests: Sequence[Request],
        continuations: Sequence[Sequence[int]],
        *,
        batch_size: int | None,
        sketcher: Sketcher,
        chunk: int | None = None,
    ) -> None:
        """One pass over the weights; asked for the same again while it is open, it has the rows at hand."""
        sequences = [(*one.prompt_ids, *tokens) for one, tokens in zip(requests, continuations, strict=True)]
        starts = [len(one.prompt_ids) for one in requests]
        key = _digest([sequences, starts, sketcher.vocabulary, sketcher.fingerprints, _of_basis(sketcher.basis)])
        if self._known is None or self._known[0] != key:
            rows = self.score(sequences, starts, vocabulary=sketcher.vocabulary, basis=sketcher.basis,
                              fingerprints=sketcher.fingerprints, part=key[:_PART])[0]  # fmt: skip
            self._known = (key, rows)
            if self.options.work:
                with suppress(OSError):  # there is more in it
                    (Path(self.options.work) / key[:_PART]).rmdir()
        sketcher.put(self._known[1])

    def score(
        self,
        sequences: Sequence[Sequence[int]],
        starts: Sequence[int],
        *,
        vocabulary: int | None = None,
        variants: Sequence[Variant | None] = (None,),
        basis: NDArray[np.float64] | None = None,
        fingerprints: bool = False,
        keep: bool = False,
        part: str = "",
    ) -> list[Rows]:
        """Rows of every sequence, for each variant, all from one pass over the weights.

        Args:
            sequences: prompt and continuation.
            starts: where the continuation of each begins.
            vocabulary: columns of the golden; None is all that the model has.
            variants: ways to compute, None being the plain one.
            basis: as a Sketcher's.
            fingerprints: as a Sketcher's.
            keep: leave the result in the directory ``work``: asked for again, it is there.
            part: of that directory, where several passes take turns.

        Raises:
            HarnessError: before the first block is read, for what would fail later.
        """
        if self._ranks is not None:
            return self._spread(sequences, starts, vocabulary, variants, basis, fingerprints, part)
        from harness.engines.streaming import passes

        together = groups([sequence[:-1] for sequence in sequences], heads=self._heads)
        if not together:
            return [Sketcher(vocabulary or self.vocabulary).rows() for _ in variants]
        sketches = [
            [
                _sketch(group, sequences, starts, vocabulary or self.vocabulary, self.vocabulary, fingerprints, basis)
                for group in together
            ]
            for _ in variants
        ]
        work = Path(self.options.work) / part if self.options.work else None
        settings = passes.Settings(
            load=self._load,
            dtype=self._dtype,
            device=self.options.device or "cpu",
            direct=preflight.reads_directly(self._places)
            if self.options.read is None
            else self.options.read == "direct",
            budget=int(self.options.hidden_gb * _GB),
            directory=work,
            rounds=self._load not in (self._native, self._dtype),
            converts=all(
                files.FLOATS.get(place.dtype) not in (None, self._load)
                for block in self.skeleton.block_places()
                for place in block
            ),
            late=self._dtype != self._native and preflight.is_large(self.skeleton, self._dtype),
            keep=keep and work is not None,
            beside=self.beside,
            work=self._work_digest(
                sequences, starts, [str(variant) for variant in variants], vocabulary, fingerprints, _of_basis(basis)
            ),
        )
        estimate = preflight.check(self.skeleton, settings, together, len(variants))
        self.progress(str(estimate))
        one = passes.Pass(
            skeleton=self.skeleton,
            settings=settings,
            groups=together,
            sketches=sketches,
            variants=variants,
            progress=self.progress,
            lift=self._lift,
        )
        one.run()
        self.took = one.took
        if one.dtypes:  # a result that was kept runs nothing
            self._ran = {"dtype": modules.common(one.dtypes), "device": modules.common(one.devices)}
        return [_rows(parts, vocabulary or self.vocabulary) for parts in sketches]

    def _spread(
        self,
        sequences: Sequence[Sequence[int]],
        starts: Sequence[int],
        vocabulary: int | None,
        variants: Sequence[Variant | None],
        basis: NDArray[np.float64] | None,
        fingerprints: bool,
        part: str,
    ) -> list[Rows]:
        """As `score`, by the ranks. What they commit is used up when all are done: a result is not kept."""
        assert self._ranks is not None
        asked = spreading.Asked(
            options=self.options,
            text=self.spec,
            widens=self._widens,
            shares=spreading.shares(sequences, self.options.ranks),
            local=0,
            sequences=sequences,
            starts=starts,
            vocabulary=vocabulary,
            variants=variants,
            basis=basis,
            fingerprints=fingerprints,
            part=part,
        )
        found = self._ranks.ask(asked, self.progress)
        rows = spreading.merged(asked, found, vocabulary or self.vocabulary)
        self.took = found[0].took
        self._ran = {
            **{key: modules.common(one.ran[key] for one in found) for key in ("dtype", "device")},
            "prompt_ranks": len(found),
        }
        return rows

    def upcast(self) -> StreamEngine:
        """The weights as this engine loads them, and what its config gives in that dtype, widened to float32."""
        wide = "float64" if self._dtype == "float64" else "float32"
        options = replace(self.options, dtype=wide, weights=self._load, work=None)
        text = f"{self.spec} (upcast to {wide})"
        return StreamEngine(options, text=text, widens=True)

    @property
    def _heads(self) -> int:
        return int(getattr(self.skeleton.model.config.get_text_config(), "num_attention_heads", 1) or 1)

    def _lift(self) -> AbstractContextManager[object]:
        if self._dtype != "float64":
            return nullcontext()
        from harness.engines.float64 import Float64Lift

        return Float64Lift()

    def _work_digest(self, *what: Any) -> str:
        config = self.skeleton.model.config.to_json_string()
        how = [self._load, self._dtype, self.options.attn, self.options.device, self._widens, versions()]
        return _digest([files.stamp(self._places), config, how, *what])


def digest_of(*what: Any) -> str:
    """SHA-256 of plain values: names a piece of work."""
    return _digest(list(what))


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()


def _of_basis(basis: NDArray[np.float64] | None) -> str:
    return "" if basis is None else hashlib.sha256(basis.tobytes()).hexdigest()


def _sketch(
    group: Group,
    sequences: Sequence[Sequence[int]],
    starts: Sequence[int],
    vocabulary: int,
    columns: int,
    fingerprints: bool,
    basis: NDArray[np.float64] | None,
) -> SlicedSketch:
    """What condenses a group's logits: those at index p predict the token at p + 1."""
    request = np.concatenate([np.full(n, i, dtype=np.int32) for i, n in zip(group.members, group.lengths, strict=True)])
    position = np.concatenate([np.arange(1, n + 1, dtype=np.int32) for n in group.lengths])
    following = np.concatenate([np.asarray(sequences[i][1:], dtype=np.int64) for i in group.members])
    return SlicedSketch(
        vocabulary,
        columns,
        following,
        request=request,
        position=position,
        generated=position >= np.asarray(starts)[request],
        fingerprints=fingerprints,
        basis=basis,
    )


def _rows(parts: Sequence[SlicedSketch], vocabulary: int) -> Rows:
    sketcher = Sketcher(vocabulary)
    for part in parts:
        sketcher.put(part.rows())
    return sketcher.rows()


def build(parsed: spec.Spec, *, model: str | None) -> StreamEngine:
    """The engine of a SPEC; ``model`` is used where the spec names none."""
    return StreamEngine(_options(parsed, model), text=parsed.text)


def _options(parsed: spec.Spec, model: str | None) -> Options:
    """What a SPEC sets; without a number of ranks those that an outer launcher started."""
    given = {"model": model, **spec.read_options(parsed, READERS)}
    if "ranks" not in given and (launched := outer.launched()) is not None:
        given["ranks"] = launched.world
    return Options(**given)


def build_reference(parsed: spec.Spec, *, model: str, dtype: str, weights: str | None = None) -> StreamEngine:
    """The engine of a SPEC for a model and in a precision that are given, whatever the SPEC says of them."""
    options = _options(parsed, None)
    return StreamEngine(replace(options, model=model, dtype=dtype, weights=weights), text=parsed.text)
