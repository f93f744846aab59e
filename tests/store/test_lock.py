# SPDX-License-Identifier: Apache-2.0
"""The lock of a folder: never stale, never shared, and told where there is none."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
import warnings

import pytest

from sidechain.io.lock import Lock

HOLD = """
import sys
from pathlib import Path
from sidechain.io.lock import Lock
lock = Lock(Path(sys.argv[1]), "test")
print("held", flush=True)
sys.stdin.read()
"""


def hold(path):
    line = [sys.executable, "-c", HOLD, str(path)]
    held = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert held.stdout.readline() == "held\n"
    return held


def test_held_by_a_process_until_it_is_killed(tmp_path):
    path = tmp_path / "lock"
    held = hold(path)
    try:
        message = rf"^op: expected a thing, got {tmp_path} locked by pid {held.pid} on .+ since 20"
        with pytest.raises(RuntimeError, match=message):
            Lock(path, "op: expected a thing")
    finally:
        held.kill()
        held.communicate()
    Lock(path, "op").release()


def test_within_one_process(tmp_path):
    found = []

    def second():
        try:
            Lock(tmp_path / "lock", "op").release()
        except RuntimeError as error:
            found.append(str(error))

    with Lock(tmp_path / "lock", "op"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    second()
    assert len(found) == 1 and f"pid {os.getpid()} on" in found[0]


def test_released_when_it_is_forgotten_and_only_once(tmp_path):
    lock = Lock(tmp_path / "lock", "op")
    lock.release()
    other = Lock(tmp_path / "lock", "op")
    lock.release()  # must not close what has its number now
    with pytest.raises(RuntimeError):
        Lock(tmp_path / "lock", "op")
    del other
    Lock(tmp_path / "lock", "op").release()


def test_a_fork_that_outlives_its_parent_does_not_hold_it(tmp_path):
    forks = HOLD.replace("print", "import os, time\nif os.fork() == 0: time.sleep(600)\nprint")
    line = [sys.executable, "-c", forks, str(tmp_path / "lock")]
    group = subprocess.Popen(
        line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0
    )
    assert group.stdout.readline() == "held\n"
    try:
        group.kill()  # the child sleeps on
        group.wait()
        end = time.monotonic() + 30
        while time.monotonic() < end:
            try:
                Lock(tmp_path / "lock", "op").release()
            except RuntimeError:
                time.sleep(0.01)
            else:
                break
        else:
            pytest.fail("the child of a dead process holds the lock")
    finally:
        os.killpg(group.pid, signal.SIGKILL)
        group.communicate()


def test_released_while_a_fork_still_has_the_file(tmp_path, monkeypatch):
    """One made by a library, or one that has not run yet."""
    read, write = os.pipe()
    lock = Lock(tmp_path / "lock", "op")
    monkeypatch.setattr("sidechain.io.lock._HELD", set())  # so that the fork does not let go of it
    child = os.fork()
    if child == 0:
        os.close(write)
        os.read(read, 1)  # until the parent is done
        os._exit(0)
    try:
        lock.release()
        Lock(tmp_path / "lock", "op").release()
    finally:
        os.close(write)
        os.close(read)
        os.waitpid(child, 0)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}', '{"pid": 1}', "\xff", "[" * 9999])
def test_what_the_file_says_is_not_trusted(tmp_path, text):
    with Lock(tmp_path / "lock", "op"):
        (tmp_path / "lock").write_text(text, encoding="latin-1")
        with pytest.raises(RuntimeError, match="locked by another process"):
            Lock(tmp_path / "lock", "op")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(tmp_path, number, monkeypatch):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.warns(RuntimeWarning, match="the file system has no locks") as found:
        Lock(tmp_path / "lock", "op").release()
    assert len(found) == 1


def test_errors_name_the_file(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no/lock"):
        Lock(tmp_path / "no" / "lock", "op")

    def flock(*_):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr("fcntl.flock", flock)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no descriptor is left open
        with pytest.raises(OSError, match="lock'"):
            Lock(tmp_path / "lock", "op")
