"""What the demo shows: a float decoder, a text to measure it on, and what it is to continue."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..evaluate.tokens import Tokens, read_tokens
from ..models import BUNDLED

PROMPT_TOKENS = 16
"""Of the first document, where no other prompt is known."""


@dataclass(frozen=True)
class Material:
    """A model and its texts."""

    model: Path
    about: str
    """What it is, in words."""
    tokens: Tokens
    prompt: tuple[int, ...]
    pieces: tuple[bytes, ...] | None
    """What each id stands for; None: not known, ids are shown."""

    def text(self, ids: Sequence[int]) -> str:
        """Ids as a person reads them."""
        if self.pieces is None:
            return " ".join(map(str, ids))
        return b"".join(self.pieces[i] for i in ids).decode(errors="replace")


def bundled() -> Material:
    """The trained model that comes with the package; ``models/python_docs`` made it."""
    about = "A Llama trained on Python's documentation"
    prompt = json.loads((BUNDLED / "prompts.json").read_text())[0]["ids"]
    pieces = tuple(piece.encode("latin-1") for piece in json.loads((BUNDLED / "pieces.json").read_text()))
    return Material(BUNDLED / "model.onnx", about, read_tokens(BUNDLED / "evaluation.npz"), tuple(prompt), pieces)


def of_files(model: Path, tokens: Path) -> Material:
    """A user's own float decoder.

    Raises:
        OptionError, MsdError: the tokens cannot be read.
    """
    read = read_tokens(tokens)
    first = next(document for document in read.documents if len(document) > 1)
    return Material(model, model.name, read, tuple(int(i) for i in first[:PROMPT_TOKENS]), None)
