"Classification: the loss against a plain loop, labels against a plain lookup, for any labels and any that are missing."
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ehr_sequencing.classification import MISSING, ClassLabels, class_probabilities, classification_loss


def sigmoid(z): return 1 / (1 + np.exp(-z))


def looped_loss(logits, labels, problem, weights):
    "The sum over known labels, written out, and their number."
    total = n = 0
    for b, row in enumerate(labels):
        if problem == "multiclass":
            if row == MISSING: continue
            p = np.exp(logits[b]) / np.exp(logits[b]).sum()
            total, n = total - weights[row] * np.log(p[row]), n + 1
            continue
        for k, y in enumerate(np.atleast_1d(row)):
            if np.isnan(y): continue
            z = np.atleast_1d(logits[b])[k]
            total, n = total - (weights[k] * np.log(sigmoid(z)) if y else np.log(1 - sigmoid(z))), n + 1
    return total, n


def draw(problem, B, K, missing, seed):
    "Logits, labels of which a share is missing, weights."
    rng = np.random.default_rng(seed)
    shape = (B,) if problem == "binary" else (B, K)
    logits, weights = rng.normal(0, 3, shape), rng.uniform(0.1, 9, 1 if problem == "binary" else K)
    if problem == "multiclass": labels = np.where(rng.random(B) < missing, MISSING, rng.integers(0, K, B))
    else: labels = np.where(rng.random(shape) < missing, np.nan, rng.integers(0, 2, shape))
    return torch.tensor(logits, requires_grad=True), torch.tensor(labels), weights


drawn = dict(problem=st.sampled_from(["binary", "multiclass", "multilabel"]), B=st.integers(1, 12), K=st.integers(2, 5), missing=st.sampled_from([0, 0.3, 0.9, 1]), seed=st.integers(0, 999))


@settings(max_examples=300, deadline=None)
@given(**drawn)
def test_the_loss_is_that_of_a_plain_loop(problem, B, K, missing, seed):
    logits, labels, weights = draw(problem, B, K, missing, seed)
    loss, n = classification_loss(logits, labels, problem, weights.tolist() if problem != "binary" else weights[0])
    total, count = looped_loss(logits.detach().numpy(), labels.numpy(), problem, weights)
    assert int(n) == count and np.isclose(loss.item(), total / max(count, 1), atol=1e-9)
    loss.backward()  # finite everywhere, and zero where the label is missing
    known = (labels != MISSING) if problem == "multiclass" else ~labels.isnan()
    assert torch.isfinite(logits.grad).all() and not logits.grad[~known].any() and (logits.grad[known] != 0).any() == bool(count)


@settings(max_examples=100, deadline=None)
@given(**drawn, cut=st.integers(0, 12))
def test_parts_add_up_and_integers_are_labels_too(problem, B, K, missing, seed, cut):
    logits, labels, weights = draw(problem, B, K, missing, seed)
    whole, n = classification_loss(logits, labels, problem)
    parts = [classification_loss(logits[s], labels[s], problem) for s in (slice(cut), slice(cut, None)) if len(labels[s])]
    assert int(n) == sum(int(k) for _, k in parts)
    if n: assert torch.isclose(sum(a * k for a, k in parts) / n, whole)
    if problem == "multiclass": return
    integers = torch.where(labels.isnan(), MISSING, labels.nan_to_num()).long()
    assert torch.equal(classification_loss(logits, integers, problem)[0], whole)


@settings(max_examples=100, deadline=None)
@given(p=st.lists(st.floats(0.01, 0.99), min_size=2, max_size=6), seed=st.integers(0, 99))
def test_probabilities_are_true_where_the_weighted_loss_is_smallest(p, seed):
    "At the optimum of the weighted loss, dividing the weights out gives the true probabilities."
    weights = np.random.default_rng(seed).uniform(0.2, 8, len(p))
    p = torch.tensor(p, dtype=torch.float64)
    z = (torch.tensor(weights) * p / (1 - p)).log().requires_grad_()
    sum(share[i] * classification_loss(z[i:i + 1], torch.tensor([y]), "binary", weights[i])[0] for i in range(len(p)) for y, share in ((1., p), (0., 1 - p))).backward()
    assert z.grad.abs().max() < 1e-9
    assert torch.allclose(class_probabilities(z.detach().unsqueeze(0), "multilabel", weights.tolist())[0], p)
    p = p / p.sum()
    z = (torch.tensor(weights) * p).log().requires_grad_()
    sum(p[k] * classification_loss(z.unsqueeze(0), torch.tensor([k]), "multiclass", weights.tolist())[0] for k in range(len(p))).backward()
    assert z.grad.abs().max() < 1e-9
    assert torch.allclose(class_probabilities(z.detach().unsqueeze(0), "multiclass", weights.tolist())[0], p)


@settings(max_examples=100, deadline=None)
@given(places=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), unique=True, min_size=1), seed=st.integers(0, 99), many=st.booleans())
def test_labels_are_those_of_the_landmark(places, seed, many):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 9, (len(places), 2) if many else len(places))
    attach = ClassLabels([r for r, _ in places], [v for _, v in places], labels)
    first = np.array([rng.integers(0, v + 1) for _, v in places])  # windows that begin late
    order = rng.permutation(len(places))
    lengths = torch.tensor([places[i][1] - first[i] + 1 for i in order])
    batch = {"rows": torch.tensor([places[i][0] for i in order]), "first_visits": torch.tensor(first[order]), "sequence_mask": torch.arange(5) < lengths.unsqueeze(1)}
    found = attach(batch)["labels"]
    assert found.dtype == torch.int64 and found.tolist() == labels[order].tolist()
    longer = batch | {"first_visits": batch["first_visits"] + 10}
    with pytest.raises(ValueError, match=f"{len(places)} of {len(places)} histories do not end at a landmark"): attach(longer)
