"""Sidecars: their content, name and cache, several processes and nodes, and outdated sources."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from builders import rewrite, rewrite_config, tiny_config, write_checkpoint
from fresh_python import run_python
from hub_cache import HubCache
from hypothesis import given
from hypothesis import strategies as st

import trtllm_ct
from trtllm_ct import FormatDetector, inspect_checkpoint, open_checkpoint, prepare
from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import DetectionError, PlanError, SidecarError, TrtllmCtError, UsageError
from trtllm_ct.engine.parallel import Parallel
from trtllm_ct.engine.releases import DEFAULT_ENGINE
from trtllm_ct.engine.target import ENGINES
from trtllm_ct.plan.options import PlanOptions
from trtllm_ct.plan.probe import Probe
from trtllm_ct.serve import cache, leases, sidecar
from trtllm_ct.serve.hub import Repository
from trtllm_ct.serve.listing import list_sidecars
from trtllm_ct.serve.sidecar import (
    SIDECAR_FILE,
    Sidecar,
    cache_root,
    clear_sidecars,
    is_sidecar,
    known_sidecars,
    make_sidecar,
    restore_sidecar,
)

if TYPE_CHECKING:
    from collections.abc import Callable

CONFIG = tiny_config(hidden=128, intermediate=256)
OPTIONS = PlanOptions(to="tensorrt_llm")
SIDE_FILES = {
    "tokenizer.json": "{}",
    "generation_config.json": "{}",
    "additional_chat_templates/chat.jinja": "{{ messages }}",
}
WEIGHTS = ("old/model.safetensors", "pytorch_model.bin", "model.safetensors.index.json")

pytestmark = pytest.mark.usefixtures("sidecar_cache")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "model", config=CONFIG, scheme="int4-g64")
    for name, text in SIDE_FILES.items():
        (tmp_path / "model" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "model" / name).write_text(text, encoding="utf-8")
    return tmp_path / "model"


def files_of(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir()}


def is_free(directory: Path) -> bool:
    with leases.unused(directory / SIDECAR_FILE) as free:
        return free


# Content.


def test_known_files_but_not_the_weights_are_linked(source: Path) -> None:
    """If weights were there, stock TensorRT-LLM would silently load those whose names it knows."""
    for name in WEIGHTS[:2]:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"weights")
    (source / "modeling_unnamed.py").write_text("")

    made = make_sidecar(source, OPTIONS)

    own = {"config.json", "hf_quant_config.json", SIDECAR_FILE}
    assert files_of(made) == own | SIDE_FILES.keys()
    assert all((made / name).is_symlink() and (made / name).samefile(source / name) for name in SIDE_FILES)


def test_the_configuration_is_what_convert_writes(source: Path, tmp_path: Path) -> None:
    made = make_sidecar(source, OPTIONS)

    trtllm_ct.convert_checkpoint(source, tmp_path / "converted")
    for name in ("config.json", "hf_quant_config.json"):
        assert (made / name).read_text() == (tmp_path / "converted" / name).read_text()


def test_a_tokenizer_of_transformers_5_is_written_anew_and_the_source_is_kept(source: Path) -> None:
    """A link would lead the engine to a file that transformers 4 refuses."""
    stored = json.dumps({"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"]})
    (source / "tokenizer_config.json").write_text(stored)

    made = make_sidecar(source, OPTIONS)

    portable = {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<a>"]}
    assert json.loads((made / "tokenizer_config.json").read_text()) == portable
    assert not (made / "tokenizer_config.json").is_symlink()
    assert (source / "tokenizer_config.json").read_text() == stored
    assert make_sidecar(source, OPTIONS) == made
    (source / "tokenizer_config.json").write_text(stored.replace("<a>", "<b>"))
    assert make_sidecar(source, OPTIONS) != made


def test_mixed_modes_are_also_written_for_old_releases(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "mixed", config=CONFIG, scheme={"o_proj": "int4-g64", "down_proj": "fp8-channel-token"})

    made = make_sidecar(tmp_path / "mixed", OPTIONS)

    layers = json.loads((made / "quant_cfg.json").read_text())["quantized_layers"]
    assert layers["model.layers.0.mlp.down_proj"]["quant_algo"] == "FP8_PER_CHANNEL_PER_TOKEN"
    assert json.loads((made / "hf_quant_config.json").read_text())["quantization"]["quant_algo"] == "MIXED_PRECISION"


def test_a_model_without_native_modules_gets_a_plain_configuration(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", config=CONFIG, scheme="int4-g32")

    made = make_sidecar(tmp_path / "model", OPTIONS)

    assert files_of(made) == {"config.json", SIDECAR_FILE}
    assert "quantization_config" not in json.loads((made / "config.json").read_text())


def test_it_records_every_mode_with_its_reason(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", config=CONFIG, scheme={"o_proj": "int4-g32", "down_proj": "int4-g64"})

    modes = json.loads((make_sidecar(tmp_path / "model", OPTIONS) / SIDECAR_FILE).read_text())["modes"]

    mode, reason = modes["model.layers.1.self_attn.o_proj"]
    assert mode == "dequantized"
    assert reason.startswith("W4A16_AWQ holds groups of 64 or 128")
    assert modes["model.layers.0.mlp.down_proj"] == ["W4A16_AWQ g64", ""]


def test_a_reopened_sidecar_has_the_same_plan(source: Path) -> None:
    options = replace(OPTIONS, engine="stock-1.3", parallel=Parallel(tensor=2), dtype=DType.F32)

    opened = Sidecar.open(make_sidecar(source, options))

    assert opened.options == options
    assert opened.plan.to_dict() == open_checkpoint(source).plan_for(options).to_dict()


@given(
    st.builds(
        PlanOptions,
        engine=st.sampled_from(sorted(ENGINES)),
        additive_zeros=st.booleans(),
        parallel=st.builds(
            lambda expert, times, **rest: Parallel(tensor=expert * times, expert=expert, **rest),
            st.integers(1, 8),
            st.integers(1, 8),
            pipeline=st.integers(1, 4),
            attention_dp=st.booleans(),
        ),
        dtype=st.sampled_from([None, DType.F16, DType.BF16, DType.F32]),
        dense_o_proj=st.booleans(),
        kv_cache=st.none() | st.sampled_from(["FP8", "NVFP4"]),
        strict=st.booleans(),
    )
)
def test_options_survive_json(options: PlanOptions) -> None:
    assert PlanOptions.from_dict(json.loads(json.dumps(options.to_dict()))) == options


def test_probed_values_survive_json_to_the_last_bit(source: Path) -> None:
    probe = Probe(
        scalars={"a": 0.1, "b": float("inf"), "c": 5e-324},
        powers={"d": (-2, 3)},
        zero=frozenset("xy"),
        trivial=frozenset("z"),
        shapes={"e": (2, 3)},
    )
    made = replace(Sidecar.open(make_sidecar(source, OPTIONS)), probe=probe)

    assert Sidecar.from_dict(made.directory, json.loads(json.dumps(made.to_dict()))) == made


# The name.


@pytest.mark.parametrize(
    "change",
    [
        lambda source: replace(OPTIONS, engine="stock-1.3"),
        lambda source: replace(OPTIONS, parallel=Parallel(tensor=2)),
        lambda source: replace(OPTIONS, dtype=DType.F32),
        lambda source: (source / "added_tokens.json").write_text("{}") and OPTIONS,
        lambda source: rewrite_config(source, lambda config: config.update(rms_norm_eps=1e-5)) or OPTIONS,
    ],
    ids=["engine", "sizes", "dtype", "a new file", "config.json"],
)
def test_every_dependency_changes_the_name(source: Path, change: Callable[[Path], PlanOptions]) -> None:
    first = make_sidecar(source, OPTIONS)

    second = make_sidecar(source, change(source))

    assert first != second
    assert is_sidecar(first)
    assert is_sidecar(second)


def test_another_release_changes_the_name(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_sidecar(source, OPTIONS)
    monkeypatch.setattr(sidecar, "__version__", "9.9.9")

    assert make_sidecar(source, OPTIONS) != first


def test_other_weights_of_the_same_shape_keep_the_name(source: Path) -> None:
    """Payloads are not part of the name, because they are read only when they are loaded."""
    first = make_sidecar(source, OPTIONS)
    rewrite(source, lambda tensors: tensors["model.norm.weight"].add_(1))

    assert make_sidecar(source, OPTIONS) == first


def test_an_existing_sidecar_is_reused(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written then, so a read-only cache works."""
    first = make_sidecar(source, OPTIONS)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(Path, "write_text", refuse)

    assert make_sidecar(source, OPTIONS) == first


def test_a_cache_that_cannot_be_written_is_named_with_the_switch(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(SidecarError, match=r"file.*TRTLLM_CT_CACHE"):
        make_sidecar(source, OPTIONS, root=tmp_path / "file")


# Several processes.


def test_eight_processes_at_once_make_one(source: Path, sidecar_cache: Path) -> None:
    code = (
        "import sys, time; from trtllm_ct.serve.sidecar import *\n"
        "from trtllm_ct.plan.options import PlanOptions\n"
        "time.sleep(max(0, float(sys.argv[2]) - time.time()))\n"
        "print(make_sidecar(sys.argv[1], PlanOptions(to='tensorrt_llm')))"
    )
    command = [sys.executable, "-c", code, str(source), str(time.time() + 2)]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(8)]
    done = [racer.communicate() for racer in racers]

    assert [racer.returncode for racer in racers] == [0] * 8, done
    assert {out for out, _ in done} == {f"{make_sidecar(source, OPTIONS)}\n"}
    assert [path.name for path in sidecar_cache.iterdir()] == [make_sidecar(source, OPTIONS).name]


def test_the_loser_of_a_race_uses_what_the_winner_wrote(
    source: Path, monkeypatch: pytest.MonkeyPatch, sidecar_cache: Path
) -> None:
    rename = Path.rename
    winners = []

    def race(path: Path, target: Path) -> Path:
        if not winners:
            winners.append(path.name)
            rename(path, target)
            # This is the file of the process that won the race; this process still has its own directory.
            (path / "additional_chat_templates").mkdir(parents=True)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", race)

    assert Sidecar.open(make_sidecar(source, OPTIONS)).source == source
    assert len(list(sidecar_cache.iterdir())) == 1


def test_the_rest_of_a_deleted_sidecar_is_replaced(source: Path) -> None:
    made = make_sidecar(source, OPTIONS)
    (made / SIDECAR_FILE).unlink()

    assert make_sidecar(source, OPTIONS) == made
    assert files_of(made) == {"config.json", "hf_quant_config.json", SIDECAR_FILE, *SIDE_FILES}


def test_an_error_leaves_nothing_behind(source: Path, sidecar_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sidecar, "write_configuration", fail)
    with pytest.raises(KeyboardInterrupt):
        make_sidecar(source, OPTIONS)

    assert list(sidecar_cache.iterdir()) == []


# Changes since the sidecar was made.


def test_a_source_with_other_tensors_raises(source: Path) -> None:
    made = Sidecar.open(make_sidecar(source, OPTIONS))
    rewrite(source, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].float()}))

    with pytest.raises(SidecarError, match=r"other headers.*prepare"):
        made.plan  # noqa: B018


def test_a_different_plan_raises_and_names_the_modules(source: Path) -> None:
    """A worker with another release must not load with a plan that differs from the engine's configuration."""
    made = make_sidecar(source, OPTIONS)
    entry = json.loads((made / SIDECAR_FILE).read_text())
    name = "model.layers.0.mlp.down_proj"
    entry["modes"][name][0] = "W4A16_AWQ g128"
    (made / SIDECAR_FILE).write_text(json.dumps(entry | {"digest": "0"}))

    with pytest.raises(SidecarError, match=rf"another plan \({name}\).*one release"):
        Sidecar.open(made).plan  # noqa: B018


def test_a_missing_source_is_named(source: Path) -> None:
    made = Sidecar.open(make_sidecar(source, OPTIONS))
    source.rename(source.with_name("elsewhere"))

    with pytest.raises(SidecarError, match=rf"{source}.*no such directory on this node.*same path"):
        made.plan  # noqa: B018


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"layout": 3}'])
def test_a_damaged_sidecar_raises(source: Path, text: str) -> None:
    made = make_sidecar(source, OPTIONS)
    (made / SIDECAR_FILE).write_text(text)

    with pytest.raises(SidecarError, match=SIDECAR_FILE):
        Sidecar.open(made)


@pytest.mark.parametrize("value", [None, [], [[]], [1, "a", None], 3, "", {"a": 1}], ids=str)
def test_values_of_another_type_are_damage_and_no_other_error(source: Path, value: object) -> None:
    made = make_sidecar(source, OPTIONS)
    written = json.loads((made / SIDECAR_FILE).read_text())
    refused = set()

    for name in written:
        (made / SIDECAR_FILE).write_text(json.dumps(written | {name: value}))
        try:
            Sidecar.open(made).plan  # noqa: B018
        except TrtllmCtError:
            refused.add(name)

    assert refused >= {"layout", "source", "options", "contents"}


# Parallel sizes.


def test_sizes_that_need_the_same_modes_are_accepted(source: Path) -> None:
    made = Sidecar.open(make_sidecar(source, OPTIONS))

    assert made.plan_for(Parallel(pipeline=2)).quant_config == made.plan.quant_config


def test_sizes_that_need_other_modes_raise_with_the_right_arguments(source: Path) -> None:
    """With four ranks, each has 32 columns of o_proj, which is half a group."""
    made = Sidecar.open(make_sidecar(source, OPTIONS))

    with pytest.raises(SidecarError, match=r"o_proj.*tensor_parallel_size=4, pipeline_parallel_size=1"):
        made.plan_for(Parallel(tensor=4))


# On another node.


def test_a_missing_sidecar_is_restored_from_its_record(source: Path) -> None:
    made = make_sidecar(source, OPTIONS)
    before = {name: (made / name).read_text() for name in files_of(made)}
    record = json.loads(json.dumps(known_sidecars()[str(made)]))
    made.rename(made.with_name("lost"))

    restored = restore_sidecar(made, record)

    assert {name: (made / name).read_text() for name in files_of(made)} == before
    assert restored.plan.to_dict() == Sidecar.open(made).plan.to_dict()


def test_restoring_from_a_different_source_raises(source: Path) -> None:
    made = make_sidecar(source, OPTIONS)
    record = known_sidecars()[str(made)]
    made.rename(made.with_name("lost"))
    rewrite_config(source, lambda config: config.update(rms_norm_eps=1e-5))

    with pytest.raises(SidecarError, match="another config"):
        restore_sidecar(made, record)
    assert not made.exists()


@pytest.mark.reference
def test_a_missing_source_is_downloaded_from_the_hub(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node downloads the commit that the sidecar was made from, into its own cache."""
    shutil.rmtree(source / "additional_chat_templates")
    hub = HubCache(tmp_path / "hub", monkeypatch)
    snapshot = hub.add("org/model", source)
    repository = Repository(name="org/model", revision=snapshot.name)
    made = make_sidecar(source, OPTIONS, repository=repository)
    record = known_sidecars()[str(made)]
    made.rename(made.with_name("lost"))
    source.rename(source.with_name("elsewhere"))

    restored = restore_sidecar(made, record)

    assert restored.source == snapshot
    assert restored.directory == made
    assert len(restored.plan.modules) > 0


# The cache.


def test_the_cache_directory_is_the_variables_or_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_root() == tmp_path / "cache"
    monkeypatch.delenv("TRTLLM_CT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "trtllm-ct"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "trtllm-ct"


def test_sidecars_are_listed_with_their_source(source: Path) -> None:
    made = {make_sidecar(source, OPTIONS), make_sidecar(source, replace(OPTIONS, parallel=Parallel(tensor=2)))}
    (next(iter(made)).parent / "something else").mkdir()

    assert {each.directory for each in list_sidecars()} == made
    assert {listed.sidecar and listed.sidecar.source for listed in list_sidecars()} == {source}
    assert list_sidecars(source / "nowhere") == ()


def test_clearing_keeps_sidecars_in_use(source: Path) -> None:
    """This process made one of the sidecars, so it is in use; no process uses the other."""
    own = make_sidecar(source, OPTIONS)
    code = """
        import sys
        from trtllm_ct.plan.options import PlanOptions
        from trtllm_ct.serve.sidecar import *
        make_sidecar(sys.argv[1], PlanOptions(to="tensorrt_llm", strict=True))
    """
    run_python(code, source)

    cleared = clear_sidecars()

    assert cleared.in_use == (own,)
    assert len(cleared.removed) == 1
    assert [each.directory for each in list_sidecars()] == [own]
    assert [path.name for path in own.parent.iterdir()] == [own.name]


def test_a_sidecar_opened_by_another_process_is_kept(source: Path) -> None:
    """The lease lasts until the process ends for any reason."""
    code = (
        "import sys; from pathlib import Path; from trtllm_ct.serve.leases import hold\n"
        "assert hold(Path(sys.argv[1])); print('holding', flush=True); sys.stdin.read()"
    )
    made = make_sidecar(source, OPTIONS)
    _let_go(made)
    assert is_free(made)
    command = [sys.executable, "-c", code, str(made / SIDECAR_FILE)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "holding\n"
        assert clear_sidecars().in_use == (made,)
        server.kill()

    assert clear_sidecars().removed == (made,)


def test_a_sidecar_cleared_meanwhile_is_made_again(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may clear a sidecar after it was found and before the lease on it is taken."""
    made = make_sidecar(source, OPTIONS)
    _let_go(made)
    lock = leases._lock

    def clear_first(descriptor: int, *, exclusive: bool) -> bool:
        monkeypatch.setattr(leases, "_lock", lock)
        assert clear_sidecars().removed == (made,)
        return lock(descriptor, exclusive=exclusive)

    monkeypatch.setattr(leases, "_lock", clear_first)

    assert make_sidecar(source, OPTIONS) == made
    assert is_sidecar(made)
    assert clear_sidecars().in_use == (made,)


def test_without_file_locks_every_sidecar_counts_as_used(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    made = make_sidecar(source, OPTIONS)
    _let_go(made)

    assert clear_sidecars().in_use == (made,)


def test_temporary_directories_of_killed_processes_are_cleared(sidecar_cache: Path) -> None:
    old, young = (f".{letter * 32}.0123abcd.partial" for letter in "ab")
    for name, age in ((old, 2 * cache._STALE_SECONDS), (young, 0)):
        sidecar_cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        (sidecar_cache / name).mkdir(mode=0o700)
        (sidecar_cache / name / "tokenizer.json").symlink_to("/nowhere")
        (sidecar_cache / name / "config.json").write_text("{}")
        os.utime(sidecar_cache / name, (time.time() - age,) * 2)

    clear_sidecars()

    assert [path.name for path in sidecar_cache.iterdir()] == [young]


def _let_go(made: Path) -> None:
    os.close(leases._held.pop(made / SIDECAR_FILE))


# Sidecars as input of other commands.


def test_the_detector_recognizes_a_sidecar(source: Path) -> None:
    detection = FormatDetector().detect(make_sidecar(source, OPTIONS))

    assert detection.method == "trtllm-ct-sidecar"
    assert detection.disagreements == ()
    assert [str(each) for each in detection.evidence] == [f'{SIDECAR_FILE}: source is "{source}"']


def test_other_commands_refuse_a_sidecar(source: Path) -> None:
    made = make_sidecar(source, OPTIONS)

    with pytest.raises(DetectionError, match=rf"sidecar of trtllm-ct.*{source}.*Give its source"):
        open_checkpoint(made)
    with pytest.raises(DetectionError, match="Give its source"):
        trtllm_ct.convert_checkpoint(made, made.with_name("out"))
    assert "sidecar" in str(inspect_checkpoint(made).problems[0])


# prepare.


def test_prepare_makes_a_sidecar_for_the_sizes(source: Path) -> None:
    made = prepare(source, tensor_parallel_size=2, pipeline_parallel_size=2, dtype="float16", strict=True)

    options = Sidecar.open(made).options
    assert options.parallel == Parallel(tensor=2, pipeline=2)
    assert (options.engine, options.dtype, options.strict) == (DEFAULT_ENGINE, DType.F16, True)
    assert prepare(str(source), dtype="auto") == make_sidecar(source, OPTIONS)


def test_prepare_returns_other_directories_unchanged(source: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "plain", config=CONFIG | {"quantization_config": None}, scheme="dense")
    trtllm_ct.convert_checkpoint(source, tmp_path / "modelopt")

    for directory in (tmp_path / "plain", tmp_path / "modelopt", prepare(source)):
        assert prepare(directory) == directory
    with pytest.raises(DetectionError):
        prepare(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"dtype": "int8"}, UsageError, "dtype: expected auto or bfloat16"),
        ({"tensor_parallel_size": 0}, UsageError, "sizes from 1 to 4096"),
        ({"tensor_parallel_size": 4, "strict": True}, PlanError, "o_proj"),
    ],
)
def test_prepare_raises_for_what_cannot_be_served(
    source: Path, arguments: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        prepare(source, **arguments)


def test_prepare_warns_about_dequantized_modules_and_row_wise_o_proj(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "trtllm_ct")
    write_checkpoint(tmp_path / "a", config=CONFIG, scheme="int4-g32")
    write_checkpoint(tmp_path / "b", config=CONFIG, scheme="fp8-channel-token", kv=True)

    prepare(tmp_path / "a")
    prepare(tmp_path / "b", dense_o_proj=True)
    prepare(tmp_path / "b")

    said = [record.getMessage() for record in caplog.records]
    assert any("14 modules are dequantized: W4A16_AWQ holds groups of 64 or 128" in each for each in said)
    assert any("2 modules are dequantized: dense_o_proj" in each for each in said)
    assert sum("quantizes them at a fixed scale of 1" in each and "dense_o_proj=True" in each for each in said) == 1


def test_a_head_that_differs_from_the_table_is_read_by_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """config.json of the sidecar says that they are not tied. No other process compares the two again."""
    source = tmp_path / "tied"
    write_checkpoint(
        source,
        config=CONFIG | {"tie_word_embeddings": True},
        edit=lambda stored: stored.update({"lm_head.weight": stored["model.embed_tokens.weight"] * 2}),
    )
    directory = make_sidecar(source, OPTIONS)
    monkeypatch.setattr("trtllm_ct.pipeline.open.probe_checkpoint", None)

    assert json.loads((directory / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in Sidecar.open(directory).plan.delivered_specs
