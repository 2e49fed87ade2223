"""The compiled module behind the losses: the prebuilt `fusedloss._C`, else one compiled now, else a clear error."""

from __future__ import annotations

import importlib
import json
import os
import threading
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import torch

from ._build import BuildError, info_file, make_plan, release

lock = threading.RLock()  # held while the module is looked for, compiled or replaced
_module: ModuleType | None = None
_debug = os.environ.get("FUSEDLOSS_DEBUG") == "1"


def extension() -> ModuleType:
    """The compiled module. The first call finds or compiles it, which can take a minute; later ones return at once."""
    if _module is None:
        with lock:
            if _module is None:
                use(_find())
    assert _module is not None
    return _module


def use(module: ModuleType) -> None:
    """Take this module from now on."""
    global _module
    if _debug:
        module.set_debug(True)
    _module = module


def debug(enabled: bool = True) -> None:
    """Look for class indices out of range on the host, before a kernel is launched; FUSEDLOSS_DEBUG=1 does so too.

    On CUDA an index out of range fails a device-side assertion, as with torch, after which the process can use the GPU
    no more. With this it is an IndexError that names row, value and number of classes, and the process goes on. Every
    cross entropy then waits for the GPU, and none can be captured in a CUDA graph. On the CPU it is always raised.
    """
    global _debug
    if not isinstance(enabled, bool):
        raise TypeError(f"debug: enabled must be a bool, got {type(enabled).__name__}")
    with lock:
        _debug = enabled
        if _module is not None:
            _module.set_debug(enabled)


def describe() -> str:
    """One line: where the compiled module comes from, and what it was built for."""
    library = Path(extension().__file__ or "")
    origin = "prebuilt" if library.parent == Path(__file__).parent else f"compiled at first use, in {library.parent}"
    return f"fusedloss: {_info(library).get('summary', 'built for an unknown torch')} ({origin})"


def _find() -> ModuleType:
    # At run time FUSEDLOSS_JIT=1 passes over a prebuilt module, for instance one of an older torch.
    prebuilt = None if os.environ.get("FUSEDLOSS_JIT") == "1" else _prebuilt()
    if prebuilt is not None:
        return prebuilt
    from . import jit  # here, because jit imports this file

    try:
        return jit.compiled_module(make_plan(needs_gpu=True))
    except BuildError as error:
        raise ImportError(f"fusedloss: nothing is prebuilt, and it cannot be compiled now: {error}") from None


def _prebuilt() -> ModuleType | None:
    library = _library()
    if library is None:
        return None
    built_for = _info(library).get("torch", "(unknown)")
    remedy = (
        f"fusedloss: the compiled part was built for torch {built_for}, and this is torch {torch.__version__}. "
        "Rebuild it from its source with `pip install --no-build-isolation --no-deps --force-reinstall .`, or set "
        "FUSEDLOSS_JIT=1 to compile it at its first use"
    )
    # torch keeps its binary interface within a minor version only. Across two, it may load and then misread memory.
    if built_for[:1].isdigit() and release(built_for)[:2] != release(torch.__version__)[:2]:
        raise ImportError(remedy)
    try:
        return importlib.import_module(f"{__package__}._C")
    except ImportError as error:
        raise ImportError(f"{remedy} ({error})") from None


def _library() -> Path | None:
    """The prebuilt file beside this one. importlib.util.find_spec could find that of another, editable install."""
    candidates = [Path(__file__).with_name(f"_C{suffix}") for suffix in EXTENSION_SUFFIXES]
    return next((path for path in candidates if path.is_file()), None)


def _info(library: Path) -> dict[str, str]:
    try:
        return json.loads(info_file(library).read_text())
    except (OSError, ValueError):
        return {}
