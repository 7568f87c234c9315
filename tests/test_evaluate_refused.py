"""Evaluations that are refused: by one sentence with the option and the remedy, before anything is written."""

import pytest

from .tiny_evaluation import contents, draw_parts, refused


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return draw_parts(tmp_path_factory.mktemp("parts") / "data")


class TestRefused:
    @pytest.mark.parametrize(
        ("given", "sentence"),
        [
            ("--data DATA --categories screw", "`--categories` has 'screw', but 'DATA' has hex_nut, ring; choose"),
            ("--data TMP/none", "`--data` 'TMP/none' is no folder; give"),
            ("--synthetic ring --categories ring", "`--categories` chooses among the folders of `--data`; give both"),
            ("--synthetic spoon", "`--synthetic` has 'spoon'; choose among "),
            ("--normal_dir TMP", "`--normal_dir` needs `--category`; give the name"),
            ("--normal_dir TMP --category ring", "`--normal_dir` 'TMP' holds no pictures"),
            ("--data DATA --mask_dir TMP", "`--mask_dir` goes with `--normal_dir`; give both, or neither."),
            ("--data DATA --shots 0", "`--shots` is 0, but color_patches needs a normal picture; give 1 or more."),
            ("--data DATA --shots 9", "`--shots` is 9, but 'hex_nut' has only 3 normal training pictures; give fewer"),
            ("--data DATA --shots_file TMP/none", "`--shots_file` 'TMP/none' cannot be read as JSON"),
            ("--data DATA --shots_file TMP/none --seeds 1", "leave out `--shots` and `--seeds`."),
            ("--data DATA --fpr_limit 2", "`--fpr_limit` must lie in (0, 1], but 2.0 was given."),
            ("--data DATA --false_alarm_rate 0.9", "`--false_alarm_rate` must be above 0 and below 0.5, got 0.9."),
            ("--data DATA --adapt", "`--adapt` fine-tunes AnomalySD to each draw; leave out `--peer`"),
            ("--data DATA --peer spade --backbone vgg99", "`--backbone` must be 'embedded', 'imagenet', 'random', a"),
            ("--data DATA --out TMP/file", "`--out` 'TMP/file' is a file; give a folder."),
            ("--data DATA --out TMP/file/below", "`--out` 'TMP/file/below' could not be written"),
            ("--data DATA --out TMP", "`--out` 'TMP' holds 'report.md' of something else"),
            ("--data DATA --out TMP --overwrite", "`--out` 'TMP' holds 'report.md' of something else"),
        ],
    )
    def test_with_a_floor(self, parts, tmp_path, capfd, given, sentence):
        self.check(parts, tmp_path, capfd, ["--peer", "color_patches", *given.split()], sentence)

    @pytest.mark.parametrize(
        ("given", "sentence"),
        [
            ("--noise_strength 3", "`--noise_strength` must be a number above 0 and at most 1, got 3.0."),
            ("--num_inference_steps 1", "`--num_inference_steps` (1) times `--noise_strength` (0.4) leaves no step"),
            ("--resolution 30", "`--resolution` must be a multiple of the VAE's factor 4, got 30."),
            (
                "--adaptation TMP/none",
                "`--adaptation` must be a folder or a Hub id that can be reached, got 'TMP/none'",
            ),
            ("--adapt --shots 0 1", "`--adapt` needs normal pictures, but `--shots` has 0; give 1 or more."),
            ("--base TMP", "`--base` 'TMP' holds no model_index.json; give the folder"),
        ],
    )
    def test_with_ours(self, parts, tiny_pipeline_folder, tmp_path, capfd, given, sentence):
        self.check(parts, tmp_path, capfd, ["--base", tiny_pipeline_folder, "--data", parts, *given.split()], sentence)

    def check(self, parts, folder, capfd, given, sentence):
        (folder / "file").write_text("mine")
        (folder / "report.md").write_text("mine")
        before = contents(folder)
        words = {"DATA": str(parts), "TMP": str(folder)}
        given = ["--out", folder / "out", *(w if not isinstance(w, str) else _filled(w, words) for w in given)]
        assert _filled(sentence, words) in refused(capfd, *given)
        assert contents(folder) == before and not (folder / "out").exists()


def _filled(text, words):
    for word, value in words.items():
        text = text.replace(word, value)
    return text
