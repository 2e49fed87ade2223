"""`python notebooks/execute.py`: run the notebooks from top to bottom and save them with what they printed.

Each runs in a clean kernel, beside a copy of the sources without anything compiled, as on a machine that has never seen
the package: its first cell that needs the extension compiles it. The tests do the same without saving.
"""

import os
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
COMPILED = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")


def execute(notebook: nbformat.NotebookNode, scratch: Path, cache: Path) -> None:
    """Fill in the outputs; `scratch` is an empty folder for the sources, what gets compiled is kept in `cache`."""
    for folder in ("fusedloss", "csrc"):
        shutil.copytree(ROOT / folder, scratch / folder, ignore=COMPILED)
    here = scratch / "notebooks"
    here.mkdir()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "FUSEDLOSS_JIT": "1",  # even where a build of the same sources is installed
        "FUSEDLOSS_CACHE_DIR": str(cache),
        "FUSEDLOSS_CUDA": "0",  # compiling the CUDA sources takes minutes, and the notebooks show CPU tensors
    }
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        record_timing=False,  # or every run would change every cell
        resources={"metadata": {"path": str(here)}},
    )
    with mock.patch.dict(os.environ, environment, clear=True):
        client.execute()


def main() -> None:
    for path in NOTEBOOKS:
        print(path.name, flush=True)
        notebook = nbformat.read(path, as_version=4)
        with tempfile.TemporaryDirectory() as scratch:
            execute(notebook, Path(scratch), Path(scratch) / "cache")
        notebook.metadata["language_info"] = {"name": "python"}  # not the version that happened to run it
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
