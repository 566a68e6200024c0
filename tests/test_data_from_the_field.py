"""Data and models as they come: Hugging Face, several inputs and targets, streams, nested batches, no parameters.

Numbers are compared with a loop written by hand over the same batches.
"""

import itertools
import math
import signal
from collections import namedtuple
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

import learnloop as ll
from tests.toys import Once, weights

AdamW = partial(torch.optim.AdamW, weight_decay=0.0)


def learner(dls, model, loss_func=None, **kwargs):
    """A learner without a table."""
    kwargs = {"lr": 0.01, "opt_func": AdamW, **kwargs}
    learn = ll.Learner(dls, model, loss_func, **kwargs)
    learn.remove_cb(ll.ProgressCallback)
    learn.logger = lambda row: None
    return learn


def by_hand(model, batches, loss_of, lr=0.01):
    """The losses of a plain torch loop."""
    opt, losses = AdamW(model.parameters(), lr=lr), []
    model.train()
    for batch in batches:
        loss = loss_of(model, batch)
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def seeded(make, *args, **kwargs):
    torch.manual_seed(0)
    return make(*args, **kwargs)


def draws():
    """A generator whose numbers are the same in every test."""
    return torch.Generator().manual_seed(0)


# Hugging Face: models from a configuration, nothing is downloaded


@pytest.fixture(scope="module")
def hf():
    return pytest.importorskip("transformers")


def bert(hf, kind="ForSequenceClassification", dropout=0.0, **config):
    """Three classes, 12 words, one layer."""
    config = hf.BertConfig(
        vocab_size=12,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        **{"num_labels": 3, **config},
    )
    return seeded(getattr(hf, f"Bert{kind}"), config)


def gpt2(hf):
    small = {"vocab_size": 12, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return seeded(hf.GPT2LMHeadModel, hf.GPT2Config(**small, **dropout, bos_token_id=0, eos_token_id=0))


def llama(hf):
    small = {"vocab_size": 12, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return seeded(hf.LlamaForCausalLM, hf.LlamaConfig(**small, **heads, bos_token_id=0, eos_token_id=0))


def sentences(kind=dict, n_batch=6):
    """Batches of 8 sentences of 5 words; the class is that of the first word."""
    words = torch.randint(0, 12, (n_batch, 8, 5), generator=draws())
    mask = torch.ones(8, 5, dtype=torch.int64)
    return [kind({"input_ids": w, "attention_mask": mask, "labels": w[:, 0] % 3}) for w in words]


def counting(n_batch=6):
    """Batches of 8 texts that count modulo 12, the last two words padded out of the loss."""
    starts = torch.randint(0, 12, (n_batch, 8, 1), generator=draws())
    texts = (starts + torch.arange(8)) % 12
    return [{"input_ids": t, "labels": torch.where(torch.arange(8) < 6, t, -100)} for t in texts]


def loss_of_output(model, batch):
    return model(**batch).loss


@pytest.mark.parametrize("kind", ["dict", "BatchEncoding"])
def test_a_classifier_trains_on_its_own_loss_and_its_metrics_see_logits_and_labels(hf, kind):
    batches = sentences(dict if kind == "dict" else hf.BatchEncoding)
    seen = []
    look = ll.Callback(after_loss=lambda cb: seen.append((type(cb.x), cb.pred.shape, cb.y.shape)))
    learn = learner(ll.DataLoaders(batches, batches[:2], device="cpu"), bert(hf), metrics=ll.accuracy, cbs=look)
    before = learn.validate()
    assert before[0] == pytest.approx(math.log(3), abs=0.1)  # it knows nothing yet
    learn.fit(8)
    after = learn.validate()
    assert after[0] < 0.3 and after[1] > 0.9 > before[1]
    assert learn.dls.n_inp == 1 and set(seen) == {(type(batches[0]), (8, 3), (8,))}


def test_its_losses_and_weights_are_those_of_a_loop_by_hand(hf):
    batches = sentences(hf.BatchEncoding)
    learn, model = learner(ll.DataLoaders(batches, device="cpu"), bert(hf)), bert(hf)
    learn.fit(3)
    assert learn.recorder.raw_losses == pytest.approx(by_hand(model, batches * 3, loss_of_output), abs=1e-6)
    torch.testing.assert_close(weights(learn), weights(SimpleNamespace(model=model)), rtol=0, atol=1e-6)


def test_validation_weighs_its_loss_and_accuracy_with_the_size_of_batches(hf):
    batches = sentences()[:2]
    batches[1] = {name: values[:3] for name, values in batches[1].items()}
    learn = learner(ll.DataLoaders(batches, batches, device="cpu"), bert(hf).eval(), metrics=ll.accuracy)
    both = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    with torch.no_grad():
        output = learn.model(**both)
    expected = [output.loss.item(), (output.logits.argmax(-1) == both["labels"]).float().mean().item()]
    assert list(learn.validate()) == pytest.approx(expected, abs=1e-6)


def test_a_loss_of_ones_own_takes_the_logits(hf):
    batches = sentences()
    learn = learner(ll.DataLoaders(batches, device="cpu"), bert(hf), ll.LabelSmoothingCrossEntropy())
    learn.fit(1)

    def smoothed(model, batch):
        return F.cross_entropy(model(**batch).logits, batch["labels"], label_smoothing=0.1)

    assert learn.recorder.raw_losses == pytest.approx(by_hand(bert(hf), batches, smoothed), abs=1e-6)


def test_texts_of_any_length_padded_by_its_own_collator_are_read_through_a_shuffled_torch_loader(hf):
    from tokenizers import Tokenizer, models, pre_tokenizers

    good, bad = ("good", "great", "fine"), ("bad", "poor", "dull")
    known = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "it", "was", "a", "film", *good, *bad))}
    plain = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]")
    texts = [f"{start} {word}{end}" for start in ("a", "it was") for word in good + bad for end in ("", " film")]
    rows = [{**tokenizer(text), "label": int(any(w in text for w in good))} for text in texts]
    loader = partial(DataLoader, rows, batch_size=6, collate_fn=hf.DataCollatorWithPadding(tokenizer))
    dls = ll.DataLoaders(loader(shuffle=True), loader(), device="cpu")
    learn = learner(dls, bert(hf, num_labels=2), metrics=ll.accuracy)
    learn.fit_one_cycle(12, 0.02)
    assert learn.recorder.values[-1][2] > 0.9


def test_two_targets_are_named_and_a_prediction_without_logits_is_the_whole_output(hf):
    def answered(batch):
        first = batch["labels"]
        return {"input_ids": batch["input_ids"], "start_positions": first, "end_positions": first + 1}

    def starts(output, start, end):
        return (output.start_logits.argmax(-1) == start).float().mean()

    batches = [answered(batch) for batch in sentences()]
    dls = ll.DataLoaders(batches, batches[:2], device="cpu", targets=("start_positions", "end_positions"))
    learn = learner(dls, bert(hf, "ForQuestionAnswering", num_labels=2), metrics=starts)
    learn.fit(8)
    losses = [row[1] for row in learn.recorder.values]
    assert losses[-1] < losses[0] / 2
    assert learn.recorder.metric_names[3] == "starts" and learn.recorder.values[-1][2] > 0.6


@pytest.mark.parametrize("make", [gpt2, llama])
def test_a_language_model_trains_on_its_own_loss(hf, make):
    batches = counting()

    def next_word(logits, labels):
        there = labels[:, 1:] != -100
        return (logits.argmax(-1)[:, :-1] == labels[:, 1:])[there].float().mean()

    dls = ll.DataLoaders(batches, batches[:2], device="cpu")
    learn = learner(dls, make(hf), metrics=[next_word, ll.Perplexity()])
    before = learn.validate()
    assert before[0] == pytest.approx(math.log(12), abs=0.1) and before[2] == pytest.approx(math.exp(before[0]))
    learn.fit(8)
    assert learn.recorder.raw_losses == pytest.approx(by_hand(make(hf), batches * 8, loss_of_output), abs=1e-6)
    after = learn.validate()
    assert after[0] < 1 and after[1] > 0.9


def test_the_finder_leaves_a_model_with_shared_weights_as_it_was(hf):
    learn = learner(ll.DataLoaders(counting(), device="cpu"), gpt2(hf))
    before = weights(learn)
    assert learn.lr_find(num_it=20, show_plot=False).valley > 0
    assert torch.equal(weights(learn), before)
    assert learn.model.lm_head.weight is learn.model.transformer.wte.weight


def test_norms_that_a_language_model_brings_along_do_not_decay(hf):
    learn = learner(ll.DataLoaders(counting(), device="cpu"), llama(hf), opt_func=ll.Adam)
    learn.create_opt()
    kept = [name for name, p in learn.model.named_parameters() if learn.opt.state[p].get("do_wd") is False]
    layer = "model.layers.0"
    assert kept == [f"{layer}.input_layernorm.weight", f"{layer}.post_attention_layernorm.weight", "model.norm.weight"]


def test_a_model_with_dropout_that_ctrl_c_stopped_goes_on_to_the_same_weights(hf):
    dls = ll.DataLoaders(sentences(), device="cpu")
    whole, stopped = learner(dls, bert(hf, dropout=0.1)), learner(dls, bert(hf, dropout=0.1))
    seeded(whole.fit, 2)
    with pytest.raises(KeyboardInterrupt):
        seeded(stopped.fit, 2, cbs=Once("after_pred", lambda cb: signal.raise_signal(signal.SIGINT)))
    assert stopped.opt_iter == 1
    stopped.resume()
    assert torch.equal(weights(stopped), weights(whole))


def test_labels_that_are_called_otherwise_train_nothing_and_that_is_said(hf):
    batches = [{"input_ids": b["input_ids"], "sentiment": b["labels"]} for b in sentences()]
    with pytest.warns(UserWarning, match=r"nothing was trained.*sentiment: int64\[8\].*`DataLoaders\(…, targets=…\)`"):
        learner(ll.DataLoaders(batches, device="cpu"), bert(hf)).fit(1)


def test_an_output_that_is_a_plain_tuple_has_no_loss_and_that_is_said(hf):
    learn = learner(ll.DataLoaders(sentences(), device="cpu"), bert(hf, return_dict=False))
    with pytest.raises(ValueError, match="the output of `BertForSequenceClassification` has no `loss`"):
        learn.fit(1)


# Two inputs and two targets


@dataclass
class Scene:
    left: Tensor
    right: Tensor
    total: Tensor
    larger: Tensor


Row = namedtuple("Row", ["left", "right", "total", "larger"])


class TwoHeads(nn.Module):
    """A number and a class, from two inputs."""

    def __init__(self):
        super().__init__()
        self.body, self.number, self.side = nn.Linear(5, 16), nn.Linear(16, 1), nn.Linear(16, 2)

    def forward(self, left, right):
        hidden = self.body(torch.cat([left, right], dim=1)).relu()
        return self.number(hidden), self.side(hidden)


def two_losses(pred, total, larger):
    number, side = pred
    return F.mse_loss(number, total) + F.cross_entropy(side, larger)


def distance(pred, total, larger):
    return (pred[0] - total).abs().mean()


def sides(pred, total, larger):
    return ll.accuracy(pred[1], larger)


def scenes(kind=tuple, n_batch=12):
    left, right = torch.rand(n_batch, 8, 3, generator=draws()), torch.rand(n_batch, 8, 2, generator=draws())
    total = left.sum(2, keepdim=True) - right.sum(2, keepdim=True)
    larger = (left[..., 0] > right[..., 1]).long()
    return [kind(batch) for batch in zip(left, right, total, larger, strict=True)]


KINDS = {
    "tuple": (tuple, {"n_inp": 2}),
    "list": (list, {"n_inp": 2}),
    "namedtuple": (Row._make, {"n_inp": 2}),
    "dataclass": (lambda batch: Scene(*batch), {"targets": ("total", "larger")}),
    "dict": (lambda batch: dict(zip(Row._fields, batch, strict=True)), {"targets": ("total", "larger")}),
}


@pytest.mark.parametrize("name", KINDS)
def test_two_inputs_and_two_targets_train_in_any_batch(name):
    kind, how = KINDS[name]
    dls = ll.DataLoaders(scenes(kind), scenes(kind)[:3], device="cpu", **how)
    learn = learner(dls, seeded(TwoHeads), two_losses, metrics=[sides, distance])
    learn.fit(3)

    model = seeded(TwoHeads)
    losses = by_hand(model, scenes() * 3, lambda model, b: two_losses(model(*b[:2]), *b[2:]))
    assert learn.recorder.raw_losses == pytest.approx(losses, abs=1e-6)
    assert losses[-1] < losses[0] / 2

    left, right, total, larger = map(torch.cat, zip(*scenes()[:3], strict=True))
    with torch.no_grad():
        pred = model(left, right)
    expected = [f(pred, total, larger).item() for f in (two_losses, sides, distance)]
    assert list(learn.validate()) == list(learn.recorder.values[-1][1:]) == pytest.approx(expected, abs=1e-6)


def test_n_inp_may_stand_on_the_loader_and_is_the_number_of_inputs():
    tensors = list(map(torch.cat, zip(*scenes(), strict=True)))
    dls = ll.DataLoaders(ll.TensorLoader(*tensors, bs=8, n_inp=2), device="cpu")
    learn = learner(dls, seeded(TwoHeads), two_losses)
    learn.fit(1)
    losses = by_hand(seeded(TwoHeads), scenes(), lambda model, b: two_losses(model(*b[:2]), *b[2:]))
    assert dls.n_inp == 2 and learn.recorder.raw_losses == pytest.approx(losses, abs=1e-6)


def test_without_n_inp_the_models_error_shows_what_was_taken_for_inputs():
    with pytest.raises(TypeError, match="positional arguments") as caught:
        learner(ll.DataLoaders(scenes(), device="cpu"), TwoHeads(), two_losses).fit(1)
    assert "xb: (float32[8, 3] cpu, float32[8, 2] cpu, float32[8, 1] cpu)" in caught.value.__notes__[0]


# Nested batches


class Nested(nn.Module):
    """Takes one structure and gives another."""

    def __init__(self):
        super().__init__()
        self.heads = TwoHeads()

    def forward(self, scene):
        number, side = self.heads(scene["left"], scene["more"][0])
        return {"number": number, "side": side}


def test_a_nested_batch_reaches_model_loss_and_metric_as_it_is():
    def nested(batch):
        left, right, total, larger = batch
        return {"left": left, "more": [right, {"name": ["a"] * 8}]}, {"total": total, "larger": (larger,)}

    def loss(pred, y):
        return two_losses((pred["number"], pred["side"]), y["total"], *y["larger"])

    def side(pred, y):
        return ll.accuracy(pred["side"], *y["larger"])

    dls = ll.DataLoaders(scenes(nested), scenes(nested)[:3], device="cpu")
    learn = learner(dls, seeded(Nested), loss, metrics=side)
    learn.fit(3)
    losses = by_hand(seeded(TwoHeads), scenes() * 3, lambda model, b: two_losses(model(*b[:2]), *b[2:]))
    assert learn.recorder.raw_losses == pytest.approx(losses, abs=1e-6)
    assert dls.n_inp == 1 and learn.recorder.metric_names[3] == "side"


# Loaders without len


class Generated:
    """Batches from a generator function, made anew for every pass."""

    def __init__(self, n_batch=12):
        self.n_batch = n_batch

    def __iter__(self):
        yield from scenes(n_batch=self.n_batch)


class Sharded(IterableDataset):
    """The samples of the batches above one by one, each worker its share."""

    def __iter__(self):
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        for batch in itertools.islice(scenes(), first, None, step):
            yield from zip(*batch, strict=True)


def streams():
    return {
        "generator": Generated(),
        "IterableDataset": DataLoader(Sharded(), batch_size=8),
        "two workers": DataLoader(Sharded(), batch_size=8, num_workers=2),
    }


def over_stream(train, **kwargs):
    dls = ll.DataLoaders(train, Generated(3), device="cpu", n_inp=2)
    return learner(dls, seeded(TwoHeads), two_losses, metrics=sides, **kwargs)


def losses_by_hand(n_batch):
    batches = itertools.islice(itertools.cycle(scenes()), n_batch)
    return by_hand(seeded(TwoHeads), batches, lambda model, b: two_losses(model(*b[:2]), *b[2:]))


@pytest.mark.parametrize("name", streams())
def test_a_loader_without_len_trains_for_epochs_and_for_steps(name):
    learn = over_stream(streams()[name])
    learn.fit(2)
    assert learn.recorder.iters == [12, 24]
    assert learn.recorder.raw_losses == pytest.approx(losses_by_hand(24), abs=1e-6)

    learn = over_stream(streams()[name])
    learn.fit(n_step=30, valid_every=8)
    assert learn.recorder.iters == [8, 16, 24, 30]  # the loader began again after 12 and after 24
    assert learn.recorder.raw_losses == pytest.approx(losses_by_hand(30), abs=1e-6)
    assert [len(row) for row in learn.recorder.values] == [3] * 4


@pytest.mark.parametrize("verb", ["fit_one_cycle", "fit_flat_cos"])
def test_a_schedule_over_a_loader_without_len_says_what_to_do_and_then_runs(verb):
    learn = over_stream(Generated())
    with pytest.raises(ValueError, match=r"the training loader has no length.*`fit\(n_step=…\)`"):
        getattr(learn, verb)(2)
    assert learn.train_iter == 0
    getattr(learn, verb)(n_step=30, valid_every=15)
    assert len(learn.recorder.hps["lr"]) == 30 and len(learn.recorder.values) == 2


def test_the_finder_runs_over_a_loader_without_len():
    assert over_stream(Generated()).lr_find(num_it=30, show_plot=False).valley > 0


def test_the_table_of_a_loader_without_len_has_a_row_per_epoch(capsys):
    learn = over_stream(Generated())
    learn.logger = print
    learn.add_cb(ll.ProgressCallback())
    learn.fit(2)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[-3:]] == ["epoch", "0", "1"]


# Models without parameters


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize("model", [Doubled(), lambda x: 2 * x], ids=["module", "function"])
def test_a_model_without_parameters_is_measured_like_any_other(model):
    x = torch.tensor([[0.0], [1.0], [2.0]])
    dls = ll.DataLoaders([(x, x), (x, x + 1)], [(x, x)], device="cpu")
    learn = learner(dls, model, F.mse_loss, metrics=ll.mae)
    learn.fit_one_cycle(1)
    assert learn.recorder.raw_losses == pytest.approx([5 / 3, 2 / 3]) and learn.opt_iter == 0  # of 0 1 4; 1 0 1
    assert list(learn.validate()) == pytest.approx([5 / 3, 1.0])
