"""Row 27: pm2 stops, restarts and reloads the daemons under load."""

from __future__ import annotations

import json
import time

from harness import Trial, drill
from pm2_home import Pm2
from system import wait_until

FAREWELL = {"event_bus": "stopped at seq", "data_collector": "events stored since the start"}
ACTIONS = ("reload", "restart", "stop")


@drill(
    row=27,
    name="pm2",
    fault="pm2 reload, restart, stop and start",
    long="100 times",
    needs=("pm2",),
    plant="a kill_timeout of 20 ms",
    breaks="was killed at",
)
def pm2(trial: Trial) -> None:
    pm2 = Pm2(trial.system, trial.directory / "checkout")
    if trial.planted:
        config = pm2.directory / "pm2_config.json"
        apps = json.loads(config.read_text())
        for app in apps["apps"]:
            app["kill_timeout"] = 20
        config.write_text(json.dumps(apps))
    pm2("start", "pm2_config.json")
    try:
        _cycle(trial, pm2)
    finally:
        pm2("kill")
    trial.check()


def _cycle(trial: Trial, pm2: Pm2) -> None:
    load = trial.publish()
    wait_until(lambda: trial.next_stored(0.0), "the first event is stored")
    slowest_s = 0.0
    cycles = trial.count(3, 100)
    for i in range(cycles):
        name, action = list(FAREWELL)[i % 2], ACTIONS[i % 3]
        before = pm2.logs().count(FAREWELL[name])
        begin = time.monotonic()
        try:
            pm2(action, name)
        except AssertionError as e:
            trial.breach(f"`pm2 {action} {name}` failed: {e}")
        slowest_s = max(slowest_s, time.monotonic() - begin)
        said = pm2.logs().count(FAREWELL[name]) - before
        trial.expect(said == 1, f"{name} was killed at `pm2 {action}`")
        if action == "stop":
            pm2("start", name)
        at = time.time()
        wait_until(lambda at=at: trial.next_stored(at), "events are stored again")
    load.stop()
    trial.wait_all_stored()
    trial.note("cycles", cycles)
    trial.note("slowest pm2 command s", f"{slowest_s:.1f}")
    states = {name: app["pm2_env"]["status"] for name, app in pm2.apps().items()}
    trial.expect(set(states.values()) == {"online"}, f"in the end pm2 has them as {states}")
