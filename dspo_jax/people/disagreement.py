"""Disagreement of rewards on the images of a group, so that people can judge the most disputed first."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float64

from dspo_jax.errors import UserError
from dspo_jax.people.groups import Group

_FIX = "name the scores.parquet that evaluate wrote with two --rewards or more"
_NOT_REWARDS = ("model", "prompt_index", "seed", "prompt", "category", "file")


def add_disagreement(groups: Sequence[Group], scores: Path) -> list[Group]:
    """Returns the groups with the disagreement of the rewards that `evaluate` scored their images with.

    Raises:
      FileNotFoundError: no such file.
      UserError: it is something else, has fewer than two rewards, or lacks an image.
    """
    of_image = _read_scores(scores)
    stacked = []
    for group in groups:
        paths = [(Path(image.folder) / image.file).resolve() for image in group.images]
        if absent := [path for path in paths if path not in of_image]:
            raise UserError(f"--scores={scores}: has no scores of {absent[0]}; {_FIX} on these images")
        stacked.append(np.array([of_image[path] for path in paths]))
    return [
        dataclasses.replace(group, disagreement=value)
        for group, value in zip(groups, measure_disagreement(stacked), strict=True)
    ]


def measure_disagreement(scores: Sequence[Float64[np.ndarray, "images rewards"]]) -> list[float]:
    """Returns for each group the standard deviation over rewards of how much better one image is.

    Differences of a reward are divided by their root mean square over all pairs of images, so that rewards
    of any scale count alike; of more than two images the pair of most disagreement counts.

    Args:
      scores: of each group's images by each reward.
    """
    pairs = [
        np.array([each[i] - each[j] for i, j in itertools.combinations(range(len(each)), 2)])
        for each in scores
    ]
    scale = np.sqrt(np.mean(np.concatenate(pairs) ** 2, axis=0))
    scale[scale == 0] = 1.0  # a reward that finds all images equal
    return [float((each / scale).std(axis=1).max()) for each in pairs]


def _read_scores(path: Path) -> dict[Path, list[float]]:
    if not path.is_file():
        raise FileNotFoundError(f"--scores={path}: no such file; {_FIX}")
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"--scores={path}: not parquet; {_FIX}") from error
    rewards = [name for name in table.column_names if name not in _NOT_REWARDS]
    if "file" not in table.column_names or len(rewards) < 2:
        raise UserError(f"--scores={path}: has scores by {', '.join(rewards) or 'no reward'}; {_FIX}")
    files = table.column("file").to_pylist()
    columns = [table.column(name).to_pylist() for name in rewards]
    return {
        (path.parent / file).resolve(): list(values) for file, *values in zip(files, *columns, strict=True)
    }
