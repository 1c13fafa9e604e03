"""The optimized BLOOM of one rank: its shard of heads, inner units and vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from harness.engines import bloom, hf
from harness.engines.ranks import plans
from harness.engines.ranks.rank import RankEngine

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class BloomRank(RankEngine):
    """One rank's part of the port, cut as the plan of transformers' BLOOM is (plans.py)."""

    options: bloom.Options
    _shapes: dict[str, tuple[int, ...]]

    def _load(self) -> PreTrainedModel:
        import torch

        from harness.models.ports.ladder.loading import load_tensors
        from harness.models.ports.ladder.model import Bloom
        from harness.models.ports.ladder.sharded import Shard

        config = self._full = hf.load_config(str(self.source))
        self.layers = range(int(config.num_hidden_layers))
        dtype = getattr(torch, self.options.dtype or hf.native_dtype(config))
        bloom.refuse_unavailable(self.spec, self.options, dtype)
        self._shapes = {}
        with hf.model_errors(str(self.source)):
            mine = {name: self._own(name, whole) for name, whole in load_tensors(self.source, dtype).items()}
            shard = Shard(self.place.shard, self.layout.tensor)
            model: Any = Bloom(config, self.options.rungs, mine, shard)
        model.generation_config = hf.load_generation_config(str(self.source))
        loaded: PreTrainedModel = model
        return loaded

    def _own(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        _, cut = self.cut(name, whole)
        self._shapes[name] = tuple(whole.shape)
        return whole if cut is None else cut.of(whole, self.place.shard, self.layout.shards).clone()

    def cut(self, name: str, parameter: torch.Tensor) -> tuple[bool, plans.Cut | None]:
        style = None if self.layout.tensor == 1 else plans.planned_style("bloom", name)
        return True, None if style is None else plans.cut_of(style, name, parameter.ndim)

    def whole_shape(self, name: str, _parameter: torch.Tensor) -> tuple[int, ...]:
        return self._shapes[name]

    @property
    def settings(self) -> Mapping[str, Any]:
        return {**super().settings, **bloom.own_settings(self.model)}

    def _new_cache(self, batch: int, length: int) -> Any:
        model: Any = self.model
        caches = [model.new_cache(length) for _ in self._parts(batch)]
        self._cache_class = bloom.cache_name(caches[0])
        return caches
