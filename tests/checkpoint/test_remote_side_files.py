"""Of a checkpoint far away, the side files are fetched that a directory's report and copies need."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtllm_ct.base.regular_files import CODE_BYTES, CONFIGURATION_BYTES
from trtllm_ct.checkpoint.remote_code import CONFIGURATIONS
from trtllm_ct.checkpoint.remote_side_files import fetched_side_files, left_behind
from trtllm_ct.checkpoint.side_files import side_files

AUTO_MAP = b'{"auto_map": {"AutoModel": "modeling.Model"}}'
FILES = {
    "config.json": AUTO_MAP,
    "hf_quant_config.json": b"{}",
    "params.json": b"{}",
    "model.safetensors": b"weights",
    "model.safetensors.index.json": b"{}",
    "pytorch_model.bin": b"weights",
    "tokenizer.json": b"{}",
    "tokenizer.model": b"#!/bin/sh",
    "preprocessor_config.json": b"{}",
    "README.md": b"text",
    "modeling.py": b"from .other import x",
    "other.py": b"",
    "unnamed.py": b"",
    "training.log": b"text",
    ".gitattributes": b"text",
    "LICENSE.sh": b"#!/bin/sh",
    "additional_chat_templates/tool.jinja": b"{{ x }}",
    "additional_chat_templates/deep/tool.jinja": b"{{ x }}",
    "assets/picture.png": b"picture",
    "assets/inner/picture.png": b"picture",
    "assets/model.safetensors": b"weights",
    "assets/.hidden": b"text",
    "onnx/model.onnx": b"weights",
    ".cache/file": b"text",
    "__pycache__/modeling.pyc": b"code",
    "code/modeling.py": b"",
    "tokenizer/vocab.txt": b"text",
}
PATTERNS = ["*", "*.log", "assets", "assets/*.png", "assets/inner/*", "*/*", "onnx", "*.py", "code/*.py", ".*"]


@settings(max_examples=300, deadline=None)
@given(
    names=st.lists(st.sampled_from(sorted(FILES)), unique=True, max_size=12),
    carry=st.lists(st.sampled_from(PATTERNS), unique=True, max_size=2),
)
def test_copies_and_report_are_those_of_the_directory(names: list[str], carry: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        whole, fetched = Path(folder, "whole"), Path(folder, "fetched")
        sizes = {name: len(FILES[name]) for name in names}
        for place, kept in ((whole, names), (fetched, fetched_side_files(sizes, carry))):
            place.mkdir()
            for name in kept:
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                (place / name).write_bytes(FILES[name])

        here, there = side_files(whole, carry), side_files(fetched, carry)

    assert (there.carried, there.code) == (here.carried, here.code)
    assert {*there.left_out, *left_behind(sizes, carry)} == set(here.left_out)


@pytest.mark.parametrize("name", sorted(FILES))
def test_weights_are_never_fetched_as_side_files(name: str) -> None:
    fetched = fetched_side_files({name: 1}, ["*", "*/*", "*/*/*"])

    assert not [file for file in fetched if file.endswith(".safetensors")]


def test_what_is_only_looked_at_has_a_limit() -> None:
    """A file that is too large to be read for names of code is not fetched for them."""
    large = dict.fromkeys(CONFIGURATIONS, CONFIGURATION_BYTES + 1) | {"modeling.py": CODE_BYTES + 1}

    assert set(fetched_side_files(large, ())) == {name for name in CONFIGURATIONS if name != "config.json"}
    assert "modeling.py" in left_behind(large, ())


@pytest.mark.parametrize("name", ["a\0.py", "\ud800.py", "a\nb.py", "tokenizer\0.json", "assets/a\0.png"], ids=ascii)
def test_a_name_that_no_file_here_can_have_is_reported_and_not_fetched(name: str) -> None:
    for carry in ((), ("*", "assets")):
        assert fetched_side_files({name: 1}, carry) == []
        assert left_behind({name: 1}, carry)
