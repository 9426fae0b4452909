"""Whether a dead engine is started again, and after how long."""

from dataclasses import dataclass

# The pause before the first restart; it doubles with each death that follows, up to the last.
FIRST_PAUSE_S = 0.1
LAST_PAUSE_S = 30.0
# An engine that has served for so long starts a new count.
STEADY_S = 60.0


@dataclass(slots=True)
class Restarts:
    """Counts the deaths that had no steady service between them."""

    max_restarts: int
    num_deaths: int = 0
    # When the present engine began to serve; None until it does.
    serving_since_s: float | None = None

    def serve(self, now_s: float) -> None:
        """The engine takes requests from now on."""
        self.serving_since_s = now_s

    def die(self, now_s: float) -> float | None:
        """The engine has died: the pause before the next one, or None for giving up."""
        since_s, self.serving_since_s = self.serving_since_s, None
        if since_s is not None and now_s - since_s >= STEADY_S:
            self.num_deaths = 0
        self.num_deaths += 1
        if self.num_deaths > self.max_restarts:
            return None
        return float(min(FIRST_PAUSE_S * 2 ** (self.num_deaths - 1), LAST_PAUSE_S))
