"""Ways to solve (H + damping) x = g with Hessian-vector products only."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hypergrad.errors import ConfigurationError

# v -> (H + damping) v, on flat vectors.
Operator = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Solution:
    """What a solver found.

    Args:
        x: the approximate solution, shape `(n,)`.
        residual: |(H + damping) x - g| / |g|.
        products: Hessian-vector products spent.
        status: `"ok"`, or what went wrong and what to do about it.
    """

    x: torch.Tensor
    residual: float
    products: int
    status: str = "ok"


class Solver(ABC):
    """A way to solve a symmetric linear system."""

    @abstractmethod
    def solve(self, operator: Operator, g: torch.Tensor, damping: float) -> Solution:
        """Solve `operator(x) = g`.

        Args:
            operator: v -> (H + damping) v, for vectors of shape `(n,)`.
            g: the right-hand side, shape `(n,)`.
            damping: the damping that is in the operator.
        """


@dataclass(frozen=True)
class CG(Solver):
    """Conjugate gradients (Hestenes & Stiefel 1952): exact after n products, good after few where H is well scaled.

    For implicit hypergradients in Pedregosa 2016, "Hyperparameter optimization with approximate gradient". Needs a
    positive definite operator: it stops where it meets a direction of negative curvature, and says so.

    Args:
        iterations: the most Hessian-vector products, at least 1.
        tolerance: stop when the relative residual is below.

    Raises:
        ConfigurationError: for a value outside its range.
    """

    iterations: int = 50
    tolerance: float = 1e-5

    def __post_init__(self) -> None:
        _check_count("iterations", self.iterations)
        if not 0.0 <= self.tolerance < 1.0:
            raise ConfigurationError(f"`tolerance` must lie in [0, 1), but got {self.tolerance!r}.")

    def solve(self, operator: Operator, g: torch.Tensor, damping: float) -> Solution:
        """See `Solver.solve`."""
        size = float(g.norm())
        x, r = torch.zeros_like(g), g.clone()
        if size == 0.0:
            return Solution(x, 0.0, 0)
        p, rr, products, status = r.clone(), float(r.dot(r)), 0, "ok"
        while products < self.iterations and math.sqrt(rr) > self.tolerance * size:
            ap = operator(p)
            products += 1
            curvature = float(p.dot(ap))
            if not curvature > 0.0:
                eigenvalue = curvature / float(p.dot(p))
                status = (
                    f"conjugate gradients met negative curvature ({eigenvalue:.3g}) after {products} products: the "
                    "training loss is not convex here, or not trained to a minimum. Train for longer, raise `damping` "
                    f"(now {damping:g}) above {max(damping - eigenvalue, 0.0):.3g}, or use Neumann() or Unrolled()"
                )
                if products == 1:
                    x = g.clone()  # nothing is known of the curvature: the gradient itself, as with H = 1
                break
            step = rr / curvature
            x += step * p
            r -= step * ap
            rr, before = float(r.dot(r)), rr
            p = r + (rr / before) * p
        residual = math.sqrt(float(r.dot(r))) / size
        if status == "ok" and residual > self.tolerance:
            status = (
                f"conjugate gradients stopped after {products} products at a relative residual of {residual:.2g}: "
                f"raise `iterations` (now {self.iterations}) or `damping` (now {damping:g})"
            )
        return Solution(x, residual, products, status)


@dataclass(frozen=True)
class Neumann(Solver):
    """x = scale * sum over k of (1 - scale * operator)^k g, the Neumann series, cut off.

    In Lorraine et al. 2020, "Optimizing millions of hyperparameters by implicit differentiation", algorithm 3. Cut off
    after k terms it is what k steps of gradient descent from here would do, so it also serves away from a minimum.

    Args:
        terms: Hessian-vector products in the series, at least 1.
        scale: must be below 2 / (the largest eigenvalue). None estimates that by ten products of a power iteration
            and takes 1 / (1.1 * the eigenvalue).

    Raises:
        ConfigurationError: for a value outside its range.
    """

    terms: int = 20
    scale: float | None = None

    def __post_init__(self) -> None:
        _check_count("terms", self.terms)
        if self.scale is not None and not (math.isfinite(self.scale) and self.scale > 0.0):
            raise ConfigurationError(f"`scale` must be positive, but got {self.scale!r}.")

    def solve(self, operator: Operator, g: torch.Tensor, damping: float) -> Solution:
        """See `Solver.solve`."""
        size = float(g.norm())
        if size == 0.0:
            return Solution(torch.zeros_like(g), 0.0, 0)
        products, scale = 0, self.scale
        if scale is None:
            largest = _largest_eigenvalue(operator, g, 10)
            products, scale = 10, 1.0 / (1.1 * largest) if largest > 0.0 else 1.0
        term, total, status, residual = g.clone(), torch.zeros_like(g), "ok", 1.0
        for _ in range(self.terms):
            total += term
            term = term - scale * operator(term)
            products += 1
            residual = float(term.norm()) / size
            if not residual < 10.0:
                largest = _largest_eigenvalue(operator, g, 5)
                status = (
                    f"the Neumann series diverges after {products} products (its last term is {residual:.2g} times the "
                    f"first): scale={scale:.3g} must be below 2 / the largest eigenvalue, about "
                    f"{2.0 / largest if largest > 0.0 else 0.0:.3g}, and no eigenvalue may be negative: lower `scale`, "
                    f"raise `damping` (now {damping:g}) or lower `terms`"
                )
                break
        # What is left of g after the terms that count: the next term exactly.
        return Solution(scale * total, residual, products, status)


@dataclass(frozen=True)
class Nystrom(Solver):
    """Replaces H by a low-rank approximation from `rank` of its columns, and inverts that plus the damping directly.

    In Hataya & Yamada 2023, "Nystrom method for accurate and scalable implicit differentiation", eq. 6; the inverse is
    taken here in an orthonormal basis of the columns, which does not lose digits at small damping. Needs
    damping > 0, and memory for `rank` vectors of the parameters' size.

    Args:
        rank: columns of H, each one Hessian-vector product; at least 1.
        seed: which columns are drawn.

    Raises:
        ConfigurationError: for a rank below 1, or when solving without damping.
    """

    rank: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        _check_count("rank", self.rank)

    def solve(self, operator: Operator, g: torch.Tensor, damping: float) -> Solution:
        """See `Solver.solve`."""
        if not damping > 0.0:
            raise ConfigurationError(
                "Nystrom inverts damping outside the columns that it knows: use Implicit(solver=Nystrom(), "
                "damping=...) with a positive damping, such as 1e-2."
            )
        size, n = float(g.norm()), g.numel()
        if size == 0.0:
            return Solution(torch.zeros_like(g), 0.0, 0)
        rank = min(self.rank, n)
        chosen = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed))[:rank].to(g.device)
        columns = torch.stack([_column(operator, g, int(i), damping) for i in chosen.tolist()], dim=1)
        core = columns[chosen]
        # H is about columns @ pinv(core) @ columns.T = Q (R pinv(core) R.T) Q.T
        q, r = torch.linalg.qr(columns)
        small = r @ torch.linalg.pinv((core + core.T) / 2, hermitian=True) @ r.T
        values, vectors = torch.linalg.eigh((small + small.T) / 2)
        basis = q @ vectors
        inside = basis.T @ g
        x = basis @ (inside / (values.clamp(min=0.0) + damping)) + (g - basis @ inside) / damping
        residual = float((operator(x) - g).norm()) / size
        status = "ok"
        if not residual < 1.0:
            status = (
                f"{rank} columns do not describe the curvature (relative residual {residual:.2g}): raise `rank` or "
                f"`damping` (now {damping:g}), or use CG()"
            )
        return Solution(x, residual, rank + 1, status)


def _column(operator: Operator, g: torch.Tensor, index: int, damping: float) -> torch.Tensor:
    hot = torch.zeros_like(g)
    hot[index] = 1.0
    return operator(hot) - damping * hot


def _largest_eigenvalue(operator: Operator, g: torch.Tensor, products: int) -> float:
    """By power iteration from g: from below, so a little too small."""
    v, value = g / g.norm(), 0.0
    for _ in range(products):
        moved = operator(v)
        value = float(moved.norm())
        if not (math.isfinite(value) and value > 0.0):
            return value
        v = moved / value
    return value


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"`{name}` must be an integer of at least 1, but got {value!r}.")
