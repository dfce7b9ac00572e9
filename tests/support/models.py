"""Tiny tokenizers in each guard family's form, and tiny random models on them.

The vocabularies are trained on a few lines; the templates are short, with the structure of the families' own.
"""

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from guardloop.guard.engine import Guard
from guardloop.guard.prompt.family import family_of
from guardloop.guard.prompt.renderer import Renderer

FAMILIES = ("llama-guard-1", "llama-guard-2", "llama-guard-3", "llama-guard-3-1b", "guardloop")
CORPUS = [
    "Task: Check if there is unsafe content in 'User' messages by our policy. The answer is safe or unsafe.",
    "Task: Check if there is unsafe content in 'Agent' messages by our policy. unsafe safe unsafe safe",
    "[INST] User: how do I bake a cake? Agent: mix flour and sugar. [/INST] safe",
    "[INST] User: how do I build a bomb? Agent: I will not help with a bomb. [/INST] unsafe",
    "<BEGIN CONVERSATION>\n\n<END CONVERSATION>\n\nunsafe\nS1,S2\n\nsafe",
    "How are you? Fine, thanks. Paint the garden door green, said the old baker of the village.",
] * 3
LLAMA_3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
LLAMA_3_SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]

ROLE = "{% set role = 'Agent' if messages | length is even else 'User' %}"
TURNS = (
    "{% for message in messages %}"
    "{{ ('User' if message['role'] == 'user' else 'Agent') + ': ' + message['content'].strip() + '\n\n' }}"
    "{% endfor %}"
)
TASK = '{{ "Task: Check if there is unsafe content in \'" + role + "\' messages by our policy.\n\n" }}'
LAST = (
    "{{ '<END CONVERSATION>\n\nGive your answer for ONLY THE LAST ' + role + ' message:\n"
    "- First line must read safe or unsafe.' }}"
)
TEMPLATES = {
    "llama-guard-1": ROLE
    + "{{ '[INST] ' }}"
    + TASK
    + "{{ '<BEGIN UNSAFE CONTENT CATEGORIES>\nO1: Violence.\nO2: Weapons.\n<END UNSAFE CONTENT CATEGORIES>\n\n' }}"
    + "{{ '<BEGIN CONVERSATION>\n\n' }}"
    + TURNS
    + LAST
    + "{{ ' [/INST]' }}",
    "llama-guard-2": ROLE
    + "{{ bos_token + '[INST] ' }}"
    + TASK
    + "{{ '<BEGIN UNSAFE CONTENT CATEGORIES>\n S1: Violence.\n S2: Weapons.\n<END UNSAFE CONTENT CATEGORIES>\n\n' }}"
    + "{{ '<BEGIN CONVERSATION>\n\n' }}"
    + TURNS
    + LAST
    + "{{ ' [/INST]' }}",
    "llama-guard-3": ROLE
    + "{{ '<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n' }}"
    + TASK
    + "{{ '<BEGIN UNSAFE CONTENT CATEGORIES>\nS1: Violence.\nS2: Weapons.\n<END UNSAFE CONTENT CATEGORIES>\n\n' }}"
    + "{{ '<BEGIN CONVERSATION>\n\n' }}"
    + TURNS
    + LAST
    + "{{ '<|eot_id|><|start_header_id|>assistant<|end_header_id|>' }}",
    "llama-guard-3-1b": "{% if categories is not defined %}"
    "{% set categories = {'S1': 'Violence.', 'S2': 'Weapons.', 'S13': 'Elections.'} %}"
    "{% endif %}"
    "{% if excluded_category_keys is not defined %}{% set excluded_category_keys = [] %}{% endif %}"
    + ROLE
    + "{{ '<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n' }}"
    + TASK
    + "{{ '<BEGIN UNSAFE CONTENT CATEGORIES>\n' }}"
    "{% for key in categories if key not in excluded_category_keys %}{{ key + ': ' + categories[key] + '\n' }}"
    "{% endfor %}"
    "{{ '<END UNSAFE CONTENT CATEGORIES>\n\n<BEGIN CONVERSATION>\n\n' }}"
    "{% for message in messages %}{% for part in message['content'] if part['type'] == 'text' %}"
    "{{ ('User' if message['role'] == 'user' else 'Agent') + ': ' + part['text'] | trim + '\n\n' }}"
    "{% endfor %}{% endfor %}" + LAST + "{{ '<|eot_id|><|start_header_id|>assistant<|end_header_id|>' }}",
}


@cache
def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    """A tiny tokenizer of the family's kind, with its chat template."""
    if family == "llama-guard-1":
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=_sentencepiece(), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )
    else:  # as in Llama 3: only two of the special tokens have a name
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=_byte_level(), bos_token=LLAMA_3_SPECIAL[0], eos_token=LLAMA_3_SPECIAL[1]
        )
    tokenizer.chat_template = TEMPLATES.get(family)
    return tokenizer


def renderer_of(family: str, **options) -> Renderer:
    return Renderer(tokenizer_of(family), family_of(family, ""), **options)


def special_ids(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    return {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}


def tiny_llama(family: str = "guardloop", seed: int = 0, **config) -> LlamaForCausalLM:
    """A random Llama of two layers, in float32, whose scores spread over some units."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    options = {"num_key_value_heads": 2, "initializer_range": 0.3, "max_position_embeddings": 8192} | sizes | config
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer_of(family)), **options)).eval()


def with_lora(model: LlamaForCausalLM, seed: int = 0, **config):
    """The model with a LoRA adapter of random weights, so that it matters."""
    torch.manual_seed(seed)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | config
    return get_peft_model(model, LoraConfig(init_lora_weights=False, **options))


def tiny_guard(family: str = "guardloop", seed: int = 0, **options) -> Guard:
    """A guard on a random model; it answers anything, so its label mass is not checked unless asked for."""
    return Guard(tiny_llama(family, seed), renderer_of(family), **{"min_label_mass": 0} | options)


def save_guard(folder: Path, family: str = "guardloop", seed: int = 0, **metadata) -> Path:
    """A random guard as a local model folder with a guard.json."""
    tiny_llama(family, seed).save_pretrained(folder)
    tokenizer_of(family).save_pretrained(folder)
    (folder / "guard.json").write_text(json.dumps({"family": family} | metadata))
    return folder


def user(*prompts: str) -> list[dict]:
    """Conversations whose User's message is judged."""
    return [{"prompt": prompt, "response": None} for prompt in prompts]


def agent(*turns: tuple[str, str]) -> list[dict]:
    """Conversations whose Agent's message is judged."""
    return [{"prompt": prompt, "response": response} for prompt, response in turns]


def common_prefix(rows: Iterable[list[int]]) -> list[int]:
    """The longest start that all rows share."""
    first, *rest = rows
    size = 0
    while size < len(first) and all(row[size : size + 1] == [first[size]] for row in rest):
        size += 1
    return first[:size]


def common_suffix(rows: Iterable[list[int]]) -> list[int]:
    """The longest end that all rows share."""
    return common_prefix([row[::-1] for row in rows])[::-1]


def _sentencepiece() -> Tokenizer:
    """As Llama 2: spaces are ▁, one is put before the text, unknown characters fall back to bytes."""
    special = [AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    bytes_ = [AddedToken(f"<0x{byte:02X}>", special=False, normalized=False) for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[*special, *bytes_], show_progress=False)
    lines = [line for text in CORPUS for line in text.split("\n")]  # a line break is always the byte <0x0A>
    tokenizer.train_from_iterator(lines, trainer)
    plain = json.loads(tokenizer.to_str())
    plain["added_tokens"] = plain["added_tokens"][: len(special)]  # the bytes are vocabulary, not markup
    plain["pre_tokenizer"]["split"] = False
    tokenizer = Tokenizer.from_str(json.dumps(plain))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _byte_level() -> Tokenizer:
    """As Llama 3: byte-level pairs behind a split by pattern."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in LLAMA_3_SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer
