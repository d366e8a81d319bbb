"""The one place that makes onnxruntime sessions and runs them against the clock."""

from __future__ import annotations

import ctypes
import difflib
import math
import os
import re
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any
from weakref import WeakSet

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
from google.protobuf.message import EncodeError
from onnx import TensorProto, helper, numpy_helper

from .errors import MsdError, OptionError
from .runtime_ops import library_path
from .source import Source, copy_fields, is_external, nbytes, stored_tensors

__all__ = [
    "SAY_NOTHING",
    "RuntimeRefused",
    "TimedOut",
    "array_of",
    "library_path",
    "open_model",
    "ort_value",
    "register",
    "run",
    "run_bound",
    "runtime_version",
    "session",
]

SAY_NOTHING = 4
"""Log severity: what goes wrong comes as an exception."""

_FOLDER_KEY = "session.model_external_initializers_file_folder_path"  # means nothing to onnxruntime 1.20
_EMBEDDED_LIMIT = 1 << 28  # bytes; protobuf serializes 2 GiB at most, and all of them are held three times on the way
_OPTIONS = {
    name for name in dir(onnxruntime.SessionOptions) if isinstance(getattr(onnxruntime.SessionOptions, name), property)
}
_registered: WeakSet[Any] = WeakSet()


class RuntimeRefused(MsdError):
    """onnxruntime does not load or does not run a model; the message is its own, in one line."""


class TimedOut(MsdError):
    """A run was stopped because its time was over."""


def runtime_version() -> tuple[int, ...]:
    """The installed onnxruntime: ``(1, 32)``."""
    return tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])


def register(options: onnxruntime.SessionOptions) -> None:
    """Make the native kernels known to the sessions opened with these options; a second call does nothing.

    Raises:
        RuntimeRefused: the library is missing or onnxruntime cannot load it.
    """
    if options in _registered:
        return
    try:
        path = str(library_path())
    except FileNotFoundError as error:
        raise RuntimeRefused(str(error)) from error
    try:
        options.register_custom_ops_library(path)
    except Exception as error:
        raise RuntimeRefused(f"native library {path!r} does not load: {_one_line(error)}") from error
    _registered.add(options)


def session(
    model: str | os.PathLike[str] | bytes, *, portable: bool = False, **options: Any
) -> onnxruntime.InferenceSession:
    """Open a model in onnxruntime, with the native kernels registered.

    Args:
        model: a file, or the bytes of a serialized model that has no external data.
        portable: do without the native library: the ops of domain ``msd`` run as the standard ops of their bodies.
        options: attributes of `onnxruntime.SessionOptions` (``intra_op_num_threads=1``), ``providers`` (default: the CPU
            alone) and ``config``, a dict of session configuration entries (``{"session.disable_prepacking": "1"}``).

    Raises:
        OptionError: an option that does not exist, or of another type.
        RuntimeRefused: onnxruntime does not load the model.
    """
    if not isinstance(model, (str, os.PathLike, bytes)):
        raise OptionError(
            f"a session needs a path or bytes, found {type(model).__name__}; `open_model` takes a ModelProto"
        )
    name = "the given model" if isinstance(model, bytes) else repr(os.fspath(model))
    settings, providers = _settings(portable, options)
    return _open(model, name, settings, providers)


def open_model(
    model: onnx.ModelProto, folder: Path, *, name: str = "the given model", portable: bool = False, **options: Any
) -> onnxruntime.InferenceSession:
    """Open a model held in memory whose external data lies in ``folder``; nothing is written there.

    More than 256 MiB of embedded initializers goes through an unnamed temporary file that the session maps, so that a
    model of any size can be opened, if its nested graphs hold less than 2 GiB. onnxruntime 1.20 cannot be told where
    external data lies: there the model goes through a temporary folder with links to the data.

    Args:
        model: not changed.
        folder: where external data is.
        name: what messages call the model.
        portable: see `session`.
        options: see `session`.

    Raises:
        ModelError: external data is missing, too short or outside ``folder``.
        OptionError: an option that does not exist, or of another type.
        RuntimeRefused: onnxruntime does not load the model, or it cannot be handed over.
    """
    settings, providers = _settings(portable, options)
    source = Source(model, folder)
    external = [tensor for tensor in stored_tensors(model) if is_external(tensor)]
    for tensor in external:
        source.bytes_of(tensor)
    with ExitStack() as cleanup:
        injected: list[onnxruntime.OrtValue] = []
        if sum(_embedded_bytes(tensor) for tensor in model.graph.initializer) > _EMBEDDED_LIMIT:
            model, injected = _taken_out(model, settings, cleanup.enter_context(tempfile.TemporaryFile()))
        try:
            serialized: bytes = model.SerializeToString()
        except (EncodeError, ValueError) as error:
            raise RuntimeRefused(
                f"{name} holds more than 2 GiB outside its main graph's initializers: it cannot be handed to onnxruntime"
            ) from error
        data: bytes | Path = serialized
        if external and runtime_version() >= (1, 21):
            settings.add_session_config_entry(_FOLDER_KEY, str(folder.resolve()))
        elif external:
            beside = Path(cleanup.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
            data = _linked(serialized, external, folder.resolve(), beside)
        opened = _open(data, name, settings, providers)
    opened.msd_initializers = injected  # onnxruntime keeps no reference to the arrays it reads
    return opened


def run(
    session: onnxruntime.InferenceSession,
    outputs: Sequence[str] | None,
    feed: Mapping[str, Any],
    seconds: float | None = None,
) -> list[Any]:
    """Run a session, for so long and no longer.

    onnxruntime looks at the clock between nodes, those of loop bodies too: one node that takes long is waited for, and
    its result returned if nothing follows it. The session can be used again afterwards.

    Args:
        session: any session.
        outputs: names of the outputs wanted; None for all.
        feed: arrays by input name.
        seconds: the limit; None for no limit.

    Raises:
        TimedOut: the time was over before the last node began.
        RuntimeRefused: a feed does not fit, or a node fails.
    """
    if seconds is not None and seconds <= 0:
        raise TimedOut("no time was left for the run")
    options = onnxruntime.RunOptions()
    over = threading.Event()

    def stop() -> None:
        over.set()
        options.terminate = True

    timer = None
    if seconds is not None:
        options.log_severity_level = 4  # a stopped run is no error to print
        timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), stop)
        timer.daemon = True
        timer.start()
    began = time.monotonic()
    try:
        results = _run_values(session, outputs, feed, options)
    except Exception as error:
        if over.is_set() and "terminate" in str(error):
            took = time.monotonic() - began
            raise TimedOut(f"the run was stopped after {took:.1f} s; {seconds:g} s were allowed") from error
        raise RuntimeRefused(f"onnxruntime {onnxruntime.__version__} cannot run it: {_one_line(error)}") from error
    finally:
        if timer is not None:
            timer.cancel()
            timer.join()
    return results


def run_bound(session: onnxruntime.InferenceSession, binding: onnxruntime.IOBinding, *, quiet: bool = False) -> None:
    """Run a session on values bound to its inputs and outputs.

    Raises:
        RuntimeRefused: a value does not fit, or a node fails; if ``quiet``, onnxruntime prints nothing of it.
    """
    options = None  # to look into options costs onnxruntime's Python part 0.2 ms a run
    if quiet:
        options = onnxruntime.RunOptions()
        options.log_severity_level = 4
    try:
        session.run_with_iobinding(binding, options)
    except Exception as error:
        raise RuntimeRefused(f"onnxruntime {onnxruntime.__version__} cannot run it: {_one_line(error)}") from error


def ort_value(array: np.ndarray) -> onnxruntime.OrtValue:
    """An array for the runtime, without a copy if it is contiguous; of bfloat16 too, which onnxruntime does not take from NumPy."""
    array = np.ascontiguousarray(array).reshape(array.shape)  # a scalar stays one
    if array.dtype == ml_dtypes.bfloat16:
        bits = array.view(np.uint16)
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, TensorProto.BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def array_of(value: onnxruntime.OrtValue) -> np.ndarray:
    """A copy of a tensor in the CPU's memory; of bfloat16 too, which onnxruntime does not give to NumPy."""
    return _bfloat16_array(value) if value.data_type() == _BFLOAT16 else np.asarray(value.numpy())


_BFLOAT16 = "tensor(bfloat16)"


def _run_values(
    session: onnxruntime.InferenceSession, outputs: Sequence[str] | None, feed: Mapping[str, Any], options: Any
) -> list[Any]:
    """`InferenceSession.run`, for bfloat16 too, which onnxruntime neither takes from NumPy nor gives to it."""
    types = {v.name: v.type for v in (*session.get_inputs(), *session.get_outputs())}
    if _BFLOAT16 not in types.values():
        return list(session.run(outputs, dict(feed), options))
    values = {
        name: ort_value(array.astype(ml_dtypes.bfloat16) if types.get(name) == _BFLOAT16 else array)
        for name, array in feed.items()
    }
    found = session.run_with_ort_values(outputs, values, options)
    return [array_of(v) for v in found]


def _bfloat16_array(value: onnxruntime.OrtValue) -> np.ndarray:
    shape = value.shape()
    count = math.prod(shape)
    bits = (ctypes.c_uint16 * count).from_address(value.data_ptr()) if count else []
    return np.asarray(np.array(bits, np.uint16).view(ml_dtypes.bfloat16).reshape(shape))


def _settings(portable: bool, options: dict[str, Any]) -> tuple[onnxruntime.SessionOptions, list[Any]]:
    settings = onnxruntime.SessionOptions()
    options = dict(options)
    providers = list(options.pop("providers", None) or ["CPUExecutionProvider"])
    # onnxruntime would fall back to the CPU, and say so on the screen only
    available = onnxruntime.get_available_providers()
    for provider in providers:
        provider_name = provider[0] if isinstance(provider, tuple) else provider
        if provider_name not in available:
            raise OptionError(
                f"provider {provider_name!r} is not in this onnxruntime, which has {', '.join(available)}"
            )
    config = options.pop("config", None) or {}
    for key, value in config.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise OptionError(f"config entry {key!r}: {value!r} must be two strings")
        try:
            settings.add_session_config_entry(key, value)
        except RuntimeError as error:
            raise OptionError(f"config entry {key!r}: {value!r}: {_one_line(error)}") from error
    for name, value in options.items():
        _set(settings, name, value)
    if not portable:
        register(settings)
    return settings, providers


def _set(settings: onnxruntime.SessionOptions, name: str, value: Any) -> None:
    if name not in _OPTIONS:
        known = sorted(_OPTIONS | {"config", "portable", "providers"})
        close = difflib.get_close_matches(name, known)
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(known)}"
        raise OptionError(f"unknown session option {name!r}; {hint}")
    try:
        setattr(settings, name, value)
    except TypeError as error:
        needed = type(getattr(settings, name)).__name__
        raise OptionError(f"session option {name} is {value!r}; it must be {needed}") from error


def _open(
    model: str | os.PathLike[str] | bytes, name: str, settings: onnxruntime.SessionOptions, providers: list[Any]
) -> onnxruntime.InferenceSession:
    try:
        return onnxruntime.InferenceSession(model, settings, providers=providers, enable_fallback=0)
    except Exception as error:
        raise RuntimeRefused(f"onnxruntime {onnxruntime.__version__} refuses {name}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    """onnxruntime's message without error codes, places in its C++ source, colours and stack traces."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    text = re.split(r"\n\s*(?:Stacktrace|Backtrace)", text, maxsplit=1, flags=re.IGNORECASE)[0]
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"\S*onnxruntime_src/\S+?:\d+ [^\n]*?\)(?: const)? (?:\[with [^\]]*\] )?", "", text)
    return " ".join(text.split())


def _embedded_bytes(tensor: TensorProto) -> int:
    return 0 if is_external(tensor) or tensor.data_type == TensorProto.STRING else nbytes(tensor)


def _taken_out(
    model: onnx.ModelProto, settings: onnxruntime.SessionOptions, file: IO[bytes]
) -> tuple[onnx.ModelProto, list[onnxruntime.OrtValue]]:
    """The model without the data of its large initializers, which ``settings`` hand to the session, mapped from ``file``."""
    small = onnx.ModelProto()
    copy_fields(model, small, but="graph")
    copy_fields(model.graph, small.graph, but="initializer")
    names: list[str] = []
    values: list[onnxruntime.OrtValue] = []
    for tensor in model.graph.initializer:
        if _embedded_bytes(tensor) < 1024 or tensor.data_type not in _BYTE_TYPES:
            small.graph.initializer.add().CopyFrom(tensor)
            continue
        small.graph.initializer.append(
            TensorProto(
                name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, data_location=TensorProto.EXTERNAL
            )
        )
        small.graph.initializer[-1].external_data.add(key="location", value="handed to the session")
        offset = file.seek(-(-file.tell() // 64) * 64)
        numpy_helper.to_array(tensor).tofile(file)
        file.seek(0, os.SEEK_END)
        array = np.memmap(file, _BYTE_TYPES[tensor.data_type], "r", offset, tuple(tensor.dims))
        names.append(tensor.name)
        values.append(onnxruntime.OrtValue.ortvalue_from_numpy(array))
    settings.add_external_initializers(names, values)
    return small, values


_BYTE_TYPES = {
    data_type: helper.tensor_dtype_to_np_dtype(data_type)
    for data_type in (
        TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BOOL,
        TensorProto.INT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64,
        TensorProto.UINT8, TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64,
    )
}  # fmt: skip
"""Element types that NumPy shares with onnxruntime."""


def _linked(data: bytes, external: list[TensorProto], folder: Path, beside: Path) -> Path:
    """A file with the model in folder ``beside``, and links there to the data files it names."""
    for location in {entry.value for tensor in external for entry in tensor.external_data if entry.key == "location"}:
        link = beside / location
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(folder / location)
    file = beside / "model.onnx"
    while file.is_symlink():
        file = file.with_stem(file.stem + "_")
    file.write_bytes(data)
    return file
