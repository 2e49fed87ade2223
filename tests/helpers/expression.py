"""The tensors and parameters of the expressions under test, and reading them."""

from fusedloss.expression import parse, to_torch

TENSORS = ("input", "target", "mask")
PARAMETERS = ("delta", "gamma")
ARGUMENTS = TENSORS + PARAMETERS


def read(text):
    return parse(text, TENSORS, PARAMETERS)


def torch_function(text):
    return to_torch(read(text), ARGUMENTS)
