"""Layers at their places in a graph, and their names."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from dagrow.layers import DEFAULT_RULES, LayerSite, layer_sites
from dagrow.tracing import record


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.part = nn.Linear(3, 3), nn.Module()
        self.part.weight, self.matrix = nn.Parameter(torch.rand(3, 3)), nn.Parameter(torch.rand(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(self.a(x))
        return functional.linear(x, self.part.weight) @ self.matrix + x @ self.a.weight


def sites_of(model: nn.Module, x: Tensor) -> list[LayerSite]:
    graph = record(model, x).graph
    sites = layer_sites(graph, model, DEFAULT_RULES)
    return [sites[node] for node in graph.nodes if node in sites]


def test_names_are_those_of_modules_owners_and_parameters() -> None:
    sites = sites_of(Net(), torch.rand(2, 3))
    assert [site.name for site in sites] == ["a", "a", "part", "matrix", "a[1]"]
    assert [site.owner for site in sites] == ["a", "a", "part", "", "a"]
    assert [site.path("weight") for site in sites] == ["a.weight", "a.weight", "part.weight", "matrix", "a.weight"]


def test_a_site_holds_the_very_parameters() -> None:
    model = Net()
    for site in sites_of(model, torch.rand(2, 3)):
        assert site.module.weight is model.get_parameter(site.path("weight"))


def test_what_no_rule_knows_is_no_site() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.LayerNorm(4), nn.BatchNorm1d(4))
    assert [site.name for site in sites_of(model.eval(), torch.rand(2, 3))] == ["0", "3"]
