"""`python -m benchmarks.demo`: two models trained twice, with torch's losses and with fusedloss's.

The only change that a training script needs is in `LIBRARIES`: `CrossEntropyLoss` and `MSELoss` come from `fusedloss`
instead of `torch.nn`. The models, the optimizers and the loops below are the same for both.
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

try:
    import matplotlib  # noqa: F401, for demo_plot
    from rich.console import Console
    from rich.table import Table
    from sklearn.datasets import load_diabetes, load_digits
    from sklearn.model_selection import train_test_split
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    needed = "pip install rich matplotlib scikit-learn"
    raise SystemExit(f"python -m benchmarks.demo needs {error.name}, which is not installed: {needed}") from None

import fusedloss

from . import report
from .arguments import sizes
from .cases import all_cases
from .contenders import warm_up
from .demo_plot import save_plot
from .measure import measure_all
from .timing import Effort, Step, Times, cpu_timer, interleave

LIBRARIES: dict[str, ModuleType] = {"torch": nn, "fusedloss": fusedloss}

# The two libraries round differently in the last bit, and training amplifies the difference from step to step. A wrong
# loss or gradient is off by far more after the first epoch.
TOLERANCE = 1e-3
BATCH = 128
EPOCHS = 20
BENCHMARK_EFFORT = Effort(min_rounds=7, max_rounds=51, seconds=0.5)
LOSS_ALONE_EFFORT = Effort(min_rounds=15, max_rounds=201, seconds=1.0)


@dataclass(frozen=True)
class Data:
    """Real data that ships inside scikit-learn, split into a training and a test part."""

    name: str
    train_x: Tensor  # [N, features]
    train_y: Tensor  # [N] class indices, or [N, 1] values
    test_x: Tensor
    test_y: Tensor
    outputs: int


@dataclass(frozen=True)
class Training:
    """The results of one training run."""

    curve: list[float]  # mean loss of each epoch
    score: float  # on the test part
    model: nn.Module


@dataclass(frozen=True)
class Task:
    """A data set with the loss and the score that fit it."""

    data: Data
    loss: str  # its name in torch.nn and in fusedloss
    score: Callable[[Tensor, Tensor], float]
    score_name: str
    learning_rate: float


def digits() -> Task:
    """1,797 images of 8x8 pixels, ten classes."""
    images, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(images / 16, labels, test_size=0.2, random_state=0)
    data = Data("digits", floats(train_x), torch.tensor(train_y), floats(test_x), torch.tensor(test_y), outputs=10)
    return Task(data, "CrossEntropyLoss", accuracy, "test accuracy", learning_rate=0.1)


def diabetes() -> Task:
    """442 patients, ten measurements each, and how far the disease progressed in a year, in standard deviations."""
    features, progress = load_diabetes(return_X_y=True)
    features, progress = features / features.std(axis=0), (progress - progress.mean()) / progress.std()
    train_x, test_x, train_y, test_y = train_test_split(features, progress[:, None], test_size=0.2, random_state=0)
    data = Data("diabetes", floats(train_x), floats(train_y), floats(test_x), floats(test_y), outputs=1)
    return Task(data, "MSELoss", r_squared, "test R²", learning_rate=0.01)


def floats(array: object) -> Tensor:
    return torch.tensor(array, dtype=torch.float32)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(dim=1) == labels).float().mean().item()


def r_squared(predicted: Tensor, actual: Tensor) -> float:
    return 1 - ((actual - predicted).square().sum() / (actual - actual.mean()).square().sum()).item()


def train(task: Task, losses: ModuleType, epochs: int) -> Training:
    """An ordinary training loop; `losses` is `torch.nn` or `fusedloss`, and nothing else differs."""
    torch.manual_seed(0)  # the same weights and the same order of batches for both
    data = task.data
    model = nn.Sequential(nn.Linear(data.train_x.shape[1], 64), nn.ReLU(), nn.Linear(64, data.outputs))
    criterion = getattr(losses, task.loss)()
    optimizer = torch.optim.SGD(model.parameters(), lr=task.learning_rate, momentum=0.9)

    curve = []
    for _ in range(epochs):
        total = 0.0
        for batch in torch.randperm(len(data.train_x)).split(BATCH):
            optimizer.zero_grad()
            loss = criterion(model(data.train_x[batch]), data.train_y[batch])
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        curve.append(total / len(data.train_x))

    with torch.no_grad():
        score = task.score(model(data.test_x), data.test_y)
    return Training(curve, score, model)


def largest_difference(curves: list[list[float]]) -> float:
    """The largest relative difference between two curves over all epochs. NaN counts as infinite."""
    ours, theirs = (torch.tensor(curve, dtype=torch.float64) for curve in curves)
    return ((ours - theirs).abs() / theirs.abs()).nan_to_num(nan=float("inf")).max().item()


def time_loss_alone(task: Task, model: nn.Module) -> dict[str, Times]:
    """Time one batch's loss and its gradient with respect to the model's output, without the model.

    The loss is a small part of a step, and two separate training runs would differ by more than its time. So the loss
    is timed apart from the training, with both libraries in turn on the same real outputs.
    """
    target = task.data.train_y[:BATCH]
    output = model(task.data.train_x[:BATCH]).detach().requires_grad_()

    def step_with(losses: ModuleType) -> Step:
        criterion = getattr(losses, task.loss)()

        def step() -> None:
            criterion(output, target).backward()
            output.grad = None

        return Step(step)

    steps = {name: step_with(losses) for name, losses in LIBRARIES.items()}
    return interleave(steps, cpu_timer, LOSS_ALONE_EFFORT)


def curves_table(trainings: dict[str, dict[str, Training]]) -> Table:
    """Every epoch's loss, both libraries side by side."""
    table = Table("epoch", title="Mean training loss of each epoch", title_justify="left")
    for task, runs in trainings.items():
        for library in runs:
            table.add_column(f"{task}\n{library}", justify="right")
    curves = [run.curve for runs in trainings.values() for run in runs.values()]
    for epoch, losses in enumerate(zip(*curves, strict=True), start=1):
        table.add_row(str(epoch), *(f"{loss:.6f}" for loss in losses))
    return table


def report_agreement(task: Task, runs: dict[str, Training], console: Console) -> bool:
    """Print the scores and whether the two curves agree. Return whether they do."""
    difference = largest_difference([run.curve for run in runs.values()])
    agree = difference <= TOLERANCE
    scores = ", ".join(f"{library} {run.score:.4f}" for library, run in runs.items())
    console.print(f"{task.data.name}, {task.loss}: {task.score_name}: {scores}")
    console.print(
        f"  the curves {'agree' if agree else 'DISAGREE'}: largest relative difference {difference:.1e}, "
        f"tolerance {TOLERANCE:.0e}",
        style="green" if agree else "bold red",
    )
    return agree


def report_times(task: Task, times: dict[str, Times], epochs: int, console: Console) -> None:
    """Print the time of the loss per step and, from it, for the whole training."""
    steps = epochs * math.ceil(len(task.data.train_x) / BATCH)
    for library, time in times.items():
        console.print(
            f"  time in the loss, {library}: {time.median * 1e6:.1f} us a step; "
            f"times the {steps} steps of this training: {time.median * steps * 1e3:.2f} ms"
        )


def benchmark(options: argparse.Namespace, console: Console) -> None:
    """A small extract of `python -m benchmarks`: eager against fusedloss."""
    names = ["eager", "fusedloss"]
    cases = all_cases(["cross_entropy", "mse"], options.sizes, ["float32"], "cpu")
    plan = [(case, names) for case in cases if case.step == "forward+backward"]
    results = measure_all(plan, BENCHMARK_EFFORT, Console(stderr=True))
    report.print_results(console, results, names, "cpu")
    console.print(report.verdict(results))
    console.print("The whole table, torch.compile included: python -m benchmarks --quick")


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    console = Console(soft_wrap=True)
    warm_up("cpu")
    tasks = [digits(), diabetes()]
    trainings = {
        task.data.name: {library: train(task, losses, options.epochs) for library, losses in LIBRARIES.items()}
        for task in tasks
    }
    console.print(curves_table(trainings))
    all_agree = True
    times = {}
    for task in tasks:
        runs = trainings[task.data.name]
        all_agree &= report_agreement(task, runs, console)
        times[task.loss] = time_loss_alone(task, runs["torch"].model)
        report_times(task, times[task.loss], options.epochs, console)
    console.print(
        "  (the loss and its gradient with respect to the model's output; the model itself is not included)\n"
    )
    benchmark(options, console)
    save_plot(options.plot, trainings, times)
    console.print(f"Plot saved to {options.plot.resolve()}", markup=False)
    return 0 if all_agree else 1


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo",
        description="Train a classifier and a regressor with torch's losses and with fusedloss's, and compare.",
    )
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of both trainings; default: %(default)s")
    parser.add_argument(
        "--sizes", type=sizes, default="128x10,2048x1000", help="of the benchmark; default: %(default)s"
    )
    parser.add_argument("--plot", type=Path, default=Path("demo.png"), metavar="FILE", help="default: %(default)s")
    options = parser.parse_args(argv)
    if options.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {options.epochs}")
    if not options.plot.resolve().parent.is_dir():
        parser.error(f"--plot {options.plot}: the directory {options.plot.resolve().parent} does not exist")
    return options


if __name__ == "__main__":
    sys.exit(main())
