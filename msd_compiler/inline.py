"""Model-local functions of a source, inlined where they hold linear layers, so that readers see one graph."""

from __future__ import annotations

from dataclasses import replace

import onnx
from onnx import inliner

from .errors import ModelError
from .source import Source

_LAYERS = frozenset({"MatMul", "Gemm", "MatMulNBits", "MatMulInteger", "QLinearMatMul", "FusedMatMul"})
"""Ops of linear layers: a function without them, or without calls of one that has them, stays a function."""

_OURS = "msd"


def inlined(source: Source) -> Source:
    """The source without those functions that hold linear layers; the source itself if it has none.

    torch's exporter writes a module as a function and passes its weights as inputs, so a weight is a constant only where
    the function is called. onnx's inliner does the work.

    Raises:
        ModelError: the functions cannot be inlined.
    """
    wanted = _functions_with_layers(source.proto)
    if not wanted:
        return source
    try:
        proto = inliner.inline_selected_functions(source.proto, sorted(wanted))
    except Exception as error:  # the inliner is C++ and raises what the binding makes of it
        raise ModelError(f"{source.name}: its functions cannot be inlined: {error}") from error
    return replace(source, proto=proto)


def _functions_with_layers(proto: onnx.ModelProto) -> set[tuple[str, str]]:
    """Domain and name of the functions that hold a layer themselves or call one that does."""
    functions = {(f.domain, f.name): f for f in proto.functions if f.domain != _OURS}
    calls = {key: _ops(f.node) for key, f in functions.items()}
    found = {key for key, ops in calls.items() if any(op in _LAYERS for _, op in ops)}
    while True:
        callers = {key for key, ops in calls.items() if ops & found} - found
        if not callers:
            return found
        found |= callers


def _ops(nodes: list[onnx.NodeProto]) -> set[tuple[str, str]]:
    """Domain and type of all nodes, nested ones too."""
    ops: set[tuple[str, str]] = set()
    for node in nodes:
        ops.add((node.domain, node.op_type))
        for attribute in node.attribute:
            if attribute.HasField("g"):
                ops |= _ops(attribute.g.node)
    return ops
