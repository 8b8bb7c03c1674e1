from __future__ import annotations

import pytest

from trtllm_ct.checkpoint.hub.naming import Repository, repository_named

HUB = "https://huggingface.co"


@pytest.mark.parametrize(
    ("text", "revision", "folder"),
    [
        ("org/name", "main", ""),
        ("org/name@v1.0", "v1.0", ""),
        ("org/name@refs/pr/3", "refs/pr/3", ""),
        ("hf://org/name", "main", ""),
        ("hf://org/name@v1", "v1", ""),
        (f"{HUB}/org/name", "main", ""),
        (f"{HUB}/org/name/", "main", ""),
        (f"{HUB}/org/name/tree/v1", "v1", ""),
        (f"{HUB}/org/name/tree/main/sub/inner", "main", "sub/inner"),
        (f"{HUB}/org/name/tree/refs%2Fpr%2F3/sub", "refs/pr/3", "sub"),
        (f"{HUB}/org/name/tree/refs/pr/3", "refs/pr/3", ""),
        (f"{HUB}/org/name/blob/main/config.json", "main", ""),
        (f"{HUB}/org/name/resolve/v1/sub/model.safetensors?download=true", "v1", "sub"),
        ("https://hf.co/org/name", "main", ""),
    ],
)
def test_ids_and_urls_name_repositories(text: str, revision: str, folder: str) -> None:
    assert repository_named(text) == Repository(name="org/name", revision=revision, folder=folder)


@pytest.mark.parametrize(
    "text",
    [
        *("name", "/org/name", "./org/name", "../x/y", "org/name/x", "org/", "org/na me", "org/name@", "org\\name"),
        *("~/x", "", "\0", "s3://bucket/x", "https://example.com/org/name", "http://[::1"),
    ],
)
def test_other_texts_name_none(text: str) -> None:
    assert repository_named(text) is None


def test_another_endpoint_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")

    assert repository_named("https://mirror.example/org/name/tree/v1") == Repository(name="org/name", revision="v1")


@pytest.mark.parametrize("text", ["org/name", "org/name@v1"])
def test_a_repository_is_called_as_it_was(text: str) -> None:
    assert str(repository_named(text)) == text
