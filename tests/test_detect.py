"""Inspections of many pictures: results as they come, interruptions, several processes, and data sets as sources."""

import csv
import functools
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from anomalysd_pipeline import AnomalySDPipeline, cli, detect, synthetic
from anomalysd_pipeline.common import progress
from anomalysd_pipeline.common.files import SoleWriter
from anomalysd_pipeline.data.picture import Picture
from anomalysd_pipeline.data.sources import gather
from anomalysd_pipeline.inspection import run as detect_run
from anomalysd_pipeline.inspection.folder import ResultFolder
from anomalysd_pipeline.inspection.result import load_part, load_pipeline
from anomalysd_pipeline.method.scoring import check_finite

from .conftest import make_tiny_pipeline, warnings_of
from .detect_driver import table

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the other processes: the last digits of a score depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny pipeline with few passes, saved."""
    folder = tmp_path_factory.mktemp("base") / "pipeline"
    quick = {"fast": {"num_inference_steps": 3, "mask_scales": [1, 2]}}
    make_tiny_pipeline(preset_overrides=quick).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Drawn rings: two in `normal`, five in `test`, the third of which is no picture."""
    folder = tmp_path_factory.mktemp("parts")
    for name in ("normal", "test"):
        (folder / name).mkdir()
    for index, image in enumerate(synthetic.normal_images("ring", 2, seed=3, size=64)):
        image.save(folder / "normal" / f"{index}.png")
    for index, sample in enumerate(synthetic.test_samples("ring", 2, 3, seed=3, size=64)):
        Image.fromarray(sample.image).save(folder / "test" / f"{index}.png")
    (folder / "test" / "2.png").write_text("no picture")
    return folder


def arguments(parts, base, out, *more):
    fixed = ["--normal", parts / "normal", "--test", parts / "test", "--category", "ring", "--device", "cpu"]
    fixed += ["--mixed-precision", "no"]
    return [str(argument) for argument in (*fixed, "--base", base, "--out", out, *more)]


@pytest.fixture(scope="module")
def whole(parts, base, tmp_path_factory):
    """The folder of an uninterrupted run by this process."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert detect.main(arguments(parts, base, out, "--maps")) == 0
    return out


@pytest.fixture
def half(whole, tmp_path):
    """That folder as an earlier run left it: with a result of the first picture, half a row of the second, and no
    table."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (rows,) = out.glob("rows/*.jsonl")
    first, second, *_ = rows.read_bytes().splitlines(keepends=True)
    rows.write_bytes(first + second[: len(second) // 2])
    (out / "results.csv").unlink()
    return out


def rows_of(out):
    return [json.loads(line) for path in out.glob("rows/*.jsonl") for line in path.read_bytes().splitlines(True)]


def test_region_of_interest(parts, base, tmp_path, capsys):
    left = np.arange(64)[None, :].repeat(64, axis=0) < 32
    Image.fromarray(left).save(tmp_path / "mask.png")
    given = arguments(parts, base, tmp_path / "out", "--maps", "--roi", tmp_path / "mask.png")
    assert detect.main(given) == 0
    found = [np.load(path) for path in (tmp_path / "out" / "maps").rglob("*.npy")]
    assert len(found) == 4 and all(own[left].any() and not own[~left].any() for own in found)
    Image.fromarray(~left).save(tmp_path / "mask.png")
    assert detect.main([*given, "--resume"]) == 2
    assert "`--roi` gives" in capsys.readouterr().err
    Image.fromarray(left & False).save(tmp_path / "mask.png")
    assert detect.main([*given, "--overwrite"]) == 2
    assert "`--roi` must mark some of the picture" in capsys.readouterr().err
    assert len(table(tmp_path / "out")) == 5
    given[given.index("--normal") : given.index("--test")] = []
    assert detect.main([*given, "--overwrite"]) == 2
    assert "`--roi` needs `--normal`" in capsys.readouterr().err


def test_tiles(parts, base, whole, tmp_path, capsys):
    given = arguments(parts, base, tmp_path / "out", "--tile-size", "48", "--tile-overlap", "16")
    assert detect.main(given) == 0
    rows = table(tmp_path / "out")
    assert len(rows) == 5 and all(row["threshold"] for row in rows if row["score"])
    assert all(a["score"] != b["score"] for a, b in zip(rows, table(whole), strict=True) if a["score"])
    assert detect.main([*given[:-4], "--resume"]) == 2
    assert "`--tile-size` gives" in capsys.readouterr().err
    assert detect.main([*given[:-1], "30", "--overwrite"]) == 2
    assert "`--tile-overlap` must be at most half of `--tile-size`" in capsys.readouterr().err
    assert table(tmp_path / "out") == rows


class TestResume:
    def test_only_what_is_missing_is_done(self, half, whole, parts, base, capsys):
        earlier = rows_of(whole)
        before = (half / "part.safetensors").stat().st_mtime_ns
        assert detect.main(arguments(parts, base, half, "--maps", "--resume")) == 0
        assert table(half) == table(whole)
        new = sorted(half.glob("rows/*.jsonl"), key=lambda path: path.stat().st_mtime_ns)[-1]
        files = [Path(json.loads(line)["file"]).name for line in new.read_text().splitlines()]
        assert files == ["1.png", "2.png", "3.png", "4.png"] and len(earlier) == 5
        assert (half / "part.safetensors").stat().st_mtime_ns == before
        assert "4 inspected" in capsys.readouterr().out

    def test_a_finished_run_is_only_told_again(self, whole, parts, base, tmp_path, capsys):
        shutil.copytree(whole, tmp_path / "out")
        assert detect.main(arguments(parts, base, tmp_path / "out", "--maps", "--resume")) == 0
        assert table(tmp_path / "out") == table(whole)
        assert "4 inspected" in capsys.readouterr().out
        results = [row for row in rows_of(tmp_path / "out") if "error" not in row]
        assert len(results) == 4

    def test_a_new_folder_is_begun(self, whole, parts, base, tmp_path):
        assert detect.main(arguments(parts, base, tmp_path / "new", "--resume")) == 0
        assert table(tmp_path / "new") == table(whole)

    def test_more_pictures_are_added(self, whole, parts, base, tmp_path):
        shutil.copytree(whole, tmp_path / "out")
        shutil.copy(parts / "test" / "4.png", tmp_path / "5.png")
        given = arguments(parts, base, tmp_path / "out", "--maps", "--resume")
        given[given.index("--test") + 1 : given.index("--category")] = [str(tmp_path / "5.png"), str(parts / "test")]
        assert detect.main(given) == 0
        rows = table(tmp_path / "out")
        assert len(rows) == 6 and rows[1:] == table(whole)
        assert rows[0]["score"] == rows[5]["score"]

    @pytest.mark.parametrize(
        ("change", "part"),
        [
            (("--seed", "1"), "`--seed` gives '1', but the results"),
            (("--category", "other ring"), "`--category` gives 'other ring'"),
            (("--noise-strength", "0.7"), "`--noise-strength` gives '0.7'"),
            (("--preset", "paper"), "`--preset` gives 'paper'"),
            (("--resolution", "32"), "`--resolution` gives '32'"),
            (("--normal", "{parts}/normal/0.png"), "`--normal` gives"),
        ],
    )
    def test_other_settings_are_refused(self, change, part, half, parts, base, capsys):
        option, value = change
        more = ["--maps", "--resume", option, value.format(parts=parts)]
        assert detect.main(arguments(parts, base, half, *more)) == 2
        error = capsys.readouterr().err
        assert part in error and "--overwrite" in error
        assert not (half / "results.csv").exists()

    @pytest.mark.parametrize(
        "damage",
        [
            lambda row: b"5",
            lambda row: b"\0" * 20,
            lambda row: b"\xff{}",
            lambda row: json.dumps({key: value for key, value in row.items() if key != "name"}).encode(),
            lambda row: json.dumps({**row, "name": "a\0b"}).encode(),
            lambda row: json.dumps({**row, "name": "../../x"}).encode(),
            lambda row: json.dumps({**row, "score": float("nan")}).encode(),
            lambda row: json.dumps({**row, "seconds": None}).encode(),
        ],
    )
    def test_a_picture_with_a_damaged_row_is_done_again(self, damage, whole, parts, base, tmp_path, capsys):
        out = shutil.copytree(whole, tmp_path / "out")
        (rows,) = out.glob("rows/*.jsonl")
        first, *others = rows.read_bytes().splitlines()
        rows.write_bytes(b"\n".join([damage(json.loads(first)), *others]) + b"\n")
        assert detect.main(arguments(parts, base, out, "--maps", "--resume")) == 0
        assert table(out) == table(whole)
        (again,) = set(out.glob("rows/*.jsonl")) - {rows}
        done = [Path(json.loads(line)["file"]).name for line in again.read_bytes().splitlines()]
        assert done == [Path(json.loads(first)["file"]).name, "2.png"]  # and that which is no picture

    def test_an_option_is_named_as_it_was_typed(self, half, parts, base, capsys):
        for option in ("--noise_strength", "--noise-strength"):
            assert detect.main(arguments(parts, base, half, "--maps", "--resume", option, "0.7")) == 2
            assert f"`{option}` gives '0.7'" in capsys.readouterr().err
            assert detect.main(arguments(parts, base, half, "--maps", "--resume", option, "1.5")) == 2
            assert f"`{option}` must" in capsys.readouterr().err

    def test_without_maps_is_refused(self, half, parts, base, capsys):
        assert detect.main(arguments(parts, base, half, "--resume")) == 2
        assert "`--maps` gives 'off'" in capsys.readouterr().err

    def test_another_base_is_refused(self, half, parts, tiny_pipeline_folder, tmp_path, capsys):
        from .tiny import tiny_components

        make_tiny_pipeline(**tiny_components(seed=1)).save_pretrained(tmp_path / "base")
        assert detect.main(arguments(parts, tmp_path / "base", half, "--maps", "--resume")) == 2
        assert "`--base` gives" in capsys.readouterr().err

    def test_an_existing_folder_names_both_ways(self, half, parts, base, capsys):
        assert detect.main(arguments(parts, base, half)) == 2
        error = capsys.readouterr().err
        assert "--resume" in error and "--overwrite" in error

    @pytest.mark.parametrize("content", ["", "[]", '{"facts": 1}'])
    def test_unreadable_settings_are_one_sentence(self, content, half, parts, base, capsys):
        (half / "run.json").write_text(content)
        assert detect.main(arguments(parts, base, half, "--maps", "--resume")) == 2
        assert "run.json that cannot be read" in capsys.readouterr().err

    def test_results_of_unknown_origin_are_not_gone_on_with(self, half, parts, base, capsys):
        (half / "run.json").unlink()
        assert detect.main(arguments(parts, base, half, "--maps", "--resume")) == 2
        assert "without a run.json" in capsys.readouterr().err

    @pytest.mark.parametrize("resumed", [False, True])
    def test_a_folder_that_another_run_writes_is_refused(self, resumed, half, parts, base, tmp_path, capsys):
        out = half if resumed else tmp_path / "new"
        with SoleWriter("--out", out) as other:
            other.keep()
            given = arguments(parts, base, out, "--maps", *(["--resume"] if resumed else []))
            assert detect.main(given) == 2
            assert f"`--out` '{out}' is being written by another run" in capsys.readouterr().err
        assert detect.main(given) == 0

    @pytest.mark.parametrize("size", [20_000, 200])
    def test_a_full_disk_is_one_sentence(self, size, whole, parts, base, tmp_path, capsys):
        """Files cannot grow past a limit, so writing fails as it does on a full disk: what was learned, or a row."""
        out, limits = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            assert detect.main(arguments(parts, base, out, "--maps")) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"anomalysd: error: `--out` '{out}' could not be written") and "--resume" in error
        assert detect.main(arguments(parts, base, out, "--maps", "--resume")) == 0
        assert table(out) == table(whole)

    def test_an_interrupted_run_leaves_a_table(self, whole, parts, base, tmp_path, monkeypatch, capsys):
        calls = []

        def interrupted(*args, **options):
            calls.append(args)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return inspect(*args, **options)

        inspect = detect_run.inspect
        monkeypatch.setattr(detect_run, "inspect", interrupted)
        assert detect.main(arguments(parts, base, tmp_path / "out")) == 130
        assert "--resume" in capsys.readouterr().err
        assert table(tmp_path / "out") == table(whole)[:3]


@pytest.fixture(scope="module")
def shards(parts, base, tmp_path_factory):
    """The folders of two runs that each inspected a part of the pictures."""
    work = tmp_path_factory.mktemp("shards")
    for index in range(2):
        given = arguments(parts, base, work / str(index), "--maps", "--shard", f"{index}/2")
        assert detect.main(given) == 0
    return [work / "0", work / "1"]


def merge(*given):
    return cli.main(["merge", *map(str, given)])


class TestShards:
    def test_merged_they_are_the_results_of_a_whole_run(self, shards, whole, parts, base, tmp_path, capsys):
        out = tmp_path / "all"
        assert merge(*shards[::-1], "--out", out) == 0  # in any order
        assert "4 inspected" in capsys.readouterr().out
        assert [len(table(shard)) for shard in shards] == [3, 2] and table(out) == table(whole)
        kept = (
            "montage.png",
            "part.safetensors",
            *(f"{name}/{i}.png" for name in ("heatmaps", "masks") for i in (0, 4)),
        )
        for name in (*kept, "coco.json", "results.json"):
            assert (out / name).read_bytes() == (whole / name).read_bytes(), name
        assert len(list(out.glob("maps/*.npy"))) == 4
        # And they can be gone on with: only the damaged picture is tried again.
        before = len(rows_of(out))
        assert detect.main(arguments(parts, base, out, "--maps", "--resume")) == 0
        assert len(rows_of(out)) == before + 1 and table(out) == table(whole)

    def test_one_that_was_killed_goes_on_with_its_own_pictures(self, shards, whole, parts, base, tmp_path):
        out = shutil.copytree(shards[0], tmp_path / "out")
        (rows,) = out.glob("rows/*.jsonl")
        first, second, *_ = rows.read_bytes().splitlines(keepends=True)
        rows.write_bytes(first + second[: len(second) // 2])
        assert detect.main(arguments(parts, base, out, "--maps", "--resume", "--shard", "0/2")) == 0
        assert table(out) == table(shards[0])
        assert merge(out, shards[1], "--out", tmp_path / "all") == 0
        assert table(tmp_path / "all") == table(whole)
        # A picture that two have done counts once.
        assert merge(whole, out, "--out", tmp_path / "twice") == 0
        assert table(tmp_path / "twice") == table(whole)

    def test_results_that_do_not_belong_together_are_refused(self, shards, parts, base, tmp_path, capsys):
        def refused(sentence, *given):
            assert merge(*given, "--out", tmp_path / "all") == 2
            assert sentence in capsys.readouterr().err
            assert not (tmp_path / "all").exists()

        other = shutil.copytree(shards[1], tmp_path / "seed") / "run.json"
        other.write_text(other.read_text().replace('"--seed": 0', '"--seed": 1'))
        refused("rests on another `--seed` than", shards[0], tmp_path / "seed")
        (tmp_path / "elsewhere").mkdir()
        shutil.copy(parts / "test" / "0.png", tmp_path / "elsewhere")
        given = arguments(parts, base, tmp_path / "other", "--maps")
        given[given.index("--test") + 1] = str(tmp_path / "elsewhere")
        assert detect.main(given) == 0
        refused("inspect with the same `--test` everywhere", shards[0], tmp_path / "other")
        refused("holds no results of an inspection", shards[0], parts / "test")
        assert merge(*shards, "--out", shards[0], "--overwrite") == 2
        assert "is one of the folders to merge" in capsys.readouterr().err and len(table(shards[0])) == 3

    def test_a_shard_that_is_none_is_refused(self, parts, base, tmp_path, capsys):
        for wrong in ("2/2", "1", "-1/2", "x/2"):
            with pytest.raises(SystemExit):
                detect.main(arguments(parts, base, tmp_path / "out", f"--shard={wrong}"))
            assert "must be I/N with I from 0 to N - 1" in capsys.readouterr().err
        assert detect.main(arguments(parts, base, tmp_path / "out", "--shard", "5/6")) == 2
        assert "`--shard` 5/6 has no picture, because `--test` has 5; give fewer" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_files_are_read_and_written_beside_the_computing(whole, parts, base, tmp_path, monkeypatch):
    threads = {}

    def noted(function):
        def run(*args, **options):
            threads.setdefault(function.__name__, set()).add(threading.current_thread().name)
            return function(*args, **options)

        return run

    for holder, name in ((Picture, "load"), (detect_run, "inspect"), (ResultFolder, "add"), (ResultFolder, "fail")):
        monkeypatch.setattr(holder, name, noted(getattr(holder, name)))
    assert detect.main(arguments(parts, base, tmp_path / "out", "--maps")) == 0
    main = {threading.current_thread().name}
    loading = {"ahead"} | main  # the normal pictures by the latter
    assert threads == {"load": loading, "inspect": main, "add": {"behind"}, "fail": {"behind"}}
    assert [Path(row["file"]).name for row in rows_of(tmp_path / "out")] == [f"{index}.png" for index in range(5)]
    assert not {thread.name for thread in threading.enumerate()} & {"ahead", "behind"}


class TestTogether:
    def test_batches_span_pictures_and_change_no_score(self, parts, base, whole, tmp_path):
        class Counting(AnomalySDPipeline):
            def __call__(self, image, **options):
                calls.append(len(image))
                return super().__call__(image, **options)

        calls, pipe = [], load_pipeline(base, "cpu")
        pipe.__class__ = Counting
        batches = []
        pipe.unet.register_forward_pre_hook(lambda _, given: batches.append(len(given[0])))
        load_part(pipe, "ring", whole / "part.safetensors")
        folder, listing = ResultFolder(tmp_path / "out"), gather([parts / "test"], tmp_path / "out")
        folder.begin({}, {})
        detect_run.inspect_pictures(pipe, listing.deal(), folder, "ring", at_once=3)
        folder.close()
        assert calls == [3, 1]  # of five files one is no picture
        assert batches == [4, 4, 4, 4, 2, 4, 2]  # 1 + 4 masks and that of the prototypes, 4 at once on a CPU
        expected = {row["file"]: row["score"] for row in rows_of(whole) if "score" in row}
        found = {row["file"]: row["score"] for row in rows_of(tmp_path / "out") if "score" in row}
        assert found == pytest.approx(expected, rel=1e-5) and len(found) == 4


@pytest.fixture(scope="module")
def adapted(base, tmp_path_factory):
    """The folder of a fine-tuning of another part, and the resolution of its base."""
    pipe = AnomalySDPipeline.from_pretrained(base)
    nuts = synthetic.normal_images("hex_nut", 2, seed=3, size=64)
    pipe.adapt({"hex nut": nuts}, steps=1, decoder_steps=1, train_batch_size=1, rank=2, mixed_precision="no")
    folder = tmp_path_factory.mktemp("adapted") / "nut"
    pipe.save_adaptation(folder / "adaptation")
    return folder


class TestAdaptation:
    def given(self, parts, base, out, adapted, category):
        given = arguments(parts, base, out, "--adaptation", adapted)[2:]
        given[given.index("ring")] = category
        return given

    def test_a_category_that_it_does_not_know_is_refused_with_those_it_knows(
        self, parts, base, adapted, tmp_path, capsys
    ):
        out = tmp_path / "out"
        assert detect.main(self.given(parts, base, out, adapted / "adaptation", "nut")) == 2
        assert "`--category` 'nut' is not among the parts that were learned: 'hex nut'" in capsys.readouterr().err
        assert not out.exists()

    def test_the_folder_of_a_fine_tuning_will_do(self, parts, base, adapted, tmp_path):
        assert detect.main(self.given(parts, base, tmp_path / "out", adapted, "hex nut")) == 0
        assert {row["verdict"] for row in table(tmp_path / "out")} <= {"normal", "defective", ""}
        assert all(row["threshold"] for row in table(tmp_path / "out") if row["score"])

    def test_as_a_base_it_is_named(self, parts, adapted, tmp_path, capsys):
        assert detect.main(arguments(parts, adapted, tmp_path / "out")) == 2
        assert f"holds no model_index.json; give '{adapted / 'adaptation'}'" in capsys.readouterr().err

    def test_in_python_a_warning(self, parts, base, adapted):
        pipe = AnomalySDPipeline.from_pretrained(base)
        pipe.load_adaptation(adapted)
        with warnings_of() as said:
            pipe(parts / "test" / "0.png", category="nut")
            pipe(parts / "test" / "0.png")
        (told,) = said
        assert told.startswith("`category` 'nut' is not registered") and told.endswith("registered are 'hex nut'.")


class TestProgress:
    def test_without_a_terminal_there_is_a_line_for_each_stage_and_no_bars(
        self, parts, base, tmp_path, monkeypatch, capsys
    ):
        monkeypatch.setattr(progress, "BRIEF", 0)
        assert detect.main(arguments(parts, base, tmp_path / "out")) == 0
        lines = capsys.readouterr().err.splitlines()
        assert any(line.startswith("anomalysd: learning ring: ") and "/2 [" in line for line in lines)
        assert any(line.startswith("anomalysd: inspecting: ") and "/5 [" in line for line in lines)
        assert not any("Loading" in line for line in lines)


class TestBase:
    @pytest.mark.parametrize(
        ("given", "sentence"),
        [
            ("./nothing", "is no folder here, and no Hub id of the form 'user/name'; give a checkpoint's folder"),
            ("{tmp}", "holds no model_index.json; give the folder of a saved pipeline"),
            ("{tmp}/1.safetensors", "is a file; give a checkpoint's folder"),
            ("somebody/nothing", " …); check its spelling and the connection, or give a checkpoint's folder."),
            ("{tmp}/bare", "lacks networks: `timm_checkpoint` must give model.safetensors of tf_efficientnet_b6"),
        ],
    )
    def test_a_base_that_cannot_be_loaded_is_one_sentence(self, given, sentence, parts, base, tmp_path, capsys):
        """Offline, as all tests are."""
        (tmp_path / "1.safetensors").touch()
        if given.endswith("bare"):
            ours = {"extractor": None, "perceptual": None, "bank": None, "adapters": None}
            shutil.copytree(base, tmp_path / "bare")
            index = json.loads((tmp_path / "bare" / "model_index.json").read_text())
            index |= dict.fromkeys(ours, [None, None])
            (tmp_path / "bare" / "model_index.json").write_text(json.dumps(index))
        given = given.format(tmp=tmp_path)
        assert detect.main(arguments(parts, given, tmp_path / "out")) == 2
        (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("anomalysd: error")]
        assert told.startswith(f"anomalysd: error: `--base` '{given}' ") and sentence in told
        assert not (tmp_path / "out").exists()


class TestThreshold:
    def verdicts(self, out):
        rows = [row for row in table(out) if row["score"]]
        assert all(row["verdict"] == ("defective" if float(row["score"]) > float(row["threshold"]) else "normal")
                   for row in rows)  # fmt: skip
        return {row["threshold"] for row in rows}

    def test_given_in_the_shell(self, parts, base, whole, tmp_path, capsys):
        low, high = sorted(float(row["score"]) for row in table(whole) if row["score"])[1:3]
        between = (low + high) / 2  # and not a score, which the table rounds
        assert detect.main(arguments(parts, base, tmp_path / "out", "--threshold", between)) == 0
        assert self.verdicts(tmp_path / "out") == {f"{between:.6g}"}
        assert detect.main(arguments(parts, base, tmp_path / "out", "--resume", "--threshold", "9")) == 2
        assert "`--threshold` gives '9.0'" in capsys.readouterr().err

    def test_of_another_rate(self, parts, base, whole, tmp_path):
        assert detect.main(arguments(parts, base, tmp_path / "out", "--false-alarm-rate", "0.4")) == 0
        (lower,), (usual,) = self.verdicts(tmp_path / "out"), self.verdicts(whole)
        assert float(lower) < float(usual)
        # The same from what a calibrated part has stored.
        pipe = load_pipeline(base, "cpu")
        load_part(pipe, "ring", whole / "part.safetensors")
        assert detect_run.threshold_at(pipe, "ring", 0.4) == pytest.approx(float(lower), rel=1e-5)

    def test_with_known_defective_pictures(self, parts, base, tmp_path, capsys):
        bad = ("--defective", parts / "test" / "3.png", parts / "test" / "4.png")
        assert detect.main(arguments(parts, base, tmp_path / "out", *bad)) == 0
        (threshold,) = self.verdicts(tmp_path / "out")
        told = capsys.readouterr().out
        assert f"Threshold {threshold}: of good parts " in told and "of defective ones " in told
        shown = [*bad[:1], parts / "normal" / "0.png"]
        assert detect.main(arguments(parts, base, tmp_path / "other", *shown)) == 2
        assert "`--defective` has a picture, number 1, that is a normal one too" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("more", "sentence"),
        [
            (("--false-alarm-rate", "0.7"), "`--false-alarm-rate` must be above 0 and below 0.5, got 0.7."),
            (("--defective", "{parts}", "--threshold", "1"), "`--defective` needs `--normal` and no `--threshold`"),
            (("--defective", "nowhere"), "`--defective` 'nowhere' does not exist"),
        ],
    )
    def test_refused(self, more, sentence, parts, base, tmp_path, capsys):
        assert detect.main(arguments(parts, base, tmp_path / "out", *(text.format(parts=parts) for text in more))) == 2
        assert sentence in capsys.readouterr().err

    def test_a_rate_needs_scores(self, parts, base, tmp_path, capsys):
        given = arguments(parts, base, tmp_path / "out", "--false-alarm-rate", "0.1")
        assert detect.main(given[2:]) == 2
        assert "`--false-alarm-rate` needs `--normal`, or an `--adaptation`" in capsys.readouterr().err


class TestBitDepth:
    @pytest.fixture
    def gray(self, parts, tmp_path):
        """The parts in gray of 8 bits, and the same with 4096 levels in files of 16 bits, of which no tested one is as
        bright as the normal ones."""
        for name, image in [
            *((f"normal/{i}.png", Image.open(parts / "normal" / f"{i}.png")) for i in range(2)),
            *((f"test/{i}.png", Image.open(parts / "test" / f"{i}.png").point(lambda v: v // 5)) for i in (0, 4)),
        ]:
            values = np.array(image.convert("L"))
            if name.startswith("normal"):
                values[0, 0] = 255
            for bits in (8, 12):
                path = tmp_path / str(bits) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                deep = (values * (4095 / 255)).round().astype(np.uint16)
                Image.fromarray(values if bits == 8 else deep).save(path)
        return tmp_path

    def test_a_part_has_the_same_scores_at_8_and_at_12_bits(self, gray, base, capsys, caplog):
        found = {}
        for bits, more in ((8, ()), (12, ()), (16, ("--bit-depth", "16"))):
            out = gray / f"out-{bits}"
            assert detect.main(arguments(gray / str(min(bits, 12)), base, out, *more)) == 0
            found[bits] = [float(row["score"]) for row in table(out)]
        assert found[12] == found[8] != found[16]
        assert caplog.text.count("looks like 12 bits") == 1
        given = arguments(gray / "12", base, gray / "out-12", "--resume", "--bit-depth", "16")
        assert detect.main(given) == 2 and "`--bit-depth` gives '16'" in capsys.readouterr().err

    def test_brighter_than_the_depth_is_no_verdict(self, gray, base):
        Image.fromarray(np.full((64, 64), 5000, np.uint16)).save(gray / "12" / "test" / "5.png")
        assert detect.main(arguments(gray / "12", base, gray / "out")) == 0
        error = table(gray / "out")[2]["error"]
        assert "5.png' has gray values up to 5000, but its 12 bits end at 4095; give the `--bit-depth`" in error


class TestNotFinite:
    def test_one_picture_is_left_out_without_a_label_and_the_others_are_inspected(
        self, parts, base, whole, tmp_path, monkeypatch, capsys
    ):
        """The distance of one picture overflows, as in half precision."""
        bad = torch.from_numpy(np.array(Image.open(parts / "test" / "3.png")))

        class Overflowing(AnomalySDPipeline):
            def _score_maps(self, inputs, *args, **options):
                found = super()._score_maps(inputs, *args, **options)
                levels = ((inputs.squares + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
                check_finite("repainting", [torch.tensor(torch.nan if own.equal(bad) else 0.0) for own in levels])
                return found

        def load(*args, **options):
            pipe = load_pipeline(*args, **options)
            pipe.__class__ = Overflowing
            return pipe

        inspect_pictures = detect_run.inspect_pictures
        monkeypatch.setattr(detect_run, "load_pipeline", load)
        together = functools.partial(inspect_pictures, at_once=4)
        monkeypatch.setattr(detect_run, "inspect_pictures", together)
        assert detect.main(arguments(parts, base, tmp_path / "out")) == 1
        told = capsys.readouterr()
        rows, expected = table(tmp_path / "out"), table(whole)
        assert [row["verdict"] for row in rows] == [row["verdict"] if i != 3 else "" for i, row in enumerate(expected)]
        assert [float(row["score"]) for i, row in enumerate(rows) if i not in (2, 3)] == pytest.approx(
            [float(row["score"]) for i, row in enumerate(expected) if i not in (2, 3)], rel=1e-5
        )
        assert rows[3]["score"] == "" and f"`--test` '{parts / 'test' / '3.png'}' has no score" in rows[3]["error"]
        assert "`--mixed-precision` 'no'" in rows[3]["error"] and rows[3]["error"] in told.err
        assert "3 inspected" in told.out and "1 could not be read" in told.out and "1 without a score" in told.out


@pytest.fixture(scope="module")
def told(parts, tmp_path_factory):
    """What became of a run killed before each of its operations on the folder of results, and resumed."""
    work = tmp_path_factory.mktemp("killed")
    tests = [parts / "test" / f"{index}.png" for index in (0, 2, 4)]
    given = ["--normal", parts / "normal" / "0.png", "--test", *tests, "--category", "ring"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.detect_driver", str(work), *map(str, given)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the driver forks")
@pytest.mark.full
class TestKilled:
    def test_every_resumed_run_gives_the_results_of_a_whole_one(self, told):
        for each in told:
            assert each["killed"] and each["status"] == 0, each
            assert each["equal"] and each["montage"], each
            assert not each["partial"], each

    def test_no_result_is_computed_twice(self, told):
        # The picture that cannot be read is tried again.
        assert {each["repeated"] for each in told} == {0, 1}

    def test_they_fall_into_all_of_a_run(self, told):
        assert {each["rows"] for each in told} == {0, 1, 2, 3}
        assert {each["operation"] for each in told} == {"open", "os.rename", "os.remove", "row"}


@pytest.fixture(scope="module")
def sources(parts, tmp_path_factory):
    """The folder of pictures, and a data set of one file with three of them, the second damaged."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("table")
    cells = [(parts / "test" / f"{index}.png").read_bytes() for index in (4, 2, 0)]
    rows = {"image": [{"bytes": cell, "path": f"{index}.png"} for index, cell in enumerate(cells)]}
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "parts.parquet")
    return [parts / "test", folder / "parts.parquet"]


@pytest.fixture(scope="module")
def given(parts, base, sources):
    def make(out, *more):
        found = arguments(parts, base, out, *more)
        at = found.index("--test")
        return [*found[: at + 1], *map(str, sources), *found[at + 2 :]]

    return make


@pytest.fixture(scope="module")
def together(given, tmp_path_factory):
    """The folder of a run by two processes, over gloo, and what they printed."""
    out = tmp_path_factory.mktemp("together") / "out"
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0"
    done = subprocess.run(
        [sys.executable, *launch.split(), "-m", "anomalysd_pipeline.detect", *given(out)],
        cwd=ROOT,
        env={**ENVIRONMENT, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return out, done.stdout


@pytest.mark.timeout(300)  # starts two processes, twice
class TestProcesses:
    def test_two_give_the_results_of_one(self, together, given, tmp_path):
        out, said = together
        assert detect.main(given(tmp_path / "alone")) == 0
        assert table(out) == table(tmp_path / "alone")
        assert len(table(out)) == 8
        assert (out / "montage.png").read_bytes() == (tmp_path / "alone" / "montage.png").read_bytes()
        assert said.count("6 inspected") == 1 and said.count("Results in") == 1

    def test_both_have_worked(self, together):
        shares = {}
        for path in together[0].glob("rows/*.jsonl"):
            files = [Path(json.loads(line).get("file", "end")).name for line in path.read_text().splitlines()]
            shares[path.name[0]] = [file for file in files if file != "end"]
        assert sorted(shares) == ["0", "1"]
        assert [len(share) for _, share in sorted(shares.items())] == [4, 4]
        assert shares["0"][0] == "0.png" and shares["1"][0] == "1.png"

    def test_one_goes_on_where_two_were_killed(self, together, given, tmp_path):
        out = tmp_path / "out"
        shutil.copytree(together[0], out)
        expected = table(out)
        (out / "results.csv").unlink()
        for path in out.glob("rows/*.jsonl"):
            lines = path.read_bytes().splitlines(keepends=True)
            path.write_bytes(b"".join(lines[:2]) + lines[2][:-1])
        assert detect.main(given(out, "--resume")) == 0
        assert table(out) == expected

    def test_pictures_of_a_table_equal_those_of_files(self, together):
        rows = table(together[0])
        assert [row["score"] for row in rows[5:]] == [rows[4]["score"], "", rows[0]["score"]]
        assert rows[5]["file"].endswith("parts.parquet#0:0.png") and "damaged" in rows[6]["error"]


def test_names_of_files_that_are_no_text_or_have_line_breaks(parts, base, tmp_path):
    names = [b"a\xff.png", b"b\nc.png", b"no\npicture.png"]
    paths = [os.fsdecode(os.fsencode(tmp_path) + b"/" + name) for name in names]
    for path in paths[:2]:
        shutil.copy(parts / "test" / "0.png", path)
    Path(paths[2]).write_text("no picture")
    out = os.fsdecode(os.fsencode(tmp_path) + b"/out\xff")
    given = ["--test", *paths, "--category", "ring", "--device", "cpu", "--base", str(base), "--out", out]
    command = [sys.executable, "-m", "anomalysd_pipeline.detect", *given]  # on streams of its own
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True)
    assert done.returncode == 0 and b"2 inspected" in done.stdout and b"/out\xff" in done.stdout
    assert b"no picture.png' is damaged" in done.stderr
    rows = table(Path(out))
    assert [row["file"] for row in rows] == paths and rows[0]["score"] == rows[1]["score"] != ""
    assert "\n" not in rows[2]["error"]
    assert json.loads((Path(out) / "run.json").read_text(encoding="utf-8"))["given"]["test"] == paths


def test_columns_are_as_ever(whole):
    with open(whole / "results.csv", newline="", encoding="utf-8") as file:
        header, first, *_ = csv.reader(io.StringIO(file.read()))
    assert header == ["file", "score", "threshold", "verdict", "seconds", "error"]
    assert float(first[4]) >= 0
    names = {path.name for path in whole.iterdir()}
    tables, folders = {"results.csv", "results.json", "coco.json"}, {"heatmaps", "masks", "maps", "rows"}
    assert names == {*tables, *folders, "montage.png", "part.safetensors", "run.json"}


def test_the_summary_names_the_defective_files_worst_first(whole, parts, base, tmp_path, capsys):
    scores = {row["file"]: float(row["score"]) for row in table(whole) if row["score"]}
    low = min(scores.values())
    assert detect.main(arguments(parts, base, tmp_path / "low", "--threshold", low * 1.00001)) == 0
    first, title, *worst = capsys.readouterr().out.splitlines()
    shown = f"{low * 1.00001:.6g}"
    assert first.startswith(f"4 inspected; 3 defective, 1 normal at the threshold {shown}; 1 could not be read")
    assert title == "Defective, worst first:"
    expected = sorted(scores, key=lambda file: -scores[file])[:3]
    assert [line.split()[1] for line in worst] == expected
