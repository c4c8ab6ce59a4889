"Pooling and the leak check: properties over drawn batches, which the chapter shows on an example each."
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from ehr_sequencing.aggregation import VISIT_POOLINGS, VisitPooling, assert_no_future_leakage, check_visits, count_tokens, pool_codes, pool_visits, present_visits, visit_softmax
from ehr_sequencing.classification import pool_sequence

HOW = st.sampled_from(VISIT_POOLINGS)
PADDING = 1e30  # whatever padding computes must not count, however large


def pooling(how, d, dtype=torch.float32):
    "A pooling whose query is not zero."
    module = VisitPooling(d, how)
    torch.manual_seed(0)
    for p in module.parameters(): nn.init.normal_(p)
    return module.to(dtype)


@st.composite
def nested(draw):
    "Codes in visits: vectors (B, V, C, d) and mask (B, V, C), real codes first; some visits are empty, some rows too."
    B, V, C, seed = draw(st.integers(1, 5)), draw(st.integers(1, 6)), draw(st.integers(1, 7)), draw(st.integers(0, 10_000))
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(C) < torch.randint(0, C + 1, (B, V, 1), generator=generator)
    x = torch.randn(B, V, C, 4, generator=generator)
    if draw(st.booleans()): x = x.round().clamp(max=0) if draw(st.booleans()) else x.round()  # ties, also with the zeros of what is empty
    return x.masked_fill(~mask.unsqueeze(-1), PADDING), mask


def flatten(x, mask, shuffle=None):
    "The same codes as rows of tokens, with a token of no visit in front and padding behind; within a row in any order if `shuffle` is given."
    B, V, C, d = x.shape
    ids = torch.where(mask, torch.arange(V).view(1, V, 1), -1).reshape(B, V * C)
    ids = torch.cat([torch.full((B, 1), -1), ids], 1)
    hidden = torch.cat([x.new_full((B, 1, d), -1e4 if x.dtype == torch.float16 else -PADDING), x.reshape(B, V * C, d)], 1)
    order = torch.stack([torch.randperm(ids.shape[1], generator=shuffle) if shuffle else torch.argsort((ids[b] < 0).int(), stable=True) for b in range(B)])
    return hidden.gather(1, order.unsqueeze(-1).expand(-1, -1, d)), ids.gather(1, order)


def by_loop(module, x, mask):
    "Each visit by itself, as the definition says."
    def one(codes):
        if not len(codes): return torch.zeros(codes.shape[1], dtype=codes.dtype)
        if module.how == "attention": return (codes @ module.query / codes.shape[1]**0.5).softmax(0) @ codes
        return {"mean": codes.mean(0), "sum": codes.sum(0), "max": codes.amax(0), "last": codes[-1]}[module.how]
    return torch.stack([torch.stack([one(x[b, v][mask[b, v]]) for v in range(x.shape[1])]) for b in range(len(x))])


@settings(max_examples=200, deadline=None)
@given(nested(), HOW)
def test_layouts_and_the_definition_agree(codes, how):
    "Flat, hierarchical and a loop give the same vectors; visits without codes give zeros; padding and tokens of no visit, however large, count for nothing."
    (x, mask), module = codes, pooling(how, 4)
    expected = by_loop(module, x, mask)
    assert expected.abs().max() < 100
    torch.testing.assert_close(module.codes(x, mask), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(module(*flatten(x, mask), x.shape[1]), expected, atol=1e-5, rtol=1e-5)
    if how != "attention": torch.testing.assert_close(pool_codes(x, mask, how), module.codes(x, mask), atol=0, rtol=0)
    assert not module.codes(x, mask)[~mask.any(-1)].any()
    if how in ("mean", "max") and mask[:, 0].any(1).all(): torch.testing.assert_close(pool_sequence(x[:, 0], mask[:, 0], how), expected[:, 0], atol=1e-5, rtol=1e-5)


@settings(max_examples=100, deadline=None)
@given(nested(), HOW, st.integers(0, 1000))
def test_order_and_company_change_nothing(codes, how, seed):
    "Patients in another order, a patient alone, more padding, room for more visits, and tokens of several visits mixed: the same vectors for the same patient."
    (x, mask), module, generator = codes, pooling(how, 4), torch.Generator().manual_seed(seed)
    B, V = mask.shape[:2]
    hidden, ids = flatten(x, mask)
    whole = module(hidden, ids, V)
    order = torch.randperm(B, generator=generator)
    torch.testing.assert_close(module(hidden[order], ids[order], V), whole[order], atol=1e-6, rtol=1e-6)
    for b in range(B):
        n = int((ids[b] >= 0).sum())
        own = int(ids[b].max()) + 1
        if n: torch.testing.assert_close(module(hidden[b:b + 1, :n], ids[b:b + 1, :n])[0], whole[b, :own], atol=1e-6, rtol=1e-6)
    wider = nn.functional.pad(hidden, (0, 0, 0, 5), value=PADDING), nn.functional.pad(ids, (0, 5), value=-1)
    torch.testing.assert_close(module(*wider, V + 3), nn.functional.pad(whole, (0, 0, 0, 3)), atol=1e-6, rtol=1e-6)
    if how != "last": torch.testing.assert_close(module(*flatten(x, mask, generator), V), whole, atol=1e-5, rtol=1e-5)


@settings(max_examples=200, deadline=None)
@given(nested(), HOW, st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
def test_gradients(codes, how, dtype):
    "They are those of the loop, finite in every precision, and zero for padding, tokens of no visit and what a visit's vector does not depend on."
    (x, mask), module = codes, pooling(how, 4, dtype)
    large = 1e4 if dtype == torch.float16 else PADDING
    x = x.clamp(-large, large).to(dtype).requires_grad_()
    weights = torch.linspace(-1, 1, 4, dtype=dtype)
    out = module.codes(x, mask)
    assert out.dtype == dtype and out.isfinite().all()
    inputs = [x, *module.parameters()]
    ours = torch.autograd.grad((out * weights).sum(), inputs, retain_graph=True)
    assert all(g.isfinite().all() for g in ours) and not ours[0][~mask].any()
    if dtype in (torch.float64, torch.float32) and mask.any():
        for mine, theirs in zip(ours, torch.autograd.grad((by_loop(module, x, mask) * weights).sum(), inputs), strict=True): torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    hidden, ids = flatten(x.detach(), mask)
    hidden.requires_grad_()
    (module(hidden, ids, mask.shape[1]) * weights).sum().backward()
    assert hidden.grad.isfinite().all() and not hidden.grad[ids < 0].any()


@pytest.mark.parametrize("how", VISIT_POOLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nobody_has_a_token(how, dtype):
    "Rows and whole batches of nothing but padding give zeros and zero gradients; no visit at all gives an empty tensor."
    module, hidden = pooling(how, 4, dtype), torch.full((2, 3, 4), 6e4, dtype=dtype, requires_grad=True)
    out = module(hidden, torch.full((2, 3), -1), 5)
    out.sum().backward()
    assert out.shape == (2, 5, 4) and not out.any() and not hidden.grad.any() and all(not p.grad.any() for p in module.parameters())
    assert module(hidden, torch.full((2, 3), -1)).shape == (2, 0, 4)


@settings(max_examples=60, deadline=None)
@given(nested(), st.floats(-1e4, 1e4), st.floats(0.01, 30))
def test_softmax_over_visits(codes, shift, scale):
    "The weights of a visit are positive and sum to one, those of no visit are zero; a shift of a visit's scores changes nothing."
    x, mask = codes
    hidden, ids = flatten(x.double(), mask)
    scores, V = hidden[..., 0] * scale, mask.shape[1]
    weights = visit_softmax(scores, ids, V)
    assert weights.isfinite().all() and (weights >= 0).all() and not weights[ids < 0].any()
    sums = torch.zeros(len(ids), V + 1, dtype=torch.float64).scatter_add(1, torch.where(ids < 0, V, ids), weights)[:, :V]
    torch.testing.assert_close(sums, (count_tokens(ids, V) > 0).double())
    assert visit_softmax(scores.masked_fill(ids < 0, torch.inf), ids, V).equal(visit_softmax(scores.masked_fill(ids < 0, torch.nan), ids, V)) and visit_softmax(scores.masked_fill(ids < 0, 0), ids, V).equal(weights)
    unknown = scores.masked_fill(ids < 0, torch.nan).requires_grad_()
    assert (visit_softmax(unknown, ids, V) ** 2).sum().backward() is None and unknown.grad.isfinite().all()
    torch.testing.assert_close(visit_softmax(scores + shift * (ids + 1), ids, V), weights, atol=1e-8, rtol=0)


@settings(max_examples=100, deadline=None)
@given(nested())
def test_masks_at_both_levels(codes):
    "Counts are those of the mask; present visits are those up to the last with a token; what `check_visits` refuses are rows without one, and holes."
    x, mask = codes
    _, ids = flatten(x, mask)
    assert count_tokens(ids, mask.shape[1]).equal(mask.sum(-1))
    present, last = present_visits(ids, mask.shape[1]), torch.where(mask.any(-1), torch.arange(mask.shape[1]), -1).amax(1)
    assert present.equal(torch.arange(mask.shape[1]) <= last.unsqueeze(1))
    empty = (last < 0).nonzero().flatten().tolist()
    if empty:
        with pytest.raises(ValueError, match=rf"{len(empty)} of {len(mask)} patients have no visit, in rows \[{', '.join(map(str, empty))}\]"): check_visits(present)
    else: check_visits(present)
    filled = mask.any(-1)
    if filled.any(1).all() and not filled.equal(present):
        with pytest.raises(ValueError, match="real visit after one that is not"): check_visits(filled)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_visit_beyond_the_slots_is_refused(data):
    "It would land in the next patient's slots."
    ids = torch.tensor(data.draw(st.lists(st.lists(st.integers(-1, 6), min_size=4, max_size=4), min_size=1, max_size=4)))
    V = data.draw(st.integers(0, 6))
    if int(ids.max()) < V: return
    for function in (lambda: pool_visits(torch.zeros(*ids.shape, 2), ids, V), lambda: count_tokens(ids, V), lambda: visit_softmax(torch.zeros(ids.shape), ids, V)):
        with pytest.raises(ValueError, match=f"holds visit {int(ids.max())}, but n_visits is {V}"): function()


def leaky_batch(generator, layout):
    "Rows of two to seven visits of two codes, flat or hierarchical."
    n = torch.randint(2, 8, (4, 1), generator=generator)
    n[0] = 7
    sequence_mask = torch.arange(7) < n
    ids = torch.where(sequence_mask, torch.arange(7), -1).repeat_interleave(2, 1)
    codes = torch.randint(5, 40, ids.shape, generator=generator).masked_fill(ids < 0, 0)
    times = torch.randint(1, 90, (4, 7), generator=generator).cumsum(1).float()
    flat = {"codes": codes, "ages": 40 + ids, "visit_ids": ids, "times": times.repeat_interleave(2, 1).masked_fill(ids < 0, 0), "attention_mask": ids >= 0}
    deep = {"visit_codes": codes.view(4, 7, 2), "visit_mask": (ids >= 0).view(4, 7, 2)}
    shared = {"sequence_mask": sequence_mask, "visit_ages": torch.where(sequence_mask, 40 + torch.arange(7), 0), "time_features": torch.stack([times.diff(dim=1, prepend=times[:, :1]), times], -1).log1p().masked_fill(~sequence_mask.unsqueeze(-1), 0)}
    return (flat if layout != "hierarchical" else {}) | (deep if layout != "flat" else {}) | shared


def visit_values(batch, name):
    "One number a visit from an input, whichever layout holds it."
    if name in ("codes", "ages", "times"): return pool_visits(batch[name].float().unsqueeze(-1), batch["visit_ids"], batch["sequence_mask"].shape[1])[..., 0]
    if name == "visit_codes": return pool_codes(batch[name].float().unsqueeze(-1), batch["visit_mask"])[..., 0]
    return batch[name].float() if name != "time_features" else batch[name].sum(-1)


INPUTS = {"flat": ("codes", "ages", "times", "sequence_mask", "visit_ages", "time_features"), "hierarchical": ("visit_codes", "sequence_mask", "visit_ages", "time_features")}


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(layout, name) for layout in INPUTS for name in INPUTS[layout]]), st.sampled_from(["next", "last", "all"]), st.sampled_from(["tensor", "tuple", "dict"]), st.booleans())
def test_the_leak_check_finds_each_input(seed, where, kind, wrap, both):
    "A running sum of any input passes; with a share of the next visit's, the last visit's or everybody's later values it fails, also as the second of two outputs."
    layout, name = where
    batch = leaky_batch(torch.Generator().manual_seed(seed), "both" if both else layout)
    def past(b): return visit_values(b, name).cumsum(1)
    def future(b):
        x = visit_values(b, name)
        if kind == "next": return past(b) + 1e-2 * nn.functional.pad(x[:, 1:], (0, 1))
        if kind == "last": return past(b) + 1e-2 * x.gather(1, b["sequence_mask"].sum(1, keepdim=True) - 1)
        return past(b) + 1e-2 * x.flip(1).cumsum(1).flip(1)
    def wrapped(f): return {"tensor": f, "tuple": lambda b: (past(b), f(b)), "dict": lambda b: {"now": past(b), "then": f(b)}}[wrap]
    assert_no_future_leakage(wrapped(past), batch)
    if name == "sequence_mask" and kind == "last": return  # 1 for everybody: no leak
    part = {"tensor": "outputs", "tuple": "outputs.1", "dict": "outputs.then"}[wrap]
    found = "are removed" if name == "sequence_mask" else "change"  # contents are replaced first; a mask has none
    with pytest.raises(AssertionError, match=rf"Future leakage: {part} at .* after \d+ {found}"): assert_no_future_leakage(wrapped(future), batch)


def test_the_leak_check_leaves_the_model_as_it_was():
    "Dropout is off during the check, also when a method is handed in, and on again afterwards."
    class Noisy(nn.Module):
        def __init__(self): super().__init__(); self.dropout = nn.Dropout(0.5)
        def forward(self, batch): return self.dropout(visit_values(batch, "codes").cumsum(1) + 1)
        def other(self, batch): return self(batch)
    model, batch = Noisy().train(), leaky_batch(torch.Generator().manual_seed(0), "both")
    for asked in (model, model.other):
        assert_no_future_leakage(asked, batch)
        assert model.training and model.dropout.training


def test_sums_do_not_depend_on_the_width_of_half_precision():
    "Against double precision: the mean of many half-precision vectors is right to the last digit that they have."
    generator = np.random.default_rng(0)
    values = torch.from_numpy(generator.normal(3, 1, (3, 700, 5)))
    assert pool_visits(torch.full((1, 600, 1), 200, dtype=torch.float16), torch.zeros(1, 600, dtype=torch.long)).item() == 200  # whose sum float16 cannot hold
    ids = torch.from_numpy(generator.integers(-1, 4, (3, 700)))
    for dtype, digits in ((torch.float16, 2**-11), (torch.bfloat16, 2**-8)):
        half = values.to(dtype)
        for how in ("mean", "sum"): torch.testing.assert_close(pool_visits(half, ids, 4, how).double(), pool_visits(half.double(), ids, 4, how), atol=0, rtol=2 * digits)


def test_the_leak_check_does_not_mind_holes():
    "Places without a token between real ones, flat or hierarchical: an honest model passes, a leaking one fails."
    for layout in ("flat", "hierarchical"):
        batch = leaky_batch(torch.Generator().manual_seed(0), layout)
        mask = batch["attention_mask"] if layout == "flat" else batch["visit_mask"]
        mask.view(4, 7, 2)[:, 1::2, 0] = False  # the first code of every other visit
        if layout == "flat": batch |= {"codes": batch["codes"].masked_fill(~mask, 0), "visit_ids": batch["visit_ids"].masked_fill(~mask, -1)}
        name = "codes" if layout == "flat" else "visit_codes"
        assert_no_future_leakage(lambda b: visit_values(b, name).cumsum(1), batch)
        with pytest.raises(AssertionError, match="Future leakage"): assert_no_future_leakage(lambda b: visit_values(b, name).flip(1).cumsum(1), batch)
