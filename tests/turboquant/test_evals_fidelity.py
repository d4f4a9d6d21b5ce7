"""Are captured queries the model's own, and the measures those of their definitions?"""

import dataclasses

import pytest
import torch
from evals_material import DIM, TEXT, tiny, tokenizer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from turboquant.evals import fidelity as module
from turboquant.evals.arms import arms
from turboquant.evals.fidelity import Observed, compare, fidelity, observe
from turboquant.evals.guards import GuardError
from turboquant.evals.niah import text_ids
from turboquant.evals.prefix import prefill
from turboquant.evals.records import intact

SETTINGS = {"context": 200, "segments": 2, "queries": 8, "text": TEXT}


def run(names=("exact", "tq4", "tq2", "int2"), **changes):
    return list(fidelity(tiny(), tokenizer(), arms(names, window=16), **(SETTINGS | changes)))


def test_queries_are_those_of_the_model_after_rope():
    ids = text_ids(tokenizer(), TEXT)[None, :208]
    prefix = prefill(tiny(), ids[:, :200])
    before = tiny().config._attn_implementation
    seen = observe(tiny(), prefix, ids[:, 200:])
    assert tiny().config._attn_implementation == before
    assert prefix.cache.get_seq_length() == 200
    with torch.no_grad():
        layer = tiny().model.layers[0]
        hidden = layer.input_layernorm(tiny().model.embed_tokens(ids))
        query, key = (
            project(hidden).view(1, 208, -1, DIM).transpose(1, 2)
            for project in (layer.self_attn.q_proj, layer.self_attn.k_proj)
        )
        cos, sin = tiny().model.rotary_emb(hidden, torch.arange(208)[None])
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
    assert torch.allclose(seen[0].queries, query[:, :, 200:], atol=1e-5)
    assert torch.allclose(seen[0].keys, key, atol=1e-5)
    assert seen[0].scaling == DIM**-0.5


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_measures_are_those_of_their_definitions(softcap):
    """Against loops over heads and queries."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 3, 16, generator=generator)
    keys, values, noise = torch.randn(3, 1, 2, 20, 16, generator=generator).unbind()
    keys_read, values_read = keys + 0.3 * noise, values + 0.1 * noise
    found = compare(Observed(query, keys, values, 0.25, softcap), keys_read, values_read)
    for head in range(4):
        kl, top1, top5, cosine, error, energy = [], [], [], [], 0.0, 0.0
        for i in range(3):
            seen = 20 - 3 + i + 1
            q = query[0, head, i].double()
            raw, read = (x[0, head // 2, :seen].double() @ q * 0.25 for x in (keys, keys_read))
            if softcap is not None:
                raw, read = (softcap * (x / softcap).tanh() for x in (raw, read))
            p, p_read = raw.softmax(0), read.softmax(0)
            kl.append(float((p * (p / p_read).log()).sum()))
            top1.append(float(raw.argmax() == read.argmax()))
            top5.append(float(raw.argmax() in read.topk(5).indices))
            cosine.append(float(torch.nn.functional.cosine_similarity(raw, read, 0)))
            out = p @ values[0, head // 2, :seen].double()
            difference = out - p_read @ values_read[0, head // 2, :seen].double()
            error, energy = error + float(difference.square().sum()), energy + float(out.square().sum())
        for name, expected in (("kl", kl), ("top1", top1), ("top5", top5), ("cosine", cosine)):
            assert float(found[name][0, head]) == pytest.approx(sum(expected) / 3, rel=1e-4), name
        assert float(found["output_error"][0, head]) == pytest.approx(error / energy, rel=1e-4)


def test_fewer_bits_look_elsewhere_more():
    kl, top = {}, {}
    for record in intact(run()):
        assert len(record.kl) == len(record.top5) == 4
        kl.setdefault(record.arm, []).extend(record.kl)
        top.setdefault(record.arm, []).extend(record.top1)
        assert all(one <= five for one, five in zip(record.top1, record.top5, strict=True))
    assert max(kl["exact"]) == 0
    assert min(top["exact"]) == 1
    assert sum(kl["tq4"]) < sum(kl["tq2"]) < sum(kl["int2"])
    assert sum(top["tq4"]) > sum(top["tq2"]) > sum(top["int2"])


def test_a_high_cosine_before_softmax_goes_with_another_top_token():
    """Why the cosine is no measure: keys share a mean, which every query meets, and softmax does not see."""
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(1, 1, 8, 16, generator=generator) + 3
    mean = torch.full((16,), 3.0)
    keys, noise = torch.randn(2, 1, 1, 200, 16, generator=generator).unbind()
    found = compare(Observed(query, keys + mean, keys, 0.25), keys + mean + noise, keys)
    assert float(found["cosine"]) > 0.97
    assert float(found["top1"]) < 0.6


class KeysForQueries:
    """The observer, giving the last keys of each head as its queries."""

    def __init__(self, context):
        self.context = context

    def __enter__(self):
        self.given = self.context.__enter__()
        return self

    def __exit__(self, *error):
        return self.context.__exit__(*error)

    def __getitem__(self, layer):
        seen = self.given[layer]
        queries = seen.keys[:, :, -seen.queries.shape[2] :].repeat_interleave(2, dim=1)
        return dataclasses.replace(seen, queries=queries)


def test_a_query_replaced_by_a_key_is_seen(monkeypatch):
    real = module._observer
    monkeypatch.setattr(module, "_observer", lambda model: KeysForQueries(real(model)))
    with pytest.raises(GuardError, match="a query equals a key"):
        run()


def test_finished_records_are_left_out_and_a_broken_arm_says_so():
    whole = run(("exact", "evals_material:NoReads@4"))
    broken = [r for r in whole if r.arm != "exact"]
    assert len(broken) == len(whole) - len(broken) == 4
    assert all("nothing was compressed" in r.broken and r.kl is r.top1 is None for r in broken)
    done = {r.key for r in whole[:-1]}
    assert [r.key for r in run(("exact", "evals_material:NoReads@4"), done=done)] == [whole[-1].key]
    assert run(("exact", "evals_material:NoReads@4"), done={r.key for r in whole}) == []
