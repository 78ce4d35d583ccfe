"""Peak memory of loading, measured in a process of its own.

Measured is VmHWM, the highest resident set, less what the process held before: anonymous memory and the mapped pages of
the files, so that reading through a map counts too. The kernel could drop those pages; the loader must not rely on it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dgemma.checkpoints.save import save_model
from dgemma.config import GenerationConfig, ModelConfig
from dgemma.model.network import DiffusionGemma

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import json, sys
import torch
from dgemma.checkpoints.load import load_model
directory, dtype = sys.argv[1:]
def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name + ":"))
torch.ones(8).bfloat16().float() @ torch.ones(8)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # starts VmHWM anew
before, anonymous = status("VmRSS"), status("RssAnon")
model = load_model(directory, "cpu", dtype)
loaded = status("RssAnon") - anonymous
sum(float(tensor.view(-1)[::512].float().sum()) for tensor in model.state_dict().values())  # touches every page
size = sum(tensor.nbytes for tensor in model.state_dict().values())
print(json.dumps({"size": size, "peak": status("VmHWM") - before, "anonymous": loaded}))
"""


@pytest.fixture(scope="module")
def large(make_model, tmp_path_factory):
    """About 250 MB in bfloat16, no tensor above 3% of it."""
    sizes = {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 128}
    base = make_model(vision=False).config
    layers = ("sliding_attention", "sliding_attention", "sliding_attention", "full_attention") * 4
    values = {
        **{f: getattr(base, f) for f in base.__dataclass_fields__},
        **sizes,
        "num_experts": 32,
        "layer_types": layers,
    }
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = DiffusionGemma(ModelConfig(**values))
    finally:
        torch.set_default_dtype(torch.float32)
    generator = torch.Generator().manual_seed(0)
    for tensor in model.state_dict().values():
        tensor.uniform_(-1, 1, generator=generator)
    directory = tmp_path_factory.mktemp("large")
    save_model(model, directory, GenerationConfig(), max_shard_bytes=100_000_000)
    return directory


def measure(directory, dtype):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CODE, str(directory), dtype]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures through Linux's /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_peak_is_within_a_tenth_of_the_weights(large, dtype):
    used = measure(large, dtype)
    assert used["size"] > 200e6
    assert 0.95 * used["size"] < used["peak"] < 1.1 * used["size"]
    if dtype == "bfloat16":
        assert used["anonymous"] < 0.05 * used["size"]  # still mapped: not a copy of the file
