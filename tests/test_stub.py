"""fusedloss/_C.pyi agrees with the extension's functions and arguments."""

import ast
import re
from pathlib import Path

import fusedloss
from fusedloss import _backend

STUB = ast.parse((Path(fusedloss.__file__).parent / "_C.pyi").read_text())
FUNCTIONS = {node.name: node for node in STUB.body if isinstance(node, ast.FunctionDef)}
CONSTANTS = {node.target.id: node.annotation.id for node in STUB.body if isinstance(node, ast.AnnAssign)}
ONLY_WITH_CUDA = {"max_cuda_classes"}


def test_names():
    module = _backend.extension()
    names = {name for name in vars(module) if not name.startswith("__")}
    assert names | ONLY_WITH_CUDA == FUNCTIONS.keys() | CONSTANTS.keys()
    assert module.with_cuda == (names >= ONLY_WITH_CUDA)


def test_constants():
    for name, kind in CONSTANTS.items():
        value = getattr(_backend.extension(), name, None)
        assert type(value).__name__ == kind or name in ONLY_WITH_CUDA, name


def test_arguments():
    """pybind11 writes a function's signature in the first line of its docstring."""
    for name, node in FUNCTIONS.items():
        signature = getattr(_backend.extension(), name).__doc__.splitlines()[0]
        assert re.findall(r"(\w+): ", signature) == [argument.arg for argument in node.args.args], signature
        assert not re.search(r"\barg\d", signature), signature
