"""ONNX's own node tests of attention with a past, their caches made int8: the expected output within that rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import msd_compiler
from msd_compiler import KvCache
from msd_compiler.compare import relative_l2
from msd_compiler.facts import ReasonCode
from msd_compiler.runtime import RuntimeRefused, session

NODES = Path(__file__).parents[2] / "shared" / "models" / "nodes"
ROUNDED = 3e-3
"""Of 8 bits per token and head, on random numbers."""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not NODES.is_dir(), reason=f"{NODES} is not here")]


def arrays(folder: Path, kind: str) -> list[np.ndarray]:
    files = [folder / "test_data_set_0" / f"{kind}_{i}.pb" for i in range(len(list(folder.glob(f"*/{kind}_*.pb"))))]
    return [numpy_helper.to_array(onnx.TensorProto.FromString(file.read_bytes())) for file in files]


@pytest.mark.parametrize("folder", sorted(NODES.glob("*with_past_and_present*")), ids=lambda folder: folder.name)
def test_int8_cache(folder):
    source = onnx.load(folder / "model.onnx")
    done = msd_compiler.compile(source, kv_cache=KvCache(8), verify=False)
    if not any(row.reason_code is ReasonCode.CACHE_ROUNDED for row in done.report.sites):
        pytest.skip(f"{[row.reason for row in done.report.sites]}")
    feed = dict(zip([i.name for i in source.graph.input], arrays(folder, "input"), strict=True))
    for name in [i.name.removesuffix("_scale") for i in done.model.graph.input if i.name.endswith("_scale")]:
        values = feed[name].astype(np.float32)
        scale = np.abs(values).max(axis=-1, keepdims=True) / np.float32(127)
        feed |= {name: np.rint(values / scale).astype(np.int8), f"{name}_scale": scale}
    for portable in (False, True):
        try:
            opened = session(done.model.SerializeToString(), portable=portable, log_severity_level=4)
        except RuntimeRefused as error:
            pytest.skip(str(error)[:200])
        y = opened.run([source.graph.output[0].name], feed)[0]
        assert relative_l2(y, arrays(folder, "output")[0]) <= ROUNDED
