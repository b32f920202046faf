"""Training with rounding in two processes: under DDP and FSDP2, qparams are those of the whole batch everywhere."""

from __future__ import annotations

import copy
import pickle
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from pt2e_quant import check_converted, convert_pt2e, prepare_pt2e, prepare_qat_pt2e
from pt2e_quant.distributed import synchronize
from pt2e_quant.distributed.ranks import Ranks
from pt2e_quant.errors import DistributedError
from pt2e_quant.fake_quantize import FakeQuantize, FusedMovingAvgObsFakeQuantize
from pt2e_quant.observer import MinMaxObserver, MovingAverageMinMaxObserver, MSEObserver
from tests.distributed.kit import one_process, outcome, run_ranks
from tests.nets import ConvNet, export
from tests.pt2e.kit import STATIC
from tests.qat.kit import TRAINED, AllConvs, images, settle

IMAGES = [images(seed, 4, 3, 16, 16) * (1 + seed) for seed in range(5)]
ROWS = [images(seed, 6, 6) * (1 + seed % 3) for seed in range(6)]
BITS = {"dtype": torch.uint8, "quant_min": 0, "quant_max": 255}
RECIPES = {
    "average": FakeQuantize.with_args(observer=MovingAverageMinMaxObserver, averaging_constant=0.3),
    "range": FakeQuantize.with_args(observer=MinMaxObserver),
    "counts": FakeQuantize.with_args(observer=MSEObserver),
    "fused": FusedMovingAvgObsFakeQuantize.with_args(observer=MovingAverageMinMaxObserver, averaging_constant=0.3),
}


NORMED = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, momentum=0.03))


def exported(model, x):
    torch.manual_seed(0)
    return torch.export.export(model().train(), (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))


def convnet():
    return prepare_qat_pt2e(exported(ConvNet, IMAGES[0]), AllConvs().set_global(TRAINED))


def linear(recipe):
    """One linear whose activations are observed by a recipe."""
    activation = replace(TRAINED.input_activation, observer_or_fake_quant_ctr=recipe, **BITS)
    config = replace(TRAINED, input_activation=activation, output_activation=activation)
    return prepare_qat_pt2e(exported(lambda: nn.Linear(6, 3), ROWS[0]), AllConvs().set_global(config))


def shares(batches):
    """Of each batch, the part of this rank."""
    return [batch.chunk(dist.get_world_size())[dist.get_rank()] for batch in batches]


def train(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for x in shares(IMAGES):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def states(model, batches):
    """The state of a model that ran these batches."""
    for x in batches:
        model(x)
    return model.state_dict()


def under_ddp():
    model = convnet()
    count = synchronize(model)
    train(DistributedDataParallel(model))
    converted = convert_pt2e(settle(model))
    check_converted(model, converted, IMAGES[:1])
    return count, model.state_dict(), converted.state_dict()


def under_fsdp():
    """The whole state goes into a model prepared anew, which is converted in one process."""
    model = convnet()
    count = synchronize(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    train(model)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    state = state if dist.get_rank() == 0 else model.state_dict()
    if dist.get_rank() == 0:
        alone = convnet()
        alone.load_state_dict(state)
        check_converted(alone, convert_pt2e(settle(alone)), IMAGES[:1])
    return count, {key: value for key, value in state.items() if not isinstance(value, dist.tensor.DTensor)}


def with_recipes():
    found = {}
    for name, recipe in RECIPES.items():
        model = linear(recipe)
        synchronize(model)
        found[name] = states(model, shares(ROWS))
    return found


def in_trouble():
    """What happens to a rank that meets NaN, to copies, and to the rank that is left."""
    rank, found = dist.get_rank(), {}
    model = linear(RECIPES["average"])
    model(ROWS[0])
    synchronize(model)
    before = copy.deepcopy(model.state_dict())
    mine = ROWS[0].clone()
    mine[0, 0] = torch.nan if rank else 1.0
    found["nan"] = outcome(lambda: model(mine))
    found["untouched"] = all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    far = copy.deepcopy(model)
    found["copy"] = states(far, shares(ROWS[1:2]))
    found["pickled"] = states(pickle.loads(pickle.dumps(model)), shares(ROWS[1:2]))
    if rank == 0:
        synchronize(model, timeout=1.5)
        start = time.monotonic()
        found["alone"] = outcome(lambda: model(ROWS[0]))
        found["seconds"] = time.monotonic() - start
    return found


def sharded_in_parts():
    model = convnet()
    fully_shard(model.depthwise, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return outcome(lambda: model(IMAGES[0]))


def every_case():
    cases = {"ddp": under_ddp(), "fsdp": under_fsdp(), "recipes": with_recipes(), "parts": sharded_in_parts()}
    return {**cases, "trouble": in_trouble()}  # it ends what the ranks have in common


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(every_case, tmp_path_factory.mktemp("ranks"))


def different(first, second):
    assert first.keys() >= second.keys()
    return [key for key in second if not torch.equal(first[key], second[key])]


def test_all_ranks_end_with_one_state_and_convert_to_the_same_integers_under_ddp(ranks):
    (count, state, integers), (_, others, their_integers) = (rank["ddp"] for rank in ranks)
    assert count == 5  # of eight: three watch weights
    assert different(state, others) == []
    assert different(integers, their_integers) == []


def test_all_ranks_have_the_same_ranges_and_statistics_under_fsdp(ranks):
    (count, state), (_, others) = (rank["fsdp"] for rank in ranks)
    assert count == 5
    assert any(key.endswith("running_var") for key in others)
    assert sum(key.endswith(".scale") for key in others) == 8
    assert different(state, others) == []


def test_a_part_that_is_sharded_alone_is_told_that_nothing_gathers_it(ranks):
    for rank in ranks:
        error, text = rank["parts"]
        assert error == "CalibrationError"
        assert "in module 'depthwise'" in text
        assert "Give fully_shard the whole model" in text


@pytest.mark.parametrize("name", RECIPES)
def test_observers_know_what_those_of_one_process_know_of_the_whole_batches(ranks, name):
    """Bit for bit, averages included: the range of a batch is that of its parts."""
    alone = states(linear(RECIPES[name]), ROWS)
    assert [different(alone, rank["recipes"][name]) for rank in ranks] == [[], []]


def test_nan_on_one_rank_is_an_error_on_all_that_leaves_no_trace(ranks):
    healthy, ill = (rank["trouble"] for rank in ranks)
    assert (healthy["nan"][0], ill["nan"][0]) == ("CalibrationError", "CalibrationError")
    assert "another rank met NaN" in healthy["nan"][1]
    assert "1 NaN among 36 values" in ill["nan"][1]
    assert healthy["untouched"]
    assert ill["untouched"]


def test_copies_are_synchronized_and_pickled_models_are_not(ranks):
    first, second = (rank["trouble"] for rank in ranks)
    assert different(first["copy"], second["copy"]) == []
    assert different(first["pickled"], second["pickled"]) != []


def test_a_rank_that_is_gone_is_an_error_in_the_next_forward(ranks):
    error, text = ranks[0]["trouble"]["alone"]
    assert error == "DistributedError"
    assert "to observe the same batch at input input_1" in text
    assert ranks[0]["trouble"]["seconds"] < 5


@pytest.mark.slow
def test_a_compiled_model_exchanges_too(monkeypatch):
    """Batches of several sizes, which a compiler gives a symbol; statistics of norms are agreed on after each."""
    torch._dynamo.reset()
    agreed = []
    monkeypatch.setattr(Ranks, "mean", lambda self, values, purpose: agreed.append(1) or values)
    batches, found = [ROWS[0], ROWS[1][:3]], []
    with one_process(), torch.no_grad():
        for compiled in (False, True):
            model = prepare_qat_pt2e(exported(lambda: NORMED, ROWS[0]), AllConvs().set_global(TRAINED))
            assert synchronize(model) == 2
            run = torch.compile(model, backend="eager") if compiled else model
            for x in batches:
                run(x)
            found.append(model.state_dict())
    assert different(*found) == []
    assert len(agreed) == 4


def test_a_model_to_calibrate_is_refused():
    calibrating = prepare_pt2e(export(ConvNet(), IMAGES[0]), AllConvs().set_global(STATIC))
    with one_process(), pytest.raises(DistributedError, match="use merge_ranks"):
        synchronize(calibrating)
