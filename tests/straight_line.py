"""The four dialects written out once more, from the published table and nothing else.

No code is shared with the package: these are what it is compared with. Every
network carries its code base's own state-dict keys, so that they also make the
checkpoints of each layout.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

SLIM = ([64, 80, 96, 112], [112, 256, 384, 512])
FULL = ([128, 160, 192, 224], [256, 512, 768, 1024])

# name: (C_mid, C_out, layers a block, blocks a stage, depthwise)
DETECTRON2 = {
    "V-19-slim-dw-eSE": (*SLIM, 3, [1, 1, 1, 1], True),
    "V-19-dw-eSE": (*FULL, 3, [1, 1, 1, 1], True),
    "V-19-slim-eSE": (*SLIM, 3, [1, 1, 1, 1], False),
    "V-19-eSE": (*FULL, 3, [1, 1, 1, 1], False),
    "V-39-eSE": (*FULL, 5, [1, 1, 2, 2], False),
    "V-57-eSE": (*FULL, 5, [1, 1, 4, 3], False),
    "V-99-eSE": (*FULL, 5, [1, 3, 9, 3], False),
}
# The same, and whether the network has eSE and identity adds (VoVNetV2).
TIMM = {
    "ese_vovnet19b_slim_dw": (*SLIM, 3, [1, 1, 1, 1], True, True),
    "ese_vovnet19b_dw": (*FULL, 3, [1, 1, 1, 1], True, True),
    "ese_vovnet19b_slim": (*SLIM, 3, [1, 1, 1, 1], False, True),
    "ese_vovnet39b": (*FULL, 5, [1, 1, 2, 2], False, True),
    "ese_vovnet57b": (*FULL, 5, [1, 1, 4, 3], False, True),
    "ese_vovnet99b": (*FULL, 5, [1, 3, 9, 3], False, True),
    "vovnet39a": (*FULL, 5, [1, 1, 2, 2], False, False),
    "vovnet57a": (*FULL, 5, [1, 1, 4, 3], False, False),
}
SEED = {
    "vovnet-19-slim-dw1": ([64, 80, 96, 112], [56, 128, 192, 256], 1, [1, 1, 1, 1], True),
    "vovnet-19-slim-dw": (*SLIM, 3, [1, 1, 1, 1], True),
    "vovnet-19-slim": (*SLIM, 3, [1, 1, 1, 1], False),
    "vovnet-19": (*FULL, 3, [1, 1, 1, 1], False),
    "vovnet-39": (*FULL, 5, [1, 1, 2, 2], False),
    "vovnet-57": (*FULL, 5, [1, 1, 4, 3], False),
    "vovnet-99": (*FULL, 5, [1, 3, 9, 3], False),
}
# The VoVNet of 2019, of five layers a block.
TORCHHUB = {
    "V-27-slim": ([64, 80, 96, 112], [128, 256, 384, 512], 5, [1, 1, 1, 1], False),
    "V-39": (*FULL, 5, [1, 1, 2, 2], False),
    "V-57": (*FULL, 5, [1, 1, 4, 3], False),
}


class Detectron2Net(nn.Module):
    """Strides 2, 1, 2; ceil-mode pools before stages 3 to 5; eSE in every block."""

    def __init__(self, mid, out, layers, blocks, dw, in_ch=3):
        super().__init__()
        stem_out = 64 if dw else 128
        parts = self.conv("stem_1", in_ch, 64, 3, 2)
        parts += self.layer("stem_2", 64, 64, 1, dw) + self.layer("stem_3", 64, stem_out, 2, dw)
        self.stem = nn.Sequential(OrderedDict(parts))
        channels = stem_out
        for s in range(4):
            stage = nn.Module()
            for b in range(blocks[s]):
                name = f"OSA{s + 2}_{b + 1}"
                block = nn.Module()
                width = channels
                if dw and channels != mid[s]:
                    reduction = self.conv(f"{name}_reduction_0", channels, mid[s], 1, 1)
                    block.conv_reduction = nn.Sequential(OrderedDict(reduction))
                    width = mid[s]
                block.layers = nn.ModuleList()
                for i in range(layers):
                    parts = self.layer(f"{name}_{i}", width, mid[s], 1, dw)
                    block.layers.append(nn.Sequential(OrderedDict(parts)))
                    width = mid[s]
                parts = self.conv(f"{name}_concat", channels + layers * mid[s], out[s], 1, 1)
                block.concat = nn.Sequential(OrderedDict(parts))
                block.ese = nn.Module()
                block.ese.fc = nn.Conv2d(out[s], out[s], 1)
                stage.add_module(name, block)
                channels = out[s]
            self.add_module(f"stage{s + 2}", stage)

    @staticmethod
    def conv(name, cin, cout, k, stride):
        conv = nn.Conv2d(cin, cout, k, stride, k // 2, bias=False)
        return [(f"{name}/conv", conv), (f"{name}/norm", nn.BatchNorm2d(cout)), (name, nn.ReLU())]

    @classmethod
    def layer(cls, name, cin, cout, stride, dw):
        if not dw:
            return cls.conv(name, cin, cout, 3, stride)
        return [
            (f"{name}/dw_conv3x3", nn.Conv2d(cin, cin, 3, stride, 1, groups=cin, bias=False)),
            (f"{name}/pw_conv1x1", nn.Conv2d(cin, cout, 1, bias=False)),
            (f"{name}/pw_norm", nn.BatchNorm2d(cout)),
            (name, nn.ReLU()),
        ]

    def forward(self, x):
        features = []
        x = self.stem(x)
        for s in range(2, 6):
            if s > 2:
                x = F.max_pool2d(x, 3, 2, ceil_mode=True)
            for b, block in enumerate(getattr(self, f"stage{s}").children()):
                outputs = [x]
                y = block.conv_reduction(x) if hasattr(block, "conv_reduction") else x
                for layer in block.layers:
                    y = layer(y)
                    outputs.append(y)
                y = block.concat(torch.cat(outputs, 1))
                y = self.gate(block, y)
                x = x + y if b > 0 else y
            features.append(x)
        return features

    @staticmethod
    def gate(block, y):
        return y * (F.relu6(block.ese.fc(y.mean((2, 3), keepdim=True)) + 3) / 6)


class TorchHubNet(Detectron2Net):
    """What detectron2's was made from: no eSE, and a classifier."""

    def __init__(self, mid, out, *numbers):
        super().__init__(mid, out, *numbers)
        for s in range(2, 6):
            for block in getattr(self, f"stage{s}").children():
                del block.ese
        self.classifier = nn.Linear(out[-1], 10)

    @staticmethod
    def gate(block, y):
        return y


class TimmNet(nn.Module):
    """As detectron2, but eSE only in the last block of a stage, or nowhere (v1)."""

    def __init__(self, mid, out, layers, blocks, dw, v2, in_ch=3):
        super().__init__()
        self.v2 = v2
        stem_out = 64 if dw else 128
        self.stem = nn.Sequential(
            self.conv(in_ch, 64, 3, 2),
            self.layer(64, 64, 1, dw),
            self.layer(64, stem_out, 2, dw),
        )
        channels = stem_out
        self.stages = nn.Sequential()
        for s in range(4):
            stage = nn.Module()
            stage.blocks = nn.Sequential()
            for b in range(blocks[s]):
                block = nn.Module()
                width = channels
                if dw and channels != mid[s]:
                    block.conv_reduction = self.conv(channels, mid[s], 1, 1)
                    width = mid[s]
                block.conv_mid = nn.Sequential()
                for i in range(layers):
                    block.conv_mid.append(self.layer(mid[s] if i else width, mid[s], 1, dw))
                block.conv_concat = self.conv(channels + layers * mid[s], out[s], 1, 1)
                if v2 and b == blocks[s] - 1:
                    block.attn = nn.Module()
                    block.attn.fc = nn.Conv2d(out[s], out[s], 1)
                stage.blocks.append(block)
                channels = out[s]
            self.stages.append(stage)
        self.head = nn.Module()
        self.head.fc = nn.Linear(channels, 10)

    @staticmethod
    def conv(cin, cout, k, stride):
        conv = nn.Conv2d(cin, cout, k, stride, k // 2, bias=False)
        return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(cout), act=nn.ReLU()))

    @classmethod
    def layer(cls, cin, cout, stride, dw):
        if not dw:
            return cls.conv(cin, cout, 3, stride)
        return nn.Sequential(
            OrderedDict(
                conv_dw=nn.Conv2d(cin, cin, 3, stride, 1, groups=cin, bias=False),
                conv_pw=nn.Conv2d(cin, cout, 1, bias=False),
                bn=nn.BatchNorm2d(cout),
                act=nn.ReLU(),
            )
        )

    def forward(self, x):
        features = []
        x = self.stem(x)
        for s, stage in enumerate(self.stages):
            if s > 0:
                x = F.max_pool2d(x, 3, 2, ceil_mode=True)
            for b, block in enumerate(stage.blocks):
                outputs = [x]
                y = block.conv_reduction(x) if hasattr(block, "conv_reduction") else x
                for layer in block.conv_mid:
                    y = layer(y)
                    outputs.append(y)
                y = block.conv_concat(torch.cat(outputs, 1))
                if hasattr(block, "attn"):
                    y = y * F.hardsigmoid(block.attn.fc(y.mean((2, 3), keepdim=True)))
                x = x + y if self.v2 and b > 0 else y
            features.append(x)
        return features


class SeedNet(nn.Module):
    """Strides 2, 1, 1; padded pools before stages 2 to 5; sigmoid gates; 1x1s with bias."""

    def __init__(self, mid, out, layers, blocks, dw, in_ch=3):
        super().__init__()
        stem_out = 64 if dw else 128
        self.model = nn.Module()
        stem = self.conv(in_ch, 64, 3, 2, False)
        stem += self.layer(64, 64, dw) + self.layer(64, stem_out, dw)
        self.model.stem = nn.Sequential(*stem)
        channels = stem_out
        for s in range(4):
            stage = nn.Module()
            for b in range(blocks[s]):
                block = nn.Module()
                block.adds = channels == out[s]
                width = channels
                if dw and channels != mid[s]:
                    block.conv_reduction = nn.Sequential(*self.conv(channels, mid[s], 1, 1, True))
                    width = mid[s]
                block.layers = nn.ModuleList()
                for _ in range(layers):
                    block.layers.append(nn.Sequential(*self.layer(width, mid[s], dw)))
                    width = mid[s]
                concat = self.conv(channels + layers * mid[s], out[s], 1, 1, True)
                block.concat = nn.Sequential(*concat)
                block.ese = nn.Module()
                block.ese.fc = nn.Conv2d(out[s], out[s], 1)
                stage.add_module(f"OSA{s + 2}_{b + 1}", block)
                channels = out[s]
            self.model.add_module(f"OSA_{s + 2}", stage)
        self.model.classifier = nn.Sequential(nn.BatchNorm2d(channels), nn.Linear(channels, 10))

    @staticmethod
    def conv(cin, cout, k, stride, bias):
        conv = nn.Conv2d(cin, cout, k, stride, k // 2, bias=bias)
        return [conv, nn.BatchNorm2d(cout), nn.ReLU()]

    @classmethod
    def layer(cls, cin, cout, dw):
        if not dw:
            return cls.conv(cin, cout, 3, 1, False)
        depthwise = nn.Conv2d(cin, cin, 3, 1, 1, groups=cin, bias=False)
        return [depthwise, *cls.conv(cin, cout, 1, 1, True)]

    def forward(self, x):
        features = []
        x = self.model.stem(x)
        for s in range(2, 6):
            x = F.max_pool2d(x, 3, 2, padding=1)
            for block in getattr(self.model, f"OSA_{s}").children():
                outputs = [x]
                y = block.conv_reduction(x) if hasattr(block, "conv_reduction") else x
                for layer in block.layers:
                    y = layer(y)
                    outputs.append(y)
                y = block.concat(torch.cat(outputs, 1))
                y = y * torch.sigmoid(block.ese.fc(y.mean((2, 3), keepdim=True)))
                x = x + y if block.adds else y
            features.append(x)
        return features


BUILDERS = {
    **{name: (Detectron2Net, numbers) for name, numbers in DETECTRON2.items()},
    **{name: (TimmNet, numbers) for name, numbers in TIMM.items()},
    **{name: (SeedNet, numbers) for name, numbers in SEED.items()},
    **{name: (TorchHubNet, numbers) for name, numbers in TORCHHUB.items()},
}


def randomise(net):
    """Give every parameter and statistic a value that leaves nothing without effect.

    Biases of both signs, variances away from one; widths are divided out so that
    activations neither vanish nor overflow through a hundred layers.
    """
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.normal_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            module.num_batches_tracked.fill_(7)
    return net


def build(name, seed=0):
    """The straight-line network of a published name, with random weights, in eval mode."""
    torch.manual_seed(seed)
    net_class, numbers = BUILDERS[name]
    return randomise(net_class(*numbers)).eval()
