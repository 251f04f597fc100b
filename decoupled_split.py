"""Decoupled split learning in one file: train a network cut in two, with or without a way back.

In split learning a client holds private images and the first layers of a network; a server holds
the rest. The client sends the activations at the cut layer (the "smashed data" z) and the labels y.

    conventional: --mode backprop                 decoupled: --mode decoupled

    client                       server           client                       server
    forward                                       forward, auxiliary loss,
    | keeps its    -- z, y -->                    backward, step
    | activations                forward, loss    (activations are freed)
    | and waits                  backward,                       -- z, y -->
    |             <-- dL/dz --   step             next batch                   forward, loss,
    backward, step                                                             backward, step
    (activations are freed)

The decoupled client learns from the loss of a small auxiliary classifier on z, so nothing has to
come back: half the bytes and no waiting. A host that runs both parties by turns needs memory for
the larger one instead of the sum of both. That alone saves at most half; the paper's "up to 58%"
takes a party cut into modules with losses of their own (--client-modules, --server-modules).
Measured for ResNet-110, batch 128, --aux-depth 0, two CPU cores, torch 2.14.1: host peak 1045 MiB
in backprop, 745 decoupled; with --cut shallow --server-modules 3, 1049 and 437 (NOTES.md, sec. 2).
The method: "Decoupled Split Learning via Auxiliary Loss" (Zihad et al. 2026, arXiv 2601.19261).

    python decoupled_split.py                                      # both modes, synthetic images
    python decoupled_split.py --mode decoupled --dataset cifar10   # the real thing
    python decoupled_split.py --help                               # every knob

MIT licence; the text is in README.md.
"""
import argparse
import json
import math
import os
import sys
import time
import weakref
import zipfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import accumulate

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision import datasets

# ---- 1. Config: every knob once; the command line is made from it --------------------------------
def knob(default, text, allowed=None):
    """A field of Config: its default, its line in --help, and its choices or its lowest value."""
    return field(default=default, metadata={"text": text, "allowed": allowed})

@dataclass
class Config:
    """All that a run depends on. The defaults are the CIFAR recipe; SYNTHETIC replaces some."""
    mode: str = knob("compare", "protocol, or both in turn", ["compare", "backprop", "decoupled"])
    dataset: str = knob("synthetic", "images to learn", ["synthetic", "cifar10", "cifar100"])
    data_dir: str = knob("data", "folder of CIFAR, which is downloaded if it is not there")
    depth: int = knob(20, "of the ResNet, 6n+2", [8, 14, 20, 32, 44, 56, 110])
    cut: str = knob("deep", "client: 1/4, 1/3, 1/2 of the layers; a block is one",
                    ["shallow", "middle", "deep"])
    client_modules: int = knob(1, "locally trained modules on the client", 1)
    server_modules: int = knob(1, "locally trained modules on the server", 1)
    aux_depth: int = knob(1, "residual blocks in an auxiliary classifier, before a linear layer", 0)
    wire: str = knob("float32", "encoding of z and dL/dz", ["float32", "bfloat16", "uint8"])
    clients: int = knob(1, "clients with equal shards of the set, visited in turn", 1)
    epochs: int = knob(10, "passes over the training set", 1)
    batch_size: int = knob(128, "images a batch at most; batches are equal, or differ by one", 1)
    lr: float = knob(0.2, "peak learning rate, the same for every module", 1e-9)
    weight_decay: float = knob(5e-4, "L2 penalty", 0)
    amp: bool = knob(False, "bfloat16 autocast: faster where the hardware has it")
    seed: int = knob(0, "of weights, batches, augmentation and synthetic images", 0)
    device: str = knob("auto", "auto: the first there is", ["auto", "cuda", "mps", "cpu"])
    max_steps: int = knob(0, "end each epoch after so many batches; 0: do not", 0)
    bandwidth: float = knob(100.0, "of the simulated link, Mbit/s", 1e-9)
    latency: float = knob(10.0, "of the simulated link, ms one way", 0)
    checkpoint: str = knob("", "file written after each epoch, and gone on from if it exists")
    log: str = knob("", "file to append JSON lines to: one an epoch, a summary a mode")

SYNTHETIC = {"epochs": 4, "batch_size": 32, "lr": 0.1}
CLASSES = {"synthetic": 10, "cifar10": 10, "cifar100": 100}
FREE_ON_RESUME = ("device", "data_dir", "checkpoint", "log", "bandwidth", "latency")  # may change

class Refusal(Exception):
    """What the user can mend: main() prints it as one line on stderr and exits with code 2."""

def refuse(message):
    """Raise it; also what argparse calls for an option that it does not understand."""
    raise Refusal(message)

# ---- 2. Model: a network is a flat list of layers; cutting it yields local modules ---------------
class Block(nn.Module):
    """(B, c_in, H, W) -> (B, c_out, H/s, W/s), s = c_out / c_in: two 3x3 convolutions beside a
    shortcut without parameters (He et al. 2016, sec. 4.2, option A)."""
    def __init__(self, c_in, c_out):
        super().__init__()
        self.c_out, self.stride = c_out, c_out // c_in
        self.conv1 = nn.Conv2d(c_in, c_out, 3, self.stride, 1, bias=False)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(c_out), nn.BatchNorm2d(c_out)

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        x = x[:, :, ::self.stride, ::self.stride]                # shortcut: every s-th pixel,
        x = F.pad(x, (0, 0, 0, 0, 0, y.shape[1] - x.shape[1]))   # zeros for the new channels
        return F.relu(y + x, inplace=True)

def classifier(channels, grid, classes):
    """(B, channels, H, W) average-pooled to grid x grid, then one linear layer to (B, classes)."""
    linear = nn.Linear(channels * grid**2, classes)
    return nn.Sequential(nn.AdaptiveAvgPool2d(grid), nn.Flatten(), linear)

def resnet_layers(depth, classes):
    """The CIFAR ResNet (He et al. 2016, sec. 4.2), depth 6n+2, as a list of 3 + 3n + 1 layers."""
    n = (depth - 2) // 6
    widths = [16] * (n + 1) + [32] * n + [64] * n
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return [*stem, *(Block(a, b) for a, b in zip(widths, widths[1:])), classifier(64, 1, classes)]

def auxiliary_classifier(layers, end, depth, classes):
    """Class scores from z, the output of layers[:end]: `depth` residual blocks, as wide as blocks
    spaced evenly over those that follow (AugLocal, Ma et al. 2024), then a linear layer on what is
    pooled to 2x2 (1x1 and 4x4 did worse: NOTES.md, sec. 7). With depth 0 or no block to follow: one
    linear layer as in the paper (sec. IV-A), but on z pooled to 4x4: on all of it, it diverges."""
    channels = getattr(layers[end - 1], "c_out", 16)    # of z, from a block or from the stem
    after = [layer.c_out for layer in layers[end:] if hasattr(layer, "c_out")]
    n, depth = len(after), min(depth, len(after))
    widths = [channels] + [after[n * i // depth - 1] for i in range(1, depth + 1)]
    blocks = [Block(a, b) for a, b in zip(widths, widths[1:])]
    return nn.Sequential(*blocks, *classifier(widths[-1], 2 if blocks else 4, classes))

class LocalModule(nn.Module):
    """A run of layers, `body`, and the `head` that turns its output into class scores: in the last
    module the network's own classifier, in the others an auxiliary one (in backprop mode None).
    Its `optimizer` and `schedule` (made in Run) are its own: modules are stepped at different
    times, on different machines, and in decoupled mode by losses of their own."""
    def __init__(self, body, head):
        super().__init__()
        self.body, self.head = nn.Sequential(*body), head

    def forward(self, x):
        return self.body(x)

    def update(self):
        """A step. The gradients are dropped at once: they would lie idle until the next batch."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()

def cut_network(config):
    """The client's and the server's lists of LocalModule. The client has the first ceil(L/4),
    ceil(L/3) or ceil(L/2) of L layers. A party's n layers make N runs of ceil(n/N), the last may be
    shorter (fewer than N: Refusal). Auxiliary weights are drawn last: both modes start alike."""
    torch.manual_seed(config.seed)
    layers, end, parties = resnet_layers(config.depth, CLASSES[config.dataset]), 0, []
    border = math.ceil(len(layers) / {"shallow": 4, "middle": 3, "deep": 2}[config.cut])
    for name, part in (("client", layers[:border]), ("server", layers[border:])):
        count = getattr(config, f"{name}_modules")
        size = math.ceil(len(part) / count)
        runs = [part[i:i + size] for i in range(0, len(part), size)]
        if len(runs) != count:
            refuse(f"--{name}-modules {count}: the {name}'s {len(part)} layers make {len(runs)} "
                   f"runs of {size}; ask for fewer modules or a larger --depth")
        parties.append([])
        for body in runs:
            end += len(body)
            head = body.pop() if end == len(layers) else None      # the network's own classifier
            if not head and config.mode != "backprop":
                head = auxiliary_classifier(layers, end, config.aux_depth, CLASSES[config.dataset])
            parties[-1].append(LocalModule(body, head))
    return parties

# ---- 3. Channel: the only way from one party to the other ----------------------------------------
class Channel:
    """An in-process wire that detaches, encodes and counts. `send` queues a tensor by direction and
    kind, each with a counter in `reset`; `receive` takes the oldest one off, with a storage of its
    own and no graph. (Until then a payload that needs no encoding is the sender's own storage.)
    `wire` encodes activations and gradients: float32, bfloat16, or uint8 with an offset and a scale
    per channel (dim 1), sent and counted too. For a real network override `push` and `pull`."""
    def __init__(self, wire="float32"):
        floats = getattr(torch, wire)
        self.types = {"labels": torch.uint8, "activations": floats, "gradients": floats}
        self.queues = {}
        self.reset()

    def reset(self):
        self.bytes = {"up": {"activations": 0, "labels": 0}, "down": {"gradients": 0},
                      "relay": {"weights": 0},          # from one client to the next
                      "evaluation": {"activations": 0}}             # up too, of test images

    def send(self, tensor, direction, kind):
        if kind == "labels" and tensor.max() > 255:
            raise ValueError("a label takes one byte: at most 256 classes")
        payload = self.encode(tensor.detach(), self.types.get(kind, tensor.dtype))
        self.bytes[direction][kind] += sum(t.numel() * t.element_size() for t in payload)
        self.push(payload, direction, kind)

    def receive(self, direction, kind):
        return self.decode(*self.pull(direction, kind))

    def push(self, payload, direction, kind):
        self.queues.setdefault((direction, kind), []).append(payload)

    def pull(self, direction, kind):
        return self.queues[direction, kind].pop(0)

    def encode(self, tensor, dtype):
        """The list of tensors that crosses the wire."""
        if dtype is not torch.uint8 or not tensor.is_floating_point():
            return [tensor.to(dtype)]
        tensor, dims = tensor.float(), [d for d in range(tensor.dim()) if d != 1]
        low, high = tensor.amin(dims, keepdim=True), tensor.amax(dims, keepdim=True)
        scale = ((high - low) / 255).clamp_min(torch.finfo(torch.float32).tiny)
        return [((tensor - low) / scale).round_().to(torch.uint8), low, scale]

    def decode(self, values, low=None, scale=None):
        """A new tensor: int64 from integers, else float32; from uint8 at most scale / 2 off."""
        if scale is not None:
            return values * scale + low
        return values.to(torch.float32 if values.is_floating_point() else torch.int64, copy=True)

# ---- 4. Memory: a ledger of live tensor storages, charged to the party that made them ------------
class Ledger(TorchDispatchMode):
    """Live bytes per party, operator by operator. While entered, and `party` is "client" or
    "server" (Party.working sets it), it sees every tensor that an operator returns. A storage
    counts once, however many views it has, until it is freed. Counted: activations, gradients,
    temporaries, weights, buffers and momentum (older ones: by `add`). Not counted: the data set and
    the batch drawn from it, an operator's scratch, the allocator's reserve, the interpreter."""
    def __init__(self):
        super().__init__()
        self.party, self.live, self.known = None, Counter(), weakref.WeakSet()
        self.trace = []         # an operator each: (who worked, client's live bytes, server's)

    def add(self, party, tree, old=()):
        """Charge the storages of all tensors in a tree, but for those in a tree of old ones."""
        new, old = ({leaf.untyped_storage() for leaf in tree_leaves(part) if torch.is_tensor(leaf)}
                    for part in (tree, old))
        for storage in new - old:
            if storage not in self.known:
                self.known.add(storage)
                self.live[party] += storage.nbytes()
                weakref.finalize(storage, self.live.subtract, {party: storage.nbytes()})

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if self.party:
            self.add(self.party, result, (args, kwargs))    # a view of the batch is not new
            self.trace.append((self.party, self.live["client"], self.live["server"]))
        return result

    def figures(self, width=60):
        """Bytes, once both parties have worked: each party's peak, that of both on one host, what
        the client held at the server's last operator; and a picture: each party's peaks in `width`
        equal runs of operators."""
        who, client, server = zip(*self.trace)
        cuts = [len(who) * i // width for i in range(width + 1)]
        return {"client_peak": max(client), "server_peak": max(server),
                "host_peak": max(map(sum, zip(client, server))),
                "client_held": dict(zip(who, client))["server"],
                "picture": [[max(live[a:max(b, a + 1)]) for a, b in zip(cuts, cuts[1:])]
                            for live in (client, server)]}

# ---- 5. The two protocols: one batch each, the same arguments, the same kind of result -----------
class Party(nn.Sequential):
    """One machine: a chain of local modules and a clock. Called, it runs the bodies end to end:
    images to z on the client, z to features on the server. (In a U-shaped split, where labels never
    leave the client, the last head and its optimizer would be on the client again.)"""
    def __init__(self, name, modules, ledger=None):
        super().__init__(*modules)
        self.name, self.ledger, self.seconds = name, ledger or Ledger(), 0.0

    @contextmanager
    def working(self):
        """What runs inside adds to self.seconds, and its tensors are charged to this party."""
        finish = getattr(torch, next(self.parameters()).device.type).synchronize
        finish()                    # a GPU runs asynchronously: wait for it before reading a clock
        self.ledger.party, start = self.name, time.perf_counter()
        yield
        finish()
        self.ledger.party, self.seconds = None, self.seconds + time.perf_counter() - start

    def update(self):
        for module in self:
            module.update()

def backprop_step(client, server, channel, x, y):
    """One batch of conventional split learning (Gupta & Raskar 2018): up, a wait, and down again.
    x: (B, 3, H, W) images, y: (B,) labels, both the client's. Returns the loss by party."""
    with client.working():
        z = client(x)       # (B, C, H', W'), say (128, 32, 16, 16); the client's activations stay
        channel.send(z, "up", "activations")
        channel.send(y, "up", "labels")
    with server.working():                          # and all this time the client can only wait
        z_in = channel.receive("up", "activations").requires_grad_()    # so that dL/dz is computed
        y_in = channel.receive("up", "labels")
        scores = server[-1].head(server(z_in)).float()      # (B, classes)
        loss = F.cross_entropy(scores, y_in)
        loss.backward()
        channel.send(z_in.grad, "down", "gradients")    # as large as z
        server.update()
        server_loss = loss.item()
        del z_in, y_in, scores, loss                # the server needs nothing more of this batch
    with client.working():
        z.backward(channel.receive("down", "gradients").to(z.dtype))    # and are freed only here
        client.update()
    return {"server": server_loss}

def decoupled_step(client, server, channel, x, y):
    """One batch of decoupled split learning (paper, sec. III): up, and that is all.
    x: (B, 3, H, W) images, y: (B,) labels, both the client's. Returns the loss by party."""
    with client.working():
        z, client_loss = train_locally(client, x, y)    # only z (B, C, H', W') is left of the batch
        channel.send(z, "up", "activations")
        channel.send(y, "up", "labels")
        del z                           # the channel has the last reference: freed when received
    with server.working():              # on two machines the client may begin its next batch now
        z_in, y_in = channel.receive("up", "activations"), channel.receive("up", "labels")
        _, server_loss = train_locally(server, z_in, y_in)  # dL/dz is neither computed nor sent
    return {"client": client_loss, "server": server_loss}

def train_locally(party, x, y):
    """A forward, loss, backward and step for each module of a party; returns the last z and loss.
    One module a party is the paper's method; the party's own peak is then near that of backprop,
    since all its activations are still alive between its forward and its backward. With several
    modules only those of one module are: that cuts the peak."""
    for module in party:
        z = module(x)
        loss = F.cross_entropy(module.head(z).float(), y)
        loss.backward()                             # frees this module's activations, all but z
        module.update()
        x = z.detach()                              # no gradient will come back from the next one
    return x, loss.item()

def hand_over(client, channel):
    """The client's part travels to the next client: weights and buffers, and momentum. (One Party
    stands for all clients, one at a time, so it is copied onto itself.)"""
    for module in client:
        for part in (module, module.optimizer):
            for tensor in filter(torch.is_tensor, tree_leaves(part.state_dict())):
                channel.send(tensor, "relay", "weights")
                tensor.copy_(channel.receive("relay", "weights"))

# ---- 6. Data: the set is one uint8 tensor, batches are made by tensor operations -----------------
def load(config):
    """Training and test set: pairs of images (N, 3, 32, 32) uint8 and labels (N,) int64."""
    if config.dataset == "synthetic":
        sets = synthetic(config.seed)
    else:
        source = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[config.dataset]
        try:
            parts = [source(config.data_dir, train=train, download=True) for train in (True, False)]
        except Exception as error:    # torchvision lets through those of os, urllib, tar and pickle
            refuse(f"--dataset {config.dataset}: not in --data-dir {config.data_dir}, or damaged: "
                   f"put {source.url} there, or try --dataset synthetic ({error})")
        sets = [(torch.from_numpy(part.data).permute(0, 3, 1, 2), torch.tensor(part.targets))
                for part in parts]
    return sets

def synthetic(seed, sizes=(2560, 1000)):
    """10 classes: a grey pattern each, bright or dark, anywhere in front of clutter that has colour
    but no brightness, under noise. On average a pixel says nothing about the class, so a linear
    model on pixels finds little; one trained convolution removes most of clutter and noise."""
    g = torch.Generator().manual_seed(seed)
    def smooth(n, channels, cells, pixels):
        noise = torch.randn(n, channels, cells, cells, generator=g)
        return F.interpolate(noise, pixels, mode="bicubic")
    patterns, sets = F.pad(smooth(10, 1, 4, 16), (16, 16, 16, 16)), []
    for n in sizes:
        labels = torch.randint(10, (n,), generator=g)
        sign = 2 * torch.randint(2, (n, 1, 1, 1), generator=g) - 1
        pattern = sign * crop(patterns[labels], *torch.randint(17, (2, n), generator=g))
        clutter = smooth(n, 3, 8, 32)
        clutter = clutter - clutter.mean(1, keepdim=True)
        noise = torch.randn(n, 3, 32, 32, generator=g)
        images = 20 * (1.5 * pattern + 3 * clutter + 0.7 * noise) + 128
        sets.append((images.clamp(0, 255).to(torch.uint8), labels))
    return sets

def crop(images, top, left):
    """The 32x32 window of each image (B, C, H, W) whose corner is at top, left: (B,) int64."""
    windows = images.unfold(2, 32, 1).unfold(3, 32, 1)     # a view: (B, C, H - 31, W - 31, 32, 32)
    return windows[torch.arange(len(images)), :, top, left]

def batches(images, labels, size, g=None):
    """Yield x (B, 3, 32, 32) float32 and y (B,). With a generator g: shuffled, and of each image
    padded with 4 black pixels a random 32x32 crop, flipped with probability 1/2."""
    order = torch.randperm(len(labels), generator=g) if g else torch.arange(len(labels))
    for index in order.tensor_split(math.ceil(len(order) / size)):   # sizes differ by one at most
        x, y = images[index], labels[index]
        if g:
            x = crop(F.pad(x, (4, 4, 4, 4)), *torch.randint(9, (2, len(y)), generator=g))
            flip = torch.rand(len(y), 1, 1, 1, generator=g) < 0.5
            x = torch.where(flip.to(x.device), x.flip(3), x)
        yield (x.float() - 128) / 64, y     # BatchNorm needs no finer scaling

# ---- 7. Training: one loop for both modes --------------------------------------------------------
class Run:
    """One mode in training: two parties, the channel, the ledger, and how far they have got (from
    the checkpoint, if there is one)."""
    def __init__(self, config, train_set, test_set, device):
        self.config, self.test_set, self.device = config, test_set, device
        self.channel, self.ledger = Channel(config.wire), Ledger()
        self.shards = list(zip(*(tensor.tensor_split(config.clients) for tensor in train_set)))
        ends = list(accumulate(math.ceil(len(y) / config.batch_size) for _, y in self.shards))
        self.steps = min(ends[-1], config.max_steps or ends[-1])
        self.hand_overs = [n for n in ends if config.clients > 1 and n <= self.steps]
        self.client, self.server = (Party(name, modules, self.ledger) for name, modules
                                    in zip(("client", "server"), cut_network(config)))
        self.state, self.epoch, self.summary = [], 0, None      # these go into a checkpoint
        for module in [*self.client, *self.server]:
            module.to(device, memory_format=torch.channels_last)
            weights = {"params": list(module.parameters())}     # a lone ReLU has none
            sgd = torch.optim.SGD([weights], config.lr, momentum=0.9, nesterov=True,
                                  weight_decay=config.weight_decay)
            module.optimizer, module.schedule = sgd, torch.optim.lr_scheduler.OneCycleLR(
                sgd, config.lr, config.epochs * self.steps, cycle_momentum=False)
            self.state += [module, module.optimizer, module.schedule]
            if config.amp:          # the forward passes are in bfloat16, the losses in float32
                for part in filter(None, (module.body, module.head)):
                    part.forward = torch.autocast(device.type, torch.bfloat16)(part.forward)
        if os.path.exists(config.checkpoint):
            self.resume(config.checkpoint)

    def train_epoch(self):
        """One pass over the training set. Returns its figures in the words of --log."""
        config, epoch = self.config, self.epoch
        client, server = self.client.train(), self.server.train()
        step = {"backprop": backprop_step, "decoupled": decoupled_step}[config.mode]
        # Seeded by the epoch: both modes see the same batches, and so does a run that is resumed.
        g = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
        stream = (batch for shard in self.shards for batch in batches(*shard, config.batch_size, g))
        self.channel.reset()
        client.seconds = server.seconds = total = seen = 0
        start = time.perf_counter()
        for n, (x, y) in zip(range(1, self.steps + 1), stream):
            losses = step(client, server, self.channel, x, y)
            for name, loss in losses.items():
                if not math.isfinite(loss):
                    refuse(f"the {name}'s loss is {loss} in epoch {epoch + 1}, step {n}: try a "
                           f"lower --lr than {config.lr:g}")
            if n in self.hand_overs:
                hand_over(client, self.channel)
            total, seen = total + losses["server"] * len(y), seen + len(y)
            seconds = time.perf_counter() - start
            left = ((config.epochs - epoch) * self.steps - n) * seconds / n / 60
            say(f"{config.mode} epoch {epoch + 1} step {n}/{self.steps} loss {total / seen:.3f} "
                f"{seen / seconds:.0f} images/s {left:.1f} min left", passing=True)
        return {"train_loss": total / seen, "images_per_second": seen / seconds,
                "bytes": self.channel.bytes,    # the live counters: evaluate() adds to them
                "seconds": {"epoch": seconds, "client": client.seconds, "server": server.seconds}}

    @torch.no_grad()
    def evaluate(self):
        """Test accuracy of the whole, and of the client with its auxiliary classifier alone."""
        client, server, right, aux = self.client.eval(), self.server.eval(), 0, 0
        for x, y in batches(*self.test_set, self.config.batch_size):
            z = client(x)
            self.channel.send(z, "evaluation", "activations")
            features = server(self.channel.receive("evaluation", "activations"))
            scores = server[-1].head(features)
            if not scores.isfinite().all():
                refuse(f"the scores of epoch {self.epoch + 1} are not finite: try a lower --lr than "
                       f"{self.config.lr:g}")
            right += (scores.argmax(1) == y).sum().item()
            if client[-1].head:
                aux += (client[-1].head(z).argmax(1) == y).sum().item()
        n = len(self.test_set[1])
        return {"test_accuracy": right / n, "aux_accuracy": aux / n if client[-1].head else None}

    def train(self):
        """Train to the last epoch. Returns the summary."""
        config = self.config
        memory = measure_memory(config, self.device, self.shards[0])
        while self.epoch < config.epochs:
            s = self.summary = {**self.train_epoch(), "memory": memory, **self.evaluate()}
            self.epoch += 1
            if config.checkpoint:
                self.save(config.checkpoint)
            write_log(config.log, {"event": "epoch", "mode": config.mode, "epoch": self.epoch, **s})
            aux = f" (auxiliary {s['aux_accuracy']:.2%})" if s["aux_accuracy"] is not None else ""
            say(f"{config.mode} epoch {self.epoch}/{config.epochs} loss {s['train_loss']:.3f} "
                f"test {s['test_accuracy']:.2%}{aux} {s['images_per_second']:.0f} images/s")
        summary = {"event": "summary", **asdict(config), "device": str(self.device),
                   "torch": str(torch.__version__), **self.summary}
        summary["seconds"]["link_epoch"] = link_seconds(
            config, summary, self.steps, len(self.hand_overs))
        write_log(config.log, summary)
        return summary

    def save(self, path):
        """Write what the next epoch needs. The old file stays until the new one is whole."""
        draft = f"{path}.{os.getpid()}"
        try:
            state = [part.state_dict() for part in self.state]
            torch.save({"config": asdict(self.config), "epoch": self.epoch,
                        "summary": self.summary, "state": state}, draft)
            os.replace(draft, path)
        except (OSError, RuntimeError) as error:    # torch.save turns one into the other
            refuse(f"--checkpoint {path}: not written, the last one is kept ({error})")
        finally:
            if os.path.exists(draft):
                os.remove(draft)

    def resume(self, path):
        """Go on from a checkpoint (on a CPU bit for bit), or Refusal: damaged, or another run's."""
        try:
            if zipfile.ZipFile(path).testzip():
                raise ValueError("a checksum is wrong")
            saved = torch.load(path, map_location="cpu", weights_only=True)
            theirs, mine = saved["config"], asdict(self.config)
            other = [k for k in mine if k not in FREE_ON_RESUME and theirs.get(k) != mine[k]]
            for part, state in zip(self.state, [] if other else saved["state"]):
                part.load_state_dict(state)
            self.epoch, self.summary = saved["epoch"], saved["summary"]
        except Exception:               # zipfile, pickle and torch each have their own
            refuse(f"--checkpoint {path}: damaged, or not one of this program; use another path")
        if other:
            refuse(f"--checkpoint {path}: of a run with --{other[0].replace('_', '-')} "
                   f"{theirs.get(other[0])}, not {mine[other[0]]}; use another path")

def measure_memory(config, device, images):
    """Bytes of one training step, on parties of their own and a batch of exactly --batch-size
    images: one step unwatched, then there is momentum, and one under the ledger."""
    index = torch.arange(config.batch_size) % len(images[1])
    run = Run(replace(config, checkpoint="", clients=1, epochs=2), images, None, device)
    step = {"backprop": backprop_step, "decoupled": decoupled_step}[config.mode]
    x, y = next(batches(images[0][index], images[1][index], config.batch_size))
    step(run.client, run.server, run.channel, x, y)
    for party in (run.client, run.server):
        static = [(m.state_dict(), m.optimizer.state_dict()) for m in party]
        run.ledger.add(party.name, static)
    with run.ledger:
        step(run.client, run.server, run.channel, x, y)
    return run.ledger.figures()

def link_seconds(config, s, steps, hand_overs):
    """Seconds of an epoch over the link. Backprop is a chain: each batch waits for its gradient.
    Decoupled is a pipeline of client, link and server: the slowest of the three sets the pace."""
    up, down, relay = (8 * sum(s["bytes"][direction].values()) / (config.bandwidth * 1e6)
                       for direction in ("up", "down", "relay"))
    client, server, latency = s["seconds"]["client"], s["seconds"]["server"], config.latency / 1e3
    once, slowest = client + up + server, max(client, up, server)
    relay += latency * hand_overs
    if config.mode == "backprop":
        return once + down + 2 * steps * latency + relay
    return slowest + (once - slowest) / steps + latency + relay

# ---- 8. Report: progress, log, table, picture ----------------------------------------------------
def say(line, passing=False):
    """A line on stderr; a passing one only on a terminal, where the next line replaces it."""
    if terminal := sys.stderr.isatty():
        line = f"\r{line:<79.79}" if passing else f"\r{line:<79}"
    if terminal or not passing:
        print(line, end="" if passing else "\n", file=sys.stderr, flush=True)

def write_log(path, *records):
    """Append JSON lines, if there is a path."""
    try:
        with open(path or os.devnull, "a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
    except OSError as error:
        refuse(f"--log {path}: {error.strerror}; what it holds is kept; mend that or use another")

def report(summaries):
    """The table, in compare mode with the change, and the memory picture. nan: does not apply."""
    columns = []
    for s in summaries:
        up, down, relay = (sum(s["bytes"][way].values()) / 1e6 for way in ("up", "down", "relay"))
        memory, clock, aux = s["memory"], s["seconds"], s["aux_accuracy"]
        columns.append({
            "test accuracy, %": 100 * s["test_accuracy"],
            "auxiliary accuracy, %": 100 * (math.nan if aux is None else aux),
            "up, MB an epoch": up, "down, MB an epoch": down, "in all, MB an epoch": up + down,
            "client to client, MB an epoch": relay,
            "client peak, MiB": memory["client_peak"] / 2**20,
            "server peak, MiB": memory["server_peak"] / 2**20,
            "peak of both on one host, MiB": memory["host_peak"] / 2**20,
            "client while the server works, MiB": memory["client_held"] / 2**20,
            "client, seconds an epoch": clock["client"],
            "server, seconds an epoch": clock["server"],
            "seconds an epoch": clock["epoch"], "seconds over the link": clock["link_epoch"]})
    compare = len(columns) > 1
    print(" " * 36 + "".join(f"{s['mode']:>12}" for s in summaries) + "      change" * compare)
    for name, a in columns[0].items():
        b = columns[-1][name]
        change = f"{b - a:+.2f}" if "%" in name else f"{100 * (b / (a or math.nan) - 1):+.1f}%"
        cells = [*(f"{column[name]:.2f}" for column in columns), *[change] * compare]
        print(f"{name:36}" + "".join(f"{'-' if 'nan' in cell else cell:>12}" for cell in cells))
    print("\nLive memory over one training step, operator by operator:")
    top = max(max(map(max, s["memory"]["picture"])) for s in summaries)
    for s in summaries:
        for party, row in zip(("client", "server"), s["memory"]["picture"]):
            bars = "".join(" ▁▂▃▄▅▆▇█"[math.ceil(8 * live / top)] for live in row)
            print(f"{s['mode']:>10} {party} {bars}")

# ---- 9. main: from the command line to the report; bad input is one line -------------------------
def parse(argv):
    """Config from the command line. Refusal for a value out of its bounds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = refuse
    for f in fields(Config):
        allowed, default = f.metadata["allowed"], f.default
        kind = ({"action": "store_true"} if isinstance(default, bool) else
                {"type": type(default), "choices": allowed if isinstance(allowed, list) else None})
        also = f", synthetic: {SYNTHETIC[f.name]}" if f.name in SYNTHETIC else ""
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, **kind,
                            help=f"{f.metadata['text']} (default: {str(default) or 'none'}{also})")
    given = vars(parser.parse_args(argv))
    preset = SYNTHETIC if given.get("dataset", "synthetic") == "synthetic" else {}
    config = Config(**{**preset, **given})
    for f in fields(Config):
        value, allowed = getattr(config, f.name), f.metadata["allowed"]
        limit = 2**31 if isinstance(value, int) else math.inf
        if isinstance(allowed, (int, float)) and not allowed <= value < limit:
            refuse(f"--{f.name.replace('_', '-')} {value}: must be from {allowed} to below {limit}")
    return config

def main(argv=None):
    """Returns the exit code: 0, or 2 for what the user can mend, or 130 for Ctrl-C."""
    try:
        config = parse(argv)
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "cpu": True}
        found = [name for name in there if there[name] and config.device in ("auto", name)]
        device = torch.device(found[0]) if found else refuse(f"--device {config.device}: not here")
        write_log(config.log)       # nothing yet: a path that cannot be written is refused at once
        folder = os.path.dirname(path := config.checkpoint) or "."
        if path and (os.path.isdir(path) or not os.access(folder, os.W_OK)):
            refuse(f"--checkpoint {path}: a file cannot be written there; name another path")
        sets = [[tensor.to(device) for tensor in pair] for pair in load(config)]
        if config.clients > (n := len(sets[0][1])):
            refuse(f"--clients {config.clients}: more than the {n} training images")
        configs, (root, end) = [config], os.path.splitext(config.checkpoint)
        if config.mode == "compare":    # each mode has its own checkpoint: run.backprop.pt
            configs = [replace(config, mode=mode, checkpoint=root and f"{root}.{mode}{end}")
                       for mode in ("backprop", "decoupled")]
        runs = [Run(config, *sets, device) for config in configs]   # none trains if one is refused
        summaries = [run.train() for run in runs]
        if len(summaries) > 1:
            write_log(config.log, {"event": "compare", **{s["mode"]: s for s in summaries}})
        report(summaries)
        return 0
    except (Refusal, OSError) as error:
        say("decoupled_split.py: error: " + (str(error) or repr(error)).splitlines()[0])
        return 2
    except KeyboardInterrupt:
        say("decoupled_split.py: interrupted; --checkpoint, if given, holds the last whole epoch")
        return 130

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")    # a terminal without block characters shows "?"
    sys.exit(main())
