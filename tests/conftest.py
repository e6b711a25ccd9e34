"""Strict numerics for every test: fake devices, no rank promotion, no network, warnings as errors.

The settings are environment variables rather than `jax.config.update`, so that the commands which tests start
as subprocesses run under the same rules. They must be set before JAX is first imported.
"""

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

NUM_DEVICES = 8

if "jax" in sys.modules:
    raise RuntimeError(
        "jax was imported before tests/conftest.py could configure it; run pytest without that plugin"
    )

# Compiled programs are shared by the test processes, by the commands they start and by the next run; the size
# limit is what makes JAX lock the folder while it writes.
COMPILATION_CACHE = Path(__file__).parents[1] / ".pytest_cache" / "jax"

os.environ.update(
    JAX_PLATFORMS="cpu",
    # Most of the time goes into compiling, and little of it into running what was compiled.
    XLA_FLAGS=f"--xla_force_host_platform_device_count={NUM_DEVICES} --xla_backend_optimization_level=0",
    JAX_NUMPY_RANK_PROMOTION="raise",
    JAX_COMPILATION_CACHE_DIR=str(COMPILATION_CACHE),
    JAX_COMPILATION_CACHE_MAX_SIZE=str(2**31),
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.5",
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_VERBOSITY="error",
    TOKENIZERS_PARALLELISM="false",
)

# Packages whose annotated shapes and dtypes are checked at every call while the tests run.
TYPECHECKED: tuple[str, ...] = (
    "dspo_jax.models",
    "dspo_jax.objectives",
    "dspo_jax.pipelines",
    "dspo_jax.rewards.device_pixels",
    "dspo_jax.rewards.differentiable",
    "dspo_jax.rewards.pixels",
    "dspo_jax.samplers",
    "dspo_jax.sampling.decoding",
    "dspo_jax.sampling.drawing",
    "dspo_jax.sampling.folder",
    "dspo_jax.sampling.image_sampler",
    "dspo_jax.sampling.init_latents",
    "dspo_jax.sampling.prompts",
    "dspo_jax.sampling.rendering",
    "dspo_jax.schedules",
    "dspo_jax.training.losses",
    "dspo_jax.training.pair_stream",
    "dspo_jax.training.rollouts",
    "dspo_jax.training.rounds",
    "dspo_jax.training.self_play_stream",
    "dspo_jax.training.step",
    "dspo_jax.training.task",
    "dspo_jax.training.trajectory_stream",
)
install_import_hook(TYPECHECKED, "typechecker.check")

# Tests in which no dtype may be promoted silently: folders, and files of training/. Elsewhere optax promotes.
STRICT_FOLDERS = (
    *("kernels", "models", "objectives", "parity", "pipelines", "rewards"),
    *("samplers", "sampling", "schedules"),
)
STRICT_FILES = ("test_stability", "test_step", "test_step_objectives", "test_step_state")

# A shell without job control ignores Ctrl-C in what it puts in the background, and the commands that tests
# interrupt would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the option that rewrites tests/golden/."""
    parser.addoption("--regenerate-golden", action="store_true", help="rewrite the golden files of the tests")


@pytest.fixture(autouse=True)
def _strict_dtypes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Refuses to mix dtypes in the tests of the mathematics."""
    if request.path.parent.name not in STRICT_FOLDERS and request.path.stem not in STRICT_FILES:
        yield
        return
    import jax  # not before the settings above

    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of optional data files (real third-party weights, prompt lists) named by DSPO_TEST_DATA."""
    folder = os.environ.get("DSPO_TEST_DATA")
    if not folder:
        pytest.skip(
            "DSPO_TEST_DATA is not set; it names a folder of optional data files outside the repository"
        )
    path = Path(folder)
    if not path.is_dir():
        pytest.fail(f"DSPO_TEST_DATA = {folder!r}: not a folder")
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of Stable Diffusion 1.5's shape with random weights; read it, never write to it."""
    from tiny_model import write_model  # imports JAX, so not before the settings above

    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def tiny_pairs(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Shards of 24 training and 6 validation pairs, encoded for `tiny_model`; read, never write to them."""
    from tiny_model import write_pairs

    return write_pairs(tmp_path_factory.mktemp("pairs") / "tiny", tiny_model)


@pytest.fixture(scope="session")
def shallow_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """`tiny_model` with fewer layers, for a training step that compiles faster; `tiny_pairs` fit it."""
    from tiny_run import make_shallow

    return make_shallow(Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("model") / "shallow")))


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_model` that a test may spoil."""
    return Path(shutil.copytree(tiny_model, tmp_path / "source" / "tiny"))


@pytest.fixture
def published(model: Path) -> Path:
    """`model` as published ones are."""
    from model_folders import publish

    return publish(model)


@pytest.fixture(params=["sd15", "sd21", "sdxl"])
def family(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A published model of each family."""
    from model_folders import publish
    from tiny_model import write_model

    return publish(write_model(tmp_path / "source" / "tiny", family=request.param))


@pytest.fixture
def full_run(tiny_model: Path, tmp_path: Path) -> Path:
    """A workdir with checkpoints 1 and 3 of every parameter of `tiny_model`'s UNet and text encoder."""
    from model_folders import make_run

    return make_run(tmp_path / "source" / "run", tiny_model, steps=(1, 3), change=0.25)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A name in an empty folder, which stays empty where writing is refused."""
    (tmp_path / "target").mkdir()
    return tmp_path / "target" / "out"
