"""One model in a process of its own: how long until it is open, until the first result, and the most memory it took.

Run as a file, so that the process holds nothing but Python, NumPy and onnxruntime: reads a `Request` as JSON from
standard input and writes what it found as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any, TypedDict

import numpy as np
import onnxruntime


class Request(TypedDict):
    """What to open and run."""

    model: str
    library: str | None
    """Of custom ops; None: the model needs none."""
    arrays: str
    """File of NumPy arrays."""
    names: list[str]
    """Inputs, in the order of the arrays ``arr_0``, ``arr_1``, ..."""
    bfloat16: list[str]
    """Inputs whose arrays are the bits of bfloat16 as uint16."""
    threads: int | None
    """None: the runtime's default."""


def measure(request: Request) -> dict[str, Any]:
    """Milliseconds to open, milliseconds of the first run, bytes at most and before the model."""
    with np.load(request["arrays"]) as file:
        arrays = {name: file[f"arr_{i}"] for i, name in enumerate(request["names"])}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if request["threads"] is not None:
        options.intra_op_num_threads = request["threads"]
    before = peak_bytes()
    began = time.perf_counter()
    if request["library"] is not None:
        options.register_custom_ops_library(request["library"])
    session = onnxruntime.InferenceSession(request["model"], options, providers=["CPUExecutionProvider"])
    opened = time.perf_counter()
    binding = session.io_binding()
    held = []
    for name, array in arrays.items():
        held.append(_value(array, is_bfloat16=name in request["bfloat16"]))
        binding.bind_ortvalue_input(name, held[-1])
    for output in session.get_outputs():
        binding.bind_output(output.name, "cpu")
    session.run_with_iobinding(binding)
    done = time.perf_counter()
    times = {"open_ms": 1e3 * (opened - began), "first_run_ms": 1e3 * (done - opened)}
    return {**times, "peak_bytes": peak_bytes(), "before_bytes": before}


def _value(array: np.ndarray, *, is_bfloat16: bool) -> onnxruntime.OrtValue:
    if is_bfloat16:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, 16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def peak_bytes() -> int | None:
    """The most memory that this process has held; None where the system does not say."""
    if sys.platform == "linux":  # getrusage would count what the parent held when it made this process
        with open("/proc/self/status") as status:
            return next((1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM")), None)
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    print(json.dumps(measure(json.load(sys.stdin))))
