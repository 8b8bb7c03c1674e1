"""What one line of transformers writes, the other reads with the same meaning after conversion.

`spellings.json` has configurations of both lines (`tests/support/make_spellings.py`).
"""

from __future__ import annotations

import copy
import inspect
import json
from typing import Any

import pytest
from installed_transformers import has_newest_transformers
from make_spellings import TABLE, rope_of, values_of

from trtllm_ct.base.dtypes import DType
from trtllm_ct.config.hf_config import portable_config, with_tie
from trtllm_ct.config.spellings import SPELLINGS

OLDER, NEWER = "4.57.3", "5.23.0"
CLASSES: dict[str, dict[str, Any]] = json.loads(TABLE.read_text())
IN_BOTH = sorted(CLASSES[OLDER].keys() & CLASSES[NEWER].keys())
ROTARY = {"rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor"}

DROPPED = {
    "norm_topk_prob": "transformers 5 computes what the default of 4.57 asks for, and TensorRT-LLM always does",
    "aux_loss_alpha": "for training only",
    "seq_aux": "for training only",
    "tie_word_embeddings": "with_tie writes it",
    "eod_token_id": "HunYuan: no class of either line reads it",
    "no_rope_layer_interval": "Llama 4: `no_rope_layers` is written and decides",
}
"""Parameters of 4.57 that 5.23 no longer writes and that are not derived, with the reason."""

# Values that differ although the same is meant.
SAME_MEANING: dict[tuple[str, str], str] = {
    ("qwen2_moe", "sliding_window"): "0 and null: none",
    ("mistral", "head_dim"): "null is hidden_size / num_attention_heads in both",
    ("olmo3", "rope"): "4.57 has no key for the theta of sliding layers: all have the same",
    ("llama4", "attention_bias"): "4.57 has no such key; its class has no bias",
    ("llama4_text", "attention_bias"): "4.57 has no such key; its class has no bias",
}


def portable(release: str, model_type: str) -> dict[str, Any]:
    return portable_config(CLASSES[release][model_type]["document"], DType.BF16)


@pytest.mark.parametrize("model_type", IN_BOTH)
def test_every_parameter_that_transformers_5_no_longer_writes_is_derived(model_type: str) -> None:
    """Without it, transformers 4 takes the default of its class and says nothing."""
    written = CLASSES[NEWER][model_type]["document"]
    lost = set(CLASSES[OLDER][model_type]["parameters"]) & set(CLASSES[OLDER][model_type]["document"]) - written.keys()

    # A class that does not rotate, or whose rotary embedding is not scaled, has no values for some rotary keys.
    assert lost - DROPPED.keys() - ROTARY <= portable(NEWER, model_type).keys()


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda spelling: f"{spelling.older} from {spelling.newer}")
def test_every_row_of_the_table_is_needed(spelling: Any) -> None:
    """Some class writes the newer name and not the older one."""
    if {spelling.older, spelling.newer} == {"dtype", "torch_dtype"}:
        return
    documents = [entry["document"] for entry in CLASSES[NEWER].values()]
    documents = [document.get("text_config", document) for document in documents]

    needing = [d for d in documents if d.get(spelling.newer) is not None and d.get(spelling.older) is None]
    assert any(spelling.model_types is None or d["model_type"] in spelling.model_types for d in needing)


@pytest.mark.parametrize(
    ("model_type", "older"),
    [
        ("qwen3_moe", {"num_experts": 256}),
        ("qwen3_vl_moe_text", {"num_experts": 120}),
        ("nemotron_h", {"hybrid_override_pattern": "ME*-", "num_hidden_layers": 4, "rms_norm_eps": 5e-06}),
        ("nemotron_h", {"mtp_hybrid_override_pattern": "*E"}),
        ("deepseek_v4", {"compress_ratios": [128, 128, *[128, 4] * 20, 128, 0, 0], "num_hash_layers": 3}),
        ("gemma3_text", {"rope_theta": 2e6, "rope_local_base_freq": 2e4, "rope_scaling": "linear"}),
        ("qwen3_vl_text", {"rope_scaling": "default"}),
    ],
)
def test_the_older_keys_of(model_type: str, older: dict[str, Any]) -> None:
    made = portable(NEWER, model_type)

    if isinstance(older.get("rope_scaling"), str):
        made["rope_scaling"] = made["rope_scaling"]["rope_type"]
    assert {key: made.get(key, "missing") for key in older} == older


def read(document: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    fields = {key: value for key, value in document.items() if key != "model_type"}
    return AutoConfig.for_model(document["model_type"], **fields)


def readable(release: str) -> list[str]:
    """The classes that the installed transformers may have, which is seen when the test runs."""
    return sorted(CLASSES[release])


def differences(model_type: str, read_by_writer: dict[str, Any], read_here: dict[str, Any]) -> dict[str, Any]:
    """The values that both readers have and that differ, by name."""
    found = {}
    for name in read_by_writer.keys() & read_here.keys():
        one, other = read_by_writer[name], read_here[name]
        if name == "text_config":
            found |= {f"text {key}": value for key, value in differences(model_type, one, other).items()}
        elif one != other and name != "dtype" and (model_type, name) not in SAME_MEANING and name not in DROPPED:
            found[name] = (one, other)
    return found


def whole(entry: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    """What the writer reads: the stored values, and those that stand in the document."""
    plain = {key: value for key, value in document.items() if value is not None and not key.startswith(tuple(ROTARY))}
    inner = {}
    if "text_config" in document:
        inner = {"text_config": whole(entry["text_config"], document["text_config"])}
    return plain | {key: value for key, value in entry.items() if key != "text_config"} | inner


@pytest.mark.reference
@pytest.mark.parametrize(("release", "model_type"), [(r, name) for r in (OLDER, NEWER) for name in readable(r)])
def test_the_installed_transformers_reads_what_the_writer_meant(release: str, model_type: str) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    entry = CLASSES[release][model_type]
    if model_type not in CONFIG_MAPPING_NAMES:
        assert model_type not in IN_BOTH or not has_newest_transformers()
        return
    tied = entry["document"].get("tie_word_embeddings")
    config = read(with_tie(portable(release, model_type), tied=tied))
    expected = whole(entry["values"], entry["document"])

    assert differences(model_type, expected, json.loads(json.dumps(values_of(config), default=str))) == {}


def _rope_or_error(config_class: Any, fields: dict[str, Any]) -> Any:
    try:
        return rope_of(config_class(**copy.deepcopy(fields)))
    except Exception as error:  # noqa: BLE001 (classes of other modalities refuse what they don't know)
        return type(error)


@pytest.mark.newest_transformers
def test_the_table_knows_every_class_with_blocks_by_kind_of_layer(caplog: pytest.LogCaptureFixture) -> None:
    """To the others a flat block is given, which such a class refuses or mixes up."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    caplog.set_level("CRITICAL")
    older = {"rope_theta": 54321.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    changed = {}
    for model_type in CONFIG_MAPPING_NAMES:
        config_class = CONFIG_MAPPING[model_type]
        if "rope_parameters" not in inspect.signature(config_class.__init__).parameters:
            continue
        converted = portable_config({"model_type": model_type, **older}, DType.BF16)
        made = {key: value for key, value in converted.items() if key not in {"model_type", "dtype", "torch_dtype"}}
        meant, found = (_rope_or_error(config_class, fields) for fields in (older, made))
        if found != meant:
            changed[model_type] = (meant, found)
    # Sliding layers of OLMo 3 have the theta of all layers in transformers 4, for which transformers 5 takes a default.
    assert changed.keys() <= {"olmo3"}, changed
