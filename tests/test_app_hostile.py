"""What an attacker would send to the running app: refused with a sentence, the app alive, nothing of the server told.

SECURITY.md lists what each class shows.
"""

import contextlib
import io
import itertools
import json
import os
import time
import zipfile

import pytest
from PIL import Image

from anomalysd_pipeline.app.sessions import EMPTY_ENOUGH
from anomalysd_pipeline.app.space import local_token

from .browser import ROOT, running_app
from .hostile_files import encoded, gif_header, picture, png_header, tiff_tags, webp_header
from .stranger import JSON, Refused, Stranger, joined
from .tiny_adaptations import quick_pipeline

pytestmark = pytest.mark.full

pytest.importorskip("gradio")

BOUNDS = {
    "UPLOAD_BYTES": 400_000,
    "UNPACKED_BYTES": 600_000,
    "ZIP_ENTRIES": 20,
    "PICTURES": 6,
    "PIXELS": 4_000_000,
    "SESSIONS": 128,  # refusals come fast, and each stranger's call is a session for a second
}
MARKUP = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    quick_pipeline().save_pretrained(folder / "tiny")
    bounds = {f"ANOMALYSD_MAX_{name}": str(value) for name, value in BOUNDS.items()}
    with running_app(folder / "app", ANOMALYSD_MODEL=str(folder / "tiny"), HF_TOKEN="hf_secret", **bounds) as app:
        with Stranger(app) as first:  # loads the model, which no test's bound on memory means
            first.batch(("fine.png", encoded()))
        yield app


@pytest.fixture
def stranger(app):
    """A visitor who speaks HTTP; afterwards the app must still serve its page, and a picture be inspected."""
    with Stranger(app) as stranger:
        yield stranger
        assert app.is_alive()
        (row,) = stranger.batch(("fine.png", encoded()))
        assert row["score"] > 0
        assert "Traceback" not in stranger.heard and "hf_secret" not in stranger.heard
        # gradio names the places of uploads and results, which only their owner is served; no other place.
        heard = stranger.heard.replace(f"{app.folder}/gradio/", "")
        for place in (app.folder, ROOT, os.path.expanduser("~/")):
            assert str(place) not in heard


def zipped(*entries, method=zipfile.ZIP_DEFLATED) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", method) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return data.getvalue()


class TestFilesThatAreNoImages:
    def test_are_refused_by_their_name(self, stranger):
        for kind, content in {
            "empty": b"",
            "text": b"no picture",
            "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
            "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            "program": b"\x7fELF" + bytes(100),
            "cut short": encoded()[:60],
            "noise": b"\x89PNG\r\n\x1a\n" + os.urandom(500),
        }.items():
            sent = stranger.upload("picture.png", content)
            assert "picture.png" in stranger.refusal("inspect", sent, "Any part", "fast"), kind

    def test_do_not_stop_a_batch(self, stranger):
        rows = stranger.batch(("a.png", encoded()), ("b.png", b"text"), ("c.png", encoded(picture(seed=2))))
        assert [bool(row["error"]) for row in rows] == [False, True, False]


class TestBombs:
    def test_of_pixels(self, stranger, app):
        before = app.memory()
        for name, content in (
            ("header.png", png_header(50_000, 50_000)),
            ("whole.png", encoded(Image.new("1", (3000, 2000)))),
            ("a.gif", gif_header((60_000, 60_000), (10, 10))),
            ("a.webp", webp_header(16_000, 16_000)),
            ("a.tif", tiff_tags(60_000, 60_000)),
            ("tile.tif", tiff_tags(32, 32, w=32_768, h=32_768)),
        ):
            assert name in stranger.refusal("inspect", stranger.upload(name, content), "Any part", "fast")
            assert app.memory() - before < 200_000_000, name

    @pytest.mark.canary
    @pytest.mark.timeout(180)  # starts the app
    def test_of_a_zip(self, stranger, app):
        before = app.memory()
        bomb = ("bomb.png", b"\x89PNG\r\n\x1a\n" + bytes(50_000_000))
        many = [(f"{i}.png", encoded(Image.new("L", (550, 550)), compress_level=0)) for i in range(3)]
        for entries, words in (([bomb], "larger than"), (many, "unpacked")):
            rows = stranger.batch(("a.zip", zipped(*entries)), ("b.png", encoded()))
            assert words in rows[-2]["error"] and not rows[-1]["error"]
        assert app.memory() - before < 200_000_000

    def test_of_entries(self, stranger):
        (row,) = stranger.batch(("a.zip", zipped(*((f"{i}.png", b"") for i in range(3000)))))
        assert "a.zip" in row["error"]

    def test_of_zips_in_zips(self, stranger):
        (row,) = stranger.batch(("a.zip", zipped(("inner.zip", zipped(("x.png", encoded()))))))
        assert "archive within" in row["error"]

    def test_of_pictures_and_bytes(self, stranger):
        rows = stranger.batch(*((f"{i}.png", encoded()) for i in range(7)))
        assert [bool(row["error"]) for row in rows] == [False] * 6 + [True] and "6 pictures" in rows[6]["error"]
        with pytest.raises(Refused, match="413"):
            stranger.upload("large.png", os.urandom(BOUNDS["UPLOAD_BYTES"] + 1000))


class TestZipEntries:
    def test_that_point_outside(self, stranger, app):
        for name in ("../../evil.png", "/etc/evil.png", "C:\\evil.png", "..\\..\\evil.png"):
            rows = stranger.batch(("a.zip", zipped((name, encoded()), ("fine.png", encoded()))))
            assert rows[0]["error"] and not rows[1]["error"], name
        assert not list(app.folder.rglob("*evil*")) and not list(app.folder.parent.glob("*evil*"))

    @pytest.mark.canary
    @pytest.mark.timeout(180)  # starts the app
    def test_of_an_adaptation(self, stranger, app):
        for entries in ([("../evil.json", "{}")], [("adaptation.json", "{}"), ("run.py", "x")], [("x.pt", "x")]):
            sentence = stranger.refusal("load_adaptation", stranger.upload("a.zip", zipped(*entries)))
            assert "a.zip" in sentence
        assert not list(app.folder.rglob("*evil*")) and not list(app.folder.rglob("run.py"))


class TestTexts:
    @pytest.mark.canary
    @pytest.mark.timeout(180)  # starts the app
    def test_markup_in_a_files_name(self, stranger):
        name = f"{MARKUP}.png"
        sentence = stranger.refusal("inspect", stranger.upload(name, b"no picture"), "Any part", "fast")
        assert "onerror" in sentence
        (row,) = stranger.batch(("a.zip", zipped((name, encoded()))))
        assert "<" not in row["file"]

    def test_of_a_parts_name(self, stranger):
        given = [stranger.upload("a.png", encoded())]
        for name in ("../x", "a/b", "", " ", "x" * 100_000, "\x00", 7, None, ["nut"], {}):
            assert "`name`" in stranger.refusal("teach", name, given, "", "", "quick", 0.05, 0), str(name)[:20]

    def test_of_a_description(self, stranger):
        given = [stranger.upload("a.png", encoded())]
        for text in ("x" * 301, "\n".join("x" * 9), "x" * 1_000_000, 5, ["x"]):
            assert "`coarse`" in stranger.refusal("teach", "nut", given, text, "", "quick", 0.05, 0), str(text)[:20]
            assert "`fine`" in stranger.refusal("teach", "nut", given, "", text, "quick", 0.05, 0), str(text)[:20]


class TestValues:
    def test_of_a_preset(self, stranger):
        file = stranger.upload("a.png", encoded())
        for preset in ("slow", "", None, 3, ["fast"], {"a": 1}, "x" * 10_000):
            assert "`preset`" in stranger.refusal("inspect", file, "Any part", preset), str(preset)[:20]
            assert "`preset`" in stranger.refusal("batch", [file], "Any part", preset), str(preset)[:20]

    def test_of_a_part(self, stranger):
        file = stranger.upload("a.png", encoded())
        for part in (5, ["nut"], {"a": 1}, "../nut", "x" * 65):
            assert "`part`" in stranger.refusal("inspect", file, part, "fast"), part

    def test_of_a_length(self, stranger):
        given = [stranger.upload("a.png", encoded())]
        for length in ("forever", None, 10**9, -1, ["quick"]):
            assert "`length`" in stranger.refusal("teach", "nut", given, "", "", length, 0.05, 0), length

    def test_of_a_rate(self, stranger):
        given = [stranger.upload("a.png", encoded())]
        for rate in (0, 0.5, -1, "much", None, [0.05], 1e400):
            assert "`false_alarm_rate`" in stranger.refusal("teach", "nut", given, "", "", "quick", rate, 0), str(rate)

    def test_of_a_depth(self, stranger):
        given = [stranger.upload("a.png", encoded())]
        for depth in (7, 17, -1, 1.5, "12", None, [12], 10**9):
            assert "`bit_depth`" in stranger.refusal("teach", "nut", given, "", "", "quick", 0.05, depth), str(depth)

    def test_of_a_region(self, stranger):
        for region in ("/etc/passwd", {"a": 1}, 5, [[0, 0]], [[0, 0], [2, 1]], [[0, 0]] * 5000, [[None, 0], [1, 1]]):
            assert "`region`" in stranger.refusal("set_region", "nut", region), str(region)[:20]
        assert "`part`" in stranger.refusal("set_region", "nut", [[0, 0], [1, 1]])

    def test_of_how_many_pictures(self, stranger):
        file = stranger.upload("a.png", encoded())
        for count in (0, 9):
            assert "`pictures`" in stranger.refusal("teach", "nut", [file] * count, "", "", "quick", 0.05, 0), count

    @pytest.mark.canary
    @pytest.mark.timeout(180)  # starts the app
    def test_of_a_function(self, stranger, app):
        """Every function of the page, the private ones too, with everything that its arguments are not."""
        config = stranger.http.get("config").json()
        for values in ([], [None] * 9, ["x" * 1000] * 9, [{"path": "/etc/passwd"}] * 9, [1e400] * 9, [[[[]]]] * 9):
            for function in config["dependencies"]:
                body = {"data": values[: len(function["inputs"])], "fn_index": function["id"], "session_hash": "abc"}
                answer = stranger.http.post("gradio_api/queue/join", content=json.dumps(body), headers=JSON)
                stranger.heard += answer.text
                answer = stranger.http.post("gradio_api/run/predict", content=json.dumps(body), headers=JSON)
                assert answer.status_code >= 400 or "root:" not in answer.text
                stranger.heard += answer.text

    def test_of_what_is_no_json(self, stranger):
        for body in (b"", b"{", b"[]", b'{"data": 5}', b"\xff" * 1000, b"[" * 100_000):
            answer = stranger.http.post("gradio_api/call/inspect", content=body, headers=JSON)
            assert 400 <= answer.status_code < 600
            stranger.heard += answer.text


class TestFilesOfTheServer:
    def test_are_not_served(self, stranger, app):
        model = next((ROOT / "anomalysd_pipeline" / "embedded").glob("*.json"))
        forms = ("gradio_api/file={}", "gradio_api/file/{}", "file={}", "gradio_api/file=/tmp/..{}")
        files = ("/etc/passwd", app.log, ROOT / "app.py", model, f"{app.folder}/gradio/../log.txt")
        for form, path in itertools.product(forms, (*files, "/proc/self/environ")):
            for given in (str(path), str(path).replace("/", "%2f")):
                answer = stranger.http.get(form.format(given))
                assert answer.status_code >= 400 or answer.headers["content-type"].startswith("text/html")
                # What was asked for may be said again, what is in it may not.
                assert "root:" not in answer.text and "_class_name" not in answer.text
                assert "hf_secret" not in answer.text and "from anomalysd_pipeline" not in answer.text

    def test_by_other_doors(self, stranger):
        for path in (
            "static/../../../app.py",
            "static/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
            "assets/%2e%2e/%2e%2e/blocks.py",
            "svelte/%2e%2e%2f%2e%2e%2fblocks.py",
            "gradio_api/proxy=http://127.0.0.1:1/",
            "gradio_api/proxy=https://example.org/",
            "gradio_api/file=https://example.org/",
            "gradio_api/custom_component/1/client/component/%2e%2e%2fapp.py",
            "gradio_api/token",
            "gradio_api/file=%00",
            "gradio_api/file=/%ed%a0%80",
            "monitoring",
            "monitoring/summary",
        ):
            answer = stranger.http.get(path)
            assert answer.status_code < 500, path
            for secret in ("root:", "hf_secret", "from __future__", "Example Domain"):
                assert secret not in answer.text, path

    @pytest.mark.canary
    @pytest.mark.timeout(180)  # starts the app
    def test_without_an_owner_are_not_served(self, stranger, app):
        """A picture that an earlier process, or a visitor who is forgotten, left in the folder of uploads."""
        left = app.folder / "gradio" / "0123456789" / "left.png"
        left.parent.mkdir(parents=True, exist_ok=True)
        left.write_bytes(encoded())
        assert stranger.http.get(f"gradio_api/file={left}").status_code == 403
        given = {"path": str(left), "meta": {"_type": "gradio.FileData"}}
        assert "`picture`" in stranger.refusal("inspect", given, "Any part", "fast")

    def test_examples_are_served_to_everybody(self, stranger, app):
        """Those that the page is built with, and those that are drawn when one of them is selected."""
        config = stranger.http.get("config").json()
        components = {c["props"].get("elem_id"): c for c in config["components"]}
        gallery, button = components["gallery-examples"], components["gallery-again"]
        paths = [entry["image"]["path"] for entry in gallery["props"]["value"]]
        select, again = (
            next(f["id"] for f in config["dependencies"] if f["targets"] == [[component["id"], event]])
            for component, event in ((gallery, "select"), (button, "click"))
        )
        drawn = joined(stranger, select, [], event_data={"index": 1, "value": None})["output"]["data"]
        paths += [picture["path"] for picture in drawn[4]] + [entry["image"]["path"] for entry in drawn[5]]
        sent = joined(stranger, again, [None])["output"]["data"][0]
        with Stranger(app) as other:
            for path in [*paths, sent["path"]]:
                answer = other.http.get(f"gradio_api/file={path}")
                assert answer.status_code == 200 and answer.headers["content-type"].startswith("image/"), path
            assert other.call("inspect", sent, "Any part", "fast")[0]["score"] > 0

    def test_addresses_are_not_fetched(self, stranger, app):
        for address in ("https://example.org/a.png", app.url, "ftp://example.org/"):
            for form in ("gradio_api/file={}", "gradio_api/file/{}", "gradio_api/proxy={}"):
                assert stranger.http.get(form.format(address)).status_code in (400, 403)

    def test_are_not_taken_for_uploads(self, stranger, app):
        meta = {"_type": "gradio.FileData"}
        uploads = f"{app.folder}/gradio"
        odd = ("\0", "\ud800", "", None, 7, "x" * 9000, f"{uploads}/{'x' * 9000}", uploads, f"{uploads}/\0")
        for path in ("/etc/passwd", str(app.log), f"{uploads}/../log.txt", *odd):
            stranger.refusal("inspect", {"path": path, "meta": meta}, "Any part", "fast")

    @pytest.mark.parametrize("url", ["file:///etc/passwd", "http://127.0.0.1:1/a.png", "http://169.254.169.254/"])
    def test_nor_are_addresses(self, stranger, url):
        given = {"path": None, "url": url, "meta": {"_type": "gradio.FileData"}}
        for upload in (given, {**given, "path": url}):
            stranger.refusal("inspect", upload, "Any part", "fast")

    def test_are_not_written_to(self, stranger, app):
        for name in ("../../evil.png", "/tmp/evil.png", "..%2fevil.png", "a\\..\\evil.png"):
            path = os.path.realpath(stranger.upload(name, encoded())["path"])
            assert path.startswith(os.path.realpath(app.folder / "gradio"))
        answer = stranger.http.post("gradio_api/upload?upload_id=../../x", files={"files": ("a.png", b"x")})
        assert answer.status_code in (200, 400, 422)


class TestAnothersSession:
    @pytest.mark.canary
    @pytest.mark.timeout(180)  # starts the app
    def test_files(self, stranger, app):
        with Stranger(app) as owner:
            given = owner.upload("mine.png", encoded(picture(seed=9)))
            files = owner.call("inspect", given, "Any part", "fast")[1]
            for path in [given["path"], *(file["path"] for file in files)]:
                assert owner.http.get(f"gradio_api/file={path}").status_code == 200
                for form in (
                    "gradio_api/file={}",
                    "gradio_api/file/{}",
                    "gradio_api/file={}?x=1",
                    "gradio_api/file=/tmp/..{}",
                ):
                    refused = stranger.http.get(form.format(path))
                    assert refused.status_code in (403, 404), form
                    stranger.heard += refused.text.replace(path, "")
                assert "`picture`" in stranger.refusal("inspect", {**given, "path": path}, "Any part", "fast")

    def test_parts(self, stranger, app):
        with Stranger(app) as owner:
            assert owner.teach("nut")["stage"] == "done"
            assert stranger.inspect(("a.png", encoded()), "nut")["threshold"] is None

    def test_its_number(self, stranger, app):
        """gradio's number of a page, guessed: with it a part can neither be used nor its state be set."""
        config = stranger.http.get("config").json()
        teach, inspect = (
            next(f["id"] for f in config["dependencies"] if f["api_name"] == name) for name in ("teach", "inspect")
        )
        with Stranger(app) as owner:
            given = [owner.upload("a.png", encoded())]
            assert joined(owner, teach, [None, "nut", given, "", "", "quick", 0.05, 0])["success"]
            own = joined(owner, inspect, [None, given[0], "nut", "fast"])
            assert own["output"]["data"][1]["threshold"] is not None
            stolen = joined(
                stranger, inspect, [None, stranger.upload("b.png", encoded(picture(seed=3))), "nut", "fast"]
            )
            assert stolen["output"]["data"][1]["threshold"] is None
            state = ["embedded", "guessed"]
            forged = joined(
                stranger, inspect, [state, stranger.upload("b.png", encoded(picture(seed=3))), "nut", "fast"]
            )
            assert forged["output"]["data"][1]["threshold"] is None


class TestPlaces:
    def test_one_who_opens_many_sessions_keeps_nobody_out(self, stranger, app):
        with Stranger(app) as greedy:
            given = greedy.upload("a.png", encoded())
            for _ in range(BOUNDS["SESSIONS"] + 4):  # each a session, without gradio's number of a page
                with contextlib.suppress(Refused):
                    greedy.call("inspect", given, "Any part", "slow")
        time.sleep(EMPTY_ENOUGH + 0.1)
        assert stranger.inspect(("a.png", encoded()))["score"] > 0


class TestToken:
    @pytest.mark.parametrize(
        ("host", "forwarded", "space", "given"),
        [
            ("127.0.0.1", False, "", True),
            ("::1", False, "", True),
            ("192.168.0.7", False, "", False),
            ("127.0.0.1", True, "", False),
            ("127.0.0.1", False, "user/space", False),
            (None, False, "", False),
        ],
    )
    def test_of_the_environment_is_for_this_machine(self, monkeypatch, host, forwarded, space, given):
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        monkeypatch.setenv("SPACE_ID", space)
        assert local_token(host, forwarded) == ("hf_secret" if given else None)
