"""Side files: which are carried, which are left out, and which links are followed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from deep_folders import make_deep

from trtllm_ct.base.errors import CatalogError
from trtllm_ct.checkpoint import remote_code
from trtllm_ct.checkpoint.folder import Folder
from trtllm_ct.checkpoint.side_files import copy_side_files as copy_into
from trtllm_ct.checkpoint.side_files import side_files
from trtllm_ct.checkpoint.snapshot import Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable


def copy_side_files(source: Path, out: Path, *options: Any) -> Any:
    """Copy into a directory, which is made, and removed again if it stays empty."""
    out.mkdir(exist_ok=True)
    try:
        with Folder(out) as folder:
            files = side_files(source, *options)
            copy_into(source, files, folder)
            return files
    finally:
        with suppress(OSError):
            out.rmdir()


CARRIED = [
    "LICENSE",
    "README.md",
    "additional_chat_templates/tool_use.jinja",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "recipe.yaml",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
]

LEFT = [
    ".cache/huggingface/download/x.metadata",
    ".git/config",
    ".gitattributes",
    "__pycache__/modeling_custom.cpython-311.pyc",
    "config.json",
    "consolidated.00.pth",
    "golden.npz",
    "hf_quant_config.json",
    "model-00001-of-00001.safetensors",
    "model.ckpt",
    "model.gguf",
    "model.onnx",
    "model.onnx_data",
    "model.safetensors.index.json",
    "params.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "sub/__pycache__/x.pyc",
    "sub/adapter.safetensors",
    "tf_model.h5",
    "flax_model.msgpack",
    "training.pt",
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make(tmp_path / "source")


def make(directory: Path, *names: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(name)
    return directory


def test_known_files_are_copied_and_weights_configuration_and_hidden_files_are_not(
    source: Path, tmp_path: Path
) -> None:
    make(source, *CARRIED, *LEFT)
    out = tmp_path / "out"

    assert copy_side_files(source, out).carried == tuple(CARRIED)

    found = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert found == CARRIED
    assert all((out / name).read_text() == name for name in CARRIED)


UNKNOWN = ["assets/figure.png", "modeling_custom.py", "notes.xyz", "run.sh", "sub/config.json", "tokenizer.model.pkl"]


def test_other_files_are_named_and_left_out(source: Path, tmp_path: Path) -> None:
    make(source, *UNKNOWN, "tokenizer.json")

    files = copy_side_files(source, tmp_path / "out")

    assert files.carried == ("tokenizer.json",)
    assert files.left_out == ("assets/", "modeling_custom.py", "notes.xyz", "run.sh", "sub/", "tokenizer.model.pkl")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tokenizer.json"]


@pytest.mark.parametrize(
    ("pattern", "carried"),
    [
        ("assets", ["assets/figure.png"]),
        ("assets/*.png", ["assets/figure.png"]),
        ("assets/*.jpg", []),
        ("*.sh", ["run.sh"]),
        ("*", UNKNOWN),
        ("figure.png", []),
        ("training.pt", ["training.pt"]),
        ("model.safetensors", []),
        ("config.json", []),
    ],
)
def test_a_pattern_carries_more(source: Path, tmp_path: Path, pattern: str, carried: list[str]) -> None:
    make(source, *UNKNOWN, "training.pt", "model.safetensors", "config.json")

    copied = copy_side_files(source, tmp_path / "out", [pattern]).carried

    assert [name for name in copied if name != "training.pt" or pattern != "*"] == carried


def test_code_that_auto_map_names_is_carried_with_what_it_imports(source: Path) -> None:
    """Remote code of models and of tokenizers; nothing else that ends in .py."""
    make(source, "other.py", "unnamed.py", "far.py")
    auto_map = {"AutoModel": "modeling_x.Model", "AutoConfig": "owner/name--far.Config"}
    (source / "config.json").write_text(json.dumps({"auto_map": auto_map}))
    (source / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["tok_x.Slow", None]}}))
    (source / "modeling_x.py").write_text("import os\nfrom .helper import help\n")
    (source / "helper.py").write_text("from .modeling_x import Model\n")
    (source / "tok_x.py").write_text("")

    files = side_files(source)

    assert files.carried == ("helper.py", "modeling_x.py", "tokenizer_config.json")
    assert files.code == ("helper.py", "modeling_x.py")
    assert files.left_out == ("far.py", "other.py", "tok_x.py", "unnamed.py")


def test_code_that_imports_itself_many_times_is_read_once(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": ["big.Model", "big.Other"]}}))
    (source / "big.py").write_text("from .big import Model\n" * 1000 + "from .other import x\n" * 1000)
    (source / "other.py").write_text("from .big import Model\n" * 1000)
    contents: list[str] = []
    read = remote_code._content

    def counted(snapshot: Snapshot, name: str, limit: int) -> bytes:
        contents.append(name)
        return read(snapshot, name, limit)

    monkeypatch.setattr(remote_code, "_content", counted)

    assert remote_code.named_code(Snapshot.of(source)) == {"big.py", "other.py"}
    assert sorted(name for name in contents if name.endswith(".py")) == ["big.py", "other.py"]


@pytest.mark.parametrize("auto_map", [3, [], {"AutoModel": 3}, {"AutoModel": "../x.Y"}, {"AutoModel": "/etc/passwd"}])
def test_a_strange_auto_map_names_nothing(source: Path, auto_map: object) -> None:
    make(source, "x.py")
    (source / "config.json").write_text(json.dumps({"auto_map": auto_map}))

    assert side_files(source).carried == ()


def test_a_directory_without_side_files_is_accepted(source: Path, tmp_path: Path) -> None:
    assert copy_side_files(source, tmp_path / "out").carried == ()


def test_links_of_a_hub_cache_arrive_as_files(tmp_path: Path) -> None:
    make(tmp_path / "hub" / "blobs", "0123")
    source = tmp_path / "hub" / "snapshots" / "abc"
    (source / "additional_chat_templates").mkdir(parents=True)
    (source / "tokenizer.json").symlink_to("../../blobs/0123")
    (source / "additional_chat_templates/tool.jinja").symlink_to("../../../blobs/0123")
    out = tmp_path / "out"

    assert copy_side_files(source, out).carried == ("additional_chat_templates/tool.jinja", "tokenizer.json")
    assert (out / "tokenizer.json").read_text() == "0123"
    assert not (out / "tokenizer.json").is_symlink()


def test_links_inside_of_the_directory_are_followed(source: Path, tmp_path: Path) -> None:
    """As a volume of Kubernetes has them; the path to the directory may have links too."""
    make(source, "..2024/tokenizer.json")
    (source / "..data").symlink_to("..2024")
    (source / "tokenizer.json").symlink_to("..data/tokenizer.json")
    (tmp_path / "link").symlink_to("source")

    assert copy_side_files(tmp_path / "link", tmp_path / "out").carried == ("tokenizer.json",)


SECRET = "the secret of another"


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    """A folder outside of the checkpoint whose content must not be copied."""
    folder = make(tmp_path / "secrets")
    (folder / "id_rsa").write_text(SECRET)
    return folder


@pytest.mark.parametrize(
    "name",
    ["special_tokens_map.json", "README.md", "unknown.xyz", "config.json", "params.json", "modeling_x.py"],
)
@pytest.mark.parametrize("carry", [(), ("*",)], ids=["known files", "all files"])
@pytest.mark.parametrize("target", ["id_rsa", "."], ids=["file", "folder"])
def test_links_out_of_the_checkpoint_are_refused_by_name(
    source: Path, tmp_path: Path, secrets: Path, name: str, carry: tuple[str, ...], target: str
) -> None:
    (source / name).symlink_to(secrets / target)

    with pytest.raises(CatalogError, match=f"{name}: .* a link to .*secrets.* leads out of the checkpoint"):
        copy_side_files(source, tmp_path / "out", carry)

    assert not (tmp_path / "out").exists()


def test_links_of_links_and_folders_of_links_are_refused(source: Path, tmp_path: Path, secrets: Path) -> None:
    make(source, "sub/README.md")
    (source / "sub/inner").symlink_to(secrets)
    (source / "tokenizer.json").symlink_to("sub/inner/id_rsa")

    with pytest.raises(CatalogError, match="out of the checkpoint") as caught:
        copy_side_files(source, tmp_path / "out", ["sub"])

    assert len(caught.value.faults) == 2


def test_blobs_that_are_a_link_are_not_followed(tmp_path: Path, secrets: Path) -> None:
    """A prepared archive may have the layout of a hub cache."""
    source = tmp_path / "hub" / "snapshots" / "abc"
    source.mkdir(parents=True)
    (tmp_path / "hub" / "blobs").symlink_to(secrets)
    (source / "tokenizer.json").symlink_to("../../blobs/id_rsa")

    with pytest.raises(CatalogError, match="out of the checkpoint"):
        copy_side_files(source, tmp_path / "out")


def test_a_link_that_is_put_there_in_the_meantime_is_not_followed(
    source: Path, tmp_path: Path, secrets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the examination of a folder and the opening of a file in it."""
    make(source, "additional_chat_templates/id_rsa.jinja")
    (secrets / "id_rsa.jinja").write_text(SECRET)
    plain = os.path.realpath

    def replaced(path: Path, *, strict: bool = False) -> str:
        place = plain(path, strict=strict)
        folder = source / "additional_chat_templates"
        if str(path).endswith(".jinja") and not folder.is_symlink():
            folder.rename(tmp_path / "moved")
            folder.symlink_to(secrets)
        return place

    monkeypatch.setattr(os.path, "realpath", replaced)

    with pytest.raises(CatalogError, match=r"not a directory|too many levels"):
        copy_side_files(source, tmp_path / "out")

    assert not any(path.read_text() == SECRET for path in tmp_path.glob("out/*/*"))


def socket_at(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        cwd = Path.cwd()
        os.chdir(path.parent)  # the path of a socket is short
        try:
            server.bind(path.name)
        finally:
            os.chdir(cwd)


STRANGE = {
    "a named pipe": os.mkfifo,
    "a socket": socket_at,
    "a directory where a file is due": lambda path: path.mkdir(),
    "10000000000 bytes": lambda path: (path.touch(), os.truncate(path, 10**10)),
}


@pytest.mark.parametrize(("said", "put"), STRANGE.items(), ids=STRANGE)
def test_what_is_no_small_regular_file_is_refused_at_once(
    source: Path, tmp_path: Path, said: str, put: Callable[[Path], object]
) -> None:
    put(source / "tokenizer.json")
    started = time.monotonic()

    with pytest.raises(CatalogError, match=f"tokenizer.json: .*{said}"):
        copy_side_files(source, tmp_path / "out")

    assert time.monotonic() - started < 2
    assert not (tmp_path / "out").exists()


def test_names_that_are_no_text_are_left_out(source: Path) -> None:
    for name in (b"README\xff", b"README\n", b"README\x1b[2J"):
        (source / os.fsdecode(name)).write_text("")

    assert len(side_files(source, ["*"]).left_out) == 3


def test_a_read_only_file_can_be_replaced_afterwards(source: Path, tmp_path: Path) -> None:
    make(source, "README.md")
    (source / "README.md").chmod(0o444)

    copy_side_files(source, tmp_path / "out")

    assert (tmp_path / "out/README.md").stat().st_mode & 0o200


@pytest.mark.parametrize("target", ["../blobs/gone", "tokenizer.json"], ids=["dangling", "to itself"])
def test_a_link_that_leads_nowhere_is_refused_before_anything_is_copied(
    source: Path, tmp_path: Path, target: str
) -> None:
    make(source, "README.md")
    (source / "tokenizer.json").symlink_to(target)

    with pytest.raises(CatalogError, match=f"tokenizer.json: .* found a link to {target}"):
        copy_side_files(source, tmp_path / "out")

    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", [".", "..", "../source/sub"])
def test_a_link_that_leads_in_a_circle_is_refused(source: Path, tmp_path: Path, target: str) -> None:
    make(source, "sub/README.md")
    (source / "sub/circle").symlink_to(target)

    with pytest.raises(CatalogError, match="circle: expected a file or a directory"):
        copy_side_files(source, tmp_path / "out", ["sub"])


def test_all_bad_links_are_named_together(source: Path, tmp_path: Path) -> None:
    for name in ("x", "y"):
        (source / name).symlink_to("gone")

    with pytest.raises(CatalogError) as caught:
        copy_side_files(source, tmp_path / "out")

    assert len(caught.value.faults) == 2


class TestCode:
    """A name that many things can have is no reason to copy a program."""

    @pytest.mark.parametrize(
        "name",
        [
            "README.pyz", "README.html", "chat_template.dill", "tokenizer.model.npy", "SYSTEM_PROMPT.vbs",
            "LICENSE.lnk",
            "NOTICE.desktop", "MODEL_CARD.scr", "chat_template.pyd", "tokenizer.model.pkl", "README.py", "COPYING.bash",
            "chat_template.so", "chat_template.so.1", "README.pt2", "README.pl", "README.rb", "LICENSE.EXE",
            "license.unknown", "USE_POLICY.zip", "NOTICE.7z",
        ],
    )  # fmt: skip
    def test_an_open_pattern_carries_no_kind_that_can_run(self, source: Path, tmp_path: Path, name: str) -> None:
        make(source, name, "tokenizer.json")

        files = copy_side_files(source, tmp_path / "out")

        assert (files.carried, files.left_out) == (("tokenizer.json",), (name,))

    @pytest.mark.parametrize(
        "name",
        [
            "README", "README.zh-CN.md", "LICENSE-2.0", "LICENSE.pdf", "LICENSE.rst", "NOTICE.txt", "COPYING",
            "chat_template.json", "tokenizer.model.v3", "tokenizer.model.v7m1", "SYSTEM_PROMPT.txt", "USE_POLICY.md",
        ],
    )  # fmt: skip
    def test_texts_are_carried(self, source: Path, tmp_path: Path, name: str) -> None:
        make(source, name)

        assert copy_side_files(source, tmp_path / "out").carried == (name,)

    @pytest.mark.parametrize("name", ["LICENSE", "README.md", "tokenizer.json", "chat_template.jinja"])
    @pytest.mark.parametrize(
        "start",
        [
            b"\x7fELF\x02\x01", b"#!/bin/sh\n", b"#! /usr/bin/env python\n", b"PK\x03\x04", b"\x80\x04\x95",
            b"\x80\x02}",
            b"MZ\x90\x00\x03", b"\x93NUMPY\x01\x00", b"\x1f\x8b\x08", b"\x00asm\x01", b"\xca\xfe\xba\xbe",
            b"7z\xbc\xaf'\x1c",
        ],
    )  # fmt: skip
    def test_a_program_under_a_known_name_is_left_out_unless_it_is_asked_for(
        self, source: Path, tmp_path: Path, name: str, start: bytes
    ) -> None:
        (source / name).write_bytes(start + b"rest")

        files = copy_side_files(source, tmp_path / "out")
        asked = copy_side_files(source, tmp_path / "out", [name])

        assert (files.carried, files.left_out) == ((), (name,))
        assert (asked.carried, asked.code) == ((name,), (name,))

    @pytest.mark.parametrize("text", [b"MZ is a language.\n", b"#! a title\n", b"\x80", b"", b"{}", "ü".encode()])
    def test_texts_that_begin_alike_are_carried(self, source: Path, tmp_path: Path, text: bytes) -> None:
        (source / "README.md").write_bytes(text)

        assert copy_side_files(source, tmp_path / "out").carried == ("README.md",)

    def test_nothing_that_is_carried_can_be_executed(self, source: Path, tmp_path: Path) -> None:
        make(source, "README", "run.sh")
        for name in ("README", "run.sh"):
            (source / name).chmod(0o755)

        files = copy_side_files(source, tmp_path / "out", ["run.sh"])

        assert files.code == ("run.sh",)
        assert all((tmp_path / "out" / name).stat().st_mode & 0o111 == 0 for name in files.carried)


def test_folders_too_deep_are_an_error(source: Path) -> None:
    make(source / "assets")
    make_deep(source / "assets")

    assert side_files(source).left_out == ("assets/",)
    with pytest.raises(CatalogError, match="more than 32 folders in each other"):
        side_files(source, ["assets"])
    subprocess.run(["rm", "-rf", source], check=True)
