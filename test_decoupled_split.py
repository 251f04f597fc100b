"""Tests of decoupled_split.py. Most compare the program with something that is not its own code:
plain PyTorch, torchvision, PyTorch's allocator, two real processes, or numbers worked out by hand.
The others see to it that its parts, tested in this way, are put together as they should be.

    pytest                              all tests: no network, one to two minutes on two cores
    python test_decoupled_split.py      the benchmark: milliseconds per training step
"""
import builtins
import copy
import dis
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import types
import urllib.error
import urllib.request
import zipfile
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from torch.utils._pytree import tree_leaves
from torchvision import datasets

import decoupled_split as ds

torch.set_num_threads(1)        # sums in the same order in every process
HERE = Path(__file__).parent
CPU = torch.device("cpu")
MODES = ["backprop", "decoupled"]
CUTS_AND_MODULES = [("deep", 1, 1), ("middle", 1, 1), ("shallow", 1, 1), ("deep", 3, 2),
                    ("middle", 3, 2), ("shallow", 2, 3)]
ENV = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONIOENCODING": "utf-8",
    "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
    "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
}

TRAIN, TEST = ds.synthetic(0, (64, 32))
BATCHES = list(ds.test_batches(*TRAIN, 16))         # four batches of 16 images
Z = torch.randn(5, 3, 4, 2)                         # 120 numbers


# ---- helpers -------------------------------------------------------------------------

def options(mode, **changes):
    small = {"depth": 8, "batch_size": 16, "epochs": 1, "lr": 0.05}
    return ds.Options(**{**small, "mode": mode, **changes})

def make_run(mode, sets=(TRAIN, TEST), **changes):
    return ds.Run(options(mode, **changes), *sets, CPU)

def make_parties(mode, total_steps=100, **changes):
    return ds.build_parties(options(mode, **changes), total_steps, CPU)

def train(mode, parties, channel, batches):
    """Train on the batches. Returns the losses of each step."""
    return [ds.STEPS[mode](*parties, channel, x, y) for x, y in batches]

def plain_sgd(parameters):
    """An optimizer for toy networks, and a schedule that changes nothing."""
    sgd = torch.optim.SGD([{"params": parameters}], 0.3, momentum=0.9)
    return sgd, torch.optim.lr_scheduler.ConstantLR(sgd, 1.0)

def oracle_sgd(parameters, total_steps=100):
    """The optimizer that the program should use, for networks of the tests' own."""
    sgd = torch.optim.SGD(parameters, 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(sgd, 0.05, total_steps, cycle_momentum=False)
    return sgd, schedule

def uncut(depth, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(*ds.resnet_layers(depth, 10)).to(memory_format=torch.channels_last)

def weights(*modules):
    """Copies of all weights and buffers."""
    return [tensor.clone() for module in modules for tensor in module.state_dict().values()]

def kept(party):
    """What stays between two batches: weights, buffers, momentum."""
    tensors = []
    for module in party:
        tensors += module.state_dict().values()
        for state in module.optimizer.state.values():
            tensors += [tensor for tensor in state.values() if torch.is_tensor(tensor)]
    return tensors

def same(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))

def size(tensors):
    return sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors)

def static_bytes(party):
    """Weights, buffers, and one momentum per parameter."""
    return size(party.state_dict().values()) + size(party.parameters())

def count_of(channel):
    """{(hop, kind): bytes} of all that was sent."""
    return {(hop, kind): count for hop, kinds in channel.bytes.items()
            for kind, count in kinds.items() if count}

def text_of(name):
    """The text of a file of the project."""
    return (HERE / name).read_text(encoding="utf-8")

def log_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]

@pytest.fixture
def small(monkeypatch):
    """64 synthetic images instead of 2560."""
    whole = ds.synthetic
    monkeypatch.setattr(ds, "synthetic", lambda seed: whole(seed, (64, 32)))

@pytest.fixture
def refused(capsys, small):
    """A function that runs main, expects code 2 and one line on stderr, and returns the line."""
    def run(*argv):
        code = ds.main([str(arg) for arg in argv])
        lines = capsys.readouterr().err.splitlines()
        assert code == 2 and len(lines) == 1
        assert lines[0].startswith("decoupled_split.py: error: ")
        return lines[0]
    return run

@pytest.fixture(scope="module", autouse=True)
def plain_command(tmp_path_factory):
    """The command of the README, shortened, as a process that runs beside the first tests."""
    argv = [sys.executable, HERE / "decoupled_split.py", *"--max-steps 2 --epochs 1 --device cpu".split()]
    process = subprocess.Popen(argv, cwd=tmp_path_factory.mktemp("plain"), text=True, env=ENV,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


# ---- network and cut -----------------------------------------------------------------

@pytest.mark.parametrize("depth, count", [(20, 269_722), (110, 1_727_962)])
def test_parameters_are_as_many_as_in_the_literature(depth, count):
    layers = ds.resnet_layers(depth, 10)

    assert sum(p.numel() for layer in layers for p in layer.parameters()) == count

@pytest.mark.parametrize("depth", [2, 7, 18, 34])
def test_a_depth_that_is_not_6n_plus_2_is_an_error(depth):
    with pytest.raises(ValueError, match=f"depth of {depth}"):
        ds.resnet_layers(depth, 10)

@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cut, clients, servers", CUTS_AND_MODULES)
def test_cutting_keeps_every_layer_once_in_order_with_its_weights(mode, cut, clients, servers):
    parties = make_parties(mode, depth=20, cut=cut, client_modules=clients,
                           server_modules=servers, seed=3)

    modules = [module for party in parties for module in party]
    layers = [layer for module in modules for layer in module.body] + [modules[-1].head]
    assert [party.name for party in parties] == ["client", "server"]
    assert [len(party) for party in parties] == [clients, servers]
    assert [type(layer) for layer in layers] == [type(layer) for layer in uncut(20)]
    assert same(weights(*layers), weights(*uncut(20, seed=3)))
    assert not same(weights(*layers), weights(*uncut(20, seed=4)))
    assert all((module.head is None) == (mode == "backprop") for module in modules[:-1])

@pytest.mark.parametrize("depth, cut, servers, plan", [
    (20, "shallow", 1, {"client": [4], "server": [13]}),
    (20, "middle", 1, {"client": [5], "server": [13]}),
    (20, "deep", 1, {"client": [7], "server": [13]}),
    (8, "shallow", 1, {"client": [2], "server": [7]}),
    (110, "deep", 1, {"client": [29], "server": [58]}),
    (110, "middle", 2, {"client": [20], "server": [39, 58]}),
    (110, "shallow", 3, {"client": [15], "server": [30, 45, 58]})])
def test_the_client_has_a_quarter_a_third_or_half_of_the_layers(depth, cut, servers, plan):
    layer_count = 3 + (depth - 2) // 2 + 1          # stem, blocks, classifier

    got = ds.make_plan(ds.Options(cut=cut, server_modules=servers), layer_count)

    assert got == plan

@pytest.mark.parametrize("depth, cut, shape", [
    (110, "deep", (32, 16, 16)), (110, "middle", (16, 32, 32)), (110, "shallow", (16, 32, 32)),
    (20, "deep", (32, 16, 16)), (8, "shallow", (16, 32, 32))])
def test_the_smashed_data_has_the_channels_and_the_size_at_the_cut(depth, cut, shape):
    client, _ = make_parties("decoupled", depth=depth, cut=cut)

    assert client(torch.zeros(2, 3, 32, 32)).shape == (2, *shape)

def test_groups_of_layers_are_consecutive_and_as_equal_as_the_paper_has_them():
    assert ds.group_ends(0, 7, 1) == [7]
    assert ds.group_ends(0, 7, 3) == [3, 6, 7]
    assert ds.group_ends(15, 58, 3) == [30, 45, 58]
    with pytest.raises(ValueError, match="no layer from 7 to 5"):
        ds.group_ends(7, 5, 1)
    with pytest.raises(ValueError, match="6 layers can be split into 1, 2, 3, 6 groups"):
        ds.group_ends(7, 13, 4)

@pytest.mark.parametrize("plan", [
    {"client": [7], "server": [12]}, {"client": [7], "server": [10, 9, 13]},
    {"client": [0], "server": [13]}, {"client": [7, 7], "server": [13]},
    {"client": [8], "server": [14]}])
def test_a_plan_that_does_not_cover_each_layer_once_is_an_error(plan):
    with pytest.raises(ValueError, match="13"):
        ds.cut_network(ds.resnet_layers(20, 10), plan, lambda end: None, plain_sgd)

def test_a_party_without_a_module_is_an_error():
    plan = {"client": [7], "edge": [], "server": [13]}

    with pytest.raises(ValueError, match="without a module"):
        ds.cut_network(ds.resnet_layers(20, 10), plan, lambda end: None, plain_sgd)

def test_block_is_the_residual_block_of_the_paper():
    block = ds.ResidualBlock(4, 8, 2).eval()
    x = torch.randn(2, 4, 6, 6)
    for norm in (block.bn1, block.bn2):
        norm.running_mean.normal_()
        norm.running_var.uniform_(1, 2)

    y = F.conv2d(x, block.conv1.weight, stride=2, padding=1)
    y = F.conv2d(block.bn1(y).clamp_min(0), block.conv2.weight, padding=1)
    shortcut = torch.cat([x[:, :, ::2, ::2], torch.zeros(2, 4, 3, 3)], 1)       # option A
    oracle = (block.bn2(y) + shortcut).clamp_min(0)

    torch.testing.assert_close(block(x.clone()), oracle)

def blocks_of(head):
    """(c_in, c_out, stride) of the residual blocks in an auxiliary classifier."""
    return [(block.conv1.in_channels, block.conv1.out_channels, block.conv1.stride[0])
            for block in head if isinstance(block, ds.ResidualBlock)]

def resnet_shapes(depth=20):
    return ds.output_shapes(ds.resnet_layers(depth, 10), torch.zeros(1, 3, 32, 32))

@pytest.mark.parametrize("depth, blocks", [
    (1, [(32, 64, 2)]),
    (2, [(32, 32, 1), (32, 64, 2)]),
    (3, [(32, 32, 1), (32, 64, 2), (64, 64, 1)]),
    (5, [(32, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 64, 1)]),
    (9, [(32, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 64, 1)])])
def test_auxiliary_blocks_take_width_and_stride_from_the_layers_that_follow(depth, blocks):
    # 7 layers are the stem and blocks of 16, 16, 16, 32. What follows is 32, 32, 64, 64, 64.
    head = ds.auxiliary_classifier(resnet_shapes(), 7, depth, 10)
    z = torch.randn(2, 32, 16, 16)

    features = head[:len(blocks)](z.clone())                    # (2, 64, 8, 8)
    pooled = F.avg_pool2d(features, 4).reshape(2, 256)          # 2x2 per channel
    oracle = pooled @ head[-1].weight.t() + head[-1].bias

    assert blocks_of(head) == blocks
    torch.testing.assert_close(head(z), oracle)

def test_auxiliary_depth_0_is_one_linear_layer_on_z_pooled_to_4x4():
    head = ds.auxiliary_classifier(resnet_shapes(), 7, 0, 10)
    z = torch.randn(2, 32, 16, 16)
    weight, bias = head.parameters()

    oracle = F.avg_pool2d(z, 4).reshape(2, 32 * 16) @ weight.t() + bias

    torch.testing.assert_close(head(z), oracle)

@pytest.mark.parametrize("size, after", [((16, 40), (8, 20)), ((40, 16), (20, 8))])
def test_an_auxiliary_block_has_the_stride_of_images_that_are_not_square(size, after):
    shapes = [(1, 8, *size), (1, 16, *after), (1, 10)]

    head = ds.auxiliary_classifier(shapes, 1, 1, 10)

    assert blocks_of(head) == [(8, 16, 2)]

def test_an_auxiliary_block_that_would_skip_most_of_z_is_an_error():
    shapes = [(1, 256, 8, 8), (1, 512, 1, 1), (1, 10)]

    with pytest.raises(ValueError, match="from 8 to 1 rows.*depth 0"):
        ds.auxiliary_classifier(shapes, 1, 1, 10)
    ds.auxiliary_classifier(shapes, 1, 0, 10)

@pytest.mark.parametrize("depth", [0, 1, 3])
def test_the_option_aux_depth_reaches_every_auxiliary_classifier(depth):
    client, server = make_parties("decoupled", depth=20, client_modules=2, server_modules=2,
                                  aux_depth=depth)

    heads = [client[0].head, client[1].head, server[0].head]

    # They stand after 4, 7 and 10 of 13 layers: 8, 5 and 2 layers follow before the classifier.
    assert [len(blocks_of(head)) for head in heads] == [min(depth, n) for n in (8, 5, 2)]

def test_auxiliary_classifier_is_the_plain_one_where_no_layer_follows():
    _, server = make_parties("decoupled", depth=8, server_modules=3, aux_depth=2)

    assert [len(module.body) for module in server] == [1, 1, 0]     # two blocks, the classifier
    assert blocks_of(server[0].head) == [(32, 64, 2)]
    assert [tuple(p.shape) for p in server[1].head.parameters()] == [(10, 64 * 16), (10,)]

def test_auxiliary_classifier_uses_the_block_that_it_is_given():
    def make_block(c_in, c_out, stride):
        return nn.Conv2d(c_in, c_out, 5, stride, padding=2)

    head = ds.auxiliary_classifier(resnet_shapes(), 7, 2, 10, make_block)

    assert [(b.in_channels, b.out_channels, b.stride[0]) for b in head[:2]] == [
        (32, 32, 1), (32, 64, 2)]

def test_the_example_image_leaves_no_trace_in_the_layers():
    layers = ds.resnet_layers(8, 10)
    before = weights(*layers)

    shapes = ds.output_shapes(layers, torch.randn(1, 3, 28, 28))

    assert shapes == [(1, 16, 28, 28)] * 4 + [(1, 32, 14, 14), (1, 64, 7, 7), (1, 10)]
    assert same(before, weights(*layers))
    assert all(layer.training for layer in layers)

def test_a_layer_that_does_not_fit_is_named():
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(9, 8, 3), ds.classifier(8, 1, 10)]

    with pytest.raises(ValueError, match=r"layer 2, Conv2d, .*\(1, 8, 30, 30\)"):
        ds.output_shapes(layers, torch.zeros(1, 3, 32, 32))


# ---- the two protocols ---------------------------------------------------------------

@pytest.mark.parametrize("cut, clients, servers", CUTS_AND_MODULES)
def test_backprop_mode_trains_as_the_uncut_network_does(cut, clients, servers):
    parties = make_parties("backprop", depth=20, cut=cut, client_modules=clients,
                           server_modules=servers)
    own = [p for party in parties for p in party.parameters()]
    gradients = {p: [] for p in own}
    for p in own:
        p.register_post_accumulate_grad_hook(lambda p: gradients[p].append(p.grad.clone()))
    whole = uncut(20)
    sgd, schedule = oracle_sgd(whole.parameters())
    channel = ds.Channel()
    assert same(own, list(whole.parameters()))

    for number, (x, y) in enumerate(BATCHES[:2]):
        losses, = train("backprop", parties, channel, [(x, y)])

        sgd.zero_grad()
        loss = F.cross_entropy(whole(x), y)
        loss.backward()
        for a, b in zip(own, whole.parameters(), strict=True):
            torch.testing.assert_close(gradients[a][number], b.grad, rtol=1e-4, atol=1e-6)
        assert losses == {"server": pytest.approx(loss.item(), rel=1e-5)}
        sgd.step()
        schedule.step()

    for a, b in zip(weights(*parties), weights(whole), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert all(len(g) == 2 for g in gradients.values())

def test_each_local_module_learns_from_its_own_loss_alone():
    parties = make_parties("decoupled", depth=14, client_modules=2, server_modules=2)
    chain = [copy.deepcopy((m.body, m.head)) for party in parties for m in party]
    optimizers = [oracle_sgd([*body.parameters(), *head.parameters()]) for body, head in chain]
    channel = ds.Channel()

    for x, y in BATCHES[:3]:
        losses, = train("decoupled", parties, channel, [(x, y)])

        own_losses = []
        h = x
        for (body, head), (sgd, schedule) in zip(chain, optimizers, strict=True):
            sgd.zero_grad()
            out = body(h)
            loss = F.cross_entropy(head(out), y)
            loss.backward()
            sgd.step()
            schedule.step()
            own_losses.append(loss.item())
            h = out.detach().clone()
        oracle = {"client": own_losses[1], "server": own_losses[3]}
        assert losses == pytest.approx(oracle, rel=1e-5)

    parts = [part for pair in chain for part in pair]
    for a, b in zip(weights(*parties), weights(*parts), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

@pytest.mark.parametrize("count", [1, 2])
def test_local_training_leaves_no_graph_and_no_gradient_behind(count):
    client, _ = make_parties("decoupled", depth=14, client_modules=count)
    x, y = BATCHES[0]
    x = x.clone().requires_grad_()          # as the z of a module before would be

    z, loss = ds.train_locally(client, x, y)

    assert z.grad_fn is None and not z.requires_grad and isinstance(loss, float)
    assert all(p.grad is None for p in client.parameters())

class WrongLabels(ds.Channel):
    def receive(self, hop, kind):
        tensor = super().receive(hop, kind)
        return 9 - tensor if kind == "labels" else tensor

def triple_the_weights(server):
    for p in server.parameters():
        p.data.mul_(3)

def raise_the_learning_rate(server):
    for module in server:
        module.optimizer.param_groups[0]["lr"] = 5

INTERFERENCE = {
    "weights": (triple_the_weights, ds.Channel),
    "learning rate": (raise_the_learning_rate, ds.Channel),
    "labels": (lambda server: None, WrongLabels),
}

@pytest.mark.parametrize("what", INTERFERENCE)
def test_decoupled_client_never_hears_from_the_server(what):
    disturb, make_channel = INTERFERENCE[what]
    # Backprop is the control: there the same interference must reach the client.
    for mode, deaf in (("decoupled", True), ("backprop", False)):
        quiet = make_parties(mode)
        disturbed = make_parties(mode)
        disturb(disturbed[1])
        channel = make_channel()

        train(mode, quiet, ds.Channel(), BATCHES[:3])
        train(mode, disturbed, channel, BATCHES[:3])

        assert same(weights(quiet[0]), weights(disturbed[0])) == deaf
        assert not same(weights(quiet[1]), weights(disturbed[1]))
        assert (channel.bytes["down"]["gradients"] == 0) == deaf

class SpyChannel(ds.Channel):
    """Remembers what was sent, and looks at what is received."""

    def __init__(self, wire):
        super().__init__(wire)
        self.log = []

    def send(self, tensor, hop, kind):
        self.log.append((hop, kind, tensor))
        super().send(tensor, hop, kind)

    def receive(self, hop, kind):
        received = super().receive(hop, kind)
        sent = next(tensor for h, k, tensor in self.log if (h, k) == (hop, kind))
        assert received.grad_fn is None and not received.requires_grad
        assert received.shape == sent.shape
        assert received.untyped_storage().data_ptr() != sent.untyped_storage().data_ptr()
        return received

@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wire", ds.WIRES)
def test_what_is_received_has_no_way_back_to_the_sender(mode, wire):
    channel = SpyChannel(wire)

    train(mode, make_parties(mode), channel, BATCHES[:1])

    routes = [(hop, kind) for hop, kind, _ in channel.log]
    up = [("up", "activations"), ("up", "labels")]
    assert routes == up + [("down", "gradients")] * (mode == "backprop")

@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [1, 2])
def test_every_parameter_has_one_optimizer_gets_a_gradient_and_moves(mode, count):
    parties = make_parties(mode, depth=14, client_modules=count, server_modules=count,
                           weight_decay=0)
    modules = [module for party in parties for module in party]
    everything = [p for party in parties for p in party.parameters()]
    owned = [p for m in modules for group in m.optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in everything]
    reached = set()

    def remember(p):
        if p.grad.abs().sum() > 0:
            reached.add(p)

    for p in everything:
        p.register_post_accumulate_grad_hook(remember)
    steps = []
    for module in modules:
        module.optimizer.register_step_post_hook(lambda optimizer, *_: steps.append(optimizer))
    channel = ds.Channel()

    for number in (1, 2):
        train(mode, parties, channel, BATCHES[number:number + 1])

        assert [steps.count(module.optimizer) for module in modules] == [number] * len(modules)
        assert all(p.grad is None for p in everything)

    assert len(owned) == len(everything) and set(owned) == set(everything)
    assert reached == set(everything)
    assert not any(map(torch.equal, everything, before))

@pytest.mark.parametrize("mode", MODES)
def test_weight_decay_pulls_every_weight_towards_zero(mode):
    plain = make_parties(mode, weight_decay=0.0)
    decayed = make_parties(mode, weight_decay=0.5)
    start = [p.detach().clone() for party in plain for p in party.parameters()]

    for parties in (plain, decayed):
        train(mode, parties, ds.Channel(), BATCHES[:1])

    ends = [[p.detach() for party in parties for p in party.parameters()]
            for parties in (plain, decayed)]
    # The first rate of one cycle is 1/25 of its peak. Nesterov's first step is 1 + 0.9 times it.
    factor = 0.05 / 25 * 1.9 * 0.5
    for w, without, with_decay in zip(start, *ends, strict=True):
        torch.testing.assert_close(without - with_decay, factor * w, rtol=0.01, atol=1e-6)

def test_both_modes_start_with_the_same_network_and_see_the_same_statistics():
    backprop = make_parties("backprop")
    decoupled = make_parties("decoupled")
    assert same(weights(*(m.body for m in backprop[0])), weights(*(m.body for m in decoupled[0])))

    train("backprop", backprop, ds.Channel(), BATCHES[:1])
    train("decoupled", decoupled, ds.Channel(), BATCHES[:1])

    # The client's batch-norm is the same. The server's is too: it received the same z.
    for a, b in zip(backprop, decoupled, strict=True):
        buffers_a = [t for m in a for t in m.body.buffers()]
        buffers_b = [t for m in b for t in m.body.buffers()]
        assert len(buffers_a) > 3 and same(buffers_a, buffers_b)

@pytest.mark.parametrize("mode", MODES)
def test_a_frozen_weight_stays_and_the_others_move(mode):
    parties = make_parties(mode)
    body = parties[0][0].body
    frozen = body[0].weight.requires_grad_(False)
    free = body[3].conv1.weight
    frozen_before = frozen.clone()
    free_before = free.detach().clone()

    train(mode, parties, ds.Channel(), BATCHES[:2])

    assert torch.equal(frozen, frozen_before) and not torch.equal(free, free_before)

def test_a_module_without_a_weight_trains_too():
    parties = make_parties("backprop", client_modules=4)        # conv, norm, relu, block

    losses = train("backprop", parties, ds.Channel(), BATCHES[:2])

    assert not list(parties[0][2].parameters())
    assert all(math.isfinite(loss["server"]) for loss in losses)

def test_a_party_clock_runs_only_while_it_works():
    client, server = make_parties("decoupled")
    start = time.perf_counter()

    for _ in range(2):
        with client.working():
            time.sleep(0.03)
        time.sleep(0.03)
    elapsed = time.perf_counter() - start

    assert 0.06 <= client.seconds <= elapsed - 0.06
    assert server.seconds == 0
    client.restart_clock()
    assert client.seconds == 0

def test_a_party_clock_waits_for_the_gpu_before_and_after_the_work(monkeypatch):
    client = ds.Party("client", [])
    now = 0.0
    queued = []             # seconds of work that the GPU still has to do

    def synchronize():
        nonlocal now
        now += sum(queued)
        queued.clear()

    monkeypatch.setattr(ds, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "synchronize", synchronize)

    queued.append(5.0)      # by another party
    with client.working():
        queued.append(2.0)

    assert client.seconds == 2 and not queued

def test_a_party_that_fails_is_no_longer_at_work():
    client, _ = make_parties("decoupled")

    with pytest.raises(RuntimeError, match="out of memory"), client.working():
        assert client.at_work
        raise RuntimeError("out of memory")

    assert not client.at_work

@pytest.mark.parametrize("mode", MODES)
def test_amp_computes_in_bfloat16_and_the_loss_in_float32(mode):
    plain = make_parties(mode)
    amp = make_parties(mode, amp=True)
    layer_types = set()
    for module in [m for party in amp for m in party]:
        for layer in module.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.register_forward_hook(lambda _, __, out: layer_types.add(out.dtype))
    x, y = BATCHES[0]

    scores = amp[0](x), amp[-1].scores(amp[0](x).float())
    a, = train(mode, plain, ds.Channel(), [(x, y)])
    b, = train(mode, amp, ds.Channel(), [(x, y)])

    assert layer_types == {torch.bfloat16}          # of heads too
    assert [t.dtype for t in scores] == [torch.bfloat16, torch.float32]
    assert a != b and a == pytest.approx(b, rel=0.02)
    assert all(p.dtype == torch.float32 for party in amp for p in party.parameters())

def test_the_backward_pass_is_outside_autocast():
    seen = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            seen.append(torch.is_autocast_enabled("cpu"))
            return gradient

    class Layer(nn.Module):
        def forward(self, x):
            seen.append(torch.is_autocast_enabled("cpu"))
            return Probe.apply(x)

    body = [nn.Linear(4, 4), Layer()]
    module = ds.LocalModule(body, nn.Linear(4, 3), plain_sgd, torch.bfloat16)

    ds.train_locally(ds.Party("client", [module]), torch.randn(6, 4), torch.tensor([0, 1, 2] * 2))

    assert seen == [True, False]


# ---- other networks, other parties ---------------------------------------------------

def flat_cnn():
    """Layers that are no ResNet: max-pooling, GroupNorm, widths 24, 48, 96, grey images."""
    torch.manual_seed(0)
    return [
        nn.Conv2d(1, 24, 5, padding=2), nn.GroupNorm(4, 24), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(24, 48, 3, padding=1), nn.GroupNorm(4, 48), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(48, 96, 3, padding=1), nn.GroupNorm(4, 96), nn.ReLU(),
        ds.classifier(96, 2, 4),
    ]

def four_classes():
    """32 grey images of 28x28 with a bright quarter, and which quarter it is."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(32) % 4
    x = 0.3 * torch.randn(32, 1, 28, 28, generator=generator)
    for image, label in zip(x, y.tolist()):
        row, column = divmod(label, 2)
        image[:, 14 * row:14 * row + 14, 14 * column:14 * column + 14] += 1
    return x, y

FLAT_PLAN = {"client": [4, 5], "server": [9, 12]}

@pytest.mark.parametrize("wire", ["float32", "uint8"])
def test_a_flat_list_of_other_layers_trains_in_decoupled_mode_with_auxiliary_blocks(wire):
    layers = flat_cnn()
    x, y = four_classes()
    shapes = ds.output_shapes(layers, x[:1])
    heads = {}

    def make_head(end):
        heads[end] = ds.auxiliary_classifier(shapes, end, 2, 4)
        return heads[end]

    def make_optimizer(parameters):
        sgd = torch.optim.SGD([{"params": parameters}], 0.1, momentum=0.9)
        return sgd, torch.optim.lr_scheduler.ConstantLR(sgd, 1.0)

    parties = ds.cut_network(layers, FLAT_PLAN, make_head, make_optimizer)
    channel = ds.Channel(wire)
    losses = [ds.decoupled_step(*parties, channel, x, y) for _ in range(12)]

    # After 4 layers z is 24x14x14. Seven layers follow, 48, 48, 48, 48, 96, 96, 96 wide, and
    # from the fourth on 7x7. The two blocks are like the third (48, 14x14) and the last.
    assert blocks_of(heads[4]) == [(24, 48, 1), (48, 96, 2)]
    # After 5 layers six follow, and the third of them is the pooling.
    assert blocks_of(heads[5]) == [(48, 48, 2), (48, 96, 1)]
    assert sorted(heads) == [4, 5, 9]
    assert all(losses[-1][name] < 0.7 * losses[0][name] for name in ("client", "server"))

def test_a_flat_list_of_other_layers_has_the_gradients_of_the_uncut_network_in_backprop_mode():
    layers = flat_cnn()
    x, y = four_classes()
    whole = nn.Sequential(*copy.deepcopy(layers))
    parties = ds.cut_network(layers, FLAT_PLAN, lambda end: None, plain_sgd)
    own = [p for party in parties for p in party.parameters()]
    gradients = {}
    for p in own:
        p.register_post_accumulate_grad_hook(lambda p: gradients.update({p: p.grad.clone()}))

    loss = F.cross_entropy(whole(x), y)
    loss.backward()
    losses = ds.backprop_step(*parties, ds.Channel(), x, y)

    assert losses == {"server": pytest.approx(loss.item(), rel=1e-5)}
    for a, b in zip(own, whole.parameters(), strict=True):
        torch.testing.assert_close(gradients[a], b.grad, rtol=1e-4, atol=1e-6)

def test_an_auxiliary_classifier_can_narrow_and_can_stand_on_a_vector():
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1), nn.Flatten(),
              nn.Linear(4 * 64, 6), nn.Linear(6, 5)]
    shapes = ds.output_shapes(layers, torch.zeros(1, 3, 8, 8))

    narrowing = ds.auxiliary_classifier(shapes, 1, 1, 5)
    on_a_vector = ds.auxiliary_classifier(shapes, 4, 1, 5)

    assert blocks_of(narrowing) == [(8, 4, 1)]
    assert narrowing(torch.randn(2, 8, 8, 8)).shape == (2, 5)
    assert on_a_vector(torch.randn(2, 6)).shape == (2, 5)

def test_an_auxiliary_classifier_for_a_sequence_is_an_error_that_says_so():
    with pytest.raises(ValueError, match="no auxiliary classifier for z of shape"):
        ds.auxiliary_classifier([(1, 7, 16), (1, 5)], 1, 1, 5)

# A chain of three parties, each one linear layer of 4 x 4 = 16 weights, 64 bytes. With its
# momentum a layer is 128 bytes. The heads have 4 x 3 = 12 weights, 48 bytes, and with
# momentum 96. So each party keeps 224 bytes between two batches.

def three_parties():
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4, bias=False) for _ in range(3)] + [nn.Linear(4, 3, bias=False)]
    plan = {"client": [1], "edge": [2], "server": [4]}
    return ds.cut_network(layers, plan, lambda end: nn.Linear(4, 3, bias=False), plain_sgd)

HOPS = ("client to edge", "edge to server", "relay", "evaluation")

def three_party_step(client, edge, server, channel, x, y):
    with client.working():
        z, client_loss = ds.train_locally(client, x, y)
        channel.send(z, "client to edge", "activations")
        channel.send(y, "client to edge", "labels")
        del z

    with edge.working():
        z = channel.receive("client to edge", "activations")
        labels = channel.receive("client to edge", "labels")
        z, edge_loss = ds.train_locally(edge, z, labels)
        channel.send(z, "edge to server", "activations")
        channel.send(labels, "edge to server", "labels")
        del z, labels

    with server.working():
        z = channel.receive("edge to server", "activations")
        labels = channel.receive("edge to server", "labels")
        _, server_loss = ds.train_locally(server, z, labels)

    return {"client": client_loss, "edge": edge_loss, "server": server_loss}

TOY_X = torch.randn(6, 4)
TOY_Y = torch.tensor([0, 1, 2, 0, 1, 2])

def test_a_third_party_is_counted_measured_and_reported_like_the_others():
    channel = ds.Channel("float32", HOPS)

    memory = ds.measure_memory(three_parties, three_party_step, channel, TOY_X, TOY_Y)
    sent = count_of(channel)
    channel.reset()
    parties = three_parties()
    accuracy = ds.evaluate(parties, channel, [(TOY_X, TOY_Y)])
    summary = {
        "mode": "decoupled", "accuracy": accuracy, "memory": memory, "bytes": channel.bytes,
        "seconds": {"client": 1, "edge": 2, "server": 3, "epoch": 7, "link_epoch": 8},
    }
    rows = {name: (unit, value) for name, unit, value in ds.table_rows(summary)}

    z = 6 * 4 * 4               # 96 bytes of activations
    assert sent == {(hop, kind): count for hop in HOPS[:2]
                    for kind, count in (("activations", z), ("labels", 6))}
    assert count_of(channel) == {("evaluation", "activations"): 2 * z}
    assert memory["client_held"] == 224             # what it keeps, nothing of the batch
    assert memory["edge_held"] == 224
    assert all(memory[f"{name}_peak"] >= 224 + 64 + 48 + z for name in accuracy)
    assert memory["host_peak"] < sum(memory[f"{name}_peak"] for name in accuracy)
    assert list(memory["picture"]) == ["client", "edge", "server", "both"]
    assert rows["computing time of the edge per epoch"] == ("s", 2)
    assert rows["accuracy of the edge's auxiliary classifier"][0] == "%"
    assert rows["peak memory of the edge"] == ("MiB", memory["edge_peak"] / 2**20)
    assert rows["held by the edge while the server works"] == ("MiB", 224 / 2**20)
    assert rows["sent per epoch, client to edge"] == ("MB", 0)

def test_the_bytes_of_a_chain_worked_out_by_hand():
    parties = three_parties()
    channel = ds.Channel("float32", HOPS)
    three_party_step(*parties, channel, TOY_X, TOY_Y)

    ledger = ds.Ledger(parties)

    assert ledger.static == {"client": 224, "edge": 224, "server": 224}
    with ledger:
        with parties[1].working():
            a = torch.zeros(10)
        with parties[2].working():
            b = torch.zeros(20)
    assert ledger.live == {"client": 224, "edge": 264, "server": 304}
    assert ledger.figures()["host_peak"] == 792
    del a, b
    assert ledger.live == ledger.static

LOSSES = dict.fromkeys(("client", "edge", "server"), 1.0)

def forget_the_clock(client, edge, server, channel, x, y):
    with client.working():
        z, _ = ds.train_locally(client, x, y)
    z, _ = ds.train_locally(edge, z, y)
    with server.working():
        ds.train_locally(server, z, y)
    return LOSSES

def forget_the_training(client, edge, server, channel, x, y):
    with client.working():
        z, _ = ds.train_locally(client, x, y)
    with edge.working():
        z = edge(z).detach()
    with server.working():
        ds.train_locally(server, z, y)

def forget_a_loss(*args):
    losses = three_party_step(*args)
    del losses["edge"]
    return losses

def update_without_a_backward_pass(client, edge, server, channel, x, y):
    with edge.working():
        edge(x)
        edge.update()

def update_without_the_head(client, edge, server, channel, x, y):
    with edge.working():
        edge(x).sum().backward()
        edge.update()

def train_twice(client, edge, server, channel, x, y):
    for _ in range(2):
        losses = three_party_step(client, edge, server, channel, x, y)
    return losses

def work_inside_another(client, edge, server, channel, x, y):
    with client.working():
        z, _ = ds.train_locally(client, x, y)
        with edge.working():
            z, _ = ds.train_locally(edge, z, y)
    with server.working():
        ds.train_locally(server, z, y)
    return LOSSES

def forget_to_receive(client, edge, server, channel, x, y):
    losses = three_party_step(client, edge, server, channel, x, y)
    with client.working():
        channel.send(client(x), "client to edge", "activations")
    return losses

def send_over_an_unknown_hop(client, edge, server, channel, x, y):
    with client.working():
        channel.send(x, "client to server", "activations")

def send_an_unknown_kind(client, edge, server, channel, x, y):
    with client.working():
        channel.send(x, "client to edge", "features")

def pass_a_tensor_by_hand(client, edge, server, channel, x, y):
    with client.working():
        z, _ = ds.train_locally(client, x, y)
        channel.send(y, "client to edge", "labels")
    with edge.working():
        z, _ = ds.train_locally(edge, z, channel.receive("client to edge", "labels"))
    with server.working():
        ds.train_locally(server, z, y)
    return LOSSES

def read_the_original_of_what_was_sent(client, edge, server, channel, x, y):
    with client.working():
        z, _ = ds.train_locally(client, x, y)
        channel.send(z, "client to edge", "activations")
        channel.send(y, "client to edge", "labels")
    with edge.working():
        channel.receive("client to edge", "activations")
        ds.train_locally(edge, z, channel.receive("client to edge", "labels"))
    with server.working():
        ds.train_locally(server, x, y)
    return LOSSES

def forget_to_send_the_labels(client, edge, server, channel, x, y):
    with client.working():
        z, _ = ds.train_locally(client, x, y)
        channel.send(z, "client to edge", "activations")
    with edge.working():
        ds.train_locally(edge, channel.receive("client to edge", "activations"), y)
    with server.working():
        ds.train_locally(server, x, y)
    return LOSSES

def work_in_the_name_of_another(client, edge, server, channel, x, y):
    with client.working():
        z, _ = ds.train_locally(client, x, y)
        ds.train_locally(edge, z, y)
    with server.working():
        ds.train_locally(server, x, y)
    return LOSSES

@pytest.mark.parametrize("step, error, message", [
    (pass_a_tensor_by_hand, RuntimeError, "the edge reads what the client did not send"),
    (read_the_original_of_what_was_sent, RuntimeError, "the edge reads what the client did not"),
    (forget_to_send_the_labels, RuntimeError, "the edge reads what the client did not send"),
    (work_in_the_name_of_another, RuntimeError, "the client reads what the edge did not send"),
    (forget_the_clock, RuntimeError, "working"),
    (forget_the_training, RuntimeError, "module 0 of the edge 0 times"),
    (forget_a_loss, RuntimeError, "losses of"),
    (update_without_a_backward_pass, RuntimeError, "without a backward pass"),
    (update_without_the_head, RuntimeError, "without a backward pass"),
    (train_twice, RuntimeError, "module 0 of the client 2 times"),
    (work_inside_another, RuntimeError, "'client', 'edge'"),
    (forget_to_receive, RuntimeError, "still holds"),
    (send_over_an_unknown_hop, KeyError, "client to server"),
    (send_an_unknown_kind, KeyError, "features"),
    (ds.decoupled_step, TypeError, "positional argument")])
def test_a_wrong_step_for_three_parties_is_an_error(step, error, message):
    with pytest.raises(error, match=message):
        ds.measure_memory(three_parties, step, ds.Channel("float32", HOPS), TOY_X, TOY_Y)

def test_a_party_that_the_ledger_does_not_know_is_an_error():
    client, edge, server = three_parties()
    ledger = ds.Ledger([client, server])

    with pytest.raises(RuntimeError, match="working"), ledger, edge.working():
        torch.zeros(3)


# ---- channel -------------------------------------------------------------------------

@pytest.mark.parametrize("wire, hop, kind, tensor, count", [
    ("float32", "up", "activations", Z, 480),
    ("float32", "down", "gradients", Z, 480),
    ("bfloat16", "up", "activations", Z, 240),
    ("bfloat16", "down", "gradients", Z, 240),
    ("uint8", "up", "activations", Z, 120 + 3 * 8),         # and an offset and a scale
    ("uint8", "down", "gradients", Z, 120 + 3 * 8),         # for each of 3 channels
    ("uint8", "evaluation", "activations", Z, 120 + 3 * 8),
    ("float32", "up", "labels", torch.arange(5), 5),
    ("uint8", "up", "labels", torch.arange(251, 256), 5),
    ("uint8", "relay", "weights", Z, 480),
    ("bfloat16", "relay", "weights", torch.arange(5), 40)])
def test_channel_counts_the_encoded_bytes_and_shares_nothing(wire, hop, kind, tensor, count):
    original = tensor.clone()
    sent = tensor.clone()
    if sent.is_floating_point():
        sent = sent.requires_grad_() * 1        # with a graph
    channel = ds.Channel(wire)

    for number in (1, 2):
        channel.send(sent, hop, kind)
        assert count_of(channel) == {(hop, kind): number * count}
    received = channel.receive(hop, kind)

    assert received.shape == original.shape and received.dtype == original.dtype
    assert received.grad_fn is None and not received.requires_grad
    if wire == "float32" or kind in ("labels", "weights"):
        assert torch.equal(received, original)
    received.fill_(77)
    assert torch.equal(sent, original)
    assert not (channel.receive(hop, kind) == 77).any()
    channel.reset()
    assert count_of(channel) == {}

@pytest.mark.parametrize("wire, count", [("float32", 480), ("bfloat16", 240), ("uint8", 144)])
def test_what_amp_has_computed_is_encoded_and_counted_like_all_else(wire, count):
    channel = ds.Channel(wire)

    channel.send(Z.bfloat16(), "up", "activations")

    assert count_of(channel) == {("up", "activations"): count}
    received = channel.receive("up", "activations")
    assert received.dtype == torch.float32
    assert (received - Z).abs().max() < 0.05

@pytest.mark.parametrize("mode", MODES)
def test_what_an_interrupted_step_has_sent_does_not_reach_the_next_one(mode):
    interrupted, clean = make_parties(mode), make_parties(mode)
    channel = ds.Channel()
    channel.send(interrupted[0](BATCHES[0][0]), "up", "activations")      # then it was stopped

    channel.reset()
    losses = train(mode, interrupted, channel, [BATCHES[1]])

    assert losses == train(mode, clean, ds.Channel(), [BATCHES[1]])

def test_bfloat16_wire_rounds_as_torch_does():
    channel = ds.Channel("bfloat16")

    channel.send(Z, "up", "activations")

    assert torch.equal(channel.receive("up", "activations"), Z.bfloat16().float())

@pytest.mark.parametrize("hop, kind", [("up", "activations"), ("down", "gradients")])
def test_uint8_wire_errs_by_half_a_step_of_the_channel_at_most(hop, kind):
    channel = ds.Channel("uint8")
    z = torch.randn(64, 6, 5, 5) * torch.tensor([1, 100, 1e-3, 1, 1, 1]).view(1, 6, 1, 1)
    z[:, 3] = -7.25                         # constant channels
    z[:, 4] = 0.0
    z[:, 5] = -z[:, 5].abs() - 50           # all negative

    channel.send(z, hop, kind)
    received = channel.receive(hop, kind)

    for c in range(6):
        step = (z[:, c].max() - z[:, c].min()).item() / 255
        error = (received[:, c] - z[:, c]).abs().max().item()
        assert error <= 0.5001 * step + 1e-6 * z[:, c].abs().max().item()
        assert step == 0 or error > 0.4 * step      # all of the 8 bits are in use

@pytest.mark.parametrize("size", [1e-4, 1e-7, 1e-10])
def test_uint8_wire_keeps_small_gradients(size):
    channel = ds.Channel("uint8")
    dz = size * torch.randn(16, 4, 5, 5)

    channel.send(dz, "down", "gradients")
    error = (channel.receive("down", "gradients") - dz).abs().amax((0, 2, 3))

    step = (dz.amax((0, 2, 3)) - dz.amin((0, 2, 3))) / 255
    assert (error <= 0.51 * step).all()

@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 5), (6, 3, 2, 2, 2)])
def test_uint8_wire_takes_a_vector_a_sequence_and_a_volume(shape):
    channel = ds.Channel("uint8")
    z = torch.randn(shape)
    z[:, 1] *= 100

    channel.send(z, "up", "activations")
    received = channel.receive("up", "activations")

    assert count_of(channel) == {("up", "activations"): z.numel() + 3 * 8}
    for c in range(3):
        step = (z[:, c].max() - z[:, c].min()) / 255
        assert (received[:, c] - z[:, c]).abs().max() <= 0.51 * step

def test_channel_is_first_in_first_out_on_each_route():
    channel = ds.Channel()

    for number in range(3):
        channel.send(torch.full((1,), number), "up", "labels")
        channel.send(torch.full((1,), 10.0 + number), "up", "activations")

    assert [channel.receive("up", "activations").item() for _ in range(3)] == [10, 11, 12]
    assert [channel.receive("up", "labels").item() for _ in range(3)] == [0, 1, 2]

def test_nothing_can_be_received_that_was_not_sent():
    channel = ds.Channel()
    channel.send(Z, "up", "activations")
    channel.receive("up", "activations")

    with pytest.raises(RuntimeError, match="no activations on the hop 'up'"):
        channel.receive("up", "activations")
    with pytest.raises(RuntimeError, match="no gradients on the hop 'down'"):
        channel.receive("down", "gradients")

def test_a_label_that_needs_more_than_one_byte_is_an_error():
    for label in (256, -1):
        with pytest.raises(ValueError, match="from 0 to 255"):
            ds.Channel().send(torch.tensor([3, label]), "up", "labels")

def test_a_wire_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match="int4"):
        ds.Channel("int4")

def test_an_epoch_of_cifar_counts_1638400000_bytes_up_and_as_many_down():
    channel = ds.Channel()

    for n in [128] * 343 + [127] * 48:
        z = torch.zeros(()).expand(n, 32, 16, 16)
        channel.send(z, "up", "activations")
        channel.send(torch.zeros((), dtype=int).expand(n), "up", "labels")
        channel.send(z, "down", "gradients")

    assert count_of(channel) == {
        ("up", "activations"): 1_638_400_000, ("up", "labels"): 50_000,
        ("down", "gradients"): 1_638_400_000}

def test_a_uint8_wire_sends_an_eighth_of_what_backprop_does_in_float32():
    large = ds.Channel("uint8")
    small = ds.Channel("uint8")

    for channel, n in ((large, 128), (small, 127)):
        channel.send(torch.zeros((n, 32, 16, 16)), "up", "activations")
    total = 343 * large.bytes["up"]["activations"] + 48 * small.bytes["up"]["activations"]

    assert total == 409_600_000 + 391 * 32 * 2 * 4      # 391 batches, 32 channels
    assert total < 0.126 * 2 * 1_638_400_000

@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wire, z", [("float32", 4 * 50 * 16 * 32 * 32),
                                     ("uint8", 50 * 16 * 32 * 32 + 4 * 16 * 8)])
def test_a_run_counts_the_bytes_of_one_epoch(mode, wire, z):
    train_set = TRAIN[0][:50], TRAIN[1][:50]            # batches of 13, 13, 12, 12
    run = make_run(mode, [train_set, TEST], wire=wire, epochs=2)

    for _ in range(2):
        run.train_epoch()
        assert count_of(run.channel) == {
            ("up", "activations"): z, ("up", "labels"): 50,
            **({("down", "gradients"): z} if mode == "backprop" else {})}


def test_a_run_is_evaluated_over_its_own_wire():
    run = make_run("decoupled", wire="uint8", max_steps=1)

    sent = run.train()["bytes"]["evaluation"]["activations"]

    assert sent == 32 * 16 * 32 * 32 + 2 * 16 * 8       # 32 images in two batches, 16 channels

@pytest.mark.parametrize("mode", MODES)
def test_memory_and_bytes_of_a_batch_are_those_of_the_wire_of_the_run(mode):
    run = make_run(mode, wire="uint8")

    _, ledger = watched_step(mode, wire="uint8")

    assert run.memory == ledger.figures()
    assert run.bytes_per_batch["up"]["activations"] == 16 * 16 * 32 * 32 + 16 * 8


# ---- two real processes over a socket ------------------------------------------------

CASES = [("backprop", "float32"), ("decoupled", "float32"), ("backprop", "uint8"),
         ("decoupled", "bfloat16")]

class SocketChannel(ds.Channel):
    """Sends the shapes of a payload, then its bytes, and counts those that arrive."""

    def __init__(self, wire, peer):
        super().__init__(wire)
        self.peer = peer
        self.arrived = {}

    @staticmethod
    def raw(tensor):
        return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)

    def push(self, payload, hop, kind):
        forms = [(t.shape, t.stride(), t.dtype) for t in payload]
        dist.send_object_list([forms], self.peer)
        for tensor in payload:
            dist.send(self.raw(tensor), self.peer)

    def pull(self, hop, kind):
        forms = [None]
        dist.recv_object_list(forms, self.peer)
        payload = [torch.empty_strided(shape, stride, dtype=dtype)
                   for shape, stride, dtype in forms[0]]
        for tensor in payload:
            dist.recv(self.raw(tensor), self.peer)
            self.arrived[hop, kind] = self.arrived.get((hop, kind), 0) + len(self.raw(tensor))
        return payload

def client_program(client, channel, mode, x, y):
    if mode == "decoupled":
        z, _ = ds.train_locally(client, x, y)
    else:
        z = client(x)
    channel.send(z, "up", "activations")
    channel.send(y, "up", "labels")
    if mode == "backprop":
        z.backward(channel.receive("down", "gradients"))
        client.update()

def server_program(server, channel, mode):
    z = channel.receive("up", "activations")
    y = channel.receive("up", "labels")
    if mode == "decoupled":
        ds.train_locally(server, z, y)
    else:
        z.requires_grad_()
        F.cross_entropy(server.scores(z), y).backward()
        server.update()
        channel.send(z.grad, "down", "gradients")

def one_party(rank, folder):
    """What one of the two processes does: its own half of the protocols, written out."""
    meeting = Path(folder, "meeting").as_uri()      # a file in which they find each other
    dist.init_process_group("gloo", meeting, timedelta(seconds=60), 2, rank)
    result = []
    for mode, wire in CASES:
        party = make_parties(mode)[rank]        # the other half is on the other machine
        channel = SocketChannel(wire, 1 - rank)
        for x, y in BATCHES:
            if rank == 0:
                client_program(party, channel, mode, x, y)
            else:
                server_program(party, channel, mode)
        result.append((channel.arrived, kept(party)))
    torch.save(result, Path(folder, str(rank)))
    dist.destroy_process_group()

@pytest.mark.skipif(not dist.is_available(), reason="PyTorch without torch.distributed")
def test_two_processes_over_a_socket_get_the_counted_bytes_and_the_same_weights(tmp_path):
    code = "import test_decoupled_split as t; t.one_party({}, {!r})"
    codes = [code.format(rank, str(tmp_path)) for rank in (0, 1)]

    halves = [subprocess.Popen([sys.executable, "-c", c], cwd=tmp_path, env=ENV) for c in codes]
    try:
        assert [process.wait(timeout=120) for process in halves] == [0, 0]
    finally:
        for process in halves:
            process.kill()
            process.wait()

    results = [torch.load(tmp_path / str(rank), weights_only=True) for rank in (0, 1)]
    for number, (mode, wire) in enumerate(CASES):
        parties = make_parties(mode)
        channel = ds.Channel(wire)
        train(mode, parties, channel, BATCHES)
        arrived = {**results[0][number][0], **results[1][number][0]}
        assert arrived == count_of(channel)
        assert len(arrived) == (3 if mode == "backprop" else 2)
        for rank, party in enumerate(parties):
            assert same(results[rank][number][1], kept(party))


# ---- memory --------------------------------------------------------------------------

@pytest.fixture
def ledger():
    """A ledger that is entered, of a party that is at work and owns nothing."""
    party = ds.Party("client", [])
    with ds.Ledger([party]) as ledger, party.working():
        yield ledger

def test_ledger_counts_a_storage_once_until_it_is_freed(ledger):
    a = torch.zeros(1000)
    assert ledger.live == {"client": 4000}

    views = [a.view(10, 100), a[5:], a[None].expand(7, 1000), a.detach()]
    a.add_(1)
    F.relu(a, inplace=True)
    views[0].t().mul_(2)
    assert ledger.live == {"client": 4000}

    b = a + 1
    assert ledger.live == {"client": 8000}

    del a, b
    assert ledger.live == {"client": 4000}          # the views keep their base
    views.clear()
    assert ledger.live == {"client": 0}

@pytest.mark.parametrize("dtype, count", [(torch.bfloat16, 20), (torch.float32, 40),
                                          (torch.int64, 80), (torch.uint8, 10), (torch.bool, 10)])
def test_ledger_knows_the_size_of_a_number(ledger, dtype, count):
    a = torch.zeros(10).to(dtype, copy=True)

    assert ledger.live == {"client": count} and a.dtype == dtype

def test_ledger_counts_what_is_saved_for_backward_until_backward(ledger):
    w = torch.ones(1000, requires_grad=True)
    y = w.exp()                                     # saves its result
    loss = y.sum()
    del y
    assert ledger.live == {"client": 4000 + 4000 + 4}

    loss.backward()
    assert ledger.live == {"client": 4000 + 4 + 4000}       # w, loss, w.grad
    w.grad = None
    assert ledger.live == {"client": 4000 + 4}

def test_ledger_charges_the_party_at_work():
    client = ds.Party("client", [])
    server = ds.Party("server", [])
    with ds.Ledger([client, server]) as ledger:
        with client.working():
            a = torch.zeros(10)
        with server.working():
            b = torch.zeros(20)
            a += 1                                  # still the client's
        with client.working():
            c = b[1:]                               # still the server's
        assert ledger.live == {"client": 40, "server": 80}
    del a
    assert ledger.live == {"client": 0, "server": 80}
    del b, c
    assert ledger.live == {"client": 0, "server": 0}

def test_ledger_charges_what_a_party_keeps_once():
    shared = nn.Linear(10, 5, bias=False)           # two modules share a layer: 200 bytes
    modules = [ds.LocalModule([shared], None, plain_sgd) for _ in range(2)]
    modules.append(ds.LocalModule([nn.BatchNorm2d(3)], None, plain_sgd))

    ledger = ds.Ledger([ds.Party("client", modules)])

    assert ledger.live == {"client": 200 + 4 * 3 * 4 + 8}   # 4 x 3 floats and a counter

def test_ledger_charges_what_two_parties_share_to_the_first_of_them():
    shared = nn.Linear(10, 5, bias=False)
    parties = [ds.Party(name, [ds.LocalModule([shared], None, plain_sgd)]) for name in "ab"]

    assert ds.Ledger(parties).live == {"a": 200, "b": 0}

def test_ledger_does_not_charge_what_was_there_before_it_was_entered():
    party = ds.Party("client", [])
    batch = torch.zeros(100)

    with ds.Ledger([party]) as ledger, party.working():
        half = batch[:50]
        total = batch.sum()

    assert ledger.live == {"client": 4} and len(half) == 50 and total == 0

def test_ledger_figures_and_picture_of_a_step_worked_out_by_hand():
    client = ds.Party("client", [])
    server = ds.Party("server", [])
    with ds.Ledger([client, server]) as ledger:
        with client.working():
            a = torch.zeros(1000)
            b = torch.zeros(200)
            del a
        with server.working():
            c = torch.zeros(900)
            d = torch.zeros(400)
            del b, c
            e = torch.zeros(1)
            del d, e

    assert ledger.figures(width=5) == {
        "client_peak": 4800, "server_peak": 5200, "host_peak": 6000, "client_held": 0,
        "picture": {"client": [4000, 4800, 800, 800, 0],
                    "server": [0, 0, 3600, 5200, 1604],
                    "both": [4000, 4800, 4400, 6000, 1604]}}
    wide = ledger.figures()["picture"]
    assert {name: (max(row), len(row)) for name, row in wide.items()} == {
        "client": (4800, 60), "server": (5200, 60), "both": (6000, 60)}

@pytest.mark.parametrize("row, width, peaks", [
    ([1, 5, 2, 3, 9, 4], 3, [5, 3, 9]), ([1, 5, 2, 3, 9, 4], 1, [9]),
    ([7, 8], 4, [7, 7, 8, 8]), ([2, 1, 3], 2, [2, 3])])
def test_the_picture_shows_the_peak_of_each_group_of_operators(row, width, peaks):
    assert ds.peaks_of_groups(row, width) == peaks

def watched_step(mode, batch=BATCHES[0], wire="float32", **changes):
    """(parties, ledger) after a step without the ledger and one with it."""
    parties = make_parties(mode, **changes)
    channel = ds.Channel(wire)
    train(mode, parties, channel, [batch])
    ledger = ds.Ledger(parties)
    with ledger:
        train(mode, parties, channel, [batch])
    assert ledger.live == ledger.static             # everything else is freed
    return parties, ledger

@pytest.mark.parametrize("wire", ["float32", "uint8"])
def test_while_the_client_goes_backward_the_server_keeps_nothing_of_the_batch(wire):
    _, ledger = watched_step("backprop", wire=wire)

    server = [live["server"] for _, live in ledger.trace]
    last = max(number for number, (name, _) in enumerate(ledger.trace) if name == "server")
    received = 1 if wire == "float32" else 2        # operators that decode what is queued
    afterwards = server[last + 1 + received:]
    assert set(afterwards) == {ledger.static["server"]}
    assert len(afterwards) >= 20

@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="other convolutions, which "
                    "allocate memory inside")
@pytest.mark.parametrize("mode", MODES)
def test_ledger_peak_is_that_of_the_cpu_allocator(mode):
    x, y = BATCHES[0][0][:8], BATCHES[0][1][:8]
    parties, ledger = watched_step(mode, (x, y), depth=20)

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                profile_memory=True) as profile:
        train(mode, parties, ds.Channel(), [(x, y)])
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)

    static = sum(map(static_bytes, parties))
    assert level == 0
    assert sum(ledger.static.values()) == static
    host_peak = ledger.figures()["host_peak"]
    assert 0.97 * peak < host_peak - static <= peak         # less: scratch of the operators

@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("mode", MODES)
def test_ledger_peak_is_that_of_the_cuda_allocator(mode):
    cuda = torch.device("cuda")
    images, labels = ds.synthetic(0, (128, 1))[0]
    x, y = ds.to_float(images).to(cuda), labels.to(cuda)
    parties = ds.build_parties(options(mode, depth=20), 100, cuda)
    channel = ds.Channel()
    train(mode, parties, channel, [(x, y)] * 2)     # momentum, and cuDNN's workspace

    with ds.Ledger(parties) as ledger:
        train(mode, parties, channel, [(x, y)])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    train(mode, parties, channel, [(x, y)])
    peak = torch.cuda.max_memory_allocated() - before + sum(ledger.static.values())

    assert ledger.figures()["host_peak"] == pytest.approx(peak, rel=0.05)

@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_run_on_a_gpu_is_the_run_on_the_cpu_up_to_rounding():
    losses = {}
    for device in (CPU, torch.device("cuda")):
        sets = [[tensor.to(device) for tensor in pair] for pair in (TRAIN, TEST)]
        run = ds.Run(options("decoupled", lr=0.01), *sets, device)
        losses[device.type] = run.train_epoch()["train_loss"]

    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.02)

@pytest.mark.parametrize("wire", ds.WIRES)
def test_decoupled_client_holds_only_its_static_state_while_the_server_works(wire):
    held = {}
    for mode in MODES:
        parties, ledger = watched_step(mode, wire=wire)
        assert ledger.static == {party.name: static_bytes(party) for party in parties}
        held[mode] = ledger.figures()["client_held"] - ledger.static["client"]

    assert held["decoupled"] == 0
    assert held["backprop"] > 16 * 5 * 16 * 32 * 32 * 4     # five activations of 16 images

@pytest.mark.parametrize("mode", MODES)
def test_memory_is_measured_before_training_on_a_full_batch(mode):
    images, labels = TRAIN
    small_set = images[:10], labels[:10]

    run = make_run(mode, [small_set, TEST], max_steps=1)    # 10 images, but batches of 16

    _, ledger = watched_step(mode)
    assert run.memory == ledger.figures()
    assert run.train()["memory"] == run.memory
    assert count_of(run.channel)["up", "labels"] == 10

@pytest.mark.parametrize("mode", MODES)
def test_training_is_the_same_without_the_measurement_before_it(mode):
    run = make_run(mode)                                    # measures when it is made
    parties = make_parties(mode, total_steps=4)
    fresh = weights(*parties)
    assert same(fresh, weights(*run.parties))

    run.train_epoch()
    train(mode, parties, ds.Channel(), stream_of(run))

    assert same(weights(*run.parties), weights(*parties))

def test_client_modules_cut_the_peak_of_the_client():
    peaks = [watched_step("decoupled", depth=20, client_modules=n, aux_depth=0)[1].figures()
             for n in (1, 7)]

    assert peaks[1]["client_peak"] < 0.5 * peaks[0]["client_peak"]

@pytest.mark.parametrize("split, saving", [
    ({"cut": "deep"}, 28.8),
    ({"cut": "middle", "server_modules": 2}, 43.7),
    ({"cut": "shallow", "server_modules": 3}, 58.7),
    ({"cut": "deep", "client_modules": 2}, 58.2)])
def test_host_peak_savings_of_resnet_110_reach_the_58_percent_of_the_paper(split, saving):
    batch = BATCHES[0][0][:8], BATCHES[0][1][:8]
    peaks = {}
    for mode in MODES:
        _, ledger = watched_step(mode, batch, depth=110, aux_depth=0, **split)
        static = sum(ledger.static.values())
        # All but the static state grows with the batch: 16 times as much for 128 images.
        peaks[mode] = static + 16 * (ledger.figures()["host_peak"] - static)

    percent = 100 * (1 - peaks["decoupled"] / peaks["backprop"])
    assert percent == pytest.approx(saving, abs=1)


# ---- data ----------------------------------------------------------------------------

def test_crops_are_those_of_torchvision():
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (12, 3, 40, 36), dtype=torch.uint8, generator=generator)
    top, left = torch.randint(9, (2, 12), generator=generator)
    top[0], left[0], top[1], left[1] = 0, 8, 8, 0

    windows = ds.crop(images, top, left, 32, 28)

    for n, window in enumerate(windows):
        assert torch.equal(window, TF.crop(images[n], top[n], left[n], 32, 28))

@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("shape, padding", [((3, 32, 32), 4), ((1, 28, 24), 2)])
def test_training_images_are_windows_of_the_padded_image_half_of_them_mirrored(
        shape, padding, flip):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (200, *shape), dtype=torch.uint8, generator=generator)
    data_set = replace(ds.DATA_SETS["cifar10"], padding=padding, flip=flip)
    places = range(2 * padding + 1)
    corners = list(itertools.product(places, places, (0, 1)))       # top, left, mirrored
    seen = []

    def window(padded, top, left, mirrored):
        image = TF.crop(padded, top, left, *shape[1:])
        return TF.hflip(image) if mirrored else image

    for x, y in ds.training_batches(images, torch.arange(200), 64, data_set, generator):
        assert x.dtype == torch.float32 and x.shape[1:] == shape
        for got, n in zip((x * 64 + 128).to(torch.uint8), y):
            padded = TF.pad(images[n], padding)
            windows = torch.stack([window(padded, *corner) for corner in corners])
            match = (windows == got).flatten(1).all(1)
            assert match.sum() == 1
            seen.append(corners[match.nonzero().item()])

    tops, lefts, mirrored = zip(*seen)
    assert len(seen) == 200 and set(tops) == set(lefts) == set(places)
    assert len(set(zip(tops, lefts))) > len(places)         # top and left are drawn separately
    assert 60 < sum(mirrored) < 140 if flip else sum(mirrored) == 0

def test_images_that_are_not_uint8_are_an_error():
    """Pixels from 0 to 1 would all become nearly -2, and nothing would be learned."""
    with pytest.raises(TypeError, match="uint8"):
        list(ds.test_batches(torch.rand(4, 3, 8, 8), torch.arange(4), 4))

@pytest.mark.parametrize("n, size, sizes", [
    (50, 16, [13, 13, 12, 12]), (5000, 128, [125] * 40), (7, 8, [7]), (9, 8, [5, 4]),
    (3, 1, [1, 1, 1]), (32, 16, [16, 16])])
def test_batches_are_equal_or_differ_by_one_image(n, size, sizes):
    images = torch.zeros(n, 3, 4, 4, dtype=torch.uint8)
    labels = torch.arange(n)
    data_set = ds.DATA_SETS["cifar10"]

    training = list(ds.training_batches(images, labels, size, data_set, torch.Generator()))
    testing = list(ds.test_batches(images, labels, size))

    assert [len(y) for _, y in training] == [len(y) for _, y in testing] == sizes
    assert torch.cat([y for _, y in testing]).tolist() == list(range(n))
    assert sorted(torch.cat([y for _, y in training]).tolist()) == list(range(n))

def stream_of(run):
    return [(x, y) for x, y, _ in run.stream()]

def test_the_batches_depend_on_the_seed_and_the_epoch_and_on_nothing_else():
    def stream(mode="backprop", epoch=0, **changes):
        run = make_run(mode, **changes)
        run.shards = [(TRAIN[0][:50], torch.arange(50))]    # labels that tell the images apart
        run.epoch = epoch
        return stream_of(run)

    first = stream()
    again = stream("decoupled", lr=0.1, depth=14)
    other_seed = stream(seed=1)
    other_epoch = stream(epoch=1)

    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    for other in (other_seed, other_epoch):
        assert not any(torch.equal(a[1], b[1]) for a, b in zip(first, other, strict=True))
    # Not only the order: an image is augmented in another way, too.
    for other in (other_seed, other_epoch):
        by_label = [{int(n): x for xs, ys in batches for x, n in zip(xs, ys)}
                    for batches in (first, other)]
        equal = sum(torch.equal(by_label[0][n], by_label[1][n]) for n in range(50))
        assert equal < 5

def test_no_two_epochs_of_neighbouring_seeds_have_the_same_order():
    run = make_run("backprop")
    run.shards = [(TRAIN[0], torch.arange(64))]         # labels that tell the images apart
    orders = set()

    for seed, epoch in itertools.product(range(3), range(4)):
        run.options.seed = seed
        run.epoch = epoch
        orders.add(tuple(torch.cat([y for _, y in stream_of(run)]).tolist()))

    assert len(orders) == 3 * 4

def test_each_client_trains_on_its_own_shard_in_an_order_of_its_own():
    run = make_run("decoupled", clients=3, batch_size=8)
    # Labels that tell the images apart:
    run.shards = list(zip(TRAIN[0][:60].split(20), torch.arange(60).split(20)))

    orders = torch.cat([y for _, y in stream_of(run)]).view(3, 20)

    for client, order in enumerate(orders):
        assert sorted(order.tolist()) == list(range(20 * client, 20 * client + 20))
    assert len({tuple((order % 20).tolist()) for order in orders}) == 3

def test_layers_like_dropout_draw_other_numbers_in_each_epoch():
    run = make_run("decoupled", max_steps=1)
    drawn = []

    def step(client, server, channel, x, y):
        drawn.append(torch.rand(4))
        return {"server": 1.0}

    run.step = step
    for epoch in (0, 1, 0):
        run.epoch = epoch
        run.train_epoch()

    assert not torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])

@pytest.mark.parametrize("mode", MODES)
def test_training_takes_exactly_the_batches_of_the_stream(mode):
    seen = []

    def spy(client, server, channel, x, y):
        seen.append((x, y))
        return {"server": 1.0}

    run = make_run(mode, max_steps=3)
    run.step = spy
    expected = stream_of(run)[:3]

    run.train_epoch()

    assert all(same(a, b) for a, b in zip(seen, expected, strict=True))

def test_synthetic_images_depend_on_the_seed_alone():
    one = ds.synthetic(5, (40, 20))
    again = ds.synthetic(5, (40, 20))
    other = ds.synthetic(6, (40, 20))

    for (x, y), (x2, y2), (x3, _), n in zip(one, again, other, (40, 20)):
        assert x.shape == (n, 3, 32, 32) and x.dtype == torch.uint8 and y.dtype == torch.int64
        assert torch.equal(x, x2) and torch.equal(y, y2)
        assert not torch.equal(x, x3)
    assert not torch.equal(one[0][0][:20], one[1][0])       # the test images are others

def test_the_seed_of_the_options_is_that_of_the_synthetic_images(monkeypatch):
    seeds = []
    monkeypatch.setattr(ds, "synthetic", seeds.append)

    for seed in (0, 7):
        ds.DATA_SETS["synthetic"].load(ds.Options(seed=seed))

    assert seeds == [0, 7]

def test_the_clutter_of_the_synthetic_images_is_in_the_colours_and_the_pattern_in_grey():
    images, labels = ds.synthetic(0, (200, 1))[0]
    images = F.avg_pool2d(images.float(), 4)            # without the noise of single pixels
    brightness = images.mean(1, keepdim=True)
    colour = images - brightness

    assert 5 < brightness.std() < 0.4 * colour.std()

def test_a_linear_model_finds_little_in_the_synthetic_images():
    (x, y), (x_test, y_test) = [(ds.to_float(x).flatten(1), y) for x, y in ds.synthetic(0)]
    torch.manual_seed(0)
    model = nn.Linear(3072, 10)
    adam = torch.optim.Adam(model.parameters(), 1e-3)

    for _ in range(10):
        for index in torch.randperm(len(y)).split(100):
            adam.zero_grad()
            F.cross_entropy(model(x[index]), y[index]).backward()
            adam.step()

    assert set(y.tolist()) == set(y_test.tolist()) == set(range(10))
    assert (model(x).argmax(1) == y).float().mean() > 0.3      # it has learned what it can
    assert (model(x_test).argmax(1) == y_test).float().mean() < 0.3

def test_the_classes_of_the_synthetic_test_images_are_those_of_the_training_images():
    (x, y), (x_test, y_test) = ds.synthetic(0, (500, 200))

    # The spectrum of the brightness does not see the place and the sign of the pattern.
    spectra = [torch.fft.rfft2((images.float() - 128).mean(1)).abs().flatten(1)
               for images in (x, x_test)]
    means = torch.stack([spectra[0][y == c].mean(0) for c in range(10)])
    nearest = torch.cdist(spectra[1], means).argmin(1)

    assert (nearest == y_test).float().mean() > 0.5

def test_a_data_set_can_be_added_with_one_entry(monkeypatch, capsys):
    def load(options):
        generator = torch.Generator().manual_seed(options.seed)
        images = torch.randint(256, (40, 1, 28, 20), dtype=torch.uint8, generator=generator)
        labels = torch.arange(40) % 3
        return [(images, labels), (images[:20], labels[:20])]

    entry = ds.DataSet(load, 3, (1, 28, 20), padding=2, flip=False, recipe={"epochs": 2, "lr": 0.01})
    monkeypatch.setitem(ds.DATA_SETS, "grey", entry)

    assert ds.main("--dataset grey --depth 8 --batch-size 20 --device cpu".split()) == 0

    out, err = capsys.readouterr()
    assert "epoch 2/2" in err and "epoch 3" not in err
    assert ds.parse(["--dataset", "grey"]).lr == 0.01
    assert ds.parse(["--dataset", "grey", "--lr", "0.3"]).lr == 0.3
    with pytest.raises(SystemExit):
        ds.parse(["--help"])
    assert "grey: 0.01" in " ".join(capsys.readouterr().out.split())

def write_cifar(folder, name, monkeypatch, packed):
    """Write a few random images in the official layout. Returns what must be loaded."""
    source = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    key = {"cifar10": "labels", "cifar100": "fine_labels"}[name]
    classes = {"cifar10": 10, "cifar100": 100}[name]
    base = folder / source.base_folder
    base.mkdir(parents=True)
    generator = torch.Generator().manual_seed(2)

    def write(filename, entry):
        (base / filename).write_bytes(pickle.dumps(entry))
        return filename, hashlib.md5((base / filename).read_bytes()).hexdigest()

    sets = []
    for attribute in ("train_list", "test_list"):
        images = []
        all_labels = []
        listed = []
        for filename, _ in getattr(source, attribute):
            data = torch.randint(256, (4, 3072), dtype=torch.uint8, generator=generator)
            labels = torch.randint(classes, (3,), generator=generator).tolist() + [classes - 1]
            listed.append(write(filename, {"data": data.numpy(), key: labels}))
            images.append(data)
            all_labels += labels
        monkeypatch.setattr(source, attribute, listed)
        sets.append((torch.cat(images), all_labels))

    names = {source.meta["key"]: [f"class {n}" for n in range(classes)]}
    _, md5 = write(source.meta["filename"], names)
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": md5})
    if packed:
        archive = folder / source.filename
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(base, source.base_folder)
        shutil.rmtree(base)
        monkeypatch.setattr(source, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    return sets

@pytest.fixture
def offline(monkeypatch):
    def fail(*args, **kwargs):
        raise urllib.error.URLError("no network in a test")
    monkeypatch.setattr(urllib.request, "urlopen", fail)

@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_read_from_the_official_layout(name, packed, tmp_path, monkeypatch, offline):
    written = write_cifar(tmp_path, name, monkeypatch, packed)
    classes = int(name[5:])

    loaded = ds.load_cifar(ds.Options(dataset=name, data_dir=str(tmp_path)))

    counts = (20 if name == "cifar10" else 4, 4)
    for (data, labels), (x, y), n in zip(written, loaded, counts, strict=True):
        assert x.shape == (n, 3, 32, 32) and x.dtype == torch.uint8 and y.dtype == torch.int64
        assert x[2, 1, 5, 7] == data[2, 1 * 1024 + 5 * 32 + 7]      # green, row 5, column 7
        assert torch.equal(x, data.view(n, 3, 32, 32)) and y.tolist() == labels
    run = make_run("decoupled", loaded, dataset=name, batch_size=4, max_steps=1)
    run.train_epoch()
    assert run.parties[-1][-1].head[-1].out_features == classes

@pytest.mark.parametrize("damage", ["absent", "changed", "truncated", "no archive"])
def test_cifar_that_cannot_be_had_is_refused(damage, tmp_path, monkeypatch, offline, capsys):
    write_cifar(tmp_path, "cifar10", monkeypatch, packed=True)
    archive = tmp_path / datasets.CIFAR10.filename
    content = archive.read_bytes()
    damaged = {"changed": content[:-1] + b"x", "truncated": content[:len(content) // 2],
               "no archive": b"<html>", "absent": b""}
    archive.write_bytes(damaged[damage])
    if damage == "absent":
        archive.unlink()
    elif damage != "changed":
        md5 = hashlib.md5(archive.read_bytes()).hexdigest()
        monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", md5)

    code = ds.main(["--dataset", "cifar10", "--data-dir", str(tmp_path)])

    *announced, line = capsys.readouterr().err.splitlines()
    assert code == 2
    assert "--data-dir" in line and ("--dataset synthetic" in line or "delete the folder" in line)
    assert ["170 MB" in text for text in announced] == ([True] if damage == "absent" else [])

@pytest.mark.parametrize("damage", ["meta", "batch"])
def test_a_damaged_folder_of_cifar_is_named_so_that_it_can_be_deleted(
        damage, tmp_path, monkeypatch, offline, refused):
    write_cifar(tmp_path, "cifar10", monkeypatch, packed=False)
    folder = tmp_path / datasets.CIFAR10.base_folder
    (folder / {"meta": "batches.meta", "batch": "data_batch_3"}[damage]).unlink()

    line = refused("--dataset", "cifar10", "--data-dir", tmp_path)

    assert f"delete the folder {folder}" in line

def test_a_damaged_meta_file_beside_a_good_archive_is_cured_by_the_advice(
        tmp_path, monkeypatch, offline, capsys, refused):
    write_cifar(tmp_path, "cifar10", monkeypatch, packed=True)
    argv = ["--dataset", "cifar10", "--data-dir", str(tmp_path), *TINY]
    assert ds.main(argv) == 0
    folder = tmp_path / datasets.CIFAR10.base_folder
    (folder / "batches.meta").write_text("damaged")
    capsys.readouterr()

    line = refused(*argv)
    folder_to_delete, = re.findall(r"delete the folder (\S+)", line)
    shutil.rmtree(folder_to_delete)

    assert ds.main(argv) == 0

def test_a_torchvision_that_cannot_be_imported_is_reported_as_that(
        tmp_path, monkeypatch, refused):
    monkeypatch.setitem(sys.modules, "torchvision", None)       # any import of it now fails

    line = refused("--dataset", "cifar10", "--data-dir", tmp_path)

    assert "torchvision" in line and "pip install" in line and "--dataset synthetic" in line

def test_a_data_folder_that_does_not_exist_yet_is_made(tmp_path, offline):
    folder = tmp_path / "new" / "data"

    with pytest.raises(ds.UserError, match="no network in a test"):     # it came to the download
        ds.load_cifar(ds.Options(dataset="cifar10", data_dir=str(folder)))

    assert folder.is_dir()

def test_a_data_folder_that_cannot_be_written_is_reported_as_that(tmp_path, refused, offline):
    (tmp_path / "file").write_text("")

    line = refused("--dataset", "cifar10", "--data-dir", tmp_path / "file")

    assert "--data-dir" in line and "cannot be written" in line

def test_a_server_that_never_answers_is_given_up(tmp_path, monkeypatch):
    seen = []

    def silent(*args, **kwargs):
        seen.append(socket.getdefaulttimeout())
        raise TimeoutError("timed out")
    monkeypatch.setattr(urllib.request, "urlopen", silent)

    with pytest.raises(ds.UserError, match="timed out"):
        ds.load_cifar(ds.Options(dataset="cifar10", data_dir=str(tmp_path)))

    assert seen and set(seen) == {60}
    assert socket.getdefaulttimeout() is None           # as it was


# ---- training, evaluation, clients ---------------------------------------------------

@pytest.mark.parametrize("wire", ["float32", "uint8"])
def test_accuracy_is_that_of_the_whole_network_in_evaluation_mode(wire):
    images, labels = ds.synthetic(1, (1, 250))[1]
    client, server = make_parties("decoupled", lr=0.1, total_steps=12)
    train("decoupled", (client, server), ds.Channel(), BATCHES * 3)
    x = (images.float() - 128) / 64
    a, b = copy.deepcopy(client[0]).eval(), copy.deepcopy(server[0]).eval()
    with torch.no_grad():
        labels[:150] = a.head(a.body(x[:150])).argmax(1)    # so the client is right more often
    before = weights(client, server)
    channel = ds.Channel(wire)
    seen = []
    client.register_forward_pre_hook(lambda _, args: seen.append(args[0]))

    accuracy = ds.evaluate([client, server], channel, ds.test_batches(images, labels, 16))

    # The oracle sends z over the same wire, in the same batches, with a channel of its own.
    own_channel = ds.Channel(wire)
    right = {"client": 0, "server": 0}
    with torch.no_grad():
        for x_part, y_part in zip(x.tensor_split(16), labels.tensor_split(16), strict=True):
            z = a.body(x_part)
            right["client"] += (a.head(z).argmax(1) == y_part).sum().item()
            own_channel.send(z, "up", "activations")
            z = own_channel.receive("up", "activations")
            right["server"] += (b.head(b.body(z)).argmax(1) == y_part).sum().item()
    assert accuracy == {name: count / 250 for name, count in right.items()}
    assert accuracy["client"] > accuracy["server"] > 0      # else a mix-up would not show
    assert torch.equal(torch.cat(seen), x)              # as they are, in their order
    assert same(before, weights(client, server))
    assert channel.bytes["evaluation"]["activations"] == own_channel.bytes["up"]["activations"]
    assert len(count_of(channel)) == 1

def test_evaluation_uses_what_the_server_receives(monkeypatch):
    parties = make_parties("decoupled")
    channel = ds.Channel()
    received = []
    monkeypatch.setattr(channel, "decode", lambda payload, kind: payload[0] * 0 + 7)
    parties[1].register_forward_pre_hook(lambda _, args: received.append(args[0]))

    ds.evaluate(parties, channel, BATCHES[:2])

    assert len(received) == 2 and all((z == 7).all() for z in received)

def test_evaluation_builds_no_graph():
    parties = make_parties("decoupled")
    seen = []
    for module in [module for party in parties for module in party.modules()]:
        module.register_forward_hook(lambda _, __, output: seen.append(output.requires_grad))

    ds.evaluate(parties, ds.Channel(), BATCHES[:1])

    assert seen and not any(seen)

def test_evaluation_mode_ends_with_the_next_epoch():
    run = make_run("decoupled")

    ds.evaluate(run.parties, run.channel, BATCHES[:1])
    assert not any(m.training for party in run.parties for m in party.modules())
    run.train_epoch()

    assert all(m.training for party in run.parties for m in party.modules())

@pytest.mark.parametrize("name", ["client", "server"])
def test_scores_that_are_not_finite_are_not_an_accuracy(name):
    parties = make_parties("decoupled")
    head = {party.name: party[-1].head for party in parties}[name]
    head[-1].bias.data[3] = math.nan

    with pytest.raises(FloatingPointError, match=f"the {name}'s test scores"):
        ds.evaluate(parties, ds.Channel(), BATCHES[:1])

def test_the_accuracy_of_a_run_is_that_of_its_last_epoch_not_of_the_best(monkeypatch):
    results = iter([{"client": 0.4, "server": 0.9}, {"client": 0.3, "server": 0.7}])
    monkeypatch.setattr(ds, "evaluate", lambda *args: next(results))
    run = make_run("decoupled", epochs=2, max_steps=1)

    summary = run.train()

    assert (summary["test_accuracy"], summary["aux_accuracy"]) == (0.7, 0.3)
    assert summary["accuracy"] == {"client": 0.3, "server": 0.7}

def test_the_loss_of_an_epoch_is_the_mean_over_its_images(monkeypatch):
    losses = iter([1.0, 2.0, 4.0, 8.0])

    def step(client, server, channel, x, y):
        return {"client": 100.0, "server": next(losses)}

    run = make_run("decoupled", [(TRAIN[0][:50], TRAIN[1][:50]), TEST])     # 13, 13, 12, 12
    run.step = step

    figures = run.train_epoch()

    assert figures["train_loss"] == pytest.approx((13 * 1 + 13 * 2 + 12 * 4 + 12 * 8) / 50)

@pytest.mark.parametrize("mode", MODES)
def test_the_seconds_of_an_epoch_are_those_of_this_epoch(mode):
    run = make_run(mode, epochs=2)
    run.train_epoch()
    start = time.perf_counter()
    seconds = run.train_epoch()["seconds"]
    elapsed = time.perf_counter() - start

    assert 0 < seconds["client"] + seconds["server"] <= seconds["epoch"] <= elapsed
    assert seconds["client"] > 0.01 * elapsed and seconds["server"] > 0.01 * elapsed

def test_images_per_second_counts_images():
    run = make_run("backprop", max_steps=2)

    figures = run.train_epoch()

    assert figures["images_per_second"] * figures["seconds"]["epoch"] == pytest.approx(32)

@pytest.mark.parametrize("mode", MODES)
def test_the_client_part_travels_after_every_shard(mode):
    relay = []

    def spy(client, server, channel, x, y):
        relay.append(channel.bytes["relay"]["weights"])
        return ds.STEPS[mode](client, server, channel, x, y)

    run = make_run(mode, [(TRAIN[0][:60], TRAIN[1][:60]), TEST], clients=3, batch_size=8)
    for number, (images, labels) in enumerate(run.shards):
        assert torch.equal(images, TRAIN[0][20 * number:20 * number + 20])
        assert torch.equal(labels, TRAIN[1][20 * number:20 * number + 20])

    run.step = spy
    figures = run.train_epoch()

    once = static_bytes(run.parties[0])                 # weights, buffers and momentum
    relay.append(run.channel.bytes["relay"]["weights"])
    assert [count / once for count in relay] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert figures["hand_overs"] == 3

def test_a_single_client_hands_nothing_over():
    run = make_run("decoupled")

    assert run.train_epoch()["hand_overs"] == 0
    assert run.channel.bytes["relay"]["weights"] == 0

@pytest.mark.parametrize("wire", ["float32", "uint8"])
def test_a_hand_over_changes_no_bit(wire):
    parties = make_parties("decoupled")
    channel = ds.Channel(wire)
    train("decoupled", parties, channel, BATCHES[:2])
    client = parties[0]
    before = [tensor.clone() for tensor in kept(client)]
    channel.reset()

    ds.hand_over(client, channel)

    assert same(before, kept(client))
    assert count_of(channel) == {("relay", "weights"): size(before)}
    assert size(before) == static_bytes(client)

def test_the_next_client_goes_on_with_what_was_received(monkeypatch):
    parties = make_parties("decoupled")
    channel = ds.Channel()
    train("decoupled", parties, channel, BATCHES[:2])
    before = [tensor.clone() for tensor in kept(parties[0])]
    monkeypatch.setattr(channel, "decode", lambda payload, kind: payload[0] + 1)

    ds.hand_over(parties[0], channel)

    assert same(kept(parties[0]), [tensor + 1 for tensor in before])

@pytest.mark.parametrize("mode", MODES)
def test_a_client_on_another_machine_goes_on_as_the_notes_say(mode):
    (old, server), (new, _) = make_parties(mode), make_parties(mode, seed=1)
    train(mode, (old, server), ds.Channel(), BATCHES[:3])
    channel = ds.Channel()

    sum(p.sum() for p in new.parameters()).backward()       # so that there is momentum
    new.update()
    for sent, own in zip(old.state_tensors(), new.state_tensors(), strict=True):
        channel.send(sent, "relay", "weights")
        own.copy_(channel.receive("relay", "weights"))
    for module in new:
        module.schedule.last_epoch = 3 - 1
        module.schedule.step()

    for client in (old, new):
        sum(p.square().sum() for p in client.parameters()).backward()
        client.update()
    assert same(weights(old), weights(new)) and same(kept(old), kept(new))

def test_learning_rate_is_one_cycle_in_every_module_and_momentum_stays():
    run = make_run("decoupled", depth=14, lr=0.08, epochs=5, client_modules=2)
    modules = [module for party in run.parties for module in party]
    rates = [[] for _ in modules]
    momenta = set()
    for module, own_rates in zip(modules, rates, strict=True):
        def note(optimizer, *_, own_rates=own_rates):
            own_rates.append(optimizer.param_groups[0]["lr"])
            momenta.add(optimizer.param_groups[0]["momentum"])
        module.optimizer.register_step_pre_hook(note)

    for _ in range(5):
        run.train_epoch()

    first = rates[0]
    top = first.index(max(first))
    assert len(rates) == 3 and all(own_rates == first for own_rates in rates)
    assert len(first) == 5 * 4 and 2 <= top <= 8
    assert max(first) == pytest.approx(0.08) and first[0] < 0.01 and first[-1] < 0.08 / 1000
    assert first == sorted(first[:top]) + sorted(first[top:], reverse=True)
    assert momenta == {0.9}

def test_the_cycle_of_the_learning_rate_ends_with_shortened_epochs():
    run = make_run("decoupled", epochs=2, max_steps=2, lr=0.08)
    rates = []
    run.parties[0][0].optimizer.register_step_pre_hook(
        lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))

    for _ in range(2):
        run.train_epoch()

    assert len(rates) == 4 and max(rates) > 0.04 and rates[-1] < 0.08 / 1000

def test_max_steps_ends_an_epoch_after_that_many_batches():
    run = make_run("decoupled", max_steps=3)

    run.train_epoch()

    assert run.channel.bytes["up"]["labels"] == 48 and run.steps_per_epoch == 3
    assert make_run("decoupled", max_steps=99).steps_per_epoch == 4


# ---- time over a link ----------------------------------------------------------------

def simulate(mode, steps, client, up, server, down, latency):
    """Seconds until the last batch is done, batch by batch."""
    if mode == "backprop":
        now = 0
        for _ in range(steps):
            now += client / 2               # forward
            now += up + latency             # z and labels
            now += server
            now += down + latency           # dL/dz
            now += client / 2               # backward
        return now
    made = sent = done = 0
    for _ in range(steps):
        made += client
        sent = max(made, sent) + up         # when the last bit has left
        done = max(sent + latency, done) + server
    return done

@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("latency", [0, 35])
@pytest.mark.parametrize("client, up_bytes, server", [
    (0.3, 2e6, 0.05), (0.01, 9e6, 0.02), (0.04, 1e6, 0.5), (0.1, 1.25e6, 0.1)])
def test_seconds_over_the_link_are_those_of_a_simulation(mode, client, up_bytes, server, latency):
    up = up_bytes / 1e7                     # 80 Mbit/s are 10 MB per second
    oracle = simulate(mode, 7, client, up, server, 2 * up, latency / 1000)
    summary = {
        "mode": mode, "bandwidth": 80, "latency": latency, "hand_overs": 0,
        "accuracy": {"client": 0.5, "server": 0.5},
        "seconds": {"client": 7 * client, "server": 7 * server, "epoch": 99},
        "bytes": {"up": {"activations": 6 * up_bytes, "labels": up_bytes},
                  "down": {"gradients": 14 * up_bytes if mode == "backprop" else 0},
                  "relay": {"weights": 0}, "evaluation": {"activations": 1e12}},
    }
    assert ds.link_seconds(summary, 7) == pytest.approx(oracle, rel=1e-6)

    summary["bytes"]["relay"]["weights"] = 5e6
    summary["hand_overs"] = 4

    with_relay = oracle + 5e6 / 1e7 + 4 * latency / 1000
    assert ds.link_seconds(summary, 7) == pytest.approx(with_relay, rel=1e-6)

def test_seconds_over_two_links_are_those_of_a_longer_pipeline():
    # Three parties. By hand: five stages of 2, 1, 5, 3 and 4 seconds per epoch of 10 batches.
    summary = {
        "mode": "decoupled", "bandwidth": 8, "latency": 20, "hand_overs": 0,
        "accuracy": {"client": None, "edge": None, "server": None},
        "seconds": {"client": 2, "edge": 5, "server": 4, "epoch": 99},
        "bytes": {"client to edge": {"activations": 1e6}, "edge to server": {"activations": 3e6},
                  "relay": {"weights": 0}, "evaluation": {"activations": 1e9}},
    }

    pipeline = ds.link_seconds(summary, 10)
    chain = ds.link_seconds({**summary, "mode": "backprop"}, 10)

    assert pipeline == pytest.approx(5 + (2 + 1 + 3 + 4) / 10 + 2 * 0.02)
    assert chain == pytest.approx(2 + 1 + 5 + 3 + 4 + 2 * 0.02 * 10)

@pytest.mark.parametrize("clients, waits", [(1, 0), (2, 1), (4, 2)])
def test_only_the_hand_overs_that_took_place_wait_for_the_link(clients, waits):
    run = make_run("decoupled", clients=clients, max_steps=2, latency=1e6)      # of 4 batches

    seconds = run.train()["seconds"]["link_epoch"]

    assert seconds == pytest.approx(1000 * (1 + waits), abs=100)

def test_each_batch_of_a_backprop_run_waits_twice_for_the_link():
    run = make_run("backprop", epochs=2, max_steps=3, latency=1e6)      # 1000 seconds

    seconds = run.train()["seconds"]["link_epoch"]

    assert seconds == pytest.approx(1000 * 2 * 3, abs=100)


# ---- long runs -----------------------------------------------------------------------

LONG = "--mode decoupled --depth 8 --epochs 3 --batch-size 16 --device cpu".split()
TINY = ("--mode decoupled --depth 8 --epochs 2 --max-steps 2 --batch-size 16 --device cpu "
        "--lr 0.05").split()

def test_a_killed_run_goes_on_and_ends_with_the_same_bits(tmp_path, small):
    a = tmp_path / "a.pt"
    b = tmp_path / "b.pt"
    log = tmp_path / "b.jsonl"
    code = """if True:
        import os
        import decoupled_split as ds
        step, whole, calls = ds.decoupled_step, ds.synthetic, []
        def deadly_step(*args):
            calls.append(args)
            if len(calls) == 2 + 4 + 2:         # two measure the memory; then in epoch 2
                os._exit(9)                     # like kill -9: nothing is tidied up
            return step(*args)
        ds.synthetic = lambda seed: whole(seed, (64, 32))
        ds.STEPS["decoupled"] = deadly_step
        ds.main()
    """
    argv = [sys.executable, "-c", code, *LONG, "--checkpoint", b, "--log", log]
    process = subprocess.run(argv, env=ENV, stderr=subprocess.DEVNULL)
    assert process.returncode == 9 and len(log_of(log)) == 1
    assert torch.load(b, weights_only=True)["epoch"] == 1

    for path in (a, b):
        argv = [*LONG, "--checkpoint", str(path), "--log", str(path.with_suffix(".jsonl"))]
        assert ds.main(argv) == 0

    ends = [torch.load(path, weights_only=True) for path in (a, b)]
    states = [tree_leaves(end["parties"]) for end in ends]
    assert len(states[0]) == len(states[1]) > 50
    assert all(torch.equal(p, q) if torch.is_tensor(p) else p == q
               for p, q in zip(*states, strict=True))
    assert [(e["event"], e.get("epoch")) for e in log_of(log)] == [
        *(("epoch", n) for n in range(1, 4)), ("summary", None)]
    whole, resumed = log_of(tmp_path / "a.jsonl")[-1], log_of(log)[-1]
    for key in ("test_accuracy", "aux_accuracy", "train_loss", "bytes", "memory"):
        assert whole[key] == resumed[key]
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"a.jsonl", "a.pt", "b.jsonl", "b.pt"}

def test_a_layer_that_draws_random_numbers_resumes_with_the_same_bits(tmp_path, monkeypatch):
    resnet_layers = ds.resnet_layers
    monkeypatch.setattr(ds, "resnet_layers", lambda depth, classes, channels: [
        nn.Dropout(0.5), *resnet_layers(depth, classes, channels)])
    path = str(tmp_path / "run.pt")
    whole = make_run("decoupled", epochs=2, checkpoint=path)
    whole.train_epoch()
    whole.epoch = 1
    ds.save(whole, path)

    torch.rand(7)                       # another process has drawn other numbers before
    resumed = make_run("decoupled", epochs=2, checkpoint=path)
    resumed.train_epoch()
    whole.train_epoch()

    assert resumed.epoch == 1
    assert same(weights(*whole.parties), weights(*resumed.parties))

def test_what_a_killed_save_leaves_is_overwritten_by_the_next(tmp_path, small):
    path = tmp_path / "run.pt"
    draft = Path(ds.draft_of(str(path)))
    draft.write_text("half a checkpoint")

    assert ds.main([*TINY, "--checkpoint", str(path)]) == 0

    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]
    assert draft.name == "run.pt.partial"       # always the same name, not one per process

def test_a_finished_run_started_again_trains_nothing_and_reports_the_same(tmp_path, small, capsys):
    argv = [*TINY, "--checkpoint", str(tmp_path / "run.pt"), "--log", str(tmp_path / "log")]
    assert ds.main(argv) == 0
    table = capsys.readouterr().out
    content = (tmp_path / "run.pt").read_bytes()

    assert ds.main(argv) == 0

    out, err = capsys.readouterr()
    assert out == table and "epoch" not in err
    assert (tmp_path / "run.pt").read_bytes() == content
    events = log_of(tmp_path / "log")
    assert [event["event"] for event in events] == ["epoch", "epoch", "summary", "summary"]
    assert events[-1] == events[-2]

class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)

def flip_a_byte(path):
    """Damage the largest tensor of the file, whose place zipfile knows."""
    with zipfile.ZipFile(path) as file:
        entry = max(file.infolist(), key=lambda e: e.file_size)
    content = bytearray(path.read_bytes())
    content[entry.header_offset + entry.file_size // 2] ^= 1
    path.write_bytes(content)

def remove_a_party(path):
    saved = torch.load(path, weights_only=True)
    del saved["parties"]["server"]
    torch.save(saved, path)

def add_a_party(path):
    saved = torch.load(path, weights_only=True)
    saved["parties"]["edge"] = saved["parties"]["client"]
    torch.save(saved, path)

def add_a_module(path):
    saved = torch.load(path, weights_only=True)
    saved["parties"]["server"].append(saved["parties"]["server"][0])
    torch.save(saved, path)

def remove_a_weight(path):
    saved = torch.load(path, weights_only=True)
    saved["parties"]["client"][0]["module"].popitem()
    torch.save(saved, path)

DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "one bit": flip_a_byte,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a checkpoint\n" * 99),
    "code in a zip": lambda path: torch.save(Evil(), path),
    "code": lambda path: path.write_bytes(pickle.dumps(Evil())),
    "another program's": lambda path: torch.save({"model": torch.zeros(3)}, path),
    "a party missing": remove_a_party,
    "a party too many": add_a_party,
    "a module too many": add_a_module,
    "a weight missing": remove_a_weight,
}

@pytest.fixture(scope="module")
def finished_checkpoint():
    """The content of the checkpoint of a finished run with the options TINY."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setitem(ds.DATA_SETS, "synthetic", replace(
            ds.DATA_SETS["synthetic"], load=lambda options: (TRAIN, TEST)))
        path = Path(folder) / "run.pt"
        assert ds.main([*TINY, "--checkpoint", str(path)]) == 0
        return path.read_bytes()

@pytest.fixture
def checkpoint(finished_checkpoint, tmp_path, small, monkeypatch, capsys):
    """The checkpoint of a finished run with the options TINY, alone in its folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.pt"
    path.write_bytes(finished_checkpoint)
    capsys.readouterr()
    return path

def test_a_checkpoint_is_read_into_main_memory_wherever_it_was_made(checkpoint, monkeypatch):
    torch_load = torch.load
    seen = {}

    def spy(path, **how):
        seen.update(how)
        return torch_load(path, **how)

    monkeypatch.setattr(torch, "load", spy)
    ds.load(str(checkpoint))

    assert str(seen.get("map_location")) == "cpu"

@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_left_alone(damage, checkpoint, refused):
    DAMAGES[damage](checkpoint)
    content = checkpoint.read_bytes()

    line = refused(*TINY, "--checkpoint", checkpoint)

    assert "--checkpoint" in line and "damaged" in line
    assert checkpoint.read_bytes() == content
    assert [path.name for path in checkpoint.parent.iterdir()] == ["run.pt"]

CHANGES = {
    "mode": "backprop", "dataset": "cifar10", "depth": "14", "cut": "middle", "client_modules": "2",
    "server_modules": "3", "aux_depth": "0", "wire": "uint8", "clients": "2", "epochs": "3",
    "batch_size": "8", "lr": "0.2", "weight_decay": "0.001", "amp": "True", "seed": "1",
    "max_steps": "3",
}
NO_CHANGE = {"device": "auto", "data_dir": "elsewhere", "bandwidth": "10", "latency": "5",
             "log": "log.jsonl"}

def test_every_option_either_may_or_may_not_change_on_resume():
    names = {knob.name for knob in fields(ds.Options)}

    assert names == {*CHANGES, *NO_CHANGE, "checkpoint"}

@pytest.mark.parametrize("name", CHANGES)
def test_a_checkpoint_of_another_configuration_is_refused(name, checkpoint, refused, monkeypatch):
    monkeypatch.setitem(ds.DATA_SETS, "cifar10", ds.DATA_SETS["synthetic"])
    content = checkpoint.read_bytes()
    change = [ds.flag(name)] if name == "amp" else [ds.flag(name), CHANGES[name]]

    line = refused(*TINY, "--checkpoint", checkpoint, *change)

    assert "--checkpoint" in line and f"its run had {ds.flag(name)} " in line
    assert f", not {CHANGES[name]};" in line
    assert checkpoint.read_bytes() == content

@pytest.mark.parametrize("name", NO_CHANGE)
def test_what_does_not_change_the_weights_may_change_on_resume(name, checkpoint):
    argv = [*TINY, "--checkpoint", str(checkpoint), ds.flag(name), NO_CHANGE[name]]

    assert ds.main(argv) == 0

def test_a_bad_checkpoint_of_the_second_mode_is_found_before_the_first_one_trains(
        tmp_path, refused):
    (tmp_path / "run.decoupled.pt").write_text("not a checkpoint")

    line = refused(*TINY, "--mode", "compare", "--checkpoint", tmp_path / "run.pt")

    assert "run.decoupled.pt" in line       # and no line of an epoch before it

@pytest.mark.parametrize("log", ["run.pt", "./run.pt", "sub/../run.pt", "link", "run.pt.partial"])
def test_log_and_checkpoint_in_the_same_file_are_refused(log, tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "link").symlink_to("run.pt")
    before = sorted(tmp_path.rglob("*"))

    line = refused(*TINY, "--checkpoint", "run.pt", "--log", log)

    assert f"--log {log}" in line and "--checkpoint" in line
    assert sorted(tmp_path.rglob("*")) == before

def test_log_and_checkpoint_of_one_mode_in_the_same_file_are_refused(tmp_path, refused):
    path = tmp_path / "run.pt"

    line = refused("--checkpoint", path, "--log", tmp_path / "run.decoupled.pt")

    assert "--log" in line and not list(tmp_path.iterdir())

def test_log_and_checkpoint_that_are_one_file_by_a_hard_link_are_refused(checkpoint, refused):
    content = checkpoint.read_bytes()
    os.link(checkpoint, checkpoint.parent / "other name")

    line = refused(*TINY, "--checkpoint", checkpoint, "--log", checkpoint.parent / "other name")

    assert "--log" in line and checkpoint.read_bytes() == content

def test_a_refused_run_leaves_no_empty_log(tmp_path, refused):
    refused(*TINY, "--log", tmp_path / "log", "--client-modules", "3")

    assert not list(tmp_path.iterdir())


# ---- log and report ------------------------------------------------------------------

KEYS = """event mode dataset depth cut client_modules server_modules aux_depth wire clients epochs
batch_size seed device torch test_accuracy aux_accuracy train_loss bytes memory seconds
images_per_second""".split()
PARTS = {
    "bytes": {"up", "down", "relay", "evaluation"},
    "memory": {"client_peak", "server_peak", "host_peak", "client_held", "picture"},
    "seconds": {"epoch", "client", "server", "link_epoch"},
}

def test_compare_logs_both_modes_and_keeps_a_checkpoint_of_each(tmp_path, small, capsys):
    log = tmp_path / "log"
    argv = [*TINY, "--mode", "compare", "--checkpoint", str(tmp_path / "run.pt"), "--log", str(log)]

    assert ds.main(argv) == 0

    events = log_of(log)
    assert [(event["event"], event.get("mode")) for event in events] == [
        *((event, mode) for mode in MODES for event in ("epoch", "epoch", "summary")),
        ("compare", None)]
    for summary, mode in ((events[2], "backprop"), (events[5], "decoupled")):
        assert set(KEYS) <= set(summary) and summary["epochs"] == 2 and summary["depth"] == 8
        assert all(names <= set(summary[key]) for key, names in PARTS.items())
        assert {**events[-1][mode], "event": "summary"} == summary
        assert 0 <= summary["test_accuracy"] <= 1 and summary["device"] == "cpu"
        assert (summary["aux_accuracy"] is None) == (mode == "backprop")
        assert summary["bytes"]["up"]["labels"] == 32
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["log", "run.backprop.pt", "run.decoupled.pt"]
    a, b = (event["memory"]["host_peak"] / 2**20 for event in (events[2], events[5]))
    out = capsys.readouterr().out
    assert [f"{a:.2f}", f"{b:.2f}", f"{100 * b / a - 100:+.1f}%"] in [
        line.split()[-3:] for line in out.splitlines()]

def test_the_summary_names_the_device_that_auto_has_chosen():
    run = make_run("decoupled", max_steps=1)

    summary = run.train()

    assert run.options.device == "auto" and summary["device"] == "cpu"

def test_a_line_of_the_log_has_the_figures_of_its_epoch(tmp_path, small):
    assert ds.main([*TINY, "--log", str(tmp_path / "log")]) == 0

    first, last, summary = log_of(tmp_path / "log")

    assert (first["epoch"], last["epoch"]) == (1, 2)
    assert first["bytes"]["up"]["labels"] == 32 and first["memory"] == summary["memory"]
    assert last["test_accuracy"] == summary["test_accuracy"]
    assert last["train_loss"] == summary["train_loss"] != first["train_loss"]

def test_the_table_has_every_figure_in_its_unit_worked_out_by_hand():
    mib = 2**20
    summary = {
        "mode": "decoupled",
        "accuracy": {"client": 0.5, "server": 0.75},
        "bytes": {"up": {"activations": 2_000_000, "labels": 500_000},
                  "down": {"gradients": 4_000_000}, "relay": {"weights": 1_000_000},
                  "evaluation": {"activations": 9_000_000}},
        "memory": {"client_peak": 3 * mib, "server_peak": 5 * mib, "host_peak": 7 * mib,
                   "client_held": mib},
        "seconds": {"client": 11, "server": 13, "epoch": 17, "link_epoch": 19},
    }

    rows = ds.table_rows(summary)

    assert rows == [
        ("test accuracy", "%", 75),
        ("accuracy of the client's auxiliary classifier", "%", 50),
        ("sent per epoch, up", "MB", 2.5),
        ("sent per epoch, down", "MB", 4),
        ("sent per epoch, relay", "MB", 1),
        ("sent per epoch, in all", "MB", 7.5),
        ("peak memory of the client", "MiB", 3),
        ("peak memory of the server", "MiB", 5),
        ("peak memory if one host runs all", "MiB", 7),
        ("held by the client while the server works", "MiB", 1),
        ("computing time of the client per epoch", "s", 11),
        ("computing time of the server per epoch", "s", 13),
        ("time per epoch on this machine", "s", 17),
        ("time per epoch over the simulated link", "s", 19),
    ]
    for count in (1, 2):
        lines = ds.table([summary] * count)
        assert len({len(line) for line in lines}) == 1      # all columns end at the same place

    summary["accuracy"]["client"] = None
    assert ds.table_rows(summary)[1][2] is None

def test_what_does_not_apply_is_a_dash_in_the_table(monkeypatch):
    rows = {"backprop": [("alone", "%", None)], "decoupled": [("alone", "%", 50)]}
    monkeypatch.setattr(ds, "table_rows", lambda summary: rows[summary["mode"]])

    lines = ds.table([{"mode": mode} for mode in MODES])

    assert lines[1].split() == ["alone,", "%", "-", "50.00", "-"]

@pytest.mark.parametrize("before, after, unit, text", [
    (75, 74.5, "%", "-0.50"), (50, 75, "MB", "+50.0%"), (4, 0, "MB", "-100.0%"),
    (0, 3, "MB", "-"), (None, 50, "%", "-"), (50, None, "%", "-")])
def test_changes_are_in_points_for_accuracies_and_else_in_per_cent(before, after, unit, text):
    assert ds.format_change(before, after, unit) == text

def test_the_picture_is_as_high_as_the_memory():
    memory = {"host_peak": 8 * 2**20,
              "picture": {"client": [0, 2**20, 4 * 2**20], "both": [1, 8 * 2**20, 5 * 2**20]}}

    lines = ds.picture([{"mode": "backprop", "memory": memory}], " ▁▂▃▄▅▆▇█")

    assert lines == [" backprop client  ▁▄      4.0 MiB", " backprop both   ▁█▅      8.0 MiB"]

def test_the_pictures_of_two_runs_have_one_scale():
    runs = [{"mode": mode, "memory": {"host_peak": n * 2**20, "picture": {"both": [n * 2**20]}}}
            for mode, n in (("backprop", 8), ("decoupled", 4))]

    lines = ds.picture(runs, " ▁▂▃▄▅▆▇█")

    assert lines == [" backprop both   █      8.0 MiB", "decoupled both   ▄      4.0 MiB"]

@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_gets_a_progress_line_and_errors_in_full(terminal, small, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)

    assert ds.main([*TINY, "--lr", "1e20", "--max-steps", "4"]) == 2

    err = capsys.readouterr().err
    lines = re.split(r"[\r\n]+", err.strip())
    error = lines[-1]
    progress = [line for line in lines if "step 1/4" in line]
    assert "a lower --lr than 1e+20" in error and len(error.rstrip()) > 79
    assert len(progress) == (1 if terminal else 0)
    for line in progress:
        assert all(word in line for word in ("loss", "images/s", "left"))
    if terminal:
        assert f"\r{progress[0]:79}\r" in err

def test_the_progress_line_worked_out_by_hand(monkeypatch):
    run = make_run("backprop", epochs=3)            # of 4 steps each
    run.epoch = 1
    lines = []
    monkeypatch.setattr(ds, "say", lambda line, passing=False: lines.append((line, passing)))
    monkeypatch.setattr(ds, "time", SimpleNamespace(perf_counter=lambda: 140.0))

    run.show_progress(2, 400, 0.75, 100.0)          # 20 seconds per step, and 6 steps to come

    assert lines == [("backprop epoch 2 step 2/4 loss 0.750 10 images/s 2.0 min left", True)]

@pytest.mark.parametrize("mode, client, alone", [
    ("decoupled", 0.5, " (client alone 50.00%)"), ("backprop", None, "")])
def test_the_line_of_an_epoch_worked_out_by_hand(mode, client, alone, capsys):
    run = make_run(mode, epochs=3)
    run.epoch = 2
    run.summary = {"train_loss": 1.25, "test_accuracy": 0.75, "aux_accuracy": client,
                   "accuracy": {"client": client, "server": 0.75}, "images_per_second": 320.0}

    run.show_epoch()

    line = f"{mode} epoch 2/3 loss 1.250 test 75.00%{alone} 320 images/s"
    assert capsys.readouterr().err.strip() == line

def test_before_training_the_program_says_what_it_will_train(small, capsys):
    assert ds.main([*TINY, "--depth", "20", "--mode", "compare"]) == 0

    lines = capsys.readouterr().err.splitlines()
    starts = [n for n, line in enumerate(lines) if "on synthetic images, cpu" in line]
    own = [sum(p.numel() for p in layer.parameters()) for layer in ds.resnet_layers(20, 10)]
    z = 16 * 32 * 16 * 16 * 4
    assert starts == [0, 4]
    assert "client: 7 layers and 0 classifier(s)" in lines[1]
    assert "client: 7 layers and 1 classifier(s)" in lines[5]
    assert f"{sum(own[:7]):,} parameters, output (32, 16, 16)" in lines[1]
    assert "server: 5 layers and 1 classifier(s)" in lines[2]
    assert f"{sum(own[7:]):,} parameters" in lines[2]
    assert f"{z + 16:,} bytes up, {z:,} bytes down" in lines[3]
    assert lines[7].endswith(f"{z + 16:,} bytes up")
    assert not any("epoch" in line for line in lines[:8])


# ---- streams of every kind -----------------------------------------------------------

class Mute:
    """What a notebook or an IDE may put in the place of a stream."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

class Broken:
    encoding = "utf-8"

    def write(self, text):
        raise RuntimeError("this stream is broken")

@pytest.mark.parametrize("stream", [None, Mute(), Broken(), io.StringIO(), object()])
def test_training_does_not_depend_on_a_stream(stream, small, monkeypatch):
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)

    code = ds.main(TINY)
    bad = ds.main(["--depth", "21"])

    assert (code, bad) == (0, 2)
    if isinstance(stream, Mute):
        assert "test accuracy" in stream.text and "█" in stream.text
        assert "error" in stream.text

def test_an_ascii_stream_gets_the_picture_in_ascii(small, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)

    assert ds.main(TINY) == 0

    text = stream.buffer.getvalue().decode("ascii")
    both = next(line for line in text.splitlines() if line.startswith("decoupled both"))
    assert "@" in both and "?" not in text

def test_an_ascii_stream_gets_an_error_that_it_cannot_spell(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stderr", stream)

    assert ds.main(["--log", "no/such/folder/é"]) == 2

    assert b"--log no/such/folder/?: cannot be written" in stream.buffer.getvalue()

@pytest.mark.skipif(os.name != "posix", reason="no shell")
def test_a_closed_or_full_stream_gives_code_0_and_no_traceback(tmp_path):
    code = ("import sys, decoupled_split as ds; whole = ds.synthetic;"
            "ds.synthetic = lambda seed: whole(seed, (64, 32)); sys.exit(ds.main())")
    command = shlex.join([sys.executable, "-c", code, *TINY])
    redirections = [">&- 2>&-", "| head -1 >/dev/null"]
    if os.path.exists("/dev/full"):
        redirections.append(">/dev/full")
    processes = [
        subprocess.Popen(["bash", "-c", f"set -o pipefail; {command} {redirection}"],
                         cwd=tmp_path, env=ENV, text=True, stderr=subprocess.PIPE)
        for redirection in redirections
    ]

    for redirection, process in zip(redirections, processes, strict=True):
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, redirection
        assert "Traceback" not in err and "Exception" not in err, redirection


# ---- bad input -----------------------------------------------------------------------

BAD = """--depth 21, --depth 2, --depth -4, --client-modules 8, --server-modules 9 --depth 14,
    --lr x, --client-modules 0, --server-modules 0, --clients 65, --clients 0, --max-steps -1,
    --epochs 0, --epochs -1, --epochs nan, --batch-size 0, --batch-size -8, --batch-size nan,
    --batch-size 65,
    --lr 0, --lr -1, --lr nan, --lr 1e39, --lr inf, --weight-decay 1e39,
    --bandwidth 0, --bandwidth -5, --bandwidth nan, --latency -1,
    --latency nan, --latency inf, --weight-decay -1, --weight-decay nan, --seed -1,
    --seed 99999999999999999999, --aux-depth -1, --mode both,
    --cut wide, --wire int4, --dataset mnist, --schedule step, --device tpu, --colour red,
    --log no/such/folder/log, --log ., --checkpoint no/such/folder/run.pt, --checkpoint ."""

@pytest.mark.parametrize("argv", [argv.strip() for argv in BAD.split(",")])
def test_bad_input_is_one_line_that_names_the_option(argv, refused, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ds.Run, "train", None)      # it must not come to that

    line = refused(*argv.split())

    assert argv.split()[0] in line
    assert not list(tmp_path.iterdir())

def test_an_error_stays_on_one_line_even_if_a_name_does_not(refused):
    assert "no/such folder" in refused("--log", "no/such\nfolder/log")

def test_an_impossible_number_of_modules_names_the_possible_ones(refused):
    line = refused("--client-modules", "5")         # of 7 layers

    assert "--client-modules 5" in line and "1, 2, 3, 4, 7 groups" in line

@pytest.mark.parametrize("name, epochs, batch_size, lr", [
    ("synthetic", 4, 32, 0.1), ("cifar10", 10, 128, 0.2), ("cifar100", 10, 128, 0.2)])
def test_the_defaults_are_those_of_the_reported_figures(name, epochs, batch_size, lr):
    chosen = ds.parse(["--dataset", name])
    data_set = ds.DATA_SETS[name]

    assert (chosen.epochs, chosen.batch_size, chosen.lr) == (epochs, batch_size, lr)
    assert (chosen.weight_decay, chosen.seed, chosen.max_steps) == (5e-4, 0, 0)
    assert (chosen.depth, chosen.cut, chosen.aux_depth) == (20, "deep", 1)
    assert (chosen.client_modules, chosen.server_modules, chosen.clients) == (1, 1, 1)
    assert (chosen.wire, chosen.amp, chosen.mode) == ("float32", False, "compare")
    assert (chosen.bandwidth, chosen.latency) == (100, 10)
    assert (data_set.padding, data_set.flip) == (4, True)

@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_available_is_refused(device, refused):
    if {"cuda": torch.cuda, "mps": torch.backends.mps}[device].is_available():
        pytest.skip("it is available")

    assert f"--device {device}" in refused("--device", device)

def test_auto_is_the_first_of_cuda_mps_and_cpu_that_is_available(monkeypatch):
    chosen = []

    for cuda, mps in itertools.product((True, False), repeat=2):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        chosen.append(ds.choose_device("auto").type)

    assert chosen == ["cuda", "cuda", "mps", "cpu"]

def test_all_images_and_labels_go_to_the_device(small, monkeypatch):
    seen = []

    def run(options, train_set, test_set, device):
        seen.extend(tensor.device.type for tensor in (*train_set, *test_set))
        raise ds.UserError("enough")

    # A "meta" tensor has a shape, but no memory. It stands for a GPU.
    monkeypatch.setattr(ds, "choose_device", lambda name: torch.device("meta"))
    monkeypatch.setattr(ds, "Run", run)

    with pytest.raises(ds.UserError, match="enough"):
        ds.experiment(options("decoupled"))

    assert seen == ["meta"] * 4

@pytest.mark.parametrize("mode", MODES)
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_remedy(mode, small, capsys):
    assert ds.main([*TINY, "--mode", mode, "--max-steps", "4", "--lr", "1e20"]) == 2

    line = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"(client|server)'s loss is (nan|inf) at step [2-4] in epoch 1 .*--lr", line)

@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("epochs", ["1", "2"])
def test_a_last_update_that_diverges_stops_the_run_before_the_checkpoint(
        mode, epochs, small, tmp_path, capsys):
    path = tmp_path / "run.pt"
    argv = [*TINY, "--mode", mode, "--epochs", epochs, "--max-steps", "1", "--lr", "1e20",
            "--checkpoint", str(path)]

    assert ds.main(argv) == 2

    line = capsys.readouterr().err.splitlines()[-1]
    assert "not finite in epoch 1" in line and "a lower --lr than 1e+20" in line
    assert not list(tmp_path.iterdir())

def test_the_checkpoint_of_the_epoch_before_outlives_a_divergence_and_is_named(
        small, monkeypatch, tmp_path, capsys):
    path = tmp_path / "run.pt"
    steps = []

    def step(*args):
        steps.append(1)
        losses = ds.decoupled_step(*args)
        if len(steps) == 2 + 4:             # two steps measure the memory
            losses["client"] = math.nan
        return losses

    monkeypatch.setitem(ds.STEPS, "decoupled", step)
    assert ds.main([*TINY, "--checkpoint", str(path)]) == 2

    line = capsys.readouterr().err.splitlines()[-1]
    assert all(word in line for word in ("client", "nan", "epoch 2", "step 2", "--lr"))
    assert f"another --checkpoint, or delete {path}" in line
    assert torch.load(path, weights_only=True)["epoch"] == 1
    assert list(tmp_path.iterdir()) == [path]

@pytest.mark.parametrize("error", [OSError, RuntimeError])     # torch.save may raise the second
def test_the_checkpoint_before_outlives_one_that_cannot_be_written(
        error, small, monkeypatch, tmp_path, capsys):
    path = tmp_path / "run.pt"
    moves = []
    move = os.replace

    def full(source, target):
        moves.append(source)
        if len(moves) == 2:
            raise error("no space left on device")
        move(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert ds.main([*TINY, "--checkpoint", str(path)]) == 2

    assert "--checkpoint" in capsys.readouterr().err.splitlines()[-1]
    assert torch.load(path, weights_only=True)["epoch"] == 1
    assert list(tmp_path.iterdir()) == [path]

@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_log_on_a_full_disk_ends_the_run_in_one_line_and_keeps_the_checkpoint(
        small, tmp_path, capsys):
    argv = [*TINY, "--checkpoint", str(tmp_path / "run.pt"), "--log", "/dev/full"]

    assert ds.main(argv) == 2

    assert "--log /dev/full" in capsys.readouterr().err.splitlines()[-1]
    assert torch.load(tmp_path / "run.pt", weights_only=True)["epoch"] == 1

def test_ctrl_c_ends_with_code_130_and_one_line(small, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setitem(ds.STEPS, "decoupled", interrupt)

    assert ds.main(TINY) == 130
    assert "interrupted" in capsys.readouterr().err.splitlines()[-1]


def test_the_command_ends_with_the_code_of_main(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["decoupled_split.py", "--depth", "21"])

    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(HERE / "decoupled_split.py"), run_name="__main__")

    assert end.value.code == 2


# ---- the documents and the command ---------------------------------------------------

@pytest.mark.parametrize("document", ["decoupled_split.py", "README.md", "NOTES.md"])
def test_every_command_in_the_documents_runs(
        document, tmp_path, monkeypatch, offline, small, capsys):
    """Made short, and with a small archive in the place of CIFAR."""
    monkeypatch.chdir(tmp_path)
    for name in ("cifar10", "cifar100"):
        write_cifar(tmp_path / "data", name, monkeypatch, packed=False)
    text = text_of(document)
    commands = re.findall(r"python decoupled_split\.py\b([^`\n]*)", text)
    assert len(commands) >= 3

    for command in dict.fromkeys(commands):
        argv = re.sub(r" {2,}.*", "", command)          # a remark in a column beside it
        argv = shlex.split(argv, comments=True)
        if argv == ["--help"]:
            with pytest.raises(SystemExit, match="0"):
                ds.main(argv)
        else:
            short = "--depth 8 --batch-size 4 --max-steps 1 --epochs 1 --device cpu".split()
            assert ds.main([*argv, *short]) == 0, command
        out = capsys.readouterr().out
        assert "client" in out and "(default: )" not in out

def test_every_option_in_the_documents_exists():
    text = text_of("README.md") + text_of("NOTES.md")
    known = {ds.flag(knob.name) for knob in fields(ds.Options)} | {"--help", "--no-deps"}

    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= known

def test_the_example_at_the_end_of_part_one_runs_as_it_stands(capsys):
    text = text_of("decoupled_split.py")
    example = text.split("# ---- Part I in use")[1].split("# ====")[0]
    code = "\n".join(line[2:] for line in example.splitlines()[2:])
    names = dict(vars(ds))

    exec(code, names)

    assert set(names["losses"]) == {"client", "server"} and "activations" in capsys.readouterr().out
    assert names["scores"].shape == (8, 10) and not names["client"].training

def part_one_alone():
    """Part I and its imports."""
    part_one = text_of("decoupled_split.py").split("# PART II")[0]
    return re.sub(r"# Only Part II needs these.*?\n\n", "", part_one, flags=re.DOTALL)

def test_part_one_can_be_copied_and_torchvision_is_only_imported_for_cifar(tmp_path):
    part_one = part_one_alone()
    assert "argparse" not in part_one
    (tmp_path / "copied.py").write_text(part_one)
    code = """if True:
        import sys, torch, copied
        from copied import *
        layers = resnet_layers(8, 10)
        def make_optimizer(parameters):
            sgd = torch.optim.SGD(parameters, 0.1, momentum=0.9)
            return sgd, torch.optim.lr_scheduler.ConstantLR(sgd, 1)
        x, y = torch.randn(4, 3, 32, 32), torch.arange(4)
        for step, head in ((decoupled_step, lambda end: classifier(16, 1, 10)),
                           (backprop_step, lambda end: None)):
            parties = cut_network(layers, {"client": [4], "server": [7]}, head, make_optimizer)
            with Ledger(parties) as ledger:
                step(*parties, Channel(), x, y)
            hand_over(parties[0], Channel("uint8"))
            assert ledger.figures()["host_peak"] > 0
        import decoupled_split
        assert "torchvision" not in sys.modules
    """
    path = os.pathsep.join([str(tmp_path), ENV["PYTHONPATH"]])

    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True,
                             stderr=subprocess.PIPE, env={**ENV, "PYTHONPATH": path})

    assert process.returncode == 0, process.stderr

def global_names(code):
    """The global names that a code object, and all code inside it, reads."""
    names = {line.argval for line in dis.get_instructions(code)
             if line.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return names.union(*map(global_names, inner))

def test_part_one_uses_no_name_of_part_two():
    code = compile(part_one_alone(), "part one", "exec")
    names = {"__name__": "part_one"}

    exec(code, names)

    assert global_names(code) <= {*names, *vars(builtins)}

def python_in(document, word):
    """The Python block of a document that contains a word."""
    blocks = re.findall(r"```python\n(.*?)```", text_of(document), re.DOTALL)
    block, = [block for block in blocks if word in block]
    return block

def test_the_notebook_cell_trains_both_modes_and_prints_the_table(small, capsys):
    code = python_in("README.md", "ds.experiment")
    assert '"--epochs", "1"' in code

    exec(code.replace('"--epochs", "1"', '"--epochs", "1", "--depth", "8"'), {})

    out = capsys.readouterr().out
    down, header, *_ = out.splitlines()
    assert down == str(dict.fromkeys(ds.KINDS, 0))
    assert header.split() == ["backprop", "decoupled", "change"]

def test_the_chart_of_the_readme_has_the_ratios_of_its_table():
    text = text_of("README.md")
    row = r"^\|.*\|.*\| ([\d.]+) M.* \| ([\d.]+) M.* \| −[\d.]+% \|$"
    rows = re.findall(row, text, re.MULTILINE)
    bars = re.search(r"bar \[(.*)\]", text).group(1).split(",")

    assert len(rows) == len(bars)
    for (backprop, decoupled), bar in zip(rows, bars, strict=True):
        assert float(bar) == pytest.approx(100 * float(decoupled) / float(backprop), abs=0.06)

def test_the_readme_quotes_the_memory_and_the_picture_of_the_demo(small, capsys):
    block, = [text for text in text_of("README.md").split("```") if "▁" in text]
    quoted = [line for line in block.splitlines() if "MiB" in line]

    assert ds.main("--epochs 1 --max-steps 1 --device cpu".split()) == 0     # memory comes first

    printed = capsys.readouterr().out.splitlines()
    assert len(quoted) == 6
    for line in quoted:
        start = re.match(r" *\w.*?(?=  |[▁-█])", line).group()
        same_row, = [other for other in printed if other.startswith(start)]
        assert len(line) == len(same_row)
        numbers, expected = ([float(n) for n in re.findall(r"-?\d+\.\d+", text)]
                             for text in (line, same_row))
        assert numbers == pytest.approx(expected, rel=0.02)

def test_the_snippet_on_compute_prints_the_operations_of_the_literature(capsys):
    exec(python_in("NOTES.md", "FlopCounterMode"), {})

    network, auxiliary = map(float, capsys.readouterr().out.split())
    assert network == pytest.approx(2 * 40.8, rel=0.01)         # He et al.: 40.8 million
    # One block from 32x16x16 to 64x8x8 (two 3x3 convolutions), 2x2 pooling, 10 classes.
    by_hand = 2 * 9 * (32 * 64 + 64 * 64) * 8 * 8 + 2 * 64 * 4 * 10
    assert auxiliary == pytest.approx(by_hand / 1e6)

def test_the_snippet_on_checkpointing_shows_what_it_saves(capsys):
    code = python_in("NOTES.md", "checkpoint_sequential")
    code = code.replace("resnet_layers(110", "resnet_layers(44").replace("(128, 1)", "(8, 1)")
    call = "checkpoint_sequential(host[0].body, 8, x, use_reentrant=False)"
    assert call in code

    exec(code, {})
    exec(code.replace(call, "host(x)"), {})

    saved, plain = map(float, capsys.readouterr().out.split())
    assert 1 < saved < 0.6 * plain

def test_the_snippet_that_loads_half_a_checkpoint_answers_like_the_client(
        tmp_path, monkeypatch, small, capsys):
    monkeypatch.chdir(tmp_path)
    assert ds.main([*TINY, "--checkpoint", "run.pt", "--log", "log"]) == 0
    capsys.readouterr()

    exec(python_in("NOTES.md", "run.pt"), {})

    accuracy = float(capsys.readouterr().out)
    assert accuracy == pytest.approx(log_of(tmp_path / "log")[-1]["aux_accuracy"])

def test_the_snippet_with_an_own_network_and_data_set_trains_both_modes(monkeypatch, capsys):
    code = python_in("NOTES.md", "load_squares")
    monkeypatch.setattr(ds, "resnet_layers", ds.resnet_layers)      # restored afterwards
    monkeypatch.setitem(ds.DATA_SETS, "squares", None)
    assert '"epochs": 3' in code

    exec(code, {})

    out = capsys.readouterr().out
    accuracy = next(line for line in out.splitlines() if line.startswith("test accuracy"))
    assert all(float(cell) > 90 for cell in accuracy.split()[-3:-1])

def test_the_plain_command_prints_the_table_and_the_picture(plain_command):
    out, err = plain_command.communicate(timeout=120)

    assert plain_command.returncode == 0
    lines = out.splitlines()
    assert lines[0].split() == ["backprop", "decoupled", "change"]
    down = next(line for line in lines if line.startswith("sent per epoch, down, MB"))
    z = 2 * 32 * 32 * 16 * 16 * 4
    assert down.split()[-3:] == [f"{z / 1e6:.2f}", "0.00", "-100.0%"]

    rows = {tuple(line.split()[:2]): line for line in lines[-6:]}
    assert set(rows) == {(mode, name) for mode in MODES for name in ("client", "server", "both")}
    bars = {key: line[17:77] for key, line in rows.items()}
    assert "█" in bars["backprop", "both"]
    # The server's fullest moment finds the client of backprop full and that of decoupled empty.
    for mode, full in (("backprop", True), ("decoupled", False)):
        client, server = bars[mode, "client"], bars[mode, "server"]
        assert (client[server.index(max(server))] > "▃") == full
    peaks = {key: float(line.split()[-2]) for key, line in rows.items()}
    assert peaks["decoupled", "both"] < 0.8 * peaks["backprop", "both"]
    epochs = [line for line in err.splitlines() if "epoch" in line]
    assert [re.sub(r"(epoch \d/\d).*", r"\1", line) for line in epochs] == [
        f"{mode} epoch 1/1" for mode in MODES]


# ---- the benchmark: python test_decoupled_split.py -----------------------------------

def benchmark(steps=40):
    """Print the median milliseconds of a training step of ResNet-20 with batches of 128 images.

    An uncut loop in plain PyTorch, and both protocols with and without --amp, take turns
    on the same batches. The batch itself is timed apart.
    """
    torch.set_num_threads(os.cpu_count())
    images, labels = ds.synthetic(0)[0]
    whole = uncut(20)
    sgd, schedule = oracle_sgd(whole.parameters(), 10_000)

    def plain(x, y):
        loss = F.cross_entropy(whole(x), y)
        loss.backward()
        sgd.step()
        sgd.zero_grad()
        schedule.step()
        return loss.item()

    loops = {"uncut": plain}
    for amp in (False, True):
        for mode in MODES:
            parties = make_parties(mode, 10_000, depth=20, amp=amp)

            def loop(x, y, mode=mode, parties=parties, channel=ds.Channel()):
                train(mode, parties, channel, [(x, y)])

            loops[mode + (" --amp" if amp else "")] = loop

    times = {name: [] for name in ["batch", *loops]}
    data_set = ds.DATA_SETS["cifar10"]
    generator = torch.Generator().manual_seed(0)
    stream = itertools.chain.from_iterable(
        ds.training_batches(images, labels, 128, data_set, generator) for _ in itertools.count())
    for _ in range(steps):
        start = time.perf_counter()
        batch = next(stream)
        times["batch"].append(time.perf_counter() - start)
        for name, loop in loops.items():
            start = time.perf_counter()
            loop(*batch)
            times[name].append(time.perf_counter() - start)

    for name, seconds in times.items():
        middle = sorted(seconds[5:])[(steps - 5) // 2]
        print(f"{name:16}{1000 * middle:8.1f} ms per step{128 / middle:9.0f} images/s")

if __name__ == "__main__":
    benchmark()
