"""Wrong variants of the network: mistakes that a port of it could make, each with the golden sets that must notice.

A mutation is a function that makes its mistake with `swap`, which puts another function in a function's place wherever the
package has imported it. Letters as in andesvl_jax/model.
"""

import functools
import sys
from typing import Callable

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from andesvl_jax.decoding import state as session_state
from andesvl_jax.inputs import chat, image, packing
from andesvl_jax.model import andesvl, attention, decoder, layers, position_table, projector, vision
from andesvl_jax.model.attention import Place
from andesvl_jax.weights import leaf

MUTATIONS: dict[str, tuple[Callable, tuple[str, ...]]] = {}
A, C, S, ODD_A, ODD_S = "aimv2_a", "aimv2_c_multi_image_text", "siglip2_c_multi", "odd aimv2", "odd siglip2"


def mutation(name: str, *noticed_by: str):
    """Registers a mutation; `noticed_by` names the sets (or checks of test_drift.py) that fail under it."""

    def register(make):
        MUTATIONS[name] = make, noticed_by
        return make

    return register


def swap_everywhere(patch, original: Callable, other: Callable, only=None) -> None:
    """Replaces a function by name in `only` (a module), or in every module of the package that holds it."""
    modules = [only] if only else [m for name, m in list(sys.modules.items()) if name.startswith("andesvl_jax")]
    for module in modules:
        for name, value in list(vars(module).items()):
            if value is original:
                patch.setattr(module, name, other)


def wrap(name: str, original: Callable, *noticed_by: str, only=None):
    """Decorator: the body gets the original function and its arguments and returns the wrong value."""

    def register(body):
        def make(patch):
            swap_everywhere(patch, original, functools.partial(body, original), only)

        MUTATIONS[name] = make, noticed_by
        return body

    return register


# ---- activations, norms, merge


def _activation(wrong: dict[str, str]):
    return lambda original, name: original(wrong.get(name, name))


wrap("tanh GELU in the projector", layers.activation, A, C, S, only=projector)(_activation({"gelu": "gelu_pytorch_tanh"}))
wrap("erf GELU in SigLIP2", layers.activation, S, only=vision)(_activation({"gelu_pytorch_tanh": "gelu"}))
wrap("SiLU whatever hidden_act says", layers.activation, S, ODD_A, only=vision)(lambda original, name: original("silu"))


@wrap("2x2 merge in the order TL BL TR BR", projector.project, C, S)
def _(original, params, config, x):
    b, p, c = x.shape
    return original(params, config, x.reshape(b, p // 4, 4, c)[:, :, jnp.array([0, 2, 1, 3])].reshape(b, p, c))


def _layers(params, **changes):
    return params.replace(layers=params.layers.replace(**changes))


@wrap("gate and up of AIMv2 swapped", vision.encode, C)
def _(original, params, *rest):
    return original(_layers(params, fc1=params.layers.fc3, fc3=params.layers.fc1), *rest)


@wrap("gate and up of the decoder swapped", decoder.decode, A)
def _(original, params, *rest, **options):
    return original(_layers(params, gate=params.layers.up, up=params.layers.gate), *rest, **options)


wrap("RMSNorm epsilon ignored", layers.rms_norm, ODD_A)(lambda original, x, weight, eps: original(x, weight, 1e-6))
wrap("epsilon of the decoder's norms ignored", layers.rms_norm, ODD_A, only=decoder)(
    lambda original, x, weight, eps: original(x, weight, 1e-6)
)
wrap("LayerNorm epsilon ignored", layers.layer_norm, ODD_S)(lambda original, x, w, b, eps: original(x, w, b, 1e-6))
wrap("RMSNorm multiplies with 1 + weight", layers.rms_norm, C)(lambda original, x, weight, eps: original(x, 1 + weight, eps))
wrap("RMSNorm without its weight", layers.rms_norm, C)(lambda original, x, weight, eps: original(x, jnp.ones_like(weight), eps))
wrap("LayerNorm does not subtract the mean", layers.layer_norm, S)(lambda original, x, w, b, eps: layers.rms_norm(x, w, eps) + b)


def _without_last_norm(function, norm):
    """`function` runs with a `norm` that passes over the weight params.norm."""

    def make(patch):
        module, last = sys.modules[function.__module__], []

        def run(params, *rest, **options):
            last.append(params.norm)
            return function(params, *rest, **options)

        swap_everywhere(patch, function, run)
        swap_everywhere(patch, norm, lambda x, w, *more: x if any(w is n for n in last) else norm(x, w, *more), module)

    return make


mutation("no norm behind the AIMv2 trunk", C)(_without_last_norm(vision.encode, layers.rms_norm))
mutation("no norm behind the SigLIP2 trunk", S)(_without_last_norm(vision.encode, layers.layer_norm))
mutation("no final norm in the decoder", C)(_without_last_norm(decoder.decode, layers.rms_norm))


# ---- 2-D rotary embedding and position table


@wrap("2-D RoPE with the column first", vision.encode, C, S)
def _(original, params, config, x, coordinates, segments):
    return original(params, config, x, coordinates[..., ::-1], segments)


@wrap("2-D RoPE rescaled to the table's grid", vision.encode, C)
def _(original, params, config, x, coordinates, segments):
    most = jnp.max(coordinates, axis=1, keepdims=True) + 1
    return original(params, config, x, coordinates * config.vision.table_side / most, segments)


@wrap("2-D RoPE on merged tokens", vision.encode, C)
def _(original, params, config, x, coordinates, segments):
    return original(params, config, x, coordinates // 2, segments)


def _interleaved(original, x, rotation):
    cos, sin = (a[..., : x.shape[-1] // 2] for a in rotation)
    even, odd = x[..., 0::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)


wrap("interleaved RoPE in the encoder", layers.rotate, C, S, only=vision)(_interleaved)
wrap("interleaved RoPE in the decoder", layers.rotate, C, only=decoder)(_interleaved)
wrap("RoPE turns the other half", layers.rotate, C)(lambda original, x, turn: original(x[..., ::-1], turn)[..., ::-1])
wrap("theta of the encoder ignored", layers.inverse_frequencies, ODD_A, ODD_S, only=vision)(
    lambda original, width, theta: original(width, 1e4)
)
wrap("theta of the decoder ignored", layers.inverse_frequencies, ODD_A, only=decoder)(
    lambda original, width, theta: original(width, 1e6)
)
wrap("theta 1e4 in the decoder", layers.inverse_frequencies, C, only=decoder)(lambda original, width, theta: original(width, 1e4))
wrap("frequencies over the whole head width in the encoder", layers.inverse_frequencies, C, only=vision)(
    lambda original, width, theta: original(2 * width, theta)[: width // 2]
)
wrap("no RoPE in the encoder", layers.rotate, C, only=vision)(lambda original, x, turn: x)
wrap("no RoPE in the decoder", layers.rotate, C, only=decoder)(lambda original, x, turn: x)


@wrap("position table in raster order", position_table.position_embedding, C, S)
def _(original, table, n, interpolation, coordinates, grids):
    index = jnp.arange(coordinates.shape[1])
    starts = jax.lax.cummax(jnp.where((coordinates == 0).all(-1), index, 0), axis=1)
    place = index - starts
    return original(table, n, interpolation, jnp.stack([place // grids[..., 1], place % grids[..., 1]], -1), grids)


@wrap("position table transposed", position_table.position_embedding, C)
def _(original, table, n, interpolation, coordinates, grids):
    return original(table, n, interpolation, coordinates[..., ::-1], grids[..., ::-1])


@wrap("one_dim position table read as two_dim", position_table.position_embedding, ODD_S)
def _(original, table, n, interpolation, coordinates, grids):
    return original(table, n, "two_dim", coordinates, grids)


@wrap("position table cut out, not resized", position_table.position_embedding, C)
def _(original, table, n, interpolation, coordinates, grids):
    return original(table, n, interpolation, jnp.minimum(coordinates, n - 1), jnp.full_like(grids, n))


@wrap("position table resized bilinearly", position_table._cubic, C, S)
def _(original, index, size, n):
    source = jnp.clip(position_table._source(index, size, n), 0, n - 1)
    return jnp.maximum(1 - jnp.abs(source[..., None] - jnp.arange(n)), 0)


@mutation("bicubic with a = -0.5", C, S)
def _(patch):
    patch.setattr(position_table, "CUBIC_A", -0.5)


wrap("position table resized with aligned corners", position_table._source, C)(
    lambda original, index, size, n: index * (n - 1) / jnp.maximum(size - 1, 1)
)


@wrap("position embedding in front of AIMv2's patch norm", vision.embed_patches, C)
def _(original, params, config, patches, coordinates, grids):
    settings = config.vision
    x = leaf.apply(params.patch, patches, params.patch_bias)
    x = x + position_table.position_embedding(params.table, settings.table_side, "two_dim", coordinates, grids)
    return layers.rms_norm(x, params.patch_norm, settings.norm_eps)


# ---- attention


def _attend(name: str, *noticed_by: str, only=None):
    return wrap(name, attention.attend, *noticed_by, only=only)


@_attend("query heads dealt to kv heads in turns", C, only=decoder)
def _(original, q, parts, *rest):
    times = q.shape[2] // parts[-1].keys.shape[1]
    deal = lambda x: jnp.tile(x, (1, times, 1, 1))  # noqa: E731
    return original(q, [part.replace(keys=deal(part.keys), values=deal(part.values)) for part in parts], *rest)


@_attend("text attention not causal", C, only=decoder)
def _(original, q, parts, queries, causal, *rest):
    return original(q, parts, queries, False, *rest)


def _standing(parts, place):
    return [part.replace(place=place) for part in parts]


@_attend("image attention causal", C, S, only=vision)
def _(original, q, parts, queries, causal, *rest):
    place = Place(jnp.where(queries.positions < 0, -1, jnp.arange(q.shape[1])), queries.segments)
    return original(q, _standing(parts, place), place, True, *rest)


@_attend("images of a row see each other", C, S, only=vision)
def _(original, q, parts, queries, *rest):
    place = Place(queries.positions)
    return original(q, _standing(parts, place), place, *rest)


@_attend("padding patches are seen", C, only=vision)
def _(original, q, parts, queries, *rest):
    place = Place(jnp.zeros_like(queries.positions), jnp.maximum(queries.segments, 0))
    return original(q, _standing(parts, place), place, *rest)


@wrap("every vision layer full", vision._window_segments, ODD_A)
def _(original, *_):
    return None


@wrap("every vision layer windowed", vision.encode, C)
def _(original, params, config, *rest):
    settings = type(config.vision)(**{**vars(config.vision), "full_attention_layers": ()})
    return original(params, config.replace(vision=settings), *rest)


@_attend("attention not scaled", C)
def _(original, q, *rest):
    return original(q * q.shape[-1] ** 0.5, *rest)


@_attend("attention scaled by the model width", C)
def _(original, q, *rest):
    return original(q * q.shape[2] ** -0.5, *rest)


@mutation("values are rotated too", C)
def _(patch):
    rotate, attend, turns = layers.rotate, attention.attend, []

    def remember(x, turn):
        turns.append(turn)
        return rotate(x, turn)

    def turned(q, parts, *rest):
        turn = lambda v: jnp.swapaxes(rotate(jnp.swapaxes(v, 1, 2), turns[-1]), 1, 2)  # noqa: E731
        return attend(q, [part.replace(values=turn(part.values)) for part in parts], *rest)

    patch.setattr(decoder, "rotate", remember)
    patch.setattr(decoder, "attend", turned)


@wrap("no q/k norm", decoder.decode, C)
def _(original, params, *rest, **options):
    return original(_layers(params, q_norm=None, k_norm=None), *rest, **options)


@mutation("q/k norm behind RoPE", C)
def _(patch):
    norm, rotate, waiting = layers.rms_norm, layers.rotate, []

    def later(x, weight, eps):
        if x.ndim < 4:
            return norm(x, weight, eps)
        waiting.append((weight, eps))
        return x

    patch.setattr(decoder, "rms_norm", later)
    patch.setattr(decoder, "rotate", lambda x, turn: norm(rotate(x, turn), *waiting.pop(0)))


@wrap("q/k norm over all heads together", layers.rms_norm, C, only=decoder)
def _(original, x, weight, eps):
    if x.ndim < 4:
        return original(x, weight, eps)
    return original(x.reshape(*x.shape[:2], -1), jnp.tile(weight, x.shape[2]), eps).reshape(x.shape)


@wrap("biases of the decoder's attention dropped", decoder.decode, ODD_A)
def _(original, params, *rest, **options):
    return original(_layers(params, q_bias=None, k_bias=None, v_bias=None, o_bias=None), *rest, **options)


@wrap("biases of the encoder dropped", vision.encode, ODD_A, S)
def _(original, params, *rest):
    return original(_layers(params, qkv_bias=None, proj_bias=None, fc1_bias=None, fc2_bias=None), *rest)


# ---- embeddings, head, placement


@wrap("embeddings scaled by the square root of the width", decoder.embed_tokens, C)
def _(original, params, config, tokens):
    return original(params, config, tokens) * config.text.hidden_size**0.5


@wrap("the head tied although it is not", decoder.logits, ODD_A)
def _(original, params, hidden):
    return original(params.replace(head=None), hidden)


@wrap("visual tokens of every image counted from the first image's", andesvl.embed_inputs, C, S)
def _(original, params, config, tokens, visual, index):
    ahead = jnp.concatenate([jnp.full_like(index[:, :1], -1), index[:, :-1]], axis=1)
    start = jax.lax.cummax(jnp.where((index >= 0) & (ahead < 0), index, 0), axis=1)
    return original(params, config, tokens, visual, jnp.where(index < 0, -1, index - start))


@wrap("visual tokens added to the placeholder's embedding", andesvl.embed_inputs, C)
def _(original, params, config, tokens, visual, index):
    return original(params, config, tokens, visual, index) + jnp.where(
        (index >= 0)[..., None], decoder.embed_tokens(params.decoder, config, tokens), 0
    )


def _positions(change):
    """`assemble` with other positions of its tokens."""

    def body(original, *args):
        batch = original(*args)
        return batch.replace(positions=np.where(batch.positions < 0, -1, change(batch)).astype(np.int32))

    return body


wrap("an image takes one text position", packing.assemble, C)(
    _positions(lambda b: np.cumsum((b.visual_index < 0) | (np.roll(b.visual_index, 1, axis=1) < 0), axis=1) - 1)
)
wrap("positions do not restart with a conversation", packing.assemble, "layout")(
    _positions(lambda b: np.arange(b.tokens.shape[1]))
)
wrap("positions start at one", packing.assemble, "layout")(_positions(lambda b: b.positions + 1))


@wrap("conversations of a row see each other", packing.assemble, "packed row")
def _(original, *args):
    batch = original(*args)
    together = np.minimum(batch.segments, 0)
    return batch.replace(segments=together, positions=np.where(together < 0, -1, np.arange(together.shape[1])))


@wrap("patch coordinates do not restart with an image", packing.assemble, C, S, "packed row")
def _(original, *args):
    batch = original(*args)
    shift = 3 * np.maximum(batch.images.segments, 0)[..., None]
    return batch.replace(images=batch.images.replace(coordinates=batch.images.coordinates + shift))


# ---- pictures and prompts


@wrap("BGR for RGB", image.to_canvas, A)
def _(original, picture, processor):
    return original(picture, processor)[..., ::-1]


@wrap("BGR for RGB behind the canvas", image.patchify, A)
def _(original, canvas, processor):
    return original(canvas[..., ::-1], processor)


def _with_field(processor, **changes):
    changed = object.__new__(type(processor))
    for name, value in {**vars(processor), **changes}.items():
        object.__setattr__(changed, name, value)
    return changed


@wrap("mean and deviation of the pixels swapped", image.patchify, A)
def _(original, canvas, processor):
    return original(canvas, _with_field(processor, mean=processor.std, std=processor.mean))


@wrap("statistics of the other encoder", image.patchify, A)
def _(original, canvas, processor):
    return original(canvas, _with_field(processor, mean=(0.5,) * 3, std=(0.5,) * 3))


@wrap("an exact multiple of the base keeps its size", image._fit_next_multiple, A)
def _(original, w, h, base):
    return original(w - (w % base == 0), h - (h % base == 0), base)


@mutation("pictures resized bilinearly", A)
def _(patch):
    resize = Image.Image.resize
    patch.setattr(Image.Image, "resize", lambda self, size, _: resize(self, size, Image.Resampling.BILINEAR))


@wrap("patches in raster order", image.patchify, C)
def _(original, canvas, processor):
    patches, coordinates, grid = original(canvas, processor)
    order = np.lexsort((coordinates[:, 1], coordinates[:, 0]))
    return patches[order], coordinates[order], grid


@wrap("patch features row, column, channel", image.patchify, A)
def _(original, canvas, processor):
    patches, *rest = original(canvas, processor)
    return np.ascontiguousarray(patches.reshape(len(patches), 3, -1).swapaxes(1, 2).reshape(patches.shape)), *rest


@wrap("two assistant headers", chat.render_prompt, "prompt")
def _(original, messages, tokenizer, *rest, **options):
    ids = original(messages, tokenizer, *rest, **options)
    header = list(chat._header(tokenizer, "assistant"))
    at = len(ids) - ids[::-1].index(tokenizer.im_start_id) - 1
    return ids[:at] + header + ids[at:]


@wrap("a line break between content items", chat._image, "prompt")
def _(original, count, tokenizer):
    return original(count, tokenizer) + tokenizer.encode("\n")


@wrap("no line break behind a turn", chat._end_of_turn, "prompt")
def _(original, tokenizer):
    return original(tokenizer)[:1]


@wrap("a default system turn", chat.render_prompt, "prompt")
def _(original, messages, tokenizer, *rest, **options):
    system = [tokenizer.im_start_id, *tokenizer.encode("system\n"), tokenizer.im_end_id]
    return system + original(messages, tokenizer, *rest, **options)


# ---- decoding with a cache


@wrap("the cache's next position is one late", session_state.cache_from, "greedy", only=session_state)
def _(original, *args):
    cache = original(*args)
    return cache.replace(length=cache.length + 1)


@wrap("padding of the prompt stays visible in the cache", session_state.cache_from, "greedy", only=session_state)
def _(original, new_kv, positions, *rest):
    return original(new_kv, jnp.maximum(positions, 0), *rest)


@wrap("a generated token is embedded one id off", session_state.embed_tokens, "greedy", only=session_state)
def _(original, params, config, tokens):
    return original(params, config, tokens - 1)
