"""The script behind `make gpu`: its steps, its summary and its time limits."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import kernels, suites, sweep

ROOT = Path(__file__).resolve().parent.parent


# The script -----------------------------------------------------------------------------------------------------------

STUB = r"""#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$CALLS"
[[ "$*" == *"${HANGS:-nothing}"* ]] && {
    trap 'echo interrupted, and printed what there is; exit 1' INT
    for _ in {1..300}; do sleep 0.1; done
}
[[ "$*" == *"$FAILS"* && ${FAILED_PRINTS:-} ]] && case "$*" in
    -c*) exit 0 ;;
    *"-m pytest"*) printf 'a line of noise\nFAILED tests/test_a.py::test_b - AssertionError\n' ;;
    *racecheck*) printf 'a line of noise\n========= Error: Race reported between\n========= RACECHECK SUMMARY: 1\n' ;;
    *representative*) printf 'a line of noise\nwrong: problem: gradient error 3\n' ;;
    *--suite*) echo lines of a case ;;
esac
case "$*" in
    -c*xdist*) exit 1 ;;
    *setup.py*) echo built ;;
    *"$FAILS"*) echo broken; exit 3 ;;
    *) echo "end of ${*: -1}" ;;
esac
"""


def run_script(
    tmp_path: Path, *steps: str, fails: str = "nothing", **environment: str
) -> tuple[subprocess.CompletedProcess, list[str]]:
    """The script's result and its calls, with stubs for every program that it calls."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("python", "nvidia-smi", "nvcc", "compute-sanitizer", "ncu"):
        (tools / tool).write_text(STUB)
        (tools / tool).chmod(0o755)
    calls = tmp_path / "calls"
    stubs = {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": str(tools / "python")}
    done = subprocess.run(
        ["bash", ROOT / "benchmarks" / "gpu.sh", tmp_path / "out", *steps],
        env={**os.environ, **stubs, "CALLS": str(calls), "FAILS": fails, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done, calls.read_text().splitlines() if calls.exists() else []


def outcomes(done: subprocess.CompletedProcess) -> dict[str, str]:
    """The outcome of each step in the summary."""
    lines = done.stdout.partition("== summary\n")[2].splitlines()
    matched = [re.fullmatch(r"(.*?) +\d+s  (\w+)(: .*)?", line) for line in lines]
    assert all(matched), lines
    return {match[2]: match[1] for match in matched if match}


STEPS = [
    "build", "representative", "kernels", "goals", "sweep", "profile", "bench", "memcheck", "racecheck", "initcheck",
    "synccheck", "test", "test_compiler", "test_large",
]  # fmt: skip
FIRST = ["build", "representative", "kernels", "goals", "sweep", "profile", "memcheck", "racecheck", "test"]


@pytest.mark.parametrize(
    ("asked_for", "steps"),
    [
        (["all"], STEPS),
        ([], FIRST),
        (["first"], FIRST),
        (["second"], ["build", "representative", "kernels", "bench"]),
        (["second", "synccheck"], ["build", "representative", "kernels", "bench", "synccheck"]),
    ],
    ids=str,
)
def test_steps_run_and_are_summed_up(asked_for: list[str], steps: list[str], tmp_path: Path) -> None:
    done, calls = run_script(tmp_path, *asked_for)
    assert done.returncode == 0, done.stdout + done.stderr
    assert outcomes(done).keys() == set(steps) and set(outcomes(done).values()) == {"passed"}
    assert not any("setup.py" in call for call in calls), "what is prebuilt is taken"
    assert not any("-n 8" in call for call in calls)  # without xdist
    # Measurements run first, and alone: later steps begin after they have ended.
    timed = [place for place, call in enumerate(calls) if re.search("kernels|--suite|sweep", call)]
    beside = [place for place, call in enumerate(calls) if re.search("compute-sanitizer|-m pytest", call)]
    assert timed and (not beside or max(timed) < min(beside))
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written >= {"output.txt", *(f"{name}.log" for name in steps)}
    assert (tmp_path / "out" / "output.txt").read_text() == done.stdout


def test_without_a_prebuilt_extension_it_is_built(tmp_path: Path) -> None:
    done, calls = run_script(tmp_path, "build", fails="fusedloss.describe")
    assert outcomes(done) == {"build": "passed"} and sum("setup.py" in call for call in calls) == 1


def test_a_step_that_fails_stops_none_and_fails_the_whole(tmp_path: Path) -> None:
    done, calls = run_script(tmp_path, "representative", "bench", fails="-m benchmarks.representative --device")
    assert done.returncode == 1
    assert outcomes(done) == {"representative": "failed (3)", "bench": "passed"}
    assert "== representative: failed (3)\nbroken\n" in done.stdout
    assert not any("setup.py" in call or "-m pytest" in call for call in calls)


def test_what_matters_of_a_steps_output_is_shown(tmp_path: Path) -> None:
    done, _ = run_script(tmp_path, "test", "racecheck", "goals", "representative", fails="-m", FAILED_PRINTS="1")
    assert set(outcomes(done).values()) == {"failed (3)"}
    for shown in (
        "== test: failed (3)\nFAILED tests/test_a.py::test_b - AssertionError\nbroken\n",
        "== racecheck: failed (3)\n========= Error: Race reported between\n",
        "== representative: failed (3)\nwrong: problem: gradient error 3\n",
        "\nlines of a case\n",
    ):
        assert shown in done.stdout
    assert "a line of noise" not in done.stdout


def test_a_step_is_interrupted_at_its_limit_and_the_next_one_runs(tmp_path: Path) -> None:
    done, _ = run_script(tmp_path, "kernels", "sweep", KERNELS_SECONDS="1", HANGS="benchmarks.kernels")
    assert outcomes(done) == {"kernels": "ended at 1s", "sweep": "passed"} and done.returncode == 1
    assert "interrupted, and printed what there is" in done.stdout


def test_what_is_left_of_the_time_in_all_limits_a_step(tmp_path: Path) -> None:
    done, calls = run_script(tmp_path, "kernels", "sweep", SECONDS_IN_ALL="6", HANGS="benchmarks.kernels")
    assert re.fullmatch("ended at [56]s", outcomes(done)["kernels"]) and outcomes(done)["sweep"] == "skipped"
    assert not any("sweep" in call for call in calls)


def test_without_a_gpu_nothing_runs(tmp_path: Path) -> None:
    done, calls = run_script(tmp_path, fails="is_available")
    assert done.returncode == 1 and done.stdout.endswith("gpu.sh: torch sees no GPU\n")
    assert not any("setup.py" in call or "-m" in call.split() for call in calls)


def test_the_documents_name_every_step() -> None:
    document = (ROOT / "docs" / "benchmarks.md").read_text()
    assert [step for step in STEPS if f"`{step}`" not in document] == []


def test_make_gpu_runs_the_script() -> None:
    arguments = ["make", "--no-print-directory", "-n", "gpu", "STEPS=second test", "OUT=folder", "PYTHON=python9"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "PYTHON=python9 bash benchmarks/gpu.sh folder second test\n"


def test_an_unknown_step_is_one_sentence(tmp_path: Path) -> None:
    done, calls = run_script(tmp_path, "biuld")
    assert done.returncode == 2 and not calls
    assert done.stderr.startswith("gpu.sh: biuld is not one of: first second all build representative kernels")


def test_the_script_runs_on_the_cpu_too(tmp_path: Path) -> None:
    """No stubs here: the real programs run, at tiny sizes."""
    out = tmp_path / "out"
    done = subprocess.run(
        ["bash", ROOT / "benchmarks" / "gpu.sh", out, "representative", "kernels", "goals", "sweep", "memcheck"],
        env={**os.environ, "DEVICE": "cpu", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=180,
    )
    found = outcomes(done)
    if not hasattr(sweep._backend.extension(), "set_cuda_tuning"):
        assert found.pop("sweep") == "failed (1)" and "no set_cuda_tuning" in done.stdout
    assert found == {**dict.fromkeys(found, "passed"), "memcheck": "skipped"}, done.stdout + done.stderr
    assert "representative: passed\n15 of 15 problems on cpu, 0 of " in done.stdout
    assert "cross_entropy 3x40 bf16: " in done.stdout and "cross_entropy_forward_with_grad " in done.stdout
    for name in ("kernels.jsonl", "goals.jsonl"):
        assert len((out / name).read_text().splitlines()) >= len(kernels.cases())
    assert len(json.loads((out / "goals.json").read_text())["figures"]) >= 3 * len(suites.goals())
    assert (out / "goals.png").stat().st_size > 10_000
    assert len(done.stdout) < 10_000


def test_files_of_tests_that_need_what_is_missing_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "test_here.py").write_text("def test(): pass\n")
    (tmp_path / "test_left_out.py").write_text("import no_such_package\n")

    def run() -> subprocess.CompletedProcess:
        arguments = ["-p", "benchmarks.leave_out", "-p", "no:cacheprovider", "-c", os.devnull, "-ra", tmp_path]
        return subprocess.run(
            [sys.executable, "-m", "pytest", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
        )

    done = run()
    assert done.returncode == 0, done.stdout
    assert "no_such_package is not installed" in done.stdout and "1 passed, 1 skipped" in done.stdout
    (tmp_path / "test_ours.py").write_text("import fusedloss.no_such_module\n")
    assert "1 error" in run().stdout
