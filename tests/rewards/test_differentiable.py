"""Rewards as functions of pixels: against the scores of image files, and their gradients."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import each_row
from tiny_clip import pictures
from tiny_rewards import NETWORKS, write_rewards

from dspo_jax.rewards import REWARDS, load_reward
from dspo_jax.rewards.differentiable import DIVISORS, DifferentiableReward, combine, load_differentiable

PROMPTS = ["a red cat", "a \u201cdog\u201d", ""]
SCORED = [*NETWORKS, "colourfulness"]  # test_b_vqa.py has b_vqa
READ_NO_PROMPT = ("aesthetic", "colourfulness")
SIZES = [(61, 50), (20, 33)]  # (height, width): larger and smaller than the networks' 28 and 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Small random weights of every reward, as the command converts them."""
    pytest.importorskip("torch")
    out = tmp_path_factory.mktemp("rewards")
    write_rewards(tmp_path_factory.mktemp("published"), out)
    return out


@pytest.fixture(scope="module")
def load(folder):
    """Loads a reward once for all tests."""
    return functools.cache(lambda name: load_differentiable(name, folder))


def images(*size):
    """Three smooth pictures [3, H, W, 3] uint8."""
    return np.stack(pictures(size, size, size))


def as_floats(files):
    return jnp.asarray(files, jnp.float32) / 255


@functools.cache
def compiled(reward):
    return jax.jit(reward.function)


def score(reward, pixels, prompts=PROMPTS):
    return compiled(reward)(reward.params, pixels, reward.tokenize(prompts))


def gradient_of(reward, pixels, prompts=PROMPTS):
    def total(pixels, params, tokens):
        return reward.function(params, pixels, tokens).sum()

    return jax.jit(jax.grad(total))(pixels, reward.params, reward.tokenize(prompts))


def test_every_reward_but_the_size_of_a_jpeg_has_a_gradient():
    assert set(DIVISORS) == set(REWARDS) - {"compressibility"}
    message = r"^reward compressibility: has no gradient: [^\n]*; train by a policy gradient, such as ddpo,"
    with pytest.raises(ValueError, match=message + r"[^\n]*$"):
        load_differentiable("compressibility")
    with pytest.raises(ValueError, match="'colorfulness': unknown; did you mean 'colourfulness'"):
        load_differentiable("colorfulness")


@each_row("name", NETWORKS)
@each_row("size", SIZES)
def test_scores_are_those_of_image_files_up_to_rounding(name, size, folder, load):
    files = images(*size)
    theirs = load_reward(name, folder, batch_size=3).score(files, PROMPTS)
    ours = score(load(name), as_floats(files))
    assert (ours.shape, ours.dtype) == ((3,), jnp.float32)
    # Shares of the spread. Seen: 0.011 with 8 bits, 6e-7 for HPS, whose resize is in floating point.
    bound = 1e-5 if name.startswith("hps") else 0.03
    print(f"\n{name} {size}: {np.abs(ours - theirs).max() / np.ptp(theirs):.1e} of {theirs}")
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound * np.ptp(theirs))


@each_row("name", SCORED)
def test_gradients_are_those_of_finite_differences(name, load):
    """Along the gradient, and half along noise, to which it is nearly orthogonal."""
    reward = load(name)
    pixels = 0.25 + 0.5 * as_floats(images(*SIZES[0]))  # nothing is clipped
    gradient = gradient_of(reward, pixels)
    lengths = jnp.linalg.norm(gradient.reshape(3, -1), axis=1)
    assert lengths.min() > 0
    noise = np.random.default_rng(0).standard_normal(pixels.shape, np.float32)
    along, step = gradient / lengths[:, None, None, None], 0.05
    for change in (along, along / 2 + noise / np.linalg.norm(noise[0]) / 2):
        ahead, behind = (score(reward, pixels + sign * step * change) for sign in (1, -1))
        slope = (gradient * change).sum((1, 2, 3))
        print(f"\n{name}: {np.abs((ahead - behind) / (2 * step) / slope - 1).max():.1e}")
        np.testing.assert_allclose((ahead - behind) / (2 * step), slope, rtol=0.01)


@each_row("name", NETWORKS)
def test_weights_are_an_argument_and_products_float32(name, load):
    reward = load(name)
    tokens, pixels = reward.tokenize(PROMPTS), as_floats(images(*SIZES[0]))

    def total(params, pixels, tokens):
        return reward.function(params, pixels, tokens).sum()

    traced = jax.make_jaxpr(jax.grad(total, argnums=1))(reward.params, pixels, tokens)
    assert sum(np.size(value) for value in traced.consts) < 100
    products = re.findall(r"= (?:dot_general|conv_general_dilated)\[.*?\n *\]", str(traced), re.DOTALL)
    assert len(products) > 10
    assert all("Precision.HIGHEST" in product for product in products)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(reward.params))


@each_row("name", SCORED)
def test_prompts_are_read_as_for_image_files(name, load):
    reward, pixels = load(name), as_floats(images(*SIZES[0]))
    assert {len(leaf) for leaf in jax.tree.leaves(reward.tokenize(PROMPTS))} == {3}
    first, other = score(reward, pixels), score(reward, pixels, ["!!", *PROMPTS[1:]])
    np.testing.assert_array_equal(first[1:], other[1:])
    assert (first[0] == other[0]) == (name in READ_NO_PROMPT)
    if name.startswith("hps"):
        np.testing.assert_array_equal(reward.tokenize(["\u201ca\u201d"]), reward.tokenize(['"a"']))


@each_row("size", [(40, 56), (9, 13)])
def test_colourfulness_is_the_one_of_image_files(size):
    files = images(*size)
    reward = load_differentiable("colourfulness")
    ours, theirs = score(reward, as_floats(files)), load_reward("colourfulness").score([*files], PROMPTS)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert theirs.min() > 10


def test_colourfulness_of_grey_has_a_finite_gradient():
    reward = load_differentiable("colourfulness")
    grey = jnp.full((1, 6, 6, 3), 0.5)
    np.testing.assert_allclose(score(reward, grey, [""]), [0], atol=2e-3)
    np.testing.assert_array_equal(gradient_of(reward, grey, [""]), 0)
    tinted = grey.at[:, :, :, 0].add(0.01)  # one colour: no deviation, but a mean
    assert np.isfinite(gradient_of(reward, tinted, [""])).all()
    assert np.abs(gradient_of(reward, tinted, [""])).max() > 0


OWN = """
import functools
import jax
import jax.numpy as jnp
import numpy as np

def of_files(images, prompts):
    return np.array([image.mean() for image in images])

def redness(images):
    return (images[..., 0] - images[..., 1]).mean((1, 2))

def in_numpy(images):
    return np.asarray(images).mean((1, 2, 3))

def branches(images):
    return images.mean((1, 2, 3)) if images.mean() > 0.5 else images.max((1, 2, 3))

def one_number(images):
    return images.mean()

def whole(images):
    return jnp.int32(images.sum((1, 2, 3)))

def both(images):
    return redness(images), redness(images)

def rounded(images):
    return jnp.round(255 * images).mean((1, 2, 3))

def calls_the_host(images):
    return jax.pure_callback(in_numpy, jax.ShapeDtypeStruct((len(images),), jnp.float32), images)

def root(images):
    return jnp.sqrt(0 * images.mean((1, 2, 3)))

def broken(images):
    return redness(image)
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path / "own.py"


def test_a_function_of_ones_own(own):
    reward = load_differentiable(f"{own}:redness")
    assert (reward.name, reward.version[:7], reward.divisor, reward.params) == ("redness", "own.py ", 1, {})
    pixels = as_floats(images(4, 5))
    expected = (pixels[..., 0] - pixels[..., 1]).mean((1, 2))
    np.testing.assert_allclose(score(reward, pixels), expected, rtol=1e-5)
    np.testing.assert_allclose(gradient_of(reward, pixels)[0, 0, 0], [1 / 20, -1 / 20, 0], rtol=1e-5)


@each_row(
    ("function", "message"),
    [
        ("in_numpy", "cannot be traced: TracerArrayConversionError: The numpy.ndarray conversion method"),
        ("branches", "cannot be traced: TracerBoolConversionError: Attempted boolean conversion"),
        (
            "of_files",
            "cannot be traced: TypeError: of_files() missing 1 required positional argument: 'prompts'",
        ),
        ("one_number", "gave float32[] for 2 images; it must be a JAX function"),
        ("whole", "gave int32[2] for 2 images; it must be a JAX function"),
        ("both", "gave a tuple; it must be a JAX function (images [B, H, W, 3] float32 in [0, 1]) -> scores"),
        ("rounded", "its gradient for images of noise is 0; it must be finite and not 0"),
        ("calls_the_host", "cannot be differentiated: ValueError: Pure callbacks"),
        ("broken", "cannot be traced: NameError: name 'image' is not defined; it must be a JAX function"),
        ("root", "its gradient for images of noise is nan; it must be finite and not 0"),
    ],
)
def test_functions_that_are_refused(function, message, own):
    with pytest.raises(ValueError, match=re.escape(f"{function}: {message}")) as error:
        load_differentiable(f"{own}:{function}")
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("reward ")


def test_a_function_that_is_not_there_is_refused(own):
    with pytest.raises(ValueError, match=r"own\.py: defines no function 'none'"):
        load_differentiable(f"{own}:none")


def test_a_sum_and_its_gradient(folder, own):
    text = f"pickscore,-0.5*aesthetic,{own}:redness"
    total = load_differentiable(text, folder)
    assert (total.name, total.divisor) == ("pickscore,-0.5*aesthetic,redness", 1)
    digests = r"pickscore: h .{8}; aesthetic: l .{8}, head.* .{8}; redness: own\.py .{8}"
    assert re.fullmatch(digests, total.version)
    parts = [load_differentiable(name, folder) for name in ("pickscore", "aesthetic", f"{own}:redness")]
    pixels, factors = as_floats(images(*SIZES[0])), (1 / 1.0, -0.5 / 0.5, 1.0)
    for of in (score, gradient_of):
        expected = sum(
            factor * np.asarray(of(part, pixels)) for part, factor in zip(parts, factors, strict=True)
        )
        ours = of(total, pixels)
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
        assert np.abs(expected).max() > 0
    weighted = load_differentiable("36*colourfulness")
    np.testing.assert_allclose(
        score(weighted, pixels), 2 * score(load_differentiable("colourfulness"), pixels), rtol=1e-6
    )


@each_row(
    ("text", "message"),
    [
        ("colourfulness,x*aesthetic", "reward 'x*aesthetic': 'x' is no weight; write, e.g., 0.5*aesthetic"),
        ("0*colourfulness", "reward colourfulness: its weight is 0; it must be finite and not 0"),
        ("nan*colourfulness", "reward colourfulness: its weight is nan; it must be finite and not 0"),
        ("colourfulness,2*colourfulness", "reward colourfulness: stands twice in the sum; give it once"),
        ("colourfulness,compressibility", "reward compressibility: has no gradient"),
        ("colourfulness,", "reward = '': unknown"),
    ],
)
def test_sums_that_are_refused(text, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_differentiable(text)
    assert "\n" not in str(error.value)


def test_a_reward_made_in_python_can_be_summed():
    def brightness(params, images, tokens):
        return params["scale"] * images.mean((1, 2, 3)) + jnp.float32(tokens)

    def count(prompts):
        return np.array([len(prompt) for prompt in prompts])

    mine = DifferentiableReward("mine", "1", {"scale": np.float32(3)}, count, brightness, 2.0)
    total = combine([(mine, 4.0)])
    images = jnp.full((2, 3, 3, 3), 0.5)
    np.testing.assert_allclose(score(total, images, ["", "abc"]), [2 * 1.5, 2 * 4.5])
