"""The effective number of a site's local steps: what FedNova divides by and SCAFFOLD reads gradients from."""

from __future__ import annotations

from collections.abc import Iterable


def effective_steps(
    rates: Iterable[float], momentum: float = 0.0, nesterov: bool = False, proximal: float = 0.0
) -> float:
    """How far SGD with these learning rates, one a step, gets from its start along a gradient that is always 1.

    This is FedNova's ||a||_1 (Wang et al., NeurIPS 2020, section 4.1) with every step weighted by its learning rate. At
    rate 1 it is the number of steps for plain SGD, the sum of c with c <- rho c + 1 for heavy ball, that of 1 + rho c
    for Nesterov's; with a proximal term mu each step keeps (1 - rate mu) of the distance so far. Steps are
    those of torch.optim.SGD, with momentum from zero.
    """
    distance = velocity = 0.0
    for rate in rates:
        gradient = 1 - proximal * distance
        velocity = momentum * velocity + gradient
        distance += rate * (gradient + momentum * velocity if nesterov else velocity)
    return distance
