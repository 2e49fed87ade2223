"""The notebooks run from top to bottom in a new kernel, beside sources that are not compiled yet."""

import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

from notebooks.execute import NOTEBOOKS, execute


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook: nbformat.NotebookNode) -> str:
    return "".join(
        output.text
        for cell in code_cells(notebook)
        for output in cell.outputs
        if output.output_type == "stream" and output.name == "stdout"
    )


def pictures(notebook: nbformat.NotebookNode) -> int:
    return sum("image/png" in output.get("data", {}) for cell in code_cells(notebook) for output in cell.outputs)


def check_drop_in(notebook: nbformat.NotebookNode) -> None:
    """The well-known results of tutorials, by all three ways to use the package."""
    text = printed(notebook)
    for way in ("hand", "torch", "fusedloss"):
        assert f"MSE by {way}: 0.1700" in text
        assert f"cross entropy by {way}: 0.5787" in text
    assert "mean |predicted - actual|: 0.3667" in text
    accuracy = re.search(r"test accuracy: torch (\S+), fusedloss (\S+)", text)
    assert accuracy and min(float(value) for value in accuracy.groups()) > 0.9
    assert re.search(r"largest relative difference between the curves: [\d.]+e-\d\d", text)
    assert pictures(notebook) == 2


def check_own_loss(notebook: nbformat.NotebookNode) -> None:
    """A module and its expression have the same value and train alike, and a typing error gets a helpful message."""
    text = printed(notebook)
    values = re.findall(r"(?:module|expression) +loss ([\d.]+), gradient", text)
    assert len(values) == 2 and abs(float(values[0]) - float(values[1])) < 1e-5
    assert "unknown name 'targte'" in text
    errors = re.search(r"squared (\S+), module (\S+), expression (\S+)", text)
    assert errors and float(errors[3]) < 0.6 * float(errors[1]) and abs(float(errors[2]) - float(errors[3])) < 0.02
    assert pictures(notebook) == 2


CHECKS = {"01_drop_in": check_drop_in, "02_your_own_loss": check_own_loss}


def test_every_notebook_is_checked() -> None:
    assert {path.stem for path in NOTEBOOKS} == set(CHECKS)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty cache. The first notebook compiles the extension for all of them."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def quick_compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A compiler that does not optimise, which takes two thirds of the time."""
    script = tmp_path_factory.mktemp("compiler") / "c++"
    script.write_text('#!/bin/sh\nexec c++ "$@" -O0\n')
    script.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", str(script))
        yield


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore")  # warnings of the kernel client itself
def test_notebook_runs_with_nothing_prebuilt(path: Path, tmp_path: Path, cache: Path, quick_compiler: None) -> None:
    notebook = read(path)
    notebook.cells.append(nbformat.v4.new_code_cell("print('fusedloss from', fusedloss.__file__)"))
    execute(notebook, tmp_path, cache)  # raises if a cell does
    CHECKS[path.stem](notebook)
    assert f"fusedloss from {tmp_path / 'fusedloss'}" in printed(notebook), "another fusedloss was tested"
    assert list(cache.rglob("*.so")), "nothing was compiled"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_with_the_outputs_of_one_run(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    CHECKS[path.stem](notebook)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_tells_nothing_of_where_it_ran(path: Path) -> None:
    """A committed output must not carry the paths of the machine that made it."""
    shown = [str(output) for cell in code_cells(read(path)) for output in cell.outputs if "data" not in output]
    assert not re.search(r"/(home|root|tmp|work|Users)/", "\n".join(shown))
