"""What is wrong with a field, said beside it in the words of the page until the field is changed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import gradio as gr

from ..app import views
from .uploads import Missing

LABELS = {
    "adaptation": "The file",
    "bit_depth": "“Bits of 16-bit gray”",
    "coarse": "“In short”",
    "files": "The files",
    "fine": "“In detail”",
    "length": "The length",
    "name": "The name",
    "part": "The part",
    "picture": "The picture",
    "pictures": "The pictures",
    "preset": "The thoroughness",
    "publication": "The adaptation",
    "region": "The region",
    "repository": "The repository",
    "false_alarm_rate": "The rate of false alarms",
}
"""Maps arguments of the functions for programs to the words of the page."""

MISSING = {
    "adaptation": "Choose a file to load.",
    "files": "Add at least one picture, or a zip of pictures.",
    "name": "Give the part a name.",
    "picture": "Add a picture to inspect.",
    "pictures": "Add at least one picture of a good part.",
    "repository": "Name the repository.",
}
_ARGUMENT = re.compile(r"`(\w+)`")


class FieldError(ValueError):
    """Repeats an error whose sentence does not begin with the argument that it is about.

    Args:
        field: the argument.
        sentence: the error.
    """

    def __init__(self, field: str, sentence: str):
        super().__init__(sentence)
        self.field = field


@contextmanager
def about(field: str) -> Iterator[None]:
    """Says of errors in this block which argument they are about."""
    try:
        yield
    except ValueError as error:
        if field_of(error) is None:
            raise FieldError(field, str(error)) from error
        raise


def field_of(error: ValueError) -> str | None:
    """Returns the argument that an error is about; None where it is about none of the page's fields."""
    named = _ARGUMENT.match(str(error))
    field = getattr(error, "field", named[1] if named else None)
    return field if field in LABELS else None


def words(error: ValueError) -> str:
    """Puts an error in the words of the page."""
    field = field_of(error)
    if isinstance(error, Missing) and field in MISSING:
        return MISSING[field]
    return _ARGUMENT.sub(lambda found: LABELS.get(found[1], found[0]), str(error))


class Faults:
    """Keeps the places beside a tab's fields where errors are said."""

    def __init__(self):
        self._places: dict[str, gr.HTML] = {}

    @property
    def outputs(self) -> list[gr.HTML]:
        """The components that `said` and `none` change."""
        return list(self._places.values())

    def beside(self, field: str, component: gr.components.Component) -> None:
        """Makes the place for errors of a field here, emptied whenever the field is changed."""
        self._places[field] = place = gr.HTML("", elem_classes="fault-place", elem_id=f"{component.elem_id}-fault")
        if hasattr(component, "change"):
            component.change(None, None, place, js="() => ''")

    def place(self, field: str) -> gr.HTML:
        """Returns the place for errors of a field."""
        return self._places[field]

    def none(self) -> dict:
        """Empties all places."""
        return dict.fromkeys(self.outputs, "")

    def said(self, error: ValueError) -> dict:
        """Says an error at its field, and nothing at the others.

        Raises:
            ValueError: the error itself, where none of the fields is its own.
        """
        place = self._places.get(field_of(error))
        if place is None:
            raise error
        return {**self.none(), place: views.fault(words(error))}
