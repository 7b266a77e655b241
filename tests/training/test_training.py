"""Training: loop, optimizer, weight averaging and recalibration."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

from scop import UserError, make_model
from scop.config import DenseSection
from scop.data.batches import Augmentation, Batches
from scop.data.dataset import Dataset
from scop.errors import Stopped
from scop.models.evaluation import measure_accuracy
from scop.storage.checkpoints import Checkpoints
from scop.training.checkpointing import Checkpointing
from scop.training.learning_rate import Schedule
from scop.training.loop import fit
from scop.training.supervised import Supervised, make_optimizer, recalibrate

CPU = torch.device("cpu")


def train(
    digits: Dataset,
    epochs: int = 2,
    checkpoints: Checkpoints | None = None,
    stop_after: int | None = None,
    stopping=lambda: False,
    **keys,
):
    """Train a fresh network; `stop_after` simulates a process that is killed after that epoch."""
    torch.manual_seed(0)
    model = make_model("tests.networks:Plain")
    section = DenseSection.model_validate({"epochs": epochs, "batch_size": 64, "lr": 0.05, "crop_padding": 1} | keys)
    batches = Batches(digits["train"], digits.info, 64, CPU, Augmentation(crop_padding=1), seed=section.seed)
    validation = Batches(digits["validation"], digits.info, 500, CPU)

    def validate() -> tuple[float, float]:
        accuracy = measure_accuracy(objective.result, validation, CPU)
        return accuracy.loss, accuracy.top1

    objective = Supervised(model, CPU, section)

    class Killed(Exception):
        pass

    def on_epoch(record) -> None:
        if stop_after is not None and record.epoch == stop_after + 1:
            raise Killed

    try:
        history = fit(
            objective,
            batches,
            make_optimizer(model, section),
            Schedule.of(section),
            label="test",
            validate=validate,
            checkpointing=Checkpointing(checkpoints, stopping),
            on_epoch=on_epoch,
        )
    except Killed:
        history = []
    objective.finish()
    return model, history


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(value, b.state_dict()[key]) for key, value in a.state_dict().items())


def test_training_learns(digits: Dataset) -> None:
    _, history = train(digits, epochs=6)
    assert history[-1].validation_top1 > 0.85
    assert history[-1].loss < history[0].loss


@pytest.mark.parametrize("epoch", [1, 3])
def test_resumes_after_a_stop_at_the_last_step_of_an_epoch(digits: Dataset, tmp_path: Path, epoch: int) -> None:
    expected, history = train(digits, epochs=3)
    steps = itertools.count(1)
    checkpoints = Checkpoints(str(tmp_path), "abc")
    with pytest.raises(Stopped, match=f"stopped in epoch {epoch} of 3"):
        train(digits, epochs=3, checkpoints=checkpoints, stopping=lambda: next(steps) == 20 * epoch)
    resumed, resumed_history = train(digits, epochs=3, checkpoints=checkpoints)
    assert same(expected, resumed)
    assert [(record.epoch, record.loss, record.top1) for record in resumed_history] == [
        (record.epoch, record.loss, record.top1) for record in history
    ]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_same_seed_reproduces_bit_for_bit(digits: Dataset, optimizer: str) -> None:
    lr = 0.05 if optimizer == "sgd" else 0.002
    first, again = (train(digits, optimizer=optimizer, lr=lr)[0] for _ in range(2))
    other, _ = train(digits, optimizer=optimizer, lr=lr, seed=1)
    assert same(first, again)
    assert not same(first, other)


def test_best_keeps_the_epoch_with_the_best_validation_top1(digits: Dataset) -> None:
    # The learning rate rises until it ruins the network, so the last epoch is not the best.
    model, history = train(digits, epochs=6, schedule="one_cycle", warmup_epochs=5.9, lr=20.0, keep="best")
    best = max(record.validation_top1 for record in history)
    assert best > history[-1].validation_top1
    validation = Batches(digits["validation"], digits.info, 500, CPU)
    assert measure_accuracy(model, validation, CPU).top1 == pytest.approx(best)


def test_rejects_best_without_a_validation_split(batches: Batches) -> None:
    model, section = make_model("tests.networks:Plain"), DenseSection()
    with pytest.raises(UserError, match="keep: best needs a validation split"):
        fit(
            Supervised(model, CPU, section),
            batches,
            make_optimizer(model, section),
            Schedule(1, keep="best"),
            label="test",
        )


def test_non_finite_loss_reports_step_and_learning_rate(digits: Dataset) -> None:
    with pytest.raises(UserError, match=r"the loss is (nan|inf) at step \d+, learning rate [\d.]+e\+\d+"):
        train(digits, lr=1e30)


def test_norms_and_biases_have_no_weight_decay() -> None:
    model = make_model("tests.networks:Plain")
    decaying, others = make_optimizer(model, DenseSection(weight_decay=0.1)).param_groups
    assert decaying["weight_decay"] == 0.1
    assert others["weight_decay"] == 0
    assert all(p.dim() > 1 for p in decaying["params"])
    assert all(p.dim() == 1 for p in others["params"])


def test_result_is_the_moving_average(digits: Dataset) -> None:
    """The result's weights and batch-norm statistics start after step 1; then w <- d w + (1 - d) w' per step."""
    torch.manual_seed(0)
    model = make_model("tests.networks:Plain")
    batches = Batches(digits["train"], digits.info, 64, CPU, Augmentation())
    section = DenseSection(epochs=1, batch_size=64, lr=0.05, ema=0.9, precision="fp32")
    objective = Supervised(model, CPU, section)
    expected: dict[str, torch.Tensor] = {}

    class Watched:
        state, start_epoch, loss = objective.state, objective.start_epoch, objective.loss

        def after_step(self) -> None:
            objective.after_step()
            for name, value in model.state_dict().items():
                known = expected.get(name)
                if not value.is_floating_point():
                    continue
                expected[name] = value.clone() if known is None else 0.9 * known + 0.1 * value

    fit(Watched(), batches, make_optimizer(model, section), Schedule(1), label="average")
    last = copy.deepcopy(model.state_dict())
    objective.finish()
    for name, value in last.items():  # counters are not averaged
        torch.testing.assert_close(model.state_dict()[name], expected.get(name, value), rtol=0, atol=1e-5)
    assert last["first_norm.num_batches_tracked"] == len(batches)
    assert not torch.allclose(model.state_dict()["first.weight"], last["first.weight"], atol=1e-4)


def test_recalibration_averages_all_batches_equally(digits: Dataset, model: nn.Module) -> None:
    batches = Batches(digits["train"], digits.info, 64, CPU, Augmentation(), seed=5)
    inputs: list[torch.Tensor] = []
    hook = model.first_norm.register_forward_hook(lambda module, args, out: inputs.append(args[0].detach().clone()))
    recalibrate(model, batches, 4, CPU, torch.float32)
    hook.remove()
    expected = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
    assert len(inputs) == 4
    assert torch.allclose(model.first_norm.running_mean, expected, atol=1e-5)
    assert model.first_norm.momentum == 0.1
