"""The queue in front of work that runs one at a time: seats for each visitor, and turns in a fair order.

A page has one model. Who may wait for it, and who is next, is decided here and not by gradio's queue, which is one line
for everybody: there, whoever sends most is served most.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from lowmem.errors import Cancelled, NotAllowed
from lowmem.events import CancelToken, Step
from lowmem.messages import msg
from lowmem.ui.service.access import Visitor

E = TypeVar("E")

SEATS, SEATS_PER_ADDRESS, SEATS_PER_VISITOR = 128, 64, 3
"""Most actions that run or wait: of all, of one address (a class behind one router), of one visitor."""

TURN_SECONDS = 600.0
"""A visitor's action may take longer than this only while nobody else waits."""

TICK_SECONDS = 0.1


@dataclass(eq=False, slots=True)
class _Seat:
    visitor: Visitor
    cancel: CancelToken
    since: float = 0.0  # when its turn began
    over: bool = False  # its turn has been ended for others
    called: threading.Event = field(default_factory=threading.Event)


class Lane:
    """One action at a time. Thread-safe.

    Visitors take turns, each with the action that they sent first; and after an action from one address comes one from
    another, if any waits. So neither many actions of one visitor nor many visitors at one address make others wait
    for more than one action.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[Visitor, deque[_Seat]] = {}  # in the order of their turns
        self._running: _Seat | None = None
        self._served = ""  # the address that was served last

    def in_turn(self, visitor: Visitor, events: Iterator[E], cancel: CancelToken) -> Iterator[E | Step]:
        """Pass `events` on once it is the visitor's turn; until then, steps say at which place it waits.

        Raises:
            NotAllowed: the visitor, the address or the page has no free seat; or the turn was too long.
            Cancelled: while it waited.
        """
        seat = self._join(_Seat(visitor, cancel))
        try:
            yield from self._until_called(seat)
            yield from events
        except Cancelled:
            if not seat.over:
                raise
            raise NotAllowed(
                msg(
                    "The action was ended after {minutes:.0f} minutes, because others wait.", minutes=TURN_SECONDS / 60
                ),
                msg("Ask for less at a time."),
            ) from None
        finally:
            self._leave(seat)

    def _join(self, seat: _Seat) -> _Seat:
        with self._lock:
            if seat.visitor.address:  # not the owner
                self._refuse(seat.visitor)
            self._waiting.setdefault(seat.visitor, deque()).append(seat)
            self._call_next()
        return seat

    def _refuse(self, visitor: Visitor) -> None:
        taken = [seat.visitor for seat in self._seats()]
        if taken.count(visitor) >= SEATS_PER_VISITOR:
            raise NotAllowed(
                msg("{count} of your actions run or wait already.", count=SEATS_PER_VISITOR),
                msg("Wait for one of them, or stop it."),
            )
        if sum(one.address == visitor.address for one in taken) >= SEATS_PER_ADDRESS:
            raise NotAllowed(
                msg("{count} actions from your address run or wait already.", count=SEATS_PER_ADDRESS),
                msg("Try again in a minute."),
            )
        if len(taken) >= SEATS:
            raise NotAllowed(msg("{count} actions run or wait already.", count=SEATS), msg("Try again in a minute."))

    def _seats(self) -> list[_Seat]:
        """All of them: the running one, then the others in the order of their turns."""
        seats, served = [self._running] if self._running else [], self._served
        waiting = {visitor: deque(own) for visitor, own in self._waiting.items()}
        while waiting:
            seat = _next(waiting, served)
            served = seat.visitor.address
            seats.append(seat)
        return seats

    def _call_next(self) -> None:
        if self._running is None and self._waiting:
            self._running = seat = _next(self._waiting, self._served)
            self._served, seat.since = seat.visitor.address, time.monotonic()
            seat.called.set()

    def _until_called(self, seat: _Seat) -> Iterator[Step]:
        place = -1
        while not seat.called.wait(TICK_SECONDS):
            seat.cancel.check()
            with self._lock:
                self._end_long_turn()
                seats = self._seats()
                before, place = place, seats.index(seat)
            if place != before and place > 0:
                yield Step(
                    0, 0, msg("Waiting: place {place} of {waiting} in the queue", place=place, waiting=len(seats) - 1)
                )
        seat.cancel.check()

    def _end_long_turn(self) -> None:
        """Called by those who wait."""
        running = self._running
        if running and running.visitor.address and time.monotonic() - running.since > TURN_SECONDS:
            running.over = True
            running.cancel.set()

    def _leave(self, seat: _Seat) -> None:
        with self._lock:
            if self._running is seat:
                self._running = None
            elif own := self._waiting.get(seat.visitor):
                own.remove(seat)
                if not own:
                    del self._waiting[seat.visitor]
            self._call_next()


def _next(waiting: dict[Visitor, deque[_Seat]], served: str) -> _Seat:
    """Take the seat whose turn it is; its visitor goes to the end."""
    visitor = next((one for one in waiting if one.address != served), next(iter(waiting)))
    own = waiting.pop(visitor)
    seat = own.popleft()
    if own:
        waiting[visitor] = own
    return seat
