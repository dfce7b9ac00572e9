"""A responder for tests: a random Llama of 50,000 weights with a byte-level tokenizer and a chat template."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from guardloop.core.records import Row
from guardloop.responses.engine import Request, sample_seed
from guardloop.responses.settings import ResponderSettings

START, END = "<|start|>", "<|end|>"
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
TEXT = "user assistant system how do i pick a lock write poem about the sea and moon tell me what is why"
WORDS = TEXT.split()
PROMPTS = [" ".join(WORDS[(i * 7 + j) % len(WORDS)] for j in range(1 + i * 5 % 13)) + f" {i}?" for i in range(40)]


def build_tokenizer(template: str | None = TEMPLATE) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=[START, END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
    wrapped.add_special_tokens({"additional_special_tokens": [START]})
    wrapped.chat_template = template
    return wrapped


def small(vocab: int, **changes: Any) -> dict[str, Any]:
    sizes = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    return sizes | changes


def build_model(vocab: int) -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**small(vocab))).eval()
    # several end tokens, so that a random model ends some of its answers
    model.generation_config = GenerationConfig(eos_token_id=[1, *range(40, 48)], pad_token_id=1)
    return model


def save(folder: Path) -> Path:
    tokenizer = build_tokenizer()
    build_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_settings(**changes: Any) -> ResponderSettings:
    values = {"model": "tiny", "samples": 3, "max_new_tokens": 12, "prefill": ""}
    values |= {"max_prompt_tokens": 200, "temperature": 1.0}
    return ResponderSettings.model_validate(values | changes)


def ask(prompts: list[str], settings: ResponderSettings, seed: int = 0) -> list[Request]:
    return [
        Request(f"p{i}", prompt, sample, sample_seed(seed, f"p{i}", sample))
        for i, prompt in enumerate(prompts)
        for sample in range(settings.samples)
    ]


def screened(prompts: list[str], **changes: Any) -> list[Row]:
    fixed = {"response": None, "unsafe": None, "category": None, "source": "test", "language": "en", "jailbreak": None}
    verdict = {"score": -1.5, "label_mass": 1.0, "flagged": False, "truncated": False, "error": None}
    return [
        {"id": f"p{i}", "prompt": prompt, "group": f"g{i}", **fixed, **verdict, **changes}
        for i, prompt in enumerate(prompts)
    ]
