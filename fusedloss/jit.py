"""Compile at first use, with torch.utils.cpp_extension.load, and keep the result: the extension, and custom losses.

    fusedloss.jit.load()           # compile now, where nothing is prebuilt, and not at the first loss
    fusedloss.jit.load(cuda=True)  # with CUDA, or an error that names what is missing

The cache holds one folder a build, named by a hash of everything that could change the build:

    cpu-0123456789abcdef/
        flock        locked by the process that compiles; the system unlocks it when that process ends, however it ends
        attempt-*/   one a try, so that a try that was killed leaves nothing which the next one could trip over
        done.json    written last, and at once: which try is the finished one
        failed.log   what the compiler said when a try failed

A library is loaded only from a folder in which nobody but the user and root can put one. Where the cache cannot be used
(other users can write to it, it cannot be written, it is full, it is mounted with noexec, or its path is none for
ninja), a line says so, and the build is made in a temporary folder for this process only.

Old folders are not removed; the whole cache can be deleted at any time.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import platform
import re
import shutil
import signal
import stat
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
from ._build import UNPARSABLE, BuildError, Plan, check_torch_path, cuda_setting, find_ninja, header_files, make_plan

_SECONDS = {".cpp": 9, ".cu": 40}  # what one source takes, for the estimate in the progress line
_CUDA_ENVIRONMENT = ("TORCH_CUDA_ARCH_LIST", "CC", "PYTORCH_NVCC", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")

_FULL = re.compile(r"No space left on device|Disk quota exceeded|File too large|terminated with signal 7")
# What the loader says where the file system or a policy forbids to execute the files in it.
_NOT_EXECUTABLE = re.compile(r"failed to map segment|Operation not permitted|Permission denied")
_FOLDER_ERRORS = (
    errno.EACCES,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.ENOSPC,
    errno.EPERM,
    errno.EROFS,
    errno.ESTALE,
)

_loaded: dict[str, ModuleType] = {}


def load(verbose: bool = False, cuda: bool | None = None) -> ModuleType:
    """Make the extension ready, so that no loss has to wait for it, and let fusedloss use it from now on.

    It is the one in use, else the prebuilt one, else it is compiled or taken from the cache. The environment variable
    FUSEDLOSS_JIT=1 asks for one from the cache, or a new one, in any case.

    Args:
        verbose: show the commands of a build.
        cuda: True takes only one with CUDA, and raises RuntimeError where something to compile it is missing; False
            takes only one without; None follows the environment variable FUSEDLOSS_CUDA, else takes what is there, or
            compiles with CUDA where a CUDA build of torch, its toolkit and a GPU are present.

    Returns:
        The compiled module. fusedloss.functional finds it by itself.
    """
    with _backend.lock:
        try:
            module = _backend.ready(cuda_setting() if cuda is None else cuda)
            if module is None:
                plan = make_plan(cuda=cuda, needs_gpu=True)
                module = compiled_module(plan, verbose=verbose, why=_backend.why_compile())
        except BuildError as error:
            raise RuntimeError(f"fusedloss: {error}") from None
        _backend.use(module)
    return module


def compiled_module(plan: Plan, cache: Path | None = None, verbose: bool = False, why: str = "") -> ModuleType:
    """The module that the plan describes. The caller holds _backend.lock; other processes are kept out here.

    why: what keeps it from being prebuilt, for the line that says what is compiled.
    """
    key = cache_key(plan)
    if key not in _loaded:
        what = Build(
            plan,
            name=f"fusedloss_{plan.device}_{key}",
            folder=(cache or cache_directory()) / f"{plan.device}-{key}",
            says=f"{plan.summary()}; {why}" if why else plan.summary(),
            seconds=_estimate(plan),
            opens=lambda library: _backend.import_library(library.stem, library),
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
    # Resolved first, so that what is checked and what is loaded are the same, whoever may change a link.
    build = replace(build, folder=Path(os.path.realpath(build.folder)))
    try:
        opened = _finished(build)
        return _compile_once(build, verbose) if opened is None else opened
    except _UnusableFolderError as error:
        _say(
            f"fusedloss: the cache {build.folder} {error}, so this build is for this process only; "
            "FUSEDLOSS_CACHE_DIR names another cache"
        )
        return _compile_apart(build, verbose, f"{build.folder} {error}")


def cache_directory() -> Path:
    """FUSEDLOSS_CACHE_DIR, else fusedloss/ in TORCH_EXTENSIONS_DIR, in XDG_CACHE_HOME or in ~/.cache; without a home
    directory that can be written, as for the numeric user ids of containers, a folder among the temporary files."""
    for variable, folder in (
        ("FUSEDLOSS_CACHE_DIR", ""),
        ("TORCH_EXTENSIONS_DIR", "fusedloss"),
        ("XDG_CACHE_HOME", "fusedloss"),
    ):
        chosen = os.environ.get(variable)
        if chosen:
            try:
                return Path(chosen).expanduser().absolute() / folder
            except RuntimeError:
                _say_once(
                    f"fusedloss: {variable} is {chosen}, but no home directory is known, so the cache is "
                    f"{_without_home()}; set {variable} to a path without ~"
                )
                return _without_home()
    try:
        caches = Path.home().absolute() / ".cache"
    except RuntimeError:
        return _without_home()
    usable = os.path.exists(caches) or os.access(caches.parent, os.W_OK)
    return caches / "fusedloss" if usable else _without_home()


def _without_home() -> Path:
    try:
        temporary = Path(tempfile.gettempdir())
    except OSError:  # none can be written, of which the build will tell
        temporary = Path("/tmp")
    return temporary.absolute() / f"fusedloss-{os.geteuid()}"


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
        plan.compiler.words[1:],
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


class _UnusableFolderError(Exception):
    """Nothing can be compiled in a folder, or loaded from it. The message follows the name of the folder."""


def _compile_once(build: Build, verbose: bool) -> Any:
    _check_tools()
    try:
        _make(build.folder)
        _check(build.folder)  # again: another user can have been faster
        with _locked(build.folder) as alone:
            opened = _finished(build)  # by the process that was waited for
            if opened is None:
                if alone:
                    for leftover in build.folder.glob("attempt-*"):
                        shutil.rmtree(leftover, ignore_errors=True)
                opened = _compile(build, verbose)
    except OSError as error:
        raise _UnusableFolderError(f"cannot be written ({error.strerror or error})") from None
    return opened


def _compile_apart(build: Build, verbose: bool, reason: str) -> Any:
    """Compile in a temporary folder, of which nothing is left when the process ends but the log of a failure."""
    _check_tools()
    reasons = [reason]
    with contextlib.suppress(OSError):  # there is none that can be written
        tempfile.gettempdir()
    for parent in dict.fromkeys(os.path.realpath(path) for path in (tempfile.tempdir, "/var/tmp", "/dev/shm") if path):
        try:
            folder = Path(tempfile.mkdtemp(prefix="fusedloss-", dir=parent))
            try:
                _check(folder)
                opened = _compile(replace(build, folder=folder), verbose)
            except RuntimeError:
                with contextlib.suppress(OSError):  # the folder stays if it holds the log, which the error names
                    folder.rmdir()
                raise
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
        except _UnusableFolderError as error:
            reasons.append(f"{parent} {error}")
        except OSError as error:
            reasons.append(f"{parent} cannot be written ({error.strerror or error})")
        else:
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            return opened
    raise BuildError(
        f"no folder is found to compile in: {'; '.join(reasons)}; set FUSEDLOSS_CACHE_DIR to a folder of your own, "
        "with space left, that only you can write and that is not mounted with noexec"
    )


def _check_tools() -> None:
    if find_ninja() is None:
        raise BuildError("ninja is missing, which compiling at first use needs; get it with: pip install ninja")
    check_torch_path()


def _compile(build: Build, verbose: bool) -> Any:
    plan = build.plan
    attempt = Path(tempfile.mkdtemp(prefix="attempt-", dir=build.folder))
    start = time.perf_counter()
    _say(f"fusedloss: compiling {build.says} (once, about {build.seconds} s) ...", end="\n" if verbose else " ")
    try:
        for name, text in build.generated.items():
            (attempt / name).write_text(text)
        csrc = plan.csrc
        if UNPARSABLE.search(str(csrc)):
            csrc = attempt / "csrc"
            csrc.symlink_to(plan.csrc)
        sources = [attempt / name for name in build.generated if not name.endswith(".h")]
        sources = sources or [csrc / path.relative_to(plan.csrc) for path in plan.sources]
        with plan.environment() as cpp_extension, _streams_that_flush():
            loaded = cpp_extension.load(
                name=build.name,
                sources=[str(path) for path in sources],
                extra_cflags=plan.cxx_flags,
                extra_cuda_cflags=plan.nvcc_flags,
                extra_ldflags=plan.link_flags,
                extra_include_paths=[str(csrc), str(attempt)],
                build_directory=str(attempt),
                with_cuda=plan.toolkit is not None,
                is_python_module=not build.generated,
                verbose=verbose,
            )
    except BaseException as error:
        _end_compilers(attempt)
        _say("failed")
        shutil.rmtree(attempt, ignore_errors=True)
        if isinstance(error, Exception):
            raise _failure(error, build.folder) from None
        raise
    _say(f"{time.perf_counter() - start:.1f} s")
    library = Path(loaded if build.generated else loaded.__file__)
    opened = build.opens(library) if build.generated else loaded
    try:
        _publish(plan, library, build.folder)
    except OSError as error:  # it is compiled and loaded; only the next process has to do so again
        _say(f"fusedloss: the build cannot be kept in {build.folder} ({error.strerror or error})")
        atexit.register(shutil.rmtree, attempt, ignore_errors=True)
    return opened


def _publish(plan: Plan, library: Path, folder: Path) -> None:
    for leftover in library.parent.iterdir():
        if leftover != library and (leftover.is_file() or leftover.is_symlink()):
            leftover.unlink()
    library.chmod(0o755)  # whatever the umask is, for otherwise the next process would not trust it
    plan.write_info(library)
    done = {"file": str(library.relative_to(folder)), "size": library.stat().st_size}
    draft = library.with_name("done.json")
    draft.write_text(json.dumps(done) + "\n")
    draft.chmod(0o644)
    draft.replace(folder / "done.json")


def _finished(build: Build) -> Any | None:
    """The finished build; None if there is none, or one that cannot be loaded and is to be made anew."""
    _check(build.folder)
    note = build.folder / "done.json"
    try:
        _check_writers(note)
        done = json.loads(note.read_text())
        library = Path(os.path.realpath(build.folder / done["file"]))
        if build.folder not in library.parents:
            return None
        for path in (library, *library.parents):
            if path == build.folder:
                break
            _check_writers(path)
        return build.opens(library) if library.stat().st_size == done["size"] else None
    except PermissionError as error:
        raise _UnusableFolderError(f"cannot be read ({error.strerror})") from None
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        if _NOT_EXECUTABLE.search(str(error)):
            raise _UnusableFolderError(f"holds a library that cannot be loaded ({error})") from None
        return None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Keep other processes out of this folder. False where the file system has no locks (some NFS): two processes then
    both compile, each its own attempt, and either result is right."""
    import fcntl  # here, because Windows has none: fusedloss is imported there, and says that only Linux is supported

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


# ---- folders that can be used, and trusted


def _make(folder: Path) -> None:
    """Make this folder and those above it, for the user alone whatever the umask is."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
    tempfile.TemporaryFile(dir=folder).close()


def _check(folder: Path) -> None:
    """Raise _UnusableFolderError where nothing can be compiled in this folder, which need not exist yet, or nothing in
    it can be loaded, or other users could put a library of theirs in its place."""
    found = UNPARSABLE.search(str(folder))
    if found:
        raise _UnusableFolderError(f"has {found[0]!r} in its path, which ninja cannot parse")
    try:
        for path in (folder, *folder.parents):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                _check_writers(path, above=path != folder)
        existing = next(path for path in (folder, *folder.parents) if path.is_dir())
        if os.statvfs(existing).f_flag & os.ST_NOEXEC:
            raise _UnusableFolderError("is mounted with noexec, which forbids to load a library from it")
    except OSError as error:
        raise _UnusableFolderError(f"cannot be read ({error.strerror or error})") from None


def _check_writers(path: Path, above: bool = False) -> None:
    """Raise _UnusableFolderError if others than the user and root can write there. A folder `above` the one in question
    may be sticky, as /tmp is: nobody can replace there what belongs to the user. It may also be open to the user's own
    group, as many systems have it; and it may belong to the id that stands for all ids unknown in a container."""
    status = os.lstat(path)  # of resolved paths; a link that took a folder's place since is open to all, by its mode
    user = os.geteuid()
    if status.st_uid not in (0, user) and not (above and status.st_uid == _unknown_user()):
        raise _UnusableFolderError(f"is not trusted, because {path} belongs to another user (id {status.st_uid})")
    harmless = 0
    if above and stat.S_ISDIR(status.st_mode):
        if status.st_mode & stat.S_ISVTX:
            harmless = 0o022
        elif _is_own_group(status.st_gid):
            harmless = 0o020
    if status.st_mode & 0o022 & ~harmless:
        remedy = "" if above else "; delete it to have it made anew"
        raise _UnusableFolderError(
            f"is not trusted, because other users can write to {path} (mode {stat.S_IMODE(status.st_mode):o}{remedy})"
        )


def _unknown_user() -> int | None:
    try:
        return int(Path("/proc/sys/kernel/overflowuid").read_text())
    except (OSError, ValueError):
        return None


def _is_own_group(group: int) -> bool:
    """Whether this is the group of the user's own name, which has no other members by convention."""
    import grp  # here, because Windows has neither
    import pwd

    try:
        return grp.getgrgid(group).gr_name == pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return False


# ---- what can go wrong while it compiles


def _end_compilers(attempt: Path) -> None:
    """End what still runs in this folder. Where the interrupt of a notebook reaches Python alone, torch ends ninja but
    not the compilers that ninja has started. They have their working directory there, and the session of this process;
    nothing else has both."""
    for _ in range(100):
        running = [int(name) for name in os.listdir("/proc") if name.isdigit() and _works_in(name, attempt)]
        if not running:
            return
        for process in running:
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.01)


def _works_in(process: str, folder: Path) -> bool:
    try:
        return (
            os.readlink(f"/proc/{process}/cwd") == str(folder)
            and int(process) != os.getpid()
            and os.getsid(int(process)) == os.getsid(0)
        )
    except OSError:  # it has ended, or is another user's
        return False


def _failure(error: Exception, folder: Path) -> Exception:
    text = str(error)
    if isinstance(error, OSError) and error.errno in _FOLDER_ERRORS:
        return _UnusableFolderError(f"cannot be written ({error.strerror})")
    from_loader = isinstance(error, ImportError | OSError) and not isinstance(error, ModuleNotFoundError)
    if from_loader and getattr(error, "errno", None) is None:
        text = str(error.__cause__ or error)  # torch may put a sentence of its own before the loader's
        if _NOT_EXECUTABLE.search(text):
            return _UnusableFolderError(f"holds a library that cannot be loaded ({text})")
        return RuntimeError(f"fusedloss: the library is compiled, but cannot be loaded: {text}")
    full = _FULL.search(text)
    if full:
        return _UnusableFolderError(f"or the folder for temporary files is full ({full[0]})")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"error:|undefined |Killed", line)]
    shown = "\n  ".join((telling or lines[-5:])[:5])
    log = folder / "failed.log"
    try:
        log.write_text(text + "\n")
    except OSError:
        return RuntimeError(f"fusedloss: compiling failed\n  {shown}")
    return RuntimeError(f"fusedloss: compiling failed\n  {shown}\nThe full log is in {log}")


def _estimate(plan: Plan) -> int:
    each = sorted((_SECONDS[path.suffix] for path in plan.sources), reverse=True)
    cores = len(os.sched_getaffinity(0))
    return max([*each[:1], round(sum(each) / cores)])


def _say(text: str, end: str = "\n") -> None:
    """Print to stderr; that nobody can read it is no reason for a loss to fail."""
    # A notebook shows what comes from stderr on pink, as if something had failed.
    in_notebook = type(sys.stderr).__module__ == "ipykernel.iostream"
    stream = sys.stdout if in_notebook else sys.stderr
    if stream is not None:  # closed before Python started
        with contextlib.suppress(OSError, ValueError):
            print(text, end=end, file=stream, flush=True)


@functools.cache
def _say_once(text: str) -> None:
    _say(text)


@contextlib.contextmanager
def _streams_that_flush() -> Iterator[None]:
    """torch flushes stdout and stderr before it runs ninja, and fails where one is missing, closed, or a pipe without a
    reader. Such a stream is put aside meanwhile."""
    with contextlib.ExitStack() as stack:
        for stream, redirect in ((sys.stdout, contextlib.redirect_stdout), (sys.stderr, contextlib.redirect_stderr)):
            try:
                stream.flush()
            except (AttributeError, OSError, ValueError):
                stack.enter_context(redirect(io.StringIO()))
        yield
