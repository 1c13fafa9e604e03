"""How a candidate is loaded and called, as lines of plain torch and transformers; or why that cannot be written."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from harness.engines import Engine, hf
from harness.engines.convention import Convention, convention_of, model_name, parameters_of
from harness.engines.port import DEVICE, DTYPE, PortEngine
from harness.engines.port import Options as PortOptions
from harness.engines.target import PyEngine, load
from harness.environment import dtype_key
from harness.numerics import quantise

#: What a port is given, and what it is called in the script.
_GIVEN = {"input_ids": "ids_BT", "position_ids": "position_BT", "attention_mask": "mask_BS", "cache": "cache"}


#: Why no script is written for tensor or pipeline parallelism.
OF_RANKS = "a candidate of several ranks needs their launcher: `harness check` names the rank that is wrong"


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """The parts of a script that differ from candidate to candidate, as text where they are code.

    Attributes:
        source: a model directory, a function of a port's module, or an object that only Python has.
        calls: as a transformers model, or as a port.
        name: of the model or the port.
        model: directory of the weights, None for a candidate that takes none.
        dtype: that it is loaded in.
        widened: whether its weights and buffers are widened to float32 then.
        device, threads, pad: as the engine has them; ``threads`` None leaves torch's own.
        chunk, static_cache, compiled: options of the `hf` SPEC.
        is_module: whether it has an evaluation mode.
        loading, rounded: arguments of `from_pretrained`; ``rounded`` of the weights that are rounded first, or "".
        new_cache: what makes an empty cache.
        cache_length: how many tokens a static cache holds.
        takes_positions, takes_keep: whether the model's forward has these arguments.
        module, function, arguments, root: the port's builder, what it is called with, and where it is imported from.
        call: what the port is called with.
        reference_loading, reference_widened: the reference in the precision that is judged.
    """

    source: Literal["hf", "py", "object"]
    calls: Literal["hf", "port"]
    name: str
    model: Path | None
    dtype: str
    widened: bool
    device: str
    reference_loading: str
    reference_widened: bool
    threads: int | None = None
    pad: int = 0
    chunk: int | None = None
    static_cache: bool = False
    compiled: bool = False
    is_module: bool = True
    loading: str = ""
    rounded: str = ""
    new_cache: str = ""
    cache_length: str = ""
    takes_positions: bool = False
    takes_keep: bool = False
    module: str = ""
    function: str = ""
    arguments: str = ""
    root: Path | None = None
    call: str = ""

    @property
    def imports(self) -> list[str]:
        """Names of transformers that the loading and the cache need."""
        cache = self.new_cache.partition("(")[0]
        loads = ["AutoModelForCausalLM"] if self.reference_loading or self.loading else []
        return sorted([*loads, *([cache] if cache else [])])


def refusal(engine: Engine) -> str:
    """Why no script can be written for an open engine, in words; empty where one can."""
    inner = engine.inner if isinstance(engine, PyEngine) else engine
    if "logits" not in engine.capabilities:
        return f"{engine.spec} shows no logits, and a small case is found by them alone"
    if isinstance(inner, hf.HFEngine) and type(inner) is hf.HFEngine:
        if inner.options.weights in quantise.SCHEMES:
            return f"{engine.spec} quantises its weights with this project's own code, which the script may not need"
        if inner.options.dtype == "float64":
            return "true float64 needs this project's own code, which the script may not need"
        if inner.options.trust_remote_code:
            return "the model's own code would be executed: nothing written here does that by itself"
        return ""
    if isinstance(inner, PortEngine):
        return ""
    if engine.settings.get("engine") in ("tp", "pp") or "tensor_parallel" in engine.settings:
        return OF_RANKS
    return f"{engine.spec} is an engine of its own, which a script cannot make without this project"


def recipe_of(engine: Engine, *, widened: bool, cast: str | None) -> Recipe:
    """The recipe of an open engine that `refusal` lets pass.

    Args:
        engine: the candidate as loaded, not widened.
        widened: whether its copy in float32 is what failed.
        cast: what the reference's weights are cast to first, None to leave them.
    """
    inner = engine.inner if isinstance(engine, PyEngine) else engine
    dtype = str(engine.settings["dtype"])
    computes = "float32" if widened else dtype
    common: dict[str, Any] = {
        "dtype": dtype,
        "widened": widened,
        "reference_loading": _loading("REFERENCE", cast if widened and cast else computes),
        "reference_widened": bool(widened and cast),
        "threads": getattr(inner, "options", PortOptions()).threads,
    }
    if isinstance(inner, hf.HFEngine):
        found = {**common, **_of_model(inner)}
    else:
        assert isinstance(inner, PortEngine)
        found = {**common, **_of_port(inner)}
    if isinstance(engine, PyEngine):
        return Recipe(**{**found, **_of_target(engine)})
    if isinstance(inner, hf.HFEngine) and inner.directory is not None:
        return Recipe(**found, source="hf", model=inner.directory)
    return Recipe(**found, source="object", model=None)


def _of_model(engine: hf.HFEngine) -> dict[str, Any]:
    """Of a transformers model, loaded or live."""
    options, model = engine.options, engine.model
    accepts = inspect.signature(model.forward).parameters
    more = {} if options.attn is None else {"attn_implementation": repr(options.attn)}
    loaded = _loading("path", options.dtype, **more)
    return {
        "calls": "hf",
        "name": type(model).__name__,
        "device": str(model.device),
        "pad": engine.decoder.pad_id,
        "chunk": options.chunk,
        "static_cache": options.static_cache,
        "compiled": options.compile,
        "loading": loaded if options.dtype or not options.weights else _loading("path", options.weights, **more),
        "rounded": _loading("path", options.weights, **more) if options.weights and options.dtype else "",
        "cache_length": _cache_length() if options.static_cache else "",
        "new_cache": _static_cache() if options.static_cache else _dynamic_cache(),
        "takes_positions": "position_ids" in accepts,
        "takes_keep": "logits_to_keep" in accepts,
    }


def _of_port(engine: PortEngine) -> dict[str, Any]:
    """Of a port, built or given."""
    from torch import nn

    return {
        "calls": "port",
        "name": model_name(engine.port),
        "device": engine.decoder.device,
        "call": _call(convention_of(engine.port)),
        "is_module": isinstance(engine.port, nn.Module),
    }


def _call(convention: Convention) -> str:
    """The arguments of a port, copies of what the loop goes on with."""
    values = {name: _GIVEN[name] if name == "cache" else f"{_GIVEN[name]}.clone()" for name in convention.names}
    return ", ".join(f"{name}={value}" if convention.by_name else value for name, value in values.items())


def _of_target(engine: PyEngine) -> dict[str, Any]:
    """How its module is found and its function is called, as engines/target.py does it."""
    options = engine.options
    name, _, function = options.target.partition(":")
    built = load(options.target)
    parameters = parameters_of(built)
    known = {"dtype": f"torch.{options.dtype or DTYPE}", "device": repr(options.device or DEVICE)}
    if parameters is None:
        by_place, given = ["path"], known
    else:
        every = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
        given = {key: value for key, value in known.items() if every or key in parameters}
        places = [one for one in parameters.values() if one.kind not in (one.VAR_KEYWORD, one.KEYWORD_ONLY)]
        by_place = ["path"] if any(one.name not in given for one in places) else []
        if not by_place and "path" in parameters:
            given["path"] = "path"
    return {
        "source": "py",
        "model": engine.directory,
        "module": name,
        "function": function,
        "arguments": ", ".join([*by_place, *(f"{key}={value}" for key, value in given.items())]),
        "root": _root(name),
    }


def _root(module: str) -> Path:
    """The directory from which a module was imported."""
    file = Path(str(sys.modules[module].__file__)).resolve()
    here = file.parent if file.name == "__init__.py" else file.with_suffix("")
    for _ in module.split("."):
        here = here.parent
    return here


def _loading(path: str, dtype: str | None, **more: str) -> str:
    wanted = '"auto"' if dtype is None else f"torch.{dtype}"
    arguments = {dtype_key(): wanted, **more, "use_safetensors": "True"}
    return ", ".join([path, *(f"{key}={value}" for key, value in arguments.items())])


def _dynamic_cache() -> str:
    from transformers import DynamicCache

    takes_config = "config" in inspect.signature(DynamicCache.__init__).parameters
    return "DynamicCache(config=model.config)" if takes_config else "DynamicCache()"


def _static_cache() -> str:
    from transformers import StaticCache

    known = inspect.signature(StaticCache.__init__).parameters
    wanted = {"max_batch_size": "rows", "device": "model.device", "dtype": "model.dtype"}
    more = "".join(f", {key}={value}" for key, value in wanted.items() if key in known)
    return f"StaticCache(config=model.config, max_cache_len=length{more})"


def _cache_length() -> str:
    """The method was renamed twice."""
    from transformers import StaticCache

    return f"cache.{'get_max_length' if hasattr(StaticCache, 'get_max_length') else 'get_max_cache_shape'}()"
