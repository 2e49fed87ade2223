"""Adoption without a changed line: torch's own functions, replaced by the fused ones.

`nn.CrossEntropyLoss`, `nn.MSELoss` and every model look the functions up in `torch.nn.functional` when they are called,
so that replacing them there reaches all. A function taken beforehand (`from torch.nn.functional import cross_entropy`)
stays torch's.
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
_active: list[patch] = []  # torch's functions are replaced while there is one
_replaced: dict[str, Callable[..., Any]] = {}


class patch:
    """Replace `torch.nn.functional.cross_entropy`, `mse_loss` and its family by the fused ones, in the whole process.

    `fusedloss.patch()` does so until `fusedloss.unpatch()`; `with fusedloss.patch():` for a block, `@fusedloss.patch()`
    for the calls of a function. What the kernels do not cover is computed by torch's own functions, as ever.
    """

    def __init__(self) -> None:
        _activate(self)

    def __enter__(self) -> patch:
        if self not in _active:  # entered again, after it was left
            _activate(self)
        return self

    def __exit__(self, *exception: object) -> None:
        _deactivate(self)

    def __call__(self, function: _FunctionT) -> _FunctionT:
        """As a decorator: not now, but whenever the function runs."""
        _deactivate(self)

        @functools.wraps(function)
        def patched(*args: Any, **options: Any) -> Any:
            with patch():
                return function(*args, **options)

        return cast(_FunctionT, patched)


def unpatch() -> None:
    """Give `torch.nn.functional` its own functions back, however often `patch()` was called."""
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
            return  # unpatch() was first
        _active.remove(handle)
        if not _active:
            for name in _NAMES:
                # Whoever has replaced it since then keeps it.
                if getattr(F, name) is getattr(functional, name):
                    setattr(F, name, _replaced.pop(name))
