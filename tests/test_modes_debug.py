"""`fusedloss.debug`, which makes the losses check class indices on the host."""

from collections.abc import Iterator

import pytest
import torch
from helpers.graphs import CLASSES, given
from helpers.modes import assert_step, run_python
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fusedloss
import fusedloss.functional as fused
from fusedloss import _backend

# ---- debug ----


def conversions(target: Tensor) -> int:
    """How often a forward pass converts a tensor. `target.cpu()` in the check on the host is a conversion too."""
    logits = torch.zeros(*target.shape, CLASSES, device=target.device)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        fused.cross_entropy(logits, target)
    return sum(event.name == "aten::to" for event in profiler.events())


@pytest.fixture
def undo_debug() -> Iterator[None]:
    before = _backend._debug
    yield
    fusedloss.debug(before)


def test_debug_is_switched_on_and_off(undo_debug, device):
    target = torch.zeros(4, dtype=torch.int64, device=device)
    fusedloss.debug(False)
    without = conversions(target)
    fusedloss.debug()
    assert [conversions(target) for _ in range(2)] == [without + 1] * 2  # the check runs in every forward pass
    fusedloss.debug(False)
    assert conversions(target) == without


@pytest.mark.parametrize("enabled", [True, False])
def test_messages_of_the_check(enabled, undo_debug, device):
    if device == "cuda" and not enabled:
        pytest.skip("a device-side assertion, after which no other test could run")
    fusedloss.debug(enabled)
    logits, target = torch.randn(6, CLASSES, 4, device=device), torch.randint(0, CLASSES, (6, 4), device=device)
    target[0] = -1
    fused.cross_entropy(logits, target, ignore_index=-1)
    target[3, 2], target[5, 0] = CLASSES, -100
    for options in ({"ignore_index": -1}, {"ignore_index": -1, "label_smoothing": 0.1, "reduction": "none"}):
        with pytest.raises(
            IndexError, match=r"target\[3, 2\] is 7, expected a class index in \[0, 7\) or ignore_index -1"
        ):
            fused.cross_entropy(logits, target, **options)
    # The same check in the op that a dispatch mode or the compiler calls.
    with pytest.raises(IndexError, match=r"target\[3, 2\] is 7"):
        torch.ops.fusedloss.cross_entropy_forward(logits, target, None, 1, -1, 0.0, False)
    # Probabilities are not checked, and valid indices are accepted.
    assert_step("probabilities", fused.cross_entropy, *given("probabilities", device)[:2])
    assert_step("indices", fused.cross_entropy, *given("indices", device)[:2])


def test_a_module_that_is_loaded_later_is_told(undo_debug, monkeypatch):
    """Debugging may be switched on before the extension is loaded, or by the environment."""

    class Module:
        enabled = False

        def set_debug(self, enabled: bool) -> None:
            self.enabled = enabled

    monkeypatch.setattr(_backend, "_module", None)
    for enabled in (True, False):
        fusedloss.debug(enabled)
        _backend.use(module := Module())
        assert module.enabled is enabled
        monkeypatch.setattr(_backend, "_module", None)


def test_the_environment_switches_debug():
    script = """
        import torch, fusedloss.functional
        from torch.profiler import ProfilerActivity, profile

        def conversions():
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                fusedloss.functional.cross_entropy(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))
            return sum(event.name == "aten::to" for event in profiler.events())

        with_check = conversions()
        fusedloss.debug(False)
        print(with_check - conversions())
    """
    assert run_python(script, FUSEDLOSS_DEBUG="1") == ["1"]
