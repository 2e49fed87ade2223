"""Each script in examples/ runs to its end, and prints what its docstring says."""

import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.nn.functional as F

import fusedloss

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
NUMBER = r"(\d+\.\d+)"


def numbers(pattern: str, printed: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, printed)]


def check_drop_in(printed: str) -> None:
    torchs = numbers(rf"(?m)^ +\d+  {NUMBER}", printed)
    ours = numbers(rf"(?m)^ +\d+  \S+  {NUMBER}$", printed)
    assert len(torchs) == 10 and ours == pytest.approx(torchs, rel=1e-3)
    assert ours[-1] < 0.9 * ours[0]
    assert "the curves agree" in printed


def check_custom_loss(printed: str) -> None:
    for q in (0.9, 0.1):
        first, _, last = numbers(rf"q = {q}, step +\d+: loss {NUMBER}", printed)
        assert last < 0.5 * first
        (below,) = numbers(rf"q = {q}: (\d+)% of the targets", printed)
        assert below == pytest.approx(100 * q, abs=5)  # the minimum of the pinball loss is that quantile


def check_patch_transformers(printed: str) -> None:
    (torchs,) = numbers(rf"torch: loss {NUMBER}, computed by NllLossBackward0", printed)
    ours = numbers(rf"step \d: loss {NUMBER}, computed by .*fusedloss.*CrossEntropy", printed)
    assert len(ours) == 5 and ours[0] == pytest.approx(torchs, rel=1e-3)
    assert ours[-1] < 0.9 * ours[0]
    patched = re.search("patched: (.*)", printed)
    assert patched and sorted(patched[1].split(", ")) == sorted(fusedloss.functional.__all__)
    assert "patched afterwards: none" in printed


CHECKS: dict[str, Callable[[str], None]] = {
    "custom_loss": check_custom_loss,
    "drop_in": check_drop_in,
    "patch_transformers": check_patch_transformers,
}
NEEDS = {"patch_transformers": "transformers"}


def test_every_example_is_found() -> None:
    assert {path.stem for path in SCRIPTS} >= set(CHECKS)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_example(script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The example runs in this process, since importing torch again would take most of the time. An example without a
    check of its own must run, print something, and leave torch's functions in place."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # nothing is downloaded
    if script.stem in NEEDS:
        pytest.importorskip(NEEDS[script.stem])
    before = {name: getattr(F, name) for name in fusedloss.functional.__all__}
    found = runpy.run_path(str(script), run_name="__main__")
    assert {name: getattr(F, name) for name in before} == before
    assert f"python examples/{script.name}" in found["__doc__"]  # tells how to run it
    printed = capsys.readouterr().out
    assert printed
    if script.stem in CHECKS:
        CHECKS[script.stem](printed)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_an_import_runs_nothing(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if script.stem in NEEDS:
        pytest.importorskip(NEEDS[script.stem])
    runpy.run_path(str(script), run_name="imported")
    assert capsys.readouterr().out == ""
