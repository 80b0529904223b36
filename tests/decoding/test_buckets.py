"""Any picture runs in one of a few compiled programs."""

import dataclasses

import numpy as np
from tiny import IMAGE_TOKEN, tiny_config, tiny_params

from andesvl_jax.decoding.state import visual_tokens
from andesvl_jax.inputs.image import ImageProcessor, Patches, plan_size
from andesvl_jax.inputs.packing import assemble_prompts, bucket, make_sample

CONFIG = tiny_config(vision={"hidden_size": 4, "num_heads": 1, "intermediate_size": 4, "num_layers": 1}, attention="chunked")


def blank(grid: tuple[int, int]) -> Patches:
    """Patches of a canvas of this grid; what they show does not matter here, and 1,000 real pictures would take a minute."""
    count = grid[0] * grid[1]
    return Patches(np.zeros((1, 1, 3), np.uint8), np.zeros((count, 12), np.float32), np.zeros((count, 2), np.int32), grid)


def test_a_thousand_picture_sizes_need_no_more_programs_than_there_are_buckets():
    processor, rng = ImageProcessor(patch_size=14), np.random.default_rng(0)
    calls = {}
    for width, height in rng.integers(1, 901, (1000, 2)).tolist():
        if max(width, height) / min(width, height) > 200:
            continue  # thinner than any canvas
        columns, rows = (side // processor.patch_size for side in plan_size(width, height, processor).canvas)
        tokens = [1] + [IMAGE_TOKEN] * (rows * columns // 4)
        sample = make_sample(tokens, [False] * len(tokens), [blank((rows, columns))], IMAGE_TOKEN)
        images = assemble_prompts([sample], CONFIG.vision.patch_features).images
        calls.setdefault(images.patches.shape, []).append(images)
    edges = {bucket(n) for n in range(1, 4 * processor.visual_tokens(900, 900) + 1)}
    assert {shape[1] for shape in calls} <= edges and len(edges) <= 12
    assert sum(map(len, calls.values())) > 900
    config, params = dataclasses.replace(CONFIG, attention_chunk=64), tiny_params(CONFIG)
    before = visual_tokens._cache_size()
    for images in calls.values():
        for one in (images[0], images[-1]):
            assert np.isfinite(visual_tokens(params, config, one)).all()
    assert visual_tokens._cache_size() - before == len(calls) <= len(edges)


def test_buckets_waste_at_most_a_third():
    sizes = np.arange(1, 20_000)
    edges = np.array([bucket(int(n)) for n in sizes])
    assert (edges >= sizes).all() and (np.diff(edges) >= 0).all()
    assert ((edges - sizes)[sizes > 64] < edges[sizes > 64] / 3).all()
