"""Calm runs to hold the others against, one per kind and session."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.chaos.launcher import LONGER, ONE_PIECE, Run, run_job

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


@pytest.fixture(scope="session")
def longer_calm_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The calm run of the longer job, in one piece: it is near to the others, not bitwise equal."""
    run = run_job(tmp_path_factory.mktemp("calm") / "longer", overrides=[LONGER, *ONE_PIECE])
    assert run.exit_code == 0, run.output
    return run
