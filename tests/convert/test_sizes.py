"""A converted directory records its sizes and release, and refuses sizes that it does not hold."""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
from builders import tiny_config, write_checkpoint
from command_line import run_cli

from trtllm_ct import prepare
from trtllm_ct.base.errors import UsageError
from trtllm_ct.config.json_file import read_json_object
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.convert.sizes import ConvertedDirectory, require_sizes
from trtllm_ct.engine.parallel import Parallel
from trtllm_ct.engine.platform import SMS, Platform
from trtllm_ct.engine.releases import RELEASES
from trtllm_ct.pipeline.open import open_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from trtllm_ct.pipeline.open import Checkpoint

# 2 K/V heads of 64 rows: one block of 128 rows, which two ranks would cut apart.
BLOCKS = tiny_config(hidden=256, heads=4, intermediate=512)
EXPERTS = tiny_config("Qwen3MoeForCausalLM", hidden=256, heads=4, intermediate=512, moe_intermediate_size=256)
SIZES = (1, 2, 4, 8)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "blocks", config=BLOCKS, scheme="fp8-block").directory


def converted(source: Path, *, scheme: str = "out", **options: Any) -> Path:
    out = source.with_name(scheme)
    convert_checkpoint(source, out, **options)
    return out


def opened(out: Path) -> ConvertedDirectory:
    directory = ConvertedDirectory.open(out)
    assert directory is not None
    return directory


@pytest.mark.parametrize("sizes", [Parallel(), Parallel(tensor=2, pipeline=2)])
@pytest.mark.parametrize("engine", ["stock-1.0", "stock-1.3"])
def test_sizes_and_release_are_recorded_beside_what_engines_read(source: Path, sizes: Parallel, engine: str) -> None:
    out = converted(source, parallel=sizes, engine=engine)

    document = read_json_object(out / "hf_quant_config.json")
    assert document["planned_for"] == {"engine": engine, "parallel": sizes.to_dict()}
    assert document["producer"]["name"] == "modelopt"
    assert "planned_for" not in document["quantization"]
    assert (opened(out).engine, opened(out).parallel) == (engine, sizes)


def test_plain_weights_have_no_record_and_hold_every_size(source: Path) -> None:
    out = converted(source, to="dense")

    assert ConvertedDirectory.open(out) is None
    assert require_sizes(out, Parallel(tensor=4)) is None


@pytest.mark.parametrize("scheme", ["fp8-block", "int4-g128", "int4-g64", "int8-channel", "fp8-channel-token", "nvfp4"])
@pytest.mark.parametrize("config", [BLOCKS, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("expert", [1, 2])
def test_a_size_is_held_exactly_if_a_plan_for_it_gives_every_module_its_mode(
    tmp_path: Path, scheme: str, config: dict[str, Any], expert: int
) -> None:
    """The rule for a directory and the planning for other sizes come to the same result."""
    source = write_checkpoint(tmp_path / "model", config=config, scheme=scheme).directory
    out, checkpoint = opened(converted(source)), open_checkpoint(source)
    layers = {module.name: module.layer for module in checkpoint.plan().modules}

    held = {}
    for size in (size for size in SIZES[:3] if size % expert == 0):
        parallel = Parallel(tensor=size, expert=expert)
        other = {module.name: module.layer for module in checkpoint.plan(parallel=parallel).modules}
        held[size] = other == layers
        assert (not out.faults(parallel)) is held[size], size
    assert held.get(1, True)


def test_sizes_that_are_not_held_are_refused_with_a_remedy(source: Path) -> None:
    out = converted(source)

    assert opened(out).faults(Parallel()) == opened(out).faults(Parallel(pipeline=2)) == ()
    (fault,) = opened(out).faults(Parallel(tensor=2))
    assert fault.where == str(out)
    assert "FP8_BLOCK_SCALES: each rank's 64 rows are no multiple of 128" in fault.found
    assert "k_proj, v_proj" in fault.found
    assert fault.remedy == "Convert the source again with --tp 2, or serve with tensor-parallel size 1."


def test_a_directory_for_several_ranks_holds_fewer_too(source: Path) -> None:
    out = converted(source, parallel=Parallel(tensor=2))

    assert [size for size in SIZES if not opened(out).faults(Parallel(tensor=size))] == [1, 2]


def test_attention_data_parallelism_leaves_attention_whole(source: Path) -> None:
    assert opened(converted(source)).faults(Parallel(tensor=2, attention_dp=True)) == ()


def test_sizes_that_do_not_divide_the_model_are_refused(source: Path) -> None:
    wheres = {fault.where for fault in opened(converted(source)).faults(Parallel(tensor=3))}

    assert "config.json: num_attention_heads" in wheres


@pytest.mark.parametrize("damage", [{"planned_for": None}, {"planned_for": {"engine": "stock-1.2"}}, {}])
def test_a_directory_without_a_readable_record_is_a_fault(source: Path, damage: dict[str, Any]) -> None:
    out = converted(source)
    path = out / "hf_quant_config.json"
    document = read_json_object(path)
    del document["planned_for"]
    path.write_text(json.dumps(document | damage))

    fault = opened(out).record_fault
    assert fault is not None
    assert fault.where == f"{path}: planned_for"
    assert opened(out).faults(Parallel(pipeline=2)) == (fault,)
    assert opened(out).faults(Parallel()) == ()


@pytest.mark.parametrize(
    ("made_for", "serves", "warns"),
    [("stock-1.3", "stock-1.2", True), ("stock-1.2", "stock-1.2", False), ("stock-1.0", "stock-1.3", False)],
)
def test_an_older_release_than_that_of_the_plan_is_named(source: Path, made_for: str, serves: str, warns: bool) -> None:
    fault = opened(converted(source, engine=made_for)).older_release(serves)

    assert (fault is not None) is warns
    assert fault is None or fault.remedy == f"Convert the source again with --engine {serves}."


# The GPU.


@pytest.mark.parametrize("sm", [None, *SMS])
def test_the_sm_is_recorded_if_the_plan_was_made_for_one(source: Path, sm: int | None) -> None:
    out = converted(source, sm=sm)

    record = read_json_object(out / "hf_quant_config.json")["planned_for"]
    assert record.get("sm", "none") == (sm or "none")
    assert opened(out).sm == sm


BIASED = tiny_config("Qwen2ForCausalLM", hidden=256, heads=4, intermediate=512)
NARROW = tiny_config(hidden=256, heads=4, intermediate=576)
OF_GPUS = {
    "fp8-block": (NARROW, "fp8-block"),
    "int4-g128": (BLOCKS, "int4-g128"),
    "int4 with bias": (BIASED, "int4-g128"),
    "int8": (BLOCKS, "int8-channel"),
    "nvfp4": (BLOCKS, "nvfp4"),
    "mxfp4": (BLOCKS, "mxfp4"),
    "experts": (EXPERTS, "int4-g128"),
    "fp8 experts": (EXPERTS, "fp8-block"),
}


@pytest.fixture(scope="module")
def of_gpus(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """Return the checkpoint of an entry of `OF_GPUS`, which is written once."""

    @cache
    def checkpoint(kind: str) -> Checkpoint:
        config, scheme = OF_GPUS[kind]
        return open_checkpoint(
            write_checkpoint(tmp_path_factory.mktemp("model"), config=config, scheme=scheme).directory
        )

    return checkpoint


@pytest.fixture(scope="module")
def layers_of(of_gpus: Callable[[str], Checkpoint]) -> Callable[[str, str, int], dict[str, Any]]:
    """Return the layer configurations that a plan for a release and an SM gives the modules; each plan is made once."""

    @cache
    def planned(kind: str, release: str, sm: int) -> dict[str, Any]:
        return {module.name: module.layer for module in of_gpus(kind).plan(engine=release, sm=sm).modules}

    return planned


@pytest.mark.pairs
@pytest.mark.parametrize("kind", OF_GPUS)
@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)
@pytest.mark.parametrize("made_for", SMS)
def test_a_gpu_is_refused_exactly_if_a_plan_for_it_lacks_one_of_the_modes(
    tmp_path: Path,
    of_gpus: Callable[[str], Checkpoint],
    layers_of: Callable[[str, str, int], dict[str, Any]],
    kind: str,
    release: Any,
    made_for: int,
) -> None:
    """The rule for a directory is that of planning, which takes the modes of the directory where they run."""
    convert_checkpoint(of_gpus(kind).directory, tmp_path / "out", engine=release.name, sm=made_for)
    directory = ConvertedDirectory.open(tmp_path / "out")
    modes = layers_of(kind, release.name, made_for)

    for sm in SMS if directory is not None else ():
        other = layers_of(kind, release.name, sm)
        lost = any(modes[name] is not None and other[name] is None for name in modes)
        assert bool(directory.gpu_faults(Platform(release=release, sm=sm))) is lost, sm
    assert directory is None or directory.gpu_faults(Platform(release=release)) == ()


def test_the_remedy_for_another_gpu_is_an_option_of_convert(source: Path) -> None:
    config = tiny_config(hidden=256, heads=4, intermediate=512)
    out = converted(write_checkpoint(source.with_name("int4"), config=config, scheme="int4-g128").directory, sm=90)

    (fault,) = opened(out).gpu_faults(Platform(release=RELEASES[1], sm=120))
    assert "it was converted for SM90" in fault.expected
    assert "W4A16_AWQ has no Linear on SM120" in fault.found
    assert fault.remedy == "Convert the source again with --engine stock-1.2 --sm 120."
    with pytest.raises(UsageError, match="SM120"):
        require_sizes(out, Parallel(), Platform(release=RELEASES[1], sm=120))


# Warnings of a conversion with default sizes.


def said(source: Path, **options: Any) -> list[str]:
    out = source.with_name("warned")
    report = convert_checkpoint(source, out, overwrite=True, **options)
    assert report.to_dict()["warnings"] == list(report.warnings)
    return [text for text in report.warnings if "tensor-parallel size" in text]


def test_a_conversion_with_default_sizes_names_those_that_would_be_wrong(source: Path) -> None:
    """Two ranks cut keys and values apart, four the queries and the output's columns too."""
    at_2, at_4 = said(source)

    start = "at tensor-parallel size {}, an engine would misread the directory, as it cuts modules apart: {}"
    assert at_2.startswith(start.format(2, "k_proj, v_proj (FP8_BLOCK_SCALES: each rank's 64 rows"))
    assert at_4.startswith(start.format(4, "q_proj, k_proj, v_proj (FP8_BLOCK_SCALES: each rank's 64 rows"))
    assert "o_proj" in at_4
    assert at_2.endswith("; convert with --tp")


def test_nothing_is_said_of_sizes_of_an_engine_without_the_class(tmp_path: Path) -> None:
    """No release of the engine has Granite, so none would misread the directory."""
    sizes = {"hidden": 512, "heads": 8, "kv_heads": 2, "intermediate": 1024}
    for name, said_of in (("LlamaForCausalLM", 2), ("GraniteForCausalLM", 0)):
        built = write_checkpoint(tmp_path / name, config=tiny_config(name, **sizes), scheme="fp8-block")
        assert len(said(built.directory)) == said_of


def test_wider_heads_are_wrong_at_larger_sizes_only(tmp_path: Path) -> None:
    config = tiny_config(hidden=512, heads=4, intermediate=1024)
    source = write_checkpoint(tmp_path / "model", config=config, scheme="fp8-block").directory

    (text,) = said(source)

    assert text.startswith("at tensor-parallel size 4, ")


def test_each_module_is_named_with_its_own_reason(tmp_path: Path) -> None:
    """At 4 ranks heads are repeated, and columns are cut; at 8 ranks more modules are wrong than at 4."""
    config = tiny_config(hidden=512, heads=8, kv_heads=2, intermediate=1536)
    source = write_checkpoint(tmp_path / "model", config=config, scheme="int4-g128").directory

    at_4, at_8 = said(source)

    heads = (
        "k_proj, v_proj (W4A16_AWQ: engines repeat its 2 K/V heads for ranks that outnumber them, but not their scales)"
    )
    assert at_4 == (
        f"at tensor-parallel size 4, an engine would misread the directory, as it cuts modules apart: {heads}; convert "
        "with --tp"
    )
    assert at_8 == at_4.replace("size 4", "size 8").replace(
        heads,
        f"{heads}; o_proj (W4A16_AWQ: each rank's 64 columns are no multiple of 128); "
        "down_proj (W4A16_AWQ: each rank's 192 columns are no multiple of 128)",
    )


@pytest.mark.parametrize("options", [{"to": "dense"}, {"parallel": Parallel(tensor=2)}])
def test_other_conversions_say_nothing(source: Path, options: dict[str, Any]) -> None:
    assert said(source, **options) == []


def test_schemes_that_can_be_cut_say_nothing(tmp_path: Path) -> None:
    """At 4 ranks there are more of them than K/V heads, and engines don't repeat the scales of rows."""
    config = tiny_config(hidden=256, heads=8, kv_heads=8, intermediate=512)
    source = write_checkpoint(tmp_path / "model", config=config, scheme="fp8-channel-token").directory

    assert said(source) == []


def test_biases_that_engines_repeat_wrongly_are_named(tmp_path: Path) -> None:
    config = tiny_config("Qwen2ForCausalLM", hidden=256, heads=4, intermediate=512)
    source = write_checkpoint(tmp_path / "model", config=config, scheme="fp8-channel-token").directory

    (text,) = said(source)

    assert text.startswith("at tensor-parallel size 4, ")
    assert "bias" in text


# Where sizes are refused.


def test_prepare_refuses_them(source: Path) -> None:
    out = converted(source)

    assert prepare(out) == out
    with pytest.raises(UsageError, match="each rank's 64 rows"):
        prepare(out, tensor_parallel_size=2)


@pytest.mark.parametrize("command", ["verify", "doctor"])
def test_the_command_line_refuses_them(source: Path, command: str) -> None:
    out = converted(source)

    assert run_cli(command, out, "--tp", 1).code == 0
    done = run_cli(command, out, "--tp", 2)
    assert done.code == 1
    assert "each rank's 64 rows are no multiple of 128" in done.out
    assert "--tp 2" in done.out


def test_verify_with_the_source_checks_weights_and_sizes(source: Path) -> None:
    out = converted(source)

    assert run_cli("verify", source, out, "--tp", 1).code == run_cli("verify", source, out).code == 0
    faults = run_cli("verify", source, out, "--tp", 2, "--json").document["faults"]
    assert [fault["where"] for fault in faults] == [str(out)]
