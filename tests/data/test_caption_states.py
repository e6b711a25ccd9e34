"""T5's stored states: against transformers, through a stopped encoding, and in training against T5 itself."""

import dataclasses
import json
import re
import shutil
from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from image_files import write_pairs_folder
from processes import finish, log_of, start
from rich.filesize import decimal
from tables import each_row
from tiny_run import make_config

from configs.encode import common as encode_common
from dspo_jax.data import caption_encoder, caption_states, loader, shards
from dspo_jax.data.caption_encoder import CaptionEncoder
from dspo_jax.data.caption_states import CaptionFiles, CaptionTable
from dspo_jax.data.datasets import Dataset, read_datasets
from dspo_jax.data.encoding import encode
from dspo_jax.data.report import format_report
from dspo_jax.data.summary import summarize_dataset
from dspo_jax.errors import UserError
from dspo_jax.pipelines.conditioning_inputs import drop_captions, find_states, prompt_batch
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.training.prompt_states import with_prompt_states
from dspo_jax.training.start import make_state, prepare

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from tiny_sd3 import write_sd3  # noqa: E402
from torch_modules import assert_close, compile_fast  # noqa: E402

LENGTH = 10
CAPTIONS = [
    "a red fox",
    "snow on a fox",
    "a red fox",
    "fox",
    "a fox on snow",
    "snow on a fox",
    "a",
    "on snow",
]
FP16 = 2.0**-11  # relative rounding


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_sd3(tmp_path_factory.mktemp("sd3") / "model")


@pytest.fixture(scope="module")
def config(model, tmp_path_factory):
    """The config of an encoding that stores T5's states."""
    config = encode_common.get_config()
    encode_common.set_source(config, "folder")
    config.model, config.num_workers, config.text.max_sequence_length = str(model), 0, LENGTH
    config.source.path = str(write_pairs_folder(tmp_path_factory.mktemp("pairs"), CAPTIONS))
    config.source.validation_share = 0.0
    return config


@pytest.fixture(scope="module")
def data(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("stored") / "data"
    assert encode(config, out)
    return out


@pytest.fixture(scope="module")
def data_without(config, tmp_path_factory):
    """The same shards, without states."""
    out = tmp_path_factory.mktemp("not_stored") / "data"
    config = config.copy_and_resolve_references()
    config.text.store_t5 = False
    assert encode(config, out)
    return out


def run_torch(model, captions):
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(model / "tokenizer_3")
    ids = tokenizer(captions, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    with torch.no_grad():
        return transformers.T5EncoderModel.from_pretrained(model / "text_encoder_3")(ids)[0].numpy()


def test_every_caption_has_the_states_of_transformers_once(model, data):
    manifest = shards.read_manifest(data)
    assert manifest["captions"]["count"] == len({*CAPTIONS, ""})
    assert manifest["t5"]["length"] == LENGTH
    batch = read_batch(data)
    assert batch["t5_states"].dtype == np.float16
    expected = run_torch(model, batch["caption"])
    np.testing.assert_allclose(batch["t5_states"], expected, rtol=2 * FP16, atol=2e-4)
    table = read_datasets(data)[0].caption_table
    np.testing.assert_allclose(table.read([""]), run_torch(model, [""]), rtol=2 * FP16, atol=2e-4)
    with pytest.raises(UserError, match=r"captions: no states of the caption 'unheard'; delete[^\n]*$"):
        table.read(["unheard"])


def test_inspect_says_what_is_stored_of_the_captions(data):
    report = summarize_dataset(data)
    size = sum(file.stat().st_size for file in (data / "captions").iterdir())
    stored = {"captions": 7, "length": LENGTH, "computed_in": "float32", "bytes": size}
    assert report["caption_states"] == stored
    line = f"  T5's states     7 captions of {LENGTH} tokens, float16 from float32, {decimal(size)}"
    assert line in format_report(report).splitlines()


def read_batch(data):
    with closing(loader.eval_batches(read_datasets(data), batch_size=8, split="train")) as batches:
        return next(batches)


def test_an_encoding_that_was_stopped_among_the_captions_goes_on(config, data, tmp_path, monkeypatch):
    """Files that exist are kept, and the dataset is that of an undisturbed run, byte for byte."""
    monkeypatch.setattr(caption_states, "_ROWS", 2)
    whole, stopped, calls = tmp_path / "whole", tmp_path / "stopped", []
    assert encode(config, whole)

    class Counted(CaptionEncoder):
        def __call__(self, captions, report):
            calls.append(captions)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return super().__call__(captions, report)

    monkeypatch.setattr(caption_encoder, "CaptionEncoder", Counted)
    with pytest.raises(KeyboardInterrupt):
        encode(config, stopped)
    assert not (stopped / shards.MANIFEST).exists()
    assert encode(config, stopped)
    assert len(calls) == 5  # four files of seven captions, one of them twice
    files = [file for file in whole.rglob("*") if file.is_file()]
    assert sum(file.parent.name == "captions" for file in files) == 5
    for file in files:
        assert file.read_bytes() == (stopped / file.relative_to(whole)).read_bytes(), file
    assert encode(config, stopped)
    assert len(calls) == 5


def test_the_last_share_to_end_stores_the_captions_of_all(config, data, tmp_path):
    config = config.copy_and_resolve_references()
    config.rows_per_shard = 4
    out = tmp_path / "data"
    assert not encode(config, out, (1, 2))
    assert not (out / "captions").exists()
    assert encode(config, out, (0, 2))
    for file in (data / "captions").iterdir():
        assert file.read_bytes() == (out / "captions" / file.name).read_bytes(), file


def test_every_caption_is_found_in_a_table_of_many_files(tmp_path):
    captions = [f"caption {i}" for i in range(2000)]
    files = CaptionFiles(tmp_path, captions, 3)
    assert files.missing() == list(range(8))
    number = {caption: i for i, caption in enumerate(files.captions)}
    for i in files.missing():
        rows = [number[caption] for caption in files.of_file(i)]
        files.write(i, np.broadcast_to(np.float16(rows)[:, None, None], (len(rows), 3, 2)))
    files.finish()
    opened = Path("/proc/self/fd")
    before = len(list(opened.iterdir()))
    table = CaptionTable(tmp_path, 3)
    found = table.read(captions)
    assert len(list(opened.iterdir())) <= before  # of a large dataset there are more than may be open
    np.testing.assert_array_equal(found[:, 2, 1], [number[caption] for caption in captions])
    with pytest.raises(UserError, match=r"states-00000-of-00008\.npy: damaged \(float16 \(256, 3, 2\) in pl"):
        CaptionTable(tmp_path, 4)


def test_states_that_float16_cannot_hold_are_refused(model):
    pipe = load_pipeline(model, max_sequence_length=LENGTH)
    params = pipe.read_params("text_encoder_3")
    norm = {"final_layer_norm": jax.tree.map(lambda x: 1e6 + x, params["encoder"]["final_layer_norm"])}
    large = {**params, "encoder": {**params["encoder"], **norm}}
    pipe = dataclasses.replace(pipe, trained={"text_encoder_3": large})
    message = f"{model / 'text_encoder_3'}: states of the caption 'a red fox' are not finite in float16 ("
    with pytest.raises(UserError, match=f"^{re.escape(message)}[^\n]*$"):
        CaptionEncoder(pipe, "float32")(["a red fox"])


def test_captions_are_dropped_among_stored_states_too(model, data):
    """Captions dropped for T5 alone, for the CLIPs alone and for all give the stored or the empty states."""
    pipe = load_pipeline(model, max_sequence_length=LENGTH)
    table = read_datasets(data)[0].caption_table
    stored = dataclasses.replace(pipe, stored_states={"": table.read([""])[0]})
    drop = jnp.array([[False] * 3, [False, False, True], [True, True, False], [True] * 3])
    batch = prompt_batch(pipe, pipe.tokenize(["a red fox"] * 4), (16, 16))
    with_states = {**batch, "t5_states": jnp.asarray(table.read(["a red fox"] * 4))}
    found = []
    for each, inputs in ((stored, with_states), (pipe, batch)):
        params = {name: each.read_params(name) for name in each.text_encoders}
        run = compile_fast(lambda params, batch, each=each: each.encode_conditioning(params, batch))
        found.append(run(params, drop_captions(each, inputs, drop)))
    for ours, theirs in zip(found[0][:2], found[1][:2], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2 * FP16, atol=2e-4)


@pytest.mark.slow
def test_training_from_stored_states_is_training_with_t5(model, data, data_without):
    """The loss and all gradients, with captions dropped, to the rounding of float16."""
    changes = {"objective.name": "diffusion_dpo", "caption_dropout": 0.5, "text.max_sequence_length": LENGTH}
    changes |= {"encoder_dropout": 0.3, "objective.beta": 1.0}
    found = []
    for folder in (data, data_without):
        experiment = prepare(make_config(model, folder, changes))
        task = experiment.task
        state, reference = make_state(task, experiment.mesh, experiment.adapters)
        assert ("text_encoder_3" in reference) == (folder == data_without)
        batch = read_batch(folder)
        names = task.loss.inputs(task.pipe)
        assert ("t5_states" in names) == (folder == data)
        batch = {name: jnp.asarray(batch[name]) for name in names if name != "index"}
        batch["index"] = jnp.arange(8, dtype=jnp.uint32)
        # Away from the reference, where the gradient of the margin is not that of a constant.
        params = jax.tree.map(lambda x: 1.1 * x, jax.device_get(state.params))
        reference = jax.device_get(reference)  # on one device, not on all eight

        def loss(params, task=task, reference=reference, batch=batch):
            return task.loss(params, task, reference, batch, jax.random.key(0))[0]

        found.append(jax.device_get(compile_fast(jax.value_and_grad(loss))(params)))
    (stored, of_stored), (run, of_run) = found
    assert abs(stored - run) < 1e-4
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(of_run))
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(of_stored), jax.tree.leaves(of_run), strict=True
    ):
        assert_close(ours, theirs, 0.01, jax.tree_util.keystr(path), 0.01 * largest)


def test_prompts_that_are_drawn_get_states_before_training(model, data):
    changes = {"text.max_sequence_length": LENGTH, "samples.every": 1}
    experiment = prepare(make_config(model, data, changes | {"samples.prompts": ("fox", "a snow fox")}))
    assert "text_encoder_3" not in experiment.task.pipe.components
    pipe = with_prompt_states(experiment).task.pipe
    assert pipe.stored_states.keys() == {"", "fox", "a snow fox"}
    expected = run_torch(model, ["fox", "a snow fox"])
    np.testing.assert_allclose(find_states(pipe, ["fox", "a snow fox"]), expected, rtol=2 * FP16, atol=2e-4)


def change_manifest(data, folder, change):
    shutil.copytree(data, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@each_row(
    ("changes", "t5", "message"),
    [
        ({"train_text_encoder": True}, {}, "config.train_text_encoder = True: {data} stores what T5 says"),
        (
            {},
            {"sha256": "0"},
            "{data}: t5.sha256 = '0': T5's stored states are of other weights than those in",
        ),
        ({}, {"length": 0}, "{data}/manifest.json: damaged manifest (t5: length = 0"),
        ({}, {"dtype": "float8"}, "{data}/manifest.json: damaged manifest (t5: dtype = 'float8' is not sup"),
    ],
)
def test_what_the_states_do_not_fit_is_refused(changes, t5, message, model, data, tmp_path):
    folder = change_manifest(data, tmp_path / "changed", lambda manifest: manifest["t5"].update(t5))
    config = make_config(model, folder, {"text.max_sequence_length": LENGTH, **changes})
    with pytest.raises(UserError, match=f"^{re.escape(message.format(data=folder))}[^\n]*$"):
        prepare(config)


def test_data_with_and_without_states_are_not_mixed(data, data_without):
    with pytest.raises(UserError, match=r"t5\.dtype = 'float32' and None: datasets of one run must agree"):
        read_datasets(f"{data},{data_without}")
    assert Dataset(data, shards.read_manifest(data)).without_states().caption_table is None


def test_a_file_of_states_that_was_cut_short_is_refused(data, tmp_path):
    folder = shutil.copytree(data, tmp_path / "data")
    file = next((folder / "captions").glob("states-*"))
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(UserError, match=f"^{re.escape(str(file))}: [^\n]* truncated or altered; delete"):
        read_datasets(folder)


def header(file, text):
    """Replaces the first word of a header, which NumPy reads as Python, without another length."""
    old = file.read_bytes()
    file.write_bytes(old[:10] + text.encode() + old[10 + len(text) :])


STATES, KEYS = "states-00001-of-00002.npy", "keys.npy"


@each_row(
    ("name", "damage", "message"),
    [
        (STATES, lambda file, array: file.unlink(), "no such file"),
        (STATES, lambda file, array: file.write_bytes(b""), "not a whole .npy file of numbers ("),
        (
            STATES,
            lambda file, array: file.write_bytes(bytes(file.stat().st_size)),
            "not a whole .npy file of numbers (",
        ),
        (
            STATES,
            lambda file, array: file.write_bytes(file.read_bytes()[:-1]),
            "not a whole .npy file of numbers (",
        ),
        (STATES, lambda file, array: header(file, "(((("), "not a whole .npy file of numbers ("),
        (STATES, lambda file, array: header(file, "\n\n,"), "not a whole .npy file of numbers ("),
        (
            STATES,
            lambda file, array: np.save(file, array.view(np.int16)),
            "damaged (int16 (44, 3, 2) in place",
        ),
        (STATES, lambda file, array: np.save(file, array.astype(">f2")), "damaged (>f2 (44, 3, 2) in place"),
        (STATES, lambda file, array: np.save(file, array[:-1]), "damaged (float16 (43, 3, 2) in place"),
        (STATES, lambda file, array: np.save(file, array[..., :1]), "damaged (float16 (44, 3, 1) in place"),
        (
            STATES,
            lambda file, array: np.save(file, array.swapaxes(1, 2)),
            "damaged (float16 (44, 2, 3) in pl",
        ),
        (
            STATES,
            lambda file, array: np.save(file, array.astype(object)),
            "not a whole .npy file of numbers (",
        ),
        (
            STATES,
            lambda file, array: np.save(file, array * np.float16(np.nan)),
            "damaged (states of the capt",
        ),
        (
            STATES,
            lambda file, array: np.save(file, array / np.float16(0)),
            "damaged (states of the caption '",
        ),
        (KEYS, lambda file, array: file.unlink(), "no such file"),
        (
            KEYS,
            lambda file, array: file.write_bytes(bytes(file.stat().st_size)),
            "not a whole .npy file of numbers (",
        ),
        (KEYS, lambda file, array: np.save(file, array[:0]), "damaged (no sums of SHA-256)"),
        (KEYS, lambda file, array: np.save(file, array.astype(np.int16)), "damaged (no sums of SHA-256)"),
        (KEYS, lambda file, array: np.save(file, array[:, :31]), "damaged (no sums of SHA-256)"),
        (KEYS, lambda file, array: np.save(file, array[::-1]), "damaged (sums of SHA-256 out of order)"),
    ],
)
def test_files_that_are_damaged_are_named(name, damage, message, tmp_path):
    captions = [f"caption {i}" for i in range(299)]
    files = CaptionFiles(tmp_path, captions, 3)
    for number in files.missing():
        files.write(number, np.ones((len(files.of_file(number)), 3, 2), np.float16))
    files.finish()
    file = tmp_path / "captions" / name
    with np.errstate(divide="ignore"):
        damage(file, np.load(file))
    message = f"^{re.escape(f'{file}: {message}')}[^\n]*; delete the dataset's folder and run[^\n]*$"
    with pytest.raises((FileNotFoundError, UserError), match=message):
        CaptionTable(tmp_path, 3).read(captions)


def test_states_that_are_not_finite_are_named_by_a_run_that_reads_them(data, tmp_path):
    """Not as a shard that cannot be read, and not by a loss of NaN."""
    folder = shutil.copytree(data, tmp_path / "data")
    (file,) = (folder / "captions").glob("states-*")
    np.save(file, np.load(file) * np.float16(np.nan))
    with pytest.raises(UserError, match=rf"^{re.escape(str(file))}: damaged \(states of the caption '"):
        read_batch(folder)


@pytest.mark.slow
def test_two_processes_of_one_run_wait_for_each_other(config, data, tmp_path):
    out = tmp_path / "data"
    flags = ["--config=configs/encode/folder.py", f"--config.model={config.model}", f"--out={out}"]
    flags += [f"--config.source.path={config.source.path}", "--config.source.validation_share=0.0"]
    flags += [f"--config.text.max_sequence_length={LENGTH}", "--config.num_workers=0"]
    assert finish(start("dspo_jax.encode", flags, out, processes=2)) == [0, 0], log_of(out, 0).read_text()
    ours, theirs = (read_batch(folder)["t5_states"] for folder in (out, data))
    np.testing.assert_allclose(ours, theirs, rtol=2 * FP16, atol=2e-4)  # one device each, and eight
