"""The state that the parts of one loader share: pickled records, restored sidecars, remembered mappings, and errors."""

from __future__ import annotations

import os
import pickle
import shutil
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from builders import Built, rewrite_config, tiny_config, write_checkpoint
from engine_fixtures import BINDINGS

from trtllm_ct.base.errors import LoadError, SidecarError, UsageError
from trtllm_ct.base.schemes import QuantAlgo
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.engine.parallel import Parallel, Rank
from trtllm_ct.pipeline.open import open_checkpoint
from trtllm_ct.plan.options import PlanOptions
from trtllm_ct.serve import leases, sidecar
from trtllm_ct.serve.rank_weights import load_rank_weights
from trtllm_ct.serve.session import LoadSession
from trtllm_ct.serve.sidecar import SIDECAR_FILE, Sidecar, is_sidecar, known_sidecars, make_sidecar

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

CONFIG = tiny_config(hidden=128, layers=1)
OPTIONS = PlanOptions(to="tensorrt_llm")

pytestmark = pytest.mark.usefixtures("sidecar_cache")


@dataclass(frozen=True)
class Mapped:
    """The attributes of an engine's mapping that this package reads."""

    tp_size: int = 1
    pp_size: int = 1
    moe_ep_size: int = 1
    enable_attention_dp: bool = False
    tp_rank: int = 0
    pp_rank: int = 0
    moe_ep_rank: int = 0
    cp_size: int = 1

    def pp_layers(self, num_layers: int, /) -> Sequence[int]:
        each = num_layers // self.pp_size
        return range(self.pp_rank * each, (self.pp_rank + 1) * each)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Built, Built]:
    """A model and a draft model; each test gets copies of them."""
    folder = tmp_path_factory.mktemp("written")
    small = tiny_config(hidden=64, layers=1)
    return (
        write_checkpoint(folder / "model", config=CONFIG, scheme="int4-g64"),
        write_checkpoint(folder / "draft", config=small, scheme="int8-channel"),
    )


def copied(built: Built, folder: Path) -> Built:
    return replace(built, directory=Path(shutil.copytree(built.directory, folder / built.directory.name)))


@pytest.fixture
def built(written: tuple[Built, Built], tmp_path: Path) -> Built:
    return copied(written[0], tmp_path)


@pytest.fixture
def made(built: Built) -> Path:
    return make_sidecar(built.directory, OPTIONS)


@pytest.fixture
def draft(written: tuple[Built, Built], tmp_path: Path) -> Path:
    return make_sidecar(copied(written[1], tmp_path).directory, OPTIONS)


def record_of(directory: Path) -> dict[str, Any]:
    return Sidecar.open(directory).record()


def lose(*directories: Path) -> None:
    """Delete the directories, as if this were a node that never had them."""
    for directory in directories:
        shutil.rmtree(directory)


def elsewhere(session: LoadSession, monkeypatch: pytest.MonkeyPatch) -> LoadSession:
    """Return the unpickled session, as in another process that has prepared nothing."""
    state = pickle.dumps(session)
    monkeypatch.setattr(sidecar, "_known", {})
    loaded: LoadSession = pickle.loads(state)
    return loaded


def same(one: Mapping[str, Tensor] | None, other: Mapping[str, Tensor] | None) -> bool:
    assert one is not None
    assert other is not None
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Which records are pickled.


def test_a_session_with_given_records_pickles_only_those(
    made: Path, draft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node makes every sidecar that it lacks, and may have to download a model for each of them."""
    own = {str(made): record_of(made)}
    session = LoadSession(own)

    assert session.records() == own
    assert elsewhere(session, monkeypatch).records() == own


def test_a_session_without_records_pickles_all_that_this_process_prepared(
    made: Path, draft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = LoadSession()

    records = {str(directory): record_of(directory) for directory in (made, draft)}
    assert session.records() == records == known_sidecars()
    assert elsewhere(session, monkeypatch).records() == records


def test_a_sidecar_prepared_after_the_loader_is_included(built: Built, draft: Path) -> None:
    session = LoadSession()

    later = make_sidecar(built.directory, OPTIONS)

    assert session.records().keys() == {str(draft), str(later)}


def test_a_session_with_empty_records_pickles_none(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = LoadSession({})

    assert session.records() == {}
    assert elsewhere(session, monkeypatch).records() == {}


def test_only_the_records_are_pickled(made: Path) -> None:
    """No tensors, open files or plans are pickled, even after loading, because every worker gets a copy."""
    session = LoadSession({str(made): record_of(made)})
    before = pickle.dumps(session)

    session.configure(made, {"mapping": Mapped()})
    session.load(made)

    assert pickle.dumps(session) == before
    assert pickle.loads(before).reports == {}


def test_records_are_copied(made: Path) -> None:
    given = {str(made): record_of(made)}
    session = LoadSession(given)

    given.clear()
    session.records().clear()

    assert session.records().keys() == {str(made)}


# On a node that lacks a sidecar.


@pytest.mark.parametrize("told", ["its own", "all"])
def test_a_missing_sidecar_is_made_before_the_configuration_is_read(
    made: Path, monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    want = LoadSession().load(made)
    session = LoadSession({str(made): record_of(made)} if told == "its own" else None)
    other_process = elsewhere(session, monkeypatch)
    lose(made)

    other_process.configure(str(made), {})

    assert (made / "config.json").is_file()
    assert same(other_process.load(made), want)


def test_loading_weights_alone_also_makes_a_missing_sidecar(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Releases differ in whether a process reads the configuration before it loads weights."""
    other_process = elsewhere(LoadSession(), monkeypatch)
    lose(made)

    assert other_process.load(str(made))
    assert is_sidecar(made)


def test_a_missing_draft_sidecar_is_made_with_the_model(
    made: Path, draft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine reads the configuration of a draft model without calling the loader."""
    other_process = elsewhere(LoadSession(), monkeypatch)
    lose(made, draft)

    other_process.configure(made, {})

    assert (draft / "config.json").is_file()


def test_a_sidecar_that_is_deleted_meanwhile_is_made_again(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other_process = elsewhere(LoadSession(), monkeypatch)
    want = other_process.load(made)
    lose(made)

    assert same(other_process.load(made), want)
    assert is_sidecar(made)


def test_an_error_of_another_model_is_raised_when_that_model_is_loaded(
    made: Path, draft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_process = elsewhere(LoadSession(), monkeypatch)
    lose(draft)
    (tmp_path / "draft").rename(tmp_path / "gone")

    other_process.configure(made, {})

    assert other_process.load(made)
    with pytest.raises(SidecarError, match=rf"{tmp_path / 'draft'}: .*no such directory on this node.*same path"):
        other_process.load(draft)


def test_a_node_with_a_different_source_raises(made: Path, built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    other_process = elsewhere(LoadSession(), monkeypatch)
    lose(made)
    rewrite_config(built.directory, lambda config: config.update(rms_norm_eps=1e-5))

    with pytest.raises(SidecarError, match=r"another config\.json.*prepare again"):
        other_process.configure(made, {})
    assert not made.exists()


def test_a_sidecar_outside_the_records_is_not_made(made: Path, draft: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other_process = elsewhere(LoadSession({str(made): record_of(made)}), monkeypatch)
    lose(made, draft)

    other_process.configure(made, {})

    assert is_sidecar(made)
    assert not draft.exists()


def test_a_loaded_sidecar_is_in_use(made: Path) -> None:
    """The cache must not be cleared while a server uses the sidecar."""
    os.close(leases._held.pop(made / SIDECAR_FILE))
    assert is_free(made)

    LoadSession().load(made)

    assert not is_free(made)


def is_free(directory: Path) -> bool:
    with leases.unused(directory / SIDECAR_FILE) as free:
        return free


# Which rank it loads for.


def test_the_mapping_of_the_configuration_is_remembered(built: Built) -> None:
    """Releases up to 1.1 call `load_weights(directory)` without a mapping."""
    parallel = Parallel(tensor=2)
    made = make_sidecar(built.directory, replace(OPTIONS, parallel=parallel))
    session = LoadSession()

    session.configure(made, {"mapping": Mapped(tp_size=2, tp_rank=1)})
    session.configure(made, {"mapping": None})
    session.load(made)

    assert session.report is not None
    assert session.report.rank == 1
    want = load_rank_weights(Sidecar.open(made), Rank(parallel=parallel, tensor=1, layers=(0,)))[1]
    assert session.report.bytes_read == want.bytes_read


def test_a_mapping_passed_to_load_takes_precedence(built: Built) -> None:
    made = make_sidecar(built.directory, replace(OPTIONS, parallel=Parallel(tensor=2)))
    session = LoadSession()

    session.configure(made, {"mapping": Mapped(tp_size=2, tp_rank=1)})
    session.load(made, Mapped(tp_size=2, tp_rank=0))

    assert session.report is not None
    assert session.report.rank == 0


def test_without_a_mapping_only_one_rank_is_supported(built: Built, made: Path) -> None:
    assert LoadSession().load(made)
    two = make_sidecar(built.directory, replace(OPTIONS, parallel=Parallel(tensor=2)))

    with pytest.raises(UsageError) as caught:
        LoadSession().load(two)

    (fault,) = caught.value.faults
    assert (fault.where, fault.found) == ("load_weights", "none, neither here nor with a configuration")
    assert fault.expected == "a mapping, which says which rank's weights to load"
    assert "CompressedTensorsCheckpointLoader()" in fault.remedy


def test_sizes_that_need_other_modes_raise_before_the_model_is_built(made: Path) -> None:
    """With four ranks, each has half a group of o_proj, but the engine was configured for a native mode."""
    with pytest.raises(SidecarError, match=r"o_proj.*prepare with the sizes that LLM is given: tensor_parallel_size=4"):
        LoadSession().configure(made, {"mapping": Mapped(tp_size=4)})


def test_a_moe_load_balancer_raises(made: Path) -> None:
    with pytest.raises(UsageError, match=r"moe_load_balancer: expected none.*trtllm-ct convert") as caught:
        LoadSession().configure(made, {"moe_load_balancer": object()})
    assert len(caught.value.faults) == 1

    LoadSession().configure(made, {"moe_load_balancer": None})


def test_unsupported_kinds_of_parallelism_raise(made: Path) -> None:
    with pytest.raises(UsageError, match=r"mapping\.cp_size: expected 1: .*found 2"):
        LoadSession().load(made, Mapped(cp_size=2))


# Directories that are not sidecars.


def test_a_checkpoint_that_was_not_prepared_raises(built: Built) -> None:
    """Stock TensorRT-LLM would load it wrongly, or only a part of it."""
    for call in (lambda session: session.load(built.directory), lambda session: session.configure(built.directory, {})):
        with pytest.raises(UsageError) as caught:
            call(LoadSession())
        (fault,) = caught.value.faults
        assert fault.where == str(built.directory)
        assert "the checkpoint itself" in fault.found
        assert f"trtllm_ct.prepare({str(built.directory)!r})" in fault.remedy
        assert "trtllm_ct.install()" in fault.remedy


@pytest.mark.parametrize("kind", ["modelopt", "dense", "empty", "missing"])
def test_other_directories_are_left_to_the_engine(built: Built, tmp_path: Path, kind: str) -> None:
    directory = tmp_path / "other"
    if kind in {"modelopt", "dense"}:
        convert_checkpoint(built.directory, directory, to=kind, parallel=Parallel(tensor=4))
    elif kind == "empty":
        directory.mkdir()
    session = LoadSession()

    session.configure(directory, {"moe_load_balancer": object(), "mapping": Mapped(tp_size=4)})

    assert session.load(directory) is None
    assert (session.report, session.reports) == (None, {})


def test_a_converted_directory_that_does_not_hold_the_sizes_is_refused(built: Built, tmp_path: Path) -> None:
    convert_checkpoint(built.directory, tmp_path / "out")

    LoadSession().configure(tmp_path / "out", {"mapping": Mapped(tp_size=1)})
    with pytest.raises(UsageError, match="Convert the source again with --tp 4"):
        LoadSession().configure(tmp_path / "out", {"mapping": Mapped(tp_size=4)})


def test_a_damaged_sidecar_raises_instead_of_going_to_the_engine(made: Path) -> None:
    (made / SIDECAR_FILE).write_text("{}")

    with pytest.raises(SidecarError, match=rf"{SIDECAR_FILE}.*prepare again"):
        LoadSession().load(made)


# What a session knows after configuring and loading.


def test_modes_are_known_after_configure(made: Path, draft: Path) -> None:
    """The Linear method that the engine lacks must be installed before the engine builds the model."""
    session = LoadSession({str(made): record_of(made), str(draft): record_of(draft)})
    assert not session.needs(QuantAlgo.W4A16_AWQ)

    session.configure(made, {})

    assert session.needs(QuantAlgo.W4A16_AWQ)
    assert session.needs(QuantAlgo.W8A16), "of the draft, whose Linears are built without asking"
    assert not session.needs(QuantAlgo.W4A16)
    assert not session.needs(QuantAlgo.W4A16_GPTQ)


def test_reports_are_kept_by_directory(made: Path, draft: Path) -> None:
    session = LoadSession()
    session.configure(made, {})
    assert session.report is None

    session.load(draft)
    assert session.report is None
    session.load(made)

    assert list(session.reports) == [str(draft), str(made)]
    assert session.report == session.reports[str(made)]
    assert session.report.modes == {"W4A16_AWQ g64": 7}


class BuiltModel:
    """A model of the engine after loading, with a Linear that the engine left unquantized."""

    @staticmethod
    def named_modules(*, remove_duplicate: bool) -> list[tuple[str, Any]]:
        return []

    def load_weights(self) -> None: ...


BuiltModel.load_weights.__module__ = "modeling_utils"


def test_the_model_is_checked_against_the_plan_loaded_last(made: Path, draft: Path) -> None:
    session = LoadSession()
    session.check(BuiltModel(), {})
    for directory in (made, draft):
        session.load(directory)
        with pytest.raises(LoadError) as caught:
            session.check(BuiltModel(), {})
        plan = open_checkpoint(Sidecar.open(directory).source).plan_for(OPTIONS)
        assert {fault.where for fault in caught.value.faults} == {each.name for each in plan.modules if each.weight}


# Calls in the order of the engine.


def loader(**arguments: Any) -> Any:
    return import_module(BINDINGS).CompressedTensorsCheckpointLoader(**arguments)


def call(loader: Any, directory: Path, **keywords: Any) -> dict[str, Tensor]:
    """Load weights with the arguments that the imitated release passes."""
    told = import_module("tensorrt_llm._double").RELEASE.mapping_argument
    mapping = import_module("tensorrt_llm.mapping").Mapping()
    return dict(loader.load_weights(str(directory), **({"mapping": mapping} if told else {}), **keywords))


def test_the_loader_works_again_after_cleanup(engine: Any, made: Path, draft: Path) -> None:
    """The engine drops all parts of a loader when a model is loaded, and then uses the same loader again."""
    own = loader()
    want = {directory: call(own, directory) for directory in (made, draft)}

    for _ in range(2):
        own.cleanup()
        own.cleanup()
        for directory in (draft, made):
            own.load_config(str(directory), trust_remote_code=True)
            assert same(call(own, directory), want[directory])

    assert own.report is not None
    assert own.reports.keys() == {str(made), str(draft)}


def test_the_mapping_survives_cleanup(engine: Any, built: Built) -> None:
    made = make_sidecar(built.directory, replace(OPTIONS, parallel=Parallel(tensor=2)))
    mapping = import_module("tensorrt_llm.mapping").Mapping(world_size=2, rank=1, tp_size=2)
    own = loader()

    own.load_config(str(made), trust_remote_code=True, mapping=mapping)
    own.cleanup()
    own.weight_loader.load_weights(str(made))

    assert own.report is not None
    assert own.report.rank == 1


def test_unknown_keywords_of_later_releases_are_accepted(engine: Any, made: Path) -> None:
    own, want = loader(), LoadSession().load(made)

    weights = call(own, made, model=object(), source_identity="x", use_consolidated=True, never_heard_of=1)

    assert same(weights, want)


@pytest.mark.parametrize("context_only", [True, False])
def test_a_worker_for_a_part_of_the_model_reads_no_files_of_the_sidecar(
    engine: Any, made: Path, context_only: bool
) -> None:
    """The newest release opens the files itself for such a worker, without asking the weight loader."""
    decoder = type("Decoder", (), {"disagg_context_only": context_only})()
    model = type("Model", (), {"model": decoder})()

    assert same(call(loader(), made, model=model), LoadSession().load(made))


def test_a_plain_draft_goes_to_the_engine_with_all_keywords(engine: Any, built: Built, tmp_path: Path) -> None:
    """The loader passes on exactly the keywords that it got, because releases differ in what they accept."""
    convert_checkpoint(built.directory, tmp_path / "dense", to="dense")
    stock = import_module("tensorrt_llm._torch.models.checkpoints.hf.weight_loader").HfWeightLoader
    heard = []
    original = stock.load_weights

    def listen(self: Any, checkpoint_dir: str, **keywords: Any) -> Any:
        heard.append(keywords)
        return original(self, checkpoint_dir, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stock, "load_weights", listen)
        weights = call(loader(), tmp_path / "dense", never_heard_of=1)

    told = {"mapping"} if import_module("tensorrt_llm._double").RELEASE.mapping_argument else set()
    assert [keywords.keys() for keywords in heard] == [{"never_heard_of"} | told]
    assert weights.keys() == built.dense.keys()


def test_a_pickled_loader_contains_its_records(engine: Any, made: Path, draft: Path) -> None:
    own = {str(made): record_of(made)}

    assert pickle.loads(pickle.dumps(loader(sidecars=own)))._session.records() == own
    assert pickle.loads(pickle.dumps(loader()))._session.records().keys() == {str(made), str(draft)}


def test_the_parts_of_a_loader_can_be_pickled_alone(engine: Any, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's own loader can hold this package's parts, as TensorRT-LLM's documentation shows."""
    bindings = import_module(BINDINGS)
    state = pickle.dumps([bindings.CompressedTensorsWeightLoader(), bindings.CompressedTensorsConfigLoader()])
    monkeypatch.setattr(sidecar, "_known", {})
    lose(made)

    weights, config = pickle.loads(state)

    config.load(str(made))
    assert is_sidecar(made)
    assert weights.load_weights(str(made))
