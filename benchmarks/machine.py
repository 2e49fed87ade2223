"""Where the figures came from. A time means nothing without its machine, torch version and commit."""

import os
import platform
import shlex
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import fusedloss

from .contention import usable_cores

ROOT = Path(__file__).resolve().parent.parent
THP = Path("/sys/kernel/mm/transparent_hugepage")


def describe() -> dict[str, Any]:
    """Everything needed to judge or repeat a run, without the names of the host and its user."""
    return {
        "date": now(),
        "commit": commit(),
        "machine": {
            "cpu": cpu_model(),
            "cores": len(usable_cores()),
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "os": platform.platform(),
        },
        "software": {
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "fusedloss": getattr(fusedloss, "__version__", None),
            "python": platform.python_version(),
            "compiler": first_line(*shlex.split(os.environ.get("CXX", "c++")), "--version"),
        },
        # A large case spends much of its time in new memory. How the memory is mapped decides how much.
        "memory_mapping": {
            "thp_enabled": read_line(THP / "enabled"),
            "thp_defrag": read_line(THP / "defrag"),
            "THP_MEM_ALLOC_ENABLE": os.environ.get("THP_MEM_ALLOC_ENABLE"),
        },
    }


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def summary(description: dict[str, Any]) -> str:
    """The line above the table."""
    machine, software = description["machine"], description["software"]
    where = machine["gpu"] or machine["cpu"]
    return f"{where} · {machine['threads']} threads · torch {software['torch']} · Python {software['python']}"


def commit() -> dict[str, Any]:
    """The commit, from git or else from FUSEDLOSS_COMMIT, and whether files differ from it."""
    head = first_line("git", "-C", str(ROOT), "rev-parse", "--verify", "HEAD") or os.environ.get("FUSEDLOSS_COMMIT")
    changes = run("git", "-C", str(ROOT), "status", "--porcelain")
    return {"hash": head, "dirty": None if changes is None else bool(changes)}


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def run(*command: str) -> str | None:
    """Return what the command printed, or None if it failed or does not exist."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def first_line(*command: str) -> str | None:
    lines = (run(*command) or "").splitlines()
    return lines[0] if lines else None


def read_line(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
