"""`patch` replaces torch's loss functions by the fused ones, so that existing code uses them unchanged.

`nn.CrossEntropyLoss`, `nn.MSELoss` and most models look the functions up in `torch.nn.functional` at each call, so
replacing them there reaches all of these. A function that was imported before (`from torch.nn.functional import
cross_entropy`) stays torch's.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.nn.functional as F

from . import functional

_NAMES = functional.__all__
_FunctionT = TypeVar("_FunctionT", bound=Callable[..., Any])

_lock = threading.RLock()
_active: list[patch] = []  # torch's functions are replaced while this is not empty
_replaced: dict[str, Callable[..., Any]] = {}


class patch:
    """Replace torch's loss functions in `torch.nn.functional` by the fused ones, in the whole process.

    The functions are those in `fusedloss.functional.__all__`. `fusedloss.patch()` replaces them until
    `fusedloss.unpatch()`, `with fusedloss.patch():` for a block, and `@fusedloss.patch()` during each call of a
    function. torch's own functions still compute the calls that the kernels do not cover.
    """

    def __init__(self) -> None:
        _activate(self)

    def __enter__(self) -> patch:
        if self not in _active:  # the block is entered a second time
            _activate(self)
        return self

    def __exit__(self, *exception: object) -> None:
        _deactivate(self)

    def __call__(self, function: _FunctionT) -> _FunctionT:
        """Decorate a function: replace torch's functions whenever it runs, instead of now."""
        _deactivate(self)

        @functools.wraps(function)
        def patched(*args: Any, **options: Any) -> Any:
            with patch():
                return function(*args, **options)

        return cast(_FunctionT, patched)


def unpatch() -> None:
    """Restore the functions of `torch.nn.functional`, however often `patch()` was called."""
    with _lock:
        for handle in list(_active):
            _deactivate(handle)


def _activate(handle: patch) -> None:
    with _lock:
        if not _active:
            for name in _NAMES:
                _replaced[name] = getattr(F, name)
                setattr(F, name, getattr(functional, name))
        _active.append(handle)


def _deactivate(handle: patch) -> None:
    with _lock:
        if handle not in _active:
            return  # unpatch() has already removed it
        _active.remove(handle)
        if not _active:
            for name in _NAMES:
                # If other code has replaced the function since then, its replacement stays.
                if getattr(F, name) is getattr(functional, name):
                    setattr(F, name, _replaced.pop(name))
