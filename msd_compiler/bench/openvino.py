"""OpenVINO, if it is installed, as another way to run a model."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from ..runtime import RuntimeRefused


def is_installed() -> bool:
    """Whether there is an OpenVINO to compare with."""
    return importlib.util.find_spec("openvino") is not None


class OpenVino:
    """A model in OpenVINO on the CPU, in float32 and one stream."""

    def __init__(self, model: onnx.ModelProto, threads: int, **properties: Any) -> None:
        """Read and compile.

        Args:
            model: without external data.
            threads: that compute.
            properties: more of OpenVINO's, by name.

        Raises:
            RuntimeRefused: OpenVINO cannot be loaded, or does not take the model.
        """
        settings = {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads, **properties}
        try:
            import openvino

            core = openvino.Core()
            self._compiled = core.compile_model(core.read_model(model.SerializeToString(), b""), "CPU", settings)
            self._tensor = openvino.Tensor
        except Exception as error:  # of what type they are changes from version to version
            raise RuntimeRefused(f"OpenVINO does not take it: {_one_line(error)}") from error

    def bind(self, arrays: Mapping[str, np.ndarray]) -> Request:
        """Inputs, bound once, so that only the run itself is timed."""
        return Request(self._compiled.create_infer_request(), {n: self._tensor(a, True) for n, a in arrays.items()})


class Request:
    """Inputs bound to a model."""

    def __init__(self, request: Any, tensors: Mapping[str, Any]) -> None:
        self._request = request
        self._held = tensors  # the runtime reads the arrays where they are
        for name, tensor in tensors.items():
            request.set_tensor(name, tensor)

    def __call__(self) -> None:
        """One run.

        Raises:
            RuntimeRefused: it fails.
        """
        try:
            self._request.infer()
        except Exception as error:
            raise RuntimeRefused(f"OpenVINO cannot run it: {_one_line(error)}") from error

    def output(self, name: str) -> np.ndarray:
        """An output of the last run."""
        return np.array(self._request.get_tensor(name).data)


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
