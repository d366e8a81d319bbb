"""What models are evaluated on: documents of token ids, from a file of ids or from text and a tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MsdError, OptionError

PADDING = -1
"""Fills rows behind the end of a document."""

TOKENIZER = "tokenizer.json"
"""The file beside a model that says how its text becomes tokens."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """Documents, one behind the other; no token of one is predicted from another's.

    Raises:
        OptionError: no document has two tokens, or an id is negative.
    """

    name: str
    """What messages call them."""
    documents: tuple[np.ndarray, ...]
    """Each ``[T]`` int64, ids of 0 or more."""
    starts: tuple[int, ...] = field(init=False)
    """Where each document starts in all tokens."""

    def __post_init__(self) -> None:
        if max((len(d) for d in self.documents), default=0) < 2:
            raise OptionError(f"{self.name} has no two tokens in a row: nothing is predicted")
        if min(int(d.min(initial=0)) for d in self.documents) < 0:
            raise OptionError(f"{self.name} has negative token ids within a document; {PADDING} may only fill its end")
        lengths = [len(d) for d in self.documents]
        object.__setattr__(self, "starts", tuple(int(s) for s in np.cumsum([0, *lengths[:-1]])))

    @property
    def count(self) -> int:
        """Of all documents."""
        return sum(map(len, self.documents))

    @property
    def largest(self) -> int:
        """The largest id."""
        return max(int(d.max(initial=0)) for d in self.documents)

    @property
    def digest(self) -> str:
        """Of ids and document starts, SHA-256."""
        digest = hashlib.sha256(np.asarray(self.starts, "<i8").tobytes())
        for document in self.documents:
            digest.update(document.astype("<i8").tobytes())
        return digest.hexdigest()


def tokens_of(given: Any, name: str = "the given tokens") -> Tokens:
    """Documents of ids: one sequence, several, or an array ``[docs, T]`` with -1 behind a document's end.

    Raises:
        OptionError: they are no integers of one or two dimensions.
    """
    if isinstance(given, Sequence) and given and not np.isscalar(given[0]):
        return Tokens(name, tuple(_ids(row, name, 1) for row in given))
    ids = _ids(given, name, 2)
    return Tokens(name, tuple(_without_padding(ids) if ids.ndim == 2 else (ids,)))


def read_tokens(path: Path) -> Tokens:
    """Documents of an ``.npz`` file.

    Ids are the array ``tokens``, or ``ids``, or the only one: ``[T]``, or ``[docs, T]`` with -1 behind a document's end. With
    ``[T]`` an array ``offsets`` may say where documents start: ascending, from 0; the end of the last, T, may be among them.

    Raises:
        OptionError: the arrays are others.
        MsdError: the file cannot be read.
    """
    name = f"tokens {str(path)!r}"
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in stored.files}
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise MsdError(f"{name} cannot be read as an .npz of arrays: {error}") from error
    offsets = arrays.pop("offsets", None)
    key = next((k for k in ("tokens", "ids") if k in arrays), next(iter(arrays)) if len(arrays) == 1 else None)
    if key is None:
        raise OptionError(f"{name} has {_names(arrays)}; an array 'tokens' is needed, or only one")
    ids = arrays[key]
    if offsets is None:
        return tokens_of(ids, name)
    ids, starts = _ids(ids, name, 1), [int(s) for s in _ids(offsets, f"{name}: offsets", 1)]
    if starts and starts[-1] != len(ids):
        starts.append(len(ids))
    if len(starts) < 2 or starts[0] != 0 or any(a > b for a, b in pairwise(starts)):
        raise OptionError(f"{name}: offsets must ascend from 0 to {len(ids)}, the number of tokens")
    return Tokens(name, tuple(ids[a:b] for a, b in pairwise(starts)))


def read_text(path: Path, tokenizer: Path) -> Tokens:
    """A text as one document, with the special tokens that its tokenizer puts around it.

    Args:
        path: UTF-8.
        tokenizer: a ``tokenizer.json`` as Hugging Face's library ``tokenizers`` writes it.

    Raises:
        OptionError: the library is not installed.
        MsdError: a file cannot be read.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise OptionError("--text needs tokenizers: pip install 'msd-compiler[text]'") from error
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise MsdError(f"text {str(path)!r} cannot be read: {error}") from error
    try:
        encoding = Tokenizer.from_file(str(tokenizer)).encode(text)
    except Exception as error:  # the library raises what its Rust part makes of it
        raise MsdError(f"tokenizer {str(tokenizer)!r} cannot be read: {error}") from error
    return Tokens(f"text {str(path)!r}", (np.array(encoding.ids, np.int64),))


def tokenizer_beside(model: Path) -> Path:
    """The ``tokenizer.json`` in a model's folder, or in the one around it, as exporters put models into ``onnx/``.

    Raises:
        OptionError: there is none.
    """
    folder = (model if model.is_dir() else model.parent).resolve()
    for place in (folder, folder.parent):
        if (place / TOKENIZER).is_file():
            return place / TOKENIZER
    raise OptionError(f"no {TOKENIZER} in {str(folder)!r}: name one with --tokenizer FILE, or give --tokens FILE.npz")


def _ids(given: Any, name: str, most: int) -> np.ndarray:
    try:
        ids = np.asarray(given)
    except ValueError as error:
        raise OptionError(f"{name} are no array: {error}") from error
    if ids.dtype.kind not in "iu" or not 1 <= ids.ndim <= most:
        wanted = "[T]" if most == 1 else "[T] or [documents, T]"
        raise OptionError(f"{name} are {ids.dtype}{list(ids.shape)}; integers {wanted} are needed")
    return ids.astype(np.int64)


def _without_padding(rows: np.ndarray) -> Iterable[np.ndarray]:
    for row in rows:
        ends = np.flatnonzero(row == PADDING)
        filled = len(ends) > 0 and bool((row[ends[0] :] == PADDING).all())
        yield row[: ends[0]] if filled else row


def _names(arrays: dict[str, np.ndarray]) -> str:
    return "arrays " + ", ".join(map(repr, arrays)) if arrays else "no arrays"
