"""What all tests share: devices, and a fresh seed for every run, printed so that a failure can be repeated."""

import os
import random
import zlib
from collections.abc import Iterator

import pytest
import torch

SEED = int(os.environ.get("FUSEDLOSS_TEST_SEED", random.SystemRandom().randrange(2**31)))


def pytest_report_header() -> str:
    return f"FUSEDLOSS_TEST_SEED={SEED}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


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
