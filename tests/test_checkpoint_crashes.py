"""A save that fails or is killed at any moment leaves every complete step as it was, and no partial one."""

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import threading

import filelock
import pytest
import torch
from checkpoint_helpers import FILES, fail_at, hidden, no_space, save_model, save_small, tokenizer, value_of

from nanochat.checkpoint import folder, tensor_file
from nanochat.checkpoint.folder import list_steps

CALLS = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir")
SAME_OR_NEW = pytest.mark.parametrize("step", [2, 3], ids=["same step again", "a new step"])


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """fsync does nothing: it takes time. (test_everything_is_on_the_disk_in_order observes it.)"""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


# ---------------------------------------------------------------------------------------------------
# Failures


@SAME_OR_NEW
def test_a_full_disk_at_any_moment_loses_nothing(tmp_path, monkeypatch, step):
    failed = 0
    for number in range(100):
        run = tmp_path / str(number)
        for old in (1, 2):
            save_small(run, old)
        with monkeypatch.context() as patch:
            count = fail_at(patch, number, ("fsync", "rename", "replace", "mkdir"))
            try:
                save_small(run, step, value=77)
            except OSError as error:
                failed += 1
                assert error.errno == errno.ENOSPC
                assert value_of(run, 2) == 2
            else:
                assert value_of(run, step) == 77
        if count[0] <= number:
            break  # nothing was left to fail
        assert not hidden(run)
        assert list_steps(run)[:2] == [1, 2] and value_of(run, 1) == 1
        save_small(run, step, value=78)
        assert value_of(run, step) == 78
        shutil.rmtree(run)
    assert failed >= 12


class LimitedFile:
    """A file to which only the bytes left in `budget` can be written."""

    def __init__(self, file, budget):
        self.file, self.budget = file, budget

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        self.budget[0] -= memoryview(data).nbytes
        if self.budget[0] < 0:
            raise no_space()
        return self.file.write(data)


@pytest.mark.parametrize("budget", [0, 100, 300, 600])
def test_a_write_that_fails_half_way(tmp_path, monkeypatch, budget):
    save_small(tmp_path, 1)
    left = [budget]
    limited = lambda *args: LimitedFile(open(*args), left)  # noqa: E731, SIM115
    monkeypatch.setattr(tensor_file, "open", limited, raising=False)
    with pytest.raises(OSError) as caught:
        save_small(tmp_path, 1, value=5)
    assert caught.value.errno == errno.ENOSPC
    assert not hidden(tmp_path) and value_of(tmp_path, 1) == 1


def test_a_disk_that_is_really_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs root to mount a small disk")
    run = disk / "run"
    try:
        save_small(run, 1)
        for step in (1, 2):
            with pytest.raises(OSError) as caught:
                save_model(run, step, {"w": torch.zeros(2**20)})
            assert caught.value.errno == errno.ENOSPC
            assert list_steps(run) == [1] and value_of(run, 1) == 1 and not hidden(run)
        save_small(run, 2)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        save_small(tmp_path / "file" / "run", 1)
    if os.geteuid():
        save_small(tmp_path / "run", 1)
        (tmp_path / "run").chmod(0o500)
        with pytest.raises(PermissionError):
            save_small(tmp_path / "run", 2)
        assert value_of(tmp_path / "run", 1) == 1
        (tmp_path / "run").chmod(0o700)


def test_an_interrupt_leaves_nothing_behind(tmp_path):
    class Interrupting:
        hash = tokenizer().hash

        def save(self, folder):
            raise KeyboardInterrupt

    save_small(tmp_path, 1)
    with pytest.raises(KeyboardInterrupt):
        save_small(tmp_path, 2, with_tokenizer=Interrupting())
    assert list_steps(tmp_path) == [1] and not hidden(tmp_path)


def raises(error):
    def call(*args):
        raise error

    return call


def test_a_partly_deleted_step_never_counts_as_complete(tmp_path, monkeypatch):
    """Publishing fails, and so does deleting what was written."""
    save_small(tmp_path, 1)

    def delete_one_file(folder):
        os.unlink(folder / "model.safetensors")
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        real, fail = folder.fsync, raises(OSError(errno.EIO, os.strerror(errno.EIO)))
        patch.setattr(folder, "fsync", lambda path: fail() if path == tmp_path else real(path))
        patch.setattr(folder.shutil, "rmtree", delete_one_file)
        with pytest.raises(OSError):
            save_small(tmp_path, 1, value=77)
    assert hidden(tmp_path) == [".000001.new"]
    assert value_of(tmp_path, 1) == 1


def test_a_folder_that_cannot_be_deleted_does_not_fail_the_save(tmp_path, monkeypatch, capsys):
    for step in (1, 2):
        save_small(tmp_path, step)
    with monkeypatch.context() as patch:
        patch.setattr(folder.shutil, "rmtree", raises(PermissionError(errno.EACCES, "Permission denied")))
        save_small(tmp_path, 3, keep_last=1)
    assert list_steps(tmp_path) == [3]
    assert ".000001.gone" in capsys.readouterr().err
    save_small(tmp_path, 4)
    assert not hidden(tmp_path)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc to see what is synced")
def test_everything_is_on_the_disk_in_order(tmp_path, monkeypatch):
    run, events, rename = tmp_path / "runs" / "d4", [], os.rename

    def record_rename(source, target):
        events.append(("rename", os.path.basename(target)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", lambda handle: events.append(("fsync", os.readlink(f"/proc/self/fd/{handle}"))))
    monkeypatch.setattr(os, "rename", record_rename)
    save_small(run, 1)
    new = str(run / ".000001.new")
    # Folders made on the way are entries of their parents.
    assert {events[0], events[1]} == {("fsync", str(tmp_path)), ("fsync", str(tmp_path / "runs"))}
    manifest = next(i for i, (_, path) in enumerate(events) if path.startswith(f"{new}/.manifest.json"))
    synced = {path for kind, path in events[:manifest] if kind == "fsync"}
    assert {f"{new}/{name}" for name in FILES if name != "manifest.json"} | {new} <= synced
    assert events[manifest + 1 :] == [("fsync", new), ("rename", "000001"), ("fsync", str(run))]


# ---------------------------------------------------------------------------------------------------
# Death


def die_at(number, save):
    """Run `save` in a child that kills itself just before its `number`-th file operation; True if it died."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            fail_at(pytest.MonkeyPatch(), number, CALLS, act=lambda: os.kill(os.getpid(), signal.SIGKILL))
            save()
            os._exit(0)
        os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # newer Pythons warn of forking with threads
@SAME_OR_NEW
def test_killed_at_any_moment_loses_nothing(tmp_path, step):
    seen = set()
    for number in range(200):
        run = tmp_path / str(number)
        for old in (1, 2):
            save_small(run, old)
        died = die_at(number, lambda: save_small(run, step, value=77, keep_last=2))  # noqa: B023
        steps = list_steps(run)
        assert 2 in steps and set(steps) <= {1, 2, 3}
        values = {s: value_of(run, s) for s in steps}  # every visible step is complete
        assert values.pop(1, 1) == 1
        assert values[2] in ((2, 77) if step == 2 else (2,)) and values.get(3, 77) == 77
        seen.add(values.get(step))
        save_small(run, 5)
        assert not hidden(run) and value_of(run, 5) == 5
        shutil.rmtree(run)
        if not died:
            break
    assert not died and number > 15
    assert seen == {2 if step == 2 else None, 77}


def test_only_a_dead_process_is_cleaned_up_after(tmp_path):
    save_small(tmp_path, 1)
    os.rename(tmp_path / "000001", tmp_path / ".000001.new")
    (tmp_path / ".000002.new").mkdir()
    with filelock.FileLock(tmp_path / ".lock"):  # held by a living process that is about to rename it
        assert list_steps(tmp_path) == []
    assert list_steps(tmp_path) == [1]
    assert hidden(tmp_path) == [".000002.new"]  # a reader publishes, only the next save deletes
    save_small(tmp_path, 3)
    assert not hidden(tmp_path) and list_steps(tmp_path) == [1, 3]


def test_an_interrupted_replacement_is_finished(tmp_path):
    save_small(tmp_path, 1)
    os.rename(tmp_path / "000001", tmp_path / ".000001.old")
    assert value_of(tmp_path, 1) == 1
    os.rename(tmp_path / "000001", tmp_path / ".000001.old")
    save_small(tmp_path / "elsewhere", 1, value=2)
    os.rename(tmp_path / "elsewhere" / "000001", tmp_path / ".000001.new")
    assert value_of(tmp_path, 1) == 2  # the newer of two complete ones


def test_threads_that_save_take_turns(tmp_path):
    start = threading.Barrier(6)

    def save(step):
        start.wait()
        save_small(tmp_path, step, keep_last=2)

    threads = [threading.Thread(target=save, args=(step,)) for step in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list_steps(tmp_path)[-1] == 5 and not hidden(tmp_path)
    for step in list_steps(tmp_path):
        assert value_of(tmp_path, step) == step
