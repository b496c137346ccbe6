"""Tiny transformers of Hugging Face, and batches of characters or images for them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["MODELS", "Tiny", "characters", "step"]

WIDTHS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SYMBOLS, LENGTH = 128, 16


@dataclass(frozen=True)
class Tiny:
    """A model and what it is trained on.

    Attributes:
        build: the model.
        feed_forward: what names of its feed-forward blocks' hidden axes contain.
        writes: whether it generates text.
    """

    build: Callable[[], nn.Module]
    feed_forward: str
    writes: bool = False
    images: bool = False

    def model(self) -> Any:
        torch.manual_seed(0)
        return self.build().double().eval()

    def example(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """What the model is traced with."""
        given: dict[str, Any] = {name: value for name, value in batch.items() if name != "labels"}
        return {**given, "use_cache": False} if self.writes else given

    def batches(self, text: str, count: int = 3, samples: int = 8) -> list[dict[str, Tensor]]:
        if self.images:
            torch.manual_seed(0)
            return [
                {"pixel_values": torch.randn(samples, 3, 16, 16).double(), "labels": torch.arange(samples) % 4}
                for _ in range(count)
            ]
        ids = characters(text)[: count * samples * LENGTH].view(count, samples, LENGTH)
        return [{"input_ids": part, "labels": part} for part in ids]


def characters(text: str) -> Tensor:
    return torch.tensor([min(ord(letter), SYMBOLS - 1) for letter in text])


def step(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross entropy, in the model's own precision (its own loss is taken in single)."""
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    if logits.ndim == 2:
        return functional.cross_entropy(logits, batch["labels"])
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def _bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=SYMBOLS, **WIDTHS))


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=SYMBOLS, n_embd=16, n_layer=2, n_head=2, n_inner=24, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config)


def _llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=SYMBOLS, num_key_value_heads=1, bos_token_id=1, eos_token_id=2, pad_token_id=0, **WIDTHS
    )
    return transformers.LlamaForCausalLM(config)


def _vit() -> nn.Module:
    config = transformers.ViTConfig(image_size=16, patch_size=4, num_labels=4, **WIDTHS)
    return transformers.ViTForImageClassification(config)


MODELS = {
    "BERT": Tiny(_bert, "intermediate.dense"),
    "GPT-2": Tiny(_gpt2, "c_fc", writes=True),
    "Llama": Tiny(_llama, "gate_proj", writes=True),
    "ViT": Tiny(_vit, "mlp.fc1", images=True),
}
