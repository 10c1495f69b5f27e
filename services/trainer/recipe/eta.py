"""This claim's throughput, and from it the time that the remaining steps will take (ETA).

The rows of every step are known beforehand, so the remaining work is counted in tokens, not in steps.
"""

from dataclasses import dataclass

# What a step costs beside its tokens (weights dequantised, Adam, bookkeeping), as the tokens that take as long.
STEP_TOKENS = 32


@dataclass(slots=True)
class Throughput:
    """Steps of one claim: a resumed job may have begun on another machine.

    Attributes:
        cold: the base has just been loaded: the first step compiles kernels, and counts only until there is another.
    """

    cold: bool = False
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """Count a step.

        Args:
            tokens: its real (non-pad) tokens.
            seconds: how long it took.
        """
        if self.cold and self.steps == 1:
            self.cold, self.steps, self.tokens, self.seconds = False, 0, 0, 0.0
        self.steps += 1
        self.tokens += tokens
        self.seconds += seconds

    def seconds_for(self, tokens: int, steps: int) -> float | None:
        """Seconds that many tokens in so many steps will take; None before the first step."""
        if self.steps == 0:
            return None
        return self.seconds * (tokens + STEP_TOKENS * steps) / (self.tokens + STEP_TOKENS * self.steps)
