"""The summary of a model: multiply-adds are compared with closed forms, the rest is written out."""

import pytest
import torch
from fastcore.basics import noop
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import learnloop as ll
from learnloop.testing import toy_learner


class Images(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(256, 10)
        )


def image_learner(model=None, bs=6, **kwargs):
    """Images of 8 by 8 in plain torch loaders."""
    torch.manual_seed(0)
    ds = TensorDataset(torch.rand(24, 1, 8, 8), torch.arange(24) % 10)
    dls = ll.DataLoaders(DataLoader(ds, bs, shuffle=True), DataLoader(ds, bs), device="cpu")
    learn = ll.Learner(dls, Images() if model is None else model, nn.CrossEntropyLoss(), **kwargs)
    learn.logger = noop
    return learn


def test_the_text_shows_layer_by_layer_what_there_is():
    learn = toy_learner(splitter={"0.*": {}, "2.*": {}}, opt_func=ll.SGD)
    learn.freeze()
    assert str(learn.summary()) == TEXT
    assert repr(learn.summary()) == TEXT


TEXT = """\
Sequential (Input shape: 8 x 2)
----------------------------------------------------------------------------
Layer  Type    Output shape  Params  Trainable  Group  Output  Multiply-adds
----------------------------------------------------------------------------
0      Linear  8 x 4             12  no             0   128 B             64
1      ReLU    8 x 4                                    128 B
2      Linear  8 x 1              5  yes            1    32 B             32
----------------------------------------------------------------------------
Total params: 17
Total trainable params: 5
Total non-trainable params: 12
Memory: 68 B of parameters and buffers, 288 B of outputs for a batch of 8
Multiply-adds, forward: 96 for that batch, 12 per sample

Optimizer used: SGD
Loss function: MSELoss()
Model frozen up to parameter group 1
Callbacks: TrainEvalCallback, Recorder"""


def test_it_works_on_plain_loaders_of_torch_and_has_its_numbers_as_data():
    found = image_learner().summary()
    assert (found.model, found.bs, found.input_shape) == ("Images", 6, (6, 1, 8, 8))
    assert [(x.kind, x.shape, x.n_params, x.group) for x in found.layers] == [
        ("Conv2d", (6, 4, 8, 8), 40, 0),
        ("BatchNorm2d", (6, 4, 8, 8), 8, 0),
        ("ReLU", (6, 4, 8, 8), 0, None),
        ("Dropout", (6, 4, 8, 8), 0, None),
        ("Flatten", (6, 256), 0, None),
        ("Linear", (6, 10), 2570, 0),
    ]
    assert (found.n_params, found.n_trainable, found.n_param_bytes) == (2618, 2618, 4 * 2618)
    assert found.n_buffer_bytes == 4 * 8 + 8  # two running statistics, one count
    assert [x.n_macs for x in found.layers] == [6 * 4 * 64 * 9, 0, 0, 0, 0, 6 * 256 * 10]
    assert found.n_macs == 6 * (4 * 64 * 9 + 2560)
    assert [x.n_bytes for x in found.layers] == [4 * 6 * 256] * 5 + [4 * 60]


def test_nothing_of_the_learner_moves():
    learn = image_learner(cbs=ll.MCDropoutCallback())
    learn.fit(1)
    learn.model.train()
    learn.model[1].eval()

    def everything():
        modes = [m.training for m in learn.model.modules()]
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in learn.model.modules()]
        weights = [t.tolist() for t in learn.model.state_dict().values()]
        rest = learn.train_iter, list(learn.final_record), len(learn.recorder.values), learn.recorder.raw_losses
        return modes, hooks, weights, rest, torch.get_rng_state().tolist()

    before = everything()
    learn.summary()
    ll.layer_info(learn, torch.zeros(2, 1, 8, 8))
    assert everything() == before
    assert torch.backends.mha.get_fastpath_enabled()


def test_without_the_callback_that_sets_modes_statistics_stay_as_well():
    learn = image_learner(default_cbs=False)
    before = learn.model[1].running_mean.clone()
    learn.summary()
    assert torch.equal(learn.model[1].running_mean, before)
    assert learn.model.training


def test_an_optimizer_is_not_made_for_it():
    learn = image_learner()
    learn.summary()
    assert learn.opt is None


def test_an_error_in_the_model_leaves_no_hook():
    class Failing(Images):
        def forward(self, x):
            super().forward(x)
            raise ZeroDivisionError

    learn = image_learner(Failing())
    with pytest.raises(ZeroDivisionError):
        learn.summary()
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in learn.model.modules()] == [0] * 7
    assert learn.model.training


def test_it_shows_nothing_while_it_runs(capsys):
    image_learner().summary()
    assert capsys.readouterr().out == ""


class Words(nn.Module):
    """A token, attention, a recurrent layer; a mapping in and out."""

    def __init__(self):
        super().__init__()
        self.start = nn.Parameter(torch.zeros(1, 1, 8))
        self.embed = nn.Embedding(10, 8)
        self.attend = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.rnn = nn.LSTM(8, 5, batch_first=True)
        self.head, self.unused = nn.Linear(5, 3), nn.Linear(2, 2)

    def forward(self, ids):
        return {"logits": self.head(self.rnn(self.attend(self.embed(ids) + self.start))[0][:, -1])}


def words_learner():
    torch.manual_seed(0)
    batches = [{"ids": torch.randint(0, 10, (4, 6)), "labels": torch.randint(0, 3, (4,))} for _ in range(2)]
    return ll.Learner(ll.DataLoaders(batches, batches, device="cpu"), Words(), nn.CrossEntropyLoss())


def test_batches_may_be_mappings_and_layers_nested():
    found = words_learner().summary()
    by_name = {x.name: x for x in found.layers}
    assert found.input_shape == {"ids": (4, 6), "labels": (4,)}
    assert by_name["Words"].n_params == 8
    assert by_name["Words"].shape == {"logits": (4, 3)}
    assert by_name["rnn"].shape == ((4, 6, 5), ((1, 4, 5), (1, 4, 5)))
    assert by_name["unused"].shape is None
    assert "did not run" in str(found)
    assert found.n_params == sum(x.n_params for x in found.layers) == sum(p.numel() for p in Words().parameters())


def test_attention_and_recurrent_layers_count_their_multiply_adds():
    """24 rows of 8 in 4 sentences of 6: closed forms."""
    by_name = {x.name: x for x in words_learner().summary().layers}
    attention = 24 * 8 * 24 + 2 * 4 * 2 * 6 * 6 * 4 + 24 * 8 * 8  # into q, k, v; scores and sums of 2 heads; out
    assert by_name["attend.self_attn"].n_macs == attention
    assert by_name["attend.linear1"].n_macs == 24 * 8 * 16
    assert by_name["rnn"].n_macs == 24 * (4 * 5 * 8 + 4 * 5 * 5)


def test_a_layer_that_runs_twice_counts_twice_and_shared_weights_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(self.a(x)))[:, :1]

    a, b = toy_learner(model=Twice()).summary().layers
    assert (a.n_macs, b.n_macs) == (2 * 8 * 4, 8 * 4)
    assert (a.n_params, b.n_params) == (6, 2)


def test_a_batch_can_be_passed():
    found = image_learner().summary((torch.rand(2, 1, 8, 8), torch.zeros(2, dtype=torch.long)))
    assert found.layers[0].shape == (2, 4, 8, 8)


def test_what_callbacks_make_of_the_input_is_what_the_layers_see():
    class Bigger(ll.Callback):
        def before_batch(self):
            self.learn.xb, self.learn.yb = (self.x.repeat(2, 1, 1, 1),), (self.y.repeat(2),)

    assert image_learner(cbs=Bigger()).summary().layers[0].shape == (12, 4, 8, 8)


def test_a_function_has_no_layers():
    def half(x):
        return x[:, :1] / 2

    found = toy_learner(model=half).summary()
    assert (found.model, found.layers, found.n_params) == ("half", [], 0)


def test_in_a_cell_it_is_a_table_with_everything_escaped():
    learn = toy_learner()
    learn.loss_func = lambda pred, y: (pred - y).mean()
    shown = learn.summary()._repr_html_()
    assert "<td>Linear</td><td>8 x 4</td><td>12</td>" in shown
    assert "&lt;lambda&gt;" in shown and "<lambda>" not in shown


# layer_info


def test_layer_info_is_that_of_fastai():
    """fastai 2.8.12, on the same network."""
    found = ll.layer_info(image_learner(), torch.rand(1, 1, 8, 8))
    assert list(map(tuple, found)) == [
        ("Conv2d", 40, True, (1, 4, 8, 8), False),
        ("BatchNorm2d", 8, True, (1, 4, 8, 8), True),
        ("ReLU", "", "", (1, 4, 8, 8), True),
        ("Dropout", "", "", (1, 4, 8, 8), True),
        ("Flatten", "", "", (1, 256), False),
        ("Linear", 2570, True, (1, 10), False),
    ]


# Without a learner


def test_model_sizes_are_the_shapes_of_the_children():
    model = nn.Sequential(*list(Images())[:3])
    model.train()
    assert ll.model_sizes(model, (10, 12)) == [(1, 4, 10, 12)] * 3
    assert [m.training for m in model.modules()] == [True] * 4


def test_the_features_of_a_model_that_needs_big_images():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.AvgPool2d(50), nn.Conv2d(5, 7, 1))
    assert ll.num_features_model(model) == 7
    assert model.training
    grouped = nn.Sequential(nn.Conv2d(4, 8, 1, groups=2))
    assert ll.num_features_model(grouped) == 8


def test_they_move_no_random_state_and_no_running_statistics():
    model, state = nn.Sequential(*list(Images())[:3]), torch.get_rng_state()
    ll.num_features_model(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model[1].num_batches_tracked == 0


def test_a_model_without_images_says_so():
    with pytest.raises(ValueError, match="Sequential has no convolution over images"):
        ll.model_sizes(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize(
    "function", [ll.model_sizes, ll.num_features_model, ll.has_params, ll.total_params, ll.flatten_model]
)
def test_functions_over_modules_say_what_they_take(function):
    name = function.__name__
    with pytest.raises(TypeError, match=f"^`{name}` takes a torch module, and got something of type int.$"):
        function(3)
    with pytest.raises(TypeError, match=r"something of type Learner\. Pass `learn.model`\.$"):
        function(toy_learner())


def test_layer_info_takes_a_learner_and_inputs():
    with pytest.raises(TypeError, match=r"^`layer_info\(learn, xb\)` takes .* and got no input\.$"):
        ll.layer_info(toy_learner())
    with pytest.raises(TypeError, match=r"and got something of type Linear\.$"):
        ll.layer_info(nn.Linear(2, 2), torch.rand(3, 2))
