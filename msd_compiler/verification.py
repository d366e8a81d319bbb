"""Is the result right? Source and result on the same inputs, or every rewritten layer alone, against an oracle."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto

from .compare import argmax_agreement, max_abs, relative_l2
from .errors import MsdError
from .facts import ActivationCodes, LowBitWeight
from .inputs import Feed, NoInputs, generate
from .oracle import half_precision
from .oracle_session import Convert, open_oracle
from .report import Method, OutputRow, SiteError, Verification
from .runtime import SAY_NOTHING, RuntimeRefused, TimedOut, open_model, run
from .runtime_ops.matmul.layout import decode
from .source import Source
from .verify_attention import RewrittenAttention, attention_error

WHOLE_UP_TO = 2**30
"""Bytes of weights up to which `msd compile` runs the whole model."""

EPSILON = {TensorProto.FLOAT16: 2.0**-11, TensorProto.BFLOAT16: 2.0**-8}
"""Rounding of a half type: a source's least distance from its oracle where it cannot run itself."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, steps done and steps in all."""


def silent(what: str, done: int, total: int) -> None:
    """A `Progress` that shows nothing."""


class Clock:
    """The time that is left of a budget; None: no limit."""

    def __init__(self, seconds: float | None):
        self._end = None if seconds is None else time.monotonic() + seconds

    def left(self) -> float | None:
        """Seconds left, None for no limit."""
        return None if self._end is None else self._end - time.monotonic()

    def check(self) -> None:
        """See that there is time left.

        Raises:
            TimedOut: there is none.
        """
        left = self.left()
        if left is not None and left <= 0:
            raise TimedOut("the time for verification is over")


@dataclass
class _Runner:
    """One way to run a model: what it gives and how long it takes."""

    session: onnxruntime.InferenceSession
    convert: Convert = dict
    times: list[float] = field(default_factory=list)

    def __call__(self, feed: Feed, clock: Clock) -> list[Any]:
        arrays = self.convert(feed.arrays)
        start = time.perf_counter()
        outputs = run(self.session, None, arrays, clock.left())
        self.times.append(1000 * (time.perf_counter() - start))
        return outputs


@dataclass(frozen=True)
class Reference:
    """What a result is measured by, each a model run with optimizations off and half precision widened."""

    oracle: Source
    """What the result must mean."""
    unrounded: Source | None = None
    """The model before its weights, or its caches, were rounded."""
    unrounded_feed: Convert | None = None
    """What its inputs are, from the oracle's: caches as the floats that their codes stand for. None: the same."""
    other_activations: Source | None = None
    """The model with the roundings of its activations left out where they are kept, left in where they are left out."""
    keeps_rounding: bool = False
    """Whether layers were left whose activations a default session rounds: the result is then as far off as that takes it."""


def verify_whole(
    source: Source,
    result: Source,
    *,
    reference: Reference | None = None,
    feeds: Sequence[Feed] | None = None,
    runs: int = 5,
    tolerance: float = 1e-3,
    clock: Clock | None = None,
    progress: Progress = silent,
    seed: int = 0,
) -> Verification:
    """Run source and result on the same inputs and compare both with the oracle.

    The oracle runs with graph optimizations off, every accuracy level at 0 and half precision widened.
    Beside the result stand what the user runs today (the source in a default session) and the result without the library.

    Args:
        reference: the oracle, and what else to show the distance of; None: the source is it.
        feeds: inputs; None: made from the source's signature.
        runs: times that each is run for its median time, interleaved.
        tolerance: largest relative L2 of any output; if it is more, twice a half-precision source's own distance, and
            what the rounding of its activations does where it is kept, and what the rounding of its caches does: a difference of
            1e-7 moves whole codes.

    Raises:
        NoInputs: no inputs were found on which the source runs.
        RuntimeRefused: the source, or the result, does not run.
        TimedOut: the clock ran out.
    """
    clock = clock or Clock(None)
    progress("verifying", 0, 4)
    half = half_precision(source.proto)
    reference = reference or Reference(source)
    names, feeds, expected = _oracle_outputs(reference.oracle, feeds, clock, seed)
    own = _own_outputs(source, feeds, clock) if half else None
    exact = _unrounded_outputs(reference, names, feeds, clock)
    other = None
    if reference.other_activations is not None:
        with suppress(RuntimeRefused):  # a rounding by an op of TensorRT, which is left out
            other = _oracle_outputs(reference.other_activations, feeds, clock, seed)[2]
    progress("verifying", 1, 4)

    native = _open(result, "the result")
    found = [native(feed, clock) for feed in feeds]
    baseline, note = _try_open(source)
    today: list[list[Any]] | None = None
    try:
        today = [baseline(feed, clock) for feed in feeds] if baseline else None
    except RuntimeRefused:
        baseline = None  # its caches are float, and the feeds' are not
    portable = _open(result, "the result without the native library", portable=True)
    without = [portable(feed, clock) for feed in feeds]
    progress("verifying", 2, 4)

    rows = []
    moved = max(
        (_moved_by_caches(reference, names, e, x) for e, x in zip(expected, exact or [], strict=False)), default=0
    )
    for i, feed in enumerate(feeds):
        for j, name in enumerate(names):
            if not isinstance(expected[i][j], np.ndarray) or expected[i][j].dtype.kind in "OSU":
                continue
            rows.append(
                _row(
                    name,
                    feed.name,
                    oracle=expected[i][j],
                    result=found[i][j],
                    portable=without[i][j],
                    baseline=today[i][j] if today else None,
                    source=own[i][j] if own else None,
                    unrounded=exact[i].get(name) if exact else None,
                    other=other[i][j] if other else None,
                    half=half,
                    tolerance=max(tolerance, moved),
                    keeps_rounding=reference.keeps_rounding,
                )
            )
    progress("verifying", 3, 4)
    timed = {"source_ms": baseline, "result_ms": native, "portable_ms": portable}
    medians = _time(timed, feeds[-1], runs, clock)
    progress("verifying", 4, 4)
    return Verification(
        method=Method.WHOLE,
        passed=all(r.relative_l2 <= r.tolerance for r in rows),
        outputs=rows,
        note=note,
        **medians,
    )


def made_inputs(oracle: Source, clock: Clock, seed: int = 0) -> Sequence[Feed]:
    """The inputs that `verify_whole` makes.

    Raises:
        NoInputs, RuntimeRefused, TimedOut: see there.
    """
    return _oracle_outputs(oracle, None, clock, seed)[1]


def _oracle_outputs(
    source: Source, feeds: Sequence[Feed] | None, clock: Clock, seed: int
) -> tuple[list[str], Sequence[Feed], list[list[Any]]]:
    """Output names, feeds (made if there are none) and what the oracle says to them.

    The oracle's session, the largest of all with its dequantized weights, is gone when this returns.
    """
    oracle = _open_oracle(source)
    if feeds is None:
        try:
            feeds = generate(
                source.proto, lambda arrays: run(oracle.session, None, oracle.convert(arrays), clock.left()), seed=seed
            )
        except NoInputs:
            clock.check()  # a refusal for want of time is no refusal
            raise
    return [o.name for o in oracle.session.get_outputs()], feeds, [oracle(feed, clock) for feed in feeds]


def _unrounded_outputs(
    reference: Reference, names: list[str], feeds: Sequence[Feed], clock: Clock
) -> list[dict[str, np.ndarray]] | None:
    """By feed and name, what the unrounded model says: outputs that it has under that name, of floats as here."""
    if reference.unrounded is None:
        return None
    oracle = _open_oracle(reference.unrounded)
    convert = reference.unrounded_feed or dict
    caches = set() if reference.unrounded_feed is None else _codes_of(reference.oracle)
    found = []
    for feed in feeds:
        said = dict(
            zip(
                (o.name for o in oracle.session.get_outputs()),
                oracle(Feed(feed.name, convert(feed.arrays)), clock),
                strict=True,
            )
        )
        floats = {n: v for n, v in said.items() if isinstance(v, np.ndarray)}
        found.append({n: v for n, v in floats.items() if n in names and n not in caches})
    return found


def _codes_of(model: Source) -> set[str]:
    """Outputs that are codes."""
    codes = (TensorProto.INT8, TensorProto.UINT8)
    return {o.name for o in model.proto.graph.output if o.type.tensor_type.elem_type in codes}


def _moved_by_caches(
    reference: Reference, names: list[str], expected: list[Any], exact: dict[str, np.ndarray]
) -> float:
    """How far rounding its caches moves a model, by the output that it moves most."""
    if reference.unrounded_feed is None:
        return 0.0
    return max((relative_l2(v, exact[n]) for n, v in zip(names, expected, strict=True) if n in exact), default=0.0)


def _open_oracle(source: Source) -> _Runner:
    return _Runner(*open_oracle(source))


def _open(source: Source, name: str, **options: Any) -> _Runner:
    return _Runner(open_model(source.proto, source.folder, name=name, log_severity_level=SAY_NOTHING, **options))


def _try_open(source: Source) -> tuple[_Runner | None, str | None]:
    """What the user runs today; None, and why, if it does not run (bfloat16 or float4 on a CPU)."""
    try:
        return _open(source, "the source as it is", portable=True), None
    except RuntimeRefused as error:
        return None, str(error)


def _own_outputs(source: Source, feeds: Sequence[Feed], clock: Clock) -> list[list[Any]] | None:
    """The half-precision source as it is, without optimizations; None if this runtime cannot run it."""
    try:
        level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        runner = _open(source, source.name, portable=True, graph_optimization_level=level)
        return [runner(feed, clock) for feed in feeds]
    except RuntimeRefused:
        return None


def _row(
    name: str,
    feed: str,
    *,
    oracle: np.ndarray,
    result: np.ndarray,
    portable: np.ndarray,
    baseline: np.ndarray | None,
    source: np.ndarray | None,
    unrounded: np.ndarray | None,
    other: np.ndarray | None,
    half: int | None,
    tolerance: float,
    keeps_rounding: bool,
) -> OutputRow:
    own = None
    if half is not None:
        own = relative_l2(source, oracle) if source is not None else EPSILON[half]
        tolerance = max(tolerance, 2 * own)
    if oracle.dtype in (np.int8, np.uint8):
        tolerance = max(tolerance, _rounding_of_codes(oracle))
    if other is not None:
        tolerance = max(tolerance, relative_l2(oracle, other))
    if keeps_rounding and baseline is not None:
        tolerance = max(tolerance, 2 * relative_l2(baseline, oracle))
    logits = _is_logits(name, oracle)
    return OutputRow(
        name=name,
        feed=feed,
        relative_l2=relative_l2(result, oracle),
        max_abs=max_abs(result, oracle),
        tolerance=tolerance,
        source_relative_l2=own,
        rounding_relative_l2=None if unrounded is None else relative_l2(oracle, unrounded),
        other_activations_relative_l2=None if other is None else relative_l2(result, other),
        baseline_relative_l2=None if baseline is None else relative_l2(baseline, oracle),
        baseline_max_abs=None if baseline is None else max_abs(baseline, oracle),
        portable_relative_l2=relative_l2(portable, oracle),
        native_to_portable_l2=relative_l2(result, portable),
        argmax=argmax_agreement(result, oracle) if logits else None,
        baseline_argmax=argmax_agreement(baseline, oracle) if logits and baseline is not None else None,
    )


def _rounding_of_codes(codes: np.ndarray) -> float:
    """Relative L2 of one element in four, at least four, being off by one code; of bytes of two codes one in thirty.

    An output of integer codes (a low-bit cache) is a rounded value: one that lies at a boundary may fall on either side,
    however close the value is. Values 1e-3 of the largest apart do so in a quarter of 127 codes, of 7 codes in a sixtieth.
    """
    step, share = (16.0, 1 / 30) if codes.dtype == np.uint8 else (1.0, 1 / 4)
    count = max(4.0, share * codes.size)
    return float(step * np.sqrt(count) / (np.linalg.norm(codes.astype(np.float64)) or 1.0))


def _is_logits(name: str, value: np.ndarray) -> bool:
    return "logit" in name.lower() and value.ndim >= 2 and value.shape[-1] > 1 and value.dtype.kind not in "iub"


def _time(runners: dict[str, _Runner | None], feed: Feed, runs: int, clock: Clock) -> dict[str, float | None]:
    """Median times in ms on one feed, interleaved; the first runs, above, warmed up. Time over: what there is by then."""
    present = {name: runner for name, runner in runners.items() if runner is not None}
    for runner in present.values():
        del runner.times[:-1]
    try:
        for _ in range(runs):
            for runner in present.values():
                runner(feed, clock)
    except TimedOut:
        pass
    return {name: round(statistics.median(r.times[1:] or r.times), 4) if r else None for name, r in runners.items()}


@dataclass(frozen=True)
class RewrittenProduct:
    """One ``msd.MatMul`` of the result and the weight it stands for."""

    site: str
    node: onnx.NodeProto
    weight: LowBitWeight
    codes: ActivationCodes | None
    alpha: float
    bias: np.ndarray | None


CODES_TOLERANCE = 1e-5
"""Largest relative L2 of a layer whose activation is given as codes: its products are exact."""

ROWS = 4
"""Rows of the random activation that a single layer is verified on."""

_ANY_OPSET, _ANY_IR = 17, 8
"""A layer alone is one node, run by the native kernel: so it is verified where the runtime is too old for the model."""

_CODES_AT_ONCE = 2**20


def verify_sites(
    result: Source,
    products: Sequence[RewrittenProduct | RewrittenAttention],
    *,
    tolerance: float = 1e-3,
    clock: Clock | None = None,
    progress: Progress = silent,
    seed: int = 0,
) -> Verification:
    """Run every rewritten layer and attention alone on random activations and compare with float64.

    One layer's weight is in memory at a time. When the clock runs out the layers done so far count, and a note says so.

    Raises:
        RuntimeRefused: a layer does not run.
    """
    clock = clock or Clock(None)
    stored = {t.name: t for t in result.proto.graph.initializer}
    errors: list[SiteError] = []
    for done, product in enumerate(products):
        progress("verifying layers", done, len(products))
        left = clock.left()
        if left is not None and left <= 0 and errors:
            break
        if isinstance(product, RewrittenAttention):
            errors.append(attention_error(result, product, seed + done))
        else:
            errors.append(_site_error(result, product, stored, tolerance, seed + done))
    progress("verifying layers", len(products), len(products))
    errors.sort(key=lambda e: -e.relative_l2)
    note = None if len(errors) == len(products) else f"{len(errors)} of {len(products)} layers in the time given"
    return Verification(
        method=Method.SITES, passed=all(e.relative_l2 <= e.tolerance for e in errors), sites=errors, note=note
    )


def _site_error(
    result: Source, product: RewrittenProduct, stored: dict[str, TensorProto], tolerance: float, seed: int
) -> SiteError:
    weight = product.weight
    # The result's element type is a matter of one Cast; in float32 the layer's own error is seen.
    node = onnx.NodeProto()
    node.CopyFrom(product.node)
    for attribute in node.attribute:
        if attribute.name == "output_dtype":
            attribute.i = TensorProto.FLOAT
    rng = np.random.default_rng(seed)
    x, fed = _random_activation(product, rng)
    feed = dict(zip(node.input, fed, strict=False))
    value = onnx.helper.make_tensor_value_info
    alone = onnx.helper.make_model(
        onnx.helper.make_graph(
            [node],
            "site",
            [value(n, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in feed.items()],
            [value(node.output[0], TensorProto.FLOAT, [ROWS, weight.n])],
            [stored[name] for name in node.input[len(fed) :]],
        ),
        opset_imports=[onnx.helper.make_opsetid("", _ANY_OPSET), onnx.helper.make_opsetid(node.domain, 1)],
        ir_version=_ANY_IR,
    )
    session = open_model(alone, result.folder, name=f"layer {product.site!r}", log_severity_level=SAY_NOTHING)
    found = run(session, None, feed)[0]
    oracle = float64_product(x, weight, product.alpha, product.bias)
    return SiteError(
        node=product.site,
        relative_l2=relative_l2(found, oracle),
        max_abs=max_abs(found, oracle),
        tolerance=tolerance if product.codes is None else min(tolerance, CODES_TOLERANCE),
    )


def _random_activation(product: RewrittenProduct, rng: np.random.Generator) -> tuple[np.ndarray, list[np.ndarray]]:
    """An activation and the inputs that stand for it: itself, or codes with their scale and zero point."""
    shape = (ROWS, product.weight.k)
    if product.codes is None:
        x = rng.standard_normal(shape).astype(np.float32)
        return x, [x]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(product.codes.element_type)
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    codes = rng.integers(low, high + 1, shape).astype(dtype)
    zero_point = np.array(rng.integers(low, high + 1), dtype)
    scale = np.array(4 / (high - low), np.float32)
    return (codes.astype(np.float64) - zero_point) * scale, [codes, scale, zero_point]


def float64_product(x: np.ndarray, weight: LowBitWeight, alpha: float, bias: np.ndarray | None) -> np.ndarray:
    """``alpha * x @ W + bias`` in float64, codes multiplied a part at a time, what each group gives scaled.

    A scale along K is left out: the rewritten graph applies it to x before the op.
    """
    data = weight.load()
    k, n, block = weight.k, weight.n, weight.block_size or weight.k
    zeros = data.zero_points if data.offsets is None else data.zero_points + data.offsets.astype(np.float64)
    x = x.astype(np.float64)
    y = np.zeros((len(x), n))
    by_column = data.codes.strides[0] < data.codes.strides[1]  # neighbours in memory are read together
    width, depth = (max(1, _CODES_AT_ONCE // k), k) if by_column else (n, max(1, _CODES_AT_ONCE // n))
    for start in range(0, n, width):
        columns = slice(start, start + width)
        for group, first in enumerate(range(0, k, block)):
            end = min(first + block, k)
            centred = x[:, first:end].sum(1, keepdims=True) * -_row_of(zeros, group, columns)
            for at in range(first, end, depth):
                steps = slice(at, min(at + depth, end))
                centred = centred + x[:, steps] @ decode(data.codes[steps, columns], weight.codebook).astype(np.float64)
            y[:, columns] += centred * _row_of(data.scales, group, columns)
    return alpha * y + (0 if bias is None else bias)


def _row_of(values: np.ndarray, group: int, columns: slice) -> np.ndarray:
    """A group's values for some columns, or the one value for all of them."""
    row: np.ndarray = values[group if len(values) > 1 else 0]
    return (row if len(row) == 1 else row[columns]).astype(np.float64)


def read_feed(path: Path) -> Feed:
    """Inputs from an ``.npz`` file, one array per input.

    Raises:
        MsdError: the file is missing or holds no plain arrays.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return Feed(path.name, {name: arrays[name] for name in arrays.files})
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise MsdError(f"inputs {str(path)!r} cannot be read as an .npz of arrays: {error}") from error
