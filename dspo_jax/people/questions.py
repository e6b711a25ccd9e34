"""Questions that people answer about two images: three ready ones, and the user's own."""

from collections.abc import Sequence

from dspo_jax import spelling
from dspo_jax.errors import UserError

QUESTIONS = {
    "general": "Which image do you prefer, given the prompt?",
    "appeal": "Which image is more visually appealing, whatever the prompt?",
    "alignment": "Which image fits the prompt better?",
}
"""The three questions of Diffusion-DPO's human evaluation (Wallace et al. 2024), in our words."""


def read_questions(texts: Sequence[str]) -> dict[str, str]:
    """Returns name -> question of names in `QUESTIONS` and of `NAME=TEXT`.

    Raises:
      UserError: a name that is unknown, no name for a file, or there twice.
    """
    questions: dict[str, str] = {}
    for text in texts:
        name, equals, asked = text.partition("=")
        if not equals:
            if name not in QUESTIONS:
                raise UserError(
                    f"{spelling.unknown('--questions', name, QUESTIONS)}; your own is NAME=TEXT, in double "
                    "quotes where TEXT has a comma"
                )
            asked = QUESTIONS[name]
        if not name.isidentifier() or not asked.strip():
            raise UserError(
                f"--questions={text}: a question of your own is NAME=TEXT, NAME of letters and digits"
            )
        if name in questions:
            raise UserError(f"--questions: {name} is there twice; rename or delete one")
        questions[name] = asked.strip()
    if not questions:
        raise UserError("--questions: none given; general is the usual one")
    return questions
