"""Which adapters may share one stack."""

import jax
import jax.numpy as jnp
import pytest
from tiny import tiny_config, tiny_params

from andesvl_jax.errors import UserError
from andesvl_jax.weights import Adapt, Int8, Quantize, Rule, represent, stack_adapters

CONFIG = tiny_config()
IDS = jnp.zeros(2, jnp.int32)


def adapter(params, rank=2, pattern=r"decoder\.layers\.q", seed=0):
    return represent(params, [Rule(pattern, Adapt(rank, 4.0))], jax.random.key(seed))


def test_adapters_that_do_not_belong_together_are_refused():
    params, others = tiny_params(CONFIG), tiny_params(CONFIG, seed=1)
    first = adapter(params)
    elsewhere = params.replace(projector=others.projector)
    packed = represent(params, [Rule(r"decoder\.layers\.q", Quantize(Int8()))])
    for adapters, message in (
        ([], "at least one"),
        ([first, adapter(params, rank=3)], r"decoder\.layers\.q: the adapters have ranks 2, 3, expected one rank"),
        ([first, adapter(params, pattern=r"decoder\.layers\.k")], "different weights"),
        ([first, adapter(packed)], "another kind"),
        ([first, adapter(others)], "different (base|weight)s"),
        ([first, adapter(elsewhere)], r"projector\.fc1: the adapters have different weights"),
        ([stack_adapters([first, first], IDS)] * 2, "found a stack of adapters"),
    ):
        with pytest.raises(UserError, match=message):
            stack_adapters(adapters, IDS)


def test_equal_bases_that_were_loaded_twice_are_one_base():
    stacked = stack_adapters([adapter(tiny_params(CONFIG)), adapter(tiny_params(CONFIG), seed=1)], IDS)
    assert stacked.decoder.layers.q.a.shape[1] == 2
