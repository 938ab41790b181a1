"""Matrix-free solvers against dense algebra."""

import pytest
import torch

from appa_lite.core.linalg import Stop, conjugate_gradients, gmres


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


@pytest.fixture
def crooked(problem) -> torch.Tensor:
    """What a learned Jacobian makes: half asymmetric, its symmetric part indefinite; acts from the right."""
    matrix, _ = problem
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(24, 24, generator=generator, dtype=torch.float64)
    matrix = matrix / 100 + noise + torch.eye(24, dtype=torch.float64)
    assert torch.linalg.eigvalsh(matrix + matrix.T)[0] < -1
    return matrix


def test_negative_curvature_falls_back_to_gmres(crooked, problem):
    _, b = problem
    solution = conjugate_gradients(lambda v: v @ crooked, b, tolerance=1e-9)
    assert (solution.stop == Stop.NEGATIVE_CURVATURE).any() and (solution.residual <= 1e-9).all()
    torch.testing.assert_close(solution.x, torch.linalg.solve(crooked.T, b.T).T, rtol=1e-5, atol=1e-7)
    bare = conjugate_gradients(lambda v: -v, b)
    torch.testing.assert_close(bare.x, -b)
    assert (bare.stop == Stop.NEGATIVE_CURVATURE).all() and bare.spent.tolist() == [2, 2, 2]


def test_a_stall_falls_back_to_gmres(problem):
    """Positive, but far from symmetric: no curvature gives it away."""
    _, b = problem
    skew = torch.randn(24, 24, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    matrix = torch.eye(24, dtype=torch.float64) + 3 * (skew - skew.T)
    solution = conjugate_gradients(lambda v: v @ matrix, b, tolerance=1e-9)
    assert (solution.stop == Stop.STALLED).all() and (solution.residual <= 1e-9).all()
    torch.testing.assert_close(solution.x, torch.linalg.solve(matrix.T, b.T).T, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("most", [0, *range(2, 12)])  # one alone does not show what A is like
def test_few_iterations_do_no_harm(crooked, problem, most):
    """However they end, the solution is no worse than none, and what is told of it is true."""
    _, b = problem
    skew = torch.randn(24, 24, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for matrix in (crooked, torch.eye(24, dtype=torch.float64) + 3 * (skew - skew.T)):
        solution = conjugate_gradients(lambda v, matrix=matrix: v @ matrix, b, tolerance=1e-9, max_iterations=most)
        assert (solution.residual <= 1).all() and (solution.spent == most).all()
        torch.testing.assert_close(solution.residual, (b - solution.x @ matrix).norm(dim=-1) / b.norm(dim=-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("span", [2.0, 4.0, 5.0])
def test_positive_definite_systems_need_no_fallback(span, dtype):
    """However long conjugate gradients take on the wider spectra, whose residual rises before it falls."""
    generator = torch.Generator().manual_seed(5)
    vectors, _ = torch.linalg.qr(torch.randn(200, 200, generator=generator, dtype=torch.float64))
    matrix = (vectors @ torch.diag(torch.logspace(0, span, 200, dtype=torch.float64)) @ vectors.T).to(dtype)
    b = torch.randn(2, 200, generator=generator, dtype=torch.float64).to(dtype)
    solution = conjugate_gradients(lambda v: v @ matrix, b, tolerance=1e-3, max_iterations=3000)
    assert (solution.stop == Stop.CONVERGED).all() and (solution.residual <= 1e-3).all()


def test_gmres_minimises_the_residual_over_the_krylov_space(crooked, problem):
    _, b = problem
    for k in (1, 3, 24):
        solution = gmres(lambda v: v @ crooked, b, tolerance=0, max_iterations=k)
        for i in range(3):
            vectors = [b[i]]
            for _ in range(k - 1):
                vectors.append(vectors[-1] @ crooked / 10)
            space = torch.stack(vectors) @ crooked
            orthonormal, _ = torch.linalg.qr(space.T)
            best = b[i] - orthonormal @ (orthonormal.T @ b[i])
            torch.testing.assert_close(solution.residual[i], best.norm() / b[i].norm(), rtol=1e-4, atol=1e-6)


def test_gmres_restarts_and_takes_a_preconditioner(crooked, problem):
    _, b = problem
    near = torch.linalg.inv(crooked + 0.3 * torch.eye(24, dtype=torch.float64))
    matvec = lambda v: v @ crooked  # noqa: E731
    plain = gmres(matvec, b, tolerance=1e-8, max_iterations=500, restart=24)
    better = gmres(matvec, b, tolerance=1e-8, precondition=lambda r: r @ near, restart=4)
    assert (better.residual <= 1e-8).all() and better.iterations < plain.iterations
    torch.testing.assert_close(better.x, torch.linalg.solve(crooked.T, b.T).T, rtol=1e-5, atol=1e-7)


def test_gmres_gives_up_where_it_cannot_go_on(problem):
    """A cyclic shift: no combination of the first M - 1 products is nearer to b than zero is."""
    b = torch.zeros(1, 24, dtype=torch.float64)
    b[0, 0] = 1
    solution = gmres(lambda v: v.roll(1, -1), b, restart=5, max_iterations=100)
    assert solution.stop.tolist() == [Stop.STALLED] and solution.iterations == 5 and solution.residual == 1
    assert not solution.x.any()


@pytest.mark.parametrize("solve", [conjugate_gradients, gmres])
def test_members_fall_back_one_by_one(crooked, problem, solve):
    """Also when only some of them need it, with a start, and within the same number of products."""
    matrix, b = problem
    both = torch.stack([crooked, matrix / 100, crooked])
    b = b * torch.tensor([[1e-6], [1.0], [1e6]], dtype=torch.float64)
    start = torch.linalg.solve(both.mT, b[..., None])[..., 0] + 0.3 * b
    together = solve(lambda v: torch.einsum("bi,bij->bj", v, both), b, start, 1e-6, 13)
    for i in range(3):
        alone = solve(lambda v, i=i: v @ both[i], b[i : i + 1], start[i : i + 1], 1e-6, 13)
        torch.testing.assert_close(together.x[i : i + 1], alone.x, rtol=1e-7, atol=0)
        assert alone.stop == together.stop[i] and alone.spent == together.spent[i] <= 13


@pytest.mark.parametrize("solve", [conjugate_gradients, gmres])
def test_the_image_of_the_solution_comes_for_free(crooked, problem, solve):
    _, b = problem
    other = torch.randn(24, 2, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    calls = []

    def matvec(v):
        calls.append(1)
        return v @ crooked, torch.einsum("bi,ijk->bjk", v, other)

    for start in (None, b.flip(0) / 50, 100 * b):
        calls.clear()
        solution = solve(matvec, b, start, 1e-6)
        torch.testing.assert_close(solution.image, torch.einsum("bi,ijk->bjk", solution.x, other), rtol=1e-8, atol=1e-9)
        assert len(calls) == solution.iterations + (start is not None)


def test_a_start_worse_than_zero_is_ignored(problem):
    matrix, b = problem
    start = torch.cat([100 * b[:1], torch.linalg.solve(matrix, b[1:].T).T * 1.01])
    solution = conjugate_gradients(lambda v: v @ matrix, b, start, max_iterations=0)
    assert not solution.x[0].any() and torch.equal(solution.x[1:], start[1:])
    assert solution.residual[0] == 1


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_fixed_counts_agree_with_azula(crooked, problem, iterations):
    solvers = pytest.importorskip("azula.linalg.solve")
    matrix, b = problem
    ours = gmres(lambda v: v @ crooked, b, tolerance=0, max_iterations=iterations)
    torch.testing.assert_close(ours.x, solvers.gmres(lambda v: v @ crooked, b, iterations=iterations), rtol=1e-9, atol=1e-12)
    ours = conjugate_gradients(lambda v: v @ matrix, b, tolerance=0, max_iterations=iterations)
    torch.testing.assert_close(ours.x, solvers.cg(lambda v: v @ matrix, b, iterations=iterations), rtol=1e-9, atol=1e-12)


def test_what_is_not_a_number_is_not_converged(problem):
    _, b = problem
    for solve in (conjugate_gradients, gmres):
        solution = solve(lambda v: v * torch.nan, b)
        assert not solution.x.any() and (solution.residual == 1).all() and (solution.stop != Stop.CONVERGED).all()
