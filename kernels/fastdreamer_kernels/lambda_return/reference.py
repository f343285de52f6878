"""Lambda-returns, by the backward recursion (DreamerV3, eq. 7; MuDreamer, "Value Head Target")."""

import torch
from torch import Tensor


def lambda_return(reward: Tensor, discount: Tensor, value: Tensor, last: Tensor | None, lam: float) -> Tensor:
    """Returns R (T, N) of rows in order of time, all arguments (T, N).

    `reward[t]` arrived with state t, `discount[t]` is gamma times the continuation of state t, `value[t]` its value:

        R[T-1] = value[T-1];  R[t] = reward[t+1] + discount[t+1] * ((1 - lam) * value[t+1] + lam * R[t+1])

    Where `last` (bool, (T, N), or None for never) the episode ends at row t and nothing of row t+1 counts:
    `R[t] = value[t]`, so give 0 as the value of a terminal row. Differentiable in reward, discount and value. The
    result is at least fp32.
    """
    reward, discount, value = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (reward, discount, value))
    returns = [value[-1]]
    for t in range(reward.shape[0] - 2, -1, -1):
        ret = reward[t + 1] + discount[t + 1] * ((1 - lam) * value[t + 1] + lam * returns[-1])
        returns.append(ret if last is None else torch.where(last[t], value[t], ret))
    return torch.stack(returns[::-1])
