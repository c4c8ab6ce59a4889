"""The embeddings against loops and on drawn cases: time features, what is refused, half precision, compilation, gradients."""
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from ehr_sequencing.dropout import Dropout
from ehr_sequencing.embeddings import AgeEmbedding, BEHRTEmbedding, PositionalEmbedding, SinusoidalPositionalEncoding, VisitEmbedding, check_tokens, time_features_of_tokens

many = settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def batches(draw):
    "Codes, ages, visits and times of drawn histories, with `[CLS]` in front, `[SEP]` between visits, and padding."
    rng, B, L = np.random.default_rng(draw(st.integers(0, 2**32 - 1))), draw(st.integers(1, 4)), draw(st.integers(1, 14))
    visits, times = np.full((B, L), -1), np.zeros((B, L))
    first, separated, start = draw(st.booleans()), draw(st.booleans()), draw(st.sampled_from([0, 900]))
    for b in range(B):
        visit, day, place = int(rng.integers(0, 3)), float(start), int(first)
        while place < L and rng.random() < 0.9:
            n = min(int(rng.integers(1, 4)), L - place)
            visits[b, place:place + n], times[b, place:place + n] = visit, day
            place, visit, day = place + n + separated, visit + 1, day + float(rng.integers(0, 400))
    return torch.tensor(rng.integers(1, 20, (B, L))), torch.tensor(rng.integers(-1, 120, (B, L))), torch.tensor(visits), torch.tensor(times, dtype=torch.float32)


@many
@given(batches())
def test_time_features_are_those_of_a_loop(batch):
    _, _, visits, times = batch
    found = time_features_of_tokens(times, visits)
    for b in range(len(visits)):
        start_of = {}
        for v, t in zip(visits[b].tolist(), times[b].tolist()): start_of.setdefault(v, t) if v >= 0 else None
        order = sorted(start_of)
        for i, v in enumerate(visits[b].tolist()):
            gap = 0 if v < 0 or order.index(v) == 0 else start_of[v] - start_of[order[order.index(v) - 1]]
            expected = [0, 0] if v < 0 else [math.log1p(gap), math.log1p(start_of[v])]
            np.testing.assert_allclose(found[b, i], expected, rtol=1e-5, atol=1e-6)


@many
@given(batches(), st.sampled_from(["sinusoidal", "learned"]), st.booleans())
def test_a_token_depends_on_itself_and_what_was_before(batch, position, use_time):
    "Cutting the end off changes nothing, and the output is the normalised sum of the terms, which it leaves as they were."
    torch.manual_seed(0)
    model = BEHRTEmbedding(20, 8, max_visits=4, position=position, use_time=use_time).eval()
    out = model(*batch)
    terms = model.terms(*batch)
    assert list(terms) == ["code", "age", "visit", "position"] + ["time"] * use_time
    torch.testing.assert_close(out, model.norm(torch.stack(list(terms.values())).sum(0)), atol=1e-5, rtol=1e-5)
    cut = max(1, batch[0].shape[1] // 2)
    torch.testing.assert_close(model(*[x[:, :cut] for x in batch]), out[:, :cut], atol=1e-5, rtol=1e-5)
    if use_time: torch.testing.assert_close(model(*batch[:3]), model.norm(torch.stack([x for name, x in terms.items() if name != "time"]).sum(0)), atol=1e-5, rtol=1e-5)
    assert all(not terms[name][batch[2] < 0].any() for name in list(terms)[2:])


@many
@given(batches(), st.integers(0, 2**32 - 1))
def test_gradients_are_those_of_the_plain_sum(batch, seed):
    "Adding in place gives each table the gradient that it has without."
    grads = []
    for plain in (False, True):
        torch.manual_seed(seed)
        model = BEHRTEmbedding(20, 8, position="learned", dropout=0.0)
        terms = list(model.terms(*batch).values())
        out = model.norm(terms[0] + terms[1] + terms[2] + terms[3] + terms[4]) if plain else model(*batch)
        (out * torch.arange(8)).sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items(): torch.testing.assert_close(grad, grads[1][name], atol=1e-4, rtol=1e-4)
    assert not grads[0]["code.weight"][0].any() and not grads[0]["visit.embedding.weight"][0].any() and not grads[0]["position.embedding.weight"][0].any()


@many
@given(batches(), st.data())
def test_what_does_not_fit_is_refused(batch, data):
    model = BEHRTEmbedding(20, 8)
    at, names = data.draw(st.integers(0, 3)), ("codes", "ages", "visit_ids", "times")
    where = np.unravel_index(data.draw(st.integers(0, batch[0].numel() - 1)), batch[0].shape)
    changed = [x.clone() for x in batch]
    kind = data.draw(st.sampled_from(["shape", "type", "value"]))
    if kind == "shape": changed[at] = torch.cat([changed[at], changed[at][:, :1]], 1)
    if kind == "type": at = min(at, 2); changed[at] = changed[at].to(data.draw(st.sampled_from([torch.float32, torch.bool, torch.int16])))
    if kind == "value":
        at = data.draw(st.sampled_from([0, 3]))
        changed[at][where] = data.draw(st.sampled_from([-1, 20, 2**40])) if at == 0 else data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    with pytest.raises(TypeError if kind == "type" else ValueError, match="expected the shape of codes" if kind == "shape" else names[at]): model(*changed)
    assert torch.isfinite(model(*batch)).all()


def test_values_are_looked_at_where_it_is_free(monkeypatch):
    "On a device that queues its work only the first batch is read; the meta device stands for one, since reading it is an error."
    model = BEHRTEmbedding(20, 8).to("meta")
    batch = [torch.zeros(2, 3, dtype=torch.int64, device="meta")] * 3
    with pytest.raises(RuntimeError): model(*batch)
    model.looked = True
    assert model(*batch).shape == (2, 3, 8)
    with pytest.raises(ValueError, match="expected the shape of codes"): model(batch[0], batch[1][:, :2], batch[2])
    on_cpu = BEHRTEmbedding(20, 8)
    for _ in range(2):
        on_cpu(*[torch.zeros(2, 3, dtype=torch.int64)] * 3)
        for outside in (20, -1):
            with pytest.raises(ValueError, match="codes: 1 of 6 lie outside 0..19"): on_cpu(torch.tensor([[0, 0, outside], [0, 0, 0]]), *[torch.zeros(2, 3, dtype=torch.int64)] * 2)
    check_tokens(torch.tensor([[0, 99]]), torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, 2, dtype=torch.int64), values=False, vocab_size=5)
    assert torch.isfinite(on_cpu(*[torch.zeros(2, 0, dtype=torch.int64)] * 3)).all()  # no token is no error


def test_half_precision_and_compilation():
    "A model in bf16 gives what float32 gives to three digits, at far places too; compiled and not are the same."
    torch.manual_seed(0)
    visits = torch.arange(600).unsqueeze(0)
    batch = (torch.randint(1, 20, (1, 600)), torch.full((1, 600), 60), visits, visits * 20.0)
    model = BEHRTEmbedding(20, 32).eval()
    expected = model(*batch)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(*batch), expected)
    half = model.bfloat16()(*batch)
    assert half.dtype == torch.bfloat16 and (half.float() - expected).abs().max() < 0.08 and (half.float() - expected).square().mean().sqrt() < 0.012


def test_dropout_in_half_precision_and_compiled():
    "Dropout keeps the type, so that a model in bf16 trains; compiled without a break it drops as often."
    torch.manual_seed(0)
    batch = [torch.ones(4, 100, dtype=torch.int64)] * 3
    out = BEHRTEmbedding(20, 32, dropout=0.25).bfloat16()(*batch)
    assert out.dtype == torch.bfloat16 and 0.2 < (out == 0).float().mean() < 0.3
    for layer in (Dropout(0.25), torch.compile(Dropout(0.25), backend="eager", fullgraph=True)):
        for dtype in (torch.float32, torch.bfloat16):
            y = layer(torch.ones(40_000, dtype=dtype))
            assert y.dtype == dtype and abs((y == 0).float().mean() - 0.25) < 0.01 and abs(y.max().float() - 4 / 3) < 0.01


def test_parts_take_any_shape():
    for layer in (AgeEmbedding(6), VisitEmbedding(6), PositionalEmbedding(6), SinusoidalPositionalEncoding(6)):
        x = torch.randint(-1, 40, (2, 3, 4))
        assert layer(x).shape == (2, 3, 4, 6) and torch.equal(layer(x)[1, 2, 3], layer(x[1, 2, 3])) and isinstance(layer, nn.Module)
    odd = AgeEmbedding(5, max_age=97, bin_years=10)
    assert torch.equal(odd(torch.tensor([97, 90])), odd(torch.tensor([200, 97])))
