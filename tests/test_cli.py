"""The command line as a person meets it: answers, and one clear sentence with exit code 2 for every kind of bad input."""

import json
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

import andesvl_jax as avl
from andesvl_jax import cli
from andesvl_jax.checkpoints.bundle import Bundle
from andesvl_jax.cli import main
from andesvl_jax.config import AndesVLConfig, TextConfig, VisionConfig
from andesvl_jax.data.corpus import corpus, train_tokenizer
from andesvl_jax.errors import UserError
from andesvl_jax.inputs.image import ImageProcessor
from andesvl_jax.inputs.tokenizer import Tokenizer
from andesvl_jax.model.andesvl import describe
from andesvl_jax.weights import initialize


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory with a random tiny model and a real tokenizer."""
    import jax

    path = tmp_path_factory.mktemp("model")
    train_tokenizer(corpus(0, examples=200), path / "tokenizer.json", vocab_size=1024)
    tokenizer = Tokenizer.load(path)
    config = AndesVLConfig(
        vision=VisionConfig(hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, table_side=4),
        text=TextConfig(
            vocab_size=1050, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
            max_position_embeddings=1024,
        ),
        image_token_id=tokenizer.image_token_id,
    )  # fmt: skip
    params = initialize(describe(config), jax.random.key(0), "float32")
    avl.save(Bundle(config, params, tokenizer, ImageProcessor.from_hf({}, config.vision)), path / "model")
    return path / "model"


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "cat.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(path)
    return path


def chat(model, *arguments):
    return main(["chat", "--model", str(model), "--max-new-tokens", "4", *map(str, arguments)])


def test_chat_answers_and_prints_the_stable_json_keys(model, picture, capsys):
    assert chat(model, "--image", picture, "--json", "What is this?") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    keys = "text ids prompt_tokens visual_tokens prefill_tokens_per_s decode_tokens_per_s kv_bytes kv_slots accepted_length"
    assert set(result) == set(keys.split()) and result["visual_tokens"] == 6 and 0 < len(result["ids"]) <= 4


def test_marks_place_the_pictures_and_eviction_shrinks_the_cache(model, picture, capsys):
    assert chat(model, "--image", picture, "--json", "Look at <image> and say what it is.") == 0
    whole = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert chat(model, "--image", picture, "--kv-policy", "snapkv", "--kv-budget", "0.25", "--json", "What is this?") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["kv_bytes"] < whole["kv_bytes"]


@pytest.mark.parametrize("damage", ["missing", "truncated", "text", "huge"])
def test_a_picture_that_cannot_be_used_is_named(model, tmp_path, capsys, damage):
    path = tmp_path / "cat.png"
    if damage == "truncated":
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:3000])
    elif damage == "text":
        path.write_text("not a picture")
    elif damage == "huge":
        Image.new("1", (20000, 20000)).save(path)
    assert_refused(chat(model, "--image", path, "What?"), capsys, "cat.png")


def test_thinking_is_taken_apart(model, picture, capsys):
    assert chat(model, "--image", picture, "--thinking", "--json", "What is this?") == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert result["text"].startswith("<think>") and lines[0].startswith("<think>")
    assert (result["reasoning"], result["answer"]) == (result["text"].removeprefix("<think>").strip(), "")  # cut off


def test_the_evaluation_preset_sees_another_canvas(model, tmp_path, capsys):
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    for options, tokens in (([], 9), (["evaluation"], 4), (["evaluation", "--max-size", 20], 1)):
        options = ["--image-preset", *options] if options else []
        assert chat(model, *options, "--image", tmp_path / "a.png", "--json", "What is this?") == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["visual_tokens"] == tokens
    assert_refused(chat(model, "--image-preset", "best", "Hello"), capsys, "expected one of release, evaluation")


def test_sampling_of_the_checkpoint(model, capsys):
    """The released values are the default of a directory; greedy and another seed give something else."""
    answers = []
    for options in ([], ["--sample"], ["--temperature", 0.6, "--top-k", 20, "--top-p", 0.95], ["--sample", "--seed", 1]):
        assert main(["chat", "--model", str(model), "--max-new-tokens", "16", "--json", *map(str, options), "Hello"]) == 0
        answers.append(json.loads(capsys.readouterr().out.splitlines()[-1])["ids"])
    assert answers[0] != answers[1] == answers[2] != answers[3]


def test_a_mark_without_a_picture_is_text(model, capsys):
    assert chat(model, "--json", "What does <image> mean?") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["visual_tokens"] == 0


def test_a_one_pixel_picture_works(model, tmp_path):
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    assert chat(model, "--image", tmp_path / "dot.png", "What?") == 0


def test_more_marks_than_pictures(model, picture, capsys):
    assert_refused(chat(model, "--image", picture, "<image> or <image>?"), capsys, "2 <image> marks")


def test_damaged_checkpoints(model, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert_refused(chat(broken, "Hello"), capsys, "model.safetensors")
    assert_refused(chat(tmp_path / "none", "Hello"), capsys, "no such directory")


def test_a_config_with_an_unknown_key_or_an_impossible_combination(model, tmp_path, capsys):
    for key, value in (("num_hidden_layer", 2), ("num_key_value_heads", 3)):
        broken = tmp_path / key
        shutil.copytree(model, broken)
        raw = json.loads((broken / "config.json").read_text())
        raw["text_config"][key] = value
        (broken / "config.json").write_text(json.dumps(raw))
        assert_refused(chat(broken, "Hello"), capsys, "config.json")


def test_wrong_options_of_decoding(model, capsys):
    assert_refused(chat(model, "--kv-policy", "best", "Hello"), capsys, "kv_policy")
    assert_refused(chat(model, "--kv-policy", "okv", "--kv-budget", "1.5", "Hello"), capsys, "kv_budget")
    assert_refused(main(["chat", "--model", str(model), "--max-new-tokens", "5000", "Hello"]), capsys, "max_position_embeddings")


def test_an_empty_dataset_and_a_missing_config(tmp_path, capsys):
    arguments = ["train", "--config", "configs/demo.py", "--out", str(tmp_path / "run")]
    assert_refused(main([*arguments, "--set", "data.weights={}"]), capsys, "the dataset is empty")
    assert_refused(main(["train", "--config", "none.py", "--out", str(tmp_path)]), capsys, "none.py")


def test_info_needs_no_weights(capsys):
    assert main(["info", "--model", "andesvl-4b", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["parameters"]["total"] == 4_359_721_984 and result["kv_bytes_per_token"] == 2 * 36 * 8 * 128 * 2
    assert_refused(main(["info", "--model", "andesvl-5b"]), capsys, "andesvl-5b")


def test_info_of_a_directory_counts_its_bytes(model, capsys):
    assert main(["info", "--model", str(model), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["bytes_on_disk"] == (model / "model.safetensors").stat().st_size and 32 <= result["bpw_all"] < 40


def last_json(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_evaluate_prints_the_stable_json_keys_and_refuses_an_unknown_benchmark(model, capsys):
    assert main(["evaluate", "--model", str(model), "--per-task", "1", "--json"]) == 0
    result = last_json(capsys)
    assert set(result) == set("benchmark n score low high blind shuffled seconds tasks".split())
    assert result["benchmark"] == "nano-val" and result["n"] == sum(task["n"] for task in result["tasks"].values()) > 5
    assert 0 <= result["low"] <= result["score"] <= result["high"] <= 1
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", "--model", str(model), "--benchmark", "none"])
    assert "nano-val" in capsys.readouterr().err
    assert_refused(main(["evaluate", "--model", str(model / "none")]), capsys, "no such directory")


def test_evaluate_sizes_pictures_as_it_is_told(model, capsys, monkeypatch):
    def found(bundle, *_, **__):
        raise UserError(f"{bundle.image_processor.size_rule} {bundle.image_processor.max_size}")

    monkeypatch.setattr("andesvl_jax.evaluation.evaluate.evaluate", found)
    arguments = ["evaluate", "--model", str(model), "--per-task", "1"]
    assert_refused(main([*arguments, "--image-preset", "evaluation"]), capsys, "evaluation 1792")
    assert_refused(main([*arguments, "--image-preset", "evaluation", "--max-size", "448"]), capsys, "evaluation 448")
    assert_refused(main([*arguments, "--image-preset", "large"]), capsys, "found 'large', expected one of release, evaluation")


def test_evaluate_on_long_contexts_tells_lengths_and_depths(model, capsys):
    arguments = ["evaluate", "--model", str(model), "--benchmark", "long", "--per-task", "3", "--json"]
    assert main([*arguments, "--task", "niah_single", "cwe", "--tokens", "200", "300"]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    rows = ["niah_single@200", "niah_single@300", "cwe@200", "cwe@300"]
    assert result["n"] == 12 and list(result["tasks"]) == rows and lines[5].split()[:2] == ["depth", "0-25"]
    assert all(task["n"] == 3 and len(task["by_depth"]) == 4 for task in result["tasks"].values())
    assert_refused(main([*arguments, "--task", "needle"]), capsys, "found 'needle', expected one of niah_single")
    assert_refused(main([*arguments, "--task", "vt", "--tokens", "20"]), capsys, "vt@20: 20 tokens are too few")
    assert_refused(main([*arguments, "--task", "vt", "--tokens", "1024"]), capsys, "max_position_embeddings")


def test_export_prints_files_and_checks_and_refuses_what_it_cannot_write(model, tmp_path, capsys):
    arguments = ["export", "--model", str(model), "--out", str(tmp_path / "made"), "--format"]
    assert main([*arguments, "stablehlo", "--json"]) == 0
    result = last_json(capsys)
    assert set(result) == {"files", "checks"} and result["checks"]
    assert all(set(check) >= {"max_abs_diff", "ok"} and check["ok"] for check in result["checks"].values()), result["checks"]
    assert all((tmp_path / "made" / name).stat().st_size == size for name, size in result["files"].items())
    assert_refused(main([*arguments, "stablehlo", "--quantize", "int8"]), capsys, "litert with int8")


def test_bench_prints_the_rows_of_its_script_and_needs_a_checkout(tmp_path, monkeypatch, capsys):
    rows = [{"what": "decode", "value": 7.0, "unit": "tokens/s", "peer": None, "ratio": None}]
    script = f"def run(config='andesvl-0.6b'):\n    return {{'name': 'decode ' + config, 'rows': {rows!r}}}\n"
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "decode.py").write_text(script)
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "andesvl_jax" / "cli.py"))
    monkeypatch.setattr("sys.path", list(sys.path))
    assert main(["bench", "decode", "--config", "pico", "--json"]) == 0
    text, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == {"name": "decode pico", "rows": rows} and text == "what decode  value 7.0  unit tokens/s"
    assert_refused(main(["bench", "train_step"]), capsys, "train_step.py")


def assert_refused(code, capsys, mention):
    error = capsys.readouterr().err
    assert code == 2 and mention in error, error
    assert error.startswith("andesvl: ") and len(error.strip().splitlines()) == 1, error
