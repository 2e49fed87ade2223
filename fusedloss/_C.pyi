"""The compiled extension, defined in csrc/bindings.cpp. A reduction has torch's number: 0 none, 1 mean, 2 sum."""

from collections.abc import Sequence

import torch
from torch import Tensor

with_cuda: bool  # whether this build has CUDA kernels
max_operands: int  # most tensors of a pointwise loss, input included
max_parameters: int  # most parameters of a pointwise loss
max_cuda_classes: int  # only in a build with CUDA kernels

# ---- the losses, with autograd; None if the tensors are not plain or there are no kernels for them

def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    inplace_backward: bool,
) -> Tensor | None: ...
def nll_loss(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int
) -> Tensor | None: ...
def pointwise(
    loss: int, operands: Sequence[Tensor], parameters: Sequence[float], reduction: int, divisor: int | None
) -> Tensor | None: ...

# ---- their forward and backward passes, without autograd

def cross_entropy_forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    autocast: bool,
) -> tuple[Tensor, Tensor]: ...  # the loss, and the statistics that the backward pass reads
def cross_entropy_backward(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor: ...
def cross_entropy_statistics_numel(
    rows: int | torch.SymInt, is_mean: bool, has_weight: bool, label_smoothing: float, class_indices: bool
) -> int | torch.SymInt: ...
def nll_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int, autocast: bool
) -> tuple[Tensor, Tensor]: ...  # the loss, and the divisor of the mean
def nll_loss_backward(
    grad_output: Tensor,
    target: Tensor,
    weight: Tensor | None,
    total_weight: Tensor,
    sizes: Sequence[int],
    strides: Sequence[int],
    dtype: torch.dtype,
    reduction: int,
    ignore_index: int,
) -> Tensor: ...
def pointwise_forward(
    loss: int,
    operands: Sequence[Tensor],
    parameters: Sequence[float],
    reduction: int,
    divisor: int | None,
    autocast: bool,
) -> Tensor: ...
def pointwise_backward(
    grad_output: Tensor,
    loss: int,
    operands: Sequence[Tensor],
    parameters: Sequence[float],
    reduction: int,
    divisor: int | None,
    wanted: int,  # one bit per operand that needs a gradient, the lowest for the first operand
) -> list[Tensor | None]: ...

# ---- registration of a pointwise loss; returns its number

def add_pointwise_loss(name: str, operands: Sequence[str], cpu_formula: int, cuda_formula: int) -> int: ...

# ---- settings

def set_debug(enabled: bool) -> None: ...
def set_cuda_tuning(name: str, value: int) -> None: ...
def cpu_capability() -> str: ...  # "portable", "avx2" or "avx512"
def choose_cpu_capability(wanted: str, has_avx2: bool, has_avx512: bool) -> str: ...
