"""Ends the report with the planted bugs that were caught."""

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List what the tests of planted bugs recorded."""
    caught = [
        value
        for report in terminalreporter.stats.get("passed", [])
        for name, value in report.user_properties
        if name == "planted bug"
    ]
    if caught:
        terminalreporter.section("planted bugs, all caught")
        for line in caught:
            terminalreporter.line(line.splitlines()[0])
