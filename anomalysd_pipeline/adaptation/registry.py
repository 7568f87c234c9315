"""Check the normal pictures and the name that an adaptation is made with."""

from __future__ import annotations

from collections.abc import Mapping

from ..data.images import load_pictures
from ..method.prompts import check_category


def check_shots(normal_images: Mapping[str, object], prompts: Mapping[str, object] | None = None) -> dict[str, list]:
    """Loads the pictures of each category, RGB.

    Args:
        normal_images: category to its pictures, anything `load_image` takes.
        prompts: category to its prompts; checked for its categories alone.

    Raises:
        ValueError: `normal_images` is no mapping or empty, a name or a picture is bad, or `prompts` has other
            categories.
    """
    if not isinstance(normal_images, Mapping) or not normal_images:
        raise ValueError(
            "`normal_images` must map at least one category to its pictures, such as {'hex nut': [...]}, got "
            f"{'an empty one' if isinstance(normal_images, Mapping) else type(normal_images).__name__}."
        )
    if prompts is not None and (not isinstance(prompts, Mapping) or not set(prompts) <= set(normal_images)):
        given = list(prompts) if isinstance(prompts, Mapping) else type(prompts).__name__
        raise ValueError(f"`prompts` must map categories of `normal_images` to their prompts, got {given}.")
    return {
        check_category(category): load_pictures(images, f"normal_images[{category!r}]")
        for category, images in normal_images.items()
    }


def default_name(shots: Mapping[str, object]) -> str:
    """Names an adaptation after its categories, in at most 64 characters."""
    names = ", ".join(shots)
    return names if len(names) <= 64 else f"{next(iter(shots))[:40]} and {len(shots) - 1} more"
