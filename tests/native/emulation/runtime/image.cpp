// SPDX-License-Identifier: Apache-2.0
#include "image.h"

#include <cxxabi.h>
#include <elf.h>
#include <link.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>

namespace emulation {
namespace {

struct Image {
  uintptr_t base = 0;
  std::string path;
};

struct Symbol {
  unsigned type;
  uintptr_t address;
  size_t size;
  std::string name;
};

struct Search {
  uintptr_t address;
  Image found;
};

int find_image(dl_phdr_info* info, size_t, void* context) {
  Search& search = *static_cast<Search*>(context);
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr) & header = info->dlpi_phdr[i];
    const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
    if (header.p_type != PT_LOAD || search.address < begin ||
        search.address >= begin + header.p_memsz) {
      continue;
    }
    // The program itself has no name.
    search.found = {info->dlpi_addr, *info->dlpi_name ? info->dlpi_name : "/proc/self/exe"};
    return 1;
  }
  return 0;
}

std::vector<Symbol> read_symbols(const Image& image) {
  std::ifstream file(image.path, std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  std::vector<Symbol> symbols;
  if (bytes.size() < sizeof(ElfW(Ehdr))) return symbols;
  const auto* const elf = reinterpret_cast<const ElfW(Ehdr)*>(bytes.data());
  const auto* const sections = reinterpret_cast<const ElfW(Shdr)*>(bytes.data() + elf->e_shoff);
  for (int s = 0; s < elf->e_shnum; ++s) {
    if (sections[s].sh_type != SHT_SYMTAB) continue;
    const char* const names = bytes.data() + sections[sections[s].sh_link].sh_offset;
    const auto* const first =
        reinterpret_cast<const ElfW(Sym)*>(bytes.data() + sections[s].sh_offset);
    for (const auto* symbol = first; symbol < first + sections[s].sh_size / sizeof(*first);
         ++symbol) {
      const unsigned type = ELF64_ST_TYPE(symbol->st_info);
      if (symbol->st_shndx == SHN_UNDEF || (type != STT_FUNC && type != STT_OBJECT)) continue;
      symbols.push_back(
          {type, image.base + symbol->st_value, symbol->st_size, names + symbol->st_name});
    }
  }
  return symbols;
}

const std::vector<Symbol>& symbols_around(const void* address) {
  static std::map<std::string, std::vector<Symbol>> images;
  Search search = {reinterpret_cast<uintptr_t>(address), {}};
  dl_iterate_phdr(find_image, &search);
  const auto known = images.find(search.found.path);
  if (known != images.end()) return known->second;
  return images[search.found.path] = read_symbols(search.found);
}

std::string demangled(const std::string& symbol) {
  int status = 0;
  char* name = abi::__cxa_demangle(symbol.c_str(), nullptr, nullptr, &status);
  const std::string result = status == 0 ? name : symbol;
  std::free(name);
  return result;
}

// Whether a variable is local to the function, or to a lambda in it: _ZZ <function> E <name>.
bool is_local_to(const std::string& variable, const std::string& function) {
  if (variable.compare(0, 3, "_ZZ") != 0) return false;
  const size_t at = variable.find_first_not_of('Z', 2);
  const std::string scope = function.substr(2) + "E";
  return at != std::string::npos && variable.compare(at, scope.size(), scope) == 0;
}

KernelSymbols find_kernel(const void* kernel) {
  KernelSymbols found;
  const std::vector<Symbol>& symbols = symbols_around(kernel);
  for (const Symbol& function : symbols) {
    if (function.type != STT_FUNC || function.address != reinterpret_cast<uintptr_t>(kernel)) {
      continue;
    }
    found.known = true;
    found.name = demangled(function.name);
    for (const Symbol& variable : symbols) {
      if (variable.type != STT_OBJECT || !is_local_to(variable.name, function.name)) continue;
      found.shared.push_back({reinterpret_cast<char*>(variable.address), variable.size});
      found.shared_bytes += variable.size;
    }
    return found;
  }
  return found;
}

}  // namespace

const KernelSymbols& kernel_symbols(const void* kernel) {
  static std::map<const void*, KernelSymbols> kernels;
  const auto known = kernels.find(kernel);
  if (known != kernels.end()) return known->second;
  return kernels[kernel] = find_kernel(kernel);
}

}  // namespace emulation
