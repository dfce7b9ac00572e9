import random
import shutil
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import cases
from support.models import tiny_llama, with_lora
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.template_heuristics.triton import CUDAConfigHeuristic

from guardloop.guard.inference.float8 import Float8Linear, to_float8
from guardloop.guard.inference.forward import decoder_of
from guardloop.guard.inference.packed import HOPPER_TILES, PackedForward, fits, is_tuned, side_of
from guardloop.guard.inference.packing import max_labels
from guardloop.guard.inference.products import first_products

PROPERTY = settings(max_examples=cases(25), deadline=None, derandomize=True)
NEAR = 1e-4
token_lists = st.lists(st.lists(st.integers(0, 299), min_size=1, max_size=90), min_size=1, max_size=6)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "adapter"])
def model(request):
    return with_lora(tiny_llama()) if request.param else tiny_llama()


def one_by_one(model, prefix, rows):
    return torch.stack([decoder_of(model)(torch.tensor([[*prefix, *row]])).last_hidden_state[0, -1] for row in rows])


@given(
    prefix=st.lists(st.integers(0, 299), min_size=1, max_size=200),
    rows=token_lists,
    own=st.booleans(),
    looked_up=st.booleans(),
)
@PROPERTY
def test_a_pack_gives_each_row_what_it_gets_alone(model, prefix, rows, own, looked_up):
    with torch.no_grad():
        first = first_products(decoder_of(model)) if looked_up else None
        forward = PackedForward(model, prefix, 1024, with_gradient=own, compiled=False, first=first)
        torch.testing.assert_close(forward(rows), one_by_one(model, prefix, rows), atol=NEAR, rtol=0)


def test_the_first_layers_products_are_looked_up_where_nothing_else_decides_them():
    plain, adapted = tiny_llama(), with_lora(tiny_llama())
    with torch.no_grad():
        found = first_products(decoder_of(plain))
        assert found is not None and first_products(decoder_of(adapted)) is None
        tokens = torch.tensor([3, 299, 3])
        normed = decoder_of(plain).layers[0].input_layernorm(decoder_of(plain).embed_tokens(tokens))
        torch.testing.assert_close(found.keys[tokens], decoder_of(plain).layers[0].self_attn.k_proj(normed))
    assert first_products(decoder_of(plain)) is None  # with gradient


def test_one_forward_serves_pack_after_pack(model):
    draw = random.Random(0)
    prefix = [draw.randrange(300) for _ in range(130)]
    forward = PackedForward(model, prefix, 512, compiled=False)
    for _ in range(4):
        rows = [[draw.randrange(300) for _ in range(draw.randrange(1, 60))] for _ in range(draw.randrange(1, 8))]
        with torch.no_grad():
            torch.testing.assert_close(forward(rows), one_by_one(model, prefix, rows), atol=NEAR, rtol=0)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="compiled code for a CPU needs g++")
def test_compiled_layers_give_the_same(model, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    prefix, packs = list(range(40)), [[[5, 6, 7, 8], [9, 10], [12] * 30], [[250] * 20, [3]]]
    with torch.no_grad():
        forward = PackedForward(model, prefix, 256, compiled=True, first=first_products(decoder_of(model)))
        for rows in packs:  # sums in place leave nothing behind for the next pack
            torch.testing.assert_close(forward(rows), one_by_one(model, prefix, rows), atol=NEAR, rtol=0)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="compiled code for a CPU needs g++")
def test_layers_are_compiled_without_helpers_that_may_hang(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 4)  # as on a machine of many cores
    for pool in ("pool", "process_pool"):
        monkeypatch.setattr(AsyncCompile, pool, lambda: pytest.fail("waits for helpers"))
    prefix, rows = list(range(40)), [[5, 6, 7, 8], [9, 10]]

    forward = PackedForward(with_lora(tiny_llama()), prefix, 256, with_gradient=True, compiled=True)

    forward(rows).sum().backward()


@pytest.mark.slow
def test_a_process_compiles_the_layers_of_any_number_of_guards(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    with torch._dynamo.config.patch(recompile_limit=3, fail_on_recompile_limit_hit=True), torch.no_grad():
        for size in (128, 256, 384):  # none fits the code of a former one
            PackedForward(tiny_llama(), list(range(40)), size, compiled=True)([[5, 6, 7, 8], [9, 10]])


@pytest.mark.parametrize("checkpointed", [0.0, 0.5, 1.0])
def test_gradients_of_a_pack_equal_those_of_whole_prompts(checkpointed):
    model, draw = with_lora(tiny_llama()), random.Random(1)
    prefix = [draw.randrange(300) for _ in range(150)]
    rows = [[draw.randrange(300) for _ in range(draw.randrange(2, 60))] for _ in range(8)]
    direction = torch.randn(len(rows), 64, generator=torch.Generator().manual_seed(0))

    def gradients(hidden):
        model.zero_grad()
        (hidden * direction).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    forward = PackedForward(model, prefix, 512, with_gradient=True, checkpointed=checkpointed, compiled=False)
    found, expected = gradients(forward(rows)), gradients(one_by_one(model, prefix, rows))
    for name, gradient in expected.items():
        assert torch.linalg.norm(found[name] - gradient) <= 1e-4 * torch.linalg.norm(gradient), name
        assert gradient.abs().max() > 0


def test_only_the_rows_that_are_read_pass_through_the_last_layers_mlp():
    model, shapes = tiny_llama(), []
    for layer in model.model.layers:
        layer.mlp.up_proj.register_forward_hook(lambda module, args, out: shapes.append(out.shape[1]))
    with torch.no_grad():
        PackedForward(model, [1, 2, 3], 1024, compiled=False)([[4, 5], [6]])
    assert shapes[-2:] == [1024, max_labels(1024)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gpu", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("head", [64, 80, 128])
def test_on_every_gpu_whole_tiles_fill_a_square_of_the_mask(gpu, dtype, head, monkeypatch):
    """FlexAttention raises otherwise. Where no tiles are given, PyTorch takes some that depend on the GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: gpu)
    cuda, chosen = torch.device("cuda"), CUDAConfigHeuristic()
    for with_gradient in (False, True):
        side = side_of(cuda, dtype, with_gradient)
        (forward,), (backward, *_) = (
            chosen.get_flex_attn_fwd_configs(head, dtype),
            chosen.get_flex_attn_bwd_configs(head, dtype),
        )
        tiles = [forward.block_m, forward.block_n]
        if is_tuned(cuda, dtype):
            tiles = [HOPPER_TILES[side][f"fwd_BLOCK_{letter}"] for letter in "MN"]
        if with_gradient:
            tiles += [backward.block_m1, backward.block_n1, backward.block_m2, backward.block_n2]
        assert all(side % tile == 0 for tile in tiles), (side, tiles)


def test_whether_tiles_are_given_is_decided_while_a_layer_is_compiled(monkeypatch):
    """A question that the compiler cannot answer would cut the layer in two, or end in an error."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))

    def asked(states):
        return states + 1 if is_tuned(torch.device("cuda"), states.dtype) else states - 1

    compiled = torch.compile(asked, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(2, dtype=torch.bfloat16)).tolist() == [1, 1]
    assert compiled(torch.zeros(2)).tolist() == [-1, -1]


def test_models_of_another_form_are_told_apart():
    model = tiny_llama()
    assert fits(model)
    assert fits(with_lora(tiny_llama()))
    model.config.sliding_window = 64
    assert not fits(model)
    model.config.sliding_window, model.config.model_type = None, "gemma3_text"
    assert not fits(model)


def test_eight_bit_floats_come_close_and_the_head_stays():
    model = tiny_llama(initializer_range=0.1)
    ids = torch.randint(0, 300, (4, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids).logits
        to_float8(model)
        after = model(ids).logits
    assert type(model.lm_head) is torch.nn.Linear
    assert sum(isinstance(m, Float8Linear) for m in model.modules()) == 14
    error = torch.linalg.norm(after - before) / torch.linalg.norm(before)
    assert 0 < error < 0.15
