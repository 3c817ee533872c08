"""One target under libFuzzer: worker.py NAME [libFuzzer's options] [corpus or one case]."""

from __future__ import annotations

import importlib
import logging
import sys
import tempfile
from pathlib import Path

import atheris

SCRATCH = Path("/dev/shm")
"""Homes of targets that write files: in memory, because a case is no test of the disk."""


def main() -> None:
    name = sys.argv.pop(1)
    logging.disable(logging.CRITICAL)  # a million warnings about garbage
    with atheris.instrument_imports(include=["event_bus", "collector"]):
        module = importlib.import_module(f"targets.{name}")
    scratch = SCRATCH if SCRATCH.is_dir() else None
    with tempfile.TemporaryDirectory(dir=scratch, prefix="bitten-fuzz-") as home:
        target = module.Target(Path(home))
        corpus = Path(sys.argv[-1])
        if corpus.is_dir():
            for number, seed in enumerate(module.seeds()):
                (corpus / str(number)).write_bytes(seed)
        atheris.Setup(sys.argv, target)
        atheris.Fuzz()


main()
