"""The options that ``msd compile`` and ``msd inspect`` share: what is asked of a result."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from .cost.workload import DEFAULT as DEFAULT_WORKLOAD
from .decide import Activations
from .errors import OptionError
from .float4 import ScaleRule
from .kv_cache import KvCache
from .quantize import Float4Quantization, Quantization, WeightRounding
from .verification import read_feed


class CacheCodes(StrEnum):
    """What float caches can be rounded to."""

    INT4 = "int4"
    INT8 = "int8"


class WeightCodes(StrEnum):
    """What float weights can be rounded to."""

    INT4 = "int4"
    INT8 = "int8"
    MXFP4 = "mxfp4"
    NVFP4 = "nvfp4"


class ScaleRules(StrEnum):
    """How a block's scale is found."""

    STANDARD = "standard"
    LEAST_ERROR = "least-error"


def _choosing(help: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel="What is chosen, and for what", **more)


@dataclass(frozen=True)
class CompileOptions:
    """A field an option; names, types, defaults and help are the command line's."""

    terms: Annotated[
        int | None,
        typer.Option(
            help="INT8 terms of the activation; default: 2, and 3 where the model rounds the result on", min=1, max=3
        ),
    ] = None
    quantize: Annotated[
        WeightCodes | None,
        typer.Option(help="round the weights of float layers: int4 and int8 by onnxruntime's own quantizer"),
    ] = None
    block_size: Annotated[
        int | None, typer.Option(help="with --quantize int4 or int8: steps of K that share a scale; default: 32")
    ] = None
    asymmetric: Annotated[
        bool, typer.Option("--asymmetric", help="with --quantize int4 or int8: blocks have zero points")
    ] = False
    scale_rule: Annotated[
        ScaleRules | None,
        typer.Option(help="with --quantize mxfp4 or nvfp4: the standard's, or of its neighbours that of least error"),
    ] = None
    activations: Annotated[
        Activations,
        typer.Option(help="those that the model itself rounds: keep their codes, exactly, or upgrade to float"),
    ] = Activations.KEEP
    kv_cache: Annotated[
        CacheCodes | None,
        typer.Option(help="make float caches low-bit; changes the model's cache inputs and outputs"),
    ] = None
    samples: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npz",
            help="inputs to look at activations on; with --kv-cache also for its scales (without, every token has its own)",
        ),
    ] = None
    target: Annotated[
        str | None,
        _choosing(
            "profile to price for: see msd targets; default: this machine's instruction set", metavar="NAME|FILE"
        ),
    ] = None
    workload: Annotated[
        str, _choosing("phases as name=share@sizes, separated by ;", metavar="PHASES|FILE", show_default=True)
    ] = DEFAULT_WORKLOAD
    budget: Annotated[
        float | None, _choosing("largest relative L2 per layer; default: 1e-4, for an accelerator 2e-3", min=0)
    ] = None
    override: Annotated[
        list[str] | None,
        _choosing(
            "for layers by name; the first that matches counts. WHAT: keep, float, 1, 2 or 3 terms, mxfp4x2, mxfp8 ...",
            metavar="GLOB=WHAT",
        ),
    ] = None

    def arguments(self) -> dict[str, Any]:
        """What `api.compile` and `api.inspect` take.

        Raises:
            OptionError: options contradict each other.
            MsdError: samples cannot be read.
        """
        samples = None if self.samples is None else [read_feed(self.samples)]
        bits: dict[CacheCodes, Literal[4, 8]] = {CacheCodes.INT4: 4, CacheCodes.INT8: 8}
        return {
            "terms": self.terms,
            "quantization": self._quantization(),
            "activations": self.activations.value,
            "kv_cache": None if self.kv_cache is None else KvCache(bits[self.kv_cache], samples),
            "target": self.target,
            "workload": self.workload,
            "budget": self.budget,
            "overrides": self.override or (),
            "samples": samples,
        }

    def _quantization(self) -> WeightRounding | None:
        codes, how = self.quantize, {} if self.block_size is None else {"block_size": self.block_size}
        is_float = codes in (WeightCodes.MXFP4, WeightCodes.NVFP4)
        if (how or self.asymmetric) and (codes is None or is_float):
            raise OptionError("--block-size and --asymmetric say how to --quantize to int4 or int8")
        if self.scale_rule is not None and not is_float:
            raise OptionError("--scale-rule says how to --quantize to mxfp4 or nvfp4")
        if codes is None:
            return None
        if is_float:
            rule: ScaleRule = "least_error" if self.scale_rule is ScaleRules.LEAST_ERROR else "standard"
            return Float4Quantization("mxfp4" if codes is WeightCodes.MXFP4 else "nvfp4", rule)
        return Quantization(4 if codes is WeightCodes.INT4 else 8, symmetric=not self.asymmetric, **how)


DEFAULTS = CompileOptions()
"""Nothing asked."""


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option per field of `CompileOptions` in the place of its parameter ``options``."""
    hints = get_type_hints(CompileOptions, include_extras=True)
    own = [
        inspect.Parameter(f.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=f.default, annotation=hints[f.name])
        for f in fields(CompileOptions)
    ]
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        parameters += own if parameter.name == "options" else [parameter]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        options = CompileOptions(**{f.name: given.pop(f.name) for f in fields(CompileOptions)})
        command(options=options, **given)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run
