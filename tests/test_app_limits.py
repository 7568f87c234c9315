"""The bounds of the app and the environment variables that change them."""

import pytest

from anomalysd_pipeline.app.limits import Limits
from anomalysd_pipeline.data.images import MAX_PIXELS
from anomalysd_pipeline.method.prompts import MAX_CATEGORY_LENGTH, MAX_PROMPT_LENGTH, check_category


class TestDefaults:
    def test_agree_with_what_the_package_allows(self):
        limits = Limits()
        assert limits.pixels == MAX_PIXELS and limits.prompt_length == MAX_PROMPT_LENGTH
        assert check_category("x" * limits.name_length) and limits.name_length == MAX_CATEGORY_LENGTH

    def test_an_empty_environment_changes_nothing(self):
        assert Limits.from_environment({"PATH": "/bin", "ANOMALYSD_MODEL": "x"}) == Limits()

    def test_cannot_be_changed_later(self):
        with pytest.raises(AttributeError):
            Limits().parts = 9


class TestEnvironment:
    def test_each_bound_has_a_variable(self):
        given = {"ANOMALYSD_MAX_SESSIONS": " 3 ", "ANOMALYSD_MAX_UPLOAD_BYTES": "1000", "ANOMALYSD_MAX_PARTS": "2"}
        limits = Limits.from_environment(given)
        assert (limits.sessions, limits.upload_bytes, limits.parts) == (3, 1000, 2)
        assert limits.pictures == Limits().pictures

    @pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "1e9", "many", "1_000", "٣", "9" * 400, "20mb", "None"])
    def test_nonsense_is_named_by_its_variable(self, text):
        with pytest.raises(ValueError, match=r"^`ANOMALYSD_MAX_SESSIONS` must be a whole number") as error:
            Limits.from_environment({"ANOMALYSD_MAX_SESSIONS": text})
        assert len(str(error.value)) < 200

    def test_a_bound_above_the_packages_own(self):
        with pytest.raises(ValueError, match=r"`ANOMALYSD_MAX_PIXELS` .* from 1 to 100000000, got 100000001"):
            Limits.from_environment({"ANOMALYSD_MAX_PIXELS": "100000001"})

    def test_a_misspelled_variable(self):
        with pytest.raises(ValueError, match=r"`ANOMALYSD_MAX_SESSION` is no bound.*ANOMALYSD_MAX_SESSIONS"):
            Limits.from_environment({"ANOMALYSD_MAX_SESSION": "3"})


@pytest.mark.parametrize("value", [0, -1, 2.0, "3", None, True])
def test_a_bound_is_a_whole_number(value):
    with pytest.raises(ValueError, match="`parts` must be a whole number"):
        Limits(parts=value)
