"""What the build decides: sources, flags and toolkit, and its message if something is missing."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from fusedloss import _build
from fusedloss._build import BuildError

ROOT = Path(__file__).resolve().parent.parent


def write_script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


def fake_toolkit(home: Path, version: str = "12.8", architectures: tuple[int, ...] = (80, 90, 120)) -> Path:
    """A CUDA toolkit with only the parts that the build looks at."""
    listed = "\n".join(f"compute_{number}" for number in architectures)
    write_script(
        home / "bin" / "nvcc",
        f"""case "$1" in
        --version) echo "Cuda compilation tools, release {version}, V{version}.1" ;;
        --dryrun) echo '#$ _HERE_={home}/bin' >&2; echo '#$ TOP={home}/bin/..' >&2 ;;
        --list-gpu-arch) echo "{listed}" ;;
        esac
        """,
    )
    (home / "include").mkdir()
    (home / "include" / "cuda_runtime.h").touch()
    return home


def fake_torch(cuda: str | None = "12.8", parallel: str = "ATen parallel backend: OpenMP") -> SimpleNamespace:
    return SimpleNamespace(
        __version__="2.13.0+fake",
        version=SimpleNamespace(cuda=cuda),
        cuda=SimpleNamespace(is_available=lambda: False),
        __config__=SimpleNamespace(parallel_info=lambda: parallel),
    )


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """Hides the machine's CUDA toolkit and GPU, and removes the variables that control the build."""
    for name in ("CC", "CUDA_HOME", "CUDA_PATH", "CXX", "FUSEDLOSS_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_build, "DEFAULT_TOOLKIT", tmp_path / "no-toolkit")
    monkeypatch.setattr(_build, "gpu_capabilities", lambda torch: [])
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("sh", "c++"):
        os.symlink(shutil.which(tool), folder / tool)
    monkeypatch.setenv("PATH", str(folder))
    return folder


@pytest.fixture
def with_torch(monkeypatch):
    def install(**options):
        monkeypatch.setattr(_build, "import_torch", lambda: fake_torch(**options))

    return install


# ---- sources -------------------------------------------------------------------------------------------------------


def test_sources_are_sorted_and_leave_cuda_to_cuda_builds(tmp_path):
    kernels = ("cpu/b.cpp", "cpu/a.cpp", "cpu/a.h", "cuda/k.cu", "cuda/k.cuh")
    others = ("bindings.cpp", "ops/a_op.cpp", "autograd/a_autograd.cpp")
    for name in (*others, *(f"kernels/{kernel}" for kernel in kernels)):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    names = [path.name for path in _build.source_files(tmp_path, cuda=False)]
    assert names == ["a.cpp", "b.cpp", "a_autograd.cpp", "a_op.cpp", "bindings.cpp"]
    with_cuda = _build.source_files(tmp_path, cuda=True)
    assert with_cuda[0].name == "k.cu" and len(with_cuda) == 6
    assert [path.name for path in _build.header_files(tmp_path)] == ["a.h", "k.cuh"]


def test_base_names_are_unique():
    """Both ways to build name an object file after the source's base name only."""
    stems = [path.stem for path in _build.source_files(_build.csrc_directory(), cuda=True)]
    assert len(stems) > 2 and len(set(stems)) == len(stems)


def test_lowest_torch_stands_in_the_metadata():
    assert f'"torch>={_build.MINIMUM_TORCH}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    "version, expected",
    [("2.13.0+cpu", (2, 13, 0)), ("2.6.0", (2, 6, 0)), ("2.14.0a0+gitabc1234", (2, 14, 0)), ("13.0", (13, 0))],
)
def test_release(version, expected):
    assert _build.release(version) == expected


# ---- what is missing, in one sentence ------------------------------------------------------------------------------


def test_other_platforms_are_told(monkeypatch):
    monkeypatch.setattr(_build.sys, "platform", "darwin")
    with pytest.raises(BuildError, match=r"only Linux, .*this is darwin"):
        _build.make_plan()


def test_missing_torch(monkeypatch):
    monkeypatch.setitem(_build.sys.modules, "torch", None)
    with pytest.raises(BuildError, match=r"torch cannot be imported.*--no-build-isolation"):
        _build.make_plan()


def test_old_torch(monkeypatch):
    import torch

    monkeypatch.setattr(torch, "__version__", "2.0.1+cu118")
    with pytest.raises(BuildError, match=r"torch 2\.0\.1\+cu118 is too old, .* or newer is needed"):
        _build.make_plan()


def test_missing_python_headers(monkeypatch, tmp_path):
    monkeypatch.setattr(_build.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(BuildError, match=r"headers of Python 3\.\d+ are missing.*apt install python3\.\d+-dev"):
        _build.make_plan()


def test_missing_compiler(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match=r"no C\+\+ compiler: neither c\+\+, g\+\+ nor clang\+\+.*apt install g\+\+"):
        _build.find_compiler()


def test_compiler_chosen_by_cxx(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    with pytest.raises(BuildError, match=r"no C\+\+ compiler: CXX=/nonexistent/g\+\+ cannot be run"):
        _build.find_compiler()
    script = write_script(tmp_path / "my-g++", "echo 'my-g++ 99.1'\necho more")
    monkeypatch.setenv("CXX", str(script))
    compiler = _build.find_compiler()
    assert (compiler.path, compiler.version, compiler.openmp) == (str(script), "my-g++ 99.1", True)


@pytest.mark.parametrize(
    "chosen, arguments",
    [("{wrapper} c++ -DX='a b'", ["c++", "-DX=a b"]), ("{spaced}", []), ("./bin/{name} c++", ["c++"])],
)
def test_compiler_of_several_words(bare, with_torch, monkeypatch, tmp_path, chosen, arguments):
    """torch accepts a single word, and quotes it."""
    wrapper = write_script(bare / "wrapper", 'printf "%s\\n" "g++ 99" "$PWD" "$@"')
    spaced = write_script(tmp_path / "my compilers" / "g++", 'printf "%s\\n" "g++ 99" "$PWD" "$@"')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CXX", chosen.format(wrapper=wrapper, name=wrapper.name, spaced=spaced))
    with_torch(cuda=None)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with _build.make_plan().environment():
        command = os.environ["CXX"]
        assert command == shlex.quote(command)
        printed = subprocess.run(
            [command, "-c", "x y"], cwd=elsewhere, capture_output=True, text=True, check=True
        ).stdout
    assert printed.splitlines() == ["g++ 99", str(elsewhere), *arguments, "-c", "x y"]
    assert not os.path.exists(command) or command == str(spaced)


def test_compiler_of_several_words_for_nvcc(bare, with_torch, monkeypatch, tmp_path):
    wrapper = write_script(bare / "wrapper", 'printf "%s\\n" "$@"')
    monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(tmp_path / "cuda")))
    with_torch()
    for chosen, expected in [(f"{wrapper} gcc -m64", ["gcc", "-m64", "x"]), (str(wrapper), ["x"])]:
        monkeypatch.setenv("CC", chosen)
        with _build.make_plan().environment():
            printed = subprocess.run([os.environ["CC"], "x"], capture_output=True, text=True, check=True).stdout
        assert printed.splitlines() == expected and os.environ["CC"] == chosen
    monkeypatch.setenv("CC", f"{wrapper} gcc")
    with _build.make_plan(cuda=False).environment():
        assert os.environ["CC"] == f"{wrapper} gcc"  # a build without CUDA does not use it


def test_compiler_of_no_word(bare, monkeypatch):
    monkeypatch.setenv("CXX", "  ")
    assert _build.find_compiler().words == ("c++",)
    for chosen in ('c++ "', "''"):
        monkeypatch.setenv("CXX", chosen)
        with pytest.raises(BuildError, match=f"no C\\+\\+ compiler: CXX={re.escape(chosen)} cannot be run"):
            _build.find_compiler()


def test_torch_in_an_awkward_place(monkeypatch, tmp_path):
    import torch

    _build.check_torch_path()
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "a $ b" / "torch" / "__init__.py"))
    with pytest.raises(BuildError, match=r"torch is in .* cannot compile .* with ' ' in that path; install it in"):
        _build.check_torch_path()


def test_clang_without_openmp_is_said(bare, with_torch):
    write_script(bare / "clang++", "[ $1 = --version ] && echo 'clang version 17.0.1'")  # and fails to compile
    (bare / "c++").unlink()
    with_torch(cuda=None)
    plan = _build.make_plan()
    assert "-fopenmp" not in plan.cxx_flags
    assert "left out CUDA: " in plan.summary() and "threads: this clang has no OpenMP" in plan.summary()


def test_openmp_follows_torch(bare, with_torch):
    with_torch(cuda=None)
    plan = _build.make_plan()
    assert "-fopenmp" in plan.cxx_flags and "-fopenmp" not in plan.link_flags
    with_torch(cuda=None, parallel="ATen parallel backend: native thread pool")
    assert "-fopenmp" not in _build.make_plan().cxx_flags


# ---- the CUDA toolkit ----------------------------------------------------------------------------------------------


def test_toolkit_behind_a_wrapper(bare, tmp_path):
    home = fake_toolkit(tmp_path / "cuda-12.8")
    write_script(bare / "nvcc", f'exec {home}/bin/nvcc "$@"')
    toolkit = _build.find_toolkit()
    assert toolkit == _build.Toolkit(home, "12.8")
    assert toolkit.supported() == [80, 90, 120]


def test_toolkit_by_variable(bare, tmp_path, monkeypatch):
    on_path = fake_toolkit(tmp_path / "one")
    os.symlink(on_path / "bin" / "nvcc", bare / "nvcc")
    other = fake_toolkit(tmp_path / "two", version="13.0")
    monkeypatch.setenv("CUDA_HOME", str(other))
    assert _build.find_toolkit() == _build.Toolkit(other, "13.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "gone"))
    assert _build.find_toolkit() == _build.Toolkit(on_path, "12.8")


def test_toolkit_in_the_usual_place(bare, tmp_path, monkeypatch):
    assert _build.find_toolkit() is None
    monkeypatch.setattr(_build, "DEFAULT_TOOLKIT", fake_toolkit(tmp_path / "usual"))
    assert _build.find_toolkit() == _build.Toolkit(tmp_path / "usual", "12.8")


def test_toolkit_without_headers_is_none(bare, tmp_path, monkeypatch):
    home = fake_toolkit(tmp_path / "cuda")
    (home / "include" / "cuda_runtime.h").unlink()
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert _build.find_toolkit() is None


@pytest.mark.parametrize(
    "supported, capabilities, expected",
    [
        ((75, 80, 90, 100, 120), (), ["80,sm_80", "90,sm_90", "100,sm_100", "120,sm_120", "120,compute_120"]),
        ((75, 80, 90), (), ["80,sm_80", "90,sm_90", "90,compute_90"]),
        ((75, 80, 90), (90,), ["90,sm_90"]),
        ((75, 80, 90), (80, 120), ["80,sm_80", "90,compute_90"]),  # a GPU newer than the nvcc gets PTX
        ((75, 80, 90), (70,), []),  # a GPU that this nvcc no longer supports
        ((), (), []),
    ],
)
def test_architecture_flags(supported, capabilities, expected):
    flags = _build.architecture_flags(supported, capabilities)
    assert [flag.removeprefix("-gencode=arch=compute_").replace("code=", "") for flag in flags] == expected


def test_cuda_is_built_where_it_can_be(bare, with_torch, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(tmp_path / "cuda")))
    with_torch()
    plan = _build.make_plan()
    assert plan.device == "cuda" and plan.left_out == ""
    assert any(path.suffix == ".cu" for path in plan.sources)
    assert "-DFUSEDLOSS_WITH_CUDA" in plan.cxx_flags and "-gencode=arch=compute_90,code=sm_90" in plan.nvcc_flags
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")  # torch turns it into flags
    assert not any("gencode" in flag for flag in _build.make_plan().nvcc_flags)


LEFT_OUT = {
    "CPU torch": (None, "12.8", r"this torch is a build without CUDA"),
    "no toolkit": ("12.8", None, r"no toolkit with nvcc is found by CUDA_HOME, CUDA_PATH, the PATH or in"),
    "other major": ("12.4", "13.0", r"nvcc is of CUDA 13\.0, but this torch is built for CUDA 12\.4"),
}


@pytest.mark.parametrize("torch_cuda, toolkit, reason", LEFT_OUT.values(), ids=LEFT_OUT.keys())
def test_cuda_left_out_is_said(bare, with_torch, tmp_path, monkeypatch, torch_cuda, toolkit, reason):
    with_torch(cuda=torch_cuda)
    if toolkit:
        monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(tmp_path / "cuda", version=toolkit)))
    plan = _build.make_plan()
    assert plan.device == "cpu" and plan.nvcc_flags == []
    assert not any("WITH_CUDA" in flag for flag in plan.cxx_flags)
    assert re.search("left out CUDA: " + reason, plan.summary()) and "\n" not in plan.summary()
    with pytest.raises(BuildError, match=r"CUDA was asked for and cannot be built: " + reason):
        _build.make_plan(cuda=True)
    monkeypatch.setenv("FUSEDLOSS_CUDA", "1")
    with pytest.raises(BuildError, match=r"CUDA was asked for and cannot be built: " + reason):
        _build.make_plan()


def test_cuda_setting(bare, with_torch, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(tmp_path / "cuda")))
    with_torch()
    monkeypatch.setenv("FUSEDLOSS_CUDA", "0")
    assert _build.make_plan().device == "cpu"
    assert _build.make_plan(cuda=True).device == "cuda"  # the argument takes precedence over the variable
    monkeypatch.setenv("FUSEDLOSS_CUDA", "yes")
    with pytest.raises(BuildError, match=r"FUSEDLOSS_CUDA is 'yes', expected 0 or 1"):
        _build.make_plan()


def test_first_use_without_a_gpu_leaves_cuda_out(bare, with_torch, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(tmp_path / "cuda")))
    with_torch()
    assert "no GPU" in _build.make_plan(needs_gpu=True).summary()
    assert _build.make_plan(needs_gpu=True, cuda=True).device == "cuda"
    monkeypatch.setattr(_build, "gpu_capabilities", lambda torch: [90])
    plan = _build.make_plan(needs_gpu=True)
    assert [flag for flag in plan.nvcc_flags if "gencode" in flag] == ["-gencode=arch=compute_90,code=sm_90"]


# ---- the environment of a build ------------------------------------------------------------------------------------


def test_environment_is_put_back(bare, with_torch, tmp_path, monkeypatch):
    from torch.utils import cpp_extension

    home = fake_toolkit(tmp_path / "cuda")
    monkeypatch.setenv("CUDA_HOME", str(home))
    with_torch()
    plan = _build.make_plan()
    before, torch_home = dict(os.environ), cpp_extension.CUDA_HOME
    with pytest.raises(KeyError), plan.environment() as build:
        assert str(home) == build.CUDA_HOME and os.environ["CXX"] == "c++"
        raise KeyError
    assert dict(os.environ) == before and torch_home == cpp_extension.CUDA_HOME
