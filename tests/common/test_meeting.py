"""How the processes of a run find each other and see who is lost, with a dictionary for a store."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest

from common.io.usage import UsageError
from common.runtime import heartbeat
from common.runtime.heartbeat import DONE, FAILED, LOST_SECONDS, Heartbeat, Places
from common.runtime.launchers import Launched
from common.runtime.meeting import Absent, Room, disagreement, meet
from common.runtime.text_store import TextStore
from common.runtime.world import World

LONG_SECONDS = 100_000
NAMES = ["rank 0 (a)", "rank 1 (a)", "rank 2 (b)"]


class Shared(dict[str, str]):
    """A store in one process."""

    def set(self, key: str, value: str) -> None:
        self[key] = value


def in_threads(works: list[Callable[[], Any]]) -> list[Any]:
    """What each returns or raises."""
    found: list[Any] = [None] * len(works)

    def run(n: int) -> None:
        try:
            found[n] = works[n]()
        except Exception as error:
            found[n] = error

    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def meeting_of(store: Shared, size: int, ranks: list[int], seconds: float) -> list[Any]:
    return in_threads(
        [lambda r=r: meet(store, r, size, {"host": f"h{r}"}, seconds) for r in ranks]  # type: ignore[misc]
    )


def test_all_meet_and_hear_all_though_the_store_remembers_a_run_before() -> None:
    store = Shared()
    runs = []
    for _ in range(3):  # a launcher that starts them again keeps its store
        met = meeting_of(store, 3, [0, 1, 2], LONG_SECONDS)
        rooms = [room for room, _ in met]
        assert [facts["host"] for facts in met[2][1]] == ["h0", "h1", "h2"]
        said = in_threads([lambda r=r: r.exchange("x", {"r": str(r.rank)}) for r in rooms])  # type: ignore[misc]
        assert said[1] == [{"r": "0"}, {"r": "1"}, {"r": "2"}]
        runs.append({room.run for room in rooms})
    assert [len(names) for names in runs] == [1, 1, 1] and len(set.union(*runs)) == 3


def test_who_does_not_come_is_named_by_all_that_are_here() -> None:
    for found in meeting_of(Shared(), 4, [0, 2], seconds=0.5):
        assert isinstance(found, Absent)
        assert str(found) == "ranks 1, 3 did not come within 0.5 s (--join-timeout)"
    (found,) = meeting_of(Shared(), 2, [1], seconds=0)
    assert str(found).startswith("rank 0 did not come")


def test_two_processes_with_one_rank_are_refused() -> None:
    store = Shared()
    met = in_threads(
        [
            lambda: meet(store, 0, 2, {"host": "a"}, LONG_SECONDS),
            lambda: meet(store, 1, 2, {"host": "b"}, LONG_SECONDS),
        ]
    )
    run = met[0][0].run
    # A second rank 1 comes with other words into the same run.
    store[f"{run}/who/all"] = ""

    class Late(Shared):
        def get(self, key: str, default: Any = None) -> Any:
            return run if key.startswith("welcome/") else store.get(key, default)

    with pytest.raises(UsageError, match="rank 1 is here twice, on b and c"):
        meet(Late(), 1, 2, {"host": "c"}, LONG_SECONDS)


def test_what_differs_is_said_with_who_and_what() -> None:
    first = {"batch_size": "8", "seed": "0", "corpus": "aa"}
    assert disagreement([first, dict(first)], ["a", "b"]) is None
    other = {**first, "seed": "1", "corpus": "bb"}
    assert disagreement([first, first, other], ["a", "a", "b"]) == (
        "rank 2 (b) has seed = 1 (and 1 more); expected 0, as rank 0 (a) has"
    )


class Hearts:
    """Three ranks' heartbeats, beating when told, on a clock that is set by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("common.runtime.heartbeat.time.monotonic", lambda: 0.0)
        self.store = Shared()
        self.ended: list[str] = []
        rooms = [Room(self.store, "run", rank, 3, LONG_SECONDS) for rank in range(3)]
        self.hearts = [Heartbeat(room, NAMES, self.ended.append) for room in rooms]

    def beat(self, now: float, *ranks: int) -> list[str | None]:
        return [self.hearts[rank].round(now) for rank in ranks]


def test_a_rank_without_a_sign_of_life_is_lost_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    hearts = Hearts(monkeypatch)
    for now in (1, 2, 3):
        assert hearts.beat(now, 2, 1, 0) == [None] * 3
    assert hearts.beat(3 + LOST_SECONDS, 1, 0) == [None] * 2  # slow, but not yet lost
    lost = f"lost rank 2 (b): no sign of life for {LOST_SECONDS:g} s"
    assert hearts.beat(4 + LOST_SECONDS, 0, 1) == [lost] * 2


def test_rank_0_is_watched_by_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    hearts = Hearts(monkeypatch)
    assert hearts.beat(1, 0, 1, 2) == [None] * 3
    assert hearts.beat(1 + LOST_SECONDS, 2) == [None]
    (found,) = hearts.beat(2 + LOST_SECONDS, 2)
    assert found == f"lost rank 0 (a): no sign of life for {LOST_SECONDS:g} s"


def test_all_are_alive_and_none_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    hearts = Hearts(monkeypatch)
    at = ["", "", ""]
    for rank, heart in enumerate(hearts.hearts):
        heart._of = Places(lambda rank=rank: at[rank], 30, " ".join)  # type: ignore[misc]

    def beat(first: int, last: int) -> list[str | None]:
        for now in range(first, last):
            found = hearts.beat(now, 2, 1, 0)
            if any(found):
                break
        return found

    assert beat(0, 100) == [None] * 3  # still building
    at[:] = ["F0", "F1", "B0"]
    assert beat(100, 130) == [None] * 3
    at[2] = "W0"
    assert beat(130, 161) == [None] * 3
    assert beat(161, 200)[2] == "no progress for 30 s (--hang-timeout): F0 F1 W0"


@pytest.mark.parametrize("failing", [0, 1])
def test_what_a_failing_rank_says_reaches_all(
    failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hearts = Hearts(monkeypatch)
    hearts.beat(1, 0, 1, 2)
    hearts.hearts[failing]._words = f"{FAILED}ValueError: no"
    hearts.beat(2, failing, 0)
    assert hearts.beat(3, 2) == [f"{NAMES[failing]}: ValueError: no"]


def test_who_has_ended_well_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    hearts = Hearts(monkeypatch)
    hearts.hearts[1]._words = DONE
    hearts.beat(1, 1, 2, 0)
    assert hearts.beat(LOST_SECONDS, 2, 0) == [None] * 2
    assert hearts.beat(2 * LOST_SECONDS, 2, 0) == [None] * 2


def test_a_store_out_of_reach_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "LOST_SECONDS", 2)
    ended: list[str] = []
    over = threading.Event()

    class Gone(Shared):
        def set(self, key: str, value: str) -> None:
            raise ConnectionError("Connection reset by peer\nand much more")

    def end(line: str) -> None:
        ended.append(line)
        over.set()

    Heartbeat(Room(Gone(), "run", 1, 3, LONG_SECONDS), NAMES, end).start()
    over.wait()
    assert ended == [
        "the store of the run has not answered for 2 s (ConnectionError: Connection reset by "
        "peer): this host, or that of the store, is cut off"
    ]


def test_the_store_of_rank_0_is_reached_by_all() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        endpoints = ("127.0.0.1:1", "127.0.0.1:2")
        first = Launched("TF_CONFIG", World(0, endpoints), f"127.0.0.1:{port}")
        with pytest.raises(UsageError, match=r"cannot hold .* Address already in use; expected"):
            TextStore(first, 0)
    with pytest.raises(UsageError, match=r"cannot reach .* Connection refused; expected"):
        TextStore(Launched("TF_CONFIG", World(1, endpoints), f"127.0.0.1:{port}"), 0)
    stores = [
        TextStore(Launched("TF_CONFIG", World(rank, endpoints), f"127.0.0.1:{port}"), LONG_SECONDS)
        for rank in range(2)
    ]
    assert stores[1].get("a") is None
    stores[1].set("a", "é\n")
    assert stores[0].get("a") == stores[1].get("a") == "é\n"
