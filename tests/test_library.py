"""Tests of the library's side effects on its caller, and of its use without the pipeline's packages."""

import subprocess
import sys

from tests.helpers import ROOT

_PRUNE = """
import torch
import scop

torch.manual_seed(0)
seeded = []
torch.cuda.manual_seed_all = seeded.append  # a GPU that the caller uses later must not start with our seed
model = scop.make_model("resnet20")
batches = [(torch.randn(32, 3, 16, 16), torch.randint(0, 10, (32,))) for _ in range(2)]


def state():
    flags = torch.backends.cudnn
    return (
        torch.get_rng_state().tolist(),
        (flags.benchmark, flags.deterministic, flags.allow_tf32),
        torch.get_float32_matmul_precision(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
    )


before = state()
for source in ("gaussian", "shuffle"):
    scores = scop.train_knockoffs(model, batches, epochs=1, source=source)
plan = scop.select_channels(model, scores, prune_rate=0.45)
scop.select_channels(model, method="random", input_shape=(3, 16, 16))
pruned = scop.prune(model, plan)
assert state() == before
assert seeded == []
assert pruned.conv1.out_channels == 16
"""
_OPTIONAL = ("boto3", "docker", "kfp", "matplotlib", "mlflow", "onnx", "pandas", "plotly", "psutil", "rich", "yaml")
_HIDE = f"""
import sys

for name in {_OPTIONAL}:
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
"""


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_pruning_has_no_side_effects_and_prints_nothing() -> None:
    result = python(_PRUNE)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_pruning_needs_no_optional_package() -> None:
    result = python(_HIDE + _PRUNE)
    assert (result.returncode, result.stderr) == (0, "")


def test_names_the_extra_that_installs_a_missing_package() -> None:
    result = python(_HIDE + "from pipelines.cli.main import main\nsys.exit(main(['run']))")
    assert result.returncode == 2
    assert result.stderr.startswith("scop: error: module yaml is not installed; run: pip install 'scop[pipeline]'")
