"""Measured times of sites: which nodes count for which, and what is not known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from msd_compiler.models import TINY_LLAMA as TINY
from support import initializer, model, weight

import msd_compiler
from msd_compiler.bench import sites
from msd_compiler.bench.profile import NodeRun, node_runs
from msd_compiler.bench.sites import nodes_of_result, nodes_of_source, site_ms, with_measured_sites
from msd_compiler.cost.workload import Phase
from msd_compiler.decide import Options, decide
from msd_compiler.report import Outcome, SiteRow
from msd_compiler.runtime import RuntimeRefused
from msd_compiler.source import Source, load
from msd_compiler.verification import silent

DECODE = Phase("decode", 1.0, 1, 1, 1024)
PREFILL = Phase("prefill", 1.0, 1, 512, 512)

LAYERS = """(float[B, S, 64] x) => (float[B, S, 64] y) {
[one] d = DequantizeLinear <axis = 0> (w, s)
[turned] t = Transpose <perm = [1, 0]> (d)
[first] a = MatMul (x, t)
[between] r = Relu (a)
e = DequantizeLinear <axis = 0> (v, q)
y = MatMul (r, e)
}"""


def layers():
    first, second = weight("int8", (64, 64), (64,)), weight("int8", (64, 64), (64,), seed=1)
    return model(LAYERS, **first, v=second["w"], q=second["s"])


PLAIN = """(float[B, S, 64] x) => (float[B, S, 64] y) {
d = DequantizeLinear <axis = 1> (w, s)
[first] a = MatMul (x, d)
e = DequantizeLinear <axis = 1> (v, q)
y = MatMul (a, e)
}"""


def plain(graph: str = PLAIN):
    """What every onnxruntime runs; 1.22 and older stumble over `LAYERS`."""
    return model(graph, **{t.name: t for t in layers().graph.initializer})


def site(**more) -> SiteRow:
    return SiteRow(node="first", form="MatMul", outcome=Outcome.REWRITTEN, m="B*S", k=64, n=64, **more)


def test_a_sites_nodes_are_its_product_and_what_prepares_its_weight():
    decided = decide(Source(layers(), Path()), Options(), silent)
    found = nodes_of_source(decided.linked, [d.site for d in decided.decisions])
    assert found == {"one": "first", "turned": "first", "first": "first", "e": "y", "y": "y"}


def test_what_sites_share_counts_for_none():
    shared = model(
        """(float[B, 64] x) => (float[B, 64] y) {
        [shared] d = DequantizeLinear <axis = 0> (w, s)
        [first] a = MatMul (x, d)
        [second] y = MatMul (a, d)
        }""",
        **weight("int8", (64, 64), (64,)),
    )
    decided = decide(Source(shared, Path()), Options(), silent)
    found = nodes_of_source(decided.linked, [d.site for d in decided.decisions])
    assert found == {"first": "first", "second": "second"}


def test_nodes_of_a_result_are_named_after_their_site():
    result = model(
        """(float[B, 64] x) => (float[B, 64] y) {
        [first] a = Identity (x)
        ["first/msd.Cast"] b = Identity (a)
        [other] c = Identity (b)
        [kept] y = Identity (c)
        }"""
    )
    found = nodes_of_result(result, {"first", "gone"}, {"first": "first", "other": "gone", "kept": "kept"})
    assert found == {"first": "first", "first/msd.Cast": "first", "kept": "kept"}


def node(name: str, op: str, ms: float, shape=(1, 1, 64)) -> NodeRun:
    return NodeRun(name, op, 0, ms, shape)


OWN = {"first": "first", "one": "first", "first_1": "other"}


@pytest.mark.parametrize(
    ("nodes", "ms"),
    [
        ([node("first", "MatMul", 2.0), node("one", "DequantizeLinear", 1.0), node("between", "Relu", 9.0)], 3.0),
        ([node("first_matmul_nbits_fused", "MatMulNBits", 2.0)], 2.0),
        ([node("fused first", "MatMul", 2.0)], 2.0),
        ([node("one/Fusion", "MatMulNBits", 2.0)], 2.0),  # named after what prepared the weight
        ([node("first_1", "MatMul", 2.0), node("first_1/Fusion", "MatMul", 2.0)], None),  # another site's
        ([node("firsts", "MatMul", 2.0)], None),
        ([node("one", "DequantizeLinear", 1.0)], None),  # where it is multiplied is not known
        ([node("first", "MatMul", 2.0, (1, 7, 64))], None),  # seven rows are not what was priced
        ([node("first", "MatMul", 2.0, None)], 2.0),
        ([], None),
    ],
)
def test_time_of_a_site(nodes, ms):
    assert site_ms(site(), DECODE, [nodes], OWN) == ms


def test_rows_are_the_phases_own():
    assert site_ms(site(), PREFILL, [[node("first", "MatMul", 2.0, (1, 512, 64))]], OWN) == 2.0


def test_the_median_run_counts():
    runs = [[node("first", "MatMul", ms)] for ms in (5.0, 2.0, 3.0)]
    assert site_ms(site(), DECODE, runs, OWN) == 3.0


def test_nodes_are_told_by_run():
    def event(cat, name, ts, dur, **args):
        return {"cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}

    shape = [{"float": [2, 6, 64]}]
    events = [event("Session", "model_run", start, 90) for start in (0, 100)]
    events += [event("Node", "a_kernel_time", 5, 80, op_name="A", node_index="0", output_type_shape=shape)]
    events += [event("Node", "a_kernel_time", 105, 40, op_name="A"), event("Node", "b_fence_before", 106, 1)]
    first, second = node_runs(events)
    assert first == [NodeRun("a", "A", 0, 0.08, (2, 6, 64))]
    assert second == [NodeRun("a", "A", -1, 0.04, None)]


@pytest.fixture(scope="module")
def measured():
    return msd_compiler.compile(plain(), measure=True)


def test_times_stand_at_their_sites(measured):
    report = measured.report
    assert [site.node for site in report.sites] == ["first", "y"]
    for row in report.sites:
        assert [m.phase for m in row.measured] == [p.name for p in report.pricing.phases] == ["decode", "prefill"]
        assert all(m.before_ms is not None and m.after_ms > 0 for m in row.measured)
    assert report.measurement.threads == 1
    for phase, *both in zip(report.measurement.phases, *(row.measured for row in report.sites), strict=True):
        assert sum(m.after_ms for m in both) <= 2 * phase.after_ms  # medians of different runs
    assert report.measurement.notes == []


def test_the_result_does_not_depend_on_times(measured):
    bare = msd_compiler.compile(plain())
    assert bare.report.measurement is None
    assert bare.report.sites[0].measured == []
    assert measured.model.SerializeToString(deterministic=True) == bare.model.SerializeToString(deterministic=True)


def test_nothing_is_measured_without_verification():
    assert msd_compiler.compile(plain(), verify=False, measure=True).report.measurement is None


def test_a_phase_that_the_model_does_not_run_is_a_note():
    graph = PLAIN.replace("(x, d)", "(m, d)").replace("d = Deq", "m = Add (x, seven)\nd = Deq", 1)
    seven = initializer("seven", np.ones((7, 64), np.float32))
    of_seven = plain(graph)
    of_seven.graph.initializer.append(seven)
    report = msd_compiler.compile(of_seven, measure=True, workload="alone=0.5@7;many=0.5@batch2,3").report
    assert [m.phase for m in report.sites[0].measured] == ["alone"]
    (first, second) = report.measurement.notes
    assert first.startswith("many of the source was not measured: the source does not run on a batch of 2 with 3 new")
    assert second.startswith("many of the result was not measured")


def test_rows_that_were_not_priced_are_not_compared():
    report = msd_compiler.compile(plain(PLAIN.replace("B, S", "1, 7")), measure=True).report
    assert [m.after_ms is None for m in report.sites[0].measured] == [False, False]  # seven in the prices, too
    fixed = plain(PLAIN.replace("B, S, 64] x", "B, 7, 64] x").replace("B, S, 64] y", "batch, S, 64] y"))
    report = msd_compiler.compile(fixed, measure=True, workload="a=1@5").report
    assert [m.after_ms for m in report.sites[0].measured] in ([None], [])


def test_a_source_that_does_not_run_has_no_times(monkeypatch):
    open_ = sites._open

    def refused(model, folder):
        if model.label == "source":
            raise RuntimeRefused("no kernel")
        return open_(model, folder)

    monkeypatch.setattr(sites, "_open", refused)
    report = msd_compiler.compile(plain(), measure=True).report
    assert [(m.before_ms, m.after_ms > 0) for m in report.sites[0].measured] == [(None, True)] * 2
    assert report.measurement.phases[0].before_ms is None
    assert report.measurement.notes[0] == "decode of the source was not measured: no kernel"


def test_time_over_is_a_note(tmp_path):
    done = msd_compiler.compile(TINY, tmp_path / "out.onnx", verify=False)
    decided = decide(load(TINY), Options(), silent)
    report = with_measured_sites(done.report, decided, load(tmp_path / "out.onnx"), seconds=0)
    assert report.measurement.phases == []
    assert [note.split(" was")[0] for note in report.measurement.notes] == ["decode", "prefill"]
    assert all(row.measured == [] for row in report.sites)


def test_a_decoder_on_the_workloads_own_sizes(tmp_path):
    report = msd_compiler.compile(TINY, tmp_path / "out.onnx", measure=True, workload="a=1@7,context9").report
    unknown = [row.node for row in report.sites if [m.after_ms for m in row.measured] == [None]]
    assert unknown == []
    assert [row.node for row in report.sites if not row.measured or row.measured[0].before_ms is None] == []
