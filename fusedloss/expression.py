"""The language of `custom_loss`: reads the formula of one element from text and translates it to torch and to C++.

    where(abs(input - target) < delta, square(input - target), abs(input - target))

The syntax is that of Python's expressions: names of tensors and parameters, `pi`, numbers, `+ - * / **`, comparisons
(also chained, `0 < x < 1`), `& | ~` between conditions, and calls of FUNCTIONS. Every subexpression is either a number
or a condition. A comparison is a condition; the whole expression must be a number. `where` also takes a number as its
condition, which then means `!= 0`.

`_Reader` reads a text once, checks it against a list of what is allowed, and makes a tree of few kinds of nodes, which
its docstring lists. The torch function and the C++ code are generated from that tree, so the text itself is never
executed or pasted into code.
"""

import ast
import keyword
import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_CHARACTERS = 10_000
MAX_LEVELS = 100


@dataclass(frozen=True)
class Function:
    arguments: int
    torch: Callable[..., Tensor]
    doc: str
    cpp: str = ""  # its name in C++, if that differs


class _Functions(dict[str, Function]):
    """The functions by name. It prints as one line per function."""

    def __repr__(self) -> str:
        width = max(map(len, self), default=0)
        return "\n".join(f"{name:<{width}}  {function.doc}" for name, function in self.items())


FUNCTIONS = _Functions(
    {
        "abs": Function(1, torch.abs, "absolute value; derivative 0 at 0"),
        "sign": Function(1, torch.sign, "-1, 0 or 1, and 0 of NaN; derivative 0"),
        "square": Function(1, torch.square, "x * x"),
        "sqrt": Function(1, torch.sqrt, "square root"),
        "rsqrt": Function(1, torch.rsqrt, "1 / sqrt(x)"),
        "exp": Function(1, torch.exp, "e ** x"),
        "expm1": Function(1, torch.expm1, "exp(x) - 1, precise near 0"),
        "log": Function(1, torch.log, "natural logarithm"),
        "log1p": Function(1, torch.log1p, "log(1 + x), precise near 0"),
        "sin": Function(1, torch.sin, "sine"),
        "cos": Function(1, torch.cos, "cosine"),
        "tan": Function(1, torch.tan, "tangent"),
        "sinh": Function(1, torch.sinh, "hyperbolic sine"),
        "cosh": Function(1, torch.cosh, "hyperbolic cosine"),
        "tanh": Function(1, torch.tanh, "hyperbolic tangent"),
        "atan": Function(1, torch.atan, "arc tangent"),
        "erf": Function(1, torch.erf, "error function"),
        "sigmoid": Function(1, torch.sigmoid, "1 / (1 + exp(-x))"),
        "logsigmoid": Function(1, F.logsigmoid, "log(sigmoid(x)), precise on both sides"),
        # Above 20, torch's softplus is x itself, which differs by less than 2.1e-9.
        "softplus": Function(1, F.softplus, "log(1 + exp(x)), precise on both sides"),
        "relu": Function(1, torch.relu, "maximum(x, 0); derivative 0 at 0"),
        "pow": Function(2, torch.pow, "a ** b"),
        "xlogy": Function(2, torch.special.xlogy, "a * log(b); 0 where a is 0 and b is not NaN"),
        "maximum": Function(2, torch.maximum, "the larger one; where both are equal, each has half the derivative"),
        "max": Function(2, torch.maximum, "maximum", cpp="maximum"),
        "minimum": Function(2, torch.minimum, "the smaller one; where both are equal, each has half the derivative"),
        "min": Function(2, torch.minimum, "minimum", cpp="minimum"),
        "clamp": Function(3, torch.clamp, "clamp(x, min, max), also with only min=... or max=...; see CLAMP_AT_BOUND"),
        "where": Function(3, torch.where, "where(condition, a, b): a where the condition holds, otherwise b"),
    }
)

# Which arguments of clamp get the derivative at a bound: first if the bound is a number, then if it is a tensor. The
# names are those of AtBound in csrc/kernels/formulas/dual_functions-inl.h. torch changed this in 2.14.
CLAMP_AT_BOUND = ("kX", "kX") if torch.__version__ < "2.14" else ("kBound", "kBoth")


# TorchScript compiles the following functions too, so they are no lambdas and all types are written out.


def _clamp_exclusive(x: Tensor, low: Tensor | None, high: Tensor | None) -> Tensor:
    """torch.clamp, where x gets no derivative at a bound."""
    inside = torch.ones_like(x, dtype=torch.bool) if low is None else x > low
    if high is not None:
        inside = inside & (x < high)
    return torch.where(inside, x, torch.clamp(x.detach(), low, high))


def _clamps(prefix: str, clamp: Callable[..., Tensor], at_bound: str) -> dict[str, Function]:
    """The functions that replace a call of clamp, depending on the bounds it is given."""

    def clamp_min(x: Tensor, low: Tensor) -> Tensor:
        return clamp(x, low, None)

    def clamp_max(x: Tensor, high: Tensor) -> Tensor:
        return clamp(x, None, high)

    return {
        f"{prefix}clamp_both": Function(3, clamp, "clamp(x, min, max)", f"clamp<AtBound::{at_bound}>"),
        f"{prefix}clamp_min": Function(2, clamp_min, "clamp(x, min)", f"clamp_min<AtBound::{at_bound}>"),
        f"{prefix}clamp_max": Function(2, clamp_max, "clamp(x, max=high)", f"clamp_max<AtBound::{at_bound}>"),
    }


def _is_nonzero(x: Tensor) -> Tensor:
    return x != 0


# The functions that calls are replaced by. An expression cannot call them itself. Number bounds are tensors here too.
_FORMS = {
    **_clamps("", torch.clamp if CLAMP_AT_BOUND[0] == "kX" else _clamp_exclusive, CLAMP_AT_BOUND[0]),
    **_clamps("tensor_", torch.clamp, CLAMP_AT_BOUND[1]),
    "is_nonzero": Function(1, _is_nonzero, "the condition that a number stands for"),
}
_CALLABLE = FUNCTIONS | _FORMS

_ARITHMETIC = {
    ast.Add: ("+", operator.add),
    ast.Sub: ("-", operator.sub),
    ast.Mult: ("*", operator.mul),
    ast.Div: ("/", operator.truediv),
    ast.Pow: ("**", operator.pow),
}
_LOGIC = {ast.BitAnd: "&", ast.BitOr: "|"}
_COMPARISONS = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!="}

_REFUSED = {
    ast.BoolOp: "'and' and 'or' do not work on conditions of elements; write (a < b) & (c < d), or | between them",
    ast.Not: "'not' does not work on conditions of elements; write ~(a < b)",
    ast.IfExp: "for 'a if condition else b' write where(condition, a, b)",
    ast.Attribute: "attributes are not available; a function is called by its name alone, as in abs(input)",
    ast.Subscript: "subscripts are not available; the formula is that of a single element",
    ast.Mod: "the operator % is not available",
    ast.FloorDiv: "the operator // is not available",
    ast.MatMult: "the operator @ is not available; the formula is that of a single element",
    ast.LShift: "the operator << is not available",
    ast.RShift: "the operator >> is not available",
    ast.BitXor: "the operator ^ is not available; a power is a ** b, and conditions have & | ~",
}
_NOT_IN_THE_LANGUAGE = "only names, numbers, operators and calls of functions can stand here"


@dataclass(frozen=True)
class Expression:
    """A formula that was read and checked."""

    text: str
    tree: ast.expr = field(compare=False, repr=False)  # determined by the text
    names: tuple[str, ...]  # of tensors and parameters, in the order of first use


def check_names(tensors: Sequence[str], parameters: Sequence[str]) -> None:
    """Raise a ValueError for a name that a formula cannot use, and a TypeError for a name that is not a str."""
    seen: set[str] = set()
    for what, names in (("tensor", tensors), ("parameter", parameters)):
        for name in names:
            if not isinstance(name, str):
                raise TypeError(f"custom_loss: the name of a {what} must be a str, not {type(name).__name__}")
            # ASCII only, because some compilers accept nothing else in a name.
            if not (name.isascii() and name.isidentifier()) or keyword.iskeyword(name):
                fault = "must be an identifier of ASCII characters, and not a keyword of Python"
            elif name.startswith("__"):
                fault = "must not begin with two underscores"
            elif name in FUNCTIONS:
                fault = "is the name of a function in expressions"
            elif name == "pi":
                fault = "is the constant pi in expressions"
            elif what == "parameter" and name in ("input", "target"):
                fault = "is the name of a tensor"
            elif name in seen:
                fault = "is there twice"
            else:
                seen.add(name)
                continue
            raise ValueError(f"custom_loss: {what} {name!r} {fault}; choose another name")


def parse(text: str, tensors: Sequence[str], parameters: Sequence[str], is_loss: bool = True) -> Expression:
    """Read a formula of these tensors and parameters. The formula of a loss must use input; a derivative need not.

    Raises:
        TypeError: text is not a str.
        ValueError: something in text, or a name, is not allowed. The message shows the place.
    """
    if not isinstance(text, str):
        raise TypeError(f"custom_loss: the expression must be a str, not {type(text).__name__}")
    check_names(tensors, parameters)
    reader = _Reader(text.strip(), tensors, parameters)
    try:
        tree = reader.whole()
        if is_loss and "input" not in reader.names:
            raise reader.refusal("the expression does not use 'input'")
    except (RecursionError, MemoryError):
        raise reader.refusal("the expression is nested too deeply") from None
    return Expression(text, tree, tuple(reader.names))


class _Reader:
    """Checks a text and makes the tree that `to_torch` and `to_cpp` translate. The tree contains only these nodes:

    - Constant: a float. A subexpression of literals alone is evaluated to one.
    - Name, UnaryOp with - or ~, and BinOp with the operators of _ARITHMETIC and _LOGIC. pow(a, b) becomes a ** b.
    - Compare with two operands. A chain becomes several comparisons joined by &.
    - Call of a plain name in FUNCTIONS or _FORMS, with the right number of arguments, all positional. clamp becomes
      clamp_both, clamp_min or clamp_max, and tensor_clamp_… if a bound contains a tensor. A number as the condition of
      where becomes a call of is_nonzero.
    """

    def __init__(self, text: str, tensors: Sequence[str], parameters: Sequence[str]) -> None:
        self.text = text
        self.lines = re.split(r"\r\n|\r|\n", text)  # the line ends of Python; str.splitlines has more
        self.tensors = tensors
        self.parameters = parameters
        self.names: dict[str, None] = {}

    def whole(self) -> ast.expr:
        if not self.text:
            raise self.refusal("the expression is empty")
        if len(self.text) > MAX_CHARACTERS:
            raise self.refusal(f"the expression is longer than {MAX_CHARACTERS:,} characters")
        try:
            # Without the final newline, Python does not report the place of something that is missing at the end.
            given = ast.parse(self.text + "\n", mode="eval").body
        except SyntaxError as error:
            # Python counts both from 1, and gives 0 or None if it does not know the place.
            hint = "; several lines need parentheses around them" if len(self.lines) > 1 else ""
            raise self.refusal(error.msg + hint, (error.lineno or 1) - 1, (error.offset or 1) - 1) from None
        except ValueError as error:  # null bytes, surrogates
            raise self.refusal(str(error)) from None
        self.check_depth(given)
        return self.number(given)

    def refusal(self, message: str, line: int = 0, column: int = 0) -> ValueError:
        line = min(line, len(self.lines) - 1)
        column = max(0, min(column, len(self.lines[line])))
        first = max(0, column - 80)  # of a very long line, show the part around the place
        shown = "".join(c if c.isprintable() else " " for c in self.lines[line][first : column + 80])
        caret = " " * (column - first) + "^"
        return ValueError(f"custom_loss: {message}\n    {shown}\n    {caret}\nfunctions: {', '.join(FUNCTIONS)}")

    def refuse(self, node: ast.expr | ast.keyword, message: str) -> NoReturn:
        before = self.lines[node.lineno - 1].encode()[: node.col_offset]  # ast counts bytes
        column = len(before.decode())
        raise self.refusal(message, node.lineno - 1, column)

    def check_depth(self, tree: ast.expr) -> None:
        """Refuse a tree that is too deep for the recursive functions. This one is not recursive."""
        todo: list[tuple[ast.AST, int]] = [(tree, 1)]
        while todo:
            node, level = todo.pop()
            if level > MAX_LEVELS and isinstance(node, ast.expr):
                self.refuse(node, f"the expression has more than {MAX_LEVELS} levels of operations within operations")
            todo.extend((child, level + isinstance(child, ast.expr)) for child in ast.iter_child_nodes(node))

    def number(self, node: ast.expr) -> ast.expr:
        result = self.read(node)
        if _is_condition(result):
            self.refuse(node, "a number is expected here, not a condition; where(condition, 1, 0) makes one")
        return result

    def condition(self, node: ast.expr) -> ast.expr:
        result = self.read(node)
        if not _is_condition(result):
            message = "a condition is expected here, not a number; mask != 0 makes one"
            self.refuse(node, f"{message} (& | ~ bind tighter than comparisons: write (a < b) & (c < d))")
        return result

    def read(self, node: ast.expr) -> ast.expr:
        match node:
            case ast.Constant():
                return self.literal(node)
            case ast.Name():
                return self.name(node)
            case ast.UnaryOp(op=ast.UAdd()):
                return self.number(node.operand)
            case ast.UnaryOp(op=ast.USub()):
                operand = self.number(node.operand)
                if isinstance(operand, ast.Constant):
                    return ast.Constant(-_value(operand))
                return ast.UnaryOp(node.op, operand)
            case ast.UnaryOp(op=ast.Invert()):
                return ast.UnaryOp(node.op, self.condition(node.operand))
            case ast.BinOp() if type(node.op) in _ARITHMETIC:
                return self.arithmetic(node, self.number(node.left), node.op, self.number(node.right))
            case ast.BinOp() if type(node.op) in _LOGIC:
                return ast.BinOp(self.condition(node.left), node.op, self.condition(node.right))
            case ast.Compare():
                return self.comparison(node)
            case ast.Call(func=ast.Name()):
                return self.call(node)
            case ast.Call(func=ast.Attribute()):
                self.refuse(node, _REFUSED[ast.Attribute])
            case _:
                kind = type(node.op) if isinstance(node, ast.BinOp | ast.UnaryOp) else type(node)
                self.refuse(node, _REFUSED.get(kind, _NOT_IN_THE_LANGUAGE))

    def literal(self, node: ast.Constant) -> ast.Constant:
        value = node.value
        if isinstance(value, bool) or not isinstance(value, int | float):  # True is an int as well
            self.refuse(node, f"{type(value).__name__} is not a type in expressions; numbers are int or float")
        return self.constant(node, lambda: float(value))

    def constant(self, node: ast.expr, compute: Callable[[], float]) -> ast.Constant:
        try:
            value = compute()
        except (OverflowError, ZeroDivisionError):
            value = math.nan
        if isinstance(value, complex) or not math.isfinite(value):
            self.refuse(node, "this is not a finite float64 number")
        return ast.Constant(value)

    def name(self, node: ast.Name) -> ast.expr:
        if node.id == "pi":
            return ast.Constant(math.pi)
        if node.id in FUNCTIONS:
            self.refuse(node, f"{node.id} is a function: call it")
        if node.id not in (*self.tensors, *self.parameters):
            tensors = f"the tensors are {', '.join(self.tensors)}"
            parameters = f"the parameters are {', '.join(self.parameters) or 'none'}"
            self.refuse(node, f"unknown name {node.id!r}; {tensors}; {parameters}")
        self.names.setdefault(node.id)
        return ast.Name(node.id, ast.Load())

    def arithmetic(self, node: ast.expr, left: ast.expr, op: ast.operator, right: ast.expr) -> ast.expr:
        if isinstance(left, ast.Constant) and isinstance(right, ast.Constant):
            # They are floats, so that no power takes long to compute.
            numbers = _value(left), _value(right)
            return self.constant(node, lambda: _ARITHMETIC[type(op)][1](*numbers))
        return ast.BinOp(left, op, right)

    def comparison(self, node: ast.Compare) -> ast.expr:
        for op in node.ops:
            if type(op) not in _COMPARISONS:
                self.refuse(node, "'in', 'not in', 'is' and 'is not' are not available")
        for middle in node.comparators[:-1]:
            # A middle operand is written twice, so with nested chains it would be written 2 ** levels times.
            if any(isinstance(inner, ast.Compare) and len(inner.ops) > 1 for inner in ast.walk(middle)):
                self.refuse(
                    middle, "a chain of comparisons cannot be in the middle of another; write (a < b) & (b < c)"
                )
        operands = [self.number(operand) for operand in (node.left, *node.comparators)]
        result: ast.expr | None = None
        for left, op, right in zip(operands, node.ops, operands[1:], strict=False):
            if isinstance(left, ast.Constant) and isinstance(right, ast.Constant):
                self.refuse(node, "a comparison of two literals is the same for every element")
            pair = ast.Compare(left, [op], [right])
            result = pair if result is None else ast.BinOp(result, ast.BitAnd(), pair)
        assert result is not None
        return result

    def call(self, node: ast.Call) -> ast.expr:
        assert isinstance(node.func, ast.Name)
        name = node.func.id
        if name not in FUNCTIONS:
            known = name in (*self.tensors, *self.parameters, "pi")
            self.refuse(node, f"{name!r} is not a function" if known else f"unknown function {name!r}")
        if name == "clamp":
            return self.clamp(node)
        if node.keywords:
            self.refuse(node.keywords[0], f"{name} takes no keyword arguments")
        expected = FUNCTIONS[name].arguments
        if len(node.args) != expected and not any(isinstance(argument, ast.Starred) for argument in node.args):
            self.refuse(node, f"{name} takes {expected} argument{'s'[: expected > 1]}, not {len(node.args)}")
        if name == "where":
            return self.where(node)
        arguments = [self.number(argument) for argument in node.args]
        if name == "pow":
            return self.arithmetic(node, arguments[0], ast.Pow(), arguments[1])
        return self.called(node, name, arguments)

    def where(self, node: ast.Call) -> ast.expr:
        condition = self.read(node.args[0])
        if isinstance(condition, ast.Constant):
            self.refuse(node.args[0], "a literal condition is the same for every element")
        if not _is_condition(condition):
            condition = _call("is_nonzero", [condition])
        return _call("where", [condition, *(self.number(argument) for argument in node.args[1:])])

    def clamp(self, node: ast.Call) -> ast.expr:
        given = dict(zip(("x", "min", "max"), map(self.number, node.args), strict=False))
        for argument in node.keywords:
            if argument.arg not in ("min", "max"):
                self.refuse(argument, "clamp takes no keyword arguments but min and max")
            if argument.arg in given:
                self.refuse(argument, f"clamp is given {argument.arg} twice")
            given[argument.arg] = self.number(argument.value)
        if len(node.args) > 3 or "x" not in given or len(given) == 1:
            self.refuse(node, "clamp takes a number and bounds: clamp(x, min, max), clamp(x, min=a) or clamp(x, max=b)")
        bounds = [bound for bound in ("min", "max") if bound in given]
        names = {node.id for bound in bounds for node in ast.walk(given[bound]) if isinstance(node, ast.Name)}
        form = f"clamp_{bounds[0] if len(bounds) == 1 else 'both'}"
        if names & set(self.tensors):
            form = f"tensor_{form}"
        return self.called(node, form, [given["x"], *(given[bound] for bound in bounds)])

    def called(self, node: ast.expr, name: str, arguments: list[ast.expr]) -> ast.expr:
        literals = [_value(argument) for argument in arguments if isinstance(argument, ast.Constant)]
        if len(literals) < len(arguments):
            return _call(name, arguments)

        def compute() -> float:
            numbers = (torch.tensor(literal, dtype=torch.float64, device="cpu") for literal in literals)
            return _CALLABLE[name].torch(*numbers).item()

        return self.constant(node, compute)


def _call(name: str, arguments: list[ast.expr]) -> ast.Call:
    return ast.Call(ast.Name(name, ast.Load()), arguments, [])


def _value(node: ast.Constant) -> float:
    """The number of a literal in a tree that _Reader made."""
    assert isinstance(node.value, float)
    return node.value


def _is_condition(node: ast.expr) -> bool:
    """True if this node of a tree that _Reader made is a condition."""
    match node:
        case ast.Compare() | ast.UnaryOp(op=ast.Invert()) | ast.BinOp(op=ast.BitAnd() | ast.BitOr()):
            return True
        case ast.Call(func=ast.Name(id="is_nonzero")):
            return True
    return False


def _argument(name: str) -> str:
    """The name in generated code for a name of the user's. No keyword, macro or function there has this prefix."""
    return f"argument_{name}"


def to_torch(expression: Expression, arguments: Sequence[str]) -> Callable[..., Tensor]:
    """The formula as a function composed of torch's operations, which takes these arguments by position.

    The name of a tensor takes a tensor; input must have a floating-point dtype. A parameter takes a number or a 0-dim
    tensor. Arguments that the formula does not use may be anything.
    """
    if missing := set(expression.names) - set(arguments):
        raise ValueError(f"custom_loss: no argument for {', '.join(sorted(missing))}")
    input_at = list(arguments).index("input")
    used = [list(arguments).index(name) for name in expression.names]
    parameters = [ast.arg(_argument(name)) for name in expression.names]
    signature = ast.arguments(posonlyargs=parameters, args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
    source = ast.Expression(ast.Lambda(signature, _torch_tree(expression.tree)))
    code = compile(ast.fix_missing_locations(source), "<custom_loss>", "eval")
    # Under a dispatch mode, torch's functions import modules through their caller's builtins. No expression can use
    # __import__, because it cannot contain that name.
    builtins = {"__import__": __import__}
    formula: Callable[..., Tensor] = eval(
        code, {"__builtins__": builtins, _function("tensor"): _tensor, **_TORCH_FUNCTIONS}
    )

    def composed(*values: Tensor | float) -> Tensor:
        input = values[input_at]
        assert isinstance(input, Tensor)
        return formula(*[_tensor(values[i], input) for i in used])

    return composed


def _tensor(value: Tensor | float, input: Tensor) -> Tensor:
    """A float tensor for this value: torch.maximum does not accept numbers, and `1 - mask` does not accept bool."""
    if not isinstance(value, Tensor):
        return input.new_full((), value)
    return value if value.is_floating_point() else value.to(input.dtype)


def to_torchscript(expression: Expression) -> tuple[str, dict[str, object]]:
    """The formula as source text that TorchScript compiles, composed of torch's operations, and the text's globals.

    In the text, a tensor or parameter x is a tensor named argument_x. All have the floating-point dtype of input.
    """
    return ast.unparse(_torch_tree(expression.tree)), {_function("tensor"): _number_as_tensor, **_TORCH_FUNCTIONS}


def _number_as_tensor(value: float, input: Tensor) -> Tensor:
    return input.new_full([], value)


def _function(name: str) -> str:
    """A function's name in generated code. Without the prefix, TorchScript would take `abs` or `max` for Python's."""
    return f"function_{name}"


_TORCH_FUNCTIONS = {_function(name): function.torch for name, function in _CALLABLE.items()}


def _torch_tree(node: ast.expr) -> ast.expr:
    """The tree with generated names. No operator has literals on both sides, so one side is always a tensor."""
    match node:
        case ast.Name():
            return ast.Name(_argument(node.id), ast.Load())
        case ast.UnaryOp():
            return ast.UnaryOp(node.op, _torch_tree(node.operand))
        case ast.BinOp():
            return ast.BinOp(_torch_tree(node.left), node.op, _torch_tree(node.right))
        case ast.Compare():
            return ast.Compare(_torch_tree(node.left), node.ops, [_torch_tree(node.comparators[0])])
        case ast.Call(func=ast.Name(id=name)):
            like = ast.Name(_argument("input"), ast.Load())
            arguments = [_torch_tree(argument) for argument in node.args]
            tensors = [
                _call(_function("tensor"), [argument, like]) if isinstance(given, ast.Constant) else argument
                for given, argument in zip(node.args, arguments, strict=True)
            ]
            return _call(_function(name), tensors)
    assert isinstance(node, ast.Constant)
    value = _value(node)
    if math.copysign(1, value) < 0:  # as text, -1.0 ** x would mean -(1.0 ** x)
        return ast.UnaryOp(ast.USub(), ast.Constant(-value))
    return ast.Constant(value)


def to_cpp(expression: Expression) -> str:
    """The formula as a C++ expression, in which a tensor or parameter x is named argument_x.

    Its functions and operators are those of csrc/kernels/formulas/dual_functions-inl.h. V is the type on which the
    formula is computed.
    """
    return _cpp(expression.tree)


def _cpp(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=value):
            return f"constant<V>({value!r})"
        case ast.Name(id=name):
            return _argument(name)
        case ast.UnaryOp(op=ast.Invert()):
            return f"not_({_cpp(node.operand)})"
        case ast.UnaryOp():
            return f"(-{_cpp(node.operand)})"
        case ast.BinOp(op=ast.Pow()):
            return _cpp_power(_cpp(node.left), node.right)
        case ast.BinOp():
            sign = _LOGIC.get(type(node.op)) or _ARITHMETIC[type(node.op)][0]
            return f"({_cpp(node.left)} {sign} {_cpp(node.right)})"
        case ast.Compare():
            return f"({_cpp(node.left)} {_COMPARISONS[type(node.ops[0])]} {_cpp(node.comparators[0])})"
        case ast.Call(func=ast.Name(id=name)):
            return f"{_CALLABLE[name].cpp or name}({', '.join(map(_cpp, node.args))})"
    raise AssertionError(f"no such node: {node}")


def _cpp_power(base: str, exponent: ast.expr) -> str:
    if isinstance(exponent, ast.Constant):
        value = _value(exponent)
        if value == 0.5:
            return f"sqrt({base})"
        if value.is_integer() and abs(value) <= 8:
            return f"power<{int(value)}>({base})"
    return f"pow({base}, {_cpp(exponent)})"
