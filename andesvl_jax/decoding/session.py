"""A session: conversations of one batch whose KV cache is kept between turns.

Chat, batch generation, evaluation and drafting are loops over it. The arrays live in a `SessionState`; this class holds what
the host must know: which tokens the cache stands for, and how much room is left.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from andesvl_jax.cache.eviction import Eviction
from andesvl_jax.cache.kv import cache_bytes, grow
from andesvl_jax.cache.store import KINDS
from andesvl_jax.checkpoints.bundle import Bundle
from andesvl_jax.checkpoints.json_file import read_json, write_json
from andesvl_jax.checkpoints.staging import replacing
from andesvl_jax.decoding import state as pure
from andesvl_jax.decoding.sampling import SamplingOptions
from andesvl_jax.decoding.state import SessionState, Verified
from andesvl_jax.errors import UserError
from andesvl_jax.inputs.packing import Sample, assemble_prompts, bucket, make_sample
from andesvl_jax.kernels import cpu
from andesvl_jax.model.andesvl import AndesVL
from andesvl_jax.model.devices import ROW_AXES, target_platform
from andesvl_jax.weights import embed

FORMAT = "andesvl session 1"
ABOUT, ARRAYS = "session.json", "session.safetensors"
ROOM = 16  # smallest number of slots or answer tokens that a program is compiled for


class Session:
    """B conversations over one cache.

    Args:
      bundle: the model.
      observe: last queries of each `extend` that are kept as evidence for `evict`; 0: a session that never evicts.
      kind: of the cache, "float" or "int8".
      mesh: devices that hold `bundle.params`, laid out as `training.sharding.param_shardings` with `IN_USE` says; rows of the
        batch are cut over `data` and `fsdp`. None: one device.

    Attributes:
      prefilled: tokens that were run through the network as prompts so far, all rows together.
    """

    def __init__(self, bundle: Bundle, observe: int = 0, kind: str = "float", mesh: Mesh | None = None):
        self.bundle, self.observe, self.kind, self.mesh = bundle, observe, kind, mesh
        self.params = bundle.params if mesh is not None else bundle.decoding_params
        self.config = bundle.config if mesh is not None else bundle.decoding_config
        self.state: SessionState | None = None
        self.prefilled = 0
        self._held: list[np.ndarray] = []  # of each row: what its positions hold, as `_identities` says
        # resolved here, outside of any trace
        self._compiled = mesh is None and target_platform() == "cpu" and cpu.available()

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row so far, answers included."""
        return [len(held) for held in self._held]

    @property
    def kv_bytes(self) -> int:
        """Allocated bytes of the cache."""
        return cache_bytes(self.state.cache)

    @property
    def kv_slots(self) -> int:
        """Allocated slots of each row, layer and head."""
        return self.state.cache.slots

    def extend(self, samples: Sequence[Sample]) -> None:
        """Appends tokens and pictures, one sample per row, to what the rows hold.

        Raises:
          UserError: another number of rows than before, or rows beyond the model's positions.
        """
        if self._held and len(samples) != len(self._held):
            raise UserError(f"session: found {len(samples)} rows, expected {len(self._held)} as before.")
        held = self._held or [np.zeros(0, np.int64)] * len(samples)
        limit = self.config.text.max_position_embeddings
        longest = max(len(h) + len(s.tokens) for h, s in zip(held, samples, strict=True))
        if longest > limit:
            raise UserError(f"session: a row would have {longest} tokens, expected at most {limit} (max_position_embeddings).")
        batch = assemble_prompts(samples, self.config.vision.patch_features)
        offsets = np.array([len(h) for h in held], np.int32)[:, None]
        positions = np.where(batch.positions >= 0, batch.positions + offsets, -1)
        with self._devices():
            tokens, positions, visual_index, images = self._placed((batch.tokens, positions, batch.visual_index, batch.images))
            visual = None if images is None else pure.visual_tokens(self.params, self.config, images)
            prompt = tokens, positions, visual, visual_index
            if self.state is None:
                state = pure.prefill(self.params, self.config, *prompt, self.observe, self.kind)
                self.state = state.replace(cache=state.cache.replace(compiled=self._compiled))
            else:
                self._reserve(tokens.shape[1], self.state.tokens.shape[1])
                self.state = pure.extend(self.params, self.config, self.state, *prompt, self.observe)
        self._held = [np.concatenate([h, _identities(s)]) for h, s in zip(held, samples, strict=True)]
        self.prefilled += sum(len(s.tokens) for s in samples)

    def follow(self, sample: Sample) -> None:
        """Brings a session of one row to this prompt: keeps what the prompt shares with the row, and runs the rest.

        The next turn of a conversation thus costs its own tokens alone. A picture is reused whole or not at all.

        Raises:
          UserError: a session of several rows, or as `extend`.
        """
        if len(self._held) > 1:
            raise UserError(f"session: found {len(self._held)} rows, expected one to follow a conversation.")
        if self._held:
            same = _shared(self._held[0], sample)
            if same < len(self._held[0]):
                self.state = pure.rewind(self.state, np.full(1, same, np.int32))
                self._held = [self._held[0][:same]]
            sample = _rest(sample, same)
        self.extend([sample])

    def evict(self, eviction: Eviction) -> None:
        """Keeps of the cache what the policy keeps; its evidence are the last tokens of the last `extend`.

        Raises:
          UserError: nothing was observed since the last eviction, or a smaller window than the policy's.
        """
        if self.state is None or self.state.queries is None or self.observe < eviction.window:
            raise UserError(
                f"session: the queries of the last {eviction.window} tokens are not held, expected an extend with "
                f"Session(observe={eviction.window}) before each evict."
            )
        with self._devices():
            self.state = pure.evict(self.params, self.config, self.state, eviction)

    def generate(
        self, options: SamplingOptions, new_tokens: int, stop_ids: Sequence[int] = (), chunk: int | None = None
    ) -> Iterator[list[np.ndarray]]:
        """Begins an answer and yields, after every `chunk` tokens and at the end, each row's answer so far, int32 [n].

        An answer ends with one of stop_ids, included, or at `new_tokens`.
        """
        self.begin(new_tokens)
        stops = jnp.asarray(tuple(stop_ids) or (-1,), jnp.int32)
        chunk = chunk or new_tokens
        for limit in range(chunk, new_tokens + chunk, chunk):
            with self._devices():
                limit = min(limit, new_tokens)
                self.state = pure.decode_until(self.params, self.config, self.state, options, stops, limit)
            yield self._answers()
            if bool(self.state.done.all()):
                return

    def begin(self, new_tokens: int) -> None:
        """Starts an answer of at most `new_tokens` tokens, for `step` or `verify` and `accept`."""
        self._reserve(new_tokens, bucket(new_tokens, ROOM))

    def step(self, options: SamplingOptions, stop_ids: Sequence[int] = ()) -> list[np.ndarray]:
        """One more token of the answer in every row that has not stopped; the answers so far."""
        stops = jnp.asarray(tuple(stop_ids) or (-1,), jnp.int32)
        limit = int(self.state.counts.max()) + 1
        with self._devices():
            self.state = pure.decode_until(self.params, self.config, self.state, options, stops, limit)
        return self._answers()

    def verify(self, tokens: np.ndarray, parents: np.ndarray, options: SamplingOptions) -> Verified:
        """One pass over a draft tree, int32 [B, M] each; see `state.verify`. The session stays as it is."""
        with self._devices():
            return pure.verify(self.params, self.config, self.state, tokens, parents, options)

    def accept(self, verified: Verified, stop_ids: Sequence[int] = (), limit: int | None = None) -> list[np.ndarray]:
        """Takes the path that plain decoding would have gone; at least one token a row. The answers so far."""
        nodes, room = verified.tokens.shape[1], self.state.tokens.shape[1]
        self._reserve(nodes, None)
        stops = jnp.asarray(tuple(stop_ids) or (-1,), jnp.int32)
        with self._devices():
            self.state = pure.accept(self.state, verified, stops, room if limit is None else min(limit, room))
        return self._answers()

    def save(self, path: str | os.PathLike) -> None:
        """Writes the session as a directory, whole or not at all; `restore` continues it bit for bit.

        Raises:
          UserError: nothing to save, `path` holds something else, or the disk refuses.
        """
        if self.state is None:
            raise UserError("session: it holds no token yet, expected an extend before save.")
        named = _named(self.state)
        arrays = {f"state.{name}": _words(x) for name, x in named.items()}
        arrays |= {f"held.{row}": held for row, held in enumerate(self._held)}
        about = {
            "format": FORMAT,
            "model": model_fingerprint(self.params),
            "observe": self.observe,
            "kind": self.kind,
            "rows": len(self._held),
            "prefilled": self.prefilled,
            "layout": {name: [list(x.shape), str(x.dtype)] for name, x in named.items()},
        }
        with replacing(Path(path), "session", (ABOUT, ARRAYS)) as staging:
            save_file(arrays, staging / ARRAYS)
            write_json(staging / ABOUT, about)

    @classmethod
    def restore(cls, bundle: Bundle, path: str | os.PathLike) -> "Session":
        """The session that `save` wrote.

        Raises:
          UserError: no such file, no session, or one of another model.
        """
        path = Path(path)
        about = read_json(path / ABOUT)
        counts = [about.get(name) for name in ("rows", "observe", "prefilled")]
        if about.get("format") != FORMAT or not all(type(n) is int and 0 <= n <= 1 << 20 for n in counts):
            raise _no_session(path)
        session = cls(bundle, about["observe"], str(about.get("kind")))
        found = model_fingerprint(session.params)
        if about.get("model") != found:
            raise UserError(
                f"{path}: a session of model {str(about.get('model'))[:12]}, expected {found[:12]}; load the model it was saved "
                "with."
            )
        template = session._template(about, path)
        arrays = _read_arrays(path, _named(template), about["rows"])
        values = [jnp.asarray(arrays[f"state.{name}"].view(np.dtype(x.dtype))) for name, x in _named(template).items()]
        session.state = jax.tree.unflatten(jax.tree.structure(template), values)
        session._held = [arrays[f"held.{row}"] for row in range(about["rows"])]
        session.prefilled = about["prefilled"]
        return session

    def _template(self, about: dict, path: Path) -> SessionState:
        """Shapes and dtypes of a state with the slots and the room that `about` gives, which has to describe just that state."""
        layout = about.get("layout")
        try:
            slots, room = layout["cache.positions"][0][-1], layout["tokens"][0][-1]
            kind_known = self.kind in KINDS and type(slots) is type(room) is int
        except (KeyError, TypeError, IndexError):
            kind_known = False
        if not kind_known or not (0 < slots <= 1 << 22 and 0 <= room <= 1 << 22):
            raise _no_session(path)

        def make(tokens):
            observe = self.observe if "queries" in layout else 0
            state = pure.prefill(self.params, self.config, tokens, tokens, None, tokens, observe, self.kind)
            state = pure.make_room(state, slots - 1, room)
            return state.replace(cache=state.cache.replace(compiled=self._compiled))

        template = jax.eval_shape(make, jax.ShapeDtypeStruct((about["rows"], 1), jnp.int32))
        expected = {name: [list(x.shape), str(x.dtype)] for name, x in _named(template).items()}
        wrong = next((name for name in expected | layout if layout.get(name) != expected.get(name)), None)
        if wrong is not None:
            raise UserError(f"{path}: {wrong[:80]} is {layout.get(wrong)}, expected {expected.get(wrong)} for this model.")
        return template

    def _reserve(self, tokens: int, answer: int | None) -> None:
        """Room for so many more tokens in the cache, and an empty answer of `answer` tokens (None: the answer stays)."""
        missing = int(self.state.next_slot.max()) + tokens - self.state.cache.slots
        slots = bucket(missing, ROOM) if missing > 0 else 0
        if answer is not None:
            self.state = pure.make_room(self.state, slots, answer)
        elif slots:
            self.state = self.state.replace(cache=grow(self.state.cache, slots))

    def _answers(self) -> list[np.ndarray]:
        tokens, counts = np.asarray(self.state.tokens), np.asarray(self.state.counts)
        answers = [row[:n] for row, n in zip(tokens, counts, strict=True)]
        known = np.asarray(self.state.cache.length) - counts  # positions in front of the answer
        self._held = [np.concatenate([h[:n], a]) for h, n, a in zip(self._held, known, answers, strict=True)]
        return answers

    def _devices(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.mesh is None else jax.sharding.set_mesh(self.mesh)

    def _placed(self, tree):
        if self.mesh is None:
            return tree
        return jax.device_put(tree, NamedSharding(self.mesh, P(ROW_AXES)))


def model_fingerprint(params: AndesVL) -> str:
    """sha256 of the small arrays of the network and of its first token embeddings, in any layout: cheap, and another one for
    every training run and adapter."""
    digest = hashlib.sha256()
    digest.update(np.asarray(embed(params.decoder.embedding, jnp.arange(64), "float32")).tobytes())
    digest.update(np.asarray(params.decoder.norm, np.float32).tobytes())
    layers = params.decoder.layers
    stacked = not isinstance(layers, tuple)
    for name in ("attention_norm", "mlp_norm"):
        found = getattr(layers, name) if stacked else jnp.stack([getattr(layer, name) for layer in layers])
        digest.update(np.asarray(found, np.float32).tobytes())
    return digest.hexdigest()


def _identities(sample: Sample) -> np.ndarray:
    """int64 [T]: of a text token its id; of a visual token a number below 0 that names its picture and its place in it."""
    out = sample.tokens.astype(np.int64)
    slots, first = np.flatnonzero(sample.tokens == sample.image_token_id), 0
    for image in sample.images:
        digest = hashlib.sha256(image.patches.tobytes() + repr(image.grid).encode()).digest()
        name = int.from_bytes(digest[:7], "little")
        out[slots[first : first + image.visual_tokens]] = -1 - (name + np.arange(image.visual_tokens))
        first += image.visual_tokens
    return out


def _shared(held: np.ndarray, sample: Sample) -> int:
    """Tokens at the start that are the same, at most all but one of the sample's, and not a part of a picture."""
    wanted = _identities(sample)
    most = min(len(held), len(wanted) - 1)
    differs = np.flatnonzero(held[:most] != wanted[:most])
    same = int(differs[0]) if len(differs) else most
    first = 0
    slots = np.flatnonzero(sample.tokens == sample.image_token_id)
    for image in sample.images:
        start, stop = slots[first], slots[first + image.visual_tokens - 1] + 1
        first += image.visual_tokens
        if start < same < stop:
            return int(start)
    return same


def _rest(sample: Sample, start: int) -> Sample:
    before = int(np.count_nonzero(sample.tokens[:start] == sample.image_token_id))
    images = list(sample.images)
    while before > 0:
        before -= images.pop(0).visual_tokens
    return make_sample(sample.tokens[start:], sample.supervised[start:], images, sample.image_token_id)


def _named(state: SessionState) -> dict[str, jax.Array]:
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in flat}


def _words(x: jax.Array) -> np.ndarray:
    """The bits as integers where NumPy does not know the type."""
    x = np.asarray(x)
    return x.view(f"u{x.itemsize}") if x.dtype.kind == "V" else x


def _no_session(path: Path) -> UserError:
    return UserError(f"{path}: not a session, expected a directory that Session.save wrote.")


def _read_arrays(path: Path, expected: dict[str, jax.ShapeDtypeStruct], rows: int) -> dict[str, np.ndarray]:
    """The arrays of a session, their shapes checked before any is read."""
    try:
        with safe_open(path / ARRAYS, "np") as file:
            for name, x in expected.items():
                if tuple(file.get_slice(f"state.{name}").get_shape()) != x.shape:
                    raise _no_session(path)
            names = [f"state.{name}" for name in expected] + [f"held.{row}" for row in range(rows)]
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise _no_session(path) from error
