"""The language of `custom_loss`: what torch, C++ and TorchScript are given for an expression."""

import math

import pytest
import torch
from helpers.expression import read, torch_function
from torch.autograd import forward_ad

from fusedloss.expression import CLAMP_AT_BOUND, FUNCTIONS, to_cpp, to_torch, to_torchscript

NUMBER, TENSOR = (f"<AtBound::{who}>" for who in CLAMP_AT_BOUND)  # clamp's template arguments
SLOPE_AT_NUMBER = 1 if CLAMP_AT_BOUND[0] == "kX" else 0


# Expressions, and the same in torch as functions of input, target, mask (of 0. and 1.), delta and gamma.
GOOD = {
    "input": lambda i, t, m, d, g: i,
    "+input": lambda i, t, m, d, g: i,
    "-input - -1": lambda i, t, m, d, g: 1 - i,
    "square(input - target)": lambda i, t, m, d, g: (i - t) ** 2,
    "where(abs(input - target) < delta, square(input - target), abs(input - target))": lambda i, t, m, d, g: (
        torch.where((i - t).abs() < d, (i - t) ** 2, (i - t).abs())
    ),
    "where(abs(input) < delta,\n    input ** 2 / 2,  # near\n\tdelta * (abs(input) - 0.5))": lambda i, t, m, d, g: (
        torch.where(i.abs() < d, i**2 / 2, d * (i.abs() - 0.5))
    ),
    " \n maximum(input, 0) - input * target + log1p(exp(-abs(input)))\n": lambda i, t, m, d, g: (
        torch.maximum(i, torch.zeros_like(i)) - i * t + torch.log1p(torch.exp(-i.abs()))
    ),
    "where(mask, input, target)": lambda i, t, m, d, g: torch.where(m != 0, i, t),
    "where(mask * target, input, 1)": lambda i, t, m, d, g: torch.where(m * t != 0, i, 1.0),
    "mask * input + (1 - mask) * target": lambda i, t, m, d, g: m * i + (1 - m) * t,
    "where(0 < input <= 1, input, -input)": lambda i, t, m, d, g: torch.where((i > 0) & (i <= 1), i, -i),
    "where(target < input != 0.5 < delta == 1, input, 0)": lambda i, t, m, d, g: torch.where(
        (t < i) & (i != 0.5) & (d > 0.5) & (d == 1), i, 0.0
    ),
    "where((input >= target) | ~(mask > 0) & (input != 0), input, 2)": lambda i, t, m, d, g: torch.where(
        (i >= t) | (~(m > 0) & (i != 0)), i, 2.0
    ),
    "input * where(input > 0, 0.1, 0.2)": lambda i, t, m, d, g: i * (0.2 - 0.1 * (i > 0).to(i)),
    "max(input, target)": lambda i, t, m, d, g: torch.maximum(i, t),
    "min(0.5, input)": lambda i, t, m, d, g: torch.minimum(torch.full_like(i, 0.5), i),
    "minimum(input, delta) + maximum(delta, target)": lambda i, t, m, d, g: (
        torch.minimum(i, torch.as_tensor(d).to(i)) + torch.maximum(t, torch.as_tensor(d).to(i))
    ),
    "clamp(input, -0.5, 0.5)": lambda i, t, m, d, g: i.clamp(-0.5, 0.5),
    "clamp(input, max=0.5)": lambda i, t, m, d, g: i.clamp(max=0.5),
    "clamp(input, min=0.5)": lambda i, t, m, d, g: i.clamp(min=0.5),
    "clamp(input, 0.5)": lambda i, t, m, d, g: i.clamp(0.5),
    "clamp(input, max=0.5, min=target)": lambda i, t, m, d, g: torch.clamp(i, t, torch.full_like(i, 0.5)),
    "clamp(0, input, delta)": lambda i, t, m, d, g: torch.clamp(
        torch.zeros_like(i), i, torch.as_tensor(d).to(i).expand_as(i)
    ),
    "input ** 3 + pow(input, 2)": lambda i, t, m, d, g: i**3 + i**2,
    "2 ** input * delta ** 2": lambda i, t, m, d, g: torch.exp2(i) * d**2,
    "-input ** 2": lambda i, t, m, d, g: -(i**2),
    "(2 + input) ** target": lambda i, t, m, d, g: (2 + i) ** t,
    "1/2 * input + 7 / delta - 2 ** 3 * pi": lambda i, t, m, d, g: 0.5 * i + 7 / d - 8 * math.pi,
    "input / (3 + target) / 2": lambda i, t, m, d, g: i / (3 + t) / 2,
    "input * (sqrt(delta) + log(gamma))": lambda i, t, m, d, g: i * (math.sqrt(d) + math.log(g)),
    "(delta - 2) ** 0.5 + input": lambda i, t, m, d, g: i + torch.as_tensor(d - 2.0).to(i) ** 0.5,
    "1 / (delta - 1) + input": lambda i, t, m, d, g: i + math.inf,
    "abs(input) + sign(target)": lambda i, t, m, d, g: i.abs() + t.sign(),
    "rsqrt(3 + input) * sqrt(2 + target)": lambda i, t, m, d, g: (3 + i) ** -0.5 * (2 + t) ** 0.5,
    "expm1(input) + exp(target)": lambda i, t, m, d, g: torch.exp(i) - 1 + torch.exp(t),
    "sin(input) + cos(input) * tan(target)": lambda i, t, m, d, g: i.sin() + i.cos() * t.tan(),
    "sinh(input) + cosh(input) + tanh(input)": lambda i, t, m, d, g: i.exp() + i.tanh(),
    "atan(input) * erf(target)": lambda i, t, m, d, g: i.atan() * t.erf(),
    "sigmoid(input) + exp(logsigmoid(input))": lambda i, t, m, d, g: 2 * torch.sigmoid(i),
    "softplus(input) - softplus(-input)": lambda i, t, m, d, g: i,
    "relu(input) - relu(-target)": lambda i, t, m, d, g: i.relu() - (-t).relu(),
    "xlogy(mask, 3 + input)": lambda i, t, m, d, g: m * torch.log(3 + i),
    "xlogy(2, 3 + input) + log(3 + target)": lambda i, t, m, d, g: 2 * torch.log(3 + i) + torch.log(3 + t),
    "log(2) * input + clamp(7, 0, max=1) + max(1, 2)": lambda i, t, m, d, g: math.log(2) * i + 3,
}


@pytest.mark.parametrize("text", GOOD)
def test_torch_function(text):
    """The operands are halves from -1 to 1, so that every kink and tie occurs."""
    input, target = (torch.randint(-2, 3, (64,)).double().div(2).requires_grad_() for _ in range(2))
    mask = torch.randint(2, (64,)).double()
    values = (input, target, mask, 1.0, 3.0)
    composed = torch_function(text)
    ours, theirs = composed(*values), GOOD[text](*values)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, equal_nan=True)
    seeds = torch.randn(64, dtype=torch.float64)
    wanted = [x for x, name in ((input, "input"), (target, "target")) if name in text]
    for gradients in zip(
        *(torch.autograd.grad(y, wanted, seeds, allow_unused=True, materialize_grads=True) for y in (ours, theirs)),
        strict=True,
    ):
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)

    # Masks of other types, parameters as tensors or of another type, and float32.
    for other in (mask.bool(), mask.long()):
        assert torch.equal(
            composed(input, target, other, 1, torch.tensor(3.0).double()).nan_to_num(), ours.nan_to_num()
        )
    single = composed(input.float(), target.float(), mask.bool(), 1.0, 3.0)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, ours.float(), rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    "text, at, gradient",
    [
        ("abs(input)", 0, 0),
        ("relu(input)", 0, 0),
        ("sign(input)", 0, 0),
        ("max(input, 1)", 1, 0.5),
        ("min(1, input)", 1, 0.5),
        ("max(input, input)", 1, 1),
        ("clamp(input, 0, 1)", 0, SLOPE_AT_NUMBER),
        ("clamp(input, 0, 1)", 1, SLOPE_AT_NUMBER),
        ("clamp(input, min=0)", 0, SLOPE_AT_NUMBER),
        ("clamp(input, max=0)", 0, SLOPE_AT_NUMBER),
        ("clamp(input, 0, 1)", 1.5, 0),
        ("where(input < 1, input, 2 * input)", 1, 2),
        ("where(input, 3 * input, 2 * input)", 0, 2),
        ("input ** 0", 0, 0),
        ("input ** 2", -1, -2),
    ],
)
def test_kinks(text, at, gradient):
    x = torch.tensor(float(at), requires_grad=True)
    (ours,) = torch.autograd.grad(torch_function(text)(x, x, x, 1.0, 1.0), x)
    assert ours.item() == gradient


SOME = "where(mask, max(input, 0) * gamma + 1/2, clamp(input - target, -delta, 1) ** 2 + sqrt(delta) * softplus(input))"


def test_transformations_of_torch(fresh_compiler):
    composed = torch_function(SOME)
    input, target, tangent = torch.randn(3, 8, dtype=torch.float64)
    mask = torch.rand(8) < 0.5
    rest = (target, mask, 1.5, 2.0)
    expected = composed(input, *rest)
    with torch.enable_grad():
        leaf = input.clone().requires_grad_()
        (slope,) = torch.autograd.grad(composed(leaf, *rest).sum(), leaf)

    compiled = torch.compile(composed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input, *rest), expected)
    torch.testing.assert_close(torch.func.vmap(composed, (0, 0, 0, None, None))(input, *rest), expected)
    torch.testing.assert_close(torch.func.grad(lambda x: composed(x, *rest).sum())(input), slope)
    torch.testing.assert_close(torch.func.jvp(lambda x: composed(x, *rest), (input,), (tangent,))[1], slope * tangent)
    with forward_ad.dual_level():
        dual = composed(forward_ad.make_dual(input, tangent), *rest)
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, slope * tangent)
    parameter = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda d: composed(input, target, mask, d, 2.0), parameter)


def test_arguments():
    """Arguments are positional, in the given order. Those that the expression does not use may be missing."""
    expression = read("input - 2 * target")
    assert expression.names == ("input", "target")
    assert to_torch(expression, ("target", "mask", "input"))(torch.tensor(1.0), None, torch.tensor(3.0)).item() == 1
    with pytest.raises(ValueError, match="no argument for target"):
        to_torch(expression, ("input",))


def test_expression_is_a_value():
    assert read("delta * input") == read("delta * input") and len({read("input"), read("input")}) == 1
    assert read("delta * input + delta * target").names == ("delta", "input", "target")
    assert read("clamp(input, max=gamma, min=delta)").names == ("input", "gamma", "delta")
    assert "tree" not in repr(read("input"))
    # Python itself normalises names (NFKC), so these letters become the plain ones.
    assert read("\uff49\uff4eput").names == ("input",)


CPP = {
    "input": "argument_input",
    "+input": "argument_input",
    "-input": "(-argument_input)",
    "--input": "(-(-argument_input))",
    "input - target * delta": "(argument_input - (argument_target * argument_delta))",
    "1/2 * input": "(c(0.5) * argument_input)",
    "input / 2": "(argument_input / c(2.0))",
    "input * -1e-6 + 10 ** 16": "((argument_input * c(-1e-06)) + c(1e+16))",
    "input - -0.0": "(argument_input - c(-0.0))",
    "input + 2 * pi": "(argument_input + c(6.283185307179586))",
    "input + exp(0) + max(1, 2) + clamp(5, 0, 1)": "(((argument_input + c(1.0)) + c(2.0)) + c(1.0))",
    "input ** 2": "power<2>(argument_input)",
    "pow(input, 3)": "power<3>(argument_input)",
    "input ** -8": "power<-8>(argument_input)",
    "input ** 0": "power<0>(argument_input)",
    "input ** (4 / 2)": "power<2>(argument_input)",
    "input ** 9": "pow(argument_input, c(9.0))",
    "input ** -2.5": "pow(argument_input, c(-2.5))",
    "input ** 0.5": "sqrt(argument_input)",
    "2 ** input": "pow(c(2.0), argument_input)",
    "-input ** 2": "(-power<2>(argument_input))",
    "input ** delta": "pow(argument_input, argument_delta)",
    "max(input, 0) - min(1, input)": "(maximum(argument_input, c(0.0)) - minimum(c(1.0), argument_input))",
    "maximum(input, 0) - minimum(1, input)": "(maximum(argument_input, c(0.0)) - minimum(c(1.0), argument_input))",
    "clamp(input, 0, delta)": f"clamp{NUMBER}(argument_input, c(0.0), argument_delta)",
    "clamp(input, target, delta)": f"clamp{TENSOR}(argument_input, argument_target, argument_delta)",
    "clamp(input, min=2 * target)": f"clamp_min{TENSOR}(argument_input, (c(2.0) * argument_target))",
    "clamp(input, max=1, min=0)": f"clamp{NUMBER}(argument_input, c(0.0), c(1.0))",
    "clamp(input, min=-1)": f"clamp_min{NUMBER}(argument_input, c(-1.0))",
    "clamp(input, 2)": f"clamp_min{NUMBER}(argument_input, c(2.0))",
    "clamp(input, max=1)": f"clamp_max{NUMBER}(argument_input, c(1.0))",
    "xlogy(target, input)": "xlogy(argument_target, argument_input)",
    "where(mask, input, 0)": "where(is_nonzero(argument_mask), argument_input, c(0.0))",
    "where(0 <= input < 1, 1, 2)": "where(((c(0.0) <= argument_input) & (argument_input < c(1.0))), c(1.0), c(2.0))",
    "where(~(input == 0) | (mask != 0) & (delta > 1), 2, 1)": (
        "where((not_((argument_input == c(0.0))) | ((argument_mask != c(0.0)) "
        "& (argument_delta > c(1.0)))), c(2.0), c(1.0))"
    ),
    "where(abs(input - target) < delta, square(input - target), abs(input - target))": (
        "where((abs((argument_input - argument_target)) < argument_delta), "
        "square((argument_input - argument_target)), abs((argument_input - argument_target)))"
    ),
}


@pytest.mark.parametrize("text", CPP)
def test_cpp(text):
    assert to_cpp(read(text)).replace("constant<V>", "c") == CPP[text]


@pytest.mark.parametrize("text", ["(-2) ** input", "input * -0.0", "2 - -3 - (4 - input)", "max(input, -1) ** -2.0"])
def test_torchscript_text(text):
    """The text has the same value when it is evaluated as Python."""
    source, names = to_torchscript(read(text))
    x = torch.arange(1.0, 5.0)
    expected = torch_function(text)(x, *[None] * 4)
    found = eval(source, {**names, "argument_input": x})
    assert torch.equal(found, expected) and torch.equal(found.signbit(), expected.signbit())


def test_functions_print_a_line_each():
    lines = repr(FUNCTIONS).splitlines()
    assert lines == [f"{name:<10}  {function.doc}" for name, function in FUNCTIONS.items()]
    assert max(map(len, lines)) <= 100


def test_functions():
    """Each function has a description, and is printed as C++ and composed in torch."""
    for name, function in FUNCTIONS.items():
        assert function.doc and name.isidentifier()
        arguments = ", ".join(["input", "target", "delta"][: function.arguments])
        cpp = to_cpp(read(f"{name}({arguments})"))
        printed = {"where": "where(is_nonzero(", "clamp": f"clamp{TENSOR}("}
        assert cpp.startswith(printed.get(name, f"{function.cpp or name}("))
        result = torch_function(f"{name}({arguments})")(torch.rand(3), torch.rand(3), torch.rand(3), 1.0, 1.0)
        assert result.shape == (3,) and result.isfinite().all()
