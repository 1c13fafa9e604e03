"""The engine `deepspeed`: a transformers model that DeepSpeed cuts (AutoTP) or partitions (ZeRO-3) over ranks.

`deepspeed:tp=2` cuts every layer; `deepspeed:zero=3,ranks=2` keeps a part of each parameter on each rank and gathers it
where it is used, with offload=cpu from the host's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from harness.engines import hf, spec
from harness.engines.ranks import engine, native, outer, plans
from harness.engines.ranks.layout import Layout, refusal
from harness.engines.ranks.serving import DeepSpeed
from harness.environment import compiler
from harness.errors import UsageError


def _stage_three(value: str) -> int:
    """A reader for the one stage of ZeRO that parts with parameters."""
    if value != "3":
        raise ValueError("3: the stages below keep every parameter whole, and are of training alone")
    return 3


#: The keys of `deepspeed:...`, each with what reads its value.
READERS: Mapping[str, Callable[[str], Any]] = {
    "tp": spec.positive,
    "zero": _stage_three,
    "ranks": spec.positive,
    "offload": spec.one_of("cpu"),
    "kernels": spec.flag,
    "all_reduce": spec.one_of("shm", "gloo"),
    "build": spec.seconds,
    **{key: engine.READERS[key] for key in ("prepare", "timeout", *engine.OF_MODEL)},
}
_OF_DEEPSPEED = ("zero", "offload", "kernels", "all_reduce", "build")

#: Model types that AutoTP of deepspeed 0.19.8 has on its list of those it cannot cut (docs/findings.md).
_UNSUPPORTED = frozenset({"gpt2", "xlm", "xlnet"})


class DeepSpeedEngine(engine.ParallelEngine):
    """A model over ranks that DeepSpeed shares out.

    Args:
        options: layout, model, and what DeepSpeed does.
        text: the SPEC.
    """

    def __init__(self, options: engine.Options, *, text: str) -> None:
        super().__init__(options, text=text, name="deepspeed")
        self.cut = lambda module, dim: plans.autotp_cut(module, dim, self._config)
        how = options.deepspeed or DeepSpeed()
        promised = {"offload": how.offload, "all_reduce": how.all_reduce, "kernels": how.kernels or None}
        self.declared = {
            **self.declared,
            "zero_stage": how.zero,
            **({"zero_ranks": options.layout.zero} if how.zero else {}),
            **{key: value for key, value in promised.items() if value is not None},
        }

    def why_not(self, config: Any) -> str:
        return why_not(self.options, config)

    @property
    def environment(self) -> Mapping[str, str]:
        # What its launcher sets: it says that all ranks are on this machine.
        return {"LOCAL_SIZE": str(self.options.layout.world), "DS_ACCELERATOR": self.options.model.device or "cpu"}


def why_not(options: engine.Options, config: Any) -> str:
    """Why a model cannot be run so here, in words; empty where it can.

    Args:
        options: what is asked for.
        config: of a transformers model.
    """
    layout, how = options.layout, options.deepspeed or DeepSpeed()
    on_cpu = (options.model.device or "cpu") == "cpu"
    if on_cpu and (options.model.dtype or hf.native_dtype(config)) == "float16" and not _has_float16():
        return "DeepSpeed takes no float16 on this processor, which has no products of it"
    if how.zero:
        return ""
    if config.model_type in _UNSUPPORTED and not how.kernels:
        return f"DeepSpeed's AutoTP does not support the model type {config.model_type!r}"
    if reason := refusal(layout, config):
        return reason
    return _no_sum(layout) if on_cpu and layout.tensor > 1 and how.all_reduce != "gloo" else ""


def _has_float16() -> bool:
    """Whether oneDNN multiplies float16 here: what DeepSpeed asks."""
    import torch

    try:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    except (AttributeError, RuntimeError):
        return False


def _no_sum(layout: Layout) -> str:
    """Why DeepSpeed's own all-reduce cannot be had, in words; empty where it can."""
    if compiler() is None:
        return "DeepSpeed compiles its all-reduce, and there is no C++ compiler (install g++, or write all_reduce=gloo)"
    needed, free = layout.world * native.BYTES, native.shared_bytes()
    if free < needed:
        return (
            f"DeepSpeed's all-reduce takes {needed / 1e6:.0f} MB of /dev/shm, and {free / 1e6:.0f} MB are free "
            "(docker run --shm-size, or write all_reduce=gloo)"
        )
    return ""


def build(parsed: spec.Spec, *, model: str | None) -> DeepSpeedEngine:
    """The engine of a SPEC; ``model`` is used where the spec names none.

    Raises:
        UsageError: for an unknown key or value, keys that exclude each other, or without a number of ranks.
    """
    given = spec.read_options(parsed, READERS)
    _refuse_pairs(parsed.text, given)
    key = "ranks" if "zero" in given else "tp"
    if key not in given:
        launched = outer.launched()
        if launched is not None:
            given[key] = launched.world
        elif key == "ranks":
            given[key] = 1
        else:
            fix = "Write deepspeed:tp=2 or deepspeed:zero=3,ranks=2, or start it with DeepSpeed's launcher"
            raise UsageError(f"the spec {parsed.text!r} names no tp", fix=fix)
    layout = Layout(tensor=given.get("tp", 1), zero=given.get("ranks", 1))
    how = DeepSpeed(**{name: given[name] for name in _OF_DEEPSPEED if name in given})
    settings = {"model": model, **{name: given[name] for name in engine.OF_MODEL if name in given}}
    more = {name: given[name] for name in ("prepare", "timeout") if name in given}
    options = engine.Options(layout=layout, model=hf.Options(**settings), deepspeed=how, **more)
    return DeepSpeedEngine(options, text=parsed.text)


def _refuse_pairs(text: str, given: Mapping[str, Any]) -> None:
    """Refuse what cannot be together.

    Raises:
        UsageError: that says which keys.
    """
    problems = (
        ("tp" in given and "zero" in given, "tp and zero exclude each other", "Keep one of them"),
        ("ranks" in given and "zero" not in given, "ranks are those of ZeRO", "Write tp=N, or add zero=3"),
        ("offload" in given and "zero" not in given, "offload is of ZeRO's parameters", "Add zero=3"),
        ("all_reduce" in given and "zero" in given, "ZeRO sums nothing over its ranks", "Leave all_reduce out"),
        (
            bool(given.get("kernels")) and given.get("device", "cpu") == "cpu",
            "DeepSpeed's kernels are CUDA's",
            "Add device=cuda where there is one, or leave kernels out",
        ),
        (bool(given.get("kernels")) and "zero" in given, "kernels and zero exclude each other", "Keep one of them"),
    )
    spec.refuse_pairs(text, problems)
