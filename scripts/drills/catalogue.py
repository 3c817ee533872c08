"""Every drill there is: importing a theme puts its drills into the table."""

import backups
import clocks
import damage
import duplicates
import exits
import files
import hangs
import kills
import later
import network
import pm2
import poison
import power
import readers
import refusals
import soak
import space
import storms
import subscribers
import windows
from harness import DRILLS

THEMES = (
    backups,
    clocks,
    damage,
    duplicates,
    exits,
    files,
    hangs,
    kills,
    later,
    network,
    pm2,
    poison,
    power,
    readers,
    refusals,
    soak,
    space,
    storms,
    subscribers,
    windows,
)

__all__ = ["DRILLS", "THEMES"]
