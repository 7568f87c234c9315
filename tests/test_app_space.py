"""A lent GPU: what is asked of it, and that arguments and results survive the way to another process and back.

The package `spaces` does nothing outside Hugging Face's machines, so one stands in for it that copies what its process
would be sent, as pickles, and notes the seconds that are asked for.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from anomalysd_pipeline.app import space

from .tiny_adaptations import quick_pipeline

pytestmark = pytest.mark.full

ROOT = Path(__file__).resolve().parents[1]

STAND_IN = """
import inspect, pickle

asked = []

def sent(value):
    return pickle.loads(pickle.dumps(value))

def GPU(duration):
    def decorate(function):
        def called(*arguments):
            asked.append(duration(*arguments))
            return sent(function(*map(sent, arguments)))
        def generated(*arguments):
            asked.append(duration(*arguments))
            for value in function(*map(sent, arguments)):
                yield sent(value)
        return generated if inspect.isgeneratorfunction(function) else called
    return decorate
"""

STORY = """
import functools, json, threading
from anomalysd_pipeline.app import work
from anomalysd_pipeline.app.lessons import Lesson
from anomalysd_pipeline.app.limits import Limits
from anomalysd_pipeline.app.model import shared_models
from anomalysd_pipeline.app.sessions import SessionStore
from anomalysd_pipeline.app.space import is_zero_gpu
from anomalysd_pipeline.app.turns import Turns
from anomalysd_pipeline.synthetic import normal_images

nuts = normal_images("hex_nut", 3, seed=5, size=64)
store = SessionStore(Limits(), functools.partial(shared_models().pipeline, "embedded"))
session, turns = store.get(None), Turns()
scores = [work.inspect_one(session, turns, None, nuts[0]).result.score]
for name, length in (("quick", "quick"), ("tuned", "standard")):
    lesson = Lesson(name, tuple(nuts[:2]), None, length)
    stages = [state.stage for state in work.teach(session, turns, lesson, threading.Event())]
    found = work.inspect_one(session, turns, name, nuts[2]).result
    scores += [found.score, found.threshold]
asked = []
if is_zero_gpu():
    import spaces
    asked = spaces.asked
print(json.dumps({"zero": is_zero_gpu(), "scores": scores, "asked": asked, "stages": [stages[0], stages[-1]]}))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The same story without a lent GPU and with one."""
    folder = tmp_path_factory.mktemp("space")
    quick_pipeline().save_pretrained(folder / "tiny")
    (folder / "path").mkdir()
    (folder / "path" / "spaces.py").write_text(STAND_IN)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("ANOMALYSD", "SPACE"))}
    inherited |= {"ANOMALYSD_MODEL": str(folder / "tiny"), "PYTHONPATH": f"{folder / 'path'}{os.pathsep}{ROOT}"}
    answers = []
    for own in ({}, {"SPACES_ZERO_GPU": "1"}):
        ran = subprocess.run([sys.executable, "-c", STORY], env={**inherited, **own}, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr[-2000:]
        answers.append(json.loads(ran.stdout.splitlines()[-1]))
    return answers


def test_results_are_those_of_a_machine_of_one_s_own(told):
    plain, lent = told
    assert lent["zero"] and not plain["zero"] and plain["asked"] == []
    assert lent["scores"] == pytest.approx(plain["scores"], rel=1e-5)
    assert lent["stages"] == plain["stages"] and lent["stages"][-1] == "done"


@pytest.mark.canary
@pytest.mark.timeout(240)  # tells the story in two processes
def test_the_time_that_is_asked_for_grows_with_the_work(told):
    inspection, quick, _, tuned, _ = told[1]["asked"]
    assert 0 < inspection < quick < tuned <= space.LONGEST
    assert all(isinstance(seconds, int) for seconds in told[1]["asked"])


@pytest.mark.canary
def test_elsewhere_a_function_is_left_as_it_is():
    def function():
        return 1

    assert space.on_gpu(lambda: 10)(function) is function
