"""Reads what datasets store of the model that encoded them: its fingerprint, and arrays that condition it.

`Pipeline.fingerprint` and `Pipeline.make_conditioning` make them; to read them needs no JAX.
"""

from dspo_jax.images.resize import Crop
from dspo_jax.json_files import JsonObject

T5_KEY = "t5"
"""The key of a dataset's manifest that says what T5's stored states follow from."""
T5_STATES = "t5_states"
"""Name in a batch of T5's stored states [B, L, F] float16."""
T5_DTYPES = ("float32", "bfloat16")
"""Dtypes that the stored states can have been computed in."""
_OLD_CAPTION_LENGTH = 77


def comparable(*fingerprints: JsonObject) -> list[JsonObject]:
    """Returns models' fingerprints with the keys that can be compared, whichever version wrote them.

    Earlier versions wrote `tokenizer_sha256` alone, which is left out where all have `tokens_sha256`, no
    `caption_length`, which was always 77, no `max_chunks`, and no `shift_factor`, as no latents were shifted.
    """
    today = all("tokens_sha256" in fingerprint for fingerprint in fingerprints)
    unread = "tokenizer_sha256" if today else "tokens_sha256"
    return [
        {"caption_length": _OLD_CAPTION_LENGTH, "max_chunks": count_chunks(each), "shift_factor": 0.0}
        | {key: value for key, value in each.items() if key != unread}
        for each in fingerprints
    ]


def count_chunks(fingerprint: JsonObject) -> int:
    """Returns the chunks that a stored caption's tokens are divided in; earlier versions had one."""
    chunks: int = fingerprint.get("max_chunks", 1)
    return chunks


def read_crops(example: JsonObject) -> list[Crop]:
    """Returns what was kept of each image of a stored example.

    It stands where SDXL reads it, and is stored for every model.
    """
    return [Crop(*crop) for crop in example["micro_conditioning"].tolist()]


def count_tokens(example: JsonObject, chunks: int = 1) -> tuple[int, int]:
    """Counts a stored caption's tokens, start and end among them, and the places that there are for them.

    Of several chunks one start and one end are counted.
    """
    first = example["tokens"][0]
    first = first[first >= 0].reshape(chunks, -1)  # a longer row of another text encoder may be below
    # In CLIP's vocabulary the end token follows the start token, with which each chunk begins; only tokens
    # that were added to it have higher ids. Padding comes after the first end token.
    ends = (first == first[0, 0] + 1).argmax(axis=1)
    return int((ends - 1).sum()) + 2, first.size - 2 * (chunks - 1)
