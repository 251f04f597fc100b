"""Decoupled split learning in one file: two halves, and no gradient between them.

A client holds private images and runs the first layers of a network. A server runs
the rest. The client sends z, the activations at the cut layer ("smashed data"), and the
labels y. Below, "host" means one machine that runs both in turn, as this program does.

    Conventional split learning: --mode backprop

        client    forward, then wait with all activations in memory
                      ---- z, y ---->   server    forward, loss, backward
                     <---- dL/dz ----   server    update
        client    backward with dL/dz: the activations are freed; update

    Decoupled split learning: --mode decoupled

        client    forward, auxiliary loss, backward: the activations are freed; update
                      ---- z, y ---->   server    forward, loss, backward, update
        client    the next batch, without waiting

The decoupled client learns from a small auxiliary classifier on z and the same labels.
The finished network does not need it. No gradient is ever sent.
Method: "Decoupled Split Learning via Auxiliary Loss", Zihad et al. 2026, arXiv 2601.19261.

    python decoupled_split.py                                       both modes, no data needed
    python decoupled_split.py --mode decoupled --dataset cifar10    the real thing
    python decoupled_split.py --help                                every option

Measured with --dataset cifar10 (ResNet-20, ten epochs, seed 0, two CPU cores):

    backprop    87.2% accuracy    3.28 GB sent per epoch    194 MiB peak memory
    decoupled   86.7%             1.64 GB                   147 MiB

The peak is that of the live tensors on one host, without the images. The paper claims
the same accuracy, half of the bytes, and up to 58% less peak memory. Here it is 24% less:
`train_locally` says what it takes to save 58%.

Part I is the method, and its last lines show it in use. All of it can be copied into a
program that has torch 2.6 or newer. You can stop reading there. Part II is the experiment
around it. It begins with a list: where to change what.

MIT licence; the text is in README.md.
"""
# Part I needs these.
import math
import time
import weakref
from collections import deque
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Only Part II needs these.
import argparse
import json
import os
import socket
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import islice


# ======================================================================================
# PART I: THE METHOD
# ======================================================================================

# ---- 1. The two protocols ------------------------------------------------------------
#
# A party is the client or the server. Each stands for a machine of its own; here one
# host runs them in turn. A party owns one or more local modules. A local module is a
# group of layers (its body) and, where it needs a loss of its own, a classifier on the
# output of these layers (its head). Section 2 has the classes, section 3 the channel.
#
# In both protocols each layer runs forward once per batch, in training mode, and on the
# same images. So the protocols differ in their gradients only, not in how often
# batch-norm updates its statistics.

def train_locally(party, x, y):
    """Train each module of a party on its own loss. Return the last one's output and loss.

    x: (B, ...) the input of the party. y: (B,) labels. The output is detached, the loss
    is a number.

    With one module per party, all activations of a party are alive when its backward
    pass begins, as in backprop mode. But a host holds those of one party at a time, not
    of both. So its peak comes from the party with more activations. This saves half at
    best.

    With several modules per party, only the activations of one module (and the input of
    the party) are alive at a time. This saves more: in ResNet-110 two modules on the
    client reach the paper's 58%. (The paper does not say how it reached them.) But it
    usually costs accuracy (Decoupled Greedy Learning, Belilovsky et al. 2019, arXiv
    1901.08164). Larger auxiliary classifiers can win it back, for a little of the memory
    (README.md, first table).
    """
    for module in party:
        z = module(x)
        loss = F.cross_entropy(module.classify(z), y)
        loss.backward()         # frees the activations of this module, except z
        module.update()
        x = z.detach()          # no gradient comes back from the next module
    return x, loss.item()

def decoupled_step(client, server, channel, x, y):
    """One batch of decoupled split learning (paper, section III).

    x: (B, C, H, W) images. y: (B,) labels. Both are the client's.
    Return the losses: {party name: number}.

    z and y go up. Nothing comes down. When the server begins, only z (as it was encoded)
    is left of the client's activations. So a host never holds the activations of both
    parties. In backprop mode it does.
    """
    with client.working():
        z, client_loss = train_locally(client, x, y)    # frees the client's activations
        channel.send(z, "up", "activations")            # z: (B, C', H', W')
        channel.send(y, "up", "labels")
        del z                   # now only the channel holds it, until it is received

    # Two real machines would now work at the same time: the client on its next batch.

    with server.working():
        z_received = channel.receive("up", "activations")
        y_received = channel.receive("up", "labels")
        # z_received requires no gradient, so dL/dz is not even computed.
        _, server_loss = train_locally(server, z_received, y_received)

    return {client.name: client_loss, server.name: server_loss}

def backprop_step(client, server, channel, x, y):
    """One batch of conventional split learning (Gupta & Raskar 2018, arXiv 1810.06060).

    Arguments and result are those of `decoupled_step`, but there is no client loss. z
    and y go up, and dL/dz comes down. With a float32 wire and without autocast this
    trains like the uncut network. The modules of a party are run as one.
    """
    with client.working():
        z = client(x)           # its graph keeps all activations of the client alive
        channel.send(z, "up", "activations")
        channel.send(y, "up", "labels")

    with server.working():      # all this time the client waits with full memory
        z_received = channel.receive("up", "activations")
        y_received = channel.receive("up", "labels")
        z_received.requires_grad_()             # makes autograd compute dL/dz
        scores = server.scores(z_received)      # (B, classes)
        loss = F.cross_entropy(scores, y_received)
        loss.backward()
        channel.send(z_received.grad, "down", "gradients")      # as large as z
        server.update()
        server_loss = loss.item()
        # The server is done with this batch: free its tensors before the client works.
        del z_received, y_received, scores, loss

    with client.working():
        dz = channel.receive("down", "gradients")
        dz = dz.to(z.dtype)     # which is bfloat16 under autocast
        z.backward(dz)          # frees the client's activations, except z
        client.update()

    return {server.name: server_loss}

def hand_over(client, channel):
    """Send the client's part to the next client: weights, buffers, momentum.

    Several clients work one after the other and share one set of weights. One Party
    stands for all of them, so it sends its state to itself. The auxiliary classifier is
    part of it. (`state_tensors` returns the tensors themselves, so `copy_` changes the
    weights. The learning rate is not sent: here one schedule counts the batches of all
    clients.)
    """
    for tensor in client.state_tensors():
        channel.send(tensor, "relay", "weights")
        tensor.copy_(channel.receive("relay", "weights"))


# ---- 2. Local modules and parties ----------------------------------------------------

class LocalModule(nn.Module):
    """A group of layers that is trained on its own, with its own optimizer.

    body: a list of layers. head: a module that turns the output of the body into class
    scores, or None. The head of the very last module is the classifier of the network.
    In decoupled mode all others have an auxiliary classifier, in backprop mode they
    have None.

    make_optimizer: called with the list of the parameters (it may be empty), returns an
    optimizer and one of PyTorch's learning rate schedules, which is stepped once per
    batch. There is no optimizer across the cut, because the two sides are updated at
    different times and on different machines.

    autocast_dtype: the precision of the forward pass, such as torch.bfloat16, or None.
    """

    def __init__(self, body, head, make_optimizer, autocast_dtype=None):
        super().__init__()
        self.body = nn.Sequential(*body)
        self.head = head
        self.autocast_dtype = autocast_dtype
        self.optimizer, self.schedule = make_optimizer(list(self.parameters()))

    def forward(self, x):
        with self.autocast(x):
            return self.body(x)

    def classify(self, z):
        """Class scores (B, classes) in float32 from z, the output of the body."""
        with self.autocast(z):
            scores = self.head(z)
        return scores.float()       # so that the loss is computed in full precision

    def autocast(self, tensor):
        enabled = self.autocast_dtype is not None
        return torch.autocast(tensor.device.type, self.autocast_dtype, enabled)

    def update(self):
        """One optimizer step. RuntimeError if a weight has no gradient.

        The gradients are freed here. Otherwise they would stay until the next batch.
        """
        if any(p.requires_grad and p.grad is None for p in self.parameters()):
            raise RuntimeError("update() without a backward pass through all weights (in "
                               "backprop mode only the last module may have a head)")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()

class Party(nn.Sequential):
    """The part of a network on one machine: a name, a chain of local modules, a clock.

    Calling it runs the bodies of its modules one after the other, without their heads.
    `seconds` is the time spent at work since the last `restart_clock`.
    """

    def __init__(self, name, modules):
        super().__init__(*modules)
        self.name = name
        self.at_work = False
        self.restart_clock()

    def scores(self, x):
        """Class scores (B, classes) of the last head for x, the input of the party."""
        return self[-1].classify(self(x))

    def update(self):
        for module in self:
            module.update()

    def state_tensors(self):
        """Everything that stays between two batches: weights, buffers, momentum."""
        state = [(module.state_dict(), module.optimizer.state_dict()) for module in self]
        return tensors_in(state)

    def restart_clock(self):
        self.seconds = 0.0

    @contextmanager
    def working(self):
        """Inside this block the clock runs and the ledger (section 5) charges the party."""
        wait_for_gpu()
        start = time.perf_counter()
        self.at_work = True
        try:
            yield
            wait_for_gpu()
        finally:
            self.at_work = False
            self.seconds += time.perf_counter() - start

def wait_for_gpu():
    """A GPU works asynchronously. Return when it has finished what it was asked to do."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()

def tensors_in(tree):
    """All tensors in nested tuples, lists and dictionaries."""
    return [leaf for leaf in tree_leaves(tree) if torch.is_tensor(leaf)]

def storages(tree):
    """The storages of all tensors in a tree: the memory behind tensors and their views."""
    return {tensor.untyped_storage() for tensor in tensors_in(tree)}


# ---- 3. Channel: the only way from one party to another ------------------------------

WIRES = ("float32", "bfloat16", "uint8")
KINDS = ("activations", "gradients", "labels", "weights")

class Channel:
    """A simulated network: it detaches, encodes, counts and queues tensors.

    A hop is a route with a name and with counters of its own: "up" and "down" in
    training, "relay" from one client to the next, "evaluation" for the activations of
    test images, which are counted apart. `bytes[hop][kind]` counts what was sent. To
    send over a hop that is not in `hops`, or a kind that is not in KINDS, is a KeyError.
    To receive what was not sent is a RuntimeError.

    wire: how activations and gradients are encoded. Labels take one byte each, and
    weights are sent as they are.

    For a real network, override `push` and `pull`. The receiver knows the hop and the
    kind of what comes next, but shapes and types have to travel with the tensors, and the
    receiver puts them on its own device. What stands under `with client.working()` in a
    step function is then the program of the client, and what stands under `with
    server.working()` that of the server. NOTES.md, section 8, says what else is divided.
    """

    def __init__(self, wire="float32", hops=("up", "down", "relay", "evaluation")):
        if wire not in WIRES:
            raise ValueError(f"wire {wire!r} is not one of {WIRES}")
        self.wire = wire
        self.hops = hops
        self.crossing = set()           # storages that the receiver is reading just now
        self.reset()

    def reset(self):
        """Begin to count at zero, and drop what was sent but not received.

        Otherwise the step after an interrupted one would receive the old batch.
        """
        self.queues = {}
        self.bytes = {hop: dict.fromkeys(KINDS, 0) for hop in self.hops}

    def send(self, tensor, hop, kind):
        # A network carries numbers, not an autograd graph. Without this detach the
        # server's backward pass in backprop mode would run on into the client's layers:
        # a gradient that never crosses the wire. (z_received.grad would be None, so
        # sending it would fail. In decoupled mode train_locally has already detached z.)
        tensor = tensor.detach()
        payload = self.encode(tensor, kind)
        self.bytes[hop][kind] += sum(part.nbytes for part in payload)
        self.push(payload, hop, kind)

    def receive(self, hop, kind):
        """The oldest tensor that was sent on this hop and has this kind.

        It has a storage of its own and no graph. The copy is made here, on receipt: a
        copy made in `send` would be charged to the sender.
        """
        payload = self.pull(hop, kind)
        self.crossing = storages(payload)       # for the ledger: this may be read
        tensor = self.decode(payload, kind)
        self.crossing = set()
        return tensor

    def push(self, payload, hop, kind):
        """Put a list of tensors on the wire."""
        self.queues.setdefault((hop, kind), deque()).append(payload)

    def pull(self, hop, kind):
        """Take the oldest list of tensors off the wire."""
        queue = self.queues.get((hop, kind))
        if not queue:
            raise RuntimeError(f"no {kind} on the hop {hop!r} to receive")
        return queue.popleft()

    def encode(self, tensor, kind):
        """The list of tensors that crosses the wire.

        It may share memory with `tensor`, so do not write into that before it is received.
        """
        if kind == "labels":
            if tensor.min() < 0 or tensor.max() > 255:
                raise ValueError("a label is a number from 0 to 255, one byte on the wire")
            return [tensor.to(torch.uint8)]
        if kind == "weights":
            return [tensor]
        if self.wire == "bfloat16":
            return [tensor.bfloat16()]
        if self.wire == "uint8":
            return quantize(tensor)
        return [tensor.float()]

    def decode(self, payload, kind):
        """A new tensor: int64 labels, float32 activations and gradients."""
        if kind == "labels":
            return payload[0].to(torch.int64)
        if kind == "weights":
            return payload[0].clone()
        if self.wire == "uint8":
            values, low, scale = payload
            return values * scale + low
        return payload[0].to(torch.float32, copy=True)

def quantize(tensor):
    """Return [values, low, scale] with tensor ~ values * scale + low.

    values: uint8, in the shape of the tensor. low, scale: float32, one number per
    channel (dimension 1), in a shape that broadcasts. The error is scale / 2 at most,
    apart from float32 rounding. dL/dz is rounded like z, and a zero becomes a small
    number, because 0 is seldom one of the 256 levels. So in backprop mode the client
    learns from a coarse gradient.
    """
    tensor = tensor.float()
    all_but_channel = [d for d in range(tensor.dim()) if d != 1]
    low = tensor.amin(all_but_channel, keepdim=True)
    high = tensor.amax(all_but_channel, keepdim=True)

    smallest = torch.finfo(torch.float32).tiny      # a constant channel has high == low
    scale = ((high - low) / 255).clamp_min(smallest)
    values = ((tensor - low) / scale).round_().to(torch.uint8)
    return [values, low, scale]


# ---- 4. Network: a flat list of layers, and where it is cut --------------------------
#
# A network is a flat list of layers, each from one tensor to one tensor. The last entry
# is the classifier. Only one tensor crosses a cut, so a skip connection has to lie inside
# one layer, as it does in ResidualBlock. The first layer of the server and of a head must
# not work in place (as ReLU with inplace=True does): autograd refuses it in backprop
# mode, and a head would change the z that is sent.

class ResidualBlock(nn.Module):
    """(B, c_in, H, W) -> (B, c_out, H / stride, W / stride), rounded up.

    Two 3x3 convolutions beside a shortcut without parameters (He et al. 2016, section
    4.2, option A): every stride-th pixel, and zeros for the new channels. (With c_out <
    c_in it drops the last channels.)
    """

    def __init__(self, c_in, c_out, stride=1):
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        shortcut = x[:, :, ::self.stride, ::self.stride]
        new_channels = out.shape[1] - x.shape[1]
        shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, new_channels))
        return F.relu(out + shortcut, inplace=True)

def classifier(channels, grid, classes):
    """(B, channels, H, W) -> (B, classes): average pooling to grid x grid, then linear."""
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(grid),
        nn.Flatten(),
        nn.Linear(channels * grid**2, classes),
    )

def resnet_layers(depth, classes, channels=3):
    """The ResNet for CIFAR (He et al. 2016, section 4.2) as a flat list of layers.

    depth: 6n + 2, or it is a ValueError. channels: of the images. The list has
    3 + 3n + 1 entries. The stem counts as three layers (convolution, batch-norm, ReLU)
    and a residual block as one, as in the cuts of the paper.
    """
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"a depth of {depth} is not 8, 14, 20 or another 6n + 2")
    blocks_per_stage = (depth - 2) // 6
    layers = [
        nn.Conv2d(channels, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
    ]
    c_in = 16
    for c_out in (16, 32, 64):
        for _ in range(blocks_per_stage):
            stride = c_out // c_in      # 2 where the channels double, else 1
            layers.append(ResidualBlock(c_in, c_out, stride))
            c_in = c_out
    layers.append(classifier(64, 1, classes))
    return layers

@torch.no_grad()
def output_shapes(layers, example):
    """The output shape of every layer for one example image of shape (1, C, H, W).

    ValueError, which names the layer, if a layer does not accept its input. The layers
    are in training mode afterwards.
    """
    shapes = []
    x = example
    for number, layer in enumerate(layers):
        layer.eval()            # the running statistics must not learn from the example
        try:
            x = layer(x)
        except Exception as error:
            name = f"layer {number}, {type(layer).__name__}"
            raise ValueError(f"{name}, does not accept {tuple(x.shape)}: {error}") from error
        finally:
            layer.train()
        shapes.append(tuple(x.shape))
    return shapes

def auxiliary_classifier(shapes, end, depth, classes, make_block=ResidualBlock):
    """A classifier on z, the output of the first `end` layers.

    shapes: of the outputs of all layers, from `output_shapes`.
    depth: the number of blocks. It is reduced if fewer layers lie between z and the
    network's classifier. A block has the channels and about the height of one of these
    layers, which are evenly spaced (AugLocal, Ma et al. 2024, arXiv 2402.17318).
    make_block: called as make_block(c_in, c_out, stride). ValueError for a stride above 4.

    After the blocks, pooling to 2x2 and a linear layer. With depth 0 it is the linear
    layer of the paper (section IV-A), but on z pooled to 4x4: on all of z it fails at
    the default learning rate (NOTES.md, section 5).
    """
    _, c_in, *size = shapes[end - 1]
    if not size:                # z is a vector
        return nn.Linear(c_in, classes)
    if len(size) != 2:
        raise ValueError(f"no auxiliary classifier for z of shape {shapes[end - 1]}")

    followers = [shape for shape in shapes[end:-1] if len(shape) == 4]
    depth = min(depth, len(followers))
    height = size[0]
    blocks = []
    for i in range(1, depth + 1):
        chosen = len(followers) * i // depth - 1        # evenly spaced, ends with the last
        _, c_out, new_height, _ = followers[chosen]
        stride = max(1, round(height / new_height))
        if stride > 4:          # the 3x3 convolutions would not see most of z
            raise ValueError(f"an auxiliary block from {height} to {new_height} rows skips most "
                             f"of z; use depth 0 (no block) or a larger depth")
        blocks.append(make_block(c_in, c_out, stride))
        c_in = c_out
        height = new_height
    grid = 2 if blocks else 4
    return nn.Sequential(*blocks, *classifier(c_in, grid, classes))

def group_ends(start, stop, count):
    """Split layers start to stop - 1 into `count` consecutive groups. Return their ends.

    An end is the number of the layer after the group. Each group has ceil(n / count) of
    the n layers, and the last one may be shorter, as in the public code of the authors.
    Not every count is possible: ValueError, which names those that are.
    """
    n = stop - start
    if n < 1:
        raise ValueError(f"there is no layer from {start} to {stop}")
    possible = sorted({math.ceil(n / size) for size in range(1, n + 1)})    # by group size
    if count not in possible:
        counts = ", ".join(map(str, possible))
        raise ValueError(f"{n} layers can be split into {counts} groups")
    size = math.ceil(n / count)
    return [min(start + size * i, stop) for i in range(1, count + 1)]

def cut_network(layers, plan, make_head, make_optimizer, autocast_dtype=None):
    """Cut a flat list of layers into parties. Return the list of parties.

    plan: where the modules of each party end, in the order of the layers. With the plan
    {"client": [7], "server": [10, 13]} the client has layers 0 to 6 in one module, and
    the server has layers 7 to 9 and 10 to 12 in two. A third party is a third key. It is
    a ValueError if a party has no module, if the ends do not increase, or if the last
    end is not the number of layers.
    layers: they are not copied. Two networks need two lists, or they share weights.
    make_head: called as make_head(end) for every module but the last, returns its
    auxiliary classifier. In backprop mode it returns None.
    make_optimizer, autocast_dtype: see LocalModule.
    """
    ends = [end for party_ends in plan.values() for end in party_ends]
    if not ends or not all(plan.values()):
        raise ValueError(f"a party without a module in {plan}")
    if ends != sorted(set(ends)) or ends[0] < 1 or ends[-1] != len(layers):
        raise ValueError(f"the ends {ends} must increase and stop at {len(layers)}")

    parties = []
    start = 0
    for name, party_ends in plan.items():
        modules = []
        for end in party_ends:
            if end == len(layers):
                body = layers[start:-1]
                head = layers[-1]       # the classifier of the network
            else:
                body = layers[start:end]
                head = make_head(end)
            modules.append(LocalModule(body, head, make_optimizer, autocast_dtype))
            start = end
        parties.append(Party(name, modules))
    return parties


# ---- 5. Memory: a ledger of live tensors ---------------------------------------------

class Ledger(TorchDispatchMode):
    """Counts the bytes of live tensors, and charges each to the party that made it.

    Inside `with ledger:` PyTorch calls `__torch_dispatch__` for every operator, forward
    and backward. A storage is counted once, from the operator that returns it until it
    is freed. Each operator adds one row to `trace`: (name of the party at work, {name:
    live bytes}). RuntimeError if an operator runs while no party, or more than one, is
    at work.

    Counted: weights, buffers and momentum, which are charged when the ledger is made;
    activations, gradients and temporaries. Not counted: the data set and the batch
    drawn from it, memory that an operator uses inside, the allocator's reserve, the
    interpreter.

    channel, batch: if they are given, the ledger also checks that a party reads only
    what it has made itself or receives. The batch belongs to the first party.
    RuntimeError for a tensor that goes from one party to another past the channel.
    """

    def __init__(self, parties, channel=None, batch=()):
        super().__init__()
        self.parties = list(parties)
        self.channel = channel
        self.live = {party.name: 0 for party in self.parties}
        self.owners = weakref.WeakKeyDictionary()       # storage: name of a party
        self.trace = []

        for storage in storages(batch):
            self.owners[storage] = self.parties[0].name
        for party in self.parties:
            self.charge(party.name, storages(party.state_tensors()))
        self.static = dict(self.live)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)

        name = self.worker(function)
        read = storages((args, kwargs))
        if self.channel is not None:
            self.check_owners(name, function, read - self.channel.crossing)
        self.charge(name, storages(result) - read)      # a view is no new memory
        self.trace.append((name, dict(self.live)))
        return result

    def worker(self, function):
        """The name of the one party at work."""
        names = [party.name for party in self.parties if party.at_work]
        if len(names) != 1:
            raise RuntimeError(f"{function} runs while {names} are at work, not one party "
                               f"of {list(self.live)}: is a `with party.working()` missing?")
        return names[0]

    def check_owners(self, name, function, read):
        for storage in read:
            owner = self.owners.get(storage)
            if owner is not None and owner != name:     # None: no party made it
                raise RuntimeError(f"{function}: the {name} reads what the {owner} "
                                   f"did not send")

    def charge(self, name, new):
        # While a storage lives, PyTorch shows it as the same Python object each time, so
        # `owners` knows it again. `finalize` calls `release` when it is freed.
        for storage in new:
            if storage in self.owners:
                continue
            self.owners[storage] = name
            size = storage.nbytes()
            self.live[name] += size
            weakref.finalize(storage, self.release, name, size)

    def release(self, name, size):
        """Called by Python when a storage is freed."""
        self.live[name] -= size

    def figures(self, width=60):
        """What the trace says, in bytes:

        `NAME_peak`: the peak of each party. `host_peak`: the peak of their sum, as if
        one host ran them all. `NAME_held`: what each party but the last still holds at
        the last operator of the last party. `picture`: the peaks of each party, and of
        all of them (`both`), in `width` consecutive groups of operators.
        """
        curves = {name: [live[name] for _, live in self.trace] for name in self.live}
        host = [sum(live.values()) for _, live in self.trace]

        last_party = self.parties[-1].name
        last_operator = max(i for i, (name, _) in enumerate(self.trace) if name == last_party)

        figures = {f"{name}_peak": max(curve) for name, curve in curves.items()}
        figures["host_peak"] = max(host)
        for party in self.parties[:-1]:
            figures[f"{party.name}_held"] = curves[party.name][last_operator]
        curves["both"] = host
        figures["picture"] = {name: peaks_of_groups(curve, width)
                              for name, curve in curves.items()}
        return figures

def peaks_of_groups(curve, width):
    """The maximum of each of `width` groups of neighbouring numbers.

    With fewer numbers than groups, groups overlap, so that none is empty.
    """
    borders = [len(curve) * i // width for i in range(width + 1)]
    return [max(curve[a:max(b, a + 1)]) for a, b in zip(borders, borders[1:])]


# ---- Part I in use -------------------------------------------------------------------
#
# batches = [(torch.randn(8, 3, 32, 32), torch.randint(10, (8,)))]
# layers = resnet_layers(depth=20, classes=10)
# shapes = output_shapes(layers, torch.zeros(1, 3, 32, 32))
#
# def make_head(end):
#     return auxiliary_classifier(shapes, end, depth=1, classes=10)
#
# def make_optimizer(parameters):
#     group = {"params": parameters}      # SGD([]) is an error, an empty group is not
#     sgd = torch.optim.SGD([group], lr=0.05, momentum=0.9)
#     return sgd, torch.optim.lr_scheduler.ConstantLR(sgd, factor=1)
#
# plan = {"client": [7], "server": [13]}
# client, server = cut_network(layers, plan, make_head, make_optimizer)
# channel = Channel()
# for x, y in batches:
#     losses = decoupled_step(client, server, channel, x, y)
# print(losses, channel.bytes)
#
# client.eval()
# server.eval()
# with torch.no_grad():
#     scores = server.scores(client(x))     # client.scores(x): by the client alone


# ======================================================================================
# PART II: THE EXPERIMENT
#
# Where to change what:
#   another network     its list of layers, in build_parties
#   another data set    an entry in DATA_SETS
#   a third party       the step functions (and the example above), make_plan, an option
#                       NAME_modules, and the hops of Channel. All else loops over the
#                       parties. (Only the first party is handed over, and is reported
#                       as aux_accuracy. --cut sets where the first party ends.)
#   a real network      Channel.push and pull; the step functions, Run.train_epoch,
#                       evaluate and hand_over, each divided in two
#
# Then run --max-steps 1 --epochs 1. Before any training the program checks the step
# functions. It finds operators outside of a `with party.working()`, tensors that go past
# the channel or stay in memory, modules that are not updated, and losses that are not
# returned. (evaluate and hand_over are not checked. hand_over runs only after the last
# batch of a client: with --clients 2, but without --max-steps.)
# ======================================================================================

class UserError(Exception):
    """An error that the user can fix. main() prints its one line and returns 2."""


# ---- 6. Data -------------------------------------------------------------------------

@dataclass(frozen=True)
class DataSet:
    """All that the program needs to know about a data set.

    load: a function of the options that returns [(images, labels), (images, labels)],
    for training and for testing: images (N, C, H, W) uint8, labels (N,) int64. The
    training set should be in random order, because each client gets a part of it in one
    piece.
    """

    load: Callable
    classes: int
    image_shape: tuple          # (C, H, W)
    padding: int                # black pixels around an image before a random crop
    flip: bool                  # whether to mirror half of the training images
    recipe: dict                # options that have another default for this data set

def load_cifar(options):
    """CIFAR-10 or CIFAR-100 from torchvision, which downloads it if it is missing."""
    name = options.dataset
    try:
        from torchvision import datasets    # nothing else in this file needs torchvision
    except Exception as error:              # missing, or made for another version of torch
        raise UserError(f"--dataset {name}: torchvision does not work; install it with "
                        f"pip install -r requirements.txt, or try --dataset synthetic "
                        f"({error})") from error
    source = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    folder = os.path.join(options.data_dir, source.base_folder)
    archive = os.path.join(options.data_dir, source.filename)

    if not os.path.exists(folder):
        check_file("--data-dir", archive, make_folder=True)
        if not os.path.exists(archive):
            say(f"downloading {source.url} (about 170 MB) to {options.data_dir}")

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(60)            # seconds without an answer
    try:
        parts = [source(options.data_dir, train, download=True) for train in (True, False)]
    except Exception as error:              # of os, urllib, tarfile, pickle or torchvision
        remedy = f"put {source.url} there, or try --dataset synthetic"
        if os.path.exists(folder):
            remedy = f"delete the folder {folder} and start again"
        raise UserError(f"--dataset {name}: missing or damaged in --data-dir "
                        f"{options.data_dir}; {remedy} ({error})") from error
    finally:
        socket.setdefaulttimeout(timeout)

    return [(torch.from_numpy(part.data).permute(0, 3, 1, 2), torch.tensor(part.targets))
            for part in parts]

def synthetic(seed, sizes=(2560, 1000)):
    """Images of ten classes, made in memory, that take training to tell apart.

    Each class has a grey pattern. An image shows it bright or dark, at a random place,
    under coloured clutter and noise. All classes have the same mean image, so a linear
    model on pixels finds little. The clutter has no brightness, so a trained
    convolution can remove it, but random features mix it with the pattern. (With some
    seeds they do well all the same: NOTES.md, section 6.)
    """
    generator = torch.Generator().manual_seed(seed)

    def smooth_noise(count, channels, cells, size):
        noise = torch.randn(count, channels, cells, cells, generator=generator)
        return F.interpolate(noise, size, mode="bicubic")

    patterns = F.pad(smooth_noise(10, 1, cells=4, size=16), (16, 16, 16, 16))
    sets = []
    for count in sizes:
        labels = torch.randint(10, (count,), generator=generator)
        sign = 2 * torch.randint(2, (count, 1, 1, 1), generator=generator) - 1
        top, left = torch.randint(17, (2, count), generator=generator)
        pattern = sign * crop(patterns[labels], top, left, 32, 32)

        clutter = smooth_noise(count, 3, cells=8, size=32)
        clutter = clutter - clutter.mean(1, keepdim=True)
        noise = torch.randn(count, 3, 32, 32, generator=generator)

        images = 20 * (1.5 * pattern + 3 * clutter + 0.7 * noise) + 128
        sets.append((images.clamp(0, 255).to(torch.uint8), labels))
    return sets

CIFAR_SHAPE = (3, 32, 32)
DATA_SETS = {
    "synthetic": DataSet(lambda options: synthetic(options.seed), 10, CIFAR_SHAPE, padding=4,
                         flip=True, recipe={"epochs": 4, "batch_size": 32, "lr": 0.1}),
    "cifar10": DataSet(load_cifar, 10, CIFAR_SHAPE, padding=4, flip=True, recipe={}),
    "cifar100": DataSet(load_cifar, 100, CIFAR_SHAPE, padding=4, flip=True, recipe={}),
}

def crop(images, top, left, height, width):
    """One window (height, width) from each image (B, C, H, W): (B, C, height, width).

    top, left: (B,) the upper left corner of each window.
    """
    # A view of all windows: (B, C, tops, lefts, height, width).
    windows = images.unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(images)), :, top, left]

def augment(images, data_set, generator):
    """A random crop of each padded image. If the data set allows, half are mirrored."""
    count, _, height, width = images.shape
    padding = data_set.padding
    padded = F.pad(images, (padding, padding, padding, padding))
    top, left = torch.randint(2 * padding + 1, (2, count), generator=generator)
    images = crop(padded, top, left, height, width)

    if data_set.flip:
        mirrored = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
        images = torch.where(mirrored.to(images.device), images.flip(3), images)
    return images

def to_float(images):
    """uint8 pixels to -2..2. A finer scaling is not needed where batch-norm follows."""
    if images.dtype != torch.uint8:
        raise TypeError(f"images are uint8, from 0 to 255, not {images.dtype}")
    return (images.float() - 128) / 64

def batch_count(images, size):
    """The number of batches. The schedule and the hand-over rely on it, too."""
    return math.ceil(images / size)

def equal_batches(order, size):
    """Split n indices into `batch_count` batches. Their sizes differ by at most one."""
    return order.tensor_split(batch_count(len(order), size))

def training_batches(images, labels, size, data_set, generator):
    """Yield shuffled and augmented batches: x (B, C, H, W) float32, y (B,) int64."""
    order = torch.randperm(len(labels), generator=generator)
    for index in equal_batches(order, size):
        yield to_float(augment(images[index], data_set, generator)), labels[index]

def test_batches(images, labels, size):
    """Yield the images as they are: x (B, C, H, W) float32, y (B,) int64."""
    for index in equal_batches(torch.arange(len(labels)), size):
        yield to_float(images[index]), labels[index]


# ---- 7. Options ----------------------------------------------------------------------

def option(default, text, choices=None, least=None):
    """A field of Options: its default, its line of --help, its choices or least value.

    Its type is str, int, float, or bool with the default False. No % in the text. A name
    that is a key of Run.summary would be lost in the log.
    """
    return field(default=default, metadata={"text": text, "choices": choices, "least": least})

CUTS = {"shallow": 4, "middle": 3, "deep": 2}       # the client has 1/4 of the layers, ...

@dataclass
class Options:
    """Everything a training run depends on. The defaults are the recipe for CIFAR.

    In a notebook call parse([...]), which knows the recipes of the other data sets, too.
    """

    mode: str = option("compare", "protocol, or both one after the other",
                       ["compare", "backprop", "decoupled"])
    dataset: str = option("synthetic", "images to learn", DATA_SETS)
    data_dir: str = option("data", "folder of CIFAR, which is downloaded if it is missing")
    depth: int = option(20, "of the ResNet: its convolutions and its linear layer, 6n+2",
                        [8, 14, 20, 32, 44, 56, 110])
    cut: str = option("deep", "the client has 1/4, 1/3 or 1/2 of the list of layers", CUTS)
    client_modules: int = option(1, "locally trained modules on the client", least=1)
    server_modules: int = option(1, "locally trained modules on the server", least=1)
    aux_depth: int = option(1, "residual blocks in an auxiliary classifier, at most as many as "
                               "layers follow; 0: only pooling and a linear layer", least=0)
    wire: str = option("float32", "encoding of activations and gradients", WIRES)
    clients: int = option(1, "clients with equal shards of the training set, taking turns", least=1)
    epochs: int = option(10, "passes over the training set", least=1)
    batch_size: int = option(128, "images per batch at most; batches differ by one image at most",
                             least=1)
    lr: float = option(0.2, "peak of the one-cycle learning rate", least=1e-9)
    weight_decay: float = option(5e-4, "L2 penalty", least=0)
    amp: bool = option(False, "bfloat16 autocast: faster where the hardware has it")
    seed: int = option(0, "of weights, batches, augmentation and synthetic images", least=0)
    device: str = option("auto", "auto is the first available one of the others",
                         ["auto", "cuda", "mps", "cpu"])
    max_steps: int = option(0, "batches after which an epoch ends early; 0: all", least=0)
    bandwidth: float = option(100.0, "of the simulated link, Mbit/s", least=1e-9)
    latency: float = option(10.0, "of the simulated link, ms in one direction", least=0)
    checkpoint: str = option("", "file written after each epoch; training resumes from it if it "
                                 "exists")
    log: str = option("", "file to append JSON lines to: one per epoch, a summary per mode")

# A resumed run may change these options: they should not influence weights or accuracy. (A
# finished run that is started again is not evaluated again.)
FREE_ON_RESUME = ["device", "data_dir", "bandwidth", "latency", "checkpoint", "log"]

class Parser(argparse.ArgumentParser):
    """A parser whose errors are user errors like all others."""

    def error(self, message):
        raise UserError(message)

def flag(name):
    """batch_size -> --batch-size"""
    return "--" + name.replace("_", "-")

def parse(argv):
    """Options from the command line. UserError for a value that is not allowed."""
    parser = Parser(description=__doc__.splitlines()[0])
    for entry in fields(Options):
        text = f"{entry.metadata['text']} (default: {str(entry.default) or 'none'}"
        for name, data_set in DATA_SETS.items():
            if entry.name in data_set.recipe:
                text += f", {name}: {data_set.recipe[entry.name]}"
        how = {"type": entry.type, "choices": entry.metadata["choices"]}
        if entry.type is bool:
            how = {"action": "store_true"}
        parser.add_argument(flag(entry.name), default=argparse.SUPPRESS, help=text + ")", **how)

    given = vars(parser.parse_args(argv))       # only what was typed (SUPPRESS)
    recipe = DATA_SETS[given.get("dataset", Options.dataset)].recipe
    options = Options(**{**recipe, **given})

    for entry in fields(Options):
        value = getattr(options, entry.name)
        least = entry.metadata["least"]
        limit = 2**31 if entry.type is int else 1e30     # well below the end of float32
        if least is not None and not least <= value < limit:
            raise UserError(f"{flag(entry.name)} {value}: must be from {least:g} to below {limit:g}")
    return options


# ---- 8. Training and evaluation ------------------------------------------------------

STEPS = {"backprop": backprop_step, "decoupled": decoupled_step}

def build_parties(options, total_steps, device):
    """The parties of a run, with new weights. Both modes start with the same network."""
    data_set = DATA_SETS[options.dataset]
    torch.manual_seed(options.seed)

    # For another network make its list of layers here. (--depth then has no effect.) A list
    # made outside would be trained by the memory measurement and by the other mode, too.
    # The layers draw their weights before any head does: so they are equal in both modes.
    layers = resnet_layers(options.depth, data_set.classes, channels=data_set.image_shape[0])
    shapes = output_shapes(layers, torch.zeros(1, *data_set.image_shape))

    def make_head(end):
        if options.mode == "backprop":
            return None
        return auxiliary_classifier(shapes, end, options.aux_depth, data_set.classes)

    def make_optimizer(parameters):
        group = {"params": parameters}      # may be empty: a module can be a lone ReLU
        sgd = torch.optim.SGD([group], options.lr, momentum=0.9, nesterov=True,
                              weight_decay=options.weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            sgd, options.lr, total_steps, cycle_momentum=False)
        return sgd, schedule

    precision = torch.bfloat16 if options.amp else None
    plan = make_plan(options, len(layers))
    parties = cut_network(layers, plan, make_head, make_optimizer, precision)
    for party in parties:
        # This changes the parameters in place, so the optimizers still have them.
        party.to(device, memory_format=torch.channels_last)
    return parties

def make_plan(options, layer_count):
    """Where the modules of each party end: the plan for `cut_network`."""
    stops = {"client": math.ceil(layer_count / CUTS[options.cut]), "server": layer_count}
    plan = {}
    start = 0
    for name, stop in stops.items():
        count = getattr(options, f"{name}_modules")
        try:
            plan[name] = group_ends(start, stop, count)
        except ValueError as error:
            raise UserError(f"--{name}-modules {count}: {error}") from error
        start = stop
    return plan

class Run:
    """One training run: its parties, its channel, and how far it has got."""

    def __init__(self, options, train_set, test_set, device):
        self.options = options
        self.device = device
        self.step = STEPS[options.mode]
        self.channel = Channel(options.wire)

        # Each client has a shard of its own: (images, labels).
        shards = [tensor.tensor_split(options.clients) for tensor in train_set]
        self.shards = list(zip(*shards, strict=True))
        self.test_set = test_set
        steps = sum(batch_count(len(labels), options.batch_size) for _, labels in self.shards)
        self.steps_per_epoch = min(steps, options.max_steps or steps)

        # Memory is measured on parties and a channel of their own, before training.
        images, labels = self.shards[0]
        # A shard may have fewer images than a batch: then images are repeated.
        index = torch.arange(options.batch_size) % len(labels)
        channel = Channel(options.wire)
        self.memory = measure_memory(lambda: build_parties(options, total_steps=2, device=device),
                                     self.step, channel, to_float(images[index]), labels[index])
        self.bytes_per_batch = channel.bytes

        total_steps = options.epochs * self.steps_per_epoch
        self.parties = build_parties(options, total_steps, device)
        self.epoch = 0              # finished epochs
        self.summary = None         # figures of the last one
        if os.path.exists(options.checkpoint):
            self.resume()

    def introduce(self):
        """Print what each party has, and what one batch sends."""
        options = self.options
        say(f"{options.mode} on {options.dataset} images, {self.device}:")
        x = torch.zeros(1, *DATA_SETS[options.dataset].image_shape, device=self.device)
        for party in self.parties:
            layers = sum(len(module.body) for module in party)
            heads = sum(module.head is not None for module in party)
            weights = sum(p.numel() for p in party.parameters())
            with torch.no_grad():
                x = party.eval()(x)
            say(f"  {party.name}: {layers} layers and {heads} classifier(s), {weights:,} "
                f"parameters, output {tuple(x.shape[1:])}")
        sent = [f"{sum(kinds.values()):,} bytes {hop}"
                for hop, kinds in self.bytes_per_batch.items() if any(kinds.values())]
        say(f"  a batch of {options.batch_size} images sends {', '.join(sent)}")

    def epoch_seed(self):
        """The seed of this epoch: the same in both modes, and after a resume."""
        return self.options.seed * 1_000_003 + self.epoch

    def stream(self):
        """Yield (x, y, whether this is the client's last batch), client after client."""
        options = self.options
        generator = torch.Generator().manual_seed(self.epoch_seed())
        for images, labels in self.shards:
            batches_left = batch_count(len(labels), options.batch_size)
            for x, y in training_batches(images, labels, options.batch_size,
                                         DATA_SETS[options.dataset], generator):
                batches_left -= 1
                yield x, y, batches_left == 0

    def train_epoch(self):
        """Train on each batch of an epoch. Return the figures of the epoch."""
        torch.manual_seed(self.epoch_seed())        # for layers like dropout
        self.channel.reset()
        for party in self.parties:
            party.train()
            party.restart_clock()
        image_count = 0
        hand_overs = 0
        loss_sum = 0
        start = time.perf_counter()

        stream = islice(self.stream(), self.steps_per_epoch)
        for number, (x, y, last_of_client) in enumerate(stream, start=1):
            losses = self.step(*self.parties, self.channel, x, y)
            check_losses(losses, number)
            if last_of_client and len(self.shards) > 1:
                hand_over(self.parties[0], self.channel)
                hand_overs += 1
            image_count += len(y)
            loss_sum += losses[self.parties[-1].name] * len(y)
            self.show_progress(number, image_count, loss_sum / image_count, start)

        seconds = time.perf_counter() - start
        clocks = {party.name: party.seconds for party in self.parties}
        return {
            "train_loss": loss_sum / image_count,
            "images_per_second": image_count / seconds,
            "hand_overs": hand_overs,
            "seconds": {"epoch": seconds, **clocks},
        }

    def show_progress(self, number, image_count, loss, start):
        seconds = time.perf_counter() - start
        steps_left = (self.options.epochs - self.epoch) * self.steps_per_epoch - number
        minutes_left = steps_left * seconds / number / 60
        say(f"{self.options.mode} epoch {self.epoch + 1} step {number}/{self.steps_per_epoch} "
            f"loss {loss:.3f} {image_count / seconds:.0f} images/s {minutes_left:.1f} min left",
            passing=True)

    def train(self):
        """Train to the last epoch. Return the summary of the run."""
        options = self.options
        while self.epoch < options.epochs:
            try:
                figures = self.train_epoch()
                batches = test_batches(*self.test_set, options.batch_size)
                accuracy = evaluate(self.parties, self.channel, batches)
            except FloatingPointError as error:
                raise self.divergence_error(error) from error

            self.epoch += 1
            self.summary = {
                "test_accuracy": accuracy[self.parties[-1].name],
                "aux_accuracy": accuracy[self.parties[0].name],
                "accuracy": accuracy,
                "memory": self.memory,
                "bytes": self.channel.bytes,
                **figures,
            }
            if options.checkpoint:
                save(self, options.checkpoint)
            event = {"event": "epoch", "mode": options.mode, "epoch": self.epoch}
            write_log(options.log, {**event, **self.summary})
            self.show_epoch()

        summary = {"event": "summary", **asdict(options), **self.summary}
        summary["device"] = str(self.device)
        summary["torch"] = str(torch.__version__)
        link_epoch = link_seconds(summary, self.steps_per_epoch)
        summary["seconds"] = {**summary["seconds"], "link_epoch": link_epoch}
        write_log(options.log, summary)
        return summary

    def show_epoch(self):
        figures = self.summary
        line = (f"{self.options.mode} epoch {self.epoch}/{self.options.epochs} "
                f"loss {figures['train_loss']:.3f} test {figures['test_accuracy']:.2%}")
        for party in self.parties[:-1]:
            accuracy = figures["accuracy"][party.name]
            if accuracy is not None:
                line += f" ({party.name} alone {accuracy:.2%})"
        say(f"{line} {figures['images_per_second']:.0f} images/s")

    def divergence_error(self, error):
        path = self.options.checkpoint
        remedy = f"try a lower --lr than {self.options.lr:g}"
        if os.path.exists(path):
            remedy += f" and another --checkpoint, or delete {path}"
        return UserError(f"{error} in epoch {self.epoch + 1} of {self.options.mode}: {remedy}")

    def resume(self):
        """Continue from the checkpoint. UserError if it is damaged or of another run."""
        path = self.options.checkpoint
        own = asdict(self.options)
        try:
            saved = load(path)
            changed = [name for name in own if name not in FREE_ON_RESUME
                       and saved["options"].get(name) != own[name]]
            if not changed:
                restore(self.parties, saved["parties"])
                self.epoch = saved["epoch"]
                self.summary = saved["summary"]
        except Exception as error:          # zipfile, pickle and torch each have their own
            raise UserError(f"--checkpoint {path}: damaged, or not of this program and network; "
                            f"use another path") from error
        if changed:
            name = changed[0]
            raise UserError(f"--checkpoint {path}: its run had {flag(name)} "
                            f"{saved['options'].get(name)}, not {own[name]}; use another path")

def check_losses(losses, number):
    """FloatingPointError for a loss that is not finite. number: of the step in its epoch."""
    for name, loss in losses.items():
        if not math.isfinite(loss):
            raise FloatingPointError(f"the {name}'s loss is {loss} at step {number}")

@torch.no_grad()
def evaluate(parties, channel, batches):
    """The test accuracy of each party's last classifier: {party name: fraction or None}.

    That of the last party is the accuracy of the whole network. The others answer with
    an auxiliary classifier, or not at all (None), as in backprop mode. Labels are not
    sent: this function compares, not a party. FloatingPointError if scores are not
    finite: then training has diverged.
    """
    for party in parties:
        party.eval()
    correct = {party.name: 0 for party in parties if party[-1].head is not None}
    image_count = 0

    for x, y in batches:
        for party in parties:
            if party is not parties[0]:
                x = channel.receive("evaluation", "activations")
            x = party(x)
            if party is not parties[-1]:
                channel.send(x, "evaluation", "activations")
            if party.name not in correct:
                continue
            scores = party[-1].classify(x)      # over a network, they would be sent back
            if not scores.isfinite().all():
                raise FloatingPointError(f"the {party.name}'s test scores are not finite")
            correct[party.name] += (scores.argmax(1) == y).sum().item()
        image_count += len(y)

    accuracy = {party.name: None for party in parties}
    for name, count in correct.items():
        accuracy[name] = count / image_count
    return accuracy


# ---- 9. Checkpoint: all parties, and what else the next epoch needs ------------------

def parts_of(party):
    """What is saved of each module of a party: objects that have a state_dict."""
    return [{"module": module, "optimizer": module.optimizer, "schedule": module.schedule}
            for module in party]

def draft_of(path):
    """Where a checkpoint is first written. The name is fixed: the next save replaces it."""
    return path + ".partial"

def save(run, path):
    """Write a checkpoint. The old one is kept until the new one is complete."""
    states = {
        party.name: [{name: part.state_dict() for name, part in parts.items()}
                     for parts in parts_of(party)]
        for party in run.parties
    }
    checkpoint = {"options": asdict(run.options), "epoch": run.epoch, "summary": run.summary,
                  "parties": states}
    draft = draft_of(path)
    try:
        torch.save(checkpoint, draft)
        os.replace(draft, path)
    except (OSError, RuntimeError) as error:    # torch.save may raise one for the other
        if os.path.exists(draft):
            os.remove(draft)
        raise UserError(f"--checkpoint {path}: not written, the last one is kept "
                        f"({error})") from error

def load(path):
    """Read a checkpoint. An exception of any kind if it is damaged."""
    with zipfile.ZipFile(path) as file:
        if file.testzip():
            raise ValueError("a checksum is wrong")
    return torch.load(path, map_location="cpu", weights_only=True)

def restore(parties, states):
    """Put the states of a checkpoint into parties. ValueError for other parties."""
    if list(states) != [party.name for party in parties]:
        raise ValueError(f"the checkpoint has the parties {list(states)}")
    for party in parties:
        for parts, saved in zip(parts_of(party), states[party.name], strict=True):
            for name, part in parts.items():
                part.load_state_dict(saved[name])


# ---- 10. Costs: the memory of one step, and the time over a link ---------------------

def measure_memory(make_parties, step, channel, x, y):
    """Run one training step under the ledger. Return its figures: see `Ledger.figures`.

    The parties are built for this purpose, so that the training loop does not know of
    the ledger. A first step, which is not watched, creates the momentum. RuntimeError if
    a step does not update each module exactly once, does not return the loss of each
    party that has a classifier, leaves tensors of a batch in memory, or lets a party read
    what was not sent to it.

    Afterwards channel.bytes has the bytes of one step.
    """
    parties = make_parties()
    losses = step(*parties, channel, x, y)
    for party in parties:
        for number, module in enumerate(party):
            updates = module.schedule.last_epoch        # PyTorch's name: one per update()
            if updates != 1:
                raise RuntimeError(f"one step updated module {number} of the {party.name} "
                                   f"{updates} times, not once (counted by its schedule)")

    classifying = {party.name for party in parties if party[-1].head is not None}
    if set(losses) != classifying:
        raise RuntimeError(f"a step returned the losses of {set(losses)}, not {classifying}")

    channel.reset()
    ledger = Ledger(parties, channel, batch=(x, y))
    with ledger:
        step(*parties, channel, x, y)
    if ledger.live != ledger.static:
        raise RuntimeError(f"after a step {ledger.live} bytes are alive, not {ledger.static}: "
                           f"something still holds tensors of the batch")
    return ledger.figures()

def link_seconds(summary, steps):
    """Seconds per epoch if each party were a machine of its own: a calculation.

    summary: as Run.train returns it. Every hop has the bandwidth (Mbit/s) and the latency
    (ms in one direction) of the options. The seconds of each party were measured here,
    without the making of batches. steps: batches per epoch.
    """
    def transfer(hop):
        return 8 * sum(summary["bytes"][hop].values()) / (summary["bandwidth"] * 1e6)

    latency = summary["latency"] / 1000
    relay = transfer("relay") + summary["hand_overs"] * latency

    hops = [hop for hop in summary["bytes"] if hop not in ("relay", "evaluation")]
    transfers = [transfer(hop) for hop in hops if transfer(hop) > 0]
    parties = list(summary["accuracy"])         # its keys are the names of the parties
    stages = [summary["seconds"][name] for name in parties] + transfers

    if summary["mode"] == "backprop":
        # A chain: each batch goes through all stages before the next one begins.
        return sum(stages) + len(transfers) * latency * steps + relay

    # A pipeline: all stages work at the same time, and the slowest sets the pace. Each
    # of the others adds the time of one batch, when the pipeline is filled and emptied.
    slowest = max(stages)
    return slowest + (sum(stages) - slowest) / steps + len(transfers) * latency + relay


# ---- 11. Report: progress, log, table, picture ---------------------------------------

def show(text, stream):
    """Print on a stream of any kind. Training never depends on a stream.

    It may be None (closed), a pipe whose reader has gone, limited to ASCII, or an
    object that a notebook, an IDE or a test has put there.
    """
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        stream.write(text.encode(encoding, "replace").decode(encoding))
        stream.flush()
    except Exception:
        pass

def say(line, passing=False):
    """Print a line on stderr. A passing line is for terminals; the next replaces it."""
    try:
        terminal = sys.stderr.isatty()
    except Exception:
        terminal = False
    if terminal and passing:
        show(f"\r{line[:79]:79}", sys.stderr)
    elif terminal:
        show(f"\r{line:79}\n", sys.stderr)
    elif not passing:
        show(f"{line}\n", sys.stderr)

def write_log(path, record):
    """Append a JSON line, if there is a path."""
    if not path:
        return
    try:
        with open(path, "a") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise UserError(f"--log {path}: {error.strerror}; what it holds is kept; make room, or "
                        f"name another file") from error

def table_rows(summary):
    """One run's column of the table: [(name, unit, value)]. None: does not apply."""
    accuracy = summary["accuracy"]
    memory = summary["memory"]
    seconds = summary["seconds"]
    *others, last = accuracy        # the names of the parties

    rows = [("test accuracy", "%", 100 * accuracy[last])]
    for name in others:
        percent = None if accuracy[name] is None else 100 * accuracy[name]
        rows.append((f"accuracy of the {name}'s auxiliary classifier", "%", percent))

    sent = {hop: sum(kinds.values()) / 1e6 for hop, kinds in summary["bytes"].items()}
    del sent["evaluation"]
    for hop, megabytes in sent.items():
        rows.append((f"sent per epoch, {hop}", "MB", megabytes))
    rows.append(("sent per epoch, in all", "MB", sum(sent.values())))

    for name in accuracy:
        rows.append((f"peak memory of the {name}", "MiB", memory[f"{name}_peak"] / 2**20))
    rows.append(("peak memory if one host runs all", "MiB", memory["host_peak"] / 2**20))
    for name in others:
        held = memory[f"{name}_held"] / 2**20
        rows.append((f"held by the {name} while the {last} works", "MiB", held))

    for name in accuracy:
        rows.append((f"computing time of the {name} per epoch", "s", seconds[name]))
    rows.append(("time per epoch on this machine", "s", seconds["epoch"]))
    rows.append(("time per epoch over the simulated link", "s", seconds["link_epoch"]))
    return rows

def format_change(before, after, unit):
    """The change in points for percentages, else in per cent."""
    if before is None or after is None:
        return "-"
    if unit == "%":
        return f"{after - before:+.2f}"
    if before == 0:
        return "-"
    return f"{100 * (after / before - 1):+.1f}%"

def table(summaries):
    """The lines of the table: a column per run and, for two runs, the change."""
    columns = [table_rows(summary) for summary in summaries]
    width = max(len(f"{name}, {unit}") for name, unit, _ in columns[0])

    header = [summary["mode"] for summary in summaries]
    if len(summaries) == 2:
        header.append("change")
    lines = [" " * width + "".join(f"{cell:>11}" for cell in header)]

    for row in zip(*columns, strict=True):      # the same row of each run
        name, unit, _ = row[0]
        values = [value for _, _, value in row]
        cells = ["-" if value is None else f"{value:.2f}" for value in values]
        if len(values) == 2:
            cells.append(format_change(*values, unit))
        name_and_unit = f"{name}, {unit}"
        lines.append(f"{name_and_unit:{width}}" + "".join(f"{cell:>11}" for cell in cells))
    return lines

def picture(summaries, levels):
    """The lines of the picture. levels: characters from empty to full."""
    top = max(summary["memory"]["host_peak"] for summary in summaries)
    lines = []
    for summary in summaries:
        for name, peaks in summary["memory"]["picture"].items():
            bar = "".join(levels[math.ceil((len(levels) - 1) * peak / top)] for peak in peaks)
            lines.append(f"{summary['mode']:>9} {name:6} {bar} {max(peaks) / 2**20:8.1f} MiB")
    return lines

def report(summaries):
    """Print the table and the picture on stdout."""
    levels = " ▁▂▃▄▅▆▇█"
    try:
        levels.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeError:
        levels = " .:-=+*%@"
    lines = table(summaries)
    lines += ["", "Live memory over one training step, operator by operator, and its peak:"]
    lines += picture(summaries, levels)
    show("\n".join(lines) + "\n", sys.stdout)


# ---- 12. Command line ----------------------------------------------------------------

def choose_device(name):
    """The torch.device of that name. UserError if it is not available."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "cpu": True}
    for candidate in available:
        if available[candidate] and name in ("auto", candidate):
            return torch.device(candidate)
    raise UserError(f"--device {name}: not available here")

def check_file(name, path, make_folder=False):
    """UserError if a file cannot be written at this path. Changes no file.

    make_folder: make the folder it is to lie in.
    """
    folder = os.path.dirname(path) or "."
    try:
        if make_folder:
            os.makedirs(folder, exist_ok=True)
        if os.path.exists(path):
            open(path, "ab").close()
        else:
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{name} {path}: cannot be written ({error.strerror}); "
                        f"name another place") from error

def is_same_file(one, other):
    """Whether two paths lead to one file, by links too. Neither has to exist."""
    if os.path.exists(one) and os.path.exists(other):
        return os.path.samefile(one, other)
    return os.path.realpath(one) == os.path.realpath(other)

def check_paths(options):
    """UserError if --log or --checkpoint cannot be written, or are the same file."""
    if options.log:
        check_file("--log", options.log)
    if options.checkpoint:
        for path in (options.checkpoint, draft_of(options.checkpoint)):
            check_file("--checkpoint", path)
            if options.log and is_same_file(options.log, path):
                raise UserError(f"--log {options.log}: this is the file of --checkpoint; "
                                f"name another one")

def options_by_mode(options):
    """The options of each run. In compare mode run.pt becomes run.backprop.pt, ..."""
    if options.mode != "compare":
        return [options]
    root, extension = os.path.splitext(options.checkpoint)
    runs_options = []
    for mode in STEPS:
        path = f"{root}.{mode}{extension}" if options.checkpoint else ""
        runs_options.append(replace(options, mode=mode, checkpoint=path))
    return runs_options

def experiment(options):
    """Train what the options ask for. Return a summary for each mode."""
    device = choose_device(options.device)
    runs_options = options_by_mode(options)
    for each in [options, *runs_options]:       # the names as typed, and with the mode in them
        check_paths(each)

    sets = DATA_SETS[options.dataset].load(options)
    train_set, test_set = [[tensor.to(device) for tensor in pair] for pair in sets]
    count = len(train_set[1])
    for name in ("clients", "batch_size"):
        value = getattr(options, name)
        if value > count:
            raise UserError(f"{flag(name)} {value}: more than the {count} training images")

    # Make all runs before training one, so that a bad checkpoint is found at once.
    runs = [Run(run_options, train_set, test_set, device) for run_options in runs_options]
    for run in runs:
        run.introduce()
    summaries = [run.train() for run in runs]
    if len(summaries) > 1:
        by_mode = {summary["mode"]: summary for summary in summaries}
        write_log(options.log, {"event": "compare", **by_mode})
    return summaries

def main(argv=None):
    """Return the exit code: 0, or 2 for an error of the user, or 130 for Ctrl-C."""
    try:
        report(experiment(parse(argv)))
        return 0
    except UserError as error:
        say("decoupled_split.py: error: " + " ".join(str(error).split()))
        return 2
    except KeyboardInterrupt:
        say("decoupled_split.py: interrupted; --checkpoint, if given, has the last full epoch")
        return 130

if __name__ == "__main__":
    sys.exit(main())
