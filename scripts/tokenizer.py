"""A CLIP tokenizer trained on the project's own prompts: byte-level BPE, so any word a user types can be encoded."""

import json
import tempfile

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from anomalysd_pipeline.method.prompts import PromptBook

START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 77
WORD_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # CLIP's own way of splitting words


def training_sentences() -> list[str]:
    """Every prompt of prompts.json, and the generic ones for the words a part's name is likely to contain."""
    book = PromptBook.default()
    sentences = [prompt for category in book.categories for prompt in book.prompts(category)]
    words = "part surface metal plastic plate cookie aliens juice bottle toy sheet housing cover pipe cable board"
    sentences += [prompt for word in words.split() for prompt in book.prompts(word)]
    return sentences + [book.prompts(category, design="simple")[0] for category in book.categories]


def make_tokenizer(vocabulary: int = 1536) -> CLIPTokenizer:
    """Train the merges on `training_sentences` and return a CLIPTokenizer of at most `vocabulary` tokens."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern=Regex(WORD_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 258,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_sentences(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(merge) for merge in merges), START, END]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    result = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH)
    with tempfile.TemporaryDirectory() as folder:  # what a user will load is what the denoiser is trained with
        result.save_pretrained(folder)
        return CLIPTokenizer.from_pretrained(folder)
