"""Folders that an earlier version saved load today and give the paper's scores that it gave; see
`data/saved_before`."""

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

from .conftest import warnings_of
from .test_publishing import run_loader

pytestmark = pytest.mark.timeout(240)  # loads pipelines in new processes

SAVED = Path(__file__).with_name("data") / "saved_before"
PUBLISHED, ADAPTATION = SAVED / "published", SAVED / "adaptation"
EXPECTED = json.loads((SAVED / "expected.json").read_text())
CELLS = 8
# Another processor, or another number of threads, adds in another order.
ROUNDING = 1e-4


def check(case, score, anomaly_map):
    cells = anomaly_map.reshape(CELLS, 64 // CELLS, CELLS, 64 // CELLS).mean((1, 3))
    assert score == pytest.approx(case["score"], rel=ROUNDING)
    np.testing.assert_allclose(cells, case["cells"], rtol=ROUNDING, atol=1e-6)


def check_all(pipe, category=None):
    """Compares the paper's scores and maps, of one category or of all. Its thresholds are of a score that is no more,
    which is said."""
    pipe.set_progress_bar_config(disable=True)
    cases = [case for case in EXPECTED if category in (None, case["category"])]
    assert len(cases) == (4 if category is None else 2)
    for case in cases:
        picture = Image.open(SAVED / case["picture"])
        output = pipe(picture, category=case["category"], feature_weight=0.0, mask_grouping="grouped")
        check(case["paper"], output.pred_scores[0], output.anomaly_maps[0])
        with warnings_of() as said:
            output = pipe(picture, category=case["category"])
        assert output.thresholds == [None] and "other settings (mask_grouping differ)" in said[0]
        with warnings_of() as said:
            output = pipe(picture, category=case["category"], mask_grouping="grouped")
        assert output.thresholds == output.pred_labels == [None] and np.isfinite(output.pred_scores).all()
        assert "calibrated for other settings (the version of the score differ)" in said[0]
        with pytest.raises(ValueError, match="was registered by an earlier version.*register it again"):
            pipe.calibrate(case["category"], picture)


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
    case = EXPECTED[-1]
    with pytest.raises(ValueError, match="published by an earlier version.*`AnomalySDPipeline.from_pretrained`"):
        pipe(Image.open(SAVED / case["picture"]), category=case["category"])


def test_its_own_code_without_the_package(tmp_path):
    case = EXPECTED[-1]  # inspected with an adaptation
    facts, found = run_loader(tmp_path, str(PUBLISHED), str(SAVED / case["picture"]), case["category"])
    assert not facts["installed"] and facts["module"].startswith("diffusers_modules.")
    check(case, found["scores"][0], found["maps"][0])
    assert facts["labels"][0] == case["label"]


@pytest.mark.full
@pytest.mark.parametrize("earlier_first", [True, False])
def test_in_a_process_with_a_folder_of_today(tmp_path, earlier_first):
    case = EXPECTED[-1]
    today = export(AnomalySDPipeline.from_pretrained(PUBLISHED), tmp_path / "today")
    first, second = (PUBLISHED, today) if earlier_first else (today, PUBLISHED)
    arguments = (str(second), str(SAVED / case["picture"]), case["category"], "--after", str(first), "--paper")
    facts, found = run_loader(tmp_path, *arguments)
    assert not facts["installed"]
    assert facts["module"].startswith("anomalysd_pipeline." if earlier_first else "diffusers_modules.")
    check(case["paper"], found["scores"][0], found["maps"][0])


def test_its_code_says_how_to_fine_tune():
    """What the earlier pipeline.py asks the package for, once for each name."""
    asked = {"fine_tune", "in_memory_accelerator"}
    code = (PUBLISHED / "pipeline.py").read_text()
    for name in asked:
        assert f'{name} = _from_package("adaptation").{name}' in code
        with pytest.raises(ImportError, match="from_pretrained"):
            getattr(adaptation, name)
    assert not hasattr(adaptation, "anything else")
