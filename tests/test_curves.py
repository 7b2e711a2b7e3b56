"""Observables matched to experimental curves: reading them, means over bins against quadrature, weights and floors."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms
from helpers import samples_of
from scipy.integrate import quad

from stabie_ase.boltzmann import Estimator, StatePoint
from stabie_ase.observables import Axis, DistanceDistribution, Observable, RadialDistribution, Target
from stabie_ase.observables.averages import precision_weights
from stabie_ase.structures.reference import UnusableReference, is_curve, read_curve
from stabie_ase.structures.reference.curves import Curve

PLAIN = "r (Å),g(r),error\n0.5,0.0,0.1\n1.0,1.0,0.2\n2.5,3.0,0.1\n"


def read(tmp_path, text, name="curve.csv", **settings):
    (tmp_path / name).write_text(text)
    return read_curve(tmp_path / name, **settings)


# -- reading


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("curve.csv", PLAIN),
        ("curve.csv", PLAIN.replace(",", ";")),
        ("curve.txt", "0.5 0.0 0.1\n1.0 1.0 0.2\n2.5 3.0 0.1\n"),
        ("curve.dat", "# r/Å  g(r)  g(r)error\n0.5 0.0 0.1\n1.0 1.0 0.2\n\n2.5 3.0 0.1\n"),
        ("curve.txt", "# a measurement of 2013\n# r_A g sigma\n0.5\t0.0\t0.1\n1.0\t1.0\t0.2\n2.5\t3.0\t0.1\n"),
        ("curve.txt", "g (1/Å)  err  r (\u212b)\n0.0 0.1 0.5\n1.0 0.2 1.0\n3.0 0.1 2.5\n"),
        ("curve.json", json.dumps({"r": [0.5, 1.0, 2.5], "value": [0, 1, 3], "error": [0.1, 0.2, 0.1]})),
    ],
)
def test_one_curve_in_many_formats(tmp_path, name, text):
    curve = read(tmp_path, text, name)
    assert is_curve(tmp_path / name)
    np.testing.assert_array_equal(curve.r, [0.5, 1.0, 2.5])
    np.testing.assert_array_equal(curve.value, [0.0, 1.0, 3.0])
    np.testing.assert_array_equal(curve.error, [0.1, 0.2, 0.1])


def test_what_a_header_tells(tmp_path):
    text = "# temperature: 298.15 K\n# pressure = 1 bar\n# source: Somebody 2013\n# seen by neutrons\nr,g\n1,2\n2,3\n"
    curve = read(tmp_path, text)
    assert (curve.temperature_K, curve.error) == (298.15, None)
    assert curve.pressure_GPa == pytest.approx(1e-4) and curve.source == "curve.csv (Somebody 2013)"
    as_json = {"r": [1, 2], "g": [2, 3], "temperature_K": 298.15, "pressure_GPa": 1e-4, "source": "Somebody 2013"}
    told = read(tmp_path, json.dumps(as_json), "curve.json")
    assert (told.temperature_K, told.pressure_GPa, told.source) == (298.15, 1e-4, "curve.json (Somebody 2013)")
    assert read(tmp_path, "# seen by neutrons\n1 2\n2 3\n", "a.txt").source == "a.txt (seen by neutrons)"


def test_columns_by_name(tmp_path):
    text = "#by Soper\n#r_A\t    O_O\t    OOError\tO_H\t    OHError\n0.00\t1.0\t0.1\t2.0\t0.2\n1.00\t3.0\t0.3\t4.0\t0.4\n"
    for column in ("O_O", "OO", "o-o"):
        curve = read(tmp_path, text, "g.txt", column=column)
        assert curve.value.tolist() == [1.0, 3.0] and curve.error.tolist() == [0.1, 0.3]
    assert curve.source == "g.txt, column O_O (by Soper)"
    assert read(tmp_path, text, "g.txt", column="OH", error="OOError").error.tolist() == [0.1, 0.3]


REFUSED = {
    "1 2\n3 4 5\n": "line 2 has 3 columns, those before have 2",
    "1 2 3 4\n2 3 4 5\n": "4 columns and no header; expected r, value and error, or a header",
    "1\n2\n": "1 columns and no header",
    "r g\n1 2 3\n2 3 4\n": "the header names 2 columns (r, g), the rows have 3",
    "r g\n": "holds no rows of numbers",
    "x g\n1 2\n2 3\n": "no columns of distances among x, g; expected one, as r (Å)",
    "r (nm) g\n1 2\n2 3\n": "r is in nm, expected Å; multiply it by 10, and divide a density by as much",
    "r_pm g\n1 2\n2 3\n": "r is in pm, expected Å; multiply it by 0.01",
    "r (1/nm) g\n1 2\n2 3\n": "r is in 1/nm, expected Å; convert it",
    "r g\n1 2\n1 3\n": "r goes from 1 to 1 Å in row 2; sort the rows by r",
    "r g\n2 2\n1 3\n": "r goes from 2 to 1 Å in row 2",
    "r g\n-1 2\n1 3\n": "r begins at -1 Å",
    "r g\n1 2\n": "two points or more",
    "r g\n1 2\n2 nan\n": "values are not finite in row 2",
    "r g\n1 inf\n2 1\n": "values are not finite in row 1",
    "r g\n1 2\nnan 2\n": "r are not finite in row 2",
    "r g\n1 2\n2 two\n": "line 3: 'two' is no number",
    "r g error\n1 2 0.1\n2 3 -0.1\n": "an error of -0.1; expected standard errors",
    "r g h\n1 2 3\n2 3 4\n": "2 columns of values among r, g, h; name one by column=NAME",
    "r g error g_err\n1 2 3 4\n2 3 4 5\n": None,
    "r g sigma err\n1 2 3 4\n2 3 4 5\n": "several columns of errors, sigma, err; name one by error=NAME",
    "# temperature: 25 °C\n1 2\n2 3\n": "tells the temperature '25 °C', expected one in K",
    "# pressure: 1\n1 2\n2 3\n": "tells the pressure '1', expected one in GPa",
}


@pytest.mark.parametrize("text", REFUSED)
def test_files_that_are_no_curve(tmp_path, text):
    if REFUSED[text] is None:  # its own error is the one with its name
        assert read(tmp_path, text, "c.txt").error.tolist() == [4.0, 5.0]
        return
    with pytest.raises(UnusableReference, match=re.escape(REFUSED[text])) as refused:
        read(tmp_path, text, "c.txt")
    assert "c.txt: " in str(refused.value) and "\n" not in str(refused.value)


def test_names_that_are_not_there(tmp_path):
    with pytest.raises(UnusableReference, match="no column 'O_X'; did you mean 'O_O'"):
        read(tmp_path, "r O_O O_H\n1 2 3\n2 3 4\n", "c.txt", column="O_X")
    with pytest.raises(UnusableReference, match="no column 'sigma'"):
        read(tmp_path, PLAIN, error="sigma")
    with pytest.raises(UnusableReference, match="no such file"):
        read_curve(tmp_path / "none.csv")
    with pytest.raises(UnusableReference, match="lists of numbers of one length, got {'r': 2, 'g': 1}"):
        read(tmp_path, '{"r": [1, 2], "g": [1]}', "c.json")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    with pytest.raises(UnusableReference, match="no text in UTF-8"):
        read_curve(tmp_path / "binary.txt")
    (tmp_path / "atoms.json").write_text('{"1": {"numbers": [1]}}')
    assert not is_curve(tmp_path / "atoms.json") and not is_curve("frames.xyz")


# -- means over bins


def test_means_over_bins_are_those_of_quadrature():
    """Irregular points, bins narrower and wider than their spacing, over widths and over shells."""
    rng = np.random.default_rng(0)
    r = np.sort(rng.uniform(0.0, 5.0, 23))
    curve = Curve(r, rng.normal(size=23), rng.random(23))
    edges = np.arange(0.0, 5.61, 0.2)
    for shells in (False, True):
        values, errors, known = curve.bin_means(edges, shells)
        assert known.sum() < len(known) and not values[~known].any() and not errors[~known].any()
        for k in np.flatnonzero(known):
            for found, y in ((values, curve.value), (errors, curve.error)):
                ends, power = edges[k : k + 2], 2 if shells else 0
                inside = r[(r > ends[0]) & (r < ends[1])]
                total = quad(lambda x, y=y, power=power: np.interp(x, r, y) * x**power, *ends, points=inside)[0]
                assert found[k] == pytest.approx(total * (power + 1) / np.diff(ends**(power + 1))[0], rel=1e-9)


def test_a_straight_line_in_closed_form():
    """g = a + b r: the mean over a width is that of its centre; over a shell a + 3/4 b (r₂⁴ - r₁⁴)/(r₂³ - r₁³)."""
    edges = np.linspace(0.0, 3.0, 7)
    curve = Curve([0.0, 0.7, 3.0], 2.0 - 0.5 * np.array([0.0, 0.7, 3.0]))
    np.testing.assert_allclose(curve.bin_means(edges)[0], 2.0 - 0.5 * 0.5 * (edges[1:] + edges[:-1]))
    np.testing.assert_allclose(curve.bin_means(edges, True)[0], 2.0 - 0.375 * np.diff(edges**4) / np.diff(edges**3))


def test_bins_that_are_not_wholly_covered_are_not_known():
    values, _, known = Curve([0.25, 0.9], [1.0, 1.0]).bin_means(np.linspace(0.0, 1.2, 7))
    assert known.tolist() == [False, False, True, True, False, False] and values.tolist() == [0, 0, 1, 1, 0, 0]
    assert Curve([0.2, 0.8], [1.0, 1.0]).bin_means(np.linspace(0.0, 1.2, 7))[2].tolist() == [False, True, True, True, False, False]
    assert Curve([0.0, 1.0, 2.0], [0.0, 1.0, 2.0]).above(0.5).r.tolist() == [1.0, 2.0]
    with pytest.raises(UnusableReference, match="ends at 2 Å, so that nothing is left above 3 Å"):
        Curve([0.0, 1.0, 2.0], [0.0, 1.0, 2.0]).above(3.0)


# -- targets


RDF = RadialDistribution((18, 18), 2.0, 0.5)


def curve_of(error=(0.0, 0.1, 0.2, 0.2, 0.2), **settings):
    return Curve(np.arange(5) * 0.5, [0.0, 0.0, 1.0, 2.0, 1.0], error, **settings)


def test_a_target_from_a_curve():
    """Values and errors are means over shells, the floor is E|N(0, e)| = √(2/π) e of the measure, weights go with 1/e²."""
    target = Target.from_curve(RDF.weighted(2.0), curve_of(source="neutrons"))
    values, errors, _ = curve_of().bin_means(np.arange(5) * 0.5, shells=True)
    torch.testing.assert_close(target.value, torch.as_tensor(values))
    torch.testing.assert_close(target.error, torch.as_tensor(errors))
    assert target.floor == pytest.approx(np.sqrt(2 / np.pi) * errors.mean()) and target.known.all()
    assert target.weight == 2.0 and target.source == "neutrons" and target.samples is None
    expected = 1.0 / (errors**2 / np.mean(errors**2) + 0.01)
    np.testing.assert_allclose(target.metric, expected / expected.sum())
    assert float(target.metric.sum()) == pytest.approx(float(RDF.measure.sum()))
    assert target.floor_of(3) == target.floor


def test_the_floor_is_the_distance_of_a_true_curve():
    """20000 draws of N(0, e): Σ c |x| within 4 standard errors."""
    target = Target.from_curve(RDF, curve_of())
    draws = target.error * torch.randn(20000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    distances = (target.measure * draws.abs()).sum(dim=1)
    assert float(distances.mean()) == pytest.approx(target.floor, abs=4 * float(distances.std()) / 20000**0.5)


def test_without_errors_bins_count_as_they_do_of_frames():
    target = Target.from_curve(RDF, curve_of(None))
    assert target.error is None and target.floor is None and target.components is None
    torch.testing.assert_close(target.metric, RDF.measure)
    exact = Target.from_curve(RDF, curve_of(np.zeros(5)))
    assert exact.floor == 0.0
    torch.testing.assert_close(exact.metric, RDF.measure)


@pytest.mark.parametrize("error", [None, (0.0, 0.1, 0.2, 0.2, 0.2)])
def test_bins_beyond_the_curve_count_nowhere(error):
    """Neither in the loss, nor in its gradient, nor in the distance that a report tells."""
    rdf = replace(RDF, r_max=3.0)
    target = Target.from_curve(rdf, curve_of(error))
    assert target.known.tolist() == [True] * 4 + [False] * 2
    assert not target.metric[4:].any() and not target.measure[4:].any() and (target.metric[:4] > 0).all()
    values = torch.randn(50, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    estimator, found = Estimator(StatePoint(300.0)), []
    for factor in (1.0, -7.0):
        values[:, 4:] *= factor
        found.append(estimator(samples_of({rdf.name: values}), [target]))
    assert found[0].losses == found[1].losses
    torch.testing.assert_close(found[0].weights, found[1].weights)


class Lengths(Observable):
    name, label, axis = "lengths", "length (Å)", Axis.of_names("", ["a", "b"])

    def values(self, batch):
        return torch.zeros(batch.n_systems, 2)


@pytest.mark.parametrize(
    ("observable", "curve", "words"),
    [
        (Lengths(), curve_of(source="c.csv"), "lengths has no axis of distances, so that it cannot be matched to a curve (c.csv)"),
        (RDF, Curve([5.0, 9.0], [1.0, 1.0]), "r from 5 to 9 Å covers no bin of rdf:Ar-Ar, which goes from 0 to 2 Å in steps of 0.5 Å"),
        (RDF, curve_of(unit="1/Å"), "values in 1/Å, expected g(r), Ar-Ar; convert them"),
        (DistanceDistribution(5.0), curve_of(unit="1/nm"), "values in 1/nm, expected h(r) (1/Å)"),
        (DistanceDistribution(5.0), curve_of(unit=""), "values in no unit, expected h(r) (1/Å)"),
    ],
)
def test_curves_that_do_not_fit_an_observable(observable, curve, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Target.from_curve(observable, curve)


@pytest.mark.parametrize("unit", ["1/Å", "Å^-1", "Å⁻¹", "1/A", "1/angstrom", None])
def test_spellings_of_a_unit(unit):
    assert Target.from_curve(DistanceDistribution(2.0, 0.5), curve_of(unit=unit)).known.all()


def test_precision_weights():
    """c ∝ w / (v/v̄ + f) with the sum of w; what has no weight has none after, whatever its variance."""
    variance, weights = torch.tensor([1.0, 3.0, 0.0, 1e9]), torch.tensor([0.2, 0.2, 0.1, 0.0])
    expected = np.array([0.2 / (0.75 + 0.1), 0.2 / (2.25 + 0.1), 0.1 / 0.1, 0.0])
    np.testing.assert_allclose(precision_weights(variance, weights, 0.1), 0.5 * expected / expected.sum(), rtol=1e-6)
    torch.testing.assert_close(precision_weights(torch.zeros(4), weights, 0.1), weights.double())


def test_a_curve_of_the_mean_of_frames_is_their_target():
    """Frames as a curve through the centres of fine bins: the target of wider ones is that of the frames within the fine width."""
    rng = np.random.default_rng(2)
    frames = [Atoms("Ar40", rng.uniform(0, 9, (40, 3)), cell=[9] * 3, pbc=True) for _ in range(30)]
    fine, wide = RadialDistribution((18, 18), 4.0, 0.01), RadialDistribution((18, 18), 3.9, 0.3)
    made = Target.from_frames(fine, frames)
    found = Target.from_curve(wide, Curve(fine.axis.values.numpy(), made.value.numpy()))
    expected = Target.from_frames(wide, frames)
    assert found.known.tolist() == [False] + [True] * 12
    torch.testing.assert_close(found.value[1:], expected.value[1:], rtol=0.02, atol=0.02)
