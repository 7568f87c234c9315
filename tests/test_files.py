"""Files and folders are complete or not there, whatever ends the process that writes them."""

import os
import shutil
import signal

import pytest

from anomalysd_pipeline import AnomalySDPipeline
from anomalysd_pipeline.common.files import disk_errors, recover, remove, write_whole, written_whole

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
