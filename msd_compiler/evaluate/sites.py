"""Each linear layer's own error on the activations that a text gives it.

Two errors meet in a low-bit layer: its weights were rounded when the model was made, and its activations are rounded when it runs. A
kernel that loses more to the second than the first has taken away what the weight's bits bought; that ratio tells which layers
change tokens (onnxruntime issue 29849). The float weights are not in the file, so the first error is taken to be a rounding's
own noise: every weight off by anything within half a step, ``scale / sqrt(12)``, independently. A row of K whose codes are all
zero counts as exactly that: its weights were far below a step, or none, and so is what their rounding did.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..crests import with_outputs
from ..errors import ModelError
from ..facts import QuantizedLinear
from ..inline import inlined
from ..linked import Linked
from ..oracle_session import open_oracle
from ..passes import READERS, REFINERS
from ..reader import Site, find_sites
from ..runtime import run
from ..runtime_ops.matmul.reference import LIMITS
from ..source import Source
from ..verification import Progress, silent
from ..weights import float_values
from .report import SiteNoise
from .run import Run
from .windows import Batch

ROWS = 512
"""Tokens that a layer is looked at on."""

GROUP = 128
"""Steps of K that share an activation's scale where the weight has no blocks."""

_AT_ONCE = 8
"""Activations that are held in memory together."""


def site_noise(
    source: Source, oracle: Run, windows: list[Batch], *, progress: Progress = silent
) -> tuple[list[SiteNoise], int]:
    """Every linear layer of the main graph whose activation is float, largest ratio first; and how many others there are.

    Args:
        oracle: a run of the source's oracle.
        windows: what to feed; their first `ROWS` tokens, or all if there are fewer, are looked at.

    Raises:
        ModelError: an activation is not finite.
        RuntimeRefused: onnxruntime does not run the model with its activations as outputs.
    """
    flat = inlined(source)
    linear = [s for s in find_sites(Linked.of(flat), READERS, REFINERS) if isinstance(s.found, QuantizedLinear)]
    sites = [s for s in linear if _is_seen(s)]
    rows = []
    for done, (site, x) in enumerate(_activations(flat, oracle, sites, windows)):
        progress("looking at layers", done, len(sites))
        rows.append(_noise(site, x))
    progress("looking at layers", len(sites), len(sites))
    rows.sort(key=lambda row: -row.int8_ratio)
    return rows, len(linear) - len(sites)


def _is_seen(site: Site) -> bool:
    found = site.found
    assert isinstance(found, QuantizedLinear)
    return found.codes is None and site.scope.parent is None and not found.swapped[0] and len(found.weights) == 1


def _activations(
    source: Source, oracle: Run, sites: list[Site], windows: list[Batch]
) -> Iterator[tuple[Site, np.ndarray]]:
    """Sites and their activations ``[rows, K]`` float32, in the order of the names of these."""
    names = {site.name: str(site.found.x.name) for site in sites if isinstance(site.found, QuantizedLinear)}
    tensors = sorted(set(names.values()))
    if not tensors:
        return
    session, _ = open_oracle(with_outputs(source, set(tensors)))
    feeds = [oracle.decoder.first_feed(batch.tokens) for batch in windows]
    for first in range(0, len(tensors), _AT_ONCE):
        part = tensors[first : first + _AT_ONCE]
        found: dict[str, list[np.ndarray]] = {tensor: [] for tensor in part}
        for feed in feeds:
            for tensor, value in zip(part, run(session, part, feed), strict=True):
                found[tensor].append(np.asarray(value, np.float32).reshape(-1, value.shape[-1]))
        for site in sites:
            if names[site.name] in found:
                x = np.concatenate(found[names[site.name]])[:ROWS]
                if not np.isfinite(x).all():
                    raise ModelError(f"{source.name}: the activation of {site.name!r} is not finite on this text")
                yield site, x


def _noise(site: Site, x: np.ndarray) -> SiteNoise:
    fact = site.found
    assert isinstance(fact, QuantizedLinear)
    weight, block = fact.weight, fact.weight.block_size or min(GROUP, fact.weight.k)
    values, steps = float_values(weight)
    steps = steps * np.any(values, axis=1, keepdims=True)  # rows of zeros count as exact
    exact = np.sum((x @ values).astype(np.float64) ** 2, axis=1)
    alive = exact > 0
    x, exact = x[alive], exact[alive]
    wrong = np.sum((x.astype(np.float64) ** 2) @ (steps.astype(np.float64) ** 2), axis=1) / 12
    weight_error = _relative(wrong, exact)
    errors = {}
    for terms in (1, 2):
        off = (_rounded(x, block, LIMITS[terms]) - x).astype(np.float32)
        errors[terms] = _relative(np.sum((off @ values).astype(np.float64) ** 2, axis=1), exact)
    return SiteNoise(
        node=site.name,
        format=weight.format,
        k=weight.k,
        n=weight.n,
        crest=_crest(x, block),
        weight_error=weight_error,
        int8_error=errors[1],
        msd_error=errors[2],
        int8_ratio=errors[1] / weight_error if weight_error else 0.0,
        msd_ratio=errors[2] / weight_error if weight_error else 0.0,
    )


def _blocks(x: np.ndarray, block: int) -> Iterator[slice]:
    for first in range(0, x.shape[1], block):
        yield slice(first, min(first + block, x.shape[1]))


def _rounded(x: np.ndarray, block: int, limit: int) -> np.ndarray:
    """The activation with each block rounded to codes within ``limit``, one scale a block."""
    rounded = np.zeros(x.shape)
    for part in _blocks(x, block):
        step = np.abs(x[:, part]).max(axis=1, keepdims=True).astype(np.float64) / limit
        rounded[:, part] = (
            np.rint(np.divide(x[:, part], step, out=np.zeros_like(rounded[:, part]), where=step > 0)) * step
        )
    return rounded


def _crest(x: np.ndarray, block: int) -> float:
    if not x.size:
        return 0.0
    rms = np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=1))
    squares = [(np.abs(x[:, part]).max(axis=1) / rms) ** 2 * (part.stop - part.start) for part in _blocks(x, block)]
    return float(np.sqrt(np.mean(np.sum(squares, axis=0)) / x.shape[1]))


def _relative(squares: np.ndarray, exact: np.ndarray) -> float:
    """Relative L2, root mean square over rows: every token counts alike, that with massive activations, too."""
    return float(np.sqrt(np.mean(squares / exact))) if len(exact) else 0.0
