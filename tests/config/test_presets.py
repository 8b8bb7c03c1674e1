"""Presets: bare names, and their meaning in the release that wrote them."""

from __future__ import annotations

import pytest

from trtllm_ct.config.presets import PRESETS, former_meaning, parse_release, preset_scheme


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("W4A16", "int4 group 128"),
        ("w4a16_asym", "int4 group 128 asymmetric"),
        ("W8A16", "int8 group 128"),
        ("W8A8", "int8 channel, input int8 token dynamic"),
        ("FP8", "fp8 tensor, input fp8 tensor"),
        ("FP8_dynamic", "fp8 channel, input fp8 token dynamic"),
        ("FP8_BLOCK", "fp8 block 128x128, input fp8 group 128 dynamic"),
        ("NVFP4", "fp4 tensor_group 16, input fp4 tensor_group 16 dynamic local"),
        ("MXFP4xFP8", "fp4 group 32, input fp8 group 128 dynamic"),
        ("UNQUANTIZED", "weights unquantized"),
    ],
)
def test_a_name_in_any_case_stands_for_full_arguments(name, label):
    scheme = preset_scheme(name, None)
    assert scheme is not None
    assert scheme.label() == label


def test_other_names_are_no_presets():
    assert preset_scheme("group_0", None) is None


@pytest.mark.parametrize(
    ("name", "version", "label"),
    [
        ("W8A16", "0.17.1", "int8 channel"),
        ("W8A16", "0.18.0", "int8 group 128"),
        ("W8A16", "0.12.3.a20251114", "int8 channel"),
        ("W8A16", "1.0", "int8 group 128"),
        ("W8A16", None, "int8 group 128"),
        ("W8A16", "main", "int8 group 128"),
        ("W8A8", "0.4.0", "int8 tensor, input int8 tensor"),
        ("W8A8", "0.5.0", "int8 channel, input int8 token dynamic"),
        ("INT8", "0.4.0", "int8 channel, input int8 token dynamic"),
    ],
)
def test_a_name_has_the_meaning_of_the_release_that_wrote_it(name, version, label):
    scheme = preset_scheme(name, parse_release(version))
    assert scheme is not None
    assert scheme.label() == label


def test_names_that_changed_their_meaning_are_known():
    assert {name for name in PRESETS if former_meaning(name)} == {"W8A16", "W8A8"}


@pytest.mark.parametrize("version", [None, "", "main", "7"])
def test_a_version_without_numbers_gives_no_release(version):
    assert parse_release(version) is None
