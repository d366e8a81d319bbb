from __future__ import annotations

import io
import json

import jsonschema
from rich.console import Console
from support import compiled, model, weight

from msd_compiler import screen
from msd_compiler.evaluate.report import Evaluation, OracleRow, TokensRow
from msd_compiler.report import (
    UNSUPPORTED,
    MeasuredRow,
    Measurement,
    Outcome,
    ReasonCode,
    Report,
    embedded_report,
    schema_path,
    schema_text,
)

GRAPH = "(float[M, 64] x) => (float[M, 32] y) { d = DequantizeLinear(w, s)  y = MatMul(x, d) }"


def test_the_shipped_schema_is_that_of_the_models():
    """Make it again with ``python -c "from msd_compiler.report import *; schema_path().write_text(schema_text())"``."""
    assert schema_path().read_text() == schema_text()


def test_a_report_fits_the_schema():
    report = compiled(model(GRAPH, **weight("int8", (64, 32), (32,)))).report
    document = json.loads(report.json_text())
    jsonschema.validate(document, json.loads(schema_path().read_text()))
    assert document["version"] == 1
    assert document["summary"] == {"sites": 1, "rewritten": 1, "kept": 0, "unsupported": 0, "reasons": {}}
    (site,) = document["sites"]
    assert (site["kind"], site["outcome"], site["m"], site["k"], site["n"]) == ("linear", "rewritten", "M", 64, 32)
    assert site["error_bound"] == 1 / 64516


def test_the_report_travels_in_the_result_without_times_and_paths():
    done = compiled(model(GRAPH, **weight("int8", (64, 32), (32,))))
    inside = embedded_report(done.model)
    assert isinstance(inside, Report)
    assert inside == done.report.portable()
    assert (inside.source, inside.result, inside.verification) == (None, None, None)


def test_an_evaluation_and_times_belong_to_the_report_alone():
    report = compiled(model(GRAPH, **weight("int8", (64, 32), (32,)))).report
    plain = report.portable()
    report.evaluation = Evaluation(
        source="m.onnx",
        onnxruntime="1.20.0",
        tokens=TokensRow(name="t", digest="0", documents=1, count=3, window=2, stride=2, batch=1, predictions=2),
        oracle=OracleRow(perplexity=2, accuracy=0.5),
        runs=[],
    )
    report.measurement = Measurement(cpu="A CPU", onnxruntime="1.20.0", threads=1, runs=5, phases=[])
    report.sites[0].measured = [MeasuredRow(phase="decode", before_ms=None, after_ms=0.5)]
    again = Report.model_validate_json(report.json_text())
    assert again == report
    jsonschema.validate(json.loads(report.json_text()), json.loads(schema_path().read_text()))
    assert report.portable() == plain


def test_a_model_without_report_has_none():
    plain = model(GRAPH, **weight("int8", (64, 32), (32,)))
    assert embedded_report(plain) is None
    plain.metadata_props.add(key="msd.report", value='{"version": 99}')
    assert embedded_report(plain) is None


def test_embeddings_are_counted_apart():
    nodes = "e = Gather(d, i)  y = Add(p, e)"
    proto = model(
        GRAPH.replace("M, 64] x", "M, 64] x, int64[M] i")
        .replace("y = MatMul", "p = MatMul")
        .replace("}", f"{nodes} }}"),
        **weight("int8", (64, 32), (32,)),
    )
    console = Console(width=80, record=True, file=io.StringIO())
    screen.print_report(console, compiled(proto).report)
    first, *rest = console.export_text().splitlines()
    assert first == "1 linear layer: 1 rewritten, 0 kept, 0 unsupported; 1 low-bit embedding kept"
    assert "embedding: 'e': a lookup multiplies nothing: it reads the rows that it needs" in rest


def test_every_reason_code_means_one_outcome():
    assert set(ReasonCode) >= UNSUPPORTED
    assert {o.value for o in Outcome} == {"rewritten", "kept", "unsupported"}
