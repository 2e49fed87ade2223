"""Compiling at first use: each source is compiled once and kept, and no failure blocks a later build.

Most tests compile a tiny source, which takes a second. test_packaging.py and the notebooks compile the real sources.
"""

import contextlib
import errno
import importlib.util
import os
import pwd
import signal
import subprocess
import sys
import tempfile
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
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a run in a shell's background ignores the signal
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
    """A compiler that logs every file that it compiles, and hangs while a file named `hang` exists."""
    real = _build.find_compiler().words[0]
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
    """Load in a new process. `start_new_session` lets a test kill it together with its compilers."""
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
    """The output of the process, and the messages of fusedloss on stderr."""
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
    another("arguments", replace(plan, compiler=replace(plan.compiler, words=(*plan.compiler.words, "-m32"))))
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


@pytest.fixture
def no_cache_named(monkeypatch):
    for name in ("FUSEDLOSS_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


def test_cache_directory(no_cache_named, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert jit.cache_directory() == tmp_path / ".cache" / "fusedloss"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert jit.cache_directory() == Path("/xdg/fusedloss")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/extensions")
    assert jit.cache_directory() == Path("/extensions/fusedloss")
    monkeypatch.setenv("FUSEDLOSS_CACHE_DIR", "/own")
    assert jit.cache_directory() == Path("/own")


def test_cache_directory_without_a_home(no_cache_named, monkeypatch, capsys):
    """In a container the user id may have no name, and HOME may be missing or belong to root."""
    own = Path(tempfile.gettempdir()) / f"fusedloss-{os.geteuid()}"
    monkeypatch.setenv("HOME", "/proc/nonexistent")
    assert jit.cache_directory() == own
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # raises KeyError, as for an id without an entry
    assert jit.cache_directory() == own
    assert capsys.readouterr().err == ""
    jit._say_once.cache_clear()
    for name in ("XDG_CACHE_HOME", "FUSEDLOSS_CACHE_DIR", "FUSEDLOSS_CACHE_DIR"):
        monkeypatch.setenv(name, "~/x")
        assert jit.cache_directory() == own
    said = capsys.readouterr().err.splitlines()
    assert (
        len(said) == 2
        and f"FUSEDLOSS_CACHE_DIR is ~/x, but no home directory is known, so the cache is {own}" in said[1]
    )


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
    assert (left / "lock").exists()  # torch's own lock, for which its next build would wait forever

    out, _ = finish(start(tiny, cache))
    assert out.startswith("1 ") and compiled(compiler) == 2
    assert not left.exists()


def test_damaged_build_is_made_anew(tiny, cache, monkeypatch):
    library = Path(load(tiny, cache).__file__)
    # The file is replaced and not overwritten, since this process has it mapped.
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


def for_this_process_only(csrc: Path, cache: Path, capsys) -> str:
    """The message about the cache, after checking that a right module was loaded from elsewhere."""
    module = load(csrc, cache)
    assert module.value() == 1 and not Path(module.__file__).is_relative_to(cache)
    assert Path(module.__file__).parent.parent.stat().st_mode & 0o777 == 0o700
    first, second = capsys.readouterr().err.splitlines()[-2:]
    assert first.startswith(f"fusedloss: the cache {cache}{os.sep}cpu-") and second.startswith("fusedloss: compiling ")
    assert first.endswith(", so this build is for this process only; FUSEDLOSS_CACHE_DIR names another cache")
    return first


def test_cache_mounted_with_noexec(tiny, cache, capsys, monkeypatch):
    real = os.statvfs

    def statvfs(path):
        return SimpleNamespace(f_flag=os.ST_NOEXEC) if Path(path) == cache else real(path)

    cache.mkdir()
    monkeypatch.setattr(os, "statvfs", statvfs)
    assert "is mounted with noexec" in for_this_process_only(tiny, cache, capsys)


def test_cache_whose_libraries_may_not_be_executed(tiny, cache, capsys, monkeypatch):
    """Some security policies forbid it, and only the loader finds out."""
    from torch.utils import cpp_extension

    real = cpp_extension._import_module_from_library

    def loader(name, folder, is_python_module):
        if Path(folder).is_relative_to(cache):
            raise ImportError(f"{folder}/{name}.so: failed to map segment from shared object")
        return real(name, folder, is_python_module)

    monkeypatch.setattr(cpp_extension, "_import_module_from_library", loader)
    assert "failed to map segment" in for_this_process_only(tiny, cache, capsys)
    assert not list(cache.glob("*/attempt-*"))


def test_loader_is_quoted(tiny, cache, compiler):
    script = compiler / "logging-g++"
    script.write_text(script.read_text().replace("sleep 1 ;;", 'sleep 1 ;; *" -shared "*) echo > "${@: -1}"; exit 0;;'))
    script.write_text(script.read_text().replace("#!/bin/sh", "#!/bin/bash"))
    with pytest.raises(RuntimeError, match=r"the library is compiled, but cannot be loaded: .*file too short"):
        load(tiny, cache)


def test_full_cache(tiny, cache, compiler, capsys):
    script = compiler / "logging-g++"
    full = f'case "$PWD" in {cache}/*) echo "fatal error: cannot write: No space left on device"; exit 1;; esac'
    script.write_text(script.read_text().replace("sleep 1", full))
    assert "is full (No space left on device)" in for_this_process_only(tiny, cache, capsys)
    assert not list(cache.glob("*/attempt-*"))


def test_build_that_cannot_be_kept(tiny, cache, capsys, monkeypatch):
    def full(plan, library):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(_build.Plan, "write_info", full)
    assert load(tiny, cache).value() == 1
    assert "the build cannot be kept in" in capsys.readouterr().err and not list(cache.glob("*/done.json"))


def test_no_folder_to_compile_in(tiny, cache, monkeypatch):
    def full(**options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(jit.tempfile, "mkdtemp", full)
    with pytest.raises(
        _build.BuildError, match=r"no folder is found to compile in: .*No space left .*; set FUSEDLOSS_C"
    ):
        load(tiny, cache)


def test_paths_that_ninja_cannot_parse(tiny, cache, tmp_path, capsys):
    for part in ("a:b", "a$b", "a|b", "a\nb"):
        with pytest.raises(jit._UnusableFolderError, match="in its path, which ninja cannot parse"):
            jit._check(tmp_path / part)
    sources = tiny.rename(tmp_path / "a:b $c 'd|")
    assert "has '$' in its path" in for_this_process_only(sources, tmp_path / "e$f", capsys)


@pytest.mark.parametrize("stream", ["none", "closed", "pipe without a reader"])
def test_nobody_reads_what_is_said(tiny, cache, monkeypatch, stream):
    unread, writable = os.pipe()
    os.close(unread)
    file = os.fdopen(writable, "w")
    if stream == "closed":
        file.close()
    try:
        monkeypatch.setattr(sys, "stderr", None if stream == "none" else file)
        monkeypatch.setattr(sys, "stdout", None if stream == "none" else sys.stdout)
        assert load(tiny, cache).value() == 1
    finally:
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            file.close()


def test_interrupt_ends_the_compilers(tiny, cache, compiler):
    """The interrupt of a notebook reaches Python only. Ctrl-C in a terminal also reaches its children."""
    (compiler / "hang").touch()
    process = start(tiny, cache)
    while not compiled(compiler):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    assert working_in(cache)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)  # waits for all processes that have its streams open
    assert process.returncode != 0 and "KeyboardInterrupt" in err
    assert not working_in(cache) and not list(cache.glob("*/attempt-*"))


def working_in(folder: Path) -> list[str]:
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            found += [str(link)] if os.readlink(link).startswith(str(folder)) else []
    return found


def test_without_fcntl(monkeypatch):
    """Windows has no fcntl. Importing fusedloss works there, and its first use reports what is supported."""
    monkeypatch.setattr(sys, "platform", "win32")
    for name in ("fcntl", "grp", "pwd"):
        monkeypatch.setitem(sys.modules, name, None)
    for path in Path(jit.__file__).parent.glob("*.py"):
        spec = importlib.util.spec_from_file_location(f"fusedloss.again_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        if path.stem not in ("__init__", "ops"):  # ops cannot be registered twice
            spec.loader.exec_module(module)
    monkeypatch.setenv("FUSEDLOSS_JIT", "1")
    monkeypatch.setattr(_backend, "_module", None)
    with pytest.raises(ImportError, match=r"only Linux, .*is supported, and this is win32"):
        _backend.extension()


# ---- which files are trusted -----------------------------------------------------------------------------------------


def test_library_that_others_can_replace_is_not_loaded(tiny, cache, capsys, monkeypatch):
    before = os.umask(0)
    try:
        kept = load(tiny, cache).__file__
    finally:
        os.umask(before)
    monkeypatch.setattr(jit, "_loaded", {})
    assert load(tiny, cache).__file__ == kept  # the user's own files are trusted, whatever the umask was
    capsys.readouterr()
    monkeypatch.setattr(jit, "_loaded", {})
    Path(kept).chmod(0o777)
    said = for_this_process_only(tiny, cache, capsys)
    assert f"is not trusted, because other users can write to {kept} (mode 777; delete it to have it made anew)" in said


def test_missing_ninja(tiny, cache, monkeypatch):
    monkeypatch.setattr(jit, "find_ninja", lambda: None)
    with pytest.raises(_build.BuildError, match=r"ninja is missing.*pip install ninja"):
        load(tiny, cache)


def test_sources_digest_knows_names_and_contents(tiny):
    digests = [_build.sources_digest(tiny)]
    (tiny / "value.h").write_text("#define VALUE 2\n")
    digests.append(_build.sources_digest(tiny))
    (tiny / "value.h").rename(tiny / "values.h")
    digests.append(_build.sources_digest(tiny))
    (tiny / "README.md").touch()
    assert len(set(digests)) == 3 and _build.sources_digest(tiny) == digests[-1]
