// Checks of the number of CPUs that a cgroup's quota leaves, on folders laid out like the kernel's.
#pragma once
#include "base/cpu_count.h"
#include "checks.h"

#if defined(__linux__)
#include <sys/stat.h>
#include <unistd.h>

#include <fstream>

class FakeRoot {
 public:
  FakeRoot() {
    char name[] = "/tmp/mlxeff-cgroup-XXXXXX";
    CHECK(mkdtemp(name));
    root_ = name;
  }
  ~FakeRoot() { CHECK(std::system(("rm -r " + root_).c_str()) == 0); }
  const std::string& path() const { return root_; }

  void write(const std::string& file, const std::string& text) const {
    const std::string full = root_ + file;
    for (size_t slash = full.find('/', root_.size() + 1); slash != std::string::npos; slash = full.find('/', slash + 1))
      mkdir(full.substr(0, slash).c_str(), 0700);
    std::ofstream(full) << text << "\n";
  }

 private:
  std::string root_;
};

inline void check_cpu_count() {
  CHECK(mlxeff::usable_cpus() >= 1 && mlxeff::usable_cpus() <= mlxeff::affinity_cpus());
  const FakeRoot none, unified, legacy;
  CHECK(std::isinf(mlxeff::cgroup_cpus(none.path())));
  unified.write("/proc/self/cgroup", "0::/outer/inner");
  CHECK(std::isinf(mlxeff::cgroup_cpus(unified.path())));
  unified.write("/sys/fs/cgroup/outer/inner/cpu.max", "max 100000");
  CHECK(std::isinf(mlxeff::cgroup_cpus(unified.path())));
  unified.write("/sys/fs/cgroup/outer/cpu.max", "150000 100000");
  CHECK(mlxeff::cgroup_cpus(unified.path()) == 1.5);
  unified.write("/sys/fs/cgroup/outer/inner/cpu.max", "50000 100000");
  CHECK(mlxeff::cgroup_cpus(unified.path()) == 0.5);
  legacy.write("/proc/self/cgroup", "5:memory:/elsewhere\n4:cpu,cpuacct:/box");
  legacy.write("/sys/fs/cgroup/cpu/elsewhere/cpu.cfs_quota_us", "1000");
  legacy.write("/sys/fs/cgroup/cpu/elsewhere/cpu.cfs_period_us", "100000");
  legacy.write("/sys/fs/cgroup/cpu/box/cpu.cfs_quota_us", "-1");
  legacy.write("/sys/fs/cgroup/cpu/box/cpu.cfs_period_us", "100000");
  CHECK(std::isinf(mlxeff::cgroup_cpus(legacy.path())));
  legacy.write("/sys/fs/cgroup/cpu/box/cpu.cfs_quota_us", "300000");
  CHECK(mlxeff::cgroup_cpus(legacy.path()) == 3);
}
#else
inline void check_cpu_count() { CHECK(mlxeff::usable_cpus() >= 1); }
#endif
