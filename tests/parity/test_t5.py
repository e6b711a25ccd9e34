"""`T5Encoder` against transformers' T5EncoderModel with random weights."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import each_row

from dspo_jax.models.t5 import find_buckets
from dspo_jax.weights.components import read_params

torch = pytest.importorskip("torch")
from safetensors.numpy import load_file, save_file  # noqa: E402
from torch_modules import assert_close, compile_fast, randomize, save  # noqa: E402
from transformers import T5Config, T5EncoderModel  # noqa: E402
from transformers.models.t5.modeling_t5 import T5Attention  # noqa: E402

CONFIG = {
    "vocab_size": 40,
    "d_model": 12,
    "d_kv": 4,
    "d_ff": 20,
    "num_layers": 2,
    "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
}


def draw_tokens(length: int) -> np.ndarray:
    """Two texts, of which one is mostly padding."""
    tokens = np.random.default_rng(length).integers(2, 40, (2, length)).astype(np.int32)
    tokens[1, length // 3] = 1
    tokens[1, length // 3 + 1 :] = 0
    return tokens


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    module = randomize(T5EncoderModel(T5Config(**CONFIG)))
    folder = tmp_path_factory.mktemp("t5")
    model, params = save(module, folder)
    return module, model, params, compile_fast(model.apply), folder


@each_row("length", [1, 2, 77, 300])
def test_states_match_transformers_at_every_length(length, encoder):
    """300 tokens are further from one another than the last bucket begins."""
    module, _, params, apply, _ = encoder
    tokens = draw_tokens(length)
    with torch.no_grad():
        theirs = module(torch.from_numpy(tokens).long()).last_hidden_state.numpy()
    states = apply(params, tokens)
    assert states.dtype == np.float32
    assert_close(states, theirs, 1e-5)


@each_row(("buckets", "farthest"), [(32, 128), (8, 20), (16, 1000)])
def test_buckets_of_all_distances_match_transformers(buckets, farthest):
    distances = torch.arange(600)[None] - torch.arange(600)[:, None]
    theirs = T5Attention._relative_position_bucket(
        distances, bidirectional=True, num_buckets=buckets, max_distance=farthest
    )
    np.testing.assert_array_equal(find_buckets(600, buckets, farthest), theirs.numpy())


def test_the_sum_of_the_layers_is_float32_whatever_the_weights_are(encoder):
    """Tokens so large that a bfloat16 sum would round them by as much as the layers' own rounding."""
    module, _, params, apply, _ = encoder
    module = copy.deepcopy(module)
    tokens = draw_tokens(20)
    with torch.no_grad():
        module.shared.weight.mul_(300)
        module.bfloat16().float()  # the same numbers
        theirs = module(torch.from_numpy(tokens).long()).last_hidden_state.numpy()
    large = params | {"shared": {"embedding": 300 * params["shared"]["embedding"]}}
    states = apply(jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), large), tokens)
    assert states.dtype == np.float32
    assert_close(states, theirs, 5e-4)


@each_row("names", [("shared.weight",), ("encoder.embed_tokens.weight",), ("shared.weight",) * 2])
def test_the_tokens_may_have_either_name_or_both(names, encoder, tmp_path):
    _, model, params, _, folder = encoder
    tensors = load_file(folder / "model.safetensors")
    tokens = tensors.pop("shared.weight")
    if len(names) == 2:
        tensors["encoder.embed_tokens.weight"] = tokens
    save_file({**tensors, names[0]: tokens}, tmp_path / "model.safetensors")
    again = read_params(tmp_path, model)
    jax.tree.map(np.testing.assert_array_equal, again, params)
