"""The report: holds what the run directory holds, fetches nothing, and its pictures are pictures."""

import io
import json
import re

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from PIL import Image

from appa_lite.config import compose
from appa_lite.core.errors import UserError
from appa_lite.core.store import write_dataset
from appa_lite.stages import report as report_stage
from appa_lite.stages import verify as verify_stage
from appa_lite.verification.charts import Axis, Line, bar_chart, line_chart
from appa_lite.verification.figures import DIVERGING, SEQUENTIAL, Scale, image
from appa_lite.verification.hero import hero
from appa_lite.verification.page import Section, build_report, viewer
from appa_lite.verification.report import Run, report
from appa_lite.verification.verify import Verification

QUICK = Verification(replicates=30)


@pytest.fixture(scope="module")
def run():
    rng = np.random.default_rng(5)
    time = pd.date_range("2003-05-01", periods=12, freq="2D").to_numpy().astype("datetime64[ns]")
    lead = np.arange(4) * np.timedelta64(2, "D").astype("timedelta64[ns]")
    grid = {"y": ("y", np.arange(16) * 16e3, {"units": "m"}), "x": ("x", np.arange(20) * 16e3, {"units": "m"})}

    def data(dims, *sizes, **coords):
        fields = {v: ((*dims, "y", "x"), rng.standard_normal((*sizes, 16, 20)), {"units": u}) for v, u in (("ssh", "m"), ("u2", "m/s"))}
        return xr.Dataset(fields, coords=grid | coords)

    truth = data(("time",), 12, time=time)
    reanalysis = data(("time", "number"), 9, 5, time=time[:9], number=np.arange(5))
    forecast = data(("time", "prediction_timedelta", "number"), 1, 4, 5, time=time[8:9], prediction_timedelta=lead, number=np.arange(5))
    table = pd.DataFrame({"time": np.repeat(time[:9], 6), "y": np.tile(np.arange(6) * 4e4, 9), "x": 1e5, "variable": "ssh"})
    table = table.assign(observation=rng.standard_normal(54), error_std=0.1, station=np.tile([f"buoy {k}" for k in range(6)], 9))
    found = Run("A </title> test", truth, table, table.iloc[::6], reanalysis, reanalysis, forecast, commands=["appa-lite simulate a<b"])
    for kind, system in (("reanalysis", reanalysis), ("forecast", forecast)):
        scores = QUICK.evaluate({kind: system}, truth)
        found.scores[kind], found.details[kind] = scores.records, json.loads(json.dumps(scores.details))
    return found


def test_the_page_holds_every_section_and_fetches_nothing(run):
    html = report(run)
    scores = ("Scores of the reanalysis", "Scores at withheld observations", "Scores of the forecast")
    for title in ("Reanalysis", "Forecast", "How this was made", *scores):
        assert f"<h2>{title}" in html
    for part in ("Rank histograms", "Spectra", "Error and spread in time", "Error against lead time", "buoy 0: ssh", "<table>"):
        assert part in html
    assert "appa-lite simulate a&lt;b" in html and "A </title> test" not in html
    static = html[: html.rindex("<script>")]
    addresses = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", static)
    assert all(a.startswith(("#", "data:")) for a in addresses)
    assert not re.search(r"https?://(?!www\.w3\.org)|<link|@import|fetch\(", html)
    assert len(html) < 12e6


def test_viewers_hold_a_frame_per_label(run):
    payloads = re.findall(r'<script type="application/json">(.*?)</script>', report(run), re.S)
    assert len(payloads) == 2
    analysis = json.loads(payloads[0])
    assert len(analysis["labels"]) == 9
    titles = [p["title"] for p in analysis["variables"][0]["panels"]]
    assert titles == ["truth", "observations", "mean", "spread", "member 1", "member 2", "member 3", "optimal interpolation, mean"]
    for variable in analysis["variables"]:
        for panel in variable["panels"]:
            assert len(panel.get("frames") or panel["points"]) == 9
    dots = analysis["variables"][0]["panels"][1]["points"][0]
    assert all(0 <= x <= 100 and 0 <= y <= 100 / analysis["aspect"] and colour.startswith("#") for x, y, colour in dots)
    assert analysis["variables"][1]["panels"][1]["points"][0][0][2] is None  # the other variable's positions, hollow


@pytest.mark.parametrize("keep", ["reanalysis", "scores", "forecast"])
def test_a_part_of_a_run_is_enough(run, keep):
    part = Run("part", **{keep: getattr(run, keep)})
    assert "<h2>" in report(part)


def test_a_ring_is_drawn_in_time():
    time = pd.date_range("2000", periods=30, freq="6h").to_numpy().astype("datetime64[ns]")
    fields = np.random.default_rng(0).standard_normal((30, 3, 40))
    ring = xr.Dataset({"x1": (("time", "number", "x"), fields)}, coords={"time": time, "x": np.arange(40.0)})
    table = pd.DataFrame({"time": time[::3], "x": np.linspace(0, 39, 10), "variable": "x1", "observation": 1.0})
    html = report(Run("ring", truth=ring.isel(number=0), reanalysis=ring, observations=table))
    assert "position across" in html and "data:image" in html
    (payload,) = re.findall(r'<script type="application/json">(.*?)</script>', html, re.S)
    panels = json.loads(payload)["variables"][0]["panels"]
    assert [p["title"] for p in panels][:3] == ["truth", "observations", "mean"] and len(panels[1]["points"][0]) == 10
    with pytest.raises(UserError, match="maps"):
        hero(ring, pd.DataFrame())


def test_the_picture_is_a_png(run):
    picture = Image.open(io.BytesIO(hero(run.reanalysis, run.observations, run.truth, run.forecast, ["ssh", "u2"])))
    assert picture.format == "PNG" and picture.width > picture.height > 300
    with pytest.raises(UserError, match="salinity"):
        hero(run.reanalysis, run.observations, variables=["salinity"])


def test_scales_are_diverging_for_signed_fields_only():
    x = np.random.default_rng(0).standard_normal(1000)
    assert Scale.of(x).colormap == DIVERGING and Scale.of(x).low == -Scale.of(x).high
    assert Scale.of(280 + x).colormap == SEQUENTIAL
    assert Scale.of(np.full(3, np.nan)).high == 1.0


def test_images_put_the_first_row_at_the_bottom_and_leave_holes():
    import base64

    field = np.zeros((8, 8))
    field[0] = 1.0
    field[5:, :3] = np.nan
    uri = image(field, Scale(0.0, 1.0, "gray"))
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGBA")).astype(int)
    assert pixels[-3, -3, 0] > 200 > 50 > pixels[5, -3, 0]
    assert pixels[5, 5, 3] == 0 and pixels[-3, -3, 3] == 255


def test_charts_survive_gaps_and_single_values():
    svg = line_chart([Line("a", [0, 1, 2, 3], [1.0, None, 2.0, 3.0], low=[0, 0, 1, 2], high=[2, 2, 3, 4])], "t", "x", "y")
    assert svg.count("<polyline") == 2 and "<polygon" in svg and "nan" not in svg
    assert "nan" not in line_chart([Line("a", [1.0], [1.0])], "t", "x", "y", "log", "log")
    assert bar_chart([1.0, 0.5], "t", "x", "y").count("<rect") == 2
    assert [name for _, name in Axis(np.array([1e-6, 1.0]), "log", 0, 100).ticks()][0] == "10⁻⁶"


def test_pages_escape_what_they_show():
    html = build_report("<b>", "<i>", [("<u>", "<em>")], [Section("<s>", "<q>", "")])
    assert not re.search(r"<(i|u|em|s|q)>", html.split("<main>")[1]) and "<h1>&lt;b&gt;</h1>" in html
    assert viewer({"labels": ["</script>"]}).count("</script>") == 1


def test_verify_and_report_from_files_to_files(run, tmp_path, capsys):
    for name in ("truth", "reanalysis", "forecast"):
        write_dataset(getattr(run, name), tmp_path / f"{name}.nc")
    write_dataset(run.reanalysis, tmp_path / "optimal_interpolation.zarr")
    run.observations.to_parquet(tmp_path / "observations.parquet")
    renamed = run.withheld.assign(variable="height", observation=100 * run.withheld["observation"], error_std=10.0)
    renamed.to_csv(tmp_path / "withheld.csv", index=False)
    both = [f"truth={tmp_path}/truth.nc", "verification=quick"]
    rival = f"baselines={{optimal_interpolation: {tmp_path}/optimal_interpolation.zarr}}"
    verify_stage.run(compose("verify", [f"forecast={tmp_path}/reanalysis.nc", rival, f"out={tmp_path}/scores_reanalysis.json", *both]))
    verify_stage.run(compose("verify", [f"forecast={tmp_path}/forecast.nc", f"out={tmp_path}/scores_forecast.csv", *both]))
    units = "network={variables: {height: {name: ssh, scale: 0.01}}}"
    seen = [f"forecast={tmp_path}/reanalysis.nc", f"observations={tmp_path}/withheld.csv", units, "verification=quick"]
    verify_stage.run(compose("verify", [*seen, f"out={tmp_path}/scores_withheld.json"]))
    assert "optimal_interpolation" in capsys.readouterr().out
    assert set(pd.read_json(tmp_path / "scores_withheld.json")["variable"]) == {"ssh"}
    kept = pd.read_csv(tmp_path / "scores_forecast.csv").query("system == 'persistence' and lead_time == 0 and metric == 'rmse'")
    assert len(kept) == 2 and (kept["value"] == 0).all()
    report_stage.run(compose("report", [f"run={tmp_path}", f"out={tmp_path}/report.html", f"picture={tmp_path}/hero.png", "title=Test"]))
    assert "Scores at withheld observations" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert (tmp_path / "hero.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("name", "out", "word"), [("nowhere", "r.html", "no directory"), (".", "r.html", "holds no"), (".", "r.pdf", "html")]
)
def test_a_report_of_nothing_is_one_clear_line(tmp_path, name, out, word):
    with pytest.raises(UserError, match=word):
        report_stage.run(compose("report", [f"run={tmp_path / name}", f"out={tmp_path / out}"]))
