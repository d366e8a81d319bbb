"""How far a layer's output will be from exact activations: the law of METHOD sections 2 and 5, before anything has run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

from ..runtime_ops.matmul.layout import ActivationFormat
from ..runtime_ops.matmul.reference import LIMITS

OUTLIER = 30.0
"""Without samples, one channel of a row is taken to be so much larger than the rest, as in language models: it is what
sets scales per group apart from one scale per row. Massive activations are larger; samples tell."""

FLOAT_ERROR = 3e-7
"""Of float32 sums over some thousand steps."""

BF16_ERROR = 1.64e-3
"""Of a weight that is dequantized to bf16, rounded to nearest, the activation being bf16 in any case (METHOD section 9)."""

FORMAT_ERRORS = {
    ActivationFormat.MXFP4_E1M2_X2: 2.0**-6.62,
    ActivationFormat.MXFP4_E1M2: 2.0**-2.85,
    ActivationFormat.MXFP4_E2M1_X2: 2.0**-5.85,
    ActivationFormat.MXFP4_E2M1: 2.0**-2.79,
    ActivationFormat.MXFP8: 2.0**-5.24,
}
"""Of an activation in such a format: the effective bits of normal values in blocks of 32 (METHOD section 6, models/paper)."""


@dataclass(frozen=True)
class Activation:
    """What is known of a layer's activations."""

    crest_of_group: Mapping[int, float] | None = None
    """Measured: by group length, the root mean square over groups of (largest magnitude / rms of the row)."""
    outlier: float = OUTLIER
    """Without measurements: how much larger one channel is than the rest."""


UNKNOWN = Activation()


def relative_l2(terms: int, k: int, group: int, activation: Activation = UNKNOWN) -> float:
    """Relative L2 error of a product whose activation has `terms` INT8 terms and a scale per `group` steps of K.

    A code is at most half a step off and anywhere within it: step / sqrt(12), the step being largest / limit. Too much
    where a step is larger than most values, as with one term and an outlier of a thousand: these are off by themselves.
    """
    return crest(k, group, activation) / (LIMITS[terms] * math.sqrt(12))


def crest(k: int, group: int, activation: Activation = UNKNOWN) -> float:
    """Root mean square of the groups' largest magnitudes, over the row's rms.

    Without samples: Gaussian, with one channel `Activation.outlier` times as large in one of the groups.
    """
    group = min(group, k)
    if activation.crest_of_group is not None and group in activation.crest_of_group:
        return activation.crest_of_group[group]
    plain, outlier = largest_of_gaussian(group), activation.outlier
    squares = (k - group) * plain**2 + group * max(outlier, plain) ** 2
    return math.sqrt(squares / (k - 1 + outlier**2))


@lru_cache
def largest_of_gaussian(count: int) -> float:
    """Median of the largest magnitude among so many standard normal numbers."""
    return NormalDist().inv_cdf((1 + 0.5 ** (1 / count)) / 2)
