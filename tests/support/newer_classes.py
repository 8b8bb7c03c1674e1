"""Which classes of the tests' models the installed transformers lacks: it writes and runs them."""

from __future__ import annotations

from functools import cache

from class_models import CLASSES
from decoder_models import DECODERS, WRAPPERS
from own_loader_models import OWN_LOADERS
from stacked_models import STACKED
from tiny_models import FAMILIES


@cache
def is_lacking(name: str) -> bool:
    """Whether a class of a test's model needs a newer transformers than the installed one."""
    import transformers

    if name in OWN_LOADERS:
        return not hasattr(transformers, OWN_LOADERS[name][0])
    types = {name: [kind] for name, (kind, _) in {**CLASSES, **DECODERS}.items()}
    types |= {name: [*types[name], kind] for name, (kind, _) in WRAPPERS.items()}
    types |= {name: [row.model_type, *filter(None, [row.outer])] for name, row in STACKED.items()}
    return any(map(lacks_type, types.get(name, ())))


def lacks_family(name: str) -> bool:
    """Whether transformers can't run a class whose tiny models are written without it."""
    return name in FAMILIES and lacks_type(FAMILIES[name]["model_type"])


def lacks_type(model_type: str) -> bool:
    """Whether the installed transformers lacks a model type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return model_type not in CONFIG_MAPPING_NAMES
