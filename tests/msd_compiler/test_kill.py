"""Killed at any moment, or out of space: the old result or the new one, whole, and no part of either."""

import hashlib
import json
import re
import resource
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from support import activation, model, weight

import msd_compiler

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs fork, limits and signals")

K, N, LAYERS = 1024, 4096, 6  # 24 MB: weights go to a data file

KILLS = """
import hashlib, json, os, random, signal, sys, time
from pathlib import Path
import msd_compiler

sources, out, mode, count = [Path(p) for p in sys.argv[1:3]], Path(sys.argv[3]), sys.argv[4], int(sys.argv[5])
CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}

def attempt(source, step=None, seconds=None):
    pid = os.fork()
    if pid == 0:
        seen = 0
        def die(event, arguments):
            nonlocal seen
            if event in CHANGES and str(out.parent) in str(arguments[0]):
                if seen == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1
        if step is not None:
            sys.addaudithook(die)
        try:
            msd_compiler.compile(source, out, verify=False)
            os._exit(0)
        finally:
            os._exit(1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    return "killed" if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)

def state():
    digest = lambda p: hashlib.sha256(p.read_bytes()).hexdigest()
    return {p.name: digest(p) if p.is_file() else "" for p in sorted(out.parent.iterdir())}

assert attempt(sources[0]) == 0
rounds, turn = [], 1
start = time.monotonic()
assert attempt(sources[1]) == 0
seconds = time.monotonic() - start
assert attempt(sources[0]) == 0
random.seed(0)
for step in range(count):
    how = attempt(sources[turn], step=step) if mode == "steps" else attempt(
        sources[turn], seconds=seconds * random.uniform(0, 1.2))
    rounds.append((how, state()))
    if out.read_bytes() != (sources[0].parent / f"{1 - turn}.onnx").read_bytes():
        turn = 1 - turn
    if mode == "steps" and how == 0:
        break
print(json.dumps(rounds))
"""


def write(file: Path, seed: int) -> Path:
    tensors = {}
    text, x = "", "x"
    for layer in range(LAYERS):
        shape = (K, N) if layer % 2 == 0 else (N, K)
        stored = weight("int8", shape, shape[1:], seed=seed + layer)
        tensors |= {f"{name}{layer}": value for name, value in stored.items()}
        y = "y" if layer == LAYERS - 1 else f"y{layer}"
        text += f"d{layer} = DequantizeLinear(w{layer}, s{layer})  {y} = MatMul({x}, d{layer})  "
        x = y
    proto = model(f"(float[M,{K}] x) => (float[M,{K}] y) {{ {text} }}", **tensors)
    onnx.save(proto, file)
    return file


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two models, and what each of them compiles to under the name ``out.onnx``."""
    folder = tmp_path_factory.mktemp("pair")
    expected = []
    for i in range(2):
        source = write(folder / f"source{i}.onnx", seed=100 * i)
        there = folder / str(i)
        there.mkdir()
        msd_compiler.compile(source, there / "out.onnx", verify=False)
        shutil.copy(there / "out.onnx", folder / f"{i}.onnx")
        expected.append({p.name: p for p in there.iterdir()})
    return folder, expected


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def rounds_of(pair, out: Path, mode: str, count: int):
    folder, _ = pair
    command = [sys.executable, "-c", KILLS, folder / "source0.onnx", folder / "source1.onnx", out, mode, count]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_old_or_new(pair, rounds):
    _, files = pair
    wholes = [{name: digest(path) for name, path in whole.items()} for whole in files]
    for _, found in rounds:
        (whole,) = [w for w in wholes if w["out.onnx"] == found["out.onnx"]]
        assert whole.items() <= found.items()
        other = {n for w in wholes for n in w} | {"out.onnx"}  # in the instant between two renames: the other's data
        left = {name for name in found if name not in other}
        assert all(re.fullmatch(r"\.out\.\w+\.partial", name) for name in left)
        assert all(found[name] == w[name] for w in wholes for name in w if name in found and name != "out.onnx")


@posix
def test_killed_before_every_change_to_the_disk(pair, tmp_path):
    out = tmp_path / "out.onnx"
    rounds = rounds_of(pair, out, "steps", 60)
    assert_old_or_new(pair, rounds)
    how = [h for h, _ in rounds]
    assert how == ["killed"] * (len(how) - 1) + [0]
    assert len(how) > 5
    found = msd_compiler.session(out).run(None, {"x": activation((2, K))})[0]
    assert np.isfinite(found).all()


@posix
@pytest.mark.slow
def test_killed_at_random(pair, tmp_path):
    out = tmp_path / "out.onnx"
    rounds = rounds_of(pair, out, "random", 20)
    assert_old_or_new(pair, rounds)
    assert Counter(h for h, _ in rounds)["killed"] >= 10
    msd_compiler.session(out)


@posix
def test_a_later_run_clears_up(pair, tmp_path):
    """What a killed run left goes with the next one; a folder that somebody still writes to, or of another name, stays."""
    folder, expected = pair
    out = tmp_path / "out.onnx"
    rounds = rounds_of(pair, out, "steps", 3)
    assert any(name.endswith(".partial") for name in rounds[-1][1])
    others = [tmp_path / ".other.abcdefgh.partial", tmp_path / ".out.not-ours.partial"]
    for other in others:
        other.mkdir()
    msd_compiler.compile(folder / "source1.onnx", out, verify=False)
    assert {p.name for p in tmp_path.iterdir()} == {*expected[1], *(o.name for o in others)}


# --- no space ------------------------------------------------------------------------------------------------------


def run_msd(*arguments, limit=None, **options):
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.run(
        [sys.executable, "-m", "msd_compiler", *map(str, arguments)],
        capture_output=True,
        text=True,
        preexec_fn=limited if limit else None,
        timeout=120,
        **options,
    )


@posix
@pytest.mark.parametrize("limit", [100, 2**20, 24 * 2**20])
def test_file_size_limit(pair, tmp_path, limit):
    folder, expected = pair
    for file in expected[0].values():
        shutil.copy(file, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    done = run_msd("compile", folder / "source1.onnx", "-o", tmp_path / "out.onnx", "--no-verify", limit=limit)
    said = " ".join(done.stderr.split())
    assert (done.returncode, "File too large" in said, "Traceback" in said) == (2, True, False), said
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@posix
def test_limit_on_a_model_in_one_file(tmp_path):
    text = "(float[M,512] x) => (float[M,512] y) { d = DequantizeLinear(w, s)  y = MatMul(x, d) }"
    source = tmp_path / "m.onnx"
    onnx.save(model(text, **weight("int8", (512, 512), (512,))), source)
    done = run_msd("compile", source, "--no-verify", limit=2**16)
    assert (done.returncode, "File too large" in " ".join(done.stderr.split())) == (2, True)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


@posix
@pytest.mark.parametrize("limit", [1000, 5000, 9000])
def test_limit_reached_by_what_is_still_buffered(tmp_path, limit):
    """Closing the file fails as the write did; the folder goes all the same."""
    text = "(float[M,64] x) => (float[M,64] y) { d = DequantizeLinear(w, s)  y = MatMul(x, d) }"
    source = tmp_path / "m.onnx"
    onnx.save(model(text, **weight("int8", (64, 64), (64,))), source)
    script = """
import resource, sys, msd_compiler
from msd_compiler import api, errors
api.EMBED_UP_TO = 0
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    msd_compiler.compile(sys.argv[1], sys.argv[1] + ".out", verify=False)
except errors.OutputError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, source, str(limit)], capture_output=True, text=True, timeout=60
    )
    assert "File too large" in done.stdout, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def _may_mount() -> bool:
    try:
        return subprocess.run(["unshare", "-rm", "true"], capture_output=True, timeout=10).returncode == 0
    except OSError:
        return False


@posix
@pytest.mark.skipif(not _may_mount(), reason="no file systems may be mounted here")
def test_full_disk(pair, tmp_path):
    """On a file system of 30 MB the new result has no room beside the old one."""
    folder, _ = pair
    script = """
        mount -t tmpfs -o size=30m none "$1" && cp "$2"/0/* "$1" && ls -A "$1" && sha256sum "$1"/*
        "$3" -m msd_compiler compile "$2/source1.onnx" -o "$1/out.onnx" --no-verify; echo "status $?"
        ls -A "$1" && sha256sum "$1"/*
    """
    command = ["unshare", "-rm", "sh", "-c", script, "sh", tmp_path, folder, sys.executable]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=120)
    before, after = re.split(r"status 2\n", done.stdout)
    assert before.endswith(after)
    assert after.count("out.") >= 4
    assert "No space left on device" in " ".join(done.stderr.split())
