"""Fused loss kernels for PyTorch: drop-in replacements for `nn.CrossEntropyLoss`, `nn.MSELoss` and related losses.

import fusedloss

criterion = fusedloss.CrossEntropyLoss()  # instead of nn.CrossEntropyLoss()
criterion = fusedloss.custom_loss("log(cosh(input - target))")  # a loss of your own
"""

from . import functional, jit
from ._backend import debug, describe
from ._patch import patch, unpatch
from ._version import __version__
from .custom import custom_loss
from .modules import (
    BCEWithLogitsLoss,
    CrossEntropyLoss,
    GaussianNLLLoss,
    HuberLoss,
    KLDivLoss,
    L1Loss,
    MSELoss,
    NLLLoss,
    PoissonNLLLoss,
    SmoothL1Loss,
    SoftMarginLoss,
)

__all__ = [
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "GaussianNLLLoss",
    "HuberLoss",
    "KLDivLoss",
    "L1Loss",
    "MSELoss",
    "NLLLoss",
    "PoissonNLLLoss",
    "SmoothL1Loss",
    "SoftMarginLoss",
    "__version__",
    "custom_loss",
    "debug",
    "describe",
    "functional",
    "jit",
    "patch",
    "unpatch",
]
