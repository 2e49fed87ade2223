"""The losses in forked processes, in the workers of a data loader and in several threads."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.graphs import CLASSES, KINDS, given
from helpers.modes import assert_step, functions, is_fused, run_python, send_one, step
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import fusedloss.functional as fused

# ---- processes and threads ----


def results(seed: int, rows: int = 64, classes: int = 33) -> tuple[Tensor, ...]:
    """Losses and gradients of arguments that are drawn with this seed."""
    generator = torch.Generator().manual_seed(seed)
    input = torch.randn(rows, classes, generator=generator).requires_grad_()
    target = torch.randint(0, classes, (rows,), generator=generator)
    other = torch.randn(rows, classes, generator=generator)
    losses = (
        fused.cross_entropy(input, target),
        fused.cross_entropy(input, other.softmax(1), label_smoothing=0.1),
        fused.mse_loss(input, other),
    )
    assert all(map(is_fused, losses))
    return *(loss.detach() for loss in losses), *torch.autograd.grad(sum(losses), input)


class Scored(Dataset):
    """A dataset whose items are losses and gradients, computed by the worker that loads the item."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, seed: int) -> tuple[int, int, tuple[Tensor, ...]]:
        return seed, os.getpid(), results(seed)


def use_data_loader_workers() -> None:
    before = results(0, 2048, 512)  # starts the threads of this process
    loader = DataLoader(Scored(), batch_size=3, num_workers=2, timeout=120, multiprocessing_context="fork")
    seen, workers = [], set()
    for seeds, pids, batches in loader:
        for i, seed in enumerate(seeds.tolist()):
            for found, expected in zip(batches, results(seed), strict=True):
                assert torch.equal(found[i], expected)
            seen.append(seed)
        workers.update(pids.tolist())
        logits, target, _ = given("indices", "cpu", 9, CLASSES)
        assert_step("indices", fused.cross_entropy, logits, target)  # this process computes too, between batches
    assert sorted(seen) == list(range(12)) and len(workers) == 2 and os.getpid() not in workers
    assert all(map(torch.equal, before, results(0, 2048, 512)))
    print("done")


def test_data_loader_workers():
    """The process hides the GPUs: with threads for them, autograd refuses to work in a fork."""
    script = "import test_modes_processes; test_modes_processes.use_data_loader_workers()"
    assert run_python(script, CUDA_VISIBLE_DEVICES="") == ["done"]


FORK = """
    import os, signal, sys, warnings
    warnings.simplefilter("ignore")
    import torch, torch.nn.functional as F
    import fusedloss.functional as fused

    def child_gives_the_same(library, name, shape, seconds, threads=None):
        x = torch.randn(shape, requires_grad=True)
        target = torch.randn(shape) if name == "mse_loss" else torch.zeros(shape[0], dtype=torch.int64)
        expected = getattr(library, name)(x, target)
        expected.backward()
        again = x.detach().requires_grad_()
        pid = os.fork()
        if pid == 0:  # computes nothing else, because the rest of torch may hang as well
            signal.alarm(seconds)  # ends the child where it hangs
            same = False
            try:
                if threads is not None:
                    torch.set_num_threads(threads)
                loss = getattr(library, name)(again, target)
                loss.backward()
                same = torch.equal(loss, expected) and torch.equal(again.grad, x.grad)
            finally:
                os._exit(0 if same else 7)
        return os.waitpid(pid, 0)[1] == 0

    torch.set_num_threads(2)
    x, target = torch.randn(4096, 512, requires_grad=True), torch.zeros(4096, dtype=torch.int64)
    for library in (F, fused):
        library.cross_entropy(x, target).backward()  # the threads of this process have started
    for name in ("cross_entropy", "mse_loss"):
        print(child_gives_the_same(fused, name, (64, 100), 60))
        print(child_gives_the_same(fused, name, (4096, 512), 60, threads=1))
        shape = (1, 30000)
        print(not child_gives_the_same(F, name, shape, 5) or child_gives_the_same(fused, name, shape, 60))
"""


def test_a_forked_child():
    """GNU OpenMP's threads do not survive a fork, so torch's losses may hang. Where they work, ours work too."""
    assert run_python(FORK, CUDA_VISIBLE_DEVICES="") == ["True"] * 6


def test_threads_of_python():
    seeds = list(range(24))
    alone = [results(seed, 128, 300) for seed in seeds]
    for workers in (2, 8):
        with ThreadPoolExecutor(workers) as pool:
            together = list(pool.map(lambda seed: results(seed, 128, 300), seeds))
        for found, expected in zip(together, alone, strict=True):
            assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_for_several_threads(kind, device):
    ours, _, _ = functions(kind)
    input, target, options = given(kind, device, 200, CLASSES)
    send_one()
    expected = step(ours, input, target, torch.ones((), device=device), **options)[1]
    leaf = input.requires_grad_()
    loss = ours(leaf, target, **options)
    with ThreadPoolExecutor(8) as pool:
        grads = list(pool.map(lambda _: torch.autograd.grad(loss, leaf, retain_graph=True)[0], range(32)))
    assert all(torch.equal(grad, expected) for grad in grads)
    assert len({grad.data_ptr() for grad in grads}) == len(grads)  # each thread has its own gradient


def test_autocast_is_of_one_thread():
    input, target, _ = given("indices", "cpu", dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16), ThreadPoolExecutor(1) as pool:
        assert pool.submit(fused.cross_entropy, input, target).result().dtype == torch.bfloat16
        assert fused.cross_entropy(input, target).dtype == torch.float32
