"""The normal form: what a linear layer with a low-bit weight is, whichever exporter wrote it.

Readers (`passes`) turn many spellings into one `QuantizedLinear`; one lowering turns it into ``msd.MatMul``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from .errors import ModelError
from .linked import Scope
from .runtime_ops.matmul.layout import Codebook


class ReasonCode(StrEnum):
    """Why a linear layer was left as it is. The values are stable; the text beside them may change."""

    FLOAT_WEIGHT = "float_weight"
    """The weight is not quantized."""
    RUNTIME_WEIGHT = "runtime_weight"
    """The weight is an input or computed, not stored in the file."""
    ACTIVATION_QUANTIZED = "activation_quantized"
    """The model itself rounds the activation, in a way that no product of its codes follows."""
    ALREADY_EXACT = "already_exact"
    """The model rounds the activation, and onnxruntime multiplies those codes exactly and as fast."""
    ACTIVATION_CODES = "activation_codes"
    """Rewritten: the integer codes that the model's own rounding gives are multiplied exactly."""
    ACTIVATION_UPGRADED = "activation_upgraded"
    """Rewritten, with the model's rounding of its activation left out as asked."""
    OPSET_TOO_OLD = "opset_too_old"
    """The model imports a default-domain opset in which the rewritten node has no meaning."""
    WEIGHT_TYPE = "weight_type"
    """The codes are of a type that is no small integer (float8) or too wide (int16)."""
    ACTIVATION_TYPE = "activation_type"
    """The activation is neither float32, float16 nor bfloat16."""
    SCALE_LAYOUT = "scale_layout"
    """The scales vary in a way that no grouping of K describes."""
    UNKNOWN_RANK = "unknown_rank"
    """The rewrite depends on the activation's rank, which the file does not tell."""
    ROUNDED_DOWNSTREAM = "rounded_downstream"
    """Rewritten, with three terms: the model rounds to integers what this layer has a part in."""
    WEIGHT_ROUNDED = "weight_rounded"
    """Rewritten, after its float weight was rounded to codes as asked."""
    COLUMN_ORDER = "column_order"
    """The columns of K are assigned to groups out of order (``g_idx``)."""
    FUSED_OP = "fused_op"
    """The layer is inside an op that does more than a product."""
    NO_CACHE = "no_cache"
    """Attention without a cache: both products are of activations."""
    FLOAT_CACHE = "float_cache"
    """Attention whose cache is float, so that there are no codes to multiply."""
    CACHE_ROUNDED = "cache_rounded"
    """Rewritten, its float cache made low-bit as asked."""
    ATTENTION_FORM = "attention_form"
    """Attention with something in it that is not followed."""
    EMBEDDING = "embedding"
    """A lookup in a low-bit table: it multiplies nothing."""
    DOES_NOT_PAY = "does_not_pay"
    """It could be rewritten, but as it stands it is as right as asked for, and faster on the target."""
    AS_ASKED = "as_asked"
    """The user said so (``--override``)."""
    FLOAT_ACTIVATIONS = "float_activations"
    """Rewritten to stay float: ``accuracy_level`` 0."""


class Reject(Exception):
    """A place that looks like a quantized linear layer and is not taken.

    Args:
        code: the stable reason.
        reason: what was found and what would be needed, in one sentence.
        known: what is known of the layer all the same (``k``, ``n``, ``format``).
    """

    def __init__(self, code: ReasonCode, reason: str, **known: int | str):
        super().__init__(reason)
        self.code = code
        self.reason = reason
        self.known = known


@dataclass(frozen=True)
class WeightData:
    """A weight's numbers: ``W[k, n] = input_scales[k] * scales[g, n] * (codes[k, n] - zero_points[g, n] - offsets[g, n])``.

    Where the weight has a codebook, its number for the code stands in the code's place.
    """

    codes: np.ndarray
    """``[K, N]`` uint8."""
    scales: np.ndarray
    """``[groups or 1, N]`` float32."""
    zero_points: np.ndarray
    """As ``scales``, or ``[1, 1]``; uint8."""
    offsets: np.ndarray | None = None
    """As ``scales``, float32: what a zero point has beyond its integer; None for none."""
    input_scales: np.ndarray | None = None
    """``[K]`` float32: a scale along the reduction, which belongs to the activation; None for none."""

    def checked(self, where: str) -> WeightData:
        """Itself, if its numbers are finite.

        Raises:
            ModelError: a scale or zero point is NaN or Inf.
        """
        named = {"scales": self.scales, "zero points": self.offsets, "scales along K": self.input_scales}
        for what, values in named.items():
            if values is not None and not np.isfinite(values).all():
                count = int(np.count_nonzero(~np.isfinite(values)))
                raise ModelError(f"{where}: {count} of {values.size} {what} are NaN or Inf; finite numbers are needed")
        return self


class LowBitWeight(ABC):
    """A stored low-bit weight: its shape and format now, its numbers when they are needed."""

    k: int
    n: int
    bits: int
    block_size: int | None
    """Steps of K that share a scale; None if the scale does not vary along K."""
    format: str
    """As people say it: ``int4 block 32``."""
    is_plain: bool
    """Whether codes, a scale per column or block, and integer zero points are all there is to it."""
    codebook: Codebook = Codebook.INTEGER
    """What the codes stand for."""

    @abstractmethod
    def load(self) -> WeightData:
        """Read the numbers.

        Raises:
            ModelError: they cannot be read, or a scale is NaN or Inf.
        """


def describe_format(type_name: str, block_size: int | None, granularity: str, zero_points: str) -> str:
    """``int4 block 32``, ``uint8 per channel, zero points``."""
    where = f"block {block_size}" if block_size else granularity
    return f"{type_name} {where}{', ' + zero_points if zero_points else ''}"


@dataclass(frozen=True)
class ActivationCodes:
    """An activation that the model itself gives as integers: ``x = scale * (codes - zero_point)``, one of each."""

    codes: gs.Tensor
    scale: gs.Tensor
    zero_point: gs.Tensor | None
    element_type: int
    """TensorProto type of the codes: uint8, int8, uint16 or int16."""
    moves: tuple[gs.Node, ...] = ()
    """What moves the values between ``DequantizeLinear`` and product, in the order of data flow."""

    @property
    def bits(self) -> int:
        """8 or 16."""
        return 8 if self.element_type in (TensorProto.UINT8, TensorProto.INT8) else 16

    @property
    def signed(self) -> bool:
        """Whether codes may be negative."""
        return self.element_type in (TensorProto.INT8, TensorProto.INT16)

    @property
    def terms(self) -> int:
        """INT8 terms that hold them exactly."""
        return self.bits // 8


@dataclass(frozen=True)
class QuantizedLinear:
    """``y = alpha * (x @ W) + bias``, W low-bit and stored in the file."""

    scope: Scope
    product: gs.Node
    """The node that multiplies; rows of the report are named after it."""
    replaced: tuple[gs.Node, ...]
    """The nodes that compute ``y`` and go away, in graph order; the last one's output is ``y``."""
    form: str
    """The spelling in the source: ``DequantizeLinear -> Transpose -> MatMul``."""
    x: gs.Tensor
    y: gs.Tensor
    weights: tuple[LowBitWeight, ...]
    """One, or one per index of the third dimension from the right (experts), all of one shape and format."""
    element_type: int
    """TensorProto type of x and y."""
    alpha: float = 1.0
    bias: np.ndarray | None = None
    """``[N]`` float32."""
    addend: gs.Tensor | None = None
    """What a Gemm adds beyond a constant row."""
    beta: float = 1.0
    """Factor of ``addend``."""
    swapped: tuple[bool, bool] = (False, False)
    """Whether the last two dimensions of x, and of y, are exchanged with respect to ``x @ W``."""
    codes: ActivationCodes | None = None
    """The integers that x stands for, where the model rounds it itself."""
    x_shape: tuple[int | str | None, ...] | None = None
    y_rank: int | None = None
    rows: int | str | None = None
    """M: rows of x, a number or a product of dimension names; None if unknown."""

    @property
    def x_rank(self) -> int | None:
        """Rank of x, None if unknown."""
        return None if self.x_shape is None else len(self.x_shape)

    @property
    def weight(self) -> LowBitWeight:
        """The weight, or the first of several."""
        return self.weights[0]
