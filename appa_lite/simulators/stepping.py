"""Explicit one-step integrators of dx/dt = rhs(x); x is a tensor, dt a number in the units of 1/rhs.

The stages are written as increments of x, so that in float32 the rounding of the weights does not scale the state:
with weights 1/3 and 2/3 instead, x itself is inflated a little at every step.
"""

from collections.abc import Callable

from torch import Tensor

Tendency = Callable[[Tensor], Tensor]


def euler(rhs: Tendency, x: Tensor, dt: float) -> Tensor:
    """Forward Euler, order 1: x + dt rhs(x)."""
    return x + dt * rhs(x)


def ssp_rk3(rhs: Tendency, x: Tensor, dt: float) -> Tensor:
    """Strong-stability-preserving Runge-Kutta of order 3 (Shu & Osher, 1988).

    a = x + dt f(x);  b = x + ((a - x) + dt f(a)) / 4;  result x + 2 ((b - x) + dt f(b)) / 3.
    """
    a = x + dt * rhs(x)
    b = x + 0.25 * ((a - x) + dt * rhs(a))
    return x + (2.0 / 3.0) * ((b - x) + dt * rhs(b))


def rk4(rhs: Tendency, x: Tensor, dt: float) -> Tensor:
    """The classical Runge-Kutta scheme of order 4 (Kutta, 1901)."""
    k1 = rhs(x)
    k2 = rhs(x + (0.5 * dt) * k1)
    k3 = rhs(x + (0.5 * dt) * k2)
    k4 = rhs(x + dt * k3)
    return x + (dt / 6.0) * ((k1 + k4) + 2.0 * (k2 + k3))
