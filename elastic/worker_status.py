"""What an agent keeps of its workers' words, for a controller that did not hear them.

Pure. Words of the past are gone once the next are written, so each worker's are summed up.
"""

from __future__ import annotations

from msgspec.structs import replace

from elastic.messages import (
    ConnectionLost,
    FaultFired,
    PhaseDone,
    RecoveryPhase,
    StepDone,
    WorkerStatus,
)
from elastic.topology import Member

Word = PhaseDone | ConnectionLost | StepDone | FaultFired
"""What a worker says that the controller or the journal wants to know."""


def fresh_status(member: Member) -> WorkerStatus:
    """The status of a worker that has said nothing yet."""
    return WorkerStatus(member, 0, (), False, -1)


def summed_up(status: WorkerStatus, word: Word) -> WorkerStatus:
    """The status after one more word of the worker."""
    match word:
        case PhaseDone():
            phases = (*_phases(status, word.generation), word.phase)
            return replace(status, generation=word.generation, phases=phases, broken=False)
        case ConnectionLost():
            phases = _phases(status, word.generation)
            return replace(status, generation=word.generation, phases=phases, broken=True)
        case StepDone():
            return replace(status, committed=word.step)
        case FaultFired():
            return status


def is_awaited(word: Word) -> bool:
    """Whether the word is to be written at once, and not with what else is said for a while.

    A worker says of a step that it is awaited if it is the first or the last rank, which speak for
    all (see `elastic.step_log`), if the step is the job's last, or if its weights were digested.
    What others commit beside that is asked for when a generation ends, and comes with its reports;
    of a worker that died it may be missing.
    """
    return not isinstance(word, StepDone) or word.awaited


def _phases(status: WorkerStatus, generation: int) -> tuple[RecoveryPhase, ...]:
    return status.phases if status.generation == generation else ()
