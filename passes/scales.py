"""Scales of a weight: stored, or codes that scales of their own make floats of (NVFP4's two levels)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from msd_compiler.constant_values import DEQUANTIZER_DOMAINS, DEQUANTIZERS, constant_value
from msd_compiler.errors import ModelError
from msd_compiler.facts import ReasonCode, Reject
from msd_compiler.linked import Linked, Scope
from msd_compiler.pattern import Chain, Const, Match, Maybe, OneOf, Op
from msd_compiler.source import type_name

from .codes import FLOAT_TYPES

SCALES = Chain(
    ("Cast", "Identity"),
    OneOf(
        (
            Const("scales"),
            Op(
                DEQUANTIZERS,
                Const("scales"),
                Const("scales_of_scales"),
                Maybe(Const("zero_points_of_scales")),
                domains=DEQUANTIZER_DOMAINS,
                name="dequantize_scales",
            ),
        )
    ),
    name="scales_chain",
)


@dataclass(frozen=True)
class Scales:
    """The scales of a ``DequantizeLinear``, which constants alone make."""

    linked: Linked
    scope: Scope
    tensor: gs.Tensor
    """What the ``DequantizeLinear`` reads."""
    stored: TensorProto
    """The scales, or the codes that they are made of: of the same shape."""
    element_type: int
    """TensorProto type that ``tensor`` has."""

    @property
    def name(self) -> str:
        """Of the stored tensor."""
        return str(self.stored.name)

    @property
    def dims(self) -> tuple[int, ...]:
        """Their shape."""
        return tuple(self.stored.dims)

    def array(self) -> np.ndarray:
        """The scales, float32.

        Raises:
            ModelError: they cannot be read, or what they are made of does not fit together.
        """
        values = constant_value(self.tensor, self.scope, self.linked)
        if values is None:
            raise ModelError(
                f"{self.linked.source.name}: scales {self.name!r} have shape {list(self.dims)}, "
                "which the scales that they are multiplied by do not fit"
            )
        return values.astype(np.float32)


def read_scales(m: Match, linked: Linked) -> Scales:
    """The scales that the matched `SCALES` makes for ``dequantize``.

    Raises:
        Reject: their type is none that scales have.
    """
    stored = m.scope.constant(m.tensor("scales"))
    assert stored is not None
    element_type = int(stored.data_type)
    if "dequantize_scales" in m.bound:
        inner = m.scope.constant(m.tensor("scales_of_scales"))
        assert inner is not None
        element_type = int(m.op("dequantize_scales").attrs.get("output_dtype", 0) or inner.data_type)
    for node in m.chain("scales_chain"):
        element_type = int(node.attrs["to"]) if node.op == "Cast" else element_type
    if element_type not in (*FLOAT_TYPES, TensorProto.FLOAT8E8M0):
        raise Reject(
            ReasonCode.WEIGHT_TYPE,
            f"scales {stored.name!r} are {type_name(element_type)}; a float type or float8e8m0 is needed",
        )
    return Scales(linked, m.scope, m.op("dequantize").inputs[1], stored, element_type)
