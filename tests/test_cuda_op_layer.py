"""The CUDA branch of the op files, without a GPU: what it checks, allocates, lays out and launches.

The extension is built with the emulated kernels in the place of CUDA's; they serve CPU tensors, and other test files
run over them. The emulated GPU is a tiny one, so that small problems reach every kernel.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cuda_emulator import build

from fusedloss import _build

MISSING = build.missing()
pytestmark = pytest.mark.skipif(MISSING != "", reason=MISSING or "not skipped")

# Test files, and which of their tests. The dtypes that are left out are the kernels' matter: test_cuda_emulator.py.
FILES = {
    "cross_entropy": "not float64 and not bfloat16 and not float16 and not does_not_exist",
    "semantics": "bfloat16",
    "mse_loss": "",
    "nll_loss": "not inductor",
    "autograd": "",
    # On the CPU a hand-over is no call of the backward pass; on CUDA the kernels decide.
    "grad_in_forward": "not the_way_that_is_taken",
    "inplace_backward": "",
    "modules": "",
    "opcheck": "",
    "bad_input": "not custom",  # no formula of one is compiled for these kernels
}


@pytest.fixture(scope="module")
def extension(emulator_folder: Path) -> Path:
    return build.build_extension(_build.csrc_directory(), emulator_folder)


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, extension: Path) -> dict[str, str]:
    """What pytest said of each file; "" where all is well. Two run at a time: together they take minutes."""

    def run(name: str) -> str:
        environment = {**os.environ, "FUSEDLOSS_TEST_EXTENSION": str(extension), "OMP_NUM_THREADS": "1"}
        if name in ("bad_input", "nll_loss"):  # else an index out of range fails a device assert
            environment["FUSEDLOSS_DEBUG"] = "1"
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-k", FILES[name]]
        path = Path(__file__).with_name(f"test_{name}.py")
        done = subprocess.run(
            [*command, str(path)], env=environment, cwd=request.config.rootpath, capture_output=True, text=True
        )
        return "" if done.returncode == 0 else done.stdout[-6000:] + done.stderr[-2000:]

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(FILES, pool.map(run, FILES), strict=True))


@pytest.mark.parametrize("name", FILES)
def test_over_the_emulated_kernels(name, outcomes):
    assert outcomes[name] == ""


@pytest.fixture
def run(extension, request):
    """Runs code over the emulated extension, and returns what it printed."""

    def run(code: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", f"import tests.conftest, torch, fusedloss, fusedloss._backend as b\n{code}"],
            env={**os.environ, "FUSEDLOSS_TEST_EXTENSION": str(extension)},
            cwd=request.config.rootpath,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_it_is_the_emulated_extension(extension, run):
    """That the files above ran over it."""
    assert run("print(b.extension().__file__, b.extension().with_cuda)").split() == [str(extension), "True"]


def test_a_loss_that_is_not_compiled_for_cuda(run):
    """As that of a user's expression, where the extension has CUDA kernels and nvcc is missing: no kernel is called."""
    code = """
_C, x, one = b.extension(), torch.ones(3), torch.ones(())
number = _C.add_pointwise_loss("mine", ["input", "target"], 1, 0)
assert _C.pointwise(number, [x, x], [], 1, None) is None
for call in (
    lambda: _C.pointwise_forward(number, [x, x], [], 1, None, False),
    lambda: _C.pointwise_backward(one, number, [x, x], [], 1, None, 1),
):
    try:
        call()
    except NotImplementedError as error:
        print(error)
"""
    assert run(code).count("mine: this loss is not compiled for the device of input") == 2
