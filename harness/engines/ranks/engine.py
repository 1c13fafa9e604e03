"""The engines `tp` and `pp`: one model over several ranks, each of them a process.

`tp:size=N` cuts every layer into N shards, `pp:stages=N` the blocks into N stages, and both keys together do both.
This process asks a team of ranks and holds no part of the model itself; under an outer launcher it is rank 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from harness import suites
from harness.engines import hf, spec
from harness.engines.base import Engine
from harness.engines.ranks import outer, plans, probes, serving, spawned, stages
from harness.engines.ranks.layout import Layout, refusal
from harness.engines.ranks.serving import DeepSpeed, Done, Setup, Work
from harness.environment import Quiet
from harness.errors import EngineError, UsageError
from harness.numerics.sketch import Sketcher
from harness.values import Generation, Request, Suite

_TIMEOUT = 60.0

#: The keys of `tp:...` and `pp:...`, each with what reads its value.
READERS: Mapping[str, Callable[[str], Any]] = {
    "size": spec.positive,
    "stages": spec.positive,
    "micro_batches": spec.positive,
    "prepare": str,
    "timeout": spec.seconds,
    "model": str,
    "dtype": spec.one_of("float32", "bfloat16", "float16"),
    "attn": spec.one_of("eager", "sdpa"),
    "batch": spec.positive,
    "chunk": spec.positive,
    "threads": spec.positive,
    "device": spec.one_of("cpu", "cuda"),
}
#: Those of the model, the same on every rank.
OF_MODEL = ("model", "dtype", "attn", "batch", "chunk", "threads", "device")


class Team(Protocol):
    """Ranks that do what they are asked, all at once."""

    spec: str
    timeout: float
    progress: Callable[[str], None]

    @property
    def size(self) -> int:
        """How many there are."""

    @property
    def alive(self) -> bool:
        """Whether they can be asked for more."""

    def meeting(self) -> str:
        """Where they meet for a new group."""

    def call(self, request: str, *arguments: Any, world: int, loading: bool = False) -> list[Any]:
        """Their answers, in their order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What `tp:...` and `pp:...` set beside what a model is loaded with.

    Attributes:
        layout: sizes of the parallelism.
        micro_batches: how many parts a batch goes through the stages in.
        prepare: MODULE:FUNCTION, called on every rank with its engine once the model is loaded.
        timeout: seconds without progress after which a rank has failed.
        model: of the model, the same on every rank.
        deepspeed: what DeepSpeed does with it; None where transformers cuts it.
    """

    layout: Layout
    micro_batches: int = 1
    prepare: str | None = None
    timeout: float = _TIMEOUT
    model: hf.Options = field(default_factory=hf.Options)
    deepspeed: DeepSpeed | None = None


class ParallelEngine(Engine):
    """A model over several ranks.

    Args:
        options: layout and model.
        text: the SPEC.
        name: "tp", "pp" or "deepspeed".

    Attributes:
        cut: how the units of a module are cut along a dimension; None is as transformers cuts.
    """

    cut: Callable[[str, int], plans.Cut] | None = None

    def __init__(self, options: Options, *, text: str, name: str) -> None:
        self.spec = text
        self.options = options
        self.name = name
        self.declared = _declared(options)
        self.capabilities = frozenset()
        self._team: Team | None = None
        self._stack = ExitStack()
        self._shown: Mapping[str, Any] = {}
        self._tokenizer: Any = None
        self._differing: list[str] = []
        self._entered = 0

    # --- opening -------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        # An engine that is open stays as it is: opened anew, it would lose what its user changed in the ranks.
        if self._entered == 0:
            self._open()
        self._entered += 1
        return self

    def _open(self) -> None:
        self._stack = ExitStack()
        try:
            self._stack.enter_context(Quiet())
            source = self.options.model.model
            if source is None:
                raise UsageError(f"the spec {self.spec!r} names no model", fix="Add model=DIR, or pass --model DIR")
            self._config = hf.load_config(source)
            if reason := self.why_not(self._config):
                problem = f"{self.spec} cannot run {Path(source).name}: {reason}"
                raise UsageError(problem, fix="Choose another number, or another engine")
            self._join()
            self._differing = []
            self._shown = self._merged(self.ask("open", self._setup(), loading=True))
            self._compare_tables()
        except BaseException:
            self._stack.close()
            self._team = None
            raise
        able = {"tokens", "logits", "replay", "upcast", "batch"}
        # Kernels of a CPU, and gloo's sums in one order: the same bits each time.
        on_cpu = (self.options.model.device or "cpu") == "cpu"
        self.capabilities = frozenset(able | ({"deterministic"} if on_cpu else set()))
        unaudited = sorted({name for one in self._shown["ranks"] for name in one["unaudited"]})
        if unaudited:
            self.limits = (
                f"weights: {len(unaudited)} tensors are cut in a way that is not known here, {unaudited[0]}",
            )

    def _join(self) -> None:
        outer.follow()
        launched, world = outer.launched(), self.options.layout.world
        if launched is not None:
            if launched.world != world:
                problem = f"{self.spec} needs {world} ranks, and the launcher started {launched.world}"
                raise UsageError(problem, fix=f"Launch {world}, or change the numbers of the SPEC")
            outer.refuse_accelerator(self.options.model.device, self.options.layout.tensor)
            self._team = outer.OuterTeam(launched)
        else:
            device = self.options.model.device or "cpu"
            team = spawned.team_of(world, self.options.model.threads, device=device, environment=self.environment)
            self._stack.callback(spawned.release, team)
            self._team = team
        self._team.spec, self._team.timeout = self.spec, self.options.timeout
        self._stack.callback(self._close_ranks)

    def why_not(self, config: Any) -> str:
        """Why it cannot run a model of this config, in words; empty where it can."""
        return why_not(self.options.layout, config)

    @property
    def environment(self) -> Mapping[str, str]:
        """What its ranks find set, beside what this process has."""
        return {}

    def _close_ranks(self) -> None:
        if self._team is not None and not self.lost:
            self._team.call("close", world=self.options.layout.world)

    def _setup(self) -> Setup:
        return Setup(
            options=self.options.model,
            text=self.spec,
            layout=self.options.layout,
            micro_batches=self.options.micro_batches,
            prepare=self.options.prepare,
            timeout=serving.patience(self.options.timeout),
            meeting=self.team.meeting(),
            deepspeed=self.options.deepspeed,
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._entered = max(0, self._entered - 1)
        if self._entered:
            return
        try:
            self._stack.close()
        finally:
            self._team = None

    @property
    def lost(self) -> bool:
        return self._team is not None and not self._team.alive

    @property
    def team(self) -> Team:
        """The ranks; only inside the ``with`` block."""
        if self._team is None:
            raise EngineError("the engine is closed", fix="Use it inside its with block")
        return self._team

    def ask(self, request: str, *arguments: Any, loading: bool = False) -> list[Any]:
        """The answers of all ranks to a request of serving.Server."""
        self.team.progress = self.progress
        return self.team.call(request, *arguments, world=self.options.layout.world, loading=loading)

    # --- what it is ----------------------------------------------------------------------------

    @property
    def directory(self) -> Path | None:
        """The model's directory."""
        return Path(self.options.model.model) if self.options.model.model else None

    @property
    def settings(self) -> Mapping[str, Any]:
        self.team  # noqa: B018  # raises when closed
        return {**self._shown, "differing": list(self._differing)}

    def _merged(self, shown: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The settings of all ranks as those of one engine, sizes as they are seen, and each rank's own."""
        layout = self.options.layout
        ranks = [dict(one["rank"]) for one in shown]
        holding = {one["stage"] for one in ranks if one["blocks"][0] < one["blocks"][1]}
        head = {key: value for key, value in shown[layout.head].items() if key != "rank"}
        missing = sorted({name for one in shown for name in one["missing_tensors"]})
        is_cut = all(one["cut"] for one in ranks)
        return {
            **head,
            "engine": self.name,
            "dtype": "+".join(sorted({one["dtype"] for one in shown})),
            "missing_tensors": missing,
            "parameters": sum(one["parameters"] for one in ranks),
            "tensor_parallel": layout.tensor if is_cut else 1,
            "pipeline_parallel": len(holding),
            "micro_batches": self.options.micro_batches,
            **({} if self.options.deepspeed is None else {"zero_ranks": layout.zero if is_cut else 1}),
            "blocks": int(self._config.get_text_config().num_hidden_layers),
            "ranks": ranks,
        }

    def _compare_tables(self) -> None:
        """Tables that are derived and not loaded (RoPE's frequencies) are the same on every rank that has them."""
        ranks = self._shown["ranks"]
        for name in dict.fromkeys(name for one in ranks for name in one["tables"]):
            holding = [one for one in ranks if name in one["tables"]]
            shown = [((name, one["tables"][name]),) for one in holding]
            if found := difference(shown, [one["rank"] for one in holding]):
                self._differing.append(found)

    @property
    def vocabulary(self) -> int:
        return int(self._config.get_text_config().vocab_size)

    @property
    def stop_ids(self) -> frozenset[int]:
        return hf.stop_ids_in(str(self.options.model.model))

    def tokenize(self, suite: Suite) -> tuple[Request, ...] | None:
        if self._tokenizer is None:
            self._tokenizer = hf.load_tokenizer(str(self.options.model.model))
        if self._tokenizer is None:
            return None
        text = self._config.get_text_config()
        return suites.resolve(
            suite,
            self._tokenizer,
            context=hf.context_length(text),
            vocabulary=self.vocabulary,
            model=str(self.options.model.model),
        )

    # --- running -------------------------------------------------------------------------------

    def generate(
        self, requests: Sequence[Request], *, batch_size: int | None, stop_ids: frozenset[int]
    ) -> list[Generation]:
        done = self._run(Work(view="generate", requests=requests, batch_size=batch_size, stop_ids=stop_ids))
        assert done.generations is not None
        return done.generations

    def replay(
        self,
        requests: Sequence[Request],
        continuations: Sequence[Sequence[int]],
        *,
        batch_size: int | None,
        sketcher: Sketcher,
    ) -> None:
        self._forced("replay", requests, continuations, batch_size, sketcher)

    def prefill(
        self,
        requests: Sequence[Request],
        continuations: Sequence[Sequence[int]],
        *,
        batch_size: int | None,
        sketcher: Sketcher,
    ) -> None:
        self._forced("prefill", requests, continuations, batch_size, sketcher)

    def _forced(
        self,
        view: Any,
        requests: Sequence[Request],
        continuations: Sequence[Sequence[int]],
        batch_size: int | None,
        sketcher: Sketcher,
    ) -> None:
        empty = Sketcher(sketcher.vocabulary, fingerprints=sketcher.fingerprints, basis=sketcher.basis)
        done = self._run(
            Work(
                view=view, requests=requests, continuations=continuations, batch_size=batch_size, sketcher=empty
            )
        )  # fmt: skip
        assert done.sketcher is not None
        sketcher.take(done.sketcher)

    def _run(self, work: Work) -> Done:
        shown: list[Done] = self.ask("run", work)
        layout = self.options.layout
        for stage in range(layout.stages):
            found = difference([shown[rank].checksums for rank in layout.ranks_of(stage)], layout.ranks_of(stage))
            if found and found not in self._differing:
                self._differing.append(found)
        self._shown = {**self._shown, **shown[layout.head].running}
        return shown[layout.head]

    def probe(self, requests: Sequence[Request], continuations: Sequence[Sequence[int]]) -> list[list[probes.Shown]]:
        """What each rank computes inside its blocks in one prefill of a batch, in the order of the forward."""
        found: list[list[probes.Shown]] = self.ask("probe", requests, continuations)
        return found

    def narrow_operation(self) -> str:
        found: list[str] = self.ask("narrow_operation")
        return next((one for one in found if one), "")

    def upcast(self) -> Engine:
        """The same ranks, their weights and buffers widened to float32 as they are while the copy is open."""
        return _Widened(self)


class _Widened(ParallelEngine):
    """The ranks of another engine while they compute in float32; it is not to be used meanwhile."""

    def __init__(self, loaded: ParallelEngine) -> None:
        super().__init__(loaded.options, text=f"{loaded.spec} (upcast to float32)", name=loaded.name)
        self.declared = {**loaded.declared, "dtype": "float32"}
        self._loaded, self.cut = loaded, loaded.cut

    def __enter__(self) -> Self:
        loaded = self._loaded
        self._team, self._config, self._tokenizer = loaded.team, loaded._config, loaded._tokenizer
        self.progress, self.capabilities = loaded.progress, loaded.capabilities
        self._differing = []
        shown = self.ask("widen", loading=True)
        try:
            self._shown = self._merged(shown)
        except BaseException:
            self.ask("narrow")
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self.lost:
            self.ask("narrow")
        self._team = None


def why_not(layout: Layout, config: Any) -> str:
    """Why a model cannot be run so here, in words; empty where it can.

    Args:
        layout: what is asked for.
        config: of a transformers model.
    """
    try:
        if layout.tensor > 1:
            plans.distributed(config, layout.tensor)
        if layout.stages > 1:
            stages.anatomy_of(config)
    except UsageError as error:
        return error.problem
    return refusal(layout, config)


def difference(checksums: Sequence[Sequence[tuple[str, int]]], ranks: Sequence[int]) -> str:
    """Where ranks first differ in what all of them should hold, in words; empty where they do not.

    Args:
        checksums: of each rank, modules in the order of the forward.
        ranks: their numbers.
    """
    for one in zip_longest(*checksums):
        if len(set(one)) > 1:
            most = max(set(one), key=one.count)
            # A rank that ran no such module, or fewer, differs too; the name is that of those that agree.
            name = next(shown[0] for shown in (most, *one) if shown is not None)
            # Of two that differ neither is more; of more, those that stand alone.
            odd = [rank for rank, shown in zip(ranks, one, strict=True) if shown != most]
            alone = len(odd) < len(one) - len(odd)
            who = f"rank {', '.join(map(str, odd))}" if alone else f"ranks {', '.join(map(str, ranks))}"
            return f"{name}: {who} {'unlike the others' if alone else 'unlike each other'}"
    return ""


def _declared(options: Options) -> dict[str, Any]:
    """What the spec promises, in the words of `settings`."""
    declared = {key: getattr(options.model, key) for key in ("dtype", "attn", "threads", "batch", "chunk")}
    declared["device"] = options.model.device or "cpu"
    declared["tensor_parallel"] = options.layout.tensor
    declared["pipeline_parallel"] = options.layout.stages
    return {key: value for key, value in declared.items() if value is not None}


def build(parsed: spec.Spec, *, model: str | None) -> ParallelEngine:
    """The engine of a SPEC; ``model`` is used where the spec names none.

    Raises:
        UsageError: for an unknown key or value, or without a number of ranks.
    """
    given = spec.read_options(parsed, READERS)
    key = "size" if parsed.engine == "tp" else "stages"
    if key not in given:
        launched = outer.launched()
        if launched is None:
            problem = f"the spec {parsed.text!r} names no {key}"
            raise UsageError(problem, fix=f"Write {parsed.engine}:{key}=2, or start it with torchrun")
        other = given.get("stages" if key == "size" else "size", 1)
        if launched.world % other:
            problem = f"{launched.world} ranks cannot be divided by the {other} of {parsed.text!r}"
            raise UsageError(problem, fix="Launch a multiple of it")
        given[key] = launched.world // other
    layout = Layout(tensor=given.get("size", 1), stages=given.get("stages", 1))
    settings = {"model": model, **{name: given[name] for name in OF_MODEL if name in given}}
    more = {name: given[name] for name in ("micro_batches", "prepare", "timeout") if name in given}
    return ParallelEngine(
        Options(layout=layout, model=hf.Options(**settings), **more), text=parsed.text, name=parsed.engine
    )
