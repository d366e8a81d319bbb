"""Rewrites quantized ONNX models so that onnxruntime multiplies low-bit weights directly, with 16-bit activations."""

from __future__ import annotations

from pkgutil import extend_path

# In a checkout the subpackages `passes` and `runtime_ops` lie elsewhere; the installed package supplies them.
__path__ = extend_path(__path__, __name__)

from .api import Compiled, VerificationFailed, compile, inspect, run, verify
from .errors import ModelError, MsdError, OptionError, OutputError
from .generate import Decoder, Generated, generate
from .inputs import Feed
from .kv_cache import KvCache
from .quantize import Float4Quantization, Quantization
from .report import Report
from .runtime import library_path, register, session

__all__ = [
    "Compiled",
    "Decoder",
    "Feed",
    "Float4Quantization",
    "Generated",
    "KvCache",
    "ModelError",
    "MsdError",
    "OptionError",
    "OutputError",
    "Quantization",
    "Report",
    "VerificationFailed",
    "compile",
    "generate",
    "inspect",
    "library_path",
    "register",
    "run",
    "session",
    "verify",
]
