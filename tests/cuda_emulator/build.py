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
# -fsanitize only has g++ call hooks.cpp: no sanitizer's library is linked. Hidden, so that neither libraries like this
# one, loaded side by side, nor a real CUDA runtime in the process take each other's functions.
FLAGS = ["-std=c++17", "-g1", "-fPIC", "-fno-strict-aliasing", "-fno-extern-tls-init", "-fvisibility=hidden"]
FLAGS += ["-fno-gnu-unique", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-unused-parameter", "-Werror"]
FLAGS += ["-fno-ipa-icf"]  # equal functions on two types, made one, would look like accesses out of bounds
UNDEFINED = "alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero"  # the rest doubles the compile time
CHECKED = ["-O1", f"-fsanitize=thread,{UNDEFINED}", "--param=tsan-instrument-func-entry-exit=0"]


def missing() -> str:
    """What keeps the emulator from being built here; "" if nothing does."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return "the emulator switches threads in x86-64 Linux's way"
    if shutil.which("g++") is None:
        return "there is no g++"
    if _build.find_toolkit() is None:
        return "there is no CUDA toolkit, whose headers a .cu file needs"
    return ""


def build(csrc: Path, folder: Path, self_test: bool = False, checked: bool = True) -> Path:
    """The library of the kernels in `csrc`. What lies in `folder` already, made of the same contents, is used again."""
    kernels = sorted(csrc.glob("kernels/cuda/*.cu")) + ([HERE / "self_test.cu"] if self_test else [])
    sources = [*kernels, *sorted(HERE.glob("*.cpp"))]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(lambda source: _compile(source, csrc, folder, checked), sources))
    library = folder / f"libkernels-{_digest(*(path.name for path in objects))}.so"
    return _make(library, ["g++", "-shared", "-Wl,-z,defs", *objects])


def build_extension(csrc: Path, folder: Path) -> Path:
    """fusedloss's extension with the emulated kernels in the place of CUDA's, serving CPU tensors. Only results are
    checked: memory comes from torch, which the emulator knows nothing of."""
    # A library of its own, since all of its thread-local memory is taken for the kernels' shared memory.
    kernels = build(csrc, folder, checked=False)
    target = folder / f"extension-{kernels.stem}"
    target.mkdir(exist_ok=True)
    (target / "lock").unlink(missing_ok=True)  # of a run that was killed; torch would wait for ever
    plan = _build.make_plan(csrc, cuda=False)
    macros = [f"-D{_build.CUDA_MACRO}", "-DFUSEDLOSS_EMULATED_CUDA"]
    with plan.environment() as cpp_extension:
        module = cpp_extension.load(
            name="fusedloss_emulated",
            sources=[str(path) for path in plan.sources],
            extra_cflags=[*plan.cxx_flags, *macros, "-isystem", str(_build.find_toolkit().home / "include")],
            extra_ldflags=[*plan.link_flags, str(kernels), f"-Wl,-rpath,{folder}"],
            extra_include_paths=[str(csrc)],
            build_directory=str(target),
        )
    return Path(module.__file__)


def _compile(source: Path, csrc: Path, folder: Path, checked: bool) -> Path:
    home = _build.find_toolkit().home
    # As a system's headers, the toolkit's are spared the warnings.
    includes = [f"-I{HERE}", f"-I{csrc}", "-isystem", home / "include", "-isystem", home / "include" / "cccl"]
    is_kernel = source.suffix == ".cu"
    flags = [*FLAGS, *(CHECKED if is_kernel and checked else ["-O2"])]
    if is_kernel:
        flags += ["-include", "cuda_on_cpu.h", "-x", "c++"]
    headers = [*HERE.glob("*.h"), *(path for path in _build.header_files(csrc) if is_kernel or path.suffix == ".h")]
    contents = [path.name + path.read_text() for path in [source, *sorted(headers)]]
    target = folder / f"{source.stem}-{_digest(str(home), str(shutil.which('g++')), *flags, *contents)}.o"
    return _make(target, ["g++", *flags, *includes, "-c", source])


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _make(target: Path, command: list[str | Path]) -> Path:
    """The target's name says what is in it: if it is there, it is right."""
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as temporary:  # two sessions may be at it
            unfinished = Path(temporary) / target.name
            _run([*command, "-o", unfinished])
            unfinished.replace(target)
    return target


def _run(command: list[str | Path]) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the emulator's build failed: {' '.join(map(str, command))}\n{done.stderr[-4000:]}")
