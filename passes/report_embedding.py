"""Lookups in a low-bit table: a row, no rewrite."""

from __future__ import annotations

from onnx import TensorProto

from msd_compiler.facts import ReasonCode, Reject, describe_format
from msd_compiler.linked import Linked
from msd_compiler.pattern import DEFAULT_DOMAINS, Any, Chain, Const, Match, Maybe, Op
from msd_compiler.reader import Reader
from msd_compiler.source import type_name

from .codes import WEIGHT_BITS

_DOMAINS = (*DEFAULT_DOMAINS, "com.microsoft")
_SCALES = (Any("scales"), Maybe(Any("zero_points")))


class ReportEmbedding(Reader):
    """An embedding: ``GatherBlockQuantized``, or a ``Gather`` before or after the ``DequantizeLinear`` of a table."""

    patterns = (
        Op(
            "GatherBlockQuantized",
            Chain(("Reshape",), Const("codes")),
            Any(),
            *_SCALES,
            domains=_DOMAINS,
            name="lookup",
        ),
        Op(
            "Gather",
            Chain(
                ("Cast", "Identity"),
                Op("DequantizeLinear", Const("codes"), *_SCALES, domains=_DOMAINS, name="lookup"),
            ),
            Any(),
        ),
        Op("DequantizeLinear", Op("Gather", Const("codes"), Any()), *_SCALES, domains=_DOMAINS, name="lookup"),
    )

    def read(self, m: Match, linked: Linked) -> None:
        """See `Reader`."""
        codes, scales = m.scope.constant(m.tensor("codes")), m.scope.constant(m.tensor("scales"))
        assert codes is not None
        if codes.data_type not in WEIGHT_BITS or len(codes.dims) < 2:
            return  # one row, or a vector of numbers
        lookup, zero_points = m.op("lookup"), "" if m.maybe("zero_points") is None else "zero points"
        if lookup.op == "GatherBlockQuantized":
            kind = type_name(codes.data_type)
            if codes.data_type == TensorProto.UINT8:
                kind = f"{'u' if zero_points else ''}int{int(lookup.attrs.get('bits', 4))}"
            block = int(lookup.attrs.get("block_size", 128))
        else:
            kind, block = type_name(codes.data_type), int(lookup.attrs.get("block_size", 0))
        one = scales is not None and all(d == 1 for d in scales.dims)
        raise Reject(
            ReasonCode.EMBEDDING,
            "a lookup multiplies nothing: it reads the rows that it needs",
            format=describe_format(kind, block, "per tensor" if one else "per channel", zero_points),
        )
