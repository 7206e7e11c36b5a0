"""The moments at which the parts of a host do what they do at intervals.

Pure. Heartbeats, an agent's looks and a controller's ticks fall on multiples of their intervals of
the host's monotonic clock, which all of its processes share. So they come together: an agent wakes
once for all of its workers, and what the workers lose to it they lose at the same moment, not one
after the other while the rest wait in a collective (as Petrini et al. 2003, "The Case of the
Missing Supercomputer Performance", found for the daemons of compute nodes).
"""

from __future__ import annotations


def seconds_to_next(interval_seconds: float, now: float) -> float:
    """From `now` (of the monotonic clock, in seconds) to the next multiple of the interval.

    More than 0, and at most the interval.
    """
    return interval_seconds - now % interval_seconds
