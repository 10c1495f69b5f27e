"""Small tokenizers of the kinds that model families have, each written as a folder that transformers reads too."""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as FastTokenizer

from tests.tiny import CORPUS

TEXTS = [*CORPUS, 'the user asks\n\nand the assistant answers: {"name": "f", "arguments": {}}\n', "   \n\n\n  "] * 4


def byte_level(added: Sequence[AddedToken]) -> FastTokenizer:
    """GPT-2's kind, with the words of Llama 3 and Qwen: line breaks stay together."""
    fast = FastTokenizer(models.BPE())
    words = Regex(r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    fast.train_from_iterator(TEXTS, trainer)
    fast.post_processor = processors.ByteLevel(trim_offsets=True)
    fast.add_tokens(list(added))
    return fast


def sentencepiece_bpe(added: Sequence[AddedToken], *, control_in_vocabulary: bool = True) -> FastTokenizer:
    """Llama 2's kind: a normaliser that writes spaces as ▁, byte fallback, control tokens in the vocabulary."""
    fast = FastTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", *(token.content for token in added)] if control_in_vocabulary else ["<unk>"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=pieces, show_progress=False)
    fast.train_from_iterator(TEXTS, trainer)
    data = json.loads(fast.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in special]
    fast = FastTokenizer.from_str(json.dumps(data))
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.add_tokens(list(added))
    return fast


def unigram(added: Sequence[AddedToken]) -> FastTokenizer:
    """T5's kind: control tokens are pieces of the model, which it may write wherever their text stands."""
    letters = sorted({letter for text in TEXTS for letter in text.replace(" ", "▁")} | set("<|>/_{}\"':"))
    pieces = [("<unk>", 0.0), *((token.content, 0.0) for token in added), *((letter, -5.0) for letter in letters)]
    pieces += [(word, -6.0) for word in ("▁the", "▁user", "quick", "fox", "assistant", "end")]
    fast = FastTokenizer(models.Unigram(pieces, unk_id=0))
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    fast.decoder = decoders.Metaspace(prepend_scheme="first")
    fast.add_tokens(list(added))
    return fast


def write(folder: Path, fast: FastTokenizer, *, template: object = None, **names: str) -> Path:
    """The folder of a tokenizer; `names` are `bos_token`, `eos_token` and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    config: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
