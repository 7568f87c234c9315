"""Several threads on one pipeline, or on pipelines that share networks: each result is as if it were alone."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from anomalysd_pipeline.common.threads import alone, give_way

from .tiny_adaptations import defective, drawn, inpainted, inspected, pictures, quick_pipeline

PARTS = ("nut", "ring", "gear")
THREADS = 4


def taught():
    """A pipeline with an adaptation for each part, not calibrated."""
    pipe = quick_pipeline()
    for seed, part in enumerate(PARTS):
        pipe.learn({part: pictures(part)}, drawn(seed), calibrate=False)
    return pipe


def sharing(pipe):
    """Another pipeline with the same networks and what `pipe` has learned."""
    components = {**pipe.components, "bank": None, "adapters": None}
    other = quick_pipeline(**{name: part for name, part in components.items() if part is not None})
    other.knowledge = pipe.knowledge.copy()
    return other


def together(count: int, work):
    """Calls `work(number)` in threads that begin at once; returns the results, or raises."""
    begin = threading.Barrier(count)

    def start(number: int):
        begin.wait(60)
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(start, range(count)))


@pytest.mark.parametrize("number_of_pipelines", [1, 2])
def test_each_inspection_uses_its_own_adaptation(number_of_pipelines):
    pipe = taught()
    pipes = [pipe, sharing(pipe)][:number_of_pipelines]
    expected = {part: inspected(pipe, part) for part in PARTS}

    def work(number: int) -> list[bool]:
        parts = [PARTS[(number + turn) % 3] for turn in range(6)]
        return [inspected(pipes[number % len(pipes)], part).equal(expected[part]) for part in parts]

    assert together(THREADS, work) == [[True] * 6] * THREADS


def test_inspections_while_others_learn_save_and_repaint(tmp_path):
    pipe = taught()
    expected, repainted = {part: inspected(pipe, part) for part in PARTS}, inpainted(pipe)

    def inspect(part: str) -> bool:
        return all(inspected(pipe, part).equal(expected[part]) for _ in range(4))

    def learn() -> bool:
        for number in range(6):
            pipe.add_category(f"another {number}", pictures("nut"))
        return True

    def forget_and_save() -> bool:
        pipe.add_category("a third", pictures("ring"))
        pipe.remove_category("a third")
        pipe.save_pretrained(tmp_path / "saved")
        return inpainted(pipe).equal(repainted)

    jobs = [lambda: inspect("nut"), lambda: inspect("ring"), learn, forget_and_save]
    assert together(len(jobs), lambda number: jobs[number]()) == [True] * len(jobs)
    assert pipe.categories == sorted([*PARTS, *(f"another {number}" for number in range(6))])


def test_a_callback_may_wait_for_another_thread_that_inspects():
    pipe = taught()
    expected = {part: inspected(pipe, part) for part in PARTS}
    picture = defective("nut")

    def other(*_) -> dict:
        # Other steps of the scheduler and another adaptation, in the middle of a repainting.
        with ThreadPoolExecutor(1) as pool:
            pool.submit(pipe, picture, category="ring", num_inference_steps=11).result(60)
        return {}

    out = pipe(picture, category="nut", output_type="pt", callback_on_step_end=other)
    assert out.anomaly_maps.equal(expected["nut"])


class TestGiveWay:
    def test_tells_whether_the_objects_were_in_use(self):
        class Shared:
            pass

        first, second = Shared(), Shared()

        def use(*objects) -> str:
            with alone(objects):
                return "used"

        def elsewhere(*objects) -> str:
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(use, *objects).result(60)

        with alone([first, None]):
            assert give_way(elsewhere, second) == ("used", False)
            assert give_way(elsewhere, second, first) == ("used", True)
