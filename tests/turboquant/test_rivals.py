"""Is each rival what its source says: bits, bias, distortion, and the faults that were published?"""

import math

import pytest
import torch

from turboquant import rivals, theory
from turboquant.quantizers import MseQuantizer, ProdQuantizer

CHEAP = sorted(set(rivals.RIVALS) - {"faiss-pq"})


def unit(n, dim, seed=0):
    x = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(x, dim=-1)


def distortion(subject, x, bits, seed=0):
    return ((subject.decode(subject.encode(x, bits=bits, seed=seed)) - x) ** 2).sum(-1).mean().item()


@pytest.mark.parametrize("name", CHEAP)
def test_every_rival_keeps_the_protocol(name):
    subject = rivals.RIVALS[name]()
    x, y = unit(100, 32), unit(9, 32, seed=1)
    codes = subject.encode(x, bits=4, seed=3)
    scores = subject.inner_product(y, codes)
    assert scores.shape == (9, 100)
    offset = 0.02 if name == "faiss-rabitq" else 1e-5  # faiss centres, so its scores are affine in y
    torch.testing.assert_close(scores, y @ subject.decode(codes).T, atol=offset, rtol=0)
    assert 0 < subject.nbytes(codes) < 100 * 32 * 4
    assert torch.equal(subject.decode(subject.encode(x, bits=4, seed=3)), subject.decode(codes))


@pytest.mark.parametrize("name", ["qjl", "qjl-orthogonal", "eden", "released-prod", "faiss-rabitq"])
def test_unbiased_rivals_have_slope_one(name):
    subject = rivals.RIVALS[name]()
    x, y = unit(2000, 64), unit(200, 64, seed=1)
    true = y @ x.T
    slopes = []
    for seed in range(12):
        scores = subject.inner_product(y, subject.encode(x, bits=2, seed=seed))
        slopes.append(((scores * true).sum() / (true * true).sum()).item())
    assert sum(slopes) / 12 == pytest.approx(1, abs=0.01)


def test_qjl_variance_and_the_orthogonal_gain():
    x, y = unit(3000, 128), unit(300, 128, seed=1)
    errors = {}
    for name, subject in {"iid": rivals.Qjl(), "orthogonal": rivals.Qjl(orthogonal=True)}.items():
        found = [subject.inner_product(y, subject.encode(x, bits=1, seed=s)) - y @ x.T for s in range(3)]
        errors[name] = 128 * torch.stack(found).square().mean().item()
    assert errors["iid"] == pytest.approx(128 * theory.prod_distortion(1, 128), rel=0.03)
    assert errors["orthogonal"] == pytest.approx(128 * theory.prod_distortion(1, 128, "orthogonal"), rel=0.03)


def test_qjl_takes_any_number_of_rows():
    codes = rivals.Qjl(rows=778).encode(unit(5, 16), bits=1, seed=0)
    assert codes.signs.shape == (5, 98)
    assert rivals.Qjl(orthogonal=True).sketch(40, 16, 0).shape == (40, 16)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        rivals.Qjl(rows=0)


def test_polar_coordinates_round_trip_and_ranges():
    x = unit(50, 16) * 3
    angles, radii = rivals.to_polar(x)
    torch.testing.assert_close(rivals.from_polar(angles, radii), x, atol=1e-5, rtol=0)
    torch.testing.assert_close(radii, x.norm(dim=-1))
    assert [a.shape[-1] for a in angles] == [8, 4, 2, 1]
    assert angles[0].max() > math.pi
    assert all((a >= 0).all() and (a <= math.pi / 2).all() for a in angles[1:])
    partial, left = rivals.to_polar(x, levels=2)
    torch.testing.assert_close(rivals.from_polar(partial, left), x, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="2\\^3 divides, not 12"):
        rivals.to_polar(x[:, :12])


def test_polar_codebook_is_a_fixed_point():
    from scipy import integrate

    for level in (2, 3, 4):
        centroids = rivals.polar_codebook(level, 2).double().tolist()
        edges = [0, *[(a + b) / 2 for a, b in zip(centroids[1:], centroids[:-1], strict=True)], math.pi / 2]

        def density(psi, power=2 ** (level - 1) - 1):
            return math.sin(2 * psi) ** power

        for low, high, centroid in zip(edges[:-1], edges[1:], centroids, strict=True):
            moment = integrate.quad(lambda p: p * density(p), low, high)[0]
            assert moment / integrate.quad(density, low, high)[0] == pytest.approx(centroid, abs=2e-4)


def test_polarquant_takes_62_bits_for_16_coordinates():
    subject = rivals.PolarQuant()
    x = unit(2000, 128)
    assert subject.nbytes(subject.encode(x, bits=4, seed=0)) == 2000 * 62
    assert distortion(subject, x, 4) == pytest.approx(0.032, rel=0.05)
    with pytest.raises(ValueError, match="not 3 and 128"):
        subject.encode(x, bits=3, seed=0)
    with pytest.raises(ValueError, match="not 4 and 24"):
        subject.encode(unit(3, 24), bits=4, seed=0)


def test_eden_scales():
    x = unit(4000, 128)
    assert distortion(rivals.eden(), x, 2) == pytest.approx(theory.unbiased_distortion(2), rel=0.03)
    plain = MseQuantizer(128, 4, seed=0)
    assert distortion(rivals.eden("mse"), x, 4) < ((plain.decode(plain.encode(x)) - x) ** 2).sum(-1).mean()


def test_absmax_levels_and_groups():
    x = torch.tensor([[7.0, -3.0, 0.4, -7.0], [0.0, 0.0, 0.0, 0.0]])
    subject = rivals.AbsMaxInt()
    assert torch.equal(subject.decode(subject.encode(x, bits=4)), x.round())
    assert subject.nbytes(subject.encode(x, bits=4)) == 2 * (2 + 4)
    outlier = unit(500, 64)
    outlier[:, 5] *= 50
    others = [i for i in range(64) if i != 5]
    errors = {}
    for group in ("token", "channel", 16):
        rival = rivals.AbsMaxInt(group)
        errors[group] = (rival.decode(rival.encode(outlier, bits=4)) - outlier)[:, others].square().sum()
    assert errors["channel"] < errors[16] < errors["token"]
    with pytest.raises(ValueError, match="groups of 5 do not divide"):
        rivals.AbsMaxInt(5).encode(x, bits=4)
    with pytest.raises(ValueError, match=r"2\.\.8, not 1"):
        subject.encode(x, bits=1)
    with pytest.raises(ValueError, match="'token', 'channel' or a number"):
        rivals.AbsMaxInt("row")


def test_without_rotation_a_one_hot_vector_is_lost():
    one_hot = torch.eye(128)[:10]
    assert distortion(rivals.scalar_without_rotation(), one_hot, 2) > 0.5
    assert distortion(rivals.eden("mse"), one_hot, 2) < 0.2


@pytest.mark.parametrize(
    ("bits", "outlier", "shrunk"), [(2, 0.2584, 0.56), (3, 0.1258, 0.73), (4, 0.0603, 0.84)]
)
def test_released_split_has_the_published_fault(bits, outlier, shrunk):
    x = torch.randn(6000, 128, generator=torch.Generator().manual_seed(0))
    quantizer = rivals.released_split(128, ((32, bits), (96, bits)), seed=0)
    estimate, x = quantizer.decode(quantizer.encode(x))[:, :32], x[:, :32]
    assert (((estimate - x) ** 2).sum(-1) / (x * x).sum(-1)).mean() == pytest.approx(outlier, rel=0.03)
    assert ((estimate * x).sum(-1) / (x * x).sum(-1)).mean() == pytest.approx(shrunk, abs=0.01)


def test_released_prod_differs_from_the_paper_where_it_should():
    released = rivals.ReleasedProdQuantizer(64, 3, seed=0)
    ours = ProdQuantizer(64, 3, seed=0, sketch="orthogonal")
    assert torch.equal(released.sketch, ours.sketch)
    assert released._residual == 0.34267
    assert (released._unsketch / ours._unsketch).mean() == pytest.approx(
        math.sqrt(math.pi / 2 / 64) * 64 * theory.mean_abs_coordinate(64), rel=1e-5
    )
    with pytest.raises(ValueError, match=r"1\.\.5, not 6"):
        rivals.ReleasedProdQuantizer(64, 6, seed=0)


def test_product_quantization_learns_its_data():
    subject = rivals.FaissPQ()
    x = unit(300, 16)
    codes = subject.encode(x, bits=2, seed=0)
    assert subject.nbytes(codes) == 300 * 4
    assert subject.inner_product(unit(3, 16), codes).shape == (3, 300)
    assert distortion(subject, x, 2) < 0.117
    codec = subject.train(unit(300, 16, seed=1), bits=2, seed=0)
    fresh = subject.encode(x, bits=2, seed=0, codec=codec)
    assert ((subject.decode(fresh) - x) ** 2).sum() > ((subject.decode(codes) - x) ** 2).sum()
    with pytest.raises(ValueError, match="8 / bits dividing d, not 2 and 18"):
        subject.encode(unit(3, 18), bits=2, seed=0)
    with pytest.raises(ValueError, match="1, 2, 4 or 8 bits"):
        subject.encode(x, bits=3, seed=0)


@pytest.mark.parametrize(("coordinates", "bits_a_code"), [(4, 8), (2, 8), (2, 4)])
def test_product_quantization_has_the_centroids_that_faiss_trains(coordinates, bits_a_code):
    faiss = rivals.import_faiss()
    x = unit(600, 24)
    ours = rivals.train_pq(x, coordinates=coordinates, bits_a_code=bits_a_code, seed=7)
    theirs = faiss.ProductQuantizer(24, 24 // coordinates, bits_a_code)
    theirs.cp.seed = 7
    theirs.cp.min_points_per_centroid = 1
    theirs.train(x.numpy())
    same = [faiss.vector_to_array(codec.centroids).tolist() for codec in (ours, theirs)]
    assert same[0] == same[1]
    assert (ours.compute_codes(x.numpy()) == theirs.compute_codes(x.numpy())).all()


def test_rabitq_scores_agree_however_many_queries():
    subject = rivals.FaissRaBitQ()
    codes = subject.encode(unit(200, 16) + 0.3, bits=3, seed=0)
    many = unit(40, 16, seed=1)
    torch.testing.assert_close(
        subject.inner_product(many, codes)[:5], subject.inner_product(many[:5], codes), atol=5e-3, rtol=0
    )
