"""What a program has set up with accelerate stays as it is, whatever runs in the same process."""

import threading

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType

from anomalysd_pipeline import train
from anomalysd_pipeline.common.devices import own_accelerate_state

from .tiny_adaptations import pictures, quick_pipeline
from .tiny_evaluation import BRIEF, draw_parts, run
from .tiny_training import Cancelled, cancel_after, reset_accelerate


@pytest.fixture
def host():
    """The accelerator of a program that uses this package."""
    reset_accelerate()
    yield Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=4)
    reset_accelerate()


def check(host) -> None:
    """It works as before, and another of the same kind may be made."""
    assert host.mixed_precision == "bf16" and host.gradient_accumulation_steps == 4
    assert host.state.distributed_type == DistributedType.NO and host.state.num_processes == 1
    assert host.state.__dict__ is AcceleratorState._shared_state
    assert host.gradient_state.__dict__ is GradientState._shared_state
    model = host.prepare(torch.nn.Linear(2, 2))
    with host.accumulate(model), host.autocast():
        assert model(torch.ones(1, 2)).dtype == torch.float32 and not host.sync_gradients
        assert torch.is_autocast_enabled("cpu")
    assert Accelerator(mixed_precision="bf16", gradient_accumulation_steps=4).state.__dict__ is host.state.__dict__
    with pytest.raises(ValueError, match="already been initialized"):
        Accelerator(mixed_precision="no")


class TestOwnState:
    def test_another_precision_inside(self, host):
        with own_accelerate_state():
            inner = Accelerator(mixed_precision="no", gradient_accumulation_steps=2)
            assert (inner.mixed_precision, host.mixed_precision) == ("no", "bf16")
            assert (inner.gradient_accumulation_steps, host.gradient_accumulation_steps) == (2, 4)
        assert inner.mixed_precision == "no"
        check(host)

    def test_after_an_error(self, host):
        with pytest.raises(KeyError), own_accelerate_state():
            Accelerator(mixed_precision="no")
            raise KeyError
        check(host)

    def test_one_of_several_processes(self, host):
        """Those that a launcher started."""
        PartialState._shared_state.update(distributed_type=DistributedType.MULTI_GPU, num_processes=3, process_index=2)
        with own_accelerate_state():
            assert (PartialState().num_processes, PartialState().process_index) == (3, 2)
        with own_accelerate_state(one_process=True):
            inner = Accelerator(mixed_precision="no")
            assert (inner.num_processes, inner.process_index, inner.distributed_type) == (1, 0, DistributedType.NO)
        assert (PartialState().num_processes, PartialState().process_index) == (3, 2)
        assert PartialState().distributed_type == DistributedType.MULTI_GPU

    def test_within_one_of_several_processes(self, host, monkeypatch):
        """A fine-tuning of one process, which has a state of its own, must not find the launcher's others again."""
        PartialState._shared_state.update(distributed_type=DistributedType.MULTI_CPU, num_processes=3, process_index=2)
        for name, value in {"WORLD_SIZE": "3", "RANK": "2", "LOCAL_RANK": "2", "MASTER_PORT": "1"}.items():
            monkeypatch.setenv(name, value)  # as the launcher left them: accelerate would start a group by these
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        with own_accelerate_state(one_process=True), own_accelerate_state():
            assert PartialState._shared_state["num_processes"] == 1
            inner = Accelerator(cpu=True, mixed_precision="no")
            assert (inner.num_processes, inner.distributed_type) == (1, DistributedType.NO)
        assert PartialState().num_processes == 3

    def test_without_any_before(self):
        reset_accelerate()
        with own_accelerate_state(one_process=True):
            assert Accelerator(cpu=True, mixed_precision="no").num_processes == 1
        assert PartialState._shared_state == AcceleratorState._shared_state == GradientState._shared_state == {}

    def test_a_device_that_the_program_did_not_choose(self, host):
        """A pipeline may be on another one than the program's accelerator."""
        PartialState._shared_state["device"] = torch.device("meta")
        with own_accelerate_state():
            assert Accelerator(cpu=True, mixed_precision="no").device == torch.device("cpu")
        assert PartialState().device == torch.device("meta")

    def test_processes_that_were_started_inside_go_on(self):
        reset_accelerate()
        with own_accelerate_state():
            PartialState._shared_state.update(distributed_type=DistributedType.MULTI_CPU, num_processes=3)
        assert PartialState._shared_state["num_processes"] == 3
        reset_accelerate()

    def test_in_two_threads_that_end_in_any_order(self, host):
        both_began, first_left = (threading.Barrier(2, timeout=60) for _ in range(2))
        found = {}

        def train(name, accumulation):
            with own_accelerate_state():
                accelerator = Accelerator(cpu=True, mixed_precision="no", gradient_accumulation_steps=accumulation)
                both_began.wait()
                if name == "second":
                    first_left.wait()
                model = torch.nn.Linear(1, 1)
                before = model.weight.item()
                model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
                changed = []
                for _ in range(accumulation):
                    with accelerator.accumulate(model):
                        accelerator.backward(model(torch.ones(1, 1)).sum())
                        optimizer.step()
                    changed.append(model.weight.item() != before)
                found[name] = changed
            if name == "first":
                first_left.wait()

        threads = [threading.Thread(target=train, args=each) for each in (("first", 2), ("second", 3))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {"first": [False, True], "second": [False, False, True]}
        check(host)


class TestAdapt:
    @pytest.mark.parametrize("precision", ["no", "bf16"])
    def test_fine_tunes_in_its_own_precision(self, host, precision):
        pipe = quick_pipeline()
        weights = pipe.adapt({"nut": pictures("nut")}, calibrate=False, mixed_precision=precision)
        assert weights.settings.mixed_precision == precision
        check(host)

    @pytest.mark.parametrize("stage", ["denoiser", "decoder"])
    def test_an_error_in_the_middle(self, host, stage):
        with pytest.raises(Cancelled):
            quick_pipeline().adapt({"nut": pictures("nut")}, callback=cancel_after(stage, 1))
        check(host)

    def test_leaves_nothing_where_there_was_nothing(self):
        reset_accelerate()
        quick_pipeline().adapt({"nut": pictures("nut")}, calibrate=False)
        assert PartialState._shared_state == AcceleratorState._shared_state == GradientState._shared_state == {}


class TestTraining:
    def test_a_run_in_the_same_process(self, host, tiny_pipeline_folder, tmp_path):
        given = "--synthetic ring --shots 1 --max_train_steps 1 --no-train_decoder --no_calibration --report_to none"
        given += f" --mixed_precision no --cpu --base {tiny_pipeline_folder} --output_dir {tmp_path}"
        assert train.main(given.split()) == 0
        check(host)


class TestEvaluation:
    def test_one_that_adapts(self, host, tiny_pipeline_folder, tmp_path):
        parts = draw_parts(tmp_path / "parts")
        given = ["--base", tiny_pipeline_folder, "--data", parts, "--categories", "ring", "--limit", 1, *BRIEF]
        given += ["--seeds", 0, "--adapt", "--adapt_steps", 1, "--adapt_decoder_steps", 1, "--mixed_precision", "no"]
        assert run(*given, "--out", tmp_path / "out") == 0
        check(host)
