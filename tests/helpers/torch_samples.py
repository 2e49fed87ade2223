"""PyTorch's own test material for the losses: samples of OpInfo, of ModuleInfo and of the criterion tests.

It comes from torch.testing._internal, which every version of torch changes. Where a version lacks a part of it, that
part's tests are skipped and the reason is reported. The values are drawn afresh; the shapes and options are torch's.
"""

import contextlib
import inspect
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedloss
import fusedloss.functional as fused

with pytest.MonkeyPatch.context() as patch:
    # On import it would forbid every later assignment to torch.backends flags, in the other tests as well.
    patch.setattr(torch.backends, "disable_global_flags", lambda: None)
    from torch.testing._internal import common_methods_invocations, common_modules, common_nn, common_utils

# Samples with more elements are compared with finite differences along random directions, not for each element.
SMALL = 30
MODULES = {
    "CrossEntropyLoss": "cross_entropy",
    "MSELoss": "mse_loss",
    "L1Loss": "l1_loss",
    "SmoothL1Loss": "smooth_l1_loss",
    "HuberLoss": "huber_loss",
    "BCEWithLogitsLoss": "binary_cross_entropy_with_logits",
    "KLDivLoss": "kl_div",
    "PoissonNLLLoss": "poisson_nll_loss",
    "GaussianNLLLoss": "gaussian_nll_loss",
    "SoftMarginLoss": "soft_margin_loss",
    "NLLLoss": "nll_loss",
}
OPS = {f"nn.functional.{name}": name for name in MODULES.values()}


@dataclass(frozen=True)
class Sample:
    name: str
    loss: str
    ours: Callable[..., Callable]  # takes the options, returns the function of the arguments
    torchs: Callable[..., Callable]
    args: tuple[Tensor, ...]  # input, and in most cases target
    options: dict[str, Any]
    reference: Callable | None = None  # torch's slow reference implementation; takes the arguments

    def double(self) -> "Sample":
        return self.map(lambda t: t.double() if t.is_floating_point() else t)

    def noncontiguous(self) -> "Sample":
        return self.map(common_utils.noncontiguous_like)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Sample":
        options = {k: change(v) if isinstance(v, Tensor) else v for k, v in self.options.items()}
        return replace(self, args=tuple(leaf(change(arg.detach()), arg) for arg in self.args), options=options)

    def variants(self) -> Iterator["Sample"]:
        """The sample, and if another argument requires grad, a copy in which only input does, for other kernels."""
        yield self
        if any(arg.requires_grad for arg in self.args[1:]):
            yield replace(self, args=(self.args[0], *(arg.detach() for arg in self.args[1:])))


def leaf(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(like.requires_grad)


def missing(what: str) -> None:
    pytest.skip(f"torch {torch.__version__} has no {what}")


# ---- what is left out ----


def weights_cancel(sample: Sample) -> bool:
    weight, target = sample.options.get("weight"), sample.args[-1]
    mean = weight is not None and sample.options.get("reduction", "mean") == "mean" and not target.is_floating_point()
    return mean and weight.double()[target].sum().item() == 0


def mean_of_a_constant_target(sample: Sample) -> bool:
    mean = sample.loss == "mse_loss" and sample.options.get("reduction", "mean") == "mean"
    return mean and len(sample.args) == 2 and not sample.args[1].requires_grad


# Samples that are not run at all, with the reason. Which samples these are may depend on the values drawn.
LEFT_OUT: list[tuple[str, Callable[[Sample], bool]]] = [
    (
        "the weights of the targets, drawn from both signs, add up to 0: the mean is NaN, and torch's inf",
        weights_cancel,
    ),
]
# Samples that are run, but without gradgradcheck's forward over reverse.
WITHOUT_FORWARD_OVER_REVERSE: list[tuple[str, Callable[[Sample], bool]]] = [
    ("torch's own mse_loss raises in it: 'ZeroTensors are immutable'", mean_of_a_constant_target),
    (
        "torch's own backward functions of these have no forward mode",
        lambda sample: sample.loss in ("huber_loss", "soft_margin_loss"),
    ),
]


# ---- the sources ----


def ops(name: str) -> list:
    return [op for op in common_methods_invocations.op_db if op.name == name] or missing(f"OpInfo of {name}")


def op_reference(op, input: Tensor, *args: Tensor, **options) -> Tensor | None:
    if op.name == "nn.functional.cross_entropy":
        # The reference does not support unbatched input.
        reference = common_nn.loss_reference_fns["CrossEntropyLoss"]
        return reference(input, *args, **options) if input.dim() > 1 else None
    if op.ref is None or op.name != "nn.functional.mse_loss":
        return None
    return torch.as_tensor(op.ref(*(arg.cpu().numpy() for arg in (input, *args)), **options)).to(input.device)


def op_samples(name: str, device: str, dtype: torch.dtype, requires_grad: bool) -> Iterator[Sample]:
    loss = OPS[name]
    for op in ops(name):
        if dtype not in op.supported_dtypes(torch.device(device).type):
            missing(f"OpInfo samples of {name} in {dtype}")
        # op.sample_inputs would set a seed of its own.
        for sample in op.sample_inputs_func(op, device, dtype, requires_grad):
            args, options = (sample.input, *sample.args), sample.kwargs
            yield Sample(
                f"OpInfo {op.formatted_name} {[tuple(arg.shape) for arg in args]} {sorted(options)}",
                loss,
                lambda **options: partial(getattr(fused, loss), **options),
                lambda **options: partial(getattr(F, loss), **options),
                args,
                options,
                partial(op_reference, op, **options),
            )


def module_infos(name: str) -> list:
    infos = [info for info in common_modules.module_db if info.module_cls is getattr(nn, name)]
    return infos or missing(f"ModuleInfo of {name}")


def keep_a_target(args: tuple[Tensor, ...], options: dict[str, Any]) -> None:
    """Keep at least one target, as torch's OpInfo does: a mean over none is NaN and has no derivative."""
    if "ignore_index" in options and (args[1] == options["ignore_index"]).all():
        args[1].view(-1)[0] = (options["ignore_index"] + 1) % args[0].shape[min(args[0].dim() - 1, 1)]


def module_samples(name: str, device: str, dtype: torch.dtype, requires_grad: bool) -> Iterator[Sample]:
    for info in module_infos(name):
        # Also in bfloat16, which torch's ModuleInfo leaves out for CrossEntropyLoss.
        for sample in info.module_inputs_func(info, device, dtype, requires_grad, training=True):
            given = sample.constructor_input
            options = dict(inspect.signature(getattr(nn, name)).bind(*given.args, **given.kwargs).arguments)
            args = tuple(leaf(arg, arg) for arg in sample.forward_input.args)
            assert not sample.forward_input.kwargs
            keep_a_target(args, options)
            yield Sample(
                f"ModuleInfo {name} {sample.desc}",
                MODULES[name],
                getattr(fusedloss, name),
                getattr(nn, name),
                args,
                options,
                sample.reference_fn and partial(sample.reference_fn, getattr(nn, name)(**options)),
            )


def criterion_samples(device: str, dtype: torch.dtype, requires_grad: bool) -> Iterator[Sample]:
    """Samples of MSELoss. Those of CrossEntropyLoss became ModuleInfo before torch 2.6; others draw differently."""
    infos = [info for info in common_nn.criterion_tests if info.get("fullname", "").partition("_")[0] == "MSELoss"]
    for info in infos or missing("criterion tests of these losses"):
        name, _, rest = info["fullname"].partition("_")
        # The constructor reads a global after torch's loop over reductions, so every reduction would be 'sum'.
        assert rest.startswith("no_batch_dim_"), info
        options = {"reduction": rest.removeprefix("no_batch_dim_")}
        module = getattr(nn, name)(**options)
        args = [
            torch.randn(info[size], dtype=torch.float64).to(device, dtype) for size in ("input_size", "target_size")
        ]
        yield Sample(
            f"criterion {info['fullname']}",
            MODULES[name],
            getattr(fusedloss, name),
            getattr(nn, name),
            (args[0].requires_grad_(requires_grad), args[1]),
            options,
            lambda *args, f=info["reference_fn"], module=module: f(*args, module),
        )


def with_our_functions(module: nn.Module) -> Callable:
    def call(*args: Tensor) -> Tensor:
        calls = []

        def mse_loss(*args: Any, **options: Any) -> Tensor:
            calls.append(args)
            return fused.mse_loss(*args, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(common_nn, "F", SimpleNamespace(mse_loss=mse_loss))
            result = module(*args)
        assert len(calls) == 1
        return result

    return call


def functional_module_samples(name: str, device: str, dtype: torch.dtype, requires_grad: bool) -> Iterator[Sample]:
    make = getattr(common_nn, name, None) or missing(f"common_nn.{name}")
    info = make()
    module, target = info["constructor"](), info["cpp_var_map"]["target"]
    target.data = target.to(device, dtype).double()  # the closure's target, which the module casts to input's dtype
    input = torch.randn(info["input_size"], dtype=torch.float64).to(device, dtype)
    yield Sample(
        f"functional module {info['fullname']}",
        "mse_loss",
        lambda: with_our_functions(module),
        lambda: module,
        (input.requires_grad_(requires_grad),),
        {},
        info["reference_fn"],
    )


SOURCES = {
    **{f"OpInfo {name}": partial(op_samples, name) for name in OPS},
    **{f"ModuleInfo {name}": partial(module_samples, name) for name in MODULES},
    "criterion tests": criterion_samples,
    **{
        f"functional module {name}": partial(functional_module_samples, name)
        for name in ("mseloss_no_reduce_test", "mseloss_no_reduce_scalar_test")
    },
}


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error


def each(source: str, device: str, dtype: torch.dtype, requires_grad: bool = True) -> Iterator[Sample]:
    random.seed(torch.initial_seed())  # torch's samples use this generator too
    samples = list(SOURCES[source](device, dtype, requires_grad))
    assert samples
    if samples[0].loss not in ("cross_entropy", "mse_loss"):  # tests/test_pointwise_losses.py covers them
        samples = random.sample(samples, min(len(samples), 12))
    for sample in samples:
        if not any(applies(sample) for _, applies in LEFT_OUT):
            yield sample
