import pytest

from benchmarks.orchestration import orchestration
from nanodlm.config import PRESETS
from tests.support.helpers import prose


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_pipeline_runs_both_ways_and_again_from_the_store(tmp_path_factory: pytest.TempPathFactory) -> None:
    corpus = tmp_path_factory.mktemp("corpus") / "prose.txt"
    corpus.write_text("\n\n".join(prose(100)))
    config = PRESETS["demo"].replace(
        data={"source": str(corpus), "sample_by": "paragraph", "val_tokens": 1000, "tokenizer": "bytes"},
        model={"seq_len": 16, "n_layers": 1, "n_heads": 2, "d_model": 16, "d_ff": 32},
        train={"batch_size": 4, "optimizer": "adamw", "max_steps": 60, "cooldown_steps": 5},
        eval={"max_rows": 16, "batch_size": 8},
        sample={"num_samples": 2, "num_steps": 4},
    )
    result = orchestration(config, repeats=1)
    assert result["flow_seconds"] > 0
    assert 0 < result["cached_run_seconds"] < result["flow_seconds"]
    assert len(result["train_ratios"]) == 1
    assert all(0 < result[f"train_beside_{name}"] < 4 for name in ("direct", "flow"))
