"""The losses against pycox, scikit-learn, lifelines and naive loops on drawn cases with ties and heavy censoring; what does not count has no
influence and no gradient; half precision; memory."""
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from lifelines import KaplanMeierFitter
from pycox.models.data import pair_rank_mat
from pycox.models.loss import nll_logistic_hazard, rank_loss_deephit_single
from sklearn.linear_model import LogisticRegression

from ehr_sequencing.losses import (DiscreteTimeSurvivalLoss, FixedHorizonProgressionLoss, MultiTaskSurvivalLoss, NobodyAtRisk, combine_tasks, compute_masked_loss, discrete_time_nll, fixed_horizon_loss,
                                   fixed_horizon_targets, horizon_loss, inverse_censoring_weights, mean_over_patients, survival_nll)
from ehr_sequencing.ranking import HybridSurvivalLoss, PairwiseRankingLoss, null_scales, pairwise_ranking_loss
from ehr_sequencing.survival import survival_loss

FORMS = {"logistic": lambda d: math.log1p(math.exp(-d)), "exponential": lambda d: math.exp(-d)}
many = settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
some = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
BLOCKS = st.sampled_from([1, 7, 2**20])
FORM = st.sampled_from(sorted(FORMS))


@st.composite
def patients(draw, smallest=1, never=True):
    "Logits (n, K) in float64, times with many ties, indicators of which few are True; -1 for never at risk."
    n, steps, seed = draw(st.integers(smallest, 24)), draw(st.integers(1, 6)), draw(st.integers(0, 2**32 - 1))
    generator, observed = np.random.default_rng(seed), draw(st.sampled_from([0.0, 0.1, 0.3, 1.0]))
    times = draw(st.lists(st.integers(-1 if never else 0, steps), min_size=n, max_size=n))
    times = torch.tensor(times)
    indicators = torch.tensor(generator.random(n) < observed) & (times >= 0) & (times < steps)
    return torch.tensor(generator.normal(-1, draw(st.sampled_from([0.0, 1.0, 4.0])), (n, steps))), times, indicators


@st.composite
def visits(draw):
    "Logits (B, V, K), bins, indicators and who is at risk."
    shape, steps, seed = (draw(st.integers(1, 6)), draw(st.integers(1, 5))), draw(st.integers(1, 4)), draw(st.integers(0, 2**32 - 1))
    generator = np.random.default_rng(seed)
    bins = torch.tensor(generator.integers(0, steps + 1, shape))
    indicators = torch.tensor(generator.random(shape) < draw(st.sampled_from([0.1, 0.5]))) & (bins < steps)
    return torch.tensor(generator.normal(-1, 1.5, (*shape, steps))), bins, indicators, torch.tensor(generator.random(shape) < draw(st.sampled_from([0.3, 0.8, 1.0])))


def naive_nll(z, T, E):
    "Minus log of the probability, multiplied out."
    h, p = 1 / (1 + np.exp(-z.numpy())), 1.0
    for t in range(int(T)): p *= 1 - h[t]
    return -math.log(p * h[int(T)] if E else p)


def naive_pairs(z, T, E, form, sigma, tied, weights=None, groups=None):
    "(sum of weighted penalties, sum of weights) by two loops over patients."
    h, total, weight = 1 / (1 + np.exp(-z.numpy())), 0.0, 0.0
    for i in range(len(T)):
        if T[i] < 0 or not E[i]: continue
        for j in range(len(T)):
            if T[j] < 0 or (groups is not None and groups[i] == groups[j]): continue
            if not (T[i] < T[j] or (tied and T[i] == T[j] and not E[j])): continue
            at, w = int(T[i]) + 1, 1 if weights is None else weights[i] * weights[j]
            d = (np.prod(1 - h[j, :at]) - np.prod(1 - h[i, :at])) / sigma
            total, weight = total + w * FORMS[form](d), weight + w
    return total, weight


def deephit(z, T, E, sigma):
    "pycox's ranking loss, as the sum over pairs, and its number of pairs."
    log_survival = F.logsigmoid(-z).cumsum(1)
    log_mass = F.logsigmoid(z) + F.pad(log_survival, (1, 0))[:, :-1]
    pairs = torch.tensor(pair_rank_mat(T.numpy(), E.numpy(), dtype="float64"))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try: mean = rank_loss_deephit_single(log_mass - log_survival[:, -1:], T, E.double(), pairs, sigma, "mean")
    finally: torch.set_default_dtype(before)
    return mean.item() * len(T)**2, int(pairs.sum())


@many
@given(patients(never=False))
def test_likelihood_is_that_of_pycox_shifted_and_of_a_loop(case):
    z, T, E = case
    ours = discrete_time_nll(z, T, E)
    np.testing.assert_allclose(ours, [naive_nll(*one) for one in zip(z, T, E)], rtol=1e-9, atol=1e-12)
    T = T.clamp(max=z.shape[1] - 1)  # pycox has no subject who survives all steps and more
    theirs = nll_logistic_hazard(z, T, E.double(), reduction="none")
    np.testing.assert_allclose(discrete_time_nll(z, torch.where(E, T, T + 1), E), theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_coefficients_are_those_of_a_logistic_regression(seed):
    generator, n, steps = np.random.default_rng(seed), 300, 4
    x = generator.normal(size=(n, 2))
    happens = generator.random((n, steps)) < 1 / (1 + np.exp(1.5 - x @ [0.7, -0.4]))[:, None]
    event, censored = np.where(happens.any(1), happens.argmax(1), steps), generator.integers(0, steps + 1, n)
    T, E = np.minimum(event, censored), event < censored
    coefficients = torch.zeros(steps + 2, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([coefficients], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, history_size=20, line_search_fn="strong_wolfe")
    loss = DiscreteTimeSurvivalLoss()

    def closure():
        optimiser.zero_grad()
        value = loss(coefficients[:steps] + (torch.tensor(x) @ coefficients[steps:])[:, None], torch.tensor(T), torch.tensor(E))
        value.backward()
        return value
    optimiser.step(closure)
    rows = [(i, t) for i in range(n) for t in range(T[i] + E[i])]
    design = np.array([np.concatenate([np.eye(steps)[t], x[i]]) for i, t in rows])
    logistic = LogisticRegression(C=np.inf, fit_intercept=False, solver="newton-cholesky", tol=1e-12, max_iter=200).fit(design, [E[i] and t == T[i] for i, t in rows])
    np.testing.assert_allclose(coefficients.detach(), logistic.coef_[0], atol=1e-6)


@many
@given(patients(2), FORM, st.sampled_from([0.05, 0.1, 1.0]), st.booleans(), BLOCKS)
def test_ranking_is_that_of_two_loops(case, form, sigma, tied, size):
    z, T, E = case
    total, pairs = naive_pairs(z, T, E, form, sigma, tied)
    def ours(): return pairwise_ranking_loss(z, T, E, form=form, sigma=sigma, tied_censored=tied, pairs_per_block=size).item()
    if pairs: assert ours() == pytest.approx(total / pairs, rel=1e-9)
    else:
        with pytest.raises(ValueError, match="no pair is comparable"): ours()
    value, n = PairwiseRankingLoss(form, sigma, tied, size).value_and_pairs(z, T, E)
    assert (value.item(), n.item()) == (ours() if pairs else 0, pairs)


@many
@given(patients(2, never=False), st.sampled_from([0.05, 0.1, 1.0]), st.booleans())
def test_ranking_is_that_of_deephit_in_pycox(case, sigma, tied):
    z, T, E = case
    if not tied:  # the same subjects as pycox counts them: one step less where censored
        inside = E | (T > 0)
        z, T, E = z[inside], T[inside], E[inside]
    assume(len(T))
    total, pairs = deephit(z, T if tied else torch.where(E, T, T - 1), E, sigma)
    assume(pairs)
    assert pairwise_ranking_loss(z, T, E, form="exponential", sigma=sigma, tied_censored=tied).item() == pytest.approx(total / pairs, rel=1e-8)


@some
@given(visits(), FORM, BLOCKS)
def test_ranking_of_visits_weighs_patients_equally_and_compares_nobody_with_himself(case, form, size):
    z, T, E, at_risk = case
    weights, groups = (at_risk.double() / at_risk.sum(1, keepdim=True).clamp(min=1)).flatten().tolist(), torch.arange(len(T)).repeat_interleave(T.shape[1]).tolist()
    total, weight = naive_pairs(z.flatten(0, 1), torch.where(at_risk, T, -1).flatten(), E.flatten(), form, 0.1, True, weights, groups)
    assume(weight)
    assert pairwise_ranking_loss(z, T, E, at_risk, form, pairs_per_block=size).item() == pytest.approx(total / weight, rel=1e-9)


@some
@given(visits(), FORM, BLOCKS, st.data())
def test_ranking_of_visits_with_weights_and_patients_of_several_rows(case, form, size, data):
    "Given weights take the place of equal ones, and rows of one patient are not compared."
    z, T, E, at_risk = case
    weights = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 0.25, 1.0, 3.0]), min_size=at_risk.numel(), max_size=at_risk.numel())), dtype=torch.float64).view(at_risk.shape)
    patients = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=len(T), max_size=len(T))))
    groups = patients.repeat_interleave(T.shape[1]).tolist()
    total, weight = naive_pairs(z.flatten(0, 1), torch.where(at_risk, T, -1).flatten(), E.flatten(), form, 0.1, True, (weights * at_risk).flatten().tolist(), groups)
    value, pairs = PairwiseRankingLoss(form, pairs_per_block=size).value_and_pairs(z, T, E, at_risk, weights, patients)
    assert value.item() == pytest.approx(total / weight if weight else 0, rel=1e-9) and bool(pairs) == bool(weight)


@some
@given(patients(2), FORM, BLOCKS)
def test_gradient_of_the_blocks_is_that_of_the_whole_matrix(case, form, size):
    z, T, E = case
    pairs = E[:, None] & ((T[:, None] < T) | ((T[:, None] == T) & ~E)) & (T >= 0)
    assume(pairs.any())
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    risks = 1 - (1 - a.sigmoid()).cumprod(1)
    at = risks[:, T.clamp(0, z.shape[1] - 1)].T
    d = (at.diagonal()[:, None] - at)[pairs] / 0.1
    (F.softplus(-d) if form == "logistic" else torch.exp(-d)).mean().backward()
    (3 * pairwise_ranking_loss(b, T, E, form=form, pairs_per_block=size)).backward()
    torch.testing.assert_close(b.grad, 3 * a.grad, rtol=1e-8, atol=1e-12)


@some
@given(visits())
def test_likelihood_of_bins_is_that_of_loops_and_of_the_training_loop(case):
    z, T, E, at_risk = case
    means = [np.mean([naive_nll(z[b, v], T[b, v], E[b, v]) for v in range(T.shape[1]) if at_risk[b, v]]) for b in range(len(T)) if at_risk[b].any()]
    if not means:
        with pytest.raises(NobodyAtRisk): horizon_loss(z, T, E, at_risk)
        return
    assert horizon_loss(z, T, E, at_risk).item() == pytest.approx(np.mean(means), rel=1e-9)
    weights = torch.rand(T.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums = [sum(weights[b, v].item() * naive_nll(z[b, v], T[b, v], E[b, v]) for v in range(T.shape[1]) if at_risk[b, v]) for b in range(len(T)) if at_risk[b].any()]
    assert horizon_loss(z, T, E, at_risk, weights).item() == pytest.approx(np.mean(sums), rel=1e-9)
    shares = torch.rand(T.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    def broken(b, v): return 0.0 if E[b, v] or T[b, v] == z.shape[-1] else -shares[b, v].item() * math.log1p(-torch.sigmoid(z[b, v, T[b, v]]).item())
    sums = [sum(weights[b, v].item() * (naive_nll(z[b, v], T[b, v], E[b, v]) + broken(b, v)) for v in range(T.shape[1]) if at_risk[b, v]) for b in range(len(T)) if at_risk[b].any()]
    assert horizon_loss(z, T, E, at_risk, weights, shares).item() == pytest.approx(np.mean(sums), rel=1e-9)
    assert survival_loss(z, {"horizon_bins": T, "horizon_events": E, "at_risk": at_risk, "visit_weights": weights, "horizon_shares": shares}).item() == pytest.approx(np.mean(sums), rel=1e-9)


@some
@given(patients())
def test_likelihood_of_visits_leaves_out_who_never_was_at_risk(case):
    z, T, E = case
    terms = [naive_nll(*one) for one in zip(z, T, E) if one[1] >= 0]
    if not terms:
        with pytest.raises(NobodyAtRisk): survival_nll(z, T, E)
        return
    assert survival_nll(z, T, E).item() == pytest.approx(np.mean(terms), rel=1e-9, abs=1e-12)
    assert survival_loss(z, {"event_times": T, "event_indicators": E}).item() == pytest.approx(np.mean(terms), rel=1e-9, abs=1e-12)


def losses_of(T, E):
    "Every loss of hazards, as a function of logits, with an event for a scale."
    with_event = torch.cat([T, torch.zeros(1, dtype=T.dtype)]), torch.cat([E, torch.ones(1, dtype=torch.bool)])
    hybrid, running = HybridSurvivalLoss(0.5, null_scales(*with_event, 99)), HybridSurvivalLoss(0.5, "running", "exponential")
    tasks = MultiTaskSurvivalLoss({"a": DiscreteTimeSurvivalLoss(), "b": HybridSurvivalLoss(1.0)}, learn_weights=True)
    return {"likelihood": lambda z: survival_nll(z, T, E), "logistic": lambda z: PairwiseRankingLoss()(z, T, E), "exponential": lambda z: PairwiseRankingLoss("exponential")(z, T, E),
            "hybrid": lambda z: hybrid(z, T, E).total, "running": lambda z: running.eval()(z, T, E).total, "tasks": lambda z: tasks({"a": z, "b": z}, {"a": (T, E), "b": (T, E)}).total}


@some
@given(patients(2), st.sampled_from([math.nan, math.inf, 1e4, -3.0]), st.integers(0, 3))
def test_later_steps_and_padding_change_no_loss_and_get_no_gradient(case, junk, extra):
    z, T, E = case
    assume((T >= 0).any())
    step = torch.arange(z.shape[1] + extra)
    beyond = (step > T[:, None]) | (T < 0)[:, None]  # a tied censoring is compared in its own step, which is therefore not beyond
    wide = F.pad(z, (0, extra)).masked_fill(beyond, junk).requires_grad_()
    for name, loss in losses_of(T, E).items():
        value = loss(wide)
        assert value.item() == pytest.approx(loss(z).item(), rel=1e-12, abs=1e-12), name
        gradient, = torch.autograd.grad(value, wide)
        assert (gradient[beyond] == 0).all() and gradient.isfinite().all(), name
    untouched = beyond | (~E[:, None] & (step == T[:, None]))  # the likelihood does not even look at the step of a censoring
    wide = F.pad(z, (0, extra)).masked_fill(untouched, junk).requires_grad_()
    strict = PairwiseRankingLoss(tied_censored=False)
    assert strict(wide, T, E).item() == pytest.approx(strict(z, T, E).item(), rel=1e-12, abs=1e-12)
    gradient, = torch.autograd.grad(survival_nll(wide, T, E) + strict(wide, T, E), wide)
    assert (gradient[untouched] == 0).all()


@some
@given(visits(), st.sampled_from([math.nan, math.inf, -1e4]), st.integers(0, 3))
def test_padded_visits_change_no_loss_and_get_no_gradient(case, junk, extra):
    z, T, E, at_risk = case
    assume(at_risk.any())
    wide = F.pad(torch.where(at_risk[..., None], z, junk), (0, 0, 0, extra), value=junk).requires_grad_()
    more = [F.pad(x, (0, extra)) for x in (T, E, at_risk)]
    durations, known = F.pad(torch.where(at_risk, T.double(), math.nan), (0, extra), value=math.nan), at_risk & (E | (T >= 1))
    weighted = FixedHorizonProgressionLoss(1, torch.tensor([0.0, 5.0]), torch.tensor([False, True]))
    losses = {"likelihood": (lambda z, T, E, m: survival_nll(z, T, E, m)), "ranking": (lambda z, T, E, m: PairwiseRankingLoss()(z, T, E, m)),
              "hybrid": (lambda z, T, E, m: HybridSurvivalLoss(2.0)(z, T, E, m).total), "masked": (lambda z, T, E, m: compute_masked_loss(z[..., 0], E, m)),
              "weighted": (lambda z, T, E, m: weighted(z[..., 0], durations[:, :T.shape[1]], E & (T <= 1), m))}
    if known.any(): losses["left out"] = lambda z, T, E, m: fixed_horizon_loss(z[..., 0], durations[:, :T.shape[1]], E, 1, m)
    for name, loss in losses.items():
        value = loss(wide, *more)
        assert value.item() == pytest.approx(loss(z, T, E, at_risk).item(), rel=1e-12, abs=1e-12), name
        gradient, = torch.autograd.grad(value, wide)
        assert (gradient[~more[2]] == 0).all() and gradient.isfinite().all(), name


@some
@given(visits(), st.sampled_from(["patient", "visit"]))
def test_masked_loss_is_that_of_loops(case, reduction):
    z, T, _, mask = case
    assume(mask.any())
    per_patient = [[(z[b, v, 0].item() - T[b, v].item())**2 for v in range(T.shape[1]) if mask[b, v]] for b in range(len(T))]
    expected = np.mean([np.mean(one) for one in per_patient if one]) if reduction == "patient" else np.mean(sum(per_patient, []))
    assert compute_masked_loss(z[..., 0], T.double(), mask, F.mse_loss, reduction).item() == pytest.approx(expected, rel=1e-9)
    assert compute_masked_loss(z, z * 0, mask, F.mse_loss, "visit").item() == pytest.approx((z[mask]**2).mean().item(), rel=1e-9)
    classes = torch.where(mask, T.clamp(max=z.shape[-1] - 1), -100)
    assert compute_masked_loss(z, classes, mask, F.cross_entropy, "visit").item() == pytest.approx(F.cross_entropy(z[mask], classes[mask]).item(), rel=1e-9, abs=1e-12)


@some
@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from([True, False, False])), min_size=1, max_size=40), st.integers(1, 9))
def test_weights_are_those_of_loops_and_reproduce_kaplan_meier(rows, horizon):
    d, e = torch.tensor([t for t, _ in rows]).double(), torch.tensor([seen for _, seen in rows])
    if d.max() < horizon:
        with pytest.raises(ValueError, match="nobody of the training data was followed"): inverse_censoring_weights(d, e, horizon, d, e)
        horizon = int(d.max())
    assume(horizon > 0)
    def followed(t):  # P(C >= t): at each earlier time, those censored among those not yet gone and without event then
        p = 1.0
        for s in sorted({s for s, _ in rows if s < t}):
            stay = sum(r > s or (r == s and not seen) for r, seen in rows)
            if stay: p *= 1 - sum(r == s and not seen for r, seen in rows) / stay
        return p
    expected = [1 / followed(min(t, horizon)) if t >= horizon or seen else 0 for t, seen in rows]
    weights = inverse_censoring_weights(d, e, horizon, d, e)
    np.testing.assert_allclose(weights, expected, rtol=1e-12)
    labels, known = fixed_horizon_targets(d, e, horizon)
    km = KaplanMeierFitter().fit(d.numpy(), e.numpy())
    assert (weights * labels).mean().item() == pytest.approx(1 - km.predict(horizon), rel=1e-9, abs=1e-12)
    z = torch.linspace(-3, 3, len(rows), dtype=torch.float64)
    each = F.binary_cross_entropy_with_logits(z, labels.double(), reduction="none")
    assert fixed_horizon_loss(z, d, e, horizon, weights=weights).item() == pytest.approx((each * weights).mean().item(), rel=1e-12)
    assert FixedHorizonProgressionLoss(horizon, d, e)(z, d, e).item() == pytest.approx((each * weights).mean().item(), rel=1e-6)
    if known.any(): assert FixedHorizonProgressionLoss(horizon)(z, d, e).item() == pytest.approx(each[known].mean().item(), rel=1e-12)


def all_losses():
    "name -> loss of logits (3, 2, 4) for a batch in which every patient is at risk."
    bins, seen, at_risk = torch.tensor([[1, 0], [2, 2], [4, 3]]), torch.tensor([[True, True], [True, False], [False, False]]), torch.ones(3, 2).bool()
    d = bins.double() + 0.5
    weighted = FixedHorizonProgressionLoss(2, torch.tensor([1.0, 2.0, 2.5]), torch.tensor([False, True, False]))
    tasks = MultiTaskSurvivalLoss({"a": DiscreteTimeSurvivalLoss(), "b": PairwiseRankingLoss()}, learn_weights=True)
    return {"likelihood": lambda z: DiscreteTimeSurvivalLoss()(z, bins, seen, at_risk), "visits": lambda z: survival_nll(z[:, 0], bins[:, 0], seen[:, 0]), "horizon": lambda z: horizon_loss(z, bins, seen, at_risk),
            "ranking": lambda z: PairwiseRankingLoss()(z, bins, seen, at_risk), "exponential": lambda z: PairwiseRankingLoss("exponential")(z[:, 0], bins[:, 0], seen[:, 0]),
            "hybrid": lambda z: HybridSurvivalLoss(0.3, null_scales(bins, seen, 4, at_risk))(z, bins, seen, at_risk).total, "running": lambda z: HybridSurvivalLoss(0.3, "running").eval()(z, bins, seen, at_risk).total,
            "masked": lambda z: compute_masked_loss(z[..., 0], seen, at_risk), "left out": lambda z: fixed_horizon_loss(z[..., 0], d, seen, 2), "weighted": lambda z: weighted(z[..., 0], d, seen),
            "tasks": lambda z: tasks({"a": z, "b": z}, {"a": (bins, seen), "b": (bins, seen)}).total, "mean": lambda z: mean_over_patients(z[..., 0], at_risk), "sum": lambda z: combine_tasks(z[0, 0], torch.ones(4))}


@pytest.mark.parametrize("name", all_losses())
def test_gradcheck(name):
    for seed in range(3):
        z = torch.randn(3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        assert torch.autograd.gradcheck(all_losses()[name], (z,))


@pytest.mark.parametrize("name", sorted(set(all_losses()) - {"sum"}))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_used_for_nothing_but_the_logits(name, dtype):
    loss = all_losses()[name]
    z = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    single, half = z.float().requires_grad_(), z.clone().requires_grad_()
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast): value = loss(half)
        assert value.dtype == torch.float32 and value.item() == loss(single).item()
        gradient, = torch.autograd.grad(value, half)
        torch.testing.assert_close(gradient.float(), torch.autograd.grad(loss(single), single)[0], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", sorted(set(all_losses()) - {"sum"}))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_logits_give_finite_losses_and_gradients(name, dtype):
    for signs in (1, -1, torch.tensor([1, -1, 1, -1]), torch.tensor([[1], [-1]]), torch.tensor([[[1]], [[-1]], [[0]]])):
        z = (torch.full((3, 2, 4), 6e4) * signs).to(dtype).requires_grad_()
        value = all_losses()[name](z)
        value.backward()
        assert value.isfinite() and z.grad.isfinite().all()


@pytest.mark.parametrize("name", sorted(set(all_losses()) - {"mean", "sum"}))
def test_logits_that_count_and_are_not_finite_raise(name):
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not finite"): all_losses()[name](torch.full((3, 2, 4), value))


def test_hybrid_reports_what_it_adds_up():
    generator = torch.Generator().manual_seed(0)
    z, T = torch.randn(50, 5, generator=generator, dtype=torch.float64).requires_grad_(), torch.randint(0, 6, (50,), generator=generator)
    E = (torch.rand(50, generator=generator) < 0.4) & (T < 5)
    out = HybridSurvivalLoss(0.7, (2.0, 4.0), sigma=0.2)(z, T, E)
    assert out.likelihood.item() == survival_nll(z, T, E).item() and out.ranking.item() == pairwise_ranking_loss(z, T, E, sigma=0.2).item()
    assert out.total.item() == pytest.approx(out.likelihood.item() / 2 + 0.7 * out.ranking.item() / 4)
    running = HybridSurvivalLoss(0.7, "running")
    assert running(z, T, E).total.requires_grad and not running.scales.requires_grad
    slope, = torch.autograd.grad(running(z, T, E).total, z)  # the scales are constants: the gradient is that of the weighted sum
    a, = torch.autograd.grad(survival_nll(z, T, E), z)
    b, = torch.autograd.grad(pairwise_ranking_loss(z, T, E), z)
    torch.testing.assert_close(slope, a / running.scales[0] + 0.7 * b / running.scales[1], rtol=1e-5, atol=1e-9)
    state = HybridSurvivalLoss(0.7, "running")
    state.load_state_dict(running.state_dict())  # a resumed run goes on with its scales
    assert torch.equal(state.scales, running.scales)


def test_several_outcomes_some_without_anybody_at_risk():
    z, T, E = torch.zeros(2, 3), torch.tensor([1, 2]), torch.tensor([True, False])
    loss = MultiTaskSurvivalLoss({"a.b": DiscreteTimeSurvivalLoss(), "c": DiscreteTimeSurvivalLoss()}, learn_weights=True)
    total, tasks = loss({"a.b": z, "c": z}, {"a.b": (T, E), "c": (T * 0 - 1, E)})
    total.backward()
    assert list(tasks) == ["a.b"] and loss.log_variances.grad[1] == 0 and loss.log_variances.grad[0] != 0
    with torch.no_grad(): loss.log_variances.copy_(torch.tensor([-1e9, 1e9]))
    assert loss({"a.b": z, "c": z}, {"a.b": (T, E), "c": (T, E)}).total.isfinite()
    with pytest.raises(ValueError, match="expected integer steps"): loss({"a.b": z, "c": z}, {"a.b": (T.float(), E), "c": (T, E)})  # a mistake is not taken for nobody at risk


MEASURE = """
import re, resource, sys, torch
from ehr_sequencing.ranking import HybridSurvivalLoss
torch.set_num_threads(1)
def peak():
    if sys.platform == "linux": return int(re.search("VmHWM:\\\\s+(\\\\d+)", open("/proc/self/status").read())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
def run(n, form, K):
    g = torch.Generator().manual_seed(0)
    z, T = torch.randn(n, K, generator=g).requires_grad_(), torch.randint(0, K + 1, (n,), generator=g)
    HybridSurvivalLoss(form=form)(z, T, (torch.rand(n, generator=g) < 0.9) & (T < K)).total.backward()
    assert z.grad.isfinite().all()
run(300, "logistic", 30)
before = peak()
for form in ("logistic", "exponential"):  # one step is the worst case: 25 million pairs at once
    for K in (30, 1): run(10_000, form, K)
print((peak() - before) // 1024)
"""


def test_ten_thousand_patients_fit_in_far_less_than_a_gigabyte():
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True, cwd=ROOT)
    assert 5 < int(done.stdout) < 400
