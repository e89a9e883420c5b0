"""Who waits for the model and who is next, when somebody sends more than others."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from lowmem.errors import Cancelled, NotAllowed
from lowmem.events import CancelToken, Step
from lowmem.ui.service import lane as lanes
from lowmem.ui.service.access import OWNER, Visitor
from lowmem.ui.service.lane import SEATS, SEATS_PER_ADDRESS, SEATS_PER_VISITOR, Lane


class Queue:
    """A lane whose first action ends when told; those after it record their order."""

    def __init__(self) -> None:
        self.lane, self.order, self.refused = Lane(), list[Visitor](), list[str]()
        self.release, self.threads = threading.Event(), list[threading.Thread]()
        self._send(Visitor("first", "first"), self._held())
        while self.lane._running is None:
            time.sleep(0.01)

    def _held(self) -> Iterator[str]:
        self.release.wait(20)
        yield "done"

    def send(self, visitor: Visitor, cancel: CancelToken | None = None) -> None:
        before = len(self.lane._seats()) + len(self.refused)
        self._send(visitor, self._recorded(visitor), cancel)
        while len(self.lane._seats()) + len(self.refused) == before:
            time.sleep(0.002)

    def _recorded(self, visitor: Visitor) -> Iterator[str]:
        self.order.append(visitor)
        yield "done"

    def _send(self, visitor: Visitor, events: Iterator[str], cancel: CancelToken | None = None) -> None:
        def run() -> None:
            try:
                for _ in self.lane.in_turn(visitor, events, cancel or CancelToken()):
                    pass
            except (NotAllowed, Cancelled) as error:
                self.refused.append(error.message)

        self.threads.append(threading.Thread(target=run, daemon=True))
        self.threads[-1].start()

    def finish(self) -> list[Visitor]:
        self.release.set()
        for thread in self.threads:
            thread.join(20)
        return self.order


def test_one_visitor_takes_few_seats() -> None:
    queue = Queue()
    for _ in range(10):
        queue.send(Visitor("1.1.1.1", "greedy"))
    queue.send(Visitor("1.1.1.1", "other"))
    assert len(queue.refused) == 10 - SEATS_PER_VISITOR
    assert queue.refused[0] == f"{SEATS_PER_VISITOR} of your actions run or wait already."
    assert queue.finish()[1] == Visitor("1.1.1.1", "other")


def test_one_address_does_not_fill_the_queue() -> None:
    queue = Queue()
    for number in range(SEATS):
        queue.send(Visitor("1.1.1.1", f"page {number}"))
    assert len(queue.refused) == SEATS - SEATS_PER_ADDRESS
    queue.send(Visitor("2.2.2.2", "somebody"))
    queue.send(OWNER)
    assert len(queue.refused) == SEATS - SEATS_PER_ADDRESS
    order = queue.finish()
    assert len(order) == SEATS_PER_ADDRESS + 2
    assert order.index(Visitor("2.2.2.2", "somebody")) <= 2
    assert order.index(OWNER) <= 4


def test_a_class_behind_one_address_has_a_seat_each() -> None:
    queue = Queue()
    pupils = [Visitor("1.1.1.1", f"pupil {number}") for number in range(32)]
    for pupil in [*pupils, *pupils]:
        queue.send(pupil)
    assert not queue.refused
    assert queue.finish() == [*pupils, *pupils]


def test_those_who_wait_see_their_place_and_may_stop() -> None:
    queue, cancel = Queue(), CancelToken()
    queue.send(Visitor("1.1.1.1", "a"))
    waiting = queue.lane.in_turn(Visitor("1.1.1.1", "b"), iter(["done"]), cancel)
    step = next(waiting)
    assert isinstance(step, Step)
    assert step.note == "Waiting: place 2 of 2 in the queue"
    cancel.set()
    with pytest.raises(Cancelled):
        next(waiting)
    assert queue.finish() == [Visitor("1.1.1.1", "a")]
    assert queue.lane._seats() == []


@pytest.mark.parametrize(("visitor", "ended"), [(Visitor("1.1.1.1", "long"), True), (OWNER, False)])
def test_a_long_turn_ends_when_others_wait(monkeypatch: pytest.MonkeyPatch, visitor: Visitor, ended: bool) -> None:
    monkeypatch.setattr(lanes, "TURN_SECONDS", 0.3)
    lane, cancel = Lane(), CancelToken()

    def working() -> Iterator[str]:
        for _ in range(20):
            cancel.wait(0.1)
            yield "step"

    events = lane.in_turn(visitor, working(), cancel)
    for _ in range(5):  # alone it may go on
        next(events)
    other = threading.Thread(target=lambda: list(lane.in_turn(Visitor("2.2.2.2", "b"), iter([]), CancelToken())))
    other.start()
    if ended:
        with pytest.raises(NotAllowed, match="because others wait"):
            list(events)
    else:
        assert len(list(events)) == 15
    other.join(5)
    assert not other.is_alive()
