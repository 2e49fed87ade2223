"""PyTorch's own test material for the losses, run against fusedloss."""

import math
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from helpers.draws import DTYPES
from helpers.oracle import COMPUTED, ROUNDED
from helpers.torch_samples import (
    MODULES,
    OPS,
    SMALL,
    SOURCES,
    WITHOUT_FORWARD_OVER_REVERSE,
    Sample,
    common_modules,
    each,
    leaf,
    missing,
    module_infos,
    naming,
    ops,
)
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import fusedloss
import fusedloss.functional as fused

# ---- the comparison ----


def scales(sample: Sample) -> tuple[float, float]:
    """The size of the terms of the loss, and of those of the gradient for a grad_output of 1.

    The weights of torch's samples are negative as often as positive, and so is their sum, the mean's denominator.
    """
    if sample.loss == "mse_loss":
        return 0.0, 0.0
    if sample.loss != "cross_entropy":
        operands = [*sample.args, *(given for given in sample.options.values() if isinstance(given, Tensor))]
        largest = [1 + operand.detach().double().abs().max().item() for operand in operands if operand.numel() > 0]
        size = math.prod(largest)
        if sample.loss == "gaussian_nll_loss":
            var = sample.args[2].detach() if len(sample.args) > 2 else sample.options["var"]
            size /= max(var.double().min().item(), 1e-6) ** 2
        return size * (max(x.numel() for x in operands) if sample.options.get("reduction") == "sum" else 1), size
    (input, target), options = (arg.detach() for arg in sample.double().args), sample.double().options
    reduction = options.pop("reduction", "mean")
    weight = options.pop("weight", None)
    if weight is None:
        weight = input.new_ones(input.shape[min(input.dim() - 1, 1)])
    # A row's loss is a difference, with an error relative to its terms.
    rows = F.cross_entropy(input, target, weight.abs(), reduction="none", **options) + weight.abs().max()
    if reduction != "mean":
        return (rows.sum() if reduction == "sum" else rows.max()).item(), 3 * weight.abs().max().item()
    kept = weight.new_ones(rows.numel())
    if not target.is_floating_point():
        kept = weight[target[target != options.get("ignore_index", -100)]]
    cancelled = kept.abs().sum() / kept.sum().abs() / kept.sum().abs()
    return (rows.sum() * cancelled).item(), (3 * weight.abs().max() * cancelled).item()


def assert_as_good(
    ours: Tensor, torchs: Tensor, exact: Tensor, scale: float, what: str, is_summed: bool = False
) -> None:
    """`ours` has torch's dtype, shape and value. In 16 bits torch rounds often, and ours must be as close to float64.

    is_summed: autograd has added up rounded results, in both ours and torch's.
    """
    for form in ("dtype", "shape", "device", "requires_grad"):
        assert getattr(ours, form) == getattr(torchs, form), f"{what}: {form}"
    ours, torchs, exact = ours.detach(), torchs.detach(), exact.detach()
    finite = exact[exact.isfinite()].abs()
    scale = max(scale if scale < float("inf") else 0.0, finite.max().item() if finite.numel() else 0.0)
    allowed = COMPUTED[ours.dtype] * scale
    if ours.dtype in (torch.float32, torch.float64):
        torch.testing.assert_close(
            ours, torchs, rtol=COMPUTED[ours.dtype], atol=allowed, equal_nan=True, msg=lambda m: f"{what}: {m}"
        )
        return
    if is_summed:
        allowed += ROUNDED[ours.dtype] * scale
    error, torchs_error = ((t.double() - exact).abs() for t in (ours, torchs))
    close = exact.isfinite() & (error <= torchs_error.nan_to_num(nan=torch.inf) + allowed)
    same = (ours == torchs) | (ours.isnan() & torchs.isnan())
    bad = ~(close | same)
    assert not bad.any(), f"{what}: {ours[bad]}, torch's {torchs[bad]}, exact {exact[bad]}"


def differentiated(sample: Sample, function: Callable, *, batch: int = 0) -> Callable[[Tensor], list[Tensor | None]]:
    """Runs the loss. The returned function takes grad_output, and returns the loss and the gradients."""
    args = [leaf(arg, arg) for arg in sample.args]
    loss = function(*args)
    wanted = [arg for arg in args if arg.requires_grad]

    def backward(grad_output: Tensor) -> list[Tensor | None]:
        if not wanted:
            return [loss]
        grads = torch.autograd.grad(loss, wanted, grad_output.to(loss.dtype), is_grads_batched=bool(batch))
        return [loss, *grads]

    return backward


def compare(sample: Sample, torchs_sample: Sample, batch: int = 0) -> None:
    exact = torchs_sample.double()
    losses = [
        differentiated(sample, sample.ours(**sample.options), batch=batch),
        differentiated(torchs_sample, torchs_sample.torchs(**torchs_sample.options), batch=batch),
        differentiated(exact, exact.torchs(**exact.options), batch=batch),
    ]
    shape = exact.torchs(**exact.options)(*exact.args).shape
    grad_output = torch.randn((batch, *shape) if batch else shape, dtype=torch.float64).to(sample.args[0])
    loss_scale, grad_scale = scales(sample)
    grad_scale *= grad_output.abs().max().item()
    names = ["loss", *(f"gradient {i}" for i, arg in enumerate(sample.args) if arg.requires_grad)]
    for name, results in zip(names, zip(*(loss(grad_output) for loss in losses), strict=True), strict=True):
        # torch's gradient is NaN for a count of 0 with the constant term, and ours is not.
        if sample.loss == "poisson_nll_loss":
            results = (results[0].masked_fill(results[2].isnan(), torch.nan), *results[1:])
        is_summed = any(arg.shape != shape for arg in sample.args) and sample.loss == "gaussian_nll_loss"
        assert_as_good(*results, loss_scale if name == "loss" else grad_scale, name, is_summed)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The samples are too small for several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


source = pytest.mark.parametrize("source", SOURCES)


@pytest.mark.parametrize("requires_grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@source
def test_values_and_gradients(source, dtype, requires_grad, device):
    for sample in each(source, device, dtype, requires_grad):
        for variant in sample.variants():
            with naming(variant.name):
                compare(variant, variant)
            with naming(f"{variant.name}, noncontiguous"):
                compare(variant.noncontiguous(), variant)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@source
def test_torchs_reference_functions(source, dtype, device):
    for sample in each(source, device, dtype, requires_grad=False):
        expected = sample.reference and sample.reference(*sample.args)
        if expected is not None:
            with naming(sample.name):
                loss = sample.ours(**sample.options)(*sample.args)
                exact = sample.double().torchs(**sample.double().options)(*sample.double().args)
                assert_as_good(loss, expected.to(dtype), exact, scales(sample)[0], "loss")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@source
def test_batched_gradients(source, dtype, device):
    for sample in each(source, device, dtype):
        for variant in sample.variants():
            with naming(variant.name):
                compare(variant, variant, batch=3)


def tangent(sample: Sample, function: Callable, directions: list[Tensor]) -> Tensor:
    with fwAD.dual_level():
        args = [
            fwAD.make_dual(arg.detach(), direction.to(arg)) if arg.requires_grad else arg
            for arg, direction in zip(sample.args, directions, strict=True)
        ]
        result = fwAD.unpack_dual(function(*args)).tangent
        assert result is not None
        return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@source
def test_forward_mode(source, dtype, device):
    for sample in each(source, device, dtype):
        for variant in sample.variants():
            directions = [torch.randn(arg.shape, dtype=torch.float64).to(device, dtype) for arg in variant.args]
            exact = variant.double()
            scale = scales(variant)[1] * sum(direction.abs().sum().item() for direction in directions)
            with naming(variant.name):
                assert_as_good(
                    tangent(variant, variant.ours(**variant.options), directions),
                    tangent(variant, variant.torchs(**variant.options), directions),
                    tangent(exact, exact.torchs(**exact.options), directions),
                    scale,
                    "tangent",
                )


@source
def test_finite_differences(source, device):
    samples = list(each(source, device, torch.float64))
    if source == "ModuleInfo KLDivLoss":
        pytest.skip("torch's samples hold logarithms of negative numbers")
    if samples[0].loss not in ("cross_entropy", "mse_loss"):
        samples = samples[:4]
    for sample in samples:
        for variant in sample.variants():
            checks = {
                "check_batched_grad": True,
                "fast_mode": variant.args[0].numel() > SMALL,
                "nondet_tol": 0.0 if device == "cpu" else 1e-12,
            }
            loss = variant.ours(**variant.options)
            with naming(variant.name):
                assert gradcheck(loss, variant.args, check_forward_ad=True, check_batched_forward_grad=True, **checks)
                assert gradgradcheck(loss, variant.args, **checks)
                if not any(applies(variant) for _, applies in WITHOUT_FORWARD_OVER_REVERSE):
                    # As in torch's own test. With undefined gradients torch's mse_loss raises here too.
                    checks |= {"check_batched_grad": False, "check_undefined_grad": False}
                    assert gradgradcheck(
                        loss, variant.args, check_fwd_over_rev=True, check_rev_over_rev=False, **checks
                    )


# ---- errors ----


def assert_same_error(error_type: type, ours: Callable[[], object], torchs: Callable[[], object]) -> None:
    with pytest.raises(error_type) as expected:
        torchs()
    with pytest.raises(error_type) as raised:
        ours()
    assert raised.type is expected.type


@pytest.mark.parametrize("name", OPS)
def test_error_inputs_of_opinfo(name, device):
    made = [op for op in ops(name) if op.error_inputs_func is not None] or missing(f"error inputs in OpInfo of {name}")
    for op in made:
        for error in op.error_inputs_func(op, device):
            sample = error.sample_input
            with naming(f"{name} {error.error_regex}"):
                assert_same_error(
                    error.error_type,
                    *(
                        partial(getattr(module, OPS[name]), sample.input, *sample.args, **sample.kwargs)
                        for module in (fused, F)
                    ),
                )


@pytest.mark.parametrize("name", MODULES)
def test_error_inputs_of_moduleinfo(name, device):
    infos = [info for info in module_infos(name) if getattr(info, "module_error_inputs_func", None) is not None]
    for info in infos or missing(f"error inputs in ModuleInfo of {name}"):
        for dtype in DTYPES:
            for requires_grad in (True, False):
                for error in info.module_error_inputs_func(info, device, dtype, requires_grad, training=True):
                    made, given = error.module_error_input.constructor_input, error.module_error_input.forward_input
                    constructors = [partial(getattr(m, name), *made.args, **made.kwargs) for m in (fusedloss, nn)]
                    with naming(f"{name} {error.error_regex}"):
                        if error.error_on == common_modules.ModuleErrorEnum.CONSTRUCTION_ERROR:
                            assert_same_error(error.error_type, *constructors)
                        else:
                            calls = (partial(make(), *given.args, **given.kwargs) for make in constructors)
                            assert_same_error(error.error_type, *calls)
