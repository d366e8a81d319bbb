"""Float models: the weights of linear layers are rounded, and the readers take it from there.

To integers onnxruntime's own quantizer rounds. It knows ``MatMul`` by an initializer and nothing else. So it is handed one
weight at a time, as a model of one MatMul, and never sees the graph: Gemm, transposed and converted weights, nested graphs and
external data are read here, and what it makes of the weight (codes, scales, zero points) goes into a ``MatMulNBits`` in the
layer's place. MXFP4 and NVFP4 are rounded here (`float4`), and go into a ``DequantizeLinear`` of the domain ``msd``: ONNX's own knows
these types from opset 23 and 24 on, and a model's opset stays what it is. No result holds it.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any as Untyped
from typing import Protocol, TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from .edit import Edit
from .errors import ModelError, OptionError
from .float4 import BLOCK_SIZES as FLOAT4_BLOCK_SIZES
from .float4 import Format, ScaleRule, round_to_float4
from .inline import inlined
from .linked import Linked, Scope
from .pattern import Any, Chain, Const, Match, Maybe, Op, match
from .source import Source, type_name
from .verification import Progress, silent

BITS = (4, 8)
BLOCK_SIZES = (16, 32, 64, 128, 256)
"""What onnxruntime's kernels round to; given another size, those of 1.20 write zeros and say nothing."""

_GEMM_NEEDS_OPSET = 7
"""Before, Gemm and Add broadcast only when told to."""

_PART = 2**28
"""Bytes of a weight that the quantizer gets at a time; columns are rounded one by one."""

_MODULES = (
    ("matmul_nbits_quantizer", "MatMulNBitsQuantizer", BITS),
    ("matmul_4bits_quantizer", "MatMul4BitsQuantizer", (4,)),
)
"""Where the quantizer is and what it can do: onnxruntime 1.22 and later, 1.20 and 1.21."""

_ROUNDED = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16})
_FLOATS = _ROUNDED | {TensorProto.BFLOAT16, TensorProto.DOUBLE}

_WEIGHT = Chain(("Cast", "Identity", "Transpose"), Const("weight"), name="chain")
_PATTERNS = {
    "MatMul": Op("MatMul", Any("x"), _WEIGHT),
    "Gemm": Op("Gemm", Any("x"), _WEIGHT, Maybe(Any("c"))),
}


@dataclass(frozen=True)
class Quantization:
    """How weights are rounded.

    Raises:
        OptionError: the quantizer rounds to no such codes.
    """

    bits: int
    """4 or 8."""
    block_size: int = 32
    """Steps of K that share a scale: 16, 32, 64, 128 or 256."""
    symmetric: bool = True
    """Zero is the middle code of every block; otherwise each block has a zero point."""

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise OptionError(f"weights cannot be rounded to {self.bits} bits; it must be 4 or 8")
        if self.block_size not in BLOCK_SIZES:
            raise OptionError(f"block size is {self.block_size}; it must be 16, 32, 64, 128 or 256")


@dataclass(frozen=True)
class Float4Quantization:
    """How weights are rounded to floats of 4 bits.

    Raises:
        OptionError: there is no such format or rule.
    """

    format: Format
    """``mxfp4``: blocks of 32, scales that are powers of two. ``nvfp4``: blocks of 16, scales of 8 bits."""
    scale_rule: ScaleRule = "standard"
    """A block's scale: by the standard's rule, or ``least_error``, the one of its neighbours that is closest to the weights."""

    def __post_init__(self) -> None:
        if self.format not in FLOAT4_BLOCK_SIZES:
            raise OptionError(f"weights cannot be rounded to {self.format!r}; it must be mxfp4 or nvfp4")
        if self.scale_rule not in ("standard", "least_error"):
            raise OptionError(f"scale rule is {self.scale_rule!r}; it must be standard or least_error")

    @property
    def block_size(self) -> int:
        """Steps of K that share a scale."""
        return FLOAT4_BLOCK_SIZES[self.format]


WeightRounding: TypeAlias = Quantization | Float4Quantization


def quantize(source: Source, how: WeightRounding, *, progress: Progress = silent) -> tuple[Source, dict[str, str]]:
    """Round the weights of a model's float linear layers to low-bit codes.

    A layer is a MatMul, or a Gemm of opset 7 or later, whose right-hand weight is stored in the file, is float32 or float16,
    has two dimensions and is at least a block long in K. A weight that comes through Transpose (a head tied to the embedding
    table), Cast or Identity is rounded as the product sees it; the table itself stays float. All else stays as it is.

    Args:
        source: not touched.
        progress: told what is being done.

    Returns:
        The rounded model, and what was done in words by name of the layer's node (or of its first output). Its codes are
        embedded: memory must hold them about four times, and above 2 GiB the model can be compiled to a file, but not
        serialized. Other external data stays where it was. The source itself, and no names, if nothing is rounded.

    Raises:
        ModelError: a weight cannot be read or is not finite.
        OptionError: the installed onnxruntime has no quantizer that does this.
    """
    rounder: _Rounder = _Quantizer(how) if isinstance(how, Quantization) else _Float4(how)
    linked = Linked.of(inlined(source))
    layers = []
    for scope, _, node in linked.nodes():
        with _named(source, node):
            m = _layer(linked, scope, node, how)
        if m is not None:
            layers.append(m)
    if not layers:
        return source, {}
    edit = Edit(linked.source)
    done: dict[str, str] = {}
    for number, m in enumerate(layers):
        progress("rounding weights", number, len(layers))
        with _named(source, m.node):
            weight = _weight(linked, m)
            edit.replace(m.scope, [m.node], _nodes(linked, m, edit, weight, rounder))
        float_type = type_name(_element_type(weight))
        done[_name(m.node)] = f"{m.node.op} with a {float_type} weight, rounded {rounder.how}"
    progress("rounding weights", len(layers), len(layers))
    edit.import_domain(rounder.domain, 1)
    proto = edit.finish()
    return Source(proto, source.folder, source.path), done


def _name(node: gs.Node) -> str:
    """What rows of the report call the node."""
    return str(node.name or node.outputs[0].name)


@contextmanager
def _named(source: Source, node: gs.Node) -> Iterator[None]:
    """Attributes of the wrong type or number are the model's mistake, and the message says where."""
    try:
        yield
    except (TypeError, ValueError, KeyError, IndexError, OverflowError) as error:
        name = node.name or (node.outputs[0].name if node.outputs else "")
        raise ModelError(f"{source.name}: {node.op} {name!r} cannot be read: {error}") from error


def _layer(linked: Linked, scope: Scope, node: gs.Node, how: WeightRounding) -> Match | None:
    """The node's match if it is a layer to round; decided without reading the weight."""
    m = match(_PATTERNS[node.op], node, scope) if node.op in _PATTERNS else None
    if m is None or scope.constant(m.tensor("x")) is not None:
        return None
    if node.op == "Gemm" and 0 < linked.source.opset < _GEMM_NEEDS_OPSET:
        return None
    stored = scope.constant(m.tensor("weight"))
    assert stored is not None
    element_types, dims = [stored.data_type], list(stored.dims)
    for step in m.chain("chain"):
        if step.op == "Cast":
            element_types.append(step.attrs["to"])
        elif step.op == "Transpose":
            dims = [dims[p] for p in step.attrs.get("perm", range(len(dims))[::-1])]
    if not _FLOATS.issuperset(element_types) or element_types[-1] not in _ROUNDED:
        return None
    if node.attrs.get("transB", 0):
        dims.reverse()
    if len(dims) != 2 or dims[0] < how.block_size or dims[1] < 2:
        return None
    x = linked.shape(scope, m.tensor("x"))
    return None if x is not None and len(x) < 2 else m


def _weight(linked: Linked, m: Match) -> np.ndarray:
    """``[K, N]``, as the product multiplies it.

    Raises:
        ModelError: it holds NaN or Inf, which no code stands for.
    """
    stored = m.scope.constant(m.tensor("weight"))
    assert stored is not None
    weight = linked.source.array(stored)
    for step in m.chain("chain"):
        if step.op == "Transpose":
            weight = weight.transpose(step.attrs.get("perm"))
        elif step.op == "Cast":
            weight = weight.astype(helper.tensor_dtype_to_np_dtype(step.attrs["to"]))
    if not np.isfinite(weight).all():
        raise ModelError(
            f"{linked.source.name}: weight {stored.name!r} holds NaN or Inf; finite numbers can be rounded"
        )
    return weight.T if m.node.attrs.get("transB", 0) else weight


@dataclass(frozen=True)
class _Place:
    """Where the nodes of a rounded layer are collected."""

    edit: Edit
    name: str
    """Of the layer."""
    weight: str
    """Of its weight."""
    nodes: list[onnx.NodeProto] = field(default_factory=list)

    def add(self, op: str, *inputs: str, suffix: str, **attributes: Untyped) -> str:
        """Add a node; its output's name is returned."""
        output = self.edit.unique(f"{self.name}/{suffix}")
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def constant(self, what: str, values: np.ndarray) -> str:
        """A part of the rounded weight."""
        return self.edit.constant(f"{self.weight}_{what}", values)


class _Rounder(Protocol):
    """Rounds a weight."""

    how: str
    """In words: ``by ...``, ``to ...``."""
    domain: str
    """Of the ops that it writes."""

    def product(self, place: _Place, x: str, weight: np.ndarray) -> str:
        """Write the product of ``x`` by the rounded ``[K, N]`` weight, in the weight's own type; the output's name."""
        ...


def _nodes(linked: Linked, m: Match, edit: Edit, weight: np.ndarray, rounder: _Rounder) -> list[onnx.NodeProto]:
    """The product, and around it what a Gemm does beyond it: the same sums, in float16 each step rounded."""
    name, x, y = _name(m.node), m.tensor("x").name, m.node.outputs[0].name
    attrs, dtype = m.node.attrs, weight.dtype
    place = _Place(edit, name, m.tensor("weight").name)
    nodes, add = place.nodes, place.add
    if attrs.get("transA", 0):
        x = add("Transpose", x, suffix="transposed", perm=[1, 0])
    found = rounder.product(place, x, weight)
    nodes[-1].name = name  # rows of the report are named after the source's node
    steps = [nodes[-1]]
    alpha, beta = float(attrs.get("alpha", 1.0)), float(attrs.get("beta", 1.0))
    c = m.maybe("c") if m.node.op == "Gemm" and beta != 0 else None
    if alpha != 1:
        found = add("Mul", found, edit.constant(f"{name}/alpha", np.array(alpha, dtype)), suffix="scaled")
        steps.append(nodes[-1])
    if c is not None:
        addend, stored = c.name, m.scope.constant(c)
        if beta != 1 and stored is not None:
            scaled = linked.source.array(stored) * np.float32(beta)
            addend = edit.constant(f"{c.name}_scaled", scaled.astype(dtype))
        elif beta != 1:
            addend = add("Mul", addend, edit.constant(f"{name}/beta", np.array(beta, dtype)), suffix="addend")
        add("Add", found, addend, suffix="sum")
        steps.append(nodes[-1])
    nodes[-1].output[0] = y
    shape = linked.shape(m.scope, m.node.outputs[0])
    if shape is not None:  # shape inference of the default domain ends at other domains' ops
        for node in steps:
            edit.declare(m.scope, node.output[0], _element_type(weight), shape)
    return nodes


class _Float4:
    """The rounding of `float4`."""

    domain = "msd"

    def __init__(self, how: Float4Quantization):
        self._how = how
        by = "the standard's rule" if how.scale_rule == "standard" else "least squared error"
        self.how = f"to {how.format}, block scales by {by}"

    def product(self, place: _Place, x: str, weight: np.ndarray) -> str:
        """See `_Rounder`."""
        rounded = round_to_float4(weight, self._how.format, self._how.scale_rule)
        codes, scales = place.constant(self._how.format, rounded.codes), place.constant("scales", rounded.scales)
        if rounded.scale_of_scales is not None:
            whole = place.constant("scale", rounded.scale_of_scales)
            scales = place.add("DequantizeLinear", scales, whole, suffix="scales", domain=self.domain)
        dequantized = place.add(
            "DequantizeLinear",
            codes,
            scales,
            suffix="weight",
            domain=self.domain,
            axis=0,
            block_size=self._how.block_size,
            output_dtype=_element_type(weight),
        )
        return place.add("MatMul", x, dequantized, suffix="product")


class _Quantizer:
    """onnxruntime's quantizer for one weight.

    Raises:
        OptionError: it is not installed whole, or too old.
    """

    how = "by onnxruntime's quantizer"
    domain = "com.microsoft"

    def __init__(self, how: Quantization):
        self._how = how
        self._module, name, bits = _imported()
        if how.bits not in bits:
            raise OptionError(
                f"the quantizer of onnxruntime {onnxruntime.__version__} rounds to 4 bits; "
                f"{how.bits} bits need onnxruntime 1.22 or later"
            )
        self._class = getattr(self._module, name)

    def product(self, place: _Place, x: str, weight: np.ndarray) -> str:
        """See `_Rounder`."""
        rounded = self.round(weight)
        parts = zip((f"Q{self._how.bits}", "scales", "zero_points"), rounded, strict=False)
        return place.add(
            "MatMulNBits",
            x,
            *(place.constant(what, values) for what, values in parts),
            suffix="product",
            domain=self.domain,
            K=len(weight),
            N=len(rounded[0]),
            bits=self._how.bits,
            block_size=self._how.block_size,
        )

    def round(self, weight: np.ndarray) -> tuple[np.ndarray, ...]:
        """Codes ``[N, blocks, bytes]``, scales ``[N, blocks]`` and, unless symmetric, zero points ``[N, bytes]``."""
        count = max(1, min(weight.shape[1], -(-weight.nbytes // _PART)))
        parts = [self._round(np.ascontiguousarray(part)) for part in np.array_split(weight, count, axis=1)]
        return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))

    def _round(self, weight: np.ndarray) -> list[np.ndarray]:
        value = helper.make_tensor_value_info
        k, n = weight.shape
        element_type = _element_type(weight)
        graph = helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
            "weight",
            [value("x", element_type, ["M", k])],
            [value("y", element_type, ["M", n])],
            [numpy_helper.from_array(weight, "w")],
        )
        with _silenced(self._module.logger):
            config = self._module.DefaultWeightOnlyQuantConfig(
                block_size=self._how.block_size,
                is_symmetric=self._how.symmetric,
                **({} if self._how.bits == 4 else {"bits": self._how.bits}),
            )
            quantizer = self._class(helper.make_model(graph), algo_config=config)
            quantizer.process()
        made = quantizer.model.model.graph
        stored = {t.name: numpy_helper.to_array(t) for t in made.initializer}
        codes, *others = (stored[name] for name in made.node[0].input[1:])
        return [codes, *(values.reshape(n, -1) for values in others)]


def _imported() -> tuple[Untyped, str, tuple[int, ...]]:
    """The quantizer's module, its class and the widths it rounds to.

    Raises:
        OptionError: it is not there, or lacks a package.
    """
    for module, name, bits in _MODULES:
        path = f"onnxruntime.quantization.{module}"
        try:
            with _no_root_handler():
                return importlib.import_module(path), name, bits
        except ModuleNotFoundError as error:
            if error.name != path:
                raise OptionError(
                    f"the quantizer of onnxruntime {onnxruntime.__version__} needs the package {error.name!r}: "
                    f"pip install {str(error.name).replace('_', '-')}"
                ) from error
    raise OptionError(f"onnxruntime {onnxruntime.__version__} has no quantizer of weights; install 1.20 or later")


def widths() -> tuple[int, ...]:
    """Bits that the installed quantizer rounds to: 4, and 8 from onnxruntime 1.22 on.

    Raises:
        OptionError: see `_imported`.
    """
    return _imported()[2]


@contextmanager
def _no_root_handler() -> Iterator[None]:
    """The quantizer's modules set up logging for the whole process when imported, unless somebody has."""
    root, placeholder = logging.getLogger(), logging.NullHandler()
    root.addHandler(placeholder)
    try:
        yield
    finally:
        root.removeHandler(placeholder)


@contextmanager
def _silenced(logger: logging.Logger) -> Iterator[None]:
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _element_type(array: np.ndarray) -> int:
    return int(helper.np_dtype_to_tensor_dtype(array.dtype))
