"""Row 29: there is nothing to run it on yet, and the list says so."""

from __future__ import annotations

from harness import NotRun, Trial, drill


@drill(
    row=29,
    name="dashboard",
    fault="foreign Host and Origin, traversal, ATTACH, PRAGMA, endless queries in the SQL page",
    long="not yet",
    plant="none yet",
    breaks="none yet",
)
def dashboard(trial: Trial) -> None:
    raise NotRun("there is no dashboard yet")
