"""Fixed sets of cases. Each answers one question."""

import itertools
from dataclasses import replace

from .cases import DTYPES, PASSES, Case, Pass
from .losses import CUSTOM, LOSSES

LARGE = [(1024, 32000), (512, 128256), (2048, 50257)]
SCALING_CONTENDERS = ["eager", "fusedloss"]
CPU_CONTENDERS = ["eager", "eager, THP", "compile", "fusedloss", "copy"]
POINTWISE = [loss for loss in LOSSES if loss != "cross_entropy"]
IN_16_BITS_TOO = ("mse", "huber", "bce")
CUDA_BYTES = 1 << 28  # at least, of logits: several times the size of a GPU's L2 cache
CUDA_CLASSES = (256, 1024, 4096, 16384, 32768, 50257, 131072, 262144)
# Rows and classes of the cases in which the compiler and the peers are timed too.
AGAINST_ALL = ((8192, 32000), (8192, 128256), (65536, 1000), (32768, 4096))


def cpu() -> list[Case]:
    """How fast is a training step's loss on the CPU, over sizes, dtypes and options?"""

    def cross_entropy(rows: int, classes: int, dtype: str = "float32", *inner: int, **options: object) -> Case:
        return Case("cross_entropy", rows, classes, dtype, "forward+backward", inner=inner, **options)

    def mse(elements: int, dtype: str) -> Case:
        return Case("mse", elements // 1000, 1000, dtype, "forward+backward")

    return [
        *(cross_entropy(*size, dtype) for size in LARGE for dtype in ("float32", "bfloat16", "float16")),
        *(cross_entropy(*size, dtype) for size in [(4096, 1000), (65536, 100)] for dtype in ("float32", "bfloat16")),
        cross_entropy(128, 10),
        cross_entropy(1024, 32000, target="probabilities"),
        cross_entropy(1024, 32000, label_smoothing=0.1),
        cross_entropy(1024, 32000, weighted=True),
        cross_entropy(1024, 32000, in_place=True),
        cross_entropy(8, 32000, "float32", 128),
        cross_entropy(16, 21, "float32", 512, 512),
        cross_entropy(4, 2, "float32", 512, 512),
        *(mse(elements, dtype) for elements in (10**5, 10**7, 10**8) for dtype in ("float32", "bfloat16")),
    ]


def pointwise() -> list[Case]:
    """How fast are the pointwise losses, and custom ones, on ten million elements?"""

    def case(loss: str, rows: int = 10_000, classes: int = 1000, dtype: str = "float32", **options: object) -> Case:
        return Case(loss, rows, classes, dtype, "forward+backward", **options)

    cases = []
    for loss in POINTWISE:
        cases.append(case(loss))
        if loss in IN_16_BITS_TOO:
            cases.append(case(loss, dtype="bfloat16"))
        if loss == "bce":
            cases.append(case(loss, 100_000, 100, weighted=True))
    return cases


def scaling() -> list[Case]:
    """Does the time depend only on the number of elements, whether there are more rows or more classes?"""
    sizes = [
        *((rows, 1000) for rows in (1, 10, 100, 1000, 10_000, 100_000)),
        *((100, classes) for classes in (10, 100, 1000, 10_000, 100_000, 1_000_000)),
        *((1, classes) for classes in (1000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_000)),
    ]
    return [Case("cross_entropy", *size, "float32", "forward+backward") for size in dict.fromkeys(sizes)]


def on_cuda(
    rows: int, classes: int, dtype: str = "bfloat16", *inner: int, step: Pass = "forward+backward", **options: object
) -> Case:
    return Case("cross_entropy", rows, classes, dtype, step, "cuda", inner, **options)


def of_cuda_bytes(classes: int, dtype: str, step: Pass = "forward+backward") -> Case:
    """Return a case with so many rows that the logits do not fit into a GPU's L2 cache."""
    return on_cuda(-(-CUDA_BYTES // (classes * DTYPES[dtype].itemsize)), classes, dtype, step=step)


def elementwise(loss: str, dtype: str = "float32", step: Pass = "forward+backward", **options: object) -> Case:
    return Case(loss, 1 << 17, 1 << 10, dtype, step, "cuda", **options)


def goals() -> list[Case]:
    """How near to the memory bandwidth is each loss on a GPU, at the shapes that models have?"""
    vocabularies = (32000, 50257, 50304, 128256, 262144)
    options = ({"target": "probabilities"}, {"label_smoothing": 0.1}, {"weighted": True})
    return [
        *(on_cuda(8192, classes) for classes in vocabularies),
        *(on_cuda(8192, classes, "float32") for classes in (32000, 128256)),
        *(on_cuda(*size) for size in ((65536, 1000), (32768, 4096), (524288, 256), (65536, 100))),
        of_cuda_bytes(100, "bfloat16"),
        *(of_cuda_bytes(1 << power, "bfloat16", "forward") for power in range(11, 19)),
        *(on_cuda(8192, 32000, **option) for option in options),
        on_cuda(8192, 50257, padding=47),  # of 50304
        *(on_cuda(8, 32000, "bfloat16", inner) for inner in (1024, 128)),
        on_cuda(16, 21, "bfloat16", 512, 512),
        *(on_cuda(128, 10, "float32", step=step) for step in PASSES),
        *(elementwise("mse", dtype) for dtype in ("bfloat16", "float32")),
        *(elementwise(loss) for loss in POINTWISE if loss not in ("mse", *CUSTOM)),
    ]


def cuda() -> list[Case]:
    """The cases of `goals` first, then more classes, dtypes and options."""
    dtypes = ("bfloat16", "float32")
    options = ({"target": "probabilities"}, {"label_smoothing": 0.1}, {"weighted": True})
    cases = [
        *goals(),
        *(of_cuda_bytes(*three) for three in itertools.product(CUDA_CLASSES, dtypes, PASSES)),
        *(on_cuda(8192, 32000, "float32", **option) for option in options),
        *(on_cuda(8192, 32000, dtype, in_place=True) for dtype in dtypes),
        on_cuda(8, 32000, "float32", 1024),
        on_cuda(16, 21, "float32", 512, 512),
        *(on_cuda(8, 262144, dtype, step=step) for dtype, step in itertools.product(dtypes, PASSES)),
        *(elementwise("mse", dtype, "forward") for dtype in dtypes),
        elementwise("bce", weighted=True),
        elementwise("log_cosh"),  # one custom loss only, because nvcc takes long to compile each
    ]
    return list(dict.fromkeys(cases))


def cuda_contenders(case: Case) -> list[str]:
    """Return who is timed. Compiling takes seconds per case, so only some cases have torch.compile and the peers."""
    if case.loss == "cross_entropy":
        against_all = not case.variant and not case.inner and (case.rows, case.classes) in AGAINST_ALL
    else:
        against_all = not case.variant and case.loss in ("mse", "bce", "log_cosh")
    compiled = ["compile"] if against_all and case.step == "forward+backward" else []
    peers = ["liger", "quack"] if against_all and case.loss == "cross_entropy" else []
    return ["eager", *compiled, "fusedloss", *peers, "copy"]


def tiny(case: Case) -> Case:
    """Return a tiny version of the case for the CPU, to try out on it what otherwise runs on a GPU."""
    inner, padding = tuple(2 for _ in case.inner), min(case.padding, 7)
    return replace(case, rows=3, classes=min(case.classes, 40), inner=inner, padding=padding, device="cpu")
