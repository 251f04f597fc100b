"""Decoupled split learning in one file: two halves of a network, and no gradient between them.

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

The decoupled client learns from an auxiliary classifier on z and the same labels.
The finished network does not need it. No gradient is ever sent.
Method: "Decoupled Split Learning via Auxiliary Loss", Zihad et al. 2026, arXiv 2601.19261.

    python decoupled_split.py                                       both modes, no data needed
    python decoupled_split.py --mode decoupled --dataset cifar10    the real thing
    python decoupled_split.py --help                                every option

Measured with --dataset cifar10 (ResNet-20, ten epochs, seed 0, two CPU cores):

    backprop    87.2% accuracy    3.28 GB sent per epoch    194 MiB peak memory
    decoupled   86.7%             1.64 GB                   147 MiB

The peak is that of the live tensors on one host. It falls by 24%. The paper claims up
to 58%: `train_locally` has the command that reaches it, and says what it costs.

How to read this file: sections 1 to 3 are the method, and section 4 measures its memory.
Edit section 5 for your own network and data. Sections 6 to 9 are only the experiment
around it. Sections 1 to 4 need only torch and the first group of imports: copy them.

"Private" means that the images themselves stay with the client. But z and the labels
reveal much about them. In a U-shaped split the labels stay as well: an exercise in NOTES.md.
MIT licence; the text is in README.md.
"""
# For `uv run`, which installs what is needed:
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21"]
# ///

# Sections 1 to 4 need these.
import math
import time
import weakref
from collections import Counter, defaultdict, deque
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Only the experiment needs these.
import argparse
import json
import os
import sys
from itertools import islice


# ---- METHOD 1. The two protocols -----------------------------------------------------
#
# A party is the client or the server, and stands for one machine. A party has one or more
# local modules: groups of layers that decoupled mode trains separately. A module that
# needs a loss of its own has a classifier on its output. Section 2 has the classes.

def train_locally(party, x, y):
    """Train each module of a party on its own loss. Return the last one's output and loss.

    x: (B, ...) the input of the party. y: (B,) labels. The output is detached, the loss
    is a number.

    Why this works: the auxiliary classifier pushes z towards features that separate the
    classes. The server needs such features as well. But the classifier only stands in
    for the rest of the network, so some accuracy may be lost.

    The activations of only one module are alive at a time. With one module per party the
    peak of a host is that of the larger party, no longer the sum: this saves half at best.
    With more modules the groups are smaller (Decoupled Greedy Learning, Belilovsky et al.
    2019, arXiv 1901.08164). In ResNet-110 two modules on the client save 58%, as the paper
    claims without saying how:

        python decoupled_split.py --dataset cifar10 --depth 110 --amp --client-modules 2

    This cost 2.2 points of accuracy (one seed), and 1.2 with --aux-depth 3 (mean of two).
    """
    for module in party:
        z = module(x)
        loss = F.cross_entropy(module.classify(z), y)
        loss.backward()         # frees the activations of this module, except z
        module.update()         # before the next module runs, by an optimizer of its own
        x = z.detach()          # no gradient comes back from the next module
    return x, loss.item()       # x was computed before the update, as z is in backprop mode

def decoupled_step(client, server, channel, x, y):
    """One batch of decoupled split learning (paper, section III).

    x: (B, C, H, W) images. y: (B,) labels. Both are the client's.
    Return the losses: {party name: number}.

    z and y go up. Nothing comes down. When the server begins, only z (as it was encoded)
    is left of the client's activations. On two machines the peak of a client with one
    module is about as high as in backprop mode. But it is held for a shorter time, and
    nobody waits.
    """
    with client.working():
        z, client_loss = train_locally(client, x, y)    # frees the client's activations
        # On two machines, sending z before the update would let the server begin earlier.
        channel.send(z, "up", "activations")            # z: (B, C', H', W')
        channel.send(y, "up", "labels")
        del z                   # now only its encoded form is left, in the channel

    with server.working():
        z_received = channel.receive("up", "activations")
        y_received = channel.receive("up", "labels")
        # z_received requires no gradient, so dL/dz is not even computed.
        _, server_loss = train_locally(server, z_received, y_received)

    return {client.name: client_loss, server.name: server_loss}

def backprop_step(client, server, channel, x, y):
    """One batch of conventional split learning (Gupta & Raskar 2018, arXiv 1810.06060).

    Arguments and result are those of `decoupled_step`, but there is no client loss. z
    and y go up, and dL/dz comes down. With a float32 wire and without autocast the
    gradients are those of the uncut network. The modules of a party are run as one.
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
        dz = channel.receive("down", "gradients").to(z.dtype)   # bfloat16 under autocast
        # A loss is a number, so its backward() needs no argument. z is not: its backward
        # pass continues from dL/dz. It frees the client's activations, except z.
        z.backward(dz)
        client.update()

    return {server.name: server_loss}

def hand_over(client, channel):
    """Send the client's part to the next client: weights, buffers, momentum.

    Several clients work one after the other and share one set of weights. One Party
    stands for all of them, so it sends its state to itself. The learning rate is not
    sent: one schedule counts the batches of all clients.
    """
    # state_dict() has the tensors themselves, and LocalModule adds the momentum to it. Some
    # tensors are integers, because batch-norm counts its batches.
    for tensor in tensors_in(client.state_dict()):
        channel.send(tensor, "relay", "weights")
        tensor.copy_(channel.receive("relay", "weights"))


# ---- METHOD 2. Local modules, parties, and the cut -----------------------------------

class LocalModule(nn.Module):
    """A group of layers that is trained on its own, with its own optimizer.

    body: a list of layers. head: turns the output of the body into class scores. The
    head of the very last module is the classifier of the network. Every other head is an
    auxiliary classifier in decoupled mode, and None in backprop mode.
    lr: the peak of a one-cycle learning rate over `total_steps` batches.
    amp: whether the forward pass computes in bfloat16 (autocast).
    """

    def __init__(self, body, head, lr, total_steps, weight_decay=0.0, amp=False):
        super().__init__()
        self.body = nn.Sequential(*body)
        self.head = head
        self.amp = amp

        # Each module has its own optimizer, because it is updated before the next one runs,
        # and no optimizer can span two machines. For Adam change this line, and lower lr.
        # SGD refuses an empty list, and a lone ReLU has no parameters, so they are in a group.
        self.optimizer = torch.optim.SGD([{"params": self.parameters()}], lr, momentum=0.9,
                                         nesterov=True, weight_decay=weight_decay)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, lr, total_steps, cycle_momentum=False)

    def forward(self, x):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.amp):
            return self.body(x)

    def classify(self, z):
        """Class scores (B, classes) in float32 from z, the output of the body."""
        with torch.autocast(z.device.type, torch.bfloat16, enabled=self.amp):
            scores = self.head(z)
        return scores.float()       # so that the loss is computed in full precision

    def update(self):
        """One optimizer step. RuntimeError if a weight has no gradient."""
        if any(p.requires_grad and p.grad is None for p in self.parameters()):
            raise RuntimeError("update() without a backward pass through all weights")
        self.optimizer.step()
        self.optimizer.zero_grad()      # at once, to free the memory of the gradients
        self.schedule.step()

    def get_extra_state(self):
        """PyTorch calls this in state_dict(), which then contains the momentum as well."""
        return {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}

    def set_extra_state(self, state):
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])

class Party(nn.Sequential):
    """The part of a network on one machine: a name, a chain of local modules, a clock.

    Calling it runs the bodies of its modules one after the other, without their heads.
    name: unique, because ledger, checkpoint and log use it as a key. `seconds` is the time
    that was spent at work.
    """

    def __init__(self, name, modules):
        super().__init__(*modules)
        self.name = name
        self.at_work = False
        self.seconds = 0.0

    def scores(self, x):
        """Class scores (B, classes) of the last head for x, the input of the party."""
        return self[-1].classify(self(x))

    def update(self):
        for module in self:
            module.update()

    @contextmanager
    def working(self):
        """Inside this block the clock runs and the ledger (section 4) charges the party."""
        self.wait_for_gpu()
        start = time.perf_counter()
        self.at_work = True
        try:
            yield
            self.wait_for_gpu()
        finally:
            self.at_work = False
        self.seconds += time.perf_counter() - start

    def wait_for_gpu(self):
        """A GPU works asynchronously. Return when it has finished what it was asked to do."""
        for device in {parameter.device for parameter in self.parameters()}:
            if device.type != "cpu":
                torch.accelerator.synchronize(device)

class ResidualBlock(nn.Module):
    """(B, c_in, H, W) -> (B, c_out, H / stride, W / stride), rounded up.

    Two 3x3 convolutions beside a shortcut without parameters (He et al. 2016, section
    4.2, option A): every stride-th pixel, and zeros for the new channels.
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

def auxiliary_classifier(shapes, depth, classes):
    """A classifier on z: residual blocks, pooling to 2x2, and a linear layer.

    shapes: (C, H, W) of z and of each layer between z and the network's classifier.
    depth: the number of blocks. They imitate evenly spaced later layers: same channels,
    roughly the same height (AugLocal, Ma et al. 2024, arXiv 2402.17318).

    With depth 0 it is the linear layer of the paper (section IV-A), but on z pooled to
    4x4: on all of z it fails at the default learning rate (NOTES.md, section 5).
    """
    shape, *later_shapes = shapes
    depth = min(depth, len(later_shapes))       # no more blocks than layers that follow
    blocks = []
    for i in range(1, depth + 1):
        nth = len(later_shapes) * i // depth        # of 6 layers, depth 2: the 3rd and the 6th
        imitated = later_shapes[nth - 1]
        stride = max(1, round(shape[1] / imitated[1]))
        blocks.append(ResidualBlock(shape[0], imitated[0], stride))
        shape = imitated
    grid = 2 if blocks else 4
    return nn.Sequential(*blocks, *classifier(shape[0], grid, classes))

@torch.no_grad()
def output_shapes(layers, image_shape):
    """The output shape of each layer for one image of shape (C, H, W)."""
    x = torch.zeros(1, *image_shape)
    shapes = []
    for layer in layers:
        layer.eval()            # batch-norm must not learn from an image of zeros
        x = layer(x)
        layer.train()
        shapes.append(x.shape[1:])
    return shapes

def group_ends(start, stop, count):
    """The ends of `count` groups of layers, as equal as possible: group_ends(0, 5, 2) = [3, 5]."""
    return [start + math.ceil((stop - start) * i / count) for i in range(1, count + 1)]

def cut_network(layers, plan, image_shape, aux_depth, **module_options):
    """Cut a flat list of layers into parties. Return the list of parties.

    layers: see section 5. They are not copied, so two networks need two lists.
    plan: where the modules of each party end. With {"client": [7], "server": [10, 13]}
    the client has layers 0 to 6 in one module. The server has 7 to 9 and 10 to 12 in two.
    image_shape: (C, H, W). module_options: the other arguments of LocalModule.
    aux_depth: the number of residual blocks in an auxiliary classifier. None: there are
    no auxiliary classifiers, as in backprop mode.
    """
    shapes = output_shapes(layers, image_shape)
    classes = shapes[-1][0]
    parties = []
    start = 0
    for name, ends in plan.items():
        modules = []
        for end in ends:
            body = layers[start:end]
            head = None
            if end == len(layers):
                head = body.pop()       # the classifier of the network
            elif aux_depth is not None:
                head = auxiliary_classifier(shapes[end - 1:-1], aux_depth, classes)
            modules.append(LocalModule(body, head, **module_options))
            start = end
        parties.append(Party(name, modules))
    return parties


# ---- METHOD 3. Channel: the only way from one party to another -----------------------

def tensors_in(tree):
    """All tensors in nested tuples, lists and dictionaries."""
    return [leaf for leaf in tree_leaves(tree) if torch.is_tensor(leaf)]

def storages(tree):
    """The storages of all tensors in a tree: the memory behind tensors and their views."""
    return {tensor.untyped_storage() for tensor in tensors_in(tree)}

# How activations and gradients are encoded. uint8 is handled by `quantize`.
WIRES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "uint8": torch.uint8}

class Channel:
    """A simulated network: it detaches, encodes, counts and queues tensors.

    `bytes` counts what was sent, by hop and kind: {"up activations": 4194304, ...}. The
    example is one batch: 128 images x 32 channels x 16 x 16 values x 4 bytes, whatever the
    number of classes. A hop is any name: here "up", "down", and "relay" from one client
    to the next. A kind is "activations", "gradients", "labels" (one byte each), or
    "weights" (anything that is sent as it is).

    For a real network, override `push` and `pull`. Shapes and types have to travel with
    the tensors. On a real client run only the blocks under `with client.working()`, and
    on a real server only those under `with server.working()`.
    """

    def __init__(self, wire="float32"):
        self.wire = wire
        self.bytes = Counter()
        self.queues = defaultdict(deque)
        self.arriving = set()       # storages that are just being received: Ledger allows them

    def send(self, tensor, hop, kind):
        # A network carries numbers, not an autograd graph. Without this detach the
        # server's backward pass in backprop mode would run on into the client's layers:
        # a gradient that never crosses the wire.
        tensor = tensor.detach()
        payload = self.encode(tensor, kind)
        self.bytes[f"{hop} {kind}"] += sum(part.nbytes for part in payload)
        self.push(payload, hop, kind)

    def receive(self, hop, kind):
        """The oldest tensor of this kind that was sent on this hop: a copy without a graph."""
        payload = self.pull(hop, kind)
        self.arriving = storages(payload)
        tensor = self.decode(payload, kind)     # copied here, so that the receiver pays for it
        self.arriving = set()
        return tensor

    def push(self, payload, hop, kind):
        """Put a list of tensors on the wire."""
        self.queues[hop, kind].append(payload)

    def pull(self, hop, kind):
        """Take the oldest list of tensors off the wire. IndexError if there is none."""
        return self.queues[hop, kind].popleft()

    def encode(self, tensor, kind):
        """The list of tensors that crosses the wire. It may share memory with `tensor`."""
        if kind == "labels":
            if tensor.min() < 0 or tensor.max() > 255:
                raise ValueError("a label is a number from 0 to 255, one byte on the wire")
            return [tensor.to(torch.uint8)]
        if kind == "weights":
            return [tensor]
        if self.wire == "uint8":
            return quantize(tensor)
        return [tensor.to(WIRES[self.wire])]

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
    """Only for the uint8 wire: [values, low, scale], tensor ~ values * scale + low.

    values: uint8, in the shape of the tensor. low, scale: float32, one number per
    channel (dimension 1). The error is scale / 2 at most.

    In backprop mode dL/dz is rounded as well. The gradient of a decoupled client never
    crosses the wire, so a coarse wire does not touch it.
    """
    tensor = tensor.float()
    all_but_channel = [d for d in range(tensor.dim()) if d != 1]
    low = tensor.amin(all_but_channel, keepdim=True)
    high = tensor.amax(all_but_channel, keepdim=True)

    scale = (high - low) / 255
    scale = scale.clamp_min(torch.finfo(torch.float32).tiny)        # if high == low
    values = ((tensor - low) / scale).round_().to(torch.uint8)
    return [values, low, scale]


# ---- MEASUREMENT 4. Memory: a ledger of live tensors ---------------------------------

class Ledger(TorchDispatchMode):
    """Counts the bytes of live tensors, and charges each to the party that made it.

    Inside `with ledger:` PyTorch calls `__torch_dispatch__` for every operator, forward
    and backward. A storage is counted once, from the operator that returns it until it
    is freed. Each operator adds one row to `trace`: (name of the party at work, {name:
    live bytes}). Counted: weights, buffers and momentum, which are charged when the ledger
    is made; activations, gradients and temporaries. Not counted: the data set and its
    batch, memory that an operator uses inside, the allocator's reserve, the interpreter.

    RuntimeError if not exactly one party is at work. RuntimeError as well if a party reads
    a tensor that it neither owns nor made nor received. Such a tensor bypassed the channel,
    or it is a gradient that no update() has freed. The batch belongs to the first party.
    """

    def __init__(self, parties, channel, batch):
        super().__init__()
        self.parties = parties
        self.channel = channel
        self.live = Counter({party.name: 0 for party in parties})
        self.owners = weakref.WeakKeyDictionary()       # storage: name of a party
        self.trace = []

        for storage in storages(batch):
            self.owners[storage] = parties[0].name
        for party in parties:
            self.charge(party.name, storages([party.state_dict(), list(party.buffers())]))
        self.static = dict(self.live)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)

        names = [party.name for party in self.parties if party.at_work]
        if len(names) != 1:
            raise RuntimeError(f"exactly one party must be at work, not {names}, at {function}")
        name = names[0]
        for storage in storages((args, kwargs)) - self.channel.arriving:
            owner = self.owners.get(storage, "nobody")      # made before the ledger
            if owner != name:
                raise RuntimeError(f"{function}: the {name} reads a tensor that belongs to {owner}")

        self.charge(name, storages(result))
        self.trace.append((name, dict(self.live)))
        return result

    def charge(self, name, found):
        # While a storage lives, PyTorch shows it as the same Python object each time, so
        # `owners` recognises it, and a view is no new memory. `finalize` subtracts its size
        # when it is freed.
        for storage in found:
            if storage not in self.owners:
                self.owners[storage] = name
                self.live[name] += storage.nbytes()
                weakref.finalize(storage, self.live.subtract, {name: storage.nbytes()})

    def figures(self, width=60):
        """What the trace says, in bytes:

        `NAME_peak`: of each party. `host_peak`: of their sum, as if one host ran them
        all. `NAME_held`: of each party but the last, what it holds when the last party
        finishes. `picture`: the peaks in `width` groups of consecutive operators.
        """
        curves = {name: [live[name] for _, live in self.trace] for name in self.live}
        curves["host"] = [sum(live.values()) for _, live in self.trace]
        result = {f"{name}_peak": max(curve) for name, curve in curves.items()}

        last = self.parties[-1].name
        last_operator = max(i for i, (name, _) in enumerate(self.trace) if name == last)
        for party in self.parties[:-1]:
            result[f"{party.name}_held"] = curves[party.name][last_operator]

        result["picture"] = {name: peaks_of_groups(curve, width)
                             for name, curve in curves.items()}
        return result

def peaks_of_groups(curve, width):
    """The maximum of each of `width` groups of neighbouring numbers. No group is empty."""
    borders = [len(curve) * i // width for i in range(width + 1)]
    return [max(curve[a:max(b, a + 1)]) for a, b in zip(borders, borders[1:])]

def measure_memory(parties, step, channel, x, y):
    """Run one training step under the ledger. Return its figures: see `Ledger.figures`.

    This trains the parties, so make them for this purpose and throw them away.
    RuntimeError if the step leaves tensors of the batch in memory.
    """
    step(*parties, channel, x, y)       # not watched: the first step creates the momentum
    ledger = Ledger(parties, channel, batch=(x, y))
    with ledger:
        step(*parties, channel, x, y)
    if ledger.live != ledger.static:
        raise RuntimeError(f"a step leaves tensors of its batch in memory: {ledger.live} bytes, "
                           f"before it {ledger.static}")
    return ledger.figures()


# ---- EDIT 5. Network and data --------------------------------------------------------
#
# A network of your own is a flat list of layers, made anew by the marked line in `build`.
# One tensor (B, C, H, W) goes from layer to layer, so a skip connection has to lie inside
# one layer, as it does in ResidualBlock. The last entry is the classifier. No other layer
# may flatten. The first layer after each cut must not work in place, as ReLU(inplace=True)
# does: autograd refuses it in backprop mode.
#
# A data set of your own is one function of the options and one entry in DATA_SETS. The
# function returns [(images, labels), (images, labels)] for training and for testing:
# images (N, C, H, W) uint8, labels (N,) int64, 0 to 255. With several clients the training
# set must be in random order, because each one gets a contiguous slice. `augment` mirrors
# images, which is wrong for digits. The default --lr is for CIFAR: begin with a lower one.

def resnet_layers(depth, classes, channels=3):
    """The ResNet for CIFAR (He et al. 2016, section 4.2) as a flat list of layers.

    depth: 6n + 2. channels: of the images. There are 3 + 3n + 1 layers: the stem counts
    as three and a residual block as one, as in the cuts of the paper.
    """
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

def load_cifar(options):
    """CIFAR-10 or CIFAR-100 from torchvision, which downloads it if it is missing."""
    from torchvision import datasets        # nothing else in this file needs torchvision
    source = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[options.dataset]
    try:
        parts = [source(options.data_dir, train, download=True) for train in (True, False)]
    except (RuntimeError, OSError) as error:
        folder = os.path.join(options.data_dir, source.base_folder)
        raise UserError(f"--dataset {options.dataset}: missing or damaged; delete {folder} and "
                        f"start again, or try --dataset synthetic ({error})") from error
    return [(torch.from_numpy(part.data).permute(0, 3, 1, 2), torch.tensor(part.targets))
            for part in parts]

def crop(images, top, left, height, width):
    """A window (B, C, height, width) of the images. top, left: (B,) where each one begins."""
    # A view of all windows: (B, C, tops, lefts, height, width).
    windows = images.unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(images)), :, top, left]     # one window of each image

def synthetic(seed, sizes=(2560, 1000)):
    """Images of ten classes, made in memory, that a linear model cannot tell apart.

    Each class has a grey pattern. An image shows it bright or dark, at a random place,
    under coloured clutter and noise. All classes have the same mean image. The clutter
    sums to zero over the colours, so a trained convolution can remove it.
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

DATA_SETS = {
    "synthetic": lambda options: synthetic(options.seed),
    "cifar10": load_cifar,
    "cifar100": load_cifar,
}

def augment(images, generator):
    """A random crop of each image, with a black border of 4 pixels. Half are mirrored."""
    count, _, height, width = images.shape
    padded = F.pad(images, (4, 4, 4, 4))
    top, left = torch.randint(9, (2, count), generator=generator)
    images = crop(padded, top, left, height, width)

    # Delete these two lines if a mirrored image is of another class, as with digits.
    mirrored = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    images = torch.where(mirrored.to(images.device), images.flip(3), images)
    return images

def to_float(images):
    """uint8 pixels to -2..2. Batch-norm makes an exact normalisation unnecessary."""
    return (images.float() - 128) / 64

def batches(images, labels, size, generator=None):
    """Yield x (B, C, H, W) float32 and y (B,) int64. The sizes differ by at most one.

    With a generator the images are shuffled and augmented, for training.
    """
    order = torch.arange(len(labels))
    if generator is not None:
        order = torch.randperm(len(labels), generator=generator)

    for index in order.tensor_split(math.ceil(len(labels) / size)):
        part = images[index]
        if generator is not None:
            part = augment(part, generator)
        yield to_float(part), labels[index]


# ---- EXPERIMENT 6. Training and evaluation -------------------------------------------
#
# The order of events: `experiment` loads the data and refuses options that do not fit.
# `train` does one run per mode. It measures memory on parties that are thrown away,
# builds the parties, and resumes from a checkpoint. Then it trains, evaluates, logs and
# saves each epoch. At the end `main` prints the report.

STEPS = {"backprop": backprop_step, "decoupled": decoupled_step}
CUTS = {"shallow": 4, "middle": 3, "deep": 2}       # the client has 1/4, 1/3, 1/2 of the layers
DIVERGED = "training has diverged, try a lower --lr"

class UserError(Exception):
    """An error that the user can fix. main() prints its one line and returns 2."""

def experiment(options):
    """Train what the options ask for. Return the summary of each run."""
    sets = DATA_SETS[options.dataset](options)
    for images, labels in sets:
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] > images.shape[3]:
            raise UserError(f"images {tuple(images.shape)} {images.dtype}, not (N, C, H, W) uint8")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise UserError(f"labels {tuple(labels.shape)} {labels.dtype}, not (N,) int64")
    train_set, test_set = [[tensor.to(options.device) for tensor in pair] for pair in sets]
    count = len(train_set[1])
    if max(options.clients, options.batch_size) > count:
        raise UserError(f"--clients, --batch-size: there are only {count} training images")

    modes = list(STEPS) if options.mode == "compare" else [options.mode]
    runs = [options_of_run(options, mode) for mode in modes]
    for run in runs:            # find errors in the options and the files before any training
        build(run, train_set, total_steps=1)
        if run.checkpoint and not read_checkpoint(run):
            open(run.checkpoint + ".partial", "a").close()
        open(run.log or os.devnull, "a").close()
    return [train(run, train_set, test_set) for run in runs]

def options_of_run(options, mode):
    """The options of one run. In compare mode run.pt becomes run.backprop.pt, ..."""
    run = argparse.Namespace(**vars(options))
    run.mode = mode
    if run.checkpoint and options.mode == "compare":
        root, extension = os.path.splitext(run.checkpoint)
        run.checkpoint = f"{root}.{mode}{extension}"
    return run

def train(options, train_set, test_set):
    """One run in one mode. Return its summary: the figures of the last epoch."""
    step = STEPS[options.mode]
    images, labels = train_set
    parties = build(options, train_set, total_steps=2)  # measure_memory takes 2 steps
    x = to_float(images[:options.batch_size])
    y = labels[:options.batch_size]
    memory = measure_memory(parties, step, Channel(options.wire), x, y)

    # Each client has a shard of its own: (images, labels).
    shards = list(zip(images.tensor_split(options.clients), labels.tensor_split(options.clients)))
    counts = [math.ceil(len(part) / options.batch_size) for _, part in shards]
    steps_per_epoch = sum(min(count, options.max_steps or count) for count in counts)
    parties = build(options, train_set, options.epochs * steps_per_epoch)
    summary = {"epoch": 0}
    checkpoint = read_checkpoint(options)
    if checkpoint:
        summary = checkpoint["summary"]
        for party in parties:
            party.load_state_dict(checkpoint["parties"][party.name])
    for party in parties:
        weights = sum(p.numel() for p in party.parameters())
        say(f"{options.mode} {party.name}: {weights:,} parameters in {len(party)} module(s)")

    for epoch in range(summary["epoch"] + 1, options.epochs + 1):
        channel = Channel(options.wire)
        figures = train_epoch(parties, step, channel, shards, options, epoch)
        test_batches = batches(*test_set, options.batch_size)
        accuracies = evaluate(*parties, Channel(options.wire), test_batches)
        summary = {**vars(options), "torch": str(torch.__version__), "epoch": epoch,
                   **accuracies, **figures, "bytes": dict(channel.bytes), "memory": memory}
        write_log(options, "epoch", summary)
        if options.checkpoint:
            save(options, parties, summary)
        say(f"{options.mode} epoch {epoch}/{options.epochs} loss {summary['train_loss']:.3f} "
            f"test {summary['test_accuracy']:.2%} {summary['images_per_second']:.0f} images/s")
    write_log(options, "summary", summary)
    return summary

def build(options, train_set, total_steps):
    """The parties of a run, with new weights. Both modes start with the same network."""
    images, labels = train_set
    image_shape = images.shape[1:]
    classes = int(labels.max()) + 1
    torch.manual_seed(options.seed)
    # For a network of your own change this line. (--depth then has no effect.)
    layers = resnet_layers(options.depth, classes, channels=image_shape[0])

    cut = math.ceil(len(layers) / CUTS[options.cut])
    rest = len(layers) - cut
    if options.client_modules > cut or options.server_modules > rest:
        raise UserError(f"--client-modules: at most {cut}; --server-modules: at most {rest}")
    plan = {"client": group_ends(0, cut, options.client_modules),
            "server": group_ends(cut, len(layers), options.server_modules)}
    aux_depth = None if options.mode == "backprop" else options.aux_depth
    parties = cut_network(layers, plan, image_shape, aux_depth, lr=options.lr, amp=options.amp,
                          weight_decay=options.weight_decay, total_steps=total_steps)

    for party in parties:       # in place, so the optimizers still have the parameters
        party.to(options.device)
        if options.device != "mps":     # where some versions of torch get this format wrong
            party.to(memory_format=torch.channels_last)     # faster convolutions
    return parties

def train_epoch(parties, step, channel, shards, options, epoch):
    """Train on each batch of an epoch, client after client. Return figures of the epoch."""
    # Both modes see the same batches, also after a resume, even if layers draw random numbers.
    seed = options.seed * 1_000_003 + epoch - 1
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)             # for layers such as dropout
    for party in parties:
        party.train()
        party.seconds = 0.0
    step_count = 0
    image_count = 0
    loss_sum = 0.0
    start = time.perf_counter()
    for images, labels in shards:
        stream = batches(images, labels, options.batch_size, generator)
        for x, y in islice(stream, options.max_steps):
            losses = step(*parties, channel, x, y)
            if not all(map(math.isfinite, losses.values())):
                raise UserError(f"epoch {epoch} has the losses {losses}: {DIVERGED}")
            step_count += 1
            image_count += len(y)
            loss_sum += losses[parties[-1].name] * len(y)
            say_progress(options, epoch, parties, step_count, losses, start)
        if len(shards) > 1:
            hand_over(parties[0], channel)

    seconds = {party.name: party.seconds for party in parties}
    seconds["epoch"] = time.perf_counter() - start
    return {
        "train_loss": loss_sum / image_count,
        "images_per_second": image_count / seconds["epoch"],
        "seconds": seconds,
    }

@torch.no_grad()
def evaluate(client, server, channel, test_batches):
    """The accuracy of the whole network, and of the client alone: None in backprop mode.

    The labels are not sent: the comparison is made here, outside of both parties.
    """
    client.eval()
    server.eval()
    has_head = client[-1].head is not None
    correct = 0
    correct_alone = 0
    image_count = 0
    for x, y in test_batches:
        z = client(x)
        channel.send(z, "up", "activations")
        scores = server.scores(channel.receive("up", "activations"))
        if not scores.isfinite().all():
            raise UserError(f"the test scores are not finite: {DIVERGED}")
        correct += (scores.argmax(1) == y).sum().item()
        if has_head:
            correct_alone += (client[-1].classify(z).argmax(1) == y).sum().item()
        image_count += len(y)
    return {
        "test_accuracy": correct / image_count,
        "aux_accuracy": correct_alone / image_count if has_head else None,
    }


# ---- EXPERIMENT 7. Checkpoint --------------------------------------------------------

FREE_ON_RESUME = ["device", "data_dir", "checkpoint", "log"]    # only these may change

def save(options, parties, summary):
    """Write a checkpoint. The old one is kept until the new one is complete."""
    states = {party.name: party.state_dict() for party in parties}
    draft = options.checkpoint + ".partial"
    torch.save({"summary": summary, "parties": states}, draft)
    os.replace(draft, options.checkpoint)

def read_checkpoint(options):
    """The checkpoint of a run, or None. UserError if unreadable or made with other options."""
    path = options.checkpoint
    if not path or not os.path.exists(path):
        return None
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        old = checkpoint["summary"]             # contains the options
        changed = {name: old.get(name) for name, value in vars(options).items()
                   if name not in FREE_ON_RESUME and old.get(name) != value}
    except Exception as error:          # torch, pickle and zipfile each have their own
        raise UserError(f"--checkpoint {path}: cannot be read, use another ({error})") from error
    if changed:
        raise UserError(f"--checkpoint {path}: was made with {changed}, use another")
    return checkpoint


# ---- EXPERIMENT 8. Report: progress, log, table, picture -----------------------------

def say(line, end="\n"):
    """Print a line on stderr. After end="\\r" the next line replaces it on a terminal."""
    width = 79 if sys.stderr.isatty() else 0
    print(line.ljust(width), end=end, file=sys.stderr, flush=True)

def say_progress(options, epoch, parties, step_count, losses, start):
    """On a terminal, print a line that the next one replaces."""
    schedule = parties[-1][0].schedule          # it counts the steps of all epochs
    steps_left = schedule.total_steps - schedule.last_epoch
    minutes_left = steps_left * (time.perf_counter() - start) / step_count / 60
    text = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
    if sys.stderr.isatty():
        say(f"{options.mode} epoch {epoch}/{options.epochs} step {step_count} loss {text} "
            f"{minutes_left:.1f} min left", end="\r")

def write_log(options, event, summary):
    """Append a line of JSON, if there is a log."""
    with open(options.log or os.devnull, "a") as file:
        file.write(json.dumps({"event": event, **summary}) + "\n")

def report(summaries):
    """Print the table and the picture of one or two runs on stdout."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")    # some consoles lack the bars
    print(*table(summaries), sep="\n")
    print("aux: the client alone. host: one machine that runs all parties in turn.")
    print("held: when the server finishes.\n\nLive memory over one step, and its peak:")
    print(*picture(summaries), sep="\n")

def table_column(summary):
    """The figures of one run: {name and unit: value, or None if it does not apply}."""
    column = {}
    for name in ("test", "aux"):
        accuracy = summary[f"{name}_accuracy"]
        column[f"{name} accuracy, %"] = None if accuracy is None else 100 * accuracy
    for key, count in summary["bytes"].items():
        column[f"sent: {key}, MB"] = count / 1e6
    column["sent: in all, MB"] = sum(summary["bytes"].values()) / 1e6
    for key, count in summary["memory"].items():
        if key != "picture":
            column[f"memory: {key.replace('_', ' ')}, MiB"] = count / 2**20
    for name, seconds in summary["seconds"].items():
        column[f"time: {name}, s"] = seconds
    return column

def table(summaries):
    """The lines of the table: a column per run and, for two runs, the change."""
    columns = [table_column(summary) for summary in summaries]
    header = [summary["mode"] for summary in summaries]
    if len(summaries) == 2:
        header.append("change")
    lines = [f"{'last epoch':40}" + "".join(f"{cell:>11}" for cell in header)]

    for name in columns[0] | columns[-1]:
        values = [column.get(name, 0.0) for column in columns]      # 0: nothing was sent
        cells = ["-" if value is None else f"{value:.2f}" for value in values]
        if len(values) == 2:
            cells.append(change(*values, in_points=name.endswith("%")))
        lines.append(f"{name:40}" + "".join(f"{cell:>11}" for cell in cells))
    return lines

def change(before, after, in_points):
    """The change of a figure: in points, or in per cent of the first."""
    if before is None or after is None or before == 0:
        return "-"
    return f"{after - before:+.2f}" if in_points else f"{100 * (after / before - 1):+.1f}%"

def picture(summaries):
    """The lines of the picture. All runs have the same scale."""
    levels = " ▁▂▃▄▅▆▇█"
    top = max(summary["memory"]["host_peak"] for summary in summaries)
    lines = []
    for summary in summaries:
        for name, peaks in summary["memory"]["picture"].items():
            bar = "".join(levels[math.ceil(8 * peak / top)] for peak in peaks)
            lines.append(f"{summary['mode']:>9} {name:6} {bar} {max(peaks) / 2**20:8.1f} MiB")
    return lines


# ---- EXPERIMENT 9. Command line ------------------------------------------------------

def at_least(least, kind=int):
    """A type for argparse: a number that is at least `least` and below 2**31."""
    def number(text):
        value = kind(text)
        if not least <= value < 2**31:      # nan is refused as well
            raise argparse.ArgumentTypeError(f"{text}: at least {least} and below 2**31")
        return value
    return number

def parse(argv=None):
    """The options, from the command line or from a list of strings, as a Namespace."""
    devices = ["cpu"]
    if torch.accelerator.is_available():
        devices.insert(0, torch.accelerator.current_accelerator().type)
    path = os.path.expanduser
    parser = argparse.ArgumentParser(       # without a usage its errors are one line
        description="Decoupled split learning in one file.", usage=argparse.SUPPRESS,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, add_help=False)
    add = parser.add_argument
    add("--mode", choices=["compare", *STEPS], default="compare", help="protocol, or both")
    add("--dataset", choices=DATA_SETS, default="synthetic", help="sets other defaults as well")
    add("--data-dir", type=path, default="data", help="of CIFAR, which is downloaded if missing")
    add("--depth", type=int, choices=[8, 14, 20, 32, 44, 56, 110], default=20, help="of ResNet")
    add("--cut", choices=CUTS, default="deep", help="the client has 1/4, 1/3 or 1/2 of the layers")
    add("--client-modules", type=at_least(1), default=1, help="locally trained, on the client")
    add("--server-modules", type=at_least(1), default=1, help="locally trained, on the server")
    add("--aux-depth", type=at_least(0), default=1, help="residual blocks in an auxiliary "
        "classifier; 0: only pooling and a linear layer")
    add("--wire", choices=WIRES, default="float32", help="encoding of activations and gradients")
    add("--clients", type=at_least(1), default=1, help="they take turns, each on its own images")
    add("--epochs", type=at_least(1), default=10, help="passes over the training set")
    add("--batch-size", type=at_least(1), default=128, help="at most; sizes may differ by one")
    add("--lr", type=at_least(1e-9, float), default=0.2, help="peak of the one-cycle rate")
    add("--weight-decay", type=at_least(0, float), default=5e-4, help="L2 penalty")
    add("--amp", action="store_true", help="bfloat16 autocast: faster where the hardware has it")
    add("--seed", type=at_least(0), default=0, help="of weights, batches and synthetic images")
    add("--device", choices=["auto", *devices], default="auto", help="auto: a GPU if there is one")
    add("--max-steps", type=at_least(1), help="batches per client and epoch; None: all")
    add("--checkpoint", type=path, help="file to save to after each epoch, and to resume from")
    add("--log", type=path, help="file to append JSON lines to, one per epoch and one per run")

    # Some defaults depend on the data set, so it is read first. --help then shows them.
    known, _ = parser.parse_known_args(argv)
    if known.dataset == "synthetic":
        parser.set_defaults(epochs=4, batch_size=32, lr=0.1)
    add("-h", "--help", action="help", help="show this text")
    options = parser.parse_args(argv)
    if options.device == "auto":
        options.device = devices[0]
    return options

def main(argv=None):
    """Return the exit code: 0, or 2 for a user error."""
    options = parse(argv)
    try:
        report(experiment(options))
    except (UserError, OSError) as error:
        say("decoupled_split.py: error: " + " ".join(str(error).split()))
        return 2
    return 0

if __name__ == "__main__":
    sys.exit(main())
