"""Options of dynamics and of evaluation; without torch, so that the command line's help need not wait for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stabie_ase.system.options import BadOption, HasTimestep, check_options, check_unused, option

if TYPE_CHECKING:
    from stabie_ase.dynamics import Integrator


@dataclass(frozen=True)
class EvaluationOptions:
    """How `stabie-ase evaluate` measures stability."""

    time_ps: float = option(5.0, "time of each replica", 1e-6, 1e9)
    replicas: int = option(64, "replicas run in parallel", 1, 1_000_000)
    temperature_K: float | None = option(None, "temperature; the reference's if not given", 1e-3, 1e5)
    timestep_fs: float = option(0.5, "time step of the Langevin dynamics", 1e-3, 20.0)
    friction_per_fs: float = option(0.01, "friction of the Langevin dynamics", 0.0, 10.0)
    check_every_fs: float = option(5.0, "time between two looks at the criteria", 1e-3, 1e6)
    criterion: str | None = option(
        None, "criteria that call a replica unstable with their tolerances (Å), 0.5 if not given; those that are not named count too",
        repeats=True,
    )
    observable: str | None = option(
        None, "observables that are compared with the reference's, several separated by commas; if not given as by finetune", repeats=True
    )
    reweight: bool = option(
        True, "reweight reference frames of another temperature to that of the dynamics by their energies, where enough of them count"
    )
    timestep_scan: str | None = option(
        None, "larger time steps in fs, as 1,1.5,2, at which the same is run again, to find the largest that is as stable"
    )
    seed: int = option(0, "seed of starting frames, momenta and noise", 0, 2**31 - 1)

    def __post_init__(self):
        check_options(self)
        self.scanned_fs  # noqa: B018 - refused here if they are none

    @property
    def scanned_fs(self) -> tuple[float, ...]:
        """The time steps of the scan, in fs; BadOption unless each is larger than the one before and than the time step."""
        try:
            found = tuple(float(text) for text in (self.timestep_scan or "").split(",") if text.strip())
        except ValueError as error:
            raise BadOption(f"timestep_scan is {self.timestep_scan!r}, expected time steps in fs, as 1,1.5,2") from error
        steps = (self.timestep_fs, *found)
        if any(not a < b <= 100.0 for a, b in zip(steps, steps[1:])) or (self.timestep_scan is not None and not found):
            raise BadOption(
                f"timestep_scan is {self.timestep_scan!r}, expected time steps that grow, from above timestep_fs, {self.timestep_fs:g}, "
                "to 100 fs at most"
            )
        return found


@dataclass(frozen=True)
class ObserveOptions:
    """What `stabie-ase observe` computes, and what it is told of the frames."""

    observable: str | None = option(
        None,
        "observables such as hr, rdf:O-O, bond-length, and of frames at equal intervals vacf, msd, diffusion, diffusion-gk, vdos; what "
        "suits the system if not given",
        repeats=True,
    )
    interval_fs: float | None = option(None, "time between two frames; as the frames tell it if not given", 1e-6, 1e12)
    temperature_K: float | None = option(None, "temperature; that of the frames if not given", 1e-3, 1e5)
    criterion: str | None = option(
        None, "criteria that end a replica with their tolerances (Å), 0.5 if not given; those that are not named count too", repeats=True
    )

    def __post_init__(self):
        check_options(self)


ENSEMBLES = ("nve", "nvt", "nvt-nose-hoover", "nvt-rescaling", "npt", "npt-flexible")
MOVING_COM = ("nvt", "npt", "npt-flexible")
"""Those whose heat bath pushes the centre of mass, unless told not to."""

AT_PRESSURE = ("npt", "npt-flexible")
USERS = {
    "friction_per_fs": MOVING_COM,
    "relaxation_time_fs": ("nvt-nose-hoover", "nvt-rescaling"),
    "pressure_GPa": AT_PRESSURE,
    "pressure_relaxation_time_fs": AT_PRESSURE,
    "compressibility_per_GPa": AT_PRESSURE,
}
"""The ensembles that use an option; elsewhere it would be ignored."""


@dataclass(frozen=True)
class MDOptions(HasTimestep):
    """Molecular dynamics as `stabie-ase md` runs it."""

    ensemble: str = option(
        "nvt",
        "ensemble: nvt is Langevin, npt is Langevin with stochastic cell rescaling, for which the model must give the stress; "
        "the centre of mass rests in all of them, see --no-fix-com",
        choices=ENSEMBLES,
    )
    time_ps: float = option(10.0, "time of each replica, what has been run included", 1e-6, 1e9)
    replicas: int = option(64, "replicas run in parallel", 1, 1_000_000)
    temperature_K: float | None = option(None, "temperature; that of the starting frames if not given", 1e-3, 1e5)
    fix_com: bool = option(
        True,
        "hold the centre of mass at rest where no atom is held, with 3N - 3 degrees of freedom, and take its momentum out of "
        "momenta in the starting file; nvt and npt can let it move (3N), the others conserve its momentum, which nve takes as "
        "it is in the file",
    )
    new_momenta: bool = option(
        False, "draw new momenta for all replicas; without it those in the starting file are used, once each, if there are any"
    )
    end_temperature_K: float | None = option(None, "temperature at the end, reached linearly", 1e-3, 1e5)
    pressure_GPa: float = option(0.0, "pressure", -1e3, 1e5)
    timestep_fs: float = option(0.5, "time step", 1e-3, 20.0)
    friction_per_fs: float = option(0.01, "friction of the Langevin thermostat", 0.0, 10.0)
    relaxation_time_fs: float = option(50.0, "characteristic time of the other thermostats", 0.1, 1e6)
    pressure_relaxation_time_fs: float = option(1000.0, "relaxation time of the volume", 1.0, 1e9)
    compressibility_per_GPa: float = option(0.46, "estimate of the compressibility, which sets the speed of the cell only", 1e-6, 1e6)
    sample_every_fs: float = option(50.0, "time between two frames", 1e-3, 1e9)
    check_every_fs: float = option(5.0, "time between two looks at the criteria", 1e-3, 1e6)
    criterion: str | None = option(
        None, "criteria that stop a replica, such as bonds:0.5 or bonds:0.5,contacts:0.5,energy", repeats=True
    )
    seed: int = option(0, "seed of starting frames, momenta and noise", 0, 2**31 - 1)

    def __post_init__(self):
        check_options(self)
        if not self.timestep_fs <= self.sample_every_fs:
            raise BadOption(
                f"sample_every_fs is {self.sample_every_fs:g}, expected a time of at least one step ({self.timestep_fs:g} fs)"
            )
        check_unused(self, [name for name, users in USERS.items() if self.ensemble not in users], f"{self.ensemble} dynamics")
        if self.end_temperature_K is not None and self.ensemble == "nve":
            raise BadOption("end_temperature_K is given, but nve dynamics have no thermostat to follow it")
        if not self.fix_com and self.ensemble not in MOVING_COM:
            raise BadOption(
                f"fix_com is false, but {self.ensemble} dynamics do not move the centre of mass; {', '.join(MOVING_COM)} do"
            )

    @property
    def integrator(self) -> Integrator:
        """The dynamics these options ask for; needs a temperature for a ramp."""
        from stabie_ase.dynamics import TemperatureRamp, integrator_for

        names = ("friction_per_fs", "relaxation_time_fs", "fix_com", "pressure_relaxation_time_fs", "compressibility_per_GPa")
        integrator = integrator_for(self.ensemble, self.timestep_fs, **{name: getattr(self, name) for name in names})
        if self.end_temperature_K is None:
            return integrator
        n_steps = self.steps(1000.0 * self.time_ps)
        return TemperatureRamp(integrator, self.temperature_K, self.end_temperature_K, n_steps)
