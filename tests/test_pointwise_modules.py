"""The pointwise losses as modules, in TorchScript, in place of torch's, and under torch.compile."""

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from helpers.graphs import losses_in
from helpers.pointwise import CASES, MODULES, Case, every_case, leaves, reductions
from torch import Tensor, nn
from torch._dynamo.testing import AotEagerAndRecordGraphs

import fusedloss

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides", "ignore:Using a target size")


# ---- modules ----


def module_of(case: Case, library: Any, operands: dict[str, Tensor], **options: Any) -> nn.Module:
    weights = {operand: x for operand, x in operands.items() if operand in ("weight", "pos_weight")}
    return getattr(library, MODULES[case.function])(**weights, **case.options, **options)


def of_module(operands: dict[str, Tensor]) -> list[Tensor]:
    return [x for operand, x in operands.items() if operand not in ("weight", "pos_weight")]


@every_case
def test_modules(name, device):
    case = CASES[name]
    for reduction in reductions(case):
        operands = case.draw((4, 3), device=device)
        ours, torchs = (module_of(case, library, operands, reduction=reduction) for library in (fusedloss, nn))
        assert isinstance(ours, type(torchs)) and repr(ours) == repr(torchs)
        assert list(ours.state_dict()) == list(torchs.state_dict())
        ours.load_state_dict(torchs.state_dict())
        assert inspect.signature(type(ours)) == inspect.signature(type(torchs))
        assert list(inspect.signature(ours.forward).parameters) == list(inspect.signature(torchs.forward).parameters)
        args = of_module(operands)
        expected = case.ours(operands, reduction=reduction)
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        for module in (
            ours,
            copy.deepcopy(ours),
            pickle.loads(pickle.dumps(ours)),
            torch.load(file, weights_only=False),
        ):
            assert type(module) is type(ours)
            assert torch.equal(module(*args), expected), f"{name}: {module}"
        torch.testing.assert_close(torchs(*args), expected)
        double = copy.deepcopy(ours).double()
        assert double(*(x.double() for x in args)).dtype == torch.float64


@every_case
def test_torchscript_gives_torchs(name):
    case = CASES[name]
    operands = case.draw((4, 3))
    ours, torchs = (module_of(case, library, operands) for library in (fusedloss, nn))
    args = of_module(operands)
    torch.testing.assert_close(torch.jit.trace(ours, args, check_trace=False)(*args), torchs(*args))
    try:
        scripted = torch.jit.script(torchs)
    except Exception as error:  # gaussian_nll_loss in some versions
        with pytest.raises(type(error)):
            torch.jit.script(ours)
        return
    torch.testing.assert_close(torch.jit.script(ours)(*args), scripted(*args))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loss = ours

        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return self.loss(input, target)

    if len(args) == 2:
        torch.testing.assert_close(torch.jit.script(Model())(*args), torchs(*args))


@every_case
def test_patch(name, device):
    case = CASES[name]
    operands = case.draw((4, 3), device=device)
    module, args = module_of(case, nn, operands), of_module(operands)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, fusedloss.patch():
        module(*args)
        case.torchs(operands)
        # A second derivative is composed of torch's own functions, also while they are replaced.
        given = leaves(operands)
        torch.autograd.grad(case.torchs(given).sum(), list(given.values()), create_graph=True)
    counts = {event.key: event.count for event in profile.key_averages() if event.key.startswith("fusedloss::")}
    assert counts.pop("fusedloss::pointwise_composed_gradients") == 1 and sum(counts.values()) == 3, counts


# ---- graphs ----


COMPILED = [
    ("l1", "none"), ("smooth l1, beta 0.3", "sum"), ("huber, delta 1.7", "mean"), ("bce", "mean"),
    ("bce, both weights", "none"), ("kl_div", "mean"), ("kl_div, log_target", "batchmean"),
    ("poisson, rate, full", "mean"), ("gaussian, full", "none"), ("soft margin", "mean"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "reduction"), COMPILED)
def test_compiled(name, reduction, device, fresh_compiler):
    """Compiled without graph breaks. Results are bitwise equal to the eager ones, also if the size changes."""
    case = CASES[name]
    recorded = AotEagerAndRecordGraphs()
    operands = case.draw((6, 5), device=device)
    module = module_of(case, fusedloss, operands, reduction=reduction)
    compiled = torch.compile(module, backend=recorded, fullgraph=True)
    for rows in (6, 9, 11) if reduction == "batchmean" else (6,):
        args = [x.requires_grad_() for x in of_module(case.draw((rows, 5), device=device))]
        steps = []
        for call in (compiled, module):
            loss = call(*args)
            steps.append((loss.detach(), *torch.autograd.grad(loss, args, torch.full_like(loss, 0.7))))
        for a, b in zip(*steps, strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num()), rows
    names = losses_in(*recorded.fw_graphs, *recorded.bw_graphs)
    assert names == {"fusedloss.pointwise_forward", "fusedloss.pointwise_backward"}, names


@pytest.mark.parametrize("name", ["bce, pos_weight", "gaussian, full"])
def test_compiled_by_inductor(name, device, fresh_compiler):
    case = CASES[name]
    operands = case.draw((6, 50), device=device)
    compiled = torch.compile(lambda **given: case.ours(given), fullgraph=True)
    steps = []
    for call in (compiled, lambda **given: case.ours(given)):
        given = leaves(operands)
        loss = call(**given)
        steps.append((loss.detach(), *torch.autograd.grad(loss, list(given.values()))))
    for a, b in zip(*steps, strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_with_a_negative_variance(fresh_compiler):
    operands = CASES["gaussian"].draw((6, 5))
    compiled = torch.compile(fusedloss.GaussianNLLLoss(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**operands), fusedloss.GaussianNLLLoss()(**operands))
    with pytest.raises(RuntimeError, match="var has negative entry/entries"):
        compiled(operands["input"], operands["target"], -operands["var"])
