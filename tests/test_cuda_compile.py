"""The CUDA sources compile for every architecture they are meant for, without a warning. No GPU is needed for that."""

import subprocess
from pathlib import Path

import pytest

from fusedloss import _build

CSRC = _build.csrc_directory()
TOOLKIT = _build.find_toolkit()


@pytest.mark.skipif(TOOLKIT is None, reason="no CUDA toolkit with nvcc is found")
@pytest.mark.parametrize("source", sorted(CSRC.glob("cuda/*.cu")), ids=lambda path: path.name)
def test_compiles_without_warnings(source: Path, tmp_path: Path):
    missing = set(_build.ARCHITECTURES) - set(TOOLKIT.supported())
    if missing:
        pytest.skip(f"nvcc of CUDA {TOOLKIT.version} does not know the architectures {missing}")
    architectures = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in _build.ARCHITECTURES]
    warnings = ["-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror", "-Xptxas=-v,--warn-on-spills"]
    command = [TOOLKIT.nvcc, "-std=c++17", "-O3", f"-I{CSRC}", *warnings, *architectures, "--threads=2"]
    output = tmp_path / "kernels.o"
    run = subprocess.run([*map(str, command), "-c", str(source), "-o", str(output)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert output.stat().st_size > 0
    # Registers that did not fit, and arrays that were not kept in registers, go through memory.
    spilled = [
        line for line in run.stderr.splitlines() if "spill stores" in line and " 0 bytes spill stores" not in line
    ]
    assert not spilled, spilled[:5]


@pytest.mark.skipif(TOOLKIT is None, reason="no CUDA toolkit with nvcc is found")
def test_a_warning_fails(tmp_path: Path):
    source = tmp_path / "warned.cu"
    source.write_text("__global__ void kernel(int* p) { int unused; *p = 0; }\n")
    command = [str(TOOLKIT.nvcc), "-Werror=all-warnings", "-arch=sm_80", "-c", str(source), "-o", str(tmp_path / "o.o")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode != 0 and "unused" in run.stderr


@pytest.mark.parametrize("folder", ["cpu", "cuda", "formulas"])
def test_kernels_do_not_know_torch(folder: str):
    """The wall that keeps a kernel's compile at seconds."""
    for path in [*CSRC.glob(f"{folder}/*"), CSRC / "options.h"]:
        for line in path.read_text().splitlines():
            if line.startswith("#include"):
                assert not any(word in line for word in ("torch/", "ATen/", "c10/", "pybind11/")), f"{path}: {line}"
