"""Benchmarks that run on the user's machine: models side by side, and single layers."""

from __future__ import annotations

from .attention import AttentionGrid, bench_attention
from .linear import LinearGrid, bench_linear
from .models import Effort, bench_models
from .plot import check_plot, plot
from .report import AttentionReport, LinearReport, ModelsReport, Report
from .view import view

__all__ = [
    "AttentionGrid",
    "AttentionReport",
    "Effort",
    "LinearGrid",
    "LinearReport",
    "ModelsReport",
    "Report",
    "bench_attention",
    "bench_linear",
    "bench_models",
    "check_plot",
    "plot",
    "view",
]
