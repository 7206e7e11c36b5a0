"""Calm runs to hold the others against, one per precision and session."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.chaos.launcher import Run, run_job

CalmRuns = Callable[[str], Run]


@pytest.fixture(scope="session")
def calm_run(tmp_path_factory: pytest.TempPathFactory) -> CalmRuns:
    """Gives the calm run of a dtype, running it on first use."""
    known: dict[str, Run] = {}

    def run(dtype: str) -> Run:
        if dtype not in known:
            directory = tmp_path_factory.mktemp("calm") / dtype
            known[dtype] = run_job(directory, overrides=[f"train.dtype={dtype}"])
            assert known[dtype].exit_code == 0, known[dtype].output
        return known[dtype]

    return run
