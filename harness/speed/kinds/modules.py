"""Where a forward spends its time: embedding, attention, MLP, norm, head, from torch's profiler.

The profiler slows what it watches (the story of BLOOM's optimization tells of 25 %), so its shares count, and never its
seconds: no run with it is a timed one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.engines import hf, hooks
from harness.engines.base import Engine
from harness.errors import EngineError
from harness.speed.kinds.latency import Work
from harness.speed.shapes import requests_of

if TYPE_CHECKING:
    from torch import nn

PARTS = ("embedding", "attention", "mlp", "norm", "head")
#: What of a forward is in none of the parts: residual sums, masks, the model's own Python.
REST = "rest"
PHASES = ("prefill", "decode")

_PREFIX = "harness:"


@dataclass(frozen=True, kw_only=True, slots=True)
class Modules:
    """Shares of the time of the forwards.

    Attributes:
        prompt: tokens of the prompt.
        new: tokens that were added.
        shares: by phase ("prefill" is the first forward, "decode" the later ones), then by part; a phase adds up to 1.
        device: whose time it is, "cpu" or "cuda".
    """

    prompt: int
    new: int
    shares: Mapping[str, Mapping[str, float]]
    device: str


def why_not(engine: Engine) -> str:
    """Why an engine's modules cannot be told apart, in words; "" where they can."""
    if not isinstance(engine, hf.HFEngine):
        return f"{engine.spec} shows no modules; only hf does"
    if engine.options.compile:
        return "what is compiled runs no modules one by one"
    return ""


def parts_of(model: Any) -> dict[str, list[nn.Module]]:
    """The modules of each part of a transformers model, none inside another one.

    Tables of tokens and positions are the embedding, rotary tables belong to attention, and so do norms inside it; all
    other norms are norms wherever they stand.
    """
    head = model.get_output_embeddings()
    found: dict[str, list[nn.Module]] = {part: [] for part in PARTS}
    taken: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{one}.") for one in taken):
            continue
        part = "head" if head is not None and module is head else _part(module)
        if part is not None:
            found[part].append(module)
            taken.append(name)
    return found


def _part(module: nn.Module) -> str | None:
    """By the class: transformers' names end in what a module is."""
    from torch import nn

    kind = type(module).__name__
    if isinstance(module, nn.Embedding):
        return "embedding"
    if kind.endswith(("Attention", "RotaryEmbedding")):
        return "attention"
    if kind.endswith(("MLP", "FeedForward")):
        return "mlp"
    return "norm" if kind.endswith("Norm") else None


def measure(engine: Engine, work: Work, pulse: Callable[[str], None]) -> Modules:
    """Continue a prompt once under the profiler, after one time without it.

    Raises:
        EngineError: for an engine that shows no modules, or whose attention or MLP has a name that is not known.
    """
    reason = why_not(engine)
    if reason or not isinstance(engine, hf.HFEngine):
        raise EngineError(reason, fix="Leave modules out with --kind")
    from torch.profiler import ProfilerActivity, profile

    parts = parts_of(engine.model)
    unknown = [part for part in ("embedding", "attention", "mlp") if not parts[part]]
    if unknown or not hooks.block_names(engine.model):
        problem = f"no module of {type(engine.model).__name__} is known as {' or '.join(unknown) or 'a block'}"
        raise EngineError(problem, fix="Leave modules out with --kind")
    requests = requests_of([work.prompt], work.new)
    engine.generate(requests, batch_size=1, stop_ids=frozenset())
    pulse("modules, warmed up")
    device = engine.model.device.type
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as profiler, labelled(engine.model, parts):
        engine.generate(requests, batch_size=1, stop_ids=frozenset())
    pulse("modules, profiled")
    seconds = {
        one.key.removeprefix(_PREFIX): float(one.device_time_total if device == "cuda" else one.cpu_time_total)
        for one in profiler.key_averages()
        # On an accelerator a label has a second entry, of the device itself.
        if one.key.startswith(_PREFIX) and (one.cpu_time_total or device == "cpu")
    }
    return Modules(prompt=len(work.prompt), new=work.new, shares=shares(seconds), device=device)


@contextmanager
def labelled(model: nn.Module, parts: Mapping[str, list[nn.Module]]) -> Iterator[None]:
    """Inside, the profiler sees each part, and each forward of the model, under a label of its phase."""
    forwards = 0

    def label(part: str) -> str:
        return f"{_PREFIX}{PHASES[min(1, forwards)]}/{part}"

    def count() -> None:
        nonlocal forwards
        forwards += 1

    with ExitStack() as stack:
        for part, modules in (*parts.items(), ("forward", [model])):
            for module in modules:
                _watch(stack, module, part, label, count if part == "forward" else None)
        yield


def _watch(
    stack: ExitStack, module: nn.Module, part: str, label: Callable[[str], str], after: Callable[[], None] | None
) -> None:
    from torch.profiler import record_function

    open_: list[Any] = []

    def enter(_module: Any, _inputs: Any) -> None:
        open_.append(record_function(label(part)))
        open_[-1].__enter__()

    def leave(_module: Any, _inputs: Any, _output: Any) -> None:
        open_.pop().__exit__(None, None, None)
        if after is not None:
            after()

    stack.callback(module.register_forward_pre_hook(enter).remove)
    # Called where a forward raises as well: a label that stays open would hold all that follows.
    stack.callback(module.register_forward_hook(leave, always_call=True).remove)


def shares(seconds: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Shares of each phase's forwards.

    Args:
        seconds: by "phase/part", the whole forwards as the part "forward"; any unit.
    """
    found = {}
    for phase in PHASES:
        whole = seconds.get(f"{phase}/forward", 0.0)
        if whole <= 0:
            continue
        times = {part: seconds.get(f"{phase}/{part}", 0.0) for part in PARTS}
        times[REST] = max(0.0, whole - sum(times.values()))
        total = sum(times.values())
        found[phase] = {part: one / total for part, one in times.items()}
    return found
