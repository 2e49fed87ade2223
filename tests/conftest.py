"""What all tests share: the devices, and a fresh seed for each run, printed so that a failure can be repeated."""

import importlib.util
import os

# `make test` runs two processes on two cores, each with two OpenMP threads. By default a thread spins while it waits
# for work, which takes a core from the other process. With threads that sleep, four test files took 22 s instead of
# 82 s. OpenMP reads this variable when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import random
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fusedloss import _backend, _build

pytest.register_assert_rewrite("helpers")
pytest_plugins = ["helpers.custom"]  # has the fixture custom_loss_folder

# The tests can run with another build of the extension. tests/test_cuda_op_layer.py makes one.
if path := os.environ.get("FUSEDLOSS_TEST_EXTENSION"):
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    _backend.use(module)

# The seed is in the environment so that the processes that pytest-xdist and the tests start use it too.
SEED = int(os.environ.setdefault("FUSEDLOSS_TEST_SEED", str(random.SystemRandom().randrange(2**31))))


# These files take longest. They start first, so that both processes finish at about the same time.
LONGEST_FIRST = ("cuda_compile", "cuda_emulator", "cuda_op_layer", "determinism", "notebooks", "packaging", "jit")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU, deselect the tests that need one, which is faster than skipping each of them."""
    if not torch.cuda.is_available():
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("gpu")])
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    order = {f"test_{name}": place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_report_header() -> str:
    return f"FUSEDLOSS_TEST_SEED={SEED}"


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(SEED + zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def emulator_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which tests/cuda_emulator keeps what it compiles, under a hash of the sources."""
    cache = getattr(request.config, "cache", None)
    return cache.mkdir("cuda_emulator") if cache else tmp_path_factory.mktemp("cuda_emulator")


@pytest.fixture(scope="session")
def emulated_kernels(emulator_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of the emulated kernels, with every bug of planted_bugs.py in it, inactive. All tests share it."""
    from cuda_emulator import build, planted_bugs  # not on the path where another process imports tests.conftest

    csrc = _build.csrc_directory()
    copy = tmp_path_factory.mktemp("planted") / "csrc"
    planted_bugs.plant(csrc, copy, planted_bugs.all_bugs(csrc))
    return build.build(copy, emulator_folder)
