"""A model as it lies on disk: parsed, its weights left where they are until somebody reads one."""

from __future__ import annotations

import mmap
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError, Message
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import ExternalDataInfo

from .errors import ModelError

_BITS = {
    TensorProto.INT4: 4,
    TensorProto.UINT4: 4,
    TensorProto.INT2: 2,
    TensorProto.UINT2: 2,
    TensorProto.FLOAT4E2M1: 4,
}
"""Element types narrower than a byte."""

_TYPES = frozenset(helper.get_all_tensor_dtypes())

_AT_ONCE = 2**18
"""Bytes unpacked at a time: they stay in the cache."""

_RELEASE_AFTER = 2**24
"""Mapped bytes that are let go of together."""


def type_name(data_type: int) -> str:
    """``TensorProto.INT4`` -> ``int4``; a number that no type has is named as such."""
    if data_type in (TensorProto.FLOAT, TensorProto.DOUBLE):
        return "float32" if data_type == TensorProto.FLOAT else "float64"
    try:
        return str(TensorProto.DataType.Name(data_type)).lower()
    except ValueError:
        return f"type {data_type}"


def nbytes(tensor: TensorProto) -> int:
    """Bytes of the tensor's packed data."""
    bits = _BITS.get(tensor.data_type)
    if bits is None:
        bits = 8 * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return int(-(-prod(tensor.dims) * bits // 8))


def unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """Codes of ``bits`` bits, low bits first, along the last axis."""
    if bits == 8:
        return packed
    per_byte = 8 // bits
    codes = np.empty((*packed.shape[:-1], packed.shape[-1] * per_byte), np.uint8)
    stored, words = packed.reshape(-1), codes.reshape(-1).view(f"<u{per_byte}")
    mask = words.dtype.type(int.from_bytes(bytes([2**bits - 1]) * per_byte, "little"))
    for start in range(0, len(stored), _AT_ONCE):
        word = stored[start : start + _AT_ONCE].astype(words.dtype)
        shift = 8 - bits
        while shift < 4 * per_byte:  # a byte beside itself, each time one code further in its own
            word |= word << words.dtype.type(shift)
            shift *= 2
        np.bitwise_and(word, mask, out=words[start : start + _AT_ONCE])
        if start % _RELEASE_AFTER == 0:
            release(packed)
    return codes


def release(values: np.ndarray | memoryview) -> None:
    """Let go of the pages of a mapped file that were read; they are read again when they are needed.

    Else a file's pages count as the process's memory as long as the array lives. Nothing happens to other arrays.
    """
    owner: Any = values
    while owner is not None and not isinstance(owner, mmap.mmap):
        owner = owner.obj if isinstance(owner, memoryview) else getattr(owner, "base", None)
    if owner is not None and hasattr(mmap, "MADV_DONTNEED"):
        owner.madvise(mmap.MADV_DONTNEED)


def is_external(tensor: TensorProto) -> bool:
    """Whether the tensor's data lies in a file beside the model."""
    return bool(tensor.data_location == TensorProto.EXTERNAL)


@dataclass(frozen=True)
class Source:
    """A parsed model and the folder that its external data lies in.

    ``proto`` is never edited: what changes a model copies it first.
    """

    proto: onnx.ModelProto
    folder: Path
    path: Path | None = None

    @property
    def name(self) -> str:
        """What messages call the model."""
        return str(self.path) if self.path else "the given model"

    @property
    def opset(self) -> int:
        """Version of the default domain that the model imports; 0 if it imports none."""
        return next((o.version for o in self.proto.opset_import if o.domain in ("", "ai.onnx")), 0)

    def files(self) -> list[Path]:
        """The files that the model consists of."""
        locations = {self._place(t).location for t in stored_tensors(self.proto) if is_external(t)}
        return ([self.path] if self.path else []) + [self.folder / name for name in sorted(locations)]

    def bytes_of(self, tensor: TensorProto) -> memoryview:
        """The raw little-endian data of an external tensor, mapped and not copied.

        Raises:
            ModelError: the data is not inside the model's folder, missing or too short.
        """
        info = self._place(tensor)
        file = self._inside(info.location, tensor.name)
        needed = nbytes(tensor)
        offset = int(info.offset or 0)
        length = int(info.length) if info.length is not None else needed
        if length != needed or offset + length > file.stat().st_size:
            raise ModelError(
                f"{self.name}: external data of {tensor.name!r} needs {needed} bytes at offset {offset} of "
                f"{info.location!r}; the model says {length} and the file has {file.stat().st_size}"
            )
        if needed == 0:
            return memoryview(b"")
        return np.memmap(file, np.uint8, "r", offset, (needed,)).data

    def array(self, tensor: TensorProto) -> np.ndarray:
        """The tensor's values; types narrower than a byte come unpacked, one element each.

        Raises:
            ModelError: the data cannot be read (see `bytes_of`) or does not fill the tensor's shape.
        """
        try:
            if not is_external(tensor):
                if tensor.HasField("raw_data") and len(tensor.raw_data) != nbytes(tensor):
                    raise ValueError(f"{len(tensor.raw_data)} bytes are stored, {nbytes(tensor)} are needed")
                return np.asarray(numpy_helper.to_array(tensor))
            data = self.bytes_of(tensor)
            dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
            if tensor.data_type in _BITS:
                elements = unpacked(np.frombuffer(data, np.uint8), _BITS[tensor.data_type])[: prod(tensor.dims)]
                return np.asarray(elements.view(dtype)).reshape(tensor.dims)
            return np.frombuffer(data, dtype).reshape(tensor.dims)
        except (ValueError, TypeError, KeyError) as error:
            raise ModelError(
                f"{self.name}: tensor {tensor.name!r} ({type_name(tensor.data_type)}{list(tensor.dims)}) "
                f"cannot be read: {error}"
            ) from error

    def _place(self, tensor: TensorProto) -> ExternalDataInfo:
        try:
            with warnings.catch_warnings(action="ignore"):  # of keys that ONNX does not know
                info = ExternalDataInfo(tensor)
            if int(info.offset or 0) < 0 or int(info.length or 0) < 0:
                raise ValueError("a negative number")
        except (ValueError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{self.name}: external data of {tensor.name!r} has no usable location, offset and length: {error}"
            ) from error
        return info

    def _inside(self, location: str, tensor_name: str) -> Path:
        """The file ``location`` of an external tensor, if it truly lies in the model's folder."""
        where = f"{self.name}: external data of {tensor_name!r} is in {location!r}"
        relative = Path(location)
        if not location or relative.is_absolute() or ".." in relative.parts or "\0" in location:
            raise ModelError(f"{where}; it must be a relative path without '..'")
        file = self.folder
        try:
            for part in relative.parts:
                file = file / part
                if file.is_symlink():
                    raise ModelError(
                        f"{where}, which is or passes a symbolic link; it must be a file in the model's folder"
                    )
            if not file.is_file():
                raise ModelError(f"{where}, which does not exist in {str(self.folder)!r}")
        except OSError as error:
            raise ModelError(f"{where}, which cannot be looked for: {error.strerror}") from error
        return file


def load(model: str | os.PathLike[str] | onnx.ModelProto) -> Source:
    """Read a model, its external data excepted, and see that the data it names is there.

    Args:
        model: a file, a folder with one ``.onnx`` file (or a ``model.onnx``) in it, or a parsed model, whose
            external data, if any, is looked for in the working directory.

    Raises:
        ModelError: there is no such file, it is no ONNX model, or its external data is missing, too short or outside
            the model's folder.
    """
    if isinstance(model, onnx.ModelProto):
        source = Source(model, Path.cwd())
    else:
        path = model_file(Path(model))
        source = Source(_parse(path), path.resolve().parent, path)
    _check(source)
    return source


def model_file(path: Path) -> Path:
    """The model that a path means: itself, or the one in a folder.

    Raises:
        ModelError: there is none, or a folder has several and none is called ``model.onnx``.
    """
    if path.is_dir():
        candidates = sorted(path.glob("*.onnx"))
        if path / "model.onnx" in candidates:
            return path / "model.onnx"
        if len(candidates) != 1:
            raise ModelError(f"folder {str(path)!r} has {len(candidates) or 'no'} .onnx files; name the one you mean")
        return candidates[0]
    if not path.exists():
        raise ModelError(f"model {str(path)!r} does not exist")
    if not path.is_file():
        raise ModelError(f"model {str(path)!r} is not a file")
    return path


def _parse(path: Path) -> onnx.ModelProto:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"model {str(path)!r} cannot be read: {error.strerror}") from error
    if not data:
        raise ModelError(f"model {str(path)!r} is empty")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        raise ModelError(f"model {str(path)!r} is not ONNX, or cut short ({len(data)} bytes)") from error
    return proto


def _check(source: Source) -> None:
    proto = source.proto
    if not proto.HasField("graph") or not proto.opset_import:
        raise ModelError(f"{source.name} is not an ONNX model: it has no graph or imports no operators")
    if not proto.graph.output:
        raise ModelError(f"{source.name} has no outputs")
    for text in _texts(proto):
        if not _is_utf8(text):
            raise ModelError(f"{source.name}: {text!r} is not UTF-8 text")
    for opset in proto.opset_import:
        if opset.version < 1:
            raise ModelError(f"{source.name} imports opset {opset.version} of domain {opset.domain or 'ai.onnx'!r}")
    for tensor in stored_tensors(proto):
        if tensor.data_type not in _TYPES:
            raise ModelError(
                f"{source.name}: tensor {tensor.name!r} is of {type_name(tensor.data_type)}, expected one of ONNX's types"
            )
        if min(tensor.dims, default=0) < 0:
            raise ModelError(
                f"{source.name}: tensor {tensor.name!r} has shape {list(tensor.dims)}; a size is at least 0"
            )
        if is_external(tensor):
            source.bytes_of(tensor)


def _texts(message: Message) -> Iterator[str | bytes]:
    """Every text of a message, the data of tensors left out."""
    if isinstance(message, TensorProto):
        yield message.name
        yield from (text for entry in message.external_data for text in (entry.key, entry.value))
        return
    for field, value in message.ListFields():
        if field.type == field.TYPE_STRING:
            yield from [value] if isinstance(value, (str, bytes)) else value
        elif field.type == field.TYPE_MESSAGE:
            for part in [value] if isinstance(value, Message) else value:
                yield from _texts(part)


def _is_utf8(text: str | bytes) -> bool:
    """Protobuf hands out text that is not UTF-8 as bytes, or with lone surrogates."""
    try:
        return isinstance(text, str) and text.encode() is not None
    except UnicodeEncodeError:
        return False


def scoped_graphs(proto: onnx.ModelProto) -> list[tuple[onnx.GraphProto, int | None]]:
    """The main graph and the bodies of its Ifs, Loops and Scans, each with the position of the graph around it.

    A graph stands before those nested in it, in node order.
    """
    found: list[tuple[onnx.GraphProto, int | None]] = []

    def visit(graph: onnx.GraphProto, parent: int | None) -> None:
        index = len(found)
        found.append((graph, parent))
        for body in _bodies(graph.node):
            visit(body, index)

    visit(proto.graph, None)
    return found


def graphs(proto: onnx.ModelProto) -> list[onnx.GraphProto]:
    """The graphs of `scoped_graphs`."""
    return [graph for graph, _ in scoped_graphs(proto)]


def _bodies(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.GraphProto]:
    """Graphs directly inside nodes."""
    return (attribute.g for node in nodes for attribute in node.attribute if attribute.HasField("g"))


def copy_fields(source: Message, target: Message, *, but: str) -> None:
    """Copy all fields of a message except one."""
    for field, value in source.ListFields():
        if field.name == but:
            continue
        if isinstance(value, Message):
            getattr(target, field.name).CopyFrom(value)
        elif hasattr(value, "extend"):
            getattr(target, field.name).extend(value)
        else:
            setattr(target, field.name, value)


def stored_tensors(proto: onnx.ModelProto) -> Iterator[TensorProto]:
    """Every tensor whose values the file holds: initializers and tensor attributes, nested graphs and functions too."""
    every_graph = graphs(proto)
    for function in proto.functions:
        inside = list(_bodies(function.node))
        while inside:
            every_graph.append(inside.pop())
            inside += _bodies(every_graph[-1].node)
    for graph in every_graph:
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield sparse.values
            yield sparse.indices
    for body in (*every_graph, *proto.functions):
        for node in body.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors
