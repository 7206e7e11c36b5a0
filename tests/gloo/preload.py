"""What the fork server of these tests imports before it forks ranks: beside what workers need, all
modules of this folder.

A rank would otherwise read, and where no bytecode is kept compile, the test's module and its
helpers, which takes longer than most tests compute.
"""

from __future__ import annotations

import gc
import importlib
import sys
from pathlib import Path

import trainer.preload

HERE = Path(__file__).parent

# As pytest does, under whose names functions are pickled.
sys.path.insert(0, str(HERE))
for path in sorted(HERE.glob("*.py")):
    if path.stem not in ("conftest", Path(__file__).stem):
        importlib.import_module(path.stem)

# What is there now stays: a rank that looked through it for garbage would copy every page of it.
gc.freeze()

__all__ = ["trainer"]
