// usable_cpus(): the number of CPUs that this process may use, at least 1. On Linux it is the smaller of the size of
// the affinity mask and the CPU quota of the cgroup; on macOS it is the number of performance cores.
#pragma once
#include <unistd.h>

#include <cmath>
#include <fstream>
#include <string>
#if defined(__linux__)
#include <sched.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace mlxeff {
namespace {

#if defined(__linux__)
int affinity_cpus() {
  for (int cpus = 1024; cpus <= 1 << 16; cpus *= 2) {  // Linux rejects a mask smaller than its own
    cpu_set_t* mask = CPU_ALLOC(cpus);
    const size_t size = CPU_ALLOC_SIZE(cpus);
    const int found = sched_getaffinity(0, size, mask) == 0 ? CPU_COUNT_S(size, mask) : 0;
    CPU_FREE(mask);
    if (found > 0) return found;
  }
  return 1;
}

double read_quota(const std::string& folder) {
  std::string quota;
  double period = 0;
  std::ifstream v2(folder + "/cpu.max");
  if (v2 >> quota >> period && quota != "max" && period > 0) return std::atof(quota.c_str()) / period;
  double limit = 0;
  std::ifstream v1_quota(folder + "/cpu.cfs_quota_us"), v1_period(folder + "/cpu.cfs_period_us");
  if (v1_quota >> limit && v1_period >> period && limit > 0 && period > 0) return limit / period;
  return INFINITY;
}

// The smallest CPU quota, in CPUs, of this process's cgroup and its ancestors. `root` is a prefix for all paths, so
// that a test can supply its own files.
double cgroup_cpus(const std::string& root = "") {
  double least = INFINITY;
  std::ifstream groups(root + "/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {  // "0::/path" (v2) or "4:cpu,cpuacct:/path" (v1)
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const bool v2 = controllers == ",,";
    if (!v2 && controllers.find(",cpu,") == std::string::npos) continue;
    const std::string mount = root + (v2 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/cpu");
    std::string path = line.substr(second + 1);
    while (true) {
      least = std::fmin(least, read_quota(mount + path));
      const size_t slash = path.rfind('/');
      if (slash == std::string::npos || path.empty()) break;
      path.resize(slash);
    }
  }
  return least;
}

int usable_cpus() { return int(std::fmax(1, std::fmin(affinity_cpus(), std::ceil(cgroup_cpus())))); }
#elif defined(__APPLE__)
int usable_cpus() {
  int cores = 0;
  size_t size = sizeof cores;
  if (sysctlbyname("hw.perflevel0.physicalcpu", &cores, &size, nullptr, 0) == 0 && cores > 0) return cores;
  return int(std::fmax(1, double(sysconf(_SC_NPROCESSORS_ONLN))));
}
#else
int usable_cpus() { return int(std::fmax(1, double(sysconf(_SC_NPROCESSORS_ONLN)))); }
#endif

}  // namespace
}  // namespace mlxeff
