"""`CLIPTextModel` and `CLIPTextModelWithProjection` against transformers' with random weights."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch_modules import assert_close, assert_gradients_close, compile_fast, randomize, save  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection  # noqa: E402

from dspo_jax.models.model import build_model  # noqa: E402

CONFIG = {
    "vocab_size": 24,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 9,
    "bos_token_id": 22,
    "eos_token_id": 23,
    "pad_token_id": 0,
    "projection_dim": 8,
}
START, END = 22, 23
# The end token sits elsewhere in every caption, once followed by padding with the end token itself.
TOKENS = np.int32(
    [
        [START, 5, 7, 1, END, 0, 0, 0, 0],
        [START, 5, END, END, END, END, END, END, END],
        [START, 9, 8, 7, 6, 5, 4, 3, END],
    ]
)


@pytest.mark.parametrize(
    ("hidden_act", "eos_token_id", "ends"),
    [
        # Configs older than transformers 4.31 say 2, whatever the tokenizer: the highest number is the end.
        ("quick_gelu", 2, [4, 2, 8]),
        # The first token of that number is the end, and here it is not the highest.
        ("gelu", 5, [1, 1, 5]),
    ],
)
def test_forward_and_gradients_match_transformers(hidden_act, eos_token_id, ends, tmp_path):
    config = CONFIG | {"hidden_act": hidden_act, "eos_token_id": eos_token_id}
    module = randomize(CLIPTextModel(CLIPTextConfig(**config)))
    model, params = save(module, tmp_path)

    @compile_fast
    def gradients_of(params):
        def loss(params):
            states, _, pooled = model.apply(params, TOKENS)
            return jnp.square(states - 1).mean() + jnp.square(pooled).sum(), (states, pooled)

        return jax.grad(loss, has_aux=True)(params)

    gradients, (states, pooled) = gradients_of(params)
    theirs = module(torch.from_numpy(TOKENS).long())
    assert_close(states, theirs.last_hidden_state.detach().numpy(), 1e-4, "last")
    assert_close(pooled, theirs.pooler_output.detach().numpy(), 1e-4, "pooled")
    np.testing.assert_array_equal(pooled, states[np.arange(3), ends])
    ((theirs.last_hidden_state - 1).square().mean() + theirs.pooler_output.square().sum()).backward()
    assert_gradients_close(module, model, gradients, tmp_path)


@pytest.mark.parametrize("eos_token_id", [None, [END], [END, 5]])
def test_an_end_token_with_which_transformers_fails_is_refused(eos_token_id):
    """transformers reads such a config, and fails at any text."""
    module = CLIPTextModel(CLIPTextConfig(**CONFIG | {"eos_token_id": eos_token_id}))
    with pytest.raises(AttributeError, match="'bool' object has no attribute 'int'"):
        module(torch.from_numpy(TOKENS).long())
    for name in ("CLIPTextModel", "CLIPTextModelWithProjection"):
        with pytest.raises(ValueError, match=re.escape(f"{name} config: eos_token_id = {eos_token_id!r} ")):
            build_model(name, CONFIG | {"hidden_act": "gelu", "eos_token_id": eos_token_id})


def test_penultimate_states_and_the_projection_match_transformers(tmp_path):
    """What SDXL takes from its second encoder: OpenCLIP's tower, padded with token 0."""
    config = CONFIG | {"hidden_act": "gelu", "eos_token_id": 2}
    module = randomize(CLIPTextModelWithProjection(CLIPTextConfig(**config)))
    model, params = save(module, tmp_path)
    assert model.class_name == "CLIPTextModelWithProjection"

    @compile_fast
    def gradients_of(params):
        def loss(params):
            states = model.apply(params, TOKENS)
            return jnp.square(states.penultimate - 1).mean() + jnp.square(states.pooled).sum(), states

        return jax.grad(loss, has_aux=True)(params)

    gradients, states = gradients_of(params)
    theirs = module(torch.from_numpy(TOKENS).long(), output_hidden_states=True)
    penultimate = theirs.hidden_states[-2]
    assert_close(states.last, theirs.last_hidden_state.detach().numpy(), 1e-4, "last")
    assert_close(states.penultimate, penultimate.detach().numpy(), 1e-4, "penultimate")
    assert_close(states.pooled, theirs.text_embeds.detach().numpy(), 1e-4, "pooled")
    ((penultimate - 1).square().mean() + theirs.text_embeds.square().sum()).backward()
    assert_gradients_close(module, model, gradients, tmp_path)
