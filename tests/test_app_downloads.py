"""What visitors take home, read back by other means."""

import csv
import dataclasses
import io
import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from anomalysd_pipeline.app import downloads
from anomalysd_pipeline.app.downloads import BatchRow, ReportFacts
from anomalysd_pipeline.inspection.result import Inspection

FACTS = ReportFacts("hex nut", "photo 1.png", "embedded (small)", {"noise_strength": 0.5, "mask_scales": [1, 2]})


def result(score=2.3, threshold=1.0, size=(60, 40)):
    """An inspection with a defect in the lower right corner."""
    anomaly_map = np.full(size[::-1], 0.2, dtype=np.float32)
    anomaly_map[30:, 45:] = score
    return Inspection(
        image=Image.new("RGB", size, (90, 120, 150)),
        inpainted=Image.new("RGB", size, (200, 160, 40)),
        anomaly_map=anomaly_map,
        score=score,
        threshold=threshold,
        is_defective=None if threshold is None else score > threshold,
        seconds=1.25,
    )


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


class TestMaps:
    def test_png_gives_the_values_back(self):
        values = np.random.default_rng(0).random((30, 50), dtype=np.float32) * 3
        image = opened(downloads.map_png16(values))
        gray = np.asarray(image)
        scale = float(image.text["Scale"])
        assert gray.dtype == np.uint16 and gray.max() == 65535 and scale == values.max()
        assert np.abs(gray * (scale / 65535) - values).max() <= scale / 65535
        assert image.text["Description"] == f"AnomalySD anomaly map: value = gray * {scale!r} / 65535"

    def test_a_given_scale_cuts(self):
        image = opened(downloads.map_png16(np.array([[0.0, 1.0, 2.0, 9.0]]), scale=2))
        assert np.asarray(image).tolist() == [[0, 32768, 65535, 65535]] and image.text["Scale"] == "2.0"

    def test_a_map_of_nothing(self):
        assert not np.asarray(opened(downloads.map_png16(np.zeros((4, 4))))).any()

    def test_npy(self):
        values = np.random.default_rng(0).random((3, 5))
        back = np.load(io.BytesIO(downloads.map_npy(values)), allow_pickle=False)
        assert back.dtype == np.float32 and np.array_equal(back, values.astype(np.float32))


class TestReport:
    @pytest.mark.parametrize(
        ("score", "threshold", "words"),
        [
            (2.3, 1.0, "Defect likely: 2.3 × the threshold"),
            (0.6, 1.0, "Looks normal: 0.6 × the threshold"),
            (0.6, None, "No verdict: this part has no threshold yet"),
        ],
    )
    def test_verdict(self, score, threshold, words):
        assert downloads.verdict_words(score, threshold) == words

    def test_shows_the_four_pictures(self):
        page = downloads.report(result(), FACTS)
        assert page.size == (1240, 1754) and page.mode == "RGB"
        pixels = np.asarray(page).reshape(-1, 3)
        for color in ((90, 120, 150), (200, 160, 40)):
            assert (pixels == color).all(axis=1).sum() > 50_000

    def test_each_fact_changes_the_page(self):
        pages = [downloads.report(result(), facts).tobytes() for facts in self.variants()]
        assert len(set(pages)) == len(pages)

    @staticmethod
    def variants():
        base = {"part": "a", "file": "b", "model": "c", "settings": {"d": 1}, "date": "2026-01-01"}
        changes = [{}, {"part": "x"}, {"file": "x"}, {"model": "x"}, {"settings": {"d": 2}}, {"date": "2026-01-02"}]
        return [ReportFacts(**{**base, **change}) for change in changes]

    def test_without_a_threshold(self):
        page = downloads.report(result(threshold=None), FACTS)
        assert page.tobytes() != downloads.report(result(), FACTS).tobytes()

    def test_hostile_texts_stay_on_the_page(self):
        texts = ["x" * 10_000, "\u202ea\u0000b", "日本 🤖 <b>", "\ud800", ""]
        for text in texts:
            facts = ReportFacts(text, text, text, {f"{text}{index}": text for index in range(90)}, "2026-01-01")
            page = np.asarray(downloads.report(result(), facts))
            assert (page[:, -60:] == 255).all() and (page[-40:] == 255).all()

    def test_many_settings_leave_the_foot_readable(self):
        many = ReportFacts("a", "b", "c", {f"setting {index}": index for index in range(500)}, "2026-01-01")
        few = ReportFacts("a", "b", "c", {}, "2026-01-01")
        feet = [np.asarray(downloads.report(result(), facts))[1754 - 90 :] for facts in (many, few)]
        assert np.array_equal(*feet) and (feet[0] < 255).any()

    @pytest.mark.parametrize("size", [(8, 4000), (4000, 8), (8, 8)])
    def test_odd_pictures(self, size):
        shape = size[::-1]
        blank = Image.new("RGB", size)
        odd = dataclasses.replace(
            result(), image=blank, inpainted=blank, anomaly_map=np.zeros(shape, dtype=np.float32)
        )
        assert downloads.report(odd, FACTS).size == (1240, 1754)

    def test_pdf(self):
        page = downloads.report(result(), FACTS)
        pdf = downloads.report_pdf(page)
        assert pdf.startswith(b"%PDF-") and pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page ") == 1
        box = pdf[pdf.index(b"/MediaBox") :].split(b"]")[0].split(b"[")[1].split()
        assert [round(float(side)) for side in box] == [0, 0, 595, 842]  # A4 in points

    def test_png_knows_its_resolution(self):
        image = opened(downloads.report_png(downloads.report(result(), FACTS)))
        assert [round(dots) for dots in image.info["dpi"]] == [150, 150]

    def test_gauge_points_at_the_score(self):
        def pointer(score):
            dark = (np.asarray(downloads.gauge(score, 1.0, 600, 60)) == (33, 37, 41)).all(axis=2)
            return np.flatnonzero(dark[2]).mean()  # above the mark of the threshold

        assert abs(pointer(1.0) - 300) < 3 and abs(pointer(0.5) - 157) < 4
        assert pointer(0.0) < 20 and pointer(2.0) > 580 and pointer(1e9) == pointer(2.0)

    def test_gauge_without_a_threshold(self):
        colors = np.asarray(downloads.gauge(1.0, None)).reshape(-1, 3)
        assert len(np.unique(colors, axis=0)) == 2


class TestInspectionFiles:
    def test_are_named_after_the_picture(self, tmp_path):
        paths = downloads.inspection_files(result(), FACTS, tmp_path)
        names = ["photo_1_map.png", "photo_1_map.npy", "photo_1_report.png", "photo_1_report.pdf"]
        assert [path.name for path in paths] == names and all(path.parent == tmp_path for path in paths)
        assert np.array_equal(np.load(paths[1]), result().anomaly_map)

    @pytest.mark.parametrize(
        "name", ["../../x.png", "CON.png", "a\0b.png", "\u202e.png", "/etc/passwd", "", "日" * 900]
    )
    def test_stay_in_their_folder(self, tmp_path, name):
        facts = ReportFacts("a", name, "c")
        for path in downloads.inspection_files(result(), facts, tmp_path):
            assert path.resolve().parent == tmp_path.resolve() and path.stat().st_size > 0


ROWS = [
    BatchRow("a.png", 2.34567891, 1.0, 1.5, Image.new("RGB", (9, 7), "red")),
    BatchRow('=HYPERLINK("http://x")', 0.5, 1.0, 0.25),
    BatchRow("b,\n.png", 0.5, None, 2.0),
    BatchRow("@c.png", error="-it is no picture."),
]


class TestBatch:
    def test_table(self):
        data = downloads.batch_csv(ROWS)
        assert data.startswith(b"\xef\xbb\xbf")
        header, *rows = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""))
        assert header == ["file", "score", "threshold", "verdict", "seconds", "error"]
        assert rows == [
            ["a.png", "2.34568", "1", "defective", "1.50", ""],
            ['\'=HYPERLINK("http://x")', "0.5", "1", "normal", "0.25", ""],
            ["b,\n.png", "0.5", "", "", "2.00", ""],
            ["'@c.png", "", "", "", "", "'-it is no picture."],
        ]

    def test_zip(self, tmp_path):
        stored = tmp_path / "heat.png"
        Image.new("RGB", (5, 5), "blue").save(stored)
        rows = [*ROWS, BatchRow("../../d/e.png", 1.0, 1.0, 1.0, stored, mask=stored)]
        rows.append(BatchRow("a.png", 1.0, 1.0, 1.0, stored))
        path = downloads.batch_zip(rows, tmp_path / "batch.zip")
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            pictures = ["heatmaps/001_a.png", "heatmaps/005_e.png", "masks/005_e.png", "heatmaps/006_a.png"]
            assert names == ["results.csv", *pictures, "results.json"]
            told = json.loads(archive.read("results.json"))["pictures"]
            assert [(one["file"], one["heatmap"], one["mask"]) for one in told[3:5]] == [
                ("@c.png", None, None),
                ("../../d/e.png", "heatmaps/005_e.png", "masks/005_e.png"),
            ]
            assert archive.read("results.csv") == downloads.batch_csv(rows)
            assert opened(archive.read(names[1])).getpixel((0, 0)) == (255, 0, 0)
            assert opened(archive.read(names[2])).getpixel((0, 0)) == (0, 0, 255)

    def test_an_empty_one(self, tmp_path):
        with zipfile.ZipFile(downloads.batch_zip([], tmp_path / "batch.zip")) as archive:
            assert archive.namelist() == ["results.csv", "results.json"]

    def test_a_lone_surrogate_is_written_somehow(self):
        assert b"a?.png" in downloads.batch_csv([BatchRow("a\ud800.png", error="x")])
