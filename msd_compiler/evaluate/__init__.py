"""Is a language model still right: perplexity, KL divergence and changed tokens on a text, against its exact meaning."""

from __future__ import annotations

from .measure import evaluate
from .report import Evaluation, Flip, OracleRow, RunRow, SiteNoise
from .tokens import Tokens, read_text, read_tokens, tokens_of
from .windows import Windows

__all__ = [
    "Evaluation",
    "Flip",
    "OracleRow",
    "RunRow",
    "SiteNoise",
    "Tokens",
    "Windows",
    "evaluate",
    "read_text",
    "read_tokens",
    "tokens_of",
]
