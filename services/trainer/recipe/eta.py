"""How fast this claim's steps have gone, and so how long the rest will take.

Which rows a step holds is known beforehand, so what is left is counted in tokens, not in steps.
"""

from dataclasses import dataclass

# What a step costs beside its tokens (weights widened, Adam, bookkeeping), as the tokens that take as long.
STEP_TOKENS = 32


@dataclass(slots=True)
class Pace:
    """Steps of one claim: a resumed job may have begun on another machine.

    Attributes:
        cold: the base has just been loaded; its first step, which compiles kernels, counts only until there is another.
    """

    cold: bool = False
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """Count a step.

        Args:
            tokens: real tokens of it.
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
