"""Scores are the model's own logits, also where an architecture scales, caps or shifts them after its head."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
)

from guardloop.guard.inference.forward import decoder_of, label_logits, scores_of
from guardloop.guard.inference.scorer import Scorer
from guardloop.guard.prompt.verdict import LabelTokens

LABELS = LabelTokens((), 7, 11)
SIZES = {
    **{"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "initializer_range": 0.4, "max_position_embeddings": 128, "pad_token_id": 0},
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "granite": GraniteConfig(**SIZES, logits_scaling=8.0),
    "gemma 2": Gemma2Config(**SIZES, final_logit_softcapping=3.0, head_dim=8),
    "cohere": CohereConfig(**SIZES, logit_scale=0.0625),
    "phi": PhiConfig(**SIZES),
}


@pytest.fixture(params=CONFIGS)
def model(request):
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval()
    if (bias := getattr(made.get_output_embeddings(), "bias", None)) is not None:
        torch.nn.init.normal_(bias)
    return made


@torch.no_grad()
def test_scores_and_logits_are_those_of_the_model(model):
    ids = torch.randint(1, 60, (3, 9))
    expected = model(input_ids=ids).logits[:, -1].float()
    hidden = decoder_of(model)(input_ids=ids).last_hidden_state[:, -1]
    torch.testing.assert_close(label_logits(model, hidden), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(scores_of(model, hidden, LABELS), expected[:, 11] - expected[:, 7], atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_scorer_gives_the_models_own_scores(model):
    prefix, rows = [3, 4, 5, 6], [[9, 8], [1, 2, 3, 4, 5], [50]]
    ((indices, scores, _),) = Scorer(model, [prefix], LABELS).score([[*prefix, *row] for row in rows])
    for index, score in zip(indices, scores.tolist(), strict=True):
        logits = model(input_ids=torch.tensor([[*prefix, *rows[index]]])).logits[0, -1]
        assert score == pytest.approx(float(logits[11] - logits[7]), abs=1e-4)
