"""Finds the compiled module behind the losses: the prebuilt `fusedloss._C`, else one that is compiled now.

A checkout in which nothing is compiled uses the prebuilt module of an installation from the same sources.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch

from ._build import BuildError, csrc_directory, info_file, make_plan, release, sources_digest

_FunctionT = TypeVar("_FunctionT", bound=Callable[..., Any])

PACKAGE = Path(__file__).resolve().parent

lock = threading.RLock()  # held while the module is looked for, compiled or replaced
_module: ModuleType | None = None
_debug = os.environ.get("FUSEDLOSS_DEBUG") == "1"
_warned = False  # True once the warning about missing CUDA kernels was given


def extension() -> ModuleType:
    """The compiled module. The first call finds or compiles it, which can take minutes; later calls return at once.

    Raises:
        ImportError: nothing usable is prebuilt, and something that compiling needs is missing.
    """
    if _module is None:
        with lock:
            if _module is None:
                use(_find())
    assert _module is not None
    return _module


def use(module: ModuleType) -> None:
    """Use this module from now on."""
    global _module
    if _debug:
        module.set_debug(True)
    _module = module


def debug(enabled: bool = True) -> None:
    """Check class indices on the host, before a kernel is launched. FUSEDLOSS_DEBUG=1 switches this on too.

    On CUDA, an index out of range fails a device-side assertion, as in torch, after which the process can no longer use
    the GPU. In debug mode it raises an IndexError that names the row, the value and the number of classes, and the
    process can go on. Every cross entropy and NLL loss then waits for the GPU, and none can be captured in a CUDA
    graph. On the CPU the IndexError is always raised.

    Args:
        enabled: True switches the check on, False off. Default True.

    Raises:
        TypeError: enabled is not a bool.
    """
    global _debug
    if not isinstance(enabled, bool):
        raise TypeError(f"debug: enabled must be a bool, got {type(enabled).__name__}")
    with lock:
        _debug = enabled
        if _module is not None:
            _module.set_debug(enabled)


def called_by_compiler(function: _FunctionT) -> _FunctionT:
    """Make torch.compile call this function while it traces and take its result for a constant.

    torch.compiler.assume_constant_result does the same, but imports the whole compiler, which takes two seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # the attribute that the compiler looks for
    return function


def describe() -> str:
    """One line that tells what the compiled module was built for, what was left out and why, and where it is.

    If nothing is compiled yet, this compiles it.

    Raises:
        ImportError: nothing usable is prebuilt, and something that compiling needs is missing.
    """
    library = Path(extension().__file__ or "")
    origin = "prebuilt" if library.name.startswith("_C.") else "compiled at first use"
    return f"fusedloss: {_info(library).get('summary', 'for an unknown torch')} ({origin}, in {library.parent})"


def with_cuda() -> bool:
    """True if the module has CUDA kernels. Asked for a call with CUDA tensors; the first False comes with a warning."""
    global _warned
    found: bool = extension().with_cuda
    if not found and not _warned:
        _warned = True
        warnings.warn(_without_cuda(), stacklevel=2)
    return found


def _without_cuda() -> str:
    text = (
        "fusedloss has no CUDA kernels here, so torch's own functions compute the losses of CUDA tensors, at torch's "
        f"speed: the build is {describe().removeprefix('fusedloss: ')}."
    )
    if torch.version.cuda is None:
        return text
    return (
        f"{text} To get them, install a CUDA toolkit with nvcc, version {release(torch.version.cuda)[0]}.x like this "
        "torch's, and call fusedloss.jit.load(cuda=True), which compiles them, or install fusedloss again from source."
    )


def ready(cuda: bool | None) -> ModuleType | None:
    """A module that need not be compiled: the one in use, else the prebuilt one.

    cuda: True accepts only a module with CUDA, False only one without, None either.

    None if there is no such module, if the prebuilt one does not fit this torch, or if FUSEDLOSS_JIT=1 asks for a new
    one.
    """
    if os.environ.get("FUSEDLOSS_JIT") == "1":
        return None
    places: tuple[Callable[[], ModuleType | None], ...] = (lambda: _module, prebuilt)
    for find in places:
        with contextlib.suppress(ImportError):
            module = find()
            if module is not None and cuda in (None, module.with_cuda):
                return module
    return None


def _find() -> ModuleType:
    from . import jit  # here, because jit imports this file

    try:
        # FUSEDLOSS_JIT=1 ignores a prebuilt module at run time, for instance one that was built for an older torch.
        module = None if os.environ.get("FUSEDLOSS_JIT") == "1" else prebuilt()
        if module is not None:
            return module
        return jit.compiled_module(make_plan(needs_gpu=True), why=why_compile())
    except BuildError as error:
        raise ImportError(f"fusedloss: nothing is prebuilt, and it cannot be compiled now: {error}") from None


def prebuilt() -> ModuleType | None:
    """The module that an installation, or a build in the checkout, has left; None if there is none.

    Raises:
        ImportError: the module in this package was built for another torch, or cannot be loaded.
    """
    library = _library(PACKAGE)
    if library is None:
        for other, unfit in _installed():
            with contextlib.suppress(ImportError):
                if not unfit:
                    return _import(other)
        return None
    built_for = _info(library).get("torch", "(unknown)")
    remedy = (
        f"fusedloss: the compiled part was built for torch {built_for}, and this is torch {torch.__version__}. "
        "Rebuild it from its source with `pip install --no-build-isolation --no-deps --force-reinstall .`, or set "
        "FUSEDLOSS_JIT=1 to compile it at its first use"
    )
    # torch keeps its binary interface only within a minor version. A module of another one may load and then misread
    # memory.
    if built_for[:1].isdigit() and not _fits(built_for):
        raise ImportError(remedy)
    try:
        return _import(library)
    except ImportError as error:
        raise ImportError(f"{remedy} ({error})") from None


def _installed() -> Iterator[tuple[Path, str]]:
    """The compiled parts of the other installations on sys.path, each with the reason why it cannot be used here.

    The reason is "" if it can be used.
    """
    for entry in sys.path:
        folder = Path(entry or os.curdir).absolute() / PACKAGE.name
        library = None if folder.resolve() == PACKAGE else _library(folder)
        if library is not None:
            info = _info(library)
            built_for = info.get("torch", "")
            if info.get("sources") != sources_digest(csrc_directory()):
                yield library, "of other sources"
            elif not _fits(built_for):
                yield library, f"for torch {built_for}"
            else:
                yield library, ""


def _fits(built_for: str) -> bool:
    return release(built_for)[:2] == release(torch.__version__)[:2]


def _import(library: Path) -> ModuleType:
    name = f"{__package__}._C"
    if name not in sys.modules:
        sys.modules[name] = import_library(name, library)
    return sys.modules[name]


def import_library(name: str, library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, library)
    if spec is None or spec.loader is None:
        raise ImportError(f"{library} is not a Python module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def why_compile() -> str:
    """Why no prebuilt module is used, and how to get one; "" if FUSEDLOSS_JIT=1 asks for a new one.

    The line that announces a compilation contains it.
    """
    if os.environ.get("FUSEDLOSS_JIT") == "1":
        return ""
    library = _library(PACKAGE)
    if library is not None:
        return f"the prebuilt one is {_info(library).get('summary', 'for an unknown torch')}"
    if (PACKAGE / "csrc").is_dir():
        why = f"{PACKAGE} was installed without a compiled part, which pip makes with --no-build-isolation"
    else:
        why = f"the checkout {PACKAGE.parent} has no compiled part, which `python setup.py build_ext --inplace` makes"
    others = [f"that in {library.parent} is {unfit}" for library, unfit in _installed() if unfit]
    if not others and any(PACKAGE.glob("_C.*.so")):
        others = ["that in it is for another Python"]
    return "; ".join([why, *others])


def _library(folder: Path) -> Path | None:
    """The compiled file in this folder for this version of Python."""
    names = [f"_C{suffix}" for suffix in EXTENSION_SUFFIXES]
    return next((folder / name for name in names if os.path.isfile(folder / name)), None)


def _info(library: Path) -> dict[str, str]:
    try:
        info: dict[str, str] = json.loads(info_file(library).read_text())
        return info
    except (OSError, ValueError):
        return {}
