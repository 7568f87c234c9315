import copy
import json

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from anomalysd_pipeline.method.prompts import PromptBook, average_embedding, check_category, encode_prompts

MVTEC = {
    "bottle",
    "cable",
    "capsule",
    "carpet",
    "grid",
    "hazelnut",
    "leather",
    "metal_nut",
    "pill",
    "screw",
    "tile",
    "toothbrush",
    "transistor",
    "wood",
    "zipper",
}
VISA = {
    "candle",
    "capsules",
    "cashew",
    "chewinggum",
    "fryum",
    "macaroni1",
    "macaroni2",
    "pcb1",
    "pcb2",
    "pcb3",
    "pcb4",
    "pipe_fryum",
}


@pytest.fixture(scope="module")
def clip():
    """A real tokenizer that spells words out in letters, and a real text encoder of 16 channels."""
    letters = "abcdefghijklmnopqrstuvwxyz.,"
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return tokenizer, CLIPTextModel(config).eval()


@pytest.fixture
def book():
    return PromptBook.default()


class TestDefaultBook:
    def test_holds_every_benchmark_category(self, book):
        assert set(book.categories) >= MVTEC | VISA

    def test_each_category_has_one_coarse_and_several_fine_prompts(self, book):
        for category, levels in book.to_dict()["categories"].items():
            assert len(levels["coarse"]) == 1, category
            assert levels["coarse"][0].startswith(("A perfect ", "Perfect ")), category
            assert len(levels["fine"]) >= 3, category
            texts = levels["coarse"] + levels["fine"]
            assert len(set(texts)) == len(texts), category
            # A word is one or two CLIP tokens, so 30 words and the punctuation stay below 60 tokens.
            assert all(len(text.split()) <= 30 and "{" not in text for text in texts), category

    def test_uses_natural_words_and_the_papers_example(self, book):
        assert book.prompts("metal_nut")[0] == "A perfect metal nut."
        assert book.prompts("pcb3")[0] == "A perfect printed circuit board."
        assert "A toothbrush with intact structure and neatly arranged bristles." in book.prompts("toothbrush")


class TestPrompts:
    def test_unknown_category_gets_the_generic_set_with_readable_words(self, book):
        prompts = book.prompts("metal_plate")
        assert prompts[0] == "A perfect metal plate."
        assert len(prompts) >= 4
        assert all("metal plate" in text and "{" not in text for text in prompts)
        assert "metal_plate" not in book.categories

    def test_designs_of_the_ablation(self, book):
        assert book.prompts("metal_nut", design="none") == [""]
        assert book.prompts("metal_nut", design="simple") == ["A photo of metal nut."]
        levels = book.to_dict()["categories"]["metal_nut"]
        assert book.prompts("metal_nut", design="hierarchical") == levels["coarse"] + levels["fine"]

    def test_unknown_design_is_refused(self, book):
        with pytest.raises(ValueError, match="`design` must be one of none, simple, hierarchical"):
            book.prompts("bottle", design="fancy")

    def test_result_is_a_copy(self, book):
        book.prompts("bottle").append("A broken bottle.")
        assert "A broken bottle." not in book.prompts("bottle")


class TestAdd:
    def test_texts_become_the_whole_prompt_set(self, book):
        book.add("bottle", "A green bottle.")
        assert book.prompts("bottle") == ["A green bottle."]
        book.add("bottle", ["A green bottle.", "A {name} in braces."])
        assert book.prompts("bottle") == ["A green bottle.", "A {name} in braces."]
        book.add("lid", {"fine": ["A flat lid."], "coarse": ["A perfect lid."]})
        assert book.prompts("lid") == ["A perfect lid.", "A flat lid."]

    def test_none_keeps_the_prompts_or_takes_the_generic_set(self, book):
        book.add("bottle", "A green bottle.")
        book.add("bottle", None)
        assert book.prompts("bottle") == ["A green bottle."]
        expected = book.prompts("metal_plate")
        book.add("metal_plate")
        assert "metal_plate" in book.categories
        assert book.prompts("metal_plate") == expected

    def test_longest_allowed_prompt(self, book):
        book.add("lid", "x" * 300)
        assert book.prompts("lid") == ["x" * 300]

    @pytest.mark.parametrize(
        "prompts", ["", "  ", [], ["fine", ""], ["fine", 3], "x" * 301, 7, {}, {"coarse": []}, {"medium": ["A lid."]}]
    )
    def test_bad_prompts_are_refused_and_change_nothing(self, book, prompts):
        before = book.to_dict()
        with pytest.raises(ValueError, match="`prompts` must"):
            book.add("bottle", prompts)
        assert book.to_dict() == before


class TestCheckCategory:
    @pytest.mark.parametrize("name", ["metal_nut", "M6 bolt", "Schräubchen", "a.b", "...", "x" * 64])
    def test_accepts_plain_names(self, name):
        assert check_category(name) == name

    @pytest.mark.parametrize("name", ["", "  ", ".", "..", "a/b", "a\\b", "a\0b", "a\nb", "x" * 65, None, 3])
    def test_refuses_names_that_are_no_file_names(self, book, name):
        with pytest.raises(ValueError, match="`category` must"):
            check_category(name)
        with pytest.raises(ValueError, match="`category` must"):
            book.add(name, "A part.")
        with pytest.raises(ValueError, match="`category` must"):
            book.prompts(name)


class TestDict:
    def test_survives_json(self, book):
        book.add("größe_2", ["An even part."])
        restored = PromptBook.from_dict(json.loads(json.dumps(book.to_dict())))
        assert restored.to_dict() == book.to_dict()
        assert restored.prompts("größe_2") == ["An even part."]
        assert restored.prompts("never seen") == book.prompts("never seen")

    def test_shares_nothing_with_the_book(self, book):
        data = book.to_dict()
        before = copy.deepcopy(data)
        data["categories"]["bottle"]["fine"].clear()
        data["generic"]["coarse"].clear()
        assert book.to_dict() == before

    @pytest.mark.parametrize(
        "data",
        [
            {},
            None,
            {"categories": {}},
            {"generic": {"fine": ["A part."]}, "categories": ["bottle"]},
            {"generic": {}, "categories": {}},
            {"generic": {"fine": ["A part."]}, "categories": {"../up": {"fine": ["A part."]}}},
        ],
    )
    def test_malformed_data_is_refused(self, data):
        with pytest.raises(ValueError, match="`.+` must"):
            PromptBook.from_dict(data)


class TestEmbeddings:
    prompts = ("a perfect lid.", "", "a lid with an even edge, a clean face and a round outline, " * 4)

    def test_equals_the_inpainting_pipelines_own(self, clip):
        from diffusers import StableDiffusionInpaintPipeline

        tokenizer, text_encoder = clip
        pipe = StableDiffusionInpaintPipeline.__new__(StableDiffusionInpaintPipeline)
        pipe.tokenizer, pipe.text_encoder = tokenizer, text_encoder
        with torch.no_grad():
            expected, _ = pipe.encode_prompt(list(self.prompts), torch.device("cpu"), 1, False)
        embeds = encode_prompts(list(self.prompts), tokenizer, text_encoder)
        assert embeds.shape == (3, 77, 16)
        assert torch.equal(embeds, expected)
        assert not embeds.requires_grad

    def test_attention_mask_only_where_the_encoder_asks_for_one(self, clip):
        tokenizer, text_encoder = clip
        masked = copy.deepcopy(text_encoder)
        masked.config.use_attention_mask = True
        tokens = tokenizer(["a lid."], padding="max_length", max_length=77, return_tensors="pt")
        with torch.no_grad():
            expected = masked(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        assert torch.equal(encode_prompts(["a lid."], tokenizer, masked), expected)
        assert not torch.equal(encode_prompts(["a lid."], tokenizer, text_encoder), expected)

    def test_average_is_over_prompts(self, clip):
        each = [encode_prompts([text], *clip) for text in self.prompts]
        average = average_embedding(list(self.prompts), *clip)
        assert average.shape == (1, 77, 16)
        torch.testing.assert_close(average, sum(each) / 3)

    @pytest.mark.parametrize("prompts", [[], "a lid", None, ["a lid", 3]])
    def test_bad_prompts_are_refused(self, clip, prompts):
        with pytest.raises(ValueError, match="`prompts` must be a non-empty list of strings"):
            encode_prompts(prompts, *clip)
