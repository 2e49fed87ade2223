"""Compiles CUDA sources, together with the emulator, into a library for the CPU."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fusedloss import _build

HERE = Path(__file__).resolve().parent
# -fsanitize only makes g++ insert calls of functions in hooks.cpp: no sanitizer's library is linked. Symbols are hidden
# so that several of these libraries and a real CUDA runtime in one process do not use each other's functions.
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-fno-strict-aliasing", "-fno-extern-tls-init", "-fvisibility=hidden"]
FLAGS += ["-fno-gnu-unique", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-unused-parameter", "-Werror"]
FLAGS += ["-fno-ipa-icf"]  # merging equal functions on two types would look like accesses out of bounds
UNDEFINED = "alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero"  # the rest doubles the compile time
CHECKS = [f"-fsanitize=thread,{UNDEFINED}", "--param=tsan-instrument-func-entry-exit=0"]


def missing() -> str:
    """Why the emulator cannot be built here; "" if it can."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return "the emulator runs on x86-64 Linux only"
    if shutil.which("g++") is None:
        return "there is no g++"
    if _build.find_toolkit() is None:
        return "there is no CUDA toolkit, whose headers the .cu files need"
    return ""


def build(csrc: Path, folder: Path) -> Path:
    """-> the library of the kernels in `csrc`. Files in `folder` that were built from the same contents are reused."""
    sources = [*sorted(csrc.glob("kernels/cuda/*.cu")), HERE / "self_test.cu", *sorted(HERE.glob("*.cpp"))]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(lambda source: _compile(source, csrc, folder), sources))
    library = folder / f"libkernels-{_digest(*(path.name for path in objects))}.so"
    return _make(library, ["g++", "-shared", "-Wl,-z,defs", *objects])


def build_extension(csrc: Path, kernels: Path) -> Path:
    """-> fusedloss's extension for CPU tensors, which calls the library of emulated kernels in place of the GPU's.

    It is built beside that library. Accesses of global memory are not checked, because the emulator does not know what
    torch allocates.
    """
    target = kernels.parent / f"extension-{kernels.stem}"
    target.mkdir(exist_ok=True)
    (target / "lock").unlink(missing_ok=True)  # a killed run may have left it; torch would wait forever
    plan = _build.make_plan(csrc, cuda=False)
    # Without optimisation: compiling takes longer than the tests save by it.
    macros = [f"-D{_build.CUDA_MACRO}", "-DFUSEDLOSS_EMULATED_CUDA"]
    with plan.environment() as cpp_extension:
        module = cpp_extension.load(
            name="fusedloss_emulated",
            sources=[str(path) for path in plan.sources],
            extra_cflags=[*plan.cxx_flags, "-O0", *macros, "-isystem", str(_build.find_toolkit().home / "include")],
            extra_ldflags=[*plan.link_flags, str(kernels), f"-Wl,-rpath,{kernels.parent}"],
            extra_include_paths=[str(csrc)],
            build_directory=str(target),
        )
    return Path(module.__file__)


def _compile(source: Path, csrc: Path, folder: Path) -> Path:
    home = _build.find_toolkit().home
    # The toolkit's headers are included as system headers, which cause no warnings.
    includes = [f"-I{HERE}", f"-I{csrc}", "-isystem", home / "include", "-isystem", home / "include" / "cccl"]
    flags = FLAGS
    if source.suffix == ".cu":
        flags = [*FLAGS, *CHECKS, "-include", "cuda_on_cpu.h", "-x", "c++"]
    # Two copies of csrc/ that differ in one formula share the objects of all sources that do not include it.
    preprocessed = _run(["g++", *flags, *includes, "-E", source]).replace(str(csrc), "csrc")
    target = folder / f"{source.stem}-{_digest(str(shutil.which('g++')), *flags, preprocessed)}.o"
    return _make(target, ["g++", *flags, *includes, "-c", source])


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _make(target: Path, command: list[str | Path]) -> Path:
    """Runs the command unless the target exists: its name contains a hash of its contents, so it cannot be outdated."""
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as temporary:  # two runs may build it at once
            unfinished = Path(temporary) / target.name
            _run([*command, "-o", unfinished])
            unfinished.replace(target)
    return target


def _run(command: list[str | Path]) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the emulator's build failed: {' '.join(map(str, command))}\n{done.stderr[-4000:]}")
    return done.stdout
