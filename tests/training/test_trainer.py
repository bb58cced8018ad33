"""The loop: it learns, accumulates exactly, hands `shared` on, skips what is not finite."""

import json
import os
import signal
from itertools import chain

import pytest
import torch
from pydantic import ValidationError
from toy import RECIPE, ToyObjective, batches, digest, make, train, weights

from latentkit.errors import InputError
from latentkit.training.distributed import pick_device
from latentkit.training.optimizers import Optimiser
from latentkit.training.trainer import Callback, NotFinite, Schedule, Trainer


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_learns(tmp_path, optimiser, precision):
    trainer = train(tmp_path / "run", optimiser=optimiser, precision=precision, steps=60, save_every=99, log_every=10)
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [10, 20, 30, 40, 50, 60]
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert set(lines[0]) == {"step", "loss", "grad_norm", "largest", "lr"}
    assert all(p.dtype == torch.float32 for p in trainer.module.parameters())


def test_metrics_hold_no_times_and_timings_do(tmp_path):
    train(tmp_path / "run")
    assert "second" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "pictures_per_second" in (tmp_path / "run" / "timings.jsonl").read_text()


def test_same_run_twice_is_the_same_bytes(tmp_path):
    train(tmp_path / "a")
    train(tmp_path / "b")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    train(tmp_path / "c", seed=4)
    assert digest(tmp_path / "a") != digest(tmp_path / "c")


def test_dropout_is_a_function_of_the_step_whatever_a_callback_draws(tmp_path):
    train(tmp_path / "a")
    train(tmp_path / "b", callbacks=(Callback(1, lambda step, trainer: torch.randn(step)),))
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_a_callback_may_switch_to_evaluation(tmp_path):
    train(tmp_path / "a")
    train(tmp_path / "b", callbacks=(Callback(1, lambda step, trainer: trainer.module.eval()),))
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_callbacks_run_at_their_steps_and_after_the_last(tmp_path):
    seen = []
    callback = Callback(5, lambda step, trainer: (seen.append(step), trainer.log({"validation": float(step)})))
    train(tmp_path / "run", callbacks=(callback,))
    assert seen == [5, 10, 12]
    assert [line["validation"] for line in metrics(tmp_path / "run") if "validation" in line] == [5.0, 10.0, 12.0]


def test_accumulated_gradient_is_that_of_the_whole_batch(tmp_path):
    """Also where the micro-batches are of unequal size (3 and 1)."""
    whole = weights(train(tmp_path / "whole", micro_batch=4, dropout=0.0))
    parts = weights(train(tmp_path / "parts", micro_batch=3, dropout=0.0))
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=2e-2, atol=2e-3, msg=name)
    trainers = [make(tmp_path / f"gradient-{m}", micro_batch=m, dropout=0.0) for m in (4, 3, 1)]
    gradients = []
    for trainer in trainers:
        trainer.run.close()
        parts = next(trainer.batches(0))
        trainer._gradients("net", parts, [{} for _ in parts])
        gradients.append([p.grad for p in trainer.module.parameters()])
    for one, *others in zip(*gradients):
        for other in others:
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


def test_weights_are_channels_last_and_gradients_follow(tmp_path):
    trainer = make(tmp_path / "run")
    trainer.run.close()
    parts = next(trainer.batches(0))
    trainer._gradients("net", parts, [{} for _ in parts])
    weight = trainer.module["net"].middle.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    assert weight.grad.stride() == weight.stride()


def test_two_turns_hand_on_shared_and_touch_only_their_own(tmp_path):
    trainer = make(tmp_path / "run", turns=2)
    before = {name: p.detach().clone() for name, p in trainer.module.named_parameters()}
    parts = next(trainer.batches(0))
    trainer._gradients("net", parts, [{} for _ in parts])
    assert all(p.grad is None for p in trainer.module["critic"].parameters()), "no work for the other turn's weights"
    trainer.module.zero_grad()
    trainer.shared = {}
    with trainer.run:
        trainer.optimisers["critic"].step = lambda rate: None
        trainer.train()
    after = dict(trainer.module.named_parameters())
    assert all(torch.equal(after[name], before[name]) == name.startswith("critic.") for name in before)
    assert not any(name.startswith("critic.") for name in trainer.ema.table())
    assert 0 < trainer.shared["scale"] < 1
    assert set(trainer.shared) == {"scale"}
    line = metrics(tmp_path / "run")[-1]
    assert {"net/loss", "critic/loss", "critic/real", "net/lr", "critic/grad_norm"} <= set(line)


def test_one_optimiser_for_each_turn(tmp_path):
    trainer = make(tmp_path / "run", turns=2)
    trainer.run.close()
    chosen = {"net": Optimiser(lr=0.5), "critic": Optimiser(lr=0.25, warmup=0)}
    trainer = Trainer(
        trainer.objective, trainer.batches, trainer.run, schedule=trainer.schedule, optimiser=chosen, seed=1
    )
    assert trainer.rate("critic") == 0.25
    assert trainer.rate("net") == 0.005


def test_gradient_is_clipped(tmp_path):
    trainer = make(tmp_path / "run")
    norms = []
    for _, parameter in trainer.turns["net"]:
        parameter.data.mul_(3)
    step = trainer.optimisers["net"].step

    def watch(rate):
        norms.append(torch.cat([p.grad.reshape(-1) for _, p in trainer.turns["net"]]).norm().item())
        step(rate)

    trainer.optimisers["net"].step = watch
    with trainer.run:
        trainer.train()
    assert max(norms) == pytest.approx(1.0, abs=1e-4)


def test_a_step_that_is_not_finite_changes_nothing_and_is_recorded(tmp_path):
    trainer = make(tmp_path / "run", broken=[4], turns=2)
    kept = {}

    def keep(step, trainer):
        kept[step] = {**weights(trainer), "scale": trainer.shared["scale"].clone()}
        del kept[step]["weights/net.seen"]

    trainer.callbacks = (Callback(1, keep),)
    with trainer.run:
        trainer.train()
    assert trainer.step == 12
    assert trainer.skipped == 1
    assert trainer.skipped_in_a_row == 0
    assert all(torch.equal(kept[3][name], kept[4][name]) for name in kept[3])
    assert not all(torch.equal(kept[4][name], kept[5][name]) for name in kept[3])
    (line,) = [line for line in metrics(tmp_path / "run") if "skipped" in line]
    assert line == {
        "step": 4, "skipped": 1, "turn": "net", "loss": None, "grad_norm": None, "index": [2, 3, 4, 5]
    }  # fmt: skip
    assert trainer.ema.updates == 11


def test_a_gradient_that_is_not_finite_is_enough(tmp_path):
    trainer = make(tmp_path / "run")
    weight = trainer.module["net"].middle.weight
    weight.register_hook(lambda gradient: gradient * torch.inf if trainer.step == 4 else gradient)
    with trainer.run:
        trainer.train()
    assert trainer.skipped == 1
    assert weight.isfinite().all()


def test_ten_in_a_row_stop_the_run_with_the_last_good_checkpoint(tmp_path, capsys):
    broken = list(range(7, 30))
    trainer = make(tmp_path / "run", broken=broken, steps=40)
    with trainer.run, pytest.raises(NotFinite, match="10 times in a row, up to step 16") as error:
        trainer.train()
    assert error.value.exit_code == 1
    assert trainer.run.store.steps() == [8, 12]
    assert all(v.isfinite().all() for t in trainer.run.store.read(12).tables.values() for v in t.values())
    assert capsys.readouterr().err.count("skipped") == 10
    with pytest.raises(NotFinite, match="up to step 16"):  # the count goes on where the checkpoint stood
        train(tmp_path / "run", broken=broken, steps=40)


def test_nine_in_a_row_do_not(tmp_path):
    trainer = train(tmp_path / "run", broken=[*range(3, 12), *range(13, 22)], steps=24)
    assert trainer.skipped == 18


def test_weights_that_are_not_finite_are_never_saved(tmp_path, capsys):
    trainer = make(tmp_path / "run", steps=10)
    trainer.callbacks = (Callback(6, lambda s, t: t.module["net"].label_embedding.weight.data[2].fill_(torch.inf)),)
    trainer.objective.loss = lambda turn, batch, shared: (
        sum(p.sum() for name, p in trainer.module.named_parameters() if "embedding" not in name) ** 2,
        {},
    )
    with trainer.run, pytest.raises(NotFinite, match="not saved"):
        trainer.train()
    assert trainer.run.store.steps() == [4]
    assert "not finite: not saved" in capsys.readouterr().err


def test_ends_where_it_ended(tmp_path):
    train(tmp_path / "run")
    before = digest(tmp_path / "run")
    trainer = make(tmp_path / "run", stream=lambda step: pytest.fail("no data is needed"))
    with trainer.run:
        trainer.train()
    assert digest(tmp_path / "run") == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_exits(tmp_path, number, code):
    """Also where more of them come during the save; and the handlers are put back."""
    before = signal.getsignal(number)
    trainer = make(tmp_path / "run")
    trainer.callbacks = (Callback(5, lambda step, trainer: os.kill(os.getpid(), number)),)
    sync = trainer.run.metrics.sync

    def impatient():
        os.kill(os.getpid(), number)
        return sync()

    trainer.run.metrics.sync = impatient
    with trainer.run, pytest.raises(SystemExit) as stop:
        trainer.train()
    assert stop.value.code == code
    assert trainer.run.store.steps() == [4, 5]
    assert signal.getsignal(number) is before
    train(tmp_path / "run")
    train(tmp_path / "whole")
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")


def test_a_signal_in_the_last_save_is_answered(tmp_path, capsys):
    trainer = make(tmp_path / "run")
    sync = trainer.run.metrics.sync

    def interrupted():
        if trainer.step == trainer.schedule.steps:
            os.kill(os.getpid(), signal.SIGINT)
        return sync()

    trainer.run.metrics.sync = interrupted
    with trainer.run, pytest.raises(SystemExit) as stop:
        trainer.train()
    assert stop.value.code == 130
    assert f"after step {trainer.schedule.steps}; run the same command to go on" in capsys.readouterr().err
    train(tmp_path / "run")
    train(tmp_path / "whole")
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")


def test_another_network_is_not_taken_for_this_run(tmp_path):
    trainer = make(tmp_path / "run")
    with trainer.run:
        trainer.train()
    objective = ToyObjective(RECIPE)
    objective.module["more"] = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"does not fit this network(.|\n)*more\.weight"):
        train(tmp_path / "run", objective=objective)


def test_another_machine_is_told(tmp_path, capsys, monkeypatch):
    train(tmp_path / "run", steps=4)
    monkeypatch.setattr("latentkit.training.trainer.__version__", "0.0")
    monkeypatch.setattr("platform.python_version", lambda: "9.9")
    train(tmp_path / "run", steps=4)
    told = capsys.readouterr().err
    assert "-> 9.9): the result may differ in the last bits" in told
    assert "-> 0.0, python" in told


def test_a_device_that_is_not_here_is_an_input_error():
    with pytest.raises(InputError, match=r"'banana' cannot be used here .* try 'auto'"):
        pick_device("banana")


def test_schedule_refuses_nonsense():
    with pytest.raises(ValidationError, match="larger than batch"):
        Schedule(steps=1, batch=2, micro_batch=3)
    with pytest.raises(ValidationError, match="extra"):
        Schedule(steps=1, batch=2, epochs=3)


def test_toy_batches_are_a_function_of_the_step():
    """What the tests above rest on."""
    late, early = next(batches(RECIPE)(3)), batches(RECIPE)(0)
    for _ in range(3):
        next(early)
    pairs = list(zip(chain(*map(dict.values, late)), chain(*map(dict.values, next(early)))))
    assert all(torch.equal(a, b) for a, b in pairs if isinstance(a, torch.Tensor))
