"""Values and gradients of the negative log likelihood, compared with the float64 reference and torch's own loss."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers.bad_input import TYPES_ARE_OURS, i, x
from helpers.draws import DTYPES, LAYOUTS, REDUCTIONS, class_dim, random_indices, random_logits
from helpers.graphs import losses_in
from helpers.oracle import assert_exact
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import grad as func_grad
from torch.func import hessian, jvp, vmap

import fusedloss
import fusedloss.functional as fused
from fusedloss import reference

# One class, one row; below and above a chunk of the forward pass (2048 rows), a tile (32768) and its least run (1024).
SHAPES = [
    (5,), (1,), (1, 1), (7, 1), (1, 7), (33, 15), (2049, 3), (5000, 17), (3, 40_000), (1, 70_001),
    (2, 3, 5), (1, 10, 255), (2, 33, 3), (2, 4, 3, 5), (1, 3, 2, 2, 7), (3, 1, 4), (1, 50, 3001), (700, 3, 31),
    (2, 40_000, 2),
]  # fmt: skip


def random_weight(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    return (torch.rand(shape[class_dim(shape)]) + 0.1).to(device, dtype)


def check(input: Tensor, target: Tensor, **options) -> None:
    """Loss and gradient, for a random grad_output, agree with the reference, and have torch's dtype and shape."""
    ours = input.detach().requires_grad_()
    exact = input.detach().double().requires_grad_()
    loss = fused.nll_loss(ours, target, **options)
    assert "NLLLoss" in loss.grad_fn.name()
    expected = reference.nll_loss(exact, target, **options)
    torchs = F.nll_loss(input.detach(), target, **options)
    assert (loss.dtype, loss.shape, loss.device) == (torchs.dtype, torchs.shape, torchs.device)
    largest = 1.0 if options.get("weight") is None else options["weight"].abs().max().item()
    terms = largest * input.detach().double().nan_to_num().abs().max().item()
    rows = target.numel()
    assert_exact(loss, expected, scale=terms * (rows if options["reduction"] == "sum" else 1), what="loss")

    grad_output = torch.randn(loss.shape, dtype=torch.float64).to(loss)
    loss.backward(grad_output)
    expected.backward(grad_output.double())
    assert ours.grad is not None and exact.grad is not None
    assert ours.grad.dtype == input.dtype
    assert_exact(ours.grad, exact.grad, what="gradient")
    assert torch.equal(ours.grad == 0, exact.grad.to(ours.grad.dtype) == 0)
    assert torch.equal(loss.detach(), fused.nll_loss(input.detach(), target, **options))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype, reduction, device):
    for weight in (None, random_weight(shape, dtype, device)):
        check(random_logits(shape, dtype, device), random_indices(shape, device), weight=weight, reduction=reduction)


@pytest.mark.parametrize("shape", [(6, 37), (3, 5, 34), (2, 7, 6, 10)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_and_offsets(layout, shape, device):
    for dtype in DTYPES:
        input = LAYOUTS[layout](random_logits(shape, dtype, device))
        for reduction in REDUCTIONS:
            check(input, random_indices(shape, device), reduction=reduction)
        leaf = input.detach().requires_grad_()
        (grad,) = torch.autograd.grad(fused.nll_loss(leaf, random_indices(shape, device)), leaf)
        assert grad.stride() == torch.empty_like(input).stride()


def test_strided_targets_and_weights(device):
    input, target = random_logits((4, 6, 5), torch.float32, device), random_indices((4, 6, 5), device)
    strided = torch.stack([target, torch.full_like(target, 10**9)], -1)[..., 0]
    weight = torch.stack([torch.rand(6), torch.full((6,), torch.nan)], -1).to(device)[:, 0]
    check(input, strided, weight=weight, reduction="mean")
    check(input, strided, weight=weight, reduction="none")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=4).map(tuple),
    dtype=st.sampled_from(DTYPES),
    weighted=st.booleans(),
    reduction=st.sampled_from(REDUCTIONS),
    order=st.randoms(use_true_random=False),
)
def test_any_call(shape, dtype, weighted, reduction, order):
    """Random shapes, with the dimensions in any order in memory."""
    permutation = list(range(len(shape)))
    order.shuffle(permutation)
    inverse = [permutation.index(d) for d in range(len(shape))]
    input = random_logits(shape, dtype, "cpu").permute(permutation).contiguous().permute(inverse)
    weight = random_weight(shape, dtype, "cpu") if weighted else None
    check(input, random_indices(shape, "cpu"), weight=weight, reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_integer_dtypes_of_targets(dtype, device):
    for shape in ((9, 7), (9, 7, 2)):
        input, target = random_logits(shape, torch.float32, device), torch.randint(0, 7, (9, *shape[2:]), device=device)
        ours, torchs = input.clone().requires_grad_(), input.clone().requires_grad_()
        loss, expected = fused.nll_loss(ours, target.to(dtype)), F.nll_loss(torchs, target)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, ours), torch.autograd.grad(expected, torchs))


@pytest.mark.parametrize("ignore_index", [0, 2, -1, 255, -(2**40)])
def test_ignore_index(ignore_index, device):
    for shape in [(40, 5), (2, 5, 33)]:
        input, target = random_logits(shape, torch.float32, device), random_indices(shape, device, ignore_index)
        for reduction in REDUCTIONS:
            check(input, target, ignore_index=ignore_index, reduction=reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0), (4, 5), (2, 5, 3)], ids=str)
def test_no_rows_that_count(shape, reduction, device):
    """The batch is empty, or all of its rows are ignored."""
    input, target = torch.randn(shape, device=device), torch.full((shape[0], *shape[2:]), -100, device=device)
    ours, torchs = input.clone().requires_grad_(), input.clone().requires_grad_()
    loss, expected = (
        f(leaf, target, reduction=reduction) for f, leaf in ((fused.nll_loss, ours), (F.nll_loss, torchs))
    )
    torch.testing.assert_close(loss, expected, equal_nan=True)
    for leaf, value in ((ours, loss), (torchs, expected)):
        value.backward(torch.ones_like(value))
        assert torch.equal(leaf.grad, torch.zeros_like(input))


def test_values_that_are_not_finite_or_have_no_weight(device):
    target = torch.tensor([1, 1, -100, 0, 2], device=device)
    weight = torch.tensor([1.0, 0.0, 2.0], device=device)
    input = torch.randn(5, 3, device=device)
    input[0, 1], input[1, 1], input[2], input[3, 0] = torch.inf, 1.0, torch.nan, -torch.inf
    for rows in (slice(None), slice(0, 3), slice(1, 3)):  # the last two weights add up to 0
        for reduction in REDUCTIONS:
            results = []
            for function in (fused.nll_loss, F.nll_loss):
                leaf = input[rows].clone().requires_grad_()
                loss = function(leaf, target[rows], weight, reduction=reduction)
                loss.backward(torch.ones_like(loss))
                results.append((loss.detach(), leaf.grad))
            torch.testing.assert_close(*results, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(8, 12), (8, 12, 3)], ids=str)
def test_autocast_gives_float32(shape, dtype, device):
    """Only float64 stays as it is."""
    input, target = random_logits(shape, dtype, device).requires_grad_(), random_indices(shape, device)
    for weight in (None, torch.rand(12, device=device, dtype=torch.promote_types(dtype, torch.float32))):
        with torch.autocast(device, dtype=torch.bfloat16):
            loss, expected = fused.nll_loss(input, target, weight), F.nll_loss(input, target, weight)
        assert loss.dtype == expected.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, input), torch.autograd.grad(expected, input))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(700, 1000), (30_000, 9), (2, 21, 9000)], ids=str)
def test_threads_do_not_change_a_bit(shape, dtype):
    input, target = random_logits(shape, dtype, "cpu").requires_grad_(), random_indices(shape, "cpu")
    weight = random_weight(shape, dtype, "cpu")
    before, by_threads = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            losses = [fused.nll_loss(input, target, weight, reduction=reduction) for reduction in REDUCTIONS]
            by_threads.append([*losses, *(torch.autograd.grad(loss.sum(), input)[0] for loss in losses)])
    finally:
        torch.set_num_threads(before)
    for other in by_threads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(by_threads[0], other, strict=True))


# ---- Autograd


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_first_and_second_derivatives(reduction, shape, device):
    input = random_logits(shape, torch.float64, device).requires_grad_()
    target, weight = random_indices(shape, device), random_weight(shape, torch.float64, device)

    def loss(x: Tensor) -> Tensor:
        return fused.nll_loss(x, target, weight, reduction=reduction)

    assert torch.autograd.gradcheck(loss, input) and torch.autograd.gradgradcheck(loss, input)
    # The function of the loss is not linear, so that the second derivative is not 0.
    through = lambda x: loss(x.log_softmax(class_dim(shape)))  # noqa: E731
    assert torch.autograd.gradgradcheck(through, input)


def test_the_second_derivative_is_0_and_not_none(device):
    for make in (lambda x: x, lambda x: x * 1):  # a leaf, and the result of an operation
        leaf = torch.randn(3, 4, device=device, requires_grad=True)
        input = make(leaf)
        loss = fused.nll_loss(input, torch.tensor([0, -100, 2], device=device))
        (grad,) = torch.autograd.grad(loss, input, create_graph=True)
        (second,) = torch.autograd.grad(grad.sum(), leaf)
        assert torch.equal(second, torch.zeros_like(second))


def test_the_input_is_not_needed_by_the_backward_pass(device):
    """torch saves the input, and refuses a backward pass after it was overwritten."""
    leaf, target = torch.randn(3, 4, device=device, requires_grad=True), torch.tensor([0, 1, 1], device=device)
    input = leaf * 1
    loss = fused.nll_loss(input, target)
    torch.autograd.grad(loss, leaf, retain_graph=True)
    (right,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    input.detach().fill_(torch.nan)
    with torch.no_grad():
        input.zero_()
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], right)
    loss = fused.nll_loss(leaf * 1, target)
    target[0] = 2  # the backward pass needs target
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("shape", [(6, 11), (2, 11, 3)], ids=str)
def test_strides_of_grad_output(shape, device):
    input, target = random_logits(shape, torch.float32, device), random_indices(shape, device)
    rows = target.shape
    strided = torch.randn(*rows, 2, device=device)[..., 0]
    for grad_output in (
        strided,
        torch.ones((), device=device).expand(rows),
        torch.randn(1, device=device).expand(rows),
    ):
        leaf, exact = input.clone().requires_grad_(), input.double().requires_grad_()
        fused.nll_loss(leaf, target, reduction="none").backward(grad_output)
        reference.nll_loss(exact, target, reduction="none").backward(grad_output.double())
        assert_exact(leaf.grad, exact.grad)


def test_a_batch_of_gradients(device):
    input, target = (
        torch.randn(5, 4, device=device, requires_grad=True),
        torch.tensor([0, 1, 3, -100, 2], device=device),
    )
    batch = torch.randn(3, 5, device=device)
    found = [
        torch.autograd.grad(f(input, target, reduction="none"), input, batch, is_grads_batched=True)[0]
        for f in (fused.nll_loss, F.nll_loss)
    ]
    torch.testing.assert_close(*found)


def test_functorch_and_forward_mode(device):
    """Torch's own function computes all of these."""
    input, target = torch.randn(6, 5, 4, device=device), torch.randint(0, 4, (6, 5), device=device)
    for f in (lambda f: vmap(f)(input, target), lambda f: vmap(func_grad(f))(input, target),
              lambda f: hessian(lambda x: f(x.exp(), target[0]))(input[0]),
              lambda f: jvp(lambda x: f(x, target[0]), (input[0],), (input[1],))):  # fmt: skip
        torch.testing.assert_close(f(fused.nll_loss), f(F.nll_loss))


# ---- Compiling and tracing


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend, device, fresh_compiler):
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    def loss(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return fused.nll_loss(x.log_softmax(1), target, weight, ignore_index=1)

    torch.compile(loss, fullgraph=True, backend=keep)(torch.randn(3, 4, device=device), i(3, device=device), None)
    assert losses_in(*graphs) & {"fusedloss.nll_loss_forward"}
    compiled = torch.compile(loss, fullgraph=True, backend=backend, dynamic=True)
    for shape in ((5, 7), (8, 6), (2, 7, 3)) if backend == "aot_eager" else ((5, 7), (8, 6)):
        for layout in (lambda x: x, lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)):
            results = []
            input, target = layout(torch.randn(shape, device=device)), random_indices(shape, device, 1)
            weight = random_weight(shape, torch.float32, device)
            for function in (compiled, loss):
                leaf = input.detach().requires_grad_()
                value = function(leaf, target, weight)
                results.append((value.detach(), *torch.autograd.grad(value, leaf)))
            torch.testing.assert_close(*results)


def test_compiled_autograd(device, fresh_compiler):
    input, target = torch.randn(5, 4, device=device), torch.tensor([0, 1, 3, -100, 2], device=device)
    grads = []
    for compiled in (False, True):
        leaf = input.clone().requires_grad_()
        loss = fused.nll_loss(leaf, target)
        if compiled:
            with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
                loss.backward()
        else:
            loss.backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_fake_tensors_look_like_the_real_ones(device):
    for layout in LAYOUTS.values():
        for shape in ((6, 37), (2, 7, 6, 10)):
            input, target = layout(torch.randn(shape, device=device)), random_indices(shape, device)
            for reduction, autocast in (("none", False), ("mean", True), ("sum", False)):

                def facts(input: Tensor, target: Tensor, reduction=reduction, autocast=autocast) -> list[tuple]:
                    leaf = input.detach().requires_grad_()
                    with torch.autocast(leaf.device.type, dtype=torch.bfloat16, enabled=autocast):
                        loss = fused.nll_loss(leaf, target, reduction=reduction)
                    found = [loss, *torch.autograd.grad(loss, leaf, torch.ones_like(loss))]
                    assert all(isinstance(tensor, FakeTensor) == isinstance(input, FakeTensor) for tensor in found)
                    return [(t.shape, t.dtype, t.stride(), t.device) for t in found]

                with FakeTensorMode() as mode:
                    faked = facts(mode.from_tensor(input), mode.from_tensor(target))
                assert faked == facts(input, target)


def test_a_second_derivative_of_the_ops(device):
    """Under a dispatch mode, where the registered ops are called."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    seen: list[str] = []
    leaf, target = torch.randn(4, 3, device=device).requires_grad_(), torch.tensor([0, 2, -100, 1], device=device)
    found = []
    for f in (fused.nll_loss, F.nll_loss):
        with Look():
            (grad,) = torch.autograd.grad(f(leaf * leaf, target), leaf, create_graph=True)
            found.append((grad, *torch.autograd.grad(grad.pow(2).sum(), leaf)))
            torch.autograd.grad(f(leaf * leaf, target), leaf)
    torch.testing.assert_close(*found)
    assert {"fusedloss.nll_loss_forward.default", "fusedloss.nll_loss_backward.default"} <= set(seen)


# ---- The interface

BAD = {
    "batch": ((x(4, 3), i(5)), {}, ["target", r"\[4\]", r"\[5\]"]),
    "no batch": ((x(4, 3), i()), {}, ["target", r"\[4\]", r"\[\]"]),
    "one dimension too many": ((x(4, 3), i(4, 1)), {}, ["target", r"\[4\]", r"\[4, 1\]"]),
    "1-D input": ((x(3), i(2)), {}, ["target", r"\[\]", r"\[2\]"]),
    "1-D input, 2-D target": ((x(3), i(2, 1)), {}, ["target", r"\[\]", r"\[2, 1\]"]),
    "spatial size": ((x(4, 3, 5), i(4, 6)), {}, ["target", r"\[4, 5\]", r"\[4, 6\]"]),
    "spatial batch": ((x(4, 3, 5), i(3, 5)), {}, ["target", r"\[4, 5\]", r"\[3, 5\]"]),
    "5-D": ((x(4, 3, 5, 2, 2), i(4, 5, 2, 3)), {}, ["target", r"\[4, 5, 2, 2\]", r"\[4, 5, 2, 3\]"]),
    "float indices": ((x(4, 3), x(4)), {}, ["target", "integer", "Float"]),
    "bool indices": ((x(4, 3), i(4).bool()), {}, ["target", "integer", "Bool"]),
    "probabilities": ((x(4, 3), x(4, 3)), {}, ["target", r"\[4\]", r"\[4, 3\]"]),
    "integer input": ((i(4, 3), i(4)), {}, ["input", "float32", "Long"]),
    "complex input": ((x(4, 3).to(torch.complex64), i(4)), {}, ["input", "float32", "ComplexFloat"]),
    "weight size": ((x(4, 3), i(4), torch.ones(2)), {}, ["weight", "3 classes", r"\[2\]"]),
    "weight dimensions": ((x(4, 3), i(4), torch.ones(3, 1)), {}, ["weight", "3 classes", r"\[3, 1\]"]),
    "weight dtype": ((x(4, 3), i(4), torch.ones(3).double()), {}, ["weight", "Float", "Double"]),
    "class too large": ((x(4, 3), i(4) + 3), {}, [r"target\[0\] is 3", r"\[0, 3\)"]),
    "class negative": ((x(4, 3), i(4) - 1), {}, [r"target\[0\] is -1", r"\[0, 3\)"]),
    "class far out": ((x(4, 3), i(4) + 2**62), {}, [str(2**62)]),
    "class too large, columns": ((x(2, 3, 300), i(2, 300) + 5), {}, [r"target\[0, 0\] is 5", r"\[0, 3\)"]),
    "class too large, 1-D": ((x(3), i() + 7), {}, ["target is 7", r"\[0, 3\)"]),
    "reduction": ((x(4, 3), i(4)), {"reduction": "average"}, ["average", "reduction"]),
    "ignore_index type": ((x(4, 3), i(4)), {"ignore_index": 1.5}, []),
    "target type": ((x(4, 3), None), {}, ["target"]),
    "no dimensions": ((torch.tensor(1.0), i()), {}, []),
    "no classes": ((x(2, 0), i(2)), {}, []),
    "differentiable weight": ((x(4, 3), i(4), torch.ones(3, requires_grad=True)), {}, ["weight"]),
    "target device": ((x(4, 3), i(4, device="meta")), {}, []),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    arguments, options, says = BAD[case]
    with pytest.raises(Exception) as expected:
        F.nll_loss(*arguments, **options)
    with pytest.raises(Exception) as raised:
        fused.nll_loss(*arguments, **options)
    assert raised.type is expected.type or not TYPES_ARE_OURS
    for part in says:
        raised.match(part)


def test_the_first_bad_row_is_named():
    target = torch.randint(0, 5, (7000, 3))
    target[4000, 1], target[6000, 2] = 5, -3
    with pytest.raises(IndexError, match=r"target\[4000, 1\] is 5, expected a class index in \[0, 5\)"):
        fused.nll_loss(torch.randn(7000, 5, 3), target)


def test_bad_arguments_of_the_backward_op():
    op, right = torch.ops.fusedloss.nll_loss_backward, torch.ones(1)
    for size, stride, target, grad_output in [
        ((4, 3), (3, 1), i(5), right), ((4, 3), (3, 1), i(4), torch.ones(2)), ((4, 3), (3, 1), i(4), right.long())
    ]:  # fmt: skip
        with pytest.raises((RuntimeError, ValueError, NotImplementedError), match="nll_loss"):
            op(grad_output, target, None, right, size, stride, torch.float32, 1, -100)


def test_one_row_with_a_target_of_one(device):
    """For a single row, torch accepts a target of shape (1) in place of ()."""
    for classes in (1, 5):
        input, target = torch.randn(classes, device=device), torch.zeros(1, dtype=torch.int64, device=device)
        for reduction in REDUCTIONS:
            results = (f(input, target, reduction=reduction) for f in (fused.nll_loss, F.nll_loss))
            torch.testing.assert_close(*results)


def test_signatures_are_torchs():
    assert issubclass(fusedloss.NLLLoss, nn.NLLLoss)
    for ours, torchs in ((fused.nll_loss, F.nll_loss), (fusedloss.NLLLoss.__init__, nn.NLLLoss.__init__),
                         (fusedloss.NLLLoss.forward, nn.NLLLoss.forward)):  # fmt: skip
        described = [
            [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()] for f in (ours, torchs)
        ]
        assert described[0] == described[1]


def test_the_module(device):
    weight = torch.rand(5, device=device)
    ours, torchs = (m.NLLLoss(weight=weight, ignore_index=3, reduction="sum") for m in (fusedloss, nn))
    assert repr(ours) == repr(torchs) and ours.state_dict().keys() == torchs.state_dict().keys()
    input, target = torch.randn(7, 5, device=device), torch.randint(0, 5, (7,), device=device)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(input, target), ours(input, target))
    torch.testing.assert_close(ours(input, target), torchs(input, target))
    torch.testing.assert_close(ours.double()(input.double(), target), torchs.double()(input.double(), target))


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")
@pytest.mark.parametrize("size_average", [None, True, False])
@pytest.mark.parametrize("reduce", [None, True, False])
def test_deprecated_arguments(size_average, reduce):
    input, target = torch.randn(7, 5), torch.randint(0, 5, (7,))
    options = {"size_average": size_average, "reduce": reduce}
    torch.testing.assert_close(fusedloss.NLLLoss(**options)(input, target), nn.NLLLoss(**options)(input, target))
    found = (f(input, target, reduction="none", **options) for f in (fused.nll_loss, F.nll_loss))
    torch.testing.assert_close(*found)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_patched_and_scripted():
    input, target = torch.randn(7, 5, requires_grad=True), torch.randint(0, 5, (7,))
    expected = nn.NLLLoss()(input, target)
    with fusedloss.patch():
        loss = nn.NLLLoss()(input, target)
        assert "NLLLoss" in loss.grad_fn.name() and F.nll_loss is fused.nll_loss
        torch.testing.assert_close(loss, expected)
        for module in (fusedloss, nn):
            torch.testing.assert_close(torch.jit.script(module.NLLLoss())(input, target), expected)


class Subclass(Tensor):
    pass


def test_subclasses_are_kept():
    input, target = torch.randn(7, 5).as_subclass(Subclass), torch.randint(0, 5, (7,))
    assert type(fused.nll_loss(input, target)) is type(F.nll_loss(input, target)) is Subclass
