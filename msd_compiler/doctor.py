"""What will run on this machine, and why: package, onnxruntime, native library, instruction set, threads."""

from __future__ import annotations

import ctypes
import importlib.metadata
import math
import os
import platform
from pathlib import Path

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from pydantic import BaseModel
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from . import api, runtime
from .compare import relative_l2
from .errors import MsdError

OLDEST_RUNTIME = (1, 20)
"""The first onnxruntime that is supported."""

ISA_VARIABLE = "MSD_ISA"
"""The environment variable that names the instruction set to use in place of the best."""

_K, _N = 64, 32
_CLOSE = 1e-4
"""Largest relative L2 of the trial product; two terms give 3e-5."""


class Problem(BaseModel):
    """Something that is wrong."""

    what: str
    """One sentence: what is wrong, and what to do."""
    fatal: bool
    """Whether the native library cannot be used because of it."""


class Library(BaseModel):
    """The native library, as far as it goes."""

    path: str | None
    """None: the package has none."""
    loads: bool
    """The system takes it into a process."""
    registers: bool
    """onnxruntime takes its ops."""
    runs: bool
    """A small product comes out right."""


class Threads(BaseModel):
    """How many CPUs there are to compute on."""

    machine: int
    """Logical CPUs."""
    process: int
    """Those that this process may use."""
    quota: float | None
    """CPUs' worth of time that a container's limit leaves; None: no limit."""


class Diagnosis(BaseModel):
    """All that `examine` finds."""

    version: str | None
    """Of the package; None in a checkout that was not installed."""
    python: str
    onnxruntime: str
    onnxruntime_supported: bool
    cpu: str
    library: Library
    instruction_sets: list[str]
    """Those of the library that this machine runs, best first."""
    used: str | None
    """Of these, the one that sessions use."""
    why: str
    """How it was chosen."""
    threads: Threads
    problems: list[Problem]

    @property
    def usable(self) -> bool:
        """Whether the native library can be used."""
        return not any(problem.fatal for problem in self.problems)


def examine() -> Diagnosis:
    """Look at this machine, and try the native library on a small product."""
    problems: list[Problem] = []
    supported = runtime.runtime_version() >= OLDEST_RUNTIME
    if not supported:
        oldest = ".".join(map(str, OLDEST_RUNTIME))
        problems.append(
            Problem(
                what=f"onnxruntime {onnxruntime.__version__} is too old: {oldest} or later is needed; "
                f"pip install --upgrade 'onnxruntime>={oldest}'",
                fatal=True,
            )
        )
    library, names = _library(problems)
    used, why = _used(names, problems)
    threads = count_threads()
    if used is not None and library.registers:
        library.runs = _runs(problems)
    _check_threads(threads, problems)
    return Diagnosis(
        version=package_version(),
        python=platform.python_version(),
        onnxruntime=onnxruntime.__version__,
        onnxruntime_supported=supported,
        cpu=cpu_name(),
        library=library,
        instruction_sets=names,
        used=used,
        why=why,
        threads=threads,
        problems=problems,
    )


def package_version() -> str | None:
    """Of msd-compiler; None in a checkout that was not installed."""
    try:
        return importlib.metadata.version("msd-compiler")
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """What the system calls the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def isa_names(path: Path) -> list[str]:
    """The instruction sets of a native library that this machine runs, best first.

    Raises:
        OSError: it cannot be loaded.
        AttributeError: it is another library.
    """
    names = ctypes.CDLL(str(path)).msd_isa_names
    names.restype = ctypes.c_char_p
    found: bytes = names()
    return found.decode().split()


def used_isa() -> str | None:
    """The instruction set that sessions use; None if the native library cannot be used."""
    try:
        return _used(isa_names(runtime.library_path()), [])[0]
    except (OSError, AttributeError):
        return None


def count_threads() -> Threads:
    """The CPUs of this machine and of this process."""
    machine = os.cpu_count() or 1
    process = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else machine
    return Threads(machine=machine, process=process, quota=_quota())


def _quota() -> float | None:
    """Of Linux' control groups, version 2."""
    try:
        time, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if time == "max" else int(time) / int(period)


def _library(problems: list[Problem]) -> tuple[Library, list[str]]:
    """The library, and the instruction sets that it has here."""
    library = Library(path=None, loads=False, registers=False, runs=False)
    try:
        path = runtime.library_path()
    except FileNotFoundError as error:
        problems.append(Problem(what=f"there is no native library: {error}", fatal=True))
        return library, []
    library.path = str(path)
    build = "build it anew: pip install --force-reinstall . in the repository"
    try:
        names = isa_names(path)
    except OSError as error:
        what = f"the system does not load the native library {library.path!r}: {error}; {build}"
        problems.append(Problem(what=what, fatal=True))
        return library, []
    except AttributeError:
        what = f"{library.path!r} is another library, or an old one: it has no msd_isa_names; {build}"
        problems.append(Problem(what=what, fatal=True))
        return library, []
    library.loads = True
    try:
        runtime.register(onnxruntime.SessionOptions())
        library.registers = True
    except MsdError as error:
        problems.append(Problem(what=f"{error}; {build}", fatal=True))
    return library, names


def _used(names: list[str], problems: list[Problem]) -> tuple[str | None, str]:
    """The instruction set that the library picks, and why."""
    wanted = os.environ.get(ISA_VARIABLE)
    if not names:
        return None, "no native library"
    if not wanted:
        return names[0], "the best of this machine"
    if wanted in names:
        if wanted != names[0]:
            what = f"{ISA_VARIABLE}={wanted} keeps the library from using {names[0]}: unset it unless that is meant"
            problems.append(Problem(what=what, fatal=False))
        return wanted, f"the environment variable {ISA_VARIABLE}"
    what = f"{ISA_VARIABLE} is {wanted!r}, and this machine runs {', '.join(names)}: unset it, or name one of these"
    problems.append(Problem(what=what, fatal=True))
    return None, f"the environment variable {ISA_VARIABLE} is {wanted!r}"


def _runs(problems: list[Problem]) -> bool:
    """Compile and run one product."""
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, (_K, _N)).astype(np.int8)
    x = rng.standard_normal((2, _K)).astype(np.float32)
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scale"], ["w"]),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    initializers = [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(np.float32(0.01), "scale")]
    inputs, outputs = [value("x", TensorProto.FLOAT, ["M", _K])], [value("y", TensorProto.FLOAT, ["M", _N])]
    graph = helper.make_graph(nodes, "trial", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    try:
        compiled = api.compile(model, verify=False).model
        (y,) = runtime.session(compiled.SerializeToString(), log_severity_level=runtime.SAY_NOTHING).run(None, {"x": x})
    except (MsdError, RuntimeError) as error:
        problems.append(Problem(what=f"a small product does not run: {error}; report this", fatal=True))
        return False
    distance = relative_l2(y, x.astype(np.float64) @ (codes * np.float64(np.float32(0.01))))
    if distance > _CLOSE:
        what = f"a small product is {distance:.1e} from the right result, allowed are {_CLOSE:g}: report this"
        problems.append(Problem(what=what, fatal=True))
    return distance <= _CLOSE


def _check_threads(threads: Threads, problems: list[Problem]) -> None:
    usable = threads.process if threads.quota is None else min(threads.process, math.ceil(threads.quota))
    if usable < threads.machine:
        what = (
            f"this process may use {usable} of {threads.machine} CPUs, and onnxruntime counts those of the machine: "
            f"open sessions with intra_op_num_threads={usable}"
        )
        problems.append(Problem(what=what, fatal=False))


def diagnosis_view(diagnosis: Diagnosis) -> RenderableType:
    """The diagnosis as a person reads it."""
    d, table = diagnosis, Table(box=box.SIMPLE, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    support = "supported" if d.onnxruntime_supported else "not supported"
    states = (("loads", d.library.loads), ("registers", d.library.registers), ("runs", d.library.runs))
    quota = "" if d.threads.quota is None else f"; a container's limit leaves {d.threads.quota:g}"
    rows = {
        "msd-compiler": d.version or "a checkout, not installed",
        "Python": d.python,
        "onnxruntime": f"{d.onnxruntime}, {support}",
        "native library": d.library.path or "none",
        "": ", ".join(word if done else f"does not {word[:-1]}" for word, done in states),
        "processor": d.cpu,
        "instruction sets": ", ".join(d.instruction_sets) or "none known",
        "used": f"{d.used}: {d.why}" if d.used else f"none: {d.why}",
        "CPUs": f"{d.threads.process} of {d.threads.machine} for this process{quota}",
    }
    for name, value in rows.items():
        table.add_row(name, Text(value))
    parts: list[RenderableType] = [table]
    parts += [Text(p.what, "red" if p.fatal else "yellow") for p in d.problems]
    verdict = ("the native library can be used", "bold green")
    parts.append(Text(*verdict) if d.usable else Text("the native library cannot be used", "bold red"))
    return Group(*parts)
