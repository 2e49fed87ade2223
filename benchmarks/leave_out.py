"""A pytest plugin: skips a test file that imports a package which is not installed, and reports the package."""

import re
from collections.abc import Generator

import pytest

OUR_OWN = ("fusedloss", "benchmarks")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    missing = re.search(r"ModuleNotFoundError: No module named '(\w+)", str(report.longrepr))
    if report.failed and missing and missing[1] not in OUR_OWN:
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 1, f"Skipped: {missing[1]} is not installed")
    return report
