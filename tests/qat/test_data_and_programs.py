"""Training on a DataLoader; bodies of map and weights that are shared; integers that no further step changes."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.map import map as torch_map
from torch.fx import GraphModule
from torch.utils.data import DataLoader, TensorDataset

from pt2e_quant import check_converted, convert_pt2e, prepare_qat_pt2e
from pt2e_quant.quantizer import with_learned_scales
from quantizers.decoder import get_decoder_quantizer
from tests.nets import ConvNet, export
from tests.pt2e.kit import STATIC, Toy
from tests.qat.kit import TRAINED, images, settle, sgd


def test_a_data_loader_calibrates_and_trains():
    x = images(1, 20, 3, 16, 16)
    labels = (x.mean((1, 2, 3)) > 0).long()
    program = export(ConvNet(), x[:2], train=True, dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    quantizer = Toy().set_global(TRAINED)
    graph = prepare_qat_pt2e(program, quantizer, calibration=DataLoader(x, batch_size=8))
    optimizer = torch.optim.AdamW(graph.parameters(), lr=0.01)
    losses = []
    for _ in range(4):
        for inputs, target in DataLoader(TensorDataset(x, labels), batch_size=8, shuffle=True):  # the last one has 4
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(graph(inputs), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert sum(losses[-3:]) < sum(losses[:3])
    check_converted(settle(graph), convert_pt2e(graph), DataLoader(x, batch_size=8))


class EachRow(nn.Module):
    """A body that runs once for every row."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch_map(lambda row: torch.relu(self.layer(row)), x))


class Tied(nn.Module):
    """One weight in two layers, which read different tensors, and a parameter that is added as well."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.relu(self.one(x))) + x


@pytest.mark.parametrize("config", [TRAINED, with_learned_scales(STATIC)], ids=["observed", "learned"])
@pytest.mark.parametrize(
    ("model", "x"), [(EachRow(), images(1, 5, 2, 3)), (Tied(), images(1, 8, 6))], ids=["map", "tied weights"]
)
def test_bodies_and_shared_weights_train_and_convert(model, x, config):
    graph = prepare_qat_pt2e(export(model, x), Toy().set_global(config), calibration=[x]).train()
    losses = sgd(graph, [x] * 8)
    assert losses[-1] < losses[0]
    check_converted(settle(graph), convert_pt2e(graph), [x])


def test_a_weight_of_two_layers_stays_one_parameter_and_one_tensor_of_integers():
    x = images(1, 8, 6)
    graph = prepare_qat_pt2e(export(Tied(), x), Toy().set_global(TRAINED)).train()
    assert sorted(tuple(parameter.shape) for parameter in graph.parameters()) == [(6,), (6,), (6, 6)]
    sgd(graph, [x] * 2)
    stored = [value for value in integers(convert_pt2e(graph)).values() if value.dim() == 2]
    assert len({value.data_ptr() for value in stored}) == 1


class Words(nn.Module):
    """A table that is the output layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.middle = nn.Embedding(20, 64), nn.Linear(64, 64)
        self.head = nn.Linear(64, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.relu(self.middle(self.table(tokens))))


def test_a_table_that_is_the_output_layer_too_trains_in_groups():
    tokens = torch.arange(12).reshape(3, 4)
    graph = prepare_qat_pt2e(export(Words(), tokens), get_decoder_quantizer(is_qat=True)).train()
    losses = sgd(graph, [tokens] * 6)
    assert losses[-1] < losses[0]
    check_converted(settle(graph), convert_pt2e(graph), [tokens])


def integers(model: GraphModule) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if value.dtype is torch.int8}


def test_converting_again_exporting_and_loading_change_no_integer():
    x = images(1, 4, 3, 16, 16)
    graph = prepare_qat_pt2e(export(ConvNet(), x), Toy().set_global(TRAINED)).train()
    sgd(graph, [x] * 3)
    converted = convert_pt2e(settle(graph))
    first = integers(converted)
    assert len(first) == 3
    file = io.BytesIO()
    torch.export.save(torch.export.export(converted, (x,)), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for other in (integers(convert_pt2e(graph)), integers(loaded)):
        assert {name: value.tolist() for name, value in other.items()} == {
            name: value.tolist() for name, value in first.items()
        }
    assert torch.equal(loaded(x), converted(x))
