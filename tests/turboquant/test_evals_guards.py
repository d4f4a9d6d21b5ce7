"""Is every way in which cache evaluations have fooled themselves seen, and a good run left alone?"""

import copy
import functools

import numpy as np
import pytest
import torch
from evals_material import (
    DIM,
    TEXT,
    ForgetsPrefill,
    KeepsDense,
    QuantizerCodec,
    codec_arm,
    layer_arm,
    tiny,
    tokenizer,
)
from transformers.cache_utils import DynamicCache

from turboquant.evals.arms import Arm, arm, arms
from turboquant.evals.guards import (
    GuardError,
    check_growth,
    check_later,
    check_queries,
    reachable_bytes,
    tensors_of,
)
from turboquant.evals.niah import niah
from turboquant.evals.records import intact
from turboquant.quantizers import MseQuantizer, ProdQuantizer, SplitQuantizer
from turboquant.rival_caches import CodecLayer, Int
from turboquant.rivals import released_split


def run(one, context=600, model=None, **changes):
    """The records of an arm beside the exact one's, which no fault of the arm may touch."""
    told = list(
        niah(
            model or tiny(), tokenizer(), [arm("exact"), one], context=context, trials=2, text=TEXT, **changes
        )
    )
    assert [r.broken for r in told if r.arm == "exact"] == [None, None]
    return [r for r in told if r.arm == one.name]


def reason(one, **changes):
    records = run(one, **changes)
    assert records[0].broken == records[1].broken
    assert all(r.correct is r.nll is r.stored_bytes is r.compressed_share is None for r in records)
    with pytest.raises(GuardError, match="is broken"):
        intact(records)
    return records[0].broken


def test_a_sound_arm_passes():
    records = intact(run(codec_arm("sound", Int(4))))
    assert all(r.compressed_share == pytest.approx(584 / 600) for r in records)  # all but the window


def test_both_arms_the_same_generation():
    same = Arm("4-bit", 4, 4, 16, lambda config, *_: DynamicCache(config=config), arm("exact").count)
    assert "to the bit" in reason(same)


def test_needle_inside_the_window():
    """The arm says that it keeps 16 tokens raw; it keeps 500."""
    wide = layer_arm("wide", lambda: CodecLayer(Int(4), Int(4), 500))
    assert "inside the uncompressed window" in reason(wide, depths=[1.0])


def test_scored_tokens_from_a_raw_prefill():
    assert "raw keys and values" in reason(layer_arm("forgets", ForgetsPrefill))
    with pytest.raises(GuardError, match="holds 0 tokens"):
        check_later("arm", 0, 0)


def test_dense_copy_kept():
    assert "dense copy" in reason(layer_arm("dense", KeepsDense))


def test_a_ratio_that_forgets_head_dim():
    """The count of a public project: tokens * bits / 8 + 2 bytes a token, of each layer and head."""

    def count(cache):
        return sum(2 * 2 * 2 * layer.get_seq_length() * (4 / 8 + 2) for layer in cache.layers)

    assert "a formula stands in for a count" in reason(codec_arm("formula", Int(4), count=count))


def test_a_count_that_leaves_out_rows():
    """Too little to be the codes, though no more is held than tables may take."""
    few = codec_arm("few", Int(4), count=lambda cache: 1000)
    assert "fewer than the" in reason(few, context=200)


def test_query_replaced_by_a_key():
    keys = torch.randn(1, 2, 50, DIM)
    queries = torch.randn(1, 4, 3, DIM)
    check_queries(queries, keys)
    queries[0, 2, 1] = keys[0, 1, -1]
    with pytest.raises(GuardError, match="keys to keys"):
        check_queries(queries, keys)


def test_decode_tokens_never_quantized():
    coded = torch.ones(2, 1, 100, dtype=torch.bool)
    coded[:, :, 80:] = False
    check_growth("arm", coded, window=16)
    with pytest.raises(GuardError, match="never quantized"):
        check_growth("arm", torch.zeros(2, 1, 100, dtype=torch.bool), window=16)
    coded[0] = False  # a protected layer may be raw
    check_growth("arm", coded, window=16)


def law_arm(quantizer, law, least):
    return codec_arm("law", QuantizerCodec(quantizer), bits=1, laws=(law, law), least_bits=least)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_our_quantizers_obey_their_law(bits):
    intact(run(law_arm(MseQuantizer(DIM, bits, seed=1), "mse", bits)))
    intact(run(law_arm(ProdQuantizer(DIM, bits, seed=1), "prod", bits)))


@pytest.mark.parametrize("parts", [((32, 4), (96, 3)), ((32, 3), (96, 2)), ((64, 4), (64, 3))])
def test_codebook_scaled_for_the_wrong_dimension(parts):
    """As released: both parts of a split have the levels of the whole vector's dimension."""
    model, least = tiny(layers=4, kv_heads=4, dim=128), parts[1][1]
    intact(run(law_arm(SplitQuantizer(128, parts, seed=1), "mse", least), model=model))
    faulty = law_arm(released_split(128, parts, seed=1), "mse", least)
    assert "levels scaled for another dimension" in reason(faulty, model=model)


def test_an_arm_that_stores_fewer_bits_than_it_says():
    """3 bits that are called 5 have the error of 3."""
    assert "above twice Theorem 1's bound for 5 bits" in reason(
        law_arm(MseQuantizer(DIM, 3, seed=1), "mse", 5)
    )


def test_an_arm_that_runs_out_of_memory_is_broken_alone():
    class OutOfMemory(CodecLayer):
        def __init__(self):
            super().__init__(Int(4), Int(4), 16)

        def update(self, *_, **__):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 TiB.\nmore")

    assert (
        reason(layer_arm("big", OutOfMemory))
        == "OutOfMemoryError: CUDA out of memory. Tried to allocate 9 TiB."
    )


def test_reads_of_another_type_or_length_are_named():
    class Double(CodecLayer):
        def __init__(self):
            super().__init__(Int(4), Int(4), 16)

        def update(self, key_states, value_states, *args, **kwargs):
            return tuple(x.double() for x in super().update(key_states, value_states))

    class Short(Double):
        def update(self, key_states, value_states, *args, **kwargs):
            return tuple(x[:, :, 1:] for x in CodecLayer.update(self, key_states, value_states))

    assert "returned torch.float64 on cpu to a model that computes in torch.float32" in reason(
        layer_arm("double", Double)
    )
    assert "returned keys or values of shape" in reason(layer_arm("short", Short))


def test_logits_that_are_not_finite_are_broken():
    class Nan(CodecLayer):
        def __init__(self):
            super().__init__(Int(4), Int(4), 16)

        def update(self, key_states, value_states, *args, **kwargs):
            return tuple(x * float("nan") for x in super().update(key_states, value_states))

    assert "not finite" in reason(layer_arm("nan", Nan))


def test_every_tensor_that_can_be_reached_counts_once():
    x, array = torch.zeros(100), np.zeros(50)

    class Slotted:
        __slots__ = ("held",)

        def __init__(self, held):
            self.held = held

    module = torch.nn.Linear(3, 2)
    inner = torch.zeros(7)

    def closure():
        return inner

    thing = {
        "view": x[:3],
        "again": [x, (x,)],
        "array": array[:2],
        "slots": Slotted(torch.zeros(5)),
        "module": module,
        "closure": closure,
        "partial": functools.partial(print, torch.zeros(11)),
        "method": Slotted(torch.zeros(13)).__init__,
    }
    thing["self"] = thing
    expected = 4 * (100 + 5 + (6 + 2) + 7 + 11 + 13) + 8 * 50
    assert reachable_bytes(thing) == expected
    assert reachable_bytes(thing, [x, *module.parameters()]) == expected - 4 * (100 + 8)
    assert len(tensors_of([x, x])) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_lower_precision_pass(dtype):
    """Rounding of what is read to the model's type is no fault."""
    model = copy.deepcopy(tiny()).to(dtype)
    names = ["fp8", "int4", "kivi2", "tq4", "tq8", "tq2.5", "tq3-prod"]
    records = intact(niah(model, tokenizer(), arms(names, window=16), context=600, trials=2, text=TEXT))
    assert len(records) == 2 * 8
    exact, fp8 = (next(r for r in records if r.arm == name) for name in ("exact", "fp8"))
    assert exact.stored_bits == 16
    assert fp8.stored_bits == pytest.approx((584 * (8 + 16 / DIM) + 16 * 16) / 600)
