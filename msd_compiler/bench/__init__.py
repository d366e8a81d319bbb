"""Benchmarks that run on the user's machine: models side by side, whole decoders of random weights, and single layers."""

from __future__ import annotations

from .attention import AttentionGrid, bench_attention
from .decode import DecodersGrid, bench_decode
from .linear import LinearGrid, bench_linear
from .models import Effort, bench_models
from .plot import plot
from .report import AttentionReport, DecodeReport, LinearReport, ModelsReport, Report
from .view import view

__all__ = [
    "AttentionGrid",
    "AttentionReport",
    "DecodeReport",
    "DecodersGrid",
    "Effort",
    "LinearGrid",
    "LinearReport",
    "ModelsReport",
    "Report",
    "bench_attention",
    "bench_decode",
    "bench_linear",
    "bench_models",
    "plot",
    "view",
]
