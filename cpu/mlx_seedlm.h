// The SeedLM part of mlxeff._native.
#pragma once
#include <nanobind/nanobind.h>

void bind_seedlm(nanobind::module_& m);
