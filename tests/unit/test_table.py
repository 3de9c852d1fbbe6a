import pytest

from tests.unit.observed_run import elastic_run, stock_run
from verl_rlhfless.report.ab import build_ab
from verl_rlhfless.report.guards import GuardLimits
from verl_rlhfless.report.table import render


@pytest.fixture
def record(tmp_path):
    folders = {}
    for name, run in (("stock", stock_run), ("elastic", elastic_run)):
        (tmp_path / name).mkdir()
        folders[name] = run(tmp_path / name).path
    limits = GuardLimits(num_steps=2, num_samples=4, max_gpus=3, pulling_arms=("elastic",))
    return build_ab(folders, 1, 4, limits, {"stock": [], "elastic": None})


def cells(text, *first):
    return next(line.split() for line in text.splitlines() if line.split()[: len(first)] == list(first))


def test_every_step_and_the_total_of_each_arm_have_a_line(record):
    text = render(record)
    assert cells(text, "stock", "1")[2:7] == ["10.0", "4.0", "44.0", "22.0", "22.0"]
    assert cells(text, "elastic", "2")[4:] == [
        "33.0", "11.0", "15.0", "7.0", "0.0", "4", "2", "4", "50", "0.200", "2.0e-08",
    ]  # fmt: skip
    assert cells(text, "stock", "total")[4:9] == ["240.0", "44.0", "160.0", "36.0", "0.0"]


def test_a_failed_guard_stands_out_and_an_unknown_value_is_a_dash(record):
    text = render(record)
    assert cells(text, "max_gpus/stock") == ["max_gpus/stock", "4", "3", "FAILED"]
    assert cells(text, "left_behind/elastic") == ["left_behind/elastic", "-", "0", "FAILED"]
    assert cells(text, "weight_version/elastic")[-1] == "ok"


def test_it_fits_a_terminal_of_120_columns_with_the_figures_of_a_long_run(record):
    step = record["arms"]["stock"]["total"]
    step |= {name: 123456.7 for name in step if name.startswith("gpu_s")} | {"response_tokens": 98765432}
    text = render(record)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 120
    assert "123,457" in text and "98,765,432" in text and "…" not in text


def test_an_unknown_figure_is_a_dash_not_a_zero(record):
    record["arms"]["stock"]["steps"][0]["num_samples"] = None
    assert cells(render(record), "stock", "1")[11] == "-"
