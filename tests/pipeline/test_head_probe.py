"""The bytes of a stored head and of its table are compared in chunks, up to the first difference."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from builders import tiny_config, write_checkpoint

from trtllm_ct import open_checkpoint
from trtllm_ct.pipeline import head_probe

if TYPE_CHECKING:
    from pathlib import Path

    import torch


@pytest.mark.parametrize("chunk", [2, 100, 1 << 22])
@pytest.mark.parametrize("element", [None, (0, 0), (50, 3), (95, 63)])
def test_one_different_element_anywhere_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, element: tuple[int, int] | None
) -> None:
    monkeypatch.setattr(head_probe, "_CHUNK_BYTES", chunk)

    def copy(stored: dict[str, torch.Tensor]) -> None:
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
        if element is not None:
            stored["lm_head.weight"][element] += 1

    write_checkpoint(tmp_path, config=tiny_config(tied=True), shards=3, edit=copy)

    assert open_checkpoint(tmp_path).probe.head_is_table is (element is None)


def test_only_the_first_chunks_of_a_different_head_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_probe, "_CHUNK_BYTES", 128)
    read: list[int] = []
    runs = head_probe.read_runs

    def counted(catalog: object, wanted: list[object]) -> object:
        read.append(len(wanted))
        return runs(catalog, wanted)  # type: ignore[arg-type]

    monkeypatch.setattr(head_probe, "read_runs", counted)
    write_checkpoint(
        tmp_path,
        config=tiny_config(tied=True),
        edit=lambda stored: stored.update({"lm_head.weight": stored["model.embed_tokens.weight"] + 1}),
    )

    assert open_checkpoint(tmp_path).probe.head_is_table is False
    assert len(read) == 2


@pytest.mark.parametrize("tied", [True, False])
def test_nothing_is_compared_without_a_tie_or_without_a_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    monkeypatch.setattr(head_probe, "read_runs", None)

    write_checkpoint(tmp_path, config=tiny_config(tied=tied))

    assert open_checkpoint(tmp_path).probe.head_is_table is False
