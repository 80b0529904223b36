"""What training of 1B and 4B takes on TPU slices, compiled without a TPU: the table of docs/tpu.md.

Command (hours on two cores; needs the extra `tpu-aot`):

    .venv/bin/python benchmarks/tpu.py > docs/tpu.md
"""

import argparse
import json
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "tpu.py"
GIB = 1 << 30
TEXT = """# Training on TPU slices

Compiled for slices that were not attached, by `andesvl aot` on a CPU machine; nothing here was run on a TPU and no speed is
claimed. Bytes are the compiler's, of one chip: arguments (parameters, moments, batch), temporaries (activations, gathered
weights, gradients), and everything together beside what the compiler has of a chip; a step fits when that is enough. TFLOP:
matrix products of one step counted by this project, of one chip, rows full, recomputation left out. all-gather, all-reduce,
other: what one chip receives in a step, by XLA's program. Seconds of compiling depend on the machine.

Parameters and moments are float32, compute is bfloat16, layers are recomputed in the backward pass; a batch is rows x tokens, and
patches of a row, four to a visual token. Each line is a configuration:

    andesvl aot   --config configs/tpu.py:andesvl-4b/v5e-64/4096 --topology v5e:8x8
    andesvl train --config configs/tpu.py:andesvl-4b/v5e-64/4096 --out out/4b --set init_from=DIR

`python benchmarks/tpu.py > docs/tpu.md` writes this file; lines of equal configurations are taken from out/tpu.jsonl, which is to
be deleted when the code has changed.

"""
HEAD = (
    "configuration", "step", "mesh", "batch", "arguments", "temporaries", "in all", "of", "fits", "TFLOP", "all-gather",
    "all-reduce", "other", "compiled in",
)  # fmt: skip


def cost(name: str, topology: str, steps: list[str]) -> dict:
    """One `andesvl aot --json` in a process of its own, so that a compiler that dies takes no other line along."""
    command = [sys.executable, "-m", "andesvl_jax.cli", "aot", "--config", f"{CONFIG}:{name}", "--topology", topology, "--json"]
    done = subprocess.run([*command, *(f"--step={step}" for step in steps)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 1) or not done.stdout:  # a Python error is 1 too
        raise SystemExit(f"{name}: andesvl aot ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def lines(name: str, result: dict, budget) -> list[str]:
    gib = lambda x: "-" if x is None else f"{x / GIB:.2f} GiB"  # noqa: E731
    mesh = ", ".join(f"{axis} {size}" for axis, size in result["mesh"].items())
    batch = f"{budget.rows} x {budget.tokens:,}, {budget.patches:,}"
    out = []
    for step, found in result["steps"].items():
        received = {kind: total["bytes"] for kind, total in found["collectives"].items()}
        known = [received.pop(kind, 0) for kind in ("all-gather", "all-reduce")]
        cells = (
            name, step, mesh, batch, gib(found["hbm"].get("arguments")), gib(found["hbm"].get("temporaries")),
            gib(found["hbm_bytes_per_device"]), gib(result["hbm_limit"]), "yes" if found["fits"] else "no",
            f"{found['flops_per_step'] / result['devices'] / 1e12:.3g}",
            *(gib(x) if found["collectives"] else "-" for x in (*known, sum(received.values()))),
            f"{found['compile_seconds']:.0f} s",
        )  # fmt: skip
        out.append("| " + " | ".join(cells) + " |")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="part of the names of the configurations to compile")
    parser.add_argument("--rows", default="out/tpu.jsonl", help="what is measured goes here, and is not measured again")
    parser.add_argument("--step", action="append", choices=("train", "prefill", "decode"), help="default: train")
    args = parser.parse_args()
    file, table = Path(args.rows), runpy.run_path(str(CONFIG))
    file.parent.mkdir(parents=True, exist_ok=True)
    known = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    steps = args.step or ["train"]
    known = [row for row in known if row["of"] == repr(table["ALL"].get(row["name"]))]
    for name in filter(lambda name: args.only in name, table["ALL"]):
        left = [s for s in steps if not any(row["name"] == name and s in row["steps"] for row in known)]
        if left:
            row = {"name": name, "of": repr(table["ALL"][name])} | cost(name, table["TOPOLOGIES"][name.split("/")[1]], left)
            known.append(row)
            with file.open("a") as out:
                print(json.dumps(row), file=out)
    print(TEXT + "| " + " | ".join(HEAD) + " |\n|" + " --- |" * len(HEAD))
    for name in table["ALL"]:
        for row in known:
            if row["name"] == name:
                print(*lines(name, row, table["ALL"][name].budget), sep="\n")


if __name__ == "__main__":
    main()
