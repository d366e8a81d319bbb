"""The ops of domain ``msd``: schema, meaning in NumPy, ONNX function body and native kernels."""

from __future__ import annotations

import sys
from pathlib import Path

_LIBRARY = {"win32": "msd_ops.dll", "darwin": "libmsd_ops.dylib"}.get(sys.platform, "libmsd_ops.so")


def library_path() -> Path:
    """Where the native library of the ops lies, for ``SessionOptions.register_custom_ops_library``.

    Raises:
        FileNotFoundError: the package was not built with its native library.
    """
    # An editable install has two folders: the checkout's, and the one the library was built into.
    for folder in __path__:
        path = Path(folder) / _LIBRARY
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"{_LIBRARY} is not in {' or '.join(repr(str(folder)) for folder in __path__)}: "
        "the package needs its native library, which 'pip install .' in the repository builds"
    )
