"""`andesvl demo`: everything once, on a laptop CPU: a small model is trained; the one that ships is evaluated, asked, compressed,
exported, and its exports run; a report shows it all."""

import itertools
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Sequence

import jax
import numpy as np

from andesvl_jax.checkpoints.bundle import Bundle
from andesvl_jax.checkpoints.hf import load, save
from andesvl_jax.compression.accounting import bits_per_weight, tree_bytes
from andesvl_jax.data import tasks_page, tasks_print
from andesvl_jax.data.corpus import corpus, train_tokenizer
from andesvl_jax.data.mixture import Mixture
from andesvl_jax.decoding.api import stream
from andesvl_jax.decoding.state import visual_tokens
from andesvl_jax.evaluation.benchmarks import NANO_TARGETS, VALIDATION_SEED, Item, nano_validation
from andesvl_jax.evaluation.evaluate import TaskResult, answers, as_json, evaluate, prompt_of
from andesvl_jax.evaluation.report import cards, loss_curve, results_table, write_report
from andesvl_jax.evaluation.scorers import correct
from andesvl_jax.export import ExportShapes, export
from andesvl_jax.inputs.image import prepare_image
from andesvl_jax.inputs.packing import Budget, assemble_prompts, bucket, make_sample
from andesvl_jax.model.andesvl import describe
from andesvl_jax.training.config import Optimizer, TrainConfig, with_changes
from andesvl_jax.training.loop import train
from andesvl_jax.training.metrics import environment, read_metrics
from andesvl_jax.weights import ALL_MATRICES, Int4, Int8, Quantize, Rule, count, represent

STEPS = 320  # of a stage
_BASE = TrainConfig(
    budget=Budget(rows=6, tokens=212, patches=112, targets=96), min_tokens=1, max_size=140, loss_average="square",
    optimizer=Optimizer(vision=1.5e-3, projector=1.5e-3, decoder=1.5e-3), steps=STEPS, checkpoint_every=STEPS, keep=1,
)  # fmt: skip
READING = ("word", "number", "handwritten")
# What a model learns from nothing in two minutes; the model that ships has longer stages of its own, see configs/stages.py.
STAGES: dict[str, TrainConfig] = {
    "words": replace(_BASE, data=Mixture({"word": 1.0})),
    "reading": replace(_BASE, data=Mixture(dict(zip(READING, (1.0, 2.0, 3.0), strict=True)), seed=1)),
}
MODEL = "nano"  # that ships, and is taken through everything after training
PER_TASK, PER_TASK_COMPRESSED = 150, 40
SMALL_PRINT = (*tasks_print.WORDINGS, *tasks_page.WORDINGS)  # tasks of pictures twice as large each way, left to the model's card
IMAGES = 1000  # pictures of random sizes in the count of compiled programs
LARGEST = 280  # pixels of their longer side at most
EXPORT_SLOTS = 192  # of the exported cache: prompt, its padding and the answer
TABLES, GROUP = r"decoder\.embedding", 16  # weights per scale at 4 bits


def run_demo(out: Path, changes: Sequence[str], command: str) -> dict[str, Any]:
    """Runs every stage and returns the stable keys of `andesvl demo --json`. `out`/report.html and `out`/model stay."""
    began = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - began:5.0f} s] {text}", flush=True)

    stages = {name: with_changes(stage, changes) for name, stage in STAGES.items()}
    out.mkdir(parents=True, exist_ok=True)
    say("tokenizer: byte-level BPE on the training questions and English text")
    train_tokenizer(corpus(0), out / "tokenizer.json")
    trained, metrics = _train_stages(stages, out, command, say)
    items = _questions(PER_TASK)
    reading = evaluate(trained, [item for item in items if item.task in READING])
    print(results_table(reading))

    bundle = load(MODEL)
    parameters = count(describe(bundle.config))
    say(f"{MODEL}, which ships trained, {parameters:,} parameters: unseen content, beside blind and shuffled-picture controls")
    results = evaluate(bundle, items)
    print(results_table(results))
    missed = shortfalls(results)
    for line in missed:
        print(f"below target: {line}")

    say("a few questions about held-out pictures")
    shown = _few_of_each(_questions(3, seed=VALIDATION_SEED + 1))
    replies = answers(bundle, shown)
    for item, reply in list(zip(shown, replies, strict=True))[::3]:
        print(f"  {item.task}: {item.question}  ->  {reply}")

    say("cache eviction: half and three quarters of the prompt")
    fewer = _few_of_each(items, PER_TASK_COMPRESSED)
    eviction = [_evicted(bundle, fewer, policy, budget) for policy, budget in _EVICTIONS]
    say("weights to int8 and int4")
    quantized = [_quantized(bundle, fewer, bits) for bits in (None, 8, 4)]
    say(f"{IMAGES} pictures of random sizes through the encoder")
    programs, buckets = compiled_programs(bundle)
    print(f"  {programs} compiled programs for {buckets} buckets")

    say("export to StableHLO and LiteRT, each run in a fresh process")
    prompt = prompt_of(bundle, shown[0])
    shapes = ExportShapes(patches=(bucket(prompt.patches),), prompt=(bucket(len(prompt.tokens)),), slots=EXPORT_SLOTS)
    exported = {}
    for name in ("stablehlo", "litert", "litert-int8"):
        form, _, weights = name.partition("-")
        exported[name] = export(bundle, out / "export" / name, form, weights or None, shapes, prompt)
        differences = (f"{stage} {check['max_abs_diff']:.1e}" for stage, check in exported[name]["checks"].items())
        print(f"  {name:<12} max |difference|: {', '.join(differences)}")
    checks = [
        {"artifact": name, "stage": stage} | check for name, done in exported.items() for stage, check in done["checks"].items()
    ]
    files = {f"{name}/{file}": size for name, done in exported.items() for file, size in done["files"].items()}

    seconds = time.perf_counter() - began
    report = out / "report.html"
    write_report(
        report, command=command, seconds=seconds, parameters=parameters, results=results, missed=missed, reading=reading,
        trained=count(describe(trained.config)),
        curve=loss_curve(metrics), training=_training_line(stages, metrics), cards=cards(shown, replies), eviction=eviction,
        quantized=quantized, exports=checks, files=files, images=IMAGES, compiled_programs=programs, buckets=buckets,
        environment=_flat(environment()),
    )  # fmt: skip
    say(f'report: {report}; ask the model: andesvl chat --model {MODEL} --image FILE "How many shapes are there?"')
    return {
        "seconds": seconds,
        "tasks": {task: {k: row[k] for k in ("accuracy", "blind", "shuffled", "n")} for task, row in as_json(results).items()},
        "compiled_programs": programs,
        "buckets": buckets,
        "export_equal": all(check["ok"] for check in checks),
        "report": str(report),
    }


def _questions(per_task: int, seed: int = VALIDATION_SEED) -> list[Item]:
    return [item for item in nano_validation(per_task, seed) if item.task not in SMALL_PRINT]


def _train_stages(stages: dict[str, TrainConfig], out: Path, command: str, say) -> tuple[Bundle, list[dict[str, float]]]:
    """Trains stage after stage, each from the model of the one before, and saves the last as `out`/model.

    Returns:
      the trained bundle; the metrics of all stages, steps and seconds counted through.
    """
    shutil.rmtree(out / "stages", ignore_errors=True)  # records of an earlier demo; its model stands until the end
    bundle, start, metrics, steps, seconds = None, None, [], 0, 0.0
    for number, (name, stage) in enumerate(stages.items(), start=1):
        say(f"training pico, {count(describe(stage.model)):,} parameters, stage {number} of {len(stages)}: {name}")
        folder = out / "stages" / f"{number}-{name.replace(' ', '-').replace(',', '')}"
        bundle = train(replace(stage, init_from=start, tokenizer=str(out)), folder, command=command)
        start = str(folder / "model")
        done = read_metrics(folder)
        metrics += [m | {"step": m["step"] + steps, "seconds": m["seconds"] + seconds} for m in done]
        steps, seconds = steps + stage.steps, seconds + done[-1]["seconds"]
    save(bundle, out / "model")
    return bundle, metrics


def shortfalls(results: dict[str, TaskResult]) -> list[str]:
    """What misses the project's targets, one sentence each."""
    out = []
    for task, result in results.items():
        target = NANO_TARGETS.get(task, 0.0)
        if result.accuracy < target:
            out.append(f"{task} {result.accuracy:.1%}, target {target:.0%}")
        if result.accuracy - result.blind < 0.3:
            out.append(f"{task} {100 * (result.accuracy - result.blind):.1f} points above blind, target 30")
    return out


def compiled_programs(bundle: Bundle, images: int = IMAGES) -> tuple[int, int]:
    """Encodes pictures of random sizes one by one -> (programs compiled, buckets their patches fall into)."""
    rng, processor = np.random.default_rng(0), replace(bundle.image_processor, max_size=LARGEST)  # as large as they come
    visual_tokens.clear_cache()  # else a bucket that an earlier stage compiled would not be counted
    buckets = set()
    for width, height in rng.integers(1, LARGEST + 1, (images, 2)):
        picture = prepare_image(rng.integers(0, 256, (height, width, 3), dtype=np.uint8), processor)
        ids = np.full(picture.visual_tokens, bundle.config.image_token_id)
        sample = make_sample(ids, np.zeros(len(ids), bool), [picture], bundle.config.image_token_id)
        batch = assemble_prompts([sample], bundle.config.vision.patch_features)
        jax.block_until_ready(visual_tokens(bundle.decoding_params, bundle.decoding_config, batch.images))
        buckets.add(bucket(sample.patches))
    return visual_tokens._cache_size(), len(buckets)


_EVICTIONS = ((None, 1.0), *itertools.product(("okv", "snapkv", "streaming"), (0.5, 0.25)))


def _evicted(bundle: Bundle, items: Sequence[Item], policy: str | None, budget: float) -> dict[str, Any]:
    right = _accuracy(bundle, items, kv_policy=policy, kv_budget=budget)
    *_, answer = stream(bundle, [prompt_of(bundle, items[-1])], 1, kv_policy=policy, kv_budget=budget)
    row = {"policy": policy or "everything kept", "budget": budget, "bytes": answer.kv_bytes, "accuracy": right}
    print(f"  {row['policy']:<16} {budget:>5.0%} of the prompt  accuracy {right:.1%}")
    return row


def _quantized(bundle: Bundle, items: Sequence[Item], bits: int | None) -> dict[str, Any]:
    params = bundle.params
    if bits is not None:
        matrices = Int8() if bits == 8 else Int4(GROUP)
        params = represent(params, [Rule(ALL_MATRICES, Quantize(matrices)), Rule(TABLES, Quantize(Int8(), axis=-1))])
    body, everything = bits_per_weight(params, bundle.config)
    name = "float32" if bits is None else f"int{bits}, embedding int8"
    right = _accuracy(replace(bundle, params=params), items)
    print(f"  {name:<22} {tree_bytes(params):>12,} bytes  accuracy {right:.1%}")
    return {"name": name, "bytes": tree_bytes(params), "bpw_body": body, "bpw_all": everything, "accuracy": right}


def _accuracy(bundle: Bundle, items: Sequence[Item], **options: Any) -> float:
    texts = answers(bundle, items, **options)
    return float(np.mean([correct(item.task, text, item.answer) for item, text in zip(items, texts, strict=True)]))


def _few_of_each(items: Sequence[Item], number: int = 3) -> list[Item]:
    groups = itertools.groupby(items, key=lambda item: item.task)
    return [item for _, group in groups for item in itertools.islice(group, number)]


def _training_line(stages: dict[str, TrainConfig], metrics: Sequence[dict[str, float]]) -> str:
    last, budget = metrics[-1], next(iter(stages.values())).budget
    return (
        f"{last['step']} steps in {len(stages)} stages ({'; '.join(stages)}) of {budget.rows} packed rows of {budget.tokens} "
        f"tokens and {budget.patches} patches in {last['seconds']:.0f} s; loss {last['loss']:.3f}."
    )


def _flat(values: dict[str, Any]) -> dict[str, str]:
    return {k: ", ".join(f"{a} {b}" for a, b in v.items()) if isinstance(v, dict) else str(v) for k, v in values.items()}
