"""The language of `custom_loss`: what is refused, with which message, and which names are allowed."""

import time

import pytest
import torch
from helpers.expression import ARGUMENTS, PARAMETERS, TENSORS, read

from fusedloss.expression import FUNCTIONS, check_names, parse, to_cpp, to_torch

# A part of the message, and the text from the caret to the end of the line.
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
    # The first attempts of an attacker.
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
    # Expressions that would exhaust the memory, the time or the stack.
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
        # An older Python may report the mistake at another place.
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
    """Deep expressions are also read if the caller has used most of the stack."""

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
