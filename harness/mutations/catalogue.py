"""The bug catalogue: every mutation by its id, negative controls among them."""

from __future__ import annotations

from harness.mutations import (
    attention,
    cache,
    controls,
    conversion,
    kernels,
    norms,
    pipeline_parallel,
    positions,
    precision,
    quantisation,
    serving,
    simple,
    stopping,
    tensor_parallel,
)
from harness.mutations.mutation import catalogue

CATALOGUE = catalogue(
    *conversion.MUTATIONS,
    *positions.MUTATIONS,
    *attention.MUTATIONS,
    *cache.MUTATIONS,
    *norms.MUTATIONS,
    *tensor_parallel.MUTATIONS,
    *pipeline_parallel.MUTATIONS,
    *quantisation.MUTATIONS,
    *stopping.MUTATIONS,
    *serving.MUTATIONS,
    *precision.MUTATIONS,
    *kernels.MUTATIONS,
    *simple.MUTATIONS,
    *controls.MUTATIONS,
)
