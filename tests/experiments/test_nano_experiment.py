"""The script that makes the models that ship: what it says of a run is what the run recorded, and its card leaves nothing out."""

import importlib.util
import json
from pathlib import Path

import pytest

from andesvl_jax.checkpoints.locate import SHIPPED, shipped_models
from andesvl_jax.compression.accounting import describe_checkpoint

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def nano():
    spec = importlib.util.spec_from_file_location("nano_experiment", ROOT / "experiments" / "nano.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "2-joint"
    folder.mkdir()
    config = {
        "init_from": None, "steps": 400, "budget": {"rows": 6, "tokens": 256},
        "optimizer": {"decoder": 7e-4, "final_fraction": 0.02},
        "data": {"seed": 3, "weights": {"word": 1.0, "niah_single@128": 0.5, "maps": 0.2}, "limits": {"maps": 250}},
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps({"config": config, "environment": {"devices": "1 x abacus"}}))
    lines = [
        {"step": step, "tokens": 1000.0 + step, "seconds": step / 2, "loss": 2.0 - step / 200} for step in (1, 100, 200, 300)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


def test_a_stage_is_described_by_its_own_record(nano, run):
    stage = nano.stage_record(run)
    assert (stage["name"], stage["steps"], stage["planned"], stage["seconds"], stage["seed"]) == ("joint", 300, 400, 150, 3)
    assert stage["tokens"] == round((4000 + 601) / 4 * 300) and stage["curve"][-1] == [300, 0.5]


def test_the_card_tells_every_stage_and_task_and_each_target_that_is_missed(nano, run):
    row = {"low": 0.5, "high": 0.7, "blind": 0.1, "shuffled": 0.12, "n": 500, "by_depth": ()}
    tasks = {"count": row | {"accuracy": 0.99}, "colour": row | {"accuracy": 0.61}, "emoji/emoji_name": row | {"accuracy": 0.6}}
    record = {
        "model": "nano", "stages": [nano.stage_record(run)], "environment": {}, "max_size": 280,
        "per_task": 500, "seconds": 10, "tasks": tasks,
    }  # fmt: skip
    parameters = dict.fromkeys(("total", "vision", "projector", "decoder"), 1_234_567)
    text = nano.card(record, {"parameters": parameters, "bytes_on_disk": 2_469_134})
    assert "| joint | 1 x abacus | 300 of 400 | 6 x 256 | 0.0007, 2 % |" in text and "maps 0.2 (250) |" in text
    assert "niah_single@128 0.5" in text and "1,234,567" in text
    assert all(f"| {name} |" in text for name in tasks) and "| 61.0 % | 50.0-70.0 |" in text
    assert "- colour: 61.0 % of 95 %" in text and "- count:" not in text and "- nothing" not in text


@pytest.mark.parametrize("name", shipped_models())
def test_the_cards_that_ship_are_what_their_results_say(nano, name):
    record = json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))
    card = (SHIPPED / name / "README.md").read_text(encoding="utf-8")
    assert card == nano.card(record, describe_checkpoint(str(SHIPPED / name)))


def test_a_run_that_began_with_the_model_that_ships_goes_on_with_its_stages(nano, run, tmp_path, monkeypatch):
    earlier, later = {"name": "alignment", "steps": 7}, nano.stage_record(run)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "nano.json").write_text(json.dumps({"stages": [earlier, later]}))
    monkeypatch.setattr(nano, "ROOT", tmp_path)
    assert nano.earlier_stages(run, "nano", [later]) == [], "it began with nothing"
    record = json.loads((run / "run.json").read_text())
    record["config"]["init_from"] = "nano"
    (run / "run.json").write_text(json.dumps(record))
    assert nano.earlier_stages(run, "nano", [later]) == [earlier], "a second card of the same runs names none twice"
