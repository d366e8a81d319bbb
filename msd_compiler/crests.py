"""How uneven a layer's activations are on samples: what its error depends on, before anything is rewritten."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

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

_AT_ONCE = 16
"""Activations that are held in memory together."""


def measure_crests(
    source: Source, sites: Iterable[Site], work_of: Callable[[QuantizedLinear], LinearWork], samples: Sequence[Feed]
) -> dict[str, Activation]:
    """What the samples say of the activations of each layer of the main graph, by the layer's name.

    Args:
        source: the model that the sites are of.

    Raises:
        RuntimeRefused: the model does not run on the samples.
        ModelError: an activation holds NaN or Inf.
    """
    found = {
        site.name: (str(site.found.x.name), work_of(site.found))
        for site in sites
        if isinstance(site.found, QuantizedLinear)
        and site.found.codes is None
        and site.scope.parent is None
        and not site.found.swapped[0]
    }
    if not found:
        return {}
    session, widen = open_oracle(with_outputs(source, {tensor for tensor, _ in found.values()}))
    groups: dict[str, set[int]] = defaultdict(set)
    for tensor, work in found.values():
        groups[tensor] |= {work.group, work.k}
    squares: dict[tuple[str, int], float] = defaultdict(float)
    energies: dict[str, float] = defaultdict(float)

    def count(name: str, value: np.ndarray, sample: Feed) -> None:
        x = np.asarray(value, np.float64)
        if not np.isfinite(x).all():
            raise ModelError(f"{source.name}: activation {name!r} is not finite on {sample.name}")
        energies[name] += float(np.sum(x**2))
        for group in groups[name]:
            squares[name, group] += _largest_squares(x, group)

    inputs = {str(value.name) for value in source.proto.graph.input}
    computed = sorted(groups.keys() - inputs)
    parts = [computed[i : i + _AT_ONCE] for i in range(0, len(computed), _AT_ONCE)]
    for sample in samples:
        feed = widen(dict(sample.arrays))
        for names in parts:
            for name, value in zip(names, run(session, names, feed), strict=True):
                count(name, value, sample)
        for name in groups.keys() & inputs:
            count(name, sample.arrays[name], sample)
    return {
        site: Activation({g: float(np.sqrt(squares[tensor, g] / energies[tensor])) for g in {work.group, work.k}})
        for site, (tensor, work) in found.items()
        if energies[tensor] > 0
    }


def _largest_squares(x: np.ndarray, group: int) -> float:
    """Sum over rows and groups of the largest magnitude squared, once per element of the group."""
    starts = np.arange(0, x.shape[-1], group)
    largest = np.maximum.reduceat(np.abs(x), starts, axis=-1)
    lengths = np.diff(np.append(starts, x.shape[-1]))
    return float(np.sum(largest**2 * lengths))


def with_outputs(source: Source, names: set[str]) -> Source:
    """The model with more of its tensors as outputs."""
    proto = onnx.ModelProto()
    proto.CopyFrom(source.proto)
    known = {value.name: value for value in proto.graph.value_info}
    for name in sorted(names - {value.name for value in (*proto.graph.input, *proto.graph.output)}):
        proto.graph.output.append(known.get(name, onnx.ValueInfoProto(name=name)))
    return Source(proto, source.folder)
