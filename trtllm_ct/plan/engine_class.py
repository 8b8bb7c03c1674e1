"""Says whether the engine that a plan is for has the class of the model.

Modes, names and tensors may be right in every detail: without the class the engine can't load a directory.
Source: TensorRT-LLM `_torch/models/modeling_auto.py: AutoModelForCausalLM.from_config`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.base.errors import Fault, FaultCollector, PlanError, UnreadClassError
from trtllm_ct.engine.model_classes import first_release, has_class

if TYPE_CHECKING:
    from collections.abc import Iterable

    from trtllm_ct.engine.releases import Release
    from trtllm_ct.engine.target import Target
    from trtllm_ct.plan.models.sites import Model

__all__ = ["class_problems", "lacks_class", "refuse_misread", "refuse_unread", "refuse_unread_names"]

_ARCHITECTURES = "config.json: architectures"

_UNREAD_HEAD = Fault(
    where="config.json: tie_word_embeddings",
    expected="a head that is tied to the embeddings: the engine's class never loads another one",
    found="a head of its own",
    remedy="Convert with --to dense for another program; set tie_word_embeddings if the head equals the embeddings.",
)


def class_problems(model: Model, release: Release | None) -> tuple[Fault, ...]:
    """Return the fault of a release without the class of a model, or of a model that its class can't load completely.

    `release` is None for a target that no engine with model classes reads.
    """
    architecture = model.name
    if release is None:
        return ()
    if has_class(release, architecture):
        head = (_UNREAD_HEAD,) if model.row.head_unread and not model.tied else ()
        return (*head, *_layers_without_experts(model))
    later = first_release(architecture)
    found = f"{architecture}, which {later.name} has first" if later else f"{architecture}, which no release line has"
    dense = "convert with --to dense for a program that has the class"
    remedy = (
        f"Choose --engine {later.name} if you run that release, or {dense}."
        if later
        else f"{dense.capitalize()}; only a TensorRT-LLM to which you added the class could load the result."
    )
    fault = Fault(
        where=_ARCHITECTURES,
        expected=f"a model class of the PyTorch backend of {release.name}",
        found=found,
        remedy=remedy,
    )
    return (fault,)


def _layers_without_experts(model: Model) -> tuple[Fault, ...]:
    """Return the fault of layers for which the class looks for routed experts and the files have an MLP."""
    if not model.row.all_mixtures:
        return ()
    body = f"{model.place(())[0]}layers."
    mixtures = {
        site.module.removeprefix(body).partition(".")[0] for site in model.sites(model.place(())) if site.expert
    }
    dense = [str(layer) for layer in range(model.layers) if str(layer) not in mixtures]
    fault = Fault(
        where="config.json: mlp_only_layers, decoder_sparse_step",
        expected=f"routed experts in every layer, as {model.name} of the engine builds them",
        found=f"layers without them: {', '.join(dense)}",
        remedy="Convert with --to dense for a program that reads these keys; or fetch the experts of these layers from "
        "where the checkpoint was published, if config.json has none of the keys.",
    )
    return (fault,) if dense else ()


def lacks_class(problems: Iterable[Fault]) -> bool:
    """Whether one of the problems of a plan is that the engine lacks the class of the model."""
    return any(fault.where == _ARCHITECTURES for fault in problems)


def refuse_misread(problems: Iterable[Fault]) -> None:
    """Raise `PlanError` for the problems of a plan with which an engine that has the class would load another model.

    Whether it has the class, the engine itself knows: users may add one to it.
    """
    FaultCollector([fault for fault in problems if fault.where != _ARCHITECTURES]).raise_if_any(PlanError)


def refuse_unread(model: Model, target: Target) -> None:
    """Raise `UnreadClassError` for a target of the engine if no row says how its class reads the model.

    What the class fuses, splits or reads plain is then unknown, so a mode of any module would be a guess.
    """
    release = target.capabilities.release
    if release is None or model.has_row:
        return
    first = first_release(model.name)
    known = f"; {first.name} has the class" if first else "; no release line has the class"
    raise UnreadClassError(
        Fault(
            where=_ARCHITECTURES,
            expected=f"a class whose reading of names is known, for target {target.name}",
            found=f"{model.name}{known}",
            remedy="Convert with --to dense: that works for every architecture. If config.json is another model's, "
            "take it from where the weights were published.",
        )
    )


def refuse_unread_names(model: Model, target: Target) -> None:
    """Raise `UnreadClassError` if the files call the layers otherwise than the engine's class, which finds no others.

    Nothing else is then said of its reading: the embeddings would be looked for under its names too.
    """
    if target.capabilities.release is None or model.discovery is None or model.row.body is None:
        return
    stored, read = model.discovery.place[0], model.row.body
    if stored != read:
        raise UnreadClassError(
            Fault(
                where="names of the tensors",
                expected=f"{read}layers., which is where {model.name} of the engine looks for layers",
                found=f"{stored}layers.",
                remedy="Convert with --to dense, which keeps the names; or quantize the weights under the names that "
                "the model was published with.",
            )
        )
