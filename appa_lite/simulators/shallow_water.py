"""A wind-driven double gyre: one or two active shallow layers over a resting abyss, on a beta plane in a closed basin."""

import importlib.util
import math
import os
import shutil
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from appa_lite.core.errors import UserError
from appa_lite.core.fields import Derived, FieldSpec, Grid, Variable
from appa_lite.core.random import Streams
from appa_lite.simulators.base import Simulator, forcing_noise
from appa_lite.simulators.stepping import ssp_rk3

GRAVITY = 9.81
DENSITY = 1025.0
DAY = 86400.0
WINDS = 6
COMPILED_BATCH = 8  # members per call of the compiled step: larger batches leave the cache


class ShallowWaterOcean(Simulator):
    """Shallow-water layers h_k = H + eta_k driven by a wind with a random part that is not part of the fields.

    .. code-block:: text

        d eta_k/dt = -div(h_k u_k) - eta_k / relaxation
        d u_k/dt   = + q_k (h v)_k - d/dx (M_k + |u_k|^2/2) + tau_x / (rho h_1) [k=1] - r_k u_k - A4 lap^2 u_k   (v alike)
        q_k = (f + zeta_k) / h_k,  f = f0 + beta (y - L/2),  M_2 = gb (eta_1 + eta_2),  M_1 = M_2 + ga eta_1
        tau = wind_stress [(-cos(2 pi y/L), 0) + sum_p a_p(t) P_p]

    The six amplitudes a_p are Ornstein-Uhlenbeck processes. P_1 = (-cos(2 pi y/L), 0), P_2 = (sin(2 pi y/L), 0), and
    P_3..P_6 are the non-divergent waves (-d/dy, d/dx) sin(k pi x/L) sin(l pi y/L), (k, l) = (1,1), (1,2), (2,1), (2,2),
    scaled to largest component one. With one layer M_1 = ga eta_1 (reduced gravity).

    Space: the energy-conserving scheme of Sadourny (1975) on an Arakawa C grid, free slip. Time: SSP-RK3.
    eta is at cell centres, u on western faces (column 0 is the wall, always 0), v on southern faces (row 0 is the
    wall, always 0); the eastern and northern walls are implied.

    A state is a tensor (B, 3 * layers * n * n + 6): for each layer eta [m], u, v [m/s], row by row, in the order of
    ``spec.variables``; then the six wind amplitudes (dimensionless). Any floating dtype; ``initial`` makes float32.

    Arguments:
        n: cells along each side of the square basin.
        dx: width of a cell, m.
        layers: active layers, 1 or 2.
        H: resting thickness of every layer, m.
        ga: reduced gravity of the interface below layer 1, m/s2.
        gb: reduced gravity of the interface below layer 2, m/s2 (no use with one layer).
        f0: Coriolis parameter at the middle of the basin, 1/s.
        beta: its northward gradient, 1/(m s).
        wind_stress: amplitude of the mean wind stress, Pa.
        wind_std: standard deviation of each of the six amplitudes, in units of ``wind_stress``; 0 is a steady wind.
        wind_memory: decorrelation time of the amplitudes, s.
        wind_update: seconds between updates of the wind, a multiple of dt.
        drag: linear drag of layer 1, 1/s.
        drag_lower: linear drag of layer 2, 1/s.
        A4: biharmonic viscosity, m4/s.
        relaxation: time scale of the relaxation of thickness, s; 0 is none.
        floor: smallest thickness in divisions, m; ``advance`` refuses states with a thinner layer.
        noise: root mean square of the initial displacement of the upper interface, m.
        dt: time step, s.
        frame_step: seconds between frames, a multiple of ``wind_update``.
        spinup_days: days before a trajectory is on the climate.
        compiled: compile the step where there is a compiler (about 15 s once, then five times faster).

    Raises:
        UserError: impossible settings, or (from ``advance``) a member that is not finite or outcrops.
    """

    def __init__(
        self,
        n: int = 64,
        dx: float = 16e3,
        layers: int = 2,
        H: float = 500.0,
        ga: float = 0.04,
        gb: float = 0.03,
        f0: float = 1e-4,
        beta: float = 2e-11,
        wind_stress: float = 0.16,
        wind_std: float = 0.25,
        wind_memory: float = 10 * DAY,
        wind_update: float = 5400.0,
        drag: float = 0.0,
        drag_lower: float = 1e-8,
        A4: float = 1e10,
        relaxation: float = 250 * DAY,
        floor: float = 20.0,
        noise: float = 20.0,
        dt: float = 1080.0,
        frame_step: float = 2 * DAY,
        spinup_days: float = 1000.0,
        compiled: bool = True,
    ):
        if layers not in (1, 2):
            raise UserError(f"layers must be 1 or 2, got {layers}")
        self.n, self.dx, self.layers, self.H = n, dx, layers, H
        self.f0, self.beta = f0, beta
        self.wind_stress, self.wind_std, self.wind_memory, self.wind_update = wind_stress, wind_std, wind_memory, wind_update
        self.A4, self.relaxation, self.floor, self.noise, self.dt = A4, relaxation, floor, noise, dt
        self.spinup_days, self.compiled = spinup_days, compiled
        self.drags = (drag, drag_lower)[:layers]
        self.gravity = ((ga + gb, gb), (gb, gb)) if layers == 2 else ((ga,),)
        self.steps_per_update = _ratio("wind_update", wind_update, "dt", dt)
        self.updates = _ratio("frame_step", frame_step, "wind_update", wind_update)
        self.spec = self._spec(frame_step)
        self._constants: dict[tuple, tuple[Tensor, ...]] = {}
        self._compiled_step: Callable | None = None

    def _spec(self, frame_step: float) -> FieldSpec:
        centres = tuple((i + 0.5) * self.dx for i in range(self.n))
        variables = []
        for k in range(1, self.layers + 1):
            variables += [
                Variable(f"eta{k}", "m", long_name=f"thickness anomaly of layer {k}"),
                Variable(f"u{k}", "m s-1", "sea_water_x_velocity", f"eastward velocity of layer {k}", (0.0, -0.5)),
                Variable(f"v{k}", "m s-1", "sea_water_y_velocity", f"northward velocity of layer {k}", (-0.5, 0.0)),
            ]
        ssh = Derived(
            "ssh",
            "linear",
            tuple(f"eta{k}" for k in range(1, self.layers + 1)),
            tuple(g / GRAVITY for g in self.gravity[0]),
            "m",
            "sea_surface_height_above_geoid",
            "sea surface height",
        )
        return FieldSpec(tuple(variables), Grid(("y", "x"), centres, centres), frame_step, None, (ssh,))

    @property
    def spinup_frames(self) -> int:
        return math.ceil(self.spinup_days * DAY / self.spec.step)

    @property
    def decorrelation_frames(self) -> int:
        """500 days with the default settings: branches of one state correlate .86 at 100 d, .32 at 300 d, .06 at 500 d."""
        return math.ceil(0.5 * self.spinup_days * DAY / self.spec.step)

    # States

    def initial(self, seed: int, members: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Smooth geostrophic noise in the upper layer over a lower layer at rest, and independent winds."""
        streams = Streams(seed, members, "ocean", "initial")
        modes = 8
        corners = torch.arange(self.n + 1, dtype=torch.float64) / self.n
        k = torch.arange(1, modes + 1, dtype=torch.float64)
        waves = torch.sin(math.pi * k[:, None] * corners)
        weights = torch.exp(-((k[:, None] ** 2 + k**2) / (0.5 * modes) ** 2))
        e = torch.stack([waves.T @ (c * weights) @ waves for c in streams.normal((modes, modes), torch.float64)])
        e = e * (self.noise / e.square().mean((1, 2), keepdim=True).sqrt())
        fields = torch.zeros(len(members), *self.spec.shape, dtype=torch.float64)
        centred = (e[:, 1:, 1:] + e[:, 1:, :-1] + e[:, :-1, 1:] + e[:, :-1, :-1]) / 4
        fields[:, 0] = centred - centred.mean((1, 2), keepdim=True)
        if self.layers == 2:
            fields[:, 3] = -fields[:, 0]
        psi = e * ((self.gravity[0][0] - self.gravity[0][-1] * (self.layers - 1)) / self.f0)
        fields[:, 1] = -(psi[:, 1:, :-1] - psi[:, :-1, :-1]) / self.dx
        fields[:, 2] = (psi[:, :-1, 1:] - psi[:, :-1, :-1]) / self.dx
        winds = self.wind_std * streams.normal((WINDS,), torch.float64)
        return self.from_fields(fields.float(), winds.float()).to(device)

    def from_fields(self, fields: Tensor, winds: Tensor | None = None) -> Tensor:
        """States (B, n_state) from fields (B, C, H, W); velocities on the walls are set to zero.

        ``winds`` (B, 6) are the amplitudes; None is the mean wind, from which the random part grows anew.
        """
        if fields.shape[1:] != self.spec.shape:
            raise UserError(f"fields must be (B, {', '.join(map(str, self.spec.shape))}), got {tuple(fields.shape)}")
        fields = fields.clone()
        fields[:, 1::3, :, 0] = 0
        fields[:, 2::3, 0, :] = 0
        if winds is None:
            winds = fields.new_zeros(fields.shape[0], WINDS)
        return torch.cat([fields.flatten(1), winds.to(fields)], dim=1)

    def fields(self, state: Tensor) -> Tensor:
        """Fields (B, C, H, W) in m and m/s."""
        return state[:, :-WINDS].unflatten(1, self.spec.shape)

    def winds(self, state: Tensor) -> Tensor:
        """The six hidden amplitudes (B, 6) of the random part of the wind, in units of ``wind_stress``."""
        return state[:, -WINDS:]

    def perturb(self, state: Tensor, seed: int, members: Sequence[int]) -> Tensor:
        """The same ocean under independent winds, drawn from their stationary law: smooth, so no gravity waves."""
        winds = self.wind_std * Streams(seed, members, "ocean", "start").normal((WINDS,), torch.float64)
        return torch.cat([state[:, :-WINDS], winds.to(state)], dim=1)

    # Time

    def advance(self, state: Tensor, frame: int, seed: int, members: Sequence[int]) -> Tensor:
        """States one frame later; the wind between ``frame`` and ``frame + 1`` is a function of (seed, member, frame)."""
        noise = forcing_noise((self.updates, WINDS), seed, members, frame, "ocean", "wind").to(state)
        if not self._compiles(state.device):
            return self._check(self._advance(state, noise, step=self.step), members)
        out = []
        for start in range(0, len(members), COMPILED_BATCH):
            part, drawn = state[start : start + COMPILED_BATCH], noise[start : start + COMPILED_BATCH]
            fill = (COMPILED_BATCH if len(members) > 1 else 1) - part.shape[0]  # two shapes to compile, 1 and 8
            part = torch.cat([part, part[-1:].expand(fill, -1)])
            drawn = torch.cat([drawn, drawn[-1:].expand(fill, -1, -1)])
            out.append(self._advance(part, drawn, step=self._compile())[: COMPILED_BATCH - fill])
        return self._check(torch.cat(out), members)

    def _advance(self, state: Tensor, noise: Tensor, step: Callable) -> Tensor:
        keep = math.exp(-self.wind_update / self.wind_memory)
        kick = self.wind_std * math.sqrt(1 - keep**2)
        constants = self.constants(state)
        x = self._to_flat(self.fields(state)).contiguous()
        winds = self.winds(state)
        for update in range(self.updates):
            winds = keep * winds + kick * noise[:, update]
            stress = self.stress(winds)
            for _ in range(self.steps_per_update):
                x = step(x, stress, constants)
        return torch.cat([self._from_flat(x).flatten(1), winds], dim=1)

    def _to_flat(self, fields: Tensor) -> Tensor:
        """(B, C, H, W) to (B, 3, layers, H * W)."""
        return fields.flatten(2).unflatten(1, (self.layers, 3)).transpose(1, 2)

    def _from_flat(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(1, 2).unflatten(2, (self.n, self.n))

    def _check(self, state: Tensor, members: Sequence[int]) -> Tensor:
        thinnest = self.H + self.fields(state)[:, 0::3].amin((1, 2, 3))
        finite = state.isfinite().all(1)
        for member, ok, thin in zip(members, finite.tolist(), thinnest.tolist(), strict=True):
            if not ok:
                raise UserError(f"member {member} of the ocean is not finite: take a smaller dt (now {self.dt:g} s) or a milder start")
            if thin < self.floor:
                found = f"a layer of member {member} is {thin:.0f} m thick, thinner than the floor of {self.floor:g} m"
                raise UserError(f"{found}: use more damping or less wind")
        return state

    def _compiles(self, device: torch.device) -> bool:
        if not self.compiled:
            return False
        if device.type == "cuda":
            return importlib.util.find_spec("triton") is not None
        return any(shutil.which(c) for c in (os.environ.get("CXX", "c++"), "g++", "clang++"))

    def _compile(self) -> Callable:
        if self._compiled_step is None:
            # every padded array is written once: inlined into its consumers it would be computed many times
            self._compiled_step = torch.compile(self.step, dynamic=False, options={"max_pointwise_cat_inputs": 0})
        return self._compiled_step

    # Equations

    def stress(self, winds: Tensor) -> Tensor:
        """Wind stress over density (2, B, 1, n * n), m2/s2, on u and v points, for amplitudes (B, 6)."""
        patterns = self.constants(winds)[-1]
        total = patterns[:, :1].expand(-1, winds.shape[0], -1)
        for p in range(WINDS):  # not a matrix product: its rounding would depend on the size of the batch
            total = total + winds[None, :, p, None] * patterns[:, p : p + 1]
        return (self.wind_stress / DENSITY) * total[:, :, None]

    def constants(self, like: Tensor) -> tuple[Tensor, ...]:
        """Masks, the Coriolis parameter, per-layer coefficients and wind patterns in the dtype and device of ``like``."""
        key = (like.dtype, like.device)
        if key not in self._constants:
            n = self.n
            one = torch.ones(n, n, dtype=torch.float64)
            west, east, south, north = (one.clone() for _ in range(4))  # zero in the column or row that touches the wall
            west[:, 0], east[:, -1], south[0], north[-1] = 0, 0, 0, 0
            corner = torch.arange(n, dtype=torch.float64)[:, None] * self.dx
            coriolis = (self.f0 + self.beta * (corner - 0.5 * n * self.dx)) * one
            flat = [a.flatten() for a in (west, east, south, north, coriolis)]
            per_layer = (self.drags, (1.0, 0.0)[: self.layers], *zip(*self.gravity, strict=True))
            layers = [torch.tensor(c, dtype=torch.float64)[:, None] for c in per_layer]
            self._constants[key] = tuple(a.to(like) for a in (*flat, *layers, self._patterns()))
        return self._constants[key]

    def _patterns(self) -> Tensor:
        """The six wind patterns (2, 6, n * n) on u and v points."""
        n = self.n
        faces, centres = torch.arange(n, dtype=torch.float64) / n, (torch.arange(n, dtype=torch.float64) + 0.5) / n
        zero, one = torch.zeros(n, n, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
        along = [(-torch.cos(2 * math.pi * centres)[:, None] * one, zero), (torch.sin(2 * math.pi * centres)[:, None] * one, zero)]
        for k, m in ((1, 1), (1, 2), (2, 1), (2, 2)):
            scale = 1.0 / max(k, m)
            x = -m * scale * torch.cos(m * math.pi * centres)[:, None] * torch.sin(k * math.pi * faces)
            y = k * scale * torch.sin(m * math.pi * faces)[:, None] * torch.cos(k * math.pi * centres)
            along.append((x, y))
        return torch.stack([torch.stack(list(p)) for p in zip(*along, strict=True)]).flatten(2)

    def step(self, x: Tensor, stress: Tensor, constants: tuple[Tensor, ...]) -> Tensor:
        """One time step of x (B, 3, layers, n * n)."""
        return ssp_rk3(lambda s: self.tendency(s, stress, constants), x, self.dt)

    def tendency(self, x: Tensor, stress: Tensor, constants: tuple[Tensor, ...]) -> Tensor:
        """dx/dt of x (B, 3, layers, n * n) = (eta, u, v).

        Rows follow each other in memory, so that a neighbour is a shift: west -1, east +1, south -n, north +n. What a
        shift across the end of a row brings in is either a wall value, zero as it should be, or masked.
        """
        west, east, south, north, coriolis, drag, top, *gravity, _ = constants
        n, idx = self.n, 1.0 / self.dx
        size = n * n
        margin = x.new_zeros(*x.shape[:1], self.layers, n + 1)

        def pad(a: Tensor) -> Callable[[int], Tensor]:
            padded = torch.cat([margin, a, margin], dim=-1)
            return lambda shift: padded[..., n + 1 + shift : n + 1 + shift + size]

        eta, u, v = pad(x[:, 0]), pad(x[:, 1]), pad(x[:, 2])
        h_u = self.H + 0.5 * (eta(0) + eta(-1))
        h_v = self.H + 0.5 * (eta(0) + eta(-n))
        h_corner = self.H + 0.25 * ((eta(0) + eta(-1)) + (eta(-n) + eta(-n - 1)))
        q = (coriolis + idx * ((v(0) - v(-1)) - (u(0) - u(-n)))) / h_corner.clamp(min=self.floor)
        flow_u, flow_v = h_u * u(0), h_v * v(0)
        flow_u_south = (self.H + 0.5 * (eta(-n) + eta(-n - 1))) * u(-n)
        flow_v_west = (self.H + 0.5 * (eta(-1) + eta(-n - 1))) * v(-1)
        kinetic = 0.25 * ((u(0) ** 2 + u(1) ** 2) + (v(0) ** 2 + v(n) ** 2))
        montgomery = sum(g * eta(0)[:, k : k + 1] for k, g in enumerate(gravity))
        lap_u = west * ((u(1) - u(0)) + (u(-1) - u(0)) + north * (u(n) - u(0)) + south * (u(-n) - u(0)))
        lap_v = south * ((v(n) - v(0)) + (v(-n) - v(0)) + east * (v(1) - v(0)) + west * (v(-1) - v(0)))

        along_x, along_y = pad(flow_u), pad(flow_v)
        turn_u, turn_v = pad(0.25 * q * (flow_v + flow_v_west)), pad(0.25 * q * (flow_u + flow_u_south))
        head, lu, lv = pad(kinetic + montgomery), pad(lap_u), pad(lap_v)

        d_eta = -idx * ((along_x(1) - along_x(0)) + (along_y(n) - along_y(0)))
        if self.relaxation:
            d_eta = d_eta - eta(0) * (1.0 / self.relaxation)
        viscous_u = (lu(1) - lu(0)) + (lu(-1) - lu(0)) + north * (lu(n) - lu(0)) + south * (lu(-n) - lu(0))
        viscous_v = (lv(n) - lv(0)) + (lv(-n) - lv(0)) + east * (lv(1) - lv(0)) + west * (lv(-1) - lv(0))
        push_u, push_v = (top * stress[i] / h.clamp(min=self.floor) for i, h in enumerate((h_u, h_v)))
        a4 = self.A4 * idx**4
        d_u = (turn_u(0) + turn_u(n)) - idx * (head(0) - head(-1)) + push_u - drag * u(0) - a4 * viscous_u
        d_v = -(turn_v(0) + turn_v(1)) - idx * (head(0) - head(-n)) + push_v - drag * v(0) - a4 * viscous_v
        return torch.stack([d_eta, west * d_u, south * d_v], dim=1)

    # Diagnostics

    def budgets(self, state: Tensor) -> dict[str, Tensor]:
        """Per member: mean thickness anomaly of each layer (m), energy and potential enstrophy per area, extremes.

        ``energy`` (m3/s2): mean of sum_k h_k |u_k|^2 / 2 + eta^T G eta / 2; without wind, damping and relaxation it is
        conserved up to the time step. ``thinnest`` (m) and ``fastest`` (m/s) tell whether the member is alive.
        """
        fields = self.fields(state)
        eta, u, v = fields[:, 0::3], fields[:, 1::3], fields[:, 2::3]
        h = self.H + eta
        u2 = torch.cat([u, torch.zeros_like(u[..., :1])], dim=-1).square()
        v2 = torch.cat([v, torch.zeros_like(v[..., :1, :])], dim=-2).square()
        kinetic = h * 0.25 * (u2[..., 1:] + u2[..., :-1] + v2[..., 1:, :] + v2[..., :-1, :])
        matrix = torch.tensor(self.gravity, dtype=state.dtype, device=state.device)
        potential = 0.5 * torch.einsum("bkyx,kl,blyx->byx", eta, matrix, eta)
        out = {f"mass{k + 1}": eta[:, k].mean((1, 2)) for k in range(self.layers)}
        out["energy"] = kinetic.sum(1).mean((1, 2)) + potential.mean((1, 2))
        out["thinnest"] = h.amin((1, 2, 3))
        out["fastest"] = torch.maximum(u.abs().amax((1, 2, 3)), v.abs().amax((1, 2, 3)))
        return out


def _ratio(name: str, value: float, unit: str, of: float) -> int:
    ratio = round(value / of)
    if ratio < 1 or abs(ratio * of - value) > 1e-6 * value:
        raise UserError(f"{name}={value:g} s must be a multiple of {unit}={of:g} s")
    return ratio
