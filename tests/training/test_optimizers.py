"""AdamW, Muon and the learning rate."""

import pytest
import torch
from torch import nn

from latentkit.training.optimizers import MOMENTUM, Muon, Optimiser, Stepper, orthogonalise


def network():
    torch.manual_seed(0)
    net = nn.ModuleDict(
        {
            "first": nn.Conv2d(3, 8, 3),
            "middle": nn.Conv2d(8, 16, 3),
            "again": nn.Conv2d(8, 16, 3),
            "point": nn.Conv2d(16, 8, 1),
            "tall": nn.Linear(4, 32),
            "norm": nn.GroupNorm(2, 8),
            "token_embedding": nn.Embedding(5, 8),
            "last": nn.Conv2d(8, 3, 3),
        }
    )
    return net.to(memory_format=torch.channels_last)


def with_gradients(net, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape, generator=generator))
    return net


@pytest.mark.parametrize("shape", [(3, 16, 64), (2, 64, 16), (1, 32, 32)])
def test_orthogonal(shape):
    """Singular values near one, the sides of the singular vectors kept, whichever side is the longer."""
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    made = orthogonalise(matrices).float()
    values = torch.linalg.svdvals(made)
    assert values.min() > 0.4
    assert values.max() < 1.3
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    cosine = torch.nn.functional.cosine_similarity(made.flatten(1), (u @ v).flatten(1))
    assert (cosine > 0.97).all()
    singles = torch.cat([orthogonalise(matrix[None]).float() for matrix in matrices])
    torch.testing.assert_close(made, singles, rtol=0, atol=0.02)


def test_muon_is_torch_muon():
    """On a matrix, against torch's own (update size matched to AdamW's)."""
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 512).reshape(16, 32)) for _ in range(2))
    muon = Muon({"w": ours}, 0.1)
    peer = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw")
    for seed in range(5):
        ours.grad = torch.randn(16, 32, generator=torch.Generator().manual_seed(seed))
        theirs.grad = ours.grad.clone()
        muon.step(0.02)
        peer.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)


def test_muon_moves_a_convolution_as_the_matrix_it_is():
    """[out, in * kh * kw], in either memory format."""
    plain = with_gradients(nn.Conv2d(8, 16, 3, bias=False))
    last = nn.Conv2d(8, 16, 3, bias=False).to(memory_format=torch.channels_last)
    matrix = nn.Parameter(plain.weight.detach().flatten(1).clone())
    matrix.grad = plain.weight.grad.flatten(1).clone()
    last.load_state_dict(plain.state_dict())
    last.weight.grad = torch.empty_like(last.weight).copy_(plain.weight.grad)
    for parameter in (plain.weight, last.weight, matrix):
        Muon({"w": parameter}, 0.0).step(0.1)
    torch.testing.assert_close(plain.weight.flatten(1), matrix, rtol=0, atol=1e-6)
    torch.testing.assert_close(last.weight, plain.weight, rtol=0, atol=2e-3)


def test_muon_updates_are_as_large_as_those_of_adamw():
    parameter = nn.Parameter(torch.zeros(64, 256))
    parameter.grad = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    Muon({"w": parameter}, 0.0).step(1.0)
    assert parameter.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.2)


def test_who_is_whose():
    net = network()
    stepper = Stepper(net.named_parameters(), Optimiser(name="muon"))
    theirs = {name for names, _, _ in stepper.muon.stacks for name in names}
    assert theirs == {"middle.weight", "again.weight", "point.weight", "tall.weight"}
    assert [len(names) for names, _, _ in stepper.muon.stacks] == [2, 1, 1], "equal shapes are one batch"
    chosen = Stepper(net.named_parameters(), Optimiser(name="muon"), elementwise=("mid", "tall.weight"))
    theirs = {name for names, _, _ in chosen.muon.stacks for name in names}
    assert theirs == {"first.weight", "again.weight", "point.weight", "last.weight"}
    assert not Stepper(net.named_parameters(), Optimiser()).muon.stacks


def test_large_groups_are_cut(monkeypatch):
    monkeypatch.setattr("latentkit.training.optimizers.LARGEST_STACK", 1)
    whole, cut = with_gradients(network()), with_gradients(network())
    steppers = [Stepper(net.named_parameters(), Optimiser(name="muon")) for net in (whole, cut)]
    assert all(len(names) == 1 for names, _, _ in steppers[1].muon.stacks)
    for stepper in steppers:
        stepper.step(0.01)
    for a, b in zip(whole.parameters(), cut.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


def test_adamw_is_torch_adamw_and_decays_matrices_only():
    ours, theirs = with_gradients(network()), with_gradients(network())
    stepper = Stepper(ours.named_parameters(), Optimiser(weight_decay=0.3, betas=(0.8, 0.95)))
    decayed = [p for name, p in theirs.named_parameters() if p.ndim > 1 and "embedding" not in name]
    rest = [p for name, p in theirs.named_parameters() if p.ndim == 1 or "embedding" in name]
    groups = [{"params": decayed, "weight_decay": 0.3}, {"params": rest, "weight_decay": 0.0}]
    peer = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.95), fused=False, foreach=False)
    for _ in range(3):
        stepper.step(0.01)
        peer.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(stepper.table()[f"{name}/exp_avg"], peer.state[b]["exp_avg"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_restored_state_goes_on_bit_by_bit(name):
    whole, resumed = network(), network()
    steppers = [Stepper(net.named_parameters(), Optimiser(name=name, weight_decay=0.1)) for net in (whole, resumed)]
    for seed in range(3):
        with_gradients(whole, seed)
        steppers[0].step(0.01)
    resumed.load_state_dict({name: value.contiguous() for name, value in whole.state_dict().items()})
    steppers[1].restore({name: value.clone().contiguous() for name, value in steppers[0].table().items()})
    for seed in range(3, 6):
        for net, stepper in zip((whole, resumed), steppers):
            with_gradients(net, seed)
            stepper.step(0.01)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))
    with pytest.raises(KeyError):
        steppers[1].restore({})


def test_rate_rises_stays_and_falls():
    settings = Optimiser(lr=2.0, warmup=4, decay=0.5)
    rates = [settings.rate(step, 20) for step in range(20)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4:11] == [2.0] * 7
    assert rates[11:] == pytest.approx([2.0 * k / 10 for k in range(9, 0, -1)])
    assert {Optimiser(warmup=0, decay=0.0).rate(step, 20) for step in range(20)} == {1e-3}
