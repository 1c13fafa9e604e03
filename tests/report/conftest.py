"""Real verdicts of each kind, made once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from harness import flow, reference_model
from harness.engines.hf import HFEngine
from harness.store import read_golden
from tests.support import write_model


@pytest.fixture(scope="session")
def real_verdicts(small_home, tmp_path_factory):
    """Verdicts on the small golden by their kind: ok, failed (blamed, in another environment), error, stale, ..."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(small_home)
        golden = read_golden("golden/small/small")
        older = {**golden.provenance, "versions": {**golden.provenance["versions"], "torch": "0.1"}}
        other = write_model(tmp_path_factory.mktemp("other") / "model", kind="gpt2")
        verdicts = {
            "ok": flow.check(golden, "hf:dtype=bfloat16", quick=True),
            "failed": flow.check(
                replace(golden, provenance=older), _broken(golden), quick=True, blame_environment=True
            ),
            "stale": flow.check(golden, f"hf:model={other}", quick=True),
            "unmeasured": flow.check(replace(golden, floors={}), "hf:dtype=bfloat16", quick=True, upcast=False),
        }
        patch.setattr(HFEngine, "replay", _raise)
        return {**verdicts, "error": flow.check(golden, "hf:dtype=float32", quick=True)}


def _broken(golden):
    model = reference_model(golden)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 7] *= 3
    return model


def _raise(*_arguments, **_options):
    raise ZeroDivisionError("a port's own bug\n<second line> ]]> ``` | \x1b[31m")
