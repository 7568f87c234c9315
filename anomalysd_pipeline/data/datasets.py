"""Data sets (MVTec-AD's layout, VisA, plain folders), their masks, and few-shot draws in a file."""

import csv
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..common.files import disk_errors
from .ground_truth import Masks, load_mask, quoted, shrink_mask
from .images import upright_size
from .listing import list_folder

VISA_SPLIT = "split_csv/1cls.csv"
GOOD = ("good", "ok", "normal")
"""Names of a folder of good test pictures, in lower case."""

Shots = dict[int, dict[int, dict[str, list[Path]]]]
"""Maps number of shots, then seed, then category to the drawn pictures."""


@dataclass(frozen=True)
class TestImage:
    """Describes a test picture.

    Attributes:
        path: file of the picture.
        label: True for a defective part.
        defect: kind of the defect, "good" for a normal part.
        mask_path: ground truth, a file, or a folder or several files to be united; None for a normal part, and where
            the data set has no mask for the picture.
        indexed: whether the mask's values are classes of defects rather than shades, see `load_mask`.
    """

    __test__ = False  # the name is the field's, not a pytest class

    path: Path
    label: bool
    defect: str
    mask_path: Path | tuple[Path, ...] | None
    indexed: bool = False

    def mask(self, size: int | tuple[int, int] | None = None) -> np.ndarray | None:
        """Reads the ground truth with `load_mask`, bool `[H, W]`; None where there is no `mask_path`.

        Raises:
            ValueError: as `load_mask`, or the mask has another size than the picture.
        """
        if self.mask_path is None:
            return None
        mask = load_mask(self.mask_path, None, self.indexed)
        width, height = upright_size(self.path, f"picture '{self.path}'")
        if mask.shape != (height, width):
            turned = ", which its EXIF data turn upright" if mask.shape == (width, height) else ""
            raise ValueError(
                f"`path` {quoted(self.mask_path)} has {mask.shape[1]} x {mask.shape[0]} pixels (width x height), but "
                f"its picture '{self.path}' has {width} x {height}{turned}; give the mask the size of the picture."
            )
        return mask if size is None else shrink_mask(mask, size)


@dataclass(frozen=True)
class Category:
    """Lists a category's normal `train` pictures and labeled `test` pictures, each in path order."""

    name: str
    train: list[Path]
    test: list[TestImage]


def read_dataset(root: str | os.PathLike, categories: Iterable[str] | None = None) -> dict[str, Category]:
    """Lists a data set; recognizes its layout by its files.

    Args:
        root: a folder with `split_csv/1cls.csv` (VisA as published, see `read_visa`), or with folders of the form
            `<category>/train/good` (MVTec-AD and others of its layout, see `read_mvtec`).
        categories: names to read, in this order; None: all, sorted.

    Returns:
        Name to category.

    Raises:
        ValueError: the folder has neither layout, or a category is unknown or cannot be read.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"`root` '{root}' is no folder; give the folder of a data set.")
    rows = _read_split(root) if (root / VISA_SPLIT).is_file() else None
    if rows is None:
        folders = [path.parent.parent for path in root.glob("*/train/good") if path.is_dir()]
        known = sorted(folder.name for folder in folders if not folder.name.startswith("."))
    else:
        known = sorted(rows)
    if not known:
        itself = (root / "train" / "good").is_dir()
        remedy = "the folder it is in" if itself else "a data set in the layout of MVTec-AD, or VisA with this table"
        raise ValueError(
            f"`root` '{root}' has no folder of the form '<category>/train/good' and no '{VISA_SPLIT}'; give {remedy}."
        )
    chosen = known if categories is None else list(dict.fromkeys(categories))
    for name in chosen:
        _check_known("categories", name, known, root)
    return {name: read_mvtec(root, name) if rows is None else _visa_category(root, name, rows) for name in chosen}


def read_mvtec(root: str | os.PathLike, category: str) -> Category:
    """Lists a category in MVTec-AD's layout, shared by MVTec LOCO and the converted VisA.

    Normal pictures are `train/good/*` and test pictures `test/<type>/*`; every type is a defect but `GOOD`, in upper
    or lower case. The mask of `test/<type>/<stem>.*` is `ground_truth/<type>/<stem>_mask.png` (MVTec-AD), of several
    `<stem>_mask_1.png` and so on, or `<stem>.png` (VisA, as its script prepares it), each with another of `SUFFIXES`
    too, or the folder `<stem>` (MVTec LOCO).

    Raises:
        ValueError: the category, `train/good` or `test` is missing or holds no pictures, or a picture lies in `test`
            itself. Ground truth may be missing: a dataset with labels alone still has image metrics.
    """
    folder = Path(root, category)
    for required in (folder, folder / "train" / "good", folder / "test"):
        if not os.path.isdir(required):
            raise ValueError(
                f"`root` '{root}' has no folder '{required.relative_to(root).as_posix()}'; give the folder that holds "
                "'<category>/train/good' and '<category>/test/<type>' as `root`, and one of its names as `category`."
            )
    test, masks = [], Masks()
    for path in list_folder(folder / "test", "root"):
        inner = path.relative_to(folder / "test").parent
        if not inner.parts:
            raise ValueError(f"`root` has '{path}' outside any defect type; move it to 'test/good' or 'test/<type>'.")
        if inner.parts[0].casefold() in GOOD:
            test.append(TestImage(path, False, "good", None))
            continue
        found = masks.find(folder / "ground_truth" / inner, path.stem)
        # LOCO numbers its defects by the gray value.
        indexed = isinstance(found, Path) and found.is_dir()
        test.append(TestImage(path, True, inner.parts[0], found, indexed))
    return Category(category, list_folder(folder / "train" / "good", "root"), test)


def read_visa(root: str | os.PathLike, category: str) -> Category:
    """Lists a category of VisA as published, divided by its `split_csv/1cls.csv`.

    The table's columns are object, split (train or test), label (normal or anomaly), image and mask, the last two
    relative to `root`. Masks hold classes of defects (1, 2, ...) on 0. A missing mask is None.

    Raises:
        ValueError: the table is missing or of another form, lacks the object, or names missing pictures.
    """
    rows = _read_split(Path(root))
    _check_known("category", category, sorted(rows), root)
    return _visa_category(Path(root), category, rows)


def read_folder(
    name: str,
    normal_dir: str | os.PathLike,
    abnormal_dir: str | os.PathLike | None = None,
    mask_dir: str | os.PathLike | None = None,
    normal_test_dir: str | os.PathLike | None = None,
) -> Category:
    """Lists plain folders of pictures, each searched with its subfolders, as one category.

    Args:
        name: name of the category.
        normal_dir: normal pictures. Without `normal_test_dir` they are divided in two halves, the larger for training,
            by a draw that depends on their names alone: it is the same for every number of shots and every seed.
        abnormal_dir: defective test pictures; the kind of defect is the first subfolder's name, else "abnormal".
        mask_dir: their masks, at the same place as in `abnormal_dir`, named `<stem>_mask.*`, `<stem>_mask_1.*` and so
            on, or `<stem>.*`, or a folder `<stem>` of masks to be united. Masks may be missing, but not all of them.
        normal_test_dir: normal test pictures; `normal_dir` then serves training alone.

    Raises:
        ValueError: a folder is missing or empty, two folders share a picture, `normal_dir` cannot be divided, or
            `mask_dir` has no mask of any picture.
    """
    if mask_dir is not None and abnormal_dir is None:
        raise ValueError("`mask_dir` has the masks of `abnormal_dir`; give both, or neither.")
    given = {"normal_dir": normal_dir, "normal_test_dir": normal_test_dir, "abnormal_dir": abnormal_dir}
    found = {argument: [] if folder is None else list_folder(folder, argument) for argument, folder in given.items()}
    _check_apart(found, mask_dir)
    train, good = found["normal_dir"], found["normal_test_dir"]
    if normal_test_dir is None:
        if len(train) < 2:
            raise ValueError(f"`normal_dir` '{normal_dir}' holds one picture; give more, or `normal_test_dir`.")
        drawn = set(draw_shots(train, (len(train) + 1) // 2, seed=0))
        train, good = [path for path in train if path in drawn], [path for path in train if path not in drawn]
    test, masks = [TestImage(path, False, "good", None) for path in good], Masks()
    for path in found["abnormal_dir"]:
        inner = path.relative_to(abnormal_dir).parent
        mask_path = None if mask_dir is None else masks.find(Path(mask_dir, inner), path.stem)
        test.append(TestImage(path, True, inner.parts[0] if inner.parts else "abnormal", mask_path))
    if mask_dir is not None and not any(image.mask_path for image in test):
        raise ValueError(
            f"`mask_dir` '{mask_dir}' has no mask of any picture in '{abnormal_dir}'; name the masks '<stem>.png' or "
            "'<stem>_mask.png' after the pictures, in the same subfolders."
        )
    return Category(name, train, test)


def draw_shots(paths: Iterable[str | os.PathLike], shots: int, seed: int) -> list[Path]:
    """Draws `shots` pictures without replacement, equal for equal names and seed on every machine.

    The paths are sorted first, so their order does not matter. Draws of a seed are nested: the first two of four shots
    are the two shots.

    Raises:
        ValueError: `shots` is negative or exceeds the number of pictures, or `seed` is negative.
    """
    ordered = sorted(map(Path, paths), key=Path.as_posix)
    if not 0 <= shots <= len(ordered):
        raise ValueError(f"`shots` is {shots} with {len(ordered)} pictures; give a number from 0 to {len(ordered)}.")
    if seed < 0:
        raise ValueError(f"`seed` is {seed}; give 0 or more.")
    return [ordered[index] for index in np.random.default_rng(seed).permutation(len(ordered))[:shots]]


def draw_all(categories: Mapping[str, Category], shots: Sequence[int], seeds: Sequence[int]) -> Shots:
    """Draws normal pictures of every category for every number of shots and seed, with `draw_shots`.

    Raises:
        ValueError: a number of shots is negative or exceeds a category's training pictures, or a seed is negative.
    """
    for name, category in categories.items():
        if max(shots, default=0) > len(category.train):
            raise ValueError(
                f"`shots` is {max(shots)}, but {name!r} has only {len(category.train)} normal training pictures; give "
                "fewer shots, or leave it out."
            )

    def draw(count: int, seed: int) -> dict[str, list[Path]]:
        return {name: draw_shots(category.train, count, seed) for name, category in categories.items()}

    return {count: {seed: draw(count, seed) for seed in seeds} for count in shots}


def write_shots(path: str | os.PathLike, shots: Shots, root: str | os.PathLike) -> None:
    """Writes draws as JSON, completely or not at all.

    Its form is `{"K": {"seed": {"category": ["path below root", ...]}}}`.

    Args:
        path: the file to write; its folder is made.
        shots: the draws, as `draw_all` returns them.
        root: the folder of the data set. Paths are written relative to it and with "/", for other machines to read.

    Raises:
        ValueError: a picture is outside `root`, or the file cannot be written.
    """
    path = Path(path)

    def names(drawn: dict[str, list[Path]]) -> dict[str, list[str]]:
        return {name: [picture.relative_to(root).as_posix() for picture in paths] for name, paths in drawn.items()}

    try:
        table = {count: {seed: names(drawn) for seed, drawn in by_seed.items()} for count, by_seed in shots.items()}
    except ValueError as error:
        raise ValueError(f"`shots` has a picture outside `root` ({error}); give the data set's folder.") from error
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with disk_errors("path", path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)


def read_shots(path: str | os.PathLike, root: str | os.PathLike, categories: Mapping[str, Category]) -> Shots:
    """Reads draws from a file of the form that `write_shots` writes.

    Args:
        path: the file.
        root: the folder of the data set.
        categories: the data set, as read. Further categories of the file are left out.

    Raises:
        ValueError: the file has another form or lacks a category, the different pictures of a list are not as many as
            its shots, or a picture is outside `root`, missing or a test picture.
    """
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        cause = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise ValueError(f"`path` '{path}' cannot be read as JSON ({cause}); give another file.") from error
    tests = {image.path for category in categories.values() for image in category.test}
    shots: Shots = {}
    for count, by_seed in _numbered(table, path, "a number of shots").items():
        for seed, drawn in _numbered(by_seed, path, "a seed").items():
            where = f"`path` '{path}', {count} shots, seed {seed}"
            shots.setdefault(count, {})[seed] = {
                name: _check_list(drawn, name, count, Path(root), tests, where) for name in categories
            }
    return shots


def _check_known(argument: str, name: str, known: Sequence[str], root: str | os.PathLike) -> None:
    if name not in known:
        raise ValueError(f"`{argument}` has {name!r}, but '{root}' has {', '.join(known)}; choose among these.")


def _read_split(root: Path) -> dict[str, list[dict[str, str]]]:
    """Reads the rows of VisA's table by object."""
    path = root / VISA_SPLIT
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            table = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        cause = getattr(error, "strerror", None) or error
        raise ValueError(f"`root` '{root}' has no readable '{VISA_SPLIT}' ({cause}); take it from VisA.") from error
    columns = ("object", "split", "label", "image", "mask")
    if not table or not set(columns) <= set(reader.fieldnames or ()):
        raise ValueError(f"`root` has '{path}', which lacks rows or a column of {', '.join(columns)}; copy it anew.")
    rows: dict[str, list[dict[str, str]]] = {}
    for number, row in enumerate(table, 2):
        fits = (row["split"], row["label"]) in {("train", "normal"), ("test", "normal"), ("test", "anomaly")}
        if not fits or not row["object"] or not _is_below(row["image"]) or not _is_below(row["mask"] or "-"):
            raise ValueError(f"`root` has '{path}', whose line {number} does not fit the others; copy it anew.")
        rows.setdefault(row["object"], []).append(row)
    return rows


def _visa_category(root: Path, name: str, rows: Mapping[str, list[dict[str, str]]]) -> Category:
    ordered = sorted(rows[name], key=lambda row: row["image"])
    missing = [row["image"] for row in ordered if not (root / row["image"]).is_file()]
    if missing:
        raise ValueError(
            f"`root` '{root}' lacks {len(missing)} pictures that '{VISA_SPLIT}' has for {name!r}, such as "
            f"'{missing[0]}'; copy the whole data set, or leave this category out."
        )
    train = [root / row["image"] for row in ordered if row["split"] == "train"]
    test = []
    for row in ordered:
        if row["split"] == "test":
            label, mask_path = row["label"] == "anomaly", root / row["mask"]
            found = mask_path if label and mask_path.is_file() else None
            test.append(TestImage(root / row["image"], label, "anomaly" if label else "good", found, indexed=label))
    if not train or not test:
        raise ValueError(f"`root` has '{root / VISA_SPLIT}' without train or test rows of {name!r}; copy it anew.")
    return Category(name, train, test)


def _check_apart(found: Mapping[str, list[Path]], mask_dir: str | os.PathLike | None) -> None:
    seen: dict[Path, str] = {}
    masks = None if mask_dir is None else Path(mask_dir).resolve()
    for argument, paths in found.items():
        for path in paths:
            real = path.resolve()
            other = "mask_dir" if masks is not None and real.is_relative_to(masks) else seen.setdefault(real, argument)
            if other != argument:
                raise ValueError(f"`{argument}` and `{other}` both hold '{path}'; give folders that share no picture.")


def _is_below(text: str) -> bool:
    """Tells whether a relative path stays below its folder."""
    return bool(text) and not Path(text).anchor and ".." not in Path(text).parts


def _numbered(table: object, path: str | os.PathLike, meaning: str) -> dict[int, object]:
    if isinstance(table, dict) and table and all(re.fullmatch(r"0|[1-9]\d{0,8}", key, re.ASCII) for key in table):
        return {int(key): value for key, value in table.items()}
    raise ValueError(
        f'`path` \'{path}\' must hold {{"K": {{"seed": {{"category": ["path", ...]}}}}}}, but has '
        f"{json.dumps(table)[:60]} where {meaning} should be; give a file that `write_shots` wrote."
    )


def _check_list(drawn: object, category: str, count: int, root: Path, tests: set[Path], where: str) -> list[Path]:
    names = drawn.get(category) if isinstance(drawn, dict) else None
    where = f"{where}, {category!r}"
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{where}: there is no list of paths; give one.")
    for name in names:
        if not _is_below(name) or not (root / name).is_file():
            raise ValueError(f"{where}: {name!r} is no file below '{root}'; give a picture's path relative to it.")
        if root / name in tests:
            raise ValueError(f"{where}: {name!r} is a test picture; give one that is not tested.")
    paths = [root / name for name in names]
    if not len(paths) == len(set(paths)) == count:
        raise ValueError(f"{where}: there are {len(set(paths))} different pictures; give {count}.")
    return paths
