"""Say which weights are missing where nothing can be downloaded, and how to give them from disk."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch import nn

from ..common.console import renaming


class MissingWeights(OSError):
    """Says in half a sentence which file is missing, where it was looked for, and which argument gives it.

    Args:
        argument: of `AnomalySDPipeline.from_pretrained`.
        file: with a word of what it holds.
        folder: where it would lie.
        cause: of the failed download.
    """

    def __init__(self, argument: str, file: str, folder: object, cause: object):
        reason = " ".join(str(cause).split()).rstrip(".")[:120]
        super().__init__(f"`{argument}` must give {file}, which is not in '{folder}' and cannot be fetched ({reason})")


@contextlib.contextmanager
def fetched(argument: str, file: str, folder: object) -> Iterator[None]:
    """Turns every OSError of a block that downloads into `MissingWeights`; arguments are those of that."""
    try:
        yield
    except OSError as error:  # as huggingface_hub, urllib and their kin raise it
        raise MissingWeights(argument, file, folder, error.__cause__ or error) from error


def made_networks(
    path: str, extractor: Callable[[], nn.Module] | None, perceptual: Callable[[], nn.Module] | None
) -> dict[str, nn.Module]:
    """Makes the networks that a bare inpainting checkpoint lacks; None for what it has.

    Raises:
        ValueError: naming everything that is missing in one sentence, so that nobody has to try again for each.
    """
    made, missing = {}, []
    for name, make in (("extractor", extractor), ("perceptual", perceptual)):
        if make is None:
            continue
        try:
            with renaming({"alexnet_path": "alexnet_checkpoint", "lin_path": "lpips_checkpoint"}):
                made[name] = make()
        except MissingWeights as error:
            missing.append(str(error))
    if missing:
        raise ValueError(
            f"`pretrained_model_name_or_path` '{path}' lacks networks: {'; '.join(missing)}; these are arguments of "
            "`AnomalySDPipeline.from_pretrained`."
        )
    return made
