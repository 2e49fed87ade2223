"""Random expressions, computed by torch and by C++, compared with their values in Python."""

import math
import operator
import os
import random
import subprocess

import pytest
import torch
from helpers.expression import ARGUMENTS, TENSORS, read, torch_function
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedloss.expression import FUNCTIONS, to_cpp


def formula(rng, levels):
    """A random expression. No function leaves its domain, and no value grows so large that digits are lost."""
    if levels == 0 or rng.random() < 0.1:
        return rng.choice([*ARGUMENTS, "pi", str(rng.randint(0, 4)), repr(rng.uniform(-2, 2)), "1e-3"])
    a, b, c = (formula(rng, levels - 1) for _ in range(3))
    anything = ["abs", "square", "relu", "sigmoid", "tanh", "atan", "erf"]
    bounded = ["exp", "expm1", "sinh", "cosh", "sin", "cos", "tan", "softplus", "logsigmoid"]
    return rng.choice(
        [
            *(f"({a}) {sign} ({b})" for sign in "+-*"),
            *(f"{name}({a})" for name in anything),
            *(f"{name}(clamp({a}, -1.25, 1.25))" for name in bounded),
            *(f"{name}(0.5 + abs({a}))" for name in ("sqrt", "rsqrt", "log", "log1p")),
            *(f"{name}({a}, {b})" for name in ("max", "min", "maximum", "minimum")),
            f"pow(0.5 + abs({a}), tanh({b}))",
            f"xlogy({a}, 0.5 + abs({b}))",
            f"({a}) / (0.5 + abs({b}))",
            f"-({a})",
            f"+({a})",
            f"tanh({a}) ** {rng.randint(0, 10)}",
            f"(0.5 + abs(tanh({a}))) ** {rng.randint(-10, 10) / 2}",
            f"clamp({a}, {b}, {c})",
            f"clamp({a}, min={b})",
            f"clamp({a}, max={b})",
            f"sign({exact(rng)}) + {a}",
            f"where({condition(rng, 2)}, {a}, {b})",
            f"where({exact(rng)}, {a}, {b})",
        ]
    )


def exact(rng):
    """An expression that all compute exactly, for functions that jump. Its value differs between elements."""
    return f"({rng.choice(TENSORS)} {rng.choice('+-*')} {rng.choice([*ARGUMENTS, '1', '0.25', 'pi'])})"


def condition(rng, levels):
    if levels == 0 or rng.random() < 0.3:
        signs = [rng.choice(["<", "<=", ">", ">=", "==", "!="]) for _ in range(rng.randint(1, 3))]
        return exact(rng) + "".join(f" {sign} {exact(rng)}" for sign in signs)
    a, b = (condition(rng, levels - 1) for _ in range(2))
    return rng.choice([f"({a}) & ({b})", f"({a}) | ({b})", f"~({a})"])


def logistic(x):
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def log_one_plus_exp(x):
    return max(x, 0) + math.log1p(math.exp(-abs(x)))


# The text is Python, except for ~, so Python itself can compute the expected value.
PYTHON = {
    "abs": abs,
    "sign": lambda x: (x > 0) - (x < 0),
    "square": lambda x: x * x,
    "rsqrt": lambda x: 1 / math.sqrt(x),
    "sigmoid": logistic,
    "logsigmoid": lambda x: -log_one_plus_exp(-x),
    "softplus": log_one_plus_exp,
    "relu": lambda x: max(x, 0),
    "pow": operator.pow,
    "xlogy": lambda a, b: a * math.log(b),
    "max": max,
    "maximum": max,
    "min": min,
    "minimum": min,
    "clamp": lambda x, min=-math.inf, max=math.inf: sorted((x, min, max))[1] if min <= max else max,
    "where": lambda c, a, b: a if c else b,
    "not_": operator.not_,
    "pi": math.pi,
    "__builtins__": {},
}
PYTHON |= {name: getattr(math, name) for name in FUNCTIONS if hasattr(math, name) and name not in PYTHON}


def by_python(text, values):
    return float(eval(text.replace("~", "not_"), PYTHON, dict(zip(ARGUMENTS, values, strict=True))))


def random_formula(rng):
    return f"({formula(rng, 4)}) + 0 * input"  # every expression must use input


def points(rng, count):
    return [[*(rng.uniform(-2, 2) for _ in range(2)), float(rng.random() < 0.5), 1.5, 0.25] for _ in range(count)]


@settings(max_examples=100, deadline=None)
@given(st.randoms(use_true_random=False))
def test_torch_against_python(rng):
    text = random_formula(rng)
    elements = points(rng, 4)
    input, target, mask = torch.tensor([element[:3] for element in elements], dtype=torch.float64).T
    result = torch_function(text)(input, target, mask, 1.5, 0.25)
    assert result.shape == (4,) and result.dtype == torch.float64
    for ours, element in zip(result.tolist(), elements, strict=True):
        assert ours == pytest.approx(by_python(text, element), rel=1e-6, abs=1e-6)


STAND_INS = """
#include <cmath>
#include <cstdio>
using std::abs, std::sqrt, std::exp, std::expm1, std::log, std::log1p, std::sin, std::cos, std::tan, std::sinh;
using std::cosh, std::tanh, std::atan, std::erf, std::pow;
using V = double;
template <typename> double constant(double x) { return x; }
double sign(double x) { return (x > 0) - (x < 0); }
double square(double x) { return x * x; }
double rsqrt(double x) { return 1 / sqrt(x); }
double softplus(double x) { return std::fmax(x, 0) + log1p(exp(-abs(x))); }
double logsigmoid(double x) { return -softplus(-x); }
double sigmoid(double x) { return exp(logsigmoid(x)); }
double relu(double x) { return std::fmax(x, 0); }
double xlogy(double a, double b) { return a == 0 ? 0 : a * log(b); }
double maximum(double a, double b) { return std::fmax(a, b); }
double minimum(double a, double b) { return std::fmin(a, b); }
enum class AtBound { kX, kBoth, kBound };
template <AtBound> double clamp_min(double x, double bound) { return std::fmax(x, bound); }
template <AtBound> double clamp_max(double x, double bound) { return std::fmin(x, bound); }
template <AtBound w> double clamp(double x, double a, double b) { return clamp_max<w>(clamp_min<w>(x, a), b); }
bool is_nonzero(double x) { return x != 0; }
bool not_(bool c) { return !c; }
double where(bool c, double a, double b) { return c ? a : b; }
template <int n> double power(double x) { return pow(x, n); }
"""


def test_cpp_against_python(tmp_path):
    """The printed C++ compiles and has the same value."""
    rng = random.Random(torch.initial_seed())
    texts = [random_formula(rng) for _ in range(80)]
    elements = points(rng, 3)
    parameters = ", ".join(f"double argument_{name}" for name in ARGUMENTS)
    lines = [f"double f{i}({parameters}) {{ return {to_cpp(read(text))}; }}" for i, text in enumerate(texts)]
    calls = [f"f{i}({', '.join(map(repr, element))})" for i in range(len(texts)) for element in elements]
    main = "".join(f'    std::printf("%.17g\\n", {call});\n' for call in calls)
    source = tmp_path / "formulas.cpp"
    source.write_text(STAND_INS + "\n".join(lines) + f"\nint main() {{\n{main}}}\n")
    program = tmp_path / "formulas"
    subprocess.run([os.environ.get("CXX", "c++"), "-std=c++17", "-O0", source, "-o", program], check=True)
    printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout.split()
    expected = [(text, by_python(text, element)) for text in texts for element in elements]
    for value, (text, python) in zip(printed, expected, strict=True):
        assert float(value) == pytest.approx(python, rel=1e-6, abs=1e-6), text
