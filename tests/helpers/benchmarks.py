"""What the tests of the benchmark share: the shortest effort, and custom losses without a compiler."""

from benchmarks.timing import Effort
from fusedloss.expression import parse, to_torch

BRIEF = Effort(min_rounds=3, max_rounds=3, seconds=0, batch_seconds=0)


def composed_custom_loss(expression: str, **parameters: float):
    """The loss that `fusedloss.custom_loss` computes, composed of torch's operations, without a compiler."""
    value = to_torch(parse(expression, ("input", "target"), tuple(parameters)), ("input", "target", *parameters))
    return lambda input, target: value(input, target, *parameters.values()).mean()
