"""Names and texts from visitors: fit to be shown, and fit to name a file."""

import pytest

from anomalysd_pipeline.app.uploads import clean_text, safe_name, visible_name

RTL, ZERO_WIDTH = "\u202e", "\u200b"


class TestNames:
    def test_of_files(self):
        assert visible_name("metal nut (2).png") == "metal nut (2).png"
        assert visible_name("größe_日本.png") == "größe_日本.png"
        assert visible_name("<img src=x onerror=alert(1)>.png") == "‹img src=x onerror=alert(1)›.png"
        assert visible_name(f"photo{RTL}gnp.exe{ZERO_WIDTH}\0\x1b[31m\r\n\t.png") == "photognp.exe[31m .png"
        assert visible_name("\ud800a.png") == "a.png" and visible_name("\0") == "file"

    def test_long_ones_keep_their_end(self):
        shown = visible_name("a" * 10_000 + "z.png")
        assert len(shown) == 80 and shown.startswith("aaa") and shown.endswith("z.png") and "…" in shown

    @pytest.mark.parametrize(
        ("text", "name"),
        [
            ("hex nut", "hex_nut"),
            ("Größe 日本", "Größe_日本"),
            ("../../etc/passwd", "etc_passwd"),
            ('a\\b:c*d?e"f<g>h|i', "a_b_c_d_e_f_g_h_i"),
            ("\uff0e\uff0e\uff0fx", "x"),  # full-width "../"
            (".hidden", "hidden"),
            ("-rf", "rf"),
            ("CON", "CON_"),
            ("con.png", "con_png"),
            ("Lpt1", "Lpt1_"),
            ("", "part"),
            ("...", "part"),
            (f"{RTL}\0\n", "part"),
            ("\ud800", "part"),
        ],
    )
    def test_of_downloads(self, text, name):
        assert safe_name(text) == name

    def test_of_downloads_are_short(self):
        for letter in ("a", "日", "\ufdfa", "e\u0301"):
            name = safe_name(letter * 10_000)
            assert 1 < len(name.encode()) <= 100 and name == safe_name(name)


class TestTexts:
    def test_are_cleaned(self):
        assert clean_text("  a\tperfect \n nut\0 ", "prompt", 40) == "a perfect nut"
        assert clean_text(f"nut{RTL}{ZERO_WIDTH}", "name", 64) == "nut"
        assert clean_text(None, "name", 64) == clean_text(" \n", "name", 64) == ""

    def test_html_stays_text(self):
        # It is escaped where it is shown: a prompt may well say "< 3 mm".
        assert clean_text("< 3 mm", "prompt", 64) == "< 3 mm"

    def test_long_ones(self):
        with pytest.raises(ValueError, match="^`prompt` has 301 characters; give at most 300.$"):
            clean_text("x" * 301, "prompt", 300)

    def test_empty_ones(self):
        with pytest.raises(ValueError, match="^`name` is empty; fill it in.$"):
            clean_text(f" {ZERO_WIDTH}", "name", 64, required=True)

    @pytest.mark.parametrize("text", [1, ["a"], {"a": 1}, b"a", True])
    def test_what_is_no_text(self, text):
        with pytest.raises(ValueError, match="`name` must be a text"):
            clean_text(text, "name", 64)
