"""How a layer's error depends on its activations and weights, measured on samples before anything is rewritten.

A code is off by up to half a step, anywhere within it, and what that does to the output hangs on the weights it meets: a channel
300 times as large as the rest makes the step of its whole group 300 times as large; if its own weights are that much smaller, as
those behind a norm with massive activations are, the output is no larger for it, and the error is all there is to see.
So a group's largest magnitudes are weighed with the weights of the group, and the measure is the output itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from .cost.error import Activation
from .cost.work import LinearWork
from .errors import ModelError
from .facts import QuantizedLinear
from .inputs import Feed
from .oracle_session import open_oracle
from .reader import Site
from .runtime import run
from .source import Source
from .weights import float_values

ROWS = 64
"""Of an activation that are looked at, evenly spread over it."""

_AT_ONCE = 16
"""Activations that are held in memory together."""


@dataclass(frozen=True)
class _Layer:
    """A layer of the main graph whose activation is float."""

    site: Site
    found: QuantizedLinear
    groups: tuple[int, ...]
    """Steps of K that may share a scale."""


def measure_crests(
    source: Source, sites: Iterable[Site], work_of: Callable[[QuantizedLinear], LinearWork], samples: Sequence[Feed]
) -> dict[str, Activation]:
    """What the samples say of each layer of the main graph, by the layer's name.

    Args:
        source: the model that the sites are of.

    Raises:
        RuntimeRefused: the model does not run on the samples.
        ModelError: an activation holds NaN or Inf, or a weight cannot be read.
    """
    layers: dict[str, list[_Layer]] = defaultdict(list)
    for site in sites:
        found = site.found
        if isinstance(found, QuantizedLinear) and _is_seen(site, found):
            work = work_of(found)
            layers[str(found.x.name)].append(_Layer(site, found, tuple({work.group, work.k})))
    if not layers:
        return {}
    session, widen = open_oracle(with_outputs(source, set(layers)))
    inputs = {str(value.name) for value in source.proto.graph.input}
    computed = sorted(layers.keys() - inputs)
    measured: dict[str, Activation] = {}
    for first in range(0, len(computed), _AT_ONCE):
        part = computed[first : first + _AT_ONCE]
        rows: dict[str, list[np.ndarray]] = defaultdict(list)
        for sample in samples:
            for name, value in zip(part, run(session, part, widen(dict(sample.arrays))), strict=True):
                rows[name].append(_some_rows(source, name, value, sample))
        measured |= _of_all(layers, rows)
    given = {name: [_some_rows(source, name, s.arrays[name], s) for s in samples] for name in layers.keys() & inputs}
    return measured | _of_all(layers, given)


def _is_seen(site: Site, found: QuantizedLinear) -> bool:
    return found.codes is None and site.scope.parent is None and not found.swapped[0]


def _some_rows(source: Source, name: str, value: np.ndarray, sample: Feed) -> np.ndarray:
    """``[rows, K]`` float32."""
    rows = np.asarray(value, np.float32).reshape(-1, value.shape[-1])
    if not np.isfinite(rows).all():
        raise ModelError(f"{source.name}: activation {name!r} is not finite on {sample.name}")
    return rows[np.unique(np.linspace(0, max(0, len(rows) - 1), ROWS).astype(np.int64))] if len(rows) else rows


def _of_all(layers: dict[str, list[_Layer]], rows: dict[str, list[np.ndarray]]) -> dict[str, Activation]:
    measured = {}
    for name in sorted(rows):
        x = np.concatenate(rows[name])
        for layer in layers[name]:
            crests = _crests(x, layer)
            if crests:
                measured[layer.site.name] = Activation(crests)
    return measured


def _crests(x: np.ndarray, layer: _Layer) -> dict[int, float]:
    """By group length; empty if every row is zero."""
    if len(layer.found.weights) == 1:
        values, _ = float_values(layer.found.weight)
        with np.errstate(over="ignore"):  # what is beyond float32 is so in the model, too
            y = x @ values
        weighed, energy = np.sum(values.astype(np.float64) ** 2, axis=1), np.sum(y.astype(np.float64) ** 2, axis=1)
    else:  # experts: which of them a row meets is not known, so all of K counts alike
        weighed, energy = np.ones(x.shape[1]), np.sum(x.astype(np.float64) ** 2, axis=1)
    alive = (energy > 0) & np.isfinite(energy)
    if not alive.any():
        return {}
    return {group: _crest(x[alive], weighed, energy[alive], group) for group in layer.groups}


def _crest(x: np.ndarray, weighed: np.ndarray, energy: np.ndarray, group: int) -> float:
    """Root mean square over rows: a token with massive activations counts as one."""
    starts = np.arange(0, x.shape[1], group)
    largest = np.maximum.reduceat(np.abs(x), starts, axis=1).astype(np.float64)
    return float(np.sqrt(np.mean(largest**2 @ np.add.reduceat(weighed, starts) / energy)))


def with_outputs(source: Source, names: set[str]) -> Source:
    """The model with more of its tensors as outputs."""
    proto = onnx.ModelProto()
    proto.CopyFrom(source.proto)
    known = {value.name: value for value in proto.graph.value_info}
    for name in sorted(names - {value.name for value in (*proto.graph.input, *proto.graph.output)}):
        proto.graph.output.append(known.get(name, onnx.ValueInfoProto(name=name)))
    return Source(proto, source.folder)
