"""Fixed sets of cases, each an answer to one question."""

from .cases import Case

LARGE = [(1024, 32000), (512, 128256), (2048, 50257)]
SCALING_CONTENDERS = ["eager", "fusedloss"]
CPU_CONTENDERS = ["eager", "eager, THP", "compile", "fusedloss", "copy"]


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


def scaling() -> list[Case]:
    """Does the cost grow with the number of elements, be they more rows or more classes, and with nothing else?"""
    sizes = [
        *((rows, 1000) for rows in (1, 10, 100, 1000, 10_000, 100_000)),
        *((100, classes) for classes in (10, 100, 1000, 10_000, 100_000, 1_000_000)),
        *((1, classes) for classes in (1000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_000)),
    ]
    return [Case("cross_entropy", *size, "float32", "forward+backward") for size in dict.fromkeys(sizes)]
