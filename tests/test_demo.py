"""The demo, a newcomer's first run: it succeeds if the losses agree, and fails with a message if they do not."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks import demo
from benchmarks.timing import Effort

FAST = ["--epochs", "2", "--sizes", "8x3"]


@pytest.fixture(autouse=True)
def little_effort(monkeypatch: pytest.MonkeyPatch) -> None:
    """The timings are short, since these tests do not use them."""
    effort = Effort(min_rounds=2, max_rounds=2, seconds=0, batch_seconds=0)
    monkeypatch.setattr(demo, "BENCHMARK_EFFORT", effort)
    monkeypatch.setattr(demo, "LOSS_ALONE_EFFORT", effort)


def test_demo_ends_well_and_saves_its_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "demo.png"
    assert demo.main([*FAST, "--plot", str(plot)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("the curves agree") == 2
    assert "DISAGREE" not in printed
    assert "test accuracy: torch 0." in printed
    assert "test R²: torch " in printed
    assert printed.count("time in the loss, fusedloss:") == 2
    assert "8x3" in printed
    assert "fusedloss ahead of eager in" in printed
    assert f"Plot saved to {plot}" in printed
    with Image.open(plot) as image:
        image.load()  # decodes every pixel
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(maxcolors=image.width * image.height)) > 2, "an empty picture"


class SmoothedByMistake(nn.CrossEntropyLoss):
    """A loss that is slightly wrong."""

    def __init__(self) -> None:
        super().__init__(label_smoothing=0.01)


class RightValueWrongGradient(nn.MSELoss):
    """The forward pass alone would not show the error."""

    def forward(self, predicted: torch.Tensor, actual: torch.Tensor) -> torch.Tensor:
        value = super().forward(predicted, actual)
        return value.detach() + 1.01 * (value - value.detach())


@pytest.mark.parametrize(
    ("cross_entropy", "mse"), [(SmoothedByMistake, nn.MSELoss), (nn.CrossEntropyLoss, RightValueWrongGradient)]
)
def test_demo_fails_when_a_loss_is_wrong(
    cross_entropy: type[nn.Module],
    mse: type[nn.Module],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong = SimpleNamespace(CrossEntropyLoss=cross_entropy, MSELoss=mse)
    monkeypatch.setitem(demo.LIBRARIES, "fusedloss", wrong)
    assert demo.main([*FAST, "--plot", str(tmp_path / "demo.png")]) == 1
    printed = capsys.readouterr().out
    assert printed.count("the curves DISAGREE") == 1
    assert printed.count("the curves agree") == 1


def test_a_loss_that_is_not_a_number_disagrees() -> None:
    assert demo.largest_difference([[1.0, float("nan")], [1.0, 2.0]]) == float("inf")
    assert demo.largest_difference([[1.0, 2.2], [1.0, 2.0]]) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--plot", "/no/such/place/demo.png"], "the directory /no/such/place does not exist"),
        (["--sizes", "large"], "'large' is not a size"),
    ],
)
def test_bad_arguments_are_one_sentence(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        demo.main(arguments)
    assert stop.value.code == 2
    last_line = capsys.readouterr().err.strip().splitlines()[-1]
    assert complaint in last_line
