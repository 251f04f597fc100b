"""Tests of decoupled_split.py: what it computes against plain PyTorch, torchvision, the allocator,
two real processes, or numbers worked out by hand. No network; about 40 seconds on two cores."""
import copy
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from dataclasses import fields
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from torch.utils._pytree import tree_leaves
from torchvision import datasets

import decoupled_split as ds

torch.set_num_threads(1)    # small tensors, and sums in the same order in every process
HERE, CPU, MODES = Path(__file__).parent, torch.device("cpu"), ["backprop", "decoupled"]
STEP = {"backprop": ds.backprop_step, "decoupled": ds.decoupled_step}
TRAIN, TEST = ds.synthetic(0, (64, 32))
BATCHES = list(ds.batches(*TRAIN, 16))
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME":
       "lo0" if sys.platform == "darwin" else "lo", "PYTHONPATH": str(HERE)}
MODULES = [("deep", 1, 1), ("middle", 1, 1), ("shallow", 1, 1), ("deep", 3, 2), ("middle", 3, 2),
           ("shallow", 2, 3)]

def make(mode, sets=(TRAIN, TEST), **changes):
    config = {"depth": 8, "batch_size": 16, "epochs": 1, "lr": 0.05}
    run = ds.Run(ds.Config(**{**config, "mode": mode, **changes}), *sets, CPU)
    for m in [*run.client, *run.server]:        # the full rate from the first step on
        m.schedule = torch.optim.lr_scheduler.ConstantLR(m.optimizer, 1.0)
        m.optimizer.param_groups[0]["lr"] = run.config.lr
    return run

def train(run, batches=BATCHES[:3]):
    return [STEP[run.config.mode](*parties(run), run.channel, x, y) for x, y in batches]

def parties(run):
    return run.client, run.server

def weights(*modules):
    return [t.clone() for module in modules for t in module.state_dict().values()]

def kept(party):
    """What stays between two batches: weights, buffers, momentum."""
    return [t for m in party for t in (*m.state_dict().values(), *(
        t for state in m.optimizer.state.values() for t in state.values() if torch.is_tensor(t)))]

def same(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))

def size(tensors):
    return sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors)

def uncut(depth, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(*ds.resnet_layers(depth, 10)).to(memory_format=torch.channels_last)

@pytest.fixture
def small(monkeypatch):
    """64 synthetic images instead of 2560."""
    whole = ds.synthetic
    monkeypatch.setattr(ds, "synthetic", lambda seed: whole(seed, (64, 32)))

@pytest.fixture
def refused(capsys, small):
    """Runs main, expects exit code 2 and one line on stderr, and returns the line."""
    def run(*argv):
        assert ds.main([str(a) for a in argv]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and "Traceback" not in lines[0]
        return lines[0]
    return run

@pytest.fixture(scope="module", autouse=True)
def plain_command(tmp_path_factory):
    """The command of the README, shortened, running beside the first tests."""
    argv = [sys.executable, HERE / "decoupled_split.py", *"--max-steps 2 --epochs 1".split()]
    process = subprocess.Popen(argv, cwd=tmp_path_factory.mktemp("plain"), text=True, env=ENV,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()

# ---- model and cut ------------------------------------------------------------------------------
@pytest.mark.parametrize("depth, count", [(20, 269_722), (110, 1_727_962)])
def test_parameters_are_as_many_as_in_the_literature(depth, count):
    client, server = ds.cut_network(ds.Config(depth=depth, mode="backprop"))
    assert sum(p.numel() for m in client + server for p in m.parameters()) == count

@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cut, clients, servers", MODULES)
def test_cutting_keeps_every_layer_once_in_order_with_its_weights(mode, cut, clients, servers):
    client, server = ds.cut_network(ds.Config(mode=mode, depth=20, cut=cut, client_modules=clients,
                                              server_modules=servers, seed=3))
    assert [len(client), len(server)] == [clients, servers]
    modules = client + server
    layers = [layer for m in modules for layer in m.body] + [modules[-1].head]
    assert [type(a) for a in layers] == [type(b) for b in uncut(20)]
    assert same(weights(*layers), weights(*uncut(20, seed=3)))
    assert not same(weights(*layers), weights(*uncut(20, seed=4)))
    assert all((m.head is None) == (mode == "backprop") for m in modules[:-1])

def test_client_holds_a_quarter_a_third_or_half_of_the_layers():
    def runs(depth, cut, servers=1):
        config = ds.Config(depth=depth, cut=cut, server_modules=servers)
        return [[len(m.body) for m in party] for party in ds.cut_network(config)]
    assert [runs(20, cut)[0] for cut in ("shallow", "middle", "deep")] == [[4], [5], [7]]
    assert [runs(8, cut)[0] for cut in ("shallow", "middle", "deep")] == [[2], [3], [4]]
    assert [runs(110, cut)[0] for cut in ("shallow", "middle", "deep")] == [[15], [20], [29]]
    assert runs(110, "shallow", 3) == [[15], [15, 15, 13 - 1]]     # the last head is a layer too

@pytest.mark.parametrize("depth, cut, shape", [
    (110, "deep", (32, 16, 16)), (110, "middle", (16, 32, 32)), (110, "shallow", (16, 32, 32)),
    (20, "deep", (32, 16, 16)), (8, "shallow", (16, 32, 32))])
def test_shape_of_the_smashed_data(depth, cut, shape):
    client, _ = ds.cut_network(ds.Config(depth=depth, cut=cut))
    assert client[0](torch.zeros(2, 3, 32, 32)).shape == (2, *shape)

def test_block_is_the_residual_block_of_the_paper():
    block, x = ds.Block(4, 8).eval(), torch.randn(2, 4, 6, 6)
    for bn in (block.bn1, block.bn2):
        bn.running_mean.normal_(), bn.running_var.uniform_(1, 2)
    y = F.conv2d(x, block.conv1.weight, stride=2, padding=1)
    y = F.conv2d(block.bn1(y).clamp_min(0), block.conv2.weight, padding=1)
    shortcut = torch.cat([x[:, :, ::2, ::2], torch.zeros(2, 4, 3, 3)], 1)   # option A
    torch.testing.assert_close(block(x.clone()), (block.bn2(y) + shortcut).clamp_min(0))

@pytest.mark.parametrize("depth, widths", [(1, [64]), (2, [32, 64]), (3, [32, 64, 64]),
                                           (5, [32, 32, 64, 64, 64]), (9, [32, 32, 64, 64, 64])])
def test_auxiliary_blocks_take_their_widths_from_the_blocks_that_follow(depth, widths):
    # 7 layers are the stem and blocks of 16, 16, 16, 32: 32, 32, 64, 64, 64 follow.
    head = ds.auxiliary_classifier(ds.resnet_layers(20, 10), 7, depth, 10)
    assert [b.c_out for b in head if isinstance(b, ds.Block)] == widths
    blocks, linear, z = head[:len(widths)], head[-1], torch.randn(2, 32, 16, 16)
    pooled = F.avg_pool2d(blocks(z.clone()), 4)                 # (2, 64, 8, 8) -> (2, 64, 2, 2)
    torch.testing.assert_close(head(z), pooled.reshape(2, 256) @ linear.weight.t() + linear.bias)

def test_auxiliary_widths_come_from_any_layer_that_says_c_out():
    class Wide(torch.nn.Conv2d):        # another network's layers: no Block among them
        c_out = 24
    layers = [torch.nn.Conv2d(3, 12, 3), Wide(12, 24, 3), ds.classifier(24, 1, 10)]
    layers[0].c_out = 12
    blocks = [b for b in ds.auxiliary_classifier(layers, 1, 1, 10) if isinstance(b, ds.Block)]
    assert [(b.conv1.in_channels, b.c_out) for b in blocks] == [(12, 24)]

def test_auxiliary_depth_0_is_one_linear_layer_on_z_pooled_to_4x4():
    head = ds.auxiliary_classifier(ds.resnet_layers(20, 10), 7, 0, 10)
    z = torch.randn(2, 32, 16, 16)
    weight, bias = head.parameters()
    oracle = F.avg_pool2d(z, 4).reshape(2, 32 * 16) @ weight.t() + bias
    torch.testing.assert_close(head(z), oracle)

def test_auxiliary_classifier_is_the_plain_one_where_no_block_follows():
    _, server = ds.cut_network(ds.Config(depth=8, server_modules=3, aux_depth=2))
    assert [len(m.body) for m in server] == [1, 1, 0]       # block, block, and only the classifier
    assert [type(layer) for layer in server[0].head].count(ds.Block) == 1
    assert [tuple(p.shape) for p in server[1].head.parameters()] == [(10, 64 * 16), (10,)]

# ---- the two protocols --------------------------------------------------------------------------
@pytest.mark.parametrize("cut, clients, servers", MODULES)
def test_backprop_mode_trains_as_the_uncut_network_does(cut, clients, servers):
    run = make("backprop", depth=20, cut=cut, client_modules=clients, server_modules=servers)
    whole, grads, losses = uncut(20), {}, []
    sgd = torch.optim.SGD(whole.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    mine = [p for party in parties(run) for p in party.parameters()]
    for p in mine:
        p.register_post_accumulate_grad_hook(
            lambda p: grads.setdefault(p, []).append(p.grad.clone()))
    assert same(mine, list(whole.parameters()))
    for n, (x, y) in enumerate(BATCHES[:2]):
        losses += train(run, [(x, y)])
        sgd.zero_grad()
        loss = F.cross_entropy(whole(x), y)
        loss.backward()
        for a, b in zip(mine, whole.parameters()):
            torch.testing.assert_close(grads[a][n], b.grad, rtol=1e-4, atol=1e-6)
        sgd.step()
        assert losses[n] == {"server": pytest.approx(loss.item(), rel=1e-5)}
    for a, b in zip(weights(*parties(run)), weights(whole)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert all(len(g) == 2 for g in grads.values())

def test_each_local_module_learns_from_its_own_loss_alone():
    run = make("decoupled", depth=14, client_modules=2, server_modules=2, aux_depth=1)
    chain = [copy.deepcopy((m.body, m.head)) for party in parties(run) for m in party]
    opts = [torch.optim.SGD([*body.parameters(), *head.parameters()], 0.05, momentum=0.9,
                            nesterov=True, weight_decay=5e-4) for body, head in chain]
    for x, y in BATCHES[:3]:
        losses, h = [], x
        for (body, head), opt in zip(chain, opts):
            opt.zero_grad()
            out = body(h)
            losses.append(F.cross_entropy(head(out), y))
            losses[-1].backward()
            opt.step()
            h = out.detach().clone()
        oracle = {"client": losses[1].item(), "server": losses[3].item()}
        assert train(run, [(x, y)])[0] == pytest.approx(oracle, rel=1e-5)
    assert ds.train_locally(copy.deepcopy(run.client), *BATCHES[0])[0].grad_fn is None
    for a, b in zip(weights(*parties(run)), weights(*(part for pair in chain for part in pair))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

class WrongLabels(ds.Channel):
    def receive(self, direction, kind):
        tensor = super().receive(direction, kind)
        return 9 - tensor if kind == "labels" else tensor

INTERFERENCE = {
    "weights": lambda run: [p.data.mul_(3) for p in run.server.parameters()],
    "loss": lambda run: setattr(run, "channel", WrongLabels()),
    "learning rate": lambda run: [m.optimizer.param_groups[0].update(lr=5) for m in run.server],
    "no step": lambda run: [setattr(m, "update", lambda: None) for m in run.server]}

@pytest.mark.parametrize("what", INTERFERENCE)
def test_decoupled_client_never_hears_from_the_server(what):
    for mode, deaf in (("decoupled", True), ("backprop", False)):   # backprop: the test can fail
        quiet, disturbed = make(mode), make(mode)
        INTERFERENCE[what](disturbed)
        train(quiet), train(disturbed)
        assert same(weights(quiet.client), weights(disturbed.client)) == deaf
        assert not same(weights(quiet.server), weights(disturbed.server))
        assert (quiet.channel.bytes["down"]["gradients"] == 0) == deaf

@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wire", ["float32", "bfloat16", "uint8"])
def test_what_the_server_receives_has_no_way_back_to_the_client(mode, wire):
    got = []

    class Spy(ds.Channel):
        def send(self, tensor, direction, kind):
            got.append([direction, kind, tensor.untyped_storage().data_ptr(), tensor])
            super().send(tensor, direction, kind)

        def receive(self, *route):
            tensor = super().receive(*route)
            sent = next(s for s in got if tuple(s[:2]) == route)
            assert tensor.grad_fn is None and not tensor.requires_grad
            assert tensor.untyped_storage().data_ptr() != sent[2] and tensor.shape == sent[3].shape
            return tensor

    run = make(mode, wire=wire)
    run.channel = Spy(wire)
    train(run, BATCHES[:1])
    assert [s[1] for s in got] == ["activations", "labels"] + ["gradients"] * (mode == "backprop")

@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [1, 2])
def test_every_parameter_has_one_optimizer_gets_a_gradient_and_moves(mode, count):
    run = make(mode, depth=14, client_modules=count, server_modules=count, weight_decay=0)
    modules, moved, steps = [m for party in parties(run) for m in party], set(), []
    owned = [p for m in modules for group in m.optimizer.param_groups for p in group["params"]]
    everything = [p for party in parties(run) for p in party.parameters()]
    assert len(owned) == len(everything) and set(owned) == set(everything)
    for p in everything:
        assert p.requires_grad
        p.register_post_accumulate_grad_hook(lambda p: p.grad.abs().sum() > 0 and moved.add(p))
    for m in modules:
        m.optimizer.register_step_post_hook(lambda optimizer, *_: steps.append(optimizer))
    before = [p.detach().clone() for p in everything]
    for n in range(1, 3):
        train(run, BATCHES[n:n + 1])
        assert [steps.count(m.optimizer) for m in modules] == [n] * len(modules)
        assert all(p.grad is None for p in everything)
    assert moved == set(everything)
    assert not any(map(torch.equal, everything, before))

def test_a_module_without_a_weight_trains_too():
    run = make("backprop", depth=8, client_modules=4)       # conv, bn, relu, block
    assert not list(run.client[2].parameters())
    train(run)

def test_a_party_clock_runs_only_while_it_works():
    (client, server), start = parties(make("decoupled")), time.perf_counter()
    for _ in range(2):
        with client.working():
            time.sleep(0.03)
        time.sleep(0.03)
    assert 0.06 <= client.seconds <= time.perf_counter() - start - 0.06 and server.seconds == 0

@pytest.mark.parametrize("mode", MODES)
def test_amp_computes_in_bfloat16_on_float32_weights(mode):
    plain, amp, seen = make(mode), make(mode, amp=True), set()
    for m in [*amp.client, *amp.server]:
        m.body[-1].register_forward_hook(lambda *_: seen.add(torch.is_autocast_enabled("cpu")))
    a, b = train(plain, BATCHES[:1])[0], train(amp, BATCHES[:1])[0]
    assert seen == {True} and a != b and a == pytest.approx(b, rel=0.02)
    assert all(p.dtype == torch.float32 for party in parties(amp) for p in party.parameters())

@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wire", ["float32", "uint8"])
def test_the_parts_train_a_model_that_is_no_resnet(mode, wire):
    torch.manual_seed(0)
    x, ledger, channel = torch.randn(64, 8), ds.Ledger(), ds.Channel(wire)
    y = (x @ torch.randn(8, 3)).argmax(1)
    head = nn.Linear(16, 3) if mode == "decoupled" else None
    parts = [ds.LocalModule([nn.Linear(8, 16), nn.ReLU()], head),
             ds.LocalModule([nn.Linear(16, 16), nn.ReLU()], nn.Linear(16, 3))]
    for m in parts:
        m.optimizer = torch.optim.SGD(m.parameters(), 0.3)
        m.schedule = torch.optim.lr_scheduler.ConstantLR(m.optimizer, 1.0)
    pair = [ds.Party(name, [m], ledger) for name, m in zip(("client", "server"), parts)]
    with ledger:
        losses = [STEP[mode](*pair, channel, x, y) for _ in range(60)]
    assert all(losses[-1][name] < losses[0][name] / 2 for name in losses[0])
    assert ledger.figures()["client_peak"] > 64 * 16 * 4

# ---- channel ------------------------------------------------------------------------------------
Z = torch.randn(5, 3, 4, 2)     # 120 numbers

@pytest.mark.parametrize("wire, direction, kind, tensor, classes, count", [
    ("float32", "up", "activations", Z, 10, 480), ("float32", "down", "gradients", Z, 10, 480),
    ("bfloat16", "up", "activations", Z, 10, 240), ("bfloat16", "down", "gradients", Z, 10, 240),
    ("uint8", "up", "activations", Z, 10, 120 + 3 * 8), ("uint8", "down", "gradients", Z, 10, 144),
    ("uint8", "evaluation", "activations", Z, 10, 144), ("float32", "up", "labels", None, 10, 5),
    ("uint8", "up", "labels", None, 100, 5), ("bfloat16", "up", "labels", None, 256, 5),
    ("uint8", "relay", "weights", Z, 10, 480),
    ("bfloat16", "relay", "weights", Z, 10, 480)])
def test_channel_counts_encoded_bytes_and_shares_nothing(
        wire, direction, kind, tensor, classes, count):
    source = torch.arange(5) + classes - 5 if tensor is None else tensor.clone()
    copy_, channel = source.clone(), ds.Channel(wire)
    sent = source.requires_grad_() * 1 if source.is_floating_point() else source
    for n in (1, 2):
        channel.send(sent, direction, kind)
        assert channel.bytes[direction][kind] == n * count
    assert sum(sum(kinds.values()) for kinds in channel.bytes.values()) == 2 * count
    out = channel.receive(direction, kind)
    assert out.shape == source.shape and out.grad_fn is None and not out.requires_grad
    assert out.dtype == (torch.int64 if kind == "labels" else tensor.dtype)
    if wire == "float32" or kind in ("labels", "weights"):
        assert torch.equal(out, copy_)
    out.fill_(77)
    assert torch.equal(sent, copy_) and torch.equal(source, copy_)
    assert not (channel.receive(direction, kind) == 77).all()
    channel.reset()
    assert not any(sum(kinds.values()) for kinds in channel.bytes.values())

def test_a_label_that_needs_more_than_one_byte_is_an_error():
    with pytest.raises(ValueError, match="256 classes"):
        ds.Channel().send(torch.tensor([3, 256]), "up", "labels")

def test_bfloat16_wire_rounds_as_torch_does():
    channel = ds.Channel("bfloat16")
    channel.send(Z, "up", "activations")
    assert torch.equal(channel.receive("up", "activations"), Z.bfloat16().float())

def test_uint8_wire_errs_by_half_a_step_of_the_channel_at_most():
    channel, z = ds.Channel("uint8"), torch.randn(64, 6, 5, 5) * torch.tensor(
        [1, 100, 1e-3, 1, 1, 1]).view(1, 6, 1, 1)
    z[:, 3], z[:, 4] = -7.25, 0.0           # constant channels
    z[:, 5] = -z[:, 5].abs() - 50           # all negative
    channel.send(z, "up", "activations")
    out = channel.receive("up", "activations")
    for c in range(6):
        step = (z[:, c].max() - z[:, c].min()).item() / 255
        error = (out[:, c] - z[:, c]).abs().max().item()
        assert error <= 0.5001 * step + 1e-6 * z[:, c].abs().max().item()
        assert step == 0 or error > 0.4 * step      # 8 bits, all in use

def test_channel_is_first_in_first_out_by_route():
    channel = ds.Channel()
    for n in range(3):
        channel.send(torch.full((1,), n), "up", "labels")
        channel.send(torch.full((1,), 10.0 + n), "up", "activations")
    assert [channel.receive("up", "activations").item() for _ in range(3)] == [10, 11, 12]
    assert [channel.receive("up", "labels").item() for _ in range(3)] == [0, 1, 2]

def test_an_epoch_of_cifar_counts_1638400000_bytes_up_and_twice_that_in_backprop():
    def send(channel, n):
        z = torch.zeros(()).expand(n, 32, 16, 16)
        channel.send(z, "up", "activations")
        channel.send(torch.zeros((), dtype=int).expand(n), "up", "labels")
        channel.send(z, "down", "gradients")
    full, large, last = ds.Channel(), ds.Channel("uint8"), ds.Channel("uint8")
    for n in [128] * 390 + [80]:
        send(full, n)
    assert full.bytes["up"] == {"activations": 1_638_400_000, "labels": 50_000}
    assert full.bytes["down"] == {"gradients": 1_638_400_000}
    send(large, 128), send(last, 80)        # 390 of one and one of the other
    tiny = sum(390 * large.bytes["up"][kind] + last.bytes["up"][kind] for kind in last.bytes["up"])
    assert tiny == 409_600_000 + 391 * 32 * 2 * 4 + 50_000 <= 0.126 * (2 * 1_638_400_000 + 50_000)

@pytest.mark.parametrize("mode", MODES)
def test_a_run_counts_the_bytes_of_an_epoch_whose_batches_differ_by_one(mode):
    run = make(mode, [(TRAIN[0][:50], TRAIN[1][:50]), TEST])
    for _ in range(2):      # counts are those of one epoch
        got = run.train_epoch()["bytes"]
        run.evaluate()
        z = 4 * 50 * 16 * 32 * 32
        assert got["up"] == {"activations": z, "labels": 50}
        assert got["down"] == {"gradients": z if mode == "backprop" else 0}
        assert got["evaluation"] == {"activations": 4 * 32 * 16 * 32 * 32}
        assert got["relay"] == {"weights": 0}

# ---- two real processes over a socket -----------------------------------------------------------
CASES = [("backprop", "float32"), ("decoupled", "float32"), ("backprop", "uint8"),
         ("decoupled", "bfloat16")]

class SocketChannel(ds.Channel):
    """Sends a payload's form, then the raw bytes of its tensors, and counts those that arrive."""

    def __init__(self, wire, peer):
        super().__init__(wire)
        self.peer, self.arrived = peer, {}

    @staticmethod
    def raw(tensor):
        return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)

    def push(self, payload, *route):
        dist.send_object_list([[(t.shape, t.stride(), t.dtype) for t in payload]], self.peer)
        for tensor in payload:
            dist.send(self.raw(tensor), self.peer)

    def pull(self, *route):
        forms = [None]
        dist.recv_object_list(forms, self.peer)
        payload = [torch.empty_strided(*form[:2], dtype=form[2]) for form in forms[0]]
        for tensor in payload:
            dist.recv(self.raw(tensor), self.peer)
            self.arrived[route] = self.arrived.get(route, 0) + len(self.raw(tensor))
        return payload

def one_party(rank, port, path):
    """What one of the two processes does: its own half of the protocols, written out."""
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", timedelta(seconds=30), 2, rank)
    result = []
    for mode, wire in CASES:
        run, channel = make(mode, wire=wire), SocketChannel(wire, 1 - rank)
        party = parties(run)[rank]
        run.client = run.server = None      # the other half is on the other machine
        for x, y in BATCHES:
            if rank == 0:
                if mode == "decoupled":
                    z, _ = ds.train_locally(party, x, y)
                else:
                    z = party(x)
                channel.send(z, "up", "activations")
                channel.send(y, "up", "labels")
                if mode == "backprop":
                    z.backward(channel.receive("down", "gradients"))
                    party.update()
            else:
                z, y = channel.receive("up", "activations"), channel.receive("up", "labels")
                if mode == "decoupled":
                    ds.train_locally(party, z, y)
                else:
                    F.cross_entropy(party[-1].head(party(z.requires_grad_())), y).backward()
                    party.update()
                    channel.send(z.grad, "down", "gradients")
        result.append((channel.arrived, kept(party)))
    torch.save(result, path)
    dist.destroy_process_group()

@pytest.mark.skipif(not dist.is_available(), reason="PyTorch without torch.distributed")
def test_two_processes_over_a_socket_get_the_counted_bytes_and_the_same_weights(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    code = "import test_decoupled_split as t; t.one_party({}, {}, {!r})"
    codes = [code.format(rank, port, str(tmp_path / str(rank))) for rank in (0, 1)]
    halves = [subprocess.Popen([sys.executable, "-c", c], cwd=tmp_path, env=ENV) for c in codes]
    try:
        assert [p.wait(timeout=60) for p in halves] == [0, 0]
    finally:
        for p in halves:
            p.kill()
            p.wait()
    results = [torch.load(tmp_path / str(rank), weights_only=True) for rank in (0, 1)]
    for n, (mode, wire) in enumerate(CASES):
        run = make(mode, wire=wire)
        train(run, BATCHES)
        arrived = {**results[0][n][0], **results[1][n][0]}
        counted = {(way, kind): count for way, kinds in run.channel.bytes.items()
                   for kind, count in kinds.items() if count}
        assert arrived == counted and len(arrived) == (3 if mode == "backprop" else 2)
        for rank, party in enumerate(parties(run)):
            assert same(results[rank][n][1], kept(party))

# ---- memory -------------------------------------------------------------------------------------
@pytest.fixture
def ledger():
    with ds.Ledger() as ledger:
        ledger.party = "client"
        yield ledger

def test_ledger_counts_a_storage_once_until_it_is_freed(ledger):
    a = torch.zeros(1000)
    assert ledger.live["client"] == 4000
    views = [a.view(10, 100), a[5:], a[None].expand(7, 1000), a.detach()]
    a.add_(1), F.relu(a, inplace=True), views[0].t().mul_(2)
    assert ledger.live["client"] == 4000
    b = a + 1
    assert ledger.live["client"] == 8000
    del a, b
    assert ledger.live["client"] == 4000        # the views keep their base
    views.clear()
    assert ledger.live["client"] == 0

@pytest.mark.parametrize("dtype, count", [(torch.bfloat16, 20), (torch.float32, 40),
                                          (torch.int64, 80), (torch.uint8, 10), (torch.bool, 10)])
def test_ledger_knows_the_size_of_a_number(ledger, dtype, count):
    a = torch.zeros(10).to(dtype, copy=True)
    assert ledger.live["client"] == count and a.dtype == dtype

def test_ledger_counts_what_is_saved_for_backward_until_backward(ledger):
    w = torch.ones(1000, requires_grad=True)
    y = w.exp()             # saves its result
    loss = y.sum()
    del y
    assert ledger.live["client"] == 4000 + 4000 + 4
    loss.backward()
    assert ledger.live["client"] == 4000 + 4 + 4000      # w, loss, w.grad
    w.grad = None
    assert ledger.live["client"] == 4000 + 4

def test_ledger_charges_the_party_at_work_and_nobody_when_none_works(ledger):
    a = torch.zeros(10)
    ledger.party = "server"
    b = torch.zeros(20)
    ledger.party = None
    c = torch.zeros(40)
    ledger.party = "client"
    b += 1
    c = c[1:]
    assert ledger.live == {"client": 40, "server": 80}
    del a
    assert ledger.live == {"client": 0, "server": 80}

def test_ledger_adds_a_tensor_once():
    ledger, a, b = ds.Ledger(), torch.zeros(10), torch.zeros(5, dtype=torch.int64)
    ledger.add("client", [a, a, a[3:]])
    ledger.add("server", [a.view(2, 5), b])
    assert ledger.live == {"client": 40, "server": 40}
    with ledger:
        ledger.party = "server"
        c = a[1:].mul_(2)
    assert ledger.live == {"client": 40, "server": 40} and c._base is a
    del a, b, c
    assert ledger.live == {"client": 0, "server": 0}

def test_ledger_figures_and_picture_of_a_step_worked_out_by_hand():
    with ds.Ledger() as ledger:
        ledger.party = "client"
        a, b = torch.zeros(1000), torch.zeros(200)
        del a
        ledger.party = "server"
        c = torch.zeros(900)
        d = torch.zeros(400)
        del b, c
        e = torch.zeros(1)
        del d, e
    assert ledger.figures(5) == {
        "client_peak": 4800, "server_peak": 5200, "host_peak": 6000, "client_held": 0,
        "picture": [[4000, 4800, 800, 800, 0], [0, 0, 3600, 5200, 1604]]}
    assert [[max(row), len(row)] for row in ledger.figures()["picture"]] == [[4800, 60], [5200, 60]]

def watched_step(run, batch):
    """Static bytes and the figures of a step that begins with momentum in place."""
    for party in parties(run):
        for p, m in ((p, m) for m in party for p in m.parameters()):
            m.optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        run.ledger.add(party.name, kept(party))
    static = dict(run.ledger.live)
    with run.ledger:
        train(run, [batch])
    assert run.ledger.live == static        # everything else is freed
    return static, run.ledger.figures()

@pytest.mark.parametrize("wire", ["float32", "uint8"])
def test_while_the_client_goes_backward_the_server_keeps_nothing_of_the_batch(wire):
    run = make("backprop", wire=wire)
    static, _ = watched_step(run, BATCHES[0])
    who, _, server = zip(*run.ledger.trace)
    end = len(who) - who[::-1].index("server")
    received = 1 if wire == "float32" else 2        # operators that decode what is still queued
    assert set(server[end + received:]) == {static["server"]} and len(server) > end + 20

def static_bytes(party):
    return size(party.state_dict().values()) + size(party.parameters())      # and momentum

@pytest.mark.parametrize("mode", MODES)
def test_ledger_peak_is_that_of_the_cpu_allocator(mode):
    run = make(mode, depth=20, batch_size=8)
    static, figures = watched_step(run, BATCHES[0])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                profile_memory=True) as profile:
        train(run, BATCHES[:1])
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    assert level == 0 and sum(static.values()) == sum(map(static_bytes, parties(run)))
    assert 0.97 * peak < figures["host_peak"] - sum(static.values()) <= peak     # less: scratch

@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("mode", MODES)
def test_ledger_peak_is_that_of_the_cuda_allocator(mode):
    cuda = torch.device("cuda")
    x, y = (t.to(cuda) for t in next(ds.batches(*ds.synthetic(0, (128, 1))[0], 128)))
    run = ds.Run(ds.Config(depth=20, mode=mode), (TRAIN[0].to(cuda), TRAIN[1].to(cuda)), TEST, cuda)
    train(run, [(x, y)])        # cuDNN's workspace
    static, figures = watched_step(run, (x, y))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    train(run, [(x, y)])
    peak = torch.cuda.max_memory_allocated() - before + sum(static.values())
    assert figures["host_peak"] == pytest.approx(peak, rel=0.05)

@pytest.mark.parametrize("wire", ["float32", "bfloat16", "uint8"])
def test_decoupled_client_holds_only_its_static_state_while_the_server_works(wire):
    held = {}
    for mode in MODES:
        run = make(mode, wire=wire)
        static, figures = watched_step(run, BATCHES[0])
        assert static == {party.name: static_bytes(party) for party in parties(run)}
        held[mode] = figures["client_held"] - static["client"]
    assert held["decoupled"] == 0
    assert held["backprop"] > 16 * 5 * 16 * 32 * 32 * 4     # at least 5 activations of a batch

@pytest.mark.parametrize("max_steps", [0, 1])
def test_the_reported_bytes_held_are_weights_buffers_and_momentum(max_steps):
    run = make("decoupled", max_steps=max_steps)
    assert run.train()["memory"]["client_held"] == static_bytes(run.client)

def test_client_modules_cut_the_peak_of_the_client():
    runs = [make("decoupled", depth=20, client_modules=n, aux_depth=0) for n in (1, 7)]
    one, seven = (watched_step(run, BATCHES[0])[1]["client_peak"] for run in runs)
    assert seven < 0.5 * one

@pytest.mark.parametrize("cut, servers, saving", [("deep", 1, 28.8), ("middle", 2, 43.7),
                                                  ("shallow", 3, 58.7)])
def test_host_peak_savings_of_resnet_110_reach_the_58_percent_of_the_paper(cut, servers, saving):
    peaks = []
    for mode in MODES:      # batch 8 shows 128: beyond the static state bytes grow with the batch
        run = make(mode, depth=110, cut=cut, server_modules=servers, aux_depth=0)
        static, figures = watched_step(run, (BATCHES[0][0][:8], BATCHES[0][1][:8]))
        peaks.append(sum(static.values()) + 16 * (figures["host_peak"] - sum(static.values())))
    assert 100 * (1 - peaks[1] / peaks[0]) == pytest.approx(saving, abs=1)

# ---- data ---------------------------------------------------------------------------------------
def test_crops_are_those_of_torchvision():
    g = torch.Generator().manual_seed(1)
    images = torch.randint(256, (12, 3, 40, 40), dtype=torch.uint8, generator=g)
    top, left = torch.randint(9, (2, 12), generator=g)
    top[0], left[0], top[1], left[1] = 0, 8, 8, 0
    for n, window in enumerate(ds.crop(images, top, left)):
        assert torch.equal(window, TF.crop(images[n], top[n], left[n], 32, 32))

def test_training_images_are_random_windows_of_the_padded_image_half_of_them_flipped():
    g = torch.Generator().manual_seed(1)
    images = torch.randint(256, (200, 3, 32, 32), dtype=torch.uint8, generator=g)
    seen, windows = [], list(itertools.product(range(9), range(9), (0, 1)))     # top, left, flip
    for x, y in ds.batches(images, torch.arange(200), 64, g):
        assert x.dtype == torch.float32 and x.shape[1:] == (3, 32, 32)
        for got, n in zip((x * 64 + 128).to(torch.uint8), y):
            padded = TF.pad(images[n], 4)
            all_ = torch.stack([TF.crop(padded, t, le, 32, 32) for t, le, flip in windows if flip])
            match = (torch.stack([all_, TF.hflip(all_)], 1).flatten(0, 1) == got).flatten(1).all(1)
            assert match.sum() == 1
            seen.append(windows[match.nonzero().item()])
    tops, lefts, flips = zip(*seen)
    assert set(tops) == set(lefts) == set(range(9)) and 60 < sum(flips) < 140 and len(seen) == 200

def test_batches_hold_every_image_once_and_differ_by_seed_alone():
    def epoch(seed, labels=torch.arange(50)):
        g = torch.Generator().manual_seed(seed)
        return list(ds.batches(TRAIN[0][:50], labels, 16, g))
    a, b, c = epoch(1), epoch(1), epoch(2)
    assert [len(y) for _, y in a] == [13, 13, 12, 12]
    for stream in (a, c):
        order = torch.cat([y for _, y in stream])
        assert order.sort().values.tolist() == list(range(50)) != order.tolist()
    assert all(same(p, q) for p, q in zip(a, b))
    assert not any(torch.equal(p[1], q[1]) for p, q in zip(a, c))

def test_both_modes_see_the_same_stream_and_another_one_in_each_epoch(monkeypatch):
    seen = {}
    for mode in MODES:
        def spy(client, server, channel, x, y, mode=mode):
            seen.setdefault((mode, run.epoch), []).append((x, y))
            return STEP[mode](client, server, channel, x, y)
        monkeypatch.setattr(ds, f"{mode}_step", spy)
        run = make(mode, [(TRAIN[0][:40], TRAIN[1][:40]), TEST])
        for run.epoch in (0, 1):
            run.train_epoch()
    for epoch in (0, 1):
        a, b = seen["backprop", epoch], seen["decoupled", epoch]
        assert [len(y) for _, y in a] == [14, 13, 13] and all(same(p, q) for p, q in zip(a, b))
    assert not any(same(p, q) for p, q in zip(seen["backprop", 0], seen["backprop", 1]))

def test_synthetic_images_depend_on_the_seed_alone():
    a, b, c = ds.synthetic(5, (40, 20)), ds.synthetic(5, (40, 20)), ds.synthetic(6, (40, 20))
    for (x, y), (x2, y2), (x3, _), n in zip(a, b, c, (40, 20)):
        assert x.shape == (n, 3, 32, 32) and x.dtype == torch.uint8 and y.dtype == torch.int64
        assert torch.equal(x, x2) and torch.equal(y, y2) and not torch.equal(x, x3)
    assert not torch.equal(a[0][0][:20], a[1][0])       # the test images are others

@pytest.mark.parametrize("n, size, sizes", [(50, 16, [13, 13, 12, 12]), (5000, 128, [125] * 40),
                                            (7, 8, [7]), (9, 8, [5, 4]), (3, 1, [1, 1, 1])])
def test_batches_are_equal_or_differ_by_one(n, size, sizes):
    images, labels = torch.zeros(n, 3, 32, 32, dtype=torch.uint8), torch.arange(n)
    for g in (None, torch.Generator()):
        assert [len(y) for _, y in ds.batches(images, labels, size, g)] == sizes

def test_a_linear_model_finds_little_in_the_synthetic_images():
    (x, y), (x_test, y_test) = [((x.flatten(1).float() - 128) / 64, y) for x, y in ds.synthetic(0)]
    assert set(y.tolist()) == set(y_test.tolist()) == set(range(10))
    model, loss = nn.Linear(3072, 10), math.inf
    adam = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(10):
        for index in torch.randperm(len(y)).split(100):
            adam.zero_grad()
            loss = F.cross_entropy(model(x[index]), y[index])
            loss.backward()
            adam.step()
    assert (model(x).argmax(1) == y).float().mean() > 0.3      # it has learned what it can
    assert (model(x_test).argmax(1) == y_test).float().mean() < 0.3

def write_cifar(folder, name, monkeypatch, packed):
    """A few random images laid out as the official archive. Returns what must be loaded."""
    cls = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    key = {"cifar10": "labels", "cifar100": "fine_labels"}[name]
    base, g = folder / cls.base_folder, torch.Generator().manual_seed(2)
    base.mkdir(parents=True)

    def write(filename, entry):
        (base / filename).write_bytes(pickle.dumps(entry))
        return filename, hashlib.md5((base / filename).read_bytes()).hexdigest()
    sets, classes = [], ds.CLASSES[name]
    for attribute in ("train_list", "test_list"):
        parts, listed = [], []
        for filename, _ in getattr(cls, attribute):
            data = torch.randint(256, (4, 3072), dtype=torch.uint8, generator=g)
            labels = torch.randint(classes, (4,), generator=g).tolist()
            listed.append(write(filename, {"data": data.numpy(), key: [*labels[:3], classes - 1]}))
            parts.append((data, [*labels[:3], classes - 1]))
        monkeypatch.setattr(cls, attribute, listed)
        sets.append((torch.cat([d for d, _ in parts]), sum((t for _, t in parts), [])))
    _, md5 = write(cls.meta["filename"], {cls.meta["key"]: [f"class {n}" for n in range(classes)]})
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": md5})
    if packed:
        archive = folder / cls.filename
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(base, cls.base_folder)
        shutil.rmtree(base)
        monkeypatch.setattr(cls, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
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
    loaded = ds.load(ds.parse(["--dataset", name, "--data-dir", str(tmp_path)]))
    for (data, labels), (x, y), n in zip(written, loaded, (20 if name == "cifar10" else 4, 4)):
        assert x.shape == (n, 3, 32, 32) and x.dtype == torch.uint8 and y.dtype == torch.int64
        assert x[2, 1, 5, 7] == data[2, 1 * 1024 + 5 * 32 + 7]      # green, row 5, column 7
        assert torch.equal(x, data.view(n, 3, 32, 32)) and y.tolist() == labels
    config = ds.Config(mode="decoupled", dataset=name, batch_size=4, depth=8, max_steps=1, epochs=1)
    run = ds.Run(config, *loaded, CPU)
    run.train_epoch()
    assert run.server[-1].head[-1].out_features == int(name[5:])

@pytest.mark.parametrize("damage", ["absent", "changed", "truncated", "no archive"])
def test_cifar_that_cannot_be_had_is_refused(damage, tmp_path, monkeypatch, offline, refused):
    write_cifar(tmp_path, "cifar10", monkeypatch, packed=True)
    archive = tmp_path / datasets.CIFAR10.filename
    content = archive.read_bytes()
    archive.write_bytes({"changed": content[:-1] + b"x", "truncated": content[:len(content) // 2],
                         "no archive": b"<html>", "absent": b""}[damage])
    if damage == "absent":
        archive.unlink()
    elif damage != "changed":
        md5 = hashlib.md5(archive.read_bytes()).hexdigest()
        monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", md5)
    line = refused("--dataset", "cifar10", "--data-dir", tmp_path)
    assert "--data-dir" in line and "--dataset synthetic" in line

# ---- training, evaluation, clients --------------------------------------------------------------
def test_accuracy_is_that_of_the_whole_network_in_evaluation_mode():
    test = ds.synthetic(1, (1, 250))[1]
    run = make("decoupled", [TRAIN, test], aux_depth=1, lr=0.1)
    train(run, BATCHES * 3)
    client, server = (copy.deepcopy(party).eval() for party in parties(run))
    x = (test[0].float() - 128) / 64
    with torch.no_grad():
        z = client[0].body(x)
        right = [(part.argmax(1) == test[1]).sum().item() for part in (
            server[0].head(server[0].body(z)), client[0].head(z),
            client.train()[0].head(client[0].body(x)))]
    assert len(set(right)) == 3         # else a mix-up would not show
    before, seen = weights(*parties(run)), []
    run.client.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    run.channel.reset()
    assert run.evaluate() == {"test_accuracy": right[0] / 250, "aux_accuracy": right[1] / 250}
    assert torch.equal(torch.cat(seen), x)      # as they are, in their order
    assert same(weights(*parties(run)), before)
    assert run.channel.bytes == {"up": {"activations": 0, "labels": 0}, "down": {"gradients": 0},
                                 "relay": {"weights": 0},
                                 "evaluation": {"activations": 250 * 16 * 32 * 32 * 4}}
    run.train_epoch()
    assert all(m.training for party in parties(run) for m in party.modules())

@pytest.mark.parametrize("mode", MODES)
def test_scores_that_are_not_finite_stop_the_run(mode):
    run = make(mode)
    run.server[-1].head[-1].bias.data[3] = math.nan
    with pytest.raises(ds.Refusal, match="not finite.*--lr"):
        run.evaluate()

@pytest.mark.parametrize("mode", MODES)
def test_memory_is_measured_on_a_full_batch_and_leaves_the_run_alone(mode):
    small = make(mode, [(TRAIN[0][:10], TRAIN[1][:10]), TEST])     # 10 images, batches of 16
    before = weights(*parties(small))
    memory = ds.measure_memory(small.config, CPU, small.shards[0])
    run = make(mode)
    assert memory == watched_step(run, BATCHES[0])[1]
    assert same(before, weights(*parties(small)))

def test_backprop_has_no_auxiliary_accuracy():
    assert make("backprop").evaluate()["aux_accuracy"] is None

@pytest.mark.parametrize("mode", MODES)
def test_the_client_part_travels_after_every_shard(mode, monkeypatch):
    relay = []

    def spy(client, server, channel, x, y):
        relay.append(dict(channel.bytes["relay"]))
        return STEP[mode](client, server, channel, x, y)
    monkeypatch.setattr(ds, f"{mode}_step", spy)
    run = make(mode, [(TRAIN[0][:60], TRAIN[1][:60]), TEST], clients=3, batch_size=8)
    assert all(torch.equal(run.shards[n][i], TRAIN[i][20 * n:20 * n + 20])
               for n in range(3) for i in (0, 1))
    total = run.train_epoch()["bytes"]["relay"]
    client = run.client
    once = size(client.state_dict().values()) + size(client.parameters())     # and momentum
    assert [r["weights"] / once for r in [*relay, total]] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]

@pytest.mark.parametrize("wire", ["float32", "uint8"])
def test_a_hand_over_changes_no_bit(wire):
    run = make("decoupled", wire=wire)
    train(run)
    party = run.client
    before = [tensor.clone() for tensor in kept(party)]
    sent = sum(run.channel.bytes["up"].values())
    ds.hand_over(party, run.channel)
    assert same(before, kept(party))
    assert sum(run.channel.bytes["up"].values()) == sent and len(before) > len(weights(party))

def test_learning_rate_follows_the_schedule_in_every_module():
    run = ds.Run(ds.Config(mode="decoupled", depth=14, lr=0.08, epochs=5, client_modules=2,
                           batch_size=16), TRAIN, TEST, CPU)
    rates = []
    for m in [*run.client, *run.server]:
        rates.append([])
        m.optimizer.register_step_pre_hook(
            lambda optimizer, *_, r=rates[-1]: r.append(optimizer.param_groups[0]["lr"]))
    for run.epoch in range(5):
        run.train_epoch()
    first = rates[0]
    assert len(rates) == 3 and all(r == first for r in rates) and len(first) == 5 * 4
    top = first.index(max(first))
    assert max(first) == pytest.approx(0.08) and first[0] < 0.01 and first[-1] < 0.08 / 1000
    assert 2 <= top <= 8 and first == sorted(first[:top]) + sorted(first[top:], reverse=True)

# ---- figures worked out -------------------------------------------------------------------------
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
@pytest.mark.parametrize("client, up_bytes, server", [
    (0.3, 2e6, 0.05), (0.01, 9e6, 0.02), (0.04, 1e6, 0.5), (0.1, 1.25e6, 0.1)])
@pytest.mark.parametrize("latency", [0, 35])
def test_seconds_over_the_link_are_those_of_a_simulation(mode, client, up_bytes, server, latency):
    steps, config = 7, ds.Config(mode=mode, bandwidth=80, latency=latency)      # 10 MB a second
    count = {"up": {"activations": 6 * up_bytes, "labels": up_bytes}, "down": {"gradients": 0},
             "relay": {"weights": 0}, "evaluation": {"activations": 1e12}}
    if mode == "backprop":
        count["down"]["gradients"] = 14 * up_bytes
    s = {"mode": mode, "bytes": count, "seconds": {"client": 7 * client, "server": 7 * server}}
    up = up_bytes / 1e7
    oracle = simulate(mode, steps, client, up, server, 2 * up, latency / 1e3)
    assert ds.link_seconds(config, s, steps, 0) == pytest.approx(oracle, rel=1e-6)
    count["relay"].update(weights=5e6)
    relay = 5e6 / 1e7 + 4 * latency / 1e3
    assert ds.link_seconds(config, s, steps, 4) == pytest.approx(oracle + relay, rel=1e-6)

def test_the_next_client_goes_on_with_what_was_received(monkeypatch):
    run = make("decoupled")
    train(run)
    before, decode = [tensor.clone() for tensor in kept(run.client)], run.channel.decode
    monkeypatch.setattr(run.channel, "decode", lambda *payload: decode(*payload) + 1)
    ds.hand_over(run.client, run.channel)
    assert same(kept(run.client), [tensor + 1 for tensor in before])

@pytest.mark.parametrize("clients, waits", [(1, 0), (2, 1), (4, 2)])
def test_only_the_hand_overs_that_took_place_wait_for_the_link(clients, waits):
    run = make("decoupled", clients=clients, max_steps=2, latency=1e6)      # of 4 batches
    assert run.train()["seconds"]["link_epoch"] == pytest.approx(1000 * (1 + waits), abs=100)

# ---- long runs ----------------------------------------------------------------------------------
LONG = "--mode decoupled --epochs 5 --batch-size 16 --device cpu".split()
TINY = "--mode decoupled --epochs 2 --max-steps 2 --batch-size 16 --device cpu".split()

def log_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]

def test_a_killed_run_goes_on_and_ends_with_the_same_bits(tmp_path, small):
    a, b, log = tmp_path / "a.pt", tmp_path / "b.pt", tmp_path / "b.jsonl"
    code = ("import decoupled_split as ds; whole = ds.synthetic;"           # `small` there too
            "ds.synthetic = lambda seed: whole(seed, (64, 32)); ds.main()")
    argv = [sys.executable, "-c", code, *LONG, "--checkpoint", b, "--log", log]
    process = subprocess.Popen(argv, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while not (log.exists() and log.read_text().endswith("\n")) and time.monotonic() < end:
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert 1 <= len(log_of(log)) < 5                        # it was interrupted
    assert torch.load(b, weights_only=True)["epoch"] < 5
    for path in (a, b):
        argv = [*LONG, "--checkpoint", str(path), "--log", str(path.with_suffix(".jsonl"))]
        assert ds.main(argv) == 0
    ends = [torch.load(path, weights_only=True) for path in (a, b)]
    states = [tree_leaves(end["state"]) for end in ends]
    assert len(states[0]) == len(states[1]) > 50
    assert all(torch.equal(p, q) if torch.is_tensor(p) else p == q for p, q in zip(*states))
    assert [(e["event"], e.get("epoch")) for e in log_of(log)] == [
        *(("epoch", n) for n in range(1, 6)), ("summary", None)]
    whole, resumed = log_of(tmp_path / "a.jsonl")[-1], log_of(log)[-1]
    for key in ("test_accuracy", "aux_accuracy", "train_loss", "bytes", "memory"):
        assert whole[key] == resumed[key]
    left = [p.name for p in tmp_path.iterdir() if not p.name.startswith("b.pt.")]   # of the killed
    assert sorted(left) == ["a.jsonl", "a.pt", "b.jsonl", "b.pt"]

def test_a_finished_run_started_again_trains_nothing_and_reports_the_same(tmp_path, small, capsys):
    argv = [*TINY, "--checkpoint", str(tmp_path / "run.pt"), "--log", str(tmp_path / "log")]
    assert ds.main(argv) == 0
    table, content = capsys.readouterr().out, (tmp_path / "run.pt").read_bytes()
    assert table.split()[0] == "decoupled" and "change" not in table    # nothing to compare with
    assert [len(line) for line in table.splitlines()[:15]] == [48] * 15
    assert ds.main(argv) == 0
    assert capsys.readouterr() == (table, "") and (tmp_path / "run.pt").read_bytes() == content
    events = log_of(tmp_path / "log")
    assert [e["event"] for e in events] == ["epoch", "epoch", "summary", "summary"]
    assert events[-1] == events[-2]

class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)

def flip_a_byte(path):
    """Damage the largest tensor of the file, whose place zipfile knows."""
    with zipfile.ZipFile(path) as file:
        entry = max(file.infolist(), key=lambda e: e.file_size)
    content = bytearray(path.read_bytes())
    content[entry.header_offset + 1000] ^= 1
    path.write_bytes(content)

@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(path.read_bytes()[:-1000]), flip_a_byte,
    lambda path: path.write_bytes(b""), lambda path: path.write_text("not a checkpoint\n" * 99),
    lambda path: torch.save(Evil(), path), lambda path: path.write_bytes(pickle.dumps(Evil())),
    lambda path: torch.save({"model": torch.zeros(3)}, path)], ids=[
        "truncated", "one bit", "empty", "text", "code in a zip", "code", "another program's"])
def test_a_damaged_checkpoint_is_refused_and_left_alone(
        damage, tmp_path, refused, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.pt"
    assert ds.main([*TINY, "--checkpoint", str(path)]) == 0
    capsys.readouterr()
    damage(path)
    content = path.read_bytes()
    assert "--checkpoint" in refused(*TINY, "--checkpoint", path)
    assert path.read_bytes() == content and [p.name for p in tmp_path.iterdir()] == ["run.pt"]

@pytest.mark.parametrize("change", [["--lr", "0.2"], ["--aux-depth", "0"], ["--mode", "backprop"],
                                    ["--depth", "14"], ["--seed", "1"], ["--epochs", "3"]])
def test_a_checkpoint_of_another_configuration_is_refused(change, tmp_path, refused, capsys):
    path = tmp_path / "run.pt"
    assert ds.main([*TINY, "--checkpoint", str(path)]) == 0
    capsys.readouterr()
    content = path.read_bytes()
    line = refused(*TINY, "--checkpoint", path, *change)
    assert "--checkpoint" in line and change[0] in line and change[1] in line
    assert path.read_bytes() == content

def test_a_bad_checkpoint_of_the_second_mode_is_found_before_the_first_one_trains(
        tmp_path, refused):
    (tmp_path / "run.decoupled.pt").write_text("not a checkpoint")
    line = refused(*TINY, "--mode", "compare", "--checkpoint", tmp_path / "run.pt")
    assert "run.decoupled.pt" in line       # and no line of an epoch before it

KEYS = """event mode dataset depth cut client_modules server_modules aux_depth wire clients epochs
batch_size seed device torch test_accuracy aux_accuracy train_loss bytes memory seconds
images_per_second""".split()
PARTS = {"bytes": {"up", "down", "relay", "evaluation"},
         "memory": {"client_peak", "server_peak", "host_peak", "client_held"},
         "seconds": {"epoch", "client", "server", "link_epoch"}}

def test_compare_logs_both_modes_and_keeps_a_checkpoint_of_each(tmp_path, small, capsys):
    log = tmp_path / "log"
    argv = [*TINY, "--mode", "compare", "--checkpoint", str(tmp_path / "run.pt"), "--log", str(log)]
    assert ds.main(argv) == 0
    events = log_of(log)
    assert [(e["event"], e.get("mode")) for e in events] == [
        *((event, mode) for mode in MODES for event in ("epoch", "epoch", "summary")),
        ("compare", None)]
    for n, mode in ((2, "backprop"), (5, "decoupled")):
        assert set(KEYS) <= set(events[n]) and events[n]["epochs"] == 2 and events[n]["depth"] == 20
        assert all(set(events[n][key]) >= names for key, names in PARTS.items())
        assert {**events[-1][mode], "event": "summary"} == events[n]
        assert 0 <= events[n]["test_accuracy"] <= 1 and events[n]["device"] == "cpu"
        assert (events[n]["aux_accuracy"] is None) == (mode == "backprop")
        assert events[n]["bytes"]["up"]["labels"] == 32
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["log", "run.backprop.pt", "run.decoupled.pt"]
    a, b = (events[n]["memory"]["host_peak"] / 2**20 for n in (2, 5))
    assert [f"{a:.2f}", f"{b:.2f}", f"{100 * b / a - 100:+.1f}%"] in [
        line.split()[-3:] for line in capsys.readouterr().out.splitlines()]

# ---- bad input ----------------------------------------------------------------------------------
BAD = """--depth 21, --depth 2, --depth -4, --client-modules 5, --server-modules 9 --depth 14,
    --lr x, --client-modules 0, --server-modules 0, --clients 65, --clients 0, --max-steps -1,
    --epochs 0, --epochs -1, --epochs nan, --batch-size 0, --batch-size -8, --batch-size nan,
    --lr 0, --lr -1, --lr nan, --bandwidth 0, --bandwidth -5, --bandwidth nan, --latency -1,
    --latency nan, --latency inf, --lr inf, --weight-decay -1, --weight-decay nan, --seed -1,
    --seed 99999999999999999999,
    --aux-depth -1, --mode both,
    --cut wide, --wire int4, --dataset mnist, --device tpu, --colour red,
    --log no/such/folder/log, --log ., --checkpoint no/such/folder/run.pt, --checkpoint ."""

@pytest.mark.parametrize("argv", [argv.strip() for argv in BAD.split(",")])
def test_bad_input_is_one_line_that_names_the_option(argv, refused, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ds.Run, "train", None)      # it must not come to that
    assert argv.split()[0] in refused(*argv.split())
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused(device, refused):
    if {"cuda": torch.cuda, "mps": torch.backends.mps}[device].is_available():
        pytest.skip("it is there")
    assert f"--device {device}" in refused("--device", device)

def test_a_data_folder_that_is_a_file_is_refused(refused, tmp_path, offline):
    (tmp_path / "file").write_text("")
    assert "--data-dir" in refused("--dataset", "cifar10", "--data-dir", tmp_path / "file")

def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_remedy(refused):
    for mode in MODES:
        line = refused(*TINY, "--mode", mode, "--max-steps", "4", "--lr", "1e30")
        assert re.search(r"(client|server)'s loss is (nan|inf) in epoch 1, step [2-4]:.*--lr", line)

def test_the_checkpoint_of_the_epoch_before_outlives_a_loss_that_is_not_finite(
        small, monkeypatch, tmp_path, capsys):
    steps, path = [], tmp_path / "run.pt"

    def step(*args):
        steps.append(1)
        losses = STEP["decoupled"](*args)
        return {**losses, "client": math.nan} if len(steps) == 2 + 4 else losses    # 2 measure the memory
    monkeypatch.setattr(ds, "decoupled_step", step)
    assert ds.main([*TINY, "--checkpoint", str(path)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert all(word in line for word in ("client", "nan", "epoch 2", "step 2", "--lr"))
    assert torch.load(path, weights_only=True)["epoch"] == 1 and list(tmp_path.iterdir()) == [path]

def test_the_checkpoint_before_outlives_one_that_cannot_be_written(
        small, monkeypatch, tmp_path, capsys):
    moves, replace, path = [], os.replace, tmp_path / "run.pt"

    def full(source, target):
        moves.append(source)
        if len(moves) == 2:
            raise OSError("no space left on device")
        replace(source, target)
    monkeypatch.setattr(os, "replace", full)
    assert ds.main([*TINY, "--checkpoint", str(path)]) == 2
    assert "--checkpoint" in capsys.readouterr().err.splitlines()[-1]
    assert torch.load(path, weights_only=True)["epoch"] == 1 and list(tmp_path.iterdir()) == [path]

@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_log_on_a_full_disk_ends_the_run_in_one_line_and_keeps_the_checkpoint(
        small, tmp_path, capsys):
    argv = [*TINY, "--checkpoint", str(tmp_path / "run.pt"), "--log", "/dev/full"]
    assert ds.main(argv) == 2
    assert "--log /dev/full" in capsys.readouterr().err.splitlines()[-1]
    assert torch.load(tmp_path / "run.pt", weights_only=True)["epoch"] == 1

@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_gets_a_progress_line_and_errors_in_full(terminal, small, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert ds.main([*TINY, "--lr", "1e30", "--max-steps", "4"]) == 2
    *progress, error = capsys.readouterr().err.rstrip("\n").split("\r" if terminal else "\n")
    assert "lower --lr than 1e+30" in error and len(error.rstrip()) > 79
    assert len(progress) == (2 if terminal else 0)
    for line in progress[1:]:
        assert all(word in line for word in ("step 1/4", "loss", "images/s", "left"))
        assert len(line) == 79

# ---- the documents and the command --------------------------------------------------------------
@pytest.mark.parametrize("document", ["decoupled_split.py", "README.md", "NOTES.md"])
def test_every_command_in_the_documents_runs(
        document, tmp_path, monkeypatch, offline, small, capsys):
    """Made short, and with a small archive in the place of CIFAR-10."""
    monkeypatch.chdir(tmp_path)
    write_cifar(tmp_path / "data", "cifar10", monkeypatch, packed=False)
    text = (HERE / document).read_text()
    commands = re.findall(r"python decoupled_split\.py\b([^`\n]*)", text)
    assert len(commands) >= 3
    for command in dict.fromkeys(commands):
        argv = shlex.split(command, comments=True)
        if argv == ["--help"]:
            with pytest.raises(SystemExit, match="0"):
                ds.main(argv)
        else:
            argv += "--depth 8 --batch-size 8 --max-steps 1 --epochs 1".split()
            assert ds.main(argv) == 0
        out = capsys.readouterr().out
        assert "client" in out and "(default: )" not in out     # what is off says so in --help

def test_the_readme_lists_every_option():
    text = (HERE / "README.md").read_text()
    for f in fields(ds.Config):
        assert f"--{f.name.replace('_', '-')}" in text

def test_the_python_in_the_notes_runs_and_shows_what_checkpointing_saves(capsys):
    code, = re.findall(r"```python\n(.*?)```", (HERE / "NOTES.md").read_text(), re.DOTALL)
    call, code = "checkpoint_sequential(net, 8, x, use_reentrant=False)", code.replace("110", "44")
    assert call in code and "(128, 1)" in code
    for text in (code, code.replace(call, "net(x)")):
        exec(text.replace("(128, 1)", "(8, 1)"), {})
    saved, plain = map(float, capsys.readouterr().out.split())
    assert 1 < saved < 0.6 * plain

def test_the_plain_command_prints_the_table_and_the_picture(plain_command):
    out, err = plain_command.communicate(timeout=60)
    assert plain_command.returncode == 0
    lines = out.splitlines()
    assert lines[0].split() == ["backprop", "decoupled", "change"]
    down = next(line for line in lines if line.startswith("down, MB"))
    assert down.split()[-3:] == [f"{2 * 32 * 32 * 16 * 16 * 4 / 1e6:.2f}", "0.00", "-100.0%"]
    picture = {tuple(line.split()[:2]): line for line in lines[-4:]}
    assert set(picture) == {(mode, party) for mode in MODES for party in ("client", "server")}
    assert all(len(line) == 18 + 60 for line in picture.values()) and "█" in "".join(lines[-4:])
    # The server's fullest moment finds the client of backprop full and that of decoupled empty.
    for mode, full in (("backprop", True), ("decoupled", False)):
        client, server = (picture[mode, party][18:] for party in ("client", "server"))
        assert (client[server.index(max(server))] > "▃") == full
    assert [re.sub(r"(epoch \d/\d).*", r"\1", line) for line in err.splitlines()] == [
        f"{mode} epoch 1/1" for mode in MODES]

# ---- the benchmark: python test_decoupled_split.py ----------------------------------------------
def benchmark(steps=40):
    """Median milliseconds a step of ResNet-20, batch 128, by turns on the same batches: an uncut
    loop in plain PyTorch, both protocols, float32 and amp, and backprop under the ledger; and of
    the input alone."""
    torch.set_num_threads(os.cpu_count())
    sets = ds.synthetic(0)
    runs = {mode + ", amp" * amp: ds.Run(
        ds.Config(mode=mode, dataset="cifar10", amp=amp), *sets, CPU)
        for amp in (False, True) for mode in MODES}
    whole = uncut(20)
    sgd = torch.optim.SGD(whole.parameters(), 0.2, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(sgd, 0.2, 10_000, cycle_momentum=False)

    def plain(x, y):
        loss = F.cross_entropy(whole(x), y)
        loss.backward()
        sgd.step()
        sgd.zero_grad()
        schedule.step()
        return loss.item()

    def watched(x, y):
        with runs["backprop"].ledger:
            train(runs["backprop"], [(x, y)])
    loops = {"uncut": plain, **{name: lambda x, y, run=run: train(run, [(x, y)])
                                for name, run in runs.items()}, "backprop, ledger": watched}
    times = {name: [] for name in ["input", *loops]}
    stream = ds.batches(*sets[0], 128, torch.Generator().manual_seed(0))
    for _ in range(steps):
        start = time.perf_counter()
        batch = next(stream)
        times["input"].append(time.perf_counter() - start)
        for name, loop in loops.items():
            start = time.perf_counter()
            loop(*batch)
            times[name].append(time.perf_counter() - start)
    for name, seconds in times.items():
        middle = sorted(seconds[5:])[(steps - 5) // 2]
        print(f"{name:18}{1e3 * middle:8.1f} ms a step{128 / middle:9.0f} images/s")

if __name__ == "__main__":
    benchmark()
