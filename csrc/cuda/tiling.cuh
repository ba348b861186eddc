// Who does what: how the blocks of a launch, and their threads, share pixels and channels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../math.h"
#include "platform.cuh"
#include "vectors.cuh"
#include "views.cuh"

namespace vovnet_fast {
namespace cuda {

// How the blocks of a launch share images, tiles of their pixels, and channels.
struct Share {
  int64_t first;  // channel
  int vectors;    // of channels, from there on
  int groups;     // blocks that share them
  int64_t tiles;  // of the pixels of an image
  int tile;       // pixels of each, but for the last
  int64_t images;

  int64_t blocks() const { return images * tiles * groups; }
};

// Pixels of a part where scratch has room for so many parts of an image: of the last ones there may
// be fewer pixels, or none at all, and then no part. 0 where an image has no pixels.
inline int64_t tile_of_parts(const char* op, Size size, int64_t parts) {
  if (size.pixels() > 0 && parts < 1) {
    throw std::invalid_argument(std::string(op) +
                                ": parts must be what reduction_parts says, got " +
                                std::to_string(parts));
  }
  return size.pixels() > 0 ? ceil_div(size.pixels(), parts) : 0;
}

// How many parts an image then has.
inline int64_t parts_of(Size size, int64_t tile) {
  return tile > 0 ? ceil_div(size.pixels(), tile) : 0;
}

// What a thread does of it: its channels, and pixels `first + threadIdx.y + k * blockDim.y`.
struct Job {
  int64_t n, tile;
  int64_t c;        // its first channel
  bool active;      // whether there are channels for it
  int first, last;  // pixels of its tile
};

// Blocks that differ in channels only are neighbours: what they share is then found in L2.
template <int V>
VF_DEVICE Job job_of(const Share& share, int pixels, int64_t block) {
  const int64_t image_tile = block / share.groups;
  const int group = static_cast<int>(block - image_tile * share.groups);
  const int vector = group * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
  Job job;
  job.n = image_tile / share.tiles;
  job.tile = image_tile - job.n * share.tiles;
  job.c = share.first + static_cast<int64_t>(vector) * V;
  job.active = vector < share.vectors;
  const int64_t first = job.tile * share.tile;
  job.first = static_cast<int>(first < pixels ? first : pixels);
  job.last = pixels - job.first < share.tile ? pixels : job.first + share.tile;
  return job;
}

// The first channel of a thread's block, and how many of the share's vectors there are from it on.
template <int V>
VF_DEVICE int64_t first_channel(const Job& job) {
  return job.c - static_cast<int64_t>(threadIdx.x) * V;
}

template <int V>
VF_DEVICE int vectors_left(const Share& share, const Job& job) {
  return share.vectors - static_cast<int>((first_channel<V>(job) - share.first) / V);
}

constexpr int kMaxVectors = 32;  // Of the threads of a block, along the channels.

// Threads of a block, along channels and pixels, for so many vectors of channels. Blocks have
// whole numbers of vectors, as equal as possible, so that few threads are without work.
inline dim3 block_for(int64_t vectors) {
  const int64_t x = ceil_div(vectors, ceil_div(vectors, kMaxVectors));
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(kThreads / x), 1);
}

// Shares so many vectors of channels, from `first` on, and tiles of so many pixels.
inline Share share_of(int64_t images, int pixels, int64_t first, int64_t vectors, int64_t tile) {
  Share share;
  share.first = first;
  share.vectors = static_cast<int>(vectors);
  share.groups = static_cast<int>(ceil_div(vectors, block_for(vectors).x));
  share.tile = static_cast<int>(tile);
  share.tiles = ceil_div(pixels, tile);
  share.images = images;
  return share;
}

// Pixels of a tile where nothing asks for a number of them: a block takes `step` of them at a time,
// several times if so many blocks are there that the device is busy all the same.
inline int64_t tile_for(int64_t images, int pixels, int64_t vectors, int64_t step) {
  constexpr int64_t kEnough = 2048, kMost = 8;
  const int64_t blocks = share_of(images, pixels, 0, vectors, step).blocks();
  return step * std::clamp(blocks / kEnough, int64_t{1}, kMost);
}

template <int V>
using Vectors = std::integral_constant<int, V>;

// Calls launch(Vectors<V>, first channel, number of vectors): for all channels that make whole
// vectors, if `fit`, and for the rest one by one.
template <class T, class Launch>
void for_channels(int64_t c, bool fit, Launch launch) {
  const int64_t whole = fit ? c / kVector<T> * kVector<T> : 0;
  if constexpr (kVector<T> > 1) {
    if (whole > 0) launch(Vectors<kVector<T>>{}, int64_t{0}, whole / kVector<T>);
  } else {
    if (whole > 0) launch(Vectors<1>{}, int64_t{0}, whole);
  }
  if (whole < c) launch(Vectors<1>{}, whole, c - whole);
}

}  // namespace cuda
}  // namespace vovnet_fast
