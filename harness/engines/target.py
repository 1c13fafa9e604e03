"""The `py` engine: what a function of a Python module builds, as ``py:MODULE:FUNCTION?key=value&...`` names it.

    build(path, *, dtype, device) -> a transformers model, an nn.Module, a callable (port.py) or an Engine

``path`` is the model directory as a Path, None where there is none; ``dtype`` a torch.dtype, float32 unless the SPEC
says otherwise; ``device`` text, "cpu" unless it says otherwise. A function may take fewer of the three.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, Self

from harness.engines import hf, spec
from harness.engines.base import Engine
from harness.engines.convention import parameters_of
from harness.engines.port import DEVICE, DTYPE, Options, PortEngine, article, declared_by
from harness.environment import Quiet, thread_count
from harness.errors import EngineError, ModelError, UsageError
from harness.numerics.sketch import Sketcher
from harness.values import Generation, Request, Suite

if TYPE_CHECKING:
    import torch

#: The keys of `py:MODULE:FUNCTION?...`, each with what reads its value.
READERS: Mapping[str, Callable[[str], Any]] = {
    "model": str,
    "dtype": spec.one_of(*hf.DTYPES),
    "device": str,
    "batch": spec.positive,
    "threads": spec.positive,
    "deterministic": spec.flag,
}


class PyEngine(Engine):
    """What a function of a Python module builds: imported and built when opened, then run by the engine it needs.

    Args:
        options: of the SPEC.
        text: the SPEC.
    """

    def __init__(self, options: Options, *, text: str) -> None:
        self.spec = text
        self.options = options
        self.declared = declared_by(options)
        self.capabilities = frozenset()
        self._stack = ExitStack()
        self._inner: Engine | None = None

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        try:
            self._stack.enter_context(Quiet())
            self._stack.enter_context(thread_count(self.options.threads))
            self._stack.enter_context(_importable(os.getcwd()))
            self._inner = self._stack.enter_context(_built(self.options, self.spec))
        except BaseException:
            self._stack.close()
            raise
        self.declared = {**self._inner.declared, **declared_by(self.options)}
        self.limits = self._inner.limits
        self.capabilities = self._inner.capabilities
        if self.options.deterministic is not None:
            claim = {"deterministic"} if self.options.deterministic else set()
            self.capabilities = self.capabilities - {"deterministic"} | claim
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._inner = None
        self._stack.__exit__(kind, error, traceback)

    @property
    def inner(self) -> Engine:
        """The engine of what was built; only inside the ``with`` block."""
        if self._inner is None:
            raise EngineError("the engine is closed", fix="Use it inside its with block")
        return self._inner

    @property
    def directory(self) -> Path | None:
        """What `build` is given as ``path``."""
        return Path(self.options.model) if self.options.model else None

    @property
    def settings(self) -> Mapping[str, Any]:
        found = dict(self.inner.settings)
        if found.get("batch") is None:
            found["batch"] = self.options.batch
        return found

    @property
    def vocabulary(self) -> int:
        return self.inner.vocabulary

    @property
    def stop_ids(self) -> frozenset[int]:
        return self.inner.stop_ids

    def tokenize(self, suite: Suite) -> tuple[Request, ...] | None:
        return self.inner.tokenize(suite)

    def generate(
        self, requests: Sequence[Request], *, batch_size: int | None, stop_ids: frozenset[int]
    ) -> list[Generation]:
        return self.inner.generate(requests, batch_size=self._batch(batch_size), stop_ids=stop_ids)

    def continue_greedily(
        self, requests: Sequence[Request], *, batch_size: int | None, stop_ids: frozenset[int]
    ) -> list[Generation]:
        """Greedy continuations also from a port without a cache: then every step runs the whole prefix again."""
        inner = self.inner
        run = inner.continue_greedily if isinstance(inner, PortEngine) else inner.generate
        return run(requests, batch_size=self._batch(batch_size), stop_ids=stop_ids)

    def replay(
        self,
        requests: Sequence[Request],
        continuations: Sequence[Sequence[int]],
        *,
        batch_size: int | None,
        sketcher: Sketcher,
    ) -> None:
        self.inner.replay(requests, continuations, batch_size=self._batch(batch_size), sketcher=sketcher)

    def prefill(
        self,
        requests: Sequence[Request],
        continuations: Sequence[Sequence[int]],
        *,
        batch_size: int | None,
        sketcher: Sketcher,
    ) -> None:
        self.inner.prefill(requests, continuations, batch_size=self._batch(batch_size), sketcher=sketcher)

    def upcast(self) -> Engine:
        return self.inner.upcast()

    def narrow_operation(self) -> str:
        return self.inner.narrow_operation()

    def _batch(self, batch_size: int | None) -> int | None:
        return batch_size if self.options.batch is None else self.options.batch


def build(parsed: spec.Spec, *, model: str | None) -> PyEngine:
    """The engine of a SPEC, nothing imported yet; ``model`` is used where the spec names none.

    Raises:
        UsageError: for a target that is not MODULE:FUNCTION, or a key or value that there is not.
    """
    _refuse_target(parsed)
    options = Options(**{"target": parsed.target, "model": model, **spec.read_options(parsed, READERS)})
    return PyEngine(options, text=parsed.text)


def _refuse_target(parsed: spec.Spec) -> None:
    name, colon, attribute = parsed.target.partition(":")
    example = f"e.g. {spec.TARGETS['py']}"
    if not parsed.target:
        raise UsageError(f"the spec {parsed.text!r} names no target", fix=f"Write py:MODULE:FUNCTION, {example}")
    if name.endswith(".py") or "/" in name:
        fix = "Name the module as `python -m` takes it, without .py and with dots: py:my_pkg.port:build"
        raise UsageError(f"{name!r} in the spec {parsed.text!r} is a file, not a module", fix=fix)
    if not colon or not all(part.isidentifier() for part in (*name.split("."), *attribute.split("."))):
        fix = f"It is MODULE:FUNCTION, and options follow a question mark, {example}"
        raise UsageError(f"the target {parsed.target!r} of the spec {parsed.text!r} is not MODULE:FUNCTION", fix=fix)


def _built(options: Options, text: str) -> Engine:
    """The engine, closed, of what the target of a spec returns."""
    import torch
    from transformers import PreTrainedModel

    made, told = _made(options)
    if isinstance(made, Engine):
        return made
    if isinstance(made, PreTrainedModel):
        shared = {key: getattr(options, key) for key in ("dtype", "device", "batch", "threads")}
        return hf.HFEngine(hf.Options(**shared), text=text, model=made)
    if not callable(made):
        fix = "Return a transformers model, an nn.Module, a callable or an Engine"
        raise EngineError(f"{options.target} returned {article(made)}", fix=fix)
    port = PortEngine(made, options, text=text, built=(options.dtype or DTYPE) if "dtype" in told else None)
    if not isinstance(made, torch.nn.Module):
        # A module shows what is in force; of a bare callable this is known only if it was told, or says so itself.
        for key in {"dtype", "device"} - told - ({"dtype"} & port.stated.keys()):
            if getattr(options, key):
                problem = f"{options.target} takes no {key}, so {key}={getattr(options, key)} would be an empty promise"
                raise UsageError(problem, fix=f"Let it take the keyword {key}, or leave {key} out of the spec")
    return port


def _made(options: Options) -> tuple[Any, frozenset[str]]:
    """What the target returns, and which of dtype and device it was told."""
    import torch

    function = load(options.target)
    path = None if options.model is None else Path(options.model)
    if path is not None and not path.exists():
        raise ModelError(f"there is no model at {path}", fix="Check the path given as model")
    device = options.device or DEVICE
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        fix = "Run `harness doctor` to see the devices of this machine"
        raise UsageError(f"the device {device!r} cannot be used", fix=fix) from None
    return _call_build(function, options.target, path, getattr(torch, options.dtype or DTYPE), device)


def _call_build(
    function: Callable[..., Any], target: str, path: Path | None, dtype: torch.dtype, device: str
) -> tuple[Any, frozenset[str]]:
    from torch import nn

    parameters = parameters_of(function)
    known: dict[str, Any] = {"dtype": dtype, "device": device}
    if parameters is None:
        return function(path, **known), frozenset(known)
    if "input_ids" in parameters or isinstance(function, Engine | nn.Module):
        fix = "Name a function build(path, *, dtype, device) that returns it"
        raise UsageError(f"{target} is a port itself, not the function that builds one", fix=fix)
    takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    known = {key: value for key, value in known.items() if takes_all or key in parameters}
    places = [one for one in parameters.values() if one.kind not in (one.VAR_KEYWORD, one.KEYWORD_ONLY)]
    by_place = [path] if any(one.name not in known for one in places) else []
    if not by_place and "path" in parameters:
        known["path"] = path
    try:
        inspect.signature(function).bind(*by_place, **known)
    except TypeError as error:
        fix = "It is called as build(path, *, dtype, device), with those of the three that it takes"
        raise UsageError(f"{target} cannot be called: {error}", fix=fix) from None
    return function(*by_place, **known), frozenset(known)


# --- importing the user's module ---------------------------------------------------------------


def load(target: str) -> Callable[..., Any]:
    """The callable that MODULE:FUNCTION names, its module imported; what that executes is the user's.

    Raises:
        UsageError: where there is no such module or attribute, or it cannot be called.
        EngineError: where the module is there and its import fails.
    """
    name, _, attribute = target.partition(":")
    value: Any = _imported(name)
    for part in attribute.split("."):
        if not hasattr(value, part):
            raise UsageError(f"{name} has no attribute {attribute!r}", fix=spec.suggest(part, _functions(value)))
        value = getattr(value, part)
    if not callable(value):
        raise UsageError(f"{target} is a {type(value).__name__}, not a function", fix="Name the function that builds")
    function: Callable[..., Any] = value
    return function


def _functions(value: Any) -> list[str]:
    """Public names of what a module or class defines itself and can be called."""
    home = getattr(value, "__name__", None)
    return [
        name
        for name, one in vars(value).items()
        if callable(one) and not name.startswith("_") and getattr(one, "__module__", None) == home
    ]


def _imported(name: str) -> ModuleType:
    importlib.invalidate_caches()
    _refuse_namesake(name.partition(".")[0])
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _broken(name, error) from error
        fix = "Modules are found as by `python -m`: in the working directory, and where packages are installed"
        raise UsageError(f"there is no module {name!r}", fix=fix) from None
    except (Exception, SystemExit) as error:
        raise _broken(name, error) from error


def _broken(name: str, error: BaseException) -> EngineError:
    said = (str(error).strip() or "no message").splitlines()[0]
    problem = f"importing {name} fails ({type(error).__name__}: {said})"
    return EngineError(problem, fix=f"See where with: python -c 'import {name}'")


def _refuse_namesake(name: str) -> None:
    """Python would hand out a module of this name that was imported from another place, whatever lies here."""
    loaded, found = sys.modules.get(name), PathFinder.find_spec(name)
    before = getattr(getattr(loaded, "__spec__", None), "origin", None)
    now = None if found is None else found.origin
    if before and now and os.path.realpath(before) != os.path.realpath(now):
        fix = "Rename one of the two, or start a new process"
        raise UsageError(f"a module {name!r} was imported from {before} already, and {now} would not run", fix=fix)


@contextmanager
def _importable(directory: str) -> Iterator[None]:
    """A directory first on the module path, as the working directory is for `python -m`."""
    if directory in sys.path or "" in sys.path:
        yield
        return
    sys.path.insert(0, directory)
    try:
        yield
    finally:
        if directory in sys.path:
            sys.path.remove(directory)
