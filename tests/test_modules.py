"""The modules can replace torch's: they have the same class, arguments and state, and give the same in examples."""

import copy
import inspect
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusedloss
import fusedloss.functional as fused

MODULES = [(fusedloss.CrossEntropyLoss, nn.CrossEntropyLoss), (fusedloss.MSELoss, nn.MSELoss)]


def described(function: Callable) -> list[tuple]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def without_our_own(function: Callable) -> list[tuple]:
    """The parameters except `inplace_backward`, which torch does not have. It is keyword-only and off by default."""
    own = ("inplace_backward", inspect.Parameter.KEYWORD_ONLY, False)
    return [parameter for parameter in described(function) if parameter != own]


@pytest.mark.parametrize(("ours", "torchs"), MODULES)
def test_signatures_are_torchs(ours, torchs):
    assert issubclass(ours, torchs)
    for method in ("__init__", "forward"):
        assert without_our_own(getattr(ours, method)) == described(getattr(torchs, method))


@pytest.mark.parametrize("name", ["cross_entropy", "mse_loss"])
def test_functions_have_torchs_signatures(name):
    assert without_our_own(getattr(fused, name)) == described(getattr(F, name))


def test_state_copies_and_repr():
    weight = torch.rand(5)
    ours = fusedloss.CrossEntropyLoss(weight=weight, ignore_index=3, reduction="sum", label_smoothing=0.1)
    torchs = nn.CrossEntropyLoss(weight=weight, ignore_index=3, reduction="sum", label_smoothing=0.1)
    assert repr(ours) == repr(torchs)
    assert ours.state_dict().keys() == torchs.state_dict().keys()
    logits, target = torch.randn(7, 5), torch.randint(0, 5, (7,))
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(logits, target), ours(logits, target))
    torch.testing.assert_close(ours(logits, target), torchs(logits, target))
    assert ours.double().weight.dtype == torch.float64
    torch.testing.assert_close(ours(logits.double(), target), torchs.double()(logits.double(), target))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", ["CrossEntropyLoss", "MSELoss"])
def test_torchscript(name):
    """TorchScript compiles torch's own function."""
    logits = torch.randn(7, 5)
    target = torch.randint(0, 5, (7,)) if name == "CrossEntropyLoss" else torch.randn(7, 5)
    expected = getattr(nn, name)()(logits, target)
    with fusedloss.patch():
        for module in (fusedloss, nn):
            torch.testing.assert_close(torch.jit.script(getattr(module, name)())(logits, target), expected)


@pytest.mark.parametrize("size_average", [None, True, False])
@pytest.mark.parametrize("reduce", [None, True, False])
@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")
def test_deprecated_arguments(size_average, reduce):
    logits, target = torch.randn(7, 5), torch.randint(0, 5, (7,))
    options = {"size_average": size_average, "reduce": reduce}
    torch.testing.assert_close(
        fusedloss.CrossEntropyLoss(**options)(logits, target), nn.CrossEntropyLoss(**options)(logits, target)
    )
    torch.testing.assert_close(
        fusedloss.MSELoss(**options)(logits, logits + 1), nn.MSELoss(**options)(logits, logits + 1)
    )
    for name, second in (("cross_entropy", target), ("mse_loss", logits.flip(0))):
        torch.testing.assert_close(
            getattr(fused, name)(logits, second, reduction="none", **options),
            getattr(F, name)(logits, second, reduction="none", **options),
        )


# ---- the usual examples of tutorials ----


def test_tutorial_mse():
    predicted, actual = torch.tensor([2.5, 0.0, 2.1]), torch.tensor([3.0, -0.5, 2.0])
    assert fusedloss.MSELoss()(predicted, actual).item() == pytest.approx(0.17, abs=1e-6)


def test_tutorial_cross_entropy():
    logits, labels = torch.tensor([[1.0, 2.0, 1.2], [1.5, 0.5, 2.1]]), torch.tensor([1, 2])
    # By hand: the mean of log(sum(exp(row))) - row[label].
    by_hand = (torch.log(torch.exp(logits[0]).sum()) - 2.0 + torch.log(torch.exp(logits[1]).sum()) - 2.1).item() / 2
    assert fusedloss.CrossEntropyLoss()(logits, labels).item() == pytest.approx(by_hand, rel=1e-6)
    assert fusedloss.CrossEntropyLoss()(logits, labels).item() == pytest.approx(
        nn.CrossEntropyLoss()(logits, labels).item(), rel=1e-6
    )


class MeanAbsoluteError(nn.Module):
    """A loss that a user has written."""

    def forward(self, predicted, actual):
        return torch.mean(torch.abs(predicted - actual))


def test_a_custom_loss_trains_beside_them():
    predicted, actual = torch.tensor([2.5, 0.0, 2.1]), torch.tensor([3.0, -0.5, 2.0])
    assert MeanAbsoluteError()(predicted, actual).item() == pytest.approx(0.3667, abs=1e-4)

    curves = []
    for mse, ce in ((fusedloss.MSELoss(), fusedloss.CrossEntropyLoss()), (nn.MSELoss(), nn.CrossEntropyLoss())):
        torch.manual_seed(5)
        inputs, labels, values = torch.randn(64, 8), torch.randint(0, 4, (64,)), torch.randn(64, 1)
        body, classes, value = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(16, 1)
        parameters = [p for layer in (body, classes, value) for p in layer.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        curve = []
        for _ in range(20):
            optimizer.zero_grad()
            hidden = torch.tanh(body(inputs))
            loss = ce(classes(hidden), labels) + mse(value(hidden), values) + MeanAbsoluteError()(value(hidden), values)
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(curve)
    assert curves[0][-1] < curves[0][0]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
