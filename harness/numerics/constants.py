"""Every dimensionless constant of the decision rule, once, with its derivation or its source.

There is no absolute tolerance anywhere: each bound is a multiple of round-off that was measured on
the reference itself. "numerics" below is the design note shared/numerics.md; docs/numerics.md tells
what was measured here.
"""

from __future__ import annotations

from collections.abc import Mapping

#: Family-wise false-alarm rate of one verdict (numerics 2.5). A choice, not a measurement.
ALPHA = 1e-3

#: How ALPHA is split (numerics 2.5b): half for the pooled statistics, a quarter for the groups
#: (prompts, position buckets), an eighth for tokens. The last eighth is kept for templates (2.9).
ALPHA_POOLED = ALPHA / 2
ALPHA_GROUPS = ALPHA / 4
ALPHA_TOKENS = ALPHA / 8

#: Effect size below which a significant deviation is `drift` (numerics 2.5c). A correct
#: tensor-parallel run with partial sums in 16 bits measured 1.36 times the round-off of the plain
#: run, so 1.5 for 16 bits; in fp32 correct variants spread over 1.2e-6...3.0e-6, a factor of 2.5.
EFFECT: Mapping[str, float] = {"float32": 3.0, "bfloat16": 1.5, "float16": 1.5}

#: Replicas drawn for a floor (numerics 2.3).
REPLICAS = 24

#: Fewer effective replicas than this cannot carry a Student t bound (numerics 2.3): the tail is then
#: decided by the few draws that happen to differ, and only the effect size speaks.
MIN_EFFECTIVE = 12.0

#: Smallest spread of a log rms between correct implementations (numerics 2.5a): measured over draws
#: 0.10 on a BLOOM, 0.16 on a Llama. The larger, since a too small spread is a false alarm.
SPREAD_FLOOR = 0.16

#: A row's round-off is at least this share of the median row's (numerics 2.2): with K replicas a
#: row can come out near zero by chance, which would turn harmless noise there into an outlier.
SIGMA_FLOOR = 0.2

#: A step's logit-difference noise is at least this share of its prompt's pooled one (numerics 2.6, but by prompt:
#: docs/decisions/0007-noise-by-prompt.md).
PAIR_FLOOR = 0.7

#: Entries among which the logit-difference noise of a step is measured (numerics 2.6).
PAIR_TOP = 5

#: Multiple of a step's noise beyond which a step counts as decidable in tables about models, where
#: no number of tokens is given: sqrt(2 ln(N / alpha)) at N = 3,072, alpha = 1e-3 (numerics 2.6).
COVERAGE_C = 5.5

#: Highest logits kept per generated step (numerics 3).
TOP = 20

#: Random projections kept per row (numerics 3): relative spread of |e| 35 % a row, 1.8 % over 384.
PROJECTIONS = 16

#: Position buckets (numerics 2.4, S3).
BUCKETS = 6

#: A reference in fp32 can only judge a precision whose round-off is this many times larger
#: (numerics 2.2): its own error then adds 1 / 30^2, about 0.1 %, to the variance.
FP32_REFERENCE_RATIO = 30.0

#: A cast that D implies moves the centre; below this share of the fp32 floor the shift is not worth
#: a centre of its own: it adds 0.1^2 = 1 % to the variance of the finest comparison there is.
CENTRE_SHARE = 0.1
