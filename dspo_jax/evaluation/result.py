"""The result of an evaluation: scores of a base and of models, and the statistics computed from them."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from dspo_jax.evaluation.image_folders import Images
from dspo_jax.evaluation.prompt_sets import PromptSet
from dspo_jax.evaluation.win_rates import Rejection, WinRate, compare, reject

BASE = "base"
"""Label of the base among the images and scores."""


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """Scores of models and their base, with win rates.

    Attributes:
      prompts: what was drawn.
      seeds: of each prompt, from 0; the base may have more.
      images: by label, the base first.
      rewards: name -> version.
      scores: label -> reward -> [prompts, seeds], of the base with all seeds it has.
      win_rates: label of a model -> reward -> numbers.
      by_category: label of a model -> reward -> category -> numbers; without categories the last is empty.
      rejection: label of a model -> reward -> numbers; the last is empty unless the base has more seeds.
    """

    prompts: PromptSet
    seeds: int
    images: Mapping[str, Images]
    rewards: Mapping[str, str]
    scores: Mapping[str, Mapping[str, np.ndarray]]
    win_rates: Mapping[str, Mapping[str, WinRate]]
    by_category: Mapping[str, Mapping[str, Mapping[str, WinRate]]]
    rejection: Mapping[str, Mapping[str, Rejection]]

    @property
    def models(self) -> list[str]:
        """Labels of the models that are compared with the base."""
        return [label for label in self.images if label != BASE]


def count_categories(prompts: PromptSet) -> dict[str, int]:
    """Categories in the order of the prompts, with their numbers of prompts; empty if there are none."""
    counts: dict[str, int] = {}
    for prompt in prompts.prompts:
        counts[prompt.category] = counts.get(prompt.category, 0) + 1
    return counts if any(counts) else {}


def assess(
    prompts: PromptSet,
    images: Mapping[str, Images],
    rewards: Mapping[str, str],
    scores: Mapping[str, Mapping[str, np.ndarray]],
    seeds: int,
) -> Evaluation:
    """Compares every model with the base under every reward; arguments as the attributes of `Evaluation`."""
    base, win_rates, by_category, rejection = scores[BASE], {}, {}, {}
    categories = np.array([prompt.category for prompt in prompts.prompts])
    for label, of_model in scores.items():
        if label == BASE:
            continue
        win_rates[label] = {name: compare(of_model[name], base[name][:, :seeds]) for name in rewards}
        by_category[label] = {
            name: {
                category: compare(
                    of_model[name][categories == category], base[name][categories == category, :seeds]
                )
                for category in count_categories(prompts)
            }
            for name in rewards
        }
        rejection[label] = {
            name: reject(of_model[name], base[name]) for name in rewards if base[name].shape[1] > seeds
        }
    return Evaluation(prompts, seeds, images, rewards, scores, win_rates, by_category, rejection)
