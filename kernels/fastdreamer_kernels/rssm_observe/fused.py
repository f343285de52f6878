"""The posterior along sequences as one operator each way, its loop a few launches a step.

What is not sequential leaves the loop: the products with images and actions before it, the gradients of all weights
after it. Inside remain four products, two norms, the gates and the draw, and backward the same in reverse. This is the
form that runs everywhere; one kernel for the whole sequence is to replace it where it fits.
"""

from typing import Any

import torch
from torch import Tensor

from fastdreamer_kernels.batch_norm_act import fused as batch_norm
from fastdreamer_kernels.gru_gates import fused as gru
from fastdreamer_kernels.launch import check, check_shapes
from fastdreamer_kernels.layer_norm_act import fused as layer_norm
from fastdreamer_kernels.rssm_observe.reference import Observed, Running, Weights
from fastdreamer_kernels.sample_onehot import fused as sampling


def _before(first: Tensor, initial: Tensor, states: Tensor) -> Tensor:
    """The state (T, B, ...) that each step starts from: the initial one where `first` (T, B), else that before."""
    shifted = torch.cat([initial.expand(1, *states.shape[1:]), states[:-1]])
    return torch.where(first.view(*first.shape, *[1] * initial.ndim), initial, shifted)


def _masked(x: Tensor, first: Tensor) -> Tensor:
    return x.masked_fill(first.unsqueeze(-1), 0)


@torch.library.custom_op("fastdreamer::rssm_observe", mutates_args=())
def forward(
    embed: Tensor,
    action: Tensor,
    first: Tensor,
    uniform: Tensor,
    deter: Tensor,
    stoch: Tensor,
    weights: list[Tensor],
    mean: Tensor | None,
    var: Tensor | None,
    batch_stats: bool,
    batch_eps: float,
    eps: float,
    unimix: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Time first: deter (T, B, D), stoch and logits (T, B, S*K); pre-activations of input, gates and hidden layer; and
    each step's statistics (T, U), empty without BatchNorm."""
    w, dtype = Weights(*weights), embed.dtype
    steps, rows, units, latent = *embed.shape[:2], w.inp_scale.numel(), stoch.numel()
    with torch.autocast(embed.device.type, enabled=False):
        inp, gates, hidden, out = (x.to(dtype) for x in (w.inp, w.gates, w.hidden, w.out))
        from_z, from_h = inp[:, :latent].t(), hidden[:, : deter.numel()].t()
        pre_inp = _masked(action.to(dtype), first) @ inp[:, latent:].t()
        pre_hidden = embed @ hidden[:, deter.numel() :].t()
        pre_gates = embed.new_empty(steps, rows, gates.shape[0])
        deters, stochs = deter.new_empty(steps, rows, deter.numel()), embed.new_empty(steps, rows, latent)
        logits = torch.empty_like(stochs)
        means, vars = (embed.new_empty(0 if mean is None else steps, units, dtype=torch.float32) for _ in range(2))
        bias, start = w.out_bias.to(dtype), stoch.to(dtype).flatten()
        h, z = deter.expand(rows, -1), start.expand(rows, -1)
        for t in range(steps):
            fresh = first[t].unsqueeze(-1)
            h, z = torch.where(fresh, deter, h), torch.where(fresh, start, z)
            pre_inp[t].addmm_(z, from_z)
            u = layer_norm.forward(pre_inp[t], w.inp_scale, w.inp_shift, eps)
            torch.mm(torch.cat([u, h.to(dtype)], -1), gates.t(), out=pre_gates[t])
            h = gru.forward(pre_gates[t], h, w.gates_scale, w.gates_shift, eps)
            pre_hidden[t].addmm_(h.to(dtype), from_h)
            if mean is None or var is None:
                q = layer_norm.forward(pre_hidden[t], w.hidden_scale, w.hidden_shift, eps)
            elif batch_stats:
                q, means[t], vars[t] = batch_norm.forward(pre_hidden[t], w.hidden_scale, w.hidden_shift, batch_eps)
            else:
                means[t], vars[t] = mean, var
                q = batch_norm.apply(pre_hidden[t], w.hidden_scale, w.hidden_shift, mean, var, batch_eps)
            torch.addmm(bias, q, out.t(), out=logits[t])
            z = sampling.forward(logits[t].view(rows, *stoch.shape), uniform[t], unimix).view(rows, latent)
            deters[t], stochs[t] = h, z
    return deters, stochs, logits, pre_inp, pre_gates, pre_hidden, means, vars


@forward.register_fake
def _(
    embed: Tensor,
    action: Tensor,
    first: Tensor,
    uniform: Tensor,
    deter: Tensor,
    stoch: Tensor,
    weights: list[Tensor],
    mean: Tensor | None,
    var: Tensor | None,
    batch_stats: bool,
    batch_eps: float,
    eps: float,
    unimix: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    w = Weights(*weights)
    steps, rows, units, latent = *embed.shape[:2], w.inp_scale.numel(), stoch.numel()
    pre_inp, pre_hidden = (embed.new_empty(steps, rows, units) for _ in range(2))
    stochs, logits = (embed.new_empty(steps, rows, latent) for _ in range(2))
    means, vars = (embed.new_empty(0 if mean is None else steps, units, dtype=torch.float32) for _ in range(2))
    deters, pre_gates = deter.new_empty(steps, rows, deter.numel()), embed.new_empty(steps, rows, w.gates.shape[0])
    return deters, stochs, logits, pre_inp, pre_gates, pre_hidden, means, vars


@torch.library.custom_op("fastdreamer::rssm_observe_backward", mutates_args=())
def backward(
    embed: Tensor,
    action: Tensor,
    first: Tensor,
    deter: Tensor,
    stoch: Tensor,
    weights: list[Tensor],
    saved: list[Tensor],
    ddeters: Tensor,
    dstochs: Tensor,
    dlogits: Tensor,
    batch_stats: bool,
    batch_eps: float,
    eps: float,
    unimix: float,
) -> list[Tensor]:
    """Gradients of embed, of the initial deter (D) and of each of the weights."""
    w, dtype = Weights(*weights), embed.dtype
    deters, stochs, logits, pre_inp, pre_gates, pre_hidden, means, vars = saved
    steps, rows, units, latent = *embed.shape[:2], w.inp_scale.numel(), stoch.numel()
    with torch.autocast(embed.device.type, enabled=False):
        inp, gates, hidden, out = (x.to(dtype) for x in (w.inp, w.gates, w.hidden, w.out))
        h_before, z_before = _before(first, deter, deters), _before(first, stoch.to(dtype).flatten(), stochs)
        dpre_inp, dpre_gates, dpre_hidden = (torch.empty_like(x) for x in (pre_inp, pre_gates, pre_hidden))
        dlogits = dlogits.clone()
        dscales = [torch.zeros(2, x.numel(), device=embed.device) for x in (w.inp_scale, w.gates_scale, w.hidden_scale)]
        ddeter = torch.zeros_like(deter)
        dh, dz = torch.zeros_like(deters[0]), torch.zeros_like(stochs[0])
        for t in reversed(range(steps)):
            shape = rows, *stoch.shape
            drawn = (dstochs[t] + dz).view(shape)
            dlogits[t] += sampling.backward(logits[t].view(shape), drawn, unimix).view(rows, latent)
            dq = dlogits[t] @ out
            if not means.numel():
                dpre_hidden[t], sums = layer_norm.backward(pre_hidden[t], w.hidden_scale, w.hidden_shift, dq, eps)
            else:
                dpre_hidden[t], sums = batch_norm.backward(
                    pre_hidden[t], w.hidden_scale, w.hidden_shift, means[t], vars[t], dq, batch_eps, batch_stats
                )
            dscales[2] += sums
            dh = ddeters[t] + dh + dpre_hidden[t] @ hidden[:, : deter.numel()]
            dpre_gates[t], dpast, sums = gru.backward(
                pre_gates[t], h_before[t], w.gates_scale, w.gates_shift, dh.to(deter.dtype), eps
            )
            dscales[1] += sums
            du, dpast_too = (dpre_gates[t] @ gates).split([units, deter.numel()], -1)
            dpre_inp[t], sums = layer_norm.backward(pre_inp[t], w.inp_scale, w.inp_shift, du.contiguous(), eps)
            dscales[0] += sums
            dh, dz = dpast + dpast_too, dpre_inp[t] @ inp[:, :latent]
            # What a reset cut off goes to the initial state.
            ddeter += dh.masked_fill(~first[t].unsqueeze(-1), 0).sum(0)
            dh, dz = _masked(dh, first[t]), _masked(dz, first[t])
        u = layer_norm.forward(pre_inp, w.inp_scale, w.inp_shift, eps)
        if not means.numel():
            q = layer_norm.forward(pre_hidden, w.hidden_scale, w.hidden_shift, eps)
        else:
            q = torch.stack(
                [
                    batch_norm.apply(pre_hidden[t], w.hidden_scale, w.hidden_shift, means[t], vars[t], batch_eps)
                    for t in range(steps)
                ]
            )
        dembed = dpre_hidden @ hidden[:, deter.numel() :]

        def weight(grad: Tensor, *inputs: Tensor) -> Tensor:
            # (T*B, outputs)^T (T*B, inputs)
            return grad.flatten(0, 1).t() @ torch.cat([x.to(dtype) for x in inputs], -1).flatten(0, 1)

        grads = Weights(
            weight(dpre_inp, z_before, _masked(action.to(dtype), first)),
            dscales[0][0],
            dscales[0][1],
            weight(dpre_gates, u, h_before),
            dscales[1][0],
            dscales[1][1],
            weight(dpre_hidden, deters, embed),
            dscales[2][0],
            dscales[2][1],
            weight(dlogits, q),
            dlogits.float().sum((0, 1)),
        )
    # An operator's results may not share memory, as the halves of a sum do.
    return [dembed, ddeter, *(grad.to(own.dtype, copy=True) for grad, own in zip(grads, w, strict=True))]


@backward.register_fake
def _(
    embed: Tensor,
    action: Tensor,
    first: Tensor,
    deter: Tensor,
    stoch: Tensor,
    weights: list[Tensor],
    saved: list[Tensor],
    ddeters: Tensor,
    dstochs: Tensor,
    dlogits: Tensor,
    batch_stats: bool,
    batch_eps: float,
    eps: float,
    unimix: float,
) -> list[Tensor]:
    return [torch.empty_like(x) for x in (embed, deter, *weights)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    embed, action, first, _, deter, stoch, weights, _, _, *ctx.options = inputs
    ctx.save_for_backward(embed, action, first, deter, stoch, *weights, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *douts: Tensor | None) -> tuple[Any, ...]:
    embed, action, first, deter, stoch, *rest = ctx.saved_tensors
    weights, saved = rest[: len(Weights._fields)], rest[len(Weights._fields) :]
    grads = [
        torch.zeros_like(out) if dout is None else dout.contiguous()
        for out, dout in zip(saved[:3], douts[:3], strict=True)
    ]
    dembed, ddeter, *dweights = backward(embed, action, first, deter, stoch, weights, saved, *grads, *ctx.options)
    return dembed, None, None, None, ddeter, None, dweights, None, None, None, None, None, None


forward.register_autograd(_backward, setup_context=_setup)


def rssm_observe(
    embed: Tensor,
    action: Tensor,
    is_first: Tensor,
    uniform: Tensor,
    deter: Tensor,
    stoch: Tensor,
    weights: Weights,
    running: Running | None,
    *,
    batch_stats: bool,
    eps: float,
    unimix: float,
) -> Observed:
    """As `reference.rssm_observe`, in float32 or bfloat16 on CUDA; sequences may be laid out in any way.

    Raises TypeError for another dtype, ValueError for weights that are not contiguous or on another device.
    """
    # (B, T, ...) -> (T, B, ...): a step's rows lie together.
    embed, action, first, uniform = (x.transpose(0, 1).contiguous() for x in (embed, action, is_first, uniform))
    floats = {"embed": embed, "action": action, "uniform": uniform, "deter": deter, "stoch": stoch}
    statistics = {} if running is None else {"running_mean": running.mean, "running_var": running.var}
    steps, rows, stochs = uniform.shape
    size, (units,) = deter.numel(), weights.inp_scale.shape
    latent, gates = stoch.numel(), 3 * size
    norm, gates_norm = [(units,)] * 2, [(gates,)] * 2
    inp, hidden = (units, latent + action.shape[-1]), (units, size + embed.shape[-1])
    shapes = [inp, *norm, (gates, units + size), *gates_norm, hidden, *norm, (latent, units), (latent,)]
    check_shapes(
        "rssm_observe",
        embed=(embed, (steps, rows, embed.shape[-1])),
        action=(action, (steps, rows, action.shape[-1])),
        is_first=(first, (steps, rows)),
        **{name: (weight, shape) for name, weight, shape in zip(Weights._fields, weights, shapes, strict=True)},
        **{name: (statistic, (units,)) for name, statistic in statistics.items()},
    )
    check("rssm_observe", floats | weights._asdict() | statistics, {"is_first": first})
    first = torch.cat([torch.ones_like(first[:1]), first[1:]])
    mean, var, momentum, batch_eps = (None, None, 0.0, eps) if running is None else running
    deters, stochs, logits, *_, means, vars = forward(
        embed, action, first, uniform, deter, stoch, list(weights), mean, var, batch_stats, batch_eps, eps, unimix
    )
    if batch_stats and running is not None:
        with torch.no_grad():
            _follow(running.mean, means, momentum)
            _follow(running.var, vars * (embed.shape[1] / max(embed.shape[1] - 1, 1)), momentum)
    deters, stochs, logits = (x.transpose(0, 1).contiguous() for x in (deters, stochs, logits))
    return Observed(deters, stochs.unflatten(-1, stoch.shape), logits.unflatten(-1, stoch.shape))


def _follow(running: Tensor, steps: Tensor, momentum: float) -> None:
    """Moves a running statistic (U) by `momentum` towards each of `steps` (T, U) in turn, all at once."""
    left = (1 - momentum) ** torch.arange(steps.shape[0], -1, -1, device=steps.device, dtype=torch.float64)
    running.copy_(left[0] * running + (momentum * left[1:]) @ steps.double())
