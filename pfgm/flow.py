"""The Poisson flow of PFGM: perturbation, loss, prior and sampling, one augmented dimension."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from .backends.reference import dequantise, wide_dtype
from .functional import field_fn
from .solvers import SCHEDULES, SOLVERS, Callback, StepInfo
from .steps import Field, euler_step

__all__ = ["EmpiricalField", "Network", "PoissonFlow"]

Network = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

# |ε_z| below which restrict_M shortens the range of m, and by how much (PFGM, appendix B.1.1).
_RESTRICT_BELOW, _RESTRICT_TO = 0.005, 0.7
_SMALLEST_Z = 1e-10


class EmpiricalField(nn.Module):
    """The exact field of the references as a network: sampling without any training.

    Forward takes x (B, *S) and z (B,) and returns (field_x, field_z) of :func:`pfgm.field_fn`.
    """

    references: Tensor

    def __init__(self, references: Tensor, gamma: float = 5.0) -> None:
        super().__init__()
        self.register_buffer("references", references, persistent=False)
        self.gamma = gamma

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return field_fn(x, z, self.references, gamma=self.gamma)


class PoissonFlow:
    """PFGM (arXiv 2209.11178): data are charges on z = 0, samples follow field lines back to it.

    A network is any callable ``net(x, z) -> (field_x, field_z)`` with x (B, *S) and z (B,), whose
    results have the shapes of x and z. All randomness comes from torch generators, on the device
    of the tensors.

    Args:
        shape: S, the shape of one sample.
        M: the largest exponent of the perturbation (1 + tau)^m. One of M and data_norm is needed;
            M goes before data_norm.
        data_norm: average norm of a sample, from which M follows (appendix B.1.1).
        sigma: standard deviation of the perturbation at m = 0, in the units of the data.
        tau: growth of the perturbation.
        gamma: softening in the field's normalisation.
        z_max: where sampling starts; from M unless given.
        z_min: where it ends.
        upper_norm: largest norm of a prior sample; from M unless given.
        restrict_M: draw m from [0, 0.7 M] where |ε_z| < 0.005 (published for images).
        z_exp: below this z, field_z is replaced by what field_x implies (appendix B.2.3).
        substitution: "exact" inverts the normalisation; "published" neglects z beside ‖x − mean‖.

    Raises:
        ValueError: an argument is out of range.

    >>> import torch
    >>> flow = PoissonFlow((2,), data_norm=1.0)
    >>> circle = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    >>> samples = flow.sample(flow.empirical(circle), 16, generator=torch.Generator())
    >>> bool((samples.norm(dim=1) - 1).abs().max() < 0.01)
    True
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        M: float | None = None,
        data_norm: float | None = None,
        sigma: float = 0.01,
        tau: float = 0.03,
        gamma: float = 5.0,
        z_max: float | None = None,
        z_min: float = 1e-3,
        upper_norm: float | None = None,
        restrict_M: bool = True,
        z_exp: float = 5.0,
        substitution: Literal["exact", "published"] = "exact",
    ) -> None:
        self.shape = tuple(shape)
        if not all(isinstance(n, int) and n > 0 for n in self.shape):
            raise ValueError(f"shape is {self.shape}; allowed are positive integers.")
        self.N = math.prod(self.shape)
        self.sigma = _positive("sigma", sigma)
        self.tau = _positive("tau", tau)
        self.gamma = _non_negative("gamma", gamma)
        if M is None:
            M = self._exponent(data_norm)
        self.M = _positive("M", M)
        growth = sigma * (1 + tau) ** self.M
        self.z_max = _positive("z_max", math.sqrt(2 / math.pi) * growth if z_max is None else z_max)
        self.z_min = _positive("z_min", z_min)
        if self.z_min >= self.z_max:
            raise ValueError(
                f"z_min is {z_min}; allowed is less than z_max, which is {self.z_max}."
            )
        self.upper_norm = _positive(
            "upper_norm", math.sqrt(self.N) * growth if upper_norm is None else upper_norm
        )
        self.restrict_M = bool(restrict_M)
        self.z_exp = _non_negative("z_exp", z_exp)
        if substitution not in ("exact", "published"):
            raise ValueError(
                f"substitution is {substitution!r}; allowed are 'exact' and 'published'."
            )
        self.substitution = substitution

    def _exponent(self, data_norm: float | None) -> float:
        if data_norm is None:
            raise ValueError("neither M nor data_norm given; one of them is needed.")
        ratio = _positive("data_norm", data_norm) ** 2 / (2 * math.sqrt(self.N) * self.sigma**2)
        exponent = int(0.75 * math.log(ratio) / math.log1p(self.tau)) + 1
        if exponent < 1:
            raise ValueError(
                f"data_norm is {data_norm}, too small for sigma={self.sigma}; scale the data up or "
                "sigma down."
            )
        return exponent

    @classmethod
    def from_data(cls, data: Tensor, **overrides: Any) -> PoissonFlow:
        """The flow for data (n, *S), uint8 (u/127.5 − 1) or floating point; measures their norm.

        >>> import torch
        >>> PoissonFlow.from_data(torch.ones(8, 1, 4, 4), tau=0.05).shape
        (1, 4, 4)
        """
        if data.ndim < 1 or len(data) == 0:
            raise ValueError(f"data has shape {tuple(data.shape)}; allowed is (n, *S) with n ≥ 1.")
        _check_dtype("data", data)
        norms = [
            dequantise(rows, wide_dtype(data.device)).flatten(1).norm(dim=1)
            for rows in data.reshape(len(data), -1).split(1024)
        ]
        data_norm = float(torch.cat(norms).mean())
        if not math.isfinite(data_norm):
            raise ValueError("data holds NaN or infinity; only finite values are allowed.")
        return cls(data.shape[1:], **{"data_norm": data_norm, **overrides})

    @classmethod
    def cifar10(cls, **overrides: Any) -> PoissonFlow:
        """The published values for CIFAR-10 (appendix B): M = 291, z_max = 40, upper_norm = 3000.

        >>> PoissonFlow.cifar10().z_max
        40.0
        """
        published = {"M": 291, "z_max": 40.0, "upper_norm": 3000.0}
        return cls((3, 32, 32), **{**published, **overrides})

    @property
    def config(self) -> dict[str, Any]:
        """Every hyper-parameter, JSON-able: ``PoissonFlow(**flow.config)`` is the same flow."""
        return {
            "shape": list(self.shape),
            "M": self.M,
            "sigma": self.sigma,
            "tau": self.tau,
            "gamma": self.gamma,
            "z_max": self.z_max,
            "z_min": self.z_min,
            "upper_norm": self.upper_norm,
            "restrict_M": self.restrict_M,
            "z_exp": self.z_exp,
            "substitution": self.substitution,
        }

    def __repr__(self) -> str:
        named = (f"{name}={value!r}" for name, value in self.config.items() if name != "shape")
        return f"PoissonFlow({self.shape}, {', '.join(named)})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PoissonFlow) and self.config == other.config

    def __hash__(self) -> int:
        return hash(tuple(map(str, self.config.items())))

    def perturb(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Moves data off the plane z = 0 (Algorithm 2).

            m ~ U[0, M],  ε_z ~ N(0, σ²),  ε_x ~ N(0, σ² I)
            x̃ = x + (1 + τ)^m ε_x,  z = (1 + τ)^m |ε_z|

        which is the paper's ‖ε_x‖ (1 + τ)^m u with u uniform on the sphere, as norm and direction
        of a normal vector are independent.

        Args:
            x: (B, *S) clean data; uint8 means u/127.5 − 1.
            generator: on the device of x.

        Returns:
            x̃ (B, *S) and z (B,), at least 1e-10.

        Raises:
            ValueError: x has another sample shape.

        >>> import torch
        >>> flow = PoissonFlow((2,), data_norm=1.0)
        >>> x_perturbed, z = flow.perturb(torch.zeros(8, 2))
        >>> x_perturbed.shape, z.shape
        (torch.Size([8, 2]), torch.Size([8]))
        """
        x = self._floating(x)
        dtype, device = x.dtype, x.device
        m = self.M * torch.rand(len(x), generator=generator, dtype=dtype, device=device)
        noise_z = torch.randn(len(x), generator=generator, dtype=dtype, device=device)
        noise_z = self.sigma * noise_z.abs()
        noise_x = torch.randn(x.shape, generator=generator, dtype=dtype, device=device)
        noise_x = self.sigma * noise_x
        if self.restrict_M:
            m = torch.where(noise_z < _RESTRICT_BELOW, _RESTRICT_TO * m, m)
        growth = (1 + self.tau) ** m
        x_perturbed = x + growth.view(-1, *[1] * len(self.shape)) * noise_x
        return x_perturbed, (growth * noise_z).clamp(min=_SMALLEST_Z)

    def loss(
        self,
        net: Network,
        x: Tensor,
        references: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Training loss: batch mean of ½ ‖net(x̃, z) − v‖² over the N + 1 components of the field.

        (Algorithm 1; summed over the components as published.)

        Args:
            net: the network being trained.
            x: (B, *S) clean data.
            references: (M, *S) data whose field v is the target; must contain the rows of x. None
                means x itself. The larger, the less the target varies from batch to batch.
            generator: of the perturbation, on the device of x.

        Returns:
            A scalar, float32 at least.

        Raises:
            ValueError: shapes do not fit, or those of the network's results.

        >>> import torch
        >>> flow = PoissonFlow((2,), data_norm=1.0)
        >>> data = torch.randn(64, 2)
        >>> float(flow.loss(flow.empirical(data), data))
        0.0
        """
        x = self._floating(x)
        x_perturbed, z = self.perturb(x, generator)
        with torch.no_grad():
            target_x, target_z = field_fn(
                x_perturbed, z, x if references is None else references, gamma=self.gamma
            )
        field_x, field_z = _evaluate(net, x_perturbed, z)
        error_x = (field_x.to(target_x.dtype) - target_x).flatten(1).square().sum(1)
        error_z = (field_z.to(target_z.dtype) - target_z).square()
        return 0.5 * (error_x + error_z).mean()

    def prior(
        self,
        n: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        clip: bool = True,
    ) -> Tensor:
        """Points (n, *S) at z = z_max, where the field lines of far-away charges are all alike.

            x = z_max g / |g₁|,  g ~ N(0, I_N),  g₁ ~ N(0, 1)

        a multivariate Cauchy distribution, the projection of the uniform hemisphere onto z = z_max
        (section 3.3). ``clip`` brings ‖x‖ into [1, upper_norm], keeping the direction: larger norms
        are never trained on. It binds for about half of all draws; ``clip=False`` is the exact
        prior.

        >>> import torch
        >>> flow = PoissonFlow.cifar10()
        >>> bool(flow.prior(4).flatten(1).norm(dim=1).max() <= 3000.1)
        True
        """
        if not isinstance(n, int) or n < 0:
            raise ValueError(f"n is {n!r}; allowed is an integer of at least 0.")
        device = _common_device(device, generator)
        direction = torch.randn(n, self.N, generator=generator, device=device)
        scale = torch.randn(n, 1, generator=generator, device=device).abs()
        norm = direction.norm(dim=1, keepdim=True)
        radius = self.z_max * norm / scale.clamp(min=torch.finfo(scale.dtype).tiny ** 0.5)
        if clip:
            radius = radius.clamp(1.0, self.upper_norm)
        x: Tensor = radius * (direction / norm)
        return x.view(n, *self.shape)

    def denoise(self, net: Network, x: Tensor, z: float) -> Tensor:
        """The posterior mean (B, *S) that the network's field implies at points x of level z.

        From dx/dz = v_x/v_z = (x − mean)/z: mean = x − z v_x/v_z. For z < z_exp, where v_z is small
        and the network's error large beside it, v_z is what v_x implies: with n = ‖v_x‖/√N,

            e_x = n (γ + √(n²γ² + (1 − n²) z²)) / (1 − n²),  v_z = −√N z / (√(e_x² + z²) + γ)

        the exact inverse of the normalisation; ``substitution="published"`` has
        e_x = γ n / (1 − n) (appendix B.2.3).
        """
        field = self._field(net, x, z)
        return euler_step(
            x,
            field.x,
            field.z,
            z,
            0.0,
            gamma=self.gamma,
            z_exp=self.z_exp,
            substitution=self.substitution,
        )

    def _field(self, net: Network, x: Tensor, z: float) -> Field:
        field_x, field_z = _evaluate(net, x, x.new_full((len(x),), z))
        return Field(field_x, field_z, self.gamma, self.z_exp, self.substitution)

    @overload
    def sample(
        self,
        net: Network,
        n: int,
        *,
        solver: str = ...,
        steps: int = ...,
        schedule: str = ...,
        generator: torch.Generator | None = ...,
        device: torch.device | str | None = ...,
        x_init: Tensor | None = ...,
        callback: Callback | None = ...,
        progress: bool = ...,
        return_nfe: Literal[False] = ...,
    ) -> Tensor: ...

    @overload
    def sample(
        self,
        net: Network,
        n: int,
        *,
        solver: str = ...,
        steps: int = ...,
        schedule: str = ...,
        generator: torch.Generator | None = ...,
        device: torch.device | str | None = ...,
        x_init: Tensor | None = ...,
        callback: Callback | None = ...,
        progress: bool = ...,
        return_nfe: Literal[True],
    ) -> tuple[Tensor, int]: ...

    def sample(
        self,
        net: Network,
        n: int,
        *,
        solver: str = "multistep",
        steps: int = 10,
        schedule: str = "rho",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        x_init: Tensor | None = None,
        callback: Callback | None = None,
        progress: bool = False,
        return_nfe: bool = False,
    ) -> Tensor | tuple[Tensor, int]:
        """Samples (n, *S): the prior carried along the field lines from z_max to z_min.

        Args:
            net: the network; a module is in evaluation mode while it samples.
            n: how many.
            solver: "euler", "heun", "multistep" or "rk45" (:mod:`pfgm.solvers`).
            steps: solver steps; rk45 chooses its own.
            schedule: spacing of the steps, "log" (published) or "rho".
            generator: of the prior.
            device: None takes that of x_init, else of the generator, else of the network's
                parameters, else the CPU.
            x_init: (n, *S), points at z_max in place of the prior.
            callback: gets a dict (step, z, x, mean, nfe) before each step; returning True stops the
                run, which then returns that x.
            progress: show a progress bar.
            return_nfe: return the number of evaluations of the network too.

        Raises:
            ValueError: an argument is out of range, or the network's results have wrong shapes.

        >>> import torch
        >>> flow = PoissonFlow((2,), data_norm=1.0)
        >>> net = flow.empirical(torch.eye(2))
        >>> x, nfe = flow.sample(net, 3, solver="heun", steps=8, return_nfe=True)
        >>> x.shape, nfe
        (torch.Size([3, 2]), 15)
        """
        if solver not in SOLVERS:
            raise ValueError(f"solver is {solver!r}; allowed are {', '.join(SOLVERS)}.")
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule is {schedule!r}; allowed are {', '.join(SCHEDULES)}.")
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps is {steps!r}; allowed is an integer of at least 1.")
        x, nfe = self._initial(net, n, generator, device, x_init), 0
        if n > 0:
            grid = SCHEDULES[schedule](self.z_max, self.z_min, steps)
            total = None if solver == "rk45" else steps
            with _evaluating(net), _shown(callback, total, progress) as shown:
                x, nfe = SOLVERS[solver](lambda x, z: self._field(net, x, z), x, grid, shown)
        return (x, nfe) if return_nfe else x

    def _initial(
        self,
        net: Network,
        n: int,
        generator: torch.Generator | None,
        device: torch.device | str | None,
        x_init: Tensor | None,
    ) -> Tensor:
        if x_init is None:
            if device is None and generator is None:
                device = _network_device(net)
            return self.prior(n, generator=generator, device=device)
        if x_init.shape != (n, *self.shape) or not x_init.is_floating_point():
            raise ValueError(
                f"x_init has shape {tuple(x_init.shape)} and dtype {x_init.dtype}; allowed is "
                f"floating point of shape {(n, *self.shape)}."
            )
        return x_init.detach().to(device=device)

    def empirical(self, references: Tensor) -> EmpiricalField:
        """The exact field of references (M, *S) as a network: samples are the references.

        >>> import torch
        >>> flow = PoissonFlow((2,), data_norm=1.0)
        >>> flow.sample(flow.empirical(torch.ones(1, 2)), 1, steps=20).round(decimals=2)
        tensor([[1., 1.]])
        """
        if references.shape[1:] != self.shape or len(references) == 0:
            raise ValueError(
                f"references has shape {tuple(references.shape)}; allowed is (M, *S) with M ≥ 1 "
                f"and S = {self.shape}."
            )
        return EmpiricalField(references, self.gamma)

    def _floating(self, x: Tensor) -> Tensor:
        if x.ndim == 0 or x.shape[1:] != self.shape:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; allowed is (B, *S) with S = {self.shape}."
            )
        _check_dtype("x", x)
        return dequantise(x, torch.float32) if x.dtype == torch.uint8 else x


def _check_dtype(name: str, values: Tensor) -> None:
    if values.dtype != torch.uint8 and not values.is_floating_point():
        raise TypeError(f"{name} has dtype {values.dtype}; allowed are uint8 and floating point.")


def _positive(name: str, value: float) -> float:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} is {value}; allowed is any finite number above 0.")
    return value


def _non_negative(name: str, value: float) -> float:
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name} is {value}; allowed is any finite number of at least 0.")
    return value


def _evaluate(net: Network, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    field_x, field_z = net(x, z)
    if field_x.shape != x.shape or field_z.shape != z.shape:
        raise ValueError(
            f"net returned shapes {tuple(field_x.shape)} and {tuple(field_z.shape)}; needed are "
            f"those of x and z, {tuple(x.shape)} and {tuple(z.shape)}."
        )
    return field_x, field_z


def _common_device(
    device: torch.device | str | None, generator: torch.Generator | None
) -> torch.device:
    if generator is None:
        return torch.device("cpu" if device is None else device)
    if device is not None and torch.device(device).type != generator.device.type:
        raise ValueError(
            f"generator is on {generator.device} and device is {device}; both must be the same."
        )
    return generator.device if device is None else torch.device(device)


def _network_device(net: Network) -> torch.device:
    if isinstance(net, nn.Module):
        for tensor in (*net.parameters(), *net.buffers()):
            return tensor.device
    return torch.device("cpu")


@contextmanager
def _evaluating(net: Network) -> Iterator[None]:
    """No gradients, and the network in evaluation mode, each part restored as it was."""
    training = [m for m in net.modules() if m.training] if isinstance(net, nn.Module) else []
    try:
        if isinstance(net, nn.Module):
            net.eval()
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _shown(
    callback: Callback | None, total: int | None, progress: bool
) -> Iterator[Callback | None]:
    """The callback, with a progress bar around it where one is wanted."""
    if not progress:
        yield callback
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc="sampling", unit="step") as bar:

        def show(info: StepInfo) -> object:
            bar.set_postfix(z=f"{info['z']:.3g}", refresh=False)
            bar.update()
            return None if callback is None else callback(info)

        yield show
