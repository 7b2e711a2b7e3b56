"""Options of training; without torch, so that the command line's help need not wait for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stabie_ase.system.options import BadOption, HasTimestep, check_options, check_unused, in_a_row, option, rows, section
from stabie_ase.training.recipes import RECIPES
from stabie_ase.training.schedule import OBSERVABLES, STABILITY
from stabie_ase.training.update_options import LabelOptions, UpdateOptions

if TYPE_CHECKING:
    from stabie_ase.dynamics import Integrator


@dataclass(frozen=True)
class DynamicsOptions(HasTimestep):
    """How replicas move, and how often they are looked at."""

    temperature_K: float | None = option(None, "temperature; the reference's if not given", 1e-3, 1e5)
    pressure_GPa: float | None = option(
        None, "pressure, at which cells then fluctuate; without it their volume is constant", -1e3, 1e5
    )
    timestep_fs: float = option(0.5, "time step of the dynamics", 1e-3, 20.0)
    thermostat: str = option(
        "langevin", "langevin, whose noise is replayed after a rewind, or nose-hoover", choices=("langevin", "nose-hoover")
    )
    friction_per_fs: float = option(0.01, "friction of the Langevin thermostat", 0.0, 10.0)
    relaxation_time_fs: float = option(20.0, "relaxation time of the Nosé-Hoover chain", 0.1, 1e5)
    replicas: int = option(32, "replicas run in parallel", 2, 1_000_000)
    sample_every_fs: float = option(5.0, "time between two frames for the estimator", 1e-3, 1e7)
    check_every_fs: float = option(5.0, "time between two looks at the criteria", 1e-3, 1e6)

    def __post_init__(self):
        check_options(self)
        if self.pressure_GPa is not None and self.thermostat != "langevin":
            raise BadOption(f"a pressure is for the langevin thermostat, and thermostat is {self.thermostat!r}; leave one of the two out")
        if self.thermostat == "langevin":  # a friction is of use with both: models are compared in Langevin dynamics
            check_unused(self, ["relaxation_time_fs"], "the langevin thermostat")

    @property
    def integrator(self) -> Integrator:
        """The dynamics these options ask for."""
        # Late, so that the schema and with it the command line's help do not wait for torch.
        from stabie_ase.dynamics import integrator_for

        ensemble = "nvt-nose-hoover" if self.thermostat == "nose-hoover" else "nvt" if self.pressure_GPa is None else "npt"
        return integrator_for(ensemble, self.timestep_fs, self.friction_per_fs, self.relaxation_time_fs)


@dataclass(frozen=True)
class PhaseOptions:
    """When failures are looked for, and when they are learned from."""

    window_fs: float = option(250.0, "length of a window of dynamics", 1e-3, 1e7)
    upper_fraction: float = option(0.5, "unstable fraction that ends a simulation phase", 0.0, 1.0)
    lower_fraction: float | None = option(
        None,
        "unstable fraction that ends a learning phase; less in proportion where fewer than upper_fraction had failed; if not given 0.1, or "
        "0.25 with an update that takes as long as regression",
        0.0,
        1.0,
    )
    failure_windows: float = option(
        3.0,
        "unstable fraction times windows that ends a simulation phase as well, so that fewer failures are waited for where they are rare; "
        "1e9: upper_fraction alone",
        0.0,
        1e9,
    )
    max_simulation_windows: int = option(40, "windows after which a simulation phase ends anyway", 1, 1_000_000)
    max_learning_windows: int = option(6, "windows after which a learning phase ends anyway", 1, 1_000_000)
    random_resets: float = option(
        1.0, "fraction of the replicas put back to a reference frame as a simulation phase begins", 0.0, 1.0
    )
    bank: float = option(
        0.0,
        "states before failures that are kept for later learning phases, as a fraction of the replicas, for where few replicas fail",
        0.0,
        100.0,
    )
    escape_factor: float = option(
        8.0, "in learning, replicas beyond this many times a criterion's tolerance are stopped", 1.0, 1e6
    )

    def __post_init__(self):
        check_options(self)
        if self.lower_fraction is not None and self.lower_fraction >= self.upper_fraction:
            raise BadOption(
                f"lower_fraction is {self.lower_fraction:g} and upper_fraction {self.upper_fraction:g}, expected lower < upper"
            )

    def lower(self, usual: float) -> float:
        """The unstable fraction that ends a learning phase.

        Parameters
        ----------
        usual : float
            Where none is given (`UpdateRule.lower_fraction`); half of the upper one, if that is not above it.

        Returns
        -------
        float
        """
        if self.lower_fraction is not None:
            return self.lower_fraction
        return usual if usual < self.upper_fraction else 0.5 * self.upper_fraction


AVERAGE_PART = 0.4
"""Of a window, for which a whole system's observable is averaged along its trajectory.

A molecule of a liquid is one of many samples and needs none: of SchNet's water gradients from one half of the replicas and from the other
have a cosine of 0.9 without it and of 0.8 with it.
"""


@dataclass(frozen=True)
class EstimatorOptions:
    """What is made of the samples of a window."""

    groups: str | None = option(
        None,
        "what one sample is: global (a frame), molecules, conditional (molecules, whose conformations are told by the energy of the system "
        "beside that with the molecule in a sound one), nearest:K (each molecule with its K nearest ones), radius:R (each with those "
        "within R Å); atoms where there are no molecules; if not given, of a liquid or solid of one kind of molecules conditional, of one "
        "element nearest:12, else global",
        name="estimator",
    )
    average_fs: float | None = option(
        None,
        "time over which the observable of a sample is averaged along its own trajectory for the estimator; 0: none; if not given 0.4 of a "
        "window of whole systems and none of groups of their atoms",
        0.0,
        1e7,
    )
    near_factor: float = option(
        4.0, "the energies of frames beyond this many times a criterion's tolerance are not changed for the observable", 1.0, 1e6
    )
    fluctuation_floor: float | None = option(
        None,
        "a bin counts by the inverse of its variance in stable frames plus this fraction of the mean variance; 1e6: all bins alike; if not "
        "given 1e-4 of whole systems and 3e-3 of groups of their atoms",
        1e-9,
        1e9,
    )
    cross_fit: bool = option(False, "unbiased estimator from two halves of the replicas, at the price of variance")
    within_trajectories: bool | None = option(
        None,
        "samples are compared with others of their own trajectory, which is too short to forget its start, not with all; if not given of "
        "groups of atoms that are not winsorized, where stability is the goal, not of whole systems",
    )
    winsorized: bool | None = option(
        None,
        "each replica's failure counts alike, and no sample is farther off than the median unstable frame, so that what explodes does not "
        "hide what breaks; if not given for stability, unless --cross-fit is",
    )
    min_ess_fraction: float = option(0.5, "effective fraction of the samples below which a new window is run", 0.0, 1.0)

    def __post_init__(self):
        check_options(self)
        if self.winsorized and self.cross_fit:
            raise BadOption("samples are cross-fitted, so that a gradient has no bias, or winsorized, which is one; choose one of them")


@dataclass(frozen=True)
class CheckOptions:
    """The final comparison with the starting model."""

    criterion: str | None = option(
        None,
        "criteria of the final comparison with their tolerances (Å), 0.5 if not given; those that are not named count too",
        repeats=True,
    )
    replicas: int | None = option(
        None,
        "fresh replicas of each model in one round of the final comparison; 64 if not given, or down to 8 where a round took longer "
        "than its budget",
        2,
        1_000_000,
    )
    time_ps: float | None = option(
        None,
        "time of each replica in the final comparison; 4 ps if not given, or less where a round took longer still",
        1e-6,
        1e9,
    )
    rounds: int = option(20, "rounds of the final comparison at most; it ends as soon as the answer is known", 1, 1_000_000)
    max_time_min: float | None = option(None, "wall time of the final comparison; that of the loop if not given", 0.0, 1e6)

    def __post_init__(self):
        check_options(self, "check_")


@dataclass(frozen=True)
class ConditionOptions:
    """One state point of several; what it leaves open is as for the whole run."""

    temperature_K: float | None = option(None, "temperature; that of its frames if not given", 1e-3, 1e5)
    pressure_GPa: float | None = option(None, "pressure", -1e3, 1e5)
    reference: str | None = option(None, "frames to start from and to match, which need no energies; the run's reference if not given")
    observable: str | None = option(None, "observables that are matched", repeats=True)
    criterion: str | None = option(None, "criteria of training", repeats=True)
    replicas: int | None = option(None, "replicas run in parallel", 2, 1_000_000)
    judge: bool = option(True, "models are compared here as well; otherwise they are trained here only")

    def __post_init__(self):
        check_options(self)


@dataclass(frozen=True)
class FinetuneOptions:
    """Every option of the StABIE loop, in sections; each field's metadata tell what it is. Units are in the names.

    The defaults are those of the recipe `natural`; `from_dict` puts those of another where nothing is given.
    """

    recipe: str = option(
        "natural",
        "defaults of all other options, of which those that are given win: natural, this package's own, or paper, the published recipe, "
        "which is paper-liquid where the reference is periodic",
        presets=RECIPES,
    )
    goal: str = option(
        STABILITY,
        "what for: stability learns from replicas that fail; observables from all of them in every window, for a model that is stable and "
        "not like its targets, such as an experiment, and is judged by these",
        choices=(STABILITY, OBSERVABLES),
    )
    observable: str | None = option(
        None,
        "observables that are matched, several separated by commas: hr, bond-length, bond-length:O-H, bond-length-moments:O-H, "
        "angle:H-O-H, dihedral:C-C-C-C, gyration, rdf:O-O, adf:O-O-O, coordination:O-O, min-distance, density, or FILE.py:CLASS; options "
        "follow, as in rdf:O-O,r_max=6,weight=2 or rdf:O-O,target=FILE for frames or a curve (csv, json, txt; column=NAME, error=NAME, "
        "above=R) to match in place of the reference; if not given hr of molecules and hr:A-B of each two elements in them, and of a "
        "liquid or solid rdf of each two elements",
        repeats=True,
    )
    criterion: str | None = option(
        None,
        "criteria that call a replica unstable in training, each with its tolerance (Å) if it takes one; any of them is enough; if not "
        "given, of a molecule bonds:0.25,contacts:0.25,energy,temperature, of a molecular liquid angles:20,intermolecular as well, and of "
        "others intermolecular or lindemann in place of bonds and contacts",
        repeats=True,
    )
    reweight: bool = option(
        True,
        "reweight reference frames of another temperature to that of the dynamics by their energies, for what observables are matched "
        "to; data of another temperature that cannot be are refused, and are taken as they are without it",
    )
    max_time_min: float = option(15.0, "wall time of the loop", 0.0, 1e6)
    max_cycles: int | None = option(None, "cycles of simulation and learning at most", 1, 1_000_000_000)
    max_updates: int | None = option(None, "updates at most", 1, 1_000_000_000)
    seed: int = option(0, "seed of everything random", 0, 2**31 - 1)
    conditions: tuple[ConditionOptions, ...] = rows(ConditionOptions)
    dynamics: DynamicsOptions = section(DynamicsOptions)
    phases: PhaseOptions = section(PhaseOptions)
    estimator: EstimatorOptions = section(EstimatorOptions)
    update: UpdateOptions = section(UpdateOptions)
    labels: LabelOptions = section(LabelOptions)
    check: CheckOptions = section(CheckOptions, prefix="check")

    def __post_init__(self):
        check_options(self)
        for name in ("sample_every_fs", "check_every_fs"):
            value, dt = getattr(self.dynamics, name), self.dynamics.timestep_fs
            if not dt <= value <= self.phases.window_fs:
                raise BadOption(
                    f"{name} is {value:g}, expected a time from one step ({dt:g} fs) to one window ({self.phases.window_fs:g} fs)"
                )

    def of_the_recipe(self) -> str:
        """What the recipe has changed, and what was given in place of its values, in words; nothing for one that changes nothing."""
        preset, values, usual = RECIPES[self.recipe], in_a_row(self), in_a_row(type(self)())
        taken = ", ".join(f"{name} {x}" for name, x in preset.items() if values[name] == x != usual[name])
        other = ", ".join(f"{name} {values[name]}" for name, x in preset.items() if values[name] != x)
        return f"{taken or 'nothing'}; given otherwise: {other}" if other else taken

    def half_width(self, whole: bool) -> int:
        """Frames to either side over which an observable is averaged, of whole systems or of groups of their atoms."""
        given = self.estimator.average_fs
        time = (AVERAGE_PART * self.phases.window_fs if whole else 0.0) if given is None else given
        return round(0.5 * time / self.dynamics.sample_every_fs)

    def within(self, whole: bool) -> bool:
        """Whether samples are compared within their trajectories, of whole systems or of groups of their atoms.

        Not where observables are the goal and replicas go on from window to window: they have long forgotten their starts.
        """
        given = self.estimator.within_trajectories
        return not (whole or self.winsorized or self.goal == OBSERVABLES) if given is None else given

    def fluctuation_floor(self, whole: bool) -> float:
        """The least variance of a bin beside the mean one; of a molecule what is rare and what never is are not so far apart.

        Parameters
        ----------
        whole : bool
            Of whole systems, not of groups of their atoms.

        Returns
        -------
        float
        """
        given = self.estimator.fluctuation_floor
        return (1e-4 if whole else 3e-3) if given is None else given

    @property
    def winsorized(self) -> bool:
        """Whether samples are winsorized: not where observables are the goal, which sound samples tell by their fluctuations."""
        given = self.estimator.winsorized
        return self.goal == STABILITY and not self.estimator.cross_fit if given is None else given
