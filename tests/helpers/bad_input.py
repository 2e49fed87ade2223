"""Arguments for the tests of bad input, and which errors an older torch raises differently."""

import torch

from fusedloss._build import release

# Before torch 2.13, torch raised RuntimeError for some of these arguments. The types of errors are compared since then.
TYPES_ARE_OURS = release(torch.__version__) >= (2, 13)


def x(*shape, **options):
    return torch.randn(shape, **options)


def i(*shape, **options):
    return torch.zeros(shape, dtype=torch.int64, **options)
