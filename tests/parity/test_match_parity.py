"""Matching selects the same modules as the compressed-tensors library, for a pool of names, classes and entries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from installed_library import attach_schemes

from trtllm_ct.base.schemes import QuantScheme
from trtllm_ct.config.match import Matcher, matches
from trtllm_ct.config.quantization_config import ConfigGroup, QuantizationConfig
from trtllm_ct.config.reader import CompressedTensorsConfigReader

if TYPE_CHECKING:
    from types import ModuleType

pytestmark = pytest.mark.library

LINEARS = (
    "lm_head",
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.o_proj",
    "model.layers.10.self_attn.q_proj",
    "model.layers.0.mlp.gate",
    "model.layers.0.mlp.gate_proj",
    "model.layers.0.mlp.experts.0.down_proj",
    "model.layers.0.mlp.experts.10.down_proj",
    "model.vision_tower.blocks.0.attn.qkv.linear",
)
ENTRIES = (
    "Linear",
    "Embedding",
    "Module",
    "LayerNorm",
    "MyLinear",
    "lm_head",
    "mlp",
    "model.layers.0",
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.q_proj.weight",
    "q_proj",
    "re:",
    "re:Linear",
    "re:lm_head",
    "re:gate",
    "re:model",
    "re:model.layers.1",
    r"re:model\.layers\.1\.",
    "re:.*gate",
    "re:.*gate$",
    "re:.*proj",
    "re:.*q_proj",
    "re:.*self_attn.*proj$",
    r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
    r"re:.*experts\.\d\.",
    "re:(?i).*QKV",
    "re:^model.layers.[0-9]+.mlp",
    "re:.*|nothing",
)
POOL = st.lists(st.sampled_from(ENTRIES), max_size=4)


@pytest.fixture(scope="module")
def library() -> ModuleType:
    from compressed_tensors.utils import match

    return match


@pytest.fixture(scope="module")
def model():
    """A model of nested modules with the names above: one Linear of a subclass, an embedding and a norm."""
    import torch

    class MyLinear(torch.nn.Linear):
        pass

    root = torch.nn.Module()

    def place(name: str, leaf: torch.nn.Module) -> None:
        parent = root
        *path, last = name.split(".")
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, torch.nn.Module())
            parent = getattr(parent, part)
        parent.add_module(last, leaf)

    for name in LINEARS:
        place(name, (MyLinear if name.endswith("linear") else torch.nn.Linear)(16, 16, device="meta"))
    place("model.embed_tokens", torch.nn.Embedding(8, 4, device="meta"))
    place("model.norm", torch.nn.LayerNorm(4, device="meta"))
    return root


def class_names(module: object) -> tuple[str, ...]:
    return tuple(base.__name__ for base in type(module).__mro__)


def group(name: str, targets: list[str]) -> ConfigGroup:
    return ConfigGroup(name=name, targets=tuple(targets), scheme=QuantScheme())


@pytest.mark.parametrize("entry", ENTRIES)
def test_one_entry_means_the_same_modules(library, model, entry):
    for name, module in model.named_modules():
        assert matches(name, entry, class_names(module)) == library.is_match(name, module, entry), name


@settings(max_examples=60, deadline=None)
@given(targets=POOL, ignore=POOL)
def test_targets_and_ignore_select_the_same_modules(library, model, targets, ignore):
    matcher = Matcher(QuantizationConfig(groups=(group("one", targets),), ignore=tuple(ignore)))
    selected = [
        name for name, module in model.named_modules() if matcher.scheme_for(name, class_names(module)) is not None
    ]
    assert selected == [name for name, _ in library.match_named_modules(model, targets, ignore)]
    without_ignored = Matcher(QuantizationConfig(groups=(group("all", ["re:"]),), ignore=tuple(ignore)))
    ignored = [
        name for name, module in model.named_modules() if without_ignored.scheme_for(name, class_names(module)) is None
    ]
    assert ignored == [name for name, module in model.named_modules() if library.is_match(name, module, ignore)]


@settings(max_examples=60, deadline=None)
@given(st.lists(POOL, max_size=3))
def test_the_same_target_decides(library, model, target_lists):
    """The library takes the first target of `match_targets`; a target of several groups belongs to the last group."""
    groups = tuple(group(str(index), targets) for index, targets in enumerate(target_lists))
    matcher = Matcher(QuantizationConfig(groups=groups))
    owner = {target: group.name for group in groups for target in group.targets}
    for name, module in model.named_modules():
        decisive = library.match_targets(name, module, list(owner))
        chosen = matcher.scheme_for(name, class_names(module))
        assert (chosen.name if chosen else None) == (owner[decisive[0]] if decisive else None), name


@pytest.mark.parametrize(
    ("targets", "ignore"),
    [
        ([["Linear"], ["re:.*self_attn.*proj$"]], ["lm_head", "re:.*gate$"]),
        ([["re:.*q_proj"], ["re:.*proj"]], []),
        ([["re:.*proj"], ["re:.*q_proj"]], []),
        pytest.param(
            [["model.layers.0.self_attn.q_proj"], ["re:.*"], ["Linear"]],
            ["model.layers.0.mlp.gate"],
            marks=pytest.mark.newest_library,  # older releases refuse the modules that are no layers, such as an MLP
        ),
        ([["Linear"], ["Linear"]], []),
        ([["Linear", "Embedding"], ["MyLinear"]], ["Linear"]),
        ([["MyLinear"], ["Linear"]], None),
    ],
)
def test_whole_configs_apply_the_same_schemes(model, targets, ignore):
    """Compared with `apply_quantization_config` on a copy of the model; their widths distinguish the groups."""
    import copy

    from compressed_tensors.quantization import QuantizationConfig as LibraryConfig

    block = {
        "config_groups": {
            f"group_{bits}": {"targets": names, "weights": {"num_bits": bits, "group_size": -1}}
            for bits, names in enumerate(targets, start=2)
        },
        "ignore": ignore,
        "quantization_status": "compressed",
    }
    matcher = Matcher(CompressedTensorsConfigReader().read(block))
    theirs = copy.deepcopy(model)
    attach_schemes(theirs, LibraryConfig.model_validate(block))
    for name, module in theirs.named_modules():
        if not {"Linear", "Embedding"} & set(class_names(module)):
            continue
        scheme = getattr(module, "quantization_scheme", None)
        chosen = matcher.scheme_for(name, class_names(module))
        assert (chosen and chosen.scheme.weights.num_bits) == (scheme and scheme.weights.num_bits), name
