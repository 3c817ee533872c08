"""pm2: settings that would kill a drain, run two of a kind, or not come back after a reboot."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from collector.doctor.context import Context
from collector.doctor.finding import CannotTell, Finding, fault, ok, warning

DRAIN_MS = 5_000
"""How long bus and collector may take to finish what they have begun."""

PM2_KILLS_AFTER_MS = 1_600
TIMEOUT_S = 3.0
MANY_RESTARTS = 10
COMMANDS = {"event_bus": "bus", "data_collector": "collect"}
AGAIN = "pm2 delete event_bus data_collector; pm2 start pm2_config.json; pm2 save"


def apps(context: Context) -> Iterator[Finding]:
    home = _pm2_home()
    if _daemon_runs(home):
        listed = [a for a in _listed() if is_ours(a, context.settings.home)]
    else:
        listed = []
    if not listed:
        raise CannotTell("pm2 runs nothing of this home")
    found = [f for app in listed for f in judge_app(app)]
    found += judge_twins(listed)
    found += judge_reboot(listed, _saved(home), is_enabled=_is_enabled_at_boot())
    yield from found or [ok(f"pm2 runs {', '.join(sorted(a['name'] for a in listed))}")]


def _pm2_home() -> Path:
    return Path(os.environ.get("PM2_HOME") or Path.home() / ".pm2")


def _daemon_runs(home: Path) -> bool:
    """Asked first, because every pm2 command starts the daemon."""
    try:
        return psutil.pid_exists(int((home / "pm2.pid").read_text()))
    except (OSError, ValueError):
        return False


def _listed() -> list[dict[str, Any]]:
    if shutil.which("pm2") is None:
        raise CannotTell("pm2 runs, but is not on the PATH")
    said = subprocess.run(
        ["pm2", "jlist"], capture_output=True, text=True, check=False, timeout=TIMEOUT_S
    ).stdout
    try:
        # It may greet first.
        apps = json.loads(said[said.index("[{") :]) if "[{" in said else []
    except ValueError as e:
        raise CannotTell(f"pm2 jlist answers no JSON: {e}") from e
    return [{"name": a["name"], **a["pm2_env"]} for a in apps]


def is_ours(app: Mapping[str, Any], home: Path) -> bool:
    """True for bus and collector of this home, whatever their names."""
    words = app.get("args") or []
    words = words.split() if isinstance(words, str) else [str(w) for w in words]
    if app["name"] not in COMMANDS and not (
        Path(str(app.get("pm_exec_path"))).name == "bitten" and set(words) & {"bus", "collect"}
    ):
        return False
    its_home = app.get("BITTEN_HOME") or (app.get("env") or {}).get("BITTEN_HOME")
    return Path(its_home or Path.home() / ".bitten").resolve() == home.resolve()


def judge_app(app: Mapping[str, Any]) -> Iterator[Finding]:
    name = app["name"]
    kill_timeout = app.get("kill_timeout") or PM2_KILLS_AFTER_MS
    if kill_timeout < DRAIN_MS:
        yield _fault(
            f"pm2 kills {name} {kill_timeout} ms after it is told to stop",
            f"finishing what has arrived may take {DRAIN_MS} ms; what was not acknowledged by then"
            " has to be sent again",
            "set kill_timeout to 15000",
        )
    if app.get("watch"):
        yield _fault(
            f"pm2 watches files of {name}",
            "it restarts it whenever a file changes, and files here change all the time",
            "set watch to false",
        )
    if app.get("exec_mode") == "cluster_mode":
        yield _fault(
            f"pm2 runs {name} in cluster mode",
            "that is for node programs; only one of them can have the ports and the lock",
            "set exec_mode to fork and instances to 1",
        )
    if app.get("autorestart") is False:
        yield _fault(
            f"pm2 does not restart {name}",
            "once it ends, for whatever reason, it stays away",
            "set autorestart to true",
        )
    if app.get("max_memory_restart"):
        yield _warning(
            f"pm2 restarts {name} above {int(app['max_memory_restart']) / 1e6:.0f} MB",
            "memory grows in a burst, which is the worst moment for a restart",
            "leave max_memory_restart out",
        )
    if app.get("cron_restart") not in (None, 0, "0"):
        yield _warning(
            f"pm2 restarts {name} on a schedule ({app['cron_restart']})",
            "there is no need to, and publishers wait meanwhile",
            "leave cron_restart out",
        )
    if not app.get("exp_backoff_restart_delay"):
        yield _warning(
            f"pm2 gives {name} up after a few quick failures",
            "without a growing delay it marks it errored while a disk is full or a port is taken",
            "set exp_backoff_restart_delay to 100",
        )
    if app.get("status") != "online":
        yield fault(
            f"pm2 says that {name} is {app.get('status')}",
            why="it was stopped by hand, or ended too often",
            remedy="see why, then start it",
            command=f"pm2 logs {name} --nostream --lines 20; pm2 restart {name}",
        )
    elif app.get("unstable_restarts", 0) > MANY_RESTARTS:
        yield warning(
            f"pm2 has restarted {name} {app['unstable_restarts']} times in a row",
            why="it ends soon after each start; its log says why",
            remedy="see its log",
            command=f"pm2 logs {name} --nostream --lines 20",
        )


def judge_twins(apps: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    names = [a["name"] for a in apps]
    for name in sorted({n for n in names if names.count(n) > 1}):
        yield _fault(
            f"pm2 runs {names.count(name)} of {name}",
            "only one can have the ports and the lock; the others fail and start again for ever",
            "set instances to 1",
        )
    if "event_bus" in names and "data_collector" not in names:
        yield _fault(
            "pm2 runs the bus, but not the collector",
            "nobody stores events in the database, unless something else runs it",
            "start both",
        )


def judge_reboot(
    apps: Sequence[Mapping[str, Any]], saved: set[str], *, is_enabled: bool | None
) -> Iterator[Finding]:
    """`saved` are the names in pm2's dump; `is_enabled` is None if the machine's init is not
    one whose files we know."""
    missing = sorted({a["name"] for a in apps} - saved)
    if not missing and is_enabled is not False:
        return
    yield warning(
        f"after a reboot pm2 does not start {', '.join(missing) or 'anything'}",
        why="`pm2 save` has not been called since they were started"
        if missing
        else "`pm2 startup` has not been called: no unit of systemd starts pm2",
        remedy="save the list, and let the machine start pm2 (it prints a command to run as root)",
        command="pm2 save; pm2 startup",
    )


def _saved(home: Path) -> set[str]:
    try:
        return {app["name"] for app in json.loads((home / "dump.pm2").read_text())}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _is_enabled_at_boot() -> bool | None:
    if not Path("/run/systemd/system").exists():
        return None
    units = Path("/etc/systemd/system")
    return any(units.glob(f"*.wants/pm2-{getpass.getuser()}.service"))


def _fault(what: str, why: str, remedy: str) -> Finding:
    return fault(what, why=why, remedy=f"{remedy}, as in pm2_config.json", command=AGAIN)


def _warning(what: str, why: str, remedy: str) -> Finding:
    return warning(what, why=why, remedy=f"{remedy}, as in pm2_config.json", command=AGAIN)
