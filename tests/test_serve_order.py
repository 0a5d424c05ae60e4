"""The order of waiting work: least first, fair between clients, nothing starves."""

import dataclasses

import pytest

from janusflow_jax.serve import order


@dataclasses.dataclass(eq=False)
class Work:
    name: str
    size: int
    client: str = "a"
    since: float = 0.0

    def work(self) -> int:
        return self.size


def names(sorted_work):
    return [x.name for x in sorted_work]


def test_least_work_first_then_arrival():
    work = [Work("long", 300), Work("first", 60), Work("second", 60), Work("short", 30)]
    assert names(order.Order(10.0).sorted(work, 0.0)) == ["short", "first", "second", "long"]


def test_a_client_with_much_work_waits_behind_one_with_little():
    ours = order.Order(10.0)
    heavy = [Work(f"heavy{i}", 60) for i in range(10)]
    for begun in heavy[:3]:
        ours.begun("a", begun.size, 0.0)
    light = Work("light", 120, client="b", since=1.0)
    assert names(ours.sorted([*heavy[3:], light], 1.0))[0] == "light"
    # Half of it is forgotten after every half-life, so a client is not behind for ever.
    assert ours.recent("a", order.HALF_LIFE) == pytest.approx(90)


def served_at(load, seconds=250.0, speed=10.0):
    """How long a large piece of work waits on a machine that others keep busy."""
    ours, waiting, now, arrivals = order.Order(speed), [], 0.0, 0
    large = Work("large", 600, "big", since=20.0)
    while now < seconds:
        if large and now >= large.since:
            waiting.append(large)
            large = None
        while arrivals < now * load:  # one second of work each, all of new clients
            waiting.append(Work("small", int(speed), f"client{arrivals}", float(arrivals / load)))
            arrivals += 1
        if not waiting:
            now += 0.1
            continue
        first, *waiting = ours.sorted(waiting, now)
        if first.name == "large":
            return now - first.since
        ours.begun(first.client, first.size, now)
        now += first.size / speed
    return float("inf")


@pytest.mark.parametrize("load", [0.5, 1.0, 1.1])
def test_nothing_starves(load):
    bound = 600 / (order.AGING * 10.0)
    assert served_at(load) < bound * max(load, 1) + 5


def test_without_aging_it_would(monkeypatch):
    monkeypatch.setattr(order, "AGING", 0.0)
    assert served_at(1.1) == float("inf")


def test_the_speed_follows_measurements():
    ours = order.Order(100.0)
    for _ in range(200):
        ours.measured(8, 0.2)
    assert ours.speed == pytest.approx(40, rel=0.01)


def test_old_clients_are_forgotten():
    ours = order.Order()
    for i in range(3000):
        ours.begun(f"client{i}", 10, float(i))
    assert len(ours._recent) < 1500
