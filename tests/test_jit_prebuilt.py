"""When the prebuilt extension is loaded, and when another one is compiled."""

import json
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from types import SimpleNamespace

import pytest
import torch

from fusedloss import _backend, _build, jit


def test_cuda_asked_for_and_not_there(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(
        RuntimeError, match="fusedloss: CUDA was asked for and cannot be built: this torch is a build without CUDA"
    ):
        jit.load(cuda=True)


# ---- the prebuilt module -------------------------------------------------------------------------------------------


@pytest.fixture
def prebuilt(tmp_path, monkeypatch):
    """Pretends that a module is prebuilt. The test calls the result with the torch version that it was built for."""
    monkeypatch.delenv("FUSEDLOSS_JIT", raising=False)
    monkeypatch.delenv("FUSEDLOSS_CUDA", raising=False)
    monkeypatch.setattr(_backend, "_module", None)
    monkeypatch.setattr(_backend, "PACKAGE", tmp_path / "own" / "fusedloss")
    monkeypatch.setattr(_backend, "_import", lambda library: SimpleNamespace(name="prebuilt", with_cuda=False))
    monkeypatch.setattr(_backend, "_debug", False)
    monkeypatch.setattr(jit, "make_plan", lambda cuda=None, **_: cuda)

    def compile_it(plan, why, **_):
        return SimpleNamespace(name="compiled", with_cuda=bool(plan), why=why)

    monkeypatch.setattr(jit, "compiled_module", compile_it)

    def built_for(version, place="own", sources=""):
        library = tmp_path / place / "fusedloss" / f"_C{EXTENSION_SUFFIXES[0]}"
        library.parent.mkdir(parents=True, exist_ok=True)
        library.touch()
        _build.info_file(library).write_text(json.dumps({"torch": str(version), "sources": sources}))
        return library

    return built_for


@pytest.mark.parametrize("built_for", ["1.9.0", torch.__version__])
def test_prebuilt_for_another_torch(prebuilt, monkeypatch, built_for):
    def fail(library):
        raise ImportError("undefined symbol: _ZN2at4gone")

    monkeypatch.setattr(_backend, "_import", fail)
    prebuilt(built_for)
    with pytest.raises(ImportError) as caught:
        _backend.extension()
    message = str(caught.value)
    assert f"was built for torch {built_for}, and this is torch {torch.__version__}. Rebuild" in message
    assert ("undefined symbol" in message) == (built_for == torch.__version__)
    assert jit.load().name == "compiled"


def test_prebuilt_is_preferred_unless_told_otherwise(prebuilt, monkeypatch):
    prebuilt(torch.__version__)
    assert _backend.extension().name == "prebuilt"
    monkeypatch.setattr(_backend, "_module", None)
    monkeypatch.setenv("FUSEDLOSS_JIT", "1")
    assert _backend.extension().name == "compiled" and _backend.extension().why == ""


def test_load_takes_what_is_prebuilt_unless_another_is_asked_for(prebuilt, monkeypatch):
    def load_anew(cuda=None, **environment):
        with monkeypatch.context() as patch:
            patch.setattr(_backend, "_module", None)
            for name, value in environment.items():
                patch.setenv(name, value)
            module = jit.load(cuda=cuda)
            assert _backend.extension() is module
        return module.name

    prebuilt(torch.__version__)
    assert load_anew() == load_anew(cuda=False) == load_anew(FUSEDLOSS_CUDA="0") == "prebuilt"
    assert load_anew(cuda=True) == load_anew(FUSEDLOSS_CUDA="1") == load_anew(FUSEDLOSS_JIT="1") == "compiled"
    monkeypatch.setattr(_backend, "_import", lambda library: SimpleNamespace(name="with CUDA", with_cuda=True))
    assert load_anew() == load_anew(cuda=True) == load_anew(FUSEDLOSS_CUDA="1") == "with CUDA"
    assert load_anew(cuda=False) == load_anew(cuda=False, FUSEDLOSS_CUDA="1") == "compiled"


def test_load_keeps_the_module_in_use_if_it_suits(prebuilt):
    prebuilt(torch.__version__)
    with_cuda = jit.load(cuda=True)
    assert with_cuda.name == "compiled" and jit.load() is with_cuda and jit.load(cuda=True) is with_cuda
    assert jit.load(cuda=False).name == "prebuilt" and _backend.extension().name == "prebuilt"


def test_a_checkout_takes_the_installed_build_of_its_sources(prebuilt, tmp_path, monkeypatch):
    """If it compiles instead, it reports the reason."""
    monkeypatch.setattr(sys, "path", [str(tmp_path / "own"), str(tmp_path / "site"), str(tmp_path / "nothing")])
    same = _build.sources_digest(_build.csrc_directory())

    def found():
        monkeypatch.setattr(_backend, "_module", None)
        return _backend.extension()

    own = rf"the checkout {tmp_path}/own has no compiled part, which `python setup.py build_ext --inplace` makes"
    assert found().why == own
    there = prebuilt(torch.__version__, "site", same).parent
    assert found().name == "prebuilt"
    prebuilt("1.9.0", "site", same)
    assert found().why == f"{own}; that in {there} is for torch 1.9.0"
    prebuilt(torch.__version__, "site", "0123")
    assert found().why == f"{own}; that in {there} is of other sources"
    prebuilt(torch.__version__)
    assert found().name == "prebuilt"


def test_nothing_prebuilt_and_nothing_to_compile_with(monkeypatch):
    monkeypatch.setattr(_backend, "_module", None)
    monkeypatch.setenv("FUSEDLOSS_JIT", "1")
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    with pytest.raises(
        ImportError, match=r"nothing is prebuilt, and it cannot be compiled now: there is no C\+\+ comp"
    ):
        _backend.extension()
