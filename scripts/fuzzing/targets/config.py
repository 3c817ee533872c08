"""A config.yaml of anything: settings, or one sentence on what is wrong with it."""

from __future__ import annotations

from pathlib import Path

from event_bus.errors import SettingsError
from event_bus.settings import Settings


def seeds() -> list[bytes]:
    return [
        b"source: engine\nenabled: false\n",
        b"events_url: tcp://127.0.0.1:5570\ningress_url: ipc:///tmp/in\ndb: ~/x.db\n",
        b"journal_max_bytes: 1_000\njournal_max_age_s: 60\nspool_max_bytes: 0x10\n",
        b"outbox_max_events: 1.5\noutbox_max_bytes: [1, 2]\n",
        b"a: &a [*a]\n",
        b"? {1: 2}\n: !!python/object:os.system x\n",
        b"when: 2026-01-31\nsource: 2026-01-31 10:00:00\nenabled: 'no'\n",
    ]


class Target:
    def __init__(self, home: Path) -> None:
        self._path = home / "config.yaml"
        self._environ = {"BITTEN_HOME": str(home)}

    def __call__(self, data: bytes) -> None:
        self._path.write_bytes(data)
        try:
            settings = Settings.load(environ=self._environ)
        except SettingsError as e:
            str(e)
        else:
            assert isinstance(settings.db, Path)
            assert isinstance(settings.enabled, bool)
            assert settings.journal_max_bytes > 0
            assert isinstance(settings.source, str)
