"""Sessions: isolated from each other, bounded in number, time and disk, and gone without a trace."""

import copy
import gc
import os
import stat
import threading

import pytest

from anomalysd_pipeline.app.limits import Limits
from anomalysd_pipeline.app.sessions import EMPTY_ENOUGH, IDLE_ENOUGH, Part, SessionStore

LIMITS = Limits(sessions=3, idle_seconds=1000, disk_bytes=10_000, parts=2)


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(clock, tmp_path):
    return SessionStore(LIMITS, dict, tmp_path / "sessions", clock)


class TestIsolation:
    def test_a_key_finds_its_own_session_only(self, store):
        first, second = store.get(None), store.get(None)
        first.parts["nut"] = Part("nut")
        first.pipe["taught"] = True
        assert store.get(first.key) is first and store.get(second.key) is second
        assert second.parts == {} and second.pipe == {} and first.folder != second.folder

    def test_keys_are_long_and_in_no_path(self, store):
        sessions = [store.get(None) for _ in range(3)]
        assert len({session.key for session in sessions}) == 3
        for session in sessions:
            assert len(session.key) >= 22  # 16 bytes in base64
            assert session.key not in str(session.folder)

    @pytest.mark.parametrize("key", ["", "x", "../..", "\0", 0, True, ["x"], {"a": 1}, b"x", 1.5])
    def test_any_other_key_is_nobodys(self, store, key):
        mine = store.get(None)
        other = store.get(key)
        assert other is not mine and other.key != key
        store.drop(key)
        assert store.get(mine.key) is mine

    def test_only_the_owner_of_the_process_may_look_into_a_folder(self, store):
        session = store.get(None)
        assert stat.S_IMODE(os.stat(session.folder).st_mode) == 0o700
        assert stat.S_IMODE(os.stat(session.new_folder()).st_mode) == 0o700

    def test_a_pipeline_is_made_once_and_at_first_use(self, tmp_path):
        made = []
        store = SessionStore(LIMITS, lambda: made.append(object()) or made[-1], tmp_path)
        session = store.get(None)
        assert made == []
        seen = []
        threads = [threading.Thread(target=lambda: seen.append(session.pipe)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(made) == 1 and seen == made * 8

    def test_a_pipeline_that_could_not_be_made_is_tried_again(self, tmp_path):
        answers = [ValueError("no base"), "pipe"]

        def make():
            answer = answers.pop(0)
            if isinstance(answer, ValueError):
                raise answer
            return answer

        session = SessionStore(LIMITS, make, tmp_path).get(None)
        with pytest.raises(ValueError, match="no base"):
            _ = session.pipe
        assert session.pipe == "pipe"


class TestTime:
    def test_an_expired_session_is_gone_with_its_files(self, store, clock):
        session = store.get(None)
        (session.folder / "map.png").write_bytes(b"x")
        clock.now = 1001
        assert store.sweep() == 1 and len(store) == 0
        assert not session.folder.exists() and session.parts == {} and session.dropped
        assert store.get(session.key).key != session.key

    def test_get_expires_by_itself(self, store, clock):
        session = store.get(None)
        clock.now = 1001
        assert store.get(session.key) is not session and not session.folder.exists()

    def test_use_keeps_it(self, store, clock):
        session = store.get(None)
        for now in (900, 1800, 2700):
            clock.now = now
            assert store.get(session.key) is session
        clock.now = 3600
        session.touch()
        clock.now = 4500
        assert store.sweep() == 0 and session.idle == 900

    def test_work_keeps_it_however_long(self, store, clock):
        session = store.get(None)
        with session.in_use():
            clock.now = 5000
            assert store.sweep() == 0 and session.idle == 0
            assert store.get(session.key) is session
        assert session.idle == 0
        clock.now = 6001
        assert store.sweep() == 1


class TestDropping:
    def test_deletes_the_files(self, store):
        session = store.get(None)
        (session.new_folder() / "map.png").write_bytes(b"x")
        store.drop(session.key)
        assert not session.folder.exists() and len(store) == 0
        store.drop(session.key)  # again

    def test_files_stay_until_the_work_has_ended(self, store):
        session = store.get(None)
        with session.in_use(), session.in_use():
            store.drop(session.key)
            assert session.folder.exists() and session.dropped
            (session.new_folder() / "late.png").write_bytes(b"x")
            with pytest.raises(ValueError, match="session has ended"), session.in_use():
                pass
        assert not session.folder.exists()
        with pytest.raises(ValueError, match="session has ended"):
            session.new_folder()

    def test_others_keep_theirs(self, store):
        first, second = store.get(None), store.get(None)
        second.parts["nut"] = Part("nut")
        store.drop(first.key)
        assert store.get(second.key) is second and second.folder.exists() and "nut" in second.parts

    def test_a_link_in_a_folder_is_not_followed(self, store, tmp_path):
        outside = tmp_path / "outside"
        outside.mkdir()
        (outside / "kept.txt").write_text("x")
        session = store.get(None)
        (session.folder / "link").symlink_to(outside)
        assert session.disk_used() < 1000
        store.drop(session.key)
        assert (outside / "kept.txt").exists() and not session.folder.exists()


class TestRenewing:
    def test_the_new_key_alone_opens_it(self, store):
        session = store.get(None)
        session.parts["nut"], old = Part("nut"), session.key
        assert store.renew(old) is session and session.key != old
        assert store.get(session.key) is session and store.get(old) is not session
        store.drop(old)  # as the page that had it does in the end
        assert not session.dropped and store.get(session.key) is session

    def test_counts_as_a_use(self, store, clock):
        session = store.get(None)
        clock.now = 999
        store.renew(session.key)
        clock.now = 1500
        assert store.get(session.key) is session

    def test_a_key_of_nobody_stays_one(self, store):
        assert store.renew("x") is None and len(store) == 0


class TestPlaces:
    def test_none_is_left_while_all_are_busy(self, store, clock):
        sessions = [store.get(None) for _ in range(3)]
        for session in sessions:
            session.parts["nut"] = Part("nut")
        clock.now = IDLE_ENOUGH
        with pytest.raises(ValueError, match="busy: all 3 places are taken; try again"):
            store.get(None)
        assert len(store) == 3 and all(store.get(session.key) is session for session in sessions)

    def test_the_one_idle_longest_leaves(self, store, clock):
        sessions = []
        for now in (0, 1, 2):
            clock.now = now
            sessions.append(store.get(None))
            sessions[-1].parts["nut"] = Part("nut")
        clock.now = 3
        store.get(sessions[0].key)
        clock.now = IDLE_ENOUGH + 2
        new = store.get(None)
        assert sessions[1].dropped and not sessions[1].folder.exists()
        assert [store.get(one.key) is one for one in (sessions[0], sessions[2], new)] == [True] * 3

    def test_one_without_parts_leaves_soon_and_first(self, store, clock):
        old, empty, young = (store.get(None) for _ in range(3))
        old.parts["nut"] = young.parts["nut"] = Part("nut")
        clock.now = EMPTY_ENOUGH
        with pytest.raises(ValueError, match="busy"):
            store.get(None)
        clock.now = IDLE_ENOUGH + 1
        store.get(empty.key)
        clock.now += EMPTY_ENOUGH + 1
        store.get(None)
        assert empty.dropped and not old.dropped and not young.dropped

    def test_one_at_work_never_leaves(self, store, clock):
        sessions = [store.get(None) for _ in range(3)]
        with sessions[0].in_use(), sessions[1].in_use(), sessions[2].in_use():
            clock.now = 10_000
            with pytest.raises(ValueError, match="busy"):
                store.get(None)
        assert not any(session.dropped for session in sessions)

    def test_a_crowd_gets_no_more_places_than_there_are(self, store):
        got, refused = [], []

        def come():
            try:
                got.append(store.get(None).key)
            except ValueError:
                refused.append(1)

        threads = [threading.Thread(target=come) for _ in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(got)) == 3 and len(refused) == 21 and len(store) == 3


class TestRoom:
    def test_counts_all_files(self, store):
        session = store.get(None)
        (session.folder / "a").write_bytes(b"x" * 3000)
        (session.new_folder() / "b").write_bytes(b"x" * 2000)
        used = session.disk_used()
        assert 5000 <= used < 10_000  # the inner folder takes some itself
        session.require_room(10_000 - used)
        with pytest.raises(ValueError, match="give fewer or smaller files"):
            session.require_room(10_000 - used + 1)

    def test_parts(self, store):
        session = store.get(None)
        for name in ("nut", "ring"):
            session.require_part(name)
            session.parts[name] = Part(name)
        session.require_part("ring")
        with pytest.raises(ValueError, match="room for 2 parts, and it has 'nut', 'ring'"):
            session.require_part("gear")


class TestRoot:
    def test_a_root_of_its_own_goes_with_the_store(self):
        store = SessionStore(LIMITS, dict)
        root, session = store.root, store.get(None)
        assert stat.S_IMODE(os.stat(root).st_mode) == 0o700 and session.folder.parent == root
        del store
        gc.collect()
        assert not root.exists()

    def test_a_given_root_is_made_and_kept(self, tmp_path):
        root = tmp_path / "a" / "b"
        SessionStore(LIMITS, dict, root)
        gc.collect()
        assert root.is_dir()


def test_a_part_holds_nothing_of_another():
    first, second = Part("a"), Part("b")
    first.facts["shots"] = 1
    assert second.facts == {} and copy.copy(first).facts == {"shots": 1}
