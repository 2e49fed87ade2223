"""The language of `custom_loss`: what can be read, what is refused and how, and that torch and C++ compute the same."""

import math
import operator
import os
import random
import subprocess
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

from fusedloss.expression import CLAMP_AT_BOUND, FUNCTIONS, check_names, parse, to_cpp, to_torch, to_torchscript

TENSORS = ("input", "target", "mask")
PARAMETERS = ("delta", "gamma")
ARGUMENTS = TENSORS + PARAMETERS
NUMBER, TENSOR = (f"<AtBound::{who}>" for who in CLAMP_AT_BOUND)  # of clamp, by what the bound is
SLOPE_AT_NUMBER = 1 if CLAMP_AT_BOUND[0] == "kX" else 0


def read(text):
    return parse(text, TENSORS, PARAMETERS)


def torch_function(text):
    return to_torch(read(text), ARGUMENTS)


# The same in torch, of input, target, mask (of 0. and 1.), delta and gamma.
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
    """On halves from -1 to 1, so that every kink and tie is met."""
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

    # Masks of other types, parameters as tensors or of another type, and half the precision.
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
    """By position, in the order that is asked for; what the formula does not use may be missing."""
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
    # Python itself normalises names (NFKC), so that these letters are the plain ones.
    assert read("\uff49\uff4eput").names == ("input",)


# The message, and what stands from the caret to the end of the line.
BAD = {
    "abs(input - targte)": (
        "unknown name 'targte'; the tensors are input, target, mask; the parameters are delta, gamma",
        "targte)",
    ),
    "": ("is empty", ""),
    " \n\t": ("is empty", ""),
    "# nothing": ("", ""),
    "input +": ("invalid syntax", ""),
    "(input": ("was never closed", "(input"),
    "input target": ("invalid syntax", "target"),
    "input\n- target": ("invalid syntax", "- target"),
    "x = input": ("invalid syntax", "= input"),
    "import os": ("invalid syntax", "import os"),
    "input; target": ("invalid syntax", "; target"),
    "1 * (x := input)": ("can stand here", "x := input)"),
    "target * delta": ("does not use 'input'", "target * delta"),
    "input > 0": ("a number is expected", "input > 0"),
    "input * (target > 0)": ("where(condition, 1, 0)", "target > 0)"),
    "abs(input > 0)": ("a number is expected", "input > 0)"),
    "(input > 0) == (target > 0)": ("a number is expected", "input > 0) == (target > 0)"),
    "where(input > 0, input > 1, 0)": ("a number is expected", "input > 1, 0)"),
    "where(input > 0 & mask, 1, 0)": ("a condition is expected", "0 & mask, 1, 0)"),
    "where(~mask, input, 0)": ("mask != 0", "mask, input, 0)"),
    "where(mask | (input > 0), 1, 0)": ("a condition is expected", "mask | (input > 0), 1, 0)"),
    "where(input > 0 and target > 0, 1, 0)": ("(a < b) & (c < d)", "input > 0 and target > 0, 1, 0)"),
    "where(not input > 0, 1, 0)": ("~(a < b)", "not input > 0, 1, 0)"),
    "input if mask else target": ("where(condition, a, b)", "input if mask else target"),
    "where(1, input, 0)": ("a literal condition", "1, input, 0)"),
    "where(1 < 2, input, 0)": ("two literals", "1 < 2, input, 0)"),
    "where(0 < 1 < input, input, 0)": ("two literals", "0 < 1 < input, input, 0)"),
    "where(0 < where(0 < input < 1, 1, 2) < 3, 1, 0)": ("in the middle", "where(0 < input < 1, 1, 2) < 3, 1, 0)"),
    "input * abs": ("abs is a function: call it", "abs"),
    "input + delta(1)": ("'delta' is not a function", "delta(1)"),
    "input + pi()": ("'pi' is not a function", "pi()"),
    "input + mean(input)": ("unknown function 'mean'", "mean(input)"),
    "input + clamp_min(input, 0)": ("unknown function 'clamp_min'", "clamp_min(input, 0)"),
    "input + is_nonzero(input)": ("unknown function 'is_nonzero'", "is_nonzero(input)"),
    "1 + abs(input, 2)": ("abs takes 1 argument, not 2", "abs(input, 2)"),
    "1 + pow(input)": ("pow takes 2 arguments, not 1", "pow(input)"),
    "where(input, 1)": ("where takes 3 arguments, not 2", "where(input, 1)"),
    "exp()": ("exp takes 1 argument, not 0", "exp()"),
    "abs(x=input)": ("abs takes no keyword arguments", "x=input)"),
    "abs(*input)": ("can stand here", "*input)"),
    "clamp(input, **input)": ("no keyword arguments but min and max", "**input)"),
    "clamp(input, low=0)": ("no keyword arguments but min and max", "low=0)"),
    "clamp(input)": ("clamp takes a number and bounds", "clamp(input)"),
    "clamp(min=input, max=1)": ("clamp takes a number and bounds", "clamp(min=input, max=1)"),
    "clamp(input, 0, 1, 2)": ("clamp takes a number and bounds", "clamp(input, 0, 1, 2)"),
    "clamp(input, 0, min=1)": ("min twice", "min=1)"),
    "clamp(input, min=0, min=1)": ("min twice", "min=1)"),
    "clamp(input, None, 1)": ("NoneType", "None, 1)"),
    "input * True": ("bool", "True"),
    "input * 1j": ("complex", "1j"),
    "input + 'a'": ("str", "'a'"),
    "input + b'a'": ("bytes", "b'a'"),
    "input + ...": ("ellipsis", "..."),
    "input + f'{input}'": ("can stand here", "f'{input}'"),
    "input + input.T": ("attributes", "input.T"),
    "1 + torch.abs(input)": ("attributes", "torch.abs(input)"),
    "input + input[0]": ("subscripts", "input[0]"),
    "input + (lambda: 1)": ("can stand here", "lambda: 1)"),
    "abs([input for _ in input])": ("can stand here", "[input for _ in input])"),
    "abs((input, target))": ("can stand here", "(input, target))"),
    "input, target": ("can stand here", "input, target"),
    "1 + {input: 1}": ("can stand here", "{input: 1}"),
    "abs(await input)": ("can stand here", "await input)"),
    "abs((yield input))": ("can stand here", "yield input))"),
    "1 + input % 2": ("operator %", "input % 2"),
    "1 + input // 2": ("operator //", "input // 2"),
    "1 + input @ 2": ("operator @", "input @ 2"),
    "abs(input << 2)": ("operator <<", "input << 2)"),
    "abs(input >> 2)": ("operator >>", "input >> 2)"),
    "abs(input ^ 2)": ("a power is a ** b", "input ^ 2)"),
    "where(input in target, 1, 0)": ("'in'", "input in target, 1, 0)"),
    "where(input is not target, 1, 0)": ("'is'", "input is not target, 1, 0)"),
    "input * 1e999": ("not a finite", "1e999"),
    "input + 1 / 0": ("not a finite", "1 / 0"),
    "input + 0 ** -1": ("not a finite", "0 ** -1"),
    "input + (-8) ** 0.5": ("not a finite", "(-8) ** 0.5"),
    "input + 1e300 * 1e300": ("not a finite", "1e300 * 1e300"),
    "input + pow(10, 400)": ("not a finite", "pow(10, 400)"),
    "input + log(0)": ("not a finite", "log(0)"),
    "input + sqrt(-1)": ("not a finite", "sqrt(-1)"),
    "abs(input -\n\t\u00e9\u4e2d - 1)": ("unknown name", "\u00e9\u4e2d - 1)"),
    "(input\r\n+ x\r\n+ input)": ("unknown name 'x'", "x"),
    "(input\r+ 1\u2028+ x\r+ input)": ("invalid", None),
    "(input +\r1 +\x0c x\r+ input)": ("unknown name 'x'", "x"),
    "input + '\u00e9\u4e2d\U0001f600' + (x)": ("str", "'\u00e9\u4e2d\U0001f600' + (x)"),
    "(input if '\u00e9' else 1) + 1": ("where(condition", "input if '\u00e9' else 1) + 1"),
    # What an attacker would try first.
    "__import__('os').system('true')": ("attributes", "__import__('os').system('true')"),
    "__import__('os')": ("unknown function '__import__'", "__import__('os')"),
    "input.__class__.__base__": ("attributes", "input.__class__.__base__"),
    '"); system("': ("str", '"); system("'),
    "input) + system(0": ("unmatched ')'", ") + system(0"),
    "input /* */": ("invalid syntax", "* */"),
    "argument_input + input": ("unknown name 'argument_input'", "argument_input + input"),
    "__builtins__ * input": ("unknown name '__builtins__'", "__builtins__ * input"),
    "\u0456nput": ("unknown name '\u0456nput'", "\u0456nput"),  # a Cyrillic letter
    "input\x00": ("null bytes", None),
    "input\ud800": ("surrogates", None),
    "input + \x1b[31m": ("", None),
    # What would take all memory, or all time, or all of the stack.
    "input * 9**9**9**9": ("not a finite", "9**9**9"),
    "input * 10**400": ("not a finite", "10**400"),
    "input * 1" + "0" * 400: ("not a finite", None),
    "input * 0x1" + "0" * 4000: ("not a finite", None),
    "input * 1" + "0" * 5000: ("", None),
    "-" * 9_000 + "input": ("", None),
    "-" * 200 + "input": ("more than 100 levels", None),
    "input" + "+1" * 150: ("more than 100 levels", None),
    "(" * 4_000 + "input" + ")" * 4_000: ("", None),
    "abs(" * 150 + "input" + ")" * 150: ("more than 100 levels", None),
    "-" * 20_000 + "input": ("10,000 characters", None),
    "(" * 9_000: ("", None),
    "[" * 9_000: ("", None),
}


@pytest.mark.filterwarnings("ignore:.*:SyntaxWarning", "ignore:.*:DeprecationWarning")
@pytest.mark.parametrize("text", BAD, ids=lambda text: ascii(text[:40]))
def test_refused(text):
    start = time.perf_counter()
    with pytest.raises(ValueError) as raised:
        read(text)
    assert time.perf_counter() - start < 2
    says, place = BAD[text]
    first, shown, caret, functions = str(raised.value).split("\n")
    assert first.startswith("custom_loss: ") and says in first
    assert functions == "functions: " + ", ".join(FUNCTIONS)
    assert shown.startswith("    ") and shown.isprintable() and len(shown) < 170
    assert caret.strip(" ") == "^" and caret.startswith("    ")
    if place is not None:
        # An older Python may see the mistake elsewhere.
        assert shown[caret.index("^") :] == place or "invalid syntax" in first or "#" in text


def test_no_text():
    for text in (None, b"input", 1):
        with pytest.raises(TypeError, match="must be a str"):
            parse(text, TENSORS, PARAMETERS)


def test_no_parameters():
    with pytest.raises(ValueError, match="the parameters are none"):
        parse("input + delta", ("input", "target"), ())


@pytest.mark.parametrize("depth", [95, 300])
def test_deep_but_allowed(depth):
    """Also where the caller has used up most of the stack."""

    def deeper(left):
        return deeper(left - 1) if left else read("abs(" * 95 + "input" + ")" * 95)

    expression = deeper(depth)
    composed = to_torch(expression, ARGUMENTS)
    assert composed(torch.tensor(-2.0), None, None, 1.0, 1.0).item() == 2
    assert to_cpp(expression).count("abs(") == 95


@pytest.mark.parametrize(
    "tensors, parameters, says",
    [
        (("input", "2x"), (), "tensor '2x' must be an identifier"),
        (("input", ""), (), "must be an identifier"),
        (("input",), ("lambda",), "parameter 'lambda' must be an identifier"),
        (("input",), ("\u03b4",), "ASCII"),
        (("input",), ("a b",), "parameter 'a b'"),
        (("input",), ("x); system(0",), "must be an identifier"),
        (("input",), ("x\n",), "must be an identifier"),
        (("input",), ("__x",), "parameter '__x' must not begin with two underscores"),
        (("input", "abs"), (), "tensor 'abs' is the name of a function"),
        (("input",), ("max",), "parameter 'max' is the name of a function"),
        (("input",), ("pi",), "parameter 'pi' is the constant"),
        (("input", "input"), (), "tensor 'input' is there twice"),
        (("input", "x"), ("x",), "parameter 'x' is there twice"),
        (("x",), ("input",), "parameter 'input' is the name of a tensor"),
        (("input",), ("target",), "parameter 'target' is the name of a tensor"),
    ],
)
def test_bad_names(tensors, parameters, says):
    for check in (check_names, lambda *names: parse("input", *names)):
        with pytest.raises(ValueError) as raised:
            check(tensors, parameters)
        assert says in str(raised.value) and str(raised.value).startswith("custom_loss: ")


def test_good_names():
    check_names(
        ("input", "target", "weight", "_x", "y0", "INFINITY"), ("int", "double", "delta", "match", "is_nonzero")
    )
    assert to_cpp(parse("int * input * INFINITY", ("input", "INFINITY"), ("int",))) == (
        "((argument_int * argument_input) * argument_INFINITY)"
    )
    with pytest.raises(TypeError, match="name of a tensor must be a str"):
        check_names((1,), ())


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
    """It means the same when it is read again."""
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
    """Each is described, and is what torch and C++ are given of that name."""
    for name, function in FUNCTIONS.items():
        assert function.doc and name.isidentifier()
        arguments = ", ".join(["input", "target", "delta"][: function.arguments])
        cpp = to_cpp(read(f"{name}({arguments})"))
        printed = {"where": "where(is_nonzero(", "clamp": f"clamp{TENSOR}("}
        assert cpp.startswith(printed.get(name, f"{function.cpp or name}("))
        result = torch_function(f"{name}({arguments})")(torch.rand(3), torch.rand(3), torch.rand(3), 1.0, 1.0)
        assert result.shape == (3,) and result.isfinite().all()


def formula(rng, levels):
    """A random number; no function leaves its domain, and nothing grows so that it would lose its digits."""
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
    """A number that all compute to the last bit, for what jumps, and that differs from one element to the other."""
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


# The text is Python, but for ~, so that Python itself can say what it is worth.
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
    return f"({formula(rng, 4)}) + 0 * input"  # every formula has input in it


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
    """What is printed is C++, and worth the same."""
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
