"""What a visitor waits for, and what many of them cost: the app as a process of its own.

    python benchmarks/app.py [--model DIR|ID] [--clients 20] [--inspections 10]

Prints the seconds from the start of the process to the page (median of three starts), to the first ready example in a
browser (where Chromium and Playwright are installed), of one inspection, and of the load: every client inspects a
picture of its own so many times; then how many answers were lost or another's, and the memory of the process before,
at the end, and a minute after.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tests' helpers are no installed package


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="default: the embedded checkpoint")
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--inspections", type=int, default=10)
    arguments = parser.parse_args()
    environment = {} if arguments.model is None else {"ANOMALYSD_MODEL": arguments.model}
    folder = Path(tempfile.mkdtemp())
    try:
        measure(folder, arguments.clients, arguments.inspections, environment)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(folder: Path, clients: int, inspections: int, environment: dict[str, str]) -> None:
    """Prints everything; `folder` for temporary files."""
    from tests.browser import App, running_app

    starts = []
    for number in range(3):
        app = App(folder / f"start_{number}", **environment)
        try:
            starts.append(app.wait(pause=0.02))
        finally:
            app.stop()
    print(f"start to page        {statistics.median(starts):.2f} s (each: {', '.join(f'{s:.2f}' for s in starts)})")
    with running_app(folder / "app", **environment) as app:
        show_example(app)
        load(app, folder, clients, inspections)


def show_example(app) -> None:
    """Prints how long a ready example takes in a browser, from the click to its heatmap."""
    from _pytest.outcomes import Skipped

    from tests.browser import Visitor, open_browser

    try:
        with open_browser() as browser:
            visitor = Visitor(browser, app.url)
            visitor.tab("Gallery")
            example = visitor.page.locator("#gallery-examples .thumbnail-item").first
            example.wait_for()
            began = time.perf_counter()
            example.click()
            visitor.page.locator("#gallery-heatmap img.heat").wait_for()
            print(f"first example        {time.perf_counter() - began:.2f} s")
    except Skipped as skipped:
        print(f"first example        not measured: {skipped.msg}")


def load(app, folder: Path, clients: int, inspections: int) -> None:
    """Prints the time of one inspection, and time, losses and memory of many at once."""
    import gradio_client

    from anomalysd_pipeline.synthetic import FAMILIES, normal_images
    from tests.browser import PATIENCE

    paths = [folder / f"picture_{number}.png" for number in range(clients)]
    for number, path in enumerate(paths):
        normal_images(FAMILIES[number % len(FAMILIES)], 1, seed=number)[0].save(path)
    patience = {"timeout": 4 * PATIENCE}

    def connect(_):
        return gradio_client.Client(app.url, verbose=False, download_files=False, httpx_kwargs=patience)

    def inspect(number: int, times: int = 1) -> list[float]:
        scores = []
        for _ in range(times):
            picture = gradio_client.handle_file(str(paths[number]))
            answer, _ = connected[number].predict(picture, "Any part", "fast", api_name="/inspect")
            scores.append(answer["score"] if answer["file"] == paths[number].name else None)
        return scores

    connected = [connect(number) for number in range(clients)]
    expected = [inspect(number) for number in range(clients)]  # one after another: nothing can get mixed up
    singles = []
    for number in range(min(5, clients)):
        began = time.perf_counter()
        inspect(number)
        singles.append(time.perf_counter() - began)
    before = app.memory()
    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(inspect, range(clients), [inspections] * clients))
    seconds = time.perf_counter() - began
    at_the_end = app.memory()
    wrong = sum(score != known[0] for known, own in zip(expected, answers, strict=True) for score in own)
    for client in connected:
        client.close()
    time.sleep(60)
    print(f"one inspection       {statistics.median(singles):.2f} s (median of {len(singles)})")
    print(f"{clients} clients x {inspections}      {seconds:.0f} s, {seconds / clients / inspections:.2f} s each")
    print(f"lost or mixed up     {wrong} of {clients * inspections}")
    print(f"memory               {before / 2**20:.0f} MiB before, {at_the_end / 2**20:.0f} MiB at the end, ", end="")
    print(f"{app.memory() / 2**20:.0f} MiB a minute after")


if __name__ == "__main__":
    main()
