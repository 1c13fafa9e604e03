"""The `hf` engine: a transformers causal language model, driven through our own decode loop.

Our loop, not `model.generate`, so that a free run and a forced one are the same code; a test holds
the two token for token.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from harness import checkpoint, suites
from harness.engines import cuda, decoding, gaudi, hooks, modules, placement, spec
from harness.engines.base import Engine
from harness.environment import Quiet, dtype_key, thread_count, versions
from harness.errors import EngineError, ModelError, UsageError, first_line
from harness.numerics import quantise
from harness.numerics.constants import TOP
from harness.numerics.sketch import Sketcher
from harness.values import NOT_USED, Generation, Request, Suite

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

#: Logits of one planned prefill batch stay below this, in float64.
_LOGITS_BYTES = 2**31

#: Characters of a loader's own message that are repeated.
_LONGEST = 300

DTYPES = ("float64", "float32", "bfloat16", "float16")

#: What an engine shows, by its option ``show``: a served model shows less of itself.
_SHOWN: Mapping[str, frozenset[str]] = {
    "logits": frozenset({"tokens", "logits", "replay", "modules", "upcast", "batch", "deterministic"}),
    "top": frozenset({"tokens", "top_logprobs", "batch", "deterministic"}),
    "tokens": frozenset({"tokens", "batch", "deterministic"}),
}


def _quantiser(text: str) -> str:
    """A reader for the name of a quantiser."""
    quantise.parse(text)
    return text


#: The keys of `hf:...`, each with what reads its value.
READERS: Mapping[str, Callable[[str], Any]] = {
    "model": str,
    "dtype": spec.one_of(*DTYPES),
    "weights": spec.one_of("float32", "bfloat16", "float16", *quantise.SCHEMES),
    "quantised": _quantiser,
    "attn": spec.one_of("eager", "sdpa"),
    "static_cache": spec.flag,
    "compile": spec.flag,
    "batch": spec.positive,
    "chunk": spec.positive,
    "show": spec.one_of(*_SHOWN),
    "threads": spec.positive,
    "device": str,
    "device_map": spec.one_of(*placement.MAPS),
    "tf32": spec.flag,
    "deterministic": spec.flag,
    "graphs": spec.flag,
    "bucket": spec.positive,
    "trust_remote_code": spec.flag,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What `hf:key=value,...` sets.

    ``dtype`` None is the checkpoint's own. ``weights`` rounds the weights to a dtype first and then computes
    in ``dtype``: with float64 this is the centre R_D of numerics.md 2.2. With a name of quantise.SCHEMES the weights
    of the blocks are quantised and dequantised instead. ``quantised`` only declares how the checkpoint was made, and
    changes nothing. ``batch`` overrides every run's size. ``chunk`` feeds prompts in pieces of that many tokens
    through the KV cache. ``show`` hides what a served model would hide. ``device`` None is the CPU for a model that
    is loaded, and wherever it is for a live one. ``device_map`` lets accelerate place the weights. On CUDA ``tf32``
    lets products of float32 round, ``deterministic=False`` takes kernels that sum in any order, ``graphs`` replays each
    step as one graph; on HPU graphs are the default, and lengths are rounded up to multiples of ``bucket``.
    """

    model: str | None = None
    dtype: str | None = None
    weights: str | None = None
    quantised: str | None = None
    attn: str | None = None
    static_cache: bool = False
    compile: bool = False
    batch: int | None = None
    chunk: int | None = None
    show: str = "logits"
    threads: int | None = None
    device: str | None = None
    device_map: str | None = None
    tf32: bool = False
    deterministic: bool = True
    graphs: bool = False
    bucket: int | None = None
    trust_remote_code: bool = False

    @property
    def device_type(self) -> str:
        """The kind of device that a model is loaded for."""
        return (self.device or "cpu").partition(":")[0]


class HFEngine(Engine):
    """A transformers model under test, or the reference.

    Args:
        options: how to load and run.
        text: the SPEC that names it in reports.
        model: a live model to use as it is, instead of loading one.
    """

    def __init__(self, options: Options, *, text: str, model: PreTrainedModel | None = None) -> None:
        self.spec = text
        self.options = options
        # A model that is loaded goes to the CPU where nothing else is said; a live one is where it is.
        device = options.device if model is not None else options.device or "cpu"
        self.declared = _declared(options, device)
        self.capabilities = _SHOWN[options.show]
        self._given = model
        self._model: PreTrainedModel | None = None
        self._stack = ExitStack()
        self._entered = 0
        self._cache_class = NOT_USED
        self._chunk: int | str | None = None
        self._weights: str | None = None
        self._missing: tuple[str, ...] = ()
        self._tokenizer: Any = None
        self._identity: checkpoint.Identity | None = None
        self._placement: placement.Placement | None = None

    def __enter__(self) -> Self:
        # An engine that is open stays as it is: loaded anew, it would lose what its user changed in the model.
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
        import torch

        self._stack.enter_context(torch.no_grad())
        self._prepare_device()
        if self._given is not None:
            self._stack.enter_context(modules.in_evaluation(self._given))
            if self._placement is not None:
                self._stack.enter_context(self._placement.placed(self._given))
            self._model = self._given
        else:
            self._model = self._load()
        self._cache_class = NOT_USED
        self._chunk = None if self.options.chunk is None else NOT_USED
        if not self._device.startswith("cpu"):
            # Kernels with atomic sums, and split-K by load: only the CPU promises the same bits.
            self.capabilities -= {"deterministic"}
        if self.options.device_map == "auto" and placement.is_split(self._model):
            # What accelerate put into the modules holds on to this model, and a copy would run its layers.
            self.capabilities -= {"upcast"}
        self._accepts = frozenset(inspect.signature(self._model.forward).parameters)
        self._forward: Callable[..., Any] = self._model
        if self.options.compile:
            import torch._dynamo

            # Graphs left by another engine (the one that this is a copy of) would be taken, and nothing counted.
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            self._stack.callback(torch._dynamo.reset)
            self._forward = torch.compile(self._model, dynamic=True)
        elif self.options.graphs:
            self._forward = self._graphed(self._model)

    def _prepare_device(self) -> None:
        """What must be so before a model is loaded for the device."""
        import torch

        options = self.options
        if options.device_type == "cuda" or (options.device_map == "auto" and torch.cuda.is_available()):
            self._stack.enter_context(cuda.flags(tf32=options.tf32, deterministic=options.deterministic))
        if options.device_type == gaudi.DEVICE and self._given is None:
            gaudi.adapt()
        self._placement = None
        if options.device_map is not None:
            self._placement = placement.Placement(options.device_map, device=options.device or "cpu", stack=self._stack)

    def _graphed(self, model: PreTrainedModel) -> Callable[..., Any]:
        if self.options.device_type == gaudi.DEVICE:
            return gaudi.graphed(model)
        import torch._dynamo

        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        self._stack.callback(torch._dynamo.reset)
        return cuda.graphed(model)

    @property
    def _device(self) -> str:
        """Where the model's input goes; weights may rest elsewhere."""
        if self._placement is None:
            return str(self.model.device)
        return placement.device_of(self.model, self.options.device or "cpu")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._entered = max(0, self._entered - 1)
        if self._entered:
            return
        self._model = None
        self._forward = _closed
        self._stack.close()

    # --- loading -------------------------------------------------------------------------------

    @property
    def directory(self) -> Path | None:
        """The model's directory, None for a live model."""
        path = Path(self.options.model) if self.options.model else None
        return path if path is not None and path.is_dir() else None

    def _load(self) -> PreTrainedModel:
        source = self.options.model
        if source is None:
            raise UsageError(f"the spec {self.spec!r} names no model", fix="Add model=DIR, or pass --model DIR")
        config = load_config(source, trust_remote_code=self.options.trust_remote_code)
        weights, dtype = self.options.weights, self.options.dtype
        self._weights = weights
        if weights is not None and weights in quantise.SCHEMES:
            model = self._quantised(source, weights)
        elif weights is not None and dtype not in (None, "float64"):
            model = self._rounded(source, weights, dtype)
        else:
            model = self._from_pretrained(source, weights or (None if dtype == "float64" else dtype))
        model = to_float64(model, config) if dtype == "float64" else model
        if self._placement is None:
            return self._place(model)
        return self._placement.place(model.eval())

    def _rounded(self, source: str, weights: str, dtype: str | None) -> PreTrainedModel:
        """What loading in ``dtype`` gives (tables beside the weights too), with weights that were rounded before."""
        rounded, model = self._from_pretrained(source, weights), self._from_pretrained(source, dtype)
        for place, weight in zip(model.parameters(), rounded.parameters(), strict=True):
            place.data = weight.data.to(place.dtype)
        return model

    def _quantised(self, source: str, scheme: str) -> PreTrainedModel:
        """What loading in ``dtype`` gives, the weights of its blocks quantised from the checkpoint's own.

        For float64 they stay in float32, and the rest in the checkpoint's own dtype.
        """
        dtype = self.options.dtype
        native = model = self._from_pretrained(source, None)
        if dtype not in (None, "float64", str(native.dtype).removeprefix("torch.")):
            model = self._from_pretrained(source, dtype)
        changed = 0
        for name, layer, input_dim in block_layers(native):
            weight = quantise.dequantised(layer.get_parameter("weight"), scheme, input_dim=input_dim)
            place = model.get_parameter(f"{name}.weight")
            place.data = weight if dtype == "float64" else weight.to(place.dtype)
            changed += 1
        # Where there was nothing to quantise the name promises what does not run, and the settings say so.
        self._weights = scheme if changed else None
        return model

    def _load_arguments(self, dtype: str | None) -> dict[str, Any]:
        """Keywords of `from_pretrained`."""
        import torch

        wanted = "auto" if dtype is None else getattr(torch, dtype)
        arguments: dict[str, Any] = {dtype_key(): wanted, "use_safetensors": True, "output_loading_info": True}
        if self.options.attn is not None:
            arguments["attn_implementation"] = self.options.attn
        return arguments if self._placement is None else {**arguments, **self._placement.arguments}

    def _from_pretrained(self, source: str, dtype: str | None, **more: Any) -> PreTrainedModel:
        from transformers import AutoModelForCausalLM

        arguments = {**self._load_arguments(dtype), **more}
        with model_errors(source):
            pair: Any = AutoModelForCausalLM.from_pretrained(
                source, trust_remote_code=self.options.trust_remote_code, **arguments
            )
        model: PreTrainedModel = pair[0]
        self._missing = tuple(sorted(str(key) for key in pair[1].get("missing_keys", ())))
        return model

    def _place(self, model: PreTrainedModel) -> PreTrainedModel:
        try:
            placed: PreTrainedModel = model.to(self.options.device or "cpu").eval()  # type: ignore[arg-type]
        except (RuntimeError, AssertionError) as error:
            problem = f"the device {self.options.device!r} cannot be used ({first_line(error)[:_LONGEST]})"
            raise UsageError(problem, fix="Run `harness doctor` to see the devices of this machine") from None
        return placed

    # --- what it is ----------------------------------------------------------------------------

    @property
    def model(self) -> PreTrainedModel:
        """The live model; only inside the ``with`` block."""
        if self._model is None:
            raise EngineError("the engine is closed", fix="Use it inside its with block")
        return self._model

    @property
    def vocabulary(self) -> int:
        head = self.model.get_output_embeddings()
        return int(head.weight.shape[0]) if head is not None else int(self._text_config.vocab_size)

    @property
    def _text_config(self) -> Any:
        """The language model's part of the config: multimodal models keep it one level down."""
        return self.model.config.get_text_config()

    @property
    def context(self) -> int | None:
        """The longest sequence the model takes, in tokens; None where its config does not say."""
        return context_length(self._text_config)

    @property
    def stop_ids(self) -> frozenset[int]:
        """The end-of-sequence ids of the model's config and generation config, as `generate` takes them."""
        return _stop_ids(self._text_config, self.model.generation_config)

    @property
    def settings(self) -> Mapping[str, Any]:
        import torch

        model, identity = self.model, self.identity
        parameters = list(model.parameters())
        placed = self._placement is not None
        return {
            "engine": "hf",
            "model": type(model).__name__,
            "dtype": modules.dtypes(parameters),
            "buffers": modules.dtypes(model.buffers()),
            "weights": self._weights,
            "quantised": self.options.quantised,
            "attn": getattr(model.config, "_attn_implementation", "unknown"),
            "cache": self._cache_class,
            "compile": bool(self.options.compile and torch._dynamo.utils.counters["stats"]["unique_graphs"]),
            "batch": self.options.batch,
            "chunk": self._chunk,
            "threads": torch.get_num_threads(),
            "device": self._device.partition(":")[0] if placed else modules.common(p.device.type for p in parameters),
            "device_map": placement.device_map(model) if placed else None,
            **({"resting": placement.resting(model)} if placed else {}),
            "graphs": self._graphs_ran(),
            "bucket": self.options.bucket,
            **(cuda.in_force() if self.options.device_type == "cuda" else {}),
            "parameters": sum(p.numel() for p in parameters),
            "missing_tensors": list(self._missing),
            "checkpoint": None if identity is None else identity.digest,
            "signature": None if identity is None else identity.signature,
            "versions": versions(),
        }

    def _graphs_ran(self) -> bool:
        return self.options.graphs and (self._on_gaudi or cuda.graphs_ran())

    @property
    def identity(self) -> checkpoint.Identity | None:
        """Of the checkpoint that was loaded, None for a live model.

        Read when first asked for: recording opens a dozen engines, and asks none of them.
        """
        if self._identity is None and self._given is None and self.directory is not None:
            self._identity = checkpoint.identify(self.directory)
        return self._identity

    def tokenize(self, suite: Suite) -> tuple[Request, ...] | None:
        return None if self.tokenizer is None else self.resolve(suite)

    def resolve(self, suite: Suite) -> tuple[Request, ...]:
        """The suite's prompts as ids, by this model's tokenizer; without one only prompts that are ids already."""
        return suites.resolve(
            suite, self.tokenizer, context=self.context, vocabulary=self.vocabulary, model=str(self.options.model)
        )

    @property
    def tokenizer(self) -> Any:
        """The tokenizer beside the model, None for a live model or a directory without one."""
        if self._tokenizer is None and self._given is None and self.options.model is not None:
            self._tokenizer = load_tokenizer(self.options.model, trust_remote_code=self.options.trust_remote_code)
        return self._tokenizer

    @property
    def tokenizer_digest(self) -> str | None:
        """Digest of the tokenizer, None without one."""
        return suites.tokenizer_digest(self.tokenizer)

    # --- running -------------------------------------------------------------------------------

    @property
    def decoder(self) -> decoding.Decoder:
        """The model as a step function."""
        pad = getattr(self._text_config, "pad_token_id", None)
        return decoding.Decoder(
            step=self._step,
            new_cache=self._new_cache,
            pad_id=pad if pad is not None and 0 <= pad < self.vocabulary else 0,
            device=self._device,
            prefill_tokens=max(1, _LOGITS_BYTES // (8 * self.vocabulary)),
        )

    def generate(
        self, requests: Sequence[Request], *, batch_size: int | None, stop_ids: frozenset[int]
    ) -> list[Generation]:
        return decoding.greedy(
            self.decoder,
            requests,
            batch_size=self._batch(batch_size),
            stop_ids=stop_ids,
            chunk=self._chunk_of(len(request.prompt_ids) for request in requests),
            top=TOP if self.options.show == "top" else 0,
        )

    def replay(
        self,
        requests: Sequence[Request],
        continuations: Sequence[Sequence[int]],
        *,
        batch_size: int | None,
        sketcher: Sketcher,
    ) -> None:
        self._need("replay")
        size = self._batch(batch_size)
        chunk = self._chunk_of(len(request.prompt_ids) for request in requests)
        decoding.replay(self.decoder, requests, continuations, batch_size=size, sketcher=sketcher, chunk=chunk)

    def prefill(
        self,
        requests: Sequence[Request],
        continuations: Sequence[Sequence[int]],
        *,
        batch_size: int | None,
        sketcher: Sketcher,
        chunk: int | None = None,
    ) -> None:
        self._need("logits")
        size = self._batch(batch_size)
        if chunk is None:
            pairs = zip(requests, continuations, strict=True)
            chunk = self._chunk_of(len(request.prompt_ids) + len(tokens) - 1 for request, tokens in pairs)
        decoding.teacher_forced(self.decoder, requests, continuations, batch_size=size, sketcher=sketcher, chunk=chunk)

    def module_outputs(
        self, requests: Sequence[Request], continuations: Sequence[Sequence[int]], names: Sequence[str] | None = None
    ) -> dict[str, list[torch.Tensor]]:
        """Outputs of the named modules (default: the blocks) in one teacher-forced pass a request, batch 1.

        Returns:
            For each name one tensor a request, [tokens, width], in the dtype the module computes in.
        """
        self._need("modules")
        names = hooks.block_names(self.model) if names is None else names
        found: dict[str, list[torch.Tensor]] = {name: [] for name in names}

        def observe(name: str, output: torch.Tensor) -> None:
            found[name].append(output[0].clone())

        # A graph that is replayed calls no hook.
        forward, self._forward = self._forward, self.model if self.options.graphs else self._forward
        try:
            with hooks.watched(self.model, names, observe):
                decoding.teacher_forced(
                    self.decoder, requests, continuations, batch_size=1, sketcher=Sketcher(self.vocabulary)
                )
        finally:
            self._forward = forward
        return found

    def upcast(self) -> HFEngine:
        """A copy as loaded, its weights *and buffers* then widened to float32 as they are; one in float64 stays so.

        Nothing is reloaded, rounded or quantised again: a buffer that the candidate rounded to 16 bits stays rounded,
        and visible. Its settings are those of this engine but for the dtype.
        """
        import torch

        self._need("upcast")
        options, dtype = self.options, "float64"
        with nullcontext() if self._placement is None else self._placement.gathered(self.model):
            live = copy.deepcopy(self.model)
        if live.dtype != torch.float64:
            dtype = "float32"
            live, options = modules.recast(live, torch.float32), replace(options, dtype=dtype)
        wide = self._like(options, f"{self.spec} (upcast to {dtype})", live)
        wide.declared = {**self.declared, **wide.declared}
        wide._weights, wide._missing, wide._identity = self._weights, self._missing, self.identity
        wide._tokenizer = self.tokenizer
        return wide

    def _like(self, options: Options, text: str, model: PreTrainedModel) -> HFEngine:
        """An engine of this kind around a live model."""
        return HFEngine(options, text=text, model=model)

    def narrow_operation(self) -> str:
        from harness.engines import float64

        # What is compiled is not dispatched operation by operation.
        return "" if self.options.compile else float64.narrow_operation(self)

    def _need(self, capability: str) -> None:
        if capability not in self.capabilities:
            problem = f"{self.spec} shows no logits: with show={self.options.show} it can only generate"
            raise EngineError(problem, fix="Leave show out, or ask for the view generate alone")

    def _chunk_of(self, lengths: Iterable[int]) -> int | None:
        """The chunk size for sequences of these lengths; it is in force once one of them is longer."""
        if self.options.chunk is not None and max(lengths, default=0) > self.options.chunk:
            self._chunk = self.options.chunk
        return self.options.chunk

    def _batch(self, batch_size: int | None) -> int | None:
        return batch_size if self.options.batch is None else self.options.batch

    def _new_cache(self, batch: int, length: int) -> Any:
        cache: Any
        if self._on_gaudi:
            cache = gaudi.Cache(length=gaudi.rounded_up(length, self.options.bucket or gaudi.BUCKET))
        elif self.options.static_cache:
            cache = _static_cache(self.model, self._device, batch, length)
        else:
            cache = _dynamic_cache(self.model)
        self._cache_class = type(cache).__name__
        return cache

    def _step(
        self,
        input_ids_BT: torch.Tensor,
        position_ids_BT: torch.Tensor,
        attention_mask_BS: torch.Tensor,
        cache: Any,
        keep: int,
    ) -> torch.Tensor:
        if self._on_gaudi:
            places = (input_ids_BT, position_ids_BT, attention_mask_BS)
            bucket = self.options.bucket or gaudi.BUCKET
            with self._lift():
                return gaudi.step(self._forward, self._accepts, *places, cache, bucket=bucket)[:, -keep:]
        with self._lift():
            arguments = self._arguments(input_ids_BT, position_ids_BT, attention_mask_BS, cache, keep)
            logits_BTV: torch.Tensor = self._forward(**arguments).logits
        return cuda.kept(logits_BTV) if self.options.graphs else logits_BTV

    @property
    def _on_gaudi(self) -> bool:
        return self.options.device_type == gaudi.DEVICE

    def _arguments(
        self,
        input_ids_BT: torch.Tensor,
        position_ids_BT: torch.Tensor,
        attention_mask_BS: torch.Tensor,
        cache: Any,
        keep: int,
    ) -> dict[str, Any]:
        """Keywords of the model's forward."""
        import torch

        if self._cache_class == "StaticCache" and cache is not None:
            # A static cache attends over its whole length; what is not written yet is masked.
            # The length of a sliding window is shorter than what was written, and needs no padding.
            missing = max(0, _static_length(cache) - attention_mask_BS.shape[1])
            attention_mask_BS = torch.nn.functional.pad(attention_mask_BS, (0, missing))
        arguments: dict[str, Any] = {
            "input_ids": input_ids_BT,
            "attention_mask": attention_mask_BS,
            "past_key_values": cache,
            "use_cache": cache is not None,
        }
        if "position_ids" in self._accepts:
            arguments["position_ids"] = position_ids_BT
        if "logits_to_keep" in self._accepts:
            arguments["logits_to_keep"] = keep
        return arguments

    def _lift(self) -> Any:
        if self.options.dtype != "float64":
            return nullcontext()
        from harness.engines.float64 import Float64Lift

        return Float64Lift()


def build(parsed: spec.Spec, *, model: str | None) -> HFEngine:
    """The engine of a SPEC; ``model`` is used where the spec names none."""
    given = spec.read_options(parsed, READERS)
    _refuse_pairs(parsed.text, given)
    options = Options(**{"model": model, **_of_device(given), **given})
    return HFEngine(options, text=parsed.text)


def _of_device(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a device sets where the spec does not."""
    on_hpu = str(given.get("device", "")).partition(":")[0] == gaudi.DEVICE
    return {"graphs": True, "bucket": gaudi.BUCKET} if on_hpu else {}


def _refuse_pairs(text: str, given: Mapping[str, Any]) -> None:
    """Refuse what cannot be together.

    Raises:
        UsageError: that says which keys.
    """
    kind = str(given.get("device", "cpu")).partition(":")[0]
    has, rest = given.keys(), given.get("device_map")
    problems = (
        (
            kind != "cuda" and has & {"tf32", "deterministic"},
            "tf32 and deterministic are of device=cuda",
            "Leave them out",
        ),
        (kind != gaudi.DEVICE and "bucket" in has, "bucket is of device=hpu", "Leave it out"),
        (kind == "cpu" and given.get("graphs"), "graphs are of device=cuda and device=hpu", "Leave it out"),
        (
            kind == "cuda" and given.get("graphs") and not given.get("static_cache"),
            "a CUDA graph replays one shape",
            "Add static_cache=true",
        ),
        (given.get("graphs") and given.get("compile"), "graphs compile by themselves", "Leave compile out"),
        (
            kind == gaudi.DEVICE and has & {"compile", "static_cache", "chunk", "device_map"},
            "on hpu shapes are static by themselves, without compile, static_cache, chunk and device_map",
            "Leave them out",
        ),
        (kind == gaudi.DEVICE and given.get("dtype") == "float64", "HPUs have no float64", "Name another dtype"),
        (
            rest is not None and (given.get("compile") or given.get("graphs")),
            "what accelerate brings in layer by layer is not compiled",
            "Leave device_map, or compile and graphs, out",
        ),
        (
            rest == "auto" and ("weights" in has or given.get("dtype") == "float64"),
            "device_map=auto never has the whole model, which weights and dtype=float64 change",
            "Write device_map=cpu-offload",
        ),
        (rest == "auto" and "device" in has, "device_map=auto chooses the devices itself", "Leave device out"),
    )
    spec.refuse_pairs(text, problems)
    if rest is not None and importlib.util.find_spec("accelerate") is None:
        fix = "Install it: pip install 'golden-harness[ranks]'"
        raise UsageError(f"device_map needs accelerate, in the spec {text!r}", fix=fix)


def from_model(model: PreTrainedModel, *, text: str | None = None) -> HFEngine:
    """An engine around a live transformers model, used as it is."""
    return HFEngine(Options(), text=text or f"{type(model).__name__} object", model=model)


def _declared(options: Options, device: str | None) -> dict[str, Any]:
    """What the spec promises, in the words of `settings`."""
    declared: dict[str, Any] = {key: getattr(options, key) for key in ("dtype", "attn", "threads", "batch", "chunk")}
    declared["device"] = None if device is None else device.partition(":")[0]
    if options.device_map == "auto":
        declared["device"] = None
    declared["device_map"] = options.device_map
    if device is not None and options.device_type == "cuda":
        declared |= {"tf32": options.tf32, "deterministic_algorithms": options.deterministic}
    if options.graphs:
        declared["graphs"] = True
    if options.weights in quantise.SCHEMES:
        declared["weights"] = options.weights
    if options.static_cache:
        declared["cache"] = "StaticCache"
    if options.compile:
        declared["compile"] = True
    return {key: value for key, value in declared.items() if value is not None}


def _closed(**_arguments: Any) -> Any:
    raise EngineError("the engine is closed", fix="Use it inside its with block")


# --- transformers, old and new -----------------------------------------------------------------


def _dynamic_cache(model: PreTrainedModel) -> Any:
    from transformers import DynamicCache

    takes_config = "config" in inspect.signature(DynamicCache.__init__).parameters
    return DynamicCache(config=model.config) if takes_config else DynamicCache()


def _static_cache(model: PreTrainedModel, device: str, batch: int, length: int) -> Any:
    import torch
    from transformers import StaticCache

    known = inspect.signature(StaticCache.__init__).parameters
    wanted: dict[str, Any] = {"max_batch_size": batch, "device": torch.device(device), "dtype": model.dtype}
    # transformers 4.55 hands on whatever it is given, and needs all of it.
    takes_any = any(one.kind is one.VAR_KEYWORD for one in known.values())
    given = {key: value for key, value in wanted.items() if takes_any or key in known}
    return StaticCache(config=model.config, max_cache_len=length, **given)


def _static_length(cache: Any) -> int:
    longest = getattr(cache, "get_max_length", None) or cache.get_max_cache_shape
    return int(longest())


def load_config(source: str, *, trust_remote_code: bool = False) -> Any:
    """The config of a model directory.

    Raises:
        ModelError: where there is none, or it is not of a decoder-only language model.
    """
    from transformers import AutoConfig

    must_exist(source)
    with model_errors(source):
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{source} is an encoder-decoder model", fix="Only decoder-only (causal) language models can be checked"
        )
    return config


def native_dtype(config: Any) -> str:
    """The dtype that a checkpoint says it is in; float32 where it says nothing, as transformers takes it."""
    named = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    return "float32" if named is None else str(named).removeprefix("torch.")


def stop_ids_in(source: str) -> frozenset[int]:
    """The end-of-sequence ids that a model directory names, as `HFEngine.stop_ids`."""
    return _stop_ids(load_config(source).get_text_config(), load_generation_config(source))


def load_generation_config(source: str) -> Any:
    """The generation config of a model directory, None where it has none."""
    from transformers import GenerationConfig

    if not (Path(source) / "generation_config.json").is_file():
        return None
    with model_errors(source):
        return GenerationConfig.from_pretrained(source)


def _stop_ids(*configs: Any) -> frozenset[int]:
    found: set[int] = set()
    for config in configs:
        eos = getattr(config, "eos_token_id", None)
        found.update(eos if isinstance(eos, list) else [] if eos is None else [eos])
    return frozenset(found)


def load_tokenizer(source: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model directory, None where it brings none."""
    from transformers import AutoTokenizer

    directory = Path(source)
    must_exist(source)
    if not any(directory.glob("tokenizer*")):
        return None
    with model_errors(source):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)


def must_exist(source: str) -> None:
    """Refuse whatever is no model directory, before a loader takes it for the name of something on a hub.

    Raises:
        ModelError: where there is no such directory, or it holds no config.json.
    """
    path = Path(source)
    if not path.is_dir():
        fix = "Check the path; a model of a hub is downloaded first: hf download ORG/NAME --local-dir DIR"
        raise ModelError(f"there is no model directory {source}", fix=fix)
    if not (path / "config.json").is_file():
        raise ModelError(f"{source} holds no config.json", fix="Give a directory written by save_pretrained")


@contextmanager
def model_errors(source: str) -> Iterator[None]:
    """Turn whatever a loader raises on a bad directory into one clear line.

    Loaders of hostile or damaged files raise nearly anything, so every Exception is caught here and only here.
    """
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        problem = f"the model {source} cannot be loaded ({type(error).__name__}: {first_line(error)[:_LONGEST]})"
        fix = (
            "It must be a transformers causal language model with .safetensors weights; `harness doctor` shows versions"
        )
        raise ModelError(problem, fix=fix) from error


def context_length(config: Any) -> int | None:
    """The longest sequence, in tokens: BLOOM calls it ``seq_length`` and only advises it, GPT-2 ``n_positions``."""
    for key in ("max_position_embeddings", "n_positions", "seq_length"):
        value = getattr(config, key, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


# --- precision ---------------------------------------------------------------------------------


def inexact_tensors(native: PreTrainedModel, dtype: str) -> list[str]:
    """Names of the parameters that change when they are cast to ``dtype``."""
    import torch

    wanted = getattr(torch, dtype)
    return [
        name
        for name, parameter in native.named_parameters()
        if parameter.is_floating_point() and not torch.equal(parameter.to(wanted).double(), parameter.double())
    ]


def block_layers(model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Module, int]]:
    """Name, module and input dimension of each Linear and Conv1D in the blocks; never the embedding or the head."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    blocks = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    seen = {id(module.weight) for module in ends if module is not None}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and name.startswith(blocks) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            yield name, module, 1 if isinstance(module, nn.Linear) else 0


def to_float64(native: PreTrainedModel, config: Any) -> PreTrainedModel:
    """The same model in true float64: built again under the lift, so that tables which are derived
    from the config (RoPE frequencies) are computed in float64 and not widened from float32; then the
    checkpoint's own weights."""
    import torch

    from harness.engines.float64 import Float64Lift

    # Eager attention: plain operations, each of which the audit can see.
    native.config._attn_implementation = "eager"
    with Float64Lift(), default_dtype(torch.float64):
        wide: PreTrainedModel = type(native)(native.config)
    for target, source in zip(wide.parameters(), native.parameters(), strict=True):
        target.data = source.data.to(torch.float64)
    persistent = native.state_dict()
    for name, buffer in wide.named_buffers():
        if name in persistent:
            buffer.data = persistent[name].to(torch.float64) if buffer.is_floating_point() else persistent[name]
        elif buffer.is_floating_point():
            buffer.data = buffer.data.to(torch.float64)
    return wide


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make ``dtype`` torch's default float, and put the old one back."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def audit_float64(engine: HFEngine) -> list[str]:
    """Operations that made a float below 64 bits in a padded prefill and a decode step; empty is proof enough.

    The engine must be open with ``dtype=float64``.
    """
    from harness.engines import float64

    with float64.Audit() as audit:
        float64.audited_steps(engine)
    if not audit.operations:
        return ["the audit saw no operation at all"]
    return sorted(set(audit.violations))
