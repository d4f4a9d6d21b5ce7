"""Do the quantizers follow their exact laws, keep every shape and byte, and refuse what they cannot do?"""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from turboquant import theory
from turboquant.codebook import codebook, grid_codebook
from turboquant.quantizers import (
    Codes,
    MseQuantizer,
    ProdQuantizer,
    SplitQuantizer,
    _Scratch,
    quantizer_of,
)

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
MAKERS = {
    "mse": lambda d, b, s: MseQuantizer(d, b, seed=s),
    "mse-gaussian": lambda d, b, s: MseQuantizer(d, b, seed=s, codebook="gaussian"),
    "mse-unbiased": lambda d, b, s: MseQuantizer(d, b, seed=s, rescale="unbiased"),
    "mse-least": lambda d, b, s: MseQuantizer(d, b, seed=s, rescale="mse"),
    "mse-identity": lambda d, b, s: MseQuantizer(d, b, seed=s, rotation="identity"),
    "prod": lambda d, b, s: ProdQuantizer(d, b, seed=s),
    "prod-orthogonal": lambda d, b, s: ProdQuantizer(d, b, seed=s, sketch="orthogonal"),
    "prod-constant": lambda d, b, s: ProdQuantizer(d, b, seed=s, residual_norm="constant"),
    "split": lambda d, b, s: SplitQuantizer(d, [(1, b), (d - 1, max(b - 1, 1))], seed=s, split="oblivious"),
}


def vectors(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(x, estimate):
    return ((estimate - x) ** 2).sum(-1) / (x * x).sum(-1)


def deviation(values, expected):
    """How many standard errors the mean of independent values lies from what is expected."""
    values = torch.tensor(values, dtype=torch.float64)
    return abs(values.mean().item() - expected) / (values.std().item() / math.sqrt(len(values)))


@given(
    maker=st.sampled_from(sorted(MAKERS)),
    dim=st.integers(2, 40),
    bits=st.integers(1, 8),
    lead=st.lists(st.integers(0, 3), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 5),
)
@settings(max_examples=150, deadline=None)
def test_any_shape_type_width_and_dimension(maker, dim, bits, lead, dtype, seed):
    quantizer = MAKERS[maker](dim, bits, seed)
    x = vectors(*lead, dim).to(dtype)
    codes = quantizer.encode(x)
    estimate = quantizer.decode(codes)
    assert estimate.shape == x.shape == codes.shape
    assert estimate.dtype == torch.float32
    assert torch.isfinite(estimate).all()
    assert codes.nbytes == sum(t.numel() * t.element_size() for t in codes.tensors.values())
    again = MAKERS[maker](dim, bits, seed).encode(x)
    assert all(torch.equal(again.tensors[name], t) for name, t in codes.tensors.items())
    y = vectors(4, dim, seed=1)
    scores = quantizer.inner_product(y, codes)
    assert scores.shape == (4, *lead)
    torch.testing.assert_close(scores, torch.tensordot(y, estimate, dims=([-1], [-1])), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("bits", "dim", "expected"), [(1, 128, 20), (3, 128, 52), (4, 128, 68), (3, 5, 6), (8, 2, 6)]
)
def test_bytes_are_those_of_packed_codes_and_a_norm(bits, dim, expected):
    assert MseQuantizer(dim, bits, seed=0).encode(vectors(10, dim)).nbytes == 10 * expected


def test_bytes_of_the_other_layouts():
    x = vectors(10, 128)
    assert ProdQuantizer(128, 3, seed=0).encode(x).nbytes == 10 * (48 + 8)
    assert ProdQuantizer(128, 3, seed=0, residual_norm="constant").encode(x).nbytes == 10 * (48 + 4)
    parts = ((32, 4), (96, 3))
    assert SplitQuantizer(128, parts, seed=0).encode(x).nbytes == 10 * (52 + 8)
    oblivious = SplitQuantizer(128, parts, seed=0, split="oblivious")
    assert oblivious.encode(x).nbytes == 10 * (52 + 4)
    assert oblivious.nominal_bits == oblivious.bits == 3.25


@pytest.mark.parametrize("dim", [2, 3, 64, 128])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["sphere", "gaussian", "grid"])
def test_codes_are_exact_at_thresholds(bits, dim, kind):
    """A code is the number of thresholds <= z, on, beside and far from them."""
    if kind == "grid" and bits > theory.GRID_MAX_BITS:
        return
    quantizer = MseQuantizer(dim, bits, seed=0, codebook=kind)
    book = {"sphere": codebook(bits, dim), "gaussian": codebook(bits, None)}.get(kind) or grid_codebook(
        bits, dim
    )
    edges = book.thresholds
    infinity = torch.tensor(math.inf)
    z = torch.cat(
        [edges, edges.nextafter(infinity), edges.nextafter(-infinity), 3 * vectors(4001), vectors(99) * 1e-30]
    )
    z = torch.cat([z, -z, torch.tensor([0.0, -0.0, 60.0, -60.0])])
    z = z[: len(z) // dim * dim].view(-1, dim)
    scratch = _Scratch(quantizer.device)
    found = quantizer._levels(quantizer._round(z, scratch), scratch)
    expected = book.centroids[(z[..., None] >= edges).sum(-1)]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rotation", ["haar", "hadamard"])
@pytest.mark.parametrize(("bits", "dim"), [(1, 64), (2, 64), (4, 64), (3, 8)])
def test_distortion_follows_its_law(bits, dim, rotation, device):
    x = vectors(500, dim)
    found = []
    for seed in range(20):
        quantizer = MseQuantizer(dim, bits, seed=seed, rotation=rotation, device=device)
        found.append(relative_error(x, quantizer.decode(quantizer.encode(x)).cpu()).mean().item())
    assert deviation(found, theory.distortion(bits, dim)) < 5
    assert deviation(found, 1.03 * theory.distortion(bits, dim)) > 5  # the test would see 3 %


def test_grid_codebook_states_its_own_distortion():
    x = vectors(4000, 64)
    quantizer = MseQuantizer(64, 4, seed=0, codebook="grid")
    found = relative_error(x, quantizer.decode(quantizer.encode(x))).mean().item()
    assert found == pytest.approx(grid_codebook(4, 64).distortion, rel=0.02)
    assert grid_codebook(4, 64).distortion > codebook(4, 64).distortion


@pytest.mark.parametrize("sketch", ["gaussian", "orthogonal"])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_inner_products_are_unbiased_and_follow_their_law(bits, sketch):
    dim, n = 32, 400
    x = torch.nn.functional.normalize(vectors(n, dim), dim=-1)
    slopes, errors = [], []
    for seed in range(40):
        quantizer = ProdQuantizer(dim, bits, seed=seed, sketch=sketch)
        estimate = quantizer.decode(quantizer.encode(x))
        slopes.append((estimate * x).sum(-1).mean().item())
        y = torch.nn.functional.normalize(vectors(n, dim, seed=100 + seed), dim=-1)
        errors.append(((y * (estimate - x)).sum(-1) ** 2).mean().item())
    assert deviation(slopes, 1.0) < 5
    assert deviation(errors, theory.prod_distortion(bits, dim, sketch)) < 5


def test_the_plain_quantizer_shrinks_and_rescaling_mends_it():
    dim, bits = 32, 2
    x = torch.nn.functional.normalize(vectors(400, dim), dim=-1)
    y = torch.nn.functional.normalize(x + 0.1 * vectors(400, dim, seed=1), dim=-1)
    true = (x * y).sum(-1)
    slopes = {"none": [], "unbiased": []}
    for seed in range(40):
        for rescale, found in slopes.items():
            quantizer = MseQuantizer(dim, bits, seed=seed, rescale=rescale)
            estimate = (quantizer.decode(quantizer.encode(x)) * y).sum(-1)
            found.append(((estimate * true).sum() / (true * true).sum()).item())
    assert deviation(slopes["none"], 1 - theory.distortion(bits, dim)) < 5
    assert deviation(slopes["none"], 1.0) > 20
    assert deviation(slopes["unbiased"], 1.0) < 5


def test_rescaling_for_least_error_has_the_least_error():
    x = vectors(500, 64)
    found = {}
    for rescale in ("none", "unbiased", "mse"):
        quantizer = MseQuantizer(64, 3, seed=0, rescale=rescale)
        found[rescale] = relative_error(x, quantizer.decode(quantizer.encode(x)))
    assert (found["mse"] <= found["none"] + 1e-6).all()
    assert (found["mse"] <= found["unbiased"] + 1e-6).all()


def test_constant_residual_norm_is_the_exact_law_s():
    assert ProdQuantizer(64, 3, seed=0, residual_norm="constant")._residual == pytest.approx(
        math.sqrt(theory.distortion(2, 64))
    )


def test_split_gives_each_group_its_own_law():
    x = vectors(6000, 128)
    own = SplitQuantizer(128, ((32, 3), (96, 2)), seed=0)
    whole = SplitQuantizer(128, ((32, 3), (96, 2)), seed=0, part_dim="whole")
    oblivious = SplitQuantizer(128, ((32, 3), (96, 2)), seed=0, split="oblivious")
    first, rest = slice(0, 32), slice(32, 128)
    estimate = own.decode(own.encode(x))
    assert relative_error(x[:, first], estimate[:, first]).mean() == pytest.approx(
        theory.distortion(3, 32), rel=0.03
    )
    assert relative_error(x[:, rest], estimate[:, rest]).mean() == pytest.approx(
        theory.distortion(2, 96), rel=0.03
    )
    estimate = whole.decode(whole.encode(x))  # the released code's fault: nearly four times the distortion
    assert relative_error(x[:, first], estimate[:, first]).mean() == pytest.approx(0.1258, rel=0.03)
    expected = (32 * theory.distortion(3, 128) + 96 * theory.distortion(2, 128)) / 128
    assert relative_error(x, oblivious.decode(oblivious.encode(x))).mean() == pytest.approx(
        expected, rel=0.03
    )


@pytest.mark.parametrize("kind", ["mse", "prod"])
def test_split_puts_named_channels_first(kind):
    x = vectors(500, 16)
    x[:, [11, 3]] *= 100
    quantizer = SplitQuantizer(16, ((2, 8), (14, 1)), seed=0, kind=kind, channels=[11, 3])
    error = (quantizer.decode(quantizer.encode(x)) - x).pow(2).mean(0)
    assert error[[11, 3]].max() < 10
    blind = SplitQuantizer(16, ((2, 8), (14, 1)), seed=0, kind=kind)
    assert (blind.decode(blind.encode(x)) - x).pow(2).mean(0)[[11, 3]].max() > 100


@pytest.mark.parametrize("maker", sorted(MAKERS))
def test_zero_vectors_come_back_exactly(maker):
    x = vectors(4, 16)
    x[2] = 0
    quantizer = MAKERS[maker](16, 3, 0)
    estimate = quantizer.decode(quantizer.encode(x))
    assert (estimate[2] == 0).all()
    assert (estimate[[0, 1, 3]] != 0).any(-1).all()


@pytest.mark.parametrize("power", [-140, -120, -70, 60, 100, 120])
def test_huge_and_tiny_vectors_keep_their_codes(power):
    x = vectors(50, 64)
    quantizer = MseQuantizer(64, 2, seed=0)
    plain = quantizer.encode(x)
    scaled = quantizer.encode(torch.ldexp(x, torch.tensor(power)))
    same = (plain.tensors["codes"] == scaled.tensors["codes"]).float().mean()
    assert same > (0.99 if power > -130 else 0.9)  # below 2^-126 the input itself has lost digits
    torch.testing.assert_close(
        torch.ldexp(scaled.tensors["norms"].double(), torch.tensor(-power)),
        plain.tensors["norms"].double(),
        rtol=1e-3,
        atol=0,
    )


def test_rows_mix_scales_without_harm():
    x = vectors(3, 64)
    mixed = torch.stack([x[0], x[1] * 1e30, x[2] * 1e-30])
    quantizer = MseQuantizer(64, 4, seed=0)
    alone = torch.stack([quantizer.decode(quantizer.encode(row)) for row in mixed])
    together = quantizer.decode(quantizer.encode(mixed))
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=0)
    assert (relative_error(mixed.double(), together.double()) < 0.05).all()


def test_hadamard_codes_do_not_depend_on_the_batch():
    x = vectors(3000, 96)
    quantizer = MseQuantizer(96, 4, seed=0, rotation="hadamard")
    whole, part = quantizer.encode(x), quantizer.encode(x[2100:2105])
    for name, tensor in part.tensors.items():
        assert torch.equal(whole.tensors[name][2100:2105], tensor)


def test_threads_change_nothing_and_their_number_is_kept():
    before = torch.get_num_threads()
    x = vectors(12_000, 96)
    y = vectors(3, 96, seed=1)
    quantizer = ProdQuantizer(96, 3, seed=0, rotation="hadamard")
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            codes = quantizer.encode(x)
            found.append((codes.tensors["codes"], quantizer.decode(codes), quantizer.inner_product(y, codes)))
            assert torch.get_num_threads() == threads
        x[-1, 0] = math.nan
        with pytest.raises(ValueError, match="must be finite"):
            quantizer.encode(x)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*found, strict=True):
        assert torch.equal(one, three) if one.dtype == torch.uint8 else torch.allclose(one, three, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_is_taken_at_its_value(dtype):
    x = vectors(100, 64).to(dtype)
    quantizer = MseQuantizer(64, 3, seed=0)
    half, full = quantizer.encode(x), quantizer.encode(x.float())
    assert all(torch.equal(half.tensors[name], t) for name, t in full.tensors.items())


@pytest.mark.parametrize("maker", ["mse", "prod", "split"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_vectors_must_be_finite(maker, bad):
    x = vectors(5, 8)
    x[3, 2] = bad
    with pytest.raises(ValueError, match="must be finite"):
        MAKERS[maker](8, 2, 0).encode(x)


def test_a_norm_beyond_float32_is_refused():
    with pytest.raises(ValueError, match="exceeds the float32 range"):
        MseQuantizer(8, 2, seed=0).encode(torch.full((1, 8), 3e38))


@pytest.mark.parametrize("maker", ["mse", "prod", "split"])
def test_wrong_input_says_what_is_allowed(maker):
    quantizer = MAKERS[maker](8, 2, 0)
    with pytest.raises(ValueError, match=r"shape \(\.\.\., 8\) for this quantizer, not \(3, 7\)"):
        quantizer.encode(vectors(3, 7))
    with pytest.raises(ValueError, match=r"not torch\.int64"):
        quantizer.encode(torch.ones(3, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="not list"):
        quantizer.encode([1.0] * 8)
    codes = quantizer.encode(vectors(3, 8))
    with pytest.raises(ValueError, match=r"queries must have shape \(m, 8\)"):
        quantizer.inner_product(vectors(8), codes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 0}, r"1\.\.8, not 0"),
        ({"bits": 9}, r"1\.\.8, not 9"),
        ({"bits": 2.5}, r"1\.\.8, not 2\.5"),
        ({"dim": 1}, "at least 2, not 1"),
        ({"rotation": "dct"}, "haar, hadamard, identity"),
        ({"codebook": "uniform"}, "'sphere', 'gaussian' or 'grid'"),
        ({"codebook": "grid", "bits": 5}, r"1\.\.4, not 5"),
        ({"rescale": "eden"}, "'none', 'unbiased' or 'mse'"),
        ({"bits": [(3, 2), (4, 1)]}, "sum to 8"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(arguments, message):
    with pytest.raises(ValueError, match=message):
        MseQuantizer(**{"dim": 8, "bits": 2, "seed": 0} | arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"parts": ((4, 2), (3, 1))}, "sum to 8"),
        ({"parts": ()}, "sum to 8"),
        ({"kind": "rabitq"}, "'mse' or 'prod'"),
        ({"split": "random"}, "'channels' or 'oblivious'"),
        ({"part_dim": "half"}, "'own' or 'whole'"),
        ({"channels": [0, 0]}, r"distinct numbers in 0\.\.7"),
        ({"channels": [8]}, r"distinct numbers in 0\.\.7"),
        ({"channels": [1], "split": "oblivious"}, "rotates all channels together"),
    ],
)
def test_wrong_splits_say_what_is_allowed(arguments, message):
    with pytest.raises(ValueError, match=message):
        SplitQuantizer(**{"dim": 8, "parts": ((4, 2), (4, 1)), "seed": 0} | arguments)


def test_wrong_sketches_say_what_is_allowed():
    with pytest.raises(ValueError, match="'gaussian' or 'orthogonal', not 'sparse'"):
        ProdQuantizer(8, 2, seed=0, sketch="sparse")
    with pytest.raises(ValueError, match="'stored' or 'constant', not 'none'"):
        ProdQuantizer(8, 2, seed=0, residual_norm="none")


@given(
    maker=st.sampled_from(sorted(MAKERS)),
    dim=st.integers(2, 20),
    bits=st.integers(1, 8),
    lead=st.lists(st.integers(0, 3), max_size=2),
)
@settings(max_examples=40, deadline=None)
def test_files_round_trip(tmp_path_factory, maker, dim, bits, lead):
    path = tmp_path_factory.mktemp("codes") / "x.safetensors"
    quantizer = MAKERS[maker](dim, bits, 0)
    codes = quantizer.encode(vectors(*lead, dim))
    codes.save(path)
    loaded = Codes.load(path)
    assert loaded.shape == codes.shape
    assert loaded.nbytes == codes.nbytes
    assert torch.equal(quantizer_of(loaded.recipe).decode(loaded), quantizer.decode(codes))


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "x.safetensors"
    MseQuantizer(8, 3, seed=0).encode(vectors(50, 8)).save(path)
    return path


def test_saving_leaves_nothing_else_behind(saved):
    assert [p.name for p in saved.parent.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.99])
def test_truncated_files_are_refused(saved, share):
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match="truncated, corrupt"):
        Codes.load(saved)


def test_a_flipped_bit_is_seen(saved):
    whole = bytearray(saved.read_bytes())
    whole[-3] ^= 1
    saved.write_bytes(bytes(whole))
    with pytest.raises(ValueError, match="do not match its checksum"):
        Codes.load(saved)


def test_a_changed_recipe_is_seen(saved):
    whole = saved.read_bytes()
    assert whole.count(b'\\"seed\\": 0') == 1
    saved.write_bytes(whole.replace(b'\\"seed\\": 0', b'\\"seed\\": 1'))
    with pytest.raises(ValueError, match="do not match its checksum"):
        Codes.load(saved)


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"w": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="holds no codes of this library"):
        Codes.load(path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        Codes.load(tmp_path / "nothing")


def test_saved_files_are_plain_safetensors(saved):
    assert {name: t.dtype for name, t in load_file(saved).items()} == {
        "codes": torch.uint8,
        "norms": torch.float32,
    }


@pytest.mark.parametrize(
    "other", [MseQuantizer(8, 2, seed=0), MseQuantizer(8, 3, seed=1), ProdQuantizer(8, 3, seed=0)]
)
def test_another_quantizer_s_codes_are_refused(other):
    codes = MseQuantizer(8, 3, seed=0).encode(vectors(5, 8))
    for use in (other.decode, lambda c: other.inner_product(vectors(2, 8), c)):
        with pytest.raises(ValueError, match="these codes were made by"):
            use(codes)


def test_damaged_codes_are_refused():
    quantizer = MseQuantizer(8, 3, seed=0)
    codes = quantizer.encode(vectors(5, 8))
    short = Codes({**codes.tensors, "codes": codes.tensors["codes"][:, :2]}, codes.shape, codes.recipe)
    with pytest.raises(
        ValueError, match=r"'codes' should be torch.uint8 \(5, 3\), found torch.uint8 \(5, 2\)"
    ):
        quantizer.decode(short)
    with pytest.raises(ValueError, match=r"'norms' should be .* found nothing"):
        quantizer.decode(Codes({"codes": codes.tensors["codes"]}, codes.shape, codes.recipe))


@pytest.mark.parametrize(
    "recipe", ["", "[]", "{}", '{"kind": "mse"}', json.dumps({"kind": "other", "dim": 8})]
)
def test_unknown_recipes_are_refused(recipe):
    with pytest.raises(ValueError, match="no quantizer of this library has the recipe"):
        quantizer_of(recipe)


@pytest.mark.parametrize("maker", sorted(MAKERS))
def test_a_recipe_makes_the_same_quantizer(maker):
    quantizer = MAKERS[maker](8, 3, 5)
    assert quantizer_of(quantizer.recipe).recipe == quantizer.recipe


def test_nbytes_counts_storages_not_views():
    codes = MseQuantizer(8, 8, seed=0).encode(vectors(100, 8))
    one = Codes({name: t[:1] for name, t in codes.tensors.items()}, (1, 8), codes.recipe)
    assert one.nbytes == codes.nbytes == 100 * 12
