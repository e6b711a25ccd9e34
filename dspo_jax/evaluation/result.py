"""The result of an evaluation: scores of a base and of models, and the statistics computed from them."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from dspo_jax.evaluation.image_folders import Images
from dspo_jax.evaluation.people import PeopleAnswers, PeopleWinRate, Votes, assess_votes
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
      people: question -> what people answered; empty without votes.
    """

    prompts: PromptSet
    seeds: int
    images: Mapping[str, Images]
    rewards: Mapping[str, str]
    scores: Mapping[str, Mapping[str, np.ndarray]]
    win_rates: Mapping[str, Mapping[str, WinRate]]
    by_category: Mapping[str, Mapping[str, Mapping[str, WinRate]]]
    rejection: Mapping[str, Mapping[str, Rejection]]
    people: Mapping[str, PeopleAnswers] = dataclasses.field(default_factory=dict)

    @property
    def models(self) -> list[str]:
        """Labels of the models that are compared with the base."""
        return [label for label in self.images if label != BASE]

    @property
    def judges(self) -> list[str]:
        """Columns of the win rates: the rewards, then people by question."""
        return [*self.rewards, *(f"people: {question}" for question in self.people)]

    def judged(self, label: str) -> dict[str, WinRate | PeopleWinRate]:
        """Returns the win rates of a model by `judges`, without questions that nobody answered about it."""
        return {
            **self.win_rates[label],
            **{
                f"people: {question}": answers.win_rates[label]
                for question, answers in self.people.items()
                if label in answers.win_rates
            },
        }


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
    votes: Mapping[str, Votes] | None = None,
) -> Evaluation:
    """Compares every model with the base under every reward, and by people's votes where there are any.

    Arguments as the attributes of `Evaluation`; votes by question.

    Raises:
      UserError: the votes are on other images.
    """
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
    people = assess_votes(votes, prompts, images, scores, BASE) if votes else {}
    return Evaluation(prompts, seeds, images, rewards, scores, win_rates, by_category, rejection, people)
