"""Folders that an earlier version saved load today and give the scores that it gave; see `data/saved_before`."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from PIL import Image

from anomalysd_pipeline import AnomalySDPipeline, adaptation
from anomalysd_pipeline.hub.publishing import export
from anomalysd_pipeline.models.bank import PrototypeBank

from .test_publishing import run_loader

pytestmark = pytest.mark.timeout(240)  # loads pipelines in new processes

SAVED = Path(__file__).with_name("data") / "saved_before"
PUBLISHED, ADAPTATION = SAVED / "published", SAVED / "adaptation"
EXPECTED = json.loads((SAVED / "expected.json").read_text())
CELLS = 8
# Another processor, or another number of threads, adds in another order.
ROUNDING = 1e-4


def check(case, score, label, anomaly_map):
    cells = anomaly_map.reshape(CELLS, 64 // CELLS, CELLS, 64 // CELLS).mean((1, 3))
    assert score == pytest.approx(case["score"], rel=ROUNDING)
    assert label == case["label"]
    np.testing.assert_allclose(cells, case["cells"], rtol=ROUNDING, atol=1e-6)


def check_all(pipe, category=None):
    """Compares scores, verdicts, thresholds and maps; of one category, or of all."""
    pipe.set_progress_bar_config(disable=True)
    cases = [case for case in EXPECTED if category in (None, case["category"])]
    assert len(cases) == (4 if category is None else 2)
    for case in cases:
        output = pipe(Image.open(SAVED / case["picture"]), category=case["category"])
        assert output.thresholds == [case["threshold"]]
        check(case, output.pred_scores[0], output.pred_labels[0], output.anomaly_maps[0])


def test_its_files_name_modules_that_have_moved():
    index = json.loads((PUBLISHED / "model_index.json").read_text())
    libraries = {entry[0] for entry in index.values() if isinstance(entry, list)}
    assert {f"anomalysd_pipeline.{name}" for name in ("prototypes", "scoring", "adapters")} <= libraries


def test_a_published_folder():
    check_all(AnomalySDPipeline.from_pretrained(PUBLISHED))


def test_a_saved_folder_has_no_code(tmp_path):
    plain = shutil.copytree(PUBLISHED, tmp_path / "plain", ignore=shutil.ignore_patterns("*.py", "README.md"))
    pipe = AnomalySDPipeline.from_pretrained(plain)
    check_all(pipe)
    pipe.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "model_index.json").read_text())["bank"] == [
        "anomalysd_pipeline.models.bank",
        "PrototypeBank",
    ]
    check_all(AnomalySDPipeline.from_pretrained(tmp_path / "again"))


def test_an_adaptation():
    pipe = AnomalySDPipeline.from_pretrained(PUBLISHED)
    pipe.remove_adaptation("gears")
    assert pipe.categories == ["hex nut"]
    assert pipe.load_adaptation(ADAPTATION) == ["gear"]
    check_all(pipe)


def test_its_own_code_beside_the_installed_package(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("diffusers_modules")]:
        monkeypatch.delitem(sys.modules, name)
    pipe = DiffusionPipeline.from_pretrained(str(PUBLISHED), custom_pipeline=str(PUBLISHED), trust_remote_code=True)
    assert type(pipe).__module__.startswith("diffusers_modules.")
    assert type(pipe.bank) is PrototypeBank
    check_all(pipe)


def test_its_own_code_without_the_package(tmp_path):
    case = EXPECTED[-1]  # inspected with an adaptation
    facts, found = run_loader(tmp_path, str(PUBLISHED), str(SAVED / case["picture"]), case["category"])
    assert not facts["installed"] and facts["module"].startswith("diffusers_modules.")
    check(case, found["scores"][0], facts["labels"][0], found["maps"][0])


@pytest.mark.full
@pytest.mark.parametrize("earlier_first", [True, False])
def test_in_a_process_with_a_folder_of_today(tmp_path, earlier_first):
    case = EXPECTED[-1]
    today = export(AnomalySDPipeline.from_pretrained(PUBLISHED), tmp_path / "today")
    first, second = (PUBLISHED, today) if earlier_first else (today, PUBLISHED)
    arguments = (str(second), str(SAVED / case["picture"]), case["category"], "--after", str(first))
    facts, found = run_loader(tmp_path, *arguments)
    assert not facts["installed"]
    assert facts["module"].startswith("anomalysd_pipeline." if earlier_first else "diffusers_modules.")
    check(case, found["scores"][0], facts["labels"][0], found["maps"][0])


def test_its_code_says_how_to_fine_tune():
    """What the earlier pipeline.py asks the package for, once for each name."""
    asked = {"fine_tune", "in_memory_accelerator"}
    code = (PUBLISHED / "pipeline.py").read_text()
    for name in asked:
        assert f'{name} = _from_package("adaptation").{name}' in code
        with pytest.raises(ImportError, match="from_pretrained"):
            getattr(adaptation, name)
    assert not hasattr(adaptation, "anything else")
