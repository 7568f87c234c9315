"""Write folders that others can load, and upload them to the Hub."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from ..common.files import disk_errors, written_whole
from .bundle import bundle_source, component_source
from .exemplars import without_exemplars
from .model_card import PLACEHOLDER, hub_id, model_card

INDEX, FACTS, CARD, CODE = "model_index.json", "adaptation.json", "README.md", "pipeline.py"
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
"""Suffixes of files that can run code when they are loaded."""


def export(
    pipe,
    folder: str | os.PathLike,
    adaptation: str | None = None,
    figures: Sequence[Mapping] | None = None,
    repo_id: str | None = None,
    license: str | None = None,
    overwrite: bool = False,
    exemplars: bool = True,
) -> Path:
    """Writes a folder that can be published as it is.

    It holds weights as safetensors, `README.md`, and for a whole pipeline the code that loads it without this package.
    It appears when all of it is on disk; on an error nothing is left behind.

    Args:
        pipe: an `AnomalySDPipeline`.
        folder: a new or empty folder.
        adaptation: name of the adaptation to write without its base; None: the whole pipeline.
        figures, repo_id, license: for the card, see `model_card`.
        overwrite: whether an earlier export in `folder` may be replaced.
        exemplars: False leaves out the normal pictures that were registered. Parts are then repainted from the image
            itself (`start`), and have to be calibrated anew.

    Returns:
        `folder`.

    Raises:
        ValueError: if the folder holds something, or cannot be written, or there is no such adaptation.
    """
    folder = Path(os.path.abspath(folder))
    earlier = (folder / INDEX).is_file() or (folder / FACTS).is_file()
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (overwrite and earlier)):
        remedy = "give a new folder, or `overwrite=True`" if earlier else "give a new or empty folder"
        raise ValueError(f"`folder` '{folder}' holds something already; {remedy}.")
    with disk_errors("folder", folder), written_whole(folder) as partial:
        if adaptation is None:
            pipe.save_pretrained(partial)
        else:
            pipe.save_adaptation(partial, adaptation)
        if not exemplars:
            for path, content in without_exemplars(partial).items():
                (partial / path).write_bytes(content)
        for path, text in _completion(partial, repo_id, figures, license).items():
            (partial / path).write_text(text, encoding="utf-8", newline="\n")
    return folder


def push(
    folder: str | os.PathLike,
    repo_id: str,
    private: bool | None = None,
    create_pr: bool = False,
    token: str | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    exemplars: bool = True,
) -> str:
    """Uploads a saved pipeline or adaptation to the Hub.

    To a folder that `export` has not made, the upload adds `README.md`, and for a pipeline the code that loads it
    without this package. Paths of this machine are taken out of its configurations. Hidden files stay behind, and the
    folder itself stays as it is.

    Args:
        folder: written by `export`, `pipe.save_pretrained` or `pipe.save_adaptation`.
        repo_id: "user/name"; made if missing.
        private: whether a new repository is private; None: the user's or the organization's default.
        create_pr: open a pull request instead of writing to the main branch.
        token: of the Hub; None: HF_TOKEN or that of `hf auth login`. It is never printed.
        commit_message: None: one that names the package.
        revision: branch; None: main.
        exemplars: see `export`.

    Returns:
        The URL of the pull request or of the commit.

    Raises:
        ValueError: for a folder without a checkpoint or with pickled files, a bad `repo_id`, and where the Hub cannot
            be reached or refuses.
    """
    folder = Path(folder)
    check_repo_id(repo_id)
    kind = _check_folder(folder)
    if create_pr and revision not in (None, "main"):
        raise ValueError(
            f"`revision` must be left out with `create_pr`, which proposes a change of main, got {revision!r}."
        )
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    if not exemplars:
        files |= without_exemplars(folder)
    files |= {path: text.encode() for path, text in _completion(folder, repo_id).items()}
    visible = [path for path in files if not any(part.startswith(".") for part in path.split("/"))]
    try:
        operations = [CommitOperationAdd(path, files[path]) for path in visible]  # reads and hashes the files
    except (OSError, ValueError) as error:
        raise ValueError(f"`folder` '{folder}' cannot be read ({' '.join(str(error).split())}).") from error
    message = commit_message or f"Upload an AnomalySD {kind} with anomalysd-pipeline"
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.create_commit(repo_id, operations, commit_message=message, revision=revision, create_pr=create_pr)
    # A failed part of an upload comes as RuntimeError, with the answer of the Hub as its cause.
    except (HTTPError, OSError, RuntimeError) as error:
        raise ValueError(_explain(error, repo_id)) from error
    except ValueError as error:
        raise ValueError(f"`folder` '{folder}' is refused: {' '.join(str(error).split())}") from error
    return commit.pr_url or commit.commit_url


def push_to_hub(
    pipe,
    repo_id: str,
    adaptation: str | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    token: str | None = None,
    figures: Sequence[Mapping] | None = None,
    license: str | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    exemplars: bool = True,
) -> str:
    """Calls `export` to a temporary folder, and `push`; arguments, URL and errors are theirs."""
    check_repo_id(repo_id)
    with tempfile.TemporaryDirectory(prefix="anomalysd-") as parent:
        folder = export(pipe, Path(parent, "export"), adaptation, figures, repo_id, license, exemplars=exemplars)
        return push(folder, repo_id, private, create_pr, token, commit_message, revision)


def check_repo_id(repo_id: str) -> None:
    """Raises ValueError for anything but "user/name" in the characters the Hub allows."""
    try:
        validate_repo_id(repo_id)
        complete = repo_id.count("/") == 1
    except HFValidationError:
        complete = False
    if not complete:
        raise ValueError(
            "`repo_id` must be 'user/name', in letters, digits, '-', '_' and '.' and at most 96 characters, got "
            f"{repo_id!r}."
        )


def _check_folder(folder: Path) -> str:
    """Returns "pipeline" or "adaptation", the content of a folder.

    Raises:
        ValueError: for a folder that must not be sent.
    """
    indices = [name for name in (INDEX, FACTS) if (folder / name).is_file()]
    if len(indices) != 1:
        raise ValueError(
            f"`folder` '{folder}' must hold either {INDEX} or {FACTS}; give what `pipe.save_pretrained` or "
            "`pipe.save_adaptation` has written."
        )
    pickled = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in PICKLES)
    if pickled:
        raise ValueError(
            f"`folder` '{folder}' holds '{pickled[0]}', which can run code when it is loaded; load the checkpoint and "
            "save it again, which writes safetensors."
        )
    facts = _read_json(folder, indices[0])
    if indices == [FACTS]:
        if not any(folder.glob("*.safetensors")):
            raise ValueError(f"`folder` '{folder}' holds no weights; save the adaptation again.")
        return "adaptation"
    if facts.get("_class_name") != "AnomalySDPipeline":
        raise ValueError(
            f"`folder` '{folder}' holds a {facts.get('_class_name')}; load it with "
            "`AnomalySDPipeline.from_pretrained` and save that."
        )
    components = [name for name, entry in facts.items() if isinstance(entry, list) and entry[0] is not None]
    missing = [name for name in components if not (folder / name).is_dir() or not any((folder / name).iterdir())]
    if missing:
        raise ValueError(f"`folder` '{folder}' lacks its component '{missing[0]}'; save the pipeline again.")
    return "pipeline"


def _completion(
    folder: Path,
    repo_id: str | None,
    figures: Sequence[Mapping] | None = None,
    license: str | None = None,
) -> dict[str, str]:
    """Writes the files that a checkpoint lacks, and its configurations without paths of this machine.

    Args:
        folder: a saved pipeline or adaptation, which is only read.
        repo_id, figures, license: for the card, see `model_card`.

    Returns:
        Path within the folder to text.
    """
    kind = "pipeline" if (folder / INDEX).is_file() else "adaptation"
    facts = _read_json(folder, INDEX if kind == "pipeline" else FACTS)
    texts = {}
    if not (folder / CARD).exists():
        texts[CARD] = model_card(facts, kind, repo_id, figures, license=license)
    elif repo_id is not None and PLACEHOLDER in (text := (folder / CARD).read_text(encoding="utf-8")):
        texts[CARD] = text.replace(PLACEHOLDER, repo_id)
    if kind == "adaptation":
        return texts
    if not (folder / CODE).exists():
        texts[CODE] = bundle_source()
    for name, entry in facts.items():
        # diffusers looks for a component's code on the Hub under this name.
        source = component_source(str(entry[0]), str(entry[-1])) if isinstance(entry, list) else None
        if source and not (folder / name / f"{entry[0]}.py").exists():
            texts[f"{name}/{entry[0]}.py"] = source
    for path in [folder / INDEX, *folder.glob("*/config.json"), *folder.glob("*/*_config.json")]:
        name = path.relative_to(folder).as_posix()
        config = _read_json(folder, name)
        paths = [key for key in ("_name_or_path", "name_or_path") if key in config and hub_id(config[key]) is None]
        if paths:
            kept = {key: value for key, value in config.items() if key not in paths}
            texts[name] = json.dumps(kept, indent=2, ensure_ascii=False) + "\n"
    return texts


def _read_json(folder: Path, name: str) -> dict:
    """Reads a file of a saved folder, and raises ValueError where it is damaged."""
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"`folder` '{folder}' holds a damaged {name} ({error}); save it again.") from error


def _explain(error: BaseException, repo_id: str) -> str:
    """Gives one sentence for the error of a client of the Hub, with the Hub's own answer."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HfHubHTTPError):
        cause = cause.__cause__
    if cause is not None:
        status = cause.response.status_code
        answer = " ".join((cause.server_message or cause.response.reason_phrase).split()).rstrip(".")
        remedy = ""
        if status in (401, 403, 404):
            remedy = "; check the name, and log in by `hf auth login` or set HF_TOKEN to a token that may write there"
        elif status == 429 or status >= 500:
            remedy = "; wait some minutes and try again"
        return f"`repo_id` '{repo_id}' is refused by the Hub ({status}: {answer}){remedy}."
    if isinstance(error, OfflineModeIsEnabled):
        return f"`repo_id` '{repo_id}' cannot be reached in offline mode; unset HF_HUB_OFFLINE to publish."
    detail = " ".join(str(error).split())[:200]
    return f"`repo_id` '{repo_id}' cannot be reached ({detail}); check the connection and try again."
