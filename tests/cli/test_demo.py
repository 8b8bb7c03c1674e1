"""`trtllm-ct demo`, which runs all steps on the bundled checkpoint."""

from __future__ import annotations

from importlib import resources

import pytest
from command_line import Done, run_cli

from trtllm_ct.pipeline.open import plan_checkpoint


@pytest.mark.reference
class TestRun:
    @pytest.fixture(scope="class")
    @classmethod
    def done(cls) -> Done:
        return run_cli("demo")

    def test_it_shows_every_step_in_order(self, done: Done):
        assert (done.code, done.err) == (0, "")
        steps = (
            "1. Inspect",
            "2. Convert",
            "3. Verify",
            "4. Generate 40 tokens",
            "Next, with a checkpoint of your own",
        )
        places = [done.out.index(step) for step in steps]
        assert places == sorted(places)

    def test_it_shows_evidence_modes_verification_and_speed(self, done: Done):
        assert 'quant_method is "compressed-tensors"' in done.out
        assert "model.layers.{0..3}.self_attn.q_proj" in done.out
        assert "W4A16_AWQ g128" in done.out
        assert ": good (39 modules)" in done.out
        assert "28 native tensors, worst error 0 in" in done.out
        assert "(40 tokens in " in done.out

    def test_it_writes_readable_text(self, done: Done):
        """The generated words are from the training text; with a broken layout they would be noise."""
        start = done.out.index("The import statement combines two operations")
        text = done.out[start : done.out.index("(40 tokens in ")]
        words = text.split()
        assert len(words) > 25
        assert "module" in text.split("then it", 1)[1]

    def test_it_ends_with_commands_for_the_users_own_checkpoint(self, done: Done):
        end = done.out[done.out.index("Next, with") :]
        for command in ("trtllm-ct inspect DIR", "trtllm-ct convert DIR OUT --to modelopt", "trtllm-ct verify DIR OUT"):
            assert command in end


def test_the_bundled_checkpoint_is_small_and_whole() -> None:
    with resources.as_file(resources.files("trtllm_ct") / "cli" / "demo_data") as directory:
        assert sum(path.stat().st_size for path in directory.iterdir()) < 8e6
        assert {"config.json", "recipe.yaml", "tokenizer.json"} <= {path.name for path in directory.iterdir()}
        assert plan_checkpoint(directory, strict=True).quant_config.quant_algo == "W4A16_AWQ"
