"""Values and derivatives of custom losses, compared with the same expressions written in torch."""

import itertools
import math
import re

import pytest
import torch
from helpers.custom import CASES, TOLERANCE, assert_same, by_hand, by_torch, drawn, gradients, made
from helpers.draws import DTYPES, REDUCTIONS
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import fusedloss
from fusedloss import ops

pytestmark = pytest.mark.usefixtures("custom_loss_folder")


# ---- values and gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_against_torch(name, dtype):
    for reduction in REDUCTIONS:
        assert_same(name, drawn(name, (7, 113), dtype), reduction)
    assert_same(name, drawn(name, (1500,), dtype, halves=True), "none")


@pytest.mark.parametrize("name", ["absolute", "squared", "masked"])
def test_sizes(name):
    """Sizes around those of a vector, of a block, and of a chunk, which is the work of one thread."""
    for size, dtype in itertools.product((0, 1, 15, 16, 17, 511, 512, 513, 8193, 40_000), DTYPES[:3]):
        for reduction in REDUCTIONS if size else ("none", "sum"):
            assert_same(name, drawn(name, (size,), dtype), reduction)
    assert made(name)(**drawn(name, (0, 3))).isnan()
    assert_same(name, drawn(name, ()), "mean")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(dtype):
    def assert_same_of(**layouts):
        operands = drawn("clipped", (6, 8, 10), dtype)
        changed = {k: layouts.get(k, lambda x: x)(x.detach()).requires_grad_() for k, x in operands.items()}
        for reduction in REDUCTIONS:
            assert_same("clipped", changed, reduction)

    transposed = lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0)  # noqa: E731
    assert_same_of(input=transposed)
    assert_same_of(input=transposed, target=transposed, weight=transposed)
    assert_same_of(target=lambda x: torch.stack([x, x])[1])
    assert_same_of(weight=lambda x: x.repeat_interleave(2, -1)[..., ::2])
    assert_same_of(input=lambda x: x[:, ::2].repeat_interleave(2, 1), target=lambda x: x.flip(0))


@pytest.mark.parametrize("shape", [(), (1,), (10,), (6, 1), (1, 10), (3, 1, 1), (3, 6, 10)], ids=str)
@pytest.mark.parametrize("name", ["squared", "masked"])
def test_broadcasting(name, shape):
    """Each gradient has the shape of its operand. The mean is over the broadcast shape."""
    for reduction, small in itertools.product(REDUCTIONS, ("weight", "target", "input")):
        operands = drawn(name, (6, 10)) | {small: torch.randn(shape, dtype=torch.float64).requires_grad_()}
        assert_same(name, operands, reduction)
    with pytest.raises(RuntimeError, match=r"must have shapes that broadcast, got \[6\], \[7\]"):
        made("absolute")(torch.randn(6), torch.randn(7))


@pytest.mark.parametrize("name", CASES)
def test_special_values(name):
    """NaN, infinities and zeros of both signs in all combinations: values and gradients are NaN where torch's are.

    Expressions with kinks are compared for finite operands only. Autograd multiplies from the loss to the input, so
    that a kink turns a NaN from before it into 0. The kernels multiply in the other order.
    """
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -2.0, 0.5, 1e-30])
    grid = torch.cartesian_prod(special, special, torch.tensor([1.0, math.nan, math.inf, 0.0]))
    values = {"input": grid[:, 0], "target": grid[:, 1], "weight": grid[:, 2], "var": grid[:, 2], "mask": grid[:, 2]}
    operands = {key: values[key].clone().requires_grad_(key != "mask") for key in drawn(name, (1,))}
    ours, theirs = made(name, "none")(**operands), by_torch(name, operands)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours[ours.isinf()], theirs[ours.isinf()])
    has_kink = re.search(r"where|clamp|max|min|relu", CASES[name].expression)
    compared = grid.isfinite().all(1) if has_kink else torch.ones(len(grid), dtype=torch.bool)
    for a, b in zip(gradients(ours.sum(), operands), gradients(theirs.sum(), operands), strict=True):
        assert torch.equal(a.isnan()[compared], b.isnan()[compared])


@pytest.mark.parametrize(
    "types",
    [
        {"target": torch.int64},
        {"target": torch.uint8, "mask": torch.bool},
        {"mask": torch.bool},
        {"mask": torch.int32},
        {"target": torch.float64},
        {"input": torch.bfloat16},
        {"input": torch.bfloat16, "target": torch.float16},
        {"input": torch.float16, "weight": torch.float64},
        {"input": torch.int64, "target": torch.int32, "weight": torch.int16},
    ],
    ids=str,
)
def test_mixed_types(types):
    drawn_ = {key: x.detach().abs() * 3 for key, x in drawn("masked", (70,), torch.float32).items()}
    operands = {key: x.to(types.get(key, x.dtype)) for key, x in drawn_.items()}
    operands = {key: x.requires_grad_(x.is_floating_point() and key != "mask") for key, x in operands.items()}
    floating = [x.dtype for x in operands.values() if x.is_floating_point() and x.dtype != torch.bool]
    common = torch.float32
    if floating:
        common = floating[0]
        for other in floating[1:]:
            common = torch.promote_types(common, other)
    loss, expected = made("masked")(**operands), by_torch("masked", operands, "mean")
    assert loss.dtype == common
    torch.testing.assert_close(loss, expected.to(common), **TOLERANCE[torch.float32])
    if not loss.requires_grad:
        return
    for ours, theirs in zip(gradients(loss, operands), gradients(expected, operands), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(
            ours, theirs, **TOLERANCE[min((torch.float32, ours.dtype), key=lambda t: t.itemsize)]
        )


@pytest.mark.parametrize("types", [(torch.float32, torch.float64), (torch.bfloat16, torch.float32)], ids=str)
def test_a_value_of_no_dimension_does_not_widen(types):
    wide = torch.tensor(0.25, dtype=types[1])
    operands = {key: x.detach().to(types[0]) for key, x in drawn("squared", (7,), torch.float32).items()}
    for name in ("target", "weight"):
        given = {**operands, name: wide}
        assert made("squared")(**given).dtype == by_torch("squared", given, "mean").dtype == types[0]
    assert made("squared")(**{key: x[0] for key, x in operands.items()} | {"weight": wide}).dtype == types[1]
    integers = {**{key: x.to(torch.int64) for key, x in operands.items()}, "weight": wide}
    assert made("squared")(**integers).dtype == types[1]


def test_other_devices():
    input = torch.ones(3, 2, device="meta", requires_grad=True)
    loss = made("squared", "none")(input=input, target=input, weight=torch.ones(2, device="meta"))
    assert loss.is_meta and loss.shape == (3, 2)


def test_clamp_at_its_bounds():
    """Results and derivatives are torch's, for bounds that are numbers or tensors, in any order."""
    grid = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=3)), dtype=torch.float64)
    for text, torchs in {
        "clamp(input, target, weight)": torch.clamp,
        "clamp(input, min=target)": lambda x, low, _: torch.clamp(x, low),
        "clamp(input, max=target)": lambda x, high, _: torch.clamp(x, max=high),
        "clamp(input, low, high)": lambda x, *_: torch.clamp(x, -1, 1),
        "clamp(input, min=low)": lambda x, *_: torch.clamp(x, min=-1),
        "clamp(input, max=high)": lambda x, *_: torch.clamp(x, max=1),
    }.items():
        names = {name: value for name, value in {"low": -1.0, "high": 1.0}.items() if name in text}
        criterion = fusedloss.custom_loss(text, reduction="none", **names)
        of_torch = [column.clone().requires_grad_() for column in grid.T]
        wanted = torch.autograd.grad(torchs(*of_torch).sum(), of_torch, materialize_grads=True)
        for call in (criterion, lambda criterion=criterion, **xs: torch.func.vmap(lambda ys: criterion(**ys))(xs)):
            leaves = dict(zip(("input", "target", "weight"), (x.clone().requires_grad_() for x in grid.T), strict=True))
            given = {name: x for name, x in leaves.items() if name in text}
            loss = call(**given)
            assert torch.equal(loss, torchs(*of_torch)), text
            grads = torch.autograd.grad(loss.sum(), list(given.values()))
            assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=False)), text


# ---- derivatives of every kind


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name):
    operands = drawn(name, (2, 3))
    keys = list(operands)
    for reduction in REDUCTIONS:
        criterion = made(name, reduction)

        def loss(*tensors, criterion=criterion):
            return criterion(**dict(zip(keys, tensors, strict=True)))

        assert torch.autograd.gradcheck(loss, tuple(operands.values()), check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(loss, tuple(operands.values()))


@pytest.mark.parametrize("name", ["squared", "quantile", "focal", "masked", "by hand"])
def test_functional_transforms(name):
    is_by_hand = name == "by hand"  # has no derivative with respect to target
    name = "squared" if is_by_hand else name
    criterion = by_hand() if is_by_hand else made(name)
    operands = [x.detach() for x in drawn(name, (4, 5)).values()]

    def expected(input, target, *rest):
        target = target.detach() if is_by_hand else target
        return by_torch(name, dict(enumerate((input, target, *rest))), "mean")

    ours = lambda i, t, *rest: criterion(i, t, **dict(zip(CASES[name].tensors, rest, strict=True)))  # noqa: E731
    for transform in (
        torch.func.vmap,
        torch.func.grad,
        lambda f: torch.func.vmap(torch.func.grad(f)),
        lambda f: torch.func.vmap(torch.func.grad(f), in_dims=(0, *[None] * (len(operands) - 1))),
        lambda f: lambda *xs: torch.func.jvp(f, tuple(xs), tuple(torch.ones_like(x) for x in xs)),
        torch.func.jacrev,
        torch.func.hessian,
    ):
        torch.testing.assert_close(transform(ours)(*operands), transform(expected)(*operands))


def test_forward_mode():
    operands = drawn("clipped", (9,), torch.float32)
    with forward_ad.dual_level():
        duals = {key: forward_ad.make_dual(x.detach(), torch.ones_like(x)) for key, x in operands.items()}
        tangents = [
            forward_ad.unpack_dual(f(duals)).tangent
            for f in (lambda xs: made("clipped", "none")(**xs), lambda xs: by_torch("clipped", xs))
        ]
    torch.testing.assert_close(*tangents)


def test_second_backward():
    operands = drawn("focal", (33,))
    loss = made("focal")(**operands)
    first = gradients(loss, operands, retain_graph=True)
    again = gradients(loss, operands)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        gradients(loss, operands)


def test_grad_output():
    """An upstream gradient other than 1, as from a loss scale or a weight of this loss."""
    operands = drawn("huber", (100,), torch.float16)
    (one, _), (many, _) = (
        gradients(made("huber")(**operands), operands),
        gradients(made("huber")(**operands) * 1024, operands),
    )
    assert many.count_nonzero() >= one.count_nonzero()
    wide = {key: x.detach().double().requires_grad_() for key, x in operands.items()}
    (expected, _) = gradients(by_torch("huber", wide, "mean") * 1024, wide)
    torch.testing.assert_close(many, expected.half(), **TOLERANCE[torch.float16])


def test_without_gradients():
    operands = drawn("focal", (20,))
    with torch.no_grad():
        assert not made("focal")(**operands).requires_grad
    with torch.inference_mode():
        assert not made("focal")(**operands).requires_grad
    target_only = {key: x.detach().requires_grad_(key == "target") for key, x in operands.items()}
    (ours,) = gradients(made("focal")(**target_only), target_only)
    (theirs,) = gradients(by_torch("focal", target_only, "mean"), target_only)
    torch.testing.assert_close(ours, theirs)


def test_a_mask_has_no_derivative():
    """A mask may require grad, and its gradient is 0."""
    operands = drawn("masked", (8,))
    operands["mask"].requires_grad_()
    *ours, zero = gradients(made("masked")(**operands), operands)
    assert zero.eq(0).all()
    *theirs, _ = gradients(by_torch("masked", operands, "mean"), operands, allow_unused=True)
    torch.testing.assert_close(ours, theirs)
    *twice, zero = gradients(made("masked")(**operands), operands, create_graph=True)
    assert zero.eq(0).all()
    torch.testing.assert_close(twice, ours)
    batch = gradients(
        made("masked")(**operands), operands, torch.ones(2).double(), is_grads_batched=True, allow_unused=True
    )
    torch.testing.assert_close(batch[0], ours[0].expand(2, -1))
    compiled = torch.compile(made("masked"), fullgraph=True, backend="aot_eager")
    assert gradients(compiled(**operands), operands)[-1].eq(0).all()
    through_op = ops.pointwise(list(operands.values()), made("masked")._name, [], REDUCTIONS.index("mean"), None)
    twice, expected = (
        gradients(
            sum(x.square().sum() for x in gradients(loss, operands, create_graph=True, allow_unused=True)[:-1]),
            operands,
            allow_unused=True,
            materialize_grads=True,
        )
        for loss in (through_op, by_torch("masked", operands, "mean"))
    )
    torch.testing.assert_close(twice, expected)
    mask = {key: x.detach().requires_grad_(key == "mask") for key, x in operands.items()}
    (zero,) = gradients(made("masked")(**mask), mask, create_graph=True)
    assert zero.eq(0).all()


def test_operand_changed_in_place():
    for changed in ("input", "target", "weight"):
        operands = {key: x * 1 for key, x in drawn("squared", (9,)).items()}
        loss = made("squared")(**operands)
        operands[changed].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_checkpointing():
    operands = drawn("cauchy", (40,))
    again = checkpoint(made("cauchy"), operands["input"], operands["target"], use_reentrant=False)
    for ours, theirs in zip(gradients(again, operands), gradients(made("cauchy")(**operands), operands), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(7,), (3, 1), (5, 3, 7)], ids=str)
def test_derivative_by_hand(shape, reduction):
    """The result equals the expression's own derivative, except for target, which has none."""
    operands = drawn("squared", (3, 7)) | {"weight": torch.rand(shape, dtype=torch.float64).requires_grad_()}
    ours, theirs = by_hand(reduction=reduction)(**operands), made("squared", reduction)(**operands)
    torch.testing.assert_close(ours, theirs)
    upstream = torch.randn(ours.shape, dtype=torch.float64)
    expected = gradients(theirs, operands, upstream)
    expected[1] = torch.zeros_like(expected[1])
    for a, b in zip(gradients(ours, operands, upstream, retain_graph=True), expected, strict=True):
        torch.testing.assert_close(a, b)
    twice = gradients(ours, operands, upstream, create_graph=True, allow_unused=True)
    assert twice[1].eq(0).all()
    torch.testing.assert_close(twice[::2], expected[::2])

    target = operands["target"].detach()
    wanted = (operands["input"], operands["weight"])
    criterion = by_hand(reduction=reduction)
    loss = lambda i, w: criterion(i, target, weight=w)  # noqa: E731
    assert torch.autograd.gradcheck(loss, wanted, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(loss, wanted)


def test_derivative_by_hand_elsewhere(fresh_compiler):
    operands = drawn("squared", (3, 7))
    expected = gradients(by_hand()(**operands), operands)
    compiled = torch.compile(by_hand(), fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(gradients(compiled(**operands), operands), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    plain = {key: x.detach() for key, x in operands.items()}
    criterion = by_hand()
    torch.jit.trace(lambda input: criterion(**plain | {"input": input}), plain["input"])  # calls it twice
    with forward_ad.dual_level():  # with respect to target, which has no derivative
        dual = forward_ad.make_dual(operands["target"].detach(), torch.ones(3, 7).double())
        loss = by_hand()(operands["input"], dual, weight=operands["weight"])
        assert forward_ad.unpack_dual(loss).tangent.eq(0).all()
