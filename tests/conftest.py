import atexit
import contextlib
import gc
import logging
import os

# Before torch starts its threads, for the workers of `make test` too: more than one each for small models would spin.
# process that starts them, share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from PIL import Image

from anomalysd_pipeline.synthetic import normal_images, test_samples


def make_tiny_pipeline(**kwargs):
    from anomalysd_pipeline import AnomalySDPipeline

    from .tiny import RESOLUTION, tiny_components

    components = {**tiny_components(), **kwargs}
    settings = {
        "resolution": RESOLUTION,
        "default_preset": "fast",
        "preset_overrides": {"fast": {"num_inference_steps": 5, "mask_scales": [1, 2]}},
    }
    pipe = AnomalySDPipeline(**{**settings, **components})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextlib.contextmanager
def warnings_of(name="anomalysd_pipeline"):
    """Collects what a logger of the package says."""
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


@pytest.fixture(scope="module", autouse=True)
def _only_new_garbage():
    """Spares garbage collection what is there: accelerate collects after every stage of a fine-tuning, and looking
    through all that the tests import takes longer than the stage."""
    gc.collect()
    gc.freeze()


atexit.register(gc.unfreeze)


@pytest.fixture
def tiny_pipeline():
    """A pipeline of real classes with small random weights, 64 px, nothing registered."""
    return make_tiny_pipeline()


@pytest.fixture(scope="session")
def tiny_pipeline_folder(tmp_path_factory):
    """The same pipeline, saved."""
    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    make_tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def nuts():
    """Three normal pictures of one drawn hex nut, 64 px."""
    return normal_images("hex_nut", 3, seed=5, size=64)


@pytest.fixture(scope="session")
def tested_nuts():
    """Two good and two defective pictures of the product of `nuts`."""
    return [Image.fromarray(sample.image) for sample in test_samples("hex_nut", 2, 2, seed=5, size=64)]


@pytest.fixture(scope="session")
def registered_pipeline(nuts):
    """A pipeline that knows the part of `nuts`, for calls that are refused: no test may change it."""
    pipe = make_tiny_pipeline()
    pipe.add_category("hex_nut", nuts)
    before = repr(dict(pipe.config)), pipe.bank["hex_nut"].clone()
    yield pipe
    assert repr(dict(pipe.config)) == before[0] and pipe.bank["hex_nut"].equal(before[1])


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A running Hub that this process' client talks to, without a login."""
    from huggingface_hub import close_session, constants

    from .hub_server import HubServer

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    close_session()
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        yield server
    close_session()
