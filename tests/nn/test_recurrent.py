"""Dynamic recurrent layers and cells beside torch.nn's in float and torch.ao's, and the state dicts of both."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pt2e_quant import QuantizationError
from pt2e_quant.kernels import using
from pt2e_quant.nn import load_quantized
from pt2e_quant.nn.quantized import dynamic, reference
from pt2e_quant.qconfig import default_dynamic_qconfig, float16_dynamic_qconfig, per_channel_dynamic_qconfig
from pt2e_quant.sqnr import sqnr

# torch.nn.LSTM says so, in its own float form, once in a process
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

FLOAT: dict[str, tuple[type, tuple[Any, ...], dict[str, Any]]] = {
    "LSTM": (nn.LSTM, (16, 24), {}),
    "LSTM, 2 layers both ways": (nn.LSTM, (16, 24, 2), {"bidirectional": True, "batch_first": True}),
    "LSTM, projected": (nn.LSTM, (16, 24, 2), {"proj_size": 8}),
    "LSTM, no bias": (nn.LSTM, (16, 24), {"bias": False}),
    "GRU": (nn.GRU, (16, 24), {}),
    "GRU, 2 layers both ways": (nn.GRU, (16, 24, 2), {"bidirectional": True}),
    "LSTMCell": (nn.LSTMCell, (16, 24), {}),
    "GRUCell": (nn.GRUCell, (16, 24), {}),
    "RNNCell": (nn.RNNCell, (16, 24), {}),
    "RNNCell, relu": (nn.RNNCell, (16, 24), {"nonlinearity": "relu"}),
}
BY_THE_PEER = [name for name in FLOAT if "projected" not in name and "no bias" not in name]  # torch.ao refuses these


def floating(name: str, qconfig: Any = per_channel_dynamic_qconfig) -> Any:
    kind, sizes, options = FLOAT[name]
    torch.manual_seed(0)
    made = kind(*sizes, **options)
    made.qconfig = qconfig
    return made.eval()


def quantized(module: Any) -> Any:
    return getattr(dynamic, type(module).__name__).from_float(module)


def by_the_peer(module: Any) -> Any:
    import torch.ao.nn.quantized.dynamic as peer
    from torch.ao.quantization import per_channel_dynamic_qconfig as their_qconfig

    other = copy.deepcopy(module)
    other.qconfig = their_qconfig
    torch.backends.quantized.engine = "x86"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's types and modules are deprecated
        return getattr(peer, type(module).__name__).from_float(other)


def batch(module: Any) -> Tensor:
    shape = (7, 3, 16) if isinstance(module, nn.RNNBase | dynamic.LSTM | dynamic.GRU) else (3, 16)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def leaves(values: Any) -> list[Tensor]:
    return [values] if isinstance(values, Tensor) else [leaf for value in values for leaf in leaves(value)]


def decibels(made: Any, wanted: Any) -> float:
    return min(float(sqnr(b, a)) for a, b in zip(leaves(made), leaves(wanted), strict=True))


@pytest.mark.parametrize("name", FLOAT)
def test_eight_bits_come_close_to_float(name: str) -> None:
    module = floating(name)
    with torch.no_grad():
        # 8-bit steps of inputs alone leave about 40 dB; weights and further layers cost some of it
        assert decibels(quantized(module)(batch(module)), module(batch(module))) > 34


@pytest.mark.filterwarnings("ignore")  # torch's types are deprecated
@pytest.mark.parametrize("name", BY_THE_PEER)
def test_no_further_from_float_than_the_peer(name: str) -> None:
    module = floating(name)
    with torch.no_grad():
        wanted = module(batch(module))
        ours, theirs = quantized(module)(batch(module)), by_the_peer(module)(batch(module))
    assert decibels(ours, wanted) > decibels(theirs, wanted)  # which leaves one bit of inputs unused


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BY_THE_PEER)
def test_a_state_dict_of_the_peer_loads(name: str) -> None:
    module = floating(name)
    state = by_the_peer(module).state_dict()
    loaded = load_quantized(nn.Sequential(floating(name)), {f"0.{key}": value for key, value in state.items()})
    made, wanted = loaded(batch(module)), quantized(module)(batch(module))
    assert all(torch.equal(a, b) for a, b in zip(leaves(made), leaves(wanted), strict=True))


@pytest.mark.parametrize("name", ["LSTM, projected", "LSTM, no bias", "GRU", "LSTMCell"])
@pytest.mark.parametrize("qconfig", [default_dynamic_qconfig, float16_dynamic_qconfig], ids=["int8", "float16"])
def test_a_state_dict_goes_through_a_file_with_weights_only(name: str, qconfig: Any) -> None:
    module = floating(name, qconfig)
    file = io.BytesIO()
    torch.save(quantized(module).state_dict(), file)
    file.seek(0)
    loaded = dynamic.__dict__[type(module).__name__].empty_like(module)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    made, wanted = loaded(batch(module)), quantized(module)(batch(module))
    assert all(torch.equal(a, b) for a, b in zip(leaves(made), leaves(wanted), strict=True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BY_THE_PEER)
def test_modules_print_as_the_peers_with_its_keys(name: str) -> None:
    ours, theirs = quantized(floating(name)), by_the_peer(floating(name))
    assert str(ours) == str(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert list(ours.get_weight()) == list(theirs.get_weight())
    assert list(ours.get_bias()) == list(theirs.get_bias())


@pytest.mark.parametrize("name", ["LSTM, projected", "GRU", "RNNCell"])
def test_float16_weights_are_rounded_and_nothing_else(name: str) -> None:
    module = floating(name, float16_dynamic_qconfig)
    made = quantized(module)(batch(module))
    with torch.no_grad():
        for parameter_name, parameter in module.named_parameters():
            if "weight" in parameter_name:
                parameter.copy_(parameter.half())
        assert all(map(_near, leaves(made), leaves(module(batch(module)))))


def _near(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-6)  # float32 sums in another order


@pytest.mark.parametrize("name", ["LSTM, 2 layers both ways", "LSTM, projected", "GRU, 2 layers both ways"])
@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed_sequences_follow_float(name: str, enforce_sorted: bool) -> None:
    module, x = floating(name), torch.randn(7, 3, 16)
    lengths = [7, 4, 2] if enforce_sorted else [2, 7, 4]
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted)
    state = module(x.transpose(0, 1) if module.batch_first else x)[1]
    state = tuple(one.detach() for one in state) if isinstance(state, tuple) else state.detach()
    with torch.no_grad():
        wanted, wanted_state = module(packed, state)
        made, made_state = quantized(module)(packed, state)
    assert torch.equal(made.batch_sizes, wanted.batch_sizes)
    assert decibels((made.data, made_state), (wanted.data, wanted_state)) > 30


@pytest.mark.parametrize("name", ["LSTM", "GRU, 2 layers both ways", "LSTMCell"])
def test_one_sequence_without_a_batch(name: str) -> None:
    module = floating(name)
    x = batch(module)
    x = x[:, 0] if x.dim() == 3 else x[0]
    made, wanted = quantized(module)(x), module(x)
    assert [one.shape for one in leaves(made)] == [one.shape for one in leaves(wanted)]
    again = quantized(module)(x, made[1] if isinstance(module, nn.RNNBase) else made)
    assert [one.shape for one in leaves(again)] == [one.shape for one in leaves(wanted)]


@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
def test_copies_and_pickles_compute_the_same(name: str) -> None:
    module = floating(name)
    made = quantized(module)
    wanted = leaves(made(batch(module)))
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), copy.deepcopy(made).to("cpu")):
        assert all(map(torch.equal, leaves(other(batch(module))), wanted))


@pytest.mark.parametrize("name", ["LSTM", "GRU", "LSTMCell", "GRUCell", "RNNCell"])
def test_from_reference_has_the_references_grids(name: str) -> None:
    module = floating(name)
    grids = {
        parameter_name: {"qscheme": torch.per_tensor_affine, "dtype": torch.qint8, "scale": 1 / 256, "zero_point": 0}
        for parameter_name, _ in module.named_parameters()
        if "weight" in parameter_name
    }
    made = getattr(reference, name).from_float(module, grids)
    weights = getattr(dynamic, name).from_reference(made).get_weight()
    assert {name: weight.q_scale() for name, weight in weights.items()} == dict.fromkeys(grids, 1 / 256)


def test_dropout_acts_between_layers_of_a_layer_in_training() -> None:
    module = nn.LSTM(16, 24, 2, dropout=0.5)
    module.qconfig = per_channel_dynamic_qconfig  # type: ignore[assignment]
    made = quantized(module)
    x = torch.randn(7, 3, 16)
    assert torch.equal(made(x)[0], made(x)[0])
    made.train()
    assert not torch.equal(made(x)[0], made(x)[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dynamic.LSTM(4, 3, dtype=torch.quint8), r"torch.qint8 or torch.float16, not torch.quint8"),
        (lambda: dynamic.LSTM(4, 3, dropout=2.0), "a probability, got 2.0"),
        (lambda: dynamic.GRU(4, 3, proj_size=2), "LSTM alone"),
        (lambda: dynamic.RNNCell(4, 3, nonlinearity="elu"), "'tanh' or 'relu', not 'elu'"),
        (lambda: dynamic.LSTM(4, 3)(torch.ones(2, 2, 5)), r"4 features, got \(2, 2, 5\)"),
        (lambda: dynamic.GRU(4, 3)(torch.ones(2, 2, 4), torch.ones(1, 1, 3)), r"a state of shape"),
        (lambda: dynamic.LSTMCell(4, 3)(torch.ones(2, 5)), r"4 features, got \(2, 5\)"),
        (lambda: dynamic.GRUCell(4, 3)(torch.ones(2, 4), torch.ones(1, 3)), r"of shape \(2, 3\) are expected"),
        (lambda: dynamic.LSTM.from_float(nn.LSTM(4, 3)), "has no qconfig"),
        (lambda: dynamic.LSTM("4", 3), "input_size must be an int"),
    ],
)
def test_what_cannot_be_is_said(call: Any, message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        call()


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_an_exported_layer_computes_the_same(name: str) -> None:
    made = quantized(floating(name))
    x = batch(made)[:2]
    program = torch.export.export(made, (x,)).module()
    assert all(map(_near, leaves(program(x)), leaves(made(x))))


@pytest.mark.parametrize("qconfig", [per_channel_dynamic_qconfig, float16_dynamic_qconfig], ids=["int8", "float16"])
@pytest.mark.parametrize("name", FLOAT)
def test_the_loop_computes_what_torchs_kernels_do(name: str, qconfig: Any) -> None:
    made = quantized(floating(name, qconfig))
    wanted = leaves(made(batch(made)))
    with using("loop"):
        assert decibels(made(batch(made)), wanted) > 90  # float32, but for a code that falls on the other side


@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_the_loop_runs_packed_sequences_as_torchs_kernel_does(enforce_sorted: bool) -> None:
    made, lengths = quantized(floating("LSTM, 2 layers both ways")), [7, 4, 2] if enforce_sorted else [2, 7, 4]
    packed = nn.utils.rnn.pack_padded_sequence(batch(made), lengths, enforce_sorted=enforce_sorted)
    out, state = made(packed)
    with using("loop"):
        other, other_state = made(packed)
    assert decibels((other.data, other_state), (out.data, state)) > 50  # a step of an input, here and there


def test_without_torchs_quantized_tensors_recurrent_layers_work(monkeypatch: pytest.MonkeyPatch) -> None:
    made = quantized(floating("LSTM"))
    wanted = leaves(made(batch(made)))
    monkeypatch.delattr(torch, "_make_per_channel_quantized_tensor")
    assert decibels(quantized(floating("LSTM"))(batch(made)), wanted) > 90


@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
def test_an_input_that_is_not_finite_is_refused(name: str) -> None:
    made = quantized(floating(name))
    with pytest.raises(QuantizationError, match="no NaN and no infinity"):
        made(batch(made) * float("nan"))
