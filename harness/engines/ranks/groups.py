"""How ranks talk: a process group for the shards of each stage, and a link between the stages of each shard.

The shards of a stage are torch.distributed's default group, so that whatever shards a layer (transformers, DTensor)
finds them and no other rank. A link is a group beside it: the same shard of every stage.
"""

from __future__ import annotations

import importlib
import sys
from contextlib import ExitStack
from datetime import timedelta
from operator import attrgetter
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from harness.engines.ranks.layout import Layout, Place

if TYPE_CHECKING:
    import torch
    from torch._C._distributed_c10d import Store

_TAG = 0
_DTENSOR = "torch.distributed.tensor"


class Groups:
    """The groups of one rank, from entering to leaving.

    Args:
        layout: of all ranks.
        place: of this one.
        store: where the ranks meet; a new one, or a new prefix, each time.
        device: type of the device, "cpu" or "cuda".
        timeout: seconds after which a rank that waits for another one gives up.
        alone: make a group of shards also where there is one only: some libraries do nothing without.
    """

    def __init__(
        self, layout: Layout, place: Place, store: Store, *, device: str, timeout: float, alone: bool = False
    ) -> None:
        self.layout, self.place, self._alone = layout, place, alone
        self._store, self._device, self._timeout = store, device, timedelta(seconds=timeout)
        self._link: Any = None
        self._sent: list[tuple[Any, torch.Tensor]] = []

    def __enter__(self) -> Self:
        import torch.distributed as dist
        from torch._C._distributed_c10d import PrefixStore

        with ExitStack() as undone:
            undone.callback(self._leave)
            if self.layout.shards > 1 or self._alone:
                store = PrefixStore(f"stage-{self.place.stage}", self._store)
                backend = "nccl" if self._device == "cuda" else "gloo"
                dist.init_process_group(
                    backend, store=store, rank=self.place.shard, world_size=self.layout.shards, timeout=self._timeout
                )
            if self.layout.stages > 1:
                store = PrefixStore(f"link-{self.place.shard}", self._store)
                if self._device == "cuda":
                    options = dist.ProcessGroupNCCL.Options()
                    options._timeout = self._timeout
                    self._link = dist.ProcessGroupNCCL(store, self.place.stage, self.layout.stages, options)
                else:
                    self._link = dist.ProcessGroupGloo(store, self.place.stage, self.layout.stages, self._timeout)
            undone.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        import torch.distributed as dist

        self._sent, self._link = [], None
        if dist.is_initialized():
            dist.destroy_process_group()
            _forget_meshes()

    def send(self, hidden_BTH: torch.Tensor) -> None:
        """Hand hidden states to the next stage, and go on without waiting for it."""
        tensor = hidden_BTH.contiguous()
        # Kept until it has arrived: the link reads from its memory.
        self._sent.append((self._link.send([tensor], self.place.stage + 1, _TAG), tensor))

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
        """Hidden states of ``shape`` from the stage before."""
        import torch

        hidden_BTH = torch.empty(shape, dtype=dtype, device=device)
        self._link.recv([hidden_BTH], self.place.stage - 1, _TAG).wait()
        return hidden_BTH

    def flush(self) -> None:
        """Wait until all that was sent has arrived."""
        for work, _ in self._sent:
            work.wait()
        self._sent = []

    def from_last(self, values: list[int]) -> list[int]:
        """The last stage's whole numbers, on every stage; elsewhere ``values`` only has their number."""
        import torch
        import torch.distributed as dist

        if self.layout.stages == 1:
            return values
        options = dist.BroadcastOptions()
        options.rootRank = self.layout.stages - 1
        tensor = torch.tensor(values, dtype=torch.int64, device=self._device)
        self._link.broadcast([tensor], options).wait()
        return [int(value) for value in tensor.tolist()]


#: What empties a cache of DTensor whose keys hold a mesh, in the torch versions that have it.
_FORGETS = (
    "debug:_clear_sharding_prop_cache",
    "_redistribute:clear_redistribute_planner_cache",
    "_redistribute:_gen_transform_infos.cache_clear",
    "_collective_utils:MeshTopoInfo.build_from_mesh.cache_clear",
    "_api:DTensor._op_dispatcher.sharding_propagator._propagate_tensor_meta_cached.cache_clear",
)


def _forget_meshes() -> None:
    """Empty DTensor's caches of how operations are sharded.

    Their keys hold the mesh, and so the groups, of each model that was open: of gloo a dozen threads each, which wake
    a hundred times a second for as long as the process lives.
    """
    if _DTENSOR not in sys.modules:
        return
    for place in _FORGETS:
        module, _, name = place.partition(":")
        try:
            forget = attrgetter(name)(importlib.import_module(f"{_DTENSOR}.{module}"))
        except (ImportError, AttributeError):
            continue
        forget()
