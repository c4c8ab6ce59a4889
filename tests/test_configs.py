"Parameters and memory of configurations: drawn sizes against built models, estimates against what training took."
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ehr_sequencing.behrt import count_parameters
from ehr_sequencing.configs import MODEL_TYPES, SIZES, EHRModelConfig, _example_batch, get_model_config, measure_memory_gb

drawn_sizes = st.fixed_dictionaries({"embedding_dim": st.integers(1, 20).map(lambda n: 2 * n), "hidden_size": st.integers(1, 10).map(lambda n: 4 * n), "num_layers": st.integers(1, 4), "max_age": st.integers(1, 120), "use_time": st.booleans()})
transformer_sizes = st.fixed_dictionaries({"num_heads": st.sampled_from([1, 2, 4]), "intermediate_size": st.integers(1, 50), "position": st.sampled_from(["sinusoidal", "learned"]), "max_visits": st.integers(1, 30)})


@settings(max_examples=150, deadline=None)
@given(model_type=st.sampled_from(list(MODEL_TYPES)), sizes=drawn_sizes, more=transformer_sizes, vocab_size=st.integers(6, 200), n_bins=st.integers(0, 8), visit_encoder=st.sampled_from(["mean", "sum", "max", "attention", "lstm"]))
def test_parameters_are_those_of_the_built_model(model_type, sizes, more, vocab_size, n_bins, visit_encoder):
    changes = sizes | ({"visit_encoder": visit_encoder} if model_type == "lstm" else more)
    config = EHRModelConfig(model_type=model_type, vocab_size=vocab_size, horizons=tuple(range(30, 30 + n_bins)) or None, changes=changes)
    assert config.n_parameters == count_parameters(config.build())[0] == round(config.total_params_millions * 1e6)
    assert EHRModelConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_memory_grows_with_what_it_should(model_type):
    for size in SIZES:
        one, two = (get_model_config(size, model_type, batch_size=b, gradient_accumulation_steps=32 // b) for b in (4, 8))
        assert one.effective_batch_size == two.effective_batch_size == 32
        assert 2 * one.memory_parts()["activations"] == pytest.approx(two.memory_parts()["activations"])
        assert one.memory_estimate_gb < two.memory_estimate_gb
        longer = get_model_config(size, model_type, batch_size=4, max_tokens=1024)
        assert longer.memory_parts()["activations"] >= 1.99 * one.memory_parts()["activations"]


def kept_numbers(config):
    "How many numbers of four bytes PyTorch keeps for the backward pass, weights apart."
    batch, model, kept = _example_batch(config, torch.Generator().manual_seed(0)), config.build().train(), {}
    weights = {p.data_ptr() for p in model.parameters()}
    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights: kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t): _ = model.loss(model(batch), batch)
    return sum(n for n, _ in kept.values()) / 4


@pytest.mark.parametrize("model_type, changes, share", [("lstm", {"visit_encoder": "sum"}, 1.0), ("lstm", {"visit_encoder": "max"}, 0.76), ("lstm", {"visit_encoder": "attention"}, 0.81), ("lstm", {"visit_encoder": "lstm"}, 0.21),
                                                        ("transformer", {"position": "learned"}, 1.0), ("transformer", {"use_time": False}, 1.0), ("transformer", {"embedding_dim": 128}, 1.0), ("transformer", {"horizons": None}, 1.0),
                                                        ("transformer", {"attention_dropout": 0.1}, 0.5), ("transformer", {"visit_heads": 2}, 0.78), ("transformer", {"packed": True}, 0.83), ("transformer", {"dropout": 0.0}, 1.12),
                                                        ("hierarchical", {"pooling": "max"}, 0.96), ("hierarchical", {"pooling": "attention"}, 0.96), ("hierarchical", {"use_time": False}, 1.0)])
def test_activations_counted_are_this_share_of_those_kept(model_type, changes, share):
    "The chapter says of which options the formula knows, and how far off it is for the others."
    config = get_model_config("small", model_type, vocab_size=500, batch_size=2, max_tokens=256, **changes)
    assert config.memory_parts()["activations"] * 1e9 / 4 / kept_numbers(config) == pytest.approx(share, rel=0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("model_type, changes", [("lstm", {}), ("transformer", {"batch_size": 8}), ("hierarchical", {"batch_size": 8, "gradient_accumulation_steps": 2}), ("transformer", {"batch_size": 8, "gradient_checkpointing": True})])
def test_memory_is_what_training_takes(model_type, changes):
    config = get_model_config("small", model_type, **changes)
    assert config.memory_estimate_gb == pytest.approx(measure_memory_gb(config), rel=0.2)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_training_that_fails_is_told():
    config = get_model_config("small", "lstm", batch_size=1)
    with pytest.raises(RuntimeError, match="ended with status"): measure_memory_gb(config, steps="none")
