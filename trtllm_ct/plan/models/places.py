"""The places that a text model may have in a checkpoint: the prefix of its body and the name of its head.

Writers and releases of transformers have used each of them.
"""

from __future__ import annotations

__all__ = ["PLACES", "known_prefixes", "name_variants"]

PLACES = (
    ("model.", "lm_head"),
    ("language_model.model.", "language_model.lm_head"),
    ("model.language_model.", "lm_head"),
    ("model.language_model.model.", "model.language_model.lm_head"),
)
"""A checkpoint has the first place for which the embedding, the first layer or the last norm is stored."""


def known_prefixes() -> tuple[str, ...]:
    """Return the prefixes that the names of the text model's body may have."""
    return tuple(body for body, _ in PLACES)


def name_variants(name: str) -> tuple[str, ...]:
    """Return a module's name, followed by the names that it has if the text model is in another place.

    transformers 4.52 moved text models, so targets and `ignore` may name `language_model.model.layers` where the files
    have `model.language_model.layers`. Some wrappers put the Linear into a child called `linear`.
    """
    variants = [name]
    for this_body, this_head in PLACES:
        if name == this_head or name.startswith(this_body):
            for body, head in PLACES:
                variants.append(head if name == this_head else body + name.removeprefix(this_body))
    return tuple(dict.fromkeys([*variants, *(f"{variant}.linear" for variant in variants)]))
