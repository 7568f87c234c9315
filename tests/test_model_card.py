"""Model cards: the Hub's metadata, what is said of the parts, and text of people's own that must not break either."""

import ast
import re

import pytest
from huggingface_hub import ModelCard

from anomalysd_pipeline import EMBEDDED
from anomalysd_pipeline.hub.bundle import bundle_source
from anomalysd_pipeline.hub.carried import strip_margin
from anomalysd_pipeline.hub.model_card import model_card, template_text

SD = "stable-diffusion-v1-5/stable-diffusion-inpainting"
CALIBRATION = {"threshold": 0.123456, "false_alarm_rate": 0.05, "pictures": 4, "held_out": True, "settings": {}}
LEVELS = {"coarse": ["A perfect nut."], "fine": ["A nut with six sides."]}


def pipeline_facts(categories=None, **given) -> dict:
    """What model_index.json holds, as far as a card reads it."""
    categories = {"hex nut": {"shots": 4, "calibration": CALIBRATION}} if categories is None else categories
    return {
        "categories": categories,
        "prompts": {"generic": {}, "categories": dict.fromkeys(categories, LEVELS)},
        "default_preset": "fast",
        "preset_overrides": {"fast": {"num_inference_steps": 7}},
        "noise_strength": 0.45,
        "prototype_weight": 0.1,
        "feature_weight": 1.0,
        "resolution": 256,
        "rotations": 4,
        **given,
    }


def adaptation_facts(**given) -> dict:
    """What adaptation.json holds."""
    return {
        "name": "nuts",
        "base_model": SD,
        "record": {"settings": {"method": "lora", "steps": 77, "rank": 16, "seed": 3}},
        "categories": {"hex nut": {"shots": 4, "noise_strength": 0.3, "calibration": None}},
        "prompts": {"hex nut": LEVELS},
        **given,
    }


def code_blocks(card: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", card, flags=re.MULTILINE | re.DOTALL)


def section(card: str, title: str) -> str:
    return card.split(f"## {title}\n")[1].split("\n## ")[0]


class TestMetadata:
    def test_of_a_pipeline(self):
        data = ModelCard(model_card(pipeline_facts(_name_or_path=SD), "pipeline", "user/nuts")).data
        assert data.library_name == "diffusers"
        assert data.pipeline_tag == "image-segmentation"
        assert data.base_model == SD
        assert data.license == "creativeml-openrail-m"
        assert "anomaly-detection" in data.tags

    def test_of_an_adaptation(self):
        data = ModelCard(model_card(adaptation_facts(), "adaptation", "user/nuts")).data
        assert data.base_model == SD and data.to_dict()["base_model_relation"] == "adapter"
        assert "lora" in data.tags

    @pytest.mark.parametrize(
        ("name", "license", "base"),
        [
            (EMBEDDED, "apache-2.0", None),
            ("/home/me/models/secret", "other", None),
            ("some/base", "other", "some/base"),
        ],
    )
    def test_license_and_base_follow_where_it_came_from(self, name, license, base):
        card = model_card(pipeline_facts(_name_or_path=name), "pipeline")
        assert ModelCard(card).data.license == license
        assert ModelCard(card).data.base_model == base
        assert "secret" not in card and EMBEDDED not in card

    def test_a_folder_is_no_hub_id(self, tmp_path, monkeypatch):
        (tmp_path / "models" / "mine").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        assert ModelCard(model_card(pipeline_facts(_name_or_path="models/mine"), "pipeline")).data.base_model is None

    def test_license_can_be_given(self):
        assert ModelCard(model_card(pipeline_facts(), "pipeline", license="mit")).data.license == "mit"

    def test_figures(self):
        figures = [
            {
                "dataset": "metal plate",
                "metric": "image AUROC",
                "value": 0.98,
                "std": 0.01,
                "shots": 4,
                "seeds": [0, 1],
            },
            {"category": "hex nut", "metric": "pixel AUROC", "value": 0.9},
        ]
        card = model_card(pipeline_facts(), "pipeline", "user/nuts", figures)
        results = ModelCard(card).data.eval_results
        assert [(r.dataset_name, r.metric_type, r.metric_name, r.metric_value) for r in results] == [
            ("metal plate", "roc_auc", "image AUROC", 0.98),
            ("hex nut", "roc_auc", "pixel AUROC", 0.9),
        ]
        assert "| metal plate |  | image AUROC | 0.980 ± 0.010 | 4 | 0, 1 |" in section(card, "Measured")

    @pytest.mark.parametrize(
        "figure",
        [
            {"metric": "image AUROC", "value": 0.9},
            {"dataset": "d", "metric": "image AUROC", "value": float("nan")},
            {"dataset": "d", "metric": "image AUROC", "value": "0.9"},
            {"dataset": "d", "value": 0.9},
            {"dataset": "d", "metric": "image AUROC", "value": 0.9, "vlaue": 1},
            ["image AUROC", 0.9],
        ],
    )
    def test_bad_figures(self, figure):
        with pytest.raises(ValueError, match="`figures`"):
            model_card(pipeline_facts(), "pipeline", figures=[figure])


class TestText:
    def test_parts_with_shots_and_thresholds(self):
        categories = {
            "hex nut": {"shots": 4, "calibration": CALIBRATION, "noise_strength": 0.2},
            "washer": {"shots": 1, "calibration": None},
        }
        card = model_card(pipeline_facts(categories), "pipeline")
        parts = section(card, "Parts it knows")
        assert "| hex nut | 4 | 0.1235 | 5 % | 4 normal pictures, each scored without itself |" in parts
        assert "| washer | 1 | not calibrated |  |  |" in parts
        assert "- **hex nut**: A perfect nut. · A nut with six sides." in parts
        assert "| `noise_strength` of hex nut | 0.2 |" in section(card, "Settings")

    def test_settings_are_those_an_inspection_uses(self):
        settings = section(model_card(pipeline_facts(), "pipeline"), "Settings")
        for row in ("| `preset` | fast |", "| `num_inference_steps` | 7 |", "| `noise_strength` | 0.45 |"):
            assert row in settings

    def test_settings_of_an_adaptation(self):
        card = model_card(adaptation_facts(), "adaptation")
        assert "| adaptation nuts | method lora, steps 77, rank 16, seed 3 |" in section(card, "Settings")

    def test_without_figures_it_says_so(self):
        assert section(model_card(pipeline_facts(), "pipeline"), "Measured").strip() == (
            "Nothing was measured for this checkpoint."
        )

    def test_without_parts(self):
        card = model_card(pipeline_facts({}), "pipeline")
        assert "None yet" in section(card, "Parts it knows")
        assert "no verdict" in section(card, "Limits")

    def test_limits_follow_the_base(self):
        small = section(model_card(pipeline_facts(_name_or_path=EMBEDDED), "pipeline"), "Limits")
        assert "small model" in small
        assert "small model" not in section(model_card(pipeline_facts(_name_or_path=SD), "pipeline"), "Limits")

    def test_a_published_pipeline_carries_the_template(self):
        namespace = {"__file__": "pipeline.py"}
        exec(bundle_source(), namespace)
        assert strip_margin(namespace["_FILES"]["anomalysd_pipeline/hub/template.md"]) == template_text()

    def test_unknown_kind(self):
        with pytest.raises(ValueError, match="`kind`"):
            model_card(pipeline_facts(), "dataset")


class TestLoadingCode:
    def test_of_a_pipeline_both_ways(self):
        package, without = code_blocks(model_card(pipeline_facts(), "pipeline", "user/nuts"))
        assert 'AnomalySDPipeline.from_pretrained("user/nuts")' in package
        assert 'source = "user/nuts"' in without and "custom_pipeline=source, trust_remote_code=True" in without
        for block in (package, without):
            ast.parse(block)

    @pytest.mark.parametrize(
        ("base", "argument"), [(SD, f'"{SD}"'), ("embedded", ""), ("my-folder", '"path/to/the/base"')]
    )
    def test_of_an_adaptation(self, base, argument):
        (block,) = code_blocks(model_card(adaptation_facts(base_model=base), "adaptation", "user/nuts"))
        assert f"AnomalySDPipeline.from_pretrained({argument})\n" in block
        assert 'pipe.load_adaptation("user/nuts")' in block
        ast.parse(block)


class TestPeoplesOwnText:
    """Names and prompts that would mean something to YAML, Markdown, HTML or Python."""

    NAMES = [
        "<img src=x onerror=alert(1)>",
        "a | b",
        "``` \"'",
        "--- !!python",
        "[x](javascript:alert(1))",
        "*nut* _nut_ $x$",
        "{{ name }}",
        "&lt;b&gt;",
        "漢字: #1",
    ]

    @pytest.fixture
    def card(self):
        facts = pipeline_facts({name: {"shots": 1, "calibration": CALIBRATION} for name in self.NAMES})
        prompt = "A\n\n# heading\n<script>alert(1)</script> ---\n```"
        facts["prompts"]["categories"] = {name: {"coarse": [prompt], "fine": []} for name in self.NAMES}
        figures = [{"dataset": name, "category": name, "metric": name, "value": 0.5} for name in self.NAMES]
        return model_card(facts, "pipeline", "user/nuts", figures)

    def test_metadata_is_read_back_as_written(self, card):
        results = ModelCard(card).data.eval_results
        assert [result.dataset_name for result in results] == [f"{name}, {name}" for name in self.NAMES]

    def test_every_row_has_its_cells(self, card):
        for title, cells in (("Parts it knows", 5), ("Measured", 6)):
            rows = [line for line in section(card, title).splitlines() if line.startswith("|")]
            assert len(rows) == 2 + len(self.NAMES)
            assert {len(re.findall(r"(?<!\\)\|", row)) - 1 for row in rows} == {cells}

    def test_rendered_as_plain_text(self, card):
        markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
        html = markdown.render(card.split("\n---\n", 1)[1])
        for tag in ("<script", "<img", "<em>nut", 'href="javascript', "<h1>heading"):
            assert tag not in html
        assert html.count("<h1>") == 1 and html.count("<h2>") == 5 and html.count("<pre>") == 2
        for shown in ("&lt;img src=x onerror=alert(1)&gt;", "&amp;lt;b&amp;gt;", "[x](javascript:alert(1))"):
            assert shown in html

    def test_code_is_still_python(self, card):
        blocks = code_blocks(card)
        assert len(blocks) == 2
        for block in blocks:
            strings = {node.value for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Constant)}
            assert min(self.NAMES) in strings
