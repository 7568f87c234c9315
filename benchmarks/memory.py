"""Memory that settings of glibc's allocator save: each is measured without and with it, in processes of its own.

    python benchmarks/memory.py [--model DIR|ID] [--pictures 4 16] [--clients 20] [--inspections 5]

First the resident memory and its peak after a part was registered and calibrated, without and with blocks of a MiB and
more returned at once while the prototype bank is filled (`M_MMAP_THRESHOLD`, left alone by the package). Then the
memory of the app before inspections by several clients at once, after them and a minute later, without and with two
heaps for all threads (`M_ARENA_MAX`, set by the app). Linux only.
"""

import argparse
import contextlib
import ctypes
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tests' helpers are no installed package

_M_MMAP_THRESHOLD = -3  # from glibc's malloc.h
_BY_ITSELF = """
import runpy, sys
sys.path.insert(0, ".")
from anomalysd_pipeline.app import memory
memory.share_arenas = lambda: False
runpy.run_path("app.py", run_name="__main__")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="Hub id, or an absolute path; default: the embedded one")
    parser.add_argument("--pictures", type=int, nargs="*", default=[4, 16])
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--inspections", type=int, default=5)
    parser.add_argument("--register", nargs=2, help=argparse.SUPPRESS)  # what a process of its own measures
    arguments = parser.parse_args()
    if arguments.register:
        count, returned = arguments.register
        register(arguments.model, int(count), returned == "returned")
        return
    for count in arguments.pictures:
        for how in ("kept", "returned"):
            command = [sys.executable, __file__, "--register", str(count), how]
            command += [] if arguments.model is None else ["--model", arguments.model]
            told = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout.strip()
            print(f"{count:2} pictures, blocks {how + ':':9} {told}", flush=True)
    for how in ("own", "shared"):
        told = inspect(arguments.model, arguments.clients, arguments.inspections, how == "shared")
        print(f"app, heaps {how + ':':7} {told}", flush=True)


def register(model: str | None, count: int, returned: bool) -> None:
    """Prints the memory of this process after it registered and calibrated a part from so many pictures."""
    import resource

    import psutil

    from anomalysd_pipeline import AnomalySDPipeline
    from anomalysd_pipeline.models.bank import PrototypeBank
    from anomalysd_pipeline.synthetic import normal_images

    if returned:
        PrototypeBank.add = large_blocks_returned()(PrototypeBank.add)
    pipe = AnomalySDPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    pictures = normal_images("hex_nut", count, seed=0)
    words = []
    for step, work in (("registered", pipe.add_category), ("calibrated", pipe.calibrate)):
        work("hex_nut", pictures)
        held = psutil.Process().memory_info().rss / 2**20
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        words.append(f"{step} {held:.0f} MiB (peak {peak:.0f})")
    print(", ".join(words))


@contextlib.contextmanager
def large_blocks_returned():
    """Returns free memory to the system, and meanwhile large blocks as soon as they are freed."""
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    libc.mallopt(_M_MMAP_THRESHOLD, 2**20)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_THRESHOLD, 2**25)  # the value that glibc itself arrives at


def inspect(model: str | None, clients: int, inspections: int, shared: bool) -> str:
    """Inspects with several clients at once; tells the memory of the app's process before, after and later."""
    import gradio_client

    from anomalysd_pipeline.synthetic import FAMILIES, normal_images
    from tests.browser import PATIENCE, running_app

    environment = {} if model is None else {"ANOMALYSD_MODEL": model}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = [folder / f"picture_{number}.png" for number in range(clients)]
        for number, path in enumerate(paths):
            normal_images(FAMILIES[number % len(FAMILIES)], 1, seed=number)[0].save(path)
        script = folder / "app_with_own_heaps.py"
        script.write_text(_BY_ITSELF, encoding="utf-8")
        with running_app(folder / "app", ["app.py" if shared else str(script)], **environment) as app:
            options = {"verbose": False, "download_files": False, "httpx_kwargs": {"timeout": 4 * PATIENCE}}
            connected = [gradio_client.Client(app.url, **options) for _ in paths]

            def work(number: int, times: int) -> None:
                for _ in range(times):
                    picture = gradio_client.handle_file(str(paths[number]))
                    connected[number].predict(picture, "Any part", "fast", api_name="/inspect")

            work(0, 1)
            sizes = [app.memory()]
            with ThreadPoolExecutor(clients) as pool:
                list(pool.map(work, range(clients), [inspections] * clients))
            sizes.append(app.memory())
            for client in connected:
                client.close()
            time.sleep(60)
            sizes.append(app.memory())
    return "{:.0f} MiB before, {:.0f} after, {:.0f} a minute later".format(*(size / 2**20 for size in sizes))


if __name__ == "__main__":
    main()
