"""Does `locate` name the right module? Bugs of the catalogue beside correct implementations, replayed module by module.

Where a bug is, is not typed by hand: the live model is looked at before and while the bug is in it, and the modules
whose weights, buffers, settings, hooks or code are others are where it is.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.engines import hf
from harness.mutations import hosts
from harness.mutations.benign import FAMILIES, Family
from harness.mutations.catalogue import CATALOGUE
from harness.mutations.mutation import Mutation
from harness.mutations.stopping import CORRECT
from harness.power.opening import TRANSFORMERS, open_spec, part_missing
from harness.power.trial import QUICK
from harness.power.trials import PRECISIONS, suite_for
from harness.scorer import open_reference

if TYPE_CHECKING:
    import torch

    from harness.locate.yardstick import Yardstick

Progress = Callable[[str], None]

#: Families that the replay can be run on with the reference's own loop; the others change how an engine drives it.
_DRIVEN = frozenset({"static_cache"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """What `locate` said of one bug, control or correct implementation.

    Attributes:
        kind: "bug", "control" or "benign".
        name: its id.
        host: the model that it was put into.
        precision: that was replayed.
        touched: the submodules in which the live model was changed; empty where it was changed elsewhere.
        single: whether that is one submodule, or the same one of every block.
        found: whether anything was named.
        named: the first wrong module; "" for the model's own forward, and where none was named.
        part: what of it.
        others: further submodules that were named.
        right: whether the one that was named is one of ``touched``.
        modules: how many were tested.
        reason: why it was not run; "" where it was.
    """

    kind: str
    name: str
    host: str
    precision: str
    touched: tuple[str, ...] = ()
    single: bool = False
    found: bool = False
    named: str = ""
    part: str = ""
    others: tuple[str, ...] = ()
    right: bool = False
    modules: int = 0
    reason: str = ""


# --- where a bug is ----------------------------------------------------------------------------


def state_of(model: Any) -> dict[str, dict[str, Any]]:
    """What a bug may change, by module: digests of its own tensors, its plain attributes, its hooks and parts."""
    found: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        state: dict[str, Any] = {
            f"tensor {key}": _digest(tensor)
            for key, tensor in [*module._parameters.items(), *module._buffers.items()]
            if tensor is not None
        }
        state |= {f"part {key}": id(part) for key, part in module._modules.items()}
        state |= {f"setting {key}": _plain(value) for key, value in vars(module).items() if not key.startswith("_")}
        state["hooks"] = (tuple(module._forward_hooks), tuple(module._forward_pre_hooks))
        found[name] = state
    return found


def _digest(tensor: torch.Tensor) -> int:
    import torch

    return zlib.crc32(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str | bool | None) else id(value)


def touched(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, ...]:
    """Modules whose state differs; the whole model itself is none."""
    return tuple(name for name in before if name and after.get(name) != before[name])


def _submodules(names: Sequence[str], blocks: Sequence[str]) -> tuple[str, ...]:
    from harness.locate.places import submodule_of

    return tuple(dict.fromkeys(submodule_of(name, blocks) for name in names))


def _is_single(submodules: Sequence[str]) -> bool:
    from harness.locate.places import kind_of

    return len({kind_of(one) for one in submodules}) == 1


# --- trials ------------------------------------------------------------------------------------


def place(
    places: Sequence[str],
    work: Path,
    goldens: Path,
    progress: Progress,
    names: Sequence[str] | None = None,
    port: str = TRANSFORMERS,
) -> None:
    """Every bug and family on some hosts, added to the file of each host in ``work``.

    Args:
        places: names of hosts.
        work: directory of goldens, hosts and results.
        goldens: where the models that are shipped lie.
        progress: called before each.
        names: these alone.
        port: SPEC of what the bugs are put into, as `opening.open_spec` takes it; then without families.
    """
    for host in places:
        done = {(one.name, one.precision) for one in kept(work) if one.host == host}
        with _Host(host, work, goldens, port) as stage:
            for precision in PRECISIONS:
                for one in _asked(host, names, families=port == TRANSFORMERS):
                    if (one.name if isinstance(one, Family) else one.id, precision) in done:
                        continue
                    progress(f"{host} {precision}: {one.name if isinstance(one, Family) else one.id}")
                    _append(work, host, stage.placed(one, precision))


def _asked(host: str, names: Sequence[str] | None, *, families: bool) -> Iterator[Mutation | Family]:
    for family in FAMILIES.values() if families else ():
        if set(family.options) <= _DRIVEN and (names is None or family.name in names):
            yield family
    for one in CATALOGUE.values():
        logits = one.shows == "logits" and "free" not in one.active and one.id not in CORRECT
        if logits and host in one.hosts and "dtype" not in dict(one.options) and (names is None or one.id in names):
            yield one


class _Host:
    """One host with what is open of it: engines by precision and options, and yardsticks."""

    def __init__(self, name: str, work: Path, goldens: Path, port: str = TRANSFORMERS) -> None:
        self.name, self._port = name, port
        self._model = hosts.model_directory(name, goldens=goldens, scratch=work / "hosts")
        self._stack = ExitStack()
        self._texts: list[tuple[int, ...]] = []
        self._engines: dict[Any, hf.HFEngine] = {}
        self._yardsticks: dict[Any, Yardstick] = {}

    def __enter__(self) -> _Host:
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    @property
    def texts(self) -> list[tuple[int, ...]]:
        """A few short prompts of the host, with what it says to them."""
        if not self._texts:
            engine = self.engine("float32", (), TRANSFORMERS)
            requests = engine.resolve(suite_for(self.name, engine.context, QUICK))
            said = engine.generate(requests, batch_size=None, stop_ids=frozenset())
            self._texts = [(*one.prompt_ids, *other.tokens) for one, other in zip(requests, said, strict=True)]
        return self._texts

    def engine(self, precision: str, options: tuple[tuple[str, Any], ...], port: str) -> hf.HFEngine:
        """An open engine of the host.

        Raises:
            LookupError: where the port lacks one of the options.
        """
        key = (precision, options, port)
        if key not in self._engines:
            self._engines[key] = self._stack.enter_context(open_spec(port, precision, dict(options), self._model))
        return self._engines[key]

    def yardstick(self, precision: str, engine: hf.HFEngine) -> Yardstick:
        """What correct implementations show at the submodules of the host."""
        from harness.locate.places import submodules
        from harness.locate.presentations import driven_as, presentations
        from harness.locate.yardstick import yardstick

        key = (precision, driven_as(engine))
        if key not in self._yardsticks:
            with open_reference(str(self._model), "float64", weights=precision) as exact:
                self._yardsticks[key] = yardstick(
                    exact,
                    self.engine(precision, (), TRANSFORMERS),
                    presentations(self.texts, exact.model.config),
                    submodules(exact.model),
                    driven_as(engine),
                    progress=lambda _text: None,
                )
        return self._yardsticks[key]

    def placed(self, one: Mutation | Family, precision: str) -> Placed:
        """What is said of one of them."""
        from harness.engines.hooks import block_names

        options = one.options if isinstance(one, Mutation) else tuple(one.options.items())
        blank = Placed(
            kind="benign" if isinstance(one, Family) else "control" if one.harmless else "bug",
            name=one.name if isinstance(one, Family) else one.id,
            host=self.name,
            precision=precision,
        )
        try:
            engine = self.engine(precision, tuple(options), self._port)
        except LookupError as error:
            return replace(blank, reason=part_missing(error))
        by = self.yardstick(precision, engine)
        blank = replace(blank, modules=len(by.names))
        blocks, before = block_names(engine.model), state_of(engine.model)
        try:
            with one.applied(engine.model) if isinstance(one, Family) else one.applied(engine):
                where = _submodules(touched(before, state_of(engine.model)), blocks)
                found = _first(engine, by, blocks)
        except LookupError as error:
            return replace(blank, reason=part_missing(error))
        except Exception as error:  # noqa: BLE001  # a bug may raise anything, and that is a result
            return replace(blank, reason=f"{type(error).__name__}: {error}"[:200])
        placed = replace(blank, touched=where, single=_is_single(where))
        if found is None:
            return placed
        module, part, others = found
        right = bool(set(_submodules([module], blocks)) & set(where)) if module else not where
        return replace(placed, found=True, named=module, part=part, others=others, right=right)


def _first(engine: hf.HFEngine, by: Yardstick, blocks: Sequence[str]) -> tuple[str, str, tuple[str, ...]] | None:
    from harness.locate import suspects
    from harness.locate.maps import same_names
    from harness.locate.presentations import driven_as
    from harness.locate.replaying import replay

    route = same_names(engine.model, by.names)
    shown = replay(engine, route, by.presentations, by.recording, driven_as(engine))
    named = suspects.first_wrong(shown, by, blocks)
    return None if named is None else (named.module, named.part, named.others)


# --- kept --------------------------------------------------------------------------------------


def _append(work: Path, host: str, one: Placed) -> None:
    file = work / "locate" / f"{host}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(asdict(one)) + "\n")


def kept(work: Path) -> list[Placed]:
    """What was done so far."""
    found = []
    for file in sorted((work / "locate").glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            values = json.loads(line)
            found.append(Placed(**{**values, "touched": tuple(values["touched"]), "others": tuple(values["others"])}))
    return found


__all__ = ["Placed", "kept", "place", "state_of", "touched"]
