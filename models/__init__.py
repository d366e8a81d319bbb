"""Recipes for models, and the two models that are kept here."""

from pathlib import Path

_FOLDER = Path(__file__).parent

BUNDLED = _FOLDER / "bundled"
"""A folder: the trained model that comes with the package, its tokenizer, texts and prompts; `python_docs` made it."""

TINY_LLAMA = _FOLDER / "tiny_llama.onnx"
"""A decoder of random weights, int4 and int8, that tests use."""
