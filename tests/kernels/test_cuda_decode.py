"""Do the kernels attend as float64 over what is stored, after any appends? `pytest -m gpu` on a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from turboquant.cache import vector_codec
from turboquant.profiles import profile
from turboquant_kernels.decode import Attention, attend, choose
from turboquant_kernels.decode.unpack import level_table
from turboquant_kernels.packed_kv import PackedKV, Reading, VectorCodec
from turboquant_kernels.packed_kv.store import Half

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
TOLERANCE = 1e-3  # of sum p |v|
POSITIVE = {4: (5, 16, 27, 39, 52, 67, 86, 113), 3: (13, 41, 73, 117), 2: (24, 81), 1: (31,)}


KERNELS = ["gluon"] * HOPPER + ["triton"]


def codecs_of(dim: int, parts: tuple, split: str) -> list[VectorCodec]:
    """Of keys and values; "prod": keys have a sketch of their residual."""
    kinds = ({"kind": "prod"}, {}) if split == "prod" else ({"split": split},) * 2
    return [vector_codec(dim, part, seed=i, **kinds[i]) for i, part in enumerate(parts)]


def normal(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def decoded(half: Half, tokens: int) -> Tensor:
    """The vectors that codes stand for, (B, G, tokens, D) float64."""
    parts, terms = [], iter(half.terms(0, tokens))
    for group in half.codec.groups:
        basis = group.rotation.forward(torch.eye(group.dim, device=DEVICE)).double()
        term = next(terms)
        part = term.coefficients.double() * (term.factors.double()[..., None] / group.dim**0.5)
        if group.sketch is not None:
            signs = next(terms)
            signs = signs.coefficients.double() * signs.factors.double()[..., None]
            part += signs @ group.sketch.matrix.double() * group.sketch.scale
        parts.append(part @ basis.T)
    joined = torch.cat(parts, dim=-1)
    if half.codec.order is None:
        return joined
    channels = half.codec.order.long()[:, None].expand_as(joined)
    return torch.empty_like(joined).scatter_(-1, channels, joined)


def exact(query: Tensor, reading: Reading, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Float64 attention over sinks, raw tokens and decoded codes, and sum p |v|."""
    sides = []
    for half, raw in ((reading.keys, reading.raw_keys), (reading.values, reading.raw_values)):
        coded = raw[:, :, :0].double()
        if int(reading.encoded):
            coded = decoded(half, int(reading.encoded))
        sides.append(torch.cat([half.sinks.double(), raw.double(), coded], dim=2))
    batch = query.shape[0]
    first = torch.zeros(batch, device=DEVICE) if reading.first is None else reading.first
    number = (int(reading.before) + torch.arange(reading.queries, device=DEVICE))[None, :, None]
    start, window = int(reading.raw_start), reading.window
    begin = first[:, None, None]
    sink = begin + torch.arange(reading.sinks, device=DEVICE)
    raw_token = reading.raw_tokens[None, None]
    token = torch.arange(int(reading.encoded), device=DEVICE)[None, None]
    near = (number - raw_token < window) | (reading.held is None) | (reading.rule == "raw")
    far = (number - token >= window) & (reading.rule == "codes")
    after = begin + reading.sinks
    seen = [
        (sink <= number).expand(batch, reading.queries, -1),
        (raw_token >= start) & (raw_token >= after) & (raw_token <= number) & near,
        (token >= after) & ((token < start) | far),
    ]
    mask = torch.cat([s.expand(batch, reading.queries, -1) for s in seen], dim=2)[:, None]
    repeats = query.shape[1] // sides[0].shape[1]
    keys, values = (x.repeat_interleave(repeats, dim=1).nan_to_num(0.0) for x in sides)
    scores = query.double() @ keys.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    p = scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0.0)
    return p @ values, (p * values.norm(dim=-1)[:, :, None]).sum(-1, keepdim=True)


def error(attention: Attention, query: Tensor, reading: Reading, softcap: float | None = None) -> float:
    scale = query.shape[-1] ** -0.5
    # In float32, so that the output's own rounding is not counted.
    found = attention(query, reading, scale=scale, softcap=softcap)
    best = "gluon" if HOPPER else "triton"
    assert attention.decoding == (best if attention.backend == "auto" else attention.backend)
    expected, total = exact(query, reading, scale, softcap)
    resolution = torch.finfo(query.dtype).eps / 2 * expected.norm(dim=-1, keepdim=True)
    off = (found.double() - expected).norm(dim=-1, keepdim=True) - resolution
    return float((off / total).max())


CASES = [
    ((((128, 4),), ((128, 4),)), 4, torch.bfloat16, "oblivious"),
    ((((128, 3),), ((128, 3),)), 7, torch.float32, "oblivious"),
    ((((128, 2),), ((128, 2),)), 1, torch.float16, "oblivious"),
    ((((64, 4),), ((64, 2),)), 4, torch.bfloat16, "oblivious"),
    ((((256, 4),), ((256, 4),)), 2, torch.bfloat16, "oblivious"),
    ((((128, 1),), ((128, 1),)), 16, torch.float16, "oblivious"),
    ((((96, 4),), ((96, 3),)), 3, torch.bfloat16, "oblivious"),
    ((((256, 3),), ((256, 2),)), 13, torch.bfloat16, "oblivious"),
    *(
        (parts, groups, dtype, split)
        for parts, groups, dtype in (
            ((((32, 4), (96, 3)),) * 2, 2, torch.bfloat16),
            ((((32, 3), (96, 2)),) * 2, 8, torch.float32),
            ((((64, 4), (64, 3)), ((128, 2),)), 1, torch.float16),
            ((((128, 4),), ((32, 3), (96, 2))), 4, torch.bfloat16),
            ((((32, 4), (32, 3)),) * 2, 2, torch.bfloat16),
            ((((64, 4), (192, 3)),) * 2, 2, torch.bfloat16),
        )
        for split in ("outlier", "oblivious")
    ),
    *(
        (((keys,), (values,)), groups, dtype, "prod")
        for keys, values, groups, dtype in (
            ((128, 4), (128, 4), 4, torch.bfloat16),
            ((128, 2), (128, 2), 16, torch.float32),
            ((64, 5), (64, 4), 1, torch.float16),
            ((256, 3), (256, 3), 8, torch.bfloat16),
        )
    ),
]


STORES = list(itertools.product([(128, 4), (0, 0), (33, 0)], [None, 6000]))


# What takes the time is compiling, for each case and number of rows: so each case is kept in one store, and
# only the first sees as many new tokens at once as there may be.
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("parts", "groups", "dtype", "split", "several", "window", "sinks", "capacity"),
    [
        (*case, 8 if i == 0 else max(1, 4 // case[1]), *kept, capacity)
        for i, case in enumerate(CASES)
        for kept, capacity in [STORES[(i + i // 2) % len(STORES)]]
    ],
    ids=str,
)
def test_against_float64(kernel, parts, split, groups, dtype, several, window, sinks, capacity) -> None:
    dim = sum(width for width, _ in parts[0])
    kv = PackedKV(*codecs_of(dim, parts, split), window=window, sinks=sinks, capacity=capacity)
    total = 5000
    keys, values = (normal(2, 2, total, dim, seed=s, dtype=dtype) for s in (1, 2))
    keys[:, :, :, 5:dim:7] *= 4  # outlier channels
    query = normal(2, 2 * groups, total, dim, seed=3, dtype=dtype)
    attention = choose(kernel)
    kv.pad(torch.tensor([0, 17], device=DEVICE))
    start = 0
    capped = 5.0 if sinks else None
    for count, softcap in (
        (50, None),
        (1, None),
        (several, None),
        (1500, None),
        (1, capped),
        (3300, None),
        (1, None),
    ):
        part = slice(start, start + count)
        reading = kv.update(keys[:, :, part], values[:, :, part])
        if count <= 8:
            assert error(attention, query[:, :, part], reading, softcap) < TOLERANCE
        start += count
    kv.crop(70)
    part = slice(start - 70, start - 70 + several)
    assert error(attention, query[:, :, part], kv.update(keys[:, :, part], values[:, :, part])) < TOLERANCE
    reading = kv.update(keys[:, :, :several], values[:, :, :several], "raw")
    assert error(attention, query[:, :, :several], reading) < TOLERANCE


@pytest.mark.parametrize("capacity", [None, 2000])
@pytest.mark.parametrize(("bits", "dim"), [((4, 3), 128), ((3, 4), 64), ((2, 1), 256), ((1, 2), 128)])
def test_appended_codes_are_the_cpus_bytes(bits, dim, capacity) -> None:
    """One launch a half on the device, plain torch on the CPU."""
    keys, values = (normal(2, 2, 1000, dim, seed=s, dtype=torch.bfloat16) for s in (1, 2))
    keys[:, :, :, 7] *= 20
    keys[0, 1, 490] = 0
    values[1, 0, 491, 3] = torch.inf
    stores = []
    for device in ("cpu", DEVICE):
        codecs = (vector_codec(dim, ((dim, b),), seed=b) for b in bits)
        kv = PackedKV(*codecs, window=40, sinks=3, capacity=capacity)
        start = 0
        for count in (400, *[1] * 300, 200, *[1] * 100):
            part = (x[:, :, start : start + count].to(device) for x in (keys, values))
            kv.update(*part)
            start += count
        stores.append(kv)
    for a, b in ((stores[0].keys, stores[1].keys), (stores[0].values, stores[1].values)):
        for x, y in zip(a.tensors(), b.tensors(), strict=True):
            assert torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8).cpu())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("parts", "split"),
    [
        (((128, 4),), "outlier"),
        (((32, 4), (96, 3)), "outlier"),
        (((32, 3), (96, 2)), "oblivious"),
        (((128, 4),), "prod"),
    ],
)
def test_a_captured_step_goes_on_as_an_eager_one(kernel, parts, split) -> None:
    def store(capacity: int | None) -> PackedKV:
        made = PackedKV(*codecs_of(128, (parts, parts), split), window=32, capacity=capacity)
        made.update(keys[:, :, :1000], values[:, :, :1000])
        return made

    keys, values = (normal(1, 2, 1100, 128, seed=s, dtype=torch.bfloat16) for s in (1, 2))
    query = normal(1, 8, 1100, 128, seed=3, dtype=torch.bfloat16)
    attention, eager, fixed = choose(kernel), store(None), store(2000)
    inputs = [x[:, :, :1].clone() for x in (query, keys, values)]

    def step() -> Tensor:
        return attention(inputs[0], fixed.update(inputs[1], inputs[2]), scale=0.1)

    def feed(t: int) -> None:
        for held, x in zip(inputs, (query, keys, values), strict=True):
            held.copy_(x[:, :, t : t + 1])

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for t in range(1000, 1003):
            feed(t)
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for t in range(1000, 1003):
        eager.update(keys[:, :, t : t + 1], values[:, :, t : t + 1])
    for t in range(1003, 1100):
        feed(t)
        graph.replay()
        reading = eager.update(keys[:, :, t : t + 1], values[:, :, t : t + 1])
        assert (out - attend(query[:, :, t : t + 1], reading, scale=0.1)).abs().max() < 4e-3
    assert int(fixed.length) == 1100


@pytest.mark.parametrize(
    "name",
    ["conservative", "aggressive", "conservative-oblivious", "aggressive-oblivious", "unbiased-keys", "4"],
)
def test_what_users_get_runs_on_the_kernel(name) -> None:
    """`auto` takes it for the profiles' codecs, and says so."""
    chosen = profile(name)
    parts = tuple(chosen.parts(bits, 128) for bits in (chosen.key_bits, chosen.value_bits))
    codecs = codecs_of(128, parts, "prod" if chosen.key_kind == "prod" else chosen.split)
    kv = PackedKV(*codecs, window=chosen.window, sinks=chosen.sinks)
    keys, values, query = (
        normal(1, heads, 700, 128, seed=heads, dtype=torch.bfloat16) for heads in (2, 2, 8)
    )
    kv.update(keys[:, :, :699], values[:, :, :699])
    attention = choose("auto")
    assert error(attention, query[:, :, 699:], kv.update(keys[:, :, 699:], values[:, :, 699:])) < TOLERANCE
    assert attention.reason is None
    assert kv.encoding == "triton"


@pytest.mark.parametrize("bits", [5, 6, 7, 8])
def test_more_bits_run_on_torch_and_say_why(bits) -> None:
    kv = PackedKV(*(vector_codec(128, ((128, bits),), seed=s) for s in (1, 2)), window=16, sinks=2)
    keys, values, query = (normal(2, heads, 900, 128, seed=heads, dtype=torch.float32) for heads in (2, 2, 8))
    kv.update(keys[:, :, :899], values[:, :, :899])
    reading = kv.update(keys[:, :, 899:], values[:, :, 899:])
    attention = choose("auto")
    found = attention(query[:, :, 899:], reading, scale=0.1)
    expected, total = exact(query[:, :, 899:], reading, 0.1, None)
    assert float(((found.double() - expected).norm(dim=-1, keepdim=True) / total).max()) < TOLERANCE
    assert attention.decoding == "torch"
    assert "of 1, 2, 3 or 4 bits" in str(attention.reason)
    for kernel in KERNELS:
        with pytest.raises(ValueError, match="cannot do this decoding step: keys must have"):
            choose(kernel)(query[:, :, 899:], reading, scale=0.1)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_instructions_look_up_what_their_twin_does(bits) -> None:
    """Inline assembly on the device, and the plain operations that stand for it in the interpreter."""
    from look_up import look_up  # needs triton, which a CPU may lack

    source = torch.Generator().manual_seed(bits)
    words = torch.randint(-(2**31), 2**31, (500, bits, 32), generator=source).int().to(DEVICE)
    table = torch.tensor(level_table(POSITIVE[bits], bits), dtype=torch.int32, device=DEVICE)
    found = []
    for assembly in (True, False):
        quads = torch.full((500, 32, 8), 0x7F7F7F7F, dtype=torch.int32, device=DEVICE)
        look_up[(500,)](words, table, quads, BITS=bits, ASM=assembly, num_warps=1)
        found.append(quads)
    assert torch.equal(*found)
    # Every level there is, and no other byte.
    levels = {x for level in POSITIVE[bits] for x in (level, -1 - level)}
    assert set(found[0].view(torch.int8).unique().tolist()) == levels
