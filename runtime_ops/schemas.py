"""Making the ops known to onnx in a process: its checker and shape inference then take them."""

from __future__ import annotations

from onnx import defs


def register(schema: defs.OpSchema) -> None:
    """A second call does nothing."""
    if not defs.has(schema.name, schema.domain):
        defs.register_schema(schema)
