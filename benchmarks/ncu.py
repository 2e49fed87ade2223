"""`python -m benchmarks.ncu FILE`: prints one line per kernel of what Nsight Compute wrote (ncu --csv --page raw)."""

import csv
import re
import sys
from pathlib import Path

from .kernels import short_name

# Each tuple lists the names of one metric in different versions of Nsight Compute. The first that is present is used.
DURATION = ("gpu__time_duration.sum",)
DRAM = (
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
)
OCCUPANCY = ("sm__warps_active.avg.pct_of_peak_sustained_active",)
REGISTERS = ("launch__registers_per_thread",)
ISSUE = ("smsp__issue_active.avg.pct_of_peak_sustained_active", "sm__inst_issued.avg.pct_of_peak_sustained_active")
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
TOP_STALLS = 3
TO_MICROSECONDS = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3}


def lines(text: str) -> list[str]:
    """Parse the header, the units and a row for each kernel. Lines without quotes are messages of ncu."""
    header, units, *rows = [*csv.reader(line for line in text.splitlines() if line.startswith('"')), [], []]
    unit_of = dict(zip(header, units, strict=False))
    return [line(dict(zip(header, row, strict=True)), unit_of) for row in rows if row]


def line(row: dict[str, str], unit_of: dict[str, str]) -> str:
    def found(names: tuple[str, ...]) -> str | None:
        return next((name for name in names if row.get(name)), None)

    def shown(names: tuple[str, ...]) -> str:
        name = found(names)
        return f"{number(row[name]):.0f}" if name else "-"

    duration = found(DURATION)
    microseconds = f"{number(row[duration]) * TO_MICROSECONDS[unit_of[duration]]:.1f}" if duration else "-"
    stalls = {match[1]: number(value) for name, value in row.items() if (match := STALL.fullmatch(name)) and value}
    top = sorted(((value, name) for name, value in stalls.items() if "not_issued" not in name), reverse=True)
    return (
        f"{short_name(row['Kernel Name'])} {size(row['Grid Size'])} of {size(row['Block Size'])}: {microseconds}us, "
        f"DRAM {shown(DRAM)}%, occupancy {shown(OCCUPANCY)}%, registers {shown(REGISTERS)}, issue {shown(ISSUE)}%, "
        f"stalls {', '.join(f'{name} {value:.1f}' for value, name in top[:TOP_STALLS]) or '-'}"
    )


def size(text: str) -> str:
    """Return `(8192, 1, 1)` as 8192."""
    return "x".join(part for part in re.findall(r"\d+", text) if part != "1") or "1"


def number(text: str) -> float:
    return float(text.replace(",", ""))


if __name__ == "__main__":
    print("\n".join(lines(Path(sys.argv[1]).read_text())) or "no kernel was profiled")
