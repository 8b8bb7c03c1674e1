"""The directory of sidecars: what is cleared, and what is not because somebody else may need it."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest
from builders import tiny_config, write_checkpoint
from deep_folders import make_deep
from other_user import IS_ROOT, OTHER_USER

from trtllm_ct.base.errors import SidecarError
from trtllm_ct.plan.options import PlanOptions
from trtllm_ct.serve import cache, leases
from trtllm_ct.serve.cache import clear_sidecars
from trtllm_ct.serve.listing import list_sidecars
from trtllm_ct.serve.sidecar import SIDECAR_FILE, make_sidecar

if TYPE_CHECKING:
    from pathlib import Path

OPTIONS = PlanOptions(to="tensorrt_llm")

pytestmark = pytest.mark.usefixtures("sidecar_cache")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    config = tiny_config(hidden=128, intermediate=256)
    return write_checkpoint(tmp_path / "model", config=config, scheme="int4-g64", tokenizer=True).directory


def _let_go(made: Path) -> None:
    os.close(leases._held.pop(made / SIDECAR_FILE))


class TestWhatIsNotCleared:
    """A user may set `TRTLLM_CT_CACHE` to a folder that holds other things."""

    def test_work_folders_and_others_with_similar_names_are_kept(self, sidecar_cache: Path) -> None:
        key = "0" * 32
        names = [".big-model.partial", ".mythesis.partial", f".{key}.partial", f".{key}.0123abcd.partial"]
        for name in names:
            (sidecar_cache / name).mkdir(parents=True)
            (sidecar_cache / name / "thesis.tex").write_text("years")
            os.utime(sidecar_cache / name, (0, 0))
        (sidecar_cache / ".x.partial").symlink_to("nowhere")
        (sidecar_cache / f".{key}.00000000.partial").symlink_to("nowhere")
        (sidecar_cache / f".{key}.11111111.partial").write_text("a file")
        os.utime(sidecar_cache / f".{key}.11111111.partial", (0, 0))

        assert clear_sidecars().removed == ()

        assert all((sidecar_cache / name / "thesis.tex").read_text() == "years" for name in names)
        assert (sidecar_cache / f".{key}.11111111.partial").is_file()

    @pytest.mark.parametrize("name", ["mine", "0" * 32])
    def test_a_directory_of_the_user_with_a_file_of_that_name_is_kept_and_said(
        self, sidecar_cache: Path, name: str
    ) -> None:
        (sidecar_cache / name).mkdir(parents=True)
        (sidecar_cache / name / SIDECAR_FILE).write_text('{"my": "notes"}')
        (sidecar_cache / name / "thesis.tex").write_text("years")

        assert clear_sidecars().others == (sidecar_cache / name,)

        assert (sidecar_cache / name / "thesis.tex").read_text() == "years"

    def test_a_prepared_directory_to_which_something_was_added_is_kept(self, source: Path) -> None:
        made = make_sidecar(source, OPTIONS)
        _let_go(made)
        (made / "thesis.tex").write_text("years")

        assert clear_sidecars().others == (made,)

        (made / "thesis.tex").unlink()
        assert clear_sidecars().removed == (made,)

    def test_a_link_to_a_directory_is_not_followed(self, source: Path, sidecar_cache: Path, tmp_path: Path) -> None:
        made = make_sidecar(source, OPTIONS)
        _let_go(made)
        made.rename(tmp_path / made.name)
        made.symlink_to(tmp_path / made.name)

        assert clear_sidecars().others == (made,)

        assert (tmp_path / made.name / SIDECAR_FILE).is_file()

    @pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777])
    def test_nothing_is_cleared_where_others_can_write(self, source: Path, sidecar_cache: Path, mode: int) -> None:
        made = make_sidecar(source, OPTIONS)
        _let_go(made)
        sidecar_cache.chmod(mode)

        with pytest.raises(SidecarError, match="other users can write to it"):
            clear_sidecars()

        assert made.is_dir()

    def test_a_directory_of_another_user_is_kept(self, source: Path) -> None:
        made = make_sidecar(source, OPTIONS)
        _let_go(made)
        if not IS_ROOT:
            return  # Nobody else can own a directory here.
        os.chown(made, OTHER_USER, OTHER_USER)

        assert clear_sidecars().others == (made,)

    def test_a_root_that_can_not_be_listed_is_an_error(self, sidecar_cache: Path) -> None:
        sidecar_cache.parent.mkdir(parents=True, exist_ok=True)
        sidecar_cache.write_text("a file")

        for call in (clear_sidecars, list_sidecars):
            with pytest.raises(SidecarError, match="not a directory"):
                call()

    def test_a_deep_directory_is_listed_as_damaged(self, sidecar_cache: Path) -> None:
        (sidecar_cache / "deep").mkdir(parents=True)
        (sidecar_cache / "deep" / SIDECAR_FILE).write_text("{}")
        make_deep(sidecar_cache / "deep")

        (listed,) = list_sidecars()

        assert listed.fault is not None
        assert "more than 32 folders in each other" in listed.fault.found
        subprocess.run(["rm", "-rf", sidecar_cache], check=True)

    def test_without_a_home_directory_the_variable_is_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("TRTLLM_CT_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)

        with pytest.raises(SidecarError, match="Set HOME, or TRTLLM_CT_CACHE"):
            cache.cache_root()
