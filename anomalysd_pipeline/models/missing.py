"""Say which weights are missing where nothing can be downloaded, and how to give them from disk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


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
