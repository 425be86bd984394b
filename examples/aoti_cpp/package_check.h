// What a package needs of the machine, checked before its code is loaded.
#pragma once

#include <string>
#include <unordered_map>
#include <vector>

namespace package_check {

using Metadata = std::unordered_map<std::string, std::string>;

// The value stored under a key, or "" where there is none.
std::string get(const Metadata& metadata, const std::string& key);

// Loads a shared library of operators into the process. Throws std::runtime_error.
void load_library(const std::string& path);

// Throws std::runtime_error, with a message for the user, if this machine cannot run the model:
// it was compiled for another architecture, or calls operators that nobody has loaded.
// `device_index` is the GPU that is meant.
void check(const Metadata& metadata, int device_index = 0);

}  // namespace package_check
