"""Fixed sets of cases, each an answer to one question."""

import itertools

from .cases import DTYPES, PASSES, Case, Pass
from .losses import CUSTOM, LOSSES

LARGE = [(1024, 32000), (512, 128256), (2048, 50257)]
SCALING_CONTENDERS = ["eager", "fusedloss"]
CPU_CONTENDERS = ["eager", "eager, THP", "compile", "fusedloss", "copy"]
POINTWISE = [loss for loss in LOSSES if loss != "cross_entropy"]
IN_16_BITS_TOO = ("mse", "huber", "bce")
CUDA_BYTES = 1 << 28  # at least, of logits: several times what a GPU's second-level cache holds
CUDA_CLASSES = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 50257, 65536, 131072, 262144)
AGAINST_ALL = (1024, 4096, 32768, 131072, 262144)  # of them, where the compiler and the peers are timed as well


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
        *(mse(elements, dtype) for elements in (10**5, 10**7, 10**8) for dtype in ("float32", "bfloat16")),
    ]


def pointwise() -> list[Case]:
    """How fast are the losses of one element after another, ten million of them, and those of one's own?"""

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
    """Does the cost grow with the number of elements, be they more rows or more classes, and with nothing else?"""
    sizes = [
        *((rows, 1000) for rows in (1, 10, 100, 1000, 10_000, 100_000)),
        *((100, classes) for classes in (10, 100, 1000, 10_000, 100_000, 1_000_000)),
        *((1, classes) for classes in (1000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_000)),
    ]
    return [Case("cross_entropy", *size, "float32", "forward+backward") for size in dict.fromkeys(sizes)]


def cuda() -> list[Case]:
    """How near to the memory's own speed are the losses on a GPU, over classes, dtypes and options?"""

    def cross_entropy(
        rows: int, classes: int, dtype: str, *inner: int, step: Pass = "forward+backward", **options: object
    ) -> Case:
        return Case("cross_entropy", rows, classes, dtype, step, "cuda", inner, **options)

    def large(classes: int, dtype: str, **options: object) -> Case:
        return cross_entropy(-(-CUDA_BYTES // (classes * DTYPES[dtype].itemsize)), classes, dtype, **options)

    def elementwise(loss: str, dtype: str = "float32", step: Pass = "forward+backward", **options: object) -> Case:
        return Case(loss, 1 << 17, 1 << 10, dtype, step, "cuda", **options)

    dtypes = ("bfloat16", "float32")
    # nvcc takes long for a custom loss: one stands for all.
    family = [loss for loss in POINTWISE if loss not in ("mse", *CUSTOM)] + ["log_cosh"]
    options = ({"target": "probabilities"}, {"label_smoothing": 0.1}, {"weighted": True}, {"in_place": True})
    return [
        *(large(classes, dtype, step=step) for dtype, classes, step in itertools.product(dtypes, CUDA_CLASSES, PASSES)),
        *(large(32768, dtype, **option) for dtype, option in itertools.product(dtypes, options)),
        *(cross_entropy(8, 32000, dtype, 1024) for dtype in dtypes),
        *(cross_entropy(16, 21, dtype, 512, 512) for dtype in dtypes),
        *(cross_entropy(8, 262144, dtype, step=step) for dtype, step in itertools.product(dtypes, PASSES)),
        *(cross_entropy(128, 10, "float32", step=step) for step in PASSES),
        *(elementwise("mse", dtype, step) for dtype, step in itertools.product(dtypes, PASSES)),
        *(elementwise(loss) for loss in family),
        elementwise("bce", weighted=True),
    ]


def cuda_contenders(case: Case) -> list[str]:
    """Compiling a contender takes seconds a case: only where it says most."""
    against_all = (
        not case.variant
        and not case.inner
        and case.classes in AGAINST_ALL
        and case.loss in ("cross_entropy", "mse", "bce", "log_cosh")
    )
    compiled = ["compile"] if against_all and case.step == "forward+backward" else []
    peers = ["liger", "quack"] if against_all and case.loss == "cross_entropy" else []
    return ["eager", *compiled, "fusedloss", *peers, "copy"]
