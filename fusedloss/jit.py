"""Compile at first use, with torch.utils.cpp_extension.load, and keep the result: the extension, and custom losses.

    fusedloss.jit.load()           # compile now and not at the first loss; a notebook shows the wait where it belongs
    fusedloss.jit.load(cuda=True)  # with CUDA, or an error that names what is missing

The cache holds one folder a build, named by a hash of everything that could change the build:

    cpu-0123456789abcdef/
        flock        locked by the process that compiles; the system unlocks it when that process ends, however it ends
        attempt-*/   one a try, so that a try that was killed leaves nothing which the next one could trip over
        done.json    written last, and at once: which try is the finished one
        failed.log   what the compiler said when a try failed

Old folders are not removed; the whole cache can be deleted at any time.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import _backend
from ._build import BuildError, Plan, find_ninja, header_files, make_plan

_SECONDS = {".cpp": 7, ".cu": 40}  # what one source takes, for the estimate in the progress line
_CUDA_ENVIRONMENT = ("TORCH_CUDA_ARCH_LIST", "CC", "PYTORCH_NVCC", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")

_loaded: dict[str, ModuleType] = {}


def load(verbose: bool = False, cuda: bool | None = None) -> ModuleType:
    """Compile the extension, or take it from the cache, and let fusedloss use it from now on.

    Args:
        verbose: show the commands of the build.
        cuda: True compiles with CUDA and raises RuntimeError where something for it is missing; False compiles for
            the CPU only; None follows the environment variable FUSEDLOSS_CUDA, else compiles with CUDA where a CUDA
            build of torch, its toolkit and a GPU are present.

    Returns:
        The compiled module. fusedloss.functional finds it by itself.
    """
    with _backend.lock:
        try:
            module = compiled_module(make_plan(cuda=cuda, needs_gpu=True), verbose=verbose)
        except BuildError as error:
            raise RuntimeError(f"fusedloss: {error}") from None
        _backend.use(module)
    return module


def compiled_module(plan: Plan, cache: Path | None = None, verbose: bool = False) -> ModuleType:
    """The module that the plan describes. The caller holds _backend.lock; other processes are kept out here."""
    key = cache_key(plan)
    if key not in _loaded:
        what = Build(
            plan,
            name=f"fusedloss_{plan.device}_{key}",
            folder=(cache or cache_directory()) / f"{plan.device}-{key}",
            says=plan.summary(),
            seconds=_estimate(plan),
            opens=_import,
        )
        _loaded[key] = compiled(what, verbose)
    return _loaded[key]


@dataclass(frozen=True)
class Build:
    """Something to be compiled once, and found in its folder of the cache from then on."""

    plan: Plan
    name: str  # of the library, without its ending
    folder: Path
    says: str  # what is compiled, for the line that tells
    seconds: int  # about
    opens: Callable[[Path], Any]  # the library -> what is made of it; OSError or ImportError where that fails
    generated: Mapping[str, str] = field(default_factory=dict)  # sources and headers, in place of the plan's sources


def compiled(build: Build, verbose: bool = False) -> Any:
    """What `opens` makes of the library, which is compiled if it is not there."""
    opened = _finished(build)
    return _compile_once(build, verbose) if opened is None else opened


def cache_directory() -> Path:
    """FUSEDLOSS_CACHE_DIR, else fusedloss/ in TORCH_EXTENSIONS_DIR, in XDG_CACHE_HOME or in ~/.cache."""
    own = os.environ.get("FUSEDLOSS_CACHE_DIR")
    if own:
        return Path(own).expanduser().absolute()
    shared = os.environ.get("TORCH_EXTENSIONS_DIR") or os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser().absolute() if shared else Path.home() / ".cache") / "fusedloss"


def cache_key(plan: Plan, generated: Mapping[str, str] | None = None) -> str:
    """A hash of all that could change the build. torch's own key knows neither its full version nor any header."""
    parts: list[object] = [
        torch.__version__,
        torch.version.git_version,
        torch.version.cuda,
        torch.compiled_with_cxx11_abi(),
        sysconfig.get_config_var("SOABI"),
        platform.machine(),
        platform.libc_ver(),
        plan.compiler.path,
        plan.compiler.version,
        plan.cxx_flags,
        plan.nvcc_flags,
        plan.link_flags,
    ]
    if plan.toolkit:
        parts += [str(plan.toolkit.home), plan.toolkit.version, [os.environ.get(name) for name in _CUDA_ENVIRONMENT]]
    if generated is not None:
        parts += sorted(generated.items())
    for path in [*([] if generated else plan.sources), *header_files(plan.csrc)]:
        parts += [path.relative_to(plan.csrc).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def _compile_once(build: Build, verbose: bool) -> Any:
    if find_ninja() is None:
        raise BuildError("ninja is missing, which compiling at first use needs; get it with: pip install ninja")
    build = replace(build, folder=_writable(build.folder))
    with _locked(build.folder) as alone:
        opened = _finished(build)  # by the process that was waited for
        if opened is None:
            if alone:
                for leftover in build.folder.glob("attempt-*"):
                    shutil.rmtree(leftover, ignore_errors=True)
            opened = _compile(build, verbose)
    return opened


def _compile(build: Build, verbose: bool) -> Any:
    plan = build.plan
    attempt = Path(tempfile.mkdtemp(prefix="attempt-", dir=build.folder))
    for name, text in build.generated.items():
        (attempt / name).write_text(text)
    sources = [attempt / name for name in build.generated if not name.endswith(".h")] or plan.sources
    start = time.perf_counter()
    try:
        with plan.environment() as cpp_extension:
            about = f"once, about {build.seconds} s"
            _say(f"fusedloss: compiling {build.says} ({about}) ...", end="\n" if verbose else " ")
            loaded = cpp_extension.load(
                name=build.name,
                sources=[str(path) for path in sources],
                extra_cflags=plan.cxx_flags,
                extra_cuda_cflags=plan.nvcc_flags,
                extra_ldflags=plan.link_flags,
                extra_include_paths=[str(plan.csrc), str(attempt)],
                build_directory=str(attempt),
                with_cuda=plan.toolkit is not None,
                is_python_module=not build.generated,
                verbose=verbose,
            )
    except BaseException as error:
        _say("failed")
        shutil.rmtree(attempt, ignore_errors=True)
        if isinstance(error, Exception):
            raise _failure(error, build.folder) from None
        raise
    _say(f"{time.perf_counter() - start:.1f} s")
    library = Path(loaded if build.generated else loaded.__file__)
    _publish(plan, library, build.folder)
    return build.opens(library) if build.generated else loaded


def _publish(plan: Plan, library: Path, folder: Path) -> None:
    for leftover in library.parent.iterdir():
        if leftover != library and leftover.is_file():
            leftover.unlink()
    plan.write_info(library)
    done = {"file": str(library.relative_to(folder)), "size": library.stat().st_size}
    draft = library.with_name("done.json")
    draft.write_text(json.dumps(done) + "\n")
    draft.replace(folder / "done.json")


def _finished(build: Build) -> Any | None:
    """The finished build; None if there is none, or one that cannot be loaded and is to be made anew."""
    try:
        done = json.loads((build.folder / "done.json").read_text())
        library = build.folder / done["file"]
        return build.opens(library) if library.stat().st_size == done["size"] else None
    except (OSError, ValueError, KeyError, ImportError):
        return None


def _import(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(library.stem, library)
    if spec is None or spec.loader is None:
        raise ImportError(f"{library} is no module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Keep other processes out of this folder. False where the file system has no locks (some NFS): two processes then
    both compile, each its own attempt, and either result is right."""
    with open(folder / "flock", "w") as file:
        alone = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("fusedloss: waiting for another process, which compiles the same ...")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            alone = False
        try:
            yield alone
        finally:
            if alone:  # said outright: a process forked meanwhile shares the lock, and would keep it beyond the close
                fcntl.flock(file, fcntl.LOCK_UN)


def _writable(folder: Path) -> Path:
    """This folder, made if need be; or a temporary one if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        _say(
            f"fusedloss: the cache {folder} cannot be written ({error.strerror}), so this build is for this process "
            "only; FUSEDLOSS_CACHE_DIR names another cache"
        )
        folder = Path(tempfile.mkdtemp(prefix="fusedloss-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _failure(error: Exception, folder: Path) -> RuntimeError:
    text = str(error)
    log = folder / "failed.log"
    with contextlib.suppress(OSError):
        log.write_text(text + "\n")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"error:|undefined |No space left|Killed", line)]
    shown = "\n  ".join((telling or lines[-5:])[:5])
    return RuntimeError(f"fusedloss: compiling failed\n  {shown}\nThe full log is in {log}")


def _estimate(plan: Plan) -> int:
    each = sorted((_SECONDS[path.suffix] for path in plan.sources), reverse=True)
    cores = len(os.sched_getaffinity(0))
    return max([*each[:1], round(sum(each) / cores)])


def _say(text: str, end: str = "\n") -> None:
    # A notebook shows what comes from stderr on pink, as if something had failed.
    in_notebook = type(sys.stderr).__module__ == "ipykernel.iostream"
    print(text, end=end, file=sys.stdout if in_notebook else sys.stderr, flush=True)
