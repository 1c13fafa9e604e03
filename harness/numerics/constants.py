"""Every dimensionless constant of the decision rule, once, with its derivation or its source.

There is no absolute tolerance anywhere: each bound is a multiple of round-off that was measured on
the reference itself. "numerics" below is the design note shared/numerics.md; docs/numerics.md tells
what was measured here.
"""

from __future__ import annotations

from collections.abc import Mapping

#: Family-wise false-alarm rate of one verdict (numerics 2.5). A choice, not a measurement.
ALPHA = 1e-3

#: How ALPHA is split (numerics 2.5b): half for the pooled statistics, a quarter for the groups (passes, prompts,
#: position buckets, worst positions), an eighth for tokens, an eighth for directions: half of that for weight
#: quantisers, half for the templates of the bug catalogue.
ALPHA_POOLED = ALPHA / 2
ALPHA_GROUPS = ALPHA / 4
ALPHA_TOKENS = ALPHA / 8
ALPHA_DIRECTIONS = ALPHA / 16
ALPHA_TEMPLATES = ALPHA / 16

#: Effect size below which a significant deviation is `drift` (numerics 2.5c). A correct
#: tensor-parallel run with partial sums in 16 bits measured 1.36 times the round-off of the plain
#: run, so 1.5 for 16 bits; in fp32 correct variants spread over 1.2e-6...3.0e-6, a factor of 2.5.
EFFECT: Mapping[str, float] = {"float32": 3.0, "bfloat16": 1.5, "float16": 1.5}

#: Replicas drawn for a floor (numerics 2.3).
REPLICAS = 24

#: Scatter of each statistic between families of correct implementations, beyond what replicas of one have (numerics
#: 2.5a): precision -> statistic -> (largest over families, the family that has it, largest of the others). Each is the
#: root of mean((value - centre)^2) - mean(own^2), and one standard error of it, over hosts and prompt groups. Printed
#: by `harness power --spreads --groups 2`; the larger of that, where one prompt in eight has 480 tokens, and of the
#: same with prompts of 160 tokens at most. The third number is what the null bench judges that family by: no family
#: sets its own limit.
SPREADS: Mapping[str, Mapping[str, tuple[float, str, float]]] = {
    "bfloat16": {
        "constant shift": (0.19, "ranks", 0.147),
        "direction int4": (0.0242, "ranks", 0.0225),
        "direction int8": (0.0233, "compiled", 0.0185),
        "entropy": (0.00975, "ranks", 0.0077),
        "error": (0.0635, "plain", 0.0635),
        "gain": (0.0255, "norms-stepwise", 0.0249),
        "log p": (0.0623, "norms-stepwise", 0.054),
        "margin": (0.0797, "attention", 0.0797),
    },
    "float16": {
        "constant shift": (0.199, "norms-stepwise", 0.162),
        "direction int4": (0.0136, "plain", 0.0136),
        "direction int8": (0.0186, "attention", 0.0166),
        "entropy": (0.00982, "batch-1", 0.00936),
        "error": (0.0655, "norms-stepwise", 0.0605),
        "gain": (0.0246, "ranks", 0.0161),
        "log p": (0.0546, "ranks", 0.0399),
        "margin": (0.0805, "plain", 0.0805),
    },
    "float32": {
        "constant shift": (0.224, "permuted", 0.188),
        "direction int4": (0.0278, "compiled", 0.0228),
        "direction int8": (0.036, "compiled", 0.0339),
        "entropy": (0.01, "ranks", 0.00895),
        "error": (0.164, "threads-2", 0.162),
        "gain": (0.0152, "norms-once", 0.0146),
        "log p": (0.0498, "compiled", 0.0308),
        "margin": (0.111, "norms-stepwise", 0.106),
    },
}

#: Scatter of a statistic that SPREADS does not name: numerics 2.5a measured 0.10 to 0.16 for a log rms over
#: draws, and the larger is taken, since a too small spread is a false alarm. Errors of one prompt, and of a range of
#: positions, are left to it: the pilot's families give 0.16 in float32, yet 0.04 to 0.06 in 16 bits, since all of them
#: round BLOOM's large ALiBi scores alike. Scores with another offset, which the softmax does not see, are rounded
#: otherwise: without its key bias bloom-tiny errs 1.6 x as much on one prompt of 500 tokens, 1.3 x over all positions
#: from 492 on (`ok-key-bias` in float16 on `core`).
SPREAD_DEFAULT = 0.16

#: Degrees of freedom behind the scatter of a module's statistics between families, which SPREAD_DEFAULT is: 14 families
#: on 4 hosts, less one each.
MODULE_DEGREES = 39.0

#: Variants of the reference that are replayed: twelve independent ones are asked for (numerics 2.3), of 16 that were
#: drawn 14.8 were.
MODULE_REPLICAS = 16

#: A row's round-off is at least this share of the median row's (numerics 2.2): with K replicas a
#: row can come out near zero by chance, which would turn harmless noise there into an outlier.
SIGMA_FLOOR = 0.2

#: A step's logit-difference noise is at least this share of its prompt's pooled one (numerics 2.6, but by prompt:
#: docs/decisions/0007-noise-by-prompt.md).
PAIR_FLOOR = 0.7

#: Entries among which the logit-difference noise of a step is measured (numerics 2.6).
PAIR_TOP = 5

#: A failing case is shrunk only as long as its error is this many times its limit (or as many as it was before): what
#: is written down is to fail on another machine too, and correct variants there spread over a factor of 2.5 (EFFECT).
CLEAR = 3.0

#: Multiple of a step's noise beyond which a step counts as decidable in tables about models, where
#: no number of tokens is given: sqrt(2 ln(N / alpha)) at N = 3,072, alpha = 1e-3 (numerics 2.6).
COVERAGE_C = 5.5

#: Largest value that one step adds to the mean clipped margin (T3), in units of noise: beyond COVERAGE_C a step
#: is T1's business, and one outlier should not decide the mean.
DEFICIT_CLIP = COVERAGE_C

#: Below this share of decidable steps a test of tokens alone says nothing (numerics 2.6).
MIN_COVERAGE = 0.8

#: Probability with which the smallest error that a verdict names would have failed it. A choice of the report.
CATCH = 0.99

#: A check that would let pass an error of this many times round-off is `unmeasured`: the precisions differ by
#: 8 (fp16 to bf16) and more from one to the next, so it could not tell two of them apart.
MAX_SMALLEST = 8.0

#: Degrees of freedom of the prior of a moderated spread where the units show no variation of their own: from
#: here on Student's t is the normal distribution to 1 % at every rate used (t/z at 1e-7: 1.012).
LARGEST_PRIOR = 600.0

#: Standard errors by which the variety of the units' spreads is taken larger than it was found, before their common
#: prior is made of it: a prior believed too much gives limits that are passed too often. With it 12 units whose
#: spreads vary by 0.25 pass 1.26 times as often as asked, printed by `pytest tests/numerics/test_null.py -k units -s`;
#: 1.8 times at 0 standard errors.
VARIETY_ERRORS = 1.0

#: Fewer units than this keep their own degrees of freedom: 6 of them pass limits of the prior above 1.9 times as
#: often as asked (4.0 at 0 standard errors), 1.1 times their own, which the same command prints.
FEWEST_UNITS = 12

#: A direction (a weight quantiser, a template) is named when its fitted coefficient lies between these
#: (numerics 2.9 and the status `deviates` of DESIGN.md): a bug that is there gives about 1.
COEFFICIENT = (0.5, 2.0)

#: A direction that is named accounts for at least this share of what the error has beyond round-off, as a variance: a
#: gross error has a part along every direction, and half of it is more than chance or kinship gives
#: (templates of different bugs have cosines up to 0.43, numerics 2.9, which is 0.18 of the variance).
EXPLAINED = 0.5

#: Coordinates of a row's logits that templates are kept in: all of them for a model that is no wider. A wider one
#: loses the square root of (width / this) of z; 256 keep a template of 10,000 rows below 3 MB.
COORDINATES = 256

#: Templates whose |cosine| is above this are one alias class (numerics 2.9): one fault in two places, or two names of
#: one fault, which no error of this suite tells apart.
ALIAS = 0.9

#: A further bug is named when it takes away at least this share of what the first one does, a tenth of its size. A
#: wrong function has other round-off than the right one, and in 2 of 300 runs on the pilot's prompts that looked like
#: another bug, of at most 3e-4 of the square.
FURTHER = 0.01

#: Random sign flips of the prompts of each replica, from which the limit of the largest z over all templates is made
#: (numerics 2.9): 200 of each of 24 replicas are 4,800 draws, whose spread is known to about 1 %.
SIGN_FLIPS = 200

#: Share of the mean variance that is added to each direction before round-off is whitened: an estimate from some
#: thousand rows x 24 replicas does not know a hundredth of it, and a direction must not count for what is not known.
RIDGE = 0.02

#: Share of an error from which it is said to lie in one place "alone". A choice of words, of no verdict.
MOSTLY = 0.95

#: A candidate of an unknown quantiser passes up to this multiple of the divergence of plain round-to-nearest at the
#: same bits a group, and below the second it is not quantised as declared (numerics 2.7).
QUANTISER_WORST = 1.2
QUANTISER_BEST = 0.2

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
