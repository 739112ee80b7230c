# SPDX-License-Identifier: Apache-2.0
"""compress(): it works, it is undone, and what it cannot do it says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from headkv_mm import HeadKVCache, ImageGrid, compress

GRID = ImageGrid(8, 8)


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def generate(model: LlamaForCausalLM) -> Callable[..., Tensor]:
    ids = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)

    def run(**kwargs: object) -> Tensor:
        return model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=64, do_sample=False, **kwargs)

    return run


def traces(model: nn.Module) -> tuple[object, ...]:
    """Everything that the hook-up may change."""
    backbone = model.model
    return (
        sorted(model.__dict__),
        model.config._attn_implementation,
        len(backbone._forward_pre_hooks),
        model.config.to_dict(),
        sorted(backbone.__dict__),
    )


def test_generate_uses_a_compressed_cache_and_equals_the_explicit_one(model, generate) -> None:
    explicit = HeadKVCache(model, "headkv", budget=0.25, image_grid=GRID)
    expected = generate(past_key_values=explicit)
    model.set_attn_implementation("sdpa")
    with compress(model, "headkv", budget=0.25, image_grid=GRID) as session:
        assert torch.equal(generate(), expected)
    assert session.report().lengths == explicit.report().lengths
    assert not torch.equal(generate(), expected)


@pytest.mark.parametrize("base", ["sdpa", "eager"])
def test_leaving_restores_the_model(model, generate, base) -> None:
    model.set_attn_implementation(base)
    before, stock = traces(model), generate()
    with compress(model, "lines", budget=0.25, image_grid=GRID):
        generate()
    assert traces(model) == before
    with pytest.raises(ZeroDivisionError), compress(model, "lines", budget=0.25, image_grid=GRID):
        _ = len(generate()) / 0
    assert traces(model) == before
    with (
        pytest.raises(ValueError, match="budget"),
        compress(model, "lines", budget=2, image_grid=GRID),
    ):
        pass
    assert traces(model) == before
    assert torch.equal(generate(), stock)


def test_contexts_nest(model, generate) -> None:
    before = traces(model)
    with compress(model, "streaming", budget=0.25, image_grid=GRID) as outer:
        first = generate()
        with compress(model, "lines", budget=0.5, image_grid=GRID) as inner:
            generate()
        assert inner.report().method == "lines"
        assert torch.equal(generate(), first)
        assert outer.report().method == "streaming"
    assert traces(model) == before


def test_none_changes_nothing(model, generate) -> None:
    stock = generate()
    with compress(model, None) as session:
        assert torch.equal(generate(), stock)
    assert session.report().nbytes == session.report().nbytes_full


def test_a_loop_that_brings_no_cache_gets_one(model) -> None:
    ids = torch.randint(3, 60, (1, 6))
    with compress(model, "lines", budget=0.25, image_grid=GRID) as session, torch.no_grad():
        cache = model(input_ids=ids).past_key_values
        assert isinstance(cache, HeadKVCache)
        assert session.caches == [cache]
        assert model(input_ids=ids, use_cache=False).past_key_values is None
        for _ in range(5):
            model(input_ids=ids)
        assert len(session.caches) == 2  # earlier ones were let go
        mine = DynamicCache(config=model.config)
        assert model(input_ids=ids, past_key_values=mine).past_key_values is mine


def test_a_guidance_branch_is_compressed_too(model, generate) -> None:
    negative = torch.randint(3, 60, (2, 3))
    with compress(model, "lines", budget=0.25, image_grid=GRID) as session:
        generate(guidance_scale=1.5, negative_prompt_ids=negative)
    assert len(session.caches) == 2
    for cache in session.caches:
        assert cache.nbytes < cache.nbytes_full


def test_a_report_needs_a_generation(model) -> None:
    with (
        compress(model, "lines", image_grid=GRID) as session,
        pytest.raises(RuntimeError, match="nothing was generated"),
    ):
        session.report()


def test_wrapped_models_are_seen_through(model, generate) -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    with compress(torch.nn.DataParallel(model), "lines", budget=0.25, image_grid=GRID) as session:
        generate()
    assert session.report().method == "lines"
    with pytest.raises(TypeError, match="takes a transformers model, got Wrapper"), compress(Wrapper(model), "lines"):
        pass


def test_other_caches_are_refused_beside_it(model, generate) -> None:
    with (
        compress(model, "lines", image_grid=GRID),
        pytest.raises(ValueError, match="cache_implementation='quantized' and kv_compression exclude each other"),
    ):
        generate(cache_implementation="quantized")


def test_assisted_decoding_is_refused_before_anything_runs(model) -> None:
    ids = torch.randint(3, 60, (1, 6))
    with (
        compress(model, "lines", image_grid=GRID),
        pytest.raises(ValueError, match="assisted decoding takes tokens back"),
    ):
        model.generate(input_ids=ids, prompt_lookup_num_tokens=2, max_new_tokens=4)


def test_models_outside_the_attention_interface_are_refused() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2)).eval()
    with pytest.raises(ValueError, match="attention interface"), compress(model, "lines", image_grid=GRID):
        pass


def test_sliding_window_models_have_nothing_to_compress() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = MistralForCausalLM(MistralConfig(sliding_window=4, **sizes, **heads)).eval()
    with pytest.raises(ValueError, match="no full-attention layer"), compress(model, "lines", image_grid=GRID):
        pass


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma2", "gpt_oss"])
def test_other_families_run_and_save(family) -> None:
    """Learned positions, q/k norms, softcaps with sliding layers between, and attention sinks."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    if family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3))
    else:
        sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "head_dim": 16}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
        moe = {"num_local_experts": 2, "num_experts_per_tok": 1} if family == "gpt_oss" else {}
        config = AutoConfig.for_model(family, **sizes, **heads, **moe, initializer_range=0.3)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = model.eval()
    model.generation_config.eos_token_id = None
    ids = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(0))
    kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 60, "do_sample": False}
    logits = {"return_dict_in_generate": True, "output_logits": True}
    stock = torch.stack(model.generate(**kwargs, **logits).logits)
    # Before the first eviction (row 5 of 8) everything is there, but it is read through the ragged storage.
    with compress(model, "lines", budget=40, image_grid=GRID) as session:
        ours = torch.stack(model.generate(**kwargs, **logits).logits)
    assert (ours[:41] - stock[:41]).abs().max() < 1e-3
    assert session.report().nbytes < session.report().nbytes_full
