"""InvertibleSequential composes, and is handled as ``torch.nn.Sequential`` is."""

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from toys import AddsContext, Affine, Double, Keep, Logistic, batch_norm_net, images, pair

from invertible import (
    AdditiveCoupling,
    InjectivePad,
    Inverse,
    InvertibleModule,
    InvertibleSequential,
    Merge,
    Parallel,
    PixelUnshuffle,
    Rebuild,
    Split,
    Swap,
)


def affines(count=5):
    """Layers that do not commute, with a log-determinant each."""
    return [Affine(0.25 * i, 1.0 + i).double() for i in range(count)]


def conditional(channels=2):
    return AdditiveCoupling(AddsContext(channels), conditional=True).double()


def named():
    return InvertibleSequential(OrderedDict(pad=InjectivePad(1), cut=Split((1, 4)), swap=Swap()))


# --- composition


def test_layers_run_in_reading_order_and_back():
    layers, x = affines(), images()
    y = x
    for layer in layers:
        y = layer(y)
    network = InvertibleSequential(*layers)
    assert torch.equal(network(x), y)
    torch.testing.assert_close(network.inverse(y), x)


@given(cut=st.integers(0, 5))
def test_two_slices_in_a_row_are_the_whole(cut):
    network = InvertibleSequential(*affines())
    y = images()
    for part in (network[:cut], network[cut:]):
        y = part(y) if len(part) else y
    assert torch.equal(y, network(images()))


def test_compositions_nest():
    inner = InvertibleSequential(Split(), AdditiveCoupling(nn.Tanh()), Swap(), Merge())
    network = InvertibleSequential(PixelUnshuffle(2), inner, Inverse(inner), inner)
    torch.testing.assert_close(network.inverse(network(images())), images())


def test_one_layer_may_stand_twice():
    layer = AdditiveCoupling(nn.Linear(2, 2)).double()
    network = InvertibleSequential(layer, Swap(), layer)
    x = pair(3, 4)
    torch.testing.assert_close(network.inverse(network(x)), x)
    assert len(list(network.parameters())) == 2


# --- the handling of nn.Sequential


@given(index=st.integers(-5, 4))
def test_an_index_gives_the_layer_that_a_list_gives(index):
    layers = affines()
    assert InvertibleSequential(*layers)[index] is layers[index]


BOUND = st.none() | st.integers(-7, 7)


@given(start=BOUND, stop=BOUND, step=st.none() | st.sampled_from([-3, -2, -1, 1, 2, 3]))
def test_a_slice_gives_the_layers_that_nn_sequential_gives(start, stop, step):
    layers, cut = affines(), slice(start, stop, step)
    part = InvertibleSequential(*layers)[cut]
    assert isinstance(part, InvertibleSequential)
    assert list(part) == list(nn.Sequential(*layers)[cut])


def test_a_slice_shares_its_layers():
    network = InvertibleSequential(*affines())
    with torch.no_grad():
        network[1:3][0].shift.fill_(7)
    assert network[1].shift == 7


@pytest.mark.parametrize("index", [5, -6])
def test_an_index_out_of_range_is_an_index_error(index):
    with pytest.raises(IndexError, match="out of range"):
        InvertibleSequential(*affines())[index]


def test_length_and_iteration_follow_the_layers():
    layers = affines()
    network = InvertibleSequential(*layers)
    assert len(network) == 5
    assert list(network) == layers
    assert list(reversed(list(network.children()))) == layers[::-1]


def test_append_adds_at_the_end_and_returns_the_sequence():
    layers = affines(3)
    network = InvertibleSequential(layers[0])
    assert network.append(layers[1]).append(layers[2]) is network
    assert list(network) == layers


PLACE = st.integers(-7, 7)
EDITS = {
    "network[i] = layer": PLACE,
    "del network[i]": PLACE | st.builds(slice, BOUND, BOUND),
    "insert": PLACE,
    "pop": PLACE | st.builds(slice, BOUND, BOUND),
    "append": st.none(),
    "extend": st.none(),
    "+": st.none(),
    "+=": st.none(),
    "*": st.integers(-1, 2),
    "*=": st.integers(-1, 2),
    "from the left *": st.integers(-1, 2),
}


def edit(network, what, where, new):
    """One edit with two new layers: the network afterwards, and what the edit returned."""
    match what:
        case "network[i] = layer":
            network[where] = new[0]
        case "del network[i]":
            del network[where]
        case "insert":
            return network, network.insert(where, new[0]) is network
        case "pop":
            popped = network.pop(where)
            return network, list(popped) if isinstance(where, slice) else popped
        case "append":
            return network, network.append(new[0]) is network
        case "extend":
            return network, network.extend(iter(new)) is network
        case "+":
            network = network + type(network)(*new)
        case "+=":
            network += type(network)(*new)
        case "*":
            network = network * where
        case "*=":
            network *= where
        case "from the left *":
            network = where * network
    return network, None


@given(data=st.data())
def test_edits_give_the_layers_and_keys_that_nn_sequential_gives(data):
    layers = affines(3)
    ours, theirs = InvertibleSequential(*layers), nn.Sequential(*layers)
    for _ in range(data.draw(st.integers(1, 5))):
        what = data.draw(st.sampled_from(list(EDITS)))
        where, new = data.draw(EDITS[what]), affines(2)
        try:
            theirs, expected = edit(theirs, what, where, new)
        except (IndexError, ValueError) as error:
            with pytest.raises(type(error)):
                edit(ours, what, where, new)
        else:
            ours, found = edit(ours, what, where, new)
            assert found == expected
        assert list(ours) == list(theirs)
        assert list(ours.state_dict()) == list(theirs.state_dict())


def test_named_layers_keep_their_names_and_all_others_count_their_place():
    network = named()
    network[1] = Split((2, 3))
    assert keys(network) == ["pad", "cut", "swap"]
    del network[0]
    assert keys(network) == ["cut", "swap"]
    assert keys(network.append(Swap())) == ["cut", "swap", "2"]
    assert keys(network.insert(1, Swap())) == ["cut", "1", "swap", "3"]
    assert isinstance(network.pop(0), Split)
    assert keys(network) == ["0", "swap", "2"]
    assert keys(network + named()) == ["0", "swap", "2", "3", "4", "5"]
    assert keys(network[1:]) == ["swap", "1"]


def keys(network):
    return [name for name, _ in network.named_children()]


@pytest.mark.parametrize(
    "derive",
    [
        lambda network: network[1:],
        lambda network: network + InvertibleSequential(Swap()),
        lambda network: network * 2,
    ],
)
def test_slices_and_sums_share_the_layers_and_have_the_options_of_the_left(derive):
    every_second = Rebuild(anchor_every=2)
    network = InvertibleSequential(*affines(), checkpoint=every_second, check_layers=True)
    derived = derive(network)
    assert (derived.checkpoint, derived.check_layers) == (every_second, True)
    assert derived[0] in list(network)
    assert len(network) == 5


def test_a_network_is_the_same_function_after_it_was_taken_apart():
    network = InvertibleSequential(Split(), AdditiveCoupling(nn.Linear(2, 2)), Swap(), Merge())
    x = images(3, 4, dtype=torch.float32)
    y = network(x)
    parts = network[:2] + network[2:]
    assert torch.equal(parts(x), y)
    layer = parts.pop(1)
    assert torch.equal(parts.insert(1, layer)(x), y)
    parts[1] = Inverse(Inverse(layer))
    torch.testing.assert_close(parts.inverse(y), x)


@pytest.mark.parametrize("edit", [lambda n: n.pop(), lambda n: n.insert(0, Swap())])
def test_a_network_may_be_edited_between_forward_and_backward(edit):
    def gradients(checkpoint):
        torch.manual_seed(0)
        layers = (AdditiveCoupling(nn.Linear(2, 2)).double() for _ in range(2))
        network = InvertibleSequential(*layers, checkpoint=checkpoint)
        parameters = list(network.parameters())
        y = network(pair(3, 4))
        edit(network)
        return torch.autograd.grad(y[0].sin().sum(), parameters)

    torch.testing.assert_close(gradients(True), gradients(False))


def test_a_network_may_be_extended_by_itself():
    layers = affines(2)
    network = InvertibleSequential(*layers)
    assert list(network.extend(network)) == layers * 2
    network += network
    assert list(network) == layers * 4


@pytest.mark.parametrize(
    ("edit", "index"),
    [
        (lambda network, i: network[i], 5),
        (lambda network, i: network.__setitem__(i, Double()), -6),
        (lambda network, i: network.__delitem__(i), 5),
        (lambda network, i: network.pop(i), 5),
        (lambda network, i: network.insert(i, Double()), 6),
    ],
)
def test_a_place_that_is_not_there_is_told(edit, index):
    network = InvertibleSequential(*affines())
    message = f"The InvertibleSequential has 5 layers: index {index} is out of range."
    with pytest.raises(IndexError, match=message):
        edit(network, index)
    assert len(network) == 5


@pytest.mark.parametrize("other", [nn.Sequential(nn.ReLU()), [Swap()], Swap()])
def test_what_is_no_sequence_is_not_added(other):
    network = InvertibleSequential(Swap())
    for add in (lambda: network + other, lambda: network.__iadd__(other)):
        with pytest.raises(TypeError, match=r"is added to another one, got .* append\(layer\) and"):
            add()
    assert len(network) == 1


def test_a_network_is_repeated_at_least_once():
    with pytest.raises(ValueError, match="is repeated at least once, got 0"):
        InvertibleSequential(Swap()) * 0
    with pytest.raises(TypeError, match="integer"):
        InvertibleSequential(Swap()) * 1.5


@pytest.mark.parametrize("cut", [slice(0, 0), slice(2, None), slice(None, None, -1), slice(9, 12)])
def test_append_works_behind_a_slice(cut):
    layer = Double()
    network = InvertibleSequential(*affines())[cut].append(layer)
    assert network[-1] is layer
    assert [name for name, _ in network.named_children()] == [str(i) for i in range(len(network))]


@pytest.mark.parametrize("cut", [slice(1, None), slice(None, None, -1), slice(5, None)])
def test_a_slice_of_named_layers_keeps_the_names(cut):
    names = ["pad", "cut", "swap"]
    assert [name for name, _ in named()[cut].named_children()] == names[cut]
    assert named()[cut].append(Swap())[-1].inverse


def test_named_layers_are_reached_by_name_and_by_index():
    network = named()
    assert network.cut is network[1]
    assert network(images())[0].shape == (2, 4, 2, 2)


def test_state_dict_keys_are_the_places_and_names_of_the_layers():
    numbered = InvertibleSequential(Swap(), AdditiveCoupling(nn.Linear(1, 1)), Swap())
    assert list(numbered.state_dict()) == ["1.f.weight", "1.f.bias"]
    by_name = InvertibleSequential(OrderedDict(a=InvertibleSequential(Affine()), b=Affine()))
    assert list(by_name.state_dict()) == ["a.0.log_scale", "a.0.shift", "b.log_scale", "b.shift"]


@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_and_state_dicts_carry_the_network(again):
    def make():
        return InvertibleSequential(
            Split(), AdditiveCoupling(batch_norm_net()), Swap(), Merge()
        ).double()

    network, other = make().eval(), make().eval()
    expected = network(images())
    other.load_state_dict(network.state_dict())
    for same in (other, again(network), again(network)[:]):
        assert torch.equal(same(images()), expected)
    assert again(network)[1].f is not network[1].f


def test_the_layers_are_shown():
    assert repr(InvertibleSequential(Swap())) == "InvertibleSequential(\n  (0): Swap()\n)"


# --- what is refused


@pytest.mark.parametrize(
    "add",
    [
        lambda _: InvertibleSequential(Swap(), nn.ReLU()),
        lambda _: InvertibleSequential(OrderedDict(swap=Swap(), relu=nn.ReLU())),
        lambda network: network.append(nn.ReLU()),
        lambda network: network.add_module("relu", nn.ReLU()),
        lambda network: setattr(network, "relu", nn.ReLU()),
        lambda network: setattr(network, "0", nn.ReLU()),
        lambda network: network.__setitem__(0, nn.ReLU()),
        lambda network: network.insert(0, nn.ReLU()),
        lambda network: network.extend([Swap(), nn.ReLU()]),
    ],
)
def test_a_layer_without_an_inverse_is_refused_on_every_way_in(add):
    network = InvertibleSequential(Swap())
    message = r"InvertibleSequential takes invertible layers.* ReLU.*AdditiveCoupling\(f\)"
    with pytest.raises(TypeError, match=message):
        add(network)
    assert [type(layer) for layer in network] == [Swap]


@pytest.mark.parametrize("nothing", [None, "swap", Swap])
def test_a_layer_is_not_replaced_by_what_is_none(nothing):
    network = InvertibleSequential(Swap())
    for replace in (
        lambda: network.__setitem__(0, nothing),
        lambda: setattr(network, "0", nothing),
        lambda: network.insert(0, nothing),
    ):
        with pytest.raises(TypeError, match="takes invertible layers, got"):
            replace()
    assert [type(layer) for layer in network] == [Swap]


def test_a_class_in_place_of_a_layer_is_refused():
    with pytest.raises(TypeError, match="Swap"):
        InvertibleSequential(Swap)


def test_a_list_of_layers_is_refused():
    with pytest.raises(TypeError, match=r"takes invertible layers.*list"):
        InvertibleSequential([Swap(), Swap()])


def test_a_name_in_use_is_refused():
    network = InvertibleSequential(OrderedDict(swap=Swap()))
    with pytest.raises(ValueError, match="already has a layer named 'swap'"):
        network.add_module("swap", Swap())


def test_an_invertible_attribute_becomes_a_layer_as_in_nn_sequential():
    network = InvertibleSequential(Double())
    network.last = Double()
    assert len(network) == 2
    assert torch.equal(network(images()), 4 * images())


def test_other_attributes_stay_attributes():
    network = InvertibleSequential(Double())
    network.note, network.nothing = "a remark", None
    assert len(network) == 1


EMPTY = {
    "no layers": InvertibleSequential,
    "an empty dict": lambda: InvertibleSequential(OrderedDict()),
    "a slice": lambda: InvertibleSequential(Swap())[1:],
    "a slice of named layers": lambda: named()[5:],
}


@pytest.mark.parametrize("make", EMPTY.values(), ids=EMPTY.keys())
def test_an_empty_sequence_can_be_made_and_not_run(make):
    network = make()
    assert len(network) == 0
    for method in ("forward", "inverse", "forward_and_log_det", "inverse_and_log_det"):
        with pytest.raises(ValueError, match="InvertibleSequential has no layers to run: append"):
            getattr(network, method)(images())
    assert torch.equal(network.append(Double())(images()), 2 * images())


# --- errors are placed


def notes(call):
    with pytest.raises(ValueError, match="multiples of its factor 2") as caught:
        call()
    return caught.value.__notes__


def test_an_error_names_the_layer_and_its_place():
    network = InvertibleSequential(Keep(), Keep(), PixelUnshuffle(2))
    expected = ["In layer 2 (PixelUnshuffle) of InvertibleSequential."]
    assert notes(lambda: network(images(1, 1, 3, 3))) == expected
    assert notes(lambda: network.forward_and_log_det(images(1, 1, 3, 3))) == expected


def test_an_error_in_a_nest_names_the_way_to_the_layer():
    inner = InvertibleSequential(Keep(), PixelUnshuffle(2))
    network = InvertibleSequential(Split(), Parallel(Keep(), inner), Swap())
    assert notes(lambda: network(images(1, 2, 3, 3))) == [
        "In layer 1.1.1 (PixelUnshuffle) of InvertibleSequential."
    ]


def test_an_error_in_an_inverse_names_the_place_counted_from_the_front():
    network = InvertibleSequential(Keep(), PixelUnshuffle(2), Keep(), Keep())
    with pytest.raises(ValueError, match="PixelUnshuffle's inverse takes") as caught:
        network.inverse(images(1, 3, 2, 2))
    assert caught.value.__notes__ == ["In layer 1 (PixelUnshuffle) of InvertibleSequential."]


def test_an_error_names_a_layer_by_its_name():
    network = InvertibleSequential(OrderedDict(shrink=PixelUnshuffle(2)))
    assert notes(lambda: network(images(1, 1, 3, 3))) == [
        "In layer shrink (PixelUnshuffle) of InvertibleSequential."
    ]


# --- contexts


def test_a_context_reaches_the_layers_that_take_one_and_no_others():
    class Refuses(Keep):
        def forward(self, x, *context):
            assert not context
            return x

        def inverse(self, y, *context):
            assert not context
            return y

    layer, context = conditional(), torch.tensor([1.0, 2.0], dtype=torch.float64)
    inner = InvertibleSequential(Refuses(), Inverse(layer))
    network = InvertibleSequential(Refuses(), layer, Swap(), inner)
    x = pair()
    y = network(x, context)
    expected = layer.inverse(Swap()(layer(x, context)), context)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    torch.testing.assert_close(network.inverse(y, context), x)
    assert network.forward_and_log_det(x, context)[1].tolist() == [0, 0]
    assert network.inverse_and_log_det(y, context)[1].tolist() == [0, 0]


@pytest.mark.parametrize("method", ["forward", "inverse", "forward_and_log_det"])
def test_a_missing_context_is_told_by_the_outermost_composition(method):
    network = InvertibleSequential(InvertibleSequential(conditional()))
    with pytest.raises(TypeError, match=r"^InvertibleSequential is conditional and got no context"):
        getattr(network, method)(pair())


@pytest.mark.parametrize("method", ["forward", "inverse", "forward_and_log_det"])
def test_a_context_that_nothing_would_use_is_refused(method):
    with pytest.raises(TypeError, match=r"got a context .* that nothing in it would use"):
        getattr(InvertibleSequential(Swap()), method)(pair(), images())


# --- what a composition is


LAYERS = {
    "plain": Swap,
    "injective": lambda: InjectivePad(1),
    "scaling": Affine,
    "conditional": conditional,
}


@given(names=st.lists(st.sampled_from(list(LAYERS)), max_size=4), nested=st.booleans())
def test_a_composition_is_what_all_or_any_of_its_layers_are(names, nested):
    network = InvertibleSequential(*(LAYERS[name]() for name in names))
    if nested:
        network = InvertibleSequential(Swap(), network)
    assert network.bijective is ("injective" not in names)
    assert network.volume_preserving is {"injective", "scaling"}.isdisjoint(names)
    assert network.conditional is ("conditional" in names)


def test_append_changes_what_a_composition_is():
    network = InvertibleSequential(Swap())
    assert network.bijective
    assert not network.append(InjectivePad(1)).bijective


# --- log-determinants


def test_log_determinants_add_up():
    network = InvertibleSequential(Affine(0.5), Logistic(), Affine(-0.25, 0.0)).double()
    x = images()
    y, log_det = network.forward_and_log_det(x)
    assert torch.equal(y, network(x))
    expected = 16 * (0.5 - 0.25) + network[1].log_det(network[0](x))
    torch.testing.assert_close(log_det, expected)
    back, inverse_log_det = network.inverse_and_log_det(y)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse_log_det, -log_det)


def test_log_determinants_are_differentiable():
    network = InvertibleSequential(Affine(0.5), Affine(1.0))
    network.forward_and_log_det(images())[1].sum().backward()
    assert [layer.log_scale.grad.item() for layer in network] == [2 * 16, 2 * 16]


def test_a_volume_preserving_composition_has_a_zero_an_example():
    network = InvertibleSequential(Split(), Swap(), Merge())
    for method in (network.forward_and_log_det, network.inverse_and_log_det):
        _, log_det = method(images(3, 4))
        assert log_det.tolist() == [0, 0, 0]
        assert log_det.dtype == torch.float64


@pytest.mark.parametrize("method", ["forward_and_log_det", "inverse_and_log_det"])
def test_a_layer_without_a_log_determinant_is_named(method):
    network = InvertibleSequential(Affine(), Double(), Affine())
    with pytest.raises(NotImplementedError, match=r"^Double defines no log-determinant") as caught:
        getattr(network, method)(images())
    assert caught.value.__notes__ == ["In layer 1 (Double) of InvertibleSequential."]


def test_no_layer_runs_twice_for_its_log_determinant():
    class Counts(InvertibleModule):
        volume_preserving = True
        runs = 0

        def forward(self, x):
            self.runs += 1
            return x

        def inverse(self, y):
            self.runs += 1
            return y

    network = InvertibleSequential(Counts(), InvertibleSequential(Counts()))
    network.forward_and_log_det(images())
    network.inverse_and_log_det(images())
    assert [layer.runs for layer in (network[0], network[1][0])] == [2, 2]
