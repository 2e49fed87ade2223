"""The losses as modules. Each is a subclass of torch's class whose `forward` calls the function in
`fusedloss.functional`.

That function documents the shapes, the errors, the formula and its source.
"""

from torch import Tensor, nn

from . import functional


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """A fused `torch.nn.CrossEntropyLoss`, with the same arguments and results.

    Args:
        weight: one weight per class, of shape (C). Default: 1 for every class.
        size_average, reduce: deprecated; they override reduction.
        ignore_index: the rows of this class index add nothing to the loss or the gradient. Default -100.
        reduction: 'none', 'mean' or 'sum'. Default 'mean'.
        label_smoothing: the part of each target, in [0, 1], that is spread evenly over the classes. Default 0.
        inplace_backward: if True, the backward pass overwrites input with the gradient; see
            `fusedloss.functional.cross_entropy` for the conditions. Default False.

    Shape:
        - input: logits, (C), (N, C) or (N, C, d1, …, dK); float32, float64, bfloat16 or float16.
        - target: class indices, (), (N) or (N, d1, …, dK); or class probabilities of input's shape and dtype.
        - output: a scalar; with reduction 'none', the shape that class-index targets have.

    The formula, its source and the errors are in `fusedloss.functional.cross_entropy`.
    """

    inplace_backward: bool = False  # modules that were pickled without it have it too

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
        """TorchScript cannot compile a call into an extension, so it compiles torch's module instead."""
        return nn.CrossEntropyLoss(
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class MSELoss(nn.MSELoss):
    """A fused `torch.nn.MSELoss`, with the same arguments and results.

    Args:
        size_average, reduce: deprecated; they override reduction.
        reduction: 'none', 'mean' or 'sum'. Default 'mean'.

    Shape:
        - input: any shape; float32, float64, bfloat16 or float16.
        - target: the shape of input. Another shape that broadcasts with it works too, with torch's warning.
        - output: a scalar; with reduction 'none', the broadcast shape.

    The formula, its source and the errors are in `fusedloss.functional.mse_loss`.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.mse_loss(input, target, reduction=self.reduction)


class NLLLoss(nn.NLLLoss):
    """A fused `torch.nn.NLLLoss`, with the same arguments and results.

    Args:
        weight: one weight per class, of shape (C). Default: 1 for every class.
        size_average, reduce: deprecated; they override reduction.
        ignore_index: the rows of this class index add nothing to the loss or the gradient. Default -100.
        reduction: 'none', 'mean' or 'sum'. Default 'mean'.

    Shape:
        - input: log-probabilities, (C), (N, C) or (N, C, d1, …, dK); float32, float64, bfloat16 or float16.
        - target: class indices, (), (N) or (N, d1, …, dK).
        - output: a scalar; with reduction 'none', the shape of target.

    The formula, its source and the errors are in `fusedloss.functional.nll_loss`.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.nll_loss(
            input, target, weight=self.weight, ignore_index=self.ignore_index, reduction=self.reduction
        )


class L1Loss(nn.L1Loss):
    """A fused `torch.nn.L1Loss`, with the same arguments and results.

    The shapes, the formula, its source and the errors are in `fusedloss.functional.l1_loss`.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.l1_loss(input, target, reduction=self.reduction)


class SmoothL1Loss(nn.SmoothL1Loss):
    """A fused `torch.nn.SmoothL1Loss`, with the same arguments and results.

    The shapes, the formula, its source and the errors are in `fusedloss.functional.smooth_l1_loss`.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.smooth_l1_loss(input, target, reduction=self.reduction, beta=self.beta)


class HuberLoss(nn.HuberLoss):
    """A fused `torch.nn.HuberLoss`, with the same arguments and results.

    The shapes, the formula, its source and the errors are in `fusedloss.functional.huber_loss`.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.huber_loss(input, target, reduction=self.reduction, delta=self.delta)


class BCEWithLogitsLoss(nn.BCEWithLogitsLoss):
    """A fused `torch.nn.BCEWithLogitsLoss`, with the same arguments and results.

    The shapes, the formula, its source and the errors are in `fusedloss.functional.binary_cross_entropy_with_logits`.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(
            input, target, weight=self.weight, reduction=self.reduction, pos_weight=self.pos_weight
        )


class KLDivLoss(nn.KLDivLoss):
    """A fused `torch.nn.KLDivLoss`, with the same arguments and results.

    The shapes, the formula, its source and the errors are in `fusedloss.functional.kl_div`.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.kl_div(input, target, reduction=self.reduction, log_target=self.log_target)


class PoissonNLLLoss(nn.PoissonNLLLoss):
    """A fused `torch.nn.PoissonNLLLoss`, with the same arguments and results.

    The shapes, the formula, its source and the errors are in `fusedloss.functional.poisson_nll_loss`.
    """

    def forward(self, log_input: Tensor, target: Tensor) -> Tensor:
        return functional.poisson_nll_loss(
            log_input, target, log_input=self.log_input, full=self.full, eps=self.eps, reduction=self.reduction
        )


class GaussianNLLLoss(nn.GaussianNLLLoss):
    """A fused `torch.nn.GaussianNLLLoss`, with the same arguments and results.

    The shapes, the formula, its source and the errors are in `fusedloss.functional.gaussian_nll_loss`.
    """

    def forward(self, input: Tensor, target: Tensor, var: Tensor | float) -> Tensor:
        return functional.gaussian_nll_loss(input, target, var, full=self.full, eps=self.eps, reduction=self.reduction)


class SoftMarginLoss(nn.SoftMarginLoss):
    """A fused `torch.nn.SoftMarginLoss`, with the same arguments and results.

    The shapes, the formula, its source and the errors are in `fusedloss.functional.soft_margin_loss`.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.soft_margin_loss(input, target, reduction=self.reduction)
