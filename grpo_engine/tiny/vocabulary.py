"""Tokenizers of the embedded models, learned from the tiny world's own sentences.

Both are the published classes with the published pre-tokenisation; only their vocabularies are small.
Every word of the world is one token; anything else falls back to bytes, so any text can be read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from .captions import FLUFF, OPENERS, canonical, loose_rewrite, paraphrase
from .corpus import draw_scene, rng_for

CLIP_CONTEXT = 24  # longest canonical caption: 18 words and two end tokens
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
QWEN_SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
QUESTION = "does this picture show {prompt}?"
DESCRIBE = "describe"
TEMPLATE = "rewrite: {prompt}"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def sentences(seed: int, count: int = 6000) -> Iterator[str]:
    """What the models read and write, for learning the vocabularies."""
    rng = rng_for(seed, "vocabulary")
    yield from (f"{opener} a" for opener in OPENERS)
    yield from (f"a {word}" for word in FLUFF)
    for _ in range(20):
        yield "Yes No yes no user assistant system"
        yield f"{QUESTION} {DESCRIBE} {TEMPLATE}"
        yield f"user\n{DESCRIBE}\nassistant\nYes No\nassistant\na large\nuser\nrewrite: show"
    for _ in range(count):
        scene = draw_scene(rng, held_out=False)
        text, request = paraphrase(scene, rng)
        yield canonical(scene)
        yield text
        yield TEMPLATE.format(prompt=text)
        yield QUESTION.format(prompt=text)
        yield loose_rewrite(text, request, rng)


def _merges(tokenizer: Tokenizer, texts: Iterator[str], **options: Any) -> list[tuple[str, str]]:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=8000, min_frequency=2, initial_alphabet=alphabet, show_progress=False, **options
    )  # the limit is never reached: training stops when every word is one token
    tokenizer.train_from_iterator(texts, trainer)
    merges = tokenizer.model.__getstate__()
    import json

    return [tuple(pair) for pair in json.loads(merges)["merges"]]


def _vocabulary(base: list[str], merges: list[tuple[str, str]], specials: tuple[str, ...]) -> dict[str, int]:
    words = list(dict.fromkeys([*base, *("".join(pair) for pair in merges)]))
    return {word: index for index, word in enumerate([*words, *specials])}


def build_clip_tokenizer(seed: int) -> CLIPTokenizer:
    """A CLIPTokenizer of the world's words; the end token has the highest id, as argmax pooling needs."""
    learner = Tokenizer(BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = Regex(r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+""")
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    merges: Any = _merges(learner, sentences(seed), end_of_word_suffix="</w>")  # annotated list[str] there, but pairs
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = [*alphabet, *(f"{letter}</w>" for letter in alphabet)]
    vocabulary = _vocabulary(base, merges, (CLIP_START, CLIP_END))
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CLIP_CONTEXT)


def build_qwen_tokenizer(seed: int) -> Qwen2Tokenizer:
    """A Qwen2Tokenizer of the world's words with the chat and vision tokens of Qwen2-VL."""
    learner = Tokenizer(BPE())
    learner.normalizer = normalizers.NFC()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    learner.decoder = decoders.ByteLevel()
    merges: Any = _merges(learner, sentences(seed))  # as above
    base = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = _vocabulary(base, merges, QWEN_SPECIALS)
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(QWEN_SPECIALS[1:]),
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_tokenizers(folder: Path, seed: int) -> tuple[Path, Path]:
    """Build both tokenizers under ``folder`` if they are not there yet; returns their folders."""
    clip, qwen = folder / "clip_tokenizer", folder / "qwen_tokenizer"
    if not (clip / "tokenizer_config.json").exists():
        build_clip_tokenizer(seed).save_pretrained(clip)
    if not (qwen / "tokenizer_config.json").exists():
        build_qwen_tokenizer(seed).save_pretrained(qwen)
    return clip, qwen
