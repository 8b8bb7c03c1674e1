"""Repositories are converted as their directories are, with few downloads on the disk."""

from __future__ import annotations

import json
from itertools import combinations
from typing import TYPE_CHECKING, Any

import pytest
from builders import rewrite, write_checkpoint
from safetensors.torch import load_file, save_file
from served_repository import (
    NAME,
    PLACE,
    HighWater,
    made,
    sizes_of,
    smallest_keep,
    threading_left,
    tree,
    weights_asked,
)
from tiny_models import tiny_config

from trtllm_ct import convert_checkpoint
from trtllm_ct.base.errors import CatalogError, PayloadError, UsageError
from trtllm_ct.checkpoint.work_folder import DOWNLOADS
from trtllm_ct.convert import staging
from trtllm_ct.pipeline import head_probe

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from hub_server import HubServer

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "int4": {"scheme": "int4-g32"},
    "nvfp4": {"scheme": "nvfp4"},
    "mixed": {"scheme": {"q_proj": "int4-g64", "down_proj": "fp8-tensor-static"}, "kv": True},
    "experts": {"scheme": "nvfp4", "config": tiny_config("Qwen3MoeForCausalLM")},
    "nothing quantized": {"scheme": "dense"},
}


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_repository_is_converted_as_its_directory(hub: HubServer, tmp_path: Path, case: str, workers: int) -> None:
    directory = made(tmp_path, hub, **CHECKPOINTS[case])

    here = convert_checkpoint(directory, tmp_path / "here", carry=["*.log"])
    there = convert_checkpoint(NAME, tmp_path / "there", carry=["*.log"], workers=workers)

    assert tree(tmp_path / "there") == tree(tmp_path / "here")
    assert there.source == PLACE
    assert there.downloaded_bytes == sum(sizes_of(directory).values())
    document = {key: value for key, value in there.to_dict().items() if key not in _OF_A_RUN}
    assert document == {key: value for key, value in here.to_dict().items() if key not in _OF_A_RUN}
    assert there.left_out_files == ("assets/",)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "here", "made", "there"]


_OF_A_RUN = {"source", "out", "seconds", "downloaded_bytes"}


@pytest.mark.parametrize("to", ["dense", "engine"])
def test_every_kind_of_directory_is_written(hub: HubServer, tmp_path: Path, to: str) -> None:
    directory = made(tmp_path, hub, scheme="fp8-tensor-static")

    for place, out in ((directory, "here"), (NAME, "there")):
        convert_checkpoint(place, tmp_path / out, to=to, max_shard_bytes=50_000)

    assert tree(tmp_path / "there") == tree(tmp_path / "here")


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("shards_kept", [1, 2, 3])
def test_no_more_than_the_kept_bytes_are_on_the_disk(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards_kept: int, workers: int
) -> None:
    directory = made(tmp_path, hub)
    convert_checkpoint(directory, tmp_path / "here")
    sizes = sizes_of(directory)
    keep = max(smallest_keep(tmp_path), shards_kept * max(sizes.values()))
    water = HighWater(tmp_path / "there", monkeypatch)

    convert_checkpoint(NAME, tmp_path / "there", keep=keep, workers=workers)

    assert 0 < water.most <= keep < sum(sizes.values())
    assert water.files == sizes.keys()
    assert tree(tmp_path / "there") == tree(tmp_path / "here")


def test_too_little_room_is_refused_before_weights_are_fetched(hub: HubServer, tmp_path: Path) -> None:
    made(tmp_path, hub)
    needed = smallest_keep(tmp_path)

    assert not weights_asked(hub)
    assert not hub.asked("tokenizer.json")
    with pytest.raises(UsageError):
        convert_checkpoint(NAME, tmp_path / "out", keep=needed - 1)
    convert_checkpoint(NAME, tmp_path / "out", keep=needed)

    assert not (tmp_path / "never").exists()
    assert not list(tmp_path.glob(".*.partial"))


def test_by_default_a_unit_that_needs_more_gets_it(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path, hub)
    monkeypatch.setattr(staging, "KEEP_BYTES", 1)
    water = HighWater(tmp_path / "out", monkeypatch)

    convert_checkpoint(NAME, tmp_path / "out")

    assert water.most <= smallest_keep(tmp_path)


@pytest.mark.parametrize("keep", [0, -1])
def test_a_room_of_no_byte_is_none(tmp_path: Path, keep: int) -> None:
    with pytest.raises(UsageError, match="--keep: expected at least one byte"):
        convert_checkpoint(NAME, tmp_path / "out", keep=keep)


def test_shards_that_do_not_stay_are_fetched_again_and_that_is_said(
    hub: HubServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As where the parts of a layer are in shards far apart."""
    directory = made(tmp_path, hub)
    scatter(directory)
    sizes = sizes_of(directory)
    needed = smallest_keep(tmp_path)

    with caplog.at_level("WARNING", logger="trtllm_ct"):
        less = convert_checkpoint(NAME, tmp_path / "less", keep=needed)
    said = [record.getMessage() for record in caplog.records if "more than once" in record.getMessage()]
    enough = int(said[0].rpartition("--keep ")[2].split()[0])
    caplog.clear()
    once = convert_checkpoint(NAME, tmp_path / "once", keep=enough)

    assert less.downloaded_bytes > once.downloaded_bytes == sum(sizes.values())
    assert int(said[0].split()[0]) == less.downloaded_bytes - once.downloaded_bytes
    assert not caplog.records
    assert tree(tmp_path / "less") == tree(tmp_path / "once")


def scatter(directory: Path) -> None:
    """Let each part of a layer lie in two shards, other ones for each part."""
    files = sorted(sizes_of(directory))
    tensors = {name: tensor for file in files for name, tensor in load_file(directory / file).items()}
    parts = sorted({name.rpartition(".")[0].rpartition(".")[0] for name in tensors})
    pairs = list(combinations(files, 2))
    homes = {
        name: pairs[parts.index(name.rpartition(".")[0].rpartition(".")[0]) % len(pairs)][number % 2]
        for number, name in enumerate(sorted(tensors))
    }
    for file in files:
        save_file({name: tensors[name].clone() for name, home in homes.items() if home == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))


def test_faulty_values_are_all_reported_and_leave_nothing(hub: HubServer, tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.mlp.down_proj.weight_scale" for layer in range(2)]

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        for name in names:
            tensors[name][:] = float("nan")

    rewrite(made(tmp_path, hub), spoil)

    with pytest.raises(PayloadError) as raised:
        convert_checkpoint(NAME, tmp_path / "there")

    assert len(raised.value.faults) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "made"]


@pytest.mark.parametrize("depth", [31, 40])
def test_side_files_too_deep_are_refused_and_leave_nothing(hub: HubServer, tmp_path: Path, depth: int) -> None:
    """What was put into deeper folders could not be removed again, and no later run could go on."""
    directory = made(tmp_path, hub)
    deep = f"{'a/' * depth}x.txt"
    (directory / deep).parent.mkdir(parents=True)
    (directory / deep).write_text("")

    if depth < 32:
        assert deep in convert_checkpoint(NAME, tmp_path / "there", carry=["a"]).carried_files
        return
    with pytest.raises(CatalogError, match=f"in at most 31 folders in each other, found {depth} of them") as raised:
        convert_checkpoint(NAME, tmp_path / "there", carry=["a"])

    assert raised.value.faults[0].where == f"{PLACE}/{deep}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "made"]


def test_side_files_without_end_are_refused_before_the_first_one_is_fetched(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs at the top are fetched because a configuration may name them; real repositories have a few."""
    monkeypatch.setattr(staging, "MAX_SIDE_FILES", 20)
    directory = made(tmp_path, hub)
    for number in range(20):
        (directory / f"module_{number}.py").write_text("")

    with pytest.raises(CatalogError, match=r"expected at most 20 side files, found \d+ of them"):
        convert_checkpoint(NAME, tmp_path / "there")

    assert not hub.asked(".py")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "made"]


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_that_config_json_ties_is_compared_as_a_whole(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, equal: bool
) -> None:
    """A directory is compared so too; `inspect` of a repository looks at samples only."""
    monkeypatch.setattr(head_probe, "_SAMPLE_BYTES", 64)
    directory = write_checkpoint(tmp_path / "made", config=tiny_config(tie_word_embeddings=True)).directory

    def store_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        if not equal:
            tensors["lm_head.weight"][3, 5] += 1

    rewrite(directory, store_head)
    hub.add(NAME, directory)

    here = convert_checkpoint(directory, tmp_path / "here")
    there = convert_checkpoint(NAME, tmp_path / "there")

    assert tree(tmp_path / "there") == tree(tmp_path / "here")
    assert there.warnings == here.warnings


def test_ranks_on_other_machines_are_refused(hub: HubServer, tmp_path: Path) -> None:
    made(tmp_path, hub)

    with pytest.raises(UsageError, match="hf download") as raised:
        staging.staged_source(NAME, None, "mpi")  # type: ignore[arg-type]

    assert raised.value.faults[0].where == "--executor"


def test_files_of_others_beside_the_downloads_stay_and_are_named(
    hub: HubServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made(tmp_path, hub)

    def put(_total: int) -> Any:
        (tmp_path / ".there.partial" / DOWNLOADS).mkdir(exist_ok=True)
        (tmp_path / ".there.partial" / DOWNLOADS / "thesis.tex").write_text("years")
        return int

    with caplog.at_level("WARNING", logger="trtllm_ct"):
        convert_checkpoint(NAME, tmp_path / "there", on_download=put)

    assert [path.name for path in (tmp_path / "there" / DOWNLOADS).iterdir()] == ["thesis.tex"]
    assert any(f"{DOWNLOADS}/thesis.tex" in record.getMessage() for record in caplog.records)


def test_downloads_are_shown_from_threads_with_their_sum(hub: HubServer, tmp_path: Path) -> None:
    directory = made(tmp_path, hub)
    totals, pieces = [], []

    def begin(total: int) -> Any:
        totals.append(total)
        return pieces.append

    convert_checkpoint(NAME, tmp_path / "there", on_download=begin)

    assert totals == [sum(sizes_of(directory).values())] == [sum(pieces)]
    assert not threading_left()
