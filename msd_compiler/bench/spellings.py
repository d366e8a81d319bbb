"""Low-bit weights as files hold them: codes in the layouts of two spellings, scales, and data beside the model."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from onnx import TensorProto

_ALIGNMENT = 64


def random_scales(source: np.random.RandomState, k: int, steps: int, *shape: int) -> np.ndarray:
    """Scales that give weights of variance 1/K to codes spread evenly over ``steps`` values, float32.

    Half of them are negative: codes from -8 to 7 have mean -1/2, which else would grow from layer to layer.
    """
    size = (0.5 + source.random_sample(shape)) / (13 / 12) ** 0.5
    sign = source.randint(0, 2, shape) * 2 - 1
    values: np.ndarray = sign * size * (12 / ((steps**2 - 1) * k)) ** 0.5
    return values.astype(np.float32)


def onnx_codes(codes: np.ndarray, bits: int) -> tuple[int, np.ndarray]:
    """Codes ``[K, N]`` int8 as an ONNX tensor's type and bytes: INT8, or INT4, two codes a byte, the first one low."""
    if bits == 8:
        return TensorProto.INT8, codes
    nibbles = codes.reshape(-1, 2).view(np.uint8) & 15
    return TensorProto.INT4, nibbles[:, 0] | nibbles[:, 1] << 4


def nbits_codes(codes: np.ndarray, bits: int, block: int) -> np.ndarray:
    """Codes ``[K, N]`` int8 as MatMulNBits holds them: ``[N, K / block, block x bits / 8]`` uint8, half the range is 0."""
    k, n = codes.shape
    raised = codes.T.view(np.uint8) + np.uint8(2 ** (bits - 1))  # wraps around to the unsigned code
    blocks = np.ascontiguousarray(raised).reshape(n, k // block, block)
    if bits == 4:
        blocks = blocks[..., ::2] | blocks[..., 1::2] << 4
    return blocks


class DataFile:
    """A file of tensors beside a model, written one after the other."""

    def __init__(self, path: Path) -> None:
        """Begin the file; what was there goes."""
        self._name = path.name
        self._file = path.open("wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def add(self, name: str, data_type: int, shape: tuple[int, ...], content: bytes | np.ndarray) -> TensorProto:
        """Append a tensor; returns what the model says of it."""
        self._file.write(bytes(-self._file.tell() % _ALIGNMENT))
        offset = self._file.tell()
        self._file.write(content if isinstance(content, bytes) else np.ascontiguousarray(content).data)
        tensor = TensorProto(name=name, data_type=data_type, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", self._name), ("offset", offset), ("length", self._file.tell() - offset)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor

    def add_floats(self, name: str, values: np.ndarray) -> TensorProto:
        """Append float32 values."""
        return self.add(name, TensorProto.FLOAT, values.shape, values)
