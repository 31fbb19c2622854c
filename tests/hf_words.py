"""A tokenizer of letters, one id for each, for the models of `hf_zoo`."""

from typing import Any

from hf_zoo import VOCAB
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_SPECIAL = ["<pad>", "<s>", "</s>"]
_LETTERS = "abcdefghijklmnopqrstuvwxyz .:|<>=?"
# Each turn of a talk: who speaks, what is said, and a line.
_TURNS = (
    "{% for message in messages %}{{ message['role'][0] }}:{{ message['content'] }}|{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def tokenizer(**options: Any) -> Any:
    ids = {word: i for i, word in enumerate([*_SPECIAL, *_LETTERS])}
    assert len(ids) == VOCAB
    inner = Tokenizer(models.WordLevel(ids, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    words = PreTrainedTokenizerFast(tokenizer_object=inner, **special, **options)
    words.chat_template = _TURNS
    return words
