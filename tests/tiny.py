"""A tiny random Llama with a real byte-level BPE tokenizer and chat template, built on the spot as a prepared base.

Small enough that a training step takes milliseconds; the architecture is SmolLM2's and TinyLlama's.
"""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from shared.bases.base_model import prepare_base
from shared.bases.catalogue import Base, Catalogue
from shared.storage.artifacts import LocalArtifactStore
from shared.storage.manifests import Manifest

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "### Instruction:\nWhat does json.dumps do in Python?\n\n### Response:\nSerialize obj to a JSON formatted str.",
    "### Input:\nThe quick brown fox jumps over the lazy dog. 0123456789 äöü 你好 🎉 def f(x): return x + 1",
]


def write_tiny_model(folder: Path, *, seed: int = 0, hidden: int = 32, layers: int = 2, positions: int = 512) -> Path:
    """A transformers folder: random fp32 Llama (vocabulary about 400) and its tokenizer; pad = eos.

    Args:
        positions: the longest sequence, in tokens. Offered tools want some thousands: with this vocabulary a token is
            hardly more than a byte.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<|im_start|>",
                "eos_token": "<|im_end|>",
                "pad_token": "<|im_end|>",
            }
        )
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=hidden,
        intermediate_size=hidden * 2,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def tiny_catalogue(folder: Path) -> Catalogue:
    """A catalogue of one base, `tiny`, whose source is the transformers folder given."""
    return Catalogue((Base(id="tiny", source=f"folder:{folder.absolute()}", aliases=("test/tiny-llama",)),))


def write_catalogue(path: Path, model: Path) -> Path:
    """The same catalogue as a TOML file, for processes."""
    path.write_text(f'[[base]]\nid = "tiny"\naliases = ["test/tiny-llama"]\nsource = "folder:{model.absolute()}"\n')
    return path


def prepared_tiny(root: Path, *, positions: int = 512) -> tuple[LocalArtifactStore, Base, Manifest]:
    """An artifact store under `root` with the tiny base prepared in it, made for sequences of so many positions."""
    store = LocalArtifactStore(root / "artifacts")
    base = tiny_catalogue(write_tiny_model(root / "tiny-model", positions=positions)).get("tiny")
    return store, base, prepare_base(base, store)
