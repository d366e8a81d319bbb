"""A session of a model's oracle: what it means, run without shortcuts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import onnxruntime

from .oracle import is_widened, oracle_model, widen_inputs
from .runtime import SAY_NOTHING, open_model
from .runtime_constants import with_float_constants
from .source import Source

Convert: TypeAlias = Callable[[Mapping[str, Any]], dict[str, Any]]
"""Makes one model's feed of another's."""


def open_oracle(source: Source) -> tuple[onnxruntime.InferenceSession, Convert]:
    """A session with graph optimizations off, accuracy levels at 0 and half precision widened, and what makes its feeds.

    What onnxruntime cannot dequantize (float4, float8e8m0) is dequantized for it.

    Raises:
        ModelError: constants cannot be read.
        RuntimeRefused: onnxruntime does not load it.
    """
    loadable = with_float_constants(source)
    session = open_model(
        oracle_model(loadable.proto, loadable.array),
        source.folder,
        name=source.name,
        portable=True,
        graph_optimization_level=onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
        log_severity_level=SAY_NOTHING,
    )
    return session, widen_inputs if is_widened(source.proto) else dict
