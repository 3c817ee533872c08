"""Every drill there is: importing a theme puts its drills into the table."""

import backups
import duplicates
import exits
import hangs
import kills
import later
import pm2
import power
import soak
import storms
import subscribers
import windows
from harness import DRILLS

THEMES = (
    backups,
    duplicates,
    exits,
    hangs,
    kills,
    later,
    pm2,
    power,
    soak,
    storms,
    subscribers,
    windows,
)

__all__ = ["DRILLS", "THEMES"]
