"""Writing a model so that it appears whole or not at all.

Weights above a few MB go to a data file beside the model, whose name carries a digest of its content: two files cannot
be renamed at once, but a new data file never replaces an old one. It is in place before the model that names it, and
those that no model names any more go last.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper

from .aside import Aside
from .errors import OutputError
from .source import Source, is_external, nbytes, release, stored_tensors

EMBED_UP_TO = 16 * 2**20
"""Bytes of weights that stay inside the model file."""

_SMALL = 1024
"""Tensors below this many bytes stay in the model: shape inference wants to read them."""

_ALIGNMENT = 64
_PENDING = "data file of this model"
_CHUNK = 2**24


class WeightStore:
    """Takes arrays as they are made, so that no more than one need be in memory."""

    def __init__(self, data: Path | None):
        self._path = data
        self._file = data.open("wb") if data else None
        self._digest = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1)
        self._size = 0

    def add(self, name: str, value: np.ndarray) -> TensorProto:
        """The initializer that stands for ``value``."""
        tensor = TensorProto(name=name, dims=value.shape, data_type=helper.np_dtype_to_tensor_dtype(value.dtype))
        self._put(tensor, np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
        return tensor

    def adopt(self, proto: onnx.ModelProto, source: Source) -> None:
        """Bring in the tensors that the model took over from its source: all its external ones, and large others."""
        for tensor in stored_tensors(proto):
            if is_external(tensor):
                if _location(tensor) != _PENDING:
                    self._put(tensor, source.bytes_of(tensor))
            elif self._file and tensor.name and len(tensor.raw_data) >= _SMALL:
                self._put(tensor, memoryview(tensor.raw_data))

    def close(self, proto: onnx.ModelProto, folder: Path, stem: str) -> Path | None:
        """Put the data file in its place and let the model's tensors name it; None if there is none."""
        if self._file is None or self._path is None:
            return None
        self._hasher.shutdown()
        sync(self._file)
        self._file.close()
        if self._size == 0:
            self._path.unlink()
            return None
        final = folder / f"{stem}.{self._digest.hexdigest()[:12]}.data"
        for tensor in stored_tensors(proto):
            if is_external(tensor) and _location(tensor) == _PENDING:
                where = {entry.key: entry.value for entry in tensor.external_data}
                _locate(tensor, final.name, int(where["offset"]), int(where["length"]))
        self._path.replace(final)
        return final

    def abandon(self) -> None:
        """Remove what was written."""
        self._hasher.shutdown()
        if self._file and self._path:
            with suppress(OSError):  # what it still held finds no room either
                self._file.close()
            self._path.unlink(missing_ok=True)

    def _put(self, tensor: TensorProto, data: memoryview) -> None:
        if self._file is None or len(data) < _SMALL:
            content = bytes(data)
            del tensor.external_data[:]
            tensor.ClearField("data_location")
            tensor.raw_data = content
            return
        try:
            self._write(bytes(-self._size % _ALIGNMENT))
            offset = self._size
            for start in range(0, len(data), _CHUNK):
                self._write(data[start : start + _CHUNK])
                release(data)
        except OSError as error:
            raise OutputError(f"weights cannot be written to {str(self._path)!r}: {error.strerror}") from error
        tensor.ClearField("raw_data")
        _locate(tensor, _PENDING, offset, len(data))

    def _write(self, data: bytes | memoryview) -> None:
        assert self._file is not None
        hashed = self._hasher.submit(self._digest.update, data)  # takes as long as writing, which it need not wait for
        try:
            self._file.write(data)
        finally:
            hashed.result()
        self._size += len(data)


class Output:
    """The place of a result. Leaving the block without `commit` leaves nothing behind.

    Raises:
        OutputError: the folder is missing or not writable, or the path is a folder.
    """

    def __init__(self, path: Path, source: Source, *, external: bool):
        self.path = path
        self._source = source
        folder = path.parent
        if not folder.is_dir():
            raise OutputError(f"output folder {str(folder)!r} does not exist")
        if path.is_dir():
            raise OutputError(f"output {str(path)!r} is a folder; name a file")
        self._stem = path.name.removesuffix(".onnx")
        try:
            self._aside = Aside(folder, self._stem)
        except OSError as error:
            raise OutputError(f"output folder {str(folder)!r} cannot be written to: {error.strerror}") from error
        self._folder = self._aside.path
        try:
            self.store = WeightStore(self._folder / "weights" if external else None)
        except OSError as error:
            self._aside.remove()
            raise OutputError(f"output {str(path)!r} cannot be written: {error.strerror}") from error
        self._data: Path | None = None
        self._model = self._folder / path.name

    def write(self, proto: onnx.ModelProto) -> Path:
        """Write the model aside, complete and loadable; returns where it is until `commit`."""
        try:
            self.store.adopt(proto, self._source)
            self._data = self.store.close(proto, self._folder, self._stem)
            with self._model.open("wb") as file:
                file.write(proto.SerializeToString(deterministic=True))
                sync(file)
        except OSError as error:
            raise OutputError(f"output {str(self.path)!r} cannot be written: {error.strerror}") from error
        except ValueError as error:
            raise OutputError(f"output {str(self.path)!r} cannot be written: {error}") from error
        return self._model

    def write_copy(self, model: Path) -> Path:
        """As `write`, for a model that is taken over as it is, all in one file."""
        try:
            shutil.copyfile(model, self._model)
            with self._model.open("rb+") as file:
                sync(file)
        except OSError as error:
            raise OutputError(f"output {str(self.path)!r} cannot be written: {error.strerror}") from error
        return self._model

    def commit(self) -> None:
        """Let the result appear, and remove the data files of what it replaces."""
        folder = self.path.parent
        replaced = self._data_of_what_is_replaced()
        data = folder / self._data.name if self._data else None
        is_new = data is not None and not data.exists()
        try:
            if self._data and data:
                self._data.replace(data)
                sync_folder(folder)
            self._model.replace(self.path)
            sync_folder(folder)
        except OSError as error:
            if data and is_new:
                data.unlink(missing_ok=True)
            raise OutputError(f"output {str(self.path)!r} cannot be put in place: {error.strerror}") from error
        for file in replaced - {data}:
            file.unlink(missing_ok=True)

    def _data_of_what_is_replaced(self) -> set[Path]:
        """Data files that only the file at ``path`` names, written by an earlier run, and none of the source's."""
        if not self.path.is_file():
            return set()
        old = onnx.ModelProto()
        try:
            old.ParseFromString(self.path.read_bytes())
        except (OSError, DecodeError):
            return set()
        ours = re.compile(re.escape(self._stem) + r"\.[0-9a-f]{12}\.data")
        named = {_location(t) for t in stored_tensors(old) if is_external(t)}
        files = {self.path.parent / name for name in named if ours.fullmatch(name)}
        return {f for f in files if not any(f.exists() and f.samefile(s) for s in self._source.files())}

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.store.abandon()
        self._aside.remove()


def weight_bytes(proto: onnx.ModelProto) -> int:
    """Bytes of all tensors that the model stores."""
    return sum(nbytes(t) for t in stored_tensors(proto))


def _locate(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    """Say where an external tensor's data lies (onnx's own setter wants the data in memory first)."""
    del tensor.external_data[:]
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def _location(tensor: TensorProto) -> str:
    return next((entry.value for entry in tensor.external_data if entry.key == "location"), "")


def sync(file: IO[bytes]) -> None:
    """Wait until an open file's content is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make a rename last; not every system lets a folder be opened."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
