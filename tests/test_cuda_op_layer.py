"""The CUDA branch of the op files, without a GPU: what it checks, allocates, lays out and launches.

The extension is built with the emulated kernels in the place of CUDA's; they serve CPU tensors, and other test files
run over them. The emulated GPU is a tiny one, so that small problems reach every kernel.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

import pytest
from cuda_emulator import build

from fusedloss import _build

MISSING = build.missing()
pytestmark = pytest.mark.skipif(MISSING != "", reason=MISSING or "not skipped")

FLOAT32 = "not float64 and not bfloat16 and not float16"
# Test files, and which of their tests run. The dtypes that are left out are tested by test_cuda_emulator.py.
FILES = {
    "cross_entropy": f"{FLOAT32} and not does_not_exist",
    "semantics": "bfloat16",
    "mse_loss": FLOAT32,
    "nll_loss": f"{FLOAT32} and not inductor",
    "autograd": "not second_derivatives",  # torch computes those
    # On the CPU, no call of the backward pass shows that a gradient was ready. On CUDA, the kernels decide.
    "grad_in_forward": "not the_way_that_is_taken and not float64",
    "inplace_backward": "",
    "modules": "",
    "opcheck": "not composed",  # torch computes the composed gradients
    "bad_input": "not custom",  # no formula of one is compiled for these kernels
}
# In these, a class index out of range would otherwise fail a device-side assertion, and end the process.
DEBUG = ("bad_input", "nll_loss")
# One process for each list: starting Python and torch, and collecting the tests, takes some 10 s.
PROCESSES = [[name for name in FILES if name not in DEBUG], list(DEBUG)]


@pytest.fixture(scope="module")
def extension(emulated_kernels: Path) -> Path:
    return build.build_extension(_build.csrc_directory(), emulated_kernels)


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, extension: Path, tmp_path_factory: pytest.TempPathFactory):
    """For each file, how many tests passed, and what pytest printed about those that did not."""

    def run(names: list[str]) -> dict[str, tuple[int, str]]:
        environment = {**os.environ, "FUSEDLOSS_TEST_EXTENSION": str(extension), "OMP_NUM_THREADS": "1"}
        if names[0] in DEBUG:
            environment["FUSEDLOSS_DEBUG"] = "1"
        report = tmp_path_factory.mktemp("report") / "report.xml"
        chosen = [f"(test_{name}.py and ({FILES[name]}))" if FILES[name] else f"test_{name}.py" for name in names]
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={report}"]
        paths = [str(Path(__file__).with_name(f"test_{name}.py")) for name in names]
        done = subprocess.run(
            [*command, "-k", " or ".join(chosen), *paths],
            env=environment,
            cwd=request.config.rootpath,
            capture_output=True,
            text=True,
        )
        printed = done.stdout[-6000:] + done.stderr[-2000:]
        if not report.exists() or done.returncode > 1:  # 1 says that some tests failed
            return dict.fromkeys(names, (0, printed))
        cases = {name: [] for name in names}
        for case in ElementTree.parse(report).iter("testcase"):
            cases[case.get("classname", "").rpartition(".test_")[2]].append({child.tag for child in case})
        return {
            name: (sum(not tags for tags in found), printed if any(tags - {"skipped"} for tags in found) else "")
            for name, found in cases.items()
        }

    with ThreadPoolExecutor(len(PROCESSES)) as pool:
        return {name: outcome for part in pool.map(run, PROCESSES) for name, outcome in part.items()}


@pytest.mark.parametrize("name", FILES)
def test_over_the_emulated_kernels(name, outcomes):
    passed, complaint = outcomes[name]
    assert complaint == "" and passed > 0


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
