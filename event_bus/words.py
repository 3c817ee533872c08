"""Words for people."""


def events(count: int, verb: str = "") -> str:
    """`1 event waits`, `2 events wait`; `verb` is as of many."""
    noun = f"{count} event" if count == 1 else f"{count} events"
    if verb and count == 1:
        verb = "is" if verb == "are" else f"{verb}s"
    return f"{noun} {verb}".rstrip()
