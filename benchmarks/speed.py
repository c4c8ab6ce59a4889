"""What the library's way of computing saves, side by side in one process: a training step, pooling, and the visit LSTM.

    python benchmarks/speed.py                       # all of it, small preset on the processor; about seven minutes
    python benchmarks/speed.py --what pretraining --device cuda --size large
    python benchmarks/speed.py --what aggregation    # pooling and the visit LSTM only

**Pre-training**: real tokens per second of a full training step of masked-code prediction (forward, backward, AdamW). Records have a heavy tail: their lengths here are log-normal with a mean of about 73 tokens, capped at 512. Compared are

- ours: `BatchLoader`'s batches of similar length, `BEHRTForMLM`, which encodes in its last block, and gives logits for, the masked codes only;
- a plain reference as a textbook has it: `nn.TransformerEncoder` with its defaults, 64 random patients padded to the longest, logits for all positions;
- Hugging Face's `BertForMaskedLM` of the same width and depth, on those random batches and on our batches, with logits for all positions, as it comes;
- the arithmetic limit: every matrix product of our step, of its own shape, timed alone, the fastest of three. Products with our padding are among them, and attention is taken as plain products, which a fused kernel may beat. What is missing to 100 % is nearly all that is not a matrix product.

All see the same masks, 15 % of the codes. Rounds are interleaved, so that a busy moment of the machine strikes all; ratios are taken within a round. Masking and batching are done before the clock starts, for all alike.
On a GPU an arm that cannot be run there is reported and left out; ours must run. Written to speed.md.

**Aggregation**: milliseconds of the forward and of the backward pass of pooling tokens to visits, against loops over patients and visits, and of the LSTM over the codes of each visit, against loops over visits. Every arm computes the same; it is checked before the clock starts. Written to aggregation_speed.md.

Prints, and writes pages to benchmarks/results (with _cuda in their names on a GPU).
"""
import contextlib
import datetime
import os
import platform
import time
from pathlib import Path

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from fastcore.script import call_parse
from torch import nn
from transformers import BertConfig, BertForMaskedLM, __version__ as transformers_version

from ehr_sequencing.aggregation import VISIT_POOLINGS, VisitPooling, count_tokens, pool_visits
from ehr_sequencing.batches import BatchLoader, make_batch
from ehr_sequencing.behrt import BEHRTConfig
from ehr_sequencing.events import EventTable, event_table
from ehr_sequencing.masked_codes import BEHRTForMLM, MaskCodes
from ehr_sequencing.sequences import build_store
from ehr_sequencing.visit_encoders import LSTMVisitEncoder
from ehr_sequencing.vocabulary import fit_vocabulary

RESULTS = Path(__file__).resolve().parent / "results"
TOKEN_BUDGET, MAX_TOKENS, REFERENCE_PATIENTS, DROPOUT, SIGMA = 8192, 512, 64, 0.1, 1.0


def heavy_tailed_store(n, n_codes, seed=0):
    "Patients whose numbers of tokens are log-normal with a mean of about 73 after the cap; visits of four codes, which follow a Zipf distribution."
    generator = np.random.default_rng(seed)
    z = generator.normal(size=n)
    grid = np.linspace(2, 6, 401)
    means = [np.clip(np.exp(m + SIGMA * z), 2, MAX_TOKENS).mean() for m in grid]
    lengths = np.clip(np.exp(grid[np.argmin(np.abs(np.array(means) - 73))] + SIGMA * z), 2, MAX_TOKENS).astype(int)
    owner = np.repeat(np.arange(n), lengths)
    place = np.arange(len(owner)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    codes = (generator.zipf(1.2, len(owner)) - 1) % n_codes
    times = np.datetime64("2010-01-01T08:00", "us") + (place // 4) * np.timedelta64(30, "D") + (place % 4) * np.timedelta64(1, "m")
    events = event_table(pl.DataFrame({"subject_id": owner, "time": times, "code": pl.Series(codes).cast(pl.String), "numeric_value": pl.Series([None] * len(owner), dtype=pl.Float32)}))
    store = build_store(EventTable(events), fit_vocabulary(events, min_patients=1))
    return store, lengths


class Textbook(nn.Module):
    "Token and position embeddings, PyTorch's encoder with its defaults, logits for every position."
    def __init__(self, config):
        super().__init__()
        d = config.hidden_size
        self.code, self.position = nn.Embedding(config.vocab_size, d), nn.Embedding(MAX_TOKENS, d)
        layer = nn.TransformerEncoderLayer(d, config.num_heads, config.intermediate_size, DROPOUT, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, config.num_layers, enable_nested_tensor=False)
        self.output = nn.Linear(d, config.vocab_size)

    def forward(self, batch):
        x = self.code(batch["codes"]) + self.position.weight[:batch["codes"].shape[1]]
        logits = self.output(self.encoder(x, src_key_padding_mask=~batch["attention_mask"]))
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)


class HuggingFace(nn.Module):
    "`BertForMaskedLM` of the same sizes, with the same dropout as ours: on what is added, not on the attention weights, where it would cost it its fused kernel."
    def __init__(self, config):
        super().__init__()
        self.bert = BertForMaskedLM(BertConfig(vocab_size=config.vocab_size, hidden_size=config.hidden_size, num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads, intermediate_size=config.intermediate_size,
                                               max_position_embeddings=MAX_TOKENS, hidden_dropout_prob=config.dropout, attention_probs_dropout_prob=0.0, attn_implementation="sdpa"))

    def forward(self, batch): return self.bert(input_ids=batch["codes"], attention_mask=batch["attention_mask"].long(), labels=batch["labels"]).loss


class Ours(nn.Module):
    "`BEHRTForMLM`; as a variant, with a last block that computes all tokens."
    def __init__(self, config, read_all=False):
        super().__init__()
        self.model, self.read_all = BEHRTForMLM(config), read_all

    def forward(self, batch):
        if not self.read_all: return self.model.loss(self.model(batch), batch)[0]
        hidden, at = self.model.behrt.encode(batch), batch["masked_positions"]
        picked = hidden.gather(1, at.clamp(min=0).unsqueeze(-1).expand(-1, -1, hidden.shape[2]))[at >= 0]
        return self.model.loss(self.model.head(picked, self.model.behrt.embedding.code.weight), batch)[0]


def with_labels(batch, device):
    "Labels for every position as well, -100 where nothing is masked, and everything on the device."
    labels, at = torch.full_like(batch["codes"], -100), batch["masked_positions"]
    rows, slots = (at >= 0).nonzero(as_tuple=True)
    labels[rows, at[rows, slots]] = batch["masked_labels"][rows, slots]
    return {k: v.to(device) for k, v in (batch | {"labels": labels}).items()}


def tokens_of(batches): return sum(int(b["attention_mask"].sum()) for b in batches)


def padding_of(batches): return 1 - tokens_of(batches) / sum(b["codes"].numel() for b in batches)


class Clock:
    "Seconds of calls, with the device finished before and after."
    def __init__(self, device, precision): self.device, self.precision = device, precision
    def context(self): return torch.autocast(self.device, torch.bfloat16) if self.precision == "bf16" else contextlib.nullcontext()

    def __call__(self, function):
        if self.device == "cuda": torch.cuda.synchronize()
        began = time.perf_counter()
        function()
        if self.device == "cuda": torch.cuda.synchronize()
        return time.perf_counter() - began


def make_epoch(build, batches, clock, compiled=False):
    "A function that trains a fresh model on batches, one step each."
    torch.manual_seed(0)
    model = build().to(clock.device).train()
    run = torch.compile(model, dynamic=True) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    def epoch():
        for batch in batches:
            optimizer.zero_grad()
            with clock.context(): loss = run(batch)
            loss.backward()
            optimizer.step()
    return epoch


def products(config, batch):
    "The matrix products of our forward pass on a batch: (rows, from, to) of linear layers, and (B, queries, keys) of attention."
    n, m = batch["codes"].numel(), int((batch["masked_positions"] >= 0).sum())
    d, e, w = config.hidden_size, config.embedding_dim, config.intermediate_size
    whole, last = [(n, d, d)] * 4 + [(n, d, w), (n, w, d)], [(n, d, d)] * 2 + [(m, d, d)] * 2 + [(m, d, w), (m, w, d)]
    (B, L), M = batch["codes"].shape, batch["masked_positions"].shape[1]
    return [(n, e, d), *whole * (config.num_layers - 1), *last, (m, d, e), (m, e, config.vocab_size)], [(B, L, L)] * (config.num_layers - 1) + [(B, M, L)]


def make_limit(config, batches, clock):
    "A function that gives the seconds of all matrix products of an epoch, forward and backward, each alone and as the fastest of three; and their number of operations."
    dtype = torch.bfloat16 if clock.precision == "bf16" else torch.float32
    draw = lambda *shape: torch.randn(*shape, device=clock.device, dtype=dtype)
    heads, width, calls, operations = config.num_heads, config.hidden_size // config.num_heads, [], 0
    biggest = max(max(r * i, i * o, r * o) for b in batches for r, i, o in products(config, b)[0])
    pool = draw(3, max(biggest, max(B * heads * M * L for b in batches for B, M, L in products(config, b)[1])))
    take = lambda k, *shape: pool[k, :int(np.prod(shape))].view(*shape)
    for batch in batches:
        linear, attention = products(config, batch)
        for r, i, o in linear:
            x, w, g = take(0, r, i), take(1, o, i), take(2, r, o)
            calls += [lambda x=x, w=w: x @ w.T, lambda g=g, w=w: g @ w, lambda g=g, x=x: g.T @ x]
            operations += 6 * r * i * o
        for B, M, L in attention:
            q, k, p = take(0, B * heads, M, width), take(1, B * heads, L, width), take(2, B * heads, M, L)
            calls += [lambda q=q, k=k: q @ k.mT, lambda p=p, k=k: p @ k] * 2 + [lambda p=p, q=q: p.mT @ q] * 2
            operations += 12 * B * heads * M * L * width
    return lambda: sum(min(clock(call) for _ in range(3)) for call in calls), operations


def peak(clock):
    "Operations a second of one large square product."
    n = 8192 if clock.device == "cuda" else 2048
    a = torch.randn(n, n, device=clock.device, dtype=torch.bfloat16 if clock.precision == "bf16" else torch.float32)
    return 2 * n**3 / min(clock(lambda: a @ a) for _ in range(5))


def warm_up(epochs, device):
    "Run every arm once. On a GPU those that fail are taken out: name -> error, in one line."
    failed = {}
    for name in list(epochs):
        try: epochs[name]()
        except Exception as error:  # a compiler or a kernel that this GPU or this version of torch does not have
            if device == "cpu" or name == "ours": raise
            failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            del epochs[name]
    return failed


def median_range(values, form="{:.2f}"): return f"{form.format(np.median(values))} ({form.format(min(values))} to {form.format(max(values))})"


def where_and_when(clock):
    "Date, machine and versions, for the head of a page."
    where = torch.cuda.get_device_name() if clock.device == "cuda" else f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{datetime.date.today()}, {where}, {clock.precision}, Python {platform.python_version()}, torch {torch.__version__}"


def pretraining(size, patients, vocab, rounds, device):
    "Lines of the page on training steps."
    clock, patients = Clock(device, "bf16" if device == "cuda" else "fp32"), patients or (20_000 if device == "cuda" else 2000)
    store, lengths = heavy_tailed_store(patients, vocab)
    n = len(store.vocabulary)
    config = getattr(BEHRTConfig, size)(n, attention="bidirectional", dropout=DROPOUT)
    change = lambda **changes: BEHRTConfig(**vars(config) | changes)
    mask = MaskCodes(n)
    loader = BatchLoader(store, token_budget=TOKEN_BUDGET if device == "cpu" else 16 * TOKEN_BUDGET, max_tokens=MAX_TOKENS, shuffle=True, layout="flat", transform=mask)
    began = time.perf_counter()
    ours = [with_labels(b, device) for b in loader]
    preparation = time.perf_counter() - began
    order = np.random.default_rng(1).permutation(len(store))
    n_random = min(3 if device == "cpu" else 50, len(store) // REFERENCE_PATIENTS)
    random = [with_labels(mask(make_batch(store, order[i * REFERENCE_PATIENTS:(i + 1) * REFERENCE_PATIENTS], max_tokens=MAX_TOKENS, layout="flat")), device) for i in range(n_random)]
    third = sorted(ours, key=lambda b: b["codes"].shape[1])[1::3] if device == "cpu" else ours  # every third by length: enough for what is several times slower

    limit, operations = make_limit(config, ours, clock)
    arms = {"ours": (lambda: Ours(config), ours), "ours, padding dropped (packed)": (lambda: Ours(change(packed=True)), ours),
            "ours, last block computes all": (lambda: Ours(config, read_all=True), ours),
            "Hugging Face on our batches": (lambda: HuggingFace(config), third), "Hugging Face on our batches, no dropout": (lambda: HuggingFace(change(dropout=0.0)), third), "ours, no dropout": (lambda: Ours(change(dropout=0.0)), ours),
            "Hugging Face on random batches": (lambda: HuggingFace(config), random), "textbook on random batches": (lambda: Textbook(config), random)}
    epochs = {name: make_epoch(build, batches, clock) for name, (build, batches) in arms.items()}
    if device == "cuda":
        torch._dynamo.config.cache_size_limit = 64  # the arms share code that is compiled for each of them; beyond the limit it would run uncompiled
        arms |= {f"{name}, compiled": arms[name] for name in ("ours", "ours, padding dropped (packed)", "Hugging Face on our batches")}
        epochs |= {name: make_epoch(*arms[name], clock, compiled=True) for name in arms if name.endswith("compiled")}
    limit()
    failed = warm_up(epochs, device)
    arms = {name: arm for name, arm in arms.items() if name not in failed}
    speed, of_limit = {name: [] for name in arms}, []
    for r in range(rounds):
        for name, (_, batches) in arms.items(): speed[name].append(tokens_of(batches) / clock(epochs[name]))
        of_limit.append(limit() / (tokens_of(ours) / speed["ours"][-1]))
        print(f"round {r + 1} of {rounds}: ours {speed['ours'][-1]:,.0f} real tokens/s, {of_limit[-1]:.0%} of the limit", flush=True)
    ratio = lambda name: np.array(speed["ours"]) / np.array(speed[name])
    seconds, rate = tokens_of(ours) / np.median(speed["ours"]), peak(clock)
    shares = " and ".join(f"{operations * np.median(speed[name]) / tokens_of(ours) / rate:.0%} ({name})" for name in ("ours", "ours, compiled") if name in speed)

    lines = ["# Speed of pre-training", "", f"`python benchmarks/speed.py --what pretraining{'' if device == 'cpu' else ' --device cuda'}{'' if size == 'small' else f' --size {size}'}`, {where_and_when(clock)}, transformers {transformers_version}.", "",
             f"{patients:,} patients with {lengths.mean():.0f} tokens on average (log-normal, capped at {MAX_TOKENS}; half of all tokens are in records of {np.sort(lengths)[np.searchsorted(np.cumsum(np.sort(lengths)), lengths.sum() / 2)]} or more), {n:,} tokens in the vocabulary, {size} preset, dropout {DROPOUT}, "
             f"medians and ranges of {rounds} interleaved rounds. A training step is forward, backward and AdamW.", "",
             "| arm | padding | real tokens/s | ours is faster by |", "|---|---|---|---|"]
    for name, (_, batches) in arms.items():
        kept = padding_of(batches)
        lines.append(f"| {name} | {kept:.0%} | {np.median(speed[name]):,.0f} | {'' if name == 'ours' else median_range(ratio(name))} |")
    lines += [f"| {name} | | failed: {error} | |" for name, error in failed.items()]
    sides = "ours, no dropout", "Hugging Face on our batches, no dropout"
    if all(name in speed for name in sides): lines += ["", f"Without dropout on either side ours is {median_range(np.array(speed[sides[0]]) / np.array(speed[sides[1]]))} times as fast as Hugging Face on our batches."]
    lines += ["", f"**What the arms do not share.** Ours gives logits for the masked codes only, through output weights of width {config.embedding_dim}; the others give them at all positions, through weights of width {config.hidden_size}, and take their loss from the masked ones. "
              f"The textbook has dropout on the attention weights too, PyTorch's default, and with it a processor has no fused attention. Ours adds the embeddings of ages, visits and times. On our batches Hugging Face has the gain of similar lengths as well.", "",
              f"**Arithmetic limit.** All matrix products of our step, each of its own shape and timed alone (the fastest of three), take {median_range(of_limit, '{:.0%}')} of the step's time: that share of the limit is reached. The step does {operations / tokens_of(ours) / 1e6:.2f} million operations a real token, those on padding included; "
              f"they run at this share of the rate of one large square product: {shares}.", "",
              f"Batching and masking {tokens_of(ours):,} tokens took {preparation:.2f} s, {preparation / seconds:.0%} of an epoch's training; worker processes of the loader can do it meanwhile."]
    return lines


def loop_over_visits(hidden, visit_ids, n_visits):
    "Mean of each visit's tokens, patient by patient and visit by visit, as one writes it down first."
    pooled = hidden.new_zeros(len(hidden), n_visits, hidden.shape[2])
    for b in range(len(hidden)):
        for v in range(n_visits):
            tokens = hidden[b][visit_ids[b] == v]
            if len(tokens): pooled[b, v] = tokens.mean(0)
    return pooled


def loop_over_rows(hidden, visit_ids, n_visits):
    "The same loop, written so that the backward pass need not fill a tensor of the size of the whole batch for every visit."
    rows = []
    for x, ids in zip(hidden.unbind(), visit_ids.unbind()):
        masks = [ids == v for v in range(n_visits)]
        rows.append(torch.stack([x[mask].mean(0) if mask.any() else x.new_zeros(x.shape[1]) for mask in masks]))
    return torch.stack(rows)


def loop_over_pieces(hidden, pieces):
    "The same where the number of tokens of each visit is known beforehand and tokens stand in the order of visits: a loop without any search."
    return torch.stack([torch.stack([piece.mean(0) if len(piece) else x.new_zeros(x.shape[1]) for piece in x.split(sizes)[:-1]]) for x, sizes in zip(hidden.unbind(), pieces)])


def second_dimension(hidden, visit_ids, n_visits):
    "scatter_add along the second dimension of (B, L, d)."
    slots = torch.where(visit_ids < 0, n_visits, visit_ids).unsqueeze(-1)
    sums = hidden.new_zeros(len(hidden), n_visits + 1, hidden.shape[2]).scatter_add(1, slots.expand_as(hidden), hidden)
    return sums[:, :n_visits] / count_tokens(visit_ids, n_visits).clamp(min=1).unsqueeze(-1)


def one_hot_product(hidden, visit_ids, n_visits):
    "A product with the (B, V, L) matrix that says which token belongs to which visit."
    belongs = (visit_ids.unsqueeze(1) == torch.arange(n_visits, device=hidden.device).view(1, -1, 1)).to(hidden.dtype)
    return belongs @ hidden / belongs.sum(-1, keepdim=True).clamp(min=1)


def visit_by_visit(encoder, batch):
    "`LSTMVisitEncoder` called for one visit after another, (B, 1, C) at a time."
    return torch.cat([encoder({name: x[:, v:v + 1] for name, x in batch.items()}) for v in range(batch["visit_codes"].shape[1])], 1)


def plain_loop(encoder, batch):
    "What a textbook has: one LSTM call a visit over its padded codes, of which the state after the last real one is kept."
    visits, x = [], encoder.code(batch["visit_codes"])
    last = (batch["visit_mask"].sum(-1) - 1).clamp(min=0)  # (B, V)
    for v in range(x.shape[1]):
        states, _ = encoder.lstm(x[:, v])  # (B, C, d)
        state = states[torch.arange(len(x), device=x.device), last[:, v]].masked_fill(~batch["visit_mask"][:, v, :1], 0)
        visits.append(state + encoder.age(batch["visit_ages"][:, v]) + encoder.time(batch["time_features"][:, v]))
    return torch.stack(visits, 1)


def passes(clock, forward, inputs, repeat):
    "Median milliseconds of a forward and of a backward pass."
    spent = []
    for _ in range(repeat):
        out = []
        first = clock(lambda: out.append(forward()))
        gradient = torch.ones_like(out[0])
        spent.append((1000 * first, 1000 * clock(lambda: torch.autograd.grad(out[0], inputs, gradient))))
    return np.median(spent, axis=0)


def compare(clock, arms, rounds):
    "Rows of a table: medians and ranges of forward and backward passes, and how many times as long as the arm called \"ours\" they take. `arms`: name -> (forward, inputs, repeat)."
    for forward, inputs, _ in arms.values(): torch.autograd.grad(forward().sum(), inputs)
    spent = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items(): spent[name].append(passes(clock, *arm))
    spent = {name: np.array(x) for name, x in spent.items()}  # (rounds, 2)
    both = lambda x, form="{:.2f}": " | ".join(median_range(column, form) for column in x.T)
    rows = [f"| {name} | {both(x)} | " + ("| |" if name == "ours" else f"{both(x / spent['ours'], '{:.1f}')} |") for name, x in spent.items()]
    return ["| arm | forward, ms | backward, ms | times ours, forward | times ours, backward |", "|---|---|---|---|---|", *rows]


def pooling(clock, rounds, B=64, L=512, V=50):
    "Lines on tokens to visits."
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, V, (B, L), generator=generator).sort(1).values
    ids = torch.where(torch.arange(L) < torch.randint(L // 2, L + 1, (B, 1), generator=generator), ids, -1).to(clock.device)
    counts, lines = count_tokens(ids, V), []
    pieces = torch.cat([counts, L - counts.sum(1, keepdim=True)], 1).tolist()
    for d in (32, 128):
        hidden, attention = torch.randn(B, L, d, generator=generator).to(clock.device).requires_grad_(), VisitPooling(d, "attention").to(clock.device)
        means = {"ours": lambda: pool_visits(hidden, ids, V), "loop over patients and visits": lambda: loop_over_visits(hidden, ids, V), "loop, row by row": lambda: loop_over_rows(hidden, ids, V), "loop, each visit's tokens known beforehand": lambda: loop_over_pieces(hidden, pieces),
                 "scatter along the second dimension": lambda: second_dimension(hidden, ids, V), "product with a matrix of zeros and ones": lambda: one_hot_product(hidden, ids, V)}
        for f in means.values(): torch.testing.assert_close(f(), means["ours"](), atol=1e-5, rtol=1e-4)
        others = {f'`how="{how}"`': lambda how=how: pool_visits(hidden, ids, V, how) for how in VISIT_POOLINGS[1:4]} | {"`VisitPooling` with attention": lambda: attention(hidden, ids, V)}
        arms = {name: (f, [hidden], 1 if name.startswith("loop") else 9) for name, f in (means | others).items()}
        lines += ["", f"Vectors of **d = {d}** numbers:", "", *compare(clock, arms, rounds)]
    return ["## Tokens to visits", "", f"Means of the tokens of each visit, B = {B} patients, L = {L}, V = {V} visits; rows of {L // 2} to {L} tokens, {(ids < 0).float().mean():.0%} padding. "
            f"A loop pays for its {B * V:,} visits, ours for the memory that it moves: its advantage shrinks as d grows, and on a machine whose memory is busy with other work.", *lines]


def random_visits(B, V, C, heavy, device):
    "Visits of codes: V for each patient, of 1 to C codes; or, if `heavy`, log-normal numbers of both, up to V and C, with a median of 10 visits and of 3 codes."
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).exp()
    n_visits = (10 * draw(B, 1)**0.9).long().clamp(1, V) if heavy else torch.full((B, 1), V)
    n_codes = (3.3 * draw(B, V, 1)**0.8).long().clamp(1, C) if heavy else torch.randint(1, C + 1, (B, V, 1), generator=generator)
    n_visits[0], n_codes[0, 0] = V, C
    mask = (torch.arange(C) < n_codes) & (torch.arange(V) < n_visits).unsqueeze(-1)
    batch = {"visit_codes": torch.randint(5, 1000, (B, V, C), generator=generator) * mask, "visit_mask": mask, "visit_ages": torch.randint(20, 90, (B, V), generator=generator), "time_features": torch.rand(B, V, 2, generator=generator)}
    return {name: x.to(device) for name, x in batch.items()}


def visits(clock, rounds, V=50, d=64):
    "Lines on the LSTM over a visit's codes."
    torch.manual_seed(0)
    encoder, lines, rate = LSTMVisitEncoder(1000, d).to(clock.device), [], peak(clock)
    for B, C, heavy in ((1, 12, False), (8, 12, False), (64, 12, False), (64, 40, True)):
        batch = random_visits(B, V, C, heavy, clock.device)
        arms = {"ours": lambda: encoder(batch), "the same, called for one visit after another": lambda: visit_by_visit(encoder, batch), "plain loop over visits, padded codes": lambda: plain_loop(encoder, batch)}
        for f in arms.values(): torch.testing.assert_close(f(), arms["ours"](), atol=1e-5, rtol=1e-4)
        rows = "visits and codes log-normal" if heavy else f"{V} visits each, 1 to {C} codes a visit"
        lines += ["", f"**{B} patient{'s' if B > 1 else ''}**, {rows}; {batch['visit_mask'].float().mean():.0%} of (B, V, C) = ({B}, {V}, {C}) are codes.", "", *compare(clock, {name: (f, list(encoder.parameters()), 3) for name, f in arms.items()}, rounds)]
        operations = int(batch["visit_mask"].sum()) * 2 * 2 * d * 4 * d  # products of inputs and states with the weights of four gates
        seconds = np.median([clock(arms["ours"]) for _ in range(5)])
        lines += ["", f"The products of a forward pass of ours, {operations / 1e6:,.0f} million operations, run at {operations / seconds / rate:.0%} of the rate of one large square product: as that share nears 100%, nothing can be much faster."]
    return ["## The LSTM over the codes of a visit", "", f"V = {V} visits, d = {d}; the backward pass gives the gradients of all parameters.", *lines]


def aggregation(rounds, device):
    "Lines of the page on pooling and the visit LSTM."
    clock = Clock(device, "fp32")
    return ["# Speed of pooling and of the visit LSTM", "", f"`python benchmarks/speed.py --what aggregation{'' if device == 'cpu' else ' --device cuda'}`, {where_and_when(clock)}.", "",
            f"Time by the clock. Medians (and ranges) of {rounds} interleaved rounds; ratios are taken within a round. All arms of a table but those with another `how` give the same numbers.", "", *pooling(clock, rounds), "", *visits(clock, rounds)]


@call_parse
def main(
    what: str = "all", # pretraining, aggregation or all
    size: str = "small", # of pre-training: small, medium or large
    patients: int = 0, # of pre-training, in an epoch of ours, of which the slow arms see a part; 2,000 if 0, and 20,000 on CUDA, whose batches are larger
    vocab: int = 5000, # of pre-training: codes
    rounds: int = 5, # interleaved repetitions
    device: str = "cpu", # or cuda, with bfloat16 for pre-training
    out: str = "", # folder of the pages; benchmarks/results if empty
):
    "Compare, and write the pages."
    pages = {"pretraining": ("speed", lambda: pretraining(size, patients, vocab, rounds, device)), "aggregation": ("aggregation_speed", lambda: aggregation(rounds, device))}
    if what not in (*pages, "all"): raise ValueError(f"what: expected {', '.join(pages)} or all, got {what!r}")
    for name, lines in (pages.values() if what == "all" else [pages[what]]):
        page = "\n".join(lines()) + "\n"
        print(page)
        path = (Path(out) if out else RESULTS) / f"{name}{'' if device == 'cpu' else '_cuda'}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
        print(f"Written to {path.name}.")
