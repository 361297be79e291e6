"""One of many processes has a lease. A dead owner loses it, a live one does not."""

import errno
import json
import os
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sail_align.extract.errors import UserError
from sail_align.extract.system import leases as module
from sail_align.extract.system.leases import Lease, LeaseLostError, Leases, Owner

FOREIGN = json.dumps({"machine": "another", "pid": 1, "start": "1", "token": "x"}).encode() + b"\n"


def in_child(work) -> int:
    """Run in a child process that ends without cleaning up. Returns its exit code."""
    if (child := os.fork()) == 0:
        os._exit(int(work() or 0))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def leave_dead_lease(folder: Path, name: str) -> None:
    in_child(lambda: Leases(folder).take(name) is None)
    assert (folder / f"{name}.0.json").exists()


def test_lease_has_one_owner_and_leaves_no_files(tmp_path):
    leases = Leases(tmp_path / "leases")
    lease = leases.take("image/x/00003")
    assert lease is not None
    lease.confirm()
    assert leases.take("image/x/00003") is None
    assert leases.names() == {"image/x/00003"}
    assert in_child(lambda: Leases(leases.folder).take("image/x/00003") is None) == 1
    leases.release(lease)
    leases.tidy()
    assert not leases.folder.exists()


def test_lease_of_an_ended_local_process_is_free_at_once(tmp_path):
    leave_dead_lease(tmp_path, "a")
    leases = Leases(tmp_path)
    lease = leases.take("a")
    assert lease is not None
    assert lease.generation == 1
    leases.release(lease)
    assert not list(tmp_path.iterdir())


def test_reused_pid_does_not_own_the_lease(tmp_path):
    record = {"machine": Owner.current().machine, "pid": os.getpid(), "start": "1", "token": "x"}
    (tmp_path / "a.0.json").write_text(json.dumps(record) + "\n")
    assert Leases(tmp_path).take("a") is not None


def of_owner(**changes) -> bytes:
    return json.dumps(asdict(Owner.current()) | changes).encode() + b"\n"


@pytest.mark.parametrize(
    "content",
    [
        FOREIGN,
        b"",
        b'{"machine": "th',
        of_owner(pid=-1),
        of_owner(pid=10**40),
        of_owner(pid="1"),
        of_owner(pid=True),
        of_owner(start=None),
        of_owner(machine=[1]),
        b"[" * 100_000,
    ],
    ids=["foreign", "empty", "short", "pid -1", "huge pid", "text pid", "true pid", "no start", "list", "deep"],
)
def test_foreign_lease_is_free_after_ttl_without_change(tmp_path, content, monkeypatch):
    now = [1_000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    file, leases = tmp_path / "a.0.json", Leases(tmp_path, ttl=60)
    file.write_bytes(content)
    assert leases.take("a") is None
    now[0] += 50
    file.write_bytes(content + b".")  # a heartbeat
    assert leases.take("a") is None
    now[0] += 50
    assert leases.take("a") is None
    now[0] += 11
    assert leases.take("a") is not None


def test_heartbeat_changes_the_file(tmp_path):
    lease = Leases(tmp_path, ttl=0.06).take("a")
    before = lease.file.read_bytes()
    deadline = time.monotonic() + 10
    while lease.file.read_bytes() == before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert lease.file.read_bytes().startswith(before + b".")
    lease.confirm()


@pytest.mark.slow
def test_one_of_many_observers_takes_a_dead_lease(tmp_path):
    for attempt in range(10):
        leave_dead_lease(tmp_path, name := f"shard{attempt}")
        told, tell = os.pipe()
        all_tried, hold_on = os.pipe()  # an ended winner would itself be taken over
        children = []
        for _ in range(6):
            if (child := os.fork()) == 0:
                os.close(hold_on)
                os.write(tell, b"x" if Leases(tmp_path).take(name) else b".")
                os.read(all_tried, 1)
                os._exit(0)
            children.append(child)
        tries = b"".join(os.read(told, 1) for _ in children)
        for end in (hold_on, all_tried, told, tell):
            os.close(end)
        for child in children:
            os.waitpid(child, 0)
        assert sorted(tries) == sorted(b"x.....")


def test_observer_that_slept_through_a_takeover_gets_nothing(tmp_path, monkeypatch):
    leave_dead_lease(tmp_path, "a")
    quick, create = Leases(tmp_path), Lease.create

    def sleep_first(self):
        monkeypatch.setattr(Lease, "create", create)
        quick.release(quick.take("a"))
        return create(self)

    monkeypatch.setattr(Lease, "create", sleep_first)
    assert Leases(tmp_path).take("a") is None
    assert not list(tmp_path.iterdir())
    assert Leases(tmp_path).take("a").generation == 0


def test_lease_that_was_taken_over_is_lost_and_not_removed(tmp_path):
    slow, quick = Leases(tmp_path), Leases(tmp_path)
    lease = slow.take("a")
    lease.file.write_bytes(FOREIGN)
    with pytest.raises(LeaseLostError):
        lease.confirm()
    lease.file.write_bytes(lease.content)
    (tmp_path / "a.1.json").write_bytes(FOREIGN)
    with pytest.raises(LeaseLostError):
        lease.confirm()
    slow.release_all()
    assert (tmp_path / "a.1.json").read_bytes() == FOREIGN
    assert quick.take("a") is None


def test_lease_on_a_file_system_without_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    leases = Leases(tmp_path)
    lease = leases.take("a")
    assert lease is not None
    assert Leases(tmp_path).take("a") is None
    leases.release(lease)
    assert not list(tmp_path.iterdir())


VALUES = st.recursive(st.none() | st.integers() | st.text(), st.lists)


@pytest.mark.slow
@given(st.binary() | VALUES.map(lambda value: of_owner(pid=value, start=value)))
def test_owner_of_any_content_is_known_or_none(content):
    owner = Owner.parse(content)
    assert owner is None or owner.is_alive() in (True, False, None)


def test_numbers_of_impossible_generations_are_ignored(tmp_path):
    (tmp_path / f"a.{'9' * 200}.json").write_bytes(FOREIGN)
    assert Leases(tmp_path).take("a").generation == 0


def test_tidying_removes_only_own_files_and_follows_no_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for name in ("precious.tmp", f".a.0.json.{'0' * 32}.tmp"):
        (tmp_path / "elsewhere" / name).write_bytes(b"!")
    leases = Leases(tmp_path / "leases")
    leases.folder.symlink_to(tmp_path / "elsewhere")
    leases.tidy()
    with pytest.raises(UserError, match="leases is a link, which a store never contains"):
        leases.take("a")
    assert len(list((tmp_path / "elsewhere").iterdir())) == 2
    Leases(tmp_path / "elsewhere").tidy()
    assert [file.name for file in (tmp_path / "elsewhere").iterdir()] == ["precious.tmp"]
