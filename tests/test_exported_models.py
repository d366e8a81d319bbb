"""What exporters and quantizers write, compiled: the committed files, and all of ``shared/models`` where it is at hand."""

from fnmatch import fnmatch

import onnx
import pytest
from onnx import TensorProto
from real_models import COMMITTED, files

import msd_compiler
from msd_compiler.facts import ReasonCode
from msd_compiler.report import Method, Outcome
from msd_compiler.runtime import RuntimeRefused, runtime_version, session

RUNTIME = runtime_version()

TOLERANCE = 5e-4
"""Relative L2 of an output; 16 bits of every activation through two to six random layers measure 6e-5 to 2.5e-4."""

SAME = 1e-6
"""Native against portable: the integers are equal, the float sums differ by a few units in the last place."""

SAME_ATTENTION = 5e-4
"""The same where attention is rewritten: the body keeps probabilities in float, the kernels code them."""

ROUNDED = 1e-3
"""A default session further from the oracle than this rounds activations that the source does not."""

FLOAT = {ReasonCode.FLOAT_WEIGHT}
EXACT = {ReasonCode.ALREADY_EXACT}
RUNTIME_WEIGHT = {ReasonCode.RUNTIME_WEIGHT}

ATTENTION = {ReasonCode.NO_CACHE, ReasonCode.FLOAT_CACHE, ReasonCode.ATTENTION_FORM}
"""Of attention without a low-bit cache; test_attention_models counts them."""

EXPECTED = (
    # path, reasons that sites may be kept for, whether there are sites to rewrite; the first that fits holds
    ("*_fp32*", FLOAT, False),
    ("*/llama_gqa_w8_dynamic*", EXACT, False),  # uint8 weights
    ("*_w8_dynamic*", set(), True),
    ("*_w8a8_*", set(), True),
    ("*_w8a16_*", set(), True),
    ("*/gpt2_q4_nbits_*", FLOAT, True),  # the quantizer takes no Gemm
    ("*/qwen2_q4_*", FLOAT, True),  # the tied head stays float
    ("*/stories260k_q4_*", FLOAT, True),  # the same
    ("*_q4_*", set(), True),
    ("*_q8_*", set(), True),
    ("repo/*matmulnbits_add.onnx", set(), True),
    ("repo/ort_attention_past_state*", RUNTIME_WEIGHT, False),
    ("repo/ort_dynamic_quantize_matmul_*", RUNTIME_WEIGHT, False),
    ("repo/ort_matmul_integer_to_float_*", RUNTIME_WEIGHT, False),
    ("repo/*dynamic_quantize_matmul.onnx", RUNTIME_WEIGHT, False),
    ("repo/*__matmul_integer_to_float.onnx", EXACT | RUNTIME_WEIGHT, False),
    ("repo/ort_ort_github_issue_19590.onnx", EXACT, False),
    ("repo/*", FLOAT, False),
    ("nodes/*", RUNTIME_WEIGHT, False),
)

TOO_NEW = ("*_dynamo23.onnx", "*_genai_*", "*_q8_nbits_*")
"""Opset 22 and later, 8-bit MatMulNBits: onnxruntime 1.20 refuses the sources themselves."""

LOADS_ALL = (1, 31)
"""An onnxruntime known to load everything."""


def expected(name):
    return next((reasons, rewrites) for pattern, reasons, rewrites in EXPECTED if fnmatch(name, pattern))


def skip_if_too_new(path, name):
    if RUNTIME < LOADS_ALL and any(fnmatch(name, pattern) for pattern in TOO_NEW):
        try:
            session(path, portable=True, log_severity_level=4)
        except RuntimeRefused as error:
            pytest.skip(str(error)[:200])


def float_outputs(path):
    graph = onnx.load(path, load_external_data=False).graph
    return {o.name for o in graph.output if o.type.tensor_type.elem_type == TensorProto.FLOAT}


def has_external_data(path):
    return any(t.external_data for t in onnx.load(path, load_external_data=False).graph.initializer)


def assert_copy(copy, path):
    if not has_external_data(path):
        assert copy.read_bytes() == path.read_bytes()
        return
    models = [onnx.load(path) for path in (copy, path)]
    for tensor in (tensor for model in models for tensor in model.graph.initializer):
        tensor.ClearField("data_location")
    assert models[0] == models[1]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("path", "name"), list(files()))
def test_compiles(path, name, tmp_path):
    reasons, rewrites = expected(name)
    reasons = reasons | {ReasonCode.EMBEDDING} | ATTENTION
    if rewrites:
        skip_if_too_new(path, name)
    out, again, copy = (tmp_path / folder / "out.onnx" for folder in ("first", "again", "copy"))
    for file in (out, again, copy):
        file.parent.mkdir()
    report = msd_compiler.compile(path, out).report

    for site in report.sites:
        assert site.outcome is Outcome.REWRITTEN or site.reason_code in reasons, f"{site.node}: {site.reason}"
    assert (report.summary.rewritten > 0) == rewrites
    if not rewrites:
        assert_copy(out, path)
        return
    if any(site.reason_code is ReasonCode.ACTIVATION_CODES for site in report.sites):
        check_codes(report.verification)
    else:
        attends = any(site.kind == "attention" and site.outcome is Outcome.REWRITTEN for site in report.sites)
        check_figures(report.verification, float_outputs(path), SAME_ATTENTION if attends else SAME)
    msd_compiler.compile(path, again, verify=False)
    assert contents(again.parent) == contents(out.parent)
    msd_compiler.compile(out, copy)
    assert_copy(copy, out)


def check_figures(verification, floats, same):
    assert verification.passed
    assert verification.method is Method.WHOLE
    assert {row.name for row in verification.outputs} >= floats
    for row in verification.outputs:
        if row.name not in floats:
            continue  # integers, as of an int8 cache: a code may fall on the other side
        where = f"{row.name} ({row.feed})"
        assert row.relative_l2 <= TOLERANCE, where
        assert row.portable_relative_l2 <= TOLERANCE, where
        assert row.native_to_portable_l2 <= same, where
        assert row.baseline_relative_l2 is not None, where
        if row.baseline_relative_l2 > ROUNDED:
            assert row.baseline_relative_l2 >= 20 * row.relative_l2, where


def check_codes(verification):
    """A model that rounds its activations: every layer is exact, and no output is farther off than today's.

    The rounding turns differences of 1e-7 into whole codes, so that two ways to compute the same differ by a share of
    what the rounding itself does.
    """
    assert verification.passed
    assert max(site.relative_l2 for site in verification.sites) <= 1e-6
    for row in verification.outputs:
        where = f"{row.name} ({row.feed})"
        assert row.native_to_portable_l2 <= SAME, where
        assert row.relative_l2 <= max(TOLERANCE, 1.05 * row.baseline_relative_l2), where
        assert row.relative_l2 <= max(TOLERANCE, 0.1 * row.other_activations_relative_l2), where


@pytest.mark.parametrize(("path", "name"), list(files()))
def test_upgrades(path, name):
    """With ``--activations upgrade`` a model that rounds its activations is as near its float self as any other."""
    if path is None or not fnmatch(name, "*_w8*"):
        pytest.skip("its activations are float")
    skip_if_too_new(path, name)
    report = msd_compiler.compile(path, activations="upgrade").report
    assert {s.reason_code for s in report.sites if s.kind == "linear"} == {ReasonCode.ACTIVATION_UPGRADED}
    for row in report.verification.outputs:
        assert row.relative_l2 <= TOLERANCE, row.name
        assert row.native_to_portable_l2 <= SAME, row.name
        assert row.other_activations_relative_l2 > 1e-3 or row.other_activations_relative_l2 == row.relative_l2, (
            row.name
        )


ASYM, NBITS, QDQ = "zero points", {"MatMulNBits"}, {"DequantizeLinear -> MatMul"}


@pytest.mark.parametrize(
    ("name", "rewritten", "kept", "formats", "forms"),
    [
        ("qwen2_genai_q4_nbits_b32_sym", 11, {ReasonCode.EMBEDDING: 1}, {"int4 block 32"}, NBITS),
        ("qwen2_genai_q8_nbits_b32", 15, {}, {"int8 block 32"}, NBITS),
        ("llama_gqa_q4_nbits_b32_asym_acc4", 15, {}, {f"uint4 block 32, {ASYM}"}, NBITS),
        ("llama_gqa_q4_qdq_b64_asym_dynamo23", 15, {}, {f"uint4 block 64, {ASYM}"}, QDQ),
        ("qwen2_q4_hqq_b64", 14, {ReasonCode.FLOAT_WEIGHT: 1}, {f"uint4 block 64, float {ASYM}"}, NBITS),
        (
            "bert_w8a8_qdq_s8s8_pt_dynamo18",
            13,
            {ReasonCode.EMBEDDING: 3},
            {f"int8 per tensor, {ASYM}"},
            QDQ | {"DequantizeLinear -> Gemm"},
        ),
        ("bert_fp32_ts14", 0, {ReasonCode.FLOAT_WEIGHT: 13}, set(), set()),
    ],
)
def test_finds(name, rewritten, kept, formats, forms):
    report = msd_compiler.inspect(COMMITTED / f"{name}.onnx")
    sites = [site for site in report.sites if site.kind != "attention"]
    assert sum(site.outcome is Outcome.REWRITTEN for site in sites) == rewritten
    assert {code: n for code, n in report.summary.reasons.items() if code not in ATTENTION} == kept
    taken = [site for site in sites if site.outcome is Outcome.REWRITTEN]
    assert {site.format for site in taken} == formats
    assert {site.form for site in taken} == forms
    assert {site.m for site in taken} <= {"batch_size*sequence_length", "batch*seq", "batch"}
