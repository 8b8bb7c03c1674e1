"""The release lines of TensorRT-LLM that checkpoints can be converted for, oldest first.

The entry of each mode says since which release it exists (`engine/modes.py`: `linear_since`, `experts_since`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = [
    "DEFAULT_ENGINE",
    "KV_CACHE_WORDS",
    "RELEASES",
    "STOCK_1_0",
    "STOCK_1_2",
    "STOCK_1_3",
    "Release",
    "release_named",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """One line of releases.

    `name` is its name for `--engine`, and `versions` are the minor versions that it stands for. `source` is the code of
    the engine that the facts were read from. `kv_cache` are the modes of its KV cache. `wraps_experts` says that routed
    experts are a ConfigurableMoE whose child `backend` gets its mode by its own name
    (`_torch/modules/fused_moe/configurable_moe.py`; since pull request 17009, July 2026, the wrapper hands its
    configuration down). `takes_scale_columns` says that Linears of row-wise FP8 take scales [N, 1] as well as [N]
    (`_torch/modules/linear.py: FP8RowwiseLinearMethod`).
    `dynamic_attention_output` says whether its attention honours `force_dynamic_quantization`
    (`_torch/modules/attention.py: Attention._use_quantize_output`).
    `matches_attention_output` says whether NVFP4 attention writes quantized values for an NVFP4 `o_proj` only (the same
    method).
    `builds_engines` says whether it has the TensorRT backend with `trtllm-build`, which pull requests 15763, 15767 and
    15918 removed in July 2026; 1.2.1 and 1.3.0rc20 are the last that have it.
    """

    name: str
    versions: tuple[str, ...]
    source: str
    kv_cache: frozenset[str] = frozenset({"FP8"})
    wraps_experts: bool = False
    takes_scale_columns: bool = False
    dynamic_attention_output: bool = False
    matches_attention_output: bool = False
    builds_engines: bool = False

    def has(self, since: Release | None) -> bool:
        """Whether it has what was introduced by the release `since`; None is what no release has."""
        return since is not None and RELEASES.index(since) <= RELEASES.index(self)


STOCK_1_0 = Release(
    name="stock-1.0",
    versions=("1.0", "1.1"),
    source="TensorRT-LLM late 2025, _torch/modules/linear.py and fused_moe/quantization.py",
    builds_engines=True,
)
STOCK_1_2 = Release(
    name="stock-1.2",
    versions=("1.2",),
    source="TensorRT-LLM early 2026, _torch/modules/linear.py and fused_moe/fused_moe_cutlass.py",
    wraps_experts=True,
    builds_engines=True,
)
STOCK_1_3 = Release(
    name="stock-1.3",
    versions=("1.3",),
    source="TensorRT-LLM main of September 2026, _torch/modules/linear.py: get_quant_method",
    takes_scale_columns=True,
    dynamic_attention_output=True,
    matches_attention_output=True,
)

RELEASES = (STOCK_1_0, STOCK_1_2, STOCK_1_3)
"""All supported lines, oldest first."""

DEFAULT_ENGINE = STOCK_1_2.name
"""The name of the newest stable line."""


KV_CACHE_WORDS = ("FP8", "NVFP4")
"""The modes of the KV cache that the `kv_cache_config` of an engine can ask for, whatever the checkpoint says.

Source: TensorRT-LLM `_torch/pyexecutor/model_loader.py` (`_KV_CACHE_MAP`).
"""

_VERSION = re.compile(r"v?(\d+\.\d+)(?:\.\d+)?(?:\.post\d+)?")
"""A stable version. The code of release candidates differs from one to the next, so these have no name here."""


def release_named(name: str) -> Release | None:
    """Return the release line of a name: `stock-1.2`, or a stable version such as `1.2` or `1.2.1`.

    None is returned for any other text.
    """
    version = _VERSION.fullmatch(name)
    return next(
        (release for release in RELEASES if name == release.name or (version and version[1] in release.versions)), None
    )
