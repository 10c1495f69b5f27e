"""How much memory training takes: the shares of it that both the estimate and the trainer reckon with.

The estimate computes all of it from shapes, before any model is loaded; the trainer measures what its forward pass
saves and adds the rest from here. Counts a CPU: the process itself, the frozen base, LoRA with its optimizer state, the
activations that one micro-batch saves for its backward pass, and working space. Knows no job, no HTTP and no torch.
"""

from dataclasses import dataclass
from typing import Any

from shared.jobs.spec import BasePrecision, LoraSpec

# A worker without any model: what it imports (550), and what its libraries keep once they have worked; measured.
PROCESS_MB = 850.0
# What the C library takes for what is saved: freed blocks between living ones; measured from 1.2 to 1.5.
FRAGMENTATION = 1.35
# Rows of logits made at a time: at a vocabulary of 49,152 they take 25 MB, which malloc keeps for the next ones.
LOSS_ROWS = 128
# Copies of them that live at once, in fp32: logits, their logarithms and their gradient.
LOGITS_COPIES = 3
# A gradient and Adam's two moments of a trained weight, all fp32.
OPTIMIZER_BYTES = 12
_WEIGHT_BYTES: dict[BasePrecision, float] = {"int8": 1, "nf4": 0.52, "bf16": 2, "fp16": 2, "fp32": 4}
# What bitsandbytes does not hold (embeddings, output head) is fp32 beside it.
_OTHER_BYTES: dict[BasePrecision, float] = {"int8": 4, "nf4": 4, "bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A Llama's sizes; `query` and `key_value` are the widths of all heads together."""

    layers: int
    hidden: int
    intermediate: int
    query: int
    key_value: int
    vocabulary: int
    tied: bool

    def inputs_and_outputs(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of each linear layer of a block, by name."""
        hidden, wide = self.hidden, self.intermediate
        return {
            "q_proj": (hidden, self.query),
            "k_proj": (hidden, self.key_value),
            "v_proj": (hidden, self.key_value),
            "o_proj": (self.query, hidden),
            "gate_proj": (hidden, wide),
            "up_proj": (hidden, wide),
            "down_proj": (wide, hidden),
        }


def model_shape(config: dict[str, Any]) -> ModelShape | None:
    """The shape in a transformers `config.json`; None for anything but a Llama, whose memory is not known.

    Raises:
        KeyError: the configuration is incomplete.
    """
    if config.get("model_type") != "llama":
        return None
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or config["hidden_size"] // heads
    return ModelShape(
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        query=heads * head,
        key_value=(config.get("num_key_value_heads") or heads) * head,
        vocabulary=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings")),
    )


def peak_memory_mb(shape: ModelShape, precision: BasePrecision, lora: LoraSpec, tokens: int) -> float:
    """Peak resident memory of a training worker on a CPU, in MB of 10^6 bytes.

    Args:
        tokens: of the largest micro-batch; memory grows linearly with it.
    """
    linears = shape.layers * sum(inputs * outputs for inputs, outputs in shape.inputs_and_outputs().values())
    others = shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    base = linears * _WEIGHT_BYTES[precision] + others * _OTHER_BYTES[precision]
    trained = shape.layers * lora.r * sum(inputs + outputs for inputs, outputs in _adapted(shape, lora).values())
    work = logits_bytes(shape.vocabulary, LOSS_ROWS) + 4 * _dequantised(shape, precision)
    saved = FRAGMENTATION * tokens * shape.layers * saved_activation_bytes(shape, lora)
    return PROCESS_MB + (base + (4 + OPTIMIZER_BYTES) * trained + work + saved) / 1e6


def logits_bytes(vocabulary: int, rows: float) -> float:
    """Bytes that the loss of `rows` supervised tokens takes while it is computed, its gradient included."""
    return 4 * LOGITS_COPIES * vocabulary * rows


def saved_activation_bytes(shape: ModelShape, lora: LoraSpec) -> int:
    """Bytes that one token leaves in one layer for the backward pass.

    Two residual streams, queries, keys, values and attention's output, gate and up; and the inputs of those products
    that have LoRA (o_proj's is kept anyway), whose hidden values and dropout masks (a byte a number) come on top.
    """
    adapted = _adapted(shape, lora)
    floats = 2 * shape.hidden + 2 * shape.query + 2 * shape.key_value + 2 * shape.intermediate
    inputs = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}, {"down_proj"})
    for names in inputs:
        floats += next((adapted[name][0] for name in names if name in adapted), 0)
    floats += lora.r * len(adapted)
    masks = sum(inputs for inputs, _ in adapted.values()) if lora.dropout else 0
    return 4 * floats + masks


def _dequantised(shape: ModelShape, precision: BasePrecision) -> int:
    """Weights that are fp32 for the time of a product: the widest layers' and, held in half precision, the head's."""
    if precision == "fp32":
        return 0
    head = shape.vocabulary * shape.hidden if precision in ("bf16", "fp16") else 0
    return 2 * shape.hidden * shape.intermediate + head


def _adapted(shape: ModelShape, lora: LoraSpec) -> dict[str, tuple[int, int]]:
    return {name: size for name, size in shape.inputs_and_outputs().items() if name in lora.target_modules}
