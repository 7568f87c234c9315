"""Files and folders are complete or not there, whatever ends the process that writes them."""

import json
import os
import shutil
import signal

import pytest

from anomalysd_pipeline import AnomalySDPipeline
from anomalysd_pipeline.common.files import (
    SoleWriter,
    disk_errors,
    read_rows,
    recover,
    remove,
    write_whole,
    written_into,
    written_whole,
)

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="the writer is a forked process")


def put(folder, text):
    with written_whole(folder) as partial:
        (partial / "first.txt").write_text(text)
        (partial / "second.txt").write_text(text)


def held(folder):
    """The text of a complete folder; None for one that is missing."""
    if not folder.exists():
        return None
    first, second = ((folder / f"{name}.txt").read_text() for name in ("first", "second"))
    assert first == second
    return first


def killed(write, call) -> bool:
    """Whether SIGKILL ended a process at its `call`-th operation on the disk, before the operation."""
    child = os.fork()
    if child == 0:
        calls = 0

        def counted(operation):
            def run(*args, **options):
                nonlocal calls
                calls += 1
                if calls == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return operation(*args, **options)

            return run

        for name in ("mkdir", "replace", "rename", "rmdir", "unlink", "fsync"):
            setattr(os, name, counted(getattr(os, name)))
        status = 1
        try:
            write()
            status = 0
        finally:
            os._exit(status)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0
    return os.WIFSIGNALED(status)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "folder"


@forks
@pytest.mark.parametrize("before", [None, "old"])
class TestKilledBetweenAnyTwoSteps:
    def after_each(self, folder, before):
        """A writer killed at each of its operations in turn, from the same state."""
        call = 0
        while True:
            call += 1
            remove(folder)
            if before:
                put(folder, before)
            if not killed(lambda: put(folder, "new"), call):
                break
            yield
        assert call > 5, "hardly anything was interrupted"

    def test_a_complete_folder_is_there_or_found_again(self, folder, before):
        found = []
        for _ in self.after_each(folder, before):
            recover(folder)
            found.append(held(folder))
        assert set(found) == {before, "new"}
        assert found == sorted(found, key=[before, "new"].index)  # what is complete once stays so

    def test_the_next_writer_keeps_it_too(self, folder, before):
        """One that fails, so that nothing of its own is left."""
        found = []
        for _ in self.after_each(folder, before):
            with pytest.raises(KeyError), written_whole(folder):
                raise KeyError
            found.append(held(folder))
            assert [path.name for path in folder.parent.iterdir()] == ([] if found[-1] is None else ["folder"])
        assert set(found) == {before, "new"}

    def test_the_next_writer_replaces_it_and_leaves_no_litter(self, folder, before):
        for _ in self.after_each(folder, before):
            put(folder, "newer")
            assert held(folder) == "newer" and [path.name for path in folder.parent.iterdir()] == ["folder"]

    def test_what_is_removed_does_not_come_back(self, folder, before):
        for _ in self.after_each(folder, before):
            remove(folder)
            recover(folder)
            assert held(folder) is None

    def test_undoing_is_killed_too(self, folder, before):
        def fail():
            replace = os.replace

            def full(source, target):
                if target == folder:
                    raise OSError(28, "No space left on device")
                replace(source, target)

            os.replace = full
            try:
                put(folder, "new")
            except OSError:
                os.replace = replace

        call = 0
        while True:
            call += 1
            remove(folder)
            if before:
                put(folder, before)
            ended = killed(fail, call)
            recover(folder)
            assert held(folder) in (before, "new")
            if not ended:
                break
        assert held(folder) == before


class TestRecover:
    def test_an_earlier_version_left_the_old_folder_alone(self, folder):
        """Its unfinished one may be incomplete."""
        put(folder, "old")
        folder.rename(folder.with_name(".folder.old"))
        folder.with_name(".folder.partial").mkdir()
        recover(folder)
        assert held(folder) == "old"

    def test_a_pipeline_that_a_killed_writer_had_completed_is_loaded(self, folder, tiny_pipeline_folder):
        shutil.copytree(tiny_pipeline_folder, folder.with_name(".folder.new"))
        folder.with_name(".folder.old").mkdir()
        assert AnomalySDPipeline.from_pretrained(folder).config.resolution == 64

    @pytest.mark.parametrize("path", ["", "/", ".", "somebody/never-written", "x" * 5000, "a\0b"])
    def test_of_something_else_is_nothing(self, path, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        recover(path)
        assert list(tmp_path.iterdir()) == []


class TestWriteWhole:
    def test_makes_its_folder_and_replaces(self, tmp_path):
        path = tmp_path / "a" / "b.txt"
        for text in ("old", "new"):
            write_whole(path, lambda unfinished, text=text: unfinished.write_text(text))
            assert path.read_text() == text and [each.name for each in path.parent.iterdir()] == ["b.txt"]

    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
    def test_after_an_error_the_old_one_is_there_alone(self, tmp_path, error):
        path = tmp_path / "b.txt"
        path.write_text("old")

        def save(unfinished):
            unfinished.write_text("ne")
            raise error

        with pytest.raises(type(error)):
            write_whole(path, save)
        assert path.read_text() == "old" and [each.name for each in tmp_path.iterdir()] == ["b.txt"]

    @forks
    def test_killed_at_any_step_it_is_old_or_new(self, tmp_path):
        path, unfinished, found = tmp_path / "b.txt", tmp_path / ".unfinished", []
        while True:
            path.write_text("old")
            if not killed(lambda: write_whole(path, lambda at: at.write_text("new"), unfinished), len(found) + 1):
                break
            found.append(path.read_text())
        assert set(found) == {"old"} and len(found) == 3 and path.read_text() == "new"

    def test_a_full_disk_is_one_sentence(self, tmp_path):
        def save(unfinished):
            raise OSError(28, "No space left on device")

        sentence = "^`out` '.*' could not be written .No space left on device.; free some"
        with pytest.raises(ValueError, match=sentence), disk_errors("out", tmp_path):
            write_whole(tmp_path / "b.txt", save)


class TestWrittenInto:
    def test_what_is_there_stays_and_what_is_written_replaces_it(self, folder):
        for text in ("old", "new"):
            with written_into(folder) as partial:
                (partial / "part").mkdir()
                (partial / "part" / "weights").write_text(text)
            if text == "old":
                (folder / "mine").write_text("mine")
        found = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}
        assert found == {"part/weights": "new", "mine": "mine"}
        assert [path.name for path in folder.parent.iterdir()] == ["folder"]

    @pytest.mark.parametrize("earlier", [False, True])
    def test_after_an_error_all_is_as_before(self, folder, earlier):
        if earlier:
            put(folder, "old")
        with pytest.raises(KeyError), written_into(folder) as partial:
            (partial / "first.txt").write_text("new")
            raise KeyError
        assert held(folder) == ("old" if earlier else None)
        assert list(folder.rglob(".*")) == []

    def test_a_pipeline_on_a_full_disk_is_as_before(self, folder, tiny_pipeline):
        resource = pytest.importorskip("resource")
        tiny_pipeline.save_pretrained(folder)
        (folder / "notes.txt").write_text("mine")
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        try:
            with pytest.raises(ValueError, match="^`save_directory` '.*' could not be written .*; free some space"):
                tiny_pipeline.save_pretrained(folder)
            with pytest.raises(ValueError, match="^`save_directory` '.*' could not be written"):
                tiny_pipeline.save_pretrained(folder.with_name("new"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        assert [path.name for path in folder.parent.iterdir()] == ["folder"]


class TestUnfinished:
    @forks
    def test_what_a_killed_process_left_is_removed_by_the_next(self, tmp_path):
        def die(unfinished):
            unfinished.write_text("ne")
            os.kill(os.getpid(), signal.SIGKILL)

        path = tmp_path / "results.csv"
        child = os.fork()
        if child == 0:
            write_whole(path, die)
        os.waitpid(child, 0)
        assert len(list(tmp_path.iterdir())) == 1
        write_whole(path, lambda unfinished: unfinished.write_text("new"))
        assert [each.name for each in tmp_path.iterdir()] == ["results.csv"]

    def test_that_of_a_running_process_stays(self, tmp_path):
        path = tmp_path / "results.csv"

        def save(unfinished):
            unfinished.write_text("outer")
            write_whole(path, lambda other: other.write_text("inner"))

        write_whole(path, save)
        assert path.read_text() == "outer" and len(list(tmp_path.iterdir())) == 1


@forks
class TestSoleWriter:
    def test_a_second_is_refused_until_the_first_has_ended(self, folder):
        with SoleWriter("out", folder) as first:
            first.keep()
            first.keep()
            sentence = "^`out` '.*' is being written by another run; wait until it has ended"
            with SoleWriter("out", folder) as second, pytest.raises(ValueError, match=sentence):
                second.keep()
        assert not folder.exists()
        with SoleWriter("out", folder) as third:
            third.keep()
            (folder / "result").write_text("mine")
        assert (folder / "result").read_text() == "mine"

    def test_a_killed_process_keeps_nothing(self, folder):
        child = os.fork()
        if child == 0:
            SoleWriter("out", folder).keep()
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
        with SoleWriter("out", folder) as writer:
            writer.keep()

    def test_a_file_is_one_sentence(self, folder):
        folder.write_text("mine")
        with pytest.raises(ValueError, match="^`out` '.*' could not be written .File exists"):
            SoleWriter("out", folder).keep()


def test_the_outermost_of_several_names_what_was_given(tmp_path):
    inner, sentence = disk_errors("inner", tmp_path / "inner"), "^`outer` '.*' could not be written"
    with pytest.raises(ValueError, match=sentence), disk_errors("outer", tmp_path), inner:
        raise OSError(28, "No space left on device")
    with pytest.raises(ValueError, match="^`next`"), disk_errors("next", tmp_path):
        raise OSError(28, "No space left on device")


def test_damaged_rows_are_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = {"name": "ä", "number": 1}
    lines = [
        b"5",
        b"null",
        b"[]",
        b"{}",
        b"\0\0\0",
        b"\xff\xfe",
        b"[" * 10**5,
        b'{"name": "x"}',
        b'{"name": 5, "number": 1}',
    ]
    lines += [json.dumps(good).encode()]
    path.write_bytes(b"\n".join(lines) + b"\n" + json.dumps(good).encode())  # the last is cut short
    ((place, row),) = read_rows(path, {"name": str, "number": int})
    assert row == good
    with open(path, "rb") as file:
        file.seek(place)
        assert json.loads(file.readline()) == good
