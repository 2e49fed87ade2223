"""Results are bitwise identical from run to run and for any number of threads, and right on every instruction set."""

import os
import subprocess
import sys

import pytest
import torch

import fusedloss.functional as fused
from fusedloss import _backend

CASES = [
    ((1, 200_000), False),  # one row
    ((700, 1000), False),
    ((37, 5000), False),  # the forward pass keeps the exponentials in the gradient's memory
    ((5, 140_000), True),  # too many exponentials to keep
    ((4097, 33), True),
    ((2, 21, 3000), False),  # columns
    ((2, 2, 70_001), False),
    ((3, 1, 50_000), True),
    ((3, 700, 150), True),
]


def results(shape, probabilities, dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    input = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    if probabilities:
        target = torch.rand(shape, generator=generator).to(dtype)
    else:
        target = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=generator)
    weight = torch.rand(shape[1], generator=generator).to(dtype)
    found = []
    for options in ({}, {"weight": weight, "label_smoothing": 0.1}, {"reduction": "sum"}):
        loss = fused.cross_entropy(input, target, **options)
        found += [loss.detach(), *torch.autograd.grad(loss, input)]
    other = torch.randn(shape, generator=generator).to(dtype)
    loss = fused.mse_loss(input, other)
    return [*found, loss.detach(), *torch.autograd.grad(loss, input)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "probabilities"), CASES, ids=str)
def test_threads_do_not_change_a_bit(shape, probabilities, dtype):
    before = torch.get_num_threads()
    try:
        by_threads = []
        for threads in (1, 2, 3, 7, 2):
            torch.set_num_threads(threads)
            by_threads.append(results(shape, probabilities, dtype))
    finally:
        torch.set_num_threads(before)
    for other in by_threads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(by_threads[0], other, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "probabilities"), CASES, ids=str)
def test_runs_on_a_gpu_do_not_differ(shape, probabilities):
    generator = torch.Generator("cuda").manual_seed(7)
    input = torch.randn(shape, generator=generator, device="cuda").requires_grad_()
    target = torch.rand(shape, generator=generator, device="cuda")
    first, *others = ((loss := fused.cross_entropy(input, target), *torch.autograd.grad(loss, input)) for _ in range(3))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_an_unknown_instruction_set_is_refused():
    code = "import fusedloss._backend as b; b.extension().cpu_capability()"
    environment = {**os.environ, "FUSEDLOSS_CPU": "sse"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "ValueError: FUSEDLOSS_CPU is 'sse', expected portable, avx2 or avx512" in run.stderr


def test_an_instruction_set_that_the_processor_lacks_is_refused():
    choose = _backend.extension().choose_cpu_capability
    assert [choose("avx2", True, has_avx512) for has_avx512 in (False, True)] == ["avx2", "avx2"]
    with pytest.raises(RuntimeError, match=r"FUSEDLOSS_CPU is 'avx512', which this processor lacks, expected .* avx2"):
        choose("avx512", True, False)
    with pytest.raises(RuntimeError, match=r"FUSEDLOSS_CPU is 'avx2', which .* lacks, expected at most portable"):
        choose("avx2", False, False)


BEST = ["portable", "avx2", "avx512"]

# The tests of numerical results. The slowest comparisons of accuracy, which take as long as all the others, are left
# out. So are float16's, and tests of options (test_semantics.py), of torch's compiler, of fake tensors and of
# transforms, which call the same kernels.
LEFT_OUT = "is_as_exact_as_torchs and (float64 or torch.float16 or 50000 or 100001)"
LEFT_OUT += " or compile or functorch or fake or any_call"
KERNEL_TESTS = [
    f"tests/test_{name}.py"
    for name in (
        *("cross_entropy", "mse_loss", "nll_loss", "accuracy"),
        *("grad_in_forward", "inplace_backward", "bounds"),
    )
] + [
    "tests/test_determinism.py::test_threads_do_not_change_a_bit",
    *(
        f"tests/test_pointwise_losses.py::test_{name}"
        for name in ("sizes", "sums_over_blocks", "no_worse_than_torch", "extremes")
    ),
]


@pytest.mark.parametrize("capability", BEST)
def test_each_instruction_set(capability, request):
    """The kernels' tests also pass in a process that is told to use a lesser instruction set."""
    machine = _backend.extension().cpu_capability()
    if BEST.index(capability) > BEST.index(machine):
        pytest.skip(f"this machine has {machine}")
    if os.environ.get("FUSEDLOSS_CPU"):
        pytest.skip("FUSEDLOSS_CPU is set: this is the process that was told")
    if capability == machine:
        pytest.skip("every other test runs on it")
    environment = {**os.environ, "FUSEDLOSS_CPU": capability}
    code = "import fusedloss._backend as b; print(b.extension().cpu_capability())"
    root = request.config.rootpath
    seen = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True, check=True
    )
    assert seen.stdout.strip() == capability
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--tb=short", "-m", "not gpu", "-k", f"not ({LEFT_OUT})", *KERNEL_TESTS],
        env=environment, cwd=root, capture_output=True, text=True,
    )  # fmt: skip
    failed = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    assert run.returncode == 0, "\n".join([*failed, "...", run.stdout[-3000:], run.stderr[-1000:]])
