"""The losses as modules: torch's own classes, with `forward` computed by the fused kernels."""

from torch import Tensor, nn

from . import functional


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss`, fused. The arguments, shapes and results are torch's.

    Args:
        weight: one weight for each class, shape (C).
        size_average, reduce: deprecated, see `reduction`.
        ignore_index: class index that adds nothing to the loss nor the gradient. Default -100.
        reduction: 'none', 'mean' or 'sum'. Default 'mean'.
        label_smoothing: how much of each target is spread evenly over the classes, in [0, 1]. Default 0.
        inplace_backward: the backward pass writes the gradient over input; see `fusedloss.functional.cross_entropy`.
            Default False.

    Shape:
        - input: logits, (C), (N, C) or (N, C, d1, …, dK); float32, float64, bfloat16 or float16.
        - target: class indices, () or (N) or (N, d1, …, dK); or class probabilities, of input's shape and dtype.
        - output: a scalar, or the shape of class-index targets for reduction 'none'.

    The formula is in `fusedloss.functional.cross_entropy`.
    """

    inplace_backward: bool = False  # also of modules that were pickled without it

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.inplace_backward = inplace_backward

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            inplace_backward=self.inplace_backward,
        )

    def __prepare_scriptable__(self) -> nn.CrossEntropyLoss:
        """TorchScript, which knows torch's function only, gets torch's module."""
        return nn.CrossEntropyLoss(
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class MSELoss(nn.MSELoss):
    """`torch.nn.MSELoss`, fused. The arguments, shapes and results are torch's.

    Args:
        size_average, reduce: deprecated, see `reduction`.
        reduction: 'none', 'mean' or 'sum'. Default 'mean'.

    Shape:
        - input: any shape; float32, float64, bfloat16 or float16.
        - target: the shape of input; another that broadcasts with it works, with torch's warning.
        - output: a scalar, or the broadcast shape for reduction 'none'.

    The formula is in `fusedloss.functional.mse_loss`.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.mse_loss(input, target, reduction=self.reduction)


class NLLLoss(nn.NLLLoss):
    """`torch.nn.NLLLoss`, fused. The arguments, shapes and results are torch's.

    Args:
        weight: one weight for each class, shape (C).
        size_average, reduce: deprecated, see `reduction`.
        ignore_index: class index that adds nothing to the loss nor the gradient. Default -100.
        reduction: 'none', 'mean' or 'sum'. Default 'mean'.

    Shape:
        - input: log-probabilities, (C), (N, C) or (N, C, d1, …, dK); float32, float64, bfloat16 or float16.
        - target: class indices, () or (N) or (N, d1, …, dK).
        - output: a scalar, or the shape of target for reduction 'none'.

    The formula is in `fusedloss.functional.nll_loss`.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.nll_loss(
            input, target, weight=self.weight, ignore_index=self.ignore_index, reduction=self.reduction
        )


class L1Loss(nn.L1Loss):
    """`torch.nn.L1Loss`, fused. The arguments, shapes and results are torch's; the formula is in
    `fusedloss.functional.l1_loss`.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.l1_loss(input, target, reduction=self.reduction)


class SmoothL1Loss(nn.SmoothL1Loss):
    """`torch.nn.SmoothL1Loss`, fused. The arguments, shapes and results are torch's; the formula is in
    `fusedloss.functional.smooth_l1_loss`.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.smooth_l1_loss(input, target, reduction=self.reduction, beta=self.beta)


class HuberLoss(nn.HuberLoss):
    """`torch.nn.HuberLoss`, fused. The arguments, shapes and results are torch's; the formula is in
    `fusedloss.functional.huber_loss`.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.huber_loss(input, target, reduction=self.reduction, delta=self.delta)


class BCEWithLogitsLoss(nn.BCEWithLogitsLoss):
    """`torch.nn.BCEWithLogitsLoss`, fused. The arguments, shapes and results are torch's; the formula is in
    `fusedloss.functional.binary_cross_entropy_with_logits`.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(
            input, target, weight=self.weight, reduction=self.reduction, pos_weight=self.pos_weight
        )


class KLDivLoss(nn.KLDivLoss):
    """`torch.nn.KLDivLoss`, fused. The arguments, shapes and results are torch's; the formula is in
    `fusedloss.functional.kl_div`.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.kl_div(input, target, reduction=self.reduction, log_target=self.log_target)


class PoissonNLLLoss(nn.PoissonNLLLoss):
    """`torch.nn.PoissonNLLLoss`, fused. The arguments, shapes and results are torch's; the formula is in
    `fusedloss.functional.poisson_nll_loss`.
    """

    def forward(self, log_input: Tensor, target: Tensor) -> Tensor:
        return functional.poisson_nll_loss(
            log_input, target, log_input=self.log_input, full=self.full, eps=self.eps, reduction=self.reduction
        )


class GaussianNLLLoss(nn.GaussianNLLLoss):
    """`torch.nn.GaussianNLLLoss`, fused. The arguments, shapes and results are torch's; the formula is in
    `fusedloss.functional.gaussian_nll_loss`.
    """

    def forward(self, input: Tensor, target: Tensor, var: Tensor | float) -> Tensor:
        return functional.gaussian_nll_loss(input, target, var, full=self.full, eps=self.eps, reduction=self.reduction)


class SoftMarginLoss(nn.SoftMarginLoss):
    """`torch.nn.SoftMarginLoss`, fused. The arguments, shapes and results are torch's; the formula is in
    `fusedloss.functional.soft_margin_loss`.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.soft_margin_loss(input, target, reduction=self.reduction)
