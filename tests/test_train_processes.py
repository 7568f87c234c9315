"""Several processes train as one does: the same losses at the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from anomalysd_pipeline import AnomalySDPipeline, train

from .train_driver import FSDP

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]  # several processes on few cores

ROOT = Path(__file__).resolve().parents[1]
DRIVER = Path(__file__).with_name("train_driver.py")
CONFIGS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
FIXED = (
    "--synthetic ring wood --shots 2 --max_train_steps 5 --max_decoder_steps 4 --learning_rate 0.003 --no_calibration "
    "--mixed_precision no --report_to none --cpu"
)
# Name: what two processes are given, whether they share the weights, and what one process is given for the same steps.
RUNS = {
    "lora": ("--train_batch_size 2", False, "--train_batch_size 4"),
    "full": ("--train_batch_size 2 --method full", False, "--train_batch_size 4 --method full"),
    "accumulation": (
        "--train_batch_size 1 --gradient_accumulation_steps 2",
        False,
        "--train_batch_size 2 --gradient_accumulation_steps 2",
    ),
    "average": (
        "--train_batch_size 2 --use_ema --ema_decay 0.5 --validation_steps 2",
        False,
        "--train_batch_size 4 --use_ema --ema_decay 0.5 --validation_steps 2",
    ),
    "sharded lora": ("--train_batch_size 2", True, "--train_batch_size 4"),
    "sharded full": ("--train_batch_size 2 --method full", True, "--train_batch_size 4 --method full"),
}


def arguments(base, out, given):
    return [*FIXED.split(), "--base", str(base), "--output_dir", str(out), *given.split()]


def curve(out):
    lines = [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]
    return [(line["stage"], line["step"]) for line in lines], [line["loss"] for line in lines]


def by_two_processes(base, folder, names, refused=False):
    """Runs by two processes, over gloo; returns what they said on stderr."""
    runs = [(name, arguments(base, folder / name, RUNS[name][0]), RUNS[name][1]) for name in names]
    if refused:
        runs.append(("averaged shards", arguments(base, folder / "refused", "--use_ema"), True))
    (folder / "runs.json").write_text(json.dumps(runs))
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *launch.split(), str(DRIVER), str(folder / "runs.json")],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


@pytest.fixture(scope="module")
def together(tiny_pipeline_folder, tmp_path_factory):
    """The folder of every run by two processes, and what they said."""
    folder = tmp_path_factory.mktemp("together")
    return folder, by_two_processes(tiny_pipeline_folder, folder, RUNS, refused=True)


@pytest.fixture(scope="module")
def alone(tiny_pipeline_folder, tmp_path_factory):
    """A function that gives the folder of a run by one process; equal runs are made once."""
    folder, made = tmp_path_factory.mktemp("alone"), {}

    def run(given):
        if given not in made:
            made[given] = folder / str(len(made))
            assert train.main(arguments(tiny_pipeline_folder, made[given], given)) == 0
        return made[given]

    return run


@pytest.mark.canary
def test_two_processes_are_one(tiny_pipeline_folder, tmp_path, alone):
    by_two_processes(tiny_pipeline_folder, tmp_path, ["lora"])
    steps, losses = curve(tmp_path / "lora")
    expected_steps, expected = curve(alone(RUNS["lora"][2]))
    assert steps == expected_steps and losses == pytest.approx(expected, rel=1e-3)


class TestTwoProcesses:
    def test_all_processes_succeed(self, together):
        for rank in (0, 1):
            statuses = json.loads((together[0] / f"statuses-{rank}.json").read_text())
            assert statuses == {**dict.fromkeys(RUNS, 0), "averaged shards": 2}

    @pytest.mark.parametrize("name", RUNS)
    def test_losses_are_those_of_one_process(self, name, together, alone):
        steps, found = curve(together[0] / name)
        expected_steps, expected = curve(alone(RUNS[name][2]))
        assert steps == expected_steps and len(steps) == 9
        assert found == pytest.approx(expected, abs=1e-4)

    def test_the_comparison_would_notice_other_weights(self, alone):
        _, lora = curve(alone(RUNS["lora"][2]))
        _, full = curve(alone(RUNS["full"][2]))
        assert abs(lora[4] - full[4]) > 1e-3 and abs(lora[8] - full[8]) > 1e-3

    def test_accumulation_is_one_larger_batch(self, alone):
        _, expected = curve(alone(RUNS["lora"][2]))
        _, found = curve(alone(RUNS["accumulation"][2]))
        assert found == pytest.approx(expected, abs=1e-4)

    @pytest.mark.parametrize("name", ["lora", "sharded lora"])
    def test_the_result_can_be_loaded(self, name, together, tiny_pipeline_folder):
        pipe = AnomalySDPipeline.from_pretrained(tiny_pipeline_folder)
        assert pipe.load_adaptation(together[0] / name / "adaptation") == ["ring", "wood"]

    @pytest.mark.parametrize("name", ["full", "sharded full"])
    def test_all_weights_are_those_of_one_process(self, name, together, alone):
        pipe = AnomalySDPipeline.from_pretrained(together[0] / name / "pipeline")
        expected = AnomalySDPipeline.from_pretrained(alone(RUNS[name][2]) / "pipeline")
        for part in ("unet", "vae"):
            found = pipe.components[part].state_dict()
            for key, value in expected.components[part].state_dict().items():
                # Adam's first steps are of one length however small a gradient is, so its sign may be a rounding's.
                assert (found[key] - value).abs().mean() < 1e-4, key

    def test_one_process_writes(self, together):
        names = {path.name for path in (together[0] / "average").iterdir()}
        assert names == {"adaptation", "checkpoints", "losses.jsonl", "run.json", "validation"}
        assert len(list((together[0] / "average" / "validation").iterdir())) == 4

    def test_an_average_of_shards_is_refused(self, together):
        folder, said = together
        assert "`--use_ema` keeps a whole copy of the weights, but FSDP divides them" in said
        assert not (folder / "refused").exists()


class TestConfigurations:
    @pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
    def test_accelerate_takes_it(self, path):
        config = load_config_from_file(str(path))
        assert config.num_processes > 1
        assert path.stem.startswith(config.distributed_type.value.split("_")[0].lower()[:5])

    def test_sharding_is_what_is_tested_here(self):
        given = yaml.safe_load((ROOT / "configs" / "accelerate" / "fsdp.yaml").read_text())["fsdp_config"]
        assert given["fsdp_transformer_layer_cls_to_wrap"] == FSDP["FSDP_TRANSFORMER_CLS_TO_WRAP"]
        for key in (
            "version",
            "auto_wrap_policy",
            "reshard_after_forward",
            "state_dict_type",
            "cpu_ram_efficient_loading",
        ):
            assert str(given[f"fsdp_{key}"]).lower() == FSDP[f"FSDP_{key.upper()}"].lower()
