"""Python runs this first in every process of a drill that injects a fault.

Product code knows nothing of it: the drill puts this directory on PYTHONPATH and names the fault
in DRILL_FAULT, so that the daemons start by their own command lines, `bitten up` included.
"""

import os
import sys
from pathlib import Path

if os.environ.get("DRILL_FAULT"):
    sys.path.append(str(Path(__file__).parent.parent))
    import faults

    faults.arm(os.environ["DRILL_FAULT"])
