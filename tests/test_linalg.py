"""Matrix-free solvers against dense algebra."""

import pytest
import torch

from appa_lite.core.linalg import conjugate_gradients


@pytest.fixture
def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """A symmetric positive definite matrix with a spread spectrum, and three right-hand sides."""
    generator = torch.Generator().manual_seed(0)
    vectors, _ = torch.linalg.qr(torch.randn(24, 24, generator=generator, dtype=torch.float64))
    matrix = vectors @ torch.diag(torch.logspace(0, 3, 24, dtype=torch.float64)) @ vectors.T
    return matrix, torch.randn(3, 24, generator=generator, dtype=torch.float64)


def test_agrees_with_the_dense_solution(problem):
    matrix, b = problem
    solution = conjugate_gradients(lambda v: v @ matrix, b, tolerance=1e-12, max_iterations=200)
    torch.testing.assert_close(solution.x, torch.linalg.solve(matrix, b.T).T, rtol=1e-9, atol=1e-10)
    true = (b - solution.x @ matrix).norm(dim=-1) / b.norm(dim=-1)
    assert (solution.residual <= 1e-12).all() and (true < 1e-10).all()
    assert 1 < solution.iterations <= 200


def test_exact_in_as_many_steps_as_there_are_eigenvalues():
    generator = torch.Generator().manual_seed(1)
    vectors, _ = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64))
    matrix = vectors @ torch.diag(torch.tensor([1.0] * 5 + [10.0] * 4 + [100.0] * 3, dtype=torch.float64)) @ vectors.T
    b = torch.randn(2, 12, generator=generator, dtype=torch.float64)
    assert conjugate_gradients(lambda v: v @ matrix, b, tolerance=1e-10).iterations == 3


def test_a_warm_start_saves_work(problem):
    matrix, b = problem
    matvec = lambda v: v @ matrix  # noqa: E731
    exact = torch.linalg.solve(matrix, b.T).T
    cold = conjugate_gradients(matvec, b, tolerance=1e-6)
    assert conjugate_gradients(matvec, b, exact, tolerance=1e-6).iterations == 0
    near = conjugate_gradients(matvec, b, exact * (1 + 1e-5), tolerance=1e-6)
    assert near.iterations < cold.iterations
    torch.testing.assert_close(near.x, cold.x, rtol=1e-3, atol=1e-4)


def test_a_preconditioner_saves_iterations_and_changes_nothing_else(problem):
    matrix, b = problem
    scale = torch.logspace(0, 4, 24, dtype=torch.float64).sqrt()
    stiff = scale[:, None] * (matrix / 1000 + torch.eye(24, dtype=torch.float64)) * scale
    matvec = lambda v: v @ stiff  # noqa: E731
    plain = conjugate_gradients(matvec, b, tolerance=1e-10, max_iterations=500)
    better = conjugate_gradients(matvec, b, tolerance=1e-10, max_iterations=500, precondition=lambda r: r / stiff.diagonal())
    exact = conjugate_gradients(matvec, b, tolerance=1e-10, precondition=lambda r: torch.linalg.solve(stiff, r.T).T)
    assert exact.iterations == 1 < better.iterations < plain.iterations
    for solution in (plain, better, exact):
        torch.testing.assert_close(solution.x, torch.linalg.solve(stiff, b.T).T, rtol=1e-6, atol=1e-8)
        true = (b - solution.x @ stiff).norm(dim=-1) / b.norm(dim=-1)
        torch.testing.assert_close(solution.residual, true, rtol=0.1, atol=1e-12)


def test_the_start_is_left_alone(problem):
    matrix, b = problem
    start = torch.ones_like(b)
    conjugate_gradients(lambda v: v @ matrix, b, start)
    assert torch.equal(start, torch.ones_like(b))


def test_members_do_not_depend_on_each_other(problem):
    matrix, b = problem
    scaled = b * torch.tensor([[1e-6], [1.0], [1e6]], dtype=torch.float64)
    matvec = lambda v: v @ matrix  # noqa: E731
    together = conjugate_gradients(matvec, scaled, tolerance=1e-4)
    for i in range(3):
        alone = conjugate_gradients(matvec, scaled[i : i + 1], tolerance=1e-4)
        torch.testing.assert_close(together.x[i : i + 1], alone.x, rtol=1e-9, atol=0)
        assert alone.iterations <= together.iterations


def test_a_zero_right_hand_side_has_a_zero_solution(problem):
    matrix, b = problem
    b = torch.cat([b[:1], torch.zeros_like(b[:1])])
    solution = conjugate_gradients(lambda v: v @ matrix, b, tolerance=1e-8)
    assert torch.isfinite(solution.x).all() and not solution.x[1].any() and solution.residual[1] == 0


def test_iterations_are_bounded_and_the_residual_is_told(problem):
    matrix, b = problem
    solution = conjugate_gradients(lambda v: v @ matrix, b, tolerance=1e-12, max_iterations=3)
    assert solution.iterations == 3
    true = (b - solution.x @ matrix).norm(dim=-1) / b.norm(dim=-1)
    torch.testing.assert_close(solution.residual, true)
    assert (solution.residual > 1e-12).all()


def test_negative_curvature_is_an_error(problem):
    _, b = problem
    with pytest.raises(FloatingPointError, match="not positive definite"):
        conjugate_gradients(lambda v: -v, b)
