"""What a step costs and what the machine does -> the shortest time it can take, and the share of it that is reached.

The roofline model of Williams, Waterman and Patterson (Communications of the ACM 52, 2009).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from harness.errors import HarnessError, UsageError, first_line
from harness.speed import costs, machine
from harness.speed.costs import Cost
from harness.speed.machine import Machine

if TYPE_CHECKING:
    from harness.engines.base import Engine


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """The shortest time of a step.

    Attributes:
        seconds: max(bytes / bandwidth, operations / rate).
        binds: which of the two it is, "bytes" or "operations".
        bytes: that the step moves.
        operations: that it does.
    """

    seconds: float
    binds: str
    bytes: float
    operations: float

    def share(self, seconds: float) -> float:
        """The share of the limit that a step of this time reaches: 1 is the limit.

        More than 1 is possible where the weights stay in the processor's caches, which no copy of large buffers does.
        """
        return self.seconds / seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Roofline:
    """The limits of one engine.

    Attributes:
        machine: what was measured; None where the limits are not known.
        limits: by (part, batch, prompt tokens); part is "prefill" or "decode".
        reason: why they are not known, in words; "" where they are.
    """

    machine: Machine | None = None
    limits: Mapping[tuple[str, int, int], Limit] | None = None
    reason: str = ""

    def limit(self, part: str, batch: int, prompt: int) -> Limit | None:
        """The limit of one part of one shape, None where it is not known."""
        return (self.limits or {}).get((part, batch, prompt))


def limit(cost: Cost, found: Machine) -> Limit:
    """The limit of one step."""
    moving, computing = cost.bytes / found.bandwidth, cost.operations / found.rate
    return Limit(
        seconds=max(moving, computing),
        binds="bytes" if moving >= computing else "operations",
        bytes=cost.bytes,
        operations=cost.operations,
    )


def observe(engine: Engine, model: str | None, shapes: Sequence[tuple[int, int, int]]) -> dict[str, Any]:
    """The limits of an open engine with the threads and on the device in force, as plain values for `roofline_of`.

    Args:
        engine: open.
        model: directory of its model, for an engine that shows no config.
        shapes: (batch, prompt tokens, new tokens) of each batch.
    """
    try:
        config, settings = _config(engine, model), engine.settings
        dtype, device = str(settings.get("dtype")), str(settings.get("device"))
        if dtype not in costs.WIDTHS:
            raise UsageError(f"nothing is known of the dtype {dtype}", fix="Name one, e.g. dtype=float32")
        counts = costs.count(config)
        measured = machine.measure(dtype, device)
    except HarnessError as error:
        return {"reason": error.problem}
    except Exception as error:  # noqa: BLE001  # configs of others: the speed counts without its limit too
        return {"reason": f"{type(error).__name__}: {first_line(error)}"}
    limits = []
    for batch, prompt, new in shapes:
        for part, cost in (
            ("prefill", costs.prefill(counts, batch=batch, prompt=prompt, dtype=dtype)),
            ("decode", costs.decode(counts, batch=batch, prompt=prompt, new=new, dtype=dtype)),
        ):
            limits.append({"key": (part, batch, prompt), **asdict(limit(cost, measured))})
    return {"reason": "", "machine": asdict(measured), "limits": limits}


def _config(engine: Engine, model: str | None) -> Any:
    """The config of an engine's model.

    Raises:
        UsageError: where there is none, and for a model over several ranks, which share a machine or do not.
    """
    from harness.engines import hf
    from harness.engines.ranks.engine import ParallelEngine

    if isinstance(engine, ParallelEngine):
        raise UsageError("several ranks have no common limit", fix="Look at one rank")
    if isinstance(engine, hf.HFEngine):
        return engine.model.config
    if model is None:
        raise UsageError(f"{engine.spec} shows no config", fix="Give the model's directory")
    return hf.load_config(model)


def roofline_of(told: Mapping[str, Any]) -> Roofline:
    """What `observe` has told."""
    if told["reason"]:
        return Roofline(reason=told["reason"])
    limits = {}
    for one in told["limits"]:
        values = dict(one)
        part, batch, prompt = values.pop("key")
        limits[part, batch, prompt] = Limit(**values)
    return Roofline(machine=Machine(**told["machine"]), limits=limits)
