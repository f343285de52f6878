"""Reference operations against independent formulas, and their gradients against finite differences."""

import math

import pytest
import torch
import torch.nn.functional as F
from fastdreamer_kernels import ops
from fastdreamer_kernels.gather_sequences.reference import Steps
from fastdreamer_kernels.sample_onehot.reference import unimix_probs
from fastdreamer_kernels.twohot.reference import symexp, symlog
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

OPS = ops.load("reference")
LOW, HIGH = -20.0, 20.0


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def grad_of(output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output.sum(), inputs, materialize_grads=True, allow_unused=True)


def test_symlog_round_trip() -> None:
    x = torch.tensor([-1e6, -3.5, -1e-3, 0.0, 1e-3, 0.5, 1000.0], dtype=torch.float64)
    torch.testing.assert_close(symexp(symlog(x)), x)
    assert symlog(torch.tensor(math.e - 1)).item() == pytest.approx(1.0)


@pytest.mark.parametrize("bins", [2, 63, 255])
def test_twohot_loss_is_cross_entropy_with_a_twohot_vector(bins: int) -> None:
    logits = torch.randn(50, bins, dtype=torch.float64)
    target = torch.cat([torch.randn(48, dtype=torch.float64) * 100, torch.tensor([1e12, -1e12], dtype=torch.float64)])
    centres = torch.linspace(LOW, HIGH, bins, dtype=torch.float64)
    # Hat functions around the bin centres, at the clipped symlog of the target.
    x = symlog(target).clamp(LOW, HIGH)
    twohot = (1 - (x[:, None] - centres).abs() / (centres[1] - centres[0])).clamp(min=0)
    torch.testing.assert_close(twohot.sum(-1), torch.ones_like(x))
    expected = -(twohot * torch.log_softmax(logits, -1)).sum(-1)
    torch.testing.assert_close(OPS.twohot_loss(logits, target, LOW, HIGH), expected)


def test_twohot_mean_recovers_what_was_coded() -> None:
    target = torch.tensor([-250.0, -1.0, 0.0, 0.3, 7.0, 4000.0], dtype=torch.float64)
    logits = torch.zeros(6, 255, dtype=torch.float64, requires_grad=True)
    # The gradient of the loss at zero logits is uniform - twohot: read the code off it.
    (grad,) = grad_of(OPS.twohot_loss(logits, target, LOW, HIGH), logits)
    coded = (1 / 255 - grad).clamp(min=1e-300).log()
    torch.testing.assert_close(OPS.twohot_mean(coded, LOW, HIGH), target)
    assert OPS.twohot_mean(torch.zeros(255), LOW, HIGH).item() == pytest.approx(0, abs=1e-5)


def test_twohot_loss_of_a_target_that_is_not_a_number_is_none() -> None:
    loss = OPS.twohot_loss(torch.randn(2, 9), torch.tensor([float("nan"), 1.0]), LOW, HIGH)
    assert loss[0].isnan()
    assert loss[1].isfinite()


def test_twohot_target_has_no_gradient() -> None:
    logits, target = torch.randn(4, 9, requires_grad=True), torch.randn(4, requires_grad=True)
    assert not grad_of(OPS.twohot_loss(logits, target, LOW, HIGH), target)[0].any()


def test_unimix_floor_and_sum() -> None:
    probs = unimix_probs(torch.tensor([[100.0, 0.0, 0.0, 0.0]]), 0.01)
    assert probs.min().item() == pytest.approx(0.01 / 4)
    assert probs.sum().item() == pytest.approx(1)


def test_sample_follows_the_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    # Equally spaced uniforms count each class in proportion to its probability, to within one count.
    uniform = (torch.arange(100_000) + 0.5) / 100_000
    sample = OPS.sample_onehot(logits.expand(100_000, 4), uniform, 0.01)
    assert set(sample.unique().tolist()) == {0.0, 1.0}
    assert (sample.sum(-1) == 1).all()
    torch.testing.assert_close(sample.mean(0), unimix_probs(logits, 0.01), atol=3e-5, rtol=0)


def test_sample_at_the_edges_of_the_uniform() -> None:
    logits = torch.randn(64, 32, 32)
    for u in (0.0, 1 - 2**-24):
        sample = OPS.sample_onehot(logits, torch.full((64, 32), u), 0.01)
        assert (sample.argmax(-1) == (0 if u == 0 else 31)).all()


def test_sample_gradient_is_that_of_the_probabilities() -> None:
    logits = torch.randn(5, 3, 7, requires_grad=True)
    weight = torch.randn(5, 3, 7)
    sampled = grad_of(OPS.sample_onehot(logits, torch.rand(5, 3), 0.01) * weight, logits)
    torch.testing.assert_close(sampled, grad_of(unimix_probs(logits, 0.01) * weight, logits))


def test_kl_is_that_of_torch_distributions() -> None:
    q, p = torch.randn(6, 4, 8, dtype=torch.float64) * 2, torch.randn(6, 4, 8, dtype=torch.float64) * 2
    expected = kl_divergence(Categorical(unimix_probs(q, 0.01)), Categorical(unimix_probs(p, 0.01))).sum(-1)
    kl = OPS.kl_balance(q, p, 0.01, 0.0)
    for value in kl:
        torch.testing.assert_close(value, expected)


def test_free_nats_bound_the_sum_over_categoricals() -> None:
    q = torch.zeros(2, 4, 8)
    p = torch.stack([torch.zeros(4, 8), torch.randn(4, 8) * 3]).requires_grad_()
    kl = OPS.kl_balance(q, p, 0.01, 1.0)
    assert kl.dyn[0].item() == kl.rep[0].item() == 1.0
    assert kl.value[0].item() == pytest.approx(0, abs=1e-6)
    assert kl.dyn[1].item() == pytest.approx(kl.value[1].item())
    assert kl.dyn[1].item() > 1
    (grad,) = grad_of(kl.dyn, p)
    assert not grad[0].any(), "below the free nats nothing is to be learned"
    assert grad[1].any()


def test_each_kl_trains_its_own_side() -> None:
    q, p = torch.randn(2, 4, 8, requires_grad=True), torch.randn(2, 4, 8, requires_grad=True)
    kl = OPS.kl_balance(q, p, 0.01, 0.0)
    to_q, to_p = grad_of(kl.dyn, q, p)
    assert not to_q.any()
    assert to_p.any()
    to_q, to_p = grad_of(kl.rep, q, p)
    assert to_q.any()
    assert not to_p.any()


@pytest.mark.parametrize("length", [1, 2, 9])
def test_lambda_return_is_the_weighted_sum_of_n_step_returns(length: int) -> None:
    reward, discount, value = torch.randn(3, length, 5, dtype=torch.float64).unbind()
    discount, lam = discount.sigmoid(), 0.9

    def n_step(t: int, n: int) -> Tensor:
        total, weight = torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
        for i in range(t + 1, t + n + 1):
            total, weight = total + weight * reward[i], weight * discount[i]
        return total + weight * value[t + n]

    returns = OPS.lambda_return(reward, discount, value, None, lam)
    for t in range(length):
        left = length - 1 - t
        expected = value[t] if left == 0 else lam ** (left - 1) * n_step(t, left)
        for n in range(1, left):
            expected = expected + (1 - lam) * lam ** (n - 1) * n_step(t, n)
        torch.testing.assert_close(returns[t], expected)


def test_lambda_return_stops_at_last_rows() -> None:
    reward, discount, value = torch.randn(3, 8, 3).unbind()
    last = torch.zeros(8, 3, dtype=torch.bool)
    last[2, 0] = last[5, 1] = last[7, 2] = True
    returns = OPS.lambda_return(reward, discount, value, last, 0.95)
    pieces = [((0, 3), (3, 8)), ((0, 6), (6, 8)), ((0, 8),)]
    for column, parts in enumerate(pieces):
        for start, stop in parts:
            piece = (slice(start, stop), slice(column, column + 1))
            alone = OPS.lambda_return(reward[piece], discount[piece], value[piece], None, 0.95)
            torch.testing.assert_close(returns[piece], alone)


def test_gru_gates_written_out() -> None:
    d, eps = 5, 1e-3
    pre, deter = torch.randn(4, 3 * d), torch.randn(4, d)
    weight, bias = torch.randn(3 * d), torch.randn(3 * d)
    mean, var = pre.mean(-1, keepdim=True), pre.var(-1, keepdim=True, correction=0)
    x = (pre - mean) / (var + eps).sqrt() * weight + bias
    reset, cand, update = x[:, :d], x[:, d : 2 * d], x[:, 2 * d :]
    update = 1 / (1 + torch.exp(1 - update))
    expected = update * torch.tanh(torch.sigmoid(reset) * cand) + (1 - update) * deter
    torch.testing.assert_close(OPS.gru_gates(pre, deter, weight, bias, eps)[0], expected)


@pytest.mark.parametrize("shape", [(16, 6), (3, 4, 4, 6)])
def test_batch_norm_is_that_of_torch(shape: tuple[int, ...]) -> None:
    norm = torch.nn.BatchNorm1d(6, eps=1e-3, momentum=0.1).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    mean, var = torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)

    def ours(x: Tensor, batch_stats: bool) -> Tensor:
        return OPS.batch_norm_act(x, norm.weight, norm.bias, mean, var, batch_stats=batch_stats, momentum=0.1, eps=1e-3)

    for _ in range(3):
        x = torch.randn(*shape, dtype=torch.float64) * 3 + 1
        torch.testing.assert_close(ours(x, True), F.silu(norm(x.reshape(-1, 6))).reshape(shape))
    torch.testing.assert_close((mean, var), (norm.running_mean, norm.running_var))
    norm.eval()
    x = torch.randn(*shape, dtype=torch.float64)
    torch.testing.assert_close(ours(x, False), F.silu(norm(x.reshape(-1, 6))).reshape(shape))
    torch.testing.assert_close((mean, var), (norm.running_mean, norm.running_var))


def test_batch_norm_of_one_row_is_finite() -> None:
    one = torch.randn(1, 3)
    mean, var = torch.zeros(3), torch.ones(3)
    out = OPS.batch_norm_act(one, torch.ones(3), torch.zeros(3), mean, var, batch_stats=True, momentum=0.1, eps=1e-3)
    assert not out.any()
    assert var.isfinite().all()


def test_gradients_against_finite_differences() -> None:
    def double(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    check = torch.autograd.gradcheck
    assert check(
        lambda p, h, w, b: OPS.gru_gates(p, h, w, b, 1e-3), (double(3, 12), double(3, 4), double(12), double(12))
    )
    assert check(lambda x, w, b: OPS.layer_norm_act(x, w, b, 1e-3), (double(3, 5), double(5), double(5)))
    mean, var = torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    for batch_stats in (True, False):
        assert check(
            lambda x, w, b, s=batch_stats: OPS.batch_norm_act(x, w, b, mean, var, batch_stats=s, momentum=0, eps=1e-3),
            (double(4, 5), double(5), double(5)),
        )
    target = torch.randn(3, dtype=torch.float64)
    assert check(lambda x: OPS.twohot_loss(x, target, LOW, HIGH), double(3, 9))
    assert check(lambda x: OPS.twohot_mean(x, -2.0, 2.0), double(3, 9))
    fixed = torch.randn(2, 3, 4, dtype=torch.float64)
    assert check(lambda p: OPS.kl_balance(fixed, p, 0.01, 0.0).dyn, double(2, 3, 4))
    assert check(lambda q: OPS.kl_balance(q, fixed, 0.01, 0.0).rep, double(2, 3, 4))
    last = torch.rand(6, 2) < 0.3
    assert check(lambda r, d, v: OPS.lambda_return(r, d, v, last, 0.9), (double(6, 2), double(6, 2), double(6, 2)))


@pytest.mark.parametrize("clip", [1e9, 0.3])
def test_adam_step_is_clipping_and_adam_of_torch(clip: float) -> None:
    """Five steps beside torch's own optimiser, clipping and lerp, on the same gradients."""
    sizes = [(3, 4), (5,), (1,)]
    params = [torch.nn.Parameter(torch.randn(*size, dtype=torch.float64)) for size in sizes]
    flat = torch.cat([p.detach().flatten() for p in params])
    slow, expected_slow = flat[:12] + 1, params[0].detach() + 1
    mean, square, step = torch.zeros_like(flat), torch.zeros_like(flat), torch.zeros((), dtype=torch.float64)
    adam = torch.optim.Adam(params, lr=0.1, eps=1e-5)
    for _ in range(5):
        grad = torch.randn_like(flat)
        for p, part in zip(params, grad.split([p.numel() for p in params]), strict=True):
            p.grad = part.view_as(p).clone()
        expected_norm = torch.nn.utils.clip_grad_norm_(params, clip)
        adam.step()
        expected_slow.lerp_(params[0].detach(), 0.02)
        norm = OPS.adam_step(
            flat, grad, mean, square, step, slow, lr=0.1, beta1=0.9, beta2=0.999, eps=1e-5, clip=clip, rate=0.02
        )
        torch.testing.assert_close(norm, expected_norm)
    torch.testing.assert_close(flat, torch.cat([p.detach().flatten() for p in params]))
    torch.testing.assert_close(slow.view(3, 4), expected_slow)
    assert step.item() == 5


@pytest.mark.parametrize("shift", [False, True])
def test_gather_sequences_row_by_row(shift: bool) -> None:
    m, b, t, a = 9, 3, 4, 2
    ring = Steps(
        torch.randint(0, 256, (m, 3, 2, 5), dtype=torch.uint8), torch.randn(m, 6), torch.randn(m, a), torch.randn(m),
        torch.rand(m) < 0.3, torch.rand(m) < 0.3, torch.rand(m) < 0.3,
    )  # fmt: skip
    index, begins = torch.randint(m, (b, t)), torch.rand(b, t) < 0.3
    found = OPS.gather_sequences(ring, index, begins, torch.float32, shift)
    raw = OPS.gather_sequences(ring, index, begins, torch.uint8, shift)
    assert ring.image is not None
    assert ring.vector is not None
    assert found.image is not None
    assert found.vector is not None
    assert raw.image is not None
    assert found.image.permute(0, 1, 3, 4, 2).is_contiguous()
    for i in range(b):
        for j in range(t):
            k = index[i, j]
            assert torch.equal(raw.image[i, j], ring.image[k])
            torch.testing.assert_close(found.image[i, j], ring.image[k] / 255 - 0.5)
            assert torch.equal(found.vector[i, j], ring.vector[k])
            before = k if not shift else index[i, j - 1]
            none = begins[i, j] or (shift and j == 0)
            assert torch.equal(found.action[i, j], torch.zeros(a) if none else ring.action[before])
            assert found.reward[i, j] == (0 if begins[i, j] else ring.reward[k])
            assert found.is_first[i, j] == (ring.is_first[k] | begins[i, j])
            assert found.is_last[i, j] == ring.is_last[k]
            assert found.is_terminal[i, j] == ring.is_terminal[k]


def test_bf16_is_computed_in_fp32() -> None:
    """What the references promise: rounded inputs, fp32 arithmetic, one rounding at the end."""
    x = (torch.randn(30, 16) * 3 + 100).bfloat16()
    weight, bias = torch.randn(16), torch.randn(16)
    found = OPS.layer_norm_act(x, weight, bias, 1e-3)
    torch.testing.assert_close(found, OPS.layer_norm_act(x.float(), weight, bias, 1e-3).bfloat16(), rtol=0, atol=0)
    logits = torch.randn(30, 63).bfloat16()
    found = OPS.twohot_mean(logits, LOW, HIGH)
    assert torch.equal(found, OPS.twohot_mean(logits.float(), LOW, HIGH))
