"""Files and folders that processes write, kill and share: what is there afterwards is the old, the new, never a part."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from afa import locks
from afa.errors import UserError
from afa.files import (
    COMMITTED,
    LOCK,
    WRITING,
    locked,
    present,
    refuse_busy,
    replacing,
    settled,
    sha256,
    staged,
    write_atomically,
)


def in_a_child(work):
    """Run something in a forked process: -> its exit status; 9 if it was killed."""
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    return signal.SIGKILL if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def save(folder, text):
    with staged(folder, last="index") as stage:
        (stage / "part").mkdir()
        (stage / "part" / "a").write_text(text)
        for name in ("data", "index"):
            (stage / name).write_text(text)


def kill_at(monkeypatch, number):
    """Kill the process at its call `number` of a rename, removal or new folder."""
    calls = [0]

    def counted(call):
        def counting(*arguments, **options):
            calls[0] += 1
            if calls[0] == number:
                killed()
            return call(*arguments, **options)

        return counting

    for name in ("replace", "rmdir", "unlink", "mkdir"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))


@pytest.mark.parametrize("number", range(1, 12))
def test_a_folder_saved_over_and_killed_at_any_change_is_the_old_or_the_new_one_and_can_be_saved_again(tmp_path, monkeypatch, number):
    folder = tmp_path / "out"
    save(folder, "old")

    def work():
        kill_at(monkeypatch, number)
        save(folder, "new")

    in_a_child(work)
    whole = {path.name: path.read_text() for path in present(folder) if path.is_file()}
    assert whole in ({"data": "old", "index": "old"}, {"data": "new", "index": "new"})
    assert (folder / "part" / "a").read_text() == whole["index"]
    save(folder, "third")
    assert content(folder) == {"data": "third", "index": "third", "part/a": "third"}


def test_what_a_killed_process_left_unfinished_is_gone_when_the_folder_is_locked_again(tmp_path):
    def work():
        with replacing(tmp_path / "deep" / "a.bin") as temporary:
            temporary.write_text("half")
            killed()

    (tmp_path / "deep").mkdir()
    assert in_a_child(work) == signal.SIGKILL
    assert [path.name[: len(WRITING)] for path in (tmp_path / "deep").iterdir()] == [WRITING]
    with locked(tmp_path):
        assert list((tmp_path / "deep").iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


def test_the_staging_of_a_living_process_stays(tmp_path):
    living = tmp_path / f"{WRITING}{locks.HOST}-{os.getppid()}-0-a"
    living.touch()
    with replacing(tmp_path / "b") as mine, locked(tmp_path):
        mine.touch()
        assert mine.exists()
    assert living.exists()


@pytest.mark.parametrize("name", [".writing-settings.json", ".writing-x8f3k2", f"{WRITING}ffff0-1-0-a"])
def test_staging_of_other_versions_and_machines_is_gone_once_the_folder_is_locked(tmp_path, name):
    (tmp_path / name).touch()
    with locked(tmp_path):
        assert not (tmp_path / name).exists()


def test_a_folder_with_unfinished_files_only_holds_nothing(tmp_path):
    (tmp_path / f"{WRITING}x").mkdir()
    (tmp_path / LOCK).touch()
    assert present(tmp_path) == [] == present(tmp_path / "none")
    (tmp_path / "mine").touch()
    assert present(tmp_path) == [tmp_path / "mine"]


def test_what_was_committed_is_finished_by_whoever_reads(tmp_path):
    (tmp_path / COMMITTED).mkdir()
    (tmp_path / COMMITTED / "a").write_text("new")
    (tmp_path / "a").write_text("old")
    assert content(settled(tmp_path)) == {"a": "new"}


@pytest.mark.parametrize("file", [False, True])
def test_a_second_process_is_refused_with_the_place_and_the_pid_of_the_first(tmp_path, file):
    target = tmp_path / "out"

    def second():
        for take in (refuse_busy, lambda *where, **how: locked(*where, **how).__enter__()):
            with pytest.raises(UserError, match=rf"\(pid {os.getppid()}\) is writing to {target}"):
                take(target, file=file)

    with locked(target, file=file), locked(target, file=file):
        assert in_a_child(second) == 0
        assert in_a_child(second) == 0  # a forked child that ends takes no lock with it
    assert list(tmp_path.iterdir()) == []


def test_a_lock_ends_with_its_process(tmp_path):
    def first():
        held = locked(tmp_path / "out")
        held.__enter__()
        killed()

    assert in_a_child(first) == signal.SIGKILL
    refuse_busy(tmp_path / "out")
    with locked(tmp_path / "out"):
        pass
    assert list((tmp_path / "out").iterdir()) == []


def test_a_lock_is_not_held_by_children_of_a_killed_process(tmp_path):
    """Else a worker that outlives its parent would keep everybody out."""
    ready = tmp_path / "ready"

    def first():
        held = locked(tmp_path / "out")
        held.__enter__()
        if not os.fork():
            ready.write_text(str(os.getpid()))
            time.sleep(30)
            os._exit(0)
        while not ready.exists() or not ready.read_text():
            time.sleep(0.01)
        killed()

    assert in_a_child(first) == signal.SIGKILL
    with locked(tmp_path / "out"):
        os.kill(int(ready.read_text()), signal.SIGKILL)


def test_an_interrupted_writer_leaves_neither_lock_nor_staging_nor_an_empty_folder(tmp_path):
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "a" / "out", last="x") as stage:
        (stage / "x").touch()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_file_systems_without_locks_go_by_the_process_that_is_named(tmp_path, monkeypatch):
    def none(descriptor, how):
        raise OSError(locks.NO_LOCKS[0], "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", none)
    (tmp_path / LOCK).write_text(f"{locks.HOST} {os.getppid()}")
    with pytest.raises(UserError, match=f"pid {os.getppid()}"), locked(tmp_path):
        pass
    for text in ("", "garbage", f"{locks.HOST} 4194304000", f"{locks.HOST} {os.getpid()}"):
        (tmp_path / LOCK).write_text(text)
        with locked(tmp_path):
            pass
        assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize("errno", [locks.errno.EROFS, locks.errno.EACCES])
def test_a_place_that_cannot_be_written_is_named_with_the_reason(tmp_path, monkeypatch, errno):
    def refuse(path, *arguments, **options):
        raise OSError(errno, os.strerror(errno), str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match=rf"nothing can be written to {tmp_path} \({os.strerror(errno)}"), locked(tmp_path):
        pass


def test_a_link_in_the_place_of_a_lock_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LOCK).symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="nothing can be written"), locked(tmp_path / "out"):
        pass
    assert (tmp_path / "mine").read_text() == "precious"


def test_long_names_can_be_written(tmp_path):
    path = tmp_path / ("ä" * 120 + ".json")
    write_atomically(path, "{}")
    assert path.read_text() == "{}"


def test_a_hash_follows_the_content_also_where_size_and_time_of_change_stay(tmp_path):
    path = tmp_path / "a"
    path.write_text("one")
    time.sleep(1.1)  # old enough to be remembered
    before, times = sha256(path), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    assert sha256(path) == before
    path.write_text("two")
    os.utime(path, ns=times)
    assert sha256(path) != before


def test_a_file_is_hashed_once_in_a_process(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_text("one")
    time.sleep(1.1)
    first = sha256(path)
    monkeypatch.setattr(Path, "open", None)
    assert sha256(path) == first


def test_a_link_in_the_place_of_what_was_committed_moves_nothing(tmp_path):
    """A downloaded folder could point anywhere."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").write_text("mine")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / COMMITTED).symlink_to(tmp_path / "mine")
    settled(tmp_path / "theirs")
    with locked(tmp_path / "theirs"):
        pass
    assert content(tmp_path / "mine") == {"precious": "mine"}


def test_experts_and_ensembles_whose_writing_was_killed_at_its_end_are_found(tmp_path):
    from afa.checkpoint.manifest import read_manifest
    from afa.demo.data import ENSEMBLE, EXPERTS
    from afa.experts.locate import locate
    from afa.experts.spec import ExpertSpec

    for name, source in (("expert", EXPERTS["curves"]), ("ensemble", ENSEMBLE)):
        shutil.copytree(source, tmp_path / name / COMMITTED)
    assert locate(ExpertSpec.parse(str(tmp_path / "expert"))).whole_pipeline
    assert len(read_manifest(tmp_path / "ensemble").experts) == 3
