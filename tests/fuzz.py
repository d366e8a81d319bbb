"""Mutated models through the command line: whatever a file holds, ``msd`` ends with status 0, 1 or 2 and a sentence.

    python tests/fuzz.py --seconds 60 --seed 1 [MODEL ...]

Never a traceback, a signal, a hang, gigabytes of memory or a half-written file. A seed gives the same cases for the same models.
A model that breaks this is kept, with the command that shows it.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from mutations import mutate, mutate_bytes
from support import model

HERE = Path(__file__).parent
MODELS = (HERE / "data/exported", HERE.parents[1] / "shared/models")
"""Where models are looked for; the second folder is beside the checkout, if at all."""

LARGEST = 4 * 2**20
"""Bytes of a model, its data included: small ones make more cases in the same time."""

CASES_PER_WORKER = 400
STATUSES = (0, 1, 2)


# --- cases ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seed:
    """A model to begin with."""

    path: Path
    proto: onnx.ModelProto
    data: tuple[Path, ...]
    """The files beside it that it names."""


@dataclass(frozen=True)
class Case:
    """A mutated model as bytes, and the words after ``msd``."""

    number: int
    seed: Seed
    model: bytes
    words: tuple[str, ...]


GRAPHS = {
    "brevitas": "q = QuantizeLinear<axis=0>(w, s, z)  c = Clip(q, low, high)  d = DequantizeLinear<axis=0>(c, s, z)  t = Transpose(d)  y = MatMul(x, t)",
    "blocks": "q = QuantizeLinear<axis=1, block_size=16>(w, b)  d = DequantizeLinear<axis=1, block_size=16>(q, b)  y = Gemm<transB=1>(x, d, s)",
    "experts": "r = Reshape(w, shape)  q = QuantizeLinear<axis=0>(w, s, z)  d = DequantizeLinear<axis=0>(q, s, z)  e = Reshape(d, shape)  f = Transpose<perm=[0,2,1]>(e)  y = MatMul(x, f)",
    "branches": "y = If(yes) <then_branch = t () => (float[] a) { q = QuantizeLinear<axis=0>(w, s, z)  d = DequantizeLinear<axis=0>(q, s, z)  p = Transpose(d)  a = MatMul(x, p) }, else_branch = u () => (float[] a) { a = Identity(x) }>",
}
"""Small models of spellings that the files lack."""

FLOAT4_GRAPHS = {
    "mxfp4": "d = DequantizeLinear<axis=0, block_size=32, output_dtype=1>(w, e8m0)  y = Gemm<alpha=0.5>(x, d, b)",
    "mxfp4, looked up": "d = DequantizeLinear<axis=0, block_size=32, output_dtype=1>(w, e8m0)  g = Gather(d, i)  a = Add(x, g)  y = MatMul(a, d)",
    "nvfp4": "s = DequantizeLinear(e4m3, whole)  d = DequantizeLinear<axis=1, block_size=16>(w, s)  t = Transpose(d)  y = MatMul(x, t)",
    "nvfp4, casts": "s = DequantizeLinear(e4m3, whole)  d = DequantizeLinear<axis=1, block_size=16>(w, s)  c = Cast<to=10>(d)  t = Transpose(c)  h = Cast<to=10>(x)  p = MatMul(h, t)  y = Cast<to=1>(p)",
}
"""The same of weights of FLOAT4E2M1, opset 24."""


def built() -> list[Seed]:
    rng = np.random.default_rng(0)
    tensors = {
        "w": rng.standard_normal((24, 40)).astype(np.float32), "s": np.full(24, 0.02, np.float32), "z": np.zeros(24, np.int8),
        "b": np.full((24, 3), 0.02, np.float32), "low": np.int8(-7), "high": np.int8(7), "shape": np.array([2, 12, 40]), "yes": np.array(True),
    }  # fmt: skip
    float4 = {
        "w": rng.integers(0, 16, (40, 40)).astype(np.uint8).view(ml_dtypes.float4_e2m1fn), "b": np.ones(40, np.float32), "i": np.array([3, 0, 39]),
        "e8m0": rng.integers(118, 126, (2, 40)).astype(np.uint8).view(ml_dtypes.float8_e8m0fnu),
        "e4m3": rng.integers(40, 126, (40, 3)).astype(np.uint8).view(ml_dtypes.float8_e4m3fn), "whole": np.float32(0.004),
    }  # fmt: skip
    found = []
    for graphs, stored, opset in ((GRAPHS, tensors, 21), (FLOAT4_GRAPHS, float4, 24)):
        for name, nodes in graphs.items():
            used = {key: value for key, value in stored.items() if re.search(rf"\b{key}\b", nodes)}
            proto = model(f"(float[3,40] x) => (float[] y) {{ {nodes} }}", opset=opset, **used)
            found.append(Seed(Path(name), proto, ()))
    return found


def seeds(paths: list[Path]) -> list[Seed]:
    files = sorted(file for p in paths for file in (p.rglob("*.onnx") if p.is_dir() else [p]))
    found = []
    for path in files:
        if path.stat().st_size > LARGEST:
            continue
        proto = onnx.load(path, load_external_data=False)
        names = {e.value for t in proto.graph.initializer for e in t.external_data if e.key == "location"}
        data = tuple(path.parent / name for name in sorted(names))
        if sum(file.stat().st_size for file in (path, *data)) <= LARGEST:
            found.append(Seed(path, proto, data))
    return found


def cases(models: list[Seed], seed: int) -> Iterator[Case]:
    for number in count():
        rng = random.Random(f"{seed} {number}")
        start = rng.choice(models)
        if rng.random() < 0.25:
            data = mutate_bytes(start.proto.SerializeToString(), rng)
        else:
            proto = onnx.ModelProto()
            proto.CopyFrom(start.proto)
            mutate(proto, rng)
            data = proto.SerializeToString()
            if rng.random() < 0.1:
                data = mutate_bytes(data, rng)
        how = rng.random()
        if how < 0.85:
            words: tuple[str, ...] = ("compile", "model.onnx", "-o", "out.onnx", "--no-verify")
        elif how < 0.92:
            words = ("compile", "model.onnx", "-o", "out.onnx", "--verify-seconds", "1")
        else:
            words = ("inspect", "model.onnx", "--verbose")
        if rng.random() < 0.2:
            words += ("--activations", "upgrade")
        if rng.random() < 0.3:
            words += ("--kv-cache", rng.choice(["int8", "int4"]))
        yield Case(number, start, data, words)


def prepare(case: Case, folder: Path) -> set[str]:
    """Put the case's files into an empty folder; returns their names."""
    (folder / "model.onnx").write_bytes(case.model)
    for file in case.seed.data:
        shutil.copy(file, folder / file.name)
    return {file.name for file in folder.iterdir()}


# --- running -------------------------------------------------------------------------------------------------------


def work(memory: int) -> None:
    """A worker: a line with a folder and words comes in, a line with status and standard error goes out."""
    import resource

    from msd_compiler import cli

    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what native code prints is no answer
    for line in sys.stdin:
        folder, words = json.loads(line)
        os.chdir(folder)
        sys.argv = ["msd", *words]
        status, said = 0, io.StringIO()
        with redirect_stdout(io.StringIO()), redirect_stderr(said):
            try:
                cli.main()
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException as error:  # what Python would print as a traceback
                import traceback

                status = -1
                said.write("".join(traceback.format_exception(error)))
        print(json.dumps([status, said.getvalue()]), file=answers, flush=True)


class Worker:
    """A process that runs the command line for many cases, with limits of time and memory."""

    def __init__(self, memory: int, said: Path):
        self._said = said
        self._errors = said.open("wb")
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", "--memory", str(memory)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        self.served = 0

    def run(self, folder: Path, words: tuple[str, ...], limit: float) -> tuple[int | None, str]:
        """The status and what was said; no status: what became of the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.served += 1
        print(json.dumps([str(folder), words]), file=self._process.stdin, flush=True)
        if not select.select([self._process.stdout], [], [], limit)[0]:
            return None, f"no end after {limit:g} s"
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            return None, f"ended by signal {-status}\n{self._said.read_text(errors='replace')[-2000:]}"
        status, said = json.loads(line)
        return status, said

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._errors.close()


def verdict(status: int | None, said: str, folder: Path, given: set[str]) -> str | None:
    """What is wrong with how a case ended; None: nothing."""
    left = {file.name for file in folder.iterdir()} - given
    if status not in STATUSES or "Traceback (most recent call last)" in said:
        return "\n    ".join(said.strip().splitlines()[-6:]) or f"status {status}"
    if status == 2 and not said.strip():
        return "status 2 without a word"
    if "Warning: " in said:
        return said.strip()  # of Python, about our code
    if status != 0 and left:
        return f"status {status}, and left behind {sorted(left)}"
    return None


def keep(case: Case, folder: Path, kept: Path) -> Path:
    """The case's files, where they stay."""
    shutil.copytree(folder, kept, dirs_exist_ok=True)
    prepare(case, kept)
    return kept


def fuzz(models: list[Seed], options: argparse.Namespace) -> int:
    """Run cases until the time is over; the number of those that went wrong."""
    end, counts, wrong = time.monotonic() + options.seconds, Counter[int](), 0
    with tempfile.TemporaryDirectory() as scratch:
        worker: Worker | None = None
        done = 0
        for case in cases(models, options.seed):
            if time.monotonic() > end or wrong >= options.most:
                break
            if case.number < options.first:
                continue
            if worker is None or worker.served >= CASES_PER_WORKER:
                if worker is not None:
                    worker.end()
                worker = Worker(options.memory, Path(scratch, "errors"))
            folder = Path(scratch, "case")
            folder.mkdir()
            given = prepare(case, folder)
            status, said = worker.run(folder, case.words, options.limit)
            done += 1
            problem = verdict(status, said, folder, given)
            if problem is None:
                counts[status or 0] += 1
            else:
                wrong += 1
                kept = keep(case, folder, options.keep / f"{options.seed}-{case.number}")
                print(f"\ncase {case.number} of seed {options.seed}, from {case.seed.path.name}: {problem}")
                print(f"  cd {kept} && msd {' '.join(case.words)}", flush=True)
                worker.end()
                worker = None
            shutil.rmtree(folder)
        if worker is not None:
            worker.end()
    by_status = ", ".join(f"{counts[status]} with status {status}" for status in STATUSES)
    print(f"seed {options.seed}: {done} mutated models of {len(models)}: {by_status}, {wrong} wrong")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="*", type=Path, metavar="MODEL", help="files or folders; default: those of the tests"
    )
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--most", type=int, default=10, help="stop after so many that went wrong")
    parser.add_argument("--limit", type=float, default=30, help="seconds a case may take")
    parser.add_argument("--memory", type=int, default=4 * 2**30, help="bytes of address space a worker may have")
    parser.add_argument(
        "--keep", type=Path, default=HERE.parent / "build/fuzz", help="folder for the models that went wrong"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.memory)
        return
    models = seeds(options.models) if options.models else seeds([p for p in MODELS if p.is_dir()]) + built()
    if not models:
        parser.error(f"no models of up to {LARGEST} bytes are there; name some")
    sys.exit(1 if fuzz(models, options) else 0)


if __name__ == "__main__":
    main()
