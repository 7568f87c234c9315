"""Twenty clients at once: no inspection is lost or mixed up, and the memory comes back to its level."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from anomalysd_pipeline.inspection.result import load_pipeline
from anomalysd_pipeline.synthetic import normal_images

from .browser import PATIENCE, running_app
from .tiny_adaptations import quick_pipeline

pytestmark = pytest.mark.full

gradio_client = pytest.importorskip("gradio_client")

CLIENTS, INSPECTIONS = 20, 10
FAMILIES = ("hex_nut", "ring", "gear", "capsule")
SPARE = 150_000_000
"""Bytes by which the memory may differ: an allocator gives back what it has in pieces."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a tiny pipeline."""
    folder = tmp_path_factory.mktemp("load") / "tiny"
    quick_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(folder, tmp_path_factory):
    """A picture of its own for each client: their paths, and the score of each without the app.

    Each score tells its picture. The precision depends on the machine, so pictures are drawn until that is so.
    """
    import torch

    pipe = load_pipeline(str(folder), "cpu", "auto")  # in the precision of the app
    place = tmp_path_factory.mktemp("pictures")
    paths, scores = [], []
    for number in range(5 * CLIENTS):
        (picture,) = normal_images(FAMILIES[number % 4], 1, seed=number, size=64)
        out = pipe(picture, preset="fast", generator=torch.Generator().manual_seed(0))
        score = float(out.pred_scores[0])
        if all(abs(score - other) > 1e-4 for other in scores):
            paths.append(place / f"picture_{number}.png")
            scores.append(score)
            picture.save(paths[-1])
        if len(paths) == CLIENTS:
            return paths, scores
    raise AssertionError("too few of the scores differ")


def test_none_is_lost_and_none_mixed_up(folder, pictures, tmp_path):
    paths, expected = pictures
    with running_app(tmp_path / "app", ANOMALYSD_MODEL=str(folder)) as app:

        def open_client(number: int):
            # Small answers alone are fetched: the files are asked for in other tests.
            return gradio_client.Client(
                app.url, verbose=False, download_files=False, httpx_kwargs={"timeout": PATIENCE}
            )

        with ThreadPoolExecutor(CLIENTS) as pool:
            clients = list(pool.map(open_client, range(CLIENTS)))

            def inspect(number: int, times: int) -> list[dict]:
                picture = gradio_client.handle_file(str(paths[number]))
                return [
                    clients[number].predict(picture, "Any part", "fast", api_name="/inspect")[0] for _ in range(times)
                ]

            alone = [inspect(number, 1)[0]["score"] for number in range(CLIENTS)]
            # What each client gets when it is alone is what it has to get beside others.
            assert alone == pytest.approx(expected, abs=2e-5)
            level = app.memory()
            begin = threading.Barrier(CLIENTS)

            def inspect_together(number: int) -> list[dict]:
                begin.wait(PATIENCE)
                return inspect(number, INSPECTIONS)

            answers = list(pool.map(inspect_together, range(CLIENTS)))
        for number, own in enumerate(answers):
            assert [answer["file"] for answer in own] == [paths[number].name] * INSPECTIONS
            assert [answer["score"] for answer in own] == pytest.approx([alone[number]] * INSPECTIONS, abs=2e-5)
        for client in clients:
            client.close()
        deadline = time.monotonic() + PATIENCE
        while app.memory() > level + SPARE and time.monotonic() < deadline:
            time.sleep(0.5)
        assert app.memory() <= level + SPARE
        assert app.is_alive()
