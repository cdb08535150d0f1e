"""How long a run still takes, in an artist's words."""

from __future__ import annotations


class TimeLeft:
    """How long the rest takes, from the steps of this run so far; what lies between sections counts in."""

    def __init__(self, total: int):
        self.total = total
        self.first: tuple[int, float] | None = None
        self.seconds: float | None = None

    def see(self, done: int, now: float) -> None:
        """done: steps of `total` that are behind. The first one seen only starts the clock: it loads the model."""
        if self.first is None:
            self.first = done, now
        elif done > self.first[0]:
            self.seconds = (now - self.first[1]) / (done - self.first[0]) * (self.total - done)

    def words(self) -> str:
        """For the node; empty while nothing is known."""
        return "" if self.seconds is None else f"about {duration(self.seconds)} left"


def duration(seconds: float) -> str:
    """A time as an artist says it: '40 s', '3 min', '2 h 5 min'."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
