"""What the symbols in input shapes stand for, and the arithmetic some exporters write into them."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

MAX_EXPRESSION = 200  # characters

# A symbol (lower case) that matches the pattern stands for the quantity. The first match counts.
MEANINGS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), quantity)
    for pattern, quantity in (
        (r"^(?!.*(seq|len)).*batch|^bs?$", "batch"),
        (r"beam", "one"),
        (r"^(?!.*batch)max_.*(seq|len)|buffer", "buffer"),
        (r"total|present|kv_(seq|len)|_plus_|past.*and", "total"),
        (r"past|history|cache_(seq|len)", "past"),
        (r"encoder|(^|_)enc_|cross|audio|source|^src", "encoder"),
        (r"frames|mel_len", "frames"),
        (r"samples", "samples"),
        (r"channel", "channels"),
        (r"height|width|image_size", "image"),
        (r"seq|len|token|time", "seq"),
    )
)
_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.floordiv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def meaning(symbol: str) -> str | None:
    """The quantity a symbol stands for by its name: "batch", "past", ...; None where the name does not tell."""
    return next((quantity for pattern, quantity in MEANINGS if pattern.search(symbol.lower())), None)


@lru_cache(1024)
def parse(dim: str) -> Any | None:
    """``past_len + seq_len`` as a syntax tree; None for a plain symbol and for what is no arithmetic."""
    if len(dim) > MAX_EXPRESSION:
        return None
    try:
        tree = ast.parse(dim.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if isinstance(tree, ast.Name):
        return None
    known = (ast.BinOp, ast.Name, ast.Constant, ast.Load, ast.operator)
    return tree if all(isinstance(node, known) for node in ast.walk(tree)) else None


def symbols(dim: str) -> list[str]:
    """The symbols in a dim, left to right; the dim itself where it is no expression."""
    tree = parse(dim)
    return [dim] if tree is None else [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]


def evaluate(dim: str, sizes: Mapping[str, int]) -> int:
    """The size of a dim, never negative.

    Raises:
        KeyError: a symbol has no size.
        ValueError: the expression is no integer arithmetic, or divides by zero.
    """
    if dim in sizes:
        return sizes[dim]
    tree = parse(dim)
    if tree is None:
        raise KeyError(dim)
    return max(0, _evaluate(tree, sizes))


def _evaluate(tree: Any, sizes: Mapping[str, int]) -> int:
    match tree:
        case ast.Name(id=name):
            return sizes[name]
        case ast.Constant(value=int(value)):
            return value
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            try:
                return _OPERATORS[type(op)](_evaluate(left, sizes), _evaluate(right, sizes))
            except ZeroDivisionError as error:
                raise ValueError("division by zero") from error
    raise ValueError(f"{ast.unparse(tree)!r} is no integer arithmetic")
