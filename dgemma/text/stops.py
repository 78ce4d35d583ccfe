"""Stop strings in a stream of text."""

from collections.abc import Iterable, Sequence


def partial_suffix(text: str, marks: Iterable[str]) -> int:
    """Characters at the end of `text` that may be the beginning of one of `marks`."""
    longest = 0
    for mark in marks:
        for length in range(min(len(text), len(mark) - 1), longest, -1):
            if text.endswith(mark[:length]):
                longest = length
                break
    return longest


class StopStrings:
    """Passes text on until a stop string is complete; holds back what may yet become one.

    The stop that is complete first wins (of two that end together, the longer), as in a text that is read character by
    character: so the outcome does not depend on where the pieces are cut.
    """

    def __init__(self, stops: str | Sequence[str]):
        self.stops = [stops] if isinstance(stops, str) else list(stops)
        if wrong := [stop for stop in self.stops if not isinstance(stop, str) or not stop]:
            raise ValueError(f"stop {wrong[0]!r}: a text of at least one character is expected")
        self.matched: str | None = None
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """(text to pass on, the stop string that was met or None). After a match nothing passes any more."""
        if self.matched is not None:
            return "", self.matched
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            _, at, self.matched = min(found)
            self._held = ""
            return text[:at], self.matched
        cut = len(text) - partial_suffix(text, self.stops)
        self._held = text[cut:]
        return text[:cut], None

    def finish(self) -> str:
        """What was held back and is not a stop string after all."""
        held, self._held = self._held, ""
        return held
