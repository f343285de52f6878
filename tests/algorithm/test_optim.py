"""The optimiser's vectors: parameters keep what they are, gradients and slow copies lie as they do."""

import torch
from fastdreamer_kernels import ops
from torch import Tensor, nn

from fastdreamer.algorithm.optim import ALIGNMENT, Optimizer

OPS = ops.load("reference")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.hidden, self.last = nn.Conv2d(3, 5, 4), nn.Linear(5, 3), nn.Linear(3, 1)
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def features(self, x: Tensor) -> Tensor:
        return self.hidden(self.conv(x).flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.features(x))


def test_parameters_keep_values_shapes_and_strides() -> None:
    net, twin = Net(), Net()
    optimizer = Optimizer(net.parameters(), OPS, lr=1e-3, eps=1e-8, clip=1.0)
    for p, other in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, other)
        assert p.stride() == other.stride()
        assert p.data_ptr() % (4 * ALIGNMENT) == optimizer.param.data_ptr() % (4 * ALIGNMENT)
        assert p.untyped_storage().data_ptr() == optimizer.param.untyped_storage().data_ptr()


def test_steps_are_those_of_torch_and_slow_copies_follow() -> None:
    net, twin = Net(), Net()
    slow, expected = Net().hidden, Net().hidden
    pairs = zip(slow.parameters(), net.hidden.parameters(), strict=True)
    optimizer = Optimizer(net.parameters(), OPS, lr=1e-2, eps=1e-8, clip=0.5, slow=pairs, rate=0.1)
    adam = torch.optim.Adam(twin.parameters(), lr=1e-2)
    for i in range(4):
        x = torch.randn(7, 3, 4, 4, generator=torch.Generator().manual_seed(i))
        norm = optimizer.step(net(x).square().mean())
        adam.zero_grad()
        twin(x).square().mean().backward()
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(twin.parameters(), 0.5))
        adam.step()
        with torch.no_grad():
            for p, other in zip(expected.parameters(), twin.hidden.parameters(), strict=True):
                p.lerp_(other, 0.1)
    for one, other in ((net, twin), (slow, expected)):
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q)


def test_parameters_that_a_loss_does_not_reach_stay() -> None:
    net = Net()
    before = net.last.weight.clone()
    optimizer = Optimizer(net.parameters(), OPS, lr=1e-2, eps=1e-8, clip=1.0)
    optimizer.step(net.features(torch.randn(2, 3, 4, 4)).sum())
    assert torch.equal(net.last.weight, before)


def test_state_goes_on_where_it_was() -> None:
    nets = Net(), Net()
    first, second = (Optimizer(net.parameters(), OPS, lr=1e-2, eps=1e-8, clip=1.0) for net in nets)
    x = torch.randn(2, 3, 4, 4)
    first.step(nets[0](x).sum())
    nets[1].load_state_dict(nets[0].state_dict())
    second.load({name: value.clone() for name, value in first.state().items()})
    for optimizer, net in zip((first, second), nets, strict=True):
        optimizer.step(net(x).sum())
    assert torch.equal(first.param, second.param)


def test_narrow_parameters_are_rounded_from_what_steps_move() -> None:
    """Under autocast nothing else changes: products read the same numbers, and steps too small for bfloat16 add up."""
    net, twin = Net(), Net()
    slows = Net().last, Net().last
    both = []
    for each, slow, narrow in ((net, slows[0], True), (twin, slows[1], False)):
        pairs = zip(slow.parameters(), each.last.parameters(), strict=True)
        chosen = [*each.hidden.parameters(), *each.last.parameters()] if narrow else []
        both.append(Optimizer(each.parameters(), OPS, lr=1e-5, eps=1e-8, clip=1e9, slow=pairs, rate=0.5, narrow=chosen))
    x = torch.randn(7, 3, 4, 4)
    for _ in range(30):
        for each, optimizer in zip((net, twin), both, strict=True):
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                optimizer.step(each(x).float().square().mean())
    narrow, plain = both
    assert net.hidden.weight.dtype == torch.bfloat16
    assert net.hidden.weight.stride() == (8, 1)
    assert slows[0].weight.dtype == torch.bfloat16
    originals = dict(narrow.originals())
    for mine, theirs in zip(
        (*net.parameters(), *slows[0].parameters()), (*twin.parameters(), *slows[1].parameters()), strict=True
    ):
        torch.testing.assert_close(originals[mine], theirs.detach())
        assert torch.equal(mine, originals[mine].to(mine.dtype))
    for name, value in plain.state().items():
        torch.testing.assert_close(narrow.state()[name], value)
    moved = (twin.hidden.weight - Net().hidden.weight).abs()
    assert (moved < 2**-9 * twin.hidden.weight.abs()).any()


def test_state_goes_on_whatever_is_narrow() -> None:
    """What a checkpoint keeps is laid out alike, so that a run may go on in another precision."""
    nets = Net(), Net(), Net()
    first, second, third = (
        Optimizer(net.parameters(), OPS, lr=1e-2, eps=1e-8, clip=1.0, narrow=chosen)
        for net, chosen in zip(nets, ((), nets[1].hidden.parameters(), ()), strict=True)
    )
    first.step(nets[0](torch.randn(2, 3, 4, 4)).sum())
    second.load({name: value.clone() for name, value in first.state().items()})
    third.load({name: value.clone() for name, value in second.state().items()})
    for name, value in first.state().items():
        assert torch.equal(third.state()[name], value)
