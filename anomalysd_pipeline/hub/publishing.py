"""From a pipeline or an adaptation to a folder that others can load, and from there to the Hub."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from ..common.files import disk_errors, written_whole
from .bundle import bundle_source, component_source
from .model_card import PLACEHOLDER, hub_id, model_card

INDEX, FACTS, CARD, CODE = "model_index.json", "adaptation.json", "README.md", "pipeline.py"
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
"""Suffixes of files that can run code when they are loaded."""

_HIDDEN = [".*", "*/.*"]
_REASONS = {
    401: "asks for a login: run `hf auth login`, or set HF_TOKEN to a token with write access",
    403: "refuses this login: use a token with write access to it, or a name of your own",
    404: "is not there and cannot be made: check the spelling of user and name",
    429: "gets too many requests: wait some minutes and try again",
}


def export(
    pipe,
    folder: str | os.PathLike,
    adaptation: str | None = None,
    figures: Sequence[Mapping] | None = None,
    repo_id: str | None = None,
    license: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a folder that can be published as it is: weights as safetensors, `README.md`, and for a whole pipeline
    the code that loads it without this package.

    The folder appears when all of it is on disk; on an error nothing is left behind.

    Args:
        pipe: an `AnomalySDPipeline`.
        folder: a new or empty folder.
        adaptation: name of the adaptation to write without its base; None: the whole pipeline.
        figures, repo_id, license: for the card, see `model_card`.
        overwrite: whether an earlier export in `folder` may be replaced.

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
        _complete(partial, repo_id, figures, license)
    return folder


def push(
    folder: str | os.PathLike,
    repo_id: str,
    private: bool | None = None,
    create_pr: bool = False,
    token: str | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
) -> str:
    """Uploads a saved pipeline or adaptation to the Hub.

    A folder that `export` has not made gets what it lacks: `README.md`, and for a pipeline the code that loads it
    without this package; paths of this machine are taken out of its configurations. Hidden files stay behind.

    Args:
        folder: written by `export`, `pipe.save_pretrained` or `pipe.save_adaptation`.
        repo_id: "user/name"; made if missing.
        private: whether a new repository is private; None: the user's or the organization's default.
        create_pr: open a pull request instead of writing to the main branch.
        token: of the Hub; None: HF_TOKEN or that of `hf auth login`. It is never printed.
        commit_message: None: one that names the package.
        revision: branch; None: main.

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
    with disk_errors("folder", folder):
        _complete(folder, repo_id)
    message = commit_message or f"Upload an AnomalySD {kind} with anomalysd-pipeline"
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            folder_path=folder,
            repo_id=repo_id,
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
            ignore_patterns=list(_HIDDEN),
        )
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
) -> str:
    """`export` to a temporary folder, and `push`; arguments, URL and errors are theirs."""
    check_repo_id(repo_id)
    with tempfile.TemporaryDirectory(prefix="anomalysd-") as parent:
        folder = export(pipe, Path(parent, "export"), adaptation, figures, repo_id, license)
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
    """What a folder holds, "pipeline" or "adaptation"."""
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
    try:
        facts = json.loads((folder / indices[0]).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"`folder` '{folder}' holds a damaged {indices[0]} ({error}); save it again.") from error
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


def _complete(
    folder: Path,
    repo_id: str | None,
    figures: Sequence[Mapping] | None = None,
    license: str | None = None,
) -> None:
    """Adds what a checkpoint lacks to be published, and takes paths of this machine out of it."""
    kind = "pipeline" if (folder / INDEX).is_file() else "adaptation"
    facts = json.loads((folder / (INDEX if kind == "pipeline" else FACTS)).read_text(encoding="utf-8"))
    card = folder / CARD
    if not card.exists():
        _write(card, model_card(facts, kind, repo_id, figures, license=license))
    elif repo_id is not None and PLACEHOLDER in (text := card.read_text(encoding="utf-8")):
        _write(card, text.replace(PLACEHOLDER, repo_id))
    if kind == "adaptation":
        return
    if not (folder / CODE).exists():
        _write(folder / CODE, bundle_source())
    for name, entry in facts.items():
        # diffusers looks for a component's code on the Hub under this name.
        source = component_source(str(entry[0]), str(entry[-1])) if isinstance(entry, list) else None
        if source and not (code := folder / name / f"{entry[0]}.py").exists():
            _write(code, source)
    for path in [folder / INDEX, *folder.glob("*/config.json"), *folder.glob("*/*_config.json")]:
        config = json.loads(path.read_text(encoding="utf-8"))
        paths = [key for key in ("_name_or_path", "name_or_path") if key in config and hub_id(config[key]) is None]
        if paths:
            kept = {key: value for key, value in config.items() if key not in paths}
            _write(path, json.dumps(kept, indent=2, ensure_ascii=False) + "\n")


def _write(path: Path, text: str) -> None:
    """Complete or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8", newline="\n")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _explain(error: BaseException, repo_id: str) -> str:
    """One sentence for what a client of the Hub raises."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HfHubHTTPError):
        cause = cause.__cause__
    if cause is not None:
        status = cause.response.status_code
        said = f" ({' '.join(cause.server_message.split()).rstrip('.')})" if cause.server_message else ""
        later = "; try again later" if status >= 500 else ""
        reason = _REASONS.get(status, f"cannot be written: the Hub answered with status {status}{later}")
        return f"`repo_id` '{repo_id}' {reason}{said}."
    if isinstance(error, OfflineModeIsEnabled):
        return f"`repo_id` '{repo_id}' cannot be reached in offline mode; unset HF_HUB_OFFLINE to publish."
    detail = " ".join(str(error).split())[:200]
    return f"`repo_id` '{repo_id}' cannot be reached ({detail}); check the connection and try again."
