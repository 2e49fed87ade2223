"""The folders of csrc/ are layers: each includes what lies below it, and nothing above or beside it."""

import re
import shutil
from pathlib import Path

import pytest

from fusedloss import _build

CSRC = _build.csrc_directory()
PYTHON, AUTOGRAD, TENSORS = ("pybind11/", "torch/csrc/utils/pybind"), ("torch/",), ("ATen/", "c10/")

# What each layer may include: folders of csrc/ ("/*": only the files in the folder itself), and parts of torch. A file
# belongs to the layer with the longest name that its path begins with.
LAYERS = {
    "bindings.cpp": (["autograd", "ops", "kernels"], [*PYTHON, *AUTOGRAD, *TENSORS]),
    "autograd": (["autograd", "ops", "kernels/*"], ["torch/csrc/autograd/", *TENSORS]),
    "ops": (["ops", "kernels"], TENSORS),
    "kernels": (["kernels/*"], []),
    "kernels/device_math-inl.h": (["kernels/cpu", "kernels/cuda"], []),
    "kernels/formulas": (["kernels/*", "kernels/formulas"], []),
    "kernels/cpu": (["kernels/*", "kernels/formulas", "kernels/cpu"], []),
    "kernels/cuda": (["kernels/*", "kernels/formulas", "kernels/cuda"], []),
}


def violations(csrc: Path) -> list[str]:
    """Every include that the layer of its file forbids, and every file that is in no layer."""
    found = []
    for path in sorted(path for path in csrc.rglob("*") if path.is_file()):
        name = path.relative_to(csrc).as_posix()
        layer = max((layer for layer in LAYERS if name.startswith(layer)), key=len, default=None)
        if layer is None:
            found.append(f"{name} is in no layer")
            continue
        folders, parts = LAYERS[layer]
        for kind, included in re.findall(
            r'^\s*#\s*(?:include|define \w+) ([<"])(\S+?\.(?:h|cuh))[>"]', path.read_text(), re.M
        ):
            if kind == "<":
                of_torch = included.startswith((*PYTHON, *AUTOGRAD, *TENSORS))
                if (of_torch and not included.startswith(tuple(parts))) or included == "torch/extension.h":
                    found.append(f"{name} includes {included}")
            elif not any(_is_in(included, folder) for folder in folders):
                found.append(f"{name} includes {included}")
            elif not (csrc / included).is_file():
                found.append(f"{name} includes {included}, which is not there")
    return found


def _is_in(included: str, folder: str) -> bool:
    """Whether the file is in this folder, or in one below it unless the folder ends with "/*"."""
    return str(Path(included).parent) == folder[:-2] if folder.endswith("/*") else included.startswith(folder + "/")


def test_a_layer_includes_only_what_lies_below_it():
    assert violations(CSRC) == []


@pytest.mark.parametrize(
    "file, include",
    [
        ("kernels/options.h", "<ATen/core/Tensor.h>"),
        ("kernels/options.h", '"kernels/cpu/vec-inl.h"'),
        ("kernels/cpu/vec-inl.h", "<c10/util/Exception.h>"),
        ("kernels/cpu/vec-inl.h", '"kernels/cuda/launch.cuh"'),
        ("kernels/cuda/launch.cuh", '"ops/checks.h"'),
        ("kernels/formulas/pointwise-inl.h", '"kernels/cpu/vec-inl.h"'),
        ("ops/checks.h", "<torch/csrc/autograd/autograd.h>"),
        ("ops/checks.h", '"autograd/functions.h"'),
        ("ops/checks.h", "<pybind11/pybind11.h>"),
        ("bindings.cpp", "<torch/extension.h>"),
        ("elsewhere.h", "<cstdint>"),
    ],
)
def test_an_include_of_another_layer_is_found(tmp_path, file, include):
    copy = tmp_path / "csrc"
    shutil.copytree(CSRC, copy)
    with (copy / file).open("a") as text:
        text.write(f"\n#include {include}\n")
    assert [line.partition(" ")[0] for line in violations(copy)] == [file]
