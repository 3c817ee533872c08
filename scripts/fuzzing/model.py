"""The machine of tests/test_model.py at length: model.py EXAMPLES SEED, in the directory tests."""

from __future__ import annotations

import sys
from pathlib import Path

from hypothesis import seed
from hypothesis.stateful import run_state_machine_as_test

sys.path.insert(0, str(Path.cwd()))
from test_model import BusMachine, sizes

settings = sizes(max_examples=int(sys.argv[1]), database=None)
run_state_machine_as_test(seed(int(sys.argv[2]))(BusMachine), settings=settings)
