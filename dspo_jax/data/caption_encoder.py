"""Captions to T5's states, over all devices of a process, and into the files of a dataset."""

import time
from collections.abc import Callable, Sequence
from functools import partial

import jax
import numpy as np
from jaxtyping import Float16

from dspo_jax.data.caption_states import CaptionFiles
from dspo_jax.data.row_progress import SECONDS_BETWEEN_LOOKS
from dspo_jax.errors import UserError
from dspo_jax.kernels.device_kind import on_mesh
from dspo_jax.monitoring.progress import Progress
from dspo_jax.parallel import processes
from dspo_jax.parallel.mesh import batch_sharding, make_mesh, replicated
from dspo_jax.pipelines.pipeline import Pipeline


class CaptionEncoder:
    """A model's T5 on all devices of this process; they are free again when this is dropped."""

    def __init__(self, pipe: Pipeline, dtype: str, batch_size: int = 16):
        """Reads T5's weights.

        Args:
          pipe: a model that has a T5.
          dtype: of the weights and products, "float32" or "bfloat16"; sums of layers are float32.
          batch_size: captions in one call.
        """
        assert pipe.stored_encoder is not None
        self._pipe, self._name = pipe, pipe.stored_encoder
        devices = jax.local_devices()
        self._size = batch_size + -batch_size % len(devices)
        mesh = make_mesh({"data": len(devices)}, devices)
        whole, self._split = replicated(mesh), batch_sharding(mesh)
        self._params = jax.device_put(pipe.read_params(self._name, dtype), whole)
        self._run = jax.jit(
            on_mesh(pipe.networks[self._name].apply, mesh),
            in_shardings=(whole, self._split),
            out_shardings=self._split,
        )

    def __call__(
        self, captions: Sequence[str], report: Callable[[int], None] = lambda done: None
    ) -> Float16[np.ndarray, "N L F"]:
        """Returns the states of N captions; `report` is told how many are done.

        Raises:
          UserError: a state is not finite in float16.
        """
        tokenizer = self._pipe.t5_tokenizer
        assert tokenizer is not None
        parts = []
        for start in range(0, len(captions), self._size):
            part = captions[start : start + self._size]
            ids = tokenizer([*part, *[""] * (self._size - len(part))])
            states = np.asarray(self._run(self._params, jax.device_put(ids, self._split)), np.float32)
            with np.errstate(over="ignore"):
                rounded = states[: len(part)].astype(np.float16)
            for caption, of_caption, exact in zip(part, rounded, states, strict=False):
                if not np.isfinite(of_caption).all():
                    raise UserError(
                        f"{self._pipe.path / self._name}: states of the caption {caption!r:.200} are not "
                        f"finite in float16 (largest magnitude {np.abs(exact).max():g}); set "
                        "--config.text.t5_dtype=float32, or --config.text.store_t5=False"
                    )
            parts.append(rounded)
            report(start + len(part))
        return np.concatenate(parts)


def store_captions(
    pipe: Pipeline, files: CaptionFiles, dtype: str, batch_size: int, share: tuple[int, int] | None
) -> None:
    """Writes the states of a dataset's captions, but for those that are there.

    Args:
      pipe: a model that has a T5, which is read if there is anything to do.
      files: of the dataset.
      dtype, batch_size: see `CaptionEncoder`.
      share: (i, n): this process writes all that is missing, from the i-th of n parts on, as no other may.
        None: the processes of this run write a part each, and wait for one another.
    """
    index, count = share or (jax.process_index(), jax.process_count())
    total, encoder = len(files.captions), None
    with Progress(
        "T5", total, _count_done(files), first="compiling", active=processes.is_first()
    ) as progress:
        missing = files.missing()
        mine = sorted(missing, key=lambda number: (number - index) % count)
        for number in mine if share else [each for each in missing if each % count == index]:
            if number not in files.missing():  # another share was faster
                continue
            encoder = encoder or CaptionEncoder(pipe, dtype, batch_size)
            report = partial(_report, progress, _count_done(files))
            files.write(number, encoder(files.of_file(number), report))
        while files.missing():
            time.sleep(SECONDS_BETWEEN_LOOKS)
            progress.update(_count_done(files))
        progress.update(total)


def _report(progress: Progress, before: int, done: int) -> None:
    progress.update(before + done)


def _count_done(files: CaptionFiles) -> int:
    missing = sum(len(files.of_file(number)) for number in files.missing())
    return len(files.captions) - missing
