"""Where the weights of a transformers model rest between passes, as accelerate places them: devices, memory or disk."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: What `device_map=` takes. The last two keep every weight off the device, and bring each layer's there as it runs.
MAPS = ("auto", "cpu-offload", "disk")


class Placement:
    """Puts a model's weights where they rest, and takes them from there.

    Args:
        how: one of MAPS.
        device: that the model runs on; with "auto" accelerate chooses.
        stack: undoes what is left on the disk.
    """

    def __init__(self, how: str, *, device: str, stack: ExitStack) -> None:
        self.how, self._device = how, device
        self._folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="harness-weights-"))

    @property
    def arguments(self) -> dict[str, Any]:
        """Keywords of `from_pretrained`: with "auto" a model is never whole in one place."""
        return {"device_map": "auto", "offload_folder": self._folder} if self.how == "auto" else {}

    def place(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model with its weights where they rest; one that was loaded by "auto" has them there."""
        import torch
        from accelerate import cpu_offload, disk_offload

        if self.how == "cpu-offload":
            cpu_offload(model, execution_device=torch.device(self._device))
        elif self.how == "disk":
            disk_offload(model, self._folder, execution_device=torch.device(self._device))
        return model

    @contextmanager
    def placed(self, model: PreTrainedModel) -> Iterator[None]:
        """Inside, the weights of a model that is in memory rest where they should."""
        self.place(model)
        try:
            yield
        finally:
            self._gather(model)

    @contextmanager
    def gathered(self, model: PreTrainedModel) -> Iterator[PreTrainedModel]:
        """Inside, the model as it was before `place`: all of it in memory, without accelerate's hooks."""
        self._gather(model)
        try:
            yield model
        finally:
            self.place(model)

    def _gather(self, model: PreTrainedModel) -> None:
        from accelerate.hooks import remove_hook_from_module

        if self.how != "auto":
            remove_hook_from_module(model, recurse=True)
            model.tie_weights()


def device_map(model: PreTrainedModel) -> str:
    """Which of MAPS a live model is under; "auto" is whatever accelerate chose, one device for all of it included."""
    if getattr(model, "hf_device_map", None) is None:
        for place, how in (("memory", "cpu-offload"), ("disk", "disk")):
            if set(resting(model)) == {place}:
                return how
    return "auto"


def is_split(model: PreTrainedModel) -> bool:
    """Whether accelerate brings parts of a model, or of its input, from one place to another."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def resting(model: PreTrainedModel) -> dict[str, int]:
    """Elements of the parameters by the place where they rest: the type of a device, "memory" or "disk"."""
    found: Counter[str] = Counter()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            place = parameter.device.type
            found[_kept(module, name) if place == "meta" else place] += parameter.numel()
    return dict(sorted(found.items()))


def _kept(module: Any, name: str) -> str:
    """Where a weight is that is not on a device: what accelerate's hook brings it from."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        kept = getattr(one, "weights_map", None)
        if kept is not None:
            name = getattr(kept, "prefix", "") + name
            kept = getattr(kept, "dataset", kept)
            on_disk = name in getattr(kept, "index", {}) and name not in (getattr(kept, "state_dict", None) or {})
            return "disk" if on_disk else "memory"
    return "nowhere"


def device_of(model: PreTrainedModel, otherwise: str) -> str:
    """Where its input goes: the device of its first weight that is on one."""
    return next((str(one.device) for one in model.parameters() if one.device.type != "meta"), otherwise)
