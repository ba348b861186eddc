"""How :mod:`.conv_sm90` divides a layer into tiles, and what those fetch from L2.

Arithmetic alone, of ``csrc/cuda/conv_sm90/layout.h`` and ``plan.h``: a test holds the two together.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

NAME = "conv-sm90"
"""Names of engines begin with it; the pixels and the output channels of a tile follow."""

SPLIT = f"{NAME} split"
"""And those of tiles that CTAs share, with the number of them."""

TURNS = f"{NAME} turns"
"""And those whose warpgroups have tiles of their own: one multiplies while the other stores."""

_ROW_BYTES = 128  # Of the input channels of a step: kRowBytes of csrc/cuda/conv_sm90/layout.h.
_STEP_BYTES = 32  # And of one WGMMA.
_CONSUMER_WARPS = 8
_SHARED_LIMIT = (227 << 10) - 1024
_MAX_RESIDENT, _RESIDENT_STRIPS = 36, 3  # kMaxResident and kResidentStrips of plan.h.
_MAX_CLUSTER, _HANDED_ROWS, _HANDED_PAD = 8, 128, 8  # kMaxCluster, kHandedRows, handed_pitch().
_MOST_SUMS = 128 * 256  # Of a tile that has parts: has_parts() of layout.h, and of e4m3
_MOST_REGISTERS = 384  # has_parts_e4m3(), less one.
_STRIPS, _WEIGHTS = {1: 3, 3: 2}, 3  # Stages with which a split is on offer: they can run ahead.

_BLOCKS = {
    2: {128: (256, 224, 192, 160, 128, 112, 96, 80, 64), 256: (192, 160, 128, 112, 96, 80, 64)},
    1: {128: (192, 160, 128, 112, 96, 80, 64), 256: (128, 112, 96, 80, 64)},
}
"""Output channels of a tile, by bytes of an activation and by its pixels: what registers hold."""

_TURN_PIXELS = 128
_TURN_BLOCKS = _BLOCKS[2][2 * _TURN_PIXELS]
"""A warpgroup by itself has the sums that each of two has of a tile of twice the pixels."""

_NARROWEST, _WIDE = 64, 96
"""Channels: the fewest of a tile, and of one that is not narrow."""

_PADDING = 1.05
"""How many channels are multiplied, at most, for one that is there, where blocks are not whole."""

ENOUGH = 200.0
"""FLOP a byte from L2 that clusters are made for in fp16; in e4m3 twice that."""

_TILE_WIDTHS = (8, 16, 32)


@dataclass(frozen=True)
class Config:
    """How a CTA tiles its work.

    Attributes:
        pixels: of a tile.
        block_out: output channels of a tile.
        cluster: tiles of pixels and of output channels that CTAs of a cluster have side by side;
            those that read the same weights, or the same pixels, share one copy of them.
        parts: CTAs of a cluster that each sum up a part of a tile's taps and input channels.
        turns: a tile is one warpgroup's, and the two of a CTA take turns.
    """

    pixels: int
    block_out: int
    cluster: tuple[int, int] = (1, 1)
    parts: int = 1
    turns: bool = False

    @property
    def name(self) -> str:
        """What the engine is called. The shape of the tile follows from the image."""
        down, across = self.cluster
        shared = f" cluster {down}x{across}" if down * across > 1 else ""
        name = f"{SPLIT} {self.parts}" if self.parts > 1 else TURNS if self.turns else NAME
        return f"{name} {self.pixels}x{self.block_out}{shared}"

    @property
    def size(self) -> int:
        """CTAs of a cluster."""
        return math.prod(self.cluster) * self.parts

    def tile(self, height: int, width: int, kernel: int) -> tuple[int, int]:
        """Height and width of a tile: the fewest tiles, and of these the least to fetch."""
        if height == 1 and kernel == 1:
            return 1, self.pixels
        shapes = [(self.pixels // tile_w, tile_w) for tile_w in _TILE_WIDTHS]

        def cost(shape: tuple[int, int]) -> tuple[int, int]:
            tile_h, tile_w = shape
            return tiles_of(height, width, shape), (tile_h + kernel - 1) * tile_w

        return min(shapes, key=cost)


WIDTHS = _BLOCKS[2][128]
"""Output channels that a tile may have, the most first."""


def kernels(block_out: int, itemsize: int = 2) -> list[Config]:
    """Of tiles with so many channels all that there are, by themselves."""
    known = _BLOCKS[itemsize].items()
    found = [Config(pixels, block_out) for pixels, blocks in known if block_out in blocks]
    if block_out in _TURN_BLOCKS and itemsize > 1:
        found.append(Config(_TURN_PIXELS, block_out, turns=True))
    return found


def tiles_of(height: int, width: int, tile: tuple[int, int]) -> int:
    """Tiles of an image."""
    return -(-height // tile[0]) * -(-width // tile[1])


def chunk(itemsize: int = 2) -> int:
    """Input channels of a step, of activations of so many bytes."""
    return _ROW_BYTES // itemsize


def _none(c_out: int, itemsize: int) -> bool:
    """Whether there are no tiles at all: vectors have 16 bytes."""
    return c_out % (16 // itemsize) > 0 or c_out < _NARROWEST


@functools.lru_cache(256)
def _configs(c_out: int, kernel: int, itemsize: int) -> tuple[Config, ...]:
    if _none(c_out, itemsize):
        return ()
    found, known = [], _BLOCKS[itemsize]
    for pixels in sorted(known)[::-1]:
        alone = Config(pixels, _block(c_out, known[pixels]))
        found += [alone, *_clustered(alone, c_out, kernel)]
    if itemsize == 1:  # While one adds products to its sums, the other has to multiply.
        return tuple(found)
    alone = Config(_TURN_PIXELS, _block(c_out, _TURN_BLOCKS), turns=True)
    return (*found, alone, *_clustered(alone, c_out, kernel))


def configs(c_out: int, kernel: int = 3, itemsize: int = 2) -> list[Config]:
    """Tiles for a number of output channels, largest first; empty where there are none.

    Those that both warpgroups of a CTA multiply together, and then those that they have by
    themselves, which store while the next tile is multiplied, but fetch more for each product.

    ``itemsize``: bytes of an activation, 1 in e4m3.

    Whole blocks, but for numbers that have none or only narrow ones, as those of concat buffers
    may: then the widest blocks whose last one is nearly full. Each by itself, in pairs, and in
    the smallest clusters that fetch little enough.
    """
    return list(_configs(c_out, kernel, itemsize))


def _clustered(alone: Config, c_out: int, kernel: int) -> list[Config]:
    """Pairs, and the smallest clusters with ENOUGH FLOP a byte; of a size those with the most."""
    rows = {128: 8, 256: 16}[alone.pixels] + kernel - 1 if kernel > 1 else alone.pixels // 16
    groups = -(-c_out // alone.block_out)

    def intensity(config: Config) -> float:
        down, across = config.cluster
        products = down * across * alone.pixels * alone.block_out * kernel**2
        return products / (down * kernel * rows * 16 + across * kernel**2 * alone.block_out)

    if intensity(alone) >= ENOUGH:
        return []
    found = [
        dataclasses.replace(alone, cluster=(size // across, across))
        for size in (2, 4, 8)
        for across in (1, 2, 4, 8)
        if across <= min(groups, size)
    ]
    sizes = [config for config in found if intensity(config) >= ENOUGH] or found[-1:]
    wanted = dict.fromkeys((2, math.prod(sizes[0].cluster)))
    return [
        max((c for c in found if math.prod(c.cluster) == size), key=intensity) for size in wanted
    ]


def _block(c_out: int, blocks: tuple[int, ...]) -> int:
    """Which of some numbers of channels, the largest first, a tile has."""
    wide = [block for block in blocks if block >= min(c_out, _WIDE)]

    def padded(block: int) -> int:
        return -(-c_out // block) * block

    for most in (1.0, _PADDING):
        fit = [block for block in wide if padded(block) <= most * c_out]
        if fit:
            return fit[0]
    return min(wide, key=padded)


# --------------------------------------------------------------------------------------
# Traffic
# --------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """A layer, as the kernel sees it: a 1x1 convolution has one row of pixels where it can.

    Attributes:
        batch, height, width: of the output.
        c_in, c_out, kernel: of the weights.
        pool: with pool partials.
        itemsize: bytes of an activation, 1 in e4m3.
    """

    batch: int
    height: int
    width: int
    c_in: int
    c_out: int
    kernel: int
    pool: bool = False
    itemsize: int = 2


class Work(NamedTuple):
    """What all CTAs together do for a layer.

    Attributes:
        tiles: of all images and channels, those of clusters' that do not exist among them.
        flop: two a product, those of pixels and channels of tiles that do not exist among them.
        fetched: bytes that bulk copies take from L2, without channels that there are not.
        resident: weights are fetched once by every CTA.
        busy: CTAs at work for each processor, on average over the waves.
        even: of what CTAs multiply, the mean over the most, as parts may differ by a tap.
    """

    tiles: int
    flop: int
    fetched: int
    resident: bool
    busy: float
    even: float

    @property
    def intensity(self) -> float:
        """FLOP a byte from L2."""
        return self.flop / self.fetched


def _taken(config: Config, shape: Shape, strips: int, weights: int) -> int:
    """Bytes of shared memory of a CTA with rings of so many stages."""
    tile_h, tile_w = config.tile(shape.height, shape.width, shape.kernel)
    strip = (tile_h + shape.kernel - 1) * tile_w * _ROW_BYTES
    handed = sums = 0
    if config.parts > 1:
        handed = _HANDED_ROWS * (config.block_out + _HANDED_PAD) * 4 + 16
    elif config.turns:
        handed = 16
    if shape.pool:
        sums = _CONSUMER_WARPS * (config.block_out if config.parts == 1 else 32 * 8) * 4
    return strips * (strip + 16) + weights * (config.block_out * _ROW_BYTES + 16) + sums + handed


def terms_of(shape: Shape) -> int:
    """Of the sum of an output, in taps of :func:`chunk` input channels."""
    return -(-shape.c_in // chunk(shape.itemsize)) * shape.kernel**2


def _parts(config: Config, shape: Shape) -> list[tuple[int, int]]:
    """First term of each part, and the one after its last; terms_of() of layout.h."""
    terms = terms_of(shape)
    return [
        (i * terms // config.parts, (i + 1) * terms // config.parts) for i in range(config.parts)
    ]


def _channels(shape: Shape, term: int, taps: int) -> int:
    """Input channels that there are of the chunk of a term, of which a chunk has ``taps``."""
    each = chunk(shape.itemsize)
    return min(each, shape.c_in - term // taps * each)


def _depth(shape: Shape, channels: int) -> int:
    """WGMMAs along so many input channels."""
    return -(-channels * shape.itemsize // _STEP_BYTES)


def _multiplied(shape: Shape) -> int:
    """Input channels: the last chunk multiplies whole WGMMAs."""
    return _depth(shape, shape.c_in) * _STEP_BYTES // shape.itemsize


def work(config: Config, shape: Shape, ctas: int) -> Work:
    """Of a layer on at most ``ctas`` CTAs, one a processor."""
    kernel = shape.kernel
    tile_h, tile_w = config.tile(shape.height, shape.width, kernel)
    down, across = config.cluster
    groups = -(-shape.c_out // (config.block_out * across))
    rectangles = shape.batch * tiles_of(shape.height, shape.width, (tile_h, tile_w))
    passes = -(-rectangles // down) * groups  # Of clusters.
    clusters = min(max(ctas // config.size, 1), passes)
    tiles = passes * down * across
    stages = terms_of(shape)
    taken = _taken(config, shape, _RESIDENT_STRIPS, stages)
    resident = groups == config.parts == 1 and stages <= _MAX_RESIDENT and taken <= _SHARED_LIMIT
    # Of a tile: channels of all its strips, where parts meet within a column twice.
    strips = sum(
        _channels(shape, column, kernel)
        for first, end in _parts(config, shape)
        for column in range(first // kernel, -(-end // kernel))
    )
    rows_x = down * (tile_h + kernel - 1) * tile_w * strips
    rows_w = across * kernel**2 * config.block_out * shape.c_in
    rows = passes * rows_x + (clusters if resident else passes) * rows_w
    fetched = shape.itemsize * rows
    flop = 2 * tiles * config.pixels * config.block_out * kernel**2 * _multiplied(shape)
    steps = [
        sum(_depth(shape, _channels(shape, term, kernel**2)) for term in range(*part))
        for part in _parts(config, shape)
    ]
    busy = passes * config.size / (-(-passes // clusters) * ctas)
    return Work(tiles, flop, fetched, resident, busy, sum(steps) / len(steps) / max(steps))


# --------------------------------------------------------------------------------------
# Splits
# --------------------------------------------------------------------------------------

SPLITS = 3
"""At most so many are on offer for a layer."""

_WORTH = 1.1
"""How much more of the processors' time than without, at least, they multiply."""


def _has_parts(pixels: int, block: int, itemsize: int) -> bool:
    if itemsize == 1:
        return block * (pixels // 128 + 1) < _MOST_REGISTERS
    return pixels * block <= _MOST_SUMS


def _all_splits(c_out: int, itemsize: int) -> Iterator[Config]:
    """Whatever parts there are."""
    if _none(c_out, itemsize):
        return
    for pixels, blocks in _BLOCKS[itemsize].items():
        for block in blocks:
            padded = -(-c_out // block) * block
            if not _has_parts(pixels, block, itemsize):
                continue
            if block != _block(c_out, blocks) and (block < _WIDE or padded > _PADDING * c_out):
                continue
            for down in (1, 2):
                for parts in range(2, _MAX_CLUSTER // down + 1):
                    yield Config(pixels, block, (down, 1), parts)


def useful(config: Config, shape: Shape, processors: int) -> float:
    """Products that there are over what all processors can do until the last CTA is done."""
    found = work(config, shape, processors)
    products = shape.batch * shape.height * shape.width * shape.c_out * shape.kernel**2
    products *= _multiplied(shape)
    return found.busy * found.even * 2 * products / found.flop


def has_room(config: Config, shape: Shape) -> bool:
    """Whether the parts of a tile have something to sum up each, and room to run ahead."""
    taken = _taken(config, shape, _STRIPS[shape.kernel], _WEIGHTS)
    few = _has_parts(config.pixels, config.block_out, shape.itemsize) and not config.turns
    return few and config.parts <= terms_of(shape) and taken <= _SHARED_LIMIT


@functools.lru_cache(1 << 10)
def splits(shape: Shape, processors: int) -> tuple[Config, ...]:
    """For a map that is too small for its tiles to keep the processors busy; the best first.

    Those that leave the least of the processors' time unused, and of them that which L2 holds up
    least, if it is less than without.
    """
    whole = configs(shape.c_out, shape.kernel, shape.itemsize)
    if not whole:
        return ()
    least = _WORTH * max(useful(config, shape, processors) for config in whole)
    found = {}
    for config in _all_splits(shape.c_out, shape.itemsize):
        if has_room(config, shape):
            found[config] = useful(config, shape, processors)

    def intensity(config: Config) -> float:
        return work(config, shape, processors).intensity

    best = sorted(found, key=lambda c: (found[c], intensity(c), -c.parts), reverse=True)
    best = [config for config in best if found[config] >= least]
    enough = ENOUGH * 2 / shape.itemsize
    fed = sorted(best, key=lambda c: min(found[c], intensity(c) / enough), reverse=True)
    return tuple(dict.fromkeys((*best[: SPLITS - 1], *fed[:1])))


@functools.lru_cache(1 << 10)
def config_of(name: str, c_out: int, kernel: int, itemsize: int = 2) -> Config | None:
    """Which tiles an engine's name says, or None: a layer with these channels has none such."""
    known = (*configs(c_out, kernel, itemsize), *_all_splits(c_out, itemsize))
    return next((config for config in known if config.name == name), None)
