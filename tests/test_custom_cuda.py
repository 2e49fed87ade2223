"""Custom losses on CUDA, without a GPU: the emulator executes the formulas that are generated from expressions.

The generated formulas replace the library's own ones in a copy of the sources. nvcc also compiles the source that
`custom_loss` gives it.
"""

import random
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cuda_emulator import build, planted_bugs
from cuda_emulator.emulator import DTYPES, REDUCTIONS, Emulator
from cuda_emulator.pointwise_problems import Formula, Pointwise
from helpers.custom import CASES as OF_CUSTOM_LOSS
from helpers.custom import Case

from fusedloss import _build, custom

MISSING = build.missing()
pytestmark = pytest.mark.skipif(MISSING != "", reason=MISSING or "not skipped")
CSRC = _build.csrc_directory()
SIZES = [1, 7, 256, 1025, 4099]
BETWEEN_TENSORS = {
    "clamp between tensors": Case(
        "clamp(input, target, weight)", lambda x, low, high, p: x.clamp(low, high), ("weight",)
    ),
    "clamp above a tensor": Case("clamp(input, min=target)", lambda x, low, p: x.clamp(min=low)),
    "clamp below a tensor": Case("clamp(input, max=target)", lambda x, high, p: x.clamp(max=high)),
}
# The C++ of all expressions is tested on the CPU (test_custom_loss.py). These call every function that the others do.
CHOSEN = ["absolute", "squared", "log-cosh", "log-cosh, stable", "charbonnier", "focal", "tukey", "hinge", "clipped"]
CHOSEN += ["cross entropy", "divergence", "masked", "circular", "bounded", "no target"]
CASES = {**{name: OF_CUSTOM_LOSS[name] for name in CHOSEN}, **BETWEEN_TENSORS}


def formula_of(name: str) -> custom._Formula:
    case = CASES[name]
    return custom._formula(case.expression, case.tensors, None, tuple(case.parameters))


FORMULAS = {f"custom_{i}": formula_of(name) for i, name in enumerate(CASES)}


@pytest.fixture(scope="session")
def emulator(emulator_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    copy = tmp_path_factory.mktemp("custom") / "csrc"
    planted_bugs.plant(CSRC, copy, planted_bugs.all_bugs(CSRC))  # as in emulated_kernels, whose objects are used
    texts = [f"namespace {name} {{\n{formula.cpp()}}}" for name, formula in FORMULAS.items()]
    names = " ".join(f"X({name}, {name}::CustomLoss)" for name in FORMULAS)
    listed = f"#undef FUSEDLOSS_POINTWISE_LOSSES\n#define FUSEDLOSS_POINTWISE_LOSSES(X) {names}\n"
    header = custom._HEADER.format(formula="\n".join([*texts, listed]))
    (copy / "kernels" / "formulas" / "pointwise-inl.h").write_text(header)
    return Emulator(build.build(copy, emulator_folder))


class Custom(Pointwise):
    """Operands of moderate size, positive where the expression requires it, and with ties."""

    def __init__(self, rng: random.Random, name: str, dtype: torch.dtype, numel: int, reduction: str):
        self.case, self.compiled = list(CASES.values())[list(FORMULAS).index(name)], FORMULAS[name]
        used = tuple(self.case.parameters[parameter] for parameter in self.compiled.parameters)
        formula = Formula(lambda *_: [], used, terms=lambda x, *_: 30 + 0 * x, composed=self.by_torch)
        super().__init__(rng, name, dtype, numel, reduction, formula=formula)

    def make_operands(self, rng: random.Random, finite: bool) -> None:
        self.operands = []
        for name in self.compiled.operands:
            values = torch.randint(-3, 4, (self.numel,)).double() / 2 + 0.1 * torch.randn(self.numel).double()
            ties = 0.3 if self.case not in BETWEEN_TENSORS.values() else 1  # the bounds of a clamp lie on them
            values = torch.where(torch.rand(self.numel) < ties, (2 * values).round() / 2, values)
            values = values.abs() + 0.5 if name in self.case.positive else values
            values = (values > 0).double() if name == "mask" else values
            self.operands.append(values.to(self.dtype))
        self.repeat_operands(rng)

    def by_torch(self, *arguments: torch.Tensor) -> torch.Tensor:
        operands = dict(zip(self.compiled.operands, arguments, strict=False))
        names = [name for name in ("input", "target", *self.case.tensors) if name in operands]
        losses = self.case.torch(*(operands[name] for name in names), SimpleNamespace(**self.case.parameters))
        return losses + 0 * sum(operands.values())  # the derivative with respect to a mask is 0


def test_the_chosen_expressions_call_every_function():
    def called(cases: Iterable[Case]) -> set[str]:
        return {name for case in cases for name in re.findall(r"(\w+)\(", case.expression)}

    assert called(CASES.values()) >= called(OF_CUSTOM_LOSS.values())


@pytest.mark.parametrize("name", FORMULAS, ids=list(CASES))
def test_through_the_emulator(name, emulator):
    rng = random.Random(int(torch.randint(1 << 30, ())))
    for dtype in DTYPES:
        Custom(rng, name, dtype, rng.choice(SIZES), rng.choice(list(REDUCTIONS))).check(emulator)


@pytest.mark.parametrize("name", list(FORMULAS)[-len(BETWEEN_TENSORS) :], ids=BETWEEN_TENSORS)
def test_bounds_that_are_met(name, emulator):
    """Also the derivatives with respect to the bounds. Of a thousand halves from -1.5 to 1.5, many lie on them."""
    rng = random.Random(int(torch.randint(1 << 30, ())))
    problem = Custom(rng, name, torch.float32, 1025, "none")
    problem.wanted = list(range(len(problem.operands)))
    problem.check(emulator)


def test_nvcc_compiles_what_custom_loss_generates(tmp_path):
    """nvcc makes a library of it, which has the symbol that is loaded from it."""
    formula = formula_of("masked")
    (tmp_path / "formula-inl.h").write_text(custom._HEADER.format(formula=formula.cpp()))
    (tmp_path / "on_cuda.cu").write_text(custom._CUDA_SOURCE.format(symbol="fusedloss_on_cuda_test"))
    nvcc = _build.find_toolkit().nvcc
    command = [nvcc, "-std=c++17", "-O3", "-arch=sm_90", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--shared"]
    command += [f"-I{CSRC}", f"-I{tmp_path}", tmp_path / "on_cuda.cu", "-o", tmp_path / "on_cuda.so"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr[-3000:]
    assert b"fusedloss_on_cuda_test" in (tmp_path / "on_cuda.so").read_bytes()
