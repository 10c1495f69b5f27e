"""The tiny tokenizer, which like Llama's writes BOS when special tokens are added."""

import json
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.processors import TemplateProcessing

from tests.tiny import write_tiny_model


def write_bos_tokenizer(root: Path) -> Path:
    """The folder of a model with that tokenizer, and with two ids that end generation."""
    folder = write_tiny_model(root / "model")
    path = str(folder / "tokenizer.json")
    fast = FastTokenizer.from_file(path)
    fast.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", fast.token_to_id("<|im_start|>"))]
    )
    fast.save(path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    return folder
