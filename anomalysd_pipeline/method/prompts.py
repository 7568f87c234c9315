"""Keep hierarchical prompts T_c of each category, and average their text embeddings.

T_c is the union of coarse prompts ("A perfect [c].") and fine ones, which describe the normal look in detail.
The denoiser is trained with one prompt drawn from T_c, and run with the average of τ(y) over T_c.
"""

from __future__ import annotations

import copy
import json
import pkgutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

PROMPT_DESIGNS = ("none", "simple", "hierarchical")
MAX_PROMPT_LENGTH = 300
MAX_PROMPTS = 1000
MAX_BOOK = 10_000
MAX_CATEGORY_LENGTH = 64
_LEVELS = ("coarse", "fine")


def check_category(category: str) -> str:
    """Returns `category` if it can serve as a category name, which also names folders and files.

    Raises:
        ValueError: if it is not a string of 1 to 64 printable characters, is blank, holds a path separator, or is
            "." or "..".
    """
    if not isinstance(category, str) or not category.strip():
        raise ValueError(f"`category` must be a non-empty name such as 'metal_nut', but {category!r} was given.")
    if len(category) > MAX_CATEGORY_LENGTH:
        raise ValueError(
            f"`category` must have at most {MAX_CATEGORY_LENGTH} characters, but a name of {len(category)} was given."
        )
    if "/" in category or "\\" in category or category in (".", "..") or not category.isprintable():
        raise ValueError(
            "`category` must be a plain name of printable characters without '/' or '\\', and not '.' or '..', "
            f"but {category!r} was given."
        )
    return category


def prompts_text() -> str:
    """Reads the text of `prompts.json`, which a wheel or a published pipeline.py ships inside the package."""
    try:
        return pkgutil.get_data(__name__.partition(".")[0], "prompts.json").decode()
    except FileNotFoundError:  # a checkout, where it lies at the root
        return Path(__file__).resolve().parents[2].joinpath("prompts.json").read_text(encoding="utf-8")


def readable_name(category: str) -> str:
    """Words a category name: "metal_plate" becomes "metal plate"."""
    return " ".join(check_category(category).replace("_", " ").split()) or category


def _check_texts(texts: str | Iterable[str], argument: str) -> list[str]:
    if isinstance(texts, str):
        texts = [texts]
    if not isinstance(texts, (list, tuple)):
        raise ValueError(f"`{argument}` must be a string or a list of strings, but {type(texts).__name__} was given.")
    if len(texts) > MAX_PROMPTS:
        raise ValueError(f"`{argument}` must hold at most {MAX_PROMPTS} prompts, but {len(texts)} were given.")
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"`{argument}` must hold non-empty strings, but {text!r} was given.")
        if len(text) > MAX_PROMPT_LENGTH:
            raise ValueError(
                f"`{argument}` must hold strings of at most {MAX_PROMPT_LENGTH} characters, but one of {len(text)} "
                "was given."
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half of a character, which a tokenizer cannot read
            raise ValueError(f"`{argument}` must hold whole characters, but {text!r} was given.") from error
    return list(texts)


def _check_prompts(prompts, argument: str) -> dict[str, list[str]]:
    if not isinstance(prompts, Mapping):
        levels = {"coarse": [], "fine": _check_texts(prompts, argument)}
    else:
        unknown = sorted(set(prompts) - set(_LEVELS), key=str)
        if unknown:
            raise ValueError(
                f"`{argument}` must have the keys 'coarse' and 'fine' only, but {unknown[0]!r} was given."
            )
        levels = {level: _check_texts(prompts.get(level, []), argument) for level in _LEVELS}
    if not levels["coarse"] + levels["fine"]:
        raise ValueError(f"`{argument}` must hold at least one prompt, but none was given.")
    return levels


class PromptBook:
    """Holds the prompts of all known categories, and a generic set for every other.

    Args:
        categories: category name to {"coarse": [...], "fine": [...]}.
        generic: the same two lists; "{name}" in them stands for the readable category name.

    Raises:
        ValueError: for names or prompts that `check_category` or `add` would refuse.
    """

    def __init__(self, categories: Mapping[str, Mapping[str, list[str]]], generic: Mapping[str, list[str]]):
        self._generic = _check_prompts(generic, "generic")
        self._categories: dict[str, dict[str, list[str]]] = {}
        for category, prompts in categories.items():
            self.add(category, prompts)

    @classmethod
    def default(cls) -> PromptBook:
        """Reads `prompts.json`: the MVTec-AD, VisA and synthetic categories, and the generic set."""
        return cls.from_dict(json.loads(prompts_text()))

    @property
    def categories(self) -> tuple[str, ...]:
        """Lists the categories with prompts of their own, in the order they were added."""
        return tuple(self._categories)

    def add(self, category: str, prompts: str | list[str] | Mapping[str, list[str]] | None = None) -> None:
        """Sets the prompts of a category, replacing those it had.

        Args:
            category: see `check_category`.
            prompts: T_c itself, nothing is added to it: a string, a list of strings, or
                {"coarse": [...], "fine": [...]} (either key may be absent). `None` keeps what the category has; a new
                one then gets the generic set, filled with its readable name.

        Raises:
            ValueError: for a bad name, no prompt at all, an unknown key, or a prompt that is blank, not a string or
                longer than 300 characters.
        """
        check_category(category)
        if prompts is None:
            prompts = self._levels(category)
        self._categories[category] = _check_prompts(prompts, "prompts")

    def prompts(self, category: str, design: str = "hierarchical") -> list[str]:
        """Gives the prompt set T_c of a category, known or not.

        Args:
            category: see `check_category`. One without prompts of its own gets the generic set.
            design: "hierarchical" gives coarse + fine prompts (the paper's choice), "simple" only "A photo of [c].",
                "none" only the empty prompt (the ablation's two other rows).

        Raises:
            ValueError: for a bad name or an unknown design.
        """
        name = readable_name(category)
        if design == "none":
            return [""]
        if design == "simple":
            return [f"A photo of {name}."]
        if design == "hierarchical":
            levels = self._levels(category)
            return levels["coarse"] + levels["fine"]
        raise ValueError(f"`design` must be one of {', '.join(PROMPT_DESIGNS)}, but {design!r} was given.")

    def to_dict(self) -> dict:
        """Gives a JSON-serializable copy, in the format of `prompts.json`."""
        return copy.deepcopy({"generic": self._generic, "categories": self._categories})

    @classmethod
    def from_dict(cls, data: Mapping) -> PromptBook:
        """Inverts `to_dict`.

        Raises:
            ValueError: if a key is missing or a name or prompt is refused.
        """
        if not (isinstance(data, Mapping) and {"generic", "categories"} <= set(data)):
            raise ValueError("`data` must be a dictionary with the keys 'generic' and 'categories'.")
        if not isinstance(data["categories"], Mapping):
            raise ValueError("`data['categories']` must be a dictionary from category names to prompts.")
        names = len(data["categories"])
        if names > MAX_BOOK:
            raise ValueError(f"`data['categories']` must have at most {MAX_BOOK} names, but {names} were given.")
        return cls(categories=data["categories"], generic=data["generic"])

    def _levels(self, category: str) -> dict[str, list[str]]:
        if category in self._categories:
            return self._categories[category]
        name = readable_name(category)
        # `replace` and not `format`: any other brace in a template is plain text.
        return {level: [text.replace("{name}", name) for text in self._generic[level]] for level in _LEVELS}


@torch.no_grad()  # the text encoder is frozen in every stage; callers reuse the result over many training steps
def encode_prompts(prompts: list[str], tokenizer, text_encoder) -> torch.Tensor:
    """Embeds each prompt as τ(y), equal to `StableDiffusionInpaintPipeline.encode_prompt`.

    Args:
        prompts: P texts; the empty string is the unconditional prompt. Tokens past the tokenizer's limit are cut.
        tokenizer: a CLIP tokenizer.
        text_encoder: a CLIP text model; the result has its device and dtype.

    Returns:
        [P, L, d], L the tokenizer's `model_max_length`, d the encoder's width; without gradient.

    Raises:
        ValueError: if `prompts` is empty or not a list of strings.
    """
    if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(text, str) for text in prompts):
        raise ValueError(f"`prompts` must be a non-empty list of strings, but {prompts!r} was given.")
    tokens = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    attention_mask = None
    if getattr(text_encoder.config, "use_attention_mask", False):
        attention_mask = tokens.attention_mask.to(text_encoder.device)
    return text_encoder(tokens.input_ids.to(text_encoder.device), attention_mask=attention_mask)[0]  # [P, L, d]


def average_embedding(prompts: list[str], tokenizer, text_encoder) -> torch.Tensor:
    """Averages τ(y) over the prompts of T_c, the condition at inference.

    Arguments and errors are those of `encode_prompts`. Returns [1, L, d].
    """
    return encode_prompts(prompts, tokenizer, text_encoder).mean(dim=0, keepdim=True)
