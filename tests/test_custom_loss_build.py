"""What custom_loss refuses before it compiles anything, and compiling in several threads and processes."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from helpers.custom import CASES, by_torch, drawn, gradients, made

import fusedloss
from fusedloss import custom, jit
from fusedloss.expression import FUNCTIONS

pytestmark = pytest.mark.usefixtures("custom_loss_folder")

ROOT = Path(fusedloss.__file__).parent.parent


# ---- bad input, and compiling

BAD = [
    ("abs(input - targte)", "unknown name 'targte'"),
    ("mean(input)", "unknown function 'mean'"),
    ("input; import os", "invalid syntax"),
    ("__import__('os').system('true')", "attributes are not available"),
    ("input.__class__", "attributes are not available"),
    ('input); system("true"', "unmatched"),
    ("input /* */ * 1", "invalid syntax"),
    ("input // 1", "//"),
    ("input\n#include <x>\n + 1", ""),
    ("[input for _ in input]", "can stand here"),
    ("(lambda: input)()", "can stand here"),
    ("input if input else 1", "where(condition, a, b)"),
    ("input > 0", "a number is expected"),
    ("target", "does not use 'input'"),
    ("", "is empty"),
    ("-" * 9000 + "input", ""),
    ("(" * 3000 + "input" + ")" * 3000, ""),
    ("input" + " + input" * 2000, "longer than 10,000"),
    ("abs(" * 150 + "input" + ")" * 150, "more than 100 levels"),
]


@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(("expression", "says"), BAD, ids=lambda text: ascii(text[:30]))
def test_bad_expressions(expression, says, monkeypatch):
    """They are refused before anything is compiled, both as a loss and as a derivative by hand."""
    monkeypatch.setattr(jit, "compiled", lambda *_: pytest.fail("it was compiled"))
    monkeypatch.setattr(custom, "make_plan", lambda *_, **__: pytest.fail("a compiler was looked for"))
    calls = [lambda: fusedloss.custom_loss(expression, alpha=1.0)]
    if expression != "target":
        calls.append(lambda: fusedloss.custom_loss("abs(input)", derivative={"input": expression}))
    for call in calls:
        with pytest.raises(ValueError) as raised:
            call()
        message, shown, caret, functions = str(raised.value).split("\n")
        assert message.startswith("custom_loss: ") and says in message
        assert shown.strip() in expression and caret.strip() == "^"
        assert functions == "functions: " + ", ".join(FUNCTIONS)


def test_bad_options(monkeypatch):
    monkeypatch.setattr(jit, "compiled", lambda *_: pytest.fail("it was compiled"))
    for expected, options in [
        (r"derivative by 'x', which is no tensor", {"derivative": {"x": "1"}}),
        (r"derivative by 'p', which is no tensor", {"derivative": {"p": "1"}, "p": 1.0}),
        (r"derivative is empty", {"derivative": {}}),
        (r"is not a valid value for reduction", {"reduction": "batchmean"}),
        (r"'2x' must be an identifier", {"tensors": ("2x",)}),
        (r"'input' is there twice|is the name of a tensor", {"input": 1.0}),
    ]:
        with pytest.raises(ValueError, match=expected):
            fusedloss.custom_loss("abs(input)", **options)
    many = [f"t{i}" for i in range(8)]
    with pytest.raises(ValueError, match="got 9 tensors and 0 parameters, expected at most 8 and 16"):
        fusedloss.custom_loss(" + ".join(["input", *many]), tensors=many)
    with pytest.raises(ValueError, match="several lines need parentheses around them"):
        fusedloss.custom_loss("input\n  - target")
    with pytest.raises(TypeError, match="derivative must map names to expressions, got str"):
        fusedloss.custom_loss("input", derivative="1")
    for text in (None, b"input", 3):
        with pytest.raises(TypeError, match="the expression must be a str"):
            fusedloss.custom_loss(text)


@pytest.mark.parametrize("compiler", ["nonexistent-c++", "false", "sh -c 'echo g++ 9; test $# -eq 0' sh"])
def test_no_compiler(compiler, monkeypatch, tmp_path):
    """A loss that is not in the cache cannot be compiled, and the error gives the reason."""
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("FUSEDLOSS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(custom, "_libraries", {})
    with pytest.raises(RuntimeError, match=r"there is no C\+\+ compiler|compiling failed"):
        fusedloss.custom_loss("abs(input) + 0.123")
    assert not list(tmp_path.glob("*/done.json"))


def compile_all(expressions: list[str], folder: Path, **environment: str) -> subprocess.Popen:
    code = (
        "import sys, threading, torch, fusedloss\n"
        "def make(text): sys.stdout.write(f'{fusedloss.custom_loss(text)(torch.ones(3), torch.zeros(3)).item()}\\n')\n"
        "threads = [threading.Thread(target=make, args=(text,)) for text in sys.argv[1:]]\n"
        "[thread.start() for thread in threads]; [thread.join() for thread in threads]\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FUSEDLOSS_CACHE_DIR": str(folder), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", code, *expressions],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_threads_and_processes(tmp_path):
    """Two processes with two threads each ask for the same loss, which is compiled once."""
    same = "abs(input - target) * 2"
    running = [compile_all([same, same], tmp_path) for _ in range(2)]
    output = [process.communicate(timeout=120) for process in running]
    assert all(printed.split() == ["2.0"] * 2 for printed, _ in output), output
    assert sum(told.count("fusedloss: compiling") for _, told in output) == 1
    assert len(list(tmp_path.glob("*/done.json"))) == 1


def test_threads():
    """Threads make and use different losses and the same losses at the same time."""
    failures, operands = [], {name: drawn(name, (300,)) for name in list(CASES)[:6]}

    def work(name):
        try:
            for _ in range(20):
                ours = made(name)(**operands[name])
                torch.testing.assert_close(ours, by_torch(name, operands[name], "mean"))
                gradients(ours, operands[name])
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in [*operands, *operands]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_unwritable_cache(tmp_path):
    """The loss is compiled for this process only."""
    (tmp_path / "file").touch()
    printed, told = compile_all(["input * 3"], tmp_path / "file" / "cache").communicate(timeout=120)
    assert printed.split() == ["3.0"] and "cannot be written" in told
