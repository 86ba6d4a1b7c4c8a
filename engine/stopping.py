"""How a run ends before its last step: all processes alike, if one of them has a reason."""

import utils

from .divergence import NOT_FINITE, Divergence
from .interruption import Interruption


class Stopping:
    """Lets the processes vote in every step. The strongest reason wins, and is known to all of them one call later.

    Args:
        interruption: reasons from outside, after which the state is good and worth saving.
        divergence: numbers that are not finite, after which it is not.
    """

    def __init__(self, interruption: Interruption, divergence: Divergence):
        self.interruption = interruption
        self.divergence = divergence
        self.votes = utils.Votes()

    def stop_if_asked(self, wait: bool = False) -> None:
        """Ends the run if a process has a reason.

        Args:
            wait: for the numbers that the device has not computed yet, and for the votes of this call.

        Raises:
            Interrupted: a process was asked to stop.
            FloatingPointError: a number is not finite.
        """
        vote = self.votes.cast(max(self.interruption.vote(), self.divergence.vote(wait)), wait)
        if vote >= NOT_FINITE:
            self.divergence.report()
        self.interruption.obey(vote)

    def stop_if_not_finite(self) -> None:
        """Ends the run if any number so far, of any process, is not finite."""
        if self.votes.cast(self.divergence.vote(wait=True), wait=True) >= NOT_FINITE:
            self.divergence.report()
