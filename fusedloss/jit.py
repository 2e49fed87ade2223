"""Compiles the extension and custom losses at first use, with torch.utils.cpp_extension.load, and caches the result.

    fusedloss.jit.load()           # if nothing is prebuilt, compile now instead of at the first loss
    fusedloss.jit.load(cuda=True)  # with CUDA, or raise an error that names what is missing

The cache holds one folder per build. Its name is a hash of everything that could change the build:

    cpu-0123456789abcdef/
        flock        locked by the process that compiles; the system unlocks it whenever that process ends
        attempt-*/   one folder per attempt, so that a killed attempt cannot disturb the next one
        done.json    written last, and atomically: names the finished attempt
        failed.log   the compiler's output of a failed attempt

A library is loaded only from a folder to which nobody but the user and root can write. If the cache cannot be used, a
line tells the reason, and the build is made in a temporary folder for this process only. Reasons are that other users
can write to the cache, that it is read-only, full or mounted with noexec, or that ninja cannot parse its path.

Old folders are not removed. The whole cache can be deleted at any time.
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

_SECONDS = {".cpp": 9, ".cu": 40}  # to compile one source, for the estimate in the progress line
_CUDA_ENVIRONMENT = ("TORCH_CUDA_ARCH_LIST", "CC", "PYTORCH_NVCC", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")

_FULL = re.compile(r"No space left on device|Disk quota exceeded|File too large|terminated with signal 7")
# The loader's messages if the file system or a policy forbids executing its files.
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
    """Load the extension now, so that no loss has to wait for it, and make fusedloss use it from now on.

    This is the extension in use, else the prebuilt one, else one from the cache, else it is compiled. With the
    environment variable FUSEDLOSS_JIT=1 it always comes from the cache or is compiled.

    Args:
        verbose: show the commands of a build. Default False.
        cuda: True accepts only an extension with CUDA, False only one without. None, the default, follows the
            environment variable FUSEDLOSS_CUDA. If that is not set, None accepts what is found, and otherwise compiles
            with CUDA if a CUDA build of torch, its toolkit and a GPU are present.

    Returns:
        The compiled module. `fusedloss.functional` uses it without further steps.

    Raises:
        RuntimeError: something that compiling needs is missing, or compiling failed.
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
    """The module that the plan describes. The caller must hold _backend.lock; this function locks out other processes.

    why: why no prebuilt module is used, for the line that announces the compilation.
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
    """Something that is compiled once, and later found in its folder of the cache."""

    plan: Plan
    name: str  # of the library, without the suffix
    folder: Path
    says: str  # what is compiled, for the progress line
    seconds: int  # the estimated time of the build
    opens: Callable[[Path], Any]  # makes the result from the library; raises OSError or ImportError if it cannot
    generated: Mapping[str, str] = field(default_factory=dict)  # texts by file name, compiled instead of plan.sources


def compiled(build: Build, verbose: bool = False) -> Any:
    """The result of `opens` for the library, which is compiled if the cache does not have it."""
    # Links are resolved first. Otherwise one could be changed between the check of a folder and the load from it.
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
    """FUSEDLOSS_CACHE_DIR, else fusedloss/ in TORCH_EXTENSIONS_DIR, in XDG_CACHE_HOME or in ~/.cache.

    Without a home directory that can be written, as with the numeric user ids of containers, it is a folder among the
    temporary files.
    """
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
    except OSError:  # no folder for temporary files can be written; the build will report that
        temporary = Path("/tmp")
    return temporary.absolute() / f"fusedloss-{os.geteuid()}"


def cache_key(plan: Plan, generated: Mapping[str, str] | None = None) -> str:
    """A hash of everything that could change the build. torch's own key lacks torch's full version and all headers."""
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
    """Nothing can be compiled in a folder, or loaded from it. The message continues a sentence about the folder."""


def _compile_once(build: Build, verbose: bool) -> Any:
    _check_tools()
    try:
        _make(build.folder)
        _check(build.folder)  # again: another user can have made the folder in the meantime
        with _locked(build.folder) as alone:
            opened = _finished(build)  # the process that held the lock may have compiled it
            if opened is None:
                if alone:
                    for leftover in build.folder.glob("attempt-*"):
                        shutil.rmtree(leftover, ignore_errors=True)
                opened = _compile(build, verbose)
    except OSError as error:
        raise _UnusableFolderError(f"cannot be written ({error.strerror or error})") from None
    return opened


def _compile_apart(build: Build, verbose: bool, reason: str) -> Any:
    """Compile in a temporary folder. When the process ends it is removed, except for the log of a failure."""
    _check_tools()
    reasons = [reason]
    with contextlib.suppress(OSError):  # no folder for temporary files can be written
        tempfile.gettempdir()
    for parent in dict.fromkeys(os.path.realpath(path) for path in (tempfile.tempdir, "/var/tmp", "/dev/shm") if path):
        try:
            folder = Path(tempfile.mkdtemp(prefix="fusedloss-", dir=parent))
            try:
                _check(folder)
                opened = _compile(replace(build, folder=folder), verbose)
            except RuntimeError:
                with contextlib.suppress(OSError):  # it fails if the folder holds the log that the error names
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
    except OSError as error:  # the library is loaded, so only the next process has to compile again
        _say(f"fusedloss: the build cannot be kept in {build.folder} ({error.strerror or error})")
        atexit.register(shutil.rmtree, attempt, ignore_errors=True)
    return opened


def _publish(plan: Plan, library: Path, folder: Path) -> None:
    for leftover in library.parent.iterdir():
        if leftover != library and (leftover.is_file() or leftover.is_symlink()):
            leftover.unlink()
    library.chmod(0o755)  # with some umasks, the next process would not trust it
    plan.write_info(library)
    done = {"file": str(library.relative_to(folder)), "size": library.stat().st_size}
    draft = library.with_name("done.json")
    draft.write_text(json.dumps(done) + "\n")
    draft.chmod(0o644)
    draft.replace(folder / "done.json")


def _finished(build: Build) -> Any | None:
    """The result of a finished build; None if there is none, or if it cannot be loaded and must be built again."""
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
    """Lock other processes out of this folder; yield True if that worked.

    It yields False if the file system has no locks (some NFS). Two processes may then compile at the same time, each in
    its own attempt, and both results are correct.
    """
    import fcntl  # here, because Windows lacks it, and importing fusedloss there must work: it reports an error later

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
            if alone:  # a process that was forked meanwhile shares the lock, and closing the file would not release it
                fcntl.flock(file, fcntl.LOCK_UN)


# ---- checks of folders


def _make(folder: Path) -> None:
    """Make this folder and its missing parents, accessible to the user alone with any umask, and test writing to it."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
    tempfile.TemporaryFile(dir=folder).close()


def _check(folder: Path) -> None:
    """Raise _UnusableFolderError if this folder, which need not exist yet, cannot be used.

    That is the case if nothing can be compiled in it or loaded from it, or if other users could replace a library in it
    by their own.
    """
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
    """Raise _UnusableFolderError if anyone but the user and root can write to this path.

    If it is a folder `above` the one in question, three exceptions apply. It may be sticky, as /tmp is: other users
    cannot replace the user's files there. It may be writable for the user's own group, as is the default on many
    systems. It may belong to the id that stands for all unknown ids in a container.
    """
    # The path is resolved. If a link has replaced it since, its mode is open to all, and so it is refused.
    status = os.lstat(path)
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
    """True if the group has the user's name. By convention, such a group has no other members."""
    import grp  # here, because Windows has neither module
    import pwd

    try:
        return grp.getgrgid(group).gr_name == pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return False


# ---- failures while compiling, and messages


def _end_compilers(attempt: Path) -> None:
    """Kill the compilers that still run in this folder.

    If an interrupt reaches Python alone, as in a notebook, torch ends ninja but not the compilers that ninja started.
    Only these have both this working directory and the session id of this process.
    """
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
    except OSError:  # the process has ended, or belongs to another user
        return False


def _failure(error: Exception, folder: Path) -> Exception:
    text = str(error)
    if isinstance(error, OSError) and error.errno in _FOLDER_ERRORS:
        return _UnusableFolderError(f"cannot be written ({error.strerror})")
    from_loader = isinstance(error, ImportError | OSError) and not isinstance(error, ModuleNotFoundError)
    if from_loader and getattr(error, "errno", None) is None:
        text = str(error.__cause__ or error)  # torch may wrap the loader's error in one of its own
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
    """Print to stderr. A loss must not fail because a message cannot be printed, so errors are ignored."""
    # A notebook shows stderr on a pink background, as if something had failed, so stdout is used there.
    in_notebook = type(sys.stderr).__module__ == "ipykernel.iostream"
    stream = sys.stdout if in_notebook else sys.stderr
    if stream is not None:  # it is None if it was closed before Python started
        with contextlib.suppress(OSError, ValueError):
            print(text, end=end, file=stream, flush=True)


@functools.cache
def _say_once(text: str) -> None:
    _say(text)


@contextlib.contextmanager
def _streams_that_flush() -> Iterator[None]:
    """Replace stdout and stderr by a buffer if they cannot be flushed.

    torch flushes both before it runs ninja, and fails if one is missing, closed, or a pipe without a reader.
    """
    with contextlib.ExitStack() as stack:
        for stream, redirect in ((sys.stdout, contextlib.redirect_stdout), (sys.stderr, contextlib.redirect_stderr)):
            try:
                stream.flush()
            except (AttributeError, OSError, ValueError):
                stack.enter_context(redirect(io.StringIO()))
        yield
