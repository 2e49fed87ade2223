"""Decides which sources are compiled and with which flags, for setup.py and for the JIT.

setup.py loads this file by its path, before the package or torch can be imported. So this file imports nothing of the
package, and imports torch only inside the functions that need it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

MINIMUM_TORCH = "2.6.0"  # the oldest version that was built with and tested; pyproject.toml names it too
ARCHITECTURES = (80, 90, 100, 120)  # compiled for if no GPU is found: Ampere, Hopper, Blackwell
DEFAULT_TOOLKIT = Path("/usr/local/cuda")
CUDA_MACRO = "FUSEDLOSS_WITH_CUDA"
# Characters that torch writes into build.ninja unescaped, and that ninja does not read as a part of a path.
UNPARSABLE = re.compile(r"[$:|\r\n]")


class BuildError(RuntimeError):
    """Something that the build needs is missing. The message is one sentence that names it and tells how to get it."""


# ---- sources -------------------------------------------------------------------------------------------------------


def csrc_directory() -> Path:
    """The folder of the C++ and CUDA sources: inside an installed package, or beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    for candidate in (package / "csrc", package.parent / "csrc"):
        if (candidate / "bindings.cpp").is_file():
            return candidate
    raise BuildError(f"the C++ sources are missing: there is no csrc/bindings.cpp in {package} or {package.parent}")


def source_files(csrc: Path, cuda: bool) -> list[Path]:
    """Every file that is compiled.

    They are sorted, so that two machines build, link and hash them in the same order. The kernels come first, because
    they take longest: if one started last, the other cores would be idle until it ends.
    """
    patterns = [*(["kernels/cuda/*.cu"] if cuda else []), "kernels/cpu/*.cpp", "autograd/*.cpp", "ops/*.cpp", "*.cpp"]
    return [path for pattern in patterns for path in sorted(csrc.glob(pattern))]


def header_files(csrc: Path) -> list[Path]:
    """Every file that a source may include."""
    return sorted(path for path in csrc.rglob("*") if path.suffix in (".h", ".cuh"))


def sources_digest(csrc: Path) -> str:
    """A hash of the sources. Equal hashes give equal extensions with the same torch, compiler and flags."""
    digest = hashlib.sha256()
    for path in [*source_files(csrc, cuda=True), *header_files(csrc)]:
        digest.update(f"{path.relative_to(csrc).as_posix()} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()


# ---- what the machine has ------------------------------------------------------------------------------------------


def check_platform() -> None:
    if not sys.platform.startswith("linux"):
        raise BuildError(f"only Linux, with g++ or clang, is supported, and this is {sys.platform}")


def check_python_headers() -> None:
    include = sysconfig.get_path("include")
    if not (Path(include) / "Python.h").is_file():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise BuildError(
            f"the headers of Python {version} are missing, there is no Python.h in {include}; "
            f"install them (Debian, Ubuntu: apt install python{version}-dev)"
        )


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.13.0+cpu" is (2, 13, 0)."""
    return tuple(int(number) for number in re.findall(r"\d+", re.split(r"[^\d.]", version)[0]))


def import_torch() -> ModuleType:
    try:
        import torch
    except Exception as error:  # a torch with a missing library raises OSError
        raise BuildError(
            f"torch cannot be imported ({_first_line(error)}); the extension is compiled against it: install "
            f"torch>={MINIMUM_TORCH} first, and give pip the option --no-build-isolation, so that the build sees it"
        ) from None
    if release(torch.__version__) < release(MINIMUM_TORCH):
        raise BuildError(f"torch {torch.__version__} is too old, {MINIMUM_TORCH} or newer is needed")
    return torch


def check_torch_path() -> None:
    """Raise BuildError for a path of torch that would need quotes: torch writes it into command lines without any."""
    import torch

    folder = str(Path(torch.__file__).parent)
    found = re.search(r"[\s$'\"`\\;&|<>()*?]", folder)
    if found:
        raise BuildError(
            f"torch is in {folder}, and cannot compile an extension with {found[0]!r} in that path; install it in a "
            "folder whose path has none"
        )


def check_path_of_sources(folder: Path) -> None:
    found = UNPARSABLE.search(str(folder))
    if found:
        raise BuildError(
            f"the sources are in {folder}, and ninja cannot parse {found[0]!r} in that path; move them to a folder "
            "whose path has none, or set FUSEDLOSS_JIT=1 to compile at first use"
        )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _output(command: Sequence[str | Path]) -> str | None:
    """What a tool prints to stdout and stderr; None if it cannot be run or fails."""
    try:
        done = subprocess.run(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=60,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None


@dataclass(frozen=True)
class Compiler:
    words: tuple[str, ...]  # the command line: ("ccache", "g++")
    path: str
    version: str
    openmp: bool

    @property
    def is_clang(self) -> bool:
        return "clang" in self.version


def find_compiler() -> Compiler:
    """The compiler in CXX, which may be several words; without CXX, the first of c++, g++ and clang++ on the PATH."""
    chosen = os.environ.get("CXX", "").strip()
    for words in [_words(chosen)] if chosen else [("c++",), ("g++",), ("clang++",)]:
        path = shutil.which(words[0])
        version = (_output([*words, "--version"]) or "").partition("\n")[0] if path else ""
        if path and version:
            # g++ always comes with OpenMP. For clang, OpenMP is a package of its own.
            openmp = "clang" not in version or _links_openmp(words)
            return Compiler(words, os.path.realpath(path), version, openmp)
    what = f"CXX={chosen} cannot be run" if chosen else "neither c++, g++ nor clang++ is on the PATH"
    raise BuildError(f"there is no C++ compiler: {what}; install one (Debian, Ubuntu: apt install g++)")


def _words(chosen: str) -> tuple[str, ...]:
    """The words of CXX or CC. If the first is a path, it becomes absolute: the compiler runs in another folder."""
    try:
        first, *others = [chosen] if shutil.which(chosen) else shlex.split(chosen)
    except ValueError:  # a quote without an end, or quotes around nothing
        return (chosen,)
    return (os.path.abspath(first) if os.sep in first else first, *others)


def _links_openmp(words: Sequence[str]) -> bool:
    program = "#include <omp.h>\nint main() { return omp_get_max_threads() < 0; }\n"
    arguments = [*words, "-x", "c++", "-", "-fopenmp", "-o", os.devnull]
    return subprocess.run(arguments, input=program.encode(), capture_output=True).returncode == 0


@contextlib.contextmanager
def _one_word(words: Sequence[str]) -> Iterator[str]:
    """The compiler as one word, which is how torch reads CXX and CC.

    Several words become a script, in a folder from which files can be executed.
    """
    if len(words) == 1 and words[0] == shlex.quote(words[0]):
        yield words[0]
        return
    folders = [path for path in (tempfile.gettempdir(), "/var/tmp", "/dev/shm") if _executes(path)]
    with tempfile.TemporaryDirectory(prefix="fusedloss-cxx-", dir=folders[0] if folders else None) as folder:
        script = Path(folder, "c++")
        script.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        script.chmod(0o755)
        yield str(script)


def _executes(folder: str) -> bool:
    """True if files can be written to and executed from this folder, and its path needs no quotes in a shell."""
    plain = shlex.quote(folder) == folder
    return plain and os.access(folder, os.W_OK) and not os.statvfs(folder).f_flag & os.ST_NOEXEC


def find_ninja() -> str | None:
    """The folder of ninja. pip's ninja is not on the PATH if .venv/bin/python runs without activating the venv."""
    for folder in (None, sysconfig.get_path("scripts")):
        ninja = shutil.which("ninja", path=folder)
        if ninja:
            return str(Path(ninja).parent)
    return None


# ---- CUDA ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Toolkit:
    home: Path
    version: str  # "13.0"

    @property
    def nvcc(self) -> Path:
        return self.home / "bin" / "nvcc"

    def supported(self) -> list[int]:
        """The virtual architectures that this nvcc compiles for; 80 stands for compute_80."""
        listed = _output([self.nvcc, "--list-gpu-arch"]) or ""
        return sorted(int(number) for number in re.findall(r"compute_(\d+)\b", listed))


def find_toolkit() -> Toolkit | None:
    """The CUDA toolkit; None if none is found.

    torch takes the folder two levels above the nvcc on the PATH, which is wrong if that is a wrapper script. Here, nvcc
    itself is asked for its folder.
    """
    for home in _toolkit_candidates():
        version = re.search(r"release (\d+\.\d+)", _output([home / "bin" / "nvcc", "--version"]) or "")
        if version and (home / "include" / "cuda_runtime.h").is_file():
            return Toolkit(home, version.group(1))
    return None


def _toolkit_candidates() -> Iterator[Path]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable])
    nvcc = shutil.which("nvcc")
    if nvcc:
        top = re.search(r"^#\$ TOP=(.+)$", _output([nvcc, "--dryrun", "x.cu"]) or "", re.MULTILINE)
        if top:
            yield Path(os.path.realpath(top.group(1).strip()))
        yield Path(os.path.realpath(nvcc)).parent.parent
        yield Path(nvcc).parent.parent
    yield DEFAULT_TOOLKIT


def gpu_capabilities(torch: ModuleType) -> list[int]:
    """The compute capabilities of this machine's GPUs; 90 stands for 9.0.

    nvidia-smi is asked first, because torch would create a CUDA context, which takes time and forbids a later fork.
    """
    listed = _output(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]) or ""
    found = re.findall(r"^(\d+)\.(\d)$", listed, re.MULTILINE)
    if not found and torch.version.cuda and torch.cuda.is_available():
        found = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    return sorted({int(major) * 10 + int(minor) for major, minor in found})


def architecture_flags(supported: Sequence[int], capabilities: Sequence[int]) -> list[str]:
    """nvcc's -gencode flags for the GPUs of this machine, or for ARCHITECTURES if it has none.

    Architectures that this nvcc does not support are left out. Without a GPU, or if a GPU is newer than this nvcc, PTX
    of the newest architecture is added, which newer GPUs can run. The list is empty if nvcc can compile for none.
    """
    native = [number for number in capabilities or ARCHITECTURES if number in supported]
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in native]
    newest = max(supported, default=0)
    if not capabilities and native:
        flags.append(f"-gencode=arch=compute_{native[-1]},code=compute_{native[-1]}")
    elif any(capability > newest for capability in capabilities) and newest:
        flags.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    return flags


def _resolve_cuda(torch: ModuleType, needs_gpu: bool) -> tuple[Toolkit | None, list[str], str]:
    """The toolkit, the architecture flags and ""; or None, no flags and the reason why CUDA is left out."""
    if torch.version.cuda is None:
        return None, [], "this torch is a build without CUDA"
    toolkit = find_toolkit()
    if toolkit is None:
        return None, [], f"no toolkit with nvcc is found by CUDA_HOME, CUDA_PATH, the PATH or in {DEFAULT_TOOLKIT}"
    if release(toolkit.version)[0] != release(torch.version.cuda)[0]:
        return None, [], f"nvcc is of CUDA {toolkit.version}, but this torch is built for CUDA {torch.version.cuda}"
    capabilities = gpu_capabilities(torch)
    if needs_gpu and not capabilities:
        return None, [], "there is no GPU on this machine"
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return toolkit, [], ""  # the user's choice, which torch turns into flags
    flags = architecture_flags(toolkit.supported(), capabilities)
    if not flags:
        wanted = ", ".join(f"{number / 10:.1f}" for number in capabilities or ARCHITECTURES)
        return None, [], f"nvcc of CUDA {toolkit.version} does not compile for compute capability {wanted}"
    return toolkit, flags, ""


def cuda_setting() -> bool | None:
    """The environment variable FUSEDLOSS_CUDA: True for 1, False for 0, None if it is not set."""
    value = os.environ.get("FUSEDLOSS_CUDA", "")
    if value not in ("", "0", "1"):
        raise BuildError(f"FUSEDLOSS_CUDA is {value!r}, expected 0 or 1")
    return None if value == "" else value == "1"


def info_file(library: Path) -> Path:
    return library.with_suffix(".json")


# ---- the plan ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Everything that determines the result of a build."""

    csrc: Path
    sources: list[Path]
    cxx_flags: list[str]
    nvcc_flags: list[str]
    link_flags: list[str]
    compiler: Compiler
    toolkit: Toolkit | None
    torch_version: str
    left_out: str  # what is not built, and why; "" if nothing is left out

    @property
    def device(self) -> str:
        return "cuda" if self.toolkit else "cpu"

    def summary(self) -> str:
        devices = f"CPU and CUDA {self.toolkit.version}" if self.toolkit else "CPU only"
        return f"for torch {self.torch_version}, {devices}" + (f"; left out {self.left_out}" if self.left_out else "")

    def write_info(self, library: Path) -> None:
        """Write a file beside the library with what it was built for. It can be read if the library fails to load."""
        info = {
            "torch": self.torch_version,
            "device": self.device,
            "summary": self.summary(),
            "sources": sources_digest(self.csrc),
        }
        info_file(library).write_text(json.dumps(info, indent=1) + "\n")

    @contextlib.contextmanager
    def environment(self) -> Iterator[ModuleType]:
        """Yield torch.utils.cpp_extension, set up with this plan's compiler, toolkit and ninja; restored afterwards."""
        with contextlib.ExitStack() as stack:
            changes = {"CXX": stack.enter_context(_one_word(self.compiler.words))}
            host_compiler = os.environ.get("CC", "").strip()  # for nvcc
            if self.toolkit and host_compiler:
                changes["CC"] = stack.enter_context(_one_word(_words(host_compiler)))
            ninja = find_ninja()
            if ninja:
                changes["PATH"] = os.environ.get("PATH", "") + os.pathsep + ninja
            before = {name: os.environ.get(name) for name in changes}
            with _unlogged("torch.utils.cpp_extension"):  # it warns of a CUDA_HOME that is replaced below
                from torch.utils import cpp_extension
            home = cpp_extension.CUDA_HOME
            os.environ.update(changes)
            if self.toolkit:
                cpp_extension.CUDA_HOME = str(self.toolkit.home)
            try:
                yield cpp_extension
            finally:
                cpp_extension.CUDA_HOME = home
                for name, value in before.items():
                    if value is None:
                        os.environ.pop(name, None)
                    else:
                        os.environ[name] = value


@contextlib.contextmanager
def _unlogged(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


def make_plan(csrc: Path | None = None, cuda: bool | None = None, needs_gpu: bool = False) -> Plan:
    """Inspect the machine and make the plan.

    Args:
        csrc: the folder of the sources. Default: `csrc_directory()`.
        cuda: True builds with CUDA or raises, False builds without. None follows FUSEDLOSS_CUDA; if that is not set,
            CUDA is built if everything for it is found.
        needs_gpu: leave CUDA out if the machine has no GPU, unless CUDA is forced.

    Raises:
        BuildError: something that the build needs is missing.
    """
    check_platform()
    torch = import_torch()
    check_python_headers()
    compiler = find_compiler()
    cuda = cuda_setting() if cuda is None else cuda
    csrc = csrc or csrc_directory()
    left_out = []

    toolkit: Toolkit | None = None
    architectures: list[str] = []
    reason = "FUSEDLOSS_CUDA=0 or cuda=False leaves it out"
    if cuda is not False:
        toolkit, architectures, reason = _resolve_cuda(torch, needs_gpu and not cuda)
    if cuda and toolkit is None:
        raise BuildError(f"CUDA was asked for and cannot be built: {reason} (torch {torch.__version__})")
    if toolkit is None:
        left_out.append(f"CUDA: {reason}")

    # The kernels are vectorised explicitly: -O3 makes them no faster, but compiling them takes a third longer.
    cxx_flags = ["-O2", "-g0", "-Wall", "-fvisibility=hidden"]
    link_flags = []
    if "OpenMP" in torch.__config__.parallel_info():
        # Without -fopenmp, at::parallel_for is silently serial. With g++ no OpenMP library is linked: the symbols are
        # found in the library that torch ships, so there is only one thread pool, torch's.
        if compiler.openmp:
            cxx_flags.append("-fopenmp")
            link_flags += ["-fopenmp"] if compiler.is_clang else []
        else:
            left_out.append("threads: this clang has no OpenMP (Debian, Ubuntu: apt install libomp-dev)")
    if toolkit:
        cxx_flags.append(f"-D{CUDA_MACRO}")
    nvcc_flags = ["-O3", f"-D{CUDA_MACRO}", "-Xcompiler", "-fvisibility=hidden", *architectures] if toolkit else []
    sources = source_files(csrc, cuda=toolkit is not None)
    version = torch.__version__
    return Plan(csrc, sources, cxx_flags, nvcc_flags, link_flags, compiler, toolkit, str(version), "; ".join(left_out))
