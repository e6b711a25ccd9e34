"""Collects people's preferences on a local web page, blind: which of two images is better, or in what order.

    python -m dspo_jax.collect --images eval/images/base --images eval/images/mine --out votes.sqlite
    python -m dspo_jax.collect export votes.sqlite --out data/judged
    python -m dspo_jax.encode --config configs/encode/folder.py --config.source.path=data/judged ...

The page shows a prompt with the images of two models, of one model's seeds, or of a pairs.jsonl, and takes
left, right, tie, skip and undo by mouse, touch and keys. Ctrl-C ends the server; the same command goes on.
"""

import socket
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from dspo_jax import cli
from dspo_jax.errors import UserError

_LOCAL = ("127.0.0.1", "localhost", "::1")
_SERVING = (
    *("questions", "rank", "scores", "checks", "check_share", "repeat_share", "votes_per_group"),
    *("seed", "host", "port"),
)
_EXPORTING = ("question", "preference", "ties", "min_checks", "who")


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    values, exports = flags.FLAGS, len(argv) > 1
    for name in _SERVING if exports else _EXPORTING:
        if values[name].present:
            what = "not an option of collect export" if exports else "an option of collect export alone"
            raise UserError(f"--{name}={values[name].value}: {what}")
    if exports:
        _export(Path(argv[2]), values)
    else:
        _serve(values)


def _export(votes: Path, values: flags.FlagValues) -> None:
    from dspo_jax.people.export import Aggregation, export
    from dspo_jax.people.votes import open_votes

    store, out = open_votes(votes), Path(values.out)
    question = values.question or next(iter(store.plan.questions))
    how = Aggregation(question, values.preference, values.ties, values.min_checks)
    try:
        moved_to = [Path(folder) for folder in values.images or ()]
        done = export(store, out, how, moved_to=moved_to, who=values.who, allow_outside=values.allow_outside)
    finally:
        store.close()
    print(
        f"{out}: {done.pairs:,} pairs, {done.labels:,} labels, {done.rankings:,} rankings by {question}; "
        f"{done.ties:,} pair(s) were even, {'kept' if values.ties else 'left out'}"
    )


def _serve(values: flags.FlagValues) -> None:
    from dspo_jax.locks import reserve
    from dspo_jax.people.disagreement import add_disagreement
    from dspo_jax.people.groups import read_checks, read_groups
    from dspo_jax.people.questions import read_questions
    from dspo_jax.people.votes import Plan, create

    try:
        from dspo_jax.people.server import make_app
        from dspo_jax.people.serving import listen, serve
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("dspo_jax"):
            raise
        raise UserError(f"{error.name} is not installed: pip install 'dspo_jax[people]'") from error

    if not values.images:
        raise UserError("--images is not set: name what people are to see, or collect export VOTES")
    plan = Plan(
        questions=read_questions(values.questions),
        seed=values.seed,
        repeat_share=values.repeat_share,
        check_share=values.check_share,
        votes_per_group=values.votes_per_group,
    )
    out = Path(values.out)
    with reserve(out):
        groups = read_groups(values.images, rank=values.rank, allow_outside=values.allow_outside)
        if values.scores is not None:
            groups = add_disagreement(groups, Path(values.scores))
        checks = read_checks(values.checks, allow_outside=values.allow_outside)
        with listen(values.host, values.port) as listener:
            store = create(out, plan, [*groups, *checks])
            token = None if values.host in _LOCAL else store.link_token
            # What listens to every address is reached by this machine's name.
            host = socket.gethostname() if values.host in ("0.0.0.0", "::") else values.host
            address = f"[{host}]" if ":" in host else host
            query = "" if token is None else f"?token={token}"
            print(
                f"{len(groups):,} groups of images, {len(checks):,} attention checks, "
                f"{len(store.votes()):,} votes so far"
            )
            print(f"http://{address}:{listener.getsockname()[1]}/{query} (Ctrl-C ends it)", flush=True)
            try:
                serve(make_app(store, token=token, allow_outside=values.allow_outside), listener)
            finally:
                print(f"{out}: {len(store.votes()):,} votes by {len(store.people()):,} people")
                store.close()


def run() -> None:
    """Defines the flags and runs the command."""
    flags.DEFINE_multi_string(
        "images",
        None,
        "DIR or NAME=DIR: what sample wrote, or a folder with metadata.jsonl or pairs.jsonl; may be "
        "repeated. Of export: where the images are now, if they were moved.",
    )
    flags.DEFINE_string(
        "out", None, "File of votes (SQLite), the same command goes on with it; of export, a new folder."
    )
    flags.DEFINE_list(
        "questions",
        ["general"],
        "general, appeal, alignment, or NAME=TEXT of your own (in double quotes if it has a comma), "
        "separated by commas; all are asked each time.",
    )
    flags.DEFINE_bool("rank", False, "All images of a prompt are put in order, in place of two compared.")
    flags.DEFINE_string(
        "scores", None, "scores.parquet of evaluate: what its rewards disagree on most is shown first."
    )
    flags.DEFINE_string("checks", None, "Folder whose pairs.jsonl has known answers: attention checks.")
    flags.DEFINE_float("check_share", 0.05, "Of what a person sees, the share of attention checks.")
    flags.DEFINE_float("repeat_share", 0.05, "Of what a person sees, the share that is shown a second time.")
    flags.DEFINE_integer("votes_per_group", 0, "People who judge each group of images; 0: everybody all.")
    flags.DEFINE_integer("seed", 0, "Random seed of order, sides, repetitions and checks.")
    flags.DEFINE_string(
        "host", "127.0.0.1", "Address to listen to; others than this machine need the link's token."
    )
    flags.DEFINE_integer("port", 8765, "Port to listen to; 0 is any.")
    flags.DEFINE_bool(
        "allow_outside", False, "Whether images may lie outside their folder, by a link or '..'."
    )
    flags.DEFINE_string("question", None, "Of export: the question whose votes count (default: the first).")
    flags.DEFINE_enum(
        "preference",
        "share",
        ("share", "majority", "reliability"),
        "Of export: a pair's preference is the winner's share of the votes, 1, or what a Bradley-Terry fit "
        "says that weighs people by their reliability.",
    )
    flags.DEFINE_bool("ties", False, "Of export: keep pairs that are even, with preference 0.5.")
    flags.DEFINE_float("min_checks", 0.0, "Of export: share of attention checks that a person must pass.")
    flags.DEFINE_bool("who", False, "Of export: votes.jsonl says who voted what and when.")
    cli.run(main, required=("out",), subcommand=("export", "VOTES"))


if __name__ == "__main__":
    run()
