"""The log on the gateway's disk: what is durable when, what a fault costs, who ships what."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cowest_serving.spool import Frames, Groups, LogFile, Pace, Spool, frame, read_frames
from tests.patience import IN_TIME

QUICK = Pace(soon=0.02, late=0.1)
NEVER = Pace(soon=600, late=600)


async def until(condition: Callable[[], Any], seconds: float = IN_TIME) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


# ---------------------------------------------------------------- frames
THREE = [frame(b"Tone", 5), frame(b"T" + b"two" * 100, 9), frame(b"Fthree", 7)]


def test_frames_come_back_with_the_latest_time() -> None:
    assert read_frames(b"".join(THREE)) == Frames((b"Tone", b"T" + b"two" * 100, b"Fthree"), 9, 0)


def test_a_file_cut_off_anywhere_gives_the_frames_that_are_whole() -> None:
    data = b"".join(THREE)
    ends = [len(b"".join(THREE[:n])) for n in range(4)]
    for cut in range(len(data) + 1):
        read = read_frames(data[:cut])
        whole = sum(end <= cut for end in ends) - 1
        assert (len(read.payloads), read.torn_bytes) == (whole, cut - ends[whole])


@pytest.mark.parametrize("at", range(len(THREE[0])))
def test_a_frame_with_any_wrong_byte_is_no_frame(at: int) -> None:
    data = bytearray(THREE[0])
    data[at] ^= 0x10
    assert read_frames(bytes(data)).payloads == ()


def test_zeros_that_a_power_cut_left_are_no_frames() -> None:
    assert read_frames(THREE[0] + bytes(4096)) == Frames((b"Tone",), 5, 4096)


@pytest.mark.parametrize(
    ("size", "rows", "age", "idle", "is_due"),
    [
        pytest.param(100, 1, 0.4, 0.4, False, id="a single row waits a moment for others"),
        pytest.param(100, 1, 2.0, 1.0, True, id="and is then shown to who watches"),
        pytest.param(100, 200, 2.0, 0.0, True, id="as are a hundred a second"),
        pytest.param(100, 201, 2.0, 0.0, False, id="under load a put every two seconds would be too many"),
        pytest.param(100, 201, 2.0, 1.1, True, id="a burst that is over is shown"),
        pytest.param(100, 900, 5.0, 0.0, True, id="load or not, five seconds are enough"),
        pytest.param(100, 2000, 1.0, 0.0, True, id="two thousand rows"),
        pytest.param(8 << 20, 9, 0.1, 0.0, True, id="eight MiB"),
    ],
)
def test_a_file_is_closed_soon_while_little_comes_and_full_under_load(
    size: int, rows: int, age: float, idle: float, is_due: bool
) -> None:
    assert Pace().is_due(size, rows, age, idle) is is_due


@pytest.mark.parametrize(
    ("rows", "age", "waiting", "is_due"),
    [
        pytest.param(5, 2.0, 1, True, id="the one before is on its way"),
        pytest.param(5, 2.0, 2, False, id="two wait: a put takes longer than two seconds"),
        pytest.param(50, 5.0, 2, False, id="or than five seconds"),
        pytest.param(100, 10.0, 2, True, id="but not for ever"),
        pytest.param(2000, 1.0, 9, True, id="a full one is closed all the same"),
    ],
)
def test_the_slower_the_store_the_fewer_and_larger_the_files(rows: int, age: float, waiting: int, is_due: bool) -> None:
    assert Pace().is_due(100, rows, age, idle=age, waiting=waiting) is is_due


class Unsynced(LogFile):
    """As on a disk that is never slow."""

    def sync(self) -> None: ...


def test_while_the_store_takes_nothing_few_and_large_files_wait_for_it(tmp_path: Path) -> None:
    """They are shipped one by one: many small ones would keep it behind for long after."""
    shipped: list[int] = []
    store_is_back = threading.Event()

    def ship(writer: str, number: int, frames: Frames) -> None:
        store_is_back.wait(IN_TIME)
        shipped.append(len(frames.payloads))

    async def written() -> None:
        pace = Pace(soon=0.01, late=0.05)
        spool = Spool(tmp_path, "one", ship, lambda payloads: None, pace=pace, open_file=Unsynced)
        await spool.start()
        for number in range(100):
            await asyncio.wait_for(spool.append(b"T%d" % number) or asyncio.sleep(0), IN_TIME)
            await asyncio.sleep(0.01)  # rows come one by one
        store_is_back.set()
        await spool.aclose()

    asyncio.run(written())
    assert sum(shipped) == 100
    assert len(shipped) < 20


# ---------------------------------------------------------------- a log in a folder
@dataclass
class Disk:
    """Real files that note what is done to them, and fail or hang where they are told to."""

    done: list[str] = field(default_factory=list)
    faults: dict[str, int] = field(default_factory=dict)  # what fails -> errno
    flowing: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.flowing.set()

    def open(self, path: Path) -> DiskFile:
        self.do("open")
        return DiskFile(LogFile(path), self)

    def do(self, what: str) -> None:
        self.done.append(what)
        if number := self.faults.get(what):
            raise OSError(number, "the disk says no")


class DiskFile:
    def __init__(self, file: LogFile, disk: Disk) -> None:
        self._file, self._disk = file, disk

    def write(self, data: bytes) -> None:
        if "write" in self._disk.faults:
            self._file.write(data[: len(data) // 2])
        self._disk.do("write")
        self._file.write(data)

    def sync(self) -> None:
        self._disk.flowing.wait()
        self._disk.do("sync")
        self._file.sync()

    def cut(self, size: int) -> None:
        self._disk.do("cut")
        self._file.cut(size)

    def close(self) -> None:
        self._file.close()


@dataclass
class World:
    folder: Path
    disk: Disk = field(default_factory=Disk)
    shipped: list[tuple[str, int, Frames]] = field(default_factory=list)
    lost: list[bytes] = field(default_factory=list)
    away: bool = False  # the store
    unshippable: str = ""  # whose files

    def ship(self, writer: str, number: int, frames: Frames) -> None:
        if self.away:
            raise ConnectionError("the store is away")
        if writer == self.unshippable:
            raise OSError(errno.EIO, "it cannot be read")
        self.shipped.append((writer, number, frames))

    @property
    def payloads(self) -> list[bytes]:
        return [payload for _, _, frames in self.shipped for payload in frames.payloads if payload != b"N"]

    @asynccontextmanager
    async def spool(self, writer: str = "w", **options: Any) -> AsyncIterator[Spool]:
        given: dict[str, Any] = {"pace": QUICK, "patience": IN_TIME, "open_file": self.disk.open} | options
        spool = Spool(self.folder, writer, self.ship, self.lost.extend, **given)
        await spool.start()
        try:
            yield spool
        finally:
            self.disk.flowing.set()
            await spool.aclose()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "spool")


async def kept(spool: Spool, payload: bytes) -> bool:
    future = spool.append(payload)
    assert future is not None
    return await future


async def test_a_record_is_durable_after_its_sync_and_not_before(world: World) -> None:
    async with world.spool(pace=NEVER) as spool:
        world.disk.flowing.clear()
        future = spool.append(b"Ta")
        await until(lambda: world.disk.done == ["open", "write"])
        assert future is not None and not future.done()
        world.disk.flowing.set()
        assert await future
        assert world.disk.done == ["open", "write", "sync"]
        (path,) = world.folder.glob("w/*.log")
        assert read_frames(path.read_bytes()).payloads == (b"Ta",)


async def test_what_comes_during_a_sync_shares_the_next(world: World) -> None:
    async with world.spool(pace=NEVER) as spool:
        world.disk.flowing.clear()
        first = spool.append(b"T0")
        await until(lambda: "write" in world.disk.done)
        rest = [spool.append(b"T%d" % n) for n in range(1, 50)]
        world.disk.flowing.set()
        assert all([await future for future in [first, *rest] if future])
        assert world.disk.done == ["open", "write", "sync", "write", "sync"]
    assert world.payloads == [b"T%d" % n for n in range(50)]


async def test_closed_files_are_shipped_in_order_and_deleted(world: World) -> None:
    async with world.spool(pace=Pace(max_rows=1)) as spool:
        for n in range(5):
            assert await kept(spool, b"T%d" % n)
        await until(lambda: len(world.shipped) == 5)
        assert [number for _, number, _ in world.shipped] == [0, 1, 2, 3, 4]
        assert world.payloads == [b"T%d" % n for n in range(5)]
        await until(lambda: spool.bytes == 0 and spool.rows == 0)
        assert not list(world.folder.glob("w/*.log"))
    assert not list(world.folder.iterdir())  # nothing is left of it


async def test_what_the_store_does_not_take_waits_on_the_disk_and_goes_in_order(world: World) -> None:
    world.away = True
    async with world.spool(pace=Pace(max_rows=1)) as spool:
        for n in range(3):
            assert await kept(spool, b"T%d" % n)
        await until(lambda: spool.failed_ships >= 1)
        assert spool.rows == 3 and spool.bytes > 0
        world.away = False
        await until(lambda: spool.rows == 0)
    assert world.payloads == [b"T0", b"T1", b"T2"]


async def test_the_next_process_ships_what_one_left_under_the_name_of_that_one(world: World) -> None:
    world.away = True
    async with world.spool("before") as spool:
        assert await kept(spool, b"Ta")
    world.away = False
    assert len(list(world.folder.glob("before/*.log"))) == 1
    async with world.spool("after"):
        await until(lambda: world.shipped)
        await until(lambda: not (world.folder / "before").exists())
    assert [(writer, number) for writer, number, _ in world.shipped] == [("before", 0)]


async def test_what_one_left_and_cannot_be_shipped_holds_up_nobody_else(world: World) -> None:
    world.away = True
    for writer in ("before", "between"):
        async with world.spool(writer) as spool:
            assert await kept(spool, b"T" + writer.encode())
    world.away, world.unshippable = False, "before"
    async with world.spool("after") as spool:
        assert await kept(spool, b"Tafter")
        await until(lambda: spool.failed_ships and len(world.payloads) == 2)
        assert sorted(world.payloads) == [b"Tafter", b"Tbetween"]
        world.unshippable = ""
        await until(lambda: len(world.payloads) == 3)
    assert list(world.folder.glob("*/*.log")) == []


async def test_a_torn_end_is_cut_off_and_the_rest_is_shipped(world: World) -> None:
    (world.folder / "dead").mkdir(parents=True)
    (world.folder / "dead" / "lock").touch()
    whole = frame(b"Ta", 1) + frame(b"Tb", 2)
    (world.folder / "dead" / "0000000000.log").write_bytes(whole + frame(b"Tc", 3)[:-1])
    async with world.spool():
        await until(lambda: world.shipped)
    ((_, _, frames),) = world.shipped
    assert frames.payloads == (b"Ta", b"Tb")
    assert frames.torn_bytes > 0


async def test_nobody_ships_what_a_living_process_holds(world: World) -> None:
    async with world.spool("one", pace=NEVER) as one:
        assert await kept(one, b"Ta")
        async with world.spool("two"):
            pass  # its end is after its look around
        assert not world.shipped
        assert list(world.folder.glob("one/*.log"))
    assert [writer for writer, _, _ in world.shipped] == ["one"]


# ---------------------------------------------------------------- trouble
@pytest.mark.parametrize("what", ["open", "write", "sync"])
async def test_a_disk_that_fails_is_told_and_what_it_did_not_take_is_given_back_once(world: World, what: str) -> None:
    async with world.spool(pace=NEVER) as spool:
        if what != "open":
            assert await kept(spool, b"Ta")
        world.disk.faults[what] = errno.ENOSPC
        assert not await kept(spool, b"Tb")
        assert world.lost == [b"Tb"]
        assert spool.is_full and "no" in spool.trouble
        world.disk.faults.clear()
        assert await kept(spool, b"Tc")
        assert not spool.is_full
        assert (spool.acknowledged, spool.unacknowledged) == (1 if what == "open" else 2, 1)
    assert world.payloads == ([b"Tc"] if what == "open" else [b"Ta", b"Tc"])


async def test_a_file_that_failed_is_never_written_again(world: World) -> None:
    async with world.spool(pace=NEVER) as spool:
        assert await kept(spool, b"Ta")
        world.disk.faults["sync"] = errno.EIO
        assert not await kept(spool, b"Tb")
        world.disk.faults.clear()
        assert await kept(spool, b"Tc")
    assert [(number, frames.payloads) for _, number, frames in world.shipped] == [(0, (b"Ta",)), (1, (b"Tc",))]


async def test_what_may_be_in_the_file_after_all_is_not_given_back(world: World) -> None:
    async with world.spool(pace=NEVER) as spool:
        world.disk.faults |= {"sync": errno.EIO, "cut": errno.EIO}
        assert not await kept(spool, b"Ta")
        await until(lambda: spool.unsure_lost == 1)
        assert world.lost == []
        world.disk.faults.clear()
    assert world.payloads == [b"Ta"]  # it was there


async def test_trouble_ends_by_itself_while_nobody_asks(world: World) -> None:
    async with world.spool() as spool:
        world.disk.faults["write"] = errno.ENOSPC
        assert not await kept(spool, b"Ta")
        world.disk.faults.clear()
        await until(lambda: not spool.is_full)
    assert world.payloads == []


async def test_a_full_spool_takes_no_more_until_the_store_has_taken_some(world: World) -> None:
    world.away = True
    async with world.spool(limit_bytes=100) as spool:
        assert await kept(spool, b"T" * 60)
        assert not spool.is_full
        assert spool.append(b"T" * 60) is None
        assert (spool.acknowledged, spool.unacknowledged) == (1, 1)
        assert spool.is_full
        world.away = False
        await until(lambda: not spool.is_full)
        assert await kept(spool, b"T" * 60)


async def test_a_spool_is_not_full_for_long_by_a_record_that_is_larger_than_it(world: World) -> None:
    async with world.spool(limit_bytes=100) as spool:
        assert await kept(spool, b"T" * 20)
        assert spool.append(b"T" * 200) is None
        assert spool.is_full
        await until(lambda: not spool.is_full)


async def test_a_spool_that_takes_a_smaller_record_is_not_full(world: World) -> None:
    world.away = True
    async with world.spool(limit_bytes=100) as spool:
        assert spool.append(b"T" * 200) is None
        assert await kept(spool, b"T" * 20)
        assert not spool.is_full


async def test_a_disk_that_hangs_delays_one_answer_and_not_the_next(world: World) -> None:
    async with world.spool(pace=NEVER, patience=0.1) as spool:
        world.disk.flowing.clear()
        assert not await kept(spool, b"Ta")
        second = spool.append(b"Tb")
        assert second is not None and second.done() and not second.result()
        world.disk.flowing.set()
        async with asyncio.timeout(IN_TIME):
            while not await kept(spool, b"Tc"):
                await asyncio.sleep(0.005)
        assert world.lost == []
    assert world.payloads[:2] == [b"Ta", b"Tb"]  # late is not lost


# ---------------------------------------------------------------- groups
@pytest.mark.parametrize(
    ("rate", "milliseconds"),
    [
        pytest.param(20, 0, id="nobody comes in so short a time"),
        pytest.param(190, 0, id="too few to be worth it"),
        pytest.param(250, 20, id="five rows, and no record waits longer"),
        pytest.param(500, 20, id="ten rows"),
        pytest.param(2000, 5, id="ten rows are soon there"),
    ],
)
def test_under_load_commits_are_so_far_apart_that_each_has_some_rows(rate: float, milliseconds: float) -> None:
    assert Groups().gap(rate) == pytest.approx(milliseconds / 1000)


def gathering(longest: float) -> Pace:
    """Whatever the rate, once there is one."""
    return Pace(soon=600, late=600, groups=Groups(rows=10**9, longest=longest, worth=0.001))


async def test_a_record_waits_for_others_only_while_enough_of_them_are_under_way(world: World) -> None:
    async with world.spool(pace=gathering(longest=600)) as spool:
        for number in range(20):  # one after the other, as one user in a hurry
            assert await kept(spool, b"T%d" % number)
        assert world.disk.done.count("sync") == 20
        first = [spool.append(b"Ta", others=50), spool.append(b"Tb", others=50)]
        await asyncio.sleep(0.02)
        assert world.disk.done.count("sync") == 20
        last = spool.append(b"Tc", others=2)  # the two above: nobody is left to wait for
        assert all([await asyncio.wait_for(future, IN_TIME) for future in [*first, last] if future])
        assert world.disk.done.count("sync") == 21


async def test_a_group_that_nobody_joins_is_committed_when_its_time_is_up(world: World) -> None:
    async with world.spool(pace=gathering(longest=0.05)) as spool:
        for number in range(3):
            assert await kept(spool, b"T%d" % number)
        future = spool.append(b"Ta", others=50)
        assert future is not None and await asyncio.wait_for(future, IN_TIME)


async def test_what_waits_for_others_is_committed_at_the_end(world: World) -> None:
    async with world.spool(pace=gathering(longest=600)) as spool:
        for number in range(3):
            assert await kept(spool, b"T%d" % number)
        last = spool.append(b"Ta", others=50)
    await asyncio.sleep(0)
    assert last is not None and last.result()
    assert world.payloads[-1] == b"Ta"


# ---------------------------------------------------------------- files
def test_a_file_that_grows_in_steps_ends_where_its_records_end(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    file = LogFile(path)
    file.write(THREE[0])
    file.sync()
    assert path.stat().st_size > len(THREE[0])
    assert read_frames(path.read_bytes()).payloads == (b"Tone",)  # as after a kill
    file.write(THREE[1] * 10_000)
    file.write(THREE[2])
    file.sync()
    file.close()
    assert path.read_bytes() == THREE[0] + THREE[1] * 10_000 + THREE[2]


def test_what_is_cut_off_a_file_is_gone_and_it_can_be_written_on(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    file = LogFile(path)
    for each in THREE:
        file.write(each)
    file.cut(len(THREE[0]))
    assert path.read_bytes() == THREE[0]
    file.write(THREE[2])
    file.close()
    assert path.read_bytes() == THREE[0] + THREE[2]


async def test_room_that_a_killed_process_did_not_use_is_no_torn_record(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    (world.folder / "dead").mkdir(parents=True)
    (world.folder / "dead" / "lock").touch()
    (world.folder / "dead" / "0000000000.log").write_bytes(frame(b"Ta", 1) + bytes(1000))
    async with world.spool():
        await until(lambda: world.shipped)
    assert world.payloads == [b"Ta"]
    assert "no whole record" not in caplog.text
