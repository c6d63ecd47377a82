// Runs one launch: the working directory holds the file `launch` and one file a buffer; those of the outputs are
// rewritten.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "grid.h"

namespace metal_on_cpu {
namespace {

void* read_file(const char* name, size_t bytes) {
  void* data = malloc(bytes);
  FILE* file = fopen(name, "rb");
  if (file == nullptr || fread(data, 1, bytes, file) != bytes) fail("buffer %s: wanted %zu bytes", name, bytes);
  fclose(file);
  return data;
}

void write_file(const char* name, const void* data, size_t bytes) {
  FILE* file = fopen(name, "wb");
  if (file == nullptr || fwrite(data, 1, bytes, file) != bytes || fclose(file) != 0) fail("cannot write %s", name);
}

struct Buffer {
  size_t bytes, origin;  // origin: of the first element, after bytes that negative strides reach
  int written;
  unsigned char* data;
};

struct Launch {
  Triple grid, threadgroup;
  int descending;
  std::vector<Buffer> buffers;
};

Launch read_launch() {
  Launch launch{};
  Triple &g = launch.grid, &t = launch.threadgroup;
  FILE* file = fopen("launch", "r");
  int count = 0;
  if (file == nullptr ||
      fscanf(file, "%u %u %u %u %u %u %d %d", &g.x, &g.y, &g.z, &t.x, &t.y, &t.z, &launch.descending, &count) != 8)
    fail("the file `launch` is missing or damaged");
  for (int i = 0; i < count; i++) {
    Buffer buffer{};
    if (fscanf(file, "%zu %zu %d", &buffer.bytes, &buffer.origin, &buffer.written) != 3) fail("launch: buffer %d", i);
    buffer.data = static_cast<unsigned char*>(read_file(std::to_string(i).c_str(), buffer.bytes));
    launch.buffers.push_back(buffer);
  }
  fclose(file);
  return launch;
}

void run(const Launch& launch) {
  if (volume(launch.grid) == 0) return;
  if (volume(launch.threadgroup) > max_threads)
    fail("a threadgroup of %zu threads: at most %u", size_t(volume(launch.threadgroup)), max_threads);
  Triple nominal = minimum(launch.threadgroup, launch.grid);
  Triple groups{divide_up(launch.grid.x, nominal.x), divide_up(launch.grid.y, nominal.y),
                divide_up(launch.grid.z, nominal.z)};
  for (uint32_t z = 0; z < groups.z; z++)
    for (uint32_t y = 0; y < groups.y; y++)
      for (uint32_t x = 0; x < groups.x; x++)
        run_threadgroup({x, y, z}, launch.grid, nominal, groups, launch.descending != 0);
}

}  // namespace
}  // namespace metal_on_cpu

int main() {
  using namespace metal_on_cpu;
  Launch launch = read_launch();
  std::vector<void*> pointers;
  for (Buffer& buffer : launch.buffers) pointers.push_back(buffer.data + buffer.origin);
  begin(pointers.data());
  run(launch);
  end();
  for (size_t i = 0; i < launch.buffers.size(); i++)
    if (launch.buffers[i].written)
      write_file(std::to_string(i).c_str(), launch.buffers[i].data, launch.buffers[i].bytes);
  return 0;
}
