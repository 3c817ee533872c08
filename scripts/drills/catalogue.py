"""Every drill there is: importing a theme puts its drills into the table."""

import backups
import duplicates
import kills
import power
import soak
import subscribers
import windows
from harness import DRILLS

__all__ = ["DRILLS", "backups", "duplicates", "kills", "power", "soak", "subscribers", "windows"]
