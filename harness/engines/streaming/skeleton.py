"""A transformers model without its weights: built from its config alone, its parts found, filled and emptied.

Everything that a checkpoint holds is on torch's meta device; what a config alone gives (tables of rotary angles,
constants) is there. A part is filled with tensors for as long as it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from harness.engines import hf, hooks
from harness.engines.streaming.files import FLOATS, Place
from harness.environment import dtype_key
from harness.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Names that checkpoints keep from before transformers changed them.
_OLD_NAMES = {"lm_head.weight": "embed_out.weight"}

#: Gives the tensor of a name.
Tensors = Callable[[str], torch.Tensor]


class _Empty(TorchFunctionMode):
    """While active, memory that is asked for without a value is not there: parameters are made so, tables are not."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if func is torch.empty:
            given["device"] = "meta"
        return func(*args, **given)


@dataclass(frozen=True, kw_only=True, slots=True)
class Skeleton:
    """The empty model and its parts.

    Attributes:
        model: all of it; ``blocks`` are its transformer blocks by name, in order.
        places: where the tensor of each parameter and stored buffer lies, by its name in the model.
        embedding, head: names of the module that embeds tokens, and of the one that gives logits.
    """

    model: PreTrainedModel
    blocks: Mapping[str, nn.Module]
    places: Mapping[str, Place]
    embedding: str
    head: str

    @property
    def base(self) -> nn.Module:
        """What runs the blocks, and is the model without its head."""
        blocks = next(iter(self.blocks)).rpartition(".")[0]
        return self.model.get_submodule(blocks.rpartition(".")[0])

    def block_places(self) -> list[list[Place]]:
        """What each block is filled with."""
        return [self._under(f"{name}.") for name in self.blocks]

    def outer_places(self) -> list[Place]:
        """What is neither in a block nor the tables of tokens at both ends: norms, positions."""
        inner = tuple(f"{name}." for name in (*self.blocks, self.embedding, self.head))
        return _unique(place for name, place in self.places.items() if not name.startswith(inner))

    @property
    def embedding_place(self) -> Place:
        return self.places[f"{self.embedding}.weight"]

    @property
    def head_places(self) -> tuple[Place, Place | None]:
        """The head's weight [V, H], and its bias [V] where it has one."""
        return self.places[f"{self.head}.weight"], self.places.get(f"{self.head}.bias")

    def _under(self, prefix: str) -> list[Place]:
        return _unique(place for name, place in self.places.items() if name.startswith(prefix))

    @contextmanager
    def filled(
        self, prefix: str, tensors: Tensors, cast: Callable[[torch.Tensor], torch.Tensor], late: Container[str] = ()
    ) -> Iterator[None]:
        """The parameters whose names begin so hold their tensors inside, and are empty again behind.

        All are cast but those whose names are in ``late``.
        """
        before = {}
        try:
            for name, place in self.places.items():
                if name.startswith(prefix):
                    tensor = tensors(place.name)
                    before[name] = _swap(self.model, name, tensor if name in late else cast(tensor))
            yield
        finally:
            for name, tensor in before.items():
                _swap(self.model, name, tensor)


@contextmanager
def widened_late(module: nn.Module, cast: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Each Linear of a part holds its weight as it is stored, and the cast of it only while it computes."""
    stored: dict[nn.Module, nn.Parameter] = {}
    hooks = []

    def before(linear: nn.Module, _given: Any) -> None:
        stored[linear] = weight = linear.get_parameter("weight")
        linear._parameters["weight"] = nn.Parameter(cast(weight.data), requires_grad=False)

    def behind(linear: nn.Module, _given: Any, _result: Any) -> None:
        linear._parameters["weight"] = stored.pop(linear)

    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            hooks += [linear.register_forward_pre_hook(before), linear.register_forward_hook(behind)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def multiplied_in_parts(
    module: nn.Module, cast: Callable[[torch.Tensor], torch.Tensor], scratch: torch.Tensor
) -> Iterator[None]:
    """Each Linear of a part widens some rows of its weight at a time into the same memory, and multiplies with them.

    Memory that is asked for anew costs more than the cast: the system clears every page of it.

    Args:
        module: the part.
        cast: what makes of a stored tensor what is loaded; its dtype may still be narrower than ``scratch``.
        scratch: the memory, a flat tensor of the dtype that is computed in.
    """
    patched: list[nn.Module] = [linear for linear in module.modules() if type(linear) is nn.Linear]
    for linear in patched:
        linear.forward = _in_parts(linear, cast, scratch)
    try:
        yield
    finally:
        for linear in patched:
            del linear.forward


def _in_parts(
    linear: nn.Module, cast: Callable[[torch.Tensor], torch.Tensor], scratch: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    weight, bias = linear.get_parameter("weight").data, linear._parameters.get("bias")
    columns = weight.shape[1]
    rows = max(1, len(scratch) // columns)

    def forward(x: torch.Tensor) -> torch.Tensor:
        result = x.new_empty((*x.shape[:-1], weight.shape[0]))
        for start in range(0, weight.shape[0], rows):
            part = slice(start, start + rows)
            stored = cast(weight[part])
            wide = scratch[: stored.numel()].view(len(stored), columns).copy_(stored)
            result[..., part] = nn.functional.linear(x, wide, None if bias is None else bias[part])
        return result

    return forward


def linear_weights(module: nn.Module, prefix: str) -> set[str]:
    """Names of the weights that `widened_late` casts."""
    return {f"{prefix}{name}.weight" for name, part in module.named_modules() if isinstance(part, nn.Linear)}


def _unique(places: Iterable[Place]) -> list[Place]:
    return list({place.name: place for place in places}.values())


def _swap(model: nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Put a tensor in the place of a parameter or buffer; what was there."""
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if leaf in parent._buffers:
        before = parent._buffers[leaf]
        parent._buffers[leaf] = tensor
    else:
        before = parent._parameters[leaf]
        parent._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    assert before is not None
    return before.data


def build(source: str, places: Mapping[str, Place], *, load: str, dtype: str, attention: str | None) -> Skeleton:
    """The empty model of a directory.

    Args:
        source: the directory.
        places: of its checkpoint.
        load: dtype that it is loaded in: what is derived from the config is rounded so.
        dtype: what it computes in: what is derived is then widened to it.
        attention: kernel, None for the model's own.

    Raises:
        ModelError: where a parameter has no tensor, or another shape, or the model's blocks cannot be found.
    """
    from transformers import AutoModelForCausalLM

    config = hf.load_config(source)
    wide = dtype == "float64"
    arguments: dict[str, Any] = {"attn_implementation": "eager" if wide else attention} if wide or attention else {}
    with hf.model_errors(source), _lift(wide), _Empty(), hf.default_dtype(getattr(torch, load)):
        model: Any = AutoModelForCausalLM.from_config(config, **{dtype_key(): getattr(torch, load)}, **arguments)
        model.eval()
    for buffer in model.buffers():
        if load != dtype and buffer.is_floating_point() and not buffer.is_meta:
            buffer.data = buffer.data.to(getattr(torch, dtype))
    blocks = hooks.block_names(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not blocks or embedding is None or not isinstance(head, nn.Linear):
        raise ModelError(f"{source} does not show its blocks, its embedding and a linear head", fix="Load it with hf:")
    names = {id(module): name for name, module in model.named_modules()}
    found = Skeleton(
        model=model,
        blocks={name: model.get_submodule(name) for name in blocks},
        places=_resolve(model, places, names[id(embedding)], names[id(head)], source),
        embedding=names[id(embedding)],
        head=names[id(head)],
    )
    _refuse_leftovers(found, source)
    return found


def _lift(wide: bool) -> Any:
    if not wide:
        return nullcontext()
    from harness.engines.float64 import Float64Lift

    return Float64Lift()


def _resolve(model: Any, places: Mapping[str, Place], embedding: str, head: str, source: str) -> dict[str, Place]:
    """Where each parameter of the model lies: under its own name, or with or without the base model's prefix."""
    prefix = f"{model.base_model_prefix}."
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    found: dict[str, Place] = {}
    missing = []
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    stored = model.state_dict().keys()
    for name, tensor in tensors.items():
        wanted = name.replace(f"{head}.", f"{embedding}.", 1) if tied and name == f"{head}.weight" else name
        tries = (wanted, wanted.removeprefix(prefix), prefix + wanted, _OLD_NAMES.get(wanted, wanted))
        place = next((places[one] for one in tries if one in places), None)
        if place is None:
            if isinstance(tensor, nn.Parameter):
                missing.append(name)
            continue
        if name not in stored:
            continue  # a table that old checkpoints hold too, and the config gives
        if place.shape != tuple(tensor.shape):
            problem = f"{place.name} of {place.file} is {list(place.shape)}, and the config says {list(tensor.shape)}"
            raise ModelError(problem, fix="Give config and weights of one model")
        if place.dtype not in FLOATS:
            if isinstance(tensor, nn.Parameter):
                raise ModelError(f"{place.name} is {place.dtype}", fix="Stream float32, bfloat16 or float16 weights")
            continue
        found[name] = place
    if missing:
        raise ModelError(
            f"{len(missing)} tensors of {source} are not in its files, e.g. {missing[0]}",
            fix="Download the missing shards; a checkpoint that is converted while it is loaded is saved again first",
        )
    return found


def _refuse_leftovers(found: Skeleton, source: str) -> None:
    left = [name for name, tensor in found.model.named_buffers() if tensor.is_meta and name not in found.places]
    if left:
        raise ModelError(f"the buffer {left[0]} of {source} is made without a value", fix="Load it with hf:")
