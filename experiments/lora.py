"""Claim: adapters teach nano 20 pictures with names of its own in five minutes of two cores, and the base stays as it is.

    python experiments/lora.py            # about 5 minutes; writes results/lora.json
    python experiments/lora.py --quick    # two steps, to see that it runs

Draws 20 pictures of two shapes, each with a made-up name, writes them as a LLaVA file, asks nano for the names, trains adapters
by configs/lora.py:nano with each seed, and asks again: about these pictures, and about the same things drawn smaller.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageDraw

import andesvl_jax as avl
from andesvl_jax.data.mixture import Mixture
from andesvl_jax.evaluation.scorers import wilson
from andesvl_jax.training.config import load_config
from andesvl_jax.training.loop import train
from andesvl_jax.training.metrics import environment

ROOT = Path(__file__).resolve().parents[1]
NAMES = (
    "zorb", "quilp", "mavo", "trenk", "lisp", "gond", "farb", "wix", "jute", "pell",
    "snoo", "brack", "dovin", "kelp", "ruma", "tosk", "vane", "yarl", "hixo", "culm",
)  # fmt: skip
COLOURS = ("red", "blue", "green", "orange", "purple")
SHAPES = ("ellipse", "rectangle")
QUESTION = "What is this?"


def picture(number: int, scale: float = 1.0) -> Image.Image:
    """Picture of one name, 112 pixels square: a large shape with a small one inside or beside it."""
    image = Image.new("RGB", (112, 112), "white")
    draw = ImageDraw.Draw(image)
    colour, shape, inside = COLOURS[number % 5], SHAPES[number // 5 % 2], number // 10 % 2 == 0
    size = int(36 * scale)
    getattr(draw, shape)((50 - size, 56 - size, 50 + size, 56 + size), fill=colour)
    left = 42 if inside else 92
    draw.polygon([(left, 64), (left + 8, 46), (left + 16, 64)], fill="black")
    return image


def write(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for number, name in enumerate(NAMES):
        picture(number).save(folder / f"{number}.png")
        turns = [{"from": "human", "value": f"<image>{QUESTION}"}, {"from": "gpt", "value": f"a {name}"}]
        records.append({"image": f"{number}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


def answers(bundle, scale: float) -> list[str]:
    conversations = [[{"role": "user", "content": f"<image>{QUESTION}"}]] * len(NAMES)
    pictures = [[picture(number, scale)] for number in range(len(NAMES))]
    return avl.chat(bundle, conversations, images=pictures, max_new_tokens=8)


def score(bundle, scale: float) -> dict:
    found = answers(bundle, scale)
    right = sum(text.strip().rstrip(".") == f"a {name}" for text, name in zip(found, NAMES, strict=True))
    low, high = wilson(right, len(NAMES))
    return {"right": right, "of": len(NAMES), "low": low, "high": high, "answers": found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="out/lora", help="run directory (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--results", default=str(ROOT / "results" / "lora.json"))
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.steps = args.seeds[:1], 12
    out, base = Path(args.out), avl.load("nano")
    data = write(out / "pictures")
    rows = [{"seed": None, "steps": 0, "seconds": 0.0, "same": score(base, 1.0), "smaller": score(base, 0.85)}]
    for seed in args.seeds:
        config = load_config(str(ROOT / "configs" / "lora.py") + ":nano")
        mixture = Mixture({"mine": 1.0}, files={"mine": str(data)}, seed=seed)
        config = replace(config, data=mixture, steps=args.steps, seed=seed, checkpoint_every=args.steps)
        began = time.perf_counter()
        train(config, out / f"seed{seed}", command="experiments/lora.py")
        seconds = time.perf_counter() - began
        tuned = avl.load("nano", adapter=out / f"seed{seed}" / "adapter")
        rows.append(
            {"seed": seed, "steps": args.steps, "seconds": seconds} | {"same": score(tuned, 1.0), "smaller": score(tuned, 0.85)}
        )
    for row in rows:
        same, smaller = row["same"]["right"], row["smaller"]["right"]
        print(f"seed {row['seed']}: {same} of 20 right, {smaller} of 20 drawn smaller; {row['seconds']:.0f} s")
    adapter = sum(f.stat().st_size for f in (out / f"seed{args.seeds[0]}" / "adapter").iterdir())
    result = {"claim": __doc__.splitlines()[0], "rows": rows, "adapter_bytes": adapter, "environment": environment()}
    Path(args.results).write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
