"""Every header of csrc/ compiles by itself: it includes what it uses.

A header outside kernels/ that is the first include of the source of the same name does so whenever that source is
compiled. The others are compiled here, those in kernels/ with flags that do not let them include torch.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cuda_emulator import build as emulator
from torch.utils import cpp_extension

from fusedloss import _build

CSRC = _build.csrc_directory()


def is_first_in_its_source(header: Path) -> bool:
    source = header.with_suffix(".cpp")
    if CSRC / "kernels" in header.parents or not source.is_file():
        return False
    first = re.search("^#include.*", source.read_text(), flags=re.MULTILINE)
    return first is not None and first[0] == f'#include "{header.relative_to(CSRC).as_posix()}"'


HEADERS = [path.relative_to(CSRC).as_posix() for path in _build.header_files(CSRC) if not is_first_in_its_source(path)]
EMULATOR = Path(emulator.__file__).parent
CXX = shutil.which("g++")
pytestmark = pytest.mark.skipif(CXX is None, reason="there is no g++")


def flags(header: str) -> list[str]:
    """The flags of the header's layer. The kernels' flags have no torch folder, so kernels cannot include torch."""
    if header.startswith("kernels/cuda/"):
        if missing := emulator.missing():
            pytest.skip(missing)
        home = _build.find_toolkit().home
        cuda = [f"-I{EMULATOR}", "-isystem", f"{home}/include", "-isystem", f"{home}/include/cccl"]
        return [*cuda, "-fno-extern-tls-init", "-Wno-unknown-pragmas", "-include", "cuda_on_cpu.h"]
    if header == "kernels/cpu/foreach_instruction_set.h":
        return ['-DFUSEDLOSS_KERNELS="kernels/cpu/math-inl.h"']  # the file that it compiles
    if header.startswith("kernels/"):
        return []
    return [argument for path in cpp_extension.include_paths() for argument in ("-isystem", path)]


def compiles(csrc: Path, header: str) -> subprocess.CompletedProcess:
    warnings = ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unused-function", "-Werror"]
    command = [CXX, "-std=c++17", "-fsyntax-only", *warnings, *flags(header), f"-I{csrc}", "-x", "c++", "-"]
    return subprocess.run(command, input=f'#include "{header}"\n', capture_output=True, text=True)


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_compiles_by_itself(header):
    done = compiles(CSRC, header)
    assert done.returncode == 0, done.stderr[:3000]


@pytest.mark.parametrize("header", ["kernels/tiles.h", "kernels/cpu/loss_values-inl.h", "kernels/formulas/dual-inl.h"])
def test_a_missing_include_is_found(tmp_path, header):
    copy = tmp_path / "csrc"
    shutil.copytree(CSRC, copy)
    lines = (copy / header).read_text().splitlines(keepends=True)
    (copy / header).write_text("".join(line for line in lines if not line.startswith("#include")))
    assert compiles(copy, header).returncode != 0
