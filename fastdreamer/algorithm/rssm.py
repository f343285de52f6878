"""The recurrent state-space model: sequence model, prior and posterior over the latent state s_t = {h_t, z_t}.

Legend: B sequences, T steps, N rows, D recurrent state, S categoricals of K classes, E embedding, A action.
"""

from typing import NamedTuple

import torch
from fastdreamer_kernels.ops import Ops
from fastdreamer_kernels.rssm_observe.reference import Running, Weights
from torch import Tensor, nn

from fastdreamer.algorithm.distributions import onehot_mode
from fastdreamer.algorithm.networks import NORM_EPS, BatchNormAct, LayerNormAct, given, linear, norm_act
from fastdreamer.config import ModelConfig, Size


class State(NamedTuple):
    """The latent state: `deter` (..., D) and `stoch` (..., S, K), one-hot."""

    deter: Tensor
    stoch: Tensor

    def features(self) -> Tensor:
        """s_t as the heads read it: (..., D + S*K), in the latents' dtype: narrow once rather than in every head."""
        return torch.cat([self.deter.to(self.stoch.dtype), self.stoch.flatten(-2)], -1)

    def detach(self) -> "State":
        return State(self.deter.detach(), self.stoch.detach())


def bounded(action: Tensor) -> Tensor:
    """Actions (..., A) cut to [-1, 1], their gradient scaled instead of cut."""
    return action / action.detach().abs().clamp(min=1)


class RSSM(nn.Module):
    """h_t = f(h_{t-1}, z_{t-1}, a_{t-1}), prior p(z_t | h_t), posterior q(z_t | h_t, x_t)."""

    def __init__(self, embed: int, action: int, widths: Size, model: ModelConfig, ops: Ops):
        super().__init__()
        d, u, sk = widths.deter, widths.units, widths.stoch * widths.classes
        self.stoch, self.classes, self.unimix, self.ops = widths.stoch, widths.classes, model.unimix, ops
        self.features = d + sk
        self.initial_deter = nn.Parameter(torch.zeros(d))
        # Sequence model
        self.inp, self.inp_norm = linear(sk + action, u, bias=False), LayerNormAct(u, ops)
        self.gates = linear(u + d, 3 * d, bias=False)
        self.gates_weight, self.gates_bias = nn.Parameter(torch.ones(3 * d)), nn.Parameter(torch.zeros(3 * d))
        # Prior
        self.prior_hidden, self.prior_norm = linear(d, u, bias=False), LayerNormAct(u, ops)
        self.prior_out = linear(u, sk, bias=True)
        # Posterior: the representation network
        self.posterior_hidden = linear(d + embed, u, bias=False)
        self.posterior_norm = norm_act("posterior", u, model, ops)
        self.posterior_out = linear(u, sk, bias=True)

    def initial(self) -> State:
        """The learned state before an episode's first step (one row): tanh of a parameter, and the prior's mode."""
        deter = torch.tanh(self.initial_deter).unsqueeze(0)
        return State(deter, onehot_mode(self.prior(deter)))

    def advance(self, state: State, action: Tensor, *, frozen: bool = False) -> tuple[Tensor, Tensor]:
        """The sequence model: state and action (N, A) at t-1 to `deter` (N, D) at t; `frozen` as `given` has it. And
        the same again as products read it, in the latents' dtype.

        Beyond [-1, 1] an action counts as its bound, as environments clip it; its gradient is scaled, not cut.
        """
        stoch = state.stoch.flatten(-2)
        u = self.inp(torch.cat([stoch, bounded(action).to(stoch.dtype)], -1))
        # (N, U) -> (N, U + D) -> (N, 3D)
        pre = self.gates(self.inp_norm(u, beside=state.deter, frozen=frozen))
        scale, shift = given(self.gates_weight, frozen), given(self.gates_bias, frozen)
        return self.ops.gru_gates(pre, state.deter, scale, shift, NORM_EPS)

    def prior(self, deter: Tensor, *, frozen: bool = False) -> Tensor:
        """Logits (..., S, K) of p(z_t | h_t) from h_t (..., D)."""
        logits = self.prior_out(self.prior_norm(self.prior_hidden(deter), frozen=frozen))
        return logits.unflatten(-1, (self.stoch, self.classes))

    def posterior(self, deter: Tensor, embed: Tensor, *, batch_stats: bool) -> Tensor:
        """Logits (N, S, K) of q(z_t | h_t, x_t) from h_t (N, D) and x_t (N, E).

        With `batch_stats` BatchNorm normalises by these N rows (training), without by its running statistics.
        """
        hidden = self.posterior_hidden(torch.cat([deter, embed], -1))
        logits = self.posterior_out(self.posterior_norm(hidden, batch_stats=batch_stats))
        return logits.unflatten(-1, (self.stoch, self.classes))

    def sample(self, logits: Tensor, uniform: Tensor, *, beside: Tensor | None = None) -> Tensor:
        """z (N, S, K) from logits (N, S, K) and uniforms (N, S); the gradient is straight-through. With h_t (N, D)
        `beside` it, s_t as the heads read it, (N, D + S*K)."""
        return self.ops.sample_onehot(logits, uniform.contiguous(), self.unimix, beside)

    def observe_step(
        self,
        initial: State,
        state: State,
        action: Tensor,
        embed: Tensor,
        is_first: Tensor,
        uniform: Tensor,
        *,
        batch_stats: bool,
    ) -> tuple[State, Tensor]:
        """One posterior step: state before, past action (N, A), x_t (N, E), is_first (N,), uniforms (N, S).

        Where `is_first`, the state is replaced by `initial` (one row) and the action by zeros. Returns s_t and the
        posterior's logits (N, S, K).
        """
        fresh = is_first.unsqueeze(-1)
        state = State(
            torch.where(fresh, initial.deter, state.deter),
            torch.where(fresh.unsqueeze(-1), initial.stoch, state.stoch),
        )
        deter, read = self.advance(state, action.masked_fill(fresh, 0))
        logits = self.posterior(read, embed, batch_stats=batch_stats)
        return State(deter, self.sample(logits, uniform)), logits

    def observe(
        self, embed: Tensor, action: Tensor, is_first: Tensor, uniform: Tensor, *, batch_stats: bool
    ) -> tuple[State, Tensor, Tensor]:
        """The posterior along sequences: x (B, T, E), past actions (B, T, A), is_first (B, T), uniforms (B, T, S).

        Row 0 starts from the learned initial state. Returns states (B, T, ...), posterior and prior logits
        (B, T, S, K). The loop of steps, each as `observe_step`, is `rssm_observe/reference.py` among the operations.
        """
        initial, norm, running = self.initial(), self.posterior_norm, None
        if isinstance(norm, BatchNormAct):
            running = Running(norm.running_mean, norm.running_var, norm.momentum, norm.eps)
        observed = self.ops.rssm_observe(
            embed,
            bounded(action),
            is_first,
            uniform,
            initial.deter[0],
            initial.stoch[0],
            self.weights(),
            running,
            batch_stats=batch_stats,
            eps=NORM_EPS,
            unimix=self.unimix,
        )
        return State(observed.deter, observed.stoch), observed.logits, self.prior(observed.deter)

    def weights(self) -> Weights:
        """Of sequence model and posterior, as the operation takes them."""
        norm = self.posterior_norm
        assert isinstance(norm, LayerNormAct | BatchNormAct)
        return Weights(
            self.inp.weight,
            self.inp_norm.weight,
            self.inp_norm.bias,
            self.gates.weight,
            self.gates_weight,
            self.gates_bias,
            self.posterior_hidden.weight,
            norm.weight,
            norm.bias,
            self.posterior_out.weight,
            self.posterior_out.bias,
        )

    def imagine_step(self, state: State, action: Tensor, uniform: Tensor) -> tuple[State, Tensor]:
        """One prior step: the state (N, ...) that follows an action (N, A), drawn with uniforms (N, S); and the same as
        `features` (N, D + S*K).

        Its gradients are for state and action: who imagines does not change the model.
        """
        deter, read = self.advance(state, action, frozen=True)
        prior = self.prior(read, frozen=True)
        features = self.sample(prior, uniform, beside=deter)
        return State(deter, features[:, deter.shape[-1] :].view(prior.shape)), features
