"""The one bridge of this process, made so that importing it never fails."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import sys
from pathlib import Path
from typing import Any

from event_bus.bridge import Bridge
from event_bus.settings import Settings

log = logging.getLogger("event_bus.bridge")


@functools.cache
def process_bridge() -> Bridge:
    """The one bridge of this process."""
    settings = _usable_settings()
    if not settings.source:
        settings = dataclasses.replace(settings, source=_script_name())
    try:
        return Bridge(settings)
    except Exception as e:  # noqa: BLE001 - an import must not fail; own schemas are what may
        log.error("%s: %s; the bridge goes on without it", settings.schemas, e)
        return Bridge(settings, own_types=False)


def _usable_settings() -> Settings:
    """Settings; those that cannot be used are logged and left out: an import must not fail."""
    try:
        return Settings.load()
    except Exception as e:  # noqa: BLE001 - also what pathlib raises without a home directory
        log.error("%s; the bridge goes on without this setting", e)
    usable: dict[str, str] = {}
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Settings):
        variable = f"BITTEN_{field.name.upper()}"
        text = os.environ.get(variable)
        with contextlib.suppress(Exception):
            if text:
                values[field.name] = field.metadata["parse"](text)
                usable[variable] = text
    if "home" not in values:
        values["home"] = Path(os.path.expanduser("~/.bitten")).absolute()  # noqa: PTH111 - no raise
        usable["BITTEN_HOME"] = str(values["home"])
    try:
        return Settings.load(environ=usable)
    except Exception:  # noqa: BLE001 - then it is config.yaml that cannot be used
        return Settings(**values)


def _script_name() -> str:
    """What the running process is called: pm2's name for it, or the script's."""
    name = os.environ.get("name") if "pm_id" in os.environ else None  # noqa: SIM112
    script = Path(sys.argv[0] if sys.argv else "")
    stem = script.parent.name if script.name == "__main__.py" else script.stem
    return name or ("python" if stem in ("", "-", "-c", "-m") else stem)
