"""The configuration files for contributors agree with each other, and the C++ sources are formatted."""

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("ruff", "clang-format", "mypy")


def load_yaml(name: str) -> dict:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((ROOT / name).read_text())


@pytest.fixture
def pins() -> dict[str, str]:
    """The version of each tool in the lint extra."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no parser for TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return dict(requirement.split("==") for requirement in project["optional-dependencies"]["lint"])


def test_pre_commit_has_the_versions_of_the_lint_extra(pins):
    assert set(pins) == set(TOOLS)
    hooks = [hook for repo in load_yaml(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    for tool, version in pins.items():
        users = [hook for hook in hooks if hook["entry"].split()[0] == tool]
        assert users, f"no hook calls {tool}"
        for hook in users:
            assert hook["additional_dependencies"] == [f"{tool}=={version}"], hook["id"]


def test_the_workflow_runs_all_checks():
    workflow = load_yaml(".github/workflows/ci.yml")
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML 1.1 reads the key `on` as true
    commands = [step.get("run", "").strip() for job in workflow["jobs"].values() for step in job["steps"]]
    assert ".ci/run" in commands
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_cpp_and_cuda_sources_are_formatted(pins):
    folders = (sysconfig.get_path("scripts"), os.environ.get("PATH", ""))
    program = shutil.which("clang-format", path=os.pathsep.join(folders))
    if program is None:
        pytest.skip("clang-format is not installed")
    printed = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"version (\S+)", printed)
    if version is None or version[1] != pins["clang-format"]:
        pytest.skip(f"another version formats differently: {printed.strip()}, not {pins['clang-format']}")
    suffixes = (".cpp", ".h", ".cu", ".cuh")
    files = [path for folder in ("csrc", "tests") for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
    assert len(files) > 50
    checked = subprocess.run([program, "--dry-run", "-Werror", *files], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr[-2000:]
