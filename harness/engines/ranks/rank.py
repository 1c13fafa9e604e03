"""The model of one rank: a transformers model of its stage's blocks, its layers cut to its shard.

It is driven by the same loop as the `hf` engine, in all ranks at once: each prepares the same batches, and every
forward of theirs meets in the collectives of the layers and on the links between stages.

Shape legend: B batch rows, T new tokens, H hidden units, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import checkpoint
from harness.engines import decoding, hf, hooks
from harness.engines.ranks import evidence, plans, stages
from harness.engines.ranks.groups import Groups
from harness.engines.ranks.layout import Layout, Place, refusal, stage_layers
from harness.errors import UsageError, first_line

if TYPE_CHECKING:
    import torch
    from torch._C._distributed_c10d import Store
    from transformers import PreTrainedModel


class RankEngine(hf.HFEngine):
    """One rank's part of a model. Its logits are those of the whole model on the last stage, and empty elsewhere.

    Args:
        options: how to load and run, the same on every rank.
        text: the SPEC.
        layout: of all ranks.
        place: of this one.
        micro_batches: how many parts a batch goes through the stages in.
        store: where the ranks meet.
        timeout: seconds that a rank waits for another.
        prepare: called with this engine once the model is loaded; None for nothing.
        pulse: called whenever a block has been entered, with a few words.
    """

    def __init__(
        self,
        options: hf.Options,
        *,
        text: str,
        layout: Layout,
        place: Place,
        micro_batches: int,
        store: Store,
        timeout: float,
        prepare: Callable[[RankEngine], None] | None,
        pulse: Callable[[str], None],
    ) -> None:
        super().__init__(options, text=text)
        self.layout, self.place = layout, place
        self.micro_batches = micro_batches
        self._store, self._timeout = store, timeout
        self._prepare, self._pulse = prepare, pulse
        self.layers = range(0)
        self._entered_blocks = 0
        self._full: Any = None
        self._evidence: Mapping[str, Any] | None = None

    def _open(self) -> None:
        device = (self.options.device or "cpu").partition(":")[0]
        if device == "cuda":
            _take_gpu()
        self._meet(device)
        super()._open()
        for name in hooks.block_names(self.model):
            self.model.get_submodule(name).register_forward_pre_hook(self._beat(name))
        if self._prepare is not None:
            self._prepare(self)

    def _meet(self, device: str, *, alone: bool = False) -> None:
        self.groups = self._stack.enter_context(
            Groups(self.layout, self.place, self._store, device=device, timeout=self._timeout, alone=alone)
        )

    def _beat(self, name: str) -> Callable[..., None]:
        def beat(*_: Any) -> None:
            self._entered_blocks += 1
            self._pulse(f"{name}, {self._entered_blocks} blocks done")

        return beat

    # --- loading -------------------------------------------------------------------------------

    @property
    def source(self) -> Path:
        """The model's directory."""
        if self.options.model is None:
            raise UsageError(f"the spec {self.spec!r} names no model", fix="Add model=DIR, or pass --model DIR")
        return Path(self.options.model)

    def _load(self) -> PreTrainedModel:
        config = self._full = hf.load_config(str(self.source), trust_remote_code=self.options.trust_remote_code)
        if reason := refusal(self.layout, config):
            raise UsageError(f"{self.spec} cannot run {self.source.name}: {reason}", fix="Choose another number")
        cut = {"distributed_config": plans.distributed(config, self.layout.tensor)} if self.layout.tensor > 1 else {}
        self.layers = stage_layers(config.get_text_config().num_hidden_layers, self.layout.stages)[self.place.stage]
        if self.layout.stages > 1:
            model = self._load_stage(config, {**self._load_arguments(self.options.dtype), **cut})
        else:
            model = self._from_pretrained(str(self.source), self.options.dtype, **cut)
        plans.localise(model, self.place, self.layout.tensor)
        return self._place(model) if self.layout.tensor == 1 else model.eval()

    def _load_stage(self, config: Any, arguments: Mapping[str, Any]) -> PreTrainedModel:
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

        short = stages.stage_config(config, self.layers)
        tensors = stages.stage_tensors(self.source, config, self.layers, self.place)
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        with hf.model_errors(str(self.source)):
            model, info = kind.from_pretrained(None, config=short, state_dict=tensors, **arguments)
        gone = stages.cut_down(model, config, self.place)
        stages.rescale(model, config, self.layers)
        self._missing = tuple(stages.missing_of(map(str, info.get("missing_keys", ())), gone))
        loaded: PreTrainedModel = model
        return loaded

    # --- what it is ----------------------------------------------------------------------------

    @property
    def vocabulary(self) -> int:
        return int(self._full.get_text_config().vocab_size)

    @property
    def identity(self) -> checkpoint.Identity | None:
        """Of the whole checkpoint, on the head alone: it is read for it, and one rank is enough."""
        return super().identity if self.place.rank == self.layout.head else None

    def cut(self, name: str, parameter: torch.Tensor) -> tuple[bool, plans.Cut | None]:
        """Whether it is known what becomes of a parameter, and how it is cut; None where it is whole."""
        style = None if self.layout.tensor == 1 else plans.style_of(self.model, name)
        if style is None:
            return True, None
        if style not in plans.STYLES:
            return False, None
        return True, plans.cut_of(style, name, parameter.ndim)

    def whole_shape(self, _name: str, parameter: torch.Tensor) -> tuple[int, ...]:
        """The shape that a parameter has over all ranks."""
        return tuple(parameter.shape)

    def summed_layers(self) -> list[str]:
        """Names of the layers whose outputs are sums over the shards; none where nothing is cut."""
        if self.layout.tensor == 1:
            return []
        summed = plans.summed_layers(self.model)
        return [name for name, _ in self.model.named_modules() if name in summed]

    @contextmanager
    def before_sums(self, take: Callable[[torch.Tensor], None]) -> Iterator[None]:
        """Inside, ``take`` is shown what goes into a sum over the shards, before it does."""
        import torch.distributed as dist

        original = dist.all_reduce

        def all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            take(tensor)
            return original(tensor, *args, **kwargs)

        dist.all_reduce = all_reduce
        try:
            yield
        finally:
            dist.all_reduce = original

    @property
    def running(self) -> dict[str, Any]:
        """The settings that are only true once a pass has run."""
        return {"cache": self._cache_class, "chunk": self._chunk}

    @property
    def settings(self) -> Mapping[str, Any]:
        if self._evidence is None:
            # Once, as it was loaded: a widened copy has the same shards.
            self._evidence = evidence.of_rank(self)
        return {**super().settings, "rank": self._evidence}

    # --- running -------------------------------------------------------------------------------

    @property
    def decoder(self) -> decoding.Decoder:
        return replace(super().decoder, choose=self._choose)

    def _choose(self, logits_BV: torch.Tensor) -> list[int]:
        """The head's tokens, on every rank: ranks that disagree would not all stop at the same step."""
        import torch.distributed as dist

        if not self.place.last:
            return self.groups.from_last([0] * len(logits_BV))
        chosen_B = logits_BV.argmax(dim=-1)
        if self.layout.shards > 1:
            dist.broadcast(chosen_B, src=0)  # of the default group: the shards of this stage
        return self.groups.from_last(chosen_B.tolist())

    def _new_cache(self, batch: int, length: int) -> Any:
        return [super(RankEngine, self)._new_cache(len(rows), length) for rows in self._parts(batch)]

    def _parts(self, batch: int) -> list[range]:
        """The rows of each micro-batch."""
        size = -(-batch // min(self.micro_batches, batch))
        return [range(start, min(start + size, batch)) for start in range(0, batch, size)]

    def _step(
        self,
        input_ids_BT: torch.Tensor,
        position_ids_BT: torch.Tensor,
        attention_mask_BS: torch.Tensor,
        cache: Any,
        keep: int,
    ) -> torch.Tensor:
        import torch

        shown = []
        for index, rows in enumerate(self._parts(len(input_ids_BT))):
            cut = slice(rows.start, rows.stop)
            arguments = self._arguments(
                input_ids_BT[cut],
                position_ids_BT[cut],
                attention_mask_BS[cut],
                None if cache is None else cache[index],
                keep if self.place.last else 0,
            )
            if not self.place.first:
                shape = (*arguments.pop("input_ids").shape, self.model.config.hidden_size)
                arguments["inputs_embeds"] = self.groups.receive(shape, self.model.dtype, str(self.model.device))
            output = self._forward(**arguments).logits
            if self.place.last:
                shown.append(output)
            else:
                self.groups.send(output)
        self.groups.flush()
        if self.place.last:
            return shown[0] if len(shown) == 1 else torch.cat(shown)
        return torch.empty((len(input_ids_BT), keep or input_ids_BT.shape[1], 0), device=self.model.device)

    @contextmanager
    def widened(self) -> Iterator[None]:
        """Weights and buffers in float32 as they are, in place: what cuts the layers is bound to these modules.

        Afterwards they are the very tensors that they were.
        """
        import torch
        from torch import nn

        kept: list[tuple[dict[str, Any], str, torch.Tensor]] = []
        table: Any
        wide: dict[int, torch.Tensor] = {}
        for module in self.model.modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is None or not tensor.is_floating_point():
                        continue
                    kept.append((table, name, tensor))
                    if id(tensor) not in wide:  # a tied weight stays one
                        new = tensor.detach().to(torch.float32)
                        is_weight = isinstance(tensor, nn.Parameter)
                        wide[id(tensor)] = nn.Parameter(new, requires_grad=False) if is_weight else new
                    table[name] = wide[id(tensor)]
        options, self.options = self.options, replace(self.options, dtype="float32")
        try:
            yield
        finally:
            self.options = options
            for table, name, tensor in kept:
                table[name] = tensor


def _take_gpu() -> None:
    """Make this rank's own GPU of its machine the one that "cuda" means, before anything is put on it."""
    import torch

    number = int(os.environ["LOCAL_RANK"])
    try:
        torch.cuda.set_device(number)
    except (RuntimeError, AssertionError) as error:
        problem = f"rank {number} of this machine has no GPU of its own ({first_line(error)})"
        raise UsageError(problem, fix="Run `harness doctor` to see the devices of this machine") from None
