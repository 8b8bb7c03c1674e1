from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from builders import write_checkpoint
from hub_cache import COMMIT, HubCache

from trtllm_ct.base.errors import DetectionError
from trtllm_ct.serve.hub import Repository, repository_named

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.reference


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubCache:
    return HubCache(tmp_path / "hub", monkeypatch)


@pytest.mark.parametrize("name", ["RedHatAI/Qwen3-8B-quantized.w4a16", "gpt2", "org/name_1.0"])
def test_ids_of_repositories(name: str) -> None:
    assert repository_named(name, "v1") == Repository(name=name, revision="v1")


@pytest.mark.parametrize("name", ["/models/x", "./x", "../x/y", "a/b/c", "", "a b", "~/x", "x/"])
def test_paths_are_none(name: str) -> None:
    assert repository_named(name) is None


def test_a_directory_goes_before_a_repository_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    assert repository_named("org/name") is None
    assert repository_named(tmp_path / "nothing") is None


def test_the_cache_answers_without_a_network(hub: HubCache, tmp_path: Path) -> None:
    snapshot = hub.add("org/name", write_checkpoint(tmp_path / "made").directory)
    repository = Repository(name="org/name")

    assert repository.configuration() == repository.checkpoint() == snapshot
    assert repository.pinned(snapshot) == Repository(name="org/name", revision=COMMIT)


def test_a_pinned_repository_stays_when_its_branch_moves(hub: HubCache, tmp_path: Path) -> None:
    made = write_checkpoint(tmp_path / "made").directory
    first = hub.add("org/name", made)
    pinned = Repository(name="org/name").pinned(first)
    second = hub.add("org/name", made, commit="f" * 40)

    assert pinned.checkpoint() == first
    assert Repository(name="org/name").checkpoint() == second
    assert Repository(name="org/name", revision="main").checkpoint() == second


@pytest.mark.parametrize(("name", "revision"), [("org/other", None), ("org/name", "v9")])
def test_what_the_cache_lacks_is_named_with_what_to_do(
    hub: HubCache, tmp_path: Path, name: str, revision: str | None
) -> None:
    hub.add("org/name", write_checkpoint(tmp_path / "made").directory)

    with pytest.raises(DetectionError, match=f"^{name}: .*hf auth login"):
        Repository(name=name, revision=revision).checkpoint()
