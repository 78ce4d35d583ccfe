"""`dgemma bench full` and `dgemma bench experts` end to end on the small shape."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from dgemma.bench import experts, full
from dgemma.bench.cli import app
from dgemma.checkpoints.load import load_model
from dgemma.quant.modules import matrices


def test_written_loaded_and_run(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    result = full.run("small", "w4a8", steps=2, threads=1, directory=kept)
    packed = matrices(load_model(kept, "cpu"))
    assert {matrix.kind for matrix in packed.values()} == {"w4a8", "int8"}
    assert result.file_bytes == sum(path.stat().st_size for path in kept.glob("*.safetensors"))
    assert sum(matrix.nbytes for matrix in packed.values()) < result.weight_bytes < result.file_bytes
    assert 0 < result.step.least <= result.step.median
    assert result.peak_bytes is None or result.peak_bytes > result.weight_bytes
    before = (kept / "model.safetensors").stat().st_mtime_ns
    full.run("small", "w4a8", steps=1, threads=1, directory=kept)
    assert (kept / "model.safetensors").stat().st_mtime_ns == before


def test_report_and_wrong_calls() -> None:
    told = CliRunner().invoke(app, ["full", "--shape", "small", "--format", "fp8", "--steps", "1", "--threads", "1"])
    assert told.exit_code == 0, told.output
    for line in ("peak memory", "written to swap", "denoising step"):
        assert line in told.output
    with pytest.raises(ValueError, match="shape 'huge' is not known"):
        full.run("huge")
    with pytest.raises(ValueError, match="steps must be at least 1"):
        full.run("small", steps=0)


def test_experts_in_every_format() -> None:
    result = experts.run("small", formats=("int8", "w4a8"), repeats=2, threads=1)
    assert list(result.seconds) == ["bf16", "int8", "w4a8"]
    assert list(result.ratios) == ["int8", "w4a8"]
    assert result.rows == 32 * 2 / 4
    told = CliRunner().invoke(app, ["experts", "--shape", "small", "--formats", "fp8", "--repeats", "1"])
    assert told.exit_code == 0, told.output
    assert "times as fast as bf16" in told.output
    with pytest.raises(ValueError, match="experts must be 2 to 4, not 9"):
        experts.run("small", experts=9)
