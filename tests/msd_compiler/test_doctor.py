"""What `msd doctor` finds: a machine in order, and each thing that can be wrong with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest

from msd_compiler import cli, doctor, library_path, runtime


@pytest.fixture(autouse=True)
def no_choice(monkeypatch):
    monkeypatch.delenv("MSD_ISA", raising=False)


def words(diagnosis: doctor.Diagnosis) -> str:
    return "; ".join(problem.what for problem in diagnosis.problems)


def test_in_order():
    found = doctor.examine()
    assert found.usable, words(found)
    assert found.onnxruntime == onnxruntime.__version__
    assert found.onnxruntime_supported
    assert found.library == doctor.Library(path=str(library_path()), loads=True, registers=True, runs=True)
    assert found.instruction_sets[-1] == "scalar"
    assert (found.used, found.why) == (found.instruction_sets[0], "the best of this machine")
    assert 1 <= found.threads.process <= found.threads.machine


def msd_doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, where the library reads the environment for the first time."""
    command = [sys.executable, "-m", "msd_compiler", "doctor", *arguments]
    variables = os.environ | environment | {"COLUMNS": "80"}
    return subprocess.run(
        command, env=variables, capture_output=True, text=True, check=False, cwd=Path(cli.__file__).parents[1]
    )


def test_chosen_by_the_user():
    done = msd_doctor("--json", MSD_ISA="scalar")
    assert done.returncode == 0, done.stderr
    found = doctor.Diagnosis.model_validate_json(done.stdout)
    assert (found.used, found.why) == ("scalar", "the environment variable MSD_ISA")
    assert found.library.runs


def test_chosen_and_not_there():
    done = msd_doctor(MSD_ISA="avx3")
    assert done.returncode == 1
    assert "MSD_ISA is 'avx3', and this machine runs" in " ".join(done.stdout.split())
    assert "the native library cannot be used" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def missing() -> Path:
    raise FileNotFoundError("libmsd_ops.so is not in '/nowhere'")


def run_doctor(monkeypatch, capsys, *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["msd", "doctor", *arguments])
    try:
        cli.main()
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    return status, capsys.readouterr().out


def test_no_library(monkeypatch, capsys):
    monkeypatch.setattr(runtime, "library_path", missing)
    status, out = run_doctor(monkeypatch, capsys, "--json")
    found = json.loads(out)
    assert status == 1
    assert found["library"] == {"path": None, "loads": False, "registers": False, "runs": False}
    assert found["used"] is None
    assert [p["fatal"] for p in found["problems"]] == [True]
    assert "/nowhere" in found["problems"][0]["what"]


def test_broken_library(monkeypatch, capsys, tmp_path):
    broken = tmp_path / "libmsd_ops.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(runtime, "library_path", lambda: broken)
    status, out = run_doctor(monkeypatch, capsys)
    assert status == 1
    assert "does not load, does not register, does not run" in out
    assert "the system does not load the native library" in out


def test_old_runtime(monkeypatch):
    monkeypatch.setattr(onnxruntime, "__version__", "1.19.2")
    found = doctor.examine()
    assert not found.onnxruntime_supported
    assert not found.usable
    assert words(found).startswith("onnxruntime 1.19.2 is too old: 1.20 or later is needed")


def test_fewer_cpus_than_the_machine_has(monkeypatch):
    monkeypatch.setattr(doctor, "count_threads", lambda: doctor.Threads(machine=8, process=8, quota=1.5))
    found = doctor.examine()
    assert found.usable
    assert words(found) == (
        "this process may use 2 of 8 CPUs, and onnxruntime counts those of the machine: "
        "open sessions with intra_op_num_threads=2"
    )
