"""Making the ops known to onnx in a process: its checker and shape inference then take them."""

from __future__ import annotations

from onnx import defs

from .attention import schema as attention
from .matmul import schema as matmul
from .matmul_integer_to_float import schema as matmul_integer_to_float

SCHEMAS = (attention.SCHEMA, matmul.SCHEMA, matmul_integer_to_float.SCHEMA)


def register_schemas() -> None:
    """Make all ops known to onnx in this process; a second call does nothing."""
    for schema in SCHEMAS:
        if not defs.has(schema.name, schema.domain):
            defs.register_schema(schema)
