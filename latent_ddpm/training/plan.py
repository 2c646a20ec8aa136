"""The plan of a stage with train_minutes: its lengths, and how they follow from the time that steps take."""

import dataclasses
import math
from itertools import pairwise
from typing import Any

MOST_CHANGE = 2.0  # of the steps that are left, at one correction
LEAST_SHARE = 0.05  # of the time has to pass before the first correction


@dataclasses.dataclass
class Plan:
    """The lengths of a stage, and the times that they follow from.

    Attributes:
        keys: of the config, with their values.
        seconds: that the stage may take, from the start of its process.
        seconds_after: that it takes after its last step, further chapters included.
        phases: the first step of each phase, from 0 on, and the seconds of a step in it, with its share of what recurs.
    """

    keys: dict[str, Any]
    seconds: float
    seconds_after: float
    phases: list[tuple[int, float]]

    def expected(self, first: int, last: float) -> float:
        """Seconds of the steps from `first` on, below `last`."""
        ends = pairwise([*self.phases, (math.inf, 0.0)])
        return sum(each * max(0.0, min(last, end) - max(first, start)) for (start, each), (end, _) in ends)

    def steps_within(self, first: int, seconds: float) -> int:
        """How many steps from `first` on fit so many seconds, rounded."""
        done: float = first
        for (_, each), (end, _) in pairwise([*self.phases, (math.inf, 0.0)]):
            if end <= done:
                continue
            fitting = seconds / each
            if done + fitting <= end:
                return max(0, round(done + fitting) - first)
            seconds -= each * (end - done)
            done = end
        raise AssertionError("the last phase does not end")

    def corrected(self, step: int, steps: int, since_first_step: float, since_start: float) -> int:
        """The number of steps that fits the time, by the time that the steps so far have taken.

        What is left is expected to be slower or faster than planned as the steps so far were. A phase that is planned
        is reached, and the steps that are left change at most by a factor of MOST_CHANGE.

        Args:
            step: steps done.
            steps: of the whole run, as planned so far.
            since_first_step: seconds since the first step began.
            since_start: seconds since the process was started.
        """
        if since_start < LEAST_SHARE * self.seconds:
            return steps
        ratio = since_first_step / self.expected(0, step)
        left = max(0.0, self.seconds - since_start - ratio * self.seconds_after)
        rest = self.steps_within(step, left / ratio)
        rest = round(min(max(rest, (steps - step) / MOST_CHANGE), (steps - step) * MOST_CHANGE))
        return max(step + max(1, rest), self.phases[-1][0] + 1)
