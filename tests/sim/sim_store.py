"""A simulated store: `elastic.store`'s promises, over a network that keeps nobody's time.

Requests and answers travel; watches tell every change in order, each at its own pace. While the
store is out, or a process is cut off from it, both are waited for. An answer that did not get
through makes the client ask again, so that what it asked for happens twice. Leases end when their
process is dead, stopped or cut off for too long; after an outage they have their whole time again.

Values are the messages themselves: nobody can change them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

from clock import Clock
from sim_process import Process, Wait, Waiter

from elastic.store import AlreadyExists, Guard, GuardFailed, LeaseLost


@dataclass(frozen=True, slots=True)
class Told:
    """One change, as a watch tells it; `value` is None where the key is gone."""

    key: str
    value: Any
    revision: int


@dataclass(slots=True, eq=False)
class SimLease:
    """A lease of `process`. `deadline` is when it ends unless it is renewed; None: it is."""

    process: Process
    seconds: float
    ended: bool = False
    deadline: float | None = None
    lost: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class _Record:
    value: Any
    created: int
    lease: SimLease | None


@dataclass(slots=True, eq=False)
class _Watch:
    process: Process
    prefix: str
    take: Callable[[Told], None]
    waiting: deque[Told] = field(default_factory=deque)
    due: float = 0.0
    ended: bool = False


class SimStore:
    """The store. `observe` is told of every write: its author, what it did, and what was before."""

    def __init__(self, clock: Clock, observe: Callable[[Process, Told, Any], None]) -> None:
        self.revision = 0
        self._clock = clock
        self._observe = observe
        self._records: dict[str, _Record] = {}
        self._history: list[Told] = []
        self._watches: list[_Watch] = []
        self._leases: list[SimLease] = []
        self._cut: set[Process] = set()
        self._out = False
        self._held: list[tuple[Process, Callable[..., None], tuple[Any, ...]]] = []

    def value(self, key: str) -> Any:
        """What is there now, for those who look on."""
        record = self._records.get(key)
        return record.value if record is not None else None

    # Operations, as waits of a task in `process`.

    def get(self, process: Process, key: str) -> Wait:
        """Value of `key`."""
        return self._ask(process, lambda: self.value(key))

    def get_prefix(self, process: Process, prefix: str) -> Wait:
        """All keys under `prefix` with their values, and the revision at which that was so."""

        def read() -> tuple[dict[str, Any], int]:
            found = {k: r.value for k, r in self._records.items() if k.startswith(prefix)}
            return found, self.revision

        return self._ask(process, read)

    def put(
        self,
        process: Process,
        key: str,
        value: Any,
        lease: SimLease | None = None,
        guard: Guard | None = None,
    ) -> Wait:
        """Write `key`. Raises GuardFailed, LeaseLost."""
        return self._ask(process, lambda: self._put(process, key, value, lease, guard))

    def create(
        self,
        process: Process,
        key: str,
        value: Any,
        lease: SimLease | None = None,
        guard: Guard | None = None,
    ) -> Wait:
        """Write `key` if it is free. Raises AlreadyExists, GuardFailed, LeaseLost."""

        def write() -> int:
            self._check(guard)
            if (found := self._records.get(key)) is not None:
                if found.value == value and found.lease is lease:
                    return found.created
                raise AlreadyExists(f"{key} exists already")
            return self._put(process, key, value, lease, guard)

        return self._ask(process, write)

    def delete(self, process: Process, key: str, guard: Guard | None = None) -> Wait:
        """Remove `key`. Raises GuardFailed."""

        def remove() -> None:
            self._check(guard)
            self._remove(process, key)

        return self._ask(process, remove)

    def lease(self, process: Process, seconds: float) -> Wait:
        """A new lease, which its process renews as long as it can."""

        def grant() -> SimLease:
            lease = SimLease(process, seconds)
            self._leases.append(lease)
            if process.dead or process.stopped or process in self._cut:
                self._lapse(lease)
            return lease

        return self._ask(process, grant)

    def revoke(self, lease: SimLease) -> Wait:
        """End a lease now."""
        return self._ask(lease.process, lambda: self._end(lease))

    def watch(
        self, process: Process, prefix: str, after: int | None, take: Callable[[Told], None]
    ) -> Callable[[], None]:
        """Call `take` with every change under `prefix` after that revision; returns its end.

        None: from now on.
        """
        watch = _Watch(process, prefix, take)
        self._watches.append(watch)
        for told in self._history[self.revision if after is None else after :]:
            if told.key.startswith(prefix):
                self._tell(watch, told)

        def end() -> None:
            watch.ended = True
            if watch in self._watches:
                self._watches.remove(watch)

        return end

    # What happens to the store and to those who use it.

    def fall_silent(self) -> None:
        """The store is out: nobody gets an answer."""
        self._out = True

    def answer_again(self) -> None:
        """The store is back. Nobody's lease ended meanwhile."""
        self._out = False
        for lease in self._leases:
            if lease.deadline is not None:
                self._arm(lease, lease.seconds)
        self._release()

    def cut_off(self, process: Process) -> None:
        """`process` and the store do not reach each other any more."""
        self._cut.add(process)
        self.falter(process)

    def reconnect(self, process: Process) -> None:
        """They do again."""
        self._cut.discard(process)
        self.recover(process)

    def falter(self, process: Process) -> None:
        """`process` renews no lease any more: it is dead, stopped or cut off."""
        if process.dead:
            self._watches = [watch for watch in self._watches if watch.process is not process]
        for lease in self._leases:
            if lease.process is process and lease.deadline is None:
                self._lapse(lease)

    def recover(self, process: Process) -> None:
        """`process` renews its leases again, or hears that they are over."""
        if process.dead or process.stopped or process in self._cut:
            return
        for lease in self._leases:
            if lease.process is process:
                lease.deadline = None
        self._release()

    def leases_end(self, lease: SimLease, lost: Callable[[], None]) -> None:
        """Call `lost` once the lease's process knows that it is over."""
        lease.lost = lost
        if lease.ended:
            self._say_lost(lease)

    # Inside.

    def _ask(self, process: Process, operation: Callable[[], Any]) -> Wait:
        clock = self._clock

        def wait(task: Waiter) -> None:
            clock.after(clock.delay(0.1), self._arrive, process, operation, task, task.token)

        return wait

    def reaches(self, process: Process) -> bool:
        """Whether the store and the process hear each other."""
        return not self._out and process not in self._cut

    def _arrive(
        self, process: Process, operation: Callable[[], Any], task: Waiter, token: int
    ) -> None:
        if not self.reaches(process):
            self._held.append((process, self._arrive, (process, operation, task, token)))
            return
        value, error = None, None
        try:
            value = operation()
        except (AlreadyExists, GuardFailed, LeaseLost) as refused:
            error = refused
        clock = self._clock
        clock.after(clock.delay(0.1), self._reply, process, operation, task, token, value, error)

    def _reply(
        self,
        process: Process,
        operation: Callable[[], Any],
        task: Waiter,
        token: int,
        value: Any,
        error: Exception | None,
    ) -> None:
        if not self.reaches(process):
            # The client does not know whether it was heard, and will ask again.
            self._held.append((process, self._arrive, (process, operation, task, token)))
        else:
            task.advance(token, value, error)

    def _release(self) -> None:
        held, self._held = self._held, []
        for process, action, arguments in held:
            if process.dead:
                continue
            if not self.reaches(process):
                self._held.append((process, action, arguments))
            else:
                self._clock.after(self._clock.delay(), action, *arguments)

    def holds(self, guard: Guard) -> bool:
        """Whether the guard's record is still the one it names."""
        record = self._records.get(guard.key)
        return record is not None and record.created == guard.revision

    def _check(self, guard: Guard | None) -> None:
        if guard is not None and not self.holds(guard):
            raise GuardFailed(f"{guard.key} of revision {guard.revision} is gone")

    def _put(
        self, process: Process, key: str, value: Any, lease: SimLease | None, guard: Guard | None
    ) -> int:
        self._check(guard)
        if lease is not None and lease.ended:
            raise LeaseLost(f"{key} was not written: its lease has ended")
        before = self._records.get(key)
        created = before.created if before is not None else self.revision + 1
        self._records[key] = _Record(value, created, lease)
        self._changed(process, key, value, before)
        return self.revision

    def _remove(self, process: Process, key: str) -> None:
        if (before := self._records.pop(key, None)) is not None:
            self._changed(process, key, None, before)

    def _changed(self, process: Process, key: str, value: Any, before: _Record | None) -> None:
        self.revision += 1
        told = Told(key, value, self.revision)
        self._history.append(told)
        self._observe(process, told, before.value if before is not None else None)
        for watch in self._watches:
            if key.startswith(watch.prefix):
                self._tell(watch, told)

    def _tell(self, watch: _Watch, told: Told) -> None:
        watch.waiting.append(told)
        clock = self._clock
        watch.due = max(watch.due, clock.now + clock.delay())
        clock.after(watch.due - clock.now, self._deliver, watch)

    def _deliver(self, watch: _Watch) -> None:
        if not self.reaches(watch.process):
            self._held.append((watch.process, self._deliver, (watch,)))
        else:
            watch.process.call(self._take, watch, watch.waiting.popleft())

    def _take(self, watch: _Watch, told: Told) -> None:
        if not watch.ended:
            watch.take(told)

    def _lapse(self, lease: SimLease) -> None:
        # It was renewed at some time in the last third.
        self._arm(lease, lease.seconds * (1 - self._clock.rng.random() / 3))

    def _arm(self, lease: SimLease, seconds: float) -> None:
        lease.deadline = self._clock.now + seconds
        self._clock.after(seconds, self._expire, lease, lease.deadline)

    def _expire(self, lease: SimLease, deadline: float) -> None:
        if lease.deadline == deadline and not self._out:
            self._clock.tell("the lease of %s ends", lease.process.name)
            self._end(lease)

    def _end(self, lease: SimLease) -> None:
        if lease.ended:
            return
        lease.ended, lease.deadline = True, None
        self._leases.remove(lease)
        for key in [key for key, record in self._records.items() if record.lease is lease]:
            self._remove(lease.process, key)
        self._say_lost(lease)

    def _say_lost(self, lease: SimLease) -> None:
        if lease.lost is not None:
            self._clock.after(self._clock.delay(0.7), self._hear_lost, lease)

    def _hear_lost(self, lease: SimLease) -> None:
        process = lease.process
        if process.stopped or not self.reaches(process):
            # It hears of it some time after it asks again, and may act as before until then.
            self._held.append((process, self._say_lost, (lease,)))
        elif lease.lost is not None:
            process.call(lease.lost)


def create_when_free(
    store: SimStore, process: Process, key: str, value: Any, lease: SimLease
) -> Generator[Wait, Any, int]:
    """`elastic.leadership.create_when_free`: wait for the key's end, as often as needed."""
    gone: deque[int] = deque()
    waiting: list[tuple[Waiter, int]] = []

    def take(told: Told) -> None:
        if told.key == key and told.value is None:
            if waiting:
                task, token = waiting.pop()
                task.advance(token)
            else:
                gone.append(told.revision)

    def until_gone(task: Waiter) -> None:
        if gone:
            gone.popleft()
            task.advance(task.token)
        else:
            waiting.append((task, task.token))

    end = store.watch(process, key, None, take)
    try:
        while True:
            try:
                created: int = yield store.create(process, key, value, lease)
                return created
            except AlreadyExists:
                yield until_gone
    finally:
        end()
