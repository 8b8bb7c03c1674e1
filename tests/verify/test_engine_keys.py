"""`verify DIR OUT` knows every key of an engine-build checkpoint: all others, and all other values, are faults."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from builders import rewrite_config, write_checkpoint
from installed_transformers import has_newest_transformers, typed_config
from tiny_models import tiny_config

from trtllm_ct.base.errors import CatalogError
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.engine.parallel import Parallel
from trtllm_ct.verify.engine_classes import class_of
from trtllm_ct.verify.verify import verify_checkpoint

if TYPE_CHECKING:
    from trtllm_ct.base.errors import Fault

SIZES = {"hidden": 256, "heads": 4, "kv_heads": 2, "intermediate": 512, "vocabulary": 97, "layers": 1}
TWO = Parallel(tensor=2)
LINEARS = [f"{letter}_proj" for letter in ("q", "k", "v", "o", "gate", "up", "down")]
MIXED = dict.fromkeys(LINEARS[:4], "fp8-tensor-static") | dict.fromkeys(LINEARS[4:], "int4-g64")
SOURCES: dict[str, tuple[str, Any]] = {
    "llama": ("LlamaForCausalLM", "int4-g64"),
    "row-wise": ("LlamaForCausalLM", "fp8-channel-token"),
    "fp8": ("LlamaForCausalLM", "fp8-tensor-static"),
    "int8": ("LlamaForCausalLM", "int8-channel"),
    "plain o_proj": ("LlamaForCausalLM", dict.fromkeys(LINEARS[:3] + LINEARS[4:], "int8-channel")),
    "mistral": ("MistralForCausalLM", "dense"),
    "mixtral": ("MixtralForCausalLM", "dense"),
    "qwen2": ("Qwen2ForCausalLM", "int4-g64"),
    "qwen3": ("Qwen3ForCausalLM", "int4-g64"),
    "kernel order": ("LlamaForCausalLM", "int4-g64"),
    "mixed": ("LlamaForCausalLM", MIXED),
}
MISSING = object()


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of a source and its directory by name; they are made when a test asks for them."""

    class Folders(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            self[name] = folder = tmp_path_factory.mktemp("kept")
            architecture, scheme = SOURCES[name]
            config = tiny_config(architecture, **SIZES)
            kv = name in {"fp8", "mixed"}
            built = write_checkpoint(folder / "in", scheme=scheme, config=config, kv=kv)
            sm = 90 if name == "kernel order" else None
            convert_checkpoint(
                built.directory, folder / "out", to="engine", parallel=TWO, sm=sm, untested=sm is not None
            )
            assert verify_checkpoint(folder / "in", folder / "out").good
            return folder

    return Folders()


def changed(
    kept: dict[str, Path], name: str, key: str, value: object, tmp_path: Path, file: str = "config.json"
) -> tuple[Fault, ...]:
    """The faults of a directory with one other value; `key` may name one in a block, as `mapping/tp_size`."""
    shutil.copytree(kept[name], tmp_path, dirs_exist_ok=True)
    path = tmp_path / "out" / file
    document = json.loads(path.read_text())
    *blocks, inner = key.split("/")
    holder = document
    for block in blocks:
        holder = holder[block]
    holder[inner] = value
    if value is MISSING:
        del holder[inner]
    path.write_text(json.dumps(document))
    return verify_checkpoint(tmp_path / "in", tmp_path / "out").faults


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("llama", "use_parallel_embedding", True),
        ("llama", "use_parallel_embedding", 0),
        ("llama", "embedding_sharding_dim", 1),
        ("llama", "embedding_sharding_dim", False),
        ("llama", "disable_weight_only_quant_plugin", True),
        ("int8", "disable_weight_only_quant_plugin", False),
        ("llama", "tie_word_embeddings", True),
        ("llama", "tie_word_embeddings", None),
        ("llama", "vocab_size", 97.0),
        ("llama", "num_key_value_heads", 4),
        ("llama", "hidden_act", "swiglu"),
        ("llama", "hidden_act", ["silu"]),
        ("llama", "architecture", ["LlamaForCausalLM"]),
        ("llama", "rotary_scaling", [1]),
        ("llama", "rotary_scaling", {"type": "default"}),
        ("llama", "rotary_scaling", {}),
        ("llama", "rotary_base", MISSING),
        ("mixtral", "hidden_act", "silu"),
        ("mixtral", "moe/top_k", 1),
        ("mixtral", "moe/normalization_mode", 0),
        ("mixtral", "moe/sparse_mixer_epsilon", 1.0),
        ("mixtral", "mapping/moe_tp_size", 1),
        ("mixtral", "mapping/moe_ep_size", 2),
        ("llama", "mapping/moe_tp_size", 2),
        ("qwen3", "qwen_type", "qwen2"),
        ("qwen2", "qwen_type", "qwen3"),
        ("qwen3", "qwen_type", MISSING),
        ("qwen2", "use_logn_attn", True),
        ("qwen2", "seq_length", 16),
        ("qwen2", "seq_length", MISSING),
        ("qwen2", "mlp_only_layers", [0]),
        ("qwen3", "moe_intermediate_size", 1),
        ("qwen3", "num_labels", True),
        ("llama", "quantization/has_zero_point", MISSING),
        ("row-wise", "quantization/group_size", 64),
        ("row-wise", "quantization/has_zero_point", True),
        ("row-wise", "quantization/pre_quant_scale", True),
        ("kernel order", "quantization/pre_quant_scale", True),
    ],
)
def test_another_value_of_a_key(name: str, key: str, value: object, kept: dict[str, Path], tmp_path: Path) -> None:
    if value is MISSING and key.startswith("quantization/"):
        with pytest.raises(CatalogError, match=key.rpartition("/")[2]):
            changed(kept, name, key, value, tmp_path)
        return
    faults = changed(kept, name, key, value, tmp_path)

    assert any(key.replace("/", ".").split(".")[0] in fault.where for fault in faults), faults


@pytest.mark.parametrize("block", ["", "quantization/", "mapping/"])
@pytest.mark.parametrize(
    "key",
    ["made_up", "attention_multiplier", "embedding_multiplier", "residual_multiplier", "output_multiplier_scale",
     "residual_mlp", "rotary_pct", "rotary_embedding_dim", "qk_layernorm", "runtime_defaults", "is_pruned",
     "qwen_type", "moe", "rank", "cp_size", "attn_tp_size", "clamp_val", "use_meta_recipe", "smoothquant_val"],
)  # fmt: skip
def test_a_key_that_no_such_directory_has(block: str, key: str, kept: dict[str, Path], tmp_path: Path) -> None:
    if not block and key == "moe":
        with pytest.raises(CatalogError, match="num_experts"):
            changed(kept, "row-wise", key, None, tmp_path)
        return
    (fault,) = changed(kept, "row-wise", block + key, None, tmp_path)

    assert fault.where.endswith(f"config.json: {block.replace('/', '.')}{key}")
    assert fault.expected.startswith("no such key")


ALWAYS = ["lm_head", "*router", "transformer.vocab_embedding"]
PLAIN = "transformer.layers.0.attention.dense"


@pytest.mark.parametrize(
    ("name", "patterns"),
    [
        ("row-wise", [*ALWAYS, "*attention"]),
        ("row-wise", [*ALWAYS, "*input_layernorm"]),
        ("row-wise", [*ALWAYS, "transformer.layers.0*"]),
        ("int8", [*ALWAYS, "*mlp.fc"]),
        ("int8", [*ALWAYS, "transformer.layers.?.mlp.fc"]),
        ("int8", []),
        ("mixtral", ALWAYS),
        ("plain o_proj", None),
        ("plain o_proj", ALWAYS),
        ("plain o_proj", [*ALWAYS, PLAIN]),
        ("plain o_proj", [*ALWAYS, "*dense*"]),
        ("plain o_proj", [*ALWAYS[1:], f"{PLAIN}*"]),
        ("plain o_proj", [*ALWAYS[:2], f"{PLAIN}*"]),
    ],
)
def test_a_list_of_plain_modules_that_its_readers_take_for_another(
    name: str, patterns: list[str] | None, kept: dict[str, Path], tmp_path: Path
) -> None:
    assert changed(kept, name, "quantization/exclude_modules", patterns, tmp_path)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("llama", "quantization/exclude_modules", 5),
        ("llama", "quantization/exclude_modules", [5]),
        ("llama", "quantization/exclude_modules", "lm_head"),
        ("llama", "quantization/kv_cache_quant_algo", ["FP8"]),
        ("llama", "quantization/kv_cache_quant_algo", "NVFP4"),
        ("llama", "quantization/kv_cache_quant_algo", MISSING),
        ("kernel order", "producer", 3),
        ("kernel order", "producer", None),
        ("kernel order", "producer", MISSING),
        ("kernel order", "producer/sm", True),
        ("kernel order", "producer/sm", -5),
        ("kernel order", "producer/sm", 120),
        ("kernel order", "producer/sm", [90]),
        ("llama", "moe", 3),
    ],
)
def test_a_value_without_which_nothing_can_be_read(
    name: str, key: str, value: object, kept: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(CatalogError, match=key.replace("/", r"\.") if key != "producer" else r"producer\.sm"):
        changed(kept, name, key, value, tmp_path)


VALUES = [MISSING, None, True, "x", [1], {"x": 1}]


@pytest.mark.parametrize("name", ["mixtral", "mixed"])
def test_every_value_of_another_kind_is_a_fault_and_no_crash(name: str, kept: dict[str, Path], tmp_path: Path) -> None:
    """Or an error of ours; only what made the files may say anything, since engines ignore it."""
    shutil.copytree(kept[name], tmp_path, dirs_exist_ok=True)
    for path in [path for path in (tmp_path / "out").glob("*.json") if not path.name.startswith(".")]:
        text = path.read_text()
        stated = json.loads(text)
        keys = [
            *stated,
            *(f"{key}/{inner}" for key, block in stated.items() if isinstance(block, dict) for inner in block),
        ]
        for key, value in ((key, value) for key in keys if "producer" not in key for value in VALUES):
            document = json.loads(text)
            block, _, inner = key.rpartition("/")
            holder = document[block] if block else document
            if isinstance(value, bool | None) and holder[inner] is value:
                continue
            holder[inner] = value
            if value is MISSING:
                del holder[inner]
            path.write_text(json.dumps(document))
            with suppress(CatalogError):
                assert verify_checkpoint(tmp_path / "in", tmp_path / "out").faults, (key, value)
        path.write_text(text)


class TestModesOfLinears:
    """quant_cfg.json replaces the block of config.json, and compares its keys as patterns, in their order."""

    LAYER = "transformer.layers.0.mlp.fc"

    def test_it_decides_about_the_cache(self, kept: dict[str, Path], tmp_path: Path) -> None:
        for value in (None, "INT8"):
            faults = changed(kept, "mixed", "kv_cache_quant_algo", value, tmp_path / str(value), "quant_cfg.json")
            assert any("kv_cache_quant_algo" in fault.where for fault in faults)
        with pytest.raises(CatalogError, match=r"quant_cfg\.json: kv_cache_quant_algo"):
            changed(kept, "mixed", "kv_cache_quant_algo", MISSING, tmp_path / "missing", "quant_cfg.json")

    def test_both_files_say_the_same_of_it(self, kept: dict[str, Path], tmp_path: Path) -> None:
        (fault,) = changed(kept, "mixed", "quantization/kv_cache_quant_algo", None, tmp_path)

        assert fault.where.endswith("config.json: quantization.kv_cache_quant_algo")

    @pytest.mark.parametrize("pattern", ["transformer.layers.0.*", "*", "transformer.layers.1.mlp.fc", "lm_head"])
    def test_a_name_that_is_no_linear(self, pattern: str, kept: dict[str, Path], tmp_path: Path) -> None:
        layers = json.loads((kept["mixed"] / "out" / "quant_cfg.json").read_text())["quantized_layers"]
        more = {pattern: layers[self.LAYER], **layers}

        (fault,) = changed(kept, "mixed", "quantized_layers", more, tmp_path, "quant_cfg.json")

        assert fault.where.endswith(f"quant_cfg.json: {pattern}")

    @pytest.mark.parametrize(
        ("key", "value"),
        [("quant_algo", "FP8"), ("quant_algo", MISSING), ("made_up", 1), (f"quantized_layers/{LAYER}/made_up", 1),
         (f"quantized_layers/{LAYER}/exclude_modules", None),
         ("quantized_layers/transformer.layers.0.attention.qkv/group_size", 64)],
    )  # fmt: skip
    def test_another_value_or_key(self, key: str, value: object, kept: dict[str, Path], tmp_path: Path) -> None:
        (fault,) = changed(kept, "mixed", key, value, tmp_path, "quant_cfg.json")

        assert fault.where.endswith(f"quant_cfg.json: {key.removeprefix('quantized_layers/').replace('/', '.')}")

    @pytest.mark.parametrize("value", [[], {}, None, 3, {LAYER: 5}, MISSING])
    def test_blocks_that_are_none(self, value: object, kept: dict[str, Path], tmp_path: Path) -> None:
        if value == {}:
            assert changed(kept, "mixed", "quantized_layers", value, tmp_path, "quant_cfg.json")
            return
        with pytest.raises(CatalogError):
            changed(kept, "mixed", "quantized_layers", value, tmp_path, "quant_cfg.json")


@pytest.mark.parametrize("architecture", sorted({architecture for architecture, _ in SOURCES.values()}))
def test_what_a_class_takes_for_a_missing_key_is_what_transformers_takes(architecture: str) -> None:
    if not has_newest_transformers():
        return
    model_type = architecture.removesuffix("ForCausalLM").lower()
    default = typed_config(model_type)

    for key, value in class_of({"architectures": [architecture]}).defaults.items():
        want = default.rope_parameters["rope_theta"] if key == "rope_theta" else getattr(default, key)
        assert want == value, key


@pytest.mark.parametrize("null", [False, True], ids=["missing", "null"])
@pytest.mark.parametrize("name", ["llama", "mistral", "mixtral", "qwen2", "qwen3"])
def test_keys_that_a_source_leaves_out_are_good(name: str, null: bool, tmp_path: Path) -> None:
    """As many K/V heads as the class or the layer has; a head of hidden size / heads, or that of the class."""
    architecture, _ = SOURCES[name]
    heads = 4 if name == "llama" or null else int(class_of({"architectures": [architecture]}).defaults[KV])
    head = 128 if name == "qwen3" and not null else 8
    sizes = {"hidden": 8 * heads, "heads": heads, "kv_heads": heads, "intermediate": 64, "layers": 1, "vocabulary": 97}
    built = write_checkpoint(tmp_path / "in", config=tiny_config(architecture, **sizes, head_dim=head), scheme="dense")

    def edit(config: dict[str, Any]) -> None:
        for key in (KV, "head_dim", "rms_norm_eps", "max_position_embeddings", "hidden_act", "tie_word_embeddings"):
            config.pop(key, None)
            if null:
                config[key] = None

    rewrite_config(built.directory, edit)
    convert_checkpoint(built.directory, tmp_path / "out", to="engine")

    report = verify_checkpoint(built.directory, tmp_path / "out")

    assert report.good, report.faults


KV = "num_key_value_heads"
