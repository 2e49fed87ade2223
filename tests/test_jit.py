"""Compiling at first use: once for everybody, kept, and never stuck. Mostly on a source so small that it compiles in a
second; the real sources go through it in test_packaging.py and in the notebooks."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import fusedloss
from fusedloss import _backend, _build, jit

SOURCE = """
#include <Python.h>
#include "value.h"
#define NAME2(name) PyInit_##name
#define NAME(name) NAME2(name)
static PyObject* value(PyObject*, PyObject*) { return PyLong_FromLong(VALUE); }
static PyMethodDef methods[] = {{"value", value, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "tiny", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC NAME(TORCH_EXTENSION_NAME)(void) { return PyModule_Create(&module); }
"""

LOAD = """
import sys
from pathlib import Path
from fusedloss import _build, jit
module = jit.compiled_module(_build.make_plan(Path(sys.argv[1]), cuda=False), cache=Path(sys.argv[2]))
print(module.value(), module.__file__)
"""


@pytest.fixture
def tiny(tmp_path) -> Path:
    csrc = tmp_path / "csrc"
    csrc.mkdir()
    (csrc / "bindings.cpp").write_text(SOURCE)
    (csrc / "value.h").write_text("#define VALUE 1\n")
    return csrc


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(jit, "_loaded", {})  # as in a new process
    return tmp_path / "cache"


@pytest.fixture
def compiler(tmp_path, monkeypatch) -> Path:
    """A compiler that writes down every file it compiles, and hangs at it while there is a file named `hang`."""
    real = shlex.split(_build.find_compiler().command)[0]
    script = tmp_path / "logging-g++"
    script.write_text(
        f"""#!/bin/sh
        case " $* " in *" -c "*)
            echo "$*" >> {tmp_path}/compiled
            if [ -e {tmp_path}/hang ]; then sleep 600; fi
            sleep 1 ;;
        esac
        exec {real} "$@"
        """
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return tmp_path


def compiled(folder: Path) -> int:
    log = folder / "compiled"
    return len(log.read_text().splitlines()) if log.exists() else 0


def start(csrc: Path, cache: Path) -> subprocess.Popen:
    """Load in a process of its own; `start_new_session` lets a test kill it together with its compilers."""
    environment = dict(os.environ, PYTHONPATH=str(Path(fusedloss.__file__).parent.parent))
    return subprocess.Popen(
        [sys.executable, "-c", LOAD, str(csrc), str(cache)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> tuple[str, str]:
    """What it printed, and what fusedloss said meanwhile."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out, "".join(line + "\n" for line in err.splitlines() if line.startswith("fusedloss"))


def load(csrc: Path, cache: Path) -> ModuleType:
    return jit.compiled_module(_build.make_plan(csrc, cuda=False), cache=cache)


# ---- once, and kept ------------------------------------------------------------------------------------------------


def test_first_use_compiles_and_says_so_in_one_line(tiny, cache, compiler):
    out, said = finish(start(tiny, cache))
    assert out.startswith("1 ") and compiled(compiler) == 1
    assert said.count("\n") == 1 and said.startswith("fusedloss: compiling for torch ") and said.endswith(" s\n")
    again, said = finish(start(tiny, cache))
    assert again == out and said == "" and compiled(compiler) == 1


def test_two_processes_compile_once(tiny, cache, compiler):
    processes = [start(tiny, cache), start(tiny, cache)]
    outputs = [finish(process) for process in processes]
    assert outputs[0][0] == outputs[1][0] and compiled(compiler) == 1
    assert sorted("waiting" in said for _, said in outputs) in ([False, True], [False, False])


def test_two_threads_find_the_module_once(monkeypatch):
    calls = []

    def find():
        calls.append(1)
        time.sleep(0.2)
        return ModuleType("found")

    monkeypatch.setattr(_backend, "_module", None)
    monkeypatch.setattr(_backend, "_find", find)
    found = []
    threads = [threading.Thread(target=lambda: found.append(_backend.extension())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and len({id(module) for module in found}) == 1


def test_same_module_within_a_process(tiny, cache):
    assert load(tiny, cache) is load(tiny, cache)


def test_environment_is_left_alone(tiny, cache):
    before = dict(os.environ)
    load(tiny, cache)
    assert dict(os.environ) == before


# ---- the key -------------------------------------------------------------------------------------------------------


def test_key_knows_everything_that_changes_a_build(tiny, tmp_path, monkeypatch):
    plan = _build.make_plan(tiny, cuda=False)
    keys = {jit.cache_key(plan)}

    def another(what, changed_plan=plan):
        key = jit.cache_key(changed_plan)
        assert key not in keys, what
        keys.add(key)

    another("flags", replace(plan, cxx_flags=[*plan.cxx_flags, "-DX"]))
    another("compiler", replace(plan, compiler=replace(plan.compiler, version="g++ 99")))
    another("toolkit", replace(plan, toolkit=_build.Toolkit(tmp_path, "13.0")))
    (tiny / "value.h").write_text("#define VALUE 2\n")
    another("a header")
    (tiny / "bindings.cpp").write_text(SOURCE + "// more\n")
    another("a source")
    (tiny / "another.h").touch()
    another("a new header")
    (tiny / "value.h").rename(tiny / "renamed.h")
    another("a name")
    monkeypatch.setattr(torch.version, "git_version", "0" * 40)
    another("the torch build")


def test_key_does_not_depend_on_the_place(tiny, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for path in tiny.iterdir():
        (elsewhere / path.name).write_bytes(path.read_bytes())
    assert jit.cache_key(_build.make_plan(tiny)) == jit.cache_key(_build.make_plan(elsewhere))


def test_changed_header_is_compiled_anew(tiny, cache):
    assert load(tiny, cache).value() == 1
    (tiny / "value.h").write_text("#define VALUE 2\n")
    assert load(tiny, cache).value() == 2


def test_cache_directory(monkeypatch, tmp_path):
    for name in ("FUSEDLOSS_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert jit.cache_directory() == tmp_path / ".cache" / "fusedloss"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert jit.cache_directory() == Path("/xdg/fusedloss")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/extensions")
    assert jit.cache_directory() == Path("/extensions/fusedloss")
    monkeypatch.setenv("FUSEDLOSS_CACHE_DIR", "/own")
    assert jit.cache_directory() == Path("/own")


# ---- accidents -----------------------------------------------------------------------------------------------------


def test_killed_build_blocks_nobody(tiny, cache, compiler):
    (compiler / "hang").touch()
    process = start(tiny, cache)
    while not compiled(compiler):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    (compiler / "hang").unlink()
    (left,) = cache.glob("*/attempt-*")
    assert (left / "lock").exists()  # torch's own lock, at which its next build would wait for ever

    out, _ = finish(start(tiny, cache))
    assert out.startswith("1 ") and compiled(compiler) == 2
    assert not left.exists()


def test_damaged_build_is_made_anew(tiny, cache, monkeypatch):
    library = Path(load(tiny, cache).__file__)
    # Replaced and not written over, since this process has it mapped.
    short = library.with_name("short")
    short.write_bytes(library.read_bytes()[:1000])
    short.replace(library)
    monkeypatch.setattr(jit, "_loaded", {})
    assert load(tiny, cache).value() == 1


@pytest.mark.parametrize("stream", ["out", "err"])
def test_a_notebook_shows_the_line_plainly(stream, capsys, monkeypatch):
    if stream == "out":
        monkeypatch.setattr(type(sys.stderr), "__module__", "ipykernel.iostream")
    jit._say("compiling")
    assert getattr(capsys.readouterr(), stream) == "compiling\n"


def test_compile_error_shows_the_first_lines(tiny, cache, capsys):
    (tiny / "value.h").write_text("#define VALUE no_such_name\n")
    with pytest.raises(RuntimeError, match="no_such_name") as caught:
        load(tiny, cache)
    message = str(caught.value)
    assert message.startswith("fusedloss: compiling failed\n") and len(message.splitlines()) < 10
    log = Path(message.split("The full log is in ")[1])
    assert "no_such_name" in log.read_text() and len(log.read_text()) > len(message)
    assert capsys.readouterr().err.endswith("failed\n")
    assert not list(cache.glob("*/attempt-*"))
    (tiny / "value.h").write_text("#define VALUE 3\n")
    assert load(tiny, cache).value() == 3


def test_failed_build_can_be_repeated_in_the_same_process(tiny, cache, compiler):
    script = compiler / "logging-g++"
    text = script.read_text()
    script.write_text(text.replace("sleep 1", 'echo "error: disk on fire"; exit 1'))
    with pytest.raises(RuntimeError, match="disk on fire"):
        load(tiny, cache)
    script.write_text(text)
    assert load(tiny, cache).value() == 1


def test_cache_that_cannot_be_written(tiny, tmp_path, cache, capsys):
    cache.write_text("a file where the folder should be")
    assert load(tiny, cache).value() == 1
    said = capsys.readouterr().err
    assert f"the cache {cache}" in said and "cannot be written" in said and "FUSEDLOSS_CACHE_DIR" in said


def test_missing_ninja(tiny, cache, monkeypatch):
    monkeypatch.setattr(jit, "find_ninja", lambda: None)
    with pytest.raises(_build.BuildError, match=r"ninja is missing.*pip install ninja"):
        load(tiny, cache)


def test_cuda_asked_for_and_not_there(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(
        RuntimeError, match="fusedloss: CUDA was asked for and cannot be built: this torch is a build without CUDA"
    ):
        jit.load(cuda=True)


# ---- the prebuilt module -------------------------------------------------------------------------------------------


@pytest.fixture
def prebuilt(tmp_path, monkeypatch):
    """Pretend that a module is prebuilt; what it was built for is the test's to say."""
    monkeypatch.delenv("FUSEDLOSS_JIT", raising=False)
    monkeypatch.setattr(_backend, "_module", None)
    library = tmp_path / "_C.cpython-311.so"
    monkeypatch.setattr(_backend, "_library", lambda: library)

    def built_for(version):
        _build.info_file(library).write_text(json.dumps({"torch": version}))

    return built_for


@pytest.mark.parametrize("built_for", ["1.9.0", torch.__version__])
def test_prebuilt_for_another_torch(prebuilt, monkeypatch, built_for):
    def fail(name):
        raise ImportError("undefined symbol: _ZN2at4gone")

    monkeypatch.setattr(_backend.importlib, "import_module", fail)
    prebuilt(str(built_for))
    with pytest.raises(ImportError) as caught:
        _backend.extension()
    message = str(caught.value)
    assert f"was built for torch {built_for}, and this is torch {torch.__version__}. Rebuild" in message
    assert ("undefined symbol" in message) == (built_for == torch.__version__)


def test_prebuilt_is_preferred_unless_told_otherwise(prebuilt, monkeypatch):
    monkeypatch.setattr(_backend.importlib, "import_module", lambda name: SimpleNamespace(name=name))
    monkeypatch.setattr(jit, "compiled_module", lambda plan: "compiled")
    prebuilt(torch.__version__)
    assert _backend.extension().name == "fusedloss._C"
    monkeypatch.setattr(_backend, "_module", None)
    monkeypatch.setenv("FUSEDLOSS_JIT", "1")
    assert _backend.extension() == "compiled"


def test_nothing_prebuilt_and_nothing_to_compile_with(monkeypatch):
    monkeypatch.setattr(_backend, "_module", None)
    monkeypatch.setenv("FUSEDLOSS_JIT", "1")
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    with pytest.raises(
        ImportError, match=r"nothing is prebuilt, and it cannot be compiled now: there is no C\+\+ comp"
    ):
        _backend.extension()
