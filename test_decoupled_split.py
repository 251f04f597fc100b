"""Tests of decoupled_split.py. Most compare it with something that is not its own code: plain
PyTorch, torchvision, PyTorch's allocator, two processes, or numbers worked out by hand.

    pytest                              all tests: no network, under a minute on two cores
    python test_decoupled_split.py      the benchmark: milliseconds per training step
"""
import copy
import functools
import itertools
import json
import math
import os
import pickle
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections import deque
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
MODES = ["backprop", "decoupled"]
CUTS_AND_MODULES = [("deep", 1, 1), ("middle", 1, 1), ("shallow", 1, 1), ("deep", 3, 2),
                    ("shallow", 2, 3)]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8", "PYTHONPATH": str(HERE),
       "USE_LIBUV": "0"}        # which gloo on Windows lacks

TRAIN, TEST = ds.synthetic(0, (64, 32))
BATCHES = list(ds.batches(*TRAIN, 16))      # four batches of 16 images
Z = torch.randn(5, 3, 4, 2)                 # 120 numbers, 480 bytes


# ---- helpers -------------------------------------------------------------------------

def make_options(mode="decoupled", **changes):
    options = ds.parse(["--device", "cpu"])
    small = {"mode": mode, "depth": 8, "batch_size": 16, "epochs": 1, "lr": 0.05}
    for name, value in {**small, **changes}.items():
        assert hasattr(options, name)
        setattr(options, name, value)
    return options

def make_parties(mode, total_steps=100, **changes):
    return ds.build(make_options(mode, **changes), TRAIN, total_steps)

def steps(mode, parties, channel, batches):
    """Train on the batches. Return the losses of each step."""
    step = ds.STEPS[mode]
    return [step(*parties, channel, x, y) for x, y in batches]

def epoch_of(mode, shards=(TRAIN,), step=None, epoch=1, total_steps=100, **changes):
    """Train one epoch. Return (parties, channel, figures)."""
    options = make_options(mode, **changes)
    parties = ds.build(options, TRAIN, total_steps)
    channel = ds.Channel(options.wire)
    step = step or ds.STEPS[mode]
    figures = ds.train_epoch(parties, step, channel, list(shards), options, epoch)
    return parties, channel, figures

def oracle_sgd(parameters):
    """The optimizer and the schedule that a module should have, with a large weight decay."""
    sgd = torch.optim.SGD(parameters, 0.05, momentum=0.9, nesterov=True, weight_decay=0.5)
    return sgd, torch.optim.lr_scheduler.OneCycleLR(sgd, 0.05, 100, cycle_momentum=False)

def uncut(depth, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(*ds.resnet_layers(depth, 10)).to(memory_format=torch.channels_last)

def modules_of(parties):
    return [module for party in parties for module in party]

def weights(*modules):
    """Copies of all weights and buffers."""
    return [tensor.clone() for module in modules for tensor in module.state_dict().values()
            if torch.is_tensor(tensor)]

def kept(party):
    """What stays between two batches: weights, buffers, momentum."""
    tensors = weights(party)
    for module in party:
        for state in module.optimizer.state.values():
            tensors.append(state["momentum_buffer"].clone())
    return tensors

def same(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))

def static_bytes(party):
    """Weights, buffers, and one momentum per parameter."""
    tensors = weights(party) + list(party.parameters())
    return sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors)

def text_of(name):
    return (HERE / name).read_text(encoding="utf-8")

def log_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]

@pytest.fixture
def small(monkeypatch):
    """64 synthetic images instead of 2560."""
    whole = ds.synthetic
    monkeypatch.setattr(ds, "synthetic", lambda seed: whole(seed, (64, 32)))

@pytest.fixture
def offline(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no network in a test")
    monkeypatch.setattr(urllib.request, "urlopen", fail)

@pytest.fixture
def refused(capsys, small):
    """A function that runs main, expects code 2 and one line on stderr, and returns the line."""
    def run(*argv):
        try:
            code = ds.main([str(word) for word in argv])
        except SystemExit as end:       # by argparse
            code = end.code
        lines = capsys.readouterr().err.splitlines()
        assert code == 2 and len(lines) == 1 and "error: " in lines[0]
        return lines[0]
    return run


# ---- network and cut -----------------------------------------------------------------

@pytest.mark.parametrize("depth, count", [(20, 269_722), (110, 1_727_962)])
def test_parameters_are_as_many_as_in_the_literature(depth, count):
    layers = ds.resnet_layers(depth, 10)

    assert sum(p.numel() for layer in layers for p in layer.parameters()) == count

@pytest.mark.parametrize("depth, cut, modules, sizes, shape", [
    (20, "deep", (1, 1), [7, 5], (32, 16, 16)),
    (110, "deep", (2, 1), [15, 14, 28], (32, 16, 16)),
    (110, "middle", (1, 2), [20, 19, 18], (16, 32, 32)),
    (110, "shallow", (1, 3), [15, 15, 14, 13], (16, 32, 32))])
def test_the_client_has_a_quarter_a_third_or_half_of_the_layers(depth, cut, modules, sizes, shape):
    parties = make_parties("decoupled", depth=depth, cut=cut, client_modules=modules[0],
                           server_modules=modules[1])

    assert [len(module.body) for module in modules_of(parties)] == sizes
    assert parties[0](torch.zeros(2, 3, 32, 32)).shape == (2, *shape)

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

@pytest.mark.parametrize("depth, blocks", [
    (0, []),
    (1, [(32, 64, 2)]),
    (2, [(32, 32, 1), (32, 64, 2)]),
    (3, [(32, 32, 1), (32, 64, 2), (64, 64, 1)]),
    (9, [(32, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 64, 1)])])
def test_auxiliary_blocks_take_width_and_stride_from_the_layers_that_follow(depth, blocks):
    # In ResNet-20, z has 32 channels. The layers that follow have 32, 32, 64, 64, 64.
    head = make_parties("decoupled", depth=20, aux_depth=depth)[0][0].head
    z = torch.randn(2, 32, 16, 16)

    features = head[:len(blocks)](z.clone())                    # (2, 64, 8, 8)
    pooled = F.avg_pool2d(features, 4).flatten(1)               # to 2x2, without blocks to 4x4
    oracle = pooled @ head[-1].weight.t() + head[-1].bias

    assert blocks == [(block.conv1.in_channels, block.conv1.out_channels, block.conv1.stride[0])
                      for block in head[:len(blocks)]]
    torch.testing.assert_close(head(z), oracle)


# ---- the two protocols ---------------------------------------------------------------

def record_gradients(parameters):
    """A dictionary of lists that fills with each gradient that a parameter receives."""
    gradients = {p: [] for p in parameters}
    for p in gradients:
        p.register_post_accumulate_grad_hook(lambda p: gradients[p].append(p.grad.clone()))
    return gradients

@pytest.mark.parametrize("cut, clients, servers", CUTS_AND_MODULES)
def test_backprop_mode_trains_as_the_uncut_network_does(cut, clients, servers):
    parties = make_parties("backprop", depth=20, cut=cut, client_modules=clients,
                           server_modules=servers, weight_decay=0.5, seed=3)
    own = [p for party in parties for p in party.parameters()]
    gradients = record_gradients(own)
    whole = uncut(20, seed=3)
    sgd, schedule = oracle_sgd(whole.parameters())

    for number, (x, y) in enumerate(BATCHES[:2]):
        losses = ds.backprop_step(*parties, ds.Channel(), x, y)

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
    parties = make_parties("decoupled", depth=14, client_modules=2, server_modules=2,
                           weight_decay=0.5)
    chain = [(copy.deepcopy(m.body), copy.deepcopy(m.head)) for m in modules_of(parties)]
    optimizers = [oracle_sgd([*body.parameters(), *head.parameters()]) for body, head in chain]

    for x, y in BATCHES[:3]:
        losses = ds.decoupled_step(*parties, ds.Channel(), x, y)

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

def test_decoupled_client_never_hears_from_the_server():
    # Backprop is the control: there the same interference must reach the client.
    for mode, deaf in (("decoupled", True), ("backprop", False)):
        quiet = make_parties(mode)
        disturbed = make_parties(mode)
        for p in disturbed[1].parameters():
            p.data.mul_(3)
        channel = ds.Channel()

        steps(mode, quiet, ds.Channel(), BATCHES[:3])
        steps(mode, disturbed, channel, BATCHES[:3])

        assert same(weights(quiet[0]), weights(disturbed[0])) == deaf
        assert (channel.bytes["down gradients"] == 0) == deaf

@pytest.mark.parametrize("mode", MODES)
def test_every_parameter_has_one_optimizer_that_steps_once_per_batch(mode):
    parties = make_parties(mode, depth=14, client_modules=2, server_modules=2)
    optimizers = [module.optimizer for module in modules_of(parties)]
    everything = [p for party in parties for p in party.parameters()]
    owned = [p for sgd in optimizers for group in sgd.param_groups for p in group["params"]]
    stepped = []
    for sgd in optimizers:
        sgd.register_step_post_hook(lambda optimizer, *_: stepped.append(optimizer))

    steps(mode, parties, ds.Channel(), BATCHES[:1])

    assert len(owned) == len(everything) and set(owned) == set(everything)
    assert set(stepped) == set(optimizers) and len(stepped) == len(optimizers)
    assert all(p.grad is None for p in everything)          # freed until the next batch

def test_both_modes_see_the_same_batch_statistics():
    buffers = []
    for mode in MODES:
        parties = make_parties(mode)
        steps(mode, parties, ds.Channel(), BATCHES[:1])
        buffers.append([b for module in modules_of(parties) for b in module.body.buffers()])

    # The client's batch-norm is the same. The server's is too: it received the same z.
    assert len(buffers[0]) > 6 and same(*buffers)

@pytest.mark.parametrize("mode", MODES)
def test_a_frozen_weight_stays_and_a_module_without_a_weight_trains(mode):
    parties = make_parties(mode, client_modules=4)          # conv, norm, relu, block
    assert not list(parties[0][2].body.parameters())
    frozen = parties[0][0].body[0].weight.requires_grad_(False)
    free = parties[0][3].body[0].conv1.weight
    frozen_before = frozen.clone()
    free_before = free.detach().clone()

    steps(mode, parties, ds.Channel(), BATCHES[:2])

    assert torch.equal(frozen, frozen_before) and not torch.equal(free, free_before)
    with pytest.raises(RuntimeError, match="without a backward pass"):
        parties[0].update()

def test_a_party_clock_counts_only_its_work_and_waits_for_its_gpu(monkeypatch):
    now = 0.0
    queued = []             # seconds of work that the GPU still has to do

    def synchronize(device):
        nonlocal now
        now += sum(queued)
        queued.clear()

    monkeypatch.setattr(ds, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(torch.accelerator, "synchronize", synchronize)
    client, server = make_parties("decoupled")
    client.to("meta")       # stands for a GPU

    queued.append(5.0)      # by another party
    with server.working():
        now += 3            # on the CPU there is nothing to wait for
    for _ in range(2):
        with client.working():
            queued.append(2.0)
        now += 10

    assert (client.seconds, server.seconds) == (4, 3) and not queued

@pytest.mark.parametrize("mode", MODES)
def test_amp_computes_in_bfloat16_and_the_loss_in_float32(mode):
    plain = make_parties(mode)
    amp = make_parties(mode, amp=True)
    layer_types = set()
    for layer in [layer for party in amp for layer in party.modules()]:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(lambda _, __, out: layer_types.add(out.dtype))

    scores = amp[-1].scores(amp[0](BATCHES[0][0]).float())
    a, = steps(mode, plain, ds.Channel(), BATCHES[:1])
    b, = steps(mode, amp, ds.Channel(), BATCHES[:1])

    assert layer_types == {torch.bfloat16}          # of heads as well
    assert scores.dtype == torch.float32
    assert a != b and a == pytest.approx(b, rel=0.02)
    assert all(p.dtype == torch.float32 for party in amp for p in party.parameters())


# ---- channel -------------------------------------------------------------------------

@pytest.mark.parametrize("wire, hop, kind, tensor, count", [
    ("float32", "up", "activations", Z, 480),
    ("bfloat16", "up", "activations", Z, 240),
    ("uint8", "down", "gradients", Z, 120 + 3 * 8),         # an offset and a scale per channel
    ("float32", "up", "activations", Z.bfloat16(), 480),    # what --amp has computed
    ("uint8", "up", "activations", Z.bfloat16(), 120 + 3 * 8),
    ("float32", "up", "labels", torch.arange(5), 5),
    ("uint8", "up", "labels", torch.arange(251, 256), 5),
    ("bfloat16", "relay", "weights", torch.arange(5), 40)])
def test_channel_counts_the_encoded_bytes_and_shares_nothing(wire, hop, kind, tensor, count):
    original = tensor.clone()
    sent = tensor.clone()
    if sent.is_floating_point():
        sent = sent.requires_grad_() * 1        # with a graph
    channel = ds.Channel(wire)

    channel.send(sent, hop, kind)
    received = channel.receive(hop, kind)

    assert channel.bytes == {f"{hop} {kind}": count}
    assert received.shape == original.shape
    assert received.dtype == (tensor.dtype if kind in ("labels", "weights") else torch.float32)
    assert received.grad_fn is None and not received.requires_grad
    if wire == "float32" or kind in ("labels", "weights"):
        assert torch.equal(received, original.to(received.dtype))
    elif wire == "bfloat16":
        assert torch.equal(received, original.bfloat16().float())
    received.fill_(77)
    assert torch.equal(sent, original)

@pytest.mark.parametrize("size", [1, 1e-4, 1e-10])          # gradients are small
@pytest.mark.parametrize("shape", [(64, 6), (64, 6, 5, 5)])
def test_uint8_wire_errs_by_half_a_step_of_the_channel_at_most(size, shape):
    z = size * torch.randn(shape)
    z[:, 1] *= 100
    z[:, 2] /= 1000
    z[:, 3] = -7.25 * size                  # a constant channel
    z[:, 4] = 0.0
    z[:, 5] = -z[:, 5].abs() - 5 * size     # all negative

    channel = ds.Channel("uint8")
    channel.send(z, "down", "gradients")
    received = channel.receive("down", "gradients")

    for c in range(6):
        step = (z[:, c].max() - z[:, c].min()).item() / 255
        error = (received[:, c] - z[:, c]).abs().max().item()
        assert error <= 0.501 * step + 1e-6 * z[:, c].abs().max().item()
        assert step == 0 or error > 0.4 * step      # all of the 8 bits are in use

def test_channel_is_first_in_first_out_on_each_route_and_takes_labels_of_one_byte():
    channel = ds.Channel()

    for number in range(3):
        channel.send(torch.full((1,), number), "up", "labels")
        channel.send(torch.full((1,), 10.0 + number), "up", "activations")

    assert [channel.receive("up", "activations").item() for _ in range(3)] == [10, 11, 12]
    assert [channel.receive("up", "labels").item() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(IndexError):         # nothing is left
        channel.receive("up", "labels")
    for label in (256, -1):
        with pytest.raises(ValueError, match="from 0 to 255"):
            channel.send(torch.tensor([3, label]), "up", "labels")


# ---- two processes: the script of NOTES.md -------------------------------------------

def python_in(document, word):
    """The Python block of a document that contains a word."""
    blocks = re.findall(r"```python\n(.*?)```", text_of(document), re.DOTALL)
    block, = [block for block in blocks if word in block]
    return block

@pytest.mark.skipif(not dist.is_available(), reason="PyTorch without torch.distributed")
@pytest.mark.parametrize("mode, wire", [("backprop", "float32"), ("decoupled", "uint8")])
def test_two_machines_end_with_the_bits_and_the_bytes_of_the_simulation(
        mode, wire, tmp_path, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    script = python_in("NOTES.md", "init_process_group").replace("29500", port)
    (tmp_path / "two_machines.py").write_text(script, encoding="utf-8")
    argv = f"--mode {mode} --wire {wire} --depth 8 --epochs 2 --max-steps 3 --device cpu".split()

    command = [sys.executable, "two_machines.py"]
    server = subprocess.Popen([*command, "server"], cwd=tmp_path, env=ENV)
    try:
        client = subprocess.run([*command, "client", "localhost", *argv], cwd=tmp_path, env=ENV,
                                stdout=subprocess.PIPE, encoding="utf-8", timeout=120)
        assert client.returncode == server.wait(timeout=20) == 0
    finally:
        server.kill()

    monkeypatch.chdir(tmp_path)
    options = ds.parse([*argv, "--checkpoint", "run.pt"])
    summary, = ds.experiment(options)
    simulated = ds.read_checkpoint(options)["parties"]
    halves = {role: torch.load(f"{role}.pt", weights_only=True) for role in simulated}
    for role, half in halves.items():
        assert same(ds.tensors_in(half["party"]), ds.tensors_in(simulated[role]))
    sent = {**halves["client"]["bytes"], **halves["server"]["bytes"]}
    for key, count in summary["bytes"].items():
        assert sent[key] == 2 * count                   # two epochs
    assert f"test accuracy {summary['test_accuracy']:.2%}" in client.stdout


# ---- memory --------------------------------------------------------------------------

def test_ledger_figures_and_picture_worked_out_by_hand():
    parties = [ds.Party(name, []) for name in ("client", "edge", "server")]
    client, edge, server = parties
    with ds.Ledger(parties, ds.Channel(), ()) as ledger:
        with client.working():
            a = torch.zeros(1000)
            b = torch.zeros(200)[5:].view(13, 15)       # keeps all 200 numbers
            del a
        with edge.working():
            c = torch.zeros(900).add_(1)                # in place: no new memory
        with server.working():
            d = torch.zeros(400, dtype=torch.bfloat16)
            del b                                       # what the client has made is the client's
            e = torch.zeros(1)
            del c, d, e

    assert ledger.figures(width=8) == {
        "client_peak": 4800, "edge_peak": 3600, "server_peak": 804, "host_peak": 5200,
        "client_held": 0, "edge_held": 3600,
        "picture": {"client": [4000, 4800, 4800, 4800, 800, 800, 800, 0],
                    "edge": [0, 0, 0, 0, 3600, 3600, 3600, 3600],
                    "server": [0, 0, 0, 0, 0, 0, 800, 804],
                    "host": [4000, 4800, 4800, 4800, 4400, 4400, 5200, 4404]}}
    assert ledger.figures(width=3)["picture"]["host"] == [4800, 4800, 5200]

def forget_the_clock(client, server, channel, x, y):
    with client.working():
        z, _ = ds.train_locally(client, x, y)
    ds.train_locally(server, z, y)

def read_the_original_of_what_was_sent(client, server, channel, x, y):
    with client.working():
        z, _ = ds.train_locally(client, x, y)
        channel.send(z, "up", "activations")
    with server.working():
        channel.receive("up", "activations")
        server(z)

def forget_to_update(client, server, channel, x, y):
    with client.working():
        F.cross_entropy(client.scores(x), y).backward()

def forget_to_receive(client, server, channel, x, y):
    ds.decoupled_step(client, server, channel, x, y)
    with client.working():
        channel.send(client(x), "up", "activations")

@pytest.mark.parametrize("step, message", [
    (forget_the_clock, r"not \[\]"),
    (read_the_original_of_what_was_sent, "the server reads a tensor that belongs to client"),
    (forget_to_update, "the client reads a tensor that belongs to nobody"),
    (forget_to_receive, "leaves tensors of its batch")])
def test_a_wrong_step_is_an_error_when_memory_is_measured(step, message):
    with pytest.raises(RuntimeError, match=message):
        ds.measure_memory(make_parties("decoupled"), step, ds.Channel(), *BATCHES[0])

def watched_step(mode, batch=BATCHES[0], wire="float32", **changes):
    """(parties, ledger) after a step without the ledger and one with it."""
    parties = make_parties(mode, **changes)
    channel = ds.Channel(wire)
    steps(mode, parties, channel, [batch])
    ledger = ds.Ledger(parties, channel, batch)
    with ledger:
        steps(mode, parties, channel, [batch])
    assert ledger.live == ledger.static             # everything else is freed
    assert ledger.static == {party.name: static_bytes(party) for party in parties}
    return parties, ledger

def test_while_the_client_goes_backward_the_server_keeps_nothing_of_the_batch():
    _, ledger = watched_step("backprop")

    server = [live["server"] for _, live in ledger.trace]
    last = max(number for number, (name, _) in enumerate(ledger.trace) if name == "server")
    afterwards = server[last + 2:]          # after the operator that receives dL/dz
    assert set(afterwards) == {ledger.static["server"]} and len(afterwards) >= 20

@pytest.mark.parametrize("wire", ds.WIRES)
def test_decoupled_client_holds_only_its_static_state_while_the_server_works(wire):
    held = {}
    for mode in MODES:
        _, ledger = watched_step(mode, wire=wire)
        held[mode] = ledger.figures()["client_held"] - ledger.static["client"]

    assert held["decoupled"] == 0
    assert held["backprop"] > 16 * 5 * 16 * 32 * 32 * 4     # five activations of 16 images

@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="other convolutions, which "
                    "allocate memory inside")
@pytest.mark.parametrize("mode", MODES)
def test_ledger_peak_is_that_of_the_cpu_allocator(mode):
    x, y = BATCHES[0][0][:8], BATCHES[0][1][:8]
    parties, ledger = watched_step(mode, (x, y), depth=20)

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                profile_memory=True) as profile:
        steps(mode, parties, ds.Channel(), [(x, y)])
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = 0
    peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)

    host_peak = ledger.figures()["host_peak"] - sum(ledger.static.values())
    assert level == 0
    assert 0.97 * peak < host_peak <= peak         # less: scratch of the operators

@pytest.mark.parametrize("mode", MODES)
def test_ledger_peak_is_that_of_the_memory_tracker_of_pytorch(mode):
    mem_tracker = pytest.importorskip("torch.distributed._tools.mem_tracker")
    parties, ledger = watched_step(mode, depth=20)
    tracker = mem_tracker.MemTracker()
    modules = modules_of(parties)
    tracker.track_external(*modules, *(module.optimizer for module in modules))

    with tracker:
        steps(mode, parties, ds.Channel(), BATCHES[:1])

    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    labels = {"backprop": 16 * 8, "decoupled": 0}       # int64; the ledger leaves the batch out
    assert ledger.figures()["host_peak"] + labels[mode] == peak

@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("mode", MODES)
def test_ledger_peak_is_that_of_the_cuda_allocator(mode):
    images, labels = [tensor.cuda() for tensor in ds.synthetic(0, (128, 1))[0]]
    batch = ds.to_float(images), labels
    parties = make_parties(mode, depth=20, device="cuda")
    channel = ds.Channel()
    steps(mode, parties, channel, [batch] * 2)          # momentum, and cuDNN's workspace

    with ds.Ledger(parties, channel, batch) as ledger:
        steps(mode, parties, channel, [batch])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    steps(mode, parties, channel, [batch])
    peak = torch.cuda.max_memory_allocated() - before + sum(ledger.static.values())

    assert ledger.figures()["host_peak"] == pytest.approx(peak, rel=0.05)

@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_run_on_a_gpu_is_the_run_on_the_cpu_up_to_rounding():
    losses = []
    for device in ("cpu", "cuda"):
        shard = [tensor.to(device) for tensor in TRAIN]
        _, _, figures = epoch_of("decoupled", [shard], lr=0.01, total_steps=4, device=device)
        losses.append(figures["train_loss"])

    assert losses[1] == pytest.approx(losses[0], rel=0.02)

@pytest.mark.parametrize("mode", MODES)
def test_memory_is_measured_on_a_full_batch_and_does_not_touch_training(mode, tmp_path):
    options = make_options(mode, wire="uint8", clients=5, checkpoint=str(tmp_path / "run.pt"))
    summary = ds.train(options, TRAIN, TEST)                    # each has 13 images, or 12

    _, ledger = watched_step(mode, wire="uint8")                # 16 images
    assert summary["memory"] == ledger.figures()
    assert summary["bytes"]["up activations"] == 64 * 16 * 32 * 32 + 5 * 16 * 8
    shards = zip(TRAIN[0].split(13), TRAIN[1].split(13))
    parties, _, _ = epoch_of(mode, shards, total_steps=5, wire="uint8")
    for party in parties:
        trained = ds.read_checkpoint(options)["parties"][party.name]
        assert same(ds.tensors_in(party.state_dict()), ds.tensors_in(trained))

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

def test_training_images_are_windows_of_the_padded_image_and_half_are_mirrored():
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (200, 1, 14, 12), dtype=torch.uint8, generator=generator)
    corners = list(itertools.product(range(9), range(9), (False, True)))    # top, left, mirrored
    seen = []

    for x, y in ds.batches(images, torch.arange(200), 64, generator):
        for got, n in zip((x * 64 + 128).to(torch.uint8), y):
            for top, left, mirrored in corners:
                window = TF.crop(TF.pad(images[n], 4), top, left, 14, 12)
                if torch.equal(TF.hflip(window) if mirrored else window, got):
                    seen.append((top, left, mirrored))

    tops, lefts, mirrored = zip(*seen)
    assert len(seen) == 200 and set(tops) == set(lefts) == set(range(9))
    assert len(set(zip(tops, lefts))) > 9           # top and left are drawn separately
    assert 60 < sum(mirrored) < 140

@pytest.mark.parametrize("n, size, sizes", [
    (50, 16, [13, 13, 12, 12]), (5000, 128, [125] * 40), (7, 8, [7]), (9, 8, [5, 4])])
def test_batches_have_each_image_once_and_differ_by_one_at_most(n, size, sizes):
    images = torch.zeros(n, 1, 2, 2, dtype=torch.uint8)
    labels = torch.arange(n)

    training = [y for _, y in ds.batches(images, labels, size, torch.Generator())]
    testing = [y for _, y in ds.batches(images, labels, size)]

    assert [len(y) for y in training] == [len(y) for y in testing] == sizes
    assert torch.equal(torch.cat(testing), labels)
    assert sorted(torch.cat(training).tolist()) == list(range(n))

def drawn(mode="backprop", epoch=1, clients=1, **changes):
    """The batches of an epoch, with labels that tell the images apart, and a random number."""
    seen = []
    def step(client, server, channel, x, y):
        seen.append((x, y, torch.rand(len(mode))[0]))       # as dropout would, mode by mode
        return {"server": 1.0}

    shards = list(zip(TRAIN[0][:48].tensor_split(clients), torch.arange(48).tensor_split(clients)))
    epoch_of(mode, shards, step, epoch, **changes)
    return seen

def test_the_batches_depend_on_the_seed_and_the_epoch_and_on_nothing_else():
    first = drawn(clients=2)
    again = drawn("decoupled", clients=2, lr=0.1, depth=14, aux_depth=0)

    for a, b in zip(first, again, strict=True):
        assert same(a[:2], b[:2])
    orders = set()
    for seed, epoch in itertools.product(range(3), range(1, 4)):
        batches = drawn(seed=seed, epoch=epoch)
        orders.add(tuple(torch.cat([y for _, y, _ in batches]).tolist()))
        orders.add(float(batches[0][2]))
    assert len(orders) == 2 * 3 * 3

def test_each_client_trains_on_its_own_shard_in_an_order_of_its_own():
    batches = drawn(clients=3, batch_size=8)

    orders = torch.cat([y for _, y, _ in batches]).view(3, 16)
    for client, order in enumerate(orders):
        assert sorted(order.tolist()) == list(range(16 * client, 16 * client + 16))
    assert len({tuple((order % 16).tolist()) for order in orders}) == 3
    batches = drawn(clients=3, batch_size=4, max_steps=2)       # limits the turn of each client
    owners = [set((y // 16).tolist()) for _, y, _ in batches]
    assert owners == [{0}, {0}, {1}, {1}, {2}, {2}]

def test_a_linear_model_fails_on_the_synthetic_images_but_not_on_their_spectra():
    (x, y), (x_test, y_test) = [(ds.to_float(x), y) for x, y in ds.synthetic(0)]
    other_seed = ds.DATA_SETS["synthetic"](make_options(seed=1))[0][0]

    def accuracy(train, test):
        """Of a linear model with least squares and a ridge."""
        train, test = train.flatten(1), test.flatten(1)
        ridge = len(train) * torch.eye(train.shape[1])
        model = torch.linalg.solve(train.T @ train + ridge, train.T @ F.one_hot(y).float())
        return ((test @ model).argmax(1) == y_test).float().mean()

    # The spectrum of a grey image depends neither on the place of a pattern nor on its sign.
    spectra = [torch.fft.fft2(images.mean(1)).abs() / 32 for images in (x, x_test)]

    assert accuracy(x, x_test) < 0.3
    assert accuracy(*spectra) > 0.8
    assert not torch.equal(ds.to_float(other_seed), x)

def write_cifar(folder, name, monkeypatch):
    """Write a few random images in the official layout. Return what must be loaded."""
    source = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    key = {"cifar10": "labels", "cifar100": "fine_labels"}[name]
    classes = int(name[5:])
    base = folder / source.base_folder
    base.mkdir(parents=True)

    # These files have other checksums than the official ones.
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda path, md5: Path(path).exists())

    sets = []
    for listed in (source.train_list, source.test_list):
        images = torch.randint(256, (len(listed), 4, 3072), dtype=torch.uint8)
        labels = torch.randint(classes, (len(listed), 4))
        labels[:, 0] = classes - 1
        for (filename, _), data, numbers in zip(listed, images, labels):
            entry = {"data": data.numpy(), key: numbers.tolist()}
            (base / filename).write_bytes(pickle.dumps(entry))
        sets.append((images.view(-1, 3, 32, 32), labels.flatten()))

    names = {source.meta["key"]: [f"class {n}" for n in range(classes)]}
    (base / source.meta["filename"]).write_bytes(pickle.dumps(names))
    return sets

@pytest.mark.parametrize("name, classes", [("cifar10", 10), ("cifar100", 100)])
def test_cifar_is_read_from_the_official_layout(name, classes, tmp_path, monkeypatch, offline):
    written = write_cifar(tmp_path, name, monkeypatch)

    loaded = ds.load_cifar(make_options(dataset=name, data_dir=str(tmp_path)))

    for (data, labels), (x, y) in zip(written, loaded, strict=True):
        assert x.dtype == torch.uint8 and y.dtype == torch.int64
        assert torch.equal(x, data) and torch.equal(y, labels)
    _, server = ds.build(make_options(), loaded[0], total_steps=2)
    assert server[-1].head[-1].out_features == classes

@pytest.mark.parametrize("missing", ["batches.meta", "data_batch_3"])
def test_cifar_that_cannot_be_had_is_refused(missing, tmp_path, monkeypatch, offline, refused):
    write_cifar(tmp_path, "cifar10", monkeypatch)
    folder = tmp_path / datasets.CIFAR10.base_folder
    (folder / missing).unlink()

    line = refused("--dataset", "cifar10", "--data-dir", tmp_path)

    assert f"delete {folder}" in line and "--dataset synthetic" in line


# ---- training, evaluation, clients ---------------------------------------------------

def test_accuracy_is_that_of_the_whole_network_in_evaluation_mode():
    images, labels = ds.synthetic(1, (1, 250))[1]
    parties = make_parties("decoupled", lr=0.1, total_steps=12)
    steps("decoupled", parties, ds.Channel(), BATCHES * 3)
    before = weights(*parties)
    channel = ds.Channel()

    def decode(payload, kind):
        assert not torch.is_grad_enabled()
        return payload[0].flip(1)       # not z, to see that the server uses what it received

    channel.decode = decode
    client, server = [copy.deepcopy(party[0]).eval() for party in parties]
    with torch.no_grad():
        z = [client.body(x) for x in ((images.float() - 128) / 64).tensor_split(16)]
        alone = torch.cat([client.head(part) for part in z]).argmax(1)
        whole = torch.cat([server.head(server.body(part.flip(1))) for part in z]).argmax(1)
    labels[:150] = alone[:150]          # the client is right more often: a mix-up would show

    accuracies = ds.evaluate(*parties, channel, ds.batches(images, labels, 16))

    right = {"test": (whole == labels).sum().item(), "aux": (alone == labels).sum().item()}
    assert accuracies == {f"{name}_accuracy": count / 250 for name, count in right.items()}
    assert right["aux"] > right["test"] > 0
    assert channel.bytes == {"up activations": 250 * 16 * 32 * 32 * 4}
    assert same(before, weights(*parties))

def test_a_run_reports_its_last_epoch_not_the_best_and_goes_back_to_training_mode(monkeypatch):
    accuracies = iter([0.9, 0.7])

    def evaluate(client, server, channel, test_batches):
        assert client.training and server.training
        client.eval()
        server.eval()
        return {"test_accuracy": next(accuracies), "aux_accuracy": None}

    monkeypatch.setattr(ds, "evaluate", evaluate)
    summary = ds.train(make_options(epochs=2, max_steps=1), TRAIN, TEST)

    assert summary["test_accuracy"] == 0.7 and summary["epoch"] == 2

def test_the_figures_of_an_epoch_are_of_its_images():
    losses = iter([1.0, 2.0, 4.0, 8.0])

    def step(client, server, channel, x, y):
        return {"client": 100.0, "server": next(losses)}

    shard = TRAIN[0][:50], TRAIN[1][:50]                    # batches of 13, 13, 12, 12
    _, _, figures = epoch_of("decoupled", [shard], step)
    assert figures["train_loss"] == pytest.approx((13 * 1 + 13 * 2 + 12 * 4 + 12 * 8) / 50)
    assert figures["images_per_second"] * figures["seconds"]["epoch"] == pytest.approx(50)
    parties, channel, _ = epoch_of("decoupled")
    figures = ds.train_epoch(parties, ds.decoupled_step, channel, [TRAIN], make_options(), 2)
    seconds = figures["seconds"]                            # of this epoch alone
    assert 0 < seconds["client"] + seconds["server"] <= seconds["epoch"]

@pytest.mark.parametrize("mode", MODES)
def test_the_client_part_travels_after_every_shard_without_changing_a_bit(mode, monkeypatch):
    relay = []

    def spy(client, server, channel, x, y):
        relay.append(channel.bytes["relay weights"])
        return ds.STEPS[mode](client, server, channel, x, y)

    shards = list(zip(TRAIN[0][:60].split(20), TRAIN[1][:60].split(20)))
    (client, _), channel, _ = epoch_of(mode, shards, spy, batch_size=8, wire="uint8")

    once = static_bytes(client)                         # weights, buffers and momentum
    relay.append(channel.bytes["relay weights"])
    assert [count / once for count in relay] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    before = kept(client)
    ds.hand_over(client, channel)
    assert same(before, kept(client))
    monkeypatch.setattr(channel, "decode", lambda payload, kind: payload[0] + 1)
    ds.hand_over(client, channel)                       # the next client has what it received
    assert same(kept(client), [tensor + 1 for tensor in before])
    assert epoch_of(mode)[1].bytes["relay weights"] == 0        # a single client

@pytest.mark.parametrize("max_steps, per_epoch", [(None, 4), (2, 2), (99, 4)])
def test_learning_rate_is_one_cycle_over_all_epochs_in_every_module(
        max_steps, per_epoch, monkeypatch):
    seen = []

    def watch(client, server, channel, x, y):
        seen.append([module.optimizer.param_groups[0]["lr"] for module in (*client, *server)])
        return ds.decoupled_step(client, server, channel, x, y)

    monkeypatch.setitem(ds.STEPS, "decoupled", watch)
    ds.train(make_options(depth=14, lr=0.08, epochs=5, client_modules=2, max_steps=max_steps),
             TRAIN, TEST)

    assert all(len(rates) == 3 and len(set(rates)) == 1 for rates in seen)
    rates = [rates[0] for rates in seen[2:]]                # the first two measure memory
    top = rates.index(max(rates))
    assert len(rates) == 5 * per_epoch
    assert max(rates) > 0.06 and rates[0] < 0.01 and rates[-1] < 0.08 / 1000
    assert rates == sorted(rates[:top]) + sorted(rates[top:], reverse=True)


# ---- long runs -----------------------------------------------------------------------

TINY = ("--mode decoupled --depth 8 --epochs 2 --max-steps 2 --batch-size 16 --device cpu "
        "--lr 0.05").split()

def test_a_killed_run_goes_on_and_ends_with_the_same_bits(tmp_path, small):
    code = """if True:
        import os
        import decoupled_split as ds
        whole, step, calls = ds.synthetic, ds.decoupled_step, []
        def deadly_step(*args):
            calls.append(args)
            if len(calls) == 2 + 4 + 2:         # two measure the memory; then in epoch 2
                os._exit(9)                     # like kill -9: nothing is tidied up
            return step(*args)
        ds.synthetic = lambda seed: whole(seed, (64, 32))
        ds.STEPS["decoupled"] = deadly_step
        ds.main()
    """
    a, b = tmp_path / "a.pt", tmp_path / "b.pt"
    argv = [*TINY, "--epochs", "3", "--max-steps", "4"]
    killed = [sys.executable, "-c", code, *argv, "--checkpoint", b, "--log", b.with_suffix(".log")]
    process = subprocess.run(killed, env=ENV, stderr=subprocess.DEVNULL)
    assert process.returncode == 9 and len(log_of(tmp_path / "b.log")) == 1
    (tmp_path / "b.pt.partial").write_text("what a killed save leaves")

    for path in (a, b):
        files = ["--checkpoint", str(path), "--log", str(path.with_suffix(".log"))]
        assert ds.main([*argv, *files]) == 0

    ends = [tree_leaves(torch.load(path, weights_only=True)["parties"]) for path in (a, b)]
    assert len(ends[0]) > 50
    for p, q in zip(*ends, strict=True):
        assert torch.equal(p, q) if torch.is_tensor(p) else p == q
    events = log_of(tmp_path / "b.log")
    assert [event["epoch"] for event in events] == [1, 2, 3, 3]
    whole, resumed = log_of(tmp_path / "a.log")[-1], events[-1]
    for key in ("test_accuracy", "aux_accuracy", "train_loss", "bytes", "memory"):
        assert whole[key] == resumed[key]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.log", "a.pt", "b.log", "b.pt"]

class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)

def test_a_checkpoint_that_cannot_be_read_or_is_of_other_options_is_refused_and_left_alone(
        tmp_path, refused, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = [*TINY, "--checkpoint", "run.pt"]
    path = Path("run.pt")
    assert ds.main(run) == 0
    good = path.read_bytes()
    capsys.readouterr()
    assert ds.main([*run, "--data-dir", "elsewhere"]) == 0
    assert "epoch" not in capsys.readouterr().err           # it is finished
    assert os.listdir() == ["run.pt"]
    changes = ["--mode backprop", "--depth 14", "--cut middle", "--client-modules 2", "--amp",
               "--server-modules 3", "--wire uint8", "--clients 2", "--epochs 3", "--batch-size 8",
               "--lr 0.2", "--weight-decay 0.001", "--aux-depth 0", "--seed 1", "--max-steps 3"]

    for change in changes:
        line = refused(*run, *change.split())
        assert f"'{change.split()[0][2:].replace('-', '_')}'" in line
    assert path.read_bytes() == good
    torch.save(Evil(), "evil.pt")
    for content in (good[:-1000], b"not a checkpoint", Path("evil.pt").read_bytes()):
        path.write_bytes(content)
        assert "--checkpoint" in refused(*run)
        assert path.read_bytes() == content
    assert not Path("executed").exists()
    path.rename("run.decoupled.pt")                         # before backprop trains
    assert "run.decoupled.pt" in refused(*run, "--mode", "compare")

def test_compare_logs_both_modes_and_keeps_a_checkpoint_of_each(tmp_path, small):
    files = ["--checkpoint", str(tmp_path / "run.pt"), "--log", str(tmp_path / "log")]

    assert ds.main([*TINY, "--mode", "compare", *files]) == 0

    events = log_of(tmp_path / "log")
    assert [(event["event"], event["mode"]) for event in events] == [
        (event, mode) for mode in MODES for event in ("epoch", "epoch", "summary")]
    for event in events:
        assert {*vars(ds.parse([])), "torch", "epoch", "images_per_second"} <= set(event)
        assert event["device"] == "cpu" and event["bytes"]["up labels"] == 32
        assert (event["aux_accuracy"] is None) == (event["mode"] == "backprop")
        assert set(event["seconds"]) == {"client", "server", "epoch"}
    assert {**events[1], "event": "summary"} == events[2]
    assert {path.name for path in tmp_path.iterdir()} == {
        "log", "run.backprop.pt", "run.decoupled.pt"}


# ---- report --------------------------------------------------------------------------

def test_the_table_and_the_picture_worked_out_by_hand():
    mib = 2**20
    backprop = {
        "mode": "backprop", "test_accuracy": 0.75, "aux_accuracy": None, "seconds": {"epoch": 20},
        "bytes": {"up activations": 2_000_000, "down gradients": 4_000_000},
        "memory": {"host_peak": 8 * mib, "picture": {"host": [0, 1, mib, 8 * mib, 5 * mib]}},
    }
    decoupled = {
        "mode": "decoupled", "test_accuracy": 0.745, "aux_accuracy": 0.5, "seconds": {"epoch": 19},
        "bytes": {"up activations": 2_000_000},
        "memory": {"host_peak": 4 * mib, "picture": {"host": [4 * mib]}},
    }

    lines = ds.table([backprop, decoupled])

    assert [re.split("  +", line) for line in lines] == [
        ["last epoch", "backprop", "decoupled", "change"],
        ["test accuracy, %", "75.00", "74.50", "-0.50"],
        ["aux accuracy, %", "-", "50.00", "-"],
        ["sent: up activations, MB", "2.00", "2.00", "+0.0%"],
        ["sent: down gradients, MB", "4.00", "0.00", "-100.0%"],
        ["sent: in all, MB", "6.00", "2.00", "-66.7%"],
        ["memory: host peak, MiB", "8.00", "4.00", "-50.0%"],
        ["time: epoch, s", "20.00", "19.00", "-5.0%"]]
    assert ds.table([decoupled])[2].split() == ["aux", "accuracy,", "%", "50.00"]
    assert ds.picture([backprop, decoupled]) == [                       # one scale
        " backprop host    ▁▁█▅      8.0 MiB", "decoupled host   ▄      4.0 MiB"]

@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_gets_a_progress_line_with_the_minutes_left(terminal, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setattr(ds, "time", SimpleNamespace(perf_counter=lambda: 140.0))
    parties = make_parties("backprop", total_steps=12)
    parties[-1][0].schedule.last_epoch = 6

    ds.say_progress(make_options("backprop", epochs=3), 2, parties, 2, {"server": 0.75}, 100.0)

    # 20 seconds per step, and 6 steps to come.
    line = "backprop epoch 2/3 step 2 loss server 0.750 2.0 min left"
    assert capsys.readouterr().err == (f"{line:79}\r" if terminal else "")


# ---- bad input -----------------------------------------------------------------------

BAD = """--depth 21, --client-modules 5, --client-modules 0, --server-modules 9, --clients 65,
    --clients 0, --max-steps 0, --epochs 0, --epochs nan, --batch-size 0, --batch-size 65, --lr x,
    --lr 0, --lr nan, --lr inf, --weight-decay -1, --seed -1, --seed 99999999999, --aux-depth -1,
    --mode both, --cut wide, --wire int4, --dataset mnist, --device tpu, --colour red,
    --log no/such/folder/log, --log /, --checkpoint no/such/folder/run.pt"""

def test_bad_input_is_one_line_that_names_it_before_any_training(refused, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ds, "train_epoch", None)        # it must not come to that

    for argv in BAD.split(","):
        option, value = argv.split()
        line = refused("--depth", "8", "--batch-size", "16", option, value)
        assert option in line or value.split(".")[0] in line

    refused("--batch-size", "16", "--client-modules", "8", "--log", "log")
    assert not list(tmp_path.iterdir())                 # the files come last
    assert 300 * "x" in refused("--batch-size", "16", "--checkpoint", 300 * "x")
    x, y = TRAIN
    sets = [((x, y[1:]), "labels (63,)"), ((x / 255, y), "uint8"),
            ((x[:, 0], y), "(N, C, H, W)"), ((x.permute(0, 2, 3, 1), y), "(N, C, H, W)")]
    for pair, message in sets:
        monkeypatch.setitem(ds.DATA_SETS, "synthetic", lambda options: [pair, TEST])
        assert message in refused("--batch-size", "16")

@pytest.mark.parametrize("name, epochs, batch_size, lr", [
    ("synthetic", 4, 32, 0.1), ("cifar10", 10, 128, 0.2), ("cifar100", 10, 128, 0.2)])
def test_the_defaults_are_those_of_the_reported_figures(name, epochs, batch_size, lr, capsys):
    chosen = ds.parse(["--dataset", name, "--log", "~/x"])

    assert (chosen.epochs, chosen.batch_size, chosen.lr) == (epochs, batch_size, lr)
    assert (chosen.weight_decay, chosen.seed, chosen.wire) == (5e-4, 0, "float32")
    assert (chosen.depth, chosen.cut, chosen.aux_depth) == (20, "deep", 1)
    assert (chosen.client_modules, chosen.server_modules, chosen.clients) == (1, 1, 1)
    assert chosen.log == os.path.expanduser("~/x")
    with pytest.raises(SystemExit):
        ds.parse(["--dataset", name, "--help"])
    assert f"one-cycle rate (default: {lr})" in " ".join(capsys.readouterr().out.split())

@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("max_steps", ["1", "4"])
def test_training_that_diverges_stops_before_the_checkpoint_is_written(
        mode, max_steps, small, tmp_path, capsys):
    """With one step the loss is still finite, and the scores after the update are not."""
    path = tmp_path / "run.pt"
    argv = ["--mode", mode, "--max-steps", max_steps, "--lr", "2e9", "--checkpoint", str(path)]
    assert ds.main([*TINY, *argv]) == 2

    line = capsys.readouterr().err.splitlines()[-1]
    assert "lower --lr" in line and ("scores" if max_steps == "1" else "losses") in line
    assert not path.exists()

def test_what_fails_in_epoch_2_keeps_its_traceback_and_the_checkpoint_of_epoch_1(
        small, monkeypatch, tmp_path):
    path = tmp_path / "run.pt"
    move = os.replace

    def fail(source, target):
        if path.exists():
            raise ValueError("a mistake in the code")
        move(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ValueError, match="a mistake"):
        ds.main([*TINY, "--checkpoint", str(path), "--log", str(tmp_path / "log")])

    assert torch.load(path, weights_only=True)["summary"]["epoch"] == 1
    assert [event["epoch"] for event in log_of(tmp_path / "log")] == [1, 2]     # none is lost


# ---- the documents and the command ---------------------------------------------------

@pytest.mark.parametrize("document", ["decoupled_split.py", "README.md", "NOTES.md"])
def test_every_command_in_the_documents_runs(document, tmp_path, monkeypatch, small, capsys):
    """Made short, and with synthetic images in the place of CIFAR."""
    monkeypatch.chdir(tmp_path)
    for name in ("cifar10", "cifar100"):
        monkeypatch.setitem(ds.DATA_SETS, name, ds.DATA_SETS["synthetic"])
    commands = re.findall(r"python decoupled_split\.py\b([^`\n]*)", text_of(document))
    assert len(commands) >= 3

    for command in dict.fromkeys(commands):
        argv = re.sub(r" {2,}.*", "", command).split()      # a remark in a column beside it
        if argv == ["--help"]:
            with pytest.raises(SystemExit, match="0"):
                ds.main(argv)
        else:
            short = "--depth 8 --batch-size 4 --max-steps 1 --epochs 1 --device cpu".split()
            assert ds.main([*argv, *short]) == 0, command
        assert "client" in capsys.readouterr().out

def test_the_first_two_of_three_steps_train_alike_and_the_third_without_the_server():
    names = {}
    exec(python_in("NOTES.md", "def two_halves"), names)
    ends = []
    for word in ("server(client(x))", "z.backward(z_received.grad)", "auxiliary ="):
        exec(python_in("NOTES.md", word), names)
        ends.append([weights(names["client"]), weights(names["server"])])

    for a, b in zip(sum(ends[0], []), sum(ends[1], []), strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.allclose(ends[1][0][0], ends[2][0][0])
    third = python_in("NOTES.md", "auxiliary =")
    exec(third.replace("server(z_received)", "3 * server(z_received)"), names)
    assert same(ends[2][0], weights(names["client"]))
    assert not same(ends[2][1], weights(names["server"]))

def test_the_snippet_on_checkpointing_shows_what_it_saves(capsys):
    code = python_in("NOTES.md", "checkpoint_sequential")
    code = code.replace("resnet_layers(110", "resnet_layers(44").replace("(128, 1)", "(8, 1)")
    call = "checkpoint_sequential(host[0].body, 8, x, use_reentrant=False)"
    assert call in code

    exec(code, {})
    exec(code.replace(call, "host(x)"), {})

    saved, plain = map(float, capsys.readouterr().out.split())
    assert 1 < saved < 0.6 * plain

def test_the_snippet_that_loads_a_checkpoint_has_the_accuracy_of_the_run(
        tmp_path, monkeypatch, small, capsys):
    monkeypatch.chdir(tmp_path)
    run = "--mode decoupled --max-steps 2 --device cpu --checkpoint run.pt --log log"
    assert ds.main(run.split()) == 0
    capsys.readouterr()

    exec(python_in("NOTES.md", "read_checkpoint").replace(
        '"cpu"]', '"cpu", "--max-steps", "2"]'), {})

    accuracies = eval(capsys.readouterr().out)
    assert accuracies.items() <= log_of(tmp_path / "log")[-1].items()

def test_the_snippets_with_an_own_network_and_from_a_notebook_run(small, monkeypatch, capsys):
    monkeypatch.setattr(ds, "resnet_layers", ds.resnet_layers)      # restored afterwards
    monkeypatch.setitem(ds.DATA_SETS, "stripes", None)
    code = python_in("README.md", "ds.experiment")
    exec(code.replace('"--epochs"', '"--depth", "8", "--epochs"'), {})
    assert "memory: host peak" in capsys.readouterr().out

    exec(python_in("NOTES.md", "load_stripes"), {})

    accuracy = capsys.readouterr().out.splitlines()[1].split()
    assert accuracy[:3] == ["test", "accuracy,", "%"] and min(map(float, accuracy[3:5])) > 80

def test_the_readme_quotes_the_picture_of_the_demo(small, capsys):
    block, = [text for text in text_of("README.md").split("```") if "▁" in text]
    quoted = [line for line in block.splitlines() if "MiB" in line]

    assert ds.main("--epochs 1 --max-steps 1 --device cpu".split()) == 0     # memory comes first

    printed = capsys.readouterr().out.splitlines()
    assert len(quoted) >= 4
    for line in quoted:
        same_row, = [other for other in printed if other.startswith(line[:17])]
        assert float(line.split()[-2]) == pytest.approx(float(same_row.split()[-2]), rel=0.05)

def test_sections_1_to_4_can_be_copied_and_need_torch_alone(tmp_path):
    text = text_of("decoupled_split.py").split("# ---- EDIT 5")[0]
    text = re.sub(r"# Only the experiment needs these.*?\n\n", "", text, flags=re.DOTALL)
    assert not re.search(r"\b(print|open)\(|\b(options|argparse|os)\.", text)
    (tmp_path / "copied.py").write_text(text, encoding="utf-8")
    code = """if True:
        import sys
        from copied import *
        x, y = torch.randn(4, 3, 8, 8), torch.arange(4)
        for step, depth in ((decoupled_step, 1), (backprop_step, None)):
            layers = [ResidualBlock(3, 4), ResidualBlock(4, 8, 2), classifier(8, 1, 4)]
            plan = {"client": group_ends(0, 1, 1), "server": [3]}
            parties = cut_network(layers, plan, (3, 8, 8), depth, lr=0.1, total_steps=2)
            channel = Channel("uint8")
            assert measure_memory(parties, step, channel, x, y)["host_peak"] > 0
            hand_over(parties[0], channel)
        assert not {"torchvision", "decoupled_split"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=ENV, check=True)

def test_the_metadata_for_uv_are_the_requirements():
    block = re.search(r"^# /// script\n(.*?)^# ///", text_of("decoupled_split.py"), re.M | re.S)
    needed = re.search(r"dependencies = (.*)", block.group(1)).group(1)

    assert json.loads(needed) == [line for line in text_of("requirements.txt").split()
                                  if not line.startswith("pytest")]

def test_the_plain_command_prints_the_table_and_the_picture(tmp_path):
    argv = [sys.executable, HERE / "decoupled_split.py", "--max-steps", "2", "--epochs", "1"]
    env = {**ENV, "PYTHONIOENCODING": "ascii"}          # a console without the bars

    process = subprocess.run([*argv, "--device", "cpu"], cwd=tmp_path, env=env,
                             capture_output=True, encoding="utf-8")

    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert ["sent:", "down", "gradients,", "MB", "2.10", "0.00", "-100.0%"] in [
        line.split() for line in lines]                 # 2 x 32 images x 32 x 16 x 16 x 4 bytes
    rows = [line.split()[:2] for line in lines[-6:]]
    assert rows == [[mode, name] for mode in MODES for name in ("client", "server", "host")]


# ---- the benchmark: python test_decoupled_split.py -----------------------------------

def benchmark(rounds=40):
    """Print the median milliseconds of a training step of ResNet-20 with batches of 128 images.

    An uncut loop in plain PyTorch, and both protocols with and without --amp, take turns
    on the same batches.
    """
    torch.set_num_threads(os.cpu_count())
    train_set, _ = ds.synthetic(0)
    whole = uncut(20)
    sgd, schedule = oracle_sgd(whole.parameters())

    def plain(x, y):
        loss = F.cross_entropy(whole(x), y)
        loss.backward()
        sgd.step()
        sgd.zero_grad()
        schedule.step()

    loops = {"uncut": plain}
    for amp in (False, True):
        for mode in MODES:
            parties = ds.build(make_options(mode, depth=20, amp=amp), train_set, 100)
            loop = functools.partial(ds.STEPS[mode], *parties, ds.Channel())
            loops[mode + (" --amp" if amp else "")] = loop

    times = {name: [] for name in loops}
    draw = functools.partial(ds.batches, *train_set, 128, torch.Generator().manual_seed(0))
    batches = itertools.chain.from_iterable(draw() for _ in itertools.count())
    order = deque(loops)
    for x, y in itertools.islice(batches, rounds):
        order.rotate()          # no loop is always the first
        for name in order:
            start = time.perf_counter()
            loops[name](x, y)
            times[name].append(time.perf_counter() - start)
    for name, seconds in times.items():
        middle = sorted(seconds[5:])[(rounds - 5) // 2]
        print(f"{name:16}{1000 * middle:8.1f} ms per step{128 / middle:9.0f} images/s")

if __name__ == "__main__":
    benchmark()
