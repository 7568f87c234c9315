"""Fine-tuning from the shell: options, what a run leaves, going on, and what is refused. Several processes: see
test_train_processes.py."""

import argparse
import contextlib
import io
import json
import resource
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalysd_pipeline import AnomalySDPipeline, synthetic, train
from anomalysd_pipeline.adaptation.checkpoints import list_checkpoints
from anomalysd_pipeline.adaptation.settings import AdaptationSettings
from anomalysd_pipeline.common.files import SoleWriter
from anomalysd_pipeline.common.progress import Progress
from anomalysd_pipeline.data.datasets import draw_shots
from anomalysd_pipeline.training import run as train_run
from anomalysd_pipeline.training.options import add_arguments, given_settings
from anomalysd_pipeline.training.pictures import read_prompts
from anomalysd_pipeline.training.reports import LossCurve

from .tiny import tiny_unet

SHORT = "--max_train_steps 3 --max_decoder_steps 2 --train_batch_size 2 --mixed_precision no --report_to none --cpu"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Drawn rings and wood in MVTec-AD's layout, five pictures each; the ring that is drawn first is no picture."""
    root = tmp_path_factory.mktemp("parts") / "data"
    synthetic.write_dataset(root, ["ring", "wood"], train=5, good=1, defective=1, seed=3, size=64)
    draw_shots((root / "ring" / "train" / "good").iterdir(), 1, seed=0)[0].write_text("not a picture")
    return root


def start(base, out, *arguments, source=("--synthetic", "ring", "--shots", "2")):
    return train.main([*map(str, source), *SHORT.split(), "--base", str(base), "--output_dir", str(out), *arguments])


def losses(out):
    return [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add_arguments(parser, report_to="none")
    return parser.parse_args([*arguments, "--output_dir", "out"])


BRIEF = ["--max_train_steps", "1", "--no-train_decoder", "--no_calibration"]
LATEST = ["--resume_from_checkpoint", "latest"]


@pytest.fixture(scope="module")
def finished(tiny_pipeline_folder, tmp_path_factory):
    """A LoRA run, with validation pictures."""
    out = tmp_path_factory.mktemp("lora") / "run"
    assert start(tiny_pipeline_folder, out, "--validation_steps", "1", "--report_to", "tensorboard") == 0
    return out


@pytest.fixture(scope="module")
def from_data(parts, tiny_pipeline_folder, tmp_path_factory):
    """A run with the data set, and prompts for one of its categories."""
    out = tmp_path_factory.mktemp("data") / "run"
    path = out.with_name("prompts.json")
    path.write_text(json.dumps({"ring": {"coarse": ["A round ring."]}, "another": "A spoon."}))
    source = ["--data", parts, "--shots", "4", "--prompts", path]
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert start(tiny_pipeline_folder, out, *BRIEF, source=source) == 0
    return out, said.getvalue()


def test_each_stage_is_told_and_counted(tiny_pipeline_folder, tmp_path, monkeypatch):
    told, init = [], Progress.__init__

    def heard(self, title, total=None, unit=None, **options):
        told.append((title, total, unit))
        init(self, title, total, unit, **options)

    monkeypatch.setattr(Progress, "__init__", heard)
    assert start(tiny_pipeline_folder, tmp_path / "run") == 0
    learning = ("learning", None, None)
    stages = [learning, ("learning, denoiser", 3, "step"), learning, ("learning, decoder", 2, "step"), learning]
    assert told == [
        ("loading the model", None, None),
        *stages,
        ("registering", None, None),
        ("calibrating", 2, "picture"),
    ]


class TestOptions:
    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            ("--method full", {"method": "full"}),
            ("--no-train_denoiser", {"train_denoiser": False}),
            ("--no-train_decoder", {"train_decoder": False}),
            ("--max_train_steps 7 --num_train_epochs 8", {"steps": 7, "epochs": 8}),
            ("--max_decoder_steps 7 --decoder_epochs 8", {"decoder_steps": 7, "decoder_epochs": 8}),
            ("--train_batch_size 3", {"train_batch_size": 3}),
            ("--gradient_accumulation_steps 4", {"gradient_accumulation_steps": 4}),
            ("--gradient_checkpointing", {"gradient_checkpointing": True}),
            ("--learning_rate 3e-4", {"learning_rate": 3e-4}),
            ("--decoder_learning_rate 2e-4", {"decoder_learning_rate": 2e-4}),
            ("--lr_scheduler cosine --lr_warmup_steps 5", {"lr_scheduler": "cosine", "lr_warmup_steps": 5}),
            ("--max_grad_norm 0.5", {"max_grad_norm": 0.5}),
            ("--use_8bit_adam", {"use_8bit_adam": True}),
            ("--use_ema --ema_decay 0.9", {"use_ema": True, "ema_decay": 0.9}),
            ("--mask_design random", {"mask_design": "random"}),
            ("--prompt_design simple", {"prompt_design": "simple"}),
            ("--noise_range 0.1 0.6", {"noise_range": (0.1, 0.6)}),
            ("--augmentation degrees=90 scale=0", {"augmentation": {"degrees": 90.0, "scale": 0.0}}),
            ("--repainting_weight 0.5", {"repainting_weight": 0.5}),
            ("--decoder_latents repainted", {"decoder_latents": "repainted"}),
            ("--rank 2 --lora_target_modules to_q", {"rank": 2, "target_modules": ("to_q",)}),
            (
                "--decoder_rank 2 --decoder_lora_target_modules conv1 conv2",
                {"decoder_rank": 2, "decoder_target_modules": ("conv1", "conv2")},
            ),
            ("--mixed_precision bf16", {"mixed_precision": "bf16"}),
            ("--seed 5", {"seed": 5}),
        ],
    )
    def test_they_reach_the_settings(self, arguments, expected):
        given = given_settings(parse("--synthetic", "ring", *arguments.split()))
        settings = AdaptationSettings.resolve([given])
        for field in fields(AdaptationSettings):
            wanted = expected.get(field.name, getattr(AdaptationSettings.resolve([]), field.name))
            assert getattr(settings, field.name) == wanted, field.name

    def test_every_setting_is_an_option(self):
        assert set(parse("--synthetic", "ring").settings) == {field.name for field in fields(AdaptationSettings)}

    @pytest.mark.parametrize("value", ["degrees", "degrees=x", "spin=3", "scale=1", "scale=-1", "degrees=nan"])
    def test_augmentations_that_are_none(self, value, capsys):
        with pytest.raises(SystemExit):
            parse("--synthetic", "ring", "--augmentation", value)
        assert "brightness, contrast, scale or degrees" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("launched", "option", "expected"),
        [("bf16", None, "bf16"), ("bf16", "no", "no"), ("no", "bf16", "bf16"), ("no", None, "no")],
    )
    def test_the_launchers_precision_yields_to_ours(self, launched, option, expected, tiny_pipeline, monkeypatch):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
        monkeypatch.setattr(train_run, "resolve_precision", lambda name, device: "no" if name == "auto" else name)
        args = parse("--synthetic", "ring", *(["--mixed_precision", option] if option else []))
        assert train_run.choose_settings(args, tiny_pipeline, tiny_pipeline.device).mixed_precision == expected


class TestResult:
    def test_an_adaptation_is_complete(self, finished, tiny_pipeline_folder):
        assert {path.name for path in finished.iterdir()} == {
            "adaptation",
            "checkpoints",
            "losses.jsonl",
            "run.json",
            "logs",
            "validation",
        }
        pipe = AnomalySDPipeline.from_pretrained(tiny_pipeline_folder)
        assert pipe.load_adaptation(finished / "adaptation") == ["ring"]
        assert pipe.config.categories["ring"]["calibration"]["threshold"] > 0

    def test_losses_have_a_line_for_each_step(self, finished):
        found = [(line["stage"], line["step"]) for line in losses(finished)]
        assert found == [("denoiser", 1), ("denoiser", 2), ("denoiser", 3), ("decoder", 1), ("decoder", 2)]
        assert all(line["lr"] == 1e-4 and line["loss"] > 0 for line in losses(finished))

    def test_the_learning_rate_is_that_of_the_step(self, tiny_pipeline_folder, tmp_path):
        schedule = "--lr_scheduler linear --lr_warmup_steps 1 --learning_rate 0.01 --decoder_learning_rate 0.1"
        assert start(tiny_pipeline_folder, tmp_path / "run", *schedule.split(), "--no_calibration") == 0
        assert [line["lr"] for line in losses(tmp_path / "run")] == pytest.approx([0, 0.01, 0.005, 0, 0.1])

    def test_the_run_describes_itself(self, finished):
        facts = json.loads((finished / "run.json").read_text())
        assert facts["settings"]["steps"] == 3 and facts["settings"]["mixed_precision"] == "no"
        assert len(facts["shots"]["ring"]) == 2 and facts["processes"] == 1

    def test_tensorboard_shows_the_losses(self, finished):
        accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
        events = accumulator(str(finished / "logs" / "anomalysd")).Reload()
        shown = [event.value for event in events.Scalars("denoiser/loss")]
        assert shown == pytest.approx([line["loss"] for line in losses(finished)[:3]])
        assert [event.step for event in events.Images("decoder/validation")] == [1, 2]

    def test_validation_shows_the_weights_in_training(self, finished):
        steps = {path.stem for path in (finished / "validation").iterdir()}
        assert steps == {"denoiser-1", "denoiser-2", "denoiser-3", "decoder-1", "decoder-2"}
        first, last = (
            np.asarray(Image.open(finished / "validation" / f"denoiser-{step}.png")).astype(int) for step in (1, 3)
        )
        changed = np.abs(first - last).sum(axis=(0, 2)) > 0  # by column
        third = len(changed) * 2 // 3
        assert changed[third:].any() and not changed[:third].any()

    def test_all_weights_are_saved_as_a_pipeline(self, tiny_pipeline_folder, tmp_path, capsys):
        out = tmp_path / "run"
        assert start(tiny_pipeline_folder, out, "--method", "full", "--no_calibration") == 0
        assert f"--base {out / 'pipeline'}" in capsys.readouterr().out
        base, pipe = (AnomalySDPipeline.from_pretrained(folder) for folder in (tiny_pipeline_folder, out / "pipeline"))
        assert pipe.categories == ["ring"] and pipe.config.categories["ring"]["calibration"] is None
        assert not np.array_equal(base.unet.conv_in.weight.detach(), pipe.unet.conv_in.weight.detach())
        assert not np.array_equal(base.vae.decoder.conv_in.weight.detach(), pipe.vae.decoder.conv_in.weight.detach())


class TestGoingOn:
    def part(self, base, out, *arguments):
        fixed = "--no-train_decoder --checkpointing_steps 2 --learning_rate 0.01 --no_calibration"
        return start(base, out, *fixed.split(), *arguments)

    def test_an_interrupted_run_has_every_step_once(self, tiny_pipeline_folder, tmp_path):
        out, whole = tmp_path / "run", tmp_path / "whole"
        assert self.part(tiny_pipeline_folder, whole, "--max_train_steps", "5") == 0
        assert self.part(tiny_pipeline_folder, out) == 0
        # As if it had been killed after the third step, while writing its line.
        shutil.rmtree(out / "checkpoints" / "denoiser" / "checkpoint-3")
        shutil.rmtree(out / "adaptation")
        with open(out / "losses.jsonl", "a") as file:
            file.write('{"stage": "denoi')
        assert self.part(tiny_pipeline_folder, out, "--max_train_steps", "5", *LATEST) == 0
        assert losses(out) == losses(whole)
        assert (out / "adaptation").is_dir()
        assert [path.name for path in list_checkpoints(out / "checkpoints" / "denoiser")] == [
            "checkpoint-4",
            "checkpoint-5",
        ]

    def test_other_settings_are_refused(self, tiny_pipeline_folder, finished, capsys):
        before = (finished / "losses.jsonl").read_bytes()
        assert start(tiny_pipeline_folder, finished, "--rank", "2", *LATEST) == 2
        assert "`--rank` is 2" in capsys.readouterr().err
        assert (finished / "losses.jsonl").read_bytes() == before

    def test_an_earlier_run_is_not_touched_unasked(self, tiny_pipeline_folder, finished, capsys):
        before = (finished / "losses.jsonl").read_bytes()
        assert start(tiny_pipeline_folder, finished) == 2
        error = capsys.readouterr().err
        assert "holds an earlier run" in error and error.count("\n") == 1
        assert (finished / "losses.jsonl").read_bytes() == before

    def test_overwrite_starts_anew(self, tiny_pipeline_folder, finished, tmp_path):
        out = Path(shutil.copytree(finished, tmp_path / "run"))
        assert start(tiny_pipeline_folder, out, "--overwrite", "--method", "full", *BRIEF) == 0
        assert [(line["stage"], line["step"]) for line in losses(out)] == [("denoiser", 1)]
        assert {path.name for path in out.iterdir()} == {"checkpoints", "losses.jsonl", "pipeline", "run.json"}


class TestLossCurve:
    def test_only_later_steps_of_the_stage_are_replaced(self, tmp_path):
        path = tmp_path / "losses.jsonl"
        first = LossCurve(path)
        for stage, step in (("denoiser", 1), ("denoiser", 2), ("decoder", 1), ("decoder", 2), ("decoder", 3)):
            first.add(stage, step, 0.5, 0.1)
        second = LossCurve(path)
        second.add("decoder", 2, 0.25, 0.1)
        second.add("decoder", 3, 0.125, 0.1)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [(line["stage"], line["step"], line["loss"]) for line in lines] == [
            ("denoiser", 1, 0.5),
            ("denoiser", 2, 0.5),
            ("decoder", 1, 0.5),
            ("decoder", 2, 0.25),
            ("decoder", 3, 0.125),
        ]
        assert list(tmp_path.iterdir()) == [path]


class TestFullDisk:
    """Files cannot grow past a limit, so writing fails as it does on a full disk."""

    def limited(self, size, *arguments):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            return start(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    @pytest.mark.parametrize("method", ["lora", "full"])
    def test_one_sentence_and_nothing_half_written(self, method, tiny_pipeline_folder, tmp_path, capsys):
        base, out = tiny_pipeline_folder, tmp_path / "run"
        common = ["--method", method, "--no-train_decoder", "--no_calibration"]

        def refused(size, *arguments):
            assert self.limited(size, base, out, *common, *arguments) == 2
            error = capsys.readouterr().err.splitlines()[-1]
            assert error.startswith("anomalysd: error: `--output_dir`") and "could not be written" in error
            hidden = [path for path in out.rglob(".*") if path.name.endswith((".partial", ".deleted"))]
            assert not hidden and not (out / "adaptation").exists() and not (out / "pipeline").exists()
            return [path.name for path in list_checkpoints(out / "checkpoints" / "denoiser")]

        assert refused(20_000, "--max_train_steps", "2") == []  # the first checkpoint
        if method == "lora":
            # Checkpoints fit, the result with its bank does not.
            assert refused(1_000_000, "--max_train_steps", "2") == ["checkpoint-2"]
        else:
            assert start(base, out, *common, "--max_train_steps", "2") == 0
            shutil.rmtree(out / "pipeline")
        assert refused(20_000, *LATEST) == ["checkpoint-2"]
        capsys.readouterr()
        assert start(base, out, *common, *LATEST) == 0
        assert [line["step"] for line in losses(out)] == [1, 2, 3]
        loaded = AnomalySDPipeline.from_pretrained(base if method == "lora" else out / "pipeline")
        if method == "lora":
            loaded.load_adaptation(out / "adaptation")
        assert loaded.categories == ["ring"]


def test_a_folder_that_another_run_writes_is_refused_at_once(tiny_pipeline_folder, finished, tmp_path, capsys):
    out = tmp_path / "run"
    with SoleWriter("output_dir", out) as other:
        other.keep()
        assert start(tiny_pipeline_folder, out, "--max_train_steps", "2") == 2
        assert f"`--output_dir` '{out}' is being written by another run" in capsys.readouterr().err
    assert not out.exists()


class TestPictures:
    def test_a_damaged_picture_is_named_and_left_out(self, parts, from_data):
        damaged = str(draw_shots((parts / "ring" / "train" / "good").iterdir(), 1, seed=0)[0])
        out, said = from_data
        assert f"'{damaged}'" in said
        shots = json.loads((out / "run.json").read_text())["shots"]
        assert {category: len(drawn) for category, drawn in shots.items()} == {"ring": 4, "wood": 4}
        assert damaged not in shots["ring"]

    def test_prompts_of_a_file_are_learned(self, from_data, tiny_pipeline_folder):
        pipe = AnomalySDPipeline.from_pretrained(tiny_pipeline_folder)
        pipe.load_adaptation(from_data[0] / "adaptation")
        assert pipe.prompt_book.prompts("ring") == ["A round ring."]
        assert "another" not in pipe.prompt_book.categories

    def test_draws_are_nested_and_follow_the_seed(self, parts):
        def drawn(*arguments):
            args = parse("--data", str(parts), "--categories", "wood", *arguments)
            return [source for source, _ in train_run.read_shots(args, report=pytest.fail)["wood"]]

        assert drawn("--shots", "2") == drawn("--shots", "5")[:2]
        assert drawn("--shots", "5", "--seed", "1") != drawn("--shots", "5", "--seed", "2")
        assert len(drawn()) == 4

    def test_prompts_with_a_byte_order_mark(self, tmp_path):
        """As editors on Windows write them."""
        (tmp_path / "prompts.json").write_text(json.dumps({"ring": {"coarse": ["A ring."]}}), encoding="utf-8-sig")
        prompts = read_prompts(tmp_path / "prompts.json", ["ring"])
        assert prompts == {"ring": {"coarse": ["A ring."]}}

    def test_plain_pictures_are_all_taken(self, parts):
        args = parse("--normal", str(parts / "wood" / "train"), "--category", "oak")
        (category, pairs), *_ = train_run.read_shots(args, report=pytest.fail).items()
        assert category == "oak" and [Path(source).name for source, _ in pairs] == [f"00{i}.png" for i in range(5)]


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "part"),
        [
            ("--normal empty --category ring", "`--normal` 'empty' holds no pictures"),
            ("--normal gone --category ring", "`--normal` 'gone' does not exist"),
            ("--normal text.png --category ring", "`--normal` holds no picture of 'ring' that can be read"),
            ("--normal good.png", "`--normal` needs `--category`"),
            ("--normal good.png --category ring --shots 0", "training needs at least one"),
            ("--normal good.png --category ring --shots 2", "holds only 1 readable"),
            ("--normal good.png --category a/b", "`--category` must be a plain name"),
            ("--synthetic spoon", "`--synthetic` is 'spoon'"),
            ("--synthetic ring --shots 0", "training needs at least one"),
            ("--synthetic ring --category ring", "`--category` names the part"),
            ("--synthetic ring --categories ring", "`--categories` chooses"),
            ("--data empty", "'<category>/train/good'"),
            ("--data empty --categories ../ring", "`--categories` must be a plain name"),
            ("--data empty --categories ring", "`--data` 'empty' has no folder of the form"),
            ("--synthetic ring --prompts gone.json", "`--prompts` 'gone.json' cannot be read"),
            ("--synthetic ring --prompts text.png", "`--prompts` 'text.png' cannot be read"),
            ("--synthetic wood --prompts ring.json", "has prompts for 'ring', but what is trained is 'wood'"),
            ("--synthetic ring --prompts ring.json", "`--prompts` 'ring.json' does not fit for 'ring'"),
            ("--synthetic ring --max_train_steps 0", "`--max_train_steps` must be"),
            ("--synthetic ring --num_train_epochs 0", "`--num_train_epochs` must be"),
            ("--synthetic ring --learning_rate -1", "`--learning_rate` must be"),
            ("--synthetic ring --seed -1", "`--seed` must be"),
            ("--synthetic ring --no-train_denoiser --no-train_decoder", "both off"),
            ("--synthetic ring --false_alarm_rate 0.9", "`--false_alarm_rate` must be"),
            ("--synthetic ring --name a/b", "`--name` must be a plain name"),
            ("--synthetic ring --output_dir good.png", "'good.png' is a file"),
            ("--synthetic ring --output_dir good.png/run", "'good.png' is a file"),
            ("--synthetic ring --resume_from_checkpoint checkpoint-7", "`--resume_from_checkpoint` must be 'latest'"),
        ],
    )
    def test_before_a_model_is_loaded(self, arguments, part, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "empty").mkdir()
        (tmp_path / "text.png").write_text("not a picture")
        (tmp_path / "ring.json").write_text('{"ring": {"medium": ["A ring."]}}')
        synthetic.normal_images("ring", 1, seed=3, size=64)[0].save(tmp_path / "good.png")
        before = sorted(tmp_path.rglob("*"))
        # The base does not exist: loading it would be another error.
        fixed = ["--report_to", "none", "--cpu", "--base", "no-model", "--output_dir", "out"]
        assert train.main([*fixed, *arguments.split()]) == 2
        error = capsys.readouterr().err
        assert part in error and "no-model" not in error and "Traceback" not in error
        assert error.splitlines()[-1].startswith("anomalysd: error: ")
        assert sorted(tmp_path.rglob("*")) == before

    @pytest.mark.parametrize(
        ("arguments", "part"),
        [
            ("--resolution 66", "`--resolution` must be a multiple of the VAE's factor 4, got 66"),
            ("--lora_target_modules no_such", "`--lora_target_modules` must name modules"),
        ],
    )
    def test_what_only_the_model_can_tell(self, arguments, part, tiny_pipeline_folder, tmp_path, capsys):
        assert start(tiny_pipeline_folder, tmp_path / "run", *arguments.split()) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("anomalysd: error: ") and part in error
        assert not (tmp_path / "run").exists()

    def test_a_base_that_does_not_inpaint(self, tiny_pipeline_folder, tmp_path, capsys):
        base = Path(shutil.copytree(tiny_pipeline_folder, tmp_path / "base"))
        tiny_unet(in_channels=4).save_pretrained(base / "unet")
        assert start(base, tmp_path / "run") == 2
        assert "9 input channels, but it has 4" in capsys.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "run").exists()

    def test_a_tracker_that_is_not_installed(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(train_run, "is_wandb_available", lambda: False)
        arguments = ["--synthetic", "ring", "--output_dir", str(tmp_path / "run"), "--report_to", "wandb"]
        assert train.main(arguments) == 2
        assert "pip install 'anomalysd-pipeline[train]'" in capsys.readouterr().err
