"""The source distribution and the two kinds of wheel: their contents, and that they work away from the checkout."""

import email
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from fusedloss import _build
from fusedloss._version import __version__

ROOT = Path(__file__).resolve().parent.parent
LEFT_BEHIND = (".*", "build", "dist", "*.egg-info", "__pycache__", "*.so", "_C.*.json")

BACKEND = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
ISOLATED = "import sys; sys.modules['torch'] = None; " + BACKEND  # as in pip's isolated build, without torch

# The real sources would take a minute. `make test` has just compiled them by setup.py, and tests/test_notebooks.py
# compiles them at their first use.
TINY = """
#include <torch/csrc/utils/pybind.h>
int value();
PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) { module.def("value", &value); }
"""

EXAMPLE = "import fusedloss; print(fusedloss.__file__, fusedloss._backend.extension().value())"


def write_tiny_sources(csrc: Path) -> None:
    shutil.rmtree(csrc)
    (csrc / "kernels" / "cpu").mkdir(parents=True)
    (csrc / "bindings.cpp").write_text(TINY)
    (csrc / "kernels" / "cpu" / "value.cpp").write_text('#include "value.h"\nint value() { return VALUE; }\n')
    (csrc / "value.h").write_text("#define VALUE 7\n")


def run(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    variables = {name: value for name, value in os.environ.items() if name not in ("FUSEDLOSS_JIT", "PYTHONPATH")}
    return subprocess.run(command, cwd=cwd, env=variables | environment, capture_output=True, text=True, timeout=600)


def call_backend(code: str, kind: str, source: Path, target: Path, **environment: str) -> subprocess.CompletedProcess:
    return run([sys.executable, "-c", code, f"build_{kind}", str(target)], source, **environment)


def build(kind: str, source: Path, target: Path, code: str = BACKEND, **environment: str) -> Path:
    """Call the build backend in the folder of the source, as pip does."""
    done = call_backend(code, kind, source, target, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("fusedloss: there is no torch here to compile against") == (code == ISOLATED)
    return target / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """It is made from a copy: a build leaves files behind, and the checkout may have an extension that is in use."""
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "tree", ignore=shutil.ignore_patterns(*LEFT_BEHIND))
    shutil.copytree(ROOT / ".ci", folder / "tree" / ".ci")
    return build("sdist", folder / "tree", folder)


@pytest.fixture
def unpacked(sdist, tmp_path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path)
    return tmp_path / f"fusedloss-{__version__}"


def test_sdist_carries_all(sdist):
    with tarfile.open(sdist) as archive:
        carried = {name.partition("/")[2] for name in archive.getnames()}
    wanted = ["setup.py", "pyproject.toml", "MANIFEST.in", "Makefile", ".ci/run", "README.md", "LICENSE"]
    for folder in ("csrc", "fusedloss", "tests", "benchmarks", "examples", "notebooks"):
        found = [
            path for path in (ROOT / folder).rglob("*") if path.suffix in (".cpp", ".h", ".cu", ".cuh", ".py", ".ipynb")
        ]
        wanted += [path.relative_to(ROOT).as_posix() for path in found if not path.match(".*/*")]
    assert [name for name in wanted if name not in carried] == []
    assert [name for name in carried if "__pycache__" in name or name.endswith((".so", ".o", ".pyc"))] == []


def test_wheel_without_a_compiled_part(unpacked, tmp_path):
    """The wheel that a plain `pip install .` builds, and FUSEDLOSS_JIT=1. It is the same for every Python and torch,
    contains the sources, and compiles once, at its first use."""
    wheel = build("wheel", unpacked, tmp_path, ISOLATED)
    assert wheel.name == f"fusedloss-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        carried = set(archive.namelist())
        archive.extractall(tmp_path / "site")
        metadata = email.message_from_bytes(archive.read(f"fusedloss-{__version__}.dist-info/METADATA"))
    csrc = _build.csrc_directory()
    sources = [*_build.source_files(csrc, cuda=True), *_build.header_files(csrc)]
    assert {f"fusedloss/csrc/{path.relative_to(csrc).as_posix()}" for path in sources} <= carried
    assert {"fusedloss/_C.pyi", "fusedloss/py.typed"} <= carried
    assert not [name for name in carried if name.endswith(".so")]
    assert not [name for name in carried if not name.startswith(("fusedloss/", "fusedloss-"))]
    assert metadata["License-Expression"] == "BSD-3-Clause" and metadata["Requires-Python"] == ">=3.10"
    assert f"torch>={_build.MINIMUM_TORCH}" in metadata.get_all("Requires-Dist")

    write_tiny_sources(tmp_path / "site" / "fusedloss" / "csrc")
    variables = {"PYTHONPATH": str(tmp_path / "site"), "FUSEDLOSS_CACHE_DIR": str(tmp_path / "cache")}
    for compiling in (1, 0):
        done = run([sys.executable, "-c", EXAMPLE], tmp_path, **variables)
        assert done.returncode == 0, done.stderr
        where, value = done.stdout.split()
        assert Path(where).parent == tmp_path / "site" / "fusedloss" and value == "7"
        assert done.stderr.count("fusedloss: compiling ") == compiling
        assert done.stderr.count(f"; {tmp_path}/site/fusedloss was installed without a compiled part") == compiling

    for folder in (tmp_path / "jit", unpacked / "build"):
        shutil.rmtree(folder, ignore_errors=True)
    assert build("wheel", unpacked, tmp_path / "jit", FUSEDLOSS_JIT="1").name == wheel.name
    with zipfile.ZipFile(tmp_path / "jit" / wheel.name) as archive:
        assert set(archive.namelist()) == carried


def test_compiled_part_that_is_insisted_on_needs_torch(unpacked, tmp_path):
    done = call_backend(ISOLATED, "wheel", unpacked, tmp_path, FUSEDLOSS_CUDA="1")
    assert done.returncode != 0 and not list(tmp_path.glob("*.whl"))
    assert "fusedloss: torch cannot be imported" in done.stderr and "option --no-build-isolation" in done.stderr


def test_wheel_with_the_compiled_part(unpacked, tmp_path):
    write_tiny_sources(unpacked / "csrc")
    wheel = build("wheel", unpacked, tmp_path, FUSEDLOSS_CUDA="0")
    assert f"-cp3{sys.version_info.minor}-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = "import fusedloss as f; print(f.__file__); print(f._backend.extension().value()); print(f.describe())"
    for first in (tmp_path / "site", unpacked):  # also in the unpacked sources, where nothing is compiled
        path = os.pathsep.join([str(first), str(tmp_path / "site")])
        done = run([sys.executable, "-c", code], tmp_path, PYTHONPATH=path)
        assert done.returncode == 0, done.stderr
        where, value, said = done.stdout.splitlines()
        assert Path(where).parent == first / "fusedloss" and value == "7"
        assert said.startswith("fusedloss: for torch ") and said.endswith(f"(prebuilt, in {tmp_path}/site/fusedloss)")


@pytest.mark.parametrize(
    "environment, sentence",
    [
        ({"CXX": "/nonexistent/c++"}, "fusedloss: there is no C++ compiler: CXX=/nonexistent/c++ cannot be run"),
        ({"FUSEDLOSS_CUDA": "maybe"}, "fusedloss: FUSEDLOSS_CUDA is 'maybe', expected 0 or 1"),
        (
            {"PYTHONPATH": "without-torch"},
            "fusedloss: torch cannot be imported (No module named 'torch'); the",
        ),
    ],
)
def test_build_that_cannot_be_says_why_in_a_sentence(unpacked, environment, sentence):
    (unpacked / "without-torch").mkdir()
    (unpacked / "without-torch" / "torch.py").write_text("raise ImportError(\"No module named 'torch'\")\n")
    done = run([sys.executable, "setup.py", "build_ext"], unpacked, **environment)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith(sentence) and "Traceback" not in done.stderr


def test_a_path_that_ninja_cannot_parse(unpacked, tmp_path):
    awkward = tmp_path / "of $me"
    shutil.copytree(unpacked, awkward)
    done = run([sys.executable, "setup.py", "build_ext"], awkward)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(
        f"fusedloss: the sources are in {awkward}, and ninja cannot parse '$'"
    )


def test_metadata_and_sdist_need_no_torch(unpacked, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError\n")
    build("sdist", unpacked, tmp_path, PYTHONPATH=str(tmp_path))
    done = run([sys.executable, "setup.py", "--version"], unpacked, PYTHONPATH=str(tmp_path))
    assert done.stdout.splitlines()[-1] == __version__


def test_a_wheel_needs_no_tools_for_development(tmp_path):
    done = subprocess.run(
        ["make", "--dry-run", "wheel", f"VENV={tmp_path / 'venv'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "torch==" in done.stdout and "bdist" not in done.stdout and "pip wheel" in done.stdout
    assert "[dev]" not in done.stdout
