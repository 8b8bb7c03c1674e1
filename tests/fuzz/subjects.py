"""What is fuzzed: files of tiny checkpoints, each changed at random and given to every stage that reads it."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from builders import SCHEMES, write_checkpoint
from fuzz.mutations import mutated_bytes, mutated_document
from tiny_models import tiny_config

from trtllm_ct import CompressedTensorsWeightLoader, convert_checkpoint, verify_checkpoint
from trtllm_ct.checkpoint.catalog import INDEX_FILE, Catalog
from trtllm_ct.checkpoint.header import LENGTH_BYTES, read_header
from trtllm_ct.convert.hf_directory import configuration_files
from trtllm_ct.engine.parallel import Parallel
from trtllm_ct.pipeline.inspection import inspect_checkpoint
from trtllm_ct.pipeline.open import open_checkpoint
from trtllm_ct.verify.sizes import verify_with_sizes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from random import Random

__all__ = ["SUBJECTS", "Subject", "make_subjects"]

_SMALL = tiny_config(hidden=64, intermediate=64, layers=1)
_MODELS = ("LlamaForCausalLM", "Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM", "UnknownForCausalLM")
_WEIGHTS = "model.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One kind of cases: `run` changes something in `work` and reads it; `share` is its part of all cases."""

    name: str
    share: float
    run: Callable[[Random], object]
    sources: list[Path] = field(default_factory=list)


def make_subjects(work: Path, shared: Path | None = None) -> tuple[Subject, ...]:
    """Write the checkpoints and return all subjects; `shared` is a folder with real checkpoints, if there is one."""
    checkpoints = _checkpoints(work / "sources")
    real = sorted(shared.glob("*/config.json")) if shared else []
    configs = [json.loads((directory / "config.json").read_text()) for directory in checkpoints]
    configs_real = [json.loads(path.read_text()) for path in real]
    case = _Cases(work / "case", checkpoints, configs, configs_real)
    return tuple(Subject(name=name, share=share, run=getattr(case, name)) for name, share in SUBJECTS.items())


SUBJECTS = {
    "header": 0.65,
    "index": 0.297,
    "config": 0.04,
    "quantization": 0.006,
    "payload": 0.003,
    "converted": 0.003,
    "convert": 0.001,
}
"""The kinds of cases, and the part of each of all cases; slow ones are rare."""


def _checkpoints(folder: Path) -> list[Path]:
    """Write one tiny checkpoint of each form of storage and of several families."""
    schemes = (
        "int4-g32",
        "int4-g64-actorder",
        "int8-plain-channel-asym",
        "fp8-tensor-static",
        "nvfp4",
        "mxfp4",
        "w8a8",
    )
    made = []
    for name in schemes:
        assert name in SCHEMES
        made.append(write_checkpoint(folder / name, config=dict(_SMALL), scheme=name, kv=name == "w8a8").directory)
    return made


class _Cases:
    """Runs single cases in one folder, which is made anew for each."""

    def __init__(self, place: Path, checkpoints: list[Path], configs: list[Any], real: list[Any]) -> None:
        self._place, self._checkpoints, self._configs = place, checkpoints, configs
        self._blocks = [config["quantization_config"] for config in real if "quantization_config" in config]
        self._headers = []
        self._converted: list[tuple[Path, Path]] = []
        for directory in checkpoints:
            content = (directory / _WEIGHTS).read_bytes()
            length = int.from_bytes(content[:LENGTH_BYTES], "little")
            self._headers.append((json.loads(content[LENGTH_BYTES : LENGTH_BYTES + length]), content))
        place.mkdir(parents=True)
        self._tiny = self._tiny_header()

    @staticmethod
    def _tiny_header() -> dict[str, Any]:
        return {
            "__metadata__": {"format": "pt"},
            "a.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
            "a.scale": {"dtype": "BF16", "shape": [2, 1], "data_offsets": [16, 20]},
            "b": {"dtype": "I64", "shape": [], "data_offsets": [20, 28]},
        }

    def header(self, random: Random) -> None:
        """The header of a file: its JSON, or its bytes."""
        document = self._tiny if random.random() < 0.5 else mutated_document(self._tiny, random)
        content = _file_of(document, bytes(28))
        if document is self._tiny:
            content = mutated_bytes(content, random)
        path = self._place / "header.safetensors"
        path.write_bytes(content)
        read_header(path, path.name)

    def index(self, random: Random) -> None:
        """An index beside two shards."""
        folder = self._place / "index"
        if not folder.exists():
            folder.mkdir()
            for shard in ("a", "b"):
                entry = {f"{shard}.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
                (folder / f"{shard}.safetensors").write_bytes(_file_of(entry, bytes(4)))
        index = {
            "metadata": {"total_size": 8},
            "weight_map": {"a.weight": "a.safetensors", "b.weight": "b.safetensors"},
        }
        text = _dump(index)
        text = mutated_bytes(text, random) if random.random() < 0.4 else _dump(mutated_document(index, random))
        (folder / INDEX_FILE).write_bytes(text)
        Catalog.from_directory(folder)

    def config(self, random: Random) -> None:
        """config.json, of small models: every key."""
        number = random.randrange(len(self._configs))
        config = self._configs[number]
        if self._blocks and random.random() < 0.5:
            config = config | {"quantization_config": random.choice(self._blocks)}
        if random.random() < 0.3:
            config = config | {"architectures": [random.choice(_MODELS)]} | _MIXTURE
        self._read(number, mutated_document(config, random), random)

    def quantization(self, random: Random) -> None:
        """Other files of a configuration: hf_quant_config.json and params.json."""
        number = random.randrange(len(self._configs))
        folder = self._checkpoint(number)
        name = random.choice(("hf_quant_config.json", "params.json", "quantize_config.json", "recipe.yaml"))
        (folder / name).write_bytes(_dump(mutated_document(random.choice(_OTHER_FILES), random)))
        if random.random() < 0.5:
            (folder / "config.json").unlink()
        inspect_checkpoint(folder, "modelopt")

    def payload(self, random: Random) -> None:
        """The header and payload of a whole checkpoint, read by `load` and `verify`."""
        number = random.randrange(len(self._headers))
        folder = self._checkpoint(number)
        self._change_weights(folder, number, random)
        if random.random() < 0.5:
            for _ in CompressedTensorsWeightLoader().stream(folder):
                pass
        else:
            verify_checkpoint(folder)

    def convert(self, random: Random) -> None:
        """A whole conversion; on an error nothing may be left."""
        number = random.randrange(len(self._headers))
        folder = self._checkpoint(number)
        self._change_weights(folder, number, random)
        out = self._place / "out"
        try:
            convert_checkpoint(folder, out, to=random.choice(("modelopt", "dense")), workers=1)
        except Exception:
            left = sorted(path.name for path in self._place.glob("*out*"))
            assert not left, f"left behind: {left}"
            raise
        verify_checkpoint(folder, out)
        shutil.rmtree(out)

    def converted(self, random: Random) -> None:
        """A JSON file of a converted directory, whose weights are a link."""
        if not self._converted:
            for number, to in ((0, "modelopt"), (4, "modelopt"), (0, "engine"), (3, "engine")):
                out = self._place / f"converted-{number}-{to}"
                convert_checkpoint(self._checkpoints[number], out, to=to, parallel=Parallel(tensor=1), workers=1)
                self._converted.append((self._checkpoints[number], out))
        source, out = random.choice(self._converted)
        folder = self._place / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for file in out.iterdir():
            (folder / file.name).symlink_to(file)
        name = random.choice(sorted(file.name for file in out.glob("*.json")))
        document = mutated_document(json.loads((out / name).read_bytes()), random)
        (folder / name).unlink()
        (folder / name).write_bytes(_dump(document))
        verify_with_sizes(source, folder, parallel=random.choice((None, Parallel(tensor=2))))

    def _read(self, number: int, config: Any, random: Random) -> None:
        folder = self._checkpoint(number)
        (folder / "config.json").write_bytes(_dump(config))
        if random.random() < 0.5:
            inspect_checkpoint(folder, "modelopt")
        else:
            checkpoint = open_checkpoint(folder)
            configuration_files(checkpoint, checkpoint.plan(random.choice(("modelopt", "dense", "tensorrt_llm"))))

    def _checkpoint(self, number: int) -> Path:
        """Return a folder with the files of a checkpoint; weights are a link, which is replaced to change them."""
        folder = self._place / "checkpoint"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / _WEIGHTS).symlink_to(self._checkpoints[number] / _WEIGHTS)
        (folder / "config.json").write_bytes(_dump(self._configs[number]))
        return folder

    def _change_weights(self, folder: Path, number: int, random: Random) -> None:
        document, content = self._headers[number]
        length = int.from_bytes(content[:LENGTH_BYTES], "little")
        payload = bytearray(content[LENGTH_BYTES + length :])
        if random.random() < 0.3:
            document = mutated_document(document, random)
        for _ in range(random.choice((1, 4, 32))):
            place = random.randrange(max(1, len(payload) - 8))
            payload[place : place + 2] = random.choice((b"\0\0", b"\xff\xff", b"\x80\x7f", b"\x7f\x80", b"\0\x80"))
        with suppress(FileNotFoundError):
            (folder / _WEIGHTS).unlink()
        (folder / _WEIGHTS).write_bytes(_file_of(document, bytes(payload)))


_MIXTURE = {
    "num_experts": 4, "n_routed_experts": 4, "moe_intermediate_size": 64, "num_experts_per_tok": 2,
    "first_k_dense_replace": 1, "mlp_only_layers": [0], "decoder_sparse_step": 1, "n_shared_experts": 1,
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
    "rope_scaling": {"rope_type": "yarn", "factor": 2.0},
    "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
}  # fmt: skip
_OTHER_FILES: tuple[Any, ...] = (
    {
        "producer": {"name": "modelopt", "version": "0.47.0"},
        "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]},
    },
    {
        "dim": 64, "n_layers": 1, "hidden_dim": 64, "n_heads": 2, "n_kv_heads": 1, "head_dim": 32, "vocab_size": 64,
        "norm_eps": 1e-5, "rope_theta": 1e4, "moe": {"num_experts": 2, "num_experts_per_tok": 1},
        "vision_encoder": {"hidden_size": 64, "num_hidden_layers": 1, "mm_projector_id": "patch_merge"},
        "quantization": {"quant_method": "compressed-tensors", "config_groups": {}, "ignore": []},
    },
)  # fmt: skip


def _dump(document: Any) -> bytes:
    """Return a document as JSON text in UTF-8; half a surrogate pair stays an escape."""
    return json.dumps(document).encode()


def _file_of(document: Any, payload: bytes) -> bytes:
    text = _dump(document)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text + payload
