"""The model of one rank under DeepSpeed: its layers cut by AutoTP, or its parameters partitioned by ZeRO-3.

DeepSpeed makes the module, and the same loop as every rank's drives it. Its groups are this project's own.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from harness.engines import hf
from harness.engines.ranks import native, plans
from harness.engines.ranks.rank import RankEngine
from harness.engines.ranks.serving import DeepSpeed
from harness.errors import UsageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

#: Classes of the layers that AutoTP puts in, with the dimension in which their weight and their bias are cut.
_LAYERS: Mapping[str, tuple[int, int | None]] = {
    "LinearLayer": (0, 0),
    "LinearAllreduce": (1, None),
    "LmHeadLinearAllreduce": (1, None),
}
#: Model types whose query, key and value are one weight that goes by head: its cut is one of rows.
_BY_HEAD = frozenset({"bloom"})


class DeepSpeedRank(RankEngine):
    """One rank's part of a model, as DeepSpeed makes it.

    Args:
        arguments: as RankEngine's.
        how: what DeepSpeed does.
        keywords: as RankEngine's.
    """

    def __init__(self, *arguments: Any, how: DeepSpeed, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.how = how
        self._deepspeed: Any = None

    # --- meeting -------------------------------------------------------------------------------

    def _meet(self, device: str, *, alone: bool = True) -> None:
        # Its launcher says how many ranks are on this machine; torchrun does so by another name.
        os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "0"))
        os.environ.setdefault("DS_ACCELERATOR", device)
        shared = self._sums_in_shared_memory(device)
        with redirect_stdout(sys.stderr):
            import deepspeed

            deepspeed.utils.logger.setLevel(logging.ERROR)
            deepspeed.ops.__compatible_ops__[native.NAME] = shared
            if shared:
                native.load(self._pulse, self.how.build)
            super()._meet(device, alone=alone)
            self._stack.callback(_leave)
            deepspeed.comm.init_distributed(verbose=False)
        if shared:
            import torch.distributed as dist

            dist.barrier()
            native.unlink(self.place.rank)

    def _sums_in_shared_memory(self, device: str) -> bool:
        """Whether DeepSpeed's own all-reduce is used: on one machine's processors, where layers are cut.

        Without LOCAL_SIZE, or with ranks elsewhere, it reads memory that nobody has made, and dies of SIGSEGV.
        """
        local, asked = int(os.environ["LOCAL_SIZE"]), self.how.all_reduce
        can = device == "cpu" and self.layout.tensor > 1 and local == self.layout.world
        if asked == "shm" and not can:
            problem = f"all_reduce=shm needs all {self.layout.world} ranks on one machine, and LOCAL_SIZE is {local}"
            raise UsageError(problem, fix="Start them with DeepSpeed's launcher, or leave all_reduce out")
        return can and asked != "gloo"

    # --- loading -------------------------------------------------------------------------------

    def _load(self) -> PreTrainedModel:
        config = self._full = hf.load_config(str(self.source), trust_remote_code=self.options.trust_remote_code)
        self.layers = range(int(config.get_text_config().num_hidden_layers))
        with redirect_stdout(sys.stderr):
            model = self._partitioned() if self.how.zero else self._injected()
        model.eval()
        return model

    def _injected(self) -> PreTrainedModel:
        """The model with its layers replaced."""
        import deepspeed

        model = self._from_pretrained(str(self.source), self.options.dtype).eval()
        self._deepspeed = deepspeed.init_inference(
            model,
            tensor_parallel={"tp_size": self.layout.tensor},
            dtype=model.dtype,
            replace_with_kernel_inject=self.how.kernels,
        )
        module: Any = self._deepspeed.module
        if module.config.model_type == "bloom" and self.layout.tensor > 1 and not self.how.kernels:
            # Where BLOOM is given no mask, as by `generate` of a text without padding, it makes the biases of all
            # heads itself, past the function that DeepSpeed replaces.
            for block in module.transformer.h:
                attention = block.self_attention
                attention.register_forward_pre_hook(
                    plans.own_slopes(attention.num_heads, self.place.shard), with_kwargs=True
                )
        found: PreTrainedModel = module
        return found

    def _partitioned(self) -> PreTrainedModel:
        """The model under ZeRO: no rank ever holds all of it."""
        import deepspeed
        from transformers.integrations.deepspeed import HfDeepSpeedConfig

        zero: dict[str, Any] = {"stage": self.how.zero, "stage3_param_persistence_threshold": 0}
        if self.how.offload:
            zero["offload_param"] = {"device": self.how.offload, "pin_memory": self.options.device == "cuda"}
        wanted: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
        dtype = self.options.dtype or hf.native_dtype(self._full)
        if dtype != "float32":
            wanted["bf16" if dtype == "bfloat16" else "fp16"] = {"enabled": True}
        alive = HfDeepSpeedConfig(wanted)  # while it lives, transformers partitions what it loads
        model = self._from_pretrained(str(self.source), dtype)
        self._deepspeed, *_ = deepspeed.initialize(model=model, config=wanted)
        del alive
        self._stack.callback(self._deepspeed.destroy)
        found: PreTrainedModel = self._deepspeed.module
        return found

    # --- what it is ----------------------------------------------------------------------------

    @property
    def settings(self) -> Mapping[str, Any]:
        from deepspeed.model_implementations.transformers.ds_transformer import DeepSpeedTransformerInference

        replaced = [one for one in self.model.modules() if isinstance(one, DeepSpeedTransformerInference)]
        return {
            **super().settings,
            "zero_stage": self._deepspeed.zero_optimization_stage() if self.how.zero else 0,
            "offload": self._offload(),
            "kernels": bool(replaced),
            "all_reduce": self._all_reduce(),
        }

    def _offload(self) -> str | None:
        """Where parameters are that are not in use, None where that is the device."""
        asked = self._deepspeed.zero_offload_param() if self.how.zero else None
        places = {one.ds_tensor.device.type for one in self.model.parameters() if hasattr(one, "ds_tensor")}
        return None if asked is None else "+".join(sorted(places))

    def _all_reduce(self) -> str:
        """What sums over the ranks in this dtype: "shm", or the backend of the group."""
        import torch
        import torch.distributed as dist
        from deepspeed.comm import comm

        level = getattr(comm.cdb, "shm_vector_kernel_level", 0)
        return "shm" if level >= (1 if self.model.dtype == torch.float32 else 2) else str(dist.get_backend())

    def cut(self, name: str, parameter: torch.Tensor) -> tuple[bool, plans.Cut | None]:
        if self.how.zero:
            return True, plans.Flat(dim=0)
        module, _, kind = name.rpartition(".")
        layer = self.model.get_submodule(module)
        found = type(layer).__name__
        if found == "fused_LinearLayer" and self._full.model_type in _BY_HEAD:
            found = "LinearLayer"
        if found in _LAYERS:
            dim = _LAYERS[found][0 if kind == "weight" else 1]
            return True, None if dim is None else plans.autotp_cut(name, dim, self._full)
        # A class of DeepSpeed's that is not in the table cuts in a way that is not known here.
        return not type(layer).__module__.startswith("deepspeed."), None

    def whole_shape(self, name: str, parameter: torch.Tensor) -> tuple[int, ...]:
        module, _, kind = name.rpartition(".")
        layer = self.model.get_submodule(module)
        whole: Any = getattr(parameter, "ds_shape", None) or getattr(layer, f"_orig_{kind}_shape", parameter.shape)
        return tuple(whole)

    def summed_layers(self) -> list[str]:
        return [name for name, one in self.model.named_modules() if type(one).__name__ == "LinearAllreduce"]

    @contextmanager
    def before_sums(self, take: Callable[[torch.Tensor], None]) -> Iterator[None]:
        from deepspeed.comm import comm

        backend, original = comm.cdb, comm.cdb.inference_all_reduce

        def all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            take(tensor)
            return original(tensor, *args, **kwargs)

        backend.inference_all_reduce = all_reduce
        try:
            yield
        finally:
            del backend.inference_all_reduce

    # --- running -------------------------------------------------------------------------------

    def _new_cache(self, batch: int, length: int) -> Any:
        # Kernels of DeepSpeed keep a cache of their own, from one text to the next unless they are told.
        reset: Any = getattr(self.model, "reset_cache", None)
        if self.how.kernels and reset is not None:
            reset()
        return super()._new_cache(batch, length)

    @contextmanager
    def widened(self) -> Iterator[None]:
        if not self.how.zero:
            with super().widened():
                yield
            return
        import torch

        # Buffers, and of each parameter the part that is kept and the empty place that it is gathered into.
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        for parameter in self.model.parameters():
            kept += [(one, one.data) for one in (parameter, parameter.ds_tensor)]  # type: ignore[attr-defined]
        kept += [(one, one.data) for one in self.model.buffers() if one.is_floating_point()]
        for tensor, narrow in kept:
            tensor.data = narrow.to(torch.float32)
        options, self.options = self.options, replace(self.options, dtype="float32")
        try:
            yield
        finally:
            self.options = options
            for tensor, narrow in kept:
                tensor.data = narrow


def _leave() -> None:
    """Leave the groups, and let DeepSpeed forget what it knows of them: it keeps that for the whole process."""
    from deepspeed.comm import comm
    from deepspeed.inference.engine import InferenceEngine

    comm.destroy_process_group()
    comm.cdb = None
    InferenceEngine.inference_mp_group = None
