"""What was exported, in a fresh virtual environment that has never heard of this package."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from anomalysd_pipeline.hub.publishing import export

from .conftest import make_tiny_pipeline

pytestmark = pytest.mark.full

LOADER = Path(__file__).with_name("load_published.py")
NEEDED = ("accelerate", "diffusers>=0.42", "safetensors", "scipy", "timm", "torch", "torchvision", "transformers")


def test_in_a_fresh_environment(nuts):
    pipe = make_tiny_pipeline()
    pipe.add_category("hex nut", nuts)
    pipe.calibrate("hex nut", nuts)
    with tempfile.TemporaryDirectory() as name:  # some 5 GB, which pytest's own folders would keep
        folder = Path(name)
        export(pipe, folder / "pipeline")
        nuts[0].save(folder / "part.png")
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        python = folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
        environment |= {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "TMPDIR": name}
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", "--no-cache-dir", *NEEDED], check=True, env=environment
        )
        absent = subprocess.run([python, "-I", "-c", "import anomalysd_pipeline"], env=environment, cwd=folder)
        assert absent.returncode == 1
        done = subprocess.run(
            [python, "-I", LOADER, "pipeline", "part.png", "hex nut", "out.npz"],
            env=environment,
            cwd=folder,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        facts, found = json.loads(done.stdout.splitlines()[-1]), np.load(folder / "out.npz")
        expected = pipe(nuts[0], category="hex nut")
        assert not facts["installed"] and facts["labels"] == expected.pred_labels
        # The environment has the registry's newest libraries, which may round otherwise than those here.
        np.testing.assert_allclose(found["maps"], expected.anomaly_maps, rtol=1e-4, atol=1e-6)
