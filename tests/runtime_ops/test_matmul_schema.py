"""Signature, function body and NumPy meaning name the same inputs, in the same order."""

from __future__ import annotations

import inspect

from msd_compiler.runtime_ops.matmul import reference, schema
from msd_compiler.runtime_ops.matmul.body import matmul_body
from msd_compiler.runtime_ops.schemas import SCHEMAS, register_schemas
from msd_compiler.runtime_ops.spelling import OLDEST_OPSET
from onnx import defs


def test_schema_and_body_and_reference_agree():
    body = matmul_body(OLDEST_OPSET)
    names = [parameter.name for parameter in schema.SCHEMA.inputs]
    assert names == list(body.input)
    assert [name.lower() for name in names] == list(inspect.signature(reference.matmul).parameters)
    assert [parameter.name for parameter in schema.SCHEMA.outputs] == list(body.output)
    assert sorted(schema.SCHEMA.attributes) == sorted(body.attribute)
    assert (schema.SCHEMA.domain, schema.SCHEMA.name) == (body.domain, body.name)
    assert schema.SCHEMA.since_version == schema.VERSION


def test_onnx_can_be_told_of_all_ops():
    for _ in range(2):
        register_schemas()
    names = {s.name for s in defs.get_all_schemas_with_history() if s.domain == "msd"}
    assert names == {s.name for s in SCHEMAS} == {"MatMul", "MatMulIntegerToFloat", "Attention"}
