"""The CUDA sources compile without a warning for the architectures that a build may be made for. The machine code
keeps a thread's values in registers and accesses memory 16 bytes at a time. No GPU is needed for these tests.

nvcc compiles a source to PTX, and ptxas compiles PTX to machine code. The first step takes most of the time, and its
result differs only before and from sm_90 on, because the sources compare the architecture with nothing else. So PTX is
made for these two. ptxas compiles that of bfloat16 for every architecture. The smallest source, that of NLL, is
compiled for each architecture from the start.
"""

import importlib.metadata
import re
import shutil
import subprocess
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

import pytest

from fusedloss import _build

CSRC = _build.csrc_directory()
TOOLKIT = _build.find_toolkit()

# The 16-byte accesses of global memory that a kernel must have; of two patterns that fit, the first counts.
LOADS, STORES = "LDG", "STG"
KERNELS = {
    "finish*": [],  # these read a number or two for each row or block, not for each class
    "sum_target_weights": [],
    "*columns*": [],  # where a thread takes one row; for several rows see scalar_accesses
    "*_few_classes": ["LDGSTS", STORES],
    "forward_rows_in_registers": [LOADS, STORES],
    "forward_rows_loss_only": [LOADS],
    "gather": [],  # reads one element a row
    "scatter": [STORES],
    "forward_rows": [LOADS, STORES],
    "backward_rows": [LOADS, STORES],
    "losses": [LOADS, STORES],  # pointwise losses, with every formula
    "gradients": [LOADS, STORES],
}


HOPPER = 90  # the only architecture that the sources compare theirs with, as a test asserts


def compile_kernels(source: Path, folder: Path, *flags: str, architectures: Sequence[int], native: bool = False) -> str:
    """Returns what nvcc and ptxas print. The cubins are left in the folder. The host's code is not compiled: that is
    done by the emulator's build, also with warnings as errors."""
    warnings = ["-Werror=all-warnings", "-Xptxas=-v"]
    ptx: dict[int, list[str]] = {}
    for number in architectures:
        ptx.setdefault(number if native else min(number, HOPPER), []).append(f"sm_{number}")
    targets = [f"-gencode=arch=compute_{number},code=[{','.join(codes)}]" for number, codes in ptx.items()]
    command = [TOOLKIT.nvcc, "-std=c++17", "-O3", f"-I{CSRC}", *warnings, *targets, *flags, "--keep"]
    command += ["--keep-dir", folder, "-fatbin", source, "-o", folder / "kernels.fatbin"]
    run = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stderr


def find_nvdisasm() -> str | None:
    """The path of the toolkit's nvdisasm, else of the one that pip installed, which is not on the PATH."""
    try:
        files = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    folders = [TOOLKIT.home / "bin", *(file.locate().parent for file in files if file.name == "nvdisasm")]
    return next((found for folder in folders if (found := shutil.which("nvdisasm", path=folder))), None)


def disassemble(folder: Path) -> dict[tuple[str, str], str]:
    """The instructions of every kernel, by its cubin and mangled name; of one cubin for each PTX."""
    nvdisasm = find_nvdisasm()
    if nvdisasm is None:
        pytest.skip("no nvdisasm is found, pip install nvidia-cuda-nvdisasm brings one")
    found = {}
    # kernels.compute_80.cubin, kernels.compute_90.sm_100.cubin and kernels.compute_90.sm_90.cubin are of two.
    of_ptx = {re.match(r".*compute_\d+|", path.name)[0]: path for path in sorted(folder.glob("*.cubin"))}
    for cubin in of_ptx.values():
        run = subprocess.run([nvdisasm, "--print-code", cubin], capture_output=True, text=True, check=True)
        _, *sections = re.split(r"^\.text\.(\S+):$", run.stdout, flags=re.MULTILINE)
        found |= {(cubin.name, name): code for name, code in zip(sections[::2], sections[1::2], strict=True)}
    return found


def kernel_name(mangled: str) -> str:
    """_ZN4cuda12forward_rowsIfEEvv is forward_rows: the last of the names that follow their lengths."""
    name, rest = mangled, re.sub("^_ZN?", "", mangled)
    while length := re.match(r"\d+", rest):
        end = length.end() + int(length[0])
        name, rest = rest[length.end() : end], rest[end:]
    return name


def through_memory(log: str) -> list[str]:
    """Kernels with registers that did not fit, or arrays that could not be kept in registers."""
    frames = re.findall(r"Function properties for (\S+)\n\s*(\d+ bytes stack.*)", log)
    assert frames, f"ptxas says nothing of stack frames: {log[-1000:]}"
    return [f"{name}: {frame}" for name, frame in frames if set(re.findall(r"\d+", frame)) != {"0"}]


def scalar_accesses(kernels: dict[tuple[str, str], str]) -> list[str]:
    """Kernels without 16-byte accesses that KERNELS asks for, or that it does not know."""
    found = []
    for (cubin, mangled), code in kernels.items():
        name = kernel_name(mangled)
        wanted = next((wanted for pattern, wanted in KERNELS.items() if fnmatch(name, pattern)), None)
        if "columns" in name and "Li1E" not in mangled:  # kWidth is not 1: a thread has rows side by side
            loads = rf"{LOADS}(STS)?"  # to registers, or to where they are kept
            wanted = [loads] if "split" in name else [loads, STORES]
        if wanted is None:
            found.append(f"{name} is a new kernel: add to KERNELS in {Path(__file__).name} what it must load and store")
        else:
            missing = [access for access in wanted if not re.search(rf"\b{access}\.E[.\w]*\.128\b", code)]
            found += [f"{cubin}: {mangled} has no 16-byte {access}" for access in missing]
    return found


needs_nvcc = pytest.mark.skipif(TOOLKIT is None, reason="no CUDA toolkit with nvcc is found")


@pytest.fixture(scope="module", params=sorted(CSRC.glob("kernels/cuda/*.cu")), ids=lambda path: path.name)
def compiled(request, tmp_path_factory) -> tuple[str, Path, str]:
    """One compile of a source for all tests: its name, the folder with its cubins, and nvcc's log."""
    missing = set(_build.ARCHITECTURES) - set(TOOLKIT.supported())
    if missing:
        pytest.skip(f"nvcc of CUDA {TOOLKIT.version} does not know the architectures {missing}")
    name = request.param.stem
    folder = tmp_path_factory.mktemp(name)
    log = compile_kernels(request.param, folder, architectures=architectures_of(name), native=name == "nll_loss_cuda")
    return name, folder, log


def architectures_of(name: str) -> tuple[int, ...]:
    """bfloat16 and NLL are compiled for all architectures, float32 and the pointwise losses for one of each PTX.

    float16 has bfloat16's kernels, with other conversions, and float64 has float32's, with fewer threads a block. These
    two are compiled for Hopper only.
    """
    if name.endswith(("_float16", "_float64")):
        return (HOPPER,)
    if name in ("cross_entropy_float32", "pointwise_cuda"):
        return (min(_build.ARCHITECTURES), HOPPER)
    return _build.ARCHITECTURES


def test_the_sources_compare_the_architecture_with_hopper_only():
    texts = [path.read_text() for path in CSRC.glob("kernels/**/*") if path.is_file()]
    compared = re.findall(r"CUDA_ARCH(?:__)?\s*(?:[<>=!]=?)\s*(\w+)", "\n".join(texts))
    assert compared and set(compared) == {f"{HOPPER}0"}


@needs_nvcc
def test_compiles_without_warnings(compiled):
    name, folder, _ = compiled
    assert (folder / "kernels.fatbin").stat().st_size > 0
    assert len(list(folder.glob("*.cubin"))) == len(architectures_of(name))


@needs_nvcc
def test_everything_stays_in_registers(compiled):
    _, _, log = compiled
    assert through_memory(log) == []


@needs_nvcc
def test_sweeps_access_16_bytes_at_a_time(compiled):
    name, folder, _ = compiled
    kernels = disassemble(folder)
    assert len({cubin for cubin, _ in kernels}) >= len({min(number, HOPPER) for number in architectures_of(name)})
    assert scalar_accesses(kernels) == []


# ---- the checks above do find what they look for


def compile_bad(code: str, folder: Path, *flags: str) -> str:
    (folder / "bad.cu").write_text(code)
    return compile_kernels(folder / "bad.cu", folder, *flags, architectures=[80])


@needs_nvcc
def test_a_warning_is_found(tmp_path: Path):
    with pytest.raises(AssertionError, match="unused"):
        compile_bad("__global__ void forward(int* p) { int unused; *p = 0; }", tmp_path)


DYNAMIC_INDEX = """
__global__ void forward(const int* p, int* out) {
  int array[64] = {};
  for (int i = 0; i < 64; ++i) array[p[i]] += i;
  *out = array[p[64]];
}"""
MANY_REGISTERS = """
__global__ void forward(const float* p, float* out) {
  float values[64], sum = 0;
#pragma unroll
  for (int i = 0; i < 64; ++i) values[i] = p[i * 32 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i) sum = sum * values[i] + values[63 - i];
  out[threadIdx.x] = sum;
}"""


@needs_nvcc
@pytest.mark.parametrize(
    ("code", "flags", "what"),
    [
        (DYNAMIC_INDEX, [], "256 bytes stack frame, 0 bytes spill stores"),
        (MANY_REGISTERS, ["-maxrregcount=32"], "[1-9][0-9]* bytes spill stores"),
    ],
    ids=["a dynamic index", "a spill"],
)
def test_memory_that_should_be_registers_is_found(code, flags, what, tmp_path: Path):
    (found,) = through_memory(compile_bad(code, tmp_path, *flags))
    assert "forward" in found and re.search(what, found)


@needs_nvcc
def test_what_fits_in_registers_is_not_found(tmp_path: Path):
    assert through_memory(compile_bad(MANY_REGISTERS, tmp_path)) == []


@needs_nvcc
@pytest.mark.parametrize(
    ("copy", "missing"),
    [
        ("out[i] = in[i];", []),
        ("out[i].x = in[i].x;", [LOADS, STORES]),
        ("out[i].x = in[i].x * in[i].y * in[i].z * in[i].w;", [STORES]),
        ("out[i] = make_int4(i, i, i, in[i].x);", [LOADS]),
    ],
)
def test_an_access_of_less_than_16_bytes_is_found(copy, missing, tmp_path: Path):
    signature = "__global__ void backward_rows(const int4* in, int4* out)"
    compile_bad(signature + "{ const int i = threadIdx.x; " + copy + " }", tmp_path)
    found = scalar_accesses(disassemble(tmp_path))
    assert [line.rpartition(" ")[2] for line in found] == missing


@needs_nvcc
def test_a_kernel_that_nobody_has_classified_is_found(tmp_path: Path):
    compile_bad("namespace a { template <class T> __global__ void sideways(T*) {} template __global__ void "
                "sideways(int*); }", tmp_path)  # fmt: skip
    (found,) = scalar_accesses(disassemble(tmp_path))
    assert "sideways is a new kernel: add to KERNELS" in found
